"""DM: the surrogate's gradient, its sign and zero, who gets gradients, the fake denoiser, the pairs."""

import pytest
import torch

import common
import data
import dmd
import edm
import toy_mog
from conftest import assert_stack_is_its_members

FACTS = data.DATASETS["toy"]


def precond(members=1, width=16, seed=0, jitter=0.3):
    net = edm.Precond(toy_mog.ToyNet(members, width), 0.5)
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += jitter * torch.randn(p.shape[1:], generator=g) if p.shape[0] == members else 0
    return net


def test_surrogate_gradient_is_the_gradient_over_the_elements():
    """[MSD Eq. 6]: grad / D per sample; grad / (B D) after the mean over B and the sum over students."""
    x, grad = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 4, 2)
    loss = dmd.dm_loss(x, grad)
    assert loss.shape == (3, 4)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], grad / 2)
    torch.testing.assert_close(torch.autograd.grad(dmd.dm_loss(x, grad).mean(-1).sum(), x)[0], grad / 8)
    image = torch.randn(5, 3, 8, 8, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(dmd.dm_loss(image, torch.ones_like(image)).sum(), image)[0],
                               torch.full_like(image, 1 / 192))


@pytest.mark.parametrize("normaliser", ["mean_abs", "c_out"])
def test_dm_gradient_sign_zero_and_finiteness(normaliser):
    x, sigma = torch.randn(6, 2), torch.rand(6) + 0.01
    mu_real = x + 0.1 * torch.randn(6, 2)
    c = torch.tensor([0.3, -0.2])
    grad = dmd.dm_gradient(x, mu_real, mu_real + c, sigma, normaliser)
    assert (grad * c > 0).all()                                     # descent moves x by -c: away from the fake mean
    assert dmd.dm_gradient(x, mu_real, mu_real, sigma, normaliser).abs().max() == 0
    assert torch.isfinite(dmd.dm_gradient(x, x, x + c, sigma, normaliser)).all()       # mu_real = x
    assert dmd.dm_gradient(x, mu_real, mu_real + 100, sigma, normaliser, clip=2.0).max() == 2.0
    with pytest.raises(ValueError):
        dmd.dm_gradient(x, x, x, sigma, "none")


def test_dm_gradient_is_the_scores_difference():
    """w_t (s_fake - s_real) with scores from [MSD Eq. 7] and each w_t, the paper's included [MSD App. D.2.1]."""
    g = torch.Generator().manual_seed(0)
    x, x_t, mu_real, mu_fake = torch.randn(4, 7, 2, generator=g, dtype=torch.float64)
    sigma = torch.rand(7, generator=g, dtype=torch.float64) + 0.1
    difference = dmd.score(x_t, mu_fake, sigma) - dmd.score(x_t, mu_real, sigma)
    w_t = sigma ** 2 / (x - mu_real).abs().mean(-1)                 # sigma^2 CS / ||mu - x||_1
    torch.testing.assert_close(dmd.dm_gradient(x, mu_real, mu_fake, sigma, "mean_abs"), w_t[:, None] * difference)
    w_t = sigma ** 2 / (sigma * 0.5 / (sigma ** 2 + 0.25).sqrt())
    torch.testing.assert_close(dmd.dm_gradient(x, mu_real, mu_fake, sigma, "c_out"), w_t[:, None] * difference)


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


@pytest.mark.parametrize("times, zero", [(0, False), (1, True), (2, False)])
def test_regression_is_zero_only_if_z_is_scaled_exactly_once(times, zero):
    D = lambda x, sigma, label: x * (0.25 / (0.25 + sigma ** 2))[..., None]
    z, label = torch.randn(1, 500, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 500, dtype=torch.int64)
    y = dmd.make_pairs(D, z, label, 256, chunk=200)
    fed = z * 80.0 ** (times - 1)                                   # one_step scales once more
    loss = dmd.regression_loss(dmd.one_step(oracle, fed, label), y).mean()
    assert (loss < 1e-3) == zero


def test_one_step_is_one_evaluation_at_sigma_max():
    seen = []
    dmd.one_step(lambda x, sigma, label: seen.append((x, sigma)) or x, torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64))
    (x, sigma), = seen
    assert (x == 80).all() and sigma.shape == (2, 3) and (sigma == 80).all()


def test_kde_denoiser():
    """Exact for the cloud: far below the points' spacing it returns the nearest, far above their mean; and it converges."""
    cloud = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    x = torch.tensor([[[0.1, 0.0]]])
    for sigma, want in ((0.01, 0.0), (1e4, 0.5)):
        got = dmd.kde_denoiser(x, torch.tensor([[sigma]]), torch.tensor([[0]]), cloud)
        assert got[0, 0, 0].item() == pytest.approx(want, abs=1e-3)
    g = torch.Generator().manual_seed(0)
    points = toy_mog.sample(torch.zeros(1, 1, 16_000, dtype=torch.int64), g)
    label = torch.zeros(1, 200, dtype=torch.int64)
    sigma = torch.full((1, 200), 0.02)
    x_t = toy_mog.sample(label, g) + 0.02 * torch.randn(1, 200, 2, generator=g)
    error = (dmd.kde_denoiser(x_t, sigma, label, points) - toy_mog.denoiser(x_t, sigma, label)).square().mean().sqrt()
    assert error < 0.05 * 0.02


def test_fake_loss_is_minimised_by_the_exact_denoiser_of_a_gaussian():
    """[MSD Eq. 8]: gradient descent on one slope per level finds s^2 / (s^2 + sigma^2)."""
    g = torch.Generator().manual_seed(0)
    s, level, n = 0.2, 0.1, 100_000
    slope = torch.tensor(0.0, requires_grad=True)
    x, noise = s * torch.randn(n, 1, generator=g), torch.randn(n, 1, generator=g)
    loss = edm.denoising_loss(lambda x, sigma, label: slope * x, x, None, torch.full((n,), level), noise).mean()
    first, = torch.autograd.grad(loss, slope, create_graph=True)
    second, = torch.autograd.grad(first, slope)
    best = -(first / second).item()                                 # the loss is a parabola in the slope
    assert best == pytest.approx(s ** 2 / (s ** 2 + level ** 2), rel=0.01)


def test_bins_in_strata():
    members = [common.Member(0, 1, 0, (0,))]
    b = dmd.bins_in_strata(common.Draws("t", members), 0, "sigma", 20, 749, 5000, 2)
    assert b.shape == (1, 5000, 2) and b.min() == 20 and b.max() == 749
    assert b[..., 0].max() <= 385 and b[..., 1].min() >= 384
    whole = b.flatten().double()
    assert abs(whole.mean() - 384.5) < 10


# ------------------------------------------------------------------------------------- the loop, with a recorded teacher

def small_flags(**changes):
    flags = dmd.Flags(dataset="toy", steps=6, batch=8, reg_warmup=2, fake_warmup=3, warmup=1, ttur=2, draws=2, pairs=24,
                      eval_every=100, select_samples=80, save_every=100, quiet=True)
    for k, v in changes.items():
        assert hasattr(flags, k)
        setattr(flags, k, v)
    return flags


def small_train(tmp_path, members, flags, teacher=None, net=None, index=None, name="s"):
    """dmd.train on a stack of members, with pairs from the exact denoiser; returns (ema, the run)."""
    one = precond(1)
    if net is None:
        net = edm.Precond(toy_mog.ToyNet(len(members), 16), 0.5)
        net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in one.state_dict().items()})
    label = data.stratified(flags.pairs, 8)[None]
    z = torch.randn(1, flags.pairs, 2, generator=common.generator("pairs"))
    pairs = {"z": z, "y": dmd.make_pairs(toy_mog.denoiser, z, label, 8), "label": label,
             "row": torch.zeros(len(members), dtype=torch.int64)}
    reference = {0: data.toy_statistics(toy_mog.sample(data.stratified(800, 8), common.generator("ref")), data.stratified(800, 8))}
    run = common.Stage("dm", {tmp_path / name: slice(0, len(members))}, flags.steps, flags.save_every, quiet=True)
    ema, best = dmd.train(run, flags, members, teacher or toy_mog.denoiser, net, pairs,
                          index or [torch.arange(flags.pairs)] * len(members), data.toy_judge(data.facts("toy")), reference, torch.device("cpu"))
    return ema


def test_kl_labels_are_the_students_own_and_pairs_hold_every_class(tmp_path):
    """F_DM [MSD Sec. 3.2], watched from outside: labels that reach the teacher, and labels of the pairs drawn."""
    members = [common.Member(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
    seen = [set(), set()]

    def teacher(x, sigma, label):
        for k in range(2):
            seen[k] |= set(label[k].tolist())
        return toy_mog.denoiser(x, sigma, label)
    regressed = [set(), set()]
    original = dmd.one_step

    def spy(G, z, label):
        if isinstance(G, edm.Precond) and torch.is_grad_enabled() and label.shape == (2, 16):
            for k in range(2):
                regressed[k] |= set(label[k].tolist())
        return original(G, z, label)
    dmd.one_step = spy
    try:
        small_train(tmp_path, members, small_flags(reg_warmup=6, steps=8, batch=16), teacher)
    finally:
        dmd.one_step = original
    assert seen[0] <= {0, 1, 2, 3} and seen[1] <= {4, 5, 6, 7} and seen[0] and seen[1]
    assert regressed[0] == regressed[1] == set(range(8))


@pytest.mark.parametrize("fake", ["net", "kde"])
def test_no_gradient_into_either_score_network(tmp_path, fake):
    """The teacher's hash is unchanged after a run; the fake denoiser gets no gradient in the generator's turn."""
    members = [common.Member(0, 1, 0, tuple(range(8)))]
    teacher = precond(seed=3)                                       # parameters that could receive a gradient
    before = common.fingerprint(teacher)
    turns = []                                                      # does any graph lead into the scores?
    original = dmd.dm_gradient

    def watched(x, mu_real, mu_fake, *rest):
        turns.append(not mu_real.requires_grad and not mu_fake.requires_grad)
        return original(x, mu_real, mu_fake, *rest)
    dmd.dm_gradient = watched
    try:
        small_train(tmp_path, members, small_flags(fake=fake, kde_points=32, ttur=1), teacher)
    finally:
        dmd.dm_gradient = original
    assert len(turns) == 4 and all(turns)
    assert common.fingerprint(teacher) == before
    assert all(p.grad is None for p in teacher.parameters())
    x = torch.randn(1, 4, 2, requires_grad=True)                    # and in general: neither network gets a gradient
    mu_fake = precond(seed=4)
    sigma, label = torch.full((1, 4), 0.1), torch.zeros(1, 4, dtype=torch.int64)
    grad = dmd.dm_gradient(x, teacher(x, sigma, label), mu_fake(x, sigma, label), sigma)
    dmd.dm_loss(x, grad).sum().backward()
    assert x.grad is not None and all(p.grad is None for n in (teacher, mu_fake) for p in n.parameters())


def test_stack_equals_separate_runs(tmp_path, double):
    """Nothing crosses students: 50 updates of a stack of three, and of each alone, in float64."""
    flags = small_flags(steps=50, reg_warmup=10, clip_norm=1.0, pairs=40)
    assert_stack_is_its_members(lambda members, name: small_train(tmp_path, members, flags, name=name).state_dict())


def test_first_step_of_a_float32_stack(tmp_path):
    flags = small_flags(steps=1, reg_warmup=0, lr=1e-3)
    members = [common.Member(0, 8, k, (k,)) for k in range(8)]
    together = small_train(tmp_path, members, flags, name="all").state_dict()
    alone = small_train(tmp_path, [members[5]], flags, name="one").state_dict()
    for k, v in alone.items():
        torch.testing.assert_close(together[k][5:6], v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [dict(reg_weight=0.0, ttur=3, reg_warmup=0), dict(dm_weight=0.0), dict(reg_warmup=0, ttur=1)])
def test_variants_run(tmp_path, changes):
    """DMD2 without GAN, regression only, DMD 1:1."""
    members = [common.Member(0, 1, 0, tuple(range(8)))]
    ema = small_train(tmp_path, members, small_flags(**changes))
    assert all(torch.isfinite(p).all() for p in ema.parameters())


def test_kde_does_not_notice_its_neighbours(tmp_path):
    """K = 8's student beside K = 1's, and alone: the same weights (float32, to rounding)."""
    flags = small_flags(fake="kde", kde_points=32, steps=4)
    members = [common.Member(0, 1, 0, tuple(range(8))), common.Member(0, 8, 5, (5,))]
    together = small_train(tmp_path, members, flags, name="all").state_dict()
    alone = small_train(tmp_path, members[1:], flags, name="one").state_dict()
    for k, v in alone.items():
        torch.testing.assert_close(together[k][1:], v, atol=1e-5, rtol=1e-5)
