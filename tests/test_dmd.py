"""DM: the surrogate's gradient, its sign and zero, who gets gradients, the fake denoiser, the pairs, F."""
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import dmd
import edm
import evaluate
import msd
import run
import teacher
import toy_mog
from common import Draws, Student
from conftest import ALL, Asked, denoiser, options, task_of, trained
from flags import Bins

LOOP = ("--steps 6 --batch 8 --reg-warmup 2 --fake-warmup 3 --warmup 1 --ttur 2 --draws 2 --select-samples 80 "
        "--eval-every 100 ")
HALVES = [Student(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
ONE = [Student(0, 1, 0, ALL)]


def test_surrogate_gradient_is_the_gradient_over_the_elements():
    """[MSD Eq. 6]: grad / D per sample; grad / (B D) after the mean over B and the sum over students."""
    x, grad = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 4, 2)
    loss = dmd.dm_loss(x, grad)
    assert loss.shape == (3, 4)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], grad / 2)
    torch.testing.assert_close(torch.autograd.grad(dmd.dm_loss(x, grad).mean(-1).sum(), x)[0], grad / 8)
    image = torch.randn(5, 3, 8, 8, requires_grad=True)
    found, = torch.autograd.grad(dmd.dm_loss(image, torch.ones_like(image)).sum(), image)
    torch.testing.assert_close(found, torch.full_like(image, 1 / 192))


@pytest.mark.parametrize("normaliser", ["mean_abs", "c_out"])
def test_dm_gradient_sign_zero_and_finiteness(normaliser):
    x, sigma = torch.randn(6, 2), torch.rand(6) + 0.01
    mu_real = x + 0.1 * torch.randn(6, 2)
    c = torch.tensor([0.3, -0.2])
    grad = dmd.dm_gradient(x, mu_real, mu_real + c, sigma, normaliser)
    assert (grad * c > 0).all()  # descent moves x by -c: away from the fake mean
    assert dmd.dm_gradient(x, mu_real, mu_real, sigma, normaliser).abs().max() == 0
    assert torch.isfinite(dmd.dm_gradient(x, x, x + c, sigma, normaliser)).all()  # mu_real = x


def test_dm_gradient_is_the_scores_difference():
    """w_t (s_fake - s_real) with scores from [MSD Eq. 7] and each w_t, the paper's included [MSD App. D.2.1]."""
    g = torch.Generator().manual_seed(0)
    x, x_t, mu_real, mu_fake = torch.randn(4, 7, 2, generator=g, dtype=torch.float64)
    sigma = torch.rand(7, generator=g, dtype=torch.float64) + 0.1
    s_fake, s_real = (-(x_t - mu) / sigma[:, None] ** 2 for mu in (mu_fake, mu_real))
    weights = {"mean_abs": sigma ** 2 / (x - mu_real).abs().mean(-1),  # sigma^2 CS / ||mu - x||_1
               "c_out": sigma ** 2 / (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())}
    for normaliser, w_t in weights.items():
        found = dmd.dm_gradient(x, mu_real, mu_fake, sigma, normaliser)
        torch.testing.assert_close(found, w_t[:, None] * (s_fake - s_real))


def test_dm_gradient_between_two_gaussians_is_the_gradient_of_their_kl():
    """fake N(m, a^2), real N(0, b^2): the mean gradient, weight removed, is the derivative in m of the diffused KL,
    m / (b^2 + sigma^2), within 5 standard errors."""
    m, a, b, level, n = 0.7, 0.3, 0.5, 0.4, 200_000
    g = torch.Generator().manual_seed(0)
    x = m + a * torch.randn(n, 1, generator=g, dtype=torch.float64)
    x_t = x + level * torch.randn(n, 1, generator=g, dtype=torch.float64)
    sigma = torch.full((n,), level, dtype=torch.float64)
    mu_real, mu_fake = x_t * b ** 2 / (b ** 2 + level ** 2), m + (x_t - m) * a ** 2 / (a ** 2 + level ** 2)
    c_out = level * 0.5 / (level ** 2 + 0.25) ** 0.5
    gradient = dmd.dm_gradient(x, mu_real, mu_fake, sigma, "c_out") * c_out / level ** 2
    error = gradient.std().item() / n ** 0.5
    assert abs(gradient.mean().item() - m / (b ** 2 + level ** 2)) < 5 * error and error < 0.01


def test_kl_gradient_is_the_mean_over_its_draws():
    """Of n draws a sample, each with the sample's own label, by hand; the gap is that of the two denoisers."""
    x, label = torch.randn(2, 3, 2, dtype=torch.float64), torch.randint(8, (2, 3))
    sigma, noise = torch.rand(2, 3, 4, dtype=torch.float64) + 0.1, torch.randn(2, 3, 4, 2, dtype=torch.float64)

    def mu(shift):
        return lambda x, sigma, label: 0.5 * x + (sigma + shift * label)[..., None]
    grad, gap = dmd.kl_gradient(x, label, sigma, noise, mu(0.1), mu(0.3), "mean_abs")
    by_hand, gaps = torch.zeros_like(x), []
    for n in range(4):
        x_t = x + sigma[..., n, None] * noise[:, :, n]
        real, fake = (mu(shift)(x_t, sigma[..., n], label) for shift in (0.1, 0.3))
        by_hand += dmd.dm_gradient(x, real, fake, sigma[..., n], "mean_abs") / 4
        gaps.append((fake - real).abs().mean((1, 2)))
    torch.testing.assert_close(grad, by_hand)
    torch.testing.assert_close(gap, torch.stack(gaps).mean(0))


def test_regression_loss():
    x, y = torch.zeros(2, 3, 2), torch.full((2, 3, 2), 0.5)
    torch.testing.assert_close(dmd.regression_loss(x, y, "l2"), torch.full((2, 3), 0.5))
    torch.testing.assert_close(dmd.regression_loss(x, y, "mse"), torch.full((2, 3), 0.25))
    image = torch.full((2, 3, 4, 4), 0.2)
    torch.testing.assert_close(dmd.regression_loss(image, image * 0, "l2"), torch.full((2,), 0.2))
    x.requires_grad_()
    dmd.regression_loss(x, x.detach().clone(), "l2").sum().backward()
    assert torch.isfinite(x.grad).all()


def oracle(x, sigma, label):
    """A generator that knows the ODE of one Gaussian of std 0.5: y = 0.5 z (to sampler accuracy), from x = 80 z."""
    return 0.5 / (sigma ** 2 + 0.25).sqrt()[..., None] * x


oracle.sigma_in = 80.0


@pytest.mark.parametrize("times, zero", [(0, False), (1, True), (2, False)])
def test_regression_is_zero_only_if_z_is_scaled_exactly_once(times, zero):
    D = lambda x, sigma, label: x * (0.25 / (0.25 + sigma ** 2))[..., None]
    z, label = torch.randn(1, 500, 2, generator=common.generator("z")), torch.zeros(1, 500, dtype=torch.int64)
    y = teacher.make_pairs(D, z, label, 256, chunk=200)
    fed = z * 80.0 ** (times - 1)  # one_step scales once more
    loss = dmd.regression_loss(dmd.one_step(oracle, fed, label), y).mean()
    assert (loss < 1e-3) == zero


def test_the_loop_scales_z_of_the_pairs_exactly_once(tmp_path):
    """Fed by the loop, the oracle's regression is zero; `train` asks for nothing else of G here (regression alone)."""
    z = torch.randn(1, 8, 2)
    seen = []

    def distance(x, y):
        seen.append((x.detach(), y))
        return dmd.regression_loss(x, y)
    G = denoiser(12)
    trained(dmd, ONE, options(LOOP + "--steps 1 --reg-warmup 1 --dm-weight 0"), tmp_path, G=G, distance=distance,
            pairs=lambda batch: (z, z / 2, torch.zeros(1, 8, dtype=torch.int64)))
    again = denoiser(12)
    with torch.no_grad():
        want = again(80 * z, torch.full((1, 8), 80.0), torch.zeros(1, 8, dtype=torch.int64))
    (x, y), = seen
    torch.testing.assert_close(x, want)
    assert torch.equal(y, z / 2)


def test_one_step_is_one_evaluation_at_sigma_max():
    seen = []
    G = edm.Precond(lambda x, c_noise, label, features: seen.append(c_noise) or x)
    for level in (80, 5.0):  # --conditioning-sigma
        G.sigma_in = level
        x = dmd.one_step(G, torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64))
        torch.testing.assert_close(seen.pop(), torch.full((2, 3), level).log() / 4)
        c_skip, c_out, c_in, _ = G.coefficients(torch.tensor(float(level)))
        torch.testing.assert_close(x, ((c_skip + c_out * c_in) * level).expand(2, 3, 2))


def best_slope(loss, s: float, level: float) -> float:
    """The minimiser of loss(D, x, label, sigma, noise) over D = slope x_t, of data N(0, s^2): of a parabola."""
    n, g = 100_000, torch.Generator().manual_seed(0)
    slope = torch.tensor(0.0, requires_grad=True)
    x, noise = s * torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g)
    value = loss(lambda x, sigma, label: slope * x, x, None, torch.full((n,), level), noise).mean()
    first, = torch.autograd.grad(value, slope, create_graph=True)
    return -(first / torch.autograd.grad(first, slope)[0]).item()


def test_fake_loss_is_minimised_by_the_exact_denoiser_of_a_gaussian():
    """[MSD Eq. 8]: the best slope of a level is s^2 / (s^2 + sigma^2)."""
    assert best_slope(edm.denoising_loss, 0.2, 0.1) == pytest.approx(0.2 ** 2 / (0.2 ** 2 + 0.1 ** 2), rel=0.01)


def test_bins_in_strata():
    b = dmd.in_strata(Draws("t", ONE).uniform(0, "sigma", 5000, 2), 20, 749)
    assert b.shape == (1, 5000, 2) and b.min() == 20 and b.max() == 749
    assert b[..., 0].max() <= 385 and b[..., 1].min() >= 384
    assert abs(b.double().mean() - 384.5) < 10
    assert dmd.in_strata(torch.tensor([[[0.0, 1.0]]]), 3, 3).tolist() == [[[3, 3]]]


def test_schedule():
    """Regression alone, a head start for mu_fake, then both, each phase with its own warm-up and decay."""
    f = options("--steps 20 --reg-warmup 8 --fake-warmup 5 --warmup 2 --ttur 3 --lr 1 --reg-lr 2 --fake-lr 4").dm
    plan = [dmd.schedule(f, step) for step in range(20)]
    assert [kl for kl, *_ in plan] == [False] * 8 + [True] * 12
    assert [turns for *_, turns, bins in plan] == [0] * 7 + [5] + [3] * 12
    f = replace(f, steps=1008, bins=Bins(20, 300), anneal=200)  # 1 000 updates of the KL term, annealed in 600
    assert [dmd.schedule(f, 8 + step)[-1] for step in (0, 300, 600, 900)] == [(200, 300), (100, 300)] + 2 * [(20, 300)]
    f = replace(f, steps=20)
    assert plan[7][2] == 4 and plan[0][1] == 1 and plan[4][1] == 1  # half of reg_lr: warming up, and half-way
    assert plan[8][1] == 0.5 and plan[14][1] == 0.5 and plan[14][2] == 2
    for more, first in ((dict(dm_weight=0.0), 20), (dict(reg_weight=0.0), 0), (dict(reg_warmup=0), 0)):
        assert dmd.first_kl_step(replace(f, **more)) == first


# ------------------------------------------------------------- the loop

def test_kl_labels_are_the_students_own_and_pairs_hold_every_class(tmp_path):
    """F_DM [MSD Sec. 3.2], watched from outside: labels that reach the teacher, and labels of the pairs drawn."""
    flags, asked = options(LOOP + "--reg-warmup 6 --steps 8 --batch 16"), Asked()
    task, regressed = task_of(dmd, HALVES, flags), [set(), set()]

    def pairs(batch):
        z, y, label = task.pairs(batch)
        for k in range(2):
            regressed[k] |= set(label[k].tolist())
        return z, y, label
    trained(dmd, HALVES, flags, tmp_path, teacher=asked, pairs=pairs)
    assert [asked.classes(k) for k in range(2)] == [set(s.classes) for s in HALVES]
    assert regressed == [set(ALL), set(ALL)]


@pytest.mark.parametrize("F, pairs, real", [(msd.filter_dm, ALL, ALL), (msd.filter_adm, ALL, (4, 5)),
                                            (msd.filter_pairs, (4, 5), ALL)])
def test_a_share_decides_what_a_loop_draws(F, pairs, real):
    """D_k = F(D, Y_k) is what the draws obey: of another share of the same student others come."""
    student, flags = [Student(0, 4, 2, (4, 5))], options("--stages dm,adm")
    D = task_of(dmd, student, flags).given[0].D
    task = task_of(dmd, student, flags, shares=[F(D, torch.tensor([4, 5]))])
    batch = common.Batch(Draws("t", student), 0, 400, (2,), slice(None))
    z, y, label = task.pairs(batch)
    assert set(label.flatten().tolist()) == set(pairs)
    assert set(task.real(batch)[1].flatten().tolist()) == set(real)
    known = task.given[0].pairs
    row = (known["z"][0] == z[0][:, None]).all(-1).nonzero()[:, 1]  # a pair stays a pair
    assert torch.equal(y[0], known["y"][0, row]) and torch.equal(label[0], known["label"][0, row])
    assert F(D, torch.tensor([4, 5])).conditions.tolist() == [4, 5]


def test_a_student_whose_classes_have_no_data_is_refused():
    D = task_of(dmd, ONE, options()).given[0].D
    for F, less in ((msd.filter_adm, D._replace(real=torch.tensor([0, 1]))),
                    (msd.filter_pairs, D._replace(pairs=torch.tensor([0, 1])))):
        with pytest.raises(common.UserError, match="classes 5 to 5"):
            F(less, torch.tensor([5]))


def test_no_gradient_into_either_score_network(tmp_path, monkeypatch):
    """The teacher's hash is unchanged after a run; the fake denoiser gets no gradient in the generator's turn."""
    frozen = denoiser(seed=3)  # parameters that could receive a gradient
    before, turns, original = common.fingerprint(frozen), [], dmd.dm_gradient

    def watched(x, mu_real, mu_fake, *rest):
        turns.append(not mu_real.requires_grad and not mu_fake.requires_grad)
        return original(x, mu_real, mu_fake, *rest)
    monkeypatch.setattr(dmd, "dm_gradient", watched)
    trained(dmd, ONE, options(LOOP + "--ttur 1"), tmp_path, teacher=frozen)
    assert turns == [True] * 4
    assert common.fingerprint(frozen) == before and all(p.grad is None for p in frozen.parameters())


def test_checkpoints_are_chosen_on_draws_that_are_not_reported():
    """DM's by the teacher's samples, ADM's by the data; both other draws than those of results.json."""
    one = task_of(dmd, ONE, options()).given[0]
    truth, z = one.judge.truth(0, 800), Draws("select", ONE).normal(0, "z", 100, 2)[0]
    assert not torch.equal(truth["real"], truth["real_select"])
    assert not torch.equal(z, torch.randn(100, 2, generator=common.generator(0, "report z")))
    for stage, name, reference in ((dmd, "l1", "select"), (msd.adm, "l1_data", "real_select")):
        select = task_of(stage, ONE, options(), inputs={0: one}).select
        assert select.name == name and torch.equal(select.references[0], one.references[reference])


def test_selection_is_the_judges_distance_over_the_students_own_classes():
    """A generator that is perfect on classes 0 to 3 alone: the one student is near the floor, the other far away."""
    def G(x, sigma, label):
        return torch.where((label < 4)[..., None], toy_mog.sample(label, common.generator("G")), 9.0)
    G.sigma_in = 80.0
    near, far = task_of(dmd, HALVES, options("--select-samples 4000")).select(G).tolist()
    assert near < 0.5 and far == pytest.approx(1)


def test_the_flops_of_training_are_counted(tmp_path):
    """By hand: a forward pass of every sample, twice as much for its backward pass; choosing best.pt is no training."""
    line = "--steps 4 --batch 8 --reg-warmup 0 --fake-warmup 3 --ttur 2 --draws 4 --select-samples 8 --eval-every 2"
    flags = options(f"{line} --save-every 3")
    trained(dmd, HALVES, flags, tmp_path)  # the teacher is the closed form, which has no network
    G, mu_fake = (2 * evaluate.multiply_adds(denoiser(width), data.facts("toy")) for width in (12, 16))
    fresh, turns = 2 + 3 * 1, 3 + 3 * 2  # of the head start, and of the other updates
    by_hand = 8 * (G * (4 * (3 + 3) + fresh) + mu_fake * (4 * 4 + 3 * turns))
    assert run.load_tensors(tmp_path / "state.pt")["flops"] == pytest.approx(by_hand, rel=1e-12)


def test_what_lpips_costs():
    """The constants of --dry-run's bill and memory."""
    distance, kept = dmd.lpips_distance("cpu", random_weights=True), {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as count, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = distance(x, torch.ones(1, 3, 32, 32))
        bytes_ = sum(t.untyped_storage().nbytes() for t in kept.values() if t.shape[:1] == (1,) or t.ndim == 0)
        loss.sum().backward()
    assert count.get_total_flops() / 2 == pytest.approx(dmd.LPIPS_MULTIPLY_ADDS, rel=0.02)
    assert bytes_ == pytest.approx(dmd.LPIPS_BYTES, rel=0.1)
