"""Plumbing that no paper talks about: flags, indexed randomness, EMA, run folders, resume. Skip it on first reading.

A library: it imports nothing of ours, takes no callback and defines no base class. Stage files call it; it never calls them.

  flags        `flag`, `parse`, `describe`: one dataclass field is one command-line flag; flag beats preset beats default
  randomness   `generator`, `Draws`: every draw is keyed by (seed, stage, students, student, step, purpose), so nothing has
               to be stored to resume, and a student's stream does not depend on who trains beside it
  stacks       `Member`: one student of a stack; a stack of M members is the leading dimension [M, ...] of every tensor
  ranks        `Ranks`: the processes of torchrun; a student's own ranks share its batch and average its gradients
  run folders  `Stage`: config.json, metrics.csv, state.pt, state.prev.pt, ema.pt, best.pt; atomic, resumable bit for bit
"""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
import types
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: `command` prints it as one line and exits with code 2."""


def command(main):
    """Decorator of every `main(argv=None)`: a UserError becomes one line and exit code 2, Ctrl-C a line and 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if dist.is_initialized():
                os._exit(2)                                         # the engine's threads, without their peers, would end it as a crash
            raise SystemExit(2) from None
        except torch.OutOfMemoryError:
            print("error: the GPU's memory is full; --micro-batch N halves it when N is half of what it was (now: all of a "
                  "rank's share of --batch), with the same result", file=sys.stderr)
            raise SystemExit(2) from None
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error):
                raise
            print("error: not enough memory on this machine; a smaller --batch (of each stage: --help), or --micro-batch N", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on where its last checkpoint stands:\n  "
                  + shlex.join([sys.executable, *sys.argv]), file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            raise SystemExit(1) from None
    return wrapped


# ------------------------------------------------------------------------------------------------------------- flags

def flag(default, help: str, stage: str = "", choices=None, low=None, later: bool = False):
    """A dataclass field that becomes `--name`. `stage` names the stage folder whose result it determines ("" = none).

    choices: the only values allowed; low: the smallest number allowed (nan and infinity never are); later: not written into
    config.json while it has its default, so that folders from before there was this flag stay valid."""
    meta = {"help": help, "stage": stage, "choices": choices, "low": low, "later": later}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def option(name: str) -> str:
    """The flag of a field: --teacher-steps; a symbol keeps its paper's spelling: --P_mean."""
    return "--" + (name if name[0].isupper() else name.replace("_", "-"))


def suffix(tag: str) -> str:
    """--tag as the end of a name: "" or "-tag"."""
    return f"-{tag}" if tag else ""


def check_tag(name: str, tag: str) -> None:
    """--tag and --against become parts of file names. UserError if they are more than letters, digits, _, . and -."""
    if not all(c.isalnum() or c in "_.-" for c in tag) or ".." in tag or len(tag) > 80:
        raise UserError(f"{name} {tag[:80]}: letters, digits, _, . and - only, at most 80")


def near(word: str, words) -> str:
    """The words that sound like it, to end an error message with: "; did you mean …?", or nothing."""
    close = difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):                                       # one line instead of the usage text
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        hint = near(unknown, self._option_string_actions) if unknown.startswith("-") else ""
        raise UserError(message + hint + " (--help lists every flag)")


def parse(cls, presets: dict, argv=None, doc: str = ""):
    """Command line -> instance of the dataclass `cls`, with `.source[name]` telling where each value comes from.

    presets: {(dataset, preset): {name: value}}; (dataset, preset, student size) adds to it; "like": the dataset whose values hold
    where its own line is silent. Flag beats preset beats default.
    Raises UserError on any misuse."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, name = hints[f.name], option(f.name)
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        opts = {"help": f"{f.metadata['help']} [{shown}]".replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **opts)
        elif typing.get_origin(kind) is list:
            parser.add_argument(name, type=typing.get_args(kind)[0], nargs="+", **opts,
                                metavar=typing.get_args(kind)[0].__name__)
        else:
            parser.add_argument(name, type=kind, **opts, metavar=kind.__name__)
    given = vars(parser.parse_args(argv))
    for f in dataclasses.fields(cls):
        choices, low = f.metadata["choices"], f.metadata["low"]
        for value in [given.get(f.name)] if low is not None and f.name in given else []:
            if not low <= value < math.inf:
                raise UserError(f"{option(f.name)} {value}: must be a number, at least {low}")
            if isinstance(value, int) and value >= 2 ** 62:
                raise UserError(f"{option(f.name)} {value}: must be below 2^62")
        if choices and f.name in given and given[f.name] not in choices:
            raise UserError(f"{option(f.name)} {given[f.name]}: no such choice"
                            f"{near(given[f.name], choices)} (one of {', '.join(map(str, choices))})")
    plain = cls()
    dataset, preset = (given.get(n, getattr(plain, n, None)) for n in ("dataset", "preset"))
    if (dataset, preset) not in presets:
        names = [key[1] for key in presets if key[0] == dataset and len(key) == 2]
        raise UserError(f"--preset {preset}: not known for {dataset}{near(preset, names)} (one of {', '.join(names)})")
    chosen = {**presets[dataset, preset], **presets.get((dataset, preset, given.get("student_size")), {})}
    if "like" in chosen:
        chosen = {**presets[chosen["like"], preset], **{k: v for k, v in chosen.items() if k != "like"}}
    out = cls(**{**chosen, **given})
    out.source = {f.name: "flag" if f.name in given else f"preset {preset}" if f.name in chosen else "default"
                  for f in dataclasses.fields(cls)}
    return out


def merge(*presets: dict) -> dict:
    """Join the PRESETS of several stage files, key by key."""
    out = {}
    for table in presets:
        for key, values in table.items():
            out[key] = {**out.get(key, {}), **values}
    return out


def describe(flags) -> str:
    """Every flag with its value and source, one line each: the body of --dry-run."""
    rows = []
    for f in dataclasses.fields(flags):
        value = getattr(flags, f.name)
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append(f"  {option(f.name):<18} {shown:<12} {flags.source[f.name]:<17} {f.metadata['help']}")
    return "\n".join(rows)


def stage_config(flags, stage: str) -> dict:
    """Only the flags that determine the result of `stage`."""
    return {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags) if f.metadata["stage"] == stage
            and not (f.metadata["later"] and getattr(flags, f.name) == f.default)}


def device(name: str, threads: int) -> torch.device:
    """--device auto|cpu|cuda|mps, checked; also sets the number of threads (0: as many as there are cores, at most 8)."""
    torch.set_num_threads(threads or max(1, min(8, torch.get_num_threads())))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:               # torchrun: a GPU per rank
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            torch.cuda.set_device(name)
        except (RuntimeError, AssertionError, ValueError):
            raise UserError(f"--device cuda: no GPU for local rank {os.environ['LOCAL_RANK']}; start fewer ranks per node") from None
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


# -------------------------------------------------------------------------------------------------------- randomness

@dataclasses.dataclass(frozen=True)
class Member:
    """One student of a stack: student number `student` of `students`, of the run with this seed, and its classes Y_k."""
    seed: int
    students: int
    student: int
    classes: tuple[int, ...]


def generator(*key, device="cpu") -> torch.Generator:
    """A torch.Generator whose stream is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """Random numbers of one stage for a stack of M members, [M, ...]; each row is keyed by its own member alone."""

    def __init__(self, stage: str, members: list[Member], device="cpu"):
        self.stage, self.members, self.device = stage, members, device
        self.classes = [torch.tensor(m.classes, device=device) for m in members]

    def generators(self, step: int, purpose: str) -> list[torch.Generator]:
        return [generator(m.seed, self.stage, m.students, m.student, step, purpose, device=self.device)
                for m in self.members]

    def normal(self, step: int, purpose: str, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators(step, purpose)])

    def uniform(self, step: int, purpose: str, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators(step, purpose)])

    def integers(self, step: int, purpose: str, low: int, high: int, *shape: int) -> Tensor:
        """Uniform on low..high-1."""
        return torch.stack([torch.randint(low, high, shape, generator=g, device=self.device)
                            for g in self.generators(step, purpose)])

    def label(self, step: int, purpose: str, batch: int) -> Tensor:
        """Labels [M, batch], uniform over each member's own classes Y_k."""
        return torch.stack([c[torch.randint(len(c), (batch,), generator=g, device=self.device)]
                            for c, g in zip(self.classes, self.generators(step, purpose))])


# -------------------------------------------------------------------------------------------------------------- ranks

PATIENCE = timedelta(days=30)              # ranks that have finished wait for others that train: not a sign of trouble


class Ranks:
    """The processes that train one student together: all see the same global batch and take a slice of it each.

    Alone (no torchrun, or one rank per student) it is a group of one and every method does nothing."""

    def __init__(self, members: list[int] | None = None, group=None, device="cpu"):
        members = members or [0]
        self.size, self.group, self.device = len(members), group, device
        self.rank = members.index(dist.get_rank()) if self.size > 1 else 0

    def parts(self, batch: int, micro: int = 0) -> list[slice]:
        """This rank's slices of a global batch, of `micro` samples each (0: one slice). UserError if they don't divide."""
        share, rest = divmod(batch, self.size)
        if rest or not share:
            raise UserError(f"a batch of {batch} cannot be shared by {self.size} ranks; choose a multiple of {self.size}")
        micro = min(micro or share, share)
        if share % micro:
            raise UserError(f"--micro-batch {micro}: must divide the {share} samples that each rank takes of a batch of {batch}")
        return [slice(i, i + micro) for i in range(self.rank * share, (self.rank + 1) * share, micro)]

    def share(self, number: int) -> list[int]:
        """This rank's part of 0..number-1: every size-th."""
        return list(range(self.rank, number, self.size))

    def add_gradients(self, net: torch.nn.Module) -> None:
        """Add up the gradients of all ranks (each already divided by the global batch)."""
        if self.size > 1:                                           # nothing overlaps with the backward pass: readable first
            with _reached():
                for work in [dist.all_reduce(p.grad, group=self.group, async_op=True) for p in net.parameters() if p.grad is not None]:
                    work.wait()

    def total(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        if self.size > 1:
            value = value.detach().clone()
            with _reached():
                dist.all_reduce(value, group=self.group)
        return value

    def any(self, flag: bool) -> bool:
        """Does one of the ranks say so?"""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Tensor) -> Tensor:
        """The ranks' tensors (of equal shape), one after another along the first dimension."""
        if self.size == 1:
            return value
        value = value.contiguous()
        out = [torch.empty_like(value) for _ in range(self.size)]
        with _reached():
            dist.all_gather(out, value, group=self.group)
        return torch.cat(out)

    def first(self, function):
        """What function() returns on the first rank, for all: decisions that are read from files must not differ."""
        value = [function() if self.rank == 0 else None]
        if self.size > 1:
            with _reached():
                dist.broadcast_object_list(value, src=dist.get_global_rank(self.group, 0), group=self.group, device=self.device)
        return value[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def split(self, units: int) -> tuple[list[int], "Ranks"]:
        """Share out `units` independent trainings: (those of this rank, the ranks that it trains them with).

        With at least as many ranks as units, each unit gets as many contiguous ranks as the others; with fewer, units go
        round. Every rank must call it. UserError if the number of ranks is larger, but not a multiple."""
        if self.size < units:
            return self.share(units), Ranks()
        if self.size % units:
            raise UserError(f"{self.size} ranks cannot be shared evenly by {units} students; start {units * (self.size // units)} "
                            f"or a multiple of {units}")
        each = self.size // units
        lists = [list(range(u * each, (u + 1) * each)) for u in range(units)]
        groups = [dist.new_group(m, timeout=PATIENCE) if each > 1 and len(lists) > 1 else self.group for m in lists]
        mine = self.rank // each
        return [mine], Ranks(lists[mine], groups[mine], self.device)


@contextlib.contextmanager
def _reached():
    """A peer that is gone shows as a RuntimeError of the engine: say so in one line instead of hanging or tracing."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"rank {os.environ.get('RANK')}: another rank stopped or cannot be reached "
                        f"({str(error).splitlines()[0][:120]}); its own message says why. The same command goes on where the last "
                        f"checkpoints stand") from None


def leave(ranks: Ranks) -> None:
    """The last thing that every rank does, together: torchrun ends all ranks when one of them ends badly."""
    if ranks.size > 1:
        ranks.wait()
        dist.destroy_process_group()
        time.sleep(0.5)                                             # gloo's threads end badly if the process is gone before them


@contextlib.contextmanager
def alone(folder: Path, ranks: Ranks):
    """One job at a time makes what all jobs of a run folder share; the lock falls with the process that holds it."""
    lock = None
    if ranks.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")
        except OSError as error:
            raise _failed_write(folder, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another job is making what both need; waiting for it …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:                                             # a file system without locks: jobs must be started in turn
            pass
    ranks.wait()
    try:
        yield
    finally:
        if lock:
            lock.close()


def world(device: torch.device) -> Ranks:
    """All ranks that torchrun started (RANK, WORLD_SIZE in the environment); a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(list(range(size)), dist.group.WORLD, device)


# ------------------------------------------------------------------------------------------------ training, in general

def fingerprint(net: torch.nn.Module) -> str:
    """A hash of every weight: equal before and after means frozen."""
    h = hashlib.sha256()
    for name, value in net.state_dict().items():
        h.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


@torch.no_grad()
def ema_update(ema: torch.nn.Module, net: torch.nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights; the first steps use a shorter memory, so that short runs are not noise."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


@torch.no_grad()
def clip_gradients(net: torch.nn.Module, max_norm: float, members: int) -> None:
    """Scale each member's gradient to an l2 norm of at most max_norm; 0 = off. Members never share a norm."""
    if not max_norm:
        return
    grads = [p.grad.view(members, -1) for p in net.parameters() if p.grad is not None]
    norm = sum(g.square().sum(1) for g in grads).sqrt()                                          # [M]
    scale = (max_norm / (norm + 1e-12)).clamp(max=1)
    for g in grads:
        g.mul_(scale[:, None])


def learning_rate(base: float, step: int, steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, or linear or cosine to zero at `steps`."""
    left = {"constant": 1.0, "linear": 1 - step / steps, "cosine": 0.5 + 0.5 * math.cos(math.pi * step / steps)}[decay]
    return base * min(1.0, (step + 1) / max(1, warmup)) * left


def set_learning_rate(optimizer, rate: float) -> None:
    """Of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def verdict(a: list[float], b: list[float]) -> dict:
    """Is a below b? Paired by seed: holds if the mean of b - a exceeds t(0.95, n - 1) standard errors; n >= 2, else only measured."""
    n = len(a)
    if n != len(b) or not n:
        raise ValueError("verdict needs two lists of equal, non-zero length")
    difference = [y - x for x, y in zip(a, b)]
    mean = sum(difference) / n
    if n == 1:
        return {"mean": mean, "error": None, "n": n, "verdict": "measured"}
    error = math.sqrt(sum((d - mean) ** 2 for d in difference) / (n - 1) / n)
    t = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}.get(n, 1.833)
    return {"mean": mean, "error": error, "n": n, "verdict": "holds" if mean > t * error else "does not hold"}


# ------------------------------------------------------------------------------------------------------- run folders

def _failed_write(path: Path, error: Exception) -> UserError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot write {path}: {text}; what was saved before is intact. Free some space or choose another "
                     f"--out, then run the same command again")


def write_atomic(path: Path, write) -> None:
    """`write(temporary_path)`, then rename: the file is old or new, never half. Raises UserError if it can't be written."""
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                        # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True) if os.access(path.parent, os.W_OK) else None
        raise _failed_write(path, error) from None


def save_json(path: Path, value) -> None:
    """Atomically. UserError if it can't be written."""
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=1) + "\n"))


def save_tensors(path: Path, value) -> None:
    """Atomically. UserError if it can't be written."""
    write_atomic(path, lambda t: torch.save(value, t))


def save_state(folder: Path, state: dict) -> None:
    """state.pt becomes state.prev.pt once the new one is whole: at any moment one of the two can be read."""
    path = folder / "state.pt"
    save_tensors(folder / "state.new.pt", state)
    try:
        if path.exists():
            os.replace(path, folder / "state.prev.pt")
        os.replace(folder / "state.new.pt", path)
    except OSError as error:
        raise _failed_write(path, error) from None


def load_tensors(path: Path, mmap: bool = False):
    """Read a checkpoint without running code from it. Raises UserError if it is missing, truncated or foreign."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:                                      # torch raises a dozen types for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}): damaged or foreign; delete it and "
                        f"run the same command again, or give another file") from None


def shard(folder: Path, name: str, i: int) -> Path:
    """Where the i-th file of a long list of samples lies."""
    return folder / f"{name}-{i:04d}.pt"


def load_shards(folder: Path, name: str, number: int = 0) -> Tensor:
    """y [N, *shape] of the files name-0000.pt, name-0001.pt, … (all, or the first `number`)."""
    paths = [shard(folder, name, i) for i in range(number)] or sorted(folder.glob(f"{name}-*.pt"))
    if not paths:
        raise UserError(f"{folder}: no {name} samples in it; delete that folder and run the same command again")
    loaded = [load_tensors(p) for p in paths]
    if not all(isinstance(v, dict) and isinstance(v.get("y"), Tensor) for v in loaded):
        raise UserError(f"{folder}: its files are not samples of this code; delete that folder")
    return torch.cat([v["y"] for v in loaded])


def _map(tree, tensor):
    if isinstance(tree, Tensor):
        return tensor(tree) if tree.ndim else tree
    if isinstance(tree, dict):
        return {k: _map(v, tensor) for k, v in tree.items()}
    return type(tree)(_map(v, tensor) for v in tree) if isinstance(tree, (list, tuple)) else tree


def _join(trees: list):
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees) if first.ndim else first
    if isinstance(first, dict):
        return {k: _join([t[k] for t in trees]) for k in first}
    return type(first)(_join(list(part)) for part in zip(*trees)) if isinstance(first, (list, tuple)) else first


def load_json(path: Path, *keys: str) -> dict:
    """Read a JSON object of a run folder, with at least these keys. UserError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError):
        value = None
    if not isinstance(value, dict) or any(k not in value for k in keys):
        raise UserError(f"{path}: damaged; delete it and run the same command again")
    return value


def to_float(x: Tensor) -> Tensor:
    """Pixels, uint8 0…255 -> [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> pixels 0…255, as EDM's generate.py rounds: 127.5 x + 128, cut off; uint8 stays as it is."""
    return x if x.dtype == torch.uint8 else (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def bar(iterable, name: str, total: int, quiet: bool):
    """A progress bar for work that is not a training loop."""
    return tqdm(iterable, desc=name, total=total, disable=quiet or total == 0, mininterval=0.5, dynamic_ncols=True)


def check_config(folder: Path, config: dict) -> None:
    """Write config.json, or compare with the one that is there: a folder made with other flags is refused."""
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        old = load_json(path)
        differ = [k for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
        if differ:
            what = ", ".join(f"{k} ({old.get(k)} there, {config.get(k)} now)" for k in differ)
            raise UserError(f"{folder} was made with other flags: {what}; give those flags, choose another --out (students: "
                            f"a --tag is enough), or delete that folder")
    elif any((folder / name).exists() for name in ("state.pt", "ema.pt")):
        raise UserError(f"{folder}: holds weights, but its config.json is gone, so nobody knows with which flags they were made; delete that folder, or choose "
                        f"another --out or --tag")
    else:
        save_json(path, config)


def saved_steps(folder: Path) -> dict[int, Path]:
    """{step: checkpoint} of the readable ones; a damaged one is set aside, and said so."""
    steps = {}
    for name in ("state.prev.pt", "state.pt"):
        path = folder / name
        if path.exists():
            try:
                steps[load_tensors(path, mmap=True)["step"]] = path                             # mapped: not read whole for a number
            except (UserError, KeyError, TypeError):
                print(f"{path} is damaged: set aside as {name}.damaged, going on from the checkpoint before it", file=sys.stderr)
                os.replace(path, folder / (name + ".damaged"))
    return steps


def finished(folder: Path, results: tuple[str, ...]) -> bool:
    """Does the folder hold the files that a stage leaves at its end?"""
    return all((folder / name).exists() for name in results)


def unfinished(folders: list[Path], results: tuple[str, ...], stacked: bool = True) -> list[list[Path]]:
    """Folders without these results, in groups that share a checkpoint (or none): each group can train as one stack."""
    groups: dict[int, list[Path]] = {}
    left = [f for f in folders if not finished(f, results)]
    if not stacked:
        return [[f] for f in left]
    steps = {f: {0, *saved_steps(f)} for f in left}
    shared = max(set.intersection(*steps.values())) if left else 0
    for f in left:
        groups.setdefault(shared or max(steps[f]), []).append(f)
    return list(groups.values())


def rows_of(net: torch.nn.Module, rows: slice, members: int) -> dict:
    """The state of some members of a stack, on the CPU; a stack of one is taken whole, whatever its tensors' shapes."""
    return {k: (v if members == 1 else v[rows]).detach().cpu().clone() for k, v in net.state_dict().items()}


def stack_of(nets: list[torch.nn.Module]) -> dict:
    """The state of the stack of these stacks: the inverse of `rows_of`."""
    states = [n.state_dict() for n in nets]
    return states[0] if len(states) == 1 else {k: torch.cat([s[k] for s in states]) for k in states[0]}


class Stage:
    """One stage of one stack: a folder per (seed, K), each holding its own members' slice of every tensor.

    folders: {folder: slice of the stack's members}. A stack of one folder saves its tensors whole.
    step counts finished updates: a checkpoint with step n holds the state after n updates.
    ranks: those that train this stack together; all read, the first one writes."""

    def __init__(self, name: str, folders: dict[Path, slice], steps: int, save_every: int, quiet: bool = False,
                 ranks: Ranks | None = None):
        self.name, self.folders, self.steps, self.save_every = name, folders, steps, save_every
        self.ranks = ranks or Ranks()
        self.main = self.ranks.rank == 0
        self.quiet = quiet or not self.main
        self.members = max(s.stop for s in folders.values())
        self.rows: list[tuple] = []
        self.before = self.last = self.started = 0
        self.stop = False

    def resume(self, **parts) -> int:
        """Load the newest checkpoint that all folders have into the given modules and optimizers; return its step."""
        if not self.main:
            self.ranks.wait()                                       # until the first rank has set damaged files aside
        saved = [saved_steps(f) for f in self.folders]
        if self.main:
            self.ranks.wait()
        self.last = start = max(set.intersection(*(set(s) for s in saved)), default=0)
        if start:
            states = [load_tensors(s[start]) for s in saved]
            joined = _join([s["parts"] for s in states]) if len(states) > 1 else states[0]["parts"]
            for key, part in parts.items():
                if isinstance(part, dict):
                    part.update(joined[key])
                else:
                    part.load_state_dict(joined[key])
            self.before = states[0]["seconds"]
        for folder in self.folders if self.main else ():
            self._trim(folder, start)
        self.started = time.perf_counter()
        return start

    def _trim(self, folder: Path, start: int) -> None:
        path = folder / "metrics.csv"
        rows = [["step", "seconds", "student", "name", "value"]]
        if path.exists():
            with open(path, newline="") as f:
                rows += [r for r in csv.reader(f) if len(r) == 5 and r[0].isdigit() and int(r[0]) <= start]
        def write(temporary):
            with open(temporary, "w", newline="") as f:
                csv.writer(f, lineterminator="\n").writerows(rows)
        write_atomic(path, write)

    def seconds(self) -> float:
        """Training seconds of this stage, earlier sessions counted in."""
        return self.before + time.perf_counter() - self.started

    def range(self, start: int):
        """A tqdm bar over the remaining steps; Ctrl-C and SIGTERM are held until the step is whole and saved."""
        def hold(number, frame):
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            os.write(2, f"\n{self.name}: stopping after this step\n".encode())               # print is not safe here
        old = {}
        try:
            for s in (signal.SIGINT, signal.SIGTERM):
                old[s] = signal.signal(s, hold)
        except ValueError:                                          # not the main thread: leave the signals alone
            pass
        self.bar = tqdm(range(start, self.steps), initial=start, total=self.steps, desc=self.name, unit="step",
                        disable=self.quiet, mininterval=0.5, dynamic_ncols=True)
        try:
            yield from self.bar
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def log(self, step: int, **values) -> None:
        """Note numbers ([M] tensors, or one float for all) of the state after `step` updates; written with the next save."""
        for name, value in values.items():
            column = value.detach().cpu().tolist() if isinstance(value, Tensor) else [value] * self.members
            self.rows.append((step, self.seconds(), name, column))

    def show(self, **values) -> None:
        """The numbers that move, on the progress bar."""
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)

    def check(self, step: int, loss: Tensor, student_names: list[str]) -> Tensor:
        """The loss [M] of all ranks; a non-finite one stops the run, naming step, student and last checkpoint."""
        loss = self.ranks.total(loss.detach())
        finite = torch.isfinite(loss)
        if not finite.all():
            bad = [n for n, ok in zip(student_names, finite.tolist()) if not ok]
            where = f"last checkpoint: step {self.last} in {next(iter(self.folders))}" if self.last else "no checkpoint yet"
            raise UserError(f"{self.name}: the loss is not finite at step {step} ({', '.join(bad[:3])}); {where}; "
                            f"lower the learning rate or a loss's weight (and choose another --tag or --out)")
        return loss

    def save(self, step: int, **parts) -> None:
        """Checkpoint every save_every steps, at the end, and when a stop was asked for (which then stops the run)."""
        self.stop = self.ranks.any(self.stop)
        if not (step % self.save_every == 0 or step == self.steps or self.stop):
            return
        trees = {k: p if isinstance(p, dict) else p.state_dict() for k, p in parts.items()}
        if step != self.last and self.main:
            self._flush()                                           # rows first: those past a resumed step are dropped
            for folder, rows in self.folders.items():
                whole = len(self.folders) == 1
                state = {"step": step, "seconds": self.seconds(),
                         "parts": trees if whole else _map(trees, lambda t: t[rows].clone())}
                save_state(folder, state)
        self.last = step
        if self.stop:
            raise KeyboardInterrupt

    def _flush(self) -> None:
        for folder, rows in self.folders.items():
            try:
                with open(folder / "metrics.csv", "a", newline="") as f:
                    out = csv.writer(f, lineterminator="\n")
                    for at, seconds, name, column in self.rows:
                        for student, value in enumerate(column[rows]):
                            out.writerow([at, f"{seconds:.2f}", student, name, f"{value:.6g}"])
            except OSError as error:
                raise _failed_write(folder / "metrics.csv", error) from None
        self.rows.clear()
