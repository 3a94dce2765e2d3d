"""Preconditioning, noise grids, loss and sampler against closed forms."""
import math

import pytest
import torch

import data
import edm
import toy_mog
from edm import Precond, heun, sigma_bins, sigma_steps


class Zero(torch.nn.Module):
    def forward(self, x, c_noise, label):
        return torch.zeros_like(x)


def test_preconditioning_has_unit_variance_input_and_target():
    """[EDM Table 1]: at data of variance sigma_data^2 the input c_in x and the target (x0 - c_skip x) / c_out have variance 1."""
    D = Precond(Zero(), 0.5)
    for level in (0.002, 0.05, 0.5, 3.0, 80.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        c_skip, c_out, c_in, c_noise = D.coefficients(sigma)
        assert c_in ** 2 * (0.25 + level ** 2) == pytest.approx(1)
        target = ((1 - c_skip) ** 2 * 0.25 + c_skip ** 2 * level ** 2) / c_out ** 2
        assert target.item() == pytest.approx(1)
        assert edm.loss_weight(sigma).item() == pytest.approx(1 / c_out.item() ** 2)
        assert c_noise.item() == pytest.approx(math.log(level) / 4)


@pytest.mark.parametrize("shape, lead", [((4, 2), (4,)), ((3, 4, 2), (3, 4)), ((4, 3, 8, 8), (4,))])
def test_sigma_has_the_leading_dimensions(shape, lead):
    x, sigma = torch.randn(shape), torch.rand(lead) + 0.1
    D = Precond(Zero())
    c_skip = D.coefficients(sigma)[0]
    torch.testing.assert_close(D(x, sigma), x * c_skip.reshape(lead + (1,) * (len(shape) - len(lead))))
    assert edm.per_sample(x).shape == lead
    assert edm.denoising_loss(D, x, None, sigma, torch.randn(shape)).shape == lead


def test_grids():
    steps, bins = sigma_steps(40), sigma_bins()
    assert len(steps) == 41 and steps[0] == 80 and steps[-2] == 0.002 and steps[-1] == 0 and (steps.diff() < 0).all()
    assert len(bins) == 1000 and bins[0] == 0.002 and bins[999] == 80 and (bins.diff() > 0).all() and bins.dtype == torch.float64
    assert bins[500].item() == pytest.approx(2.53, abs=0.01) and bins[749].item() == pytest.approx(17.5, abs=0.05)
    with pytest.raises(ValueError):
        sigma_steps(1)


def gaussian(s=0.5):
    return lambda x, sigma, label: x * (s ** 2 / (s ** 2 + sigma ** 2))[..., None]


def test_heun_has_order_two_and_euler_order_one():
    """One Gaussian of std s: the flow is x proportional to sqrt(s^2 + sigma^2); compared at sigma_min, before the last step."""
    s, D, z = 0.5, gaussian(), torch.tensor([[1.0, -0.3]], dtype=torch.float64)

    def error(n, order):
        t = sigma_steps(n)
        x = z * 80
        for a, b in zip(t[:-2], t[1:-1]):
            d = (x - D(x, a[None], None)) / a
            nxt = x + (b - a) * d
            if order == 2:
                nxt = x + (b - a) * (d + (nxt - D(nxt, b[None], None)) / b) / 2
            x = nxt
        exact = z * 80 * math.sqrt((s ** 2 + 0.002 ** 2) / (s ** 2 + 80 ** 2))
        return (x - exact).abs().max().item(), x

    for order in (1, 2):
        e = [error(n, order)[0] for n in (64, 128, 256)]
        for a, b in zip(e, e[1:]):
            assert math.log2(a / b) == pytest.approx(order, abs=0.2)
    last = error(64, 2)[1]                                          # our sampler is that second-order scheme, then Euler to 0
    torch.testing.assert_close(heun(D, z, None, 64), D(last, torch.tensor([0.002], dtype=torch.float64), None), atol=1e-12, rtol=0)
    torch.testing.assert_close(edm.ddim(D, z, None, 64), D(error(64, 1)[1], torch.tensor([0.002], dtype=torch.float64), None), atol=1e-12, rtol=0)


def test_heun_evaluations_and_dtype():
    calls = []

    def D(x, sigma, label):
        calls.append((x.dtype, sigma.shape))
        return x * 0
    out = heun(D, torch.randn(3, 5, 2), torch.zeros(3, 5, dtype=torch.int64), 18)
    assert len(calls) == 2 * 18 - 1 and out.dtype == torch.float32
    assert set(calls) == {(torch.float32, (3, 5))}


def test_sampler_on_the_exact_denoiser_gives_the_mixture():
    label = torch.arange(20_000) % 8
    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    x = heun(toy_mog.denoiser, z, label, 40)
    check = toy_mog.coverage(x, label)
    assert check["within"] > 0.998 and check["modes"] > 63.5 and 0.7 < check["mode_min"] and check["mode_max"] < 1.3
    assert abs(x.mean(0)).max() < 0.01 and abs(x.var(0) - 0.13).max() < 0.005


def test_stochastic_sampler():
    """[EDM Alg. 2] keeps a Gaussian's std; equal generators give equal samples; no churn is the deterministic sampler."""
    D, z = gaussian(), torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    x = heun(D, z, None, 64, S_churn=20, generator=torch.Generator().manual_seed(1))
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(x, heun(D, z, None, 64, S_churn=20, generator=torch.Generator().manual_seed(1)))
    plain = heun(D, z, None, 64)
    assert not torch.equal(x, plain)
    assert torch.equal(plain, heun(D, z, None, 64, S_churn=20, S_min=100.0))   # no level lies above S_min


def test_exact_denoiser_minimises_the_loss():
    """[EDM Eq. 2]: on the mixture any change of D* raises the loss."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(8, (40_000,), generator=g)
    x, noise = toy_mog.sample(label, g), torch.randn(40_000, 2, generator=g)
    sigma = torch.exp(torch.randn(40_000, generator=g) * 1.5 - 2.5)
    best = edm.denoising_loss(toy_mog.denoiser, x, label, sigma, noise).mean()
    for change in (lambda D, s: D * 1.01, lambda D, s: D + 0.05 * s[..., None]):
        worse = edm.denoising_loss(lambda x, s, c: change(toy_mog.denoiser(x, s, c), s), x, label, sigma, noise).mean()
        assert worse > best * 1.001


def test_error_by_level():
    facts = data.DATASETS["toy"]
    levels = torch.tensor([0.01, 1.0])
    assert edm.error_by_level(toy_mog.denoiser, toy_mog.denoiser, levels, facts, 0, 100).max() == 0
    off = lambda x, s, c: toy_mog.denoiser(x, s, c) + 0.1 * (s * 0.5 / (s ** 2 + 0.25).sqrt())[..., None]
    torch.testing.assert_close(edm.error_by_level(off, toy_mog.denoiser, levels, facts, 0, 100), torch.tensor([0.1, 0.1]))
