"""O2MKD: ranges, draws, routing, losses, training, merging, what claims are read from, whole runs."""
import shutil

import pytest
import torch

import common
import data
import edm
import msd
import o2mkd
import students
import toy_mog
import tsm
from common import Student, generator
from conftest import ALL, Killed, assert_stack_is_its_members, denoiser, kill_after, refused, same, trained
from flags import UserError, parse
from run import load_json, load_tensors

SMOKE = ["--preset", "smoke"]
KDS = list(o2mkd.FEATURE_LOSSES)
every_kd = pytest.mark.parametrize("kd", KDS)
close = torch.testing.assert_close


def latents(number):
    return torch.randn(1, number, 2), data.stratified(number, 8)[None]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("scheme", ["uniform", "small", "large"])
def test_ranges_cover_the_levels_exactly_once(scheme, number):
    """Every bin, and every sigma between, has one owner; the bin where neighbours meet is the upper one's."""
    edges, grid = o2mkd.ranges(number, scheme), edm.sigma_bins()
    of_bin = torch.cat([torch.full((high - low,), k) for k, (low, high) in enumerate(zip(edges, edges[1:]))])
    assert (edges[0], len(edges), len(of_bin)) == (0, number + 1, 1000)
    router = o2mkd.Router(edges)
    assert torch.equal(router(grid.float()), of_bin) and torch.equal(router(grid.float().double()), of_bin)
    assert torch.equal(router((grid[1:] * grid[:-1]).sqrt()), of_bin[:-1])
    assert router(torch.tensor([0.0, 1e-4, 79.99, 1e4])).tolist() == [0, 0, number - 1, number - 1]


def test_schemes_put_more_students_where_they_say():
    """Edges at T i / N, T (i / N)^2, mirrored, as written."""
    edges = [o2mkd.ranges(4, scheme)[1:4] for scheme in ("uniform", "small", "large", "0-99,100-299,300-499,500-999")]
    assert edges == [[250, 500, 750], [62, 250, 562], [438, 750, 938], [100, 300, 500]]


@pytest.mark.parametrize("number, scheme", [
    (4, "smal"), (2, "0-99,200-999"), (2, "0-500,400-999"), (2, "0-99,100-899"), (2, "0-99,100-1000"),
    (3, "0-99,100-999"), (3, "0-99,100-49,50-999"), (100, "small")])
def test_a_level_without_an_owner_or_an_owner_without_a_level(number, scheme):
    with pytest.raises(UserError, match=f"--scheme {scheme}: not {number} ranges"):
        o2mkd.ranges(number, scheme)


def test_share_of_own_levels_is_p_plus_the_ranges_mass():
    """Own range with p, else all: p + (1 - p) m; tossed once per student and update."""
    low, high = torch.tensor([0, 100, 700]), torch.tensor([100, 700, 1000])
    draws = common.Draws("o2mkd", [Student(0, 3, k, ALL) for k in range(3)])

    def bins(step, size, p):
        return o2mkd.draw_bins(common.Batch(draws, step, size, (2,), slice(None)), low, high, p)
    for p in (0, 0.3, 1):
        drawn = torch.stack([bins(step, 64, p) for step in range(1500)])  # [steps, 3, batch]
        own = ((drawn >= low[:, None]) & (drawn < high[:, None])).double().mean(-1)  # [steps, 3]
        tolerance = 4 * (p * (1 - p) / 1500 + 0.25 / 1500 / 64) ** 0.5 + 1e-9
        close(own.mean(0), p + (1 - p) * (high - low).double() / 1000, atol=tolerance, rtol=0)
        if p == 0.3:  # whole batches of the first student's 10 %
            assert ((own[:, 0] == 1).double().mean() - 0.3).abs() < 0.05
    edge = bins(0, 200_000, 1)
    assert edge.amin(1).tolist() == [0, 100, 700] and edge.amax(1).tolist() == [99, 699, 999]


def test_equal_ranges_draw_as_one_student_does():
    """N = 1 has the law of sigma of N = 8 together: even over the bins, whatever p is."""
    low, draws = torch.tensor(o2mkd.ranges(8)[:-1]), common.Draws("o2mkd", [Student(0, 8, k, ALL) for k in range(8)])
    drawn = torch.cat([o2mkd.draw_bins(common.Batch(draws, step, 64, (2,), slice(None)), low, low + 125, 0.75)
                       for step in range(1500)])
    share = drawn.flatten().double().histogram(10, range=(0, 1000))[0] / drawn.numel()
    close(share, torch.full((10,), 0.1).double(), atol=4 * 0.0015, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_n_copies_of_the_teacher_are_the_teachers_sampler(order):
    """The same samples bit for bit, and every evaluation ran at its own owner."""
    router, (z, label), seen = o2mkd.Router(o2mkd.ranges(4, "small")), latents(64), []

    def copy_of(i):
        def denoise(x, sigma, label):
            assert (router(sigma) == i).all()
            seen.append((i, sigma[0, 0].item()))
            return toy_mog.denoiser(x, sigma, label)
        return denoise
    x = edm.heun(o2mkd.routed([copy_of(i) for i in range(4)], router), z, label, 12, order=order)
    assert torch.equal(x, edm.heun(toy_mog.denoiser, z, label, 12, order=order))
    levels = edm.sigma_steps(12)[:-1].float()
    levels = levels if order == 1 else levels.repeat_interleave(2)[1:]
    assert [sigma for _, sigma in seen] == levels.tolist() and {i for i, _ in seen} == {0, 1, 2, 3}


def test_both_evaluations_of_a_heun_step_go_to_their_own_owner():
    """A step across a boundary asks two students."""
    t, seen, router = edm.sigma_steps(6), [], o2mkd.Router(o2mkd.ranges(2))
    across, = (i for i in range(5) if router(t[i]) != router(t[i + 1]))
    two = [lambda x, s, c, i=i: seen.append(i) or toy_mog.denoiser(x, s, c) for i in range(2)]
    edm.heun(o2mkd.routed(two, router), *latents(8), 6)
    assert seen[2 * across:2 * across + 2] == [1, 0]


def test_mixed_levels_are_answered_one_by_one():
    router, sigma = o2mkd.Router([0, 300, 1000]), edm.level(torch.tensor([[0, 299, 300, 999]]))
    x, scaled = torch.randn(1, 4, 2), [lambda x, s, c, i=i: (i + 1) * x for i in range(2)]
    assert router(sigma).tolist() == [[0, 0, 1, 1]]
    assert torch.equal(o2mkd.routed(scaled, router)(x, sigma, torch.zeros(1, 4).long()), x * (router(sigma) + 1)[..., None])


def at_random():
    """x, label, sigma, noise of a batch."""
    g, label = generator(3), data.stratified(32, 8)[None]
    sigma = edm.level(torch.randint(1000, label.shape, generator=g)).double()
    return toy_mog.sample(label, g), label, sigma, torch.randn(1, 32, 2, generator=g)


def pair_of(width=16):
    """A student, and a frozen teacher."""
    return denoiser(width), denoiser(seed=5).requires_grad_(False)


def test_the_loss_is_denoising_plus_lambda_tsm_with_the_same_gradients(double):
    batch, (student, teacher) = at_random(), pair_of()
    for lam in (0.0, 0.7):
        value, parts = o2mkd.o2mkd_loss(student, teacher, *batch, lam)
        apart = edm.denoising_loss(student, *batch).mean(-1) + lam * tsm.tsm_loss(student, teacher, *batch).mean(-1)
        close(value, apart, atol=0, rtol=1e-12)
        ours, theirs = (torch.autograd.grad(v.sum(), list(student.parameters())) for v in (value, apart))
        close(ours, theirs, atol=1e-13, rtol=1e-10)
        assert set(parts) == {"denoising", *["prediction"] * (lam > 0)} and not parts["denoising"].requires_grad


@every_kd
def test_the_loss_by_features_is_denoising_plus_lambda_times_theirs(double, kd):
    """Features of both at the same x_t, through the linear layer where the loss compares units."""
    batch, (student, teacher), one = at_random(), pair_of(12), [Student(0, 1, 0, ALL)]
    project, none = (o2mkd.Projection(kd, one, (width,), (16,)) for width in (12, 16))
    assert (project.weight is None) == (kd == "similarity") and none.weight is None
    value, parts = o2mkd.o2mkd_loss(student, teacher, *batch, 0.3, kd, project)
    x, label, sigma, noise = batch
    x_t = x + sigma[..., None] * noise
    h, h_teacher = (D.bottleneck(x_t, sigma, label) for D in (student, teacher))
    both = student(x_t, sigma, label, features=True)  # in one pass
    assert torch.equal(both[0], student(x_t, sigma, label)) and torch.equal(both[1], h)
    theirs = o2mkd.FEATURE_LOSSES[kd](project(h), h_teacher)
    denoising = edm.denoising_loss(student, *batch).mean(-1)
    prediction = tsm.tsm_loss(student, teacher, *batch).mean(-1)
    close([value, parts[kd], parts["prediction"]], [denoising + 0.3 * theirs, theirs, prediction], atol=0, rtol=1e-12)


@every_kd
@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 4, 3, 3)])
def test_feature_losses_are_zero_for_equal_features_and_one_value_per_student(kd, shape):
    h, other, loss = torch.randn(shape), torch.randn(shape, requires_grad=True), o2mkd.FEATURE_LOSSES[kd]
    value = loss(other, h)
    assert value.shape == shape[:1] and torch.autograd.grad(value.sum(), other)[0].abs().max() > 0
    for same_direction in (h, 3 * h):  # none of them sees the scale
        close(loss(same_direction, h), torch.zeros(shape[:1]), atol=1e-6, rtol=0)


def test_attention_transfer_by_hand():
    """Two channels at two positions: mean squares (5, 0) and (9, 8) / norms; of ToyNet, units are the positions."""
    h, g = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 0.0]])  # [C = 2, W = 2]
    value = o2mkd.attention_loss(h[None, None, :, None], g[None, None, :, None]).item()
    assert value == pytest.approx((1 - 9 / 145 ** 0.5) ** 2 + 64 / 145, rel=1e-6)
    value = o2mkd.attention_loss(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, -5.0]]])).item()
    assert value == pytest.approx(1 / 17 + (4 / 17 ** 0.5 - 1) ** 2, rel=1e-6)


def test_similarity_preserving_by_hand():
    """Orthogonal features against equal ones: rows (1, 0), (0, 1) against (1, 1) / sqrt 2, mean square over b^2 = 4."""
    value = o2mkd.similarity_loss(torch.eye(2)[None], torch.ones(1, 2, 7))  # any two widths
    assert value.item() == pytest.approx(((1 - 2 ** -0.5) ** 2 + 0.5) / 2, rel=1e-6)


def test_contrastive_by_hand():
    """Swapped orthogonal features: own similarity 0, the other's 1, against 1 and 0: it differs by 1 / temperature."""
    t = torch.eye(2)[None]
    for h in (t, t[..., None, None].expand(1, 2, 2, 3, 3)):
        assert o2mkd.contrastive_loss(h.flip(1), h, 0.5).item() == pytest.approx(2.0, rel=1e-6)


def short(group, folder, line="", **parts) -> dict:
    """Weights of a short training of these toy students, all from one start."""
    flags = parse(o2mkd.Flags, o2mkd.PRESETS, [*SMOKE, "--batch", "8", *line.split()])
    shares = [msd.filter_adm(students.whole(data.facts("toy")), torch.tensor(s.classes)) for s in group]
    return trained(o2mkd, group, flags, folder, shares=shares, **parts)["ema.pt"].state_dict()


def test_p_0_is_ordinary_distillation(tmp_path, monkeypatch):
    """A student with p = 0 is the one that has all levels, to which p is nothing, bit for bit."""
    def after(line):
        return short([Student(0, 4, 1, ALL)], tmp_path / line, line)
    a, b = after("--p 0"), after("--p 0.5")  # bins 250 to 499
    monkeypatch.setattr(o2mkd, "ranges", lambda *_: [0, 0, 1000, 1000, 1000])  # all levels
    assert not same(a, b) and same(a, after("--p 1"))


@pytest.mark.parametrize("kd", ["prediction", *KDS])
def test_stack_equals_separate_runs(tmp_path, double, kd):
    assert_stack_is_its_members(lambda group, name: short(group, tmp_path / name, f"--kd {kd} --p 0.5"))


def test_the_teacher_is_frozen_and_micro_batches_change_nothing(tmp_path, double):
    one, (_, D) = [Student(0, 2, 1, ALL)], pair_of()
    before = common.fingerprint(D)
    whole, parts = (short(one, tmp_path / m, f"--kd attention --micro-batch {m}", D=D) for m in "02")
    close(parts, whole, atol=1e-10, rtol=0)
    assert common.fingerprint(D) == before
    with pytest.raises(UserError, match="relates all samples of a batch"):
        short(one, tmp_path / "no", "--kd similarity --micro-batch 2")


@pytest.mark.parametrize("kd", ["prediction", "contrastive"])
def test_killed_and_run_again_is_the_same_bit_for_bit(tmp_path, monkeypatch, kd):
    group, line = [Student(0, 4, 1, ALL), Student(1, 1, 0, ALL)], f"--kd {kd} --save-every 4"
    whole = short(group, tmp_path / "whole", line)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, "o2mkd", 10)
        short(group, tmp_path / "killed", line)
    assert same(whole, short(group, tmp_path / "killed", line))


def test_merge_of_equal_nets_is_that_net(double):
    start, a, b = (denoiser(seed=seed).requires_grad_(False) for seed in range(3))
    for c, n in ((None, 3), (0.25, 4)):
        close(o2mkd.merge(start, [a] * n, c).state_dict(), a.state_dict(), atol=1e-14, rtol=1e-14)
    assert same(o2mkd.merge(start, [a], 0.0).state_dict(), start.state_dict())
    mean, b = o2mkd.merge(start, [a, b]).state_dict(), b.state_dict()
    close(dict(mean), {k: (v + b[k]) / 2 for k, v in a.state_dict().items()})


def test_steadiness_of_known_curves(tmp_path):
    """A constant neither falls nor varies; a line from 2 to 1 falls by half, about; 1 ± 0.1 varies by 0.1."""
    rows = ["step,seconds,student,name,value"]
    for i in range(400):
        rows += [f"{i},0,0,flat,3", f"{i},0,0,line,{2 - i / 399}", f"{i},0,0,wave,{1 + 0.1 * (-1) ** i}"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    found = o2mkd.steadiness(tmp_path)
    assert found["flat"] == {"fall": 0, "variation": 0} and found["wave"]["variation"] == pytest.approx(0.1)
    assert found["line"]["fall"] == pytest.approx(0.487, abs=0.01) and found["line"]["variation"] < 0.03


def test_gradual_tells_a_ramp_from_a_jump():
    place = torch.arange(21.0)
    tables = [(p[:, None] - p).abs().tolist() for p in (place, 20 * (place > 7).float())]
    ramp, jump = (o2mkd.gradual({"distance": table}) for table in tables)
    assert ramp == {"neighbours": 1, "far": 10} and jump["neighbours"] > jump["far"]


def test_a_hybrid_of_the_teacher_is_the_teacher(double):
    router, (_, D), mu, (z, label) = o2mkd.Router(o2mkd.ranges(4)), pair_of(), toy_mog.denoiser, latents(800)
    x, hybrid = (edm.heun(o2mkd.routed(who, router), z, label, 6) for who in ([mu] * 4, [mu, mu, D, mu]))
    assert torch.equal(x, edm.heun(mu, z, label, 6)) and not torch.equal(x, hybrid)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A finished smoke run with all that it can measure."""
    out = tmp_path_factory.mktemp("o2mkd")
    execute(out, "--students 1 4 --seeds 2 --merge --inspect 1 --curve 4")
    return out


@pytest.fixture
def copy(noise, tmp_path, monkeypatch):
    """The folder of that run, to train in without figures."""
    monkeypatch.setattr("plot.draw", lambda *_: [])
    return shutil.copytree(noise, tmp_path / "copy")


def execute(out, line):
    o2mkd.main([*SMOKE, "--out", str(out), *line.split()])


def test_a_run_leaves_results_and_figures(noise):
    results = load_json(noise / "results-o2mkd.json")
    rows = {"4": "merged merged-mean alone-1 hybrid-1", "014": "heun-4 ddim-4", "0": "drift-neighbours drift-far",
            "14": "o2mkd loss-denoising loss-prediction"}
    assert all("".join(results["stages"][name]) == Ns for Ns, names in rows.items() for name in names.split())
    assert len(results["students"]["4"]["per_seed"]) == 2 and results["edges"]["4"] == [0, 250, 500, 750, 1000]
    teacher, one, four = (results["cost"][n] for n in "014")
    net = toy_mog.ToyNet().named_parameters()
    exact = sum(p.numel() for name, p in net if p.shape[1] > 1 and name != "table")
    assert four["parameters"] == 4 * one["parameters"] and four["multiply_adds"] == one["multiply_adds"]
    assert one["multiply_adds"] < teacher["multiply_adds"] == exact * 15
    names = {f"{n}-o2mkd.png" for n in ("samples", "losses", "drift", "curve")}
    assert {p.name for p in (noise / "figures").glob("*-o2mkd.png")} == names


def test_a_single_student_is_the_sampler_of_its_own_denoiser(noise):
    """The table's row is what the loaded students give."""
    found, kept = o2mkd.load_students(noise / "seed0/o2mkd1"), load_tensors(noise / "seed0/o2mkd1/samples.pt")
    z, label = torch.randn(1, 800, 2, generator=generator(0, "report z")), kept["label"][None]
    for D in (found.denoisers[0], o2mkd.routed(found.denoisers, found.router)):
        assert torch.equal(edm.heun(D, z, label, 8)[0], kept["x"])


def test_students_start_from_the_teacher_or_one_trained_before_and_merge_back(copy, capsys):
    home = copy / "seed0"
    execute(copy, "--students 2 --tag same --keep 1 --lr 0")
    found, teacher = o2mkd.load_students(home / "o2mkd2-same"), load_tensors(home / "teacher/ema.pt")["net"]
    assert all(same(D.state_dict(), teacher) for D in (found.start, *found.denoisers))
    close(dict(o2mkd.merge(found.start, found.denoisers).state_dict()), dict(teacher))
    execute(copy, "--students 2 --tag fork --init o2mkd1")
    start = o2mkd.load_students(home / "o2mkd2-fork").start
    assert same(start.state_dict(), load_tensors(home / "o2mkd1/ema.pt")["net"])
    for line, words in (("--init o2mkd1 --keep 0.7", "--init o2mkd1: of size"), ("--p 0.9", "p (0.75 there, 0.9 now)")):
        assert words in refused(capsys, o2mkd.main, [*SMOKE, "--out", str(copy), *line.split()])


def test_the_exact_teacher_is_no_network_to_look_into(tmp_path, monkeypatch):
    monkeypatch.setattr("plot.draw", lambda *_: [])
    execute(tmp_path, "--students 2 --teacher exact")
    results = load_json(tmp_path / "results-o2mkd.json")
    assert set(results["cost"]) == {"2"} and "drift-far" not in results["stages"]


@pytest.mark.parametrize("kd", ["prediction", *(pytest.param(kd, marks=pytest.mark.slow) for kd in KDS)])
def test_images(image_run, tiny, tmp_path, monkeypatch, kd):
    """A folder per student, narrowed networks, merged."""
    monkeypatch.setattr("plot.draw", lambda *_: [])
    out = shutil.copytree(image_run, tmp_path / "run")
    execute(out, f"--dataset fashion-mnist --data {tiny} --students 2 --merge --kd {kd}")
    assert load_tensors(out / "seed0/o2mkd2/student1/ema.pt")["size"] == (8, (1, 1, 1), 1, (8, 4))
    stages = load_json(out / "results-o2mkd.json")["stages"]
    assert {"fd_data", "right class"} <= set(stages["o2mkd"]["2"]) and "merged" in stages
    sizes = [data.facts(name).narrowed("B", 0.7)[0] for name in ("imagenet64", "fashion-mnist", "toy")]
    assert sizes == [128, 12, 45]
