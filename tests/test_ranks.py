"""Ranks: two ranks see the batch of one; students go to ranks of their own; a rank that dies does not leave the others waiting."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import data
import msd
import rank_worker

WORKER = str(Path(__file__).resolve().parent / "rank_worker.py")


def launch(size: int, *argv, **env) -> list[tuple[int, str]]:
    """Start `size` ranks on this machine; (exit code, output) of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **env}
    ranks = [subprocess.Popen([sys.executable, WORKER, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**base, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]
    out = [(p.communicate(timeout=120)[0], p.returncode) for p in ranks]
    return [(code, text) for text, code in out]


@pytest.mark.parametrize("net", ["toy", *(pytest.param(n, marks=pytest.mark.slow) for n in ("image", "adm", "tsm", "cd", "o2mkd"))])
def test_two_ranks_are_one_rank_on_the_joined_batch(tmp_path, net, double):
    """Float64, 20 updates of each stage (ADM: also critic, real data, pairs): equal to 1e-10; in micro-batches on one rank too."""
    for name in ("one", "two", "micro"):
        (tmp_path / name).mkdir()
    rank_worker.double_dm(tmp_path / "one", net, 0)
    rank_worker.double_dm(tmp_path / "micro", net, 4)
    results = launch(2, "double", tmp_path / "two", net)
    assert all(code == 0 for code, _ in results), results
    weights = {name: torch.load(tmp_path / name / "weights.pt")["ema"] for name in ("one", "two", "micro")}
    for k, v in weights["one"].items():
        assert v.dtype == torch.float64 or "frequency" in k
        torch.testing.assert_close(weights["two"][k], v, rtol=0, atol=1e-10)
        torch.testing.assert_close(weights["micro"][k], v, rtol=0, atol=1e-10)


def image_argv(tiny, out, *more) -> list[str]:
    return ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), "--quiet", "--threads", "1", *more]


def students(out, K):
    return [common.load_tensors(out / f"seed0/students{K}/dm/student{k}/ema.pt")["net"] for k in range(K)]


@pytest.mark.slow
def test_students_in_turn_on_fewer_ranks_are_the_same_bit_for_bit(tmp_path, tiny, image_run):
    results = launch(2, *image_argv(tiny, tmp_path, "--students", "3", "--teacher", str(image_run / "seed0/teacher/ema.pt")))
    assert all(code == 0 for code, _ in results), results
    for a, b in zip(students(image_run, 3), students(tmp_path, 3)):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_one_student_at_a_time_is_the_same_bit_for_bit(tmp_path, tiny, image_run):
    """--student k, for job arrays: then the same command without it evaluates."""
    for k in (1, 2, 0):
        assert msd.main(image_argv(tiny, tmp_path, "--students", "3", "--student", str(k))) == 0
        assert not (tmp_path / "results.json").exists()
        if k == 2:
            with pytest.raises(common.UserError, match="--student 0"):
                msd.load_students(tmp_path / "seed0/students3")
    assert msd.main(image_argv(tiny, tmp_path, "--students", "3")) == 0
    for a, b in zip(students(image_run, 3), students(tmp_path, 3)):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_world_size_that_does_not_divide(tmp_path, tiny):
    for code, text in launch(3, *image_argv(tiny, tmp_path, "--teacher-batch", "9", "--students", "2")):
        assert code == 2 and "start 2 or 4" in text and "Traceback" not in text
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("size, changes, words", [
    (3, dict(students=[1]), "--batch 4 with 3 ranks"), (2, dict(teacher_batch=7), "batch of 7"),
    (8, dict(students=[4], micro_batch=3, teacher="file"), "--micro-batch 3"), (6, dict(students=[4]), "start 4 or 8")])
def test_ranks_and_batches_that_do_not_divide(size, changes, words):
    flags = msd.Flags(**{"dataset": "fashion-mnist", "students": [2], "teacher_batch": 24, "batch": 4 if "micro_batch" not in changes else 16, **changes})
    ranks = common.Ranks()
    ranks.size = size
    with pytest.raises(common.UserError, match=words):
        msd.check_ranks(flags, data.facts("fashion-mnist"), ranks)


def test_a_student_alone_takes_all_ranks():
    flags = msd.Flags(dataset="fashion-mnist", students=[5], student=2, teacher="file", batch=64)
    ranks = common.Ranks()
    ranks.size = 8
    msd.check_ranks(flags, data.facts("fashion-mnist"), ranks)


def test_a_rank_that_dies_stops_the_others_with_a_message(tmp_path, tiny):
    (code0, text0), (code1, _) = launch(2, "dies", *image_argv(tiny, tmp_path, "--students", "1"))
    assert code1 == 9 and code0 == 2 and "another rank stopped" in text0 and "Traceback" not in text0


def test_rank_map():
    assert msd.rank_map(4, 16)[1] == "student 1: ranks 4-7"
    assert msd.rank_map(4, 3) == ["rank 0: students 0 3", "rank 1: students 1", "rank 2: students 2"]
