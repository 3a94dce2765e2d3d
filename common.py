"""What every training loop stands on: indexed randomness, ranks, AdamW of a stack, averages of weights.

A stack of M students is the leading dimension [M, ...] of every tensor. Every draw is a function of (seed, stage, K, k,
step, purpose): nothing has to be stored to resume, and a student's stream does not depend on who trains beside it.
Not here: run folders and checkpoints (run.py).
"""
import copy
import hashlib
import math
import operator
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flags import UserError


# ---- randomness

@dataclass(frozen=True)
class Student:
    """Student k of K, of the run with this seed: it answers for the classes Y_k."""
    seed: int
    K: int
    k: int
    classes: tuple[int, ...]
    start: object = field(default=None, compare=False)  # what its next stage starts from: students.Start

    def __str__(self):
        return f"student {self.k} of {self.K}, seed {self.seed}"


def generator(*key, device="cpu") -> torch.Generator:
    """Its stream is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """Random numbers of one stage, [M, ...]; each row is keyed by its own student alone."""

    def __init__(self, stage: str, students: list[Student], device="cpu"):
        self.stage, self.students, self.device = stage, students, device
        self.classes = [torch.tensor(s.classes, device=device) for s in students]

    def generators(self, step: int, purpose: str) -> list[torch.Generator]:
        return [generator(s.seed, self.stage, s.K, s.k, step, purpose, device=self.device) for s in self.students]

    def stack(self, draw, step: int, purpose: str, *args) -> Tensor:
        return torch.stack([draw(*args, generator=g, device=self.device) for g in self.generators(step, purpose)])

    def normal(self, step: int, purpose: str, *shape: int) -> Tensor:
        return self.stack(torch.randn, step, purpose, shape)

    def uniform(self, step: int, purpose: str, *shape: int) -> Tensor:
        return self.stack(torch.rand, step, purpose, shape)

    def label(self, step: int, purpose: str, batch: int) -> Tensor:
        """[M, batch], uniform over each student's own classes."""
        return torch.stack([c[torch.randint(len(c), (batch,), generator=g, device=self.device)]
                            for c, g in zip(self.classes, self.generators(step, purpose))])


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one update: b rows of what is drawn for all, so that ranks do not change the noise."""
    draws: Draws
    step: int
    size: int  # of the whole batch
    shape: tuple  # of a sample
    part: slice
    of: str = "{}"  # how purposes are called, such as "fake {} 0"

    def label(self) -> Tensor:
        """[M, b], uniform over each student's own classes Y_k."""
        return self.draws.label(self.step, self.of.format("label"), self.size)[:, self.part]

    def normal(self, purpose: str, *n: int, shape: tuple | None = None) -> Tensor:
        """[M, b, *n, *shape], by default a sample's shape."""
        shape = self.shape if shape is None else shape
        return self.draws.normal(self.step, self.of.format(purpose), self.size, *n, *shape)[:, self.part]

    def uniform(self, purpose: str, *n: int) -> Tensor:
        """[M, b, *n], on 0 … 1."""
        return self.draws.uniform(self.step, self.of.format(purpose), self.size, *n)[:, self.part]

    def once(self, purpose: str) -> Tensor:
        """[M]: one uniform draw for a student's whole batch."""
        return self.draws.uniform(self.step, self.of.format(purpose))

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """[M, b], uniform on low … high, both drawn."""
        purpose = self.of.format(purpose)
        return self.draws.stack(torch.randint, self.step, purpose, low, high + 1, (self.size,))[:, self.part]


def latents(seeds, shape) -> Tensor:
    """Unit-variance latents [len(seeds), *shape]: each a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=generator("latent", operator.index(s))) for s in seeds])


# ---- ranks

PATIENCE = timedelta(days=30)  # ranks that have finished wait for the others


class Ranks:
    """The processes that train a student together, each on its slice of the batch."""

    def __init__(self, members: list[int] | None = None, group=None, device="cpu"):
        members = members or [0]
        self.size, self.group, self.device = len(members), group, device
        self.rank = members.index(dist.get_rank()) if self.size > 1 else 0

    def parts(self, batch: int, micro: int = 0) -> list[slice]:
        """This rank's slices of a batch, of `micro` samples each (0: one slice). UserError if they don't divide."""
        share, rest = divmod(batch, self.size)
        if rest or not share:
            raise UserError(f"a batch of {batch} cannot be shared by {self.size} ranks")
        micro = min(micro or share, share)
        if share % micro:
            raise UserError(f"--micro-batch {micro}: must divide a rank's {share} samples")
        return [slice(i, i + micro) for i in range(self.rank * share, (self.rank + 1) * share, micro)]

    def share(self, number: int) -> list[int]:
        """This rank's part of 0..number-1: every size-th."""
        return list(range(self.rank, number, self.size))

    def add_gradients(self, net: nn.Module) -> None:
        """Sum over the ranks, each already divided by the whole batch."""
        if self.size > 1:
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            for work in [dist.all_reduce(g, group=self.group, async_op=True) for g in grads]:
                work.wait()

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, flag: bool) -> bool:
        """Does one of the ranks say so?"""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Tensor) -> Tensor:
        """The ranks' tensors, of equal shape, joined along the first dimension."""
        if self.size == 1:
            return value
        value = value.contiguous()
        out = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(out, value, group=self.group)
        return torch.cat(out)

    def first(self, function):
        """What function() returns on the first rank, for all: of files, two ranks may see different states."""
        value = [function() if self.rank == 0 else None]
        if self.size > 1:
            first = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(value, src=first, group=self.group, device=self.device)
        return value[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def split(self, units: int) -> tuple[list[int], "Ranks"]:
        """Share out `units` trainings: (those of this rank, the ranks that it trains them with). All ranks call it.

        Each gets equally many ranks; fewer ranks take them in turn. UserError if there are more, but no multiple."""
        if self.size < units:
            return self.share(units), Ranks(device=self.device)
        each, rest = divmod(self.size, units)
        if rest:
            raise UserError(f"{self.size} ranks for {units} students: start {units * each} or another multiple")
        lists = [list(range(u, u + each)) for u in range(0, self.size, each)]
        groups = [dist.new_group(m, timeout=PATIENCE) if each > 1 and units > 1 else self.group for m in lists]
        mine = self.rank // each
        return [mine], Ranks(lists[mine], groups[mine], self.device)


def leave(ranks: Ranks) -> None:
    """The end of all ranks, together: torchrun ends all when one ends badly."""
    if ranks.size > 1:
        ranks.wait()
        dist.destroy_process_group()
        time.sleep(0.5)  # gloo's threads end badly if the process is gone before them


def world(device: torch.device) -> Ranks:
    """All ranks that torchrun started; a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1:
        return Ranks(device=device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(list(range(size)), dist.group.WORLD, device)


# ---- updates

def fingerprint(net: nn.Module) -> str:
    """A hash of every weight: equal before and after means frozen."""
    h = hashlib.sha256()
    for name, value in net.state_dict().items():
        h.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def learning_rate(base: float, step: int, steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, or linear or cosine to zero at `steps`."""
    left = {"constant": 1.0, "linear": 1 - step / steps, "cosine": 0.5 + 0.5 * math.cos(math.pi * step / steps)}[decay]
    return base * min(1.0, (step + 1) / max(1, warmup)) * left


@torch.no_grad()
def ema_update(ema: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average; its memory is shorter in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


@torch.no_grad()
def clip_gradients(net: nn.Module, max_norm: float, students: int) -> None:
    """Scale each student's own gradient to an l2 norm of at most max_norm; 0 = off."""
    if not max_norm:
        return
    grads = [p.grad.view(students, -1) for p in net.parameters() if p.grad is not None]
    norm = sum(g.square().sum(1) for g in grads).sqrt()  # [M]
    scale = (max_norm / (norm + 1e-12)).clamp(max=1)
    for g in grads:
        g.mul_(scale[:, None])


WEIGHT_DECAY = 0.01  # AdamW's own default, as in DMD


class AdamW:
    """AdamW of M students, which share nothing: losses per sample in, one update out."""

    def __init__(self, net: nn.Module, run, betas=(0.9, 0.999), clip_norm: float = 0.0):
        self.net, self.run, self.clip_norm, self.loss = net, run, clip_norm, 0.0
        self.adamw = torch.optim.AdamW(net.parameters(), betas=betas, weight_decay=WEIGHT_DECAY, fused=True)
        self.state_dict, self.load_state_dict = self.adamw.state_dict, self.adamw.load_state_dict

    def backward(self, losses: Tensor) -> None:
        """Add the gradient of a micro-batch's losses [M, b]: mean over the whole batch, sum over students."""
        self.add(losses.sum(-1) / self.run.batch)

    def add(self, loss: Tensor) -> None:
        """Add the gradient of a loss [M] that is such a mean already."""
        loss.sum().backward()
        self.loss = self.loss + loss.detach()

    def step(self, step: int, lr: float) -> Tensor:
        """The update; returns the loss [M] of all ranks. UserError if it is not finite."""
        loss = self.run.check(step, self.loss)
        self.run.ranks.add_gradients(self.net)
        clip_gradients(self.net, self.clip_norm, len(loss))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        self.loss = 0.0
        return loss


class Average:
    """The weights that are kept: an exponential moving average `now`, and each student's `best` of it.

    select(net) -> [M]: the distance by which that is chosen, in metrics.csv as select.name; it leaves some of what it
    judged, select.seen [M, n, *shape]."""

    def __init__(self, net: nn.Module, decay: float, select=None):
        self.net, self.decay, self.select = net, decay, select
        self.now = copy.deepcopy(net).requires_grad_(False)
        self.best = copy.deepcopy(self.now) if select else None
        self.record = {"distance": torch.full((len(select.students),), math.inf), "seen": []} if select else {}

    def state(self) -> dict:
        """For a checkpoint."""
        return {"ema": self.now, **({"best": self.best, "record": self.record} if self.select else {})}

    def update(self, step: int) -> None:
        ema_update(self.now, self.net, self.decay, step)

    @torch.no_grad()
    def choose(self, run, step: int, every: int) -> None:
        """Every so many steps, and at the end: copy into `best` the students whose distance is the lowest so far."""
        if step % every and step < run.length:
            return
        flops = run.flops
        distance = self.select(self.now)  # [M]
        run.flops = flops  # choosing is no training
        better = distance < self.record["distance"]
        self.record["distance"] = torch.where(better, distance, self.record["distance"])
        for b, e in zip(self.best.parameters(), self.now.parameters()):
            chosen = better.to(b.device).reshape(-1, *[1] * (b.ndim - 1))  # a stack of one: all or nothing
            b.copy_(torch.where(chosen, e, b))
        self.record["seen"] += [self.select.seen]
        run.log(step, **{self.select.name: distance})
