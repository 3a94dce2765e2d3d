"""The teacher: preconditioning, grids, loss, samplers against closed forms; AdamW, averages of a stack; guidance."""
import math

import pytest
import torch

import common
import data
import edm
import run
import toy_mog
from common import Student
from conftest import ALL, error_by_level, given, options, trained
from edm import Precond, heun, sigma_bins, sigma_steps


class Zero(torch.nn.Module):
    def forward(self, x, c_noise, label, features=False):
        return torch.zeros_like(x)


def test_preconditioning_has_unit_variance_input_and_target():
    """[EDM Table 1]: data of variance sigma_data^2 give c_in x and the target (x0 - c_skip x) / c_out variance 1."""
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
    assert len(bins) == 1000 and bins[0] == 0.002 and bins[999] == 80 and (bins.diff() > 0).all()
    assert bins.dtype == torch.float64
    assert bins[500].item() == pytest.approx(2.53, abs=0.01) and bins[749].item() == pytest.approx(17.5, abs=0.05)
    with pytest.raises(ValueError):
        sigma_steps(1)


def gaussian(x, sigma, label=None):
    """The denoiser of a Gaussian of std 0.5."""
    return x * (0.25 / (0.25 + sigma ** 2))[..., None]


def test_heun_has_order_two_and_euler_order_one():
    """One Gaussian of std s: the flow is x proportional to sqrt(s^2 + sigma^2); compared at sigma_min."""
    s, z, low = 0.5, torch.tensor([[1.0, -0.3]], dtype=torch.float64), torch.tensor([0.002], dtype=torch.float64)

    def error(n, order):
        t = sigma_steps(n)
        x = z * 80
        for a, b in zip(t[:-2], t[1:-1]):
            d = (x - gaussian(x, a[None])) / a
            nxt = x + (b - a) * d
            if order == 2:
                nxt = x + (b - a) * (d + (nxt - gaussian(nxt, b[None])) / b) / 2
            x = nxt
        exact = z * 80 * math.sqrt((s ** 2 + 0.002 ** 2) / (s ** 2 + 80 ** 2))
        return (x - exact).abs().max().item(), x

    for order in (1, 2):
        e = [error(n, order)[0] for n in (64, 128, 256)]
        for a, b in zip(e, e[1:]):
            assert math.log2(a / b) == pytest.approx(order, abs=0.2)
        end = gaussian(error(64, order)[1], low)  # our sampler is that scheme, then Euler's step to 0
        torch.testing.assert_close(heun(gaussian, z, None, 64, order=order), end, atol=1e-12, rtol=0)


def test_heun_evaluations_and_dtype():
    calls = []

    def D(x, sigma, label):
        calls.append((x.dtype, sigma.shape))
        return x * 0
    out = heun(D, torch.randn(3, 5, 2), torch.zeros(3, 5, dtype=torch.int64), 18)
    assert len(calls) == 2 * 18 - 1 == edm.evaluations(18) and edm.evaluations(18, "ddim") == 18
    assert out.dtype == torch.float32 and set(calls) == {(torch.float32, (3, 5))}


def test_sampler_on_the_exact_denoiser_gives_the_mixture():
    label = torch.arange(20_000) % 8
    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    x = heun(toy_mog.denoiser, z, label, 40)
    check = toy_mog.coverage(x, label)
    assert check["within"] > 0.998 and check["modes"] > 63.5 and 0.7 < check["mode_min"] and check["mode_max"] < 1.3
    assert abs(x.mean(0)).max() < 0.01 and abs(x.var(0) - 0.13).max() < 0.005


def test_stochastic_sampler():
    """[EDM Alg. 2] keeps a Gaussian's std; equal generators give equal samples; no churn is [EDM Alg. 1]."""
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))

    def churned(**more):
        return heun(gaussian, z, None, 64, S_churn=20, generator=torch.Generator().manual_seed(1), **more)
    x, plain = churned(), heun(gaussian, z, None, 64)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(x, churned()) and not torch.equal(x, plain)
    assert torch.equal(plain, churned(S_min=100.0))  # no level lies above S_min


def test_exact_denoiser_minimises_the_loss():
    """[EDM Eq. 2]: on the mixture any change of D* raises the loss."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(8, (40_000,), generator=g)
    x, noise = toy_mog.sample(label, g), torch.randn(40_000, 2, generator=g)
    sigma = torch.exp(torch.randn(40_000, generator=g) * 1.5 - 2.5)
    best = edm.denoising_loss(toy_mog.denoiser, x, label, sigma, noise).mean()
    for change in (lambda D, s: D * 1.01, lambda D, s: D + 0.05 * s[..., None]):
        D = lambda x, s, c: change(toy_mog.denoiser(x, s, c), s)
        assert edm.denoising_loss(D, x, label, sigma, noise).mean() > best * 1.001


def test_error_by_level():
    facts, levels = data.DATASETS["toy"], torch.tensor([0.01, 1.0])

    def off(x, s, c):
        return toy_mog.denoiser(x, s, c) + 0.1 * (s * 0.5 / (s ** 2 + 0.25).sqrt())[..., None]
    for D, error in ((toy_mog.denoiser, 0.0), (off, 0.1)):
        found = error_by_level(D, toy_mog.denoiser, levels, facts, 0, 100)
        torch.testing.assert_close(found, torch.full((2,), error))


# --------------------------------------------------------- what every loop stands on

def test_a_stacks_updates_are_plain_torchs(tmp_path, double):
    """AdamW with clipping and micro-batches, and both averages, of a stack of three, against each network by itself."""
    group = [Student(0, 3, k, ALL) for k in range(3)]
    start, x, target = (torch.randn(3, *shape) for shape in ((4, 2), (8, 4), (8, 2)))
    table = torch.tensor([[3.0, 1.0, 2.0], [2.0, 5.0, 2.0], [9.0, 0.5, 9.0]])  # of three evaluations

    class Select:
        name, students, rows, seen = "l1", group, iter(table), torch.zeros(3, 20, 2)

        def __call__(self, net):
            return next(self.rows)
    net = torch.nn.ParameterDict({"w": start.clone()})
    one = run.Run("t", group, {tmp_path: slice(0, 3)}, 6, 8, (2,), micro_batch=4)
    opt, average, seen = common.AdamW(net, one, (0.5, 0.99), clip_norm=0.3), common.Average(net, 0.4, Select()), []
    for step in one.steps({}):
        for batch in one.batches(step):
            opt.backward((x @ net["w"] - target)[:, batch.part].square().mean(-1))
        opt.step(step, 0.1 / (step + 1))
        average.update(step)
        average.choose(one, step + 1, 2)
        if step % 2:
            seen.append(average.now["w"].clone())
    for k, best in enumerate((1, 2, 0)):  # each its own lowest; of equal ones the first
        w, ema = torch.nn.Parameter(start[k].clone()), start[k].clone()
        plain = torch.optim.AdamW([w], betas=(0.5, 0.99), weight_decay=0.01)
        for step in range(6):
            (x[k] @ w - target[k]).square().mean().backward()
            w.grad *= min(1.0, 0.3 / w.grad.norm().item())
            plain.param_groups[0]["lr"] = 0.1 / (step + 1)
            plain.step()
            plain.zero_grad()
            decay = min(0.4, (1 + step) / (10 + step))
            ema = decay * ema + (1 - decay) * w.detach()
        torch.testing.assert_close(net["w"][k].detach(), w.detach(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(average.now["w"][k], ema, atol=1e-12, rtol=1e-12)
        assert torch.equal(average.best["w"][k], seen[best][k])
    assert torch.equal(average.record["distance"], table.min(0).values.float())


def test_learning_rate():
    rate = common.learning_rate
    assert [rate(2.0, step, 100, 4, "constant") for step in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    assert rate(2.0, 50, 100, 0, "linear") == 1.0 and rate(2.0, 25, 100, 0, "linear") == 1.5
    assert [rate(2.0, step, 100, 0, "cosine") for step in (50, 100)] == pytest.approx([1.0, 0.0])


# ----------------------------------------------------- the teacher's loop, guidance

def test_guidance():
    """Scale 1 is the teacher itself; other scales go away from the answer without a class."""
    one = given()
    assert one.mu_teacher is toy_mog.denoiser and one.guided(one.net) is one.net
    x, sigma, label = torch.randn(1, 40, 2), torch.full((1, 40), 0.3), data.stratified(40, 8)[None]
    with_class, without = toy_mog.denoiser(x, sigma, label), toy_mog.denoiser(x, sigma, None)
    for scale in (0.0, 1.0000001, 3.0):
        one.cfg = scale
        torch.testing.assert_close(one.mu_teacher(x, sigma, label), without + scale * (with_class - without))


def test_label_dropout_trains_the_score_without_a_class(tmp_path, monkeypatch):
    """Its share of the batch reaches the network with no class; the rest with its own; also in micro-batches."""
    seen, original = [], edm.denoising_loss

    def spy(D, x, label, *rest):
        seen.append((label is None, x.shape[1]))
        return original(D, x, label, *rest)
    monkeypatch.setattr(edm, "denoising_loss", spy)
    for micro in (0, 8):
        flags = options(f"--teacher-steps 2 --teacher-batch 40 --label-dropout 0.25 --micro-batch {micro}")
        trained(edm, [Student(0, 1, 0, ALL)], flags, tmp_path / str(micro))
        assert sum(n for free, n in seen if free) == 2 * 10 and sum(n for _, n in seen) == 2 * 40
        seen.clear()


def test_one_draw_in_ten_is_uniform_over_the_bins():
    """The mixed law; sigma above 70, which its normal draws reach once in 300 000 times, are trained."""
    batch = common.Batch(common.Draws("t", [Student(0, 1, 0, (0,))]), 0, 100_000, (2,), slice(None))
    sigma = edm.draw_sigma(batch, edm.Flags(noise_law="mixed"))[0]
    of_bins = torch.isin(sigma, edm.level(torch.arange(1000)))
    assert abs(of_bins.double().mean() - 0.1) < 0.005
    levels = edm.sigma_bins()
    assert abs((sigma > 70).double().mean() - 0.1 * (levels > 70).double().mean()) < 5e-4
    rest = sigma[~of_bins].log()
    assert abs(rest.mean() + 2.5) < 0.02 and abs(rest.std() - 1.5) < 0.02
