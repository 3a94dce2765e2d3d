"""TSM: its loss and what minimises it; smaller students stage by stage; post-distillation; orders, starts, specialised students; resume."""
import shutil
from pathlib import Path

import pytest
import torch

import adm
import common
import data
import dmd
import edm
import msd
import sample
import toy_mog
import tsm
from conftest import SMALL, assert_stack_is_its_members, refused
from test_dmd import precond

SMOKE = ["--preset", "smoke", "--quiet"]


def trained(out) -> dict:
    """Every result of a run, by its place."""
    return {str(p.relative_to(out)): common.load_tensors(p)["net"] for p in sorted(out.rglob("*.pt")) if p.name in ("ema.pt", "best.pt")}


def equal(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f])


def test_loss_is_zero_at_the_teacher_and_its_gradient_spares_it():
    teacher, x = precond(seed=1), torch.randn(1, 6, 2)
    label, sigma, noise = torch.randint(8, (1, 6)), torch.rand(1, 6) + 0.1, torch.randn(1, 6, 2)
    assert tsm.tsm_loss(teacher, teacher, x, label, sigma, noise).abs().max() == 0
    student = precond(seed=2)
    tsm.tsm_loss(student, teacher, x, label, sigma, noise).sum().backward()
    assert all(p.grad is None for p in teacher.parameters()) and any(p.grad.abs().sum() > 0 for p in student.parameters())
    shifted = tsm.tsm_loss(lambda *a: teacher(*a) + 0.3, teacher, x, label, sigma, noise)
    torch.testing.assert_close(shifted, edm.loss_weight(sigma) * 0.09)                          # [MSD App. D.2.2]'s weight, mean over elements


def test_the_minimiser_is_the_teacher_not_the_data():
    """Data N(0, 0.2^2), a teacher whose slope is 20 % too large: the best slope of TSM is the teacher's, that of the denoising loss is not."""
    g = torch.Generator().manual_seed(0)
    s, level, n = 0.2, 0.1, 100_000
    exact = s ** 2 / (s ** 2 + level ** 2)
    x, noise, sigma = s * torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g), torch.full((n,), level)
    found = []
    for loss in (lambda D: tsm.tsm_loss(D, lambda x, sigma, label: 1.2 * exact * x, x, None, sigma, noise), lambda D: edm.denoising_loss(D, x, None, sigma, noise)):
        slope = torch.tensor(0.0, requires_grad=True)
        first, = torch.autograd.grad(loss(lambda x, sigma, label: slope * x).mean(), slope, create_graph=True)
        second, = torch.autograd.grad(first, slope)
        found.append(-(first / second).item())
    assert found[0] == pytest.approx(1.2 * exact, rel=1e-4) and found[1] == pytest.approx(exact, rel=0.01)


def test_toy_sizes():
    """Each about a third of the one before; XS has less than a fifth of the teacher's parameters."""
    count = {s: sum(p.numel() for p in toy_mog.toy_net(1, s).parameters()) for s in toy_mog.SIZES}
    assert count == {"B": 24162, "S": 9822, "XS": 3782, "XXS": 1100}


def small_tsm(tmp_path, members, name, teacher=None):
    flags = tsm.Flags(dataset="toy", tsm_steps=40, tsm_batch=8, save_every=100, quiet=True)
    net = edm.Precond(toy_mog.ToyNet(len(members), 12), 0.5)
    net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in precond(1, 12).state_dict().items()})
    run = common.Stage("tsm", {tmp_path / name: slice(0, len(members))}, flags.tsm_steps, flags.save_every, quiet=True)
    return tsm.train(run, flags, members, teacher or toy_mog.denoiser, net, data.Mixture(data.facts("toy")), torch.device("cpu")).state_dict()


def small_post(tmp_path, members, name):
    flags = adm.Flags(dataset="toy", post_steps=40, batch=8, save_every=100, eval_every=100, select_samples=80, quiet=True, warmup=1)
    def stack(seed, width):
        net = edm.Precond(toy_mog.ToyNet(len(members), width), 0.5)
        net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in precond(1, width, seed).state_dict().items()})
        return net
    run = common.Stage("post", {tmp_path / name: slice(0, len(members))}, 40, flags.save_every, quiet=True)
    reference = {0: data.toy_statistics(toy_mog.sample(data.stratified(800, 8), common.generator("ref")), data.stratified(800, 8))}
    return tsm.train_post(run, flags, members, stack(1, 16).requires_grad_(False), stack(0, 12), data.toy_judge(data.facts("toy")), reference, torch.device("cpu"))[0].state_dict()


@pytest.mark.parametrize("train", [small_tsm, small_post])
def test_stack_equals_separate_runs(tmp_path, double, train):
    assert_stack_is_its_members(lambda members, name: train(tmp_path, members, name))


def test_a_short_training_approaches_the_teacher(tmp_path):
    """The error against the exact denoiser falls well below that of the start."""
    flags = tsm.Flags(dataset="toy", tsm_steps=250, tsm_batch=128, save_every=1000, quiet=True)
    facts, members = data.facts("toy"), [common.Member(0, 1, 0, tuple(range(8)))]
    start = edm.Precond(facts.net(1, "XS"), 0.5)
    run = common.Stage("tsm", {tmp_path: slice(0, 1)}, 250, 1000, quiet=True)
    D = tsm.train(run, flags, members, toy_mog.denoiser, start, data.Mixture(data.facts("toy")), torch.device("cpu"))
    levels = torch.tensor([0.1, 0.5])
    before, after = (edm.error_by_level(net, facts.exact, levels, facts, 0, 2000) for net in (start.requires_grad_(False), D))
    assert (after < 0.5 * before).all()


# ------------------------------------------------------------------------------------------------------------ whole runs

def test_three_stages_of_small_students(small, tmp_path):
    results = common.load_json(small / "results-XXS.json")
    assert results["size"] == "XXS" and results["parameters"] == 1100 and list(results["stages"]) == ["dm", "adm"]
    folders = [small / "seed0" / p for p in ("tsm/XXS-12", "students3-XXS/dm", "students3-XXS/adm")]
    assert all(common.load_tensors(f / "ema.pt")["size"] == "XXS" for f in folders)
    fake = common.load_tensors(small / "seed0/students3-XXS/dm/state.pt")["parts"]["mu_fake"]
    teacher = common.load_tensors(small / "seed0/teacher/ema.pt")["net"]
    assert {k: v.shape[1:] for k, v in fake.items()} == {k: v.shape[1:] for k, v in teacher.items()}    # mu_fake: the teacher's size
    assert "start" in common.load_json(folders[1] / "config.json") and "start" not in common.load_json(small / "seed0/students3/dm/config.json")
    x = msd.generate(small / "seed0/students3-XXS", torch.tensor([0, 7]), [1, 2])
    assert x.shape == (2, 2)
    sample.main(["--run", str(small), "--students", "3", "--tag", "XXS", "--timing", "0", "--seeds", "0-9", "--of", "students", "--out", str(tmp_path / "s")])


def test_dm_starts_from_the_tsm_network(small, tmp_path):
    """With learning rates of 0 the small students still are the common TSM network."""
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    assert msd.main([*SMALL, "--stages", "tsm,dm", "--tag", "still", "--lr", "0", "--reg-lr", "0", "--out", str(out)]) == 0
    start = common.load_tensors(out / "seed0/tsm/XXS-12/ema.pt")["net"]
    G = common.load_tensors(out / "seed0/students3-still/dm/ema.pt")["net"]
    assert all(torch.equal(G[k][i], start[k][0]) for k in G for i in range(3))


def test_post_distillation_imitates_the_best_students(small, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    seen = []
    original = tsm.train_post
    monkeypatch.setattr(tsm, "train_post", lambda run, flags, members, best_G, *rest: seen.append(best_G.state_dict()) or original(run, flags, members, best_G, *rest))
    assert msd.main([*SMOKE, "--students", "3", "--student-size", "XXS", "--stages", "post", "--post-steps", "8", "--out", str(out)]) == 0
    best = common.load_tensors(out / "seed0/students3/adm/best.pt")["net"]
    assert all(torch.equal(seen[0][k], best[k]) for k in best)
    assert common.load_json(out / "seed0/students3-XXS-post/post/config.json")["start"] == "random"


def test_post_steps_are_those_of_the_three_stages():
    flags = adm.Flags(tsm_steps=10, steps=20, adm_steps=30)
    assert tsm.post_steps(flags) == 60
    flags.post_steps = 7
    assert tsm.post_steps(flags) == 7


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("place, count", [pytest.param("tsm/XXS-12", 1, marks=pytest.mark.slow), ("tsm/XXS-12", 3), pytest.param("students3-XXS/dm", 2, marks=pytest.mark.slow), ("students3-XXS/adm", 1), ("students3-XXS-post/post", 1)])
def test_killed_in_any_stage_and_run_again_is_the_same_bit_for_bit(small, tmp_path, monkeypatch, place, count):
    """Dead right after the count-th checkpoint of a stage (TSM's third is its last: between stages), then the same command again."""
    out = tmp_path / "run"
    for name in ("teacher", "pairs", "reference", "students3"):
        shutil.copytree(small / "seed0" / name, out / "seed0" / name)
    argv = [*SMALL, "--out", str(out)]
    if "post" in place:
        argv[argv.index("tsm,dm,adm")] = "post"
    original, seen = common.save_state, []

    def dying(folder, state):
        original(folder, state)
        seen.append(folder)
        if sum(place in str(f) for f in seen) == count:
            raise Killed
    monkeypatch.setattr(common, "save_state", dying)
    with pytest.raises(Killed):
        msd.main(argv)
    monkeypatch.setattr(common, "save_state", original)
    assert msd.main(argv) == 0
    if "post" in place:
        whole = tmp_path / "whole"
        for name in ("teacher", "pairs", "reference", "students3"):
            shutil.copytree(small / "seed0" / name, whole / "seed0" / name)
        argv[-1] = str(whole)
        assert msd.main(argv) == 0
        assert equal(trained(whole), trained(out))
    else:
        assert equal(trained(small), trained(out))


@pytest.mark.slow
def test_own_tsm_networks(small, tmp_path):
    """--no-tsm-common: one per student, on its own classes, in its own folder; --real generated works as well."""
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    assert msd.main([*SMALL, "--no-tsm-common", "--tag", "own", "--real", "generated", "--stages", "tsm,adm", "--out", str(out)]) == 0
    saved = common.load_tensors(out / "seed0/students3-own/tsm/ema.pt")
    assert saved["partition"] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert common.load_json(out / "seed0/students3-own/adm/config.json")["real"] == "generated"


@pytest.mark.slow
def test_one_specialised_student_against_the_general_one(small, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    argv = [*SMALL[:-6], "--tsm-steps", "12", "--adm-steps", "8", "--out", str(out)]
    argv[argv.index("--students"):argv.index("--students") + 2] = []
    assert msd.main([*argv, "--classes", "3,4"]) == 0
    assert "no general student" in capsys.readouterr().out
    folder = out / "seed0/students1-XXS-classes3_4"
    assert common.load_json(folder / "adm/config.json")["partition"] == [[3, 4]]
    assert set(common.load_tensors(folder / "adm/samples.pt")["label"].tolist()) == {3, 4}
    assert "no student for it" in refused(capsys, sample.main, ["--run", str(out), "--students", "1", "--tag", "XXS-classes3_4", "--classes", "5",
                                                               "--timing", "0", "--out", str(tmp_path / "s")])
    assert msd.main([*argv, "--students", "1"]) == 0
    capsys.readouterr()
    assert msd.main([*argv, "--classes", "3,4"]) == 0
    assert "below the general one on these classes?" in capsys.readouterr().out
    assert msd.main([*argv, "--classes", "5", "--adm-steps", "7"]) == 0                         # of other flags: not compared, and said so
    text = capsys.readouterr().out
    assert "made with another adm_steps" in text and "below the general one" not in text


def test_the_exact_teacher_takes_its_weights_from_tsm(tmp_path, monkeypatch):
    """No teacher is trained: TSM networks of full size against the closed form are what everything starts from."""
    monkeypatch.setattr(edm, "train", lambda *a: pytest.fail("an EDM teacher was trained"))
    assert msd.main([*SMOKE, "--students", "2", "--teacher", "exact", "--stages", "dm,adm", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "seed0/tsm/B-20/ema.pt").exists() and not (tmp_path / "seed0/teacher").exists()


def test_random_and_path_starts(small, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    path = str(out / "seed0/tsm/XXS-12/ema.pt")
    for tag, init in (("random", "random"), ("file", path)):
        assert msd.main([*SMALL, "--stages", "dm", "--init", init, "--tag", tag, "--lr", "0", "--reg-lr", "0", "--out", str(out)]) == 0
    a, b = (common.load_tensors(out / f"seed0/students3-{t}/dm/ema.pt")["net"] for t in ("random", "file"))
    start = common.load_tensors(out / "seed0/tsm/XXS-12/ema.pt")["net"]
    assert all(torch.equal(b[k][0], start[k][0]) for k in b) and any(not torch.equal(a[k], b[k]) for k in a)


def test_tsm_alone(tmp_path, small, capsys):
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    shutil.rmtree(out / "seed0/tsm")
    tsm.main([*SMOKE, "--student-size", "XXS", "--save-every", "4", "--tsm-steps", "12", "--out", str(out)])
    assert "tsm/XXS-12" in capsys.readouterr().out
    assert equal({"a": common.load_tensors(out / "seed0/tsm/XXS-12/ema.pt")["net"]}, {"a": common.load_tensors(small / "seed0/tsm/XXS-12/ema.pt")["net"]})


# ---------------------------------------------------------------------------------------------------------------- misuse

@pytest.mark.parametrize("argv, words", [
    (["--stages", "adm,dm"], ["--stages adm,dm", "tsm,dm,adm"]),
    (["--stages", "dm,dm"], ["--stages dm,dm"]),
    (["--stages", "dm,post"], ["--stages dm,post"]),
    (["--stages", "dm,gan"], ["gan is no stage"]),
    (["--stages", ""], ["nothing is no stage"]),
    (["--stages", "adm"], ["students8/dm", "train that stage first"]),
    (["--stages", "post", "--student-size", "XS"], ["students8/adm", "train that stage first"]),
    (["--student-size", "XS"], ["--stages tsm,dm", "--init random"]),
    (["--student-size", "XL"], ["--student-size XL"]),
    (["--student-size", "XS", "--init", "teacher"], ["do not fit"]),
    (["--stages", "tsm,dm", "--init", "random"], ["--init random"]),
    (["--init", "nowhere.pt"], ["--init nowhere.pt", "no such file"]),
    (["--init", "dm-nothing"], ["students8-nothing/dm"]),
    (["--classes", "9"], ["--classes 9", "0 to 7"]),
    (["--classes", "a"], ["--classes a"]),
    (["--classes", "3", "--students", "4"], ["--classes", "--students"]),
    (["--stages", "dm,adm", "--gan-bins", "5"], ["--gan-bins"]),
    (["--stages", "dm,adm", "--critic-weight", "0"], ["--critic-weight 0"]),
    (["--gan-weight", "nan"], ["--gan-weight"]),
])
def test_impossible_orders_and_starts(capsys, tmp_path, argv, words):
    line = refused(capsys, msd.main, [*SMOKE, *argv, "--out", str(tmp_path / "x")])
    assert all(w in line for w in words), line
    assert not list(tmp_path.rglob("*.pt"))


def test_students_of_another_size_are_no_start(small, capsys, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    line = refused(capsys, msd.main, [*SMOKE, "--students", "3", "--stages", "adm", "--init", "dm-XXS", "--tag", "x", "--out", str(out)])
    assert "size XXS" in line and "--student-size XXS" in line
    line = refused(capsys, msd.main, [*SMOKE, "--students", "3", "--student-size", "XS", "--stages", "adm", "--init", "dm", "--tag", "x", "--out", str(out)])
    assert "--student-size B" in line


@pytest.mark.parametrize("argv, words", [
    (["--stages", "tsm,adm", "--student-size", "XXS", "--adm-fake", "resume"], "--adm-fake resume"),
    (["--stages", "adm", "--init", "teacher", "--adm-fake", "resume"], "--adm-fake resume"),
    (["--stages", "dm,adm", "--gan-weight", "0", "--dm-weight", "0"], "nothing is left"),
    (["--dataset", "fashion-mnist", "--teacher", "exact"], "closed form"),
    (["--init", "tsm-x", "--student-size", "XXS"], "have no tag"), (["--init", str(Path(__file__).parent)], "a folder"),
    (["--init", __file__], "neither a teacher's nor a student's"), (["--seed", "9" * 20], "below 2^62"), (["--tag", "x" * 300], "at most 80"),
    (["--batch", str(10 ** 15)], "not enough memory")])
def test_late_mistakes_are_refused_early(capsys, tmp_path, argv, words):
    assert words in refused(capsys, msd.main, [*SMOKE, *argv, "--out", str(tmp_path / "x")])
    assert not list(tmp_path.rglob("*.pt"))


def test_a_start_from_another_dataset_or_size(capsys, image_run, small, tmp_path):
    path = str(image_run / "seed0/teacher/ema.pt")
    assert "made for fashion-mnist" in refused(capsys, msd.main, [*SMOKE, "--init", path, "--out", str(tmp_path)])
    path = str(small / "seed0/tsm/XXS-12/ema.pt")
    assert "--student-size XXS" in refused(capsys, msd.main, [*SMOKE, "--init", path, "--out", str(tmp_path)])
    assert "a stack of 3 students" in refused(capsys, msd.main, [*SMOKE, "--init", str(small / "seed0/students3/dm/best.pt"), "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("*.pt"))


def test_adm_alone_is_for_the_teachers_size(capsys, small):
    assert "msd.py" in refused(capsys, adm.main, [*SMOKE, "--student-size", "XXS", "--out", str(small)])


def test_stages_of_one_run_stand_in_one_table(small, tmp_path):
    """DM of K = 2 joins the results of K = 3's two stages; ADM of another length does not."""
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    assert msd.main([*SMOKE, "--students", "2", "--out", str(out)]) == 0
    results = common.load_json(out / "results.json")
    assert set(results["stages"]["dm"]) == {"2", "3"} and set(results["stages"]["adm"]) == set(results["students"]) == {"3"}
    assert msd.main([*SMOKE, "--students", "3", "--stages", "adm", "--adm-steps", "8", "--out", str(out)]) == 0
    assert common.load_json(out / "results.json")["stages"].keys() == {"dm", "adm"} and not (out / "results.previous.json").exists()
    assert msd.main([*SMOKE, "--students", "2", "--stages", "dm,adm", "--adm-steps", "7", "--out", str(out)]) == 0
    assert set(common.load_json(out / "results.previous.json")["stages"]["dm"]) == {"2", "3"}


def test_changed_weights_of_an_exact_teacher_are_noticed(capsys, tmp_path):
    argv = [*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path)]
    assert msd.main(argv) == 0
    assert "weights of exact" in refused(capsys, msd.main, [*argv, "--tsm-steps", "21"])


@pytest.mark.slow
def test_images_of_three_stages(image_run, tiny, tmp_path):
    """A smaller image student after TSM (a network of its own), DM and ADM."""
    out = tmp_path / "run"
    shutil.copytree(image_run / "data", out / "data")
    argv = ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), "--quiet", "--threads", "1", "--students", "1",
            "--teacher", str(teacher_of(tmp_path)), "--student-size", "XXS"]
    assert msd.main([*argv, "--stages", "tsm,dm,adm", "--no-tsm-common"]) == 0
    folder = out / "seed0/students1-XXS"
    assert [common.load_tensors(folder / s / "student0" / "ema.pt")["size"] for s in ("tsm", "dm", "adm")] == ["XXS"] * 3
    assert msd.generate(folder, torch.tensor([1]), [2]).shape == (1, 1, 16, 16)


def teacher_of(tmp_path):
    """A teacher of size XS, untrained, in a file."""
    D = edm.Precond(data.facts("fashion-mnist").net(1, "XS"))
    common.save_tensors(tmp_path / "teacher.pt", {"dataset": "fashion-mnist", "resolution": 16, "size": "XS", "net": D.state_dict()})
    return tmp_path / "teacher.pt"


def test_imagenet_presets_of_each_size(capsys):
    """[MSD App. D.2.1, D.2.2, B.6] to the letter."""
    for size, words in (("", ["--batch 128 ", "--adm-batch 192 ", "--adm-steps 150000", "--adm-lr 5e-07"]),
                        ("S", ["--batch 160 ", "--adm-batch 160 ", "--tsm-batch 576 ", "--tsm-steps 400000", "--tsm-lr 0.0001", "--tsm-common False"]),
                        ("XS", ["--batch 224 ", "--adm-batch 224 ", "--tsm-batch 3584 ", "--tsm-common True"]),
                        ("XXS", ["--batch 256 ", "--adm-batch 256 ", "--tsm-batch 4864 ", "--adm-lr 2e-06"])):
        argv = ["--student-size", size, "--stages", "tsm,dm,adm"] if size else ["--stages", "dm,adm"]
        assert msd.main(["--dataset", "imagenet64", *argv, "--dry-run"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(w in text for w in words), [w for w in words if w not in text]
        assert "--gan-weight 0.003" in text and "--critic-weight 0.01" in text


def test_dmd_alone_with_the_exact_teacher_says_where_weights_come_from(capsys, tmp_path):
    assert "msd.py" in refused(capsys, dmd.main, [*SMOKE, "--teacher", "exact", "--out", str(tmp_path)])
