"""TSM: its loss and what minimises it; smaller students stage by stage; post-distillation; what a stage starts from."""
import shutil
from dataclasses import replace

import pytest
import torch

import data
import dmd
import edm
import msd
import post
import tsm
from common import Student
from conftest import ALL, SMALL, Killed, denoiser, given, kill_after, options, refused, same, trained
from flags import UserError, parse
from run import load_json, load_tensors, save_tensors
from students import first_start
from test_dmd import best_slope

SMOKE = ["--preset", "smoke"]
pytestmark = pytest.mark.usefixtures("undrawn")


def nets(out) -> dict:
    """Every result of a run, {place and name: weights}."""
    paths = [p for p in sorted(out.rglob("*.pt")) if p.name in ("ema.pt", "best.pt")]
    found = {p.relative_to(out): load_tensors(p)["net"] for p in paths}
    return {f"{p} {k}": v for p, net in found.items() for k, v in net.items()}


def image_teacher(path, size: str) -> None:
    """An untrained one."""
    net = edm.Precond(data.facts("fashion-mnist").net(1, size)).state_dict()
    save_tensors(path, {"dataset": "fashion-mnist", "resolution": 16, "size": size, "net": net})


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the run `small`, to be gone on with."""
    return shutil.copytree(small, tmp_path / "copy")


def test_loss_is_zero_at_the_teacher_and_its_gradient_spares_it():
    frozen, x = denoiser(seed=1), torch.randn(1, 6, 2)
    label, sigma, noise = torch.randint(8, (1, 6)), torch.rand(1, 6) + 0.1, torch.randn(1, 6, 2)
    assert tsm.tsm_loss(frozen, frozen, x, label, sigma, noise).abs().max() == 0
    student = denoiser(seed=2)
    tsm.tsm_loss(student, frozen, x, label, sigma, noise).sum().backward()
    assert all(p.grad is None for p in frozen.parameters()) and any(p.grad.any() for p in student.parameters())
    shifted = tsm.tsm_loss(lambda *a: frozen(*a) + 0.3, frozen, x, label, sigma, noise)
    torch.testing.assert_close(shifted, edm.loss_weight(sigma) * 0.09)  # [MSD App. D.2.2]'s weight, mean over elements


def test_the_minimiser_is_the_teacher_not_the_data():
    """Data N(0, 0.2^2), a teacher whose slope is 20 % too large: TSM's best slope is that, the denoising loss's not."""
    exact = 0.2 ** 2 / (0.2 ** 2 + 0.1 ** 2)
    found = best_slope(lambda D, *rest: tsm.tsm_loss(D, lambda x, *_: 1.2 * exact * x, *rest), 0.2, 0.1)
    assert found == pytest.approx(1.2 * exact, rel=1e-4)
    assert best_slope(edm.denoising_loss, 0.2, 0.1) == pytest.approx(exact, rel=0.01)


def test_post_steps_are_those_of_the_three_stages():
    flags = options("--tsm-steps 10 --steps 20 --adm-steps 30 --batch 7")
    assert post.length(flags) == (60, 7)


def test_post_learns_what_it_imitates(tmp_path):
    """On latents that it has not seen: half of the distance, at least, is gone."""
    flags = options("--tsm-steps 50 --steps 100 --adm-steps 100 --batch 64 --reg-lr 1e-2 --eval-every 500")
    best, z, label = denoiser(16, 1), torch.randn(1, 500, 2), data.stratified(500, 8)[None]
    G = trained(post, [Student(0, 1, 0, ALL)], flags, tmp_path, imitated=best, inputs={0: given(pairs=4000)})["ema.pt"]
    y, before, after = (dmd.one_step(net, z, label) for net in (best, denoiser(12), G))
    assert dmd.regression_loss(after, y).mean() < 0.5 * dmd.regression_loss(before, y).mean()


@pytest.mark.parametrize("line, own", [("--tsm-common", False), ("--no-tsm-common", True)])
def test_own_tsm_networks(tmp_path, drawn, line, own):
    """One network for all learns from the whole data, one per student from its own classes."""
    group = [Student(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
    trained(tsm, group, options("--tsm-steps 2 --tsm-batch 64 " + line), tmp_path)
    assert [{*row.tolist()} for row in torch.cat(drawn, 1)] == [{*(s.classes if own else ALL)} for s in group]


# ---------------------------------------------------------- whole runs

def test_three_stages_of_small_students(small, tmp_path):
    results = load_json(small / "results-XXS.json")
    assert results["size"] == "XXS" and list(results["stages"]) == ["dm", "adm"]
    folders = [small / "seed0" / p for p in ("tsm/XXS-12", "students3-XXS/dm", "students3-XXS/adm")]
    assert all(load_tensors(f / "ema.pt")["size"] == "XXS" for f in folders)
    fake = load_tensors(folders[1] / "state.pt")["parts"]["mu_fake"]
    mu_teacher = load_tensors(small / "seed0/teacher/ema.pt")["net"]
    assert {k: v.shape[1:] for k, v in fake.items()} == {k: v.shape[1:] for k, v in mu_teacher.items()}  # not XXS
    assert "start" in load_json(folders[1] / "config.json")
    assert "start" not in load_json(small / "seed0/students3/dm/config.json")
    assert msd.generate(small / "seed0/students3-XXS", torch.tensor([0, 7]), [1, 2]).shape == (2, 2)


def test_dm_starts_from_the_tsm_network(copy):
    """With learning rates of 0 the small students still are the common TSM network."""
    still = ["--stages", "tsm,dm", "--tag", "still", "--lr", "0", "--reg-lr", "0"]
    assert msd.main([*SMALL, *still, "--out", str(copy)]) == 0
    start = load_tensors(copy / "seed0/tsm/XXS-12/ema.pt")["net"]
    G = load_tensors(copy / "seed0/students3-still/dm/ema.pt")["net"]
    assert all(torch.equal(G[k][i], start[k][0]) for k in G for i in range(3))


def test_post_distillation_imitates_the_best_students(copy, monkeypatch):
    seen, original = [], post.train
    monkeypatch.setattr(post, "train", lambda run, flags, task: seen.append(task) or original(run, flags, task))
    assert msd.main([*SMALL, "--stages", "post", "--steps", "2", "--adm-steps", "2", "--out", str(copy)]) == 0
    best = load_tensors(copy / "seed0/students3/adm/best.pt")["net"]
    imitated = {k: v[1:] for k, v in seen[0].imitated.state_dict().items()}  # after K = 1
    assert same(imitated, best) and not any(p.requires_grad for p in seen[0].imitated.parameters())
    config = load_json(copy / "seed0/students3-XXS-post/post/config.json")
    assert config["start"] == "random" and config["post_steps"] == 16


@pytest.mark.parametrize("stage, step", [("tsm", 12), ("adm", 5)])
def test_killed_in_any_stage_and_run_again_is_the_same_bit_for_bit(small, tmp_path, monkeypatch, stage, step):
    """Between two stages, and in the middle of one; then the same command again."""
    out = tmp_path / "run"
    for name in ("teacher", "pairs", "reference", "students1", "students3"):
        shutil.copytree(small / "seed0" / name, out / "seed0" / name)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, stage, step)
        msd.main([*SMALL, "--out", str(out)])
    assert msd.main([*SMALL, "--out", str(out)]) == 0
    assert same(nets(small), nets(out))


def test_the_exact_teacher_takes_its_weights_from_tsm(tmp_path, monkeypatch, capsys):
    """No teacher is trained: a TSM network of full size is what everything starts from; another one is noticed."""
    monkeypatch.setattr(edm, "train", lambda *a: pytest.fail("an EDM teacher was trained"))
    argv = [*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path)]
    assert msd.main(argv) == 0
    assert (tmp_path / "seed0/tsm/B-20/ema.pt").exists() and not (tmp_path / "seed0/teacher").exists()
    assert "weights of exact" in refused(capsys, msd.main, [*argv, "--tsm-steps", "21"])


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--student-size XXS --stages tsm,dm,adm --no-tsm-common", "--method cd"])
def test_images_of_every_stage(image_run, tiny, tmp_path, line):
    """Image students, each a network of its own; small ones after a TSM network of their own; sampled by the router."""
    shutil.copytree(image_run / "data", tmp_path / "run/data")
    image_teacher(tmp_path / "teacher.pt", "XS")
    argv = ["--dataset", "fashion-mnist", *SMOKE, "--data", str(tiny), "--out", str(tmp_path / "run"), *line.split()]
    assert msd.main([*argv, "--students", "2", "--teacher", str(tmp_path / "teacher.pt")]) == 0
    home = tmp_path / "run/seed0" / ("students2-cd" if "cd" in line else "students2-XXS")
    students = msd.load_students(home)
    assert [f.parent.parent.name for f in students.files] == ["cd" if "cd" in line else "adm"] * 2
    assert students[0].sigma_min == edm.SIGMA_MIN * ("cd" in line)
    assert msd.generate(students, torch.tensor([1, 9]), [2, 3]).shape == (2, 1, 16, 16)


# -------------------------------------------------------------- starts

def begun(small, line: str, student: Student = Student(0, 3, 1, (3, 4, 5))):
    """What a student starts from."""
    flags = options(f"--students 3 --tsm-steps 12 --out {small} {line}")
    return first_start(flags, student, replace(given(), size="B", net=edm.Precond(data.facts("toy").net(1)))).start


def test_random_and_path_starts(small):
    """--init, and what it is without: every way leads to the weights of one file, of the student's own row."""
    root = small / "seed0"
    for line, place, row in (
            (f"--init {root}/tsm/XXS-12/ema.pt --student-size XXS", "tsm/XXS-12/ema.pt", 0),
            ("--init tsm --student-size XXS", "tsm/XXS-12/ema.pt", 0), ("--stages adm", "students3/dm/best.pt", 1),
            ("--init dm", "students3/dm/best.pt", 1), ("--init adm", "students3/adm/best.pt", 1),
            ("--init dm-XXS --student-size XXS", "students3-XXS/dm/best.pt", 1),
            ("--stages adm --student-size XXS", "students3-XXS/dm/best.pt", 1)):
        want, found = load_tensors(root / place)["net"], begun(small, line).load().state_dict()
        assert all(torch.equal(found[k][0], v[row]) for k, v in want.items()), line
    assert begun(small, "").name == "teacher"
    fresh = [begun(small, line, s).load().state_dict() for line, s in (
        ("--init random", Student(0, 3, 1, (3, 4, 5))), ("--stages tsm", Student(0, 8, 0, (0,))))]
    assert same(*fresh)  # for all students of a seed


@pytest.mark.parametrize("line, words", [
    ("--stages adm --init dm-XXS", "of size XXS"), ("--init dm --student-size XS", "of size B"),
    ("--init dm-nothing", "students3-nothing/dm"), ("--init nowhere.pt", "nowhere.pt"),
    ("--init {images}", "fashion-mnist"), ("--init {small}/seed0/students3/dm/best.pt", "3 network"),
    ("--partition random --init dm-", "same --partition"), ("--init tsm-x --student-size XXS", "tsm-x")])
def test_what_is_no_start(small, tmp_path, line, words):
    """Of another size, data, or classes; not there; more than one network."""
    image_teacher(tmp_path / "images.pt", "XXS")
    student = Student(0, 3, 1, (1, 2, 7) if "random" in line else (3, 4, 5))
    with pytest.raises((UserError, OSError), match=words):
        begun(small, line.format(small=small, images=tmp_path / "images.pt"), student)


def test_imagenet_presets_of_each_size():
    """[MSD App. D.2.1, D.2.2, B.6] to the letter."""
    for size, dm, adm, lr, tsm_batch, common in (
            ("", 128, 192, 5e-7, 576, True), ("S", 160, 160, 5e-7, 576, False), ("XS", 224, 224, 2e-6, 3584, True),
            ("XXS", 256, 256, 2e-6, 4864, True)):
        f = parse(msd.Flags, msd.PRESETS, ["--dataset", "imagenet64", "--student-size", size])
        assert (f.dm.batch, f.adm.batch, f.adm.lr, f.tsm.batch, f.tsm.common) == (dm, adm, lr, tsm_batch, common)
        assert (f.tsm.steps, f.tsm.lr, f.adm.steps) == (400_000, 1e-4, 150_000)
        assert (f.adm.gan_weight, f.adm.critic_weight) == (3e-3, 1e-2)
