"""A small stack to train, on one rank or several."""
from pathlib import Path

import torch

import adm
import common
import consistency
import data
import dmd
import edm
import msd
import o2mkd
import run
import tsm
from common import Student, generator
from evaluate import Judge
from flags import parse
from students import Start, Task, whole
from teacher import Given

STAGES = {"toy": dmd, "image": dmd, "adm": adm, "tsm": tsm, "cd": consistency, "o2mkd": o2mkd}
O2MKD = "--steps 20 --batch 8 --lr 1e-3"
MSD = (f"{O2MKD} --reg-lr 1e-3 --fake-lr 1e-3 --reg-warmup 8 --fake-warmup 3 --ttur 2 --draws 2 --clip-norm 1 "
       "--eval-every 10 --select-samples 40 --adm-steps 20 --adm-batch 8 --adm-lr 1e-3 --adm-fake-lr 1e-3 "
       "--gan-weight 0.1 --tsm-steps 20 --tsm-batch 8 --tsm-lr 1e-3 --cd-steps 20 --cd-batch 8 --cd-lr 1e-3 --cd-points 6")


def stack(stage, flags, groups, size, out: Path, pairs: int, ranks=None) -> tuple:
    """(run, flags, task) for stage.train: students of these groups of classes, without anything trained before.

    The teacher is a network with random weights, which they start from; y = z / 2; the judge compares means."""
    facts = data.facts(flags.run.dataset, flags.run.resolution)
    ranks, (steps, batch) = ranks or common.Ranks(), stage.length(flags)
    torch.manual_seed(0)
    D = edm.Precond(facts.net(1, size), facts.sigma_data).requires_grad_(False)
    for p in D.parameters():  # some of a U-Net's are 0
        p.add_(0.02 * torch.randn(p.shape))
    D.to(ranks.device)
    z = torch.randn(1, pairs, *facts.shape, generator=generator("z")).to(ranks.device)
    held = {"z": z, "y": z / 2, "label": data.stratified(pairs, facts.classes).to(ranks.device)[None]}
    judge = Judge("mean", lambda x, label: x.mean(), lambda a, b, classes: float(a - b), None, None)
    given = Given(0, facts, None, {}, False, 1.0, size, D, real=lambda: data.Generated(held["y"], held["label"], [0]),
                  judge=judge, pairs=held, references={"select": 0.0, "real_select": 0.0})
    start = Start("teacher", size, lambda: D)
    students = [Student(0, len(groups), k, tuple(Y_k), start) for k, Y_k in enumerate(groups)]
    shares = [whole(facts, pairs)._replace(real=torch.tensor(s.classes)) for s in students]
    training = run.Run(stage.NAME, students, {out: slice(0, len(students))}, steps, batch, facts.shape,
                       flags.run.save_every, flags.run.micro_batch, ranks)
    return training, flags, Task(stage, students, shares, {0: given}, flags, ranks)


def double(out: Path, name: str) -> None:
    """20 updates of two toy students or one of images in float64, all ranks on one batch of 8; to OUT/weights.pt."""
    stage, house, argv = STAGES[name], *((o2mkd, O2MKD) if name == "o2mkd" else (msd, MSD))
    where, groups, size = "fashion-mnist --resolution 8", [range(3)], (16, (1, 1), 1, ())
    if name in ("toy", "o2mkd"):
        where, groups, size = "toy", [range(4), range(4, 8)], (16, 3)
    flags = parse(house.Flags, house.PRESETS, f"--dataset {where} --save-every 10 {argv}".split())
    training, *rest = stack(stage, flags, groups, size, out, 24, common.world(torch.device("cpu")))
    kept = stage.train(training, *rest)
    if training.main:
        torch.save(kept["ema.pt"].state_dict(), out / "weights.pt")
    common.leave(training.ranks)
