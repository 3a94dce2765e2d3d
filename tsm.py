"""Stage 0, TSM: a smaller network learns the teacher's denoiser, to start one-step distillation from [MSD Sec. 3.3].

A student of the teacher's size starts from the teacher's weights; a smaller one cannot. Teacher score matching trains
it first as a diffusion model, on real data, with the teacher's output as the target. It keeps its noise input, so
G(sigma_max z; sigma_max) is then simply that network at sigma_max.

  teacher score matching                    [MSD Eq. 3]                tsm_loss, train
  mu^(0) = Distill_TSM(mu_teacher, D_real)  [MSD Eq. 4, first line]    students.distil

One network for all students (--tsm-common, App. B.6, the default), or one per student on its own classes
(--no-tsm-common, App. D.2.2). Real data can be the teacher's samples (--real generated, App. D.3.3). With `--teacher
exact`, which has no weights at all, TSM also makes the network of full size that the others start from.
Noise law and schedule are the teacher's. Not here: what follows (dmd.py, adm.py), the order of the stages (msd.py).

Departures from the paper
 1. An average of the weights is kept, learning rates decay (toy and small images); the paper says neither.
 2. In later stages only G is small: the fake denoiser stays as large as the teacher.

Run      python tsm.py --dataset toy --student-size XS
"""
from dataclasses import dataclass

import torch
from torch import Tensor

import edm
from common import AdamW, Average, learning_rate
from flags import flag

NAME, BY = "tsm", ""  # no best checkpoint is chosen: the last average is kept
USES = dict(real="real", tsm_decay="teacher.decay", noise_law="teacher.noise_law", P_mean="teacher.P_mean",
            P_std="teacher.P_std")


@dataclass
class Flags:
    """Stage 0, TSM"""
    prefix = "tsm_"
    steps: int = flag(4000, "updates of TSM", low=1)
    batch: int = flag(384, "batch of TSM", low=1)
    lr: float = flag(1e-2, "its learning rate (AdamW)", low=0)
    ema: float = flag(0.998, "decay of the average of its weights", low=0, below=1)
    common: bool = flag(True, "one TSM network for all students; else one per student, on its own classes")


PRESETS = {
    ("toy", "paper"): dict(steps=100_000, lr=1e-4, ema=0.0), ("toy", "smoke"): dict(steps=20, batch=32),
    ("fashion-mnist", "default"): dict(steps=3000, batch=64, lr=2e-3, ema=0.999),
    ("fashion-mnist", "smoke"): dict(steps=4, batch=4),
    ("cifar10", "default"): dict(steps=200_000, batch=512, lr=1e-4, ema=0.0),
    ("cifar10", "smoke"): dict(steps=2, batch=2),
    # [MSD App. D.2.2]; B.6 for XS and XXS, whose number of updates is not stated: that of S
    ("imagenet64", "default"): dict(steps=400_000, batch=576, lr=1e-4, ema=0.0),
    ("imagenet64", "default", "S"): dict(common=False),
    ("imagenet64", "default", "XS"): dict(batch=3584), ("imagenet64", "default", "XXS"): dict(batch=4864),
}


def tsm_loss(student, teacher, x: Tensor, label: Tensor | None, sigma: Tensor, noise: Tensor, sigma_data=0.5) -> Tensor:
    """lambda_t ||mu_TSM(x_t, t) - mu_teacher(x_t, t)||^2 of real data x [..., *shape], per sample [...] [MSD Eq. 3].

    The denoising loss with the teacher's output for the target: no noise in the target, so it can reach 0. No gradient
    flows into the teacher."""
    x_t = x + edm.like(sigma, x) * noise
    with torch.no_grad():
        target = teacher(x_t, sigma, label)
    return edm.loss_weight(sigma, sigma_data) * edm.per_sample((student(x_t, sigma, label) - target) ** 2)


def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.tsm.steps, flags.tsm.batch


def passes(flags) -> tuple[int, int]:
    """See edm.passes."""
    return flags.tsm.steps * edm.guided(flags), 3 * flags.tsm.steps


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Match the stack task.G to the frozen task.teacher on task.real; returns {file: the weights to keep in it}."""
    f, D = flags.tsm, task.G
    average, opt = Average(D, f.ema), AdamW(D, run)
    state = dict(D=D, **average.state(), optimizer=opt)
    for step in run.steps(state):
        for batch in run.batches(step):
            x, label = task.real(batch)  # [M, b, *shape], [M, b]
            sigma = edm.draw_sigma(batch, flags.teacher)  # [M, b]
            losses = tsm_loss(D, task.teacher, x, label, sigma, batch.normal("noise"))  # [MSD Eq. 3]
            opt.backward(losses)
        loss = opt.step(step, learning_rate(f.lr, step, f.steps, edm.WARMUP, flags.teacher.decay))
        average.update(step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss, **edm.by_band(losses, sigma, "loss"))
        run.save(step + 1, state)
    return {"ema.pt": average.now}


if __name__ == "__main__":
    import msd
    msd.alone(NAME)
