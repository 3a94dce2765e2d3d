"""The mixture's closed forms against automatic differentiation, limits and counts."""
import math

import pytest
import torch

import data
import evaluate
import toy_mog


def points(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(8, (n,), generator=g)
    sigma = torch.exp(torch.randn(n, generator=g, dtype=torch.float64) * 2 - 2)
    x = toy_mog.sample(label, g).double() + sigma[:, None] * torch.randn(n, 2, generator=g, dtype=torch.float64)
    return x, sigma, label


@pytest.mark.parametrize("given", [True, False])
def test_score_is_the_gradient_of_the_log_density(given):
    x, sigma, label = points()
    label = label if given else None
    x.requires_grad_()
    grad, = torch.autograd.grad(toy_mog.log_density(x, sigma, label).sum(), x)
    torch.testing.assert_close(toy_mog.score(x.detach(), sigma, label), grad, rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    axis = torch.linspace(-1, 1, 201, dtype=torch.float64)  # a third of sigma apart: the sum is the integral
    x = torch.cartesian_prod(axis, axis)
    sigma = torch.full((len(x),), 0.03, dtype=torch.float64)
    total = toy_mog.log_density(x, sigma).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-6


def test_tweedie():
    """D = x + sigma^2 score [EDM Eq. 3]."""
    x, sigma, label = points()
    D = x + sigma[:, None] ** 2 * toy_mog.score(x, sigma, label)
    torch.testing.assert_close(toy_mog.denoiser(x, sigma, label), D, rtol=1e-9, atol=1e-9)


def test_denoiser_limits():
    x, _, label = points()
    nothing, huge = (torch.full((200,), level, dtype=torch.float64) for level in (1e-7, 1e5))
    clean = toy_mog.sample(label, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(toy_mog.denoiser(clean, nothing, label), clean, atol=1e-8, rtol=0)
    centre = toy_mog.means(dtype=torch.float64).mean(1)[label]
    torch.testing.assert_close(toy_mog.denoiser(huge[:, None] * x, huge, label), centre, atol=1e-4, rtol=0)


def test_denoiser_is_the_mean_of_x0_given_x():
    """Self-normalised importance sampling from exact draws agrees within 5 standard errors."""
    g = torch.Generator().manual_seed(0)
    x0 = toy_mog.sample(torch.full((400_000,), 2), g).double()
    sigma, x = 0.05, toy_mog.means(dtype=torch.float64)[2, 0] + torch.tensor([0.02, -0.03])
    w = torch.exp(-(x0 - x).square().sum(-1) / (2 * sigma ** 2))
    w = w / w.sum()
    mean = (w[:, None] * x0).sum(0)
    error = ((w[:, None] * (x0 - mean)) ** 2).sum(0).sqrt()
    D = toy_mog.denoiser(x[None], torch.tensor([sigma], dtype=torch.float64), torch.tensor([2]))[0]
    assert ((D - mean).abs() < 5 * error).all()


def test_samples_have_the_stated_moments():
    label = torch.arange(80_000) % 8
    x = toy_mog.sample(label, torch.Generator().manual_seed(0)).double()
    variance = toy_mog.OUTER ** 2 / 2 + toy_mog.INNER ** 2 / 2 + toy_mog.STD ** 2
    assert abs(x.var(0) - variance).max() < 0.002
    check = toy_mog.coverage(x, label)
    assert abs(check["within"] - (1 - math.exp(-8))) < 5e-4
    assert check["modes"] > 63.8 and 0.8 < check["mode_min"] < 1 < check["mode_max"] < 1.2


def test_coverage_of_a_collapsed_class():
    x = toy_mog.means()[0, 3].expand(100, 2)
    check = toy_mog.coverage(x, torch.zeros(100, dtype=torch.int64))
    assert check["modes"] == pytest.approx(1) and check["mode_min"] == 0 and check["mode_max"] == pytest.approx(8)
    assert toy_mog.coverage(x, torch.ones(100, dtype=torch.int64))["within"] == 0  # the wrong class's Gaussians


def test_histogram_counts_everything():
    x = torch.tensor([[0.0, 0.0], [-0.75, -0.75], [0.7499, 0.7499], [0.75, 0.0], [9.0, 0.0], [float("nan"), 0.0]])
    h = toy_mog.histogram(x)
    assert h.sum() == 6 and h[-1] == 3
    assert h[0] == 1 and h[100 * 200 + 100] == 1 and h[200 * 200 - 1] == 1


def test_l1_is_a_total_variation():
    a, b = torch.tensor([2, 0, 2]), torch.tensor([0, 3, 3])
    assert toy_mog.l1(a, a * 5) == 0
    assert toy_mog.l1(a, b) == 0.5
    assert toy_mog.l1(torch.tensor([1, 0]), torch.tensor([0, 7])) == 1


def test_toynet_students_are_independent(double):
    """Student k's output depends on its own weights and rows alone, and equals that of a stack of one."""
    torch.manual_seed(0)
    net = toy_mog.ToyNet(students=3, width=16)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, c, label = torch.randn(3, 5, 2), torch.randn(3, 5), torch.randint(8, (3, 5))
    out, h = net(x, c, label, features=True)
    assert out.shape == (3, 5, 2) and h.shape == (3, 5, 16)
    one = toy_mog.ToyNet(students=1, width=16)
    one.load_state_dict({k: v[1:2] for k, v in net.state_dict().items()})
    torch.testing.assert_close(one(x[1:2], c[1:2], label[1:2])[0], out[1], atol=1e-13, rtol=0)
    g = torch.autograd.grad(out[1].sum(), net.w_in, retain_graph=True)[0]
    assert g[1].abs().sum() > 0 and g[0].abs().sum() == 0 and g[2].abs().sum() == 0
    assert net(x, c, None).shape == (3, 5, 2)


def test_toy_sizes():
    """Each less than half of the one before; XS has less than a fifth of the teacher's parameters."""
    count = {s: sum(p.numel() for p in toy_mog.ToyNet(1, *toy_mog.SIZES[s]).parameters()) for s in toy_mog.SIZES}
    assert count == {"B": 24162, "S": 9822, "XS": 3782, "XXS": 1100}


def test_prompts_see_their_embeddings():
    """A label is a row of E; the net sees E[label] alone; prompts of one class have the same exact denoiser."""
    facts, label, E = data.facts("toy-prompts"), torch.arange(32).expand(2, 32), toy_mog.prompts()
    assert E.shape == (32, 8) and facts.classes == 32 and torch.equal(E, facts.embeddings())
    net, x, c_noise = facts.net(2), torch.randn(2, 32, 2), torch.zeros(2, 32)
    out = net(x, c_noise, label)
    net.E = E.flip(0)
    torch.testing.assert_close(net(x, c_noise, 31 - label), out)
    exact = toy_mog.denoiser(x, c_noise + 0.2, label % 8)
    assert torch.equal(facts.exact(x, c_noise + 0.2, label), exact)
    assert evaluate.toy_judge(facts).truth(0, 3200)["real"].shape[0] == 32


def test_not_a_number_is_astray():
    x, label = torch.tensor([[float("nan"), 0.0], [0.6, 0.0], [0.5, 0.0]]), torch.zeros(3, dtype=torch.int64)
    assert toy_mog.astray(x, label).tolist() == [True, False, True]  # the second: a centre; the third: the ring's
    assert toy_mog.coverage(x, label)["within"] == pytest.approx(1 / 3)
