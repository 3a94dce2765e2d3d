"""Images end to end at smoke size: the run folder, resume after kill -9 anywhere, routing, sampling, LPIPS, misuse."""
import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import dmd
import edm
import fid
import msd
import plot
import sample
import test_snapshot
from conftest import write_idx

ROOT = Path(__file__).resolve().parent.parent


def argv(tiny, out, *more) -> list[str]:
    return ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), "--quiet", "--threads", "1", *more]


def refused(capsys, main, words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    return err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------- the run folder

def test_results_and_figures(image_run):
    results = common.load_json(image_run / "results.json")
    assert results["metric"] == "fd" and results["title"] == "FD (our classifier)"
    assert set(results["students"]) == {"1", "3"} and results["floor_data"] >= 0 and results["teacher"]["fd_data"] > 0
    for r in results["students"].values():
        assert r["fd"] > 0 and r["fd_data"] > 0 and len(r["per_class"]) == 10 and 0 <= r["right class"] <= 1
    assert {p.name for p in (image_run / "figures").iterdir()} == {"samples.png", "fd.png", "training.png"}
    assert len(plot.draw(image_run)) == 3
    table = msd.table(results)
    assert "FD (our classifier)" in table and "FID" not in table


def test_fd_in_the_results_is_the_distance_of_the_saved_samples(image_run, capsys):
    """results.json against fid.py's command line, from samples.pt and the data alone."""
    net = fid.load_classifier(image_run / "data" / "classifier-16px.pt")
    saved = common.load_tensors(image_run / "seed0/students3/dm/samples.pt")
    y = common.to_uint8(common.load_shards(image_run / "seed0/reference", "report"))
    expected = fid.frechet_distance(*fid.statistics(net.features(saved["x"])), *fid.statistics(net.features(y)))
    assert common.load_json(image_run / "results.json")["students"]["3"]["fd"] == pytest.approx(expected, rel=1e-9)
    np.savez(image_run / "teacher.npz", arr_0=y.permute(0, 2, 3, 1).numpy())
    fid.main(["--images", str(image_run / "seed0/students3"), "--ref", str(image_run / "teacher.npz"), "--quiet",
              "--features", str(image_run / "data/classifier-16px.pt")])
    assert f": {expected:.4g} (40 images" in capsys.readouterr().out


def test_pairs_are_the_teachers_ode_from_the_latents_that_the_index_gives(image_run):
    """z is regenerated, not stored; y lies in float16 within rounding of Heun from that z."""
    D = edm.load_teacher(image_run / "seed0/teacher/ema.pt")
    ranks, facts = common.Ranks(), data.facts("fashion-mnist")
    again = dmd.solve(image_run / "seed0/pairs/40", "pairs", 40, None, facts, 0, 3, "cpu", ranks, True)
    assert again["y"].dtype == torch.float16
    y = edm.heun(D, again["z"], again["label"], 3)
    assert (again["y"].float() - y).abs().max() < 2e-3 * max(1.0, y.abs().max())


def test_selection_is_by_the_students_own_classes_of_the_data(image_run, tiny):
    """[MSD App. E]: the last logged distance is that of ema.pt on Y_k against the training images of Y_k."""
    flags = msd.Flags(dataset="fashion-mnist", out=str(image_run), data=str(tiny), quiet=True)
    judge = data.judge(flags, lambda: data.source(flags), torch.device("cpu"), common.Ranks())
    students = msd.load_students(image_run / "seed0/students3", "ema.pt")
    member = common.Member(0, 3, 1, (4, 5, 6))
    reference = {0: judge.truth(0, 0)["real"]}
    distance = dmd.own_distance(students.G.student(1), students.facts, judge, [member], reference, 40, "cpu", common.Ranks())
    rows = plot.read_metrics(image_run / "seed0/students3/dm")["fd"]["student1"]
    assert rows[0][-1] == 6 and distance.item() == pytest.approx(rows[1][-1], rel=1e-4)


def test_one_student_is_dmd_bit_for_bit(image_run, tiny, tmp_path):
    words = [w for w in argv(tiny, tmp_path) if w != "--students"]
    dmd.main(words)
    a, b = (common.load_tensors(p / "seed0/students1/dm/student0/ema.pt")["net"] for p in (image_run, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_only_the_students_that_the_labels_need_are_loaded(image_run):
    students = msd.load_students(image_run / "seed0/students3")
    x = msd.generate(students, torch.tensor([5, 4, 6, 5]), [1, 2, 3, 4])
    assert x.shape == (4, 1, 16, 16) and set(students.G.loaded) == {1}
    calls = []
    students.G.loaded[1].register_forward_hook(lambda *a: calls.append(1))
    y = msd.generate(students, torch.tensor([5, 0, 6, 9, 4]), [1, 7, 3, 9, 2])
    assert set(students.G.loaded) == {0, 1, 2} and len(calls) == 1                              # once per batch
    torch.testing.assert_close(y[[0, 4, 2]], x[[0, 1, 2]])


def test_sampling_writes_what_others_read(image_run, tmp_path, capsys):
    sample.main(["--run", str(image_run), "--students", "3", "--seeds", "3-8", "--classes", "2", "9", "--folders", "--timing", "0",
                 "--out", str(tmp_path / "s")])
    with np.load(tmp_path / "s-students.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 1) and f["arr_0"].dtype == np.uint8 and f["arr_1"].tolist() == [2, 9] * 3
        image = np.asarray(Image.open(tmp_path / "s-students" / "000004.png"))
        assert np.array_equal(image, f["arr_0"][1, ..., 0])
        x = common.to_uint8(msd.generate(image_run / "seed0/students3", torch.tensor([9]), [4]))
        assert np.abs(x[0, 0].numpy().astype(int) - image).max() <= 1
    assert fid.read_images(tmp_path / "s-teacher.npz")[0].shape == (6, 1, 16, 16) and (tmp_path / "s.png").exists()


def test_exact_kde_and_stack_belong_to_the_toy(capsys, tiny, tmp_path):
    assert "closed form" in refused(capsys, msd.main, argv(tiny, tmp_path, "--teacher", "exact"))
    assert "--fake net" in refused(capsys, msd.main, argv(tiny, tmp_path, "--fake", "kde"))
    assert "--student 0" in refused(capsys, msd.main, ["--student", "0", "--out", str(tmp_path)])
    assert "--student 3" in refused(capsys, msd.main, argv(tiny, tmp_path, "--student", "3", "--students", "3"))


@pytest.mark.slow
def test_students_of_nvidias_teacher(tmp_path):
    """From an EDM snapshot to routed samples: G starts as the snapshot's network, with its sigma_data and size."""
    path = tmp_path / "teacher.pkl"
    test_snapshot.dump(test_snapshot.snapshot_of(resolution=32, channels=3, classes=10, width=32, mult=(1, 2), attention=(16,)), path)
    D = edm.load_teacher(path)
    assert D.facts.name == "cifar10" and not any(p.requires_grad for p in D.parameters())
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = np.random.default_rng(0).integers(0, 255, (20, 3073)).astype(np.uint8)
        rows[:, 0] = np.arange(20) % 10
        (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
    out = tmp_path / "run"
    assert msd.main(["--dataset", "cifar10", "--preset", "smoke", "--teacher", str(path), "--data", str(tmp_path), "--out", str(out),
                     "--distance", "l2", "--quiet", "--lr", "0", "--reg-lr", "0", "--weight-decay", "0", "--ema", "0"]) == 0
    G = msd.load_students(out / "seed0/students2", "ema.pt").G.student(0)                       # learning rate 0: still the teacher
    assert all(torch.equal(a, b) for a, b in zip(G.parameters(), D.parameters()))
    assert msd.generate(out / "seed0/students2", torch.tensor([9, 0]), [1, 2]).shape == (2, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------------------ resume

def files(out: Path) -> dict:
    return {str(p.relative_to(out)): p for p in out.rglob("*.pt")}


def weights(out: Path) -> dict:
    return {k: common.load_tensors(p)["net"] for k, p in files(out).items() if p.name in ("ema.pt", "best.pt")}


MOMENTS = [("student1/state", 2), ("pairs-", 2), ("teacher/state", 2), ("teacher/state", 1), ("teacher/ema", 1), ("classifier", 1), ("report-", 1), ("student1/state", 1), ("student2/best", 1), ("student2/ema", 1)]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Uninterrupted, with files of ten samples."""
    out, facts = tmp_path_factory.mktemp("whole") / "run", data.DATASETS["fashion-mnist"]
    data.DATASETS["fashion-mnist"] = dataclasses.replace(facts, chunk=10)
    assert msd.main(argv(tiny, out, "--students", "3")) == 0
    data.DATASETS["fashion-mnist"] = facts
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment, count", MOMENTS)
def test_killed_at_any_moment_and_run_again_is_the_same_bit_for_bit(whole, tiny, tmp_path, monkeypatch, moment, count):
    """kill -9 in the middle of writing the count-th such file, which is left half written; then the same command again."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data, dataclasses
torch.set_num_threads(1)
data.DATASETS["fashion-mnist"] = dataclasses.replace(data.DATASETS["fashion-mnist"], chunk=10)
import msd
original, seen = torch.save, []
def save(value, path, *rest):
    if {moment!r} in str(path).replace(os.sep, "/"):
        seen.append(path)
        if len(seen) == {count}:
            open(path, "wb").write(b"half a fi")
            os.kill(os.getpid(), signal.SIGKILL)
    original(value, path, *rest)
torch.save = save
msd.main(sys.argv[1:])
"""
    words = argv(tiny, tmp_path, "--students", "3")
    monkeypatch.setitem(data.DATASETS, "fashion-mnist", dataclasses.replace(data.DATASETS["fashion-mnist"], chunk=10))
    killed = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert msd.main(words) == 0
    mine, expected = weights(tmp_path), weights(whole)
    assert set(mine) == set(expected) and len(mine) == 7
    for name in expected:
        assert all(torch.equal(mine[name][k], expected[name][k]) for k in expected[name]), name


# ------------------------------------------------------------------------------------------------------------------- LPIPS

def test_lpips_distance_with_random_weights():
    distance = dmd.lpips_distance("cpu", random_weights=True)
    x = torch.rand(1, 2, 1, 16, 16) * 2 - 1
    y = x.clone()
    y[0, 1] += 0.3
    d = distance(x.requires_grad_(True), y.half())
    assert d.shape == (1, 2) and d[0, 1] > 50 * d[0, 0].abs()
    d.sum().backward()
    assert x.grad.abs().sum() > 0


def test_lpips_without_weights_says_which_file_to_put_where(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    def offline(*a, **k):
        raise OSError("no internet")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused(capsys, msd.main, argv(tiny, tmp_path / "o", "--distance", "lpips", "--students", "1"))
    assert "vgg16-397923af.pth" in line and str(tmp_path / "hub") in line and "--distance l2" in line


# ------------------------------------------------------------------------------------------------------------------- misuse

def test_teacher_of_another_resolution(capsys, image_run, tiny, tmp_path):
    path = str(image_run / "seed0/teacher/ema.pt")
    line = refused(capsys, msd.main, argv(tiny, tmp_path, "--resolution", "32", "--teacher", path))
    assert "1x16x16" in line and "1x32x32" in line and "--resolution" in line
    assert "10 classes" in refused(capsys, msd.main, ["--preset", "smoke", "--teacher", path, "--out", str(tmp_path), "--quiet"])
    assert not list(tmp_path.rglob("*.pt"))


def test_missing_teacher_snapshot(capsys, tmp_path):
    line = refused(capsys, msd.main, ["--dataset", "imagenet64", "--teacher", str(tmp_path / "none.pkl"), "--out", str(tmp_path / "o"), "--device", "cpu"])
    assert "none.pkl" in line


def test_gpu_memory(capsys, tiny, tmp_path, monkeypatch):
    def full(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(dmd, "one_step", full)
    assert "--micro-batch" in refused(capsys, msd.main, argv(tiny, tmp_path, "--students", "1"))


def test_micro_batch_must_divide(capsys, tiny, tmp_path):
    assert "--micro-batch 3" in refused(capsys, msd.main, argv(tiny, tmp_path, "--micro-batch", "3"))
    assert not list(tmp_path.rglob("*.pt"))


def test_other_images_in_the_same_run_folder(capsys, image_run, tiny, tmp_path):
    import shutil
    shutil.copytree(tiny, tmp_path / "other")
    write_idx(tmp_path / "other/train-labels-idx1-ubyte.gz", np.arange(200) // 20 % 10, True)
    line = refused(capsys, msd.main, argv(tmp_path / "other", image_run))
    assert "other images" in line and "--data" in line


@pytest.mark.parametrize("more, words", [
    (["--pairs", "1"], "--pairs 1: at least two per class, 20"), (["--tag", "../x"], "--tag ../x"), (["--features", "nowhere.pt"], "nowhere.pt"),
    (["--bins", "0", "999", "--fake-bins", "0", "500"], "--fake-bins"), (["--resolution", "20"], "--resolution 20")])
def test_refused_before_anything_is_made(capsys, tiny, tmp_path, more, words):
    assert words in refused(capsys, msd.main, argv(tiny, tmp_path, *more))
    assert not list(tmp_path.rglob("*.pt"))


def test_cut_off_metrics_are_drawn(image_run, tmp_path):
    import shutil
    shutil.copytree(image_run, tmp_path / "copy")
    path = tmp_path / "copy/seed0/students3/dm/student1/metrics.csv"
    path.write_text(path.read_text() + "6,1.2")
    assert plot.draw(tmp_path / "copy")


def test_old_pictures_do_not_stay_in_the_folder(image_run, tmp_path):
    for seeds in ("0-9", "3-5"):
        sample.main(["--run", str(image_run), "--students", "3", "--seeds", seeds, "--folders", "--of", "students", "--timing", "0", "--out", str(tmp_path / "s")])
    assert sorted(p.name for p in (tmp_path / "s-students").iterdir()) == ["000003.png", "000004.png", "000005.png"]


def test_damaged_shard(capsys, image_run, tiny, tmp_path):
    import shutil
    shutil.copytree(image_run, tmp_path / "copy")
    (tmp_path / "copy/seed0/pairs/40/pairs-0000.pt").write_bytes(b"half")
    assert "pairs-0000.pt" in refused(capsys, msd.main, argv(tiny, tmp_path / "copy"))


@pytest.mark.parametrize("students", [4, 64])
def test_imagenet_dry_run_needs_neither_data_nor_weights(capsys, tmp_path, monkeypatch, students):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert msd.main(["--dataset", "imagenet64", "--students", str(students), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in ("295,899,267 a network", "GiB", f"K = {students}, {4 * students} ranks (32 samples a rank and update): student 0: ranks 0-3",
                  "10,000 times 511 evaluations"):
        assert words in text
    for flag, value in (("--lr", "2e-06"), ("--steps", "200000"), ("--clip-norm", "10.0"), ("--reg-weight", "0.25"), ("--distance", "lpips"),
                        ("--sampler-steps", "256"), ("--pairs", "10000"), ("--beta2", "0.999"), ("--bins", "20 980"), ("--fake-bins", "0 999")):
        assert f"{flag} " in text and any(line.split()[:1] == [flag] and value in line and "preset" in line for line in text.splitlines()), flag
    assert not list(tmp_path.iterdir()) and time.perf_counter() - start < 60
