"""O2MKD: ranges cover once, draws obey their law, the loss is the shared ones', routing, merging, whole runs, bad input."""
import math
import shutil

import pytest
import torch

import common
import data
import edm
import msd
import o2mkd
import run as runs
import sample
import students
import toy_mog
import tsm
from common import Student, generator
from conftest import ALL, assert_stack_is_its_members, denoiser, given, refused, same, trained
from flags import UserError, parse
from run import load_json, load_tensors

SMOKE = ["--preset", "smoke"]
KDS = list(o2mkd.FEATURE_LOSSES)


# -------------------------------------------------- ranges and router

@pytest.mark.parametrize("scheme", ["uniform", "small", "large"])
def test_ranges_cover_the_levels_exactly_once(scheme):
    """Every bin, and every sigma between, has one owner; neighbours meet at a bin, which belongs to the upper one."""
    grid = edm.sigma_bins()
    for number in (1, 2, 3, 4, 8, 16):
        edges = o2mkd.ranges(number, scheme)
        owned = [b for low, high in zip(edges, edges[1:]) for b in range(low, high)]
        assert owned == list(range(1000)) and len(edges) == number + 1
        router = o2mkd.Router(edges)
        of_bin = torch.bucketize(torch.arange(1000), torch.tensor(edges[1:-1]), right=True)
        for sigma in (grid.float(), grid.float().double()):
            assert torch.equal(router(sigma), of_bin)
        assert torch.equal(router((grid[1:] * grid[:-1]).sqrt()), of_bin[:-1])
        assert router(torch.tensor([0.0, 1e-4, 79.99, 1e4])).tolist() == [0, 0, number - 1, number - 1]


def test_schemes_put_more_students_where_they_say():
    edges = [o2mkd.ranges(4, scheme) for scheme in ("uniform", "small", "large")]
    uniform, small, large = ([b - a for a, b in zip(e, e[1:])] for e in edges)
    assert uniform == [250] * 4 and small == sorted(small) and small[0] < 100 and large == small[::-1]
    assert o2mkd.ranges(3, "0-99,100-299,300-999") == [0, 100, 300, 1000]


def test_share_of_own_levels_is_p_plus_the_ranges_mass():
    """Own range with p, else all: p + (1 - p) m; tossed once per student and update, so a batch has one law."""
    low, high = torch.tensor([0, 100, 700]), torch.tensor([100, 700, 1000])
    draws = common.Draws("o2mkd", [Student(0, 3, k, ALL) for k in range(3)])

    def bins(step, size, p):
        return o2mkd.draw_bins(common.Batch(draws, step, size, (2,), slice(None)), low, high, p)
    for p in (0.0, 0.3, 1.0):
        drawn = torch.stack([bins(step, 64, p) for step in range(800)])                         # [steps, 3, batch]
        assert drawn.min() >= 0 and drawn.max() <= 999
        own = ((drawn >= low[:, None]) & (drawn < high[:, None])).double().mean(-1)             # [steps, 3]
        m = (high - low).double() / 1000
        tolerance = 4 * (p * (1 - p) / 800 + 0.25 / 800 / 64) ** 0.5 + 1e-9
        assert ((own.mean(0) - (p + (1 - p) * m)).abs() < tolerance).all()
        if p == 0.3:                                                # whole batches of the first student's 10 %
            assert ((own[:, 0] == 1).double().mean() - 0.3).abs() < 0.065
    edge = bins(0, 200_000, 1.0)
    assert [int(v.min()) for v in edge] == [0, 100, 700] and [int(v.max()) for v in edge] == [99, 699, 999]


@pytest.mark.parametrize("draw", [edm.heun, edm.ddim])
def test_n_copies_of_the_teacher_are_the_teachers_sampler(draw):
    """Routed through copies of one denoiser: the same samples bit for bit, and every evaluation ran at its own owner."""
    router = o2mkd.Router(o2mkd.ranges(4, "small"))
    z, label, steps, seen = torch.randn(1, 64, 2), data.stratified(64, 8)[None], 12, []

    def copy_of(i):
        def denoise(x, sigma, label):
            assert (router(sigma) == i).all()
            seen.append((i, sigma.flatten()[0].item()))
            return toy_mog.denoiser(x, sigma, label)
        return denoise
    x = draw(o2mkd.routed([copy_of(i) for i in range(4)], router), z, label, steps)
    assert torch.equal(x, draw(toy_mog.denoiser, z, label, steps))
    levels = edm.sigma_steps(steps)[:-1].float().tolist()
    twice = [levels[0], *(s for v in levels[1:] for s in (v, v))]
    assert [s for _, s in seen] == (levels if draw is edm.ddim else twice) and {i for i, _ in seen} == {0, 1, 2, 3}


def test_both_evaluations_of_a_heun_step_go_to_their_own_owner():
    """A step across a boundary asks two students: routing by the sigma passed to the network, not by the step's first."""
    t, seen, router = edm.sigma_steps(6), [], o2mkd.Router(o2mkd.ranges(2))
    across, = (i for i in range(5) if router(t[i]) != router(t[i + 1]))
    two = [lambda x, s, c, i=i: seen.append(i) or toy_mog.denoiser(x, s, c) for i in range(2)]
    edm.heun(o2mkd.routed(two, router), torch.randn(1, 4, 2), data.stratified(4, 8)[None], 6)
    assert seen[2 * across:2 * across + 2] == [1, 0]


def test_mixed_levels_and_classes_are_answered_one_by_one():
    """Class blocks x ranges: student block * R + range; a batch of many owners is put together right."""
    router = o2mkd.Router([0, 300, 1000], [torch.arange(4), torch.arange(4, 8)])
    sigma = edm.level(torch.tensor([[0, 299, 300, 999] * 2]))
    x, label = torch.randn(1, 8, 2), torch.tensor([[0, 3, 1, 2, 4, 7, 5, 6]])
    assert router(sigma, label).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    scaled = [lambda x, s, c, i=i: (i + 1) * x for i in range(4)]
    assert torch.equal(o2mkd.routed(scaled, router)(x, sigma, label), x * (router(sigma, label) + 1)[..., None])


# ---------------------------------------------------------- the losses

def at_random(students=1, b=32):
    """x, label, sigma, noise of a batch."""
    g, label = torch.Generator().manual_seed(3), data.stratified(b, 8).repeat(students, 1)
    sigma = edm.sigma_bins()[torch.randint(1000, label.shape, generator=g)].to(torch.get_default_dtype())
    return toy_mog.sample(label, g), label, sigma, torch.randn(*label.shape, 2, generator=g)


def pair_of(width=16):
    """A student, and a frozen teacher."""
    return denoiser(width), denoiser(16, seed=5).requires_grad_(False)


def test_the_loss_is_denoising_plus_lambda_tsm_with_the_same_gradients(double):
    batch, (student, teacher) = at_random(), pair_of()
    for lam in (0.0, 0.7):
        value, parts = o2mkd.o2mkd_loss(student, teacher, *batch, lam)
        apart = edm.denoising_loss(student, *batch).mean(-1) + lam * tsm.tsm_loss(student, teacher, *batch).mean(-1)
        torch.testing.assert_close(value, apart, atol=0, rtol=1e-12)
        ours, theirs = (torch.autograd.grad(v.sum(), list(student.parameters())) for v in (value, apart))
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-10)
        assert set(parts) == {"denoising", *(["prediction"] if lam else [])} and not parts["denoising"].requires_grad


@pytest.mark.parametrize("kd", KDS)
def test_the_loss_by_features_is_denoising_plus_lambda_times_theirs(double, kd):
    """Features of both at the same x_t; the student's through the linear layer, where the loss compares units."""
    batch, (student, teacher) = at_random(), pair_of(width=12)
    project = o2mkd.Projection(kd, [Student(0, 1, 0, ALL)], (12,), (16,))
    assert (project.weight is None) == (kd == "similarity")
    assert o2mkd.Projection(kd, [Student(0, 1, 0, ALL)], (16,), (16,)).weight is None
    value, parts = o2mkd.o2mkd_loss(student, teacher, *batch, 0.3, kd, project)
    x, label, sigma, noise = batch
    h, h_teacher = (D.bottleneck(x + sigma[..., None] * noise, sigma, label) for D in (student, teacher))
    theirs = o2mkd.FEATURE_LOSSES[kd](project(h), h_teacher)
    close = dict(atol=0, rtol=1e-12)
    torch.testing.assert_close(value, edm.denoising_loss(student, *batch).mean(-1) + 0.3 * theirs, **close)
    torch.testing.assert_close(parts[kd], theirs.detach(), **close)
    torch.testing.assert_close(parts["prediction"], tsm.tsm_loss(student, teacher, *batch).mean(-1).detach(), **close)


def test_features_come_with_the_prediction_in_one_pass():
    (D, _), (x, label, sigma, _) = pair_of(), at_random()
    value, h = D(x, sigma, label, features=True)
    assert torch.equal(value, D(x, sigma, label)) and torch.equal(h, D.bottleneck(x, sigma, label))


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 4, 3, 3)])
def test_feature_losses_are_zero_for_equal_features_and_one_value_per_student(kd, shape):
    h, other, loss = torch.randn(shape), torch.randn(shape, requires_grad=True), o2mkd.FEATURE_LOSSES[kd]
    value = loss(other, h)
    assert loss(h, h).abs().max() < 1e-6 and value.shape == shape[:1]
    assert torch.autograd.grad(value.sum(), other)[0].abs().max() > 0
    torch.testing.assert_close(loss(3 * h, h), torch.zeros_like(value), atol=1e-6, rtol=0)      # none of them sees the scale


def test_attention_transfer_by_hand():
    """Two channels at two positions: means of squares (5, 0) and (9, 8) / norms; on ToyNet units are the positions."""
    h = torch.tensor([[[[[1.0, 0.0]], [[3.0, 0.0]]]]])              # [1, 1, C = 2, H = 1, W = 2]
    g = torch.tensor([[[[[3.0, 4.0]], [[3.0, 0.0]]]]])
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([9.0, 8.0]) / math.sqrt(145)
    assert o2mkd.attention_loss(h, g).item() == pytest.approx((a - b).square().sum().item(), rel=1e-6)
    h, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, -5.0]]])
    assert o2mkd.attention_loss(h, g).item() == pytest.approx((1 / 17) + (4 / math.sqrt(17) - 1) ** 2, rel=1e-6)


def test_similarity_preserving_by_hand():
    """Orthogonal features against equal ones: rows (1, 0), (0, 1) against (1, 1) / sqrt 2, mean square over b^2 = 4."""
    value = o2mkd.similarity_loss(torch.eye(2)[None], torch.ones(1, 2, 7))                      # any two widths
    assert value.item() == pytest.approx(((1 - 2 ** -0.5) ** 2 + 0.5) / 2, rel=1e-6)


def test_contrastive_by_hand():
    """Swapped orthogonal features: own similarity 0, the other's 1, against 1 and 0: it differs by 1 / temperature."""
    t = torch.eye(2)[None]
    for h in (t, t[..., None, None].expand(1, 2, 2, 3, 3)):
        assert o2mkd.contrastive_loss(h.flip(1), h, 0.5).item() == pytest.approx(2.0, rel=1e-6)


# ----------------------------------------------------------- training

def short(group, folder, *argv, **parts) -> dict:
    """Weights of a short training of these toy students, all from one start."""
    flags = parse(o2mkd.Flags, o2mkd.PRESETS, [*SMOKE, "--batch", "8", *argv])
    whole = students.whole(data.facts("toy"))
    shares = [msd.filter_adm(whole, torch.tensor(s.classes)) for s in group]
    return trained(o2mkd, group, flags, folder, shares=shares, **parts)["ema.pt"].state_dict()


def test_p_0_is_ordinary_distillation(tmp_path):
    """Whatever its range, a student with p = 0 is the one that has all levels, bit for bit; that one asks for no p."""
    second = [Student(0, 4, 1, ALL)]                                # at home in bins 250 to 499, or, of one range, in all
    ordinary = short(second, tmp_path / "a", "--p", "0", "--ranges", "1")
    assert same(ordinary, short(second, tmp_path / "b", "--p", "0"))
    assert same(ordinary, short(second, tmp_path / "c", "--p", "1", "--ranges", "1"))
    assert not same(ordinary, short(second, tmp_path / "d", "--p", "0.5"))


@pytest.mark.parametrize("kd", ["prediction", *KDS])
def test_stack_equals_separate_runs(tmp_path, double, kd):
    """Losses of a whole batch too give one value per student, so nothing crosses students."""
    assert_stack_is_its_members(lambda group, name: short(group, tmp_path / name, "--kd", kd, "--p", "0.5"))


def test_a_students_projection_does_not_depend_on_who_trains_beside_it():
    group = [Student(3, 1, 0, ALL), Student(5, 1, 0, ALL)]
    together, alone = (o2mkd.Projection("attention", who, (4,), (6,)).weight for who in (group, group[1:]))
    assert torch.equal(together[1:], alone) and not torch.equal(together[0], together[1])


def test_the_teacher_is_frozen_and_micro_batches_change_nothing(tmp_path, double):
    second, teacher = [Student(0, 2, 1, ALL)], denoiser(16, seed=5).requires_grad_(False)
    before = common.fingerprint(teacher)
    whole = short(second, tmp_path / "whole", "--kd", "attention", D=teacher)
    parts = short(second, tmp_path / "parts", "--kd", "attention", "--micro-batch", "2", D=teacher)
    assert common.fingerprint(teacher) == before
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    with pytest.raises(UserError, match="relates all samples of a batch"):
        short(second, tmp_path / "no", "--kd", "similarity", "--micro-batch", "2")


# ------------------------------------------------- merging and probes

def test_merge_of_equal_nets_is_that_net(double):
    start, a, b = (denoiser(seed=seed).requires_grad_(False) for seed in range(3))
    for c, n in ((None, 3), (0.25, 4)):
        torch.testing.assert_close(o2mkd.merge(start, [a] * n, c).state_dict(), a.state_dict(), atol=1e-14, rtol=1e-14)
    assert same(o2mkd.merge(start, [a], 0.0).state_dict(), start.state_dict())
    mean = o2mkd.merge(start, [a, b]).state_dict()
    assert all(torch.allclose(mean[k], (v + b.state_dict()[k]) / 2) for k, v in a.state_dict().items())
    with pytest.raises(RuntimeError):
        o2mkd.merge(start, [denoiser(12)])                          # of another size


def test_steadiness_of_known_curves(tmp_path):
    """A constant neither falls nor varies; a line from 2 to 1 falls by about a half; 1 ± 0.1 varies by 0.1."""
    rows = ["step,seconds,student,name,value"]
    for i in range(400):
        rows += [f"{i},0,0,flat,3", f"{i},0,0,line,{2 - i / 399}", f"{i},0,0,wave,{1 + 0.1 * (-1) ** i}"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = o2mkd.steadiness(tmp_path)
    assert found["flat"] == {"fall": 0, "variation": 0} and found["wave"]["variation"] == pytest.approx(0.1)
    assert found["line"]["fall"] == pytest.approx(0.487, abs=0.01) and found["line"]["variation"] < 0.03


def test_gradual_tells_a_ramp_from_a_jump():
    place = torch.arange(21.0)
    ramp, jump = (dict(distance=(p[:, None] - p).abs().tolist()) for p in (place, 20 * (place > 7).float()))
    assert o2mkd.gradual(ramp) == {"neighbours": 1, "far": 10}
    assert o2mkd.gradual(jump)["neighbours"] > o2mkd.gradual(jump)["far"]


def test_a_hybrid_of_the_teacher_is_the_teacher_and_its_losses_agree(double):
    router, (_, D) = o2mkd.Router(o2mkd.ranges(4)), pair_of()
    z, label, mu = torch.randn(1, 8, 2), data.stratified(8, 8)[None], toy_mog.denoiser
    x = edm.heun(mu, z, label, 6)
    assert torch.equal(x, edm.heun(o2mkd.routed([mu] * 4, router), z, label, 6))
    assert not torch.equal(x, edm.heun(o2mkd.routed([mu, mu, D, mu], router), z, label, 6))
    label = data.stratified(800, 8)[None]
    losses = o2mkd.inside_outside(D, D, router, 1, toy_mog.sample(label, generator(0)).double(), label, 0)
    assert losses["prediction_in"] == losses["prediction_out"] == 0 < losses["denoising_in"] != losses["denoising_out"]


# --------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A finished smoke run: N = 1, 4 and two seeds, merged, one student alone, another number of steps."""
    out = tmp_path_factory.mktemp("o2mkd") / "run"
    o2mkd.main([*SMOKE, "--students", "1", "4", "--seeds", "2", "--merge", "--inspect", "1", "--curve", "4", "--out", str(out)])
    return out


@pytest.fixture
def copy(noise, tmp_path, monkeypatch):
    """The folder of that run, to train in; what follows a training is left out."""
    monkeypatch.setattr(o2mkd, "report", lambda *_: None)
    return shutil.copytree(noise, tmp_path / "copy")


def test_a_run_leaves_results_and_figures(noise):
    results = load_json(noise / "results-o2mkd.json")
    rows = results["stages"]
    assert {"o2mkd", "merged", "merged-mean", "alone-1", "hybrid-1", "heun-4", "ddim-4", "loss-denoising", "loss-prediction",
            "drift-far"} <= set(rows)
    assert list(results["students"]) == ["1", "4"] and results["edges"]["4"] == [0, 250, 500, 750, 1000]
    assert len(results["students"]["4"]["per_seed"]) == 2 and set(rows["heun-4"]) == {"0", "1", "4"}
    assert {"denoising_in", "prediction_out"} <= set(rows["alone-1"]["4"])
    teacher, one, four = (results["cost"][n] for n in ("0", "1", "4"))
    assert four["parameters"] == 4 * one["parameters"] and four["multiply_adds"] == one["multiply_adds"]
    net = toy_mog.toy_net(1, "B")
    exact = sum(p[0].numel() for name, p in net.named_parameters() if p.shape[1] > 1 and name != "table")
    assert one["multiply_adds"] < teacher["multiply_adds"] == exact * 15
    names = {p.name for p in (noise / "figures").glob("*-o2mkd.png")}
    assert names == {f"{n}-o2mkd.png" for n in ("samples", "students", "losses", "drift", "curve")}


def test_a_single_student_is_the_sampler_of_its_own_denoiser(noise):
    """The table's row is what the loaded students give."""
    found, kept = o2mkd.load_students(noise / "seed0/o2mkd1"), load_tensors(noise / "seed0/o2mkd1/samples.pt")
    z, label = torch.randn(800, 2, generator=generator(0, "report z")), data.stratified(800, 8)
    for D in (found.denoisers[0], o2mkd.routed(found.denoisers, found.router)):
        assert torch.equal(edm.heun(D, z[None], label[None], 8)[0], kept["x"])


def test_sample_py_takes_students_by_noise_level(noise, tmp_path, capsys):
    argv = ["--run", str(noise), "--o2mkd", "--sampler", "ddim", "--seeds", "0-9", "--out", str(tmp_path / "s"), "--students"]
    sample.main([*argv, "4"])
    assert capsys.readouterr().out.count("8 function evaluations") == 2
    assert "o2mkd8" in refused(capsys, sample.main, [*argv, "8"])


def test_the_same_command_reuses_and_adds_to_the_table(copy, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("plot.draw", lambda *_: [])
    argv = [*SMOKE, "--seeds", "2", "--out", str(copy), "--students"]
    o2mkd.main([*argv, "1", "2"])
    assert "o2mkd1: already trained" in capsys.readouterr().out
    results = load_json(copy / "results-o2mkd.json")
    assert set(results["students"]) == {"1", "2", "4"} and "merged" in results["stages"]
    assert "p (0.75 there, 0.9 now)" in refused(capsys, o2mkd.main, [*argv, "4", "--p", "0.9"])


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("kd", ["prediction", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_killed_and_run_again_is_the_same_bit_for_bit(copy, monkeypatch, kd):
    argv = [*SMOKE, "--seeds", "2", "--save-every", "4", "--kd", kd, "--out", str(copy), "--students", "1", "4", "--tag"]
    original, count = runs.Run._save, iter(range(1000))

    def dying(*args):
        original(*args)
        if next(count) == 5:                                        # of four folders some are a checkpoint ahead
            raise Killed
    o2mkd.main([*argv, "whole"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "_save", dying)
        o2mkd.main([*argv, "killed"])
    o2mkd.main([*argv, "killed"])
    folders = sorted(copy.glob("seed*/o2mkd*-whole"))
    assert len(folders) == 4
    for whole in folders:
        killed = whole.with_name(whole.name.replace("whole", "killed"))
        assert same(*(load_tensors(f / "ema.pt")["net"] for f in (whole, killed)))
        lines = [[line.split(",") for line in (f / "metrics.csv").read_text().splitlines()] for f in (whole, killed)]
        assert [row[:1] + row[2:] for row in lines[0]] == [row[:1] + row[2:] for row in lines[1]]       # all but seconds


def test_students_start_from_the_teacher_or_one_trained_before_and_merge_back(copy):
    argv = [*SMOKE, "--students", "2", "--out", str(copy), "--tag"]
    o2mkd.main([*argv, "same", "--keep", "1", "--lr", "0"])         # the teacher's size: from its weights
    teacher = load_tensors(copy / "seed0/teacher/ema.pt")["net"]
    found = o2mkd.load_students(copy / "seed0/o2mkd2-same")
    assert all(same(D.state_dict(), teacher) for D in (found.start, *found.denoisers))
    torch.testing.assert_close(dict(o2mkd.merge_folders([copy / "seed0/o2mkd2-same"]).state_dict()), teacher)
    o2mkd.main([*argv, "fork", "--init", "o2mkd1"])
    fork, base = o2mkd.load_students(copy / "seed0/o2mkd2-fork"), load_tensors(copy / "seed0/o2mkd1/ema.pt")["net"]
    assert same(fork.start.state_dict(), base)
    for other in ("o2mkd2-same", "o2mkd4"):                         # of another size, of another start
        with pytest.raises(UserError, match="started from other weights"):
            o2mkd.merge_folders([copy / "seed0/o2mkd2-fork", copy / "seed0" / other])


def test_classes_times_ranges(copy, capsys):
    """--students 4 --ranges 2: four networks, two blocks of classes, each with its two ranges."""
    o2mkd.main([*SMOKE, "--students", "4", "--ranges", "2", "--out", str(copy)])
    assert "N = 4: ranges meet at sigma 2.5" in capsys.readouterr().out
    found = o2mkd.load_students(copy / "seed0/o2mkd4-2ranges")
    assert found.router(torch.tensor([0.002, 80.0, 0.002, 80.0]), torch.tensor([0, 3, 4, 7])).tolist() == [0, 1, 2, 3]
    assert load_json(copy / "seed0/o2mkd4-2ranges/config.json")["partition"] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_the_exact_teacher_teaches_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr("plot.draw", lambda *_: [])
    o2mkd.main([*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path / "run")])
    results = load_json(tmp_path / "run/results-o2mkd.json")
    assert set(results["cost"]) == {"2"} and not any(s.startswith("drift") for s in results["stages"])  # it is no network


def images(image_run, tiny, out, *argv):
    shutil.copytree(image_run, out)
    o2mkd.main([*SMOKE, "--dataset", "fashion-mnist", "--data", str(tiny), "--out", str(out), "--students", *argv])


def test_images(image_run, tiny, tmp_path):
    """Two ranges of tiny images: a folder per student, narrowed networks, merged."""
    images(image_run, tiny, tmp_path / "run", "2", "--merge")
    assert load_tensors(tmp_path / "run/seed0/o2mkd2/student1/ema.pt")["size"] == (8, (1, 1, 1), 1, (8, 4))
    results = load_json(tmp_path / "run/results-o2mkd.json")
    assert {"fd_data", "right class"} <= set(results["students"]["2"]) and "merged" in results["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("kd", KDS)
def test_images_by_features(image_run, tiny, tmp_path, kd):
    images(image_run, tiny, tmp_path / "run", "1", "--kd", kd)


def test_sizes_of_narrowed_networks():
    assert data.facts("imagenet64").narrowed("B", 0.7)[0] == 128 and data.facts("fashion-mnist").narrowed("B", 0.7)[0] == 12
    assert data.facts("toy").narrowed("B", 0.7) == (45, 2)


# ---------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, words", [
    ("--p 1.5", "--p 1.5"),                                         # a bound
    ("--scheme smal", "--scheme smal"),                             # no such scheme
    ("--scheme 0-99,200-999 --students 2", "cover the bins once"),  # a gap
    ("--scheme 0-500,400-999 --students 2", "cover the bins once"),
    ("--scheme 0-99,100-899 --students 2", "cover the bins once"),
    ("--scheme 0-99,100-1000 --students 2", "cover the bins once"),
    ("--scheme 0-99,100-999 --students 3", "not 3 ranges"),
    ("--scheme small --students 100", "none empty"),
    ("--students 4 --ranges 3", "multiples of it"),                 # flags that contradict each other
    ("--kd similarity --cfg 1.5 --label-dropout 0.1", "--kd similarity"),
    ("--kd similarity --teacher exact", "--kd similarity"),
    ("--init o2mkd4", "--init o2mkd4"),                             # a start that is not there
    ("--init o2mkd1-gone --teacher exact", "o2mkd1-gone"),
    ("--students 32 --ranges 2 --teacher exact", "16")])            # more blocks than classes
def test_misuse(capsys, tmp_path, argv, words):
    assert words in refused(capsys, o2mkd.main, [*SMOKE, *argv.split(), "--out", str(tmp_path / "x")])


def test_a_start_of_another_size(copy, capsys):
    line = refused(capsys, o2mkd.main, [*SMOKE, "--init", "o2mkd1", "--keep", "0.7", "--tag", "x", "--out", str(copy)])
    assert "--init o2mkd1: of size" in line


def test_a_folder_without_students(noise):
    for folder in ("seed0", "seed0/teacher", "nowhere"):
        with pytest.raises(OSError):
            o2mkd.load_students(noise / folder)
