"""F, router, sampling by seed; K = 1 is dmd.py; resume bit for bit, old run folders too; students beside others."""
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import dmd
import edm
import evaluate
import msd
import sample
import teacher
import toy_mog
from conftest import ROOT, exit_code, forked, refused, same
from flags import UserError
from plot import draw
from run import load_json, load_shards, load_tensors, save_json
from students import Students, load_students, random_start, whole

pytestmark = pytest.mark.usefixtures("undrawn")
SMOKE = ["--preset", "smoke"]
AGAIN = [*SMOKE, "--students", "1", "3", "--seeds", "2"]  # as the fixture `run` was made


def weights(out, name="ema.pt", K=3):
    return load_tensors(out / "seed0" / f"students{K}" / "dm" / name)["net"]


def test_filter_dm_keeps_the_pairs_whole():
    """[MSD Sec. 3.2]: KL and GAN terms see Y_k; F_DM's pairs are of every class. Filtered, they are of Y_k alone."""
    D = whole(data.facts("toy"), pairs=40)
    for Y_k in msd.partition(8, 4):
        for F in (msd.filter_dm, msd.filter_adm, msd.filter_pairs):
            assert torch.equal(F(D, Y_k).conditions, Y_k)
        assert set(D.pair_label[msd.filter_dm(D, Y_k).pairs].tolist()) == set(range(8))
        assert torch.equal(msd.filter_adm(D, Y_k).real, Y_k)
        own = D.pair_label[msd.filter_pairs(D, Y_k).pairs]
        assert set(own.tolist()) == set(Y_k.tolist()) and len(own) == 10
    with pytest.raises(msd.UserError, match="of the classes 1 to 2"):
        msd.filter_adm(D._replace(real=torch.tensor([0])), torch.tensor([1, 2]))


def test_router_is_total():
    for K in range(1, 9):
        parts = msd.partition(8, K)
        student = msd.Router(parts)(torch.arange(8))
        assert all((student[p] == k).all() for k, p in enumerate(parts))
    for label in (torch.tensor([8]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(msd.UserError):
            msd.Router(msd.partition(8, 2))(label)


def test_route_gives_each_sample_to_its_own_student():
    """Three constant students: sample i must carry its own student's constant, in the order asked; one evaluation."""
    parts, calls = msd.partition(8, 3), []
    label = torch.randint(8, (50,), generator=torch.Generator().manual_seed(0))
    z = torch.randn(50, 2)

    def G(x, sigma, block_label):
        calls.append(x.shape[0])
        return x / 80 + torch.arange(3.0)[:, None, None]
    G.sigma_in = 80
    students, router = Students(data.facts("toy"), parts, G, [], 0.0, 0.0), msd.Router(parts)
    torch.testing.assert_close(msd.route(students, router, z, label), z + router(label)[:, None])
    assert msd.route(students, router, z[:1], label[:1]).shape == (1, 2) and calls == [3, 3]


def test_same_seed_same_latent_same_sample_whatever_the_batch(run):
    folder, label, seeds = run / "seed0" / "students3", torch.tensor([7, 0, 3, 3, 5]), [11, 12, 13, 14, 15]
    whole = msd.generate(folder, label, seeds)
    for i in range(5):
        assert torch.equal(common.latents(seeds, (2,))[i], common.latents([seeds[i]], (2,))[0])
        torch.testing.assert_close(msd.generate(folder, label[i:i + 1], seeds[i:i + 1])[0], whole[i], atol=1e-5, rtol=0)


def test_one_student_is_dmd_bit_for_bit(tmp_path, monkeypatch):
    """K = 1 through the wrapper equals the command `python dmd.py`."""
    argv = [*SMOKE, "--steps", "30", "--reg-warmup", "10"]
    assert msd.main([*argv, "--students", "1", "--out", str(tmp_path / "msd")]) == 0
    monkeypatch.setattr(sys, "argv", ["dmd.py", *argv, "--out", str(tmp_path / "dmd")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "dmd.py"), run_name="__main__")
    assert end.value.code == 0 and same(weights(tmp_path / "msd", K=1), weights(tmp_path / "dmd", K=1))


# ------------------------------------------------------------- resume

def killed(moment: str, count: int, argv: list[str], words: Path) -> None:
    """msd.py, killed with -9 in the middle of writing the count-th file of this name, which is left half written."""
    original, seen = torch.save, []

    def save(value, path, *rest):
        if moment in Path(path).as_posix():
            seen.append(path)
            if len(seen) == count:
                Path(path).write_bytes(b"half a fi")
                os.kill(os.getpid(), signal.SIGKILL)
        original(value, path, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        process = forked(msd.main, argv, words)
    assert exit_code(process) == -signal.SIGKILL, words.read_text()


SLOW = [pytest.param(name, 1, marks=pytest.mark.slow) for name in ("teacher/state", "students3/dm/state", "students3/dm/best")]


@pytest.mark.parametrize("moment, count", [("students3/dm/state", 3), *SLOW])
def test_interrupted_runs_resume_bit_for_bit(run, tmp_path, moment, count):
    """n steps = m steps + kill -9 + the rest: weights, metrics but for the seconds."""
    argv = [*AGAIN, "--save-every", "2", "--out", str(tmp_path)]
    killed(moment, count, argv, tmp_path / "words")
    assert not (tmp_path / "seed0/students3/dm/ema.pt").exists()
    assert msd.main(argv) == 0
    for name in ("ema.pt", "best.pt"):
        assert same(weights(run, name), weights(tmp_path, name))
    rows = [(out / "seed0/students3/dm/metrics.csv").read_text().splitlines() for out in (run, tmp_path)]
    without = [[(r.split(",")[0], *r.split(",")[2:]) for r in text] for text in rows]
    assert without[0] == without[1] and len(rows[0]) > 1


def test_ctrl_c_saves_and_says_how_to_resume(run, tmp_path):
    argv = f"--students 3 --teacher {run}/seed0/teacher/ema.pt --steps 9000 --save-every 97 --eval-every 9000"
    state, words = tmp_path / "seed0/students3/dm/state.pt", tmp_path / "words"
    process = forked(msd.main, [*SMOKE, *argv.split(), "--out", tmp_path], words)
    while not state.exists():
        time.sleep(0.02)
        assert os.waitpid(process, os.WNOHANG) == (0, 0), words.read_text()
    os.kill(process, signal.SIGINT)
    assert exit_code(process) == 130
    assert "the same command goes on" in words.read_text() and "Traceback" not in words.read_text()
    assert load_tensors(state)["step"] % 97 > 0


def test_students_do_not_notice_their_neighbours(run, tmp_path):
    """The same K = 3 trained alone equals the one trained beside K = 1 and a second seed (float32: to rounding)."""
    assert msd.main([*SMOKE, "--students", "3", "--out", str(tmp_path)]) == 0
    torch.testing.assert_close(weights(run), weights(tmp_path), atol=1e-4, rtol=1e-4)


def test_a_finished_run_is_reused_and_one_of_other_flags_is_not(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    argv = [*AGAIN, "--out", str(tmp_path / "run")]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.pt") if p.name != "samples.pt"}
    assert msd.main(argv) == 0
    assert "reused" in capsys.readouterr().out and {p: p.stat().st_mtime_ns for p in before} == before
    path = tmp_path / "run/seed0/students3/dm/config.json"
    save_json(path, {k: v for k, v in load_json(path).items() if k != "anneal"})  # as before there was this flag
    assert "anneal (None there, 200 now)" in refused(capsys, msd.main, argv)


@pytest.mark.parametrize("name", ["best.pt", "state.pt"])
def test_a_deleted_file_of_a_finished_run_is_made_again(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/seed0/students3/dm" / name).unlink()
    assert msd.main([*AGAIN, "--out", str(tmp_path / "run")]) == 0
    assert same(weights(run, "best.pt"), weights(tmp_path / "run", "best.pt"))


# ------------------------------------------------------- what is left

def test_random_weights_are_of_the_seed():
    """--init random: another net for every seed, the same for all students of one."""
    hashes = [common.fingerprint(random_start(data.facts("toy"), "B", seed).load()) for seed in (1, 2, 1)]
    assert hashes[0] == hashes[2] != hashes[1]


def test_one_student_trains_along(tmp_path, capsys):
    """On the toy K = 1 stands beside what was asked for, whatever the partition, and is measured."""
    assert msd.main([*SMOKE, "--students", "4", "--partition", "kmeans", "--out", str(tmp_path)]) == 0
    assert "K = 1, 4" in capsys.readouterr().out
    assert list(load_json(tmp_path / "results-kmeans.json")["students"]) == ["1", "4"]
    assert msd.parse(msd.Flags, msd.PRESETS, ["--dataset", "fashion-mnist", "--students", "5"]).students == [5]


def test_why_shows_the_student_of_class_0(tmp_path, monkeypatch):
    """Wherever it stands in the stack: at the first checkpoint and at the last."""
    argv = [*SMOKE, "--students", "4", "--partition", "random", "--steps", "60", "--save-every", "30"]
    assert msd.main([*argv, "--out", str(tmp_path)]) == 0
    asked, original = [], dmd.one_step
    monkeypatch.setattr(dmd, "one_step", lambda G, z, label: asked.append(G) or original(G, z, label))
    assert "why" in [path.stem.removesuffix("-random") for path in draw(tmp_path, "random")]
    home = tmp_path / "seed0/students4-random/dm"
    row = [0 in Y_k for Y_k in load_json(home / "config.json")["partition"]].index(True)
    for G, name, step in zip(asked, ("state.first.pt", "state.pt"), (30, 60), strict=True):
        saved = load_tensors(home / name)
        assert saved["step"] == step and row > 0
        assert torch.equal(G.net.b_out[0], saved["parts"]["G"]["net.b_out"][row])


def test_results_and_figures(run):
    results = load_json(run / "results.json")
    assert results["seeds"] == [0, 1] and set(results["students"]) == {"1", "3"} and results["metric"] == "l1"
    row = results["students"]["3"]
    assert row["l1"] == pytest.approx(np.mean([p["l1"] for p in row["per_seed"]])) and len(row["per_class"]) == 8
    figures = draw(run)
    assert [path.stem for path in figures] == ["figure4", "training"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in figures)
    config = load_json(run / "seed1/students3/dm/config.json")
    assert config["partition"] == [[0, 1, 2], [3, 4, 5], [6, 7]] and "out" not in config and "device" not in config


def test_teacher_from_a_path_and_best_is_chosen_on_other_draws(run, tmp_path, monkeypatch):
    """Training sees the `select` draw of the teacher alone; results.json is measured against `report`, another draw."""
    seen, original, path = [], dmd.train, run / "seed0/teacher/ema.pt"
    before = path.read_bytes()

    def spy(training, flags, task):
        seen.append(task.select.references[0])
        return original(training, flags, task)
    monkeypatch.setattr(dmd, "train", spy)
    assert msd.main([*SMOKE, "--students", "3", "--teacher", str(path), "--out", str(tmp_path)]) == 0
    torch.testing.assert_close(weights(run), weights(tmp_path), atol=1e-4, rtol=1e-4)
    assert path.read_bytes() == before
    label, judge = data.stratified(800, 8), evaluate.toy_judge(data.facts("toy"))
    drawn = [load_shards(tmp_path / "seed0/reference", name) for name in ("select", "report")]
    select, report = (judge.statistics(y, label) for y in drawn)
    assert torch.equal(seen[0], select) and not torch.equal(seen[0], report)


def test_exact_teacher(tmp_path):
    """Its samples are of the closed form, sample.py's too."""
    assert msd.main([*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path)]) == 0
    y = load_shards(tmp_path / "seed0/reference", "report")
    assert load_json(tmp_path / "seed0/students2/dm/config.json")["teacher"] == "exact"
    z = torch.randn(1, len(y), 2, generator=common.generator(0, "report"))
    torch.testing.assert_close(y[None], teacher.make_pairs(toy_mog.denoiser, z, data.stratified(len(y), 8)[None], 8))
    sample.main(f"--run {tmp_path} --students 2 --steps 8 --seeds 0-9 --out {tmp_path / 's'}".split())
    a = np.load(tmp_path / "s.npz")
    expected = edm.heun(toy_mog.denoiser, common.latents(range(10), (2,)), torch.tensor(a["label"]), 8)
    torch.testing.assert_close(torch.tensor(a["teacher"]), expected)


def test_churn_is_of_the_samples_to_compare_with(run, tmp_path, capsys):
    """[EDM Alg. 2] by --S_churn: other references, the same pairs; a run folder holds one kind."""
    more = ["--S_churn", "20", "--S_noise", "1.003", "--out", str(tmp_path / "a")]
    assert msd.main([*SMOKE, "--students", "2", "--stages", "teacher", *more]) == 0
    shutil.copytree(tmp_path / "a/seed0/teacher", tmp_path / "b/seed0/teacher")
    for name, flags in (("a", more), ("b", ["--out", str(tmp_path / "b")])):
        assert msd.main([*SMOKE, "--students", "2", *flags]) == 0
    for name, alike in (("pairs/64", True), ("reference", False)):
        one, other = (load_tensors(min((tmp_path / at / "seed0" / name).glob("*-0000.pt")))["y"] for at in "ab")
        assert torch.equal(one, other) == alike
    assert "S_churn (20.0 there, None now)" in refused(capsys, msd.main, [*SMOKE, "--students", "2", "--out", str(tmp_path / "a")])


def test_conditioning_sigma_is_kept_with_the_weights(tmp_path, capsys):
    """[MSD App. D.4]: G generates at this level, in training and afterwards; ADM goes on at it."""
    line = [*SMOKE, "--students", "2", "--stages", "dm,adm", "--conditioning-sigma", "5", "--out", str(tmp_path)]
    assert msd.main(line) == 0
    for stage in ("dm", "adm"):
        assert load_students(tmp_path / "seed0/students2" / stage).stack.sigma_in == 5
    assert "conditioning_sigma (5.0 there, 80.0 now)" in refused(capsys, msd.main, [*line[:-4], *line[-2:]])


def test_f_decides_what_a_student_is_asked_for(tmp_path, monkeypatch):
    """Not decoration: with another F the KL term asks for other classes, though the partition is the same."""
    asked = []

    def stop(run, flags, task):
        asked.extend(c.tolist() for c in run.draws.classes)
        raise UserError("enough")
    monkeypatch.setattr(msd.dmd, "train", stop)
    monkeypatch.setattr(msd, "filter_dm", lambda D, Y_k: D._replace(conditions=Y_k[:1]))
    with pytest.raises(SystemExit):
        msd.main(["--preset", "smoke", "--students", "2", "--out", str(tmp_path)])
    assert asked == [[0], [0], [4]]  # of K = 1, and of K = 2
