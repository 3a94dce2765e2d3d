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
import plot
import sample
import toy_mog
import tsm
from conftest import assert_stack_is_its_members, refused

SMOKE = ["--preset", "smoke", "--quiet", "--dataset", "toy"]
ALL = tuple(range(8))


def full_net(students=1, width=16, seed=0):
    """A denoiser whose last layer is not small."""
    net = toy_mog.ToyNet(students, width, seed=seed)
    with torch.no_grad():
        net.w_out.mul_(50)
    return edm.Precond(net, 0.5)


# ------------------------------------------------------------------------------------------------------ ranges and router

@pytest.mark.parametrize("scheme", ["uniform", "small", "large"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 16])
def test_ranges_cover_the_levels_exactly_once(scheme, number):
    """Every bin, and every sigma between, has one owner; neighbours meet at a bin, which belongs to the upper one."""
    edges = o2mkd.ranges(number, scheme)
    owned = [b for low, high in zip(edges, edges[1:]) for b in range(low, high)]
    assert owned == list(range(1000)) and len(edges) == number + 1
    router, grid = o2mkd.Router(edges), edm.sigma_bins()
    of_bin = torch.bucketize(torch.arange(1000), torch.tensor(edges[1:-1]), right=True)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(router(grid.float().to(dtype)), of_bin)
    between = (grid[1:] * grid[:-1]).sqrt()
    assert torch.equal(router(between), of_bin[:-1])
    assert router(torch.tensor([0.0, 1e-4, 79.99, 1e4])).tolist() == [0, 0, number - 1, number - 1]


def test_schemes_put_more_students_where_they_say():
    width = {s: [b - a for a, b in zip(e, e[1:])] for s in ("uniform", "small", "large") for e in [o2mkd.ranges(4, s)]}
    assert width["uniform"] == [250] * 4
    assert width["small"] == sorted(width["small"]) and width["small"][0] < 100 and width["large"] == width["small"][::-1]
    assert o2mkd.ranges(3, "0-99,100-299,300-999") == [0, 100, 300, 1000]


def test_share_of_own_levels_is_p_plus_the_ranges_mass():
    """Own range with p, else all: p + (1 - p) m; tossed once per student and update, so a batch has one law."""
    low, high = torch.tensor([0, 100, 700]), torch.tensor([100, 700, 1000])
    draws = common.Draws("o2mkd", [common.Member(0, 3, i, ALL) for i in range(3)])
    for p in (0.0, 0.3, 1.0):
        bins = torch.stack([o2mkd.draw_bins(draws, step, 64, low, high, p) for step in range(1500)])        # [steps, 3, batch]
        assert bins.min() >= 0 and bins.max() <= 999
        own = ((bins >= low[:, None]) & (bins < high[:, None])).double().mean(-1)               # [steps, 3]
        m = (high - low).double() / 1000
        tolerance = 4 * (p * (1 - p) / 1500 + 0.25 / 1500 / 64) ** 0.5 + 1e-9
        assert ((own.mean(0) - (p + (1 - p) * m)).abs() < tolerance).all()
        if p == 0.3:
            assert ((own[:, 0] == 1).double().mean() - 0.3).abs() < 0.05                        # whole batches of the first student's 10 %
    edge = o2mkd.draw_bins(draws, 0, 200_000, low, high, 1.0)
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
    assert [s for _, s in seen] == (levels if draw is edm.ddim else [levels[0], *[s for v in levels[1:] for s in (v, v)]])
    assert {i for i, _ in seen} == {0, 1, 2, 3}


def test_both_evaluations_of_a_heun_step_go_to_their_own_owner():
    """A step across a boundary asks two students: routing by the sigma passed to the network, not by the step's first."""
    t, seen = edm.sigma_steps(6), []
    router = o2mkd.Router(o2mkd.ranges(2))
    across = [i for i in range(5) if router(t[i]) != router(t[i + 1])]
    assert len(across) == 1
    students = [lambda x, s, c, i=i: seen.append(i) or toy_mog.denoiser(x, s, c) for i in range(2)]
    edm.heun(o2mkd.routed(students, router), torch.randn(1, 4, 2), data.stratified(4, 8)[None], 6)
    assert seen[2 * across[0]:2 * across[0] + 2] == [1, 0]


def test_mixed_levels_and_classes_are_answered_one_by_one():
    """Class blocks x ranges: student block * R + range; a batch of many owners is put together right."""
    parts = [torch.arange(4), torch.arange(4, 8)]
    router = o2mkd.Router([0, 300, 1000], parts)
    sigma, label = edm.sigma_bins()[torch.tensor([[0, 299, 300, 999] * 2])].float(), torch.tensor([[0, 3, 1, 2, 4, 7, 5, 6]])
    assert router(sigma, label).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    scaled = [lambda x, s, c, i=i: (i + 1) * x for i in range(4)]
    x = torch.randn(1, 8, 2)
    assert torch.equal(o2mkd.routed(scaled, router)(x, sigma, label), x * (router(sigma, label) + 1)[..., None])


# -------------------------------------------------------------------------------------------------------------- the losses

def at_random(b=32, members=1):
    g = torch.Generator().manual_seed(3)
    label = data.stratified(b, 8).repeat(members, 1)
    return (toy_mog.sample(label, g), label, edm.sigma_bins()[torch.randint(1000, label.shape, generator=g)].to(torch.get_default_dtype()),
            torch.randn(*label.shape, 2, generator=g))


def test_the_loss_is_denoising_plus_lambda_tsm_with_the_same_gradients(double):
    x, label, sigma, noise = at_random()
    student, teacher = full_net(), full_net(seed=5).requires_grad_(False)
    for lam in (0.0, 0.7):
        value, parts = o2mkd.o2mkd_loss(student, teacher, x, label, sigma, noise, lam)
        ours = torch.autograd.grad(value.sum(), list(student.parameters()))
        apart = edm.denoising_loss(student, x, label, sigma, noise).mean(-1) + lam * tsm.tsm_loss(student, teacher, x, label, sigma, noise).mean(-1)
        theirs = torch.autograd.grad(apart.sum(), list(student.parameters()))
        torch.testing.assert_close(value, apart, atol=0, rtol=1e-12)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-10)
        assert set(parts) == {"denoising", *(["prediction"] if lam else [])} and not parts["denoising"].requires_grad


@pytest.mark.parametrize("kd", list(o2mkd.FEATURE_LOSSES))
def test_the_loss_by_features_is_denoising_plus_lambda_times_theirs(double, kd):
    """Features of both at the same x_t; the student's through the linear layer, where the loss compares units."""
    x, label, sigma, noise = at_random(members=2)
    student, teacher = full_net(2, width=12), full_net(2, seed=5).requires_grad_(False)
    project = o2mkd.Projection([0, 1], 12, 16).double() if kd != "similarity" else lambda h: h
    assert o2mkd.projects(kd, (12,), (16,)) == (kd != "similarity") and not o2mkd.projects(kd, (16,), (16,))
    value, parts = o2mkd.o2mkd_loss(student, teacher, x, label, sigma, noise, 0.3, kd, project)
    x_t = x + sigma[..., None] * noise
    theirs = o2mkd.FEATURE_LOSSES[kd](project(student.bottleneck(x_t, sigma, label)), teacher.bottleneck(x_t, sigma, label))
    theirs = theirs.mean(-1) if kd == "attention" else theirs
    torch.testing.assert_close(value, edm.denoising_loss(student, x, label, sigma, noise).mean(-1) + 0.3 * theirs, atol=0, rtol=1e-12)
    torch.testing.assert_close(parts[kd], theirs.detach(), atol=0, rtol=1e-12)
    torch.testing.assert_close(parts["prediction"], tsm.tsm_loss(student, teacher, x, label, sigma, noise).mean(-1).detach(), atol=0, rtol=1e-12)


def trained(tmp_path, members, name, edges=None, teacher=toy_mog.denoiser, kd="prediction", p=0.5, steps=12, width=12, **more):
    """A short training of these members, all from one start; edges: (low, high) of each, else by their number."""
    flags = o2mkd.Flags(dataset="toy", steps=steps, batch=8, save_every=1000, quiet=True, kd=kd, p=p, students=[4], **more)
    net = edm.Precond(toy_mog.ToyNet(len(members), width), 0.5)
    net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in edm.Precond(toy_mog.ToyNet(1, width), 0.5).state_dict().items()})
    run = common.Stage("o2mkd", {tmp_path / name: slice(0, len(members))}, steps, 1000, quiet=True)
    own = edges or [o2mkd.ranges(m.students)[m.student:m.student + 2] for m in members]
    low, high = torch.tensor(own).T
    project = o2mkd.Projection([m.seed for m in members], width, 16).to(torch.get_default_dtype()) if kd in ("attention", "contrastive") else None
    return o2mkd.train(run, flags, members, low, high, teacher, net, project, data.Mixture(data.facts("toy")), torch.device("cpu")).state_dict()


def test_p_0_is_ordinary_distillation(tmp_path):
    """Whatever its range, a student with p = 0 is the one that has no range, bit for bit; and N = 1 does not depend on p."""
    m = [common.Member(0, 4, 1, ALL)]
    ordinary = trained(tmp_path, m, "a", [(0, 1000)], p=0.0)
    for name, edges, p, same in (("b", [(250, 500)], 0.0, True), ("c", [(0, 1000)], 1.0, True), ("d", [(250, 500)], 0.5, False)):
        other = trained(tmp_path, m, name, edges, p=p)
        assert all(torch.equal(ordinary[k], other[k]) for k in other) == same


@pytest.mark.parametrize("kd", [pytest.param("prediction", marks=pytest.mark.slow), "attention", "similarity", "contrastive"])
def test_stack_equals_separate_runs(tmp_path, double, kd):
    """Losses of a whole batch too give one value per student, so nothing crosses students."""
    def teacher_of(members):
        net = full_net(len(members), seed=5).requires_grad_(False)                             # every row the same weights
        return net if kd != "prediction" else toy_mog.denoiser
    assert_stack_is_its_members(lambda members, name: trained(tmp_path, members, name, teacher=teacher_of(members), kd=kd))


@pytest.mark.parametrize("kd", list(o2mkd.FEATURE_LOSSES))
@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 4, 3, 3)])
def test_feature_losses_are_zero_for_equal_features_and_one_value_per_student(kd, shape):
    h, other = torch.randn(shape), torch.randn(shape, requires_grad=True)
    loss = o2mkd.FEATURE_LOSSES[kd]
    assert loss(h, h).abs().max() < 1e-6
    value = loss(other, h)
    assert value.shape == (shape[:2] if kd == "attention" else shape[:1])
    assert torch.autograd.grad(value.sum(), other)[0].abs().max() > 0
    torch.testing.assert_close(loss(3 * h, h), torch.zeros_like(value), atol=1e-6, rtol=0)      # none of them sees the scale


def test_attention_transfer_by_hand():
    """Two channels at two positions: means of squares (5, 0) and (9, 8) / norms; on ToyNet units are the positions."""
    h = torch.tensor([[[[[1.0, 0.0]], [[3.0, 0.0]]]]])                                          # [1, 1, C = 2, H = 1, W = 2]
    g = torch.tensor([[[[[3.0, 4.0]], [[3.0, 0.0]]]]])
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([9.0, 8.0]) / math.sqrt(145)
    assert o2mkd.attention_loss(h, g).item() == pytest.approx((a - b).square().sum().item(), rel=1e-6)
    h, g = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, -5.0]]])
    assert o2mkd.attention_loss(h, g).item() == pytest.approx((1 / 17) + (4 / math.sqrt(17) - 1) ** 2, rel=1e-6)


def test_similarity_preserving_by_hand():
    """Orthogonal features against equal ones: rows (1, 0), (0, 1) against (1, 1) / sqrt 2, mean square over b^2 = 4; any two widths."""
    h, g = torch.eye(2)[None], torch.ones(1, 2, 7)
    expected = ((1 - 2 ** -0.5) ** 2 + 0.5) / 2
    assert o2mkd.similarity_loss(h, g).item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_by_hand():
    """Swapped orthogonal features: own similarity 0, the other's 1, against 1 and 0; cross-entropy differs by 1 / temperature."""
    t = torch.eye(2)[None]
    assert o2mkd.contrastive_loss(t.flip(1), t, 0.5).item() == pytest.approx(2.0, rel=1e-6)
    images = torch.eye(2)[None, :, :, None, None].expand(1, 2, 2, 3, 3)
    assert o2mkd.contrastive_loss(images.flip(1), images, 0.5).item() == pytest.approx(2.0, rel=1e-6)


def test_a_students_projection_does_not_depend_on_who_trains_beside_it():
    together, alone = o2mkd.Projection([3, 5], 4, 6).weight, o2mkd.Projection([5], 4, 6).weight
    assert torch.equal(together[1:], alone) and not torch.equal(together[0], together[1])


def test_the_teacher_is_frozen_and_micro_batches_change_nothing(tmp_path, double):
    teacher = full_net(1, seed=5).requires_grad_(False)
    before, member = common.fingerprint(teacher), [common.Member(0, 2, 1, ALL)]
    whole = trained(tmp_path, member, "whole", teacher=teacher, kd="attention")
    parts = trained(tmp_path, member, "parts", teacher=teacher, kd="attention", micro_batch=2)
    assert common.fingerprint(teacher) == before
    for k, v in whole.items():
        torch.testing.assert_close(v, parts[k], atol=1e-10, rtol=0)


def test_features_come_with_the_prediction_in_one_pass():
    D, (x, label, sigma, _) = full_net(), at_random()
    value, h = D(x, sigma, label, features=True)
    assert torch.equal(value, D(x, sigma, label)) and torch.equal(h, D.bottleneck(x, sigma, label))


# ----------------------------------------------------------------------------------------------------------------- merging

def test_merge_of_equal_nets_is_that_net(double):
    start, net = full_net(), full_net(seed=7)
    for c, n in ((None, 3), (0.25, 4)):
        for k, v in o2mkd.merge(start, [net] * n, c).items():
            torch.testing.assert_close(v, net.state_dict()[k], atol=1e-14, rtol=1e-14)
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in o2mkd.merge(start, [net], 0.0).items())
    a, b = full_net(seed=1).state_dict(), full_net(seed=2).state_dict()
    mean = o2mkd.merge(start, [full_net(seed=1), full_net(seed=2)])
    assert all(torch.allclose(mean[k], (a[k] + b[k]) / 2) for k in mean)
    with pytest.raises(common.UserError, match="different sizes"):
        o2mkd.merge(start, [full_net(width=12)])


# --------------------------------------------------------------------------------------------------- what claims are read from

def test_steadiness_of_known_curves(tmp_path):
    """A constant neither falls nor varies; a line from 2 to 1 falls by about a half; 1 ± 0.1 varies by 0.1."""
    rows = ["step,seconds,student,name,value"]
    for i in range(400):
        rows += [f"{i},0,0,flat,3", f"{i},0,0,line,{2 - i / 399}", f"{i},0,0,wave,{1 + 0.1 * (-1) ** i}"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = o2mkd.steadiness(tmp_path)
    assert found["flat"] == {"fall": 0, "variation": 0} and found["wave"]["variation"] == pytest.approx(0.1)
    assert found["line"]["fall"] == pytest.approx(0.487, abs=0.01) and found["line"]["variation"] < 0.03       # a fall is no variation


def test_gradual_tells_a_ramp_from_a_jump():
    place = torch.arange(21.0)
    ramp, jump = (dict(distance=(p[:, None] - p).abs().tolist()) for p in (place, 20 * (place > 7).float()))
    assert o2mkd.gradual(ramp) == {"neighbours": 1, "far": 10}
    assert o2mkd.gradual(jump)["neighbours"] > o2mkd.gradual(jump)["far"]


def test_a_hybrid_of_the_teacher_is_the_teacher_and_its_losses_agree(double):
    router, D = o2mkd.Router(o2mkd.ranges(4)), full_net().requires_grad_(False)
    z, label = torch.randn(1, 8, 2), data.stratified(8, 8)[None]
    hybrid = o2mkd.routed([D if j == 2 else toy_mog.denoiser for j in range(4)], router)
    x = edm.heun(o2mkd.routed([toy_mog.denoiser] * 4, router), z, label, 6)
    assert torch.equal(x, edm.heun(toy_mog.denoiser, z, label, 6)) and not torch.equal(x, edm.heun(hybrid, z, label, 6))
    data_x = toy_mog.sample(data.stratified(800, 8)[None], common.generator(0)).double()
    same = o2mkd.inside_outside(D, D, router, 1, data.facts("toy"), data_x, data.stratified(800, 8)[None], 0, "cpu")
    assert same["prediction_in"] == same["prediction_out"] == 0 < same["denoising_in"] != same["denoising_out"]


# ------------------------------------------------------------------------------------------------------------- whole runs

def with_teacher(run, out):
    """A run folder that has the smoke run's teachers and references alone."""
    for seed in ("seed0", "seed1"):
        for part in ("teacher", "reference"):
            shutil.copytree(run / seed / part, out / seed / part)
    return out


@pytest.fixture
def unseen(monkeypatch):
    """Training is looked at, not what follows it."""
    monkeypatch.setattr(o2mkd, "evaluate", lambda *_: None)
    monkeypatch.setattr(o2mkd, "report", lambda *_: None)


@pytest.fixture(scope="module")
def noise(run, tmp_path_factory):
    """A finished smoke run: N = 1, 4 and two seeds, merged, one student alone, two numbers of steps."""
    out = with_teacher(run, tmp_path_factory.mktemp("o2mkd") / "run")
    o2mkd.main([*SMOKE, "--students", "1", "4", "--seeds", "2", "--merge", "--inspect", "1", "--curve", "4", "--out", str(out)])
    return out


def test_a_run_leaves_results_and_figures(noise):
    results = common.load_json(noise / "results-o2mkd.json")
    assert set(results["stages"]) >= {"o2mkd", "merged", "merged-mean", "alone-1", "hybrid-1", "heun-4", "ddim-4", "loss-denoising", "loss-prediction", "drift-far"}
    assert list(results["students"]) == ["1", "4"] and results["edges"]["4"] == [0, 250, 500, 750, 1000]
    assert len(results["students"]["4"]["per_seed"]) == 2 and set(results["stages"]["heun-4"]) == {"0", "1", "4"}
    assert set(results["stages"]["alone-1"]["4"]) >= {"denoising_in", "prediction_out"}
    one, four, teacher = (results["cost"][n] for n in ("1", "4", "0"))
    assert four["parameters"] == 4 * one["parameters"] and four["multiply_adds"] == one["multiply_adds"] < teacher["multiply_adds"]
    net = toy_mog.toy_net(1, "B")
    exact = sum(p[0].numel() for name, p in net.named_parameters() if p.shape[1] > 1 and name != "table")
    assert teacher["multiply_adds"] == exact * 15
    names = {p.name for p in (noise / "figures").glob("*-o2mkd.png")}
    assert names == {f"{n}-o2mkd.png" for n in ("samples", "students", "losses", "drift", "curve")}
    plot.main([str(noise), "o2mkd"])


def test_a_single_student_is_the_sampler_of_its_own_denoiser(noise):
    """The table's row is what the loaded students give; sample.py takes them too."""
    found = o2mkd.load_students(noise / "seed0" / "o2mkd1")
    label = data.stratified(800, 8)
    z = torch.randn(800, 2, generator=common.generator(0, "report z"))
    x = o2mkd.sampled(o2mkd.routed(found.denoisers, found.router), z, label, 8, "heun", found.facts, "cpu")
    assert torch.equal(x, common.load_tensors(noise / "seed0/o2mkd1/samples.pt")["x"])
    torch.testing.assert_close(x, edm.heun(found.denoisers[0], z[None], label[None], 8)[0])


def test_sample_py_takes_students_by_noise_level(noise, tmp_path, capsys):
    for sampler, evaluations in (("heun", 15), ("ddim", 8)):
        sample.main(["--run", str(noise), "--students", "4", "--o2mkd", "--sampler", sampler, "--timing", "64", "--seeds", "0-9", "--out", str(tmp_path / "s")])
        assert capsys.readouterr().out.count(f"{evaluations} function evaluations") == 2
    assert "o2mkd8" in refused(capsys, sample.main, ["--run", str(noise), "--students", "8", "--o2mkd", "--out", str(tmp_path / "s")])


def test_the_same_command_reuses_and_adds_to_the_table(noise, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda *_: [])
    out = tmp_path / "copy"
    shutil.copytree(noise, out)
    o2mkd.main([*SMOKE, "--students", "2", "--seeds", "2", "--out", str(out)])
    o2mkd.main([*SMOKE, "--students", "1", "--seeds", "2", "--out", str(out)])
    assert "already trained" in capsys.readouterr().out
    results = common.load_json(out / "results-o2mkd.json")
    assert set(results["students"]) == {"1", "2", "4"} and "merged" in results["stages"]
    o2mkd.main([*SMOKE, "--students", "1", "--seeds", "1", "--out", str(out)])                  # of other seeds: the old table is kept
    assert (out / "results-o2mkd.previous.json").exists()
    assert "p (0.75 there, 0.9 now)" in refused(capsys, o2mkd.main, [*SMOKE, "--students", "4", "--seeds", "2", "--p", "0.9", "--out", str(out)])


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("kd", ["prediction", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_killed_and_run_again_is_the_same_bit_for_bit(run, unseen, tmp_path, monkeypatch, kd):
    argv = [*SMOKE, "--students", "1", "4", "--seeds", "2", "--save-every", "4", "--kd", kd, "--tag", "x"]
    ends = []
    for name, kill in (("whole", False), ("killed", True)):
        out = with_teacher(run, tmp_path / name)
        original, count = common.save_state, iter(range(1000))

        def dying(folder, state):
            original(folder, state)
            if next(count) == 5:                                    # one of four folders is a checkpoint ahead
                raise Killed
        if kill:
            monkeypatch.setattr(common, "save_state", dying)
            with pytest.raises(Killed):
                o2mkd.main([*argv, "--out", str(out)])
            monkeypatch.setattr(common, "save_state", original)
        o2mkd.main([*argv, "--out", str(out)])
        ends.append({str(p.relative_to(out)): common.load_tensors(p)["net"] for p in sorted(out.glob("seed*/o2mkd*/ema.pt"))})
        lines = [p.read_text().splitlines() for p in sorted(out.glob("seed*/o2mkd*/metrics.csv"))]
        ends[-1] |= {"metrics": [[c for i, c in enumerate(line.split(",")) if i != 1] for text in lines for line in text]}      # all but seconds
    assert len(ends[0]) == 5 and ends[0].pop("metrics") == ends[1].pop("metrics")
    assert all(torch.equal(a[k], ends[1][f][k]) for f, a in ends[0].items() for k in a)


def test_students_of_the_teachers_size_start_from_it_and_merge_back(run, unseen, tmp_path, capsys):
    out = with_teacher(run, tmp_path / "run")
    o2mkd.main([*SMOKE, "--students", "2", "--keep", "1", "--lr", "0", "--tag", "same", "--out", str(out)])
    teacher = edm.load_teacher(out / "seed0/teacher/ema.pt").state_dict()
    found = o2mkd.load_students(out / "seed0/o2mkd2-same")
    assert all(torch.equal(D.state_dict()[k], teacher[k]) for D in found.denoisers for k in teacher)        # learning rate 0
    merged = o2mkd.merge_folders([out / "seed0/o2mkd2-same"])
    assert all(torch.allclose(merged.state_dict()[k], teacher[k]) for k in teacher)
    o2mkd.main([*SMOKE, "--students", "2", "--out", str(out)])
    with pytest.raises(common.UserError, match="cannot be merged"):
        o2mkd.merge_folders([out / "seed0/o2mkd2-same", out / "seed0/o2mkd2"])                  # other sizes
    o2mkd.main([*SMOKE, "--students", "1", "--tag", "base", "--out", str(out)])
    o2mkd.main([*SMOKE, "--students", "2", "--init", "o2mkd1-base", "--tag", "fork", "--out", str(out)])
    with pytest.raises(common.UserError, match="started from different weights"):
        o2mkd.merge_folders([out / "seed0/o2mkd2", out / "seed0/o2mkd2-fork"])
    start = o2mkd.load_students(out / "seed0/o2mkd2-fork").start.state_dict()
    base = common.load_tensors(out / "seed0/o2mkd1-base/ema.pt")["net"]
    assert all(torch.equal(start[k], base[k]) for k in base)


def test_classes_times_ranges(run, tmp_path, capsys, monkeypatch):
    """--students 4 --ranges 2: four networks, two blocks of classes, each with its two ranges; trained on their own classes alone."""
    monkeypatch.setattr(plot, "draw", lambda *_: [])
    out = with_teacher(run, tmp_path / "run")
    o2mkd.main([*SMOKE, "--students", "4", "--ranges", "2", "--out", str(out)])
    text = capsys.readouterr().out
    assert "bins (sigma) 0-499" in text and "classes 0 1 2 3 | 4 5 6 7" in text
    found = o2mkd.load_students(out / "seed0/o2mkd4-2ranges")
    assert found.router(torch.tensor([0.002, 80.0, 0.002, 80.0]), torch.tensor([0, 3, 4, 7])).tolist() == [0, 1, 2, 3]
    assert common.load_json(out / "seed0/o2mkd4-2ranges/config.json")["partition"] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert "4" in common.load_json(out / "results-o2mkd-2ranges.json")["students"]


def test_the_exact_teacher_teaches_predictions(tmp_path, capsys):
    o2mkd.main([*SMOKE, "--students", "2", "--teacher", "exact", "--out", str(tmp_path / "run")])
    results = common.load_json(tmp_path / "run/results-o2mkd.json")
    assert set(results["cost"]) == {"2"} and not any(s.startswith("drift") for s in results["stages"])      # the closed form is no network


def test_images(image_run, tiny, tmp_path):
    """Two ranges of tiny images: a folder per student, narrowed networks, merged."""
    out = tmp_path / "run"
    shutil.copytree(image_run, out)
    argv = ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--quiet", "--threads", "1", "--out", str(out)]
    o2mkd.main([*argv, "--students", "2", "--merge"])
    assert common.load_tensors(out / "seed0/o2mkd2/student1/ema.pt")["size"] == (8, (1, 1, 1), 1, (8, 4))
    results = common.load_json(out / "results-o2mkd.json")
    assert {"fd_data", "right class"} <= set(results["students"]["2"]) and "merged" in results["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("kd", list(o2mkd.FEATURE_LOSSES))
def test_images_by_features(image_run, tiny, tmp_path, kd):
    out = tmp_path / "run"
    shutil.copytree(image_run, out)
    o2mkd.main(["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--quiet", "--threads", "1", "--out", str(out), "--students", "1", "--kd", kd])


def test_imagenet_dry_run(capsys):
    o2mkd.main(["--dataset", "imagenet64", "--students", "4", "--dry-run"])
    assert "N = 4: bins" in capsys.readouterr().out
    assert data.facts("imagenet64").narrowed("B", 0.7)[0] == 128 and data.facts("fashion-mnist").narrowed("B", 0.7)[0] == 12
    assert data.facts("toy").narrowed("B", 0.7) == (45, 2)


# --------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, words", [
    (["--p", "1.5"], ["--p 1.5", "from 0 to 1"]),
    (["--p", "-0.1"], ["--p -0.1"]),
    (["--students", "1001"], ["--students 1001", "1000"]),
    (["--students", "0"], ["--students 0"]),
    (["--scheme", "0-99,200-999", "--students", "2"], ["a gap", "100 to 199"]),
    (["--scheme", "0-500,400-999", "--students", "2"], ["an overlap", "400"]),
    (["--scheme", "0-99,100-899", "--students", "2"], ["ends at bin 899"]),
    (["--scheme", "0-99,100-1000", "--students", "2"], ["ends at bin 1000"]),
    (["--scheme", "0-99,100-999", "--students", "3"], ["2 ranges", "3"]),
    (["--scheme", "smal"], ["did you mean small?"]),
    (["--scheme", "small", "--students", "100"], ["leave a student without"]),
    (["--students", "4", "--ranges", "3"], ["a multiple of 3"]),
    (["--students", "32", "--ranges", "2"], ["--students 32", "16 blocks", "8 classes"]),
    (["--students", "1", "--merge"], ["--merge", "several"]),
    (["--teacher-size", "Z"], ["--teacher-size Z"]),
    (["--kd", "similarity", "--cfg", "1.5", "--label-dropout", "0.1"], ["--kd prediction"]),
    (["--kd", "hinton"], ["--kd hinton"]),
    (["--kd-weight", "-0.5"], ["--kd-weight -0.5"]),
    (["--keep", "0"], ["--keep 0"]),
    (["--keep", "1.2"], ["--keep 1.2"]),
    (["--keep", "0.5", "--student-size", "XS"], ["one of them"]),
    (["--init", "teacher"], ["--init teacher", "--keep 1"]),
    (["--init", "o2mkd4"], ["o2mkd1"]),
    (["--init", "o2mkd1-gone"], ["o2mkd1-gone", "train"]),
    (["--init", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    (["--teacher", "exact", "--kd", "similarity"], ["--kd prediction"]),
    (["--kd", "similarity", "--micro-batch", "4"], ["--micro-batch"]),
    (["--kd", "similarity", "--kd-weight", "0"], ["nothing would be distilled"]),
    (["--inspect", "4"], ["--inspect 4"]),
    (["--curve", "1"], ["--curve 1"]),
    (["--tag", "../x"], ["--tag ../x"]),
    (["--steqs", "5"], ["--steps"]),
    (["--ema", "1"], ["--ema 1"]),
    (["--eval-samples", "8"], ["--eval-samples 8"]),
])
def test_bad_flags(capsys, tmp_path, argv, words):
    line = refused(capsys, o2mkd.main, [*SMOKE, *argv, "--teacher-steps", "1", "--out", str(tmp_path / "x")])
    for word in words:
        assert word in line


def test_wrong_calls_from_python(noise, run, tmp_path):
    found, folder = o2mkd.load_students(noise / "seed0/o2mkd4"), noise / "seed0/o2mkd4"
    for call, words in ((lambda: o2mkd.routed(found.denoisers[:2], found.router), "2 denoisers for a router of 4"), (lambda: o2mkd.merge(found.start, []), "no students"),
                        (lambda: o2mkd.merge(found.start, found.denoisers, math.nan), "c = nan"), (lambda: o2mkd.merge_folders([]), "no folders")):
        with pytest.raises(common.UserError, match=words):
            call()
    o2mkd.merge_folders(str(folder))                                # one folder, as a string


def test_lost_files_are_named(noise, tmp_path, capsys, monkeypatch):
    """Weights without their config.json are nobody's; without metrics.csv the curves are left out."""
    monkeypatch.setattr(plot, "draw", lambda *_: [])
    out = tmp_path / "copy"
    shutil.copytree(noise, out)
    (out / "seed0/o2mkd4/metrics.csv").unlink()
    o2mkd.main([*SMOKE, "--students", "4", "--out", str(out)])
    (out / "seed0/o2mkd4/config.json").unlink()
    assert "config.json is gone" in refused(capsys, o2mkd.main, [*SMOKE, "--students", "4", "--p", "0.1", "--out", str(out)])
    assert "results-o2mkd" in refused(capsys, msd.main, ["--preset", "smoke", "--quiet", "--tag", "o2mkd-x", "--out", str(tmp_path / "x")])


def test_folders_that_hold_no_students(capsys, run):
    for folder in (run / "seed0", run / "seed0/students3", run / "seed0/students3/dm", run / "seed0/teacher", run / "nowhere"):
        with pytest.raises(common.UserError, match="no students by noise level"):
            o2mkd.load_students(folder)
