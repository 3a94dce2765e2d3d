"""Images end to end at smoke size: the run folder, resume after kill -9 anywhere, routing, sampling, LPIPS, misuse."""
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import dmd
import edm
import evaluate
import fid
import images
import msd
import plot
import run as folders
import sample
import students
import teacher
import test_snapshot
from conftest import refused, same, write_idx
from flags import parse
from plot import draw, read_metrics
from test_msd import killed
from test_ranks import image_argv as argv

pytestmark = pytest.mark.usefixtures("undrawn")
FACTS = data.DATASETS["fashion-mnist"]


# ------------------------------------------------------ the run folder

def test_results_and_figures(image_run):
    results = folders.load_json(image_run / "results.json")
    assert results["metric"] == "fd" and results["title"] == "FD (our classifier)"
    assert set(results["students"]) == {"1", "3"} and results["floor_data"] >= 0 and results["teacher"]["fd_data"] > 0
    for r in results["students"].values():
        assert r["fd"] > 0 and r["fd_data"] > 0 and len(r["per_class"]) == 10 and 0 <= r["right class"] <= 1
    assert [path.stem for path in draw(image_run)] == ["samples", "fd", "progress-dm", "training"]
    panels = plot.progress({3: image_run / "seed0/students3/dm"}, "fd")  # evaluated at the start and every 3 updates
    assert {title: x.shape for title, x in panels.items()} == dict.fromkeys(
        ("0 updates", "3 updates", "6 updates"), (18, 1, 16, 16))
    assert "FD (our classifier)" in evaluate.table(results)


def test_fd_in_the_results_is_the_distance_of_the_saved_samples(image_run, capsys, tmp_path):
    """results.json against fid.py's command line, from samples.pt and the data alone."""
    net = fid.load_classifier(image_run / "data" / "classifier-16px.pt")
    x = folders.load_tensors(image_run / "seed0/students3/dm/samples.pt")["x"]
    y = images.to_uint8(folders.load_shards(image_run / "seed0/reference", "report"))
    expected = fid.frechet_distance(*fid.statistics(net.features(x)), *fid.statistics(net.features(y)))
    assert folders.load_json(image_run / "results.json")["students"]["3"]["fd"] == pytest.approx(expected, rel=1e-9)
    for name, pixels in (("x", x), ("y", y)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    fid.main(["--images", str(tmp_path / "x.npz"), "--ref", str(tmp_path / "y.npz"),
              "--features", str(image_run / "data/classifier-16px.pt")])
    assert f"{expected:.4g}" in capsys.readouterr().out


def given_of(image_run) -> teacher.Given:
    D = students.load_network(image_run / "seed0/teacher/ema.pt").net
    made_with = json.loads((image_run / "seed0/pairs/40/config.json").read_text())
    lineage = {k: v for k, v in made_with.items() if k not in ("sampler_steps", "pairs")}
    return teacher.Given(0, FACTS, None, lineage, exact=False, cfg=1.0, net=D)


def test_pairs_are_the_teachers_ode_from_the_latents_that_the_index_gives(image_run):
    """z is regenerated, not stored; y lies in float16 within rounding of Heun from that z."""
    given = given_of(image_run)
    again = teacher.solve(image_run / "seed0/pairs/40", "pairs", 40, given, 3, common.Ranks())
    assert again["y"].dtype == torch.float16
    y = edm.heun(given.net, again["z"], again["label"], 3)
    assert (again["y"].float() - y).abs().max() < 2e-3 * max(1.0, y.abs().max())


def test_selection_is_by_the_students_own_classes_of_the_data(image_run, tiny):
    """[MSD App. E]: the last logged distance is that of ema.pt on Y_k against the test images of Y_k."""
    flags, ranks, given = parse(msd.Flags, msd.PRESETS, argv(tiny, image_run)), common.Ranks(), given_of(image_run)
    given.judge = evaluate.judge(flags.run, lambda: data.source(flags.run), ranks)
    given.references = {"select": given.judge.truth(0, 0)["real_select"]}
    select = students.Selection("select", [common.Student(0, 3, 1, (4, 5, 6))], {0: given}, 40, ranks)
    distance = select(students.load_students(image_run / "seed0/students3", "ema.pt")[1])
    steps, values = read_metrics(image_run / "seed0/students3/dm")["fd"]["student1"]
    assert steps[-1] == 6 and distance.item() == pytest.approx(values[-1], rel=1e-4)


def test_only_the_students_that_the_labels_need_are_read_and_asked_once_a_batch(image_run, monkeypatch):
    read, asked, original, one_step = [], [], students.load_network, dmd.one_step
    monkeypatch.setattr(students, "load_network", lambda path: read.append(path.parent.name) or original(path))
    monkeypatch.setattr(dmd, "one_step", lambda G, z, label: asked.append(len(z)) or one_step(G, z, label))
    found = students.load_students(image_run / "seed0/students3")
    x = msd.generate(found, torch.tensor([5, 4, 6, 5]), [1, 2, 3, 4])
    assert x.shape == (4, 1, 16, 16) and set(read) == {"student1"} and asked == [4]
    y = msd.generate(found, torch.tensor([5, 0, 6, 9, 4]), [1, 7, 3, 9, 2])
    assert set(read) == {"student0", "student1", "student2"} and asked == [4, 1, 3, 1]
    torch.testing.assert_close(y[[0, 4, 2]], x[[0, 1, 2]])


def test_sampling_writes_what_others_read(image_run, tmp_path, capsys):
    line = f"--run {image_run} --students 3 --classes 2 9 --folders --out {tmp_path / 's'}"
    for _ in range(2):
        sample.main([*line.split(), "--seeds", "3-8"])
    assert "other images" in refused(capsys, sample.main, [*line.split(), "--seeds", "4-9"])
    assert sorted(p.name for p in (tmp_path / "s-students").iterdir()) == [f"{i:06d}.png" for i in range(3, 9)]
    with np.load(tmp_path / "s-students.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 1) and f["arr_0"].dtype == np.uint8 and f["arr_1"].tolist() == [2, 9] * 3
        image = np.asarray(Image.open(tmp_path / "s-students" / "000004.png"))
        assert np.array_equal(image, f["arr_0"][1, ..., 0])
        x = images.to_uint8(msd.generate(image_run / "seed0/students3", torch.tensor([9]), [4]))
        assert np.abs(x[0, 0].numpy().astype(int) - image).max() <= 1
    assert images.read(tmp_path / "s-teacher.npz").shape == (6, 1, 16, 16) and (tmp_path / "s.png").exists()


@pytest.mark.slow
def test_students_of_nvidias_teacher(tmp_path):
    """From an EDM snapshot to routed samples: G starts as the snapshot's network, with its sigma_data and size."""
    path = tmp_path / "teacher.pkl"
    net = test_snapshot.snapshot_of(resolution=32, channels=3, classes=10, width=32, mult=(1, 2), attention=(16,))
    test_snapshot.dump(net, path)
    D = students.load_network(path).net
    for i, x in enumerate(np.random.default_rng(0).integers(0, 255, (100, 32, 32, 3)).astype(np.uint8)):
        folder = tmp_path / "data" / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / f"{i}.png")
    line = f"--dataset cifar10 --preset smoke --teacher {path} --data {tmp_path / 'data'} --out {tmp_path / 'run'}"
    assert msd.main(f"{line} --distance l2 --lr 0 --reg-lr 0 --ema 0".split()) == 0
    G = students.load_students(tmp_path / "run/seed0/students2", "ema.pt")[0]  # learning rate 0: still the teacher
    assert same(G.state_dict(), D.state_dict())
    assert msd.generate(tmp_path / "run/seed0/students2", torch.tensor([9, 0]), [1, 2]).shape == (2, 3, 32, 32)


# -------------------------------------------------------------- resume

def weights(out) -> dict:
    found = {str(p.relative_to(out)): p for p in out.rglob("*.pt") if p.name in ("ema.pt", "best.pt")}
    return {name: folders.load_tensors(path)["net"] for name, path in found.items()}


MOMENTS = [("student1/state", 2), ("pairs-", 2), ("teacher/state", 2), ("teacher/state", 1), ("teacher/ema", 1),
           ("classifier", 1), ("report-", 1), ("student1/state", 1), ("student2/best", 1), ("student2/ema", 1)]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Uninterrupted, with files of ten samples."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "fashion-mnist", dataclasses.replace(FACTS, chunk=10))
        assert msd.main(argv(tiny, out, "--students", "3")) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment, count", MOMENTS)
def test_killed_at_any_moment_and_run_again_is_the_same_bit_for_bit(whole, tiny, tmp_path, monkeypatch, moment, count):
    """kill -9 in the middle of writing the count-th such file; then the same command again."""
    words = argv(tiny, tmp_path, "--students", "3")
    monkeypatch.setitem(data.DATASETS, "fashion-mnist", dataclasses.replace(FACTS, chunk=10))
    killed(moment, count, words, tmp_path / "words")
    assert msd.main(words) == 0
    mine, expected = weights(tmp_path), weights(whole)
    assert len(mine) == 7 and all(same(mine[name], net) for name, net in expected.items())


# --------------------------------------------------------------- LPIPS

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
    def offline(*a, **k):
        raise OSError("no internet")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused(capsys, msd.main, argv(tiny, tmp_path / "o", "--distance", "lpips", "--students", "1"))
    assert "vgg16-397923af.pth" in line and str(tmp_path / "hub") in line and "--distance l2" in line
    assert not list(tmp_path.rglob("*.pt"))  # before anything is made


# -------------------------------------------------------------- misuse

@pytest.mark.parametrize("more, words", [
    ("--teacher {run}/seed0/teacher/ema.pt --resolution 32", "16, 16"), ("--teacher none.pkl", "none.pkl"),
    ("--teacher {run}/seed0/teacher/ema.pt --dataset toy", "10 classes"), ("--features nowhere.pt", "nowhere.pt"),
    ("--resolution 20", "--resolution 20"), ("--micro-batch 3", "--micro-batch 3")])
def test_refused_before_anything_is_made(capsys, image_run, tiny, tmp_path, more, words):
    line = refused(capsys, msd.main, argv(tiny, tmp_path, *more.format(run=image_run).split()))
    assert words in line and not list(tmp_path.rglob("*.pt"))


def test_files_of_a_run_that_are_not_what_they_were(capsys, image_run, tiny, tmp_path):
    """A damaged shard, other images."""
    copy = tmp_path / "copy"
    shutil.copytree(image_run, copy)
    (copy / "seed0/pairs/40/pairs-0000.pt").write_bytes(b"half")
    assert "pairs-0000.pt" in refused(capsys, msd.main, argv(tiny, copy))
    shutil.copytree(tiny, tmp_path / "other")
    write_idx(tmp_path / "other/train-labels-idx1-ubyte.gz", np.arange(200) // 20 % 10, True)
    assert f"{copy}/data was made with other flags" in refused(capsys, msd.main, argv(tmp_path / "other", copy))


def test_imagenet_dry_run_needs_neither_data_nor_weights(capsys, tmp_path, monkeypatch):
    """[MSD App. D.2.1]"""
    monkeypatch.chdir(tmp_path)
    assert msd.main(["--dataset", "imagenet64", "--students", "64", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("295,899,267", "GiB", "K = 64", "5,110,000  10,000 pairs, 511 each", "25,550,000  50,000 samples to compare with", "80 GB: 32"))
    for row in ("lr 2e-06", "steps 200000", "clip-norm 10.0", "reg-weight 0.25", "distance lpips", "sampler-steps 256",
                "pairs 10000", "beta2 0.999", "bins 20 980"):
        assert re.search(rf"--{row.replace(' ', ' +', 1)} +preset", text), row
    assert not list(tmp_path.iterdir())
