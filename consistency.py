"""Consistency distillation (CD): the paper's second method, the same partition [MSD App. A.2, Fig. 5].

Trains f(x; sigma, label), which takes any point of the teacher's ODE to its end: f(x; sigma_min) = x by construction, and two
neighbouring points of one trajectory must give the same. Then G(sigma_max z; sigma_max, label) = f is a one-step generator.
One update: a real x of the student's own classes Y_k, noised to level t; one Heun step of the teacher to the next lower level
t'; f at t is pulled to what a slow average of f says at t'. No pairs, no fake denoiser, no GAN; but real data, where DM needs none.

  f(x; sigma_min) = x by the scalings        [Song et al. 2023, Eq. 5, App. C]     boundary_scalings, student_of
  one step of the teacher's ODE              [EDM Alg. 1]                          heun_step
  consistency loss, target by EMA            [Song et al. 2023, Eq. 7, Alg. 2]     consistency_loss, train
  what a perfect f gives, with N levels      (the N-point Heun sampler)            bound

(Song et al. 2023: "Consistency Models", arXiv 2303.01469.) With N levels and Heun's steps, f imitates the N-point Heun sampler,
whose own distance `bound` measures. Not here: consistency training without a teacher, growing N, several steps at sampling.

Departures: MSD says of this only that it was done; these are from Song et al.'s CD on ImageNet-64 (for cifar10: their CIFAR-10 run)
 1. AdamW for RAdam; weight decay, warm-up and clipping are those of the DM preset; the EMAs begin with a shorter memory.
 2. The checkpoint that is kept is the best of several evaluations (as in dmd.py), not the last.
On the toy and on fashion-mnist also
 3. Distance: the root mean square, as in dmd.py, for LPIPS. Learning rates that decay.
On the toy, where errors add up along the N levels, also
 4. N = 64 levels, not 40: 18 are too few for its narrow modes, as for the sampler; the target's mu is 0.97, not 0.95.
 5. --cd-rise: the levels come in from below, since what f says at a level is worth no more than what it says below.
 6. --cd-focus: more than half of the draws fall on levels where modes part (as in iCT's noise law, arXiv 2310.14189).

Run      python consistency.py --dataset toy
         python msd.py --dataset toy --students 1 2 4 8 --method cd
Many GPUs    torchrun --nproc-per-node 8 consistency.py --dataset imagenet64
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

import adm
import common
import data
import dmd
import edm
from common import flag


@dataclasses.dataclass
class Flags(adm.Flags):
    """Flags of CD; warm-up, clipping, weight decay and evaluation are those of DM."""
    cd_steps: int = flag(16_000, "updates of the student", "cd", low=1)
    cd_batch: int = flag(512, "batch per student", "cd", low=1)
    cd_lr: float = flag(1e-2, "learning rate (AdamW)", "cd", low=0)
    cd_beta2: float = flag(0.99, "AdamW's second beta", "cd", low=0)
    cd_decay: str = flag("cosine", "schedule of the learning rate after warm-up", "cd", ("linear", "cosine", "constant"))
    cd_points: int = flag(64, "N: noise levels of the discretised ODE, sigma_max and sigma_min among them", "cd", low=2)
    cd_rise: float = flag(0.3, "share of the updates in which the levels come in, from sigma_min upwards; 0 = all from the start", "cd", low=0)
    cd_focus: float = flag(0.6, "share of the levels drawn by ln sigma ~ N(-2, 1.4^2), where modes part; the rest uniformly", "cd", low=0)
    cd_target: float = flag(0.97, "mu: decay of the average that gives the target; 0 = f itself, without gradient", "cd", low=0)
    cd_ema: float = flag(0.998, "decay of the average of f's weights (what is kept and sampled)", "cd", low=0)
    cd_distance: str = flag("l2", "root mean square, mean square, or LPIPS (VGG)", "cd", ("l2", "mse", "lpips"))


# of Song et al. 2023, App. C, CD on ImageNet-64; RAdam there
CM = dict(cd_beta2=0.999, cd_decay="constant", cd_rise=0.0, cd_focus=0.0, cd_target=0.95, cd_points=40, cd_ema=0.999943)
PRESETS = {
    ("toy", "default"): {}, ("toy", "few-pairs"): {}, ("toy", "paper"): dict(CM, cd_steps=200_000, cd_lr=1e-7, cd_points=64),
    ("toy", "smoke"): dict(cd_steps=12, cd_batch=16, cd_points=8),
    ("fashion-mnist", "default"): dict(CM, cd_steps=2000, cd_batch=64, cd_lr=5e-4, cd_decay="linear", cd_ema=0.995),
    ("fashion-mnist", "smoke"): dict(cd_steps=6, cd_batch=4, cd_points=4),
    # CM's CIFAR-10 run: 18 levels, the target is f itself, learning rate 4e-4, batch 512, 800 000 updates
    ("cifar10", "default"): dict(CM, cd_steps=800_000, cd_batch=512, cd_lr=4e-4, cd_points=18, cd_target=0.0, cd_ema=0.9999, cd_distance="lpips"),
    ("cifar10", "smoke"): dict(CM, cd_steps=2, cd_batch=2, cd_points=3),
    # CM's ImageNet-64 run: 600 000 updates of batch 2048 at 8e-6; MSD has no CD on images
    ("imagenet64", "default"): dict(CM, cd_steps=600_000, cd_batch=2048, cd_lr=8e-6, cd_distance="lpips"),
}
PRESETS["imagenet64", "paper"] = PRESETS["imagenet64", "default"]
# what CD takes from DM's flags
SHARED = ("weight_decay", "warmup", "clip_norm", "select_samples", "eval_every")


# ------------------------------------------------------------------------------------------- the method: scalings, step, loss

def boundary_scalings(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in [...] with c_skip(sigma_min) = 1 and c_out(sigma_min) = 0, exactly [Song et al. 2023, App. C].

    c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2), c_out = (sigma - sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2),
    c_in = 1 / sqrt(sigma^2 + sigma_data^2): EDM's, shifted by sigma_min where it matters."""
    return edm.Precond(None, sigma_data, edm.SIGMA_MIN).coefficients(sigma)[:3]


def student_of(D: edm.Precond) -> edm.Precond:
    """f with the network of D, copied, and the boundary scalings: f(x; sigma_min) = x bit for bit."""
    return edm.Precond(copy.deepcopy(D.net), D.sigma_data, edm.SIGMA_MIN)


@torch.no_grad()
def heun_step(denoise, x: Tensor, t: Tensor, t_next: Tensor, label: Tensor | None) -> Tensor:
    """From x [..., *shape] at noise level t [...] to t_next [...] > 0, one Heun step of the teacher's ODE [EDM Alg. 1]."""
    d = (x - denoise(x, t, label)) / edm.like(t, x)
    step = edm.like(t_next - t, x)
    x_next = x + step * d
    d_next = (x_next - denoise(x_next, t_next, label)) / edm.like(t_next, x)
    return x + step * (d + d_next) / 2


def consistency_loss(f, target, solve, x: Tensor, label: Tensor | None, t: Tensor, t_next: Tensor, noise: Tensor, distance="l2") -> Tensor:
    """l(f(x_t; t), f^-(x_t'; t')) of real data x [..., *shape], per sample [...] [Song et al. 2023, Eq. 7].

    x_t = x + t noise; solve(x_t, t, t', label) takes it along the teacher's ODE to the lower level t' = t_next; target is f^-,
    which gets no gradient; distance: see dmd.regression_loss."""
    x_t = x + edm.like(t, x) * noise
    with torch.no_grad():
        y = target(solve(x_t, t, t_next, label), t_next, label)
    return dmd.regression_loss(f(x_t, t, label), y, distance)


@torch.no_grad()
def bound(denoise, z: Tensor, label: Tensor, points: int) -> Tensor:
    """Where the N-point Heun sampler takes z [..., *shape]: what a perfect f of N = `points` levels would give.

    `edm.heun` with the same levels, but for its last step, from sigma_min to 0, which f does not take."""
    grid = edm.sigma_bins(points).flip(0).to(z)
    x = edm.SIGMA_MAX * z
    for t, t_next in zip(grid, grid[1:]):
        x = heun_step(denoise, x, t.expand(label.shape), t_next.expand(label.shape), label)
    return x


def level_law(grid: Tensor, focus: float) -> Tensor:
    """Cumulative probabilities [N - 1] of drawing level i, the step from grid[i + 1] down to grid[i] (ascending, [N]).

    Uniform over the levels but for a share `focus`, which falls on ln sigma ~ N(-2, 1.4^2): where modes part, and f is hardest."""
    normal = torch.special.ndtr((grid.log() + 2) / 1.4).diff()
    return (focus * normal / normal.sum() + (1 - focus) / len(normal)).cumsum(0)


def draw_level(u: Tensor, law: Tensor, top: int) -> Tensor:
    """Levels 0 … top - 1 by this law, from uniform u [...]."""
    return torch.searchsorted(law, u.to(law.dtype) * law[top - 1]).clamp(max=top - 1)


# ------------------------------------------------------------------------------------------------------------ training

def train(run: common.Stage, flags: Flags, members, teacher, net, source, judge, references: dict, device):
    """Train the stack of students that `net` initialises; returns (last, best) averaged weights of each member.

    members: M students, each with its classes Y_k, from which real data and labels come;  teacher: denoiser, never changed
    net: stack of M, with boundary scalings;  source: real data (data.py);  judge, references: see dmd.own_distance"""
    facts = data.facts(flags.dataset, flags.resolution)
    draws, ranks = common.Draws("cd", members, device), run.ranks
    names = [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    f, target = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net).requires_grad_(False)
    ema, best = copy.deepcopy(target), copy.deepcopy(target)
    edm.compiled(flags, f, target, ema)
    optimizer = torch.optim.AdamW(f.parameters(), betas=(0.9, flags.cd_beta2), weight_decay=flags.weight_decay, fused=True)
    record = {"distance": torch.full((len(members),), float("inf"))}
    start = run.resume(f=f, target=target, ema=ema, best=best, optimizer=optimizer, record=record)

    B, N = flags.cd_batch, flags.cd_points
    grid = edm.sigma_bins(N).float().to(device)                                                 # ascending
    law = level_law(edm.sigma_bins(N), flags.cd_focus).to(device, torch.float32 if device.type == "mps" else torch.float64)
    distance = dmd.lpips_distance(device) if flags.cd_distance == "lpips" else flags.cd_distance
    for step in run.range(start):
        rise = flags.cd_rise * flags.cd_steps
        top = max(1, math.ceil(min(1.0, (step + 1) / rise if rise else 1.0) * (N - 1)))         # levels below this one are in
        optimizer.zero_grad()
        loss = torch.zeros(len(members), device=device)
        for part in ranks.parts(B, flags.micro_batch):
            x, label = source.batch(draws, step, B, part)                                       # [M, b, *shape], of Y_k
            i = draw_level(draws.uniform(step, "level", B), law, top)[:, part]                  # [M, b], 0 … N - 2
            noise = draws.normal(step, "noise", B, *facts.shape)[:, part]
            losses = consistency_loss(f, target, lambda *at: heun_step(teacher, *at), x, label, grid[i + 1], grid[i], noise, distance)
            share = losses.sum(-1) / B                                                          # [M]
            share.sum().backward()
            loss += share.detach()
        loss = run.check(step, loss, names)
        ranks.add_gradients(f)
        common.clip_gradients(f, flags.clip_norm, len(members))
        common.set_learning_rate(optimizer, common.learning_rate(flags.cd_lr, step, flags.cd_steps, flags.warmup, flags.cd_decay))
        optimizer.step()
        common.ema_update(target, f, flags.cd_target, step)
        common.ema_update(ema, f, flags.cd_ema, step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss, **dmd.by_band(losses.detach(), grid[i + 1], "consistency loss"))
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.cd_steps:
            dmd.keep_best(run, step + 1, dmd.own_distance(ema, facts, judge, members, references, flags.select_samples, device, ranks),
                          ema, best, record, facts.metric)
        run.save(step + 1, f=f, target=target, ema=ema, best=best, optimizer=optimizer, record=record)
    return ema, best


# ------------------------------------------------------------------------------------------------------ the whole stage

def config(flags: Flags, seed: int, start: dmd.Start) -> dict:
    """The flags that determine the CD students of a seed, but for K and the partition."""
    pairs = {"sampler_steps": flags.sampler_steps, "pairs": flags.pairs} if flags.real == "generated" else {}
    return {**dmd.ancestry(flags, seed), "start": start.name, **common.stage_config(flags, "size"), "real": flags.real, **pairs,
            **{name: getattr(flags, name) for name in SHARED}, **common.stage_config(flags, "cd")}


def distil(flags: Flags, members: list, starts: list[dmd.Start], inputs: dmd.Inputs, source, device, ranks) -> None:
    """G_k = Distill_CD(mu_teacher, D_real of Y_k) for all members [MSD Eq. 1]: best.pt and ema.pt in each cd folder."""
    seeds = edm.seeds(flags)

    def train_stack(run, index: list[int]) -> dict:
        stack, row = [members[i] for i in index], [seeds.index(members[i].seed) for i in index]
        net = student_of(dmd.generators(flags, [starts[i] for i in index], device))
        references = {s: r["select"] for s, r in inputs.references.items()}
        ema, best = train(run, flags, stack, dmd.teacher_of(flags, row, inputs.teachers, device), net, source(), inputs.judge, references, device)
        return {"best.pt": best, "ema.pt": ema}
    homes = [dmd.stage_folder(flags, m.seed, m.students, "cd") for m in members]
    configs = [config(flags, m.seed, s) for m, s in zip(members, starts)]
    dmd.train_all(flags, "cd", members, homes, configs, flags.cd_steps, train_stack, starts, ranks)


def check_flags(flags: Flags) -> None:
    """Raise UserError for values that are fine alone but not together."""
    for name in ("cd_target", "cd_ema", "cd_beta2"):
        if getattr(flags, name) >= 1:
            raise common.UserError(f"{common.option(name)} {getattr(flags, name)}: must be below 1")
    for name in ("cd_rise", "cd_focus"):
        if getattr(flags, name) > 1:
            raise common.UserError(f"{common.option(name)} {getattr(flags, name)}: a share, from 0 to 1")
    if flags.cd_distance == "lpips" and data.DATASETS[flags.dataset].stacked:
        raise common.UserError(f"--cd-distance lpips: needs images; {flags.dataset} takes l2 or mse")


@common.command
def main(argv=None):
    """CD of one student that covers every class: msd.py with K = 1 and --method cd, without its figures."""
    flags = common.parse(Flags, PRESETS_ALL, argv, __doc__)
    flags.tag = flags.tag or "cd"
    dmd.check_flags(flags)
    adm.check_flags(flags)
    check_flags(flags)
    if flags.dry_run:
        print(common.describe(flags))
        return
    if flags.teacher == "exact" or flags.student_size:
        raise common.UserError("--teacher exact and --student-size: python msd.py --students 1 --method cd takes them")
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    facts = data.facts(flags.dataset, flags.resolution)
    ranks.parts(flags.cd_batch, flags.micro_batch)
    if flags.cd_distance == "lpips":
        dmd.lpips_distance("cpu")                                   # are its weights there? Hours later is too late
    if ranks.rank == 0:
        print(f"consistency: one student of {flags.dataset}, {flags.cd_steps} updates of batch {flags.cd_batch}, {flags.cd_points} levels, on {device}, "
              f"into {flags.out}")
    source = data.opened(flags, ranks)
    with common.alone(Path(flags.out), ranks):
        inputs = dmd.get_inputs(flags, device, ranks)
    members = [common.Member(seed, 1, 0, tuple(range(facts.classes))) for seed in edm.seeds(flags)]
    starts = [dmd.Start("teacher", D.size, lambda D=D: D) for D in inputs.teachers]
    distil(flags, members, starts, inputs, adm.real_data(flags, inputs, source), device, ranks)
    for m in members if ranks.rank == 0 else ():
        print(f"seed {m.seed}: {dmd.stage_folder(flags, m.seed, 1, 'cd')}")
    common.leave(ranks)


PRESETS_ALL = common.merge(adm.PRESETS_ALL, PRESETS)

if __name__ == "__main__":
    main()
