"""Post-distillation, the paper's baseline for small students: imitate the best large ones [MSD Sec. 4.1, Table 1].

A small student G learns z -> G_best(z) from the ADM student of full size of the same K, by the regression loss
[MSD Eq. 9] on the latents of the pairs of its classes: no teacher's answer, no data, no fake denoiser.

Departures: the paper gives one sentence. Here: as many updates as the three stages together, DM's batch, schedule and
averages, the learning rate of its regression phase; checkpoints are chosen by the data, as in ADM.

Run      python msd.py --students 8 --stages dm,adm, and then --students 8 --student-size XS --stages post
"""
import torch

from common import AdamW, Average, learning_rate
from dmd import one_step, regression_loss

NAME, BY = "post", "real_select"
USES = {name: f"dm.{name}" for name in ("pairs", "batch", "beta1", "beta2", "decay", "warmup", "clip_norm", "ema",
                                        "distance", "select_samples", "eval_every", "conditioning_sigma")}
USES |= {"post_lr": "dm.reg_lr", "student_size": "student_size"}


def length(flags) -> tuple[int, int]:
    """Updates of this stage, those of the three others together (what they cost), and its batch."""
    return flags.tsm.steps + flags.dm.steps + flags.adm.steps, flags.dm.batch


def passes(flags) -> tuple[int, int]:
    """See edm.passes."""
    return length(flags)[0], 3 * length(flags)[0]


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Train the stack task.G to imitate the frozen task.imitated; returns {file: the weights to keep in it}."""
    f, G, (steps, _) = flags.dm, task.G, length(flags)
    average, opt_G = Average(G, f.ema, task.select), AdamW(G, run, (f.beta1, f.beta2), f.clip_norm)
    state = dict(G=G, **average.state(), opt_G=opt_G)
    for step in run.steps(state):
        for batch in run.batches(step):
            z, _, label = task.pairs(batch)  # [M, b, *shape], [M, b]; of --pairs, a fixed set, as in DM
            with torch.no_grad():
                y = one_step(task.imitated, z, label)
            opt_G.backward(regression_loss(one_step(G, z, label), y, task.distance))  # [MSD Eq. 9]
        loss = opt_G.step(step, learning_rate(f.reg_lr, step, steps, f.warmup, f.decay))
        average.update(step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, regression=loss)
        average.choose(run, step + 1, f.eval_every)
        run.save(step + 1, state)
    return {"best.pt": average.best, "ema.pt": average.now}
