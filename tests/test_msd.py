"""Partition, F_DM, router, sampling by seed; K = 1 is dmd.py; resume bit for bit; a stack does not notice its neighbours."""
import json
import shutil
import signal
import subprocess
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
import msd
import sample
import toy_mog

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ["--preset", "smoke", "--quiet"]


@pytest.mark.parametrize("students", range(1, 9))
def test_partition_is_disjoint_covering_and_even(students):
    parts = msd.partition(8, students)
    assert len(parts) == students and torch.equal(torch.cat(parts), torch.arange(8))
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


@pytest.mark.parametrize("students", [0, -1, 9, 16])
def test_partition_refuses(students):
    with pytest.raises(common.UserError):
        msd.partition(8, students)


def test_filter_dm_keeps_the_pairs_whole():
    """[MSD Sec. 3.2]: KL classes are Y_k; for K >= 2 the pairs hold every class. Filtered, they hold Y_k alone."""
    label = data.stratified(40, 8)
    for classes_k in msd.partition(8, 4):
        kl, index = msd.filter_dm(label, classes_k)
        assert torch.equal(kl, classes_k) and set(label[index].tolist()) == set(range(8))
        _, index = msd.filter_dm(label, classes_k, filter_pairs=True)
        assert set(label[index].tolist()) == set(classes_k.tolist()) and len(index) == 10


def test_router_is_total():
    for K in range(1, 9):
        parts = msd.partition(8, K)
        student = msd.Router(parts)(torch.arange(8))
        for k, p in enumerate(parts):
            assert (student[p] == k).all()
    with pytest.raises(common.UserError):
        msd.Router(msd.partition(8, 2))(torch.tensor([8]))


def test_route_gives_each_sample_to_its_own_student():
    """A stack of three constant students: sample i must carry its own student's constant, in the order asked."""
    router = msd.Router(msd.partition(8, 3))
    label = torch.randint(8, (50,), generator=torch.Generator().manual_seed(0))
    z = torch.randn(50, 2)

    def G(x, sigma, block_label):
        assert x.shape[0] == 3
        return x / 80 + torch.arange(3.0)[:, None, None]
    torch.testing.assert_close(msd.route(G, router, z, label), z + router(label)[:, None])
    assert msd.route(G, router, z[:1], label[:1]).shape == (1, 2)


def test_same_seed_same_latent_same_sample_whatever_the_batch(run):
    folder = run / "seed0" / "students3"
    label = torch.tensor([7, 0, 3, 3, 5])
    seeds = [11, 12, 13, 14, 15]
    whole = msd.generate(folder, label, seeds)
    for i in range(5):
        assert torch.equal(msd.latents(seeds, (2,))[i], msd.latents([seeds[i]], (2,))[0])
        torch.testing.assert_close(msd.generate(folder, label[i:i + 1], seeds[i:i + 1])[0], whole[i], atol=1e-5, rtol=0)


def test_one_student_is_dmd_bit_for_bit(tmp_path):
    """K = 1 through the wrapper equals plain dmd.py after 50 updates."""
    argv = [*SMOKE, "--steps", "50", "--reg-warmup", "10"]
    assert msd.main([*argv, "--students", "1", "--out", str(tmp_path / "msd")]) == 0
    dmd.main([*argv, "--out", str(tmp_path / "dmd")])
    a, b = (common.load_tensors(tmp_path / n / "seed0" / "students1" / "dm" / "ema.pt")["net"] for n in ("msd", "dmd"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def weights(out, name="ema.pt", K=3):
    return common.load_tensors(out / "seed0" / f"students{K}" / "dm" / name)["net"]


@pytest.mark.slow
def test_interrupted_runs_resume_bit_for_bit(tmp_path):
    """n steps = m steps + kill -9 + the rest, in the students' training (test_tsm.py: in every stage; test_images.py: in many moments)."""
    argv = [*SMOKE, "--students", "3", "--steps", "60", "--teacher-steps", "300", "--save-every", "10"]
    assert msd.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "msd.py"), *argv, "--out", str(out)]
    for marker in ("students3/dm/state.pt",):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(3000):
            if (out / "seed0" / marker).exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert (out / "seed0" / marker).exists()
    assert not (out / "seed0" / "students3" / "dm" / "ema.pt").exists(), "the run was too fast to be killed"
    assert msd.main([*argv, "--out", str(out)]) == 0
    for name in ("ema.pt", "best.pt"):
        a, b = weights(tmp_path / "whole", name), weights(out, name)
        assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [(out / "seed0" / "students3" / "dm" / "metrics.csv").read_text().splitlines() for out in (tmp_path / "whole", out)]
    strip = [[(r.split(",")[0], *r.split(",")[2:]) for r in text] for text in rows]
    assert strip[0] == strip[1]                                     # equal but for the seconds


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    out = tmp_path / "run"
    argv = [*SMOKE, "--students", "3", "--steps", "4000", "--save-every", "4000", "--eval-every", "5000", "--out", str(out)]
    process = subprocess.Popen([sys.executable, str(ROOT / "msd.py"), *argv], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not (out / "seed0" / "students3" / "dm" / "metrics.csv").exists():
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "msd.py --preset smoke" in err and "Traceback" not in err
    assert 0 < common.load_tensors(out / "seed0" / "students3" / "dm" / "state.pt")["step"] < 4000


def test_students_do_not_notice_their_neighbours(run, tmp_path):
    """The same K = 3 trained alone equals the one trained beside K = 1 and a second seed (float32: to rounding)."""
    assert msd.main([*SMOKE, "--students", "3", "--out", str(tmp_path)]) == 0
    a, b = weights(run), weights(tmp_path)
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-4)


def test_a_finished_run_is_reused(run, capsys):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("ema.pt")}
    assert msd.main([*SMOKE, "--students", "1", "3", "--seeds", "2", "--out", str(run)]) == 0
    text = capsys.readouterr().out
    assert "reused" in text and {p: p.stat().st_mtime_ns for p in before} == before


def test_results_and_figures(run):
    results = json.loads((run / "results.json").read_text())
    assert results["seeds"] == [0, 1] and set(results["students"]) == {"1", "3"} and results["metric"] == "l1"
    row = results["students"]["3"]
    assert len(row["per_seed"]) == 2 and row["l1"] == pytest.approx(np.mean([p["l1"] for p in row["per_seed"]]))
    assert len(row["per_class"]) == 8 and 0 < row["l1"] <= 1 and row["l1_sd"] is not None
    for name in ("figure4", "l1", "students", "training", "teacher"):
        assert (run / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((run / "seed1" / "students3" / "dm" / "config.json").read_text())
    assert config["partition"] == [[0, 1, 2], [3, 4, 5], [6, 7]] and "out" not in config and "device" not in config


def test_best_is_chosen_on_other_draws(run, tmp_path, monkeypatch):
    """Training sees the `select` draw of the teacher alone; results.json is measured against `report`, another draw."""
    drawn = [common.load_shards(run / "seed0" / "reference", name) for name in ("select", "report")]
    assert not torch.equal(*drawn)
    seen = []
    original = dmd.train

    def spy(*args):
        seen.append(args[8][0])
        return original(*args)
    monkeypatch.setattr(dmd, "train", spy)
    assert msd.main([*SMOKE, "--students", "2", "--out", str(tmp_path)]) == 0
    counts = {}
    for name in ("select", "report"):
        y = common.load_shards(tmp_path / "seed0" / "reference", name)
        counts[name] = data.toy_statistics(y, data.stratified(len(y), 8))
    assert torch.equal(seen[0], counts["select"]) and not torch.equal(seen[0], counts["report"])


def test_target(run):
    argv = [*SMOKE, "--students", "1", "3", "--seeds", "2", "--out", str(run), "--target-l1"]
    assert msd.main([*argv, "0.000001"]) == 1 and msd.main([*argv, "0.999999"]) == 0


def test_exact_teacher(tmp_path):
    assert msd.main([*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path)]) == 0
    y = common.load_shards(tmp_path / "seed0" / "reference", "report")
    assert json.loads((tmp_path / "seed0" / "students2" / "dm" / "config.json").read_text())["teacher"] == "exact"
    z = torch.randn(1, len(y), 2, generator=common.generator(0, "report"))
    torch.testing.assert_close(y[None], dmd.make_pairs(toy_mog.denoiser, z, data.stratified(len(y), 8)[None], 8))
    sample.main(["--run", str(tmp_path), "--students", "2", "--steps", "8", "--timing", "0", "--out", str(tmp_path / "s")])
    a = np.load(tmp_path / "s.npz")                                 # the sampled teacher is the exact one too
    z = msd.latents(a["seed"], (2,))
    torch.testing.assert_close(torch.tensor(a["teacher"]), edm.heun(toy_mog.denoiser, z, torch.tensor(a["label"]), 8))


def test_teacher_from_a_path(run, tmp_path):
    path = run / "seed0" / "teacher" / "ema.pt"
    before = path.read_bytes()
    assert msd.main([*SMOKE, "--students", "3", "--teacher", str(path), "--out", str(tmp_path)]) == 0
    a, b = weights(run), weights(tmp_path)
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-4)
    assert path.read_bytes() == before


def test_rank_map():
    assert msd.rank_map(3, 1) == ["rank 0: students 0 1 2"]
    assert msd.rank_map(5, 2) == ["rank 0: students 0 2 4", "rank 1: students 1 3"]
    assert msd.rank_map(2, 4) == ["student 0: ranks 0-1", "student 1: ranks 2-3"]


def test_sample_command(run, tmp_path, capsys):
    out = tmp_path / "s"
    argv = ["--run", str(run), "--students", "3", "--steps", "8", "--timing", "64"]
    sample.main([*argv, "--classes", "6", "1", "--seeds", "0-9,40", "--out", str(out)])
    text = capsys.readouterr().out
    assert "15 function evaluations per sample" in text and "1 function evaluation per sample" in text and "samples per second" in text
    a = np.load(out.with_name("s.npz"))
    assert a["teacher"].shape == a["students"].shape == (11, 2) and a["label"].tolist() == [6, 1] * 5 + [6] and a["seed"][-1] == 40
    sample.main([*argv, "--classes", "6", "--seeds", "40", "--out", str(out)])
    b = np.load(out.with_name("s.npz"))
    for who in ("teacher", "students"):
        np.testing.assert_allclose(a[who][-1], b[who][0], atol=1e-5)


def test_verdict_rule_both_ways():
    """t(0.95, n - 1) standard errors of the paired differences: 2.13 at n = 5, 2.92 at n = 3."""
    assert common.verdict([1, 2, 3, 4, 5], [2, 3, 4.1, 5, 6])["verdict"] == "holds"
    assert common.verdict([2, 3, 4.1, 5, 6], [1, 2, 3, 4, 5])["verdict"] == "does not hold"
    error = 1.0 / 3 ** 0.5                                          # differences m - 1, m, m + 1: standard error 1 / sqrt(3)
    for mean, word in ((2.93 * error, "holds"), (2.91 * error, "does not hold")):
        assert common.verdict([0, 0, 0], [mean - 1, mean, mean + 1])["verdict"] == word
    assert common.verdict([1], [2])["verdict"] == "measured"


def test_against(run, capsys):
    argv = [*SMOKE, "--students", "3", "--seeds", "2", "--out", str(run)]
    assert msd.main([*argv, "--tag", "reg", "--dm-weight", "0"]) == 0
    capsys.readouterr()
    assert msd.main([*argv, "--against", "reg"]) == 0
    assert "K = 3, this below reg?" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        msd.main([*argv, "--against", "nothing"])


def test_results_of_other_flags_are_not_mixed(run, tmp_path, capsys):
    """K = 1 with other flags does not join the table of K = 3: the old one is set aside, and said so."""
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    shutil.rmtree(out / "seed0" / "students1")
    assert msd.main([*SMOKE, "--students", "1", "--lr", "0.002", "--out", str(out)]) == 0
    assert "moved to" in capsys.readouterr().out
    assert set(json.loads((out / "results.json").read_text())["students"]) == {"1"}
    assert set(json.loads((out / "results.previous.json").read_text())["students"]) == {"1", "3"}


@pytest.mark.parametrize("name", ["best.pt", "ema.pt", "state.pt"])
def test_a_deleted_file_of_a_finished_run_is_made_again(run, tmp_path, name):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    before = weights(out, "best.pt")
    (out / "seed0" / "students3" / "dm" / name).unlink()
    assert msd.main([*SMOKE, "--students", "1", "3", "--seeds", "2", "--out", str(out)]) == 0
    after = weights(out, "best.pt")
    assert all(torch.equal(before[k], after[k]) for k in before)
