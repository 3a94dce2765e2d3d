"""Consistency distillation (CD): the paper's second method, the same partition [MSD App. A.2, Fig. 5].

Trains f(x; sigma, label), which takes any point of the teacher's ODE to its end: f(x; sigma_min) = x by construction,
and two neighbouring points of one trajectory must give the same. Then G(sigma_max z; sigma_max, label) = f is a
one-step generator. One update: a real x of the student's own classes Y_k, noised to level t; one Heun step of the
teacher to the next lower level t'; f at t is pulled to what a slow average of f says at t'. No pairs, no fake
denoiser; but real data.

  f(x; sigma_min) = x by the scalings        [Song et al. 2023, Eq. 5, App. C]     boundary_scalings, student_of
  one step of the teacher's ODE              [EDM Alg. 1]                          heun_step
  consistency loss, target by EMA            [Song et al. 2023, Eq. 7, Alg. 2]     consistency_loss, train

(Song et al. 2023: "Consistency Models", arXiv 2303.01469.) With N levels and Heun's steps, f imitates the N-point Heun
sampler. Not here: training without a teacher, growing N, several steps.

Departures, from Song et al.'s CD on ImageNet-64 (cifar10: their CIFAR-10 run); MSD says only that it was done
 1. AdamW for RAdam; weight decay, warm-up and clipping are those of the DM preset; EMAs begin with a shorter memory.
 2. The checkpoint that is kept is the best of several evaluations (as in dmd.py), not the last.
On the toy and on fashion-mnist also
 3. Distance: the root mean square, as in dmd.py, for LPIPS. Learning rates that decay.
On the toy, where errors add up along the N levels, also 16 000 updates of batch 512 at 1e-2, and
 4. N = 64 levels, not 40: 18 are too few for its narrow modes, as for the sampler; the target's mu is 0.97, not 0.95.
 5. --cd-rise: the levels come in from below, since what f says at a level is worth no more than what it says below.
 6. --cd-focus: more than half of the draws fall on levels where modes part (as in iCT's noise law, arXiv 2310.14189).

Run      python consistency.py --dataset toy
         python msd.py --dataset toy --students 1 2 4 8 --method cd
"""
import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import edm
from common import AdamW, Average, ema_update, learning_rate
from dmd import regression_loss
from flags import flag

NAME, BY = "cd", "select"
USES = {name: f"dm.{name}" for name in ("warmup", "clip_norm", "select_samples", "eval_every")}
USES |= {"cd_distance": "dm.distance", "real": "real", "student_size": "student_size"}


@dataclass
class Flags:
    """Consistency distillation (CD); warm-up, clipping, distance and evaluation are those of DM"""
    prefix = "cd_"
    steps: int = flag(16_000, "updates of the student", low=1)
    batch: int = flag(512, "batch per student", low=1)
    lr: float = flag(1e-2, "learning rate (AdamW)", low=0)
    beta2: float = flag(0.99, "AdamW's second beta", low=0, below=1)
    decay: str = flag("cosine", "schedule of the learning rate after warm-up", choices=("linear", "cosine", "constant"))
    points: int = flag(64, "N: noise levels of the discretised ODE, sigma_max and sigma_min among them", low=2)
    rise: float = flag(0.3, "share of the updates in which the levels come in, from sigma_min upwards; 0 = none", low=0,
                       below=1)
    focus: float = flag(0.6, "share of the levels drawn by ln sigma ~ N(-2, 1.4^2), where modes part", low=0, below=1)
    target: float = flag(0.97, "mu: decay of the average that gives the target; 0 = f itself, without gradient", low=0,
                         below=1)
    ema: float = flag(0.998, "decay of the average of f's weights (what is kept and sampled)", low=0, below=1)


# of Song et al. 2023, App. C, CD on ImageNet-64; RAdam there
CM = dict(beta2=0.999, decay="constant", rise=0.0, focus=0.0, target=0.95, points=40, ema=0.999943)
PRESETS = {
    ("toy", "paper"): dict(CM, steps=200_000, lr=1e-7, points=64),
    ("toy", "smoke"): dict(steps=12, batch=16, points=8),
    ("fashion-mnist", "default"): dict(CM, steps=2000, batch=64, lr=5e-4, decay="linear", ema=0.995),
    ("fashion-mnist", "smoke"): dict(steps=6, batch=4, points=4),
    # CM's CIFAR-10 run: 18 levels, the target is f itself, learning rate 4e-4, batch 512, 800 000 updates
    ("cifar10", "default"): dict(CM, steps=800_000, batch=512, lr=4e-4, points=18, target=0.0, ema=0.9999),
    ("cifar10", "smoke"): dict(CM, steps=2, batch=2, points=3),
    # CM's ImageNet-64 run: 600 000 updates of batch 2048 at 8e-6; MSD has no CD on images
    ("imagenet64", "default"): dict(CM, steps=600_000, batch=2048, lr=8e-6),
}


# ---- the method: scalings, step, loss

def boundary_scalings(sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in [...] with c_skip(sigma_min) = 1 and c_out(sigma_min) = 0 exactly [Song et al. 2023, App. C].

    c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2), c_out = (sigma - sigma_min) sigma_data c_in,
    c_in = 1 / sqrt(sigma^2 + sigma_data^2): EDM's, shifted by sigma_min where it matters."""
    return edm.Precond(None, sigma_data, edm.SIGMA_MIN).coefficients(sigma)[:3]


def student_of(D: edm.Precond) -> edm.Precond:
    """f with the network of D and the boundary scalings: f(x; sigma_min) = x bit for bit."""
    return edm.Precond(D.net, D.sigma_data, edm.SIGMA_MIN)


@torch.no_grad()
def heun_step(denoise, x: Tensor, t: Tensor, t_next: Tensor, label: Tensor | None) -> Tensor:
    """From x [..., *shape] at level t [...] to t_next [...] > 0, one Heun step of the teacher's ODE [EDM Alg. 1]."""
    d = (x - denoise(x, t, label)) / edm.like(t, x)
    step = edm.like(t_next - t, x)
    x_next = x + step * d
    d_next = (x_next - denoise(x_next, t_next, label)) / edm.like(t_next, x)
    return x + step * (d + d_next) / 2


def consistency_loss(f, target, solve, x: Tensor, label: Tensor | None, t: Tensor, t_next: Tensor, noise: Tensor,
                     distance="l2") -> Tensor:
    """l(f(x_t; t), f^-(x_t'; t')) of real data x [..., *shape], per sample [...] [Song et al. 2023, Eq. 7].

    x_t = x + t noise; solve(x_t, t, t', label) takes it along the teacher's ODE to the lower level t' = t_next; target
    is f^-, which gets no gradient; distance: see regression_loss."""
    x_t = x + edm.like(t, x) * noise
    with torch.no_grad():
        y = target(solve(x_t, t, t_next, label), t_next, label)
    return regression_loss(f(x_t, t, label), y, distance)


def level_law(grid: Tensor, focus: float) -> Tensor:
    """Cumulative probabilities [N - 1] of drawing level i, the step from grid[i + 1] down to grid[i] (ascending, [N]).

    Uniform but for a share `focus`, which falls on ln sigma ~ N(-2, 1.4^2): where modes part, and f is hardest."""
    normal = torch.special.ndtr((grid.log() + 2) / 1.4).diff()
    return (focus * normal / normal.sum() + (1 - focus) / len(normal)).cumsum(0)


def draw_level(u: Tensor, law: Tensor, top: int) -> Tensor:
    """Levels 0 … top - 1 by this law, from uniform u [...]."""
    return torch.searchsorted(law, u.to(law.dtype) * law[top - 1]).clamp(max=top - 1)


# ---- training

def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.cd.steps, flags.cd.batch


def passes(flags) -> tuple[int, int]:
    """See edm.passes."""
    return 2 * flags.cd.steps * edm.guided(flags), 4 * flags.cd.steps


def highest(step: int, cd: Flags) -> int:
    """Levels below this one are in: all N - 1; in the first `rise` of the updates they come in from below."""
    rise = cd.rise * cd.steps
    return max(1, math.ceil(min(1.0, (step + 1) / rise if rise else 1.0) * (cd.points - 1)))


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Train the stack f, which starts as task.G; returns {file: the weights to keep in it}.

    task.teacher: denoiser, frozen, whose ODE is followed; task.real: D_real of Y_k."""
    cd, dm, f = flags.cd, flags.dm, student_of(task.G)
    f_minus = copy.deepcopy(f).requires_grad_(False)
    average = Average(f, cd.ema, task.select)  # of f's weights; of each student the best, too
    opt = AdamW(f, run, (0.9, cd.beta2), dm.clip_norm)
    state = dict(f=f, target=f_minus, **average.state(), optimizer=opt)

    grid = edm.sigma_bins(cd.points).float().to(run.ranks.device)  # [N], ascending
    law = level_law(edm.sigma_bins(cd.points), cd.focus)
    law = law.to(grid.device, torch.float32 if grid.device.type == "mps" else torch.float64)
    solve = functools.partial(heun_step, task.teacher)
    for step in run.steps(state):
        for batch in run.batches(step):
            x, label = task.real(batch)  # [M, b, *shape], of Y_k
            i = draw_level(batch.uniform("level"), law, highest(step, cd))  # [M, b], 0 … N - 2
            t, t_next, noise = grid[i + 1], grid[i], batch.normal("noise")
            losses = consistency_loss(f, f_minus, solve, x, label, t, t_next, noise, task.distance)
            opt.backward(losses)
        loss = opt.step(step, learning_rate(cd.lr, step, cd.steps, dm.warmup, cd.decay))
        ema_update(f_minus, f, cd.target, step)  # the target follows f
        average.update(step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss, **edm.by_band(losses, t, "consistency loss"))
        average.choose(run, step + 1, dm.eval_every)  # each student by its own classes [MSD App. E]
        run.save(step + 1, state)
    return {"best.pt": average.best, "ema.pt": average.now}


if __name__ == "__main__":
    import msd
    msd.alone(NAME)
