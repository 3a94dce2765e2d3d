"""What holds of every training loop: a stack is its students, micro-batches are the batch, a kill changes no bit."""
import re

import pytest
import torch

import adm
import consistency
import data
import dmd
import edm
import evaluate
import post
import tsm
from common import Student
from conftest import ALL, Killed, assert_stack_is_its_members, denoiser, error_by_level, kill_after, options, same, trained
from run import load_tensors

LOOPS = {
    edm: "--teacher-steps 20 --teacher-batch 8 --label-dropout 0.25",
    tsm: "--tsm-steps 20 --tsm-batch 8",
    dmd: "--steps 20 --batch 8 --reg-warmup 6 --fake-warmup 3 --warmup 1 --ttur 2 --draws 2 --clip-norm 1 --pairs 24",
    adm: "--adm-steps 20 --adm-batch 8 --fake-warmup 3 --warmup 1 --draws 2 --clip-norm 1 --gan-weight 0.1",
    post: "--tsm-steps 5 --steps 10 --adm-steps 5 --batch 8 --warmup 1",
    consistency: "--cd-steps 20 --cd-batch 8 --cd-points 8 --warmup 1",
}
every_loop = pytest.mark.parametrize("stage", LOOPS, ids=lambda stage: stage.NAME)


def flags_of(stage, more: str = ""):
    return options(f"{LOOPS[stage]} --select-samples 80 --eval-every 8 --save-every 100 {more}")


def states(stage, group, folder, more: str = "") -> dict:
    """Every weight that a loop leaves, {file and name: [M, ...]}."""
    kept = trained(stage, group, flags_of(stage, more), folder)
    return {f"{file} {k}": v for file, net in kept.items() for k, v in net.state_dict().items()}


@every_loop
def test_stack_equals_separate_runs(tmp_path, double, stage):
    assert_stack_is_its_members(lambda group, name: states(stage, group, tmp_path / name))


@every_loop
def test_micro_batches_are_the_whole_batch(tmp_path, double, stage):
    one = [Student(0, 1, 0, ALL)]
    whole, parts = (states(stage, one, tmp_path / micro, f"--micro-batch {micro}") for micro in "02")
    for k, v in whole.items():
        torch.testing.assert_close(parts[k], v, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(whole["ema.pt net.w_out"], denoiser(12).net.w_out)  # and it has learnt something


@every_loop
def test_resume_bit_for_bit(tmp_path, monkeypatch, stage):
    """n steps are m, a kill past the checkpoint, and the rest: weights, chosen checkpoints and metrics."""
    group, more = [Student(0, 2, 1, (4, 5, 6, 7)), Student(3, 1, 0, ALL)], "--save-every 6"
    whole = states(stage, group, tmp_path / "whole", more)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, stage.NAME, 15)
        states(stage, group, tmp_path / "killed", more)
    assert load_tensors(tmp_path / "killed/state.pt")["step"] == 12
    with open(tmp_path / "killed/metrics.csv", "a") as file:
        file.write("14,1.0,0,l1,9\n")  # as if it had died between the rows and the checkpoint of step 18
    assert same(whole, states(stage, group, tmp_path / "killed", more))
    rows = []
    for name in ("whole", "killed"):
        lines = (tmp_path / name / "metrics.csv").read_text().splitlines()
        rows.append([re.sub(r",[\d.]+,", ",", line, count=1) for line in lines])  # without the seconds
    assert rows[0] == rows[1] and (len(rows[0]) > 1 or not stage.BY)


@every_loop
@pytest.mark.parametrize("more", ["", "--ttur 3 --adm-ttur 2 --reg-weight 0 --gan-weight 0", "--dm-weight 0"])
def test_the_bill_is_what_is_counted(tmp_path, stage, more):
    """--dry-run's passes of a stage, and the FLOPs that its loop counts; networks of 12, teachers of 16 channels."""
    mu_teacher, flags, facts = denoiser(16).requires_grad_(False), flags_of(stage, more), data.facts("toy")
    trained(stage, [Student(0, 1, 0, ALL)], flags, tmp_path, teacher=mu_teacher)
    of_student, of_teacher = (2 * evaluate.multiply_adds(net, facts) for net in (denoiser(12), mu_teacher))
    a, b = stage.passes(flags)
    wanted = stage.length(flags)[1] * (a * (of_student if stage is edm else of_teacher) + b * of_student)
    assert load_tensors(tmp_path / "state.pt")["flops"] == wanted


@pytest.mark.parametrize("stage, line", [
    (edm, "--teacher-steps 150 --teacher-batch 128"), (edm, "--teacher-steps 150 --teacher-batch 128 --noise-law bins"),
    (tsm, "--tsm-steps 150 --tsm-batch 128")])
def test_a_short_training_approaches_the_exact_denoiser(tmp_path, stage, line):
    """The error falls well below that of the start."""
    levels, facts = torch.tensor([0.1, 0.5, 2.0]), data.facts("toy")
    D = trained(stage, [Student(0, 1, 0, ALL)], options(line + " --save-every 500"), tmp_path, width=24)["ema.pt"]
    before, after = (error_by_level(net.requires_grad_(False), facts.exact, levels, facts, 0, 2000)
                     for net in (denoiser(24), D))
    assert (after < 0.5 * before).all()
