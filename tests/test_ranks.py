"""Two ranks see the batch of one; students go to ranks of their own; nobody waits for a rank that died."""
import os
import socket
from pathlib import Path

import pytest
import torch

import common
import msd
import rank_worker
import run as folders
from conftest import exit_code, forked
from students import load_students

pytestmark = pytest.mark.usefixtures("undrawn")


def launch(words: Path, main, *argv) -> list[tuple[int, str]]:
    """main(argv) on two ranks of this machine, as torchrun starts them; (exit code, output) of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    files = [words.with_name(f"{words.name}{r}") for r in "01"]
    ranks = [forked(main, argv, file, **env, RANK=r, LOCAL_RANK=r) for r, file in zip("01", files)]
    return [(exit_code(rank), file.read_text()) for rank, file in zip(ranks, files)]


@pytest.mark.parametrize("net", [pytest.param(n, marks=[pytest.mark.slow] * (n != "toy")) for n in rank_worker.STAGES])
def test_two_ranks_are_one_rank_on_the_joined_batch(tmp_path, net, double):
    """Float64, 20 updates of each stage (ADM: also critic, real data): equal to 1e-10."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    rank_worker.double(tmp_path / "one", net)
    results = launch(tmp_path / "words", lambda argv: rank_worker.double(tmp_path / "two", net))
    assert all(code == 0 for code, _ in results), results
    one, two = (torch.load(tmp_path / name / "weights.pt") for name in ("one", "two"))
    assert all(v.dtype == torch.float64 for v in one.values())
    torch.testing.assert_close(two, one, rtol=0, atol=1e-10)


def image_argv(tiny, out, *more) -> list[str]:
    return ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), *more]


def same_students(out, other, K=3) -> bool:
    files = [f"seed0/students{K}/dm/student{k}/ema.pt" for k in range(K)]
    a, b = ([folders.load_tensors(place / file)["net"] for file in files] for place in (out, other))
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b) for name in x)


@pytest.mark.slow
def test_students_in_turn_on_fewer_ranks_are_the_same_bit_for_bit(tmp_path, tiny, image_run):
    teacher = str(image_run / "seed0/teacher/ema.pt")
    results = launch(tmp_path / "words", msd.main, *image_argv(tiny, tmp_path, "--students", "3", "--teacher", teacher))
    assert all(code == 0 for code, _ in results), results
    assert same_students(image_run, tmp_path) and (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_one_student_at_a_time_is_the_same_bit_for_bit(tmp_path, tiny, image_run):
    """--student k, for job arrays: then the same command without it evaluates."""
    for k in (1, 2, 0):
        assert msd.main(image_argv(tiny, tmp_path, "--students", "3", "--student", str(k))) == 0
        assert not (tmp_path / "results.json").exists()
        if k == 2:
            with pytest.raises(FileNotFoundError, match="student0"):
                load_students(tmp_path / "seed0/students3")
    assert msd.main(image_argv(tiny, tmp_path, "--students", "3")) == 0
    assert same_students(image_run, tmp_path)


def ranks_of(size: int, rank: int = 0) -> common.Ranks:
    """As one of `size` ranks sees them, without the others."""
    ranks = common.Ranks()
    ranks.size, ranks.rank = size, rank
    return ranks


def test_ranks_share_a_batch():
    assert ranks_of(2, 1).parts(8, 2) == [slice(4, 6), slice(6, 8)]
    assert ranks_of(3, 2).share(5) == [2] and common.Ranks().parts(8) == [slice(0, 8)]
    assert ranks_of(2, 1).split(5)[0] == [1, 3] and common.Ranks().split(3)[0] == [0, 1, 2]


@pytest.mark.parametrize("share, words", [
    (lambda: ranks_of(2).parts(7), "batch of 7"), (lambda: ranks_of(8).parts(4), "batch of 4"),
    (lambda: ranks_of(2).parts(8, 3), "--micro-batch 3"), (lambda: ranks_of(6).split(4), "start 4 or")])
def test_what_does_not_divide(share, words):
    with pytest.raises(msd.UserError, match=words):
        share()


def test_a_rank_that_dies_stops_the_others_with_a_message(tmp_path, monkeypatch):
    """The second, after a few steps."""
    original, count = common.Ranks.add_gradients, []

    def add_gradients(self, net):
        count.append(1)
        if os.environ["RANK"] == "1" and len(count) == 3:
            os._exit(9)
        original(self, net)
    monkeypatch.setattr(common.Ranks, "add_gradients", add_gradients)
    argv = ("--preset", "smoke", "--students", "1", "--out", tmp_path)
    (code0, text0), (code1, _) = launch(tmp_path / "words", msd.main, *argv)
    assert code1 == 9 and code0 == 2 and "another rank stopped" in text0 and "Traceback" not in text0
