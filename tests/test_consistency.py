"""Consistency distillation: scalings, Heun's step, the loss of an exact map, who gets gradients, whose data."""
import math
import runpy
import shutil
import sys

import pytest
import torch

import common
import consistency
import data
import edm
import msd
import toy_mog
import unet
from common import Student
from conftest import ALL, ROOT, Asked, denoiser, options, same, trained
from run import load_json, load_tensors

SMOKE = ["--preset", "smoke"]
pytestmark = pytest.mark.usefixtures("undrawn")
LOOP = "--cd-steps 12 --cd-batch 8 --cd-points 8 --warmup 1 --select-samples 80 "
NINE = [0.002, 0.0021, 0.005, 0.02, 0.1, 0.5, 2.5, 17.5, 80.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_is_the_identity_at_sigma_min_bit_for_bit(dtype):
    """f(x; sigma_min) = x, for points and images; with plain EDM scalings it is not."""
    x, label = 3 * torch.randn(1, 50, 2, dtype=dtype), data.stratified(50, 8)[None]
    D = denoiser().to(dtype)
    sigma = torch.full((1, 50), edm.SIGMA_MIN, dtype=dtype)
    assert torch.equal(consistency.student_of(D)(x, sigma, label), x)
    assert not torch.equal(D(x, sigma, label), x)
    net = unet.UNet(16, 1, 10, unet.LAPTOP["XXS"]).to(dtype)
    torch.nn.init.normal_(net.out_conv.weight)
    x, label = torch.randn(1, 3, 1, 16, 16, dtype=dtype), torch.zeros(1, 3, dtype=torch.int64)
    sigma = edm.sigma_bins(40).to(dtype)[:1].expand(1, 3)  # as training reads it from the grid
    assert torch.equal(consistency.student_of(edm.Precond(net, 0.5))(x, sigma, label), x)


@pytest.mark.parametrize("sigma", NINE)
def test_boundary_scalings_against_their_closed_forms(sigma):
    """[Song et al. 2023, App. C], evaluated in plain Python."""
    level = torch.tensor(sigma, dtype=torch.float64)
    for sd in (0.5, 1.3):
        c_skip, c_out, c_in = (v.item() for v in consistency.boundary_scalings(level, sd))
        assert c_skip == pytest.approx(sd ** 2 / ((sigma - 0.002) ** 2 + sd ** 2), rel=1e-14)
        assert c_out == pytest.approx(sd * (sigma - 0.002) / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)
        assert c_in == pytest.approx(1 / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)
        plain = edm.Precond(None, sd).coefficients(level)  # the teacher's stay EDM's
        assert plain[0].item() == pytest.approx(sd ** 2 / (sigma ** 2 + sd ** 2), rel=1e-14)
        assert plain[1].item() == pytest.approx(sd * sigma / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)


S = 0.5  # one Gaussian of this std: its flow is x sqrt(S^2 + t'^2) / sqrt(S^2 + t^2)


def gaussian(x, sigma, label=None):
    return S ** 2 / (S ** 2 + edm.like(sigma, x) ** 2) * x


def flow(x, t, t_next, label=None):
    return x * edm.like(((S ** 2 + t_next ** 2) / (S ** 2 + t ** 2)).sqrt(), x)


def solution(x, t, label=None):
    """The exact solution map, to sigma_min."""
    return flow(x, t, torch.tensor(edm.SIGMA_MIN, dtype=x.dtype))


def mean_loss(N, solve):
    """Mean consistency loss of the exact map over all levels of an N-point grid, float64."""
    grid, g = edm.sigma_bins(N), torch.Generator().manual_seed(0)
    i = torch.arange(N - 1).repeat_interleave(200)
    x, noise = (torch.randn(1, len(i), 2, generator=g, dtype=torch.float64) for _ in range(2))
    t, t_next = grid[i + 1][None], grid[i][None]
    return consistency.consistency_loss(solution, solution, solve, S * x, None, t, t_next, noise, "mse").mean().item()


def test_loss_of_the_exact_map_is_zero_with_the_exact_flow():
    for N in (4, 18, 64):
        assert mean_loss(N, flow) < 1e-28


def test_loss_of_the_exact_map_falls_with_heuns_order():
    """A Heun step errs as h^3, so the squared loss falls 2^6-fold per doubling of N; at least 2^5 is asked."""
    losses = [mean_loss(N, lambda *at: consistency.heun_step(gaussian, *at)) for N in (20, 40, 80, 160)]
    assert losses[0] > 1e-8
    for a, b in zip(losses, losses[1:]):
        assert a / b > 2 ** 5


def test_heun_steps_make_the_sampler():
    """From level to level, to sigma_min: edm.heun's state before its last step, to 0, which is the denoiser's answer."""
    z, label = torch.randn(1, 64, 2, dtype=torch.float64), data.stratified(64, 8)[None]
    x, grid = edm.SIGMA_MAX * z, edm.sigma_bins(20).flip(0)
    for t, t_next in zip(grid, grid[1:]):
        x = consistency.heun_step(toy_mog.denoiser, x, t.expand(label.shape), t_next.expand(label.shape), label)
    end = toy_mog.denoiser(x, torch.full(label.shape, edm.SIGMA_MIN, dtype=torch.float64), label)
    torch.testing.assert_close(end, edm.heun(toy_mog.denoiser, z, label, 20), atol=1e-9, rtol=1e-9)


def test_target_gets_no_gradient_and_the_student_does():
    f, target, mu_teacher = (consistency.student_of(denoiser(seed=s)) for s in range(3))
    x, noise, label = torch.randn(1, 20, 2), torch.randn(1, 20, 2), data.stratified(20, 8)[None]
    t, t_next = torch.full((1, 20), 0.3), torch.full((1, 20), 0.2)
    solve = lambda *at: consistency.heun_step(mu_teacher, *at)
    consistency.consistency_loss(f, target, solve, x, label, t, t_next, noise).sum().backward()
    assert all(p.grad is None for net in (target, mu_teacher) for p in net.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in f.parameters())


def test_level_law():
    """`focus` of the draws are normal in ln sigma, the rest uniform; by the inverse; only from levels that are in."""
    grid, u = edm.sigma_bins(64), torch.linspace(0, 1, 1001, dtype=torch.float64)
    mass = torch.distributions.Normal(-2, 1.4).cdf(grid.log())
    for focus in (0.0, 0.6, 1.0):
        law = consistency.level_law(grid, focus)
        normal, uniform = (mass[1:] - mass[0]) / (mass[-1] - mass[0]), torch.arange(1, 64) / 63
        torch.testing.assert_close(law, focus * normal + (1 - focus) * uniform.double(), atol=1e-7, rtol=0)
        for top in (1, 7, 63):
            i, below = consistency.draw_level(u, law, top), torch.cat([torch.zeros(1), law])
            assert (below[i] <= u * law[top - 1]).all() and (u * law[top - 1] <= law[i]).all() and i.max() == top - 1


# ------------------------------------------------------------- the loop

def test_real_data_are_the_students_own_and_the_teacher_is_frozen(tmp_path, drawn):
    group = [Student(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
    D = copies(denoiser(seed=3), 2)
    asked, before = Asked(D), common.fingerprint(D)
    kept = trained(consistency, group, options(LOOP), tmp_path, teacher=asked)
    for k, s in enumerate(group):
        assert asked.classes(k) == {*torch.cat(drawn, 1)[k].tolist()} == {*s.classes}
    assert all((sigma > 0).all() for sigma, _ in asked.calls)  # Heun's second evaluation never divides by 0
    assert common.fingerprint(D) == before and all(p.grad is None for p in D.parameters())
    assert {net.sigma_min for net in kept.values()} == {edm.SIGMA_MIN}


def copies(D, M: int) -> edm.Precond:
    """M copies of a stack of one."""
    net = edm.Precond(toy_mog.ToyNet(M, *D.net.bottleneck), 0.5)
    net.load_state_dict({k: torch.cat([v] * M) for k, v in D.state_dict().items()})
    return net


def test_levels_come_in_from_below(tmp_path):
    """--cd-rise 0.5 of 12 updates: the top of 7 levels rises by at least one an update, and is reached at the sixth."""
    asked, grid = Asked(), edm.sigma_bins(8).float()
    line = LOOP + "--cd-batch 256 --cd-rise 0.5"
    trained(consistency, [Student(0, 1, 0, ALL)], options(line), tmp_path, teacher=asked)
    tops = [sigma.max().item() for sigma, _ in asked.calls[::2]]  # the first of a Heun step's two evaluations
    assert tops[0] == pytest.approx(grid[2].item()) and tops[2] == pytest.approx(grid[4].item())
    assert all(t == pytest.approx(80.0) for t in tops[5:])


def test_the_target_is_a_slow_average_of_f(tmp_path):
    """After the first update: mu, or the shorter memory of the first steps, of the start; the rest of f."""
    for mu, kept in (("0.05", 0.05), ("0.97", 0.1), ("0", 0.0)):
        trained(consistency, [Student(0, 1, 0, ALL)], options(LOOP + f"--cd-steps 1 --cd-target {mu}"), tmp_path / mu)
        parts, start = load_tensors(tmp_path / mu / "state.pt")["parts"], denoiser(12).state_dict()
        for k, v in parts["f"].items():
            torch.testing.assert_close(parts["target"][k], kept * start[k] + (1 - kept) * v)


def test_one_student_is_consistency_py(tmp_path, run, monkeypatch):
    """msd.py --method cd; its students answer through `generate` with their own scalings."""
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
    assert msd.main([*SMOKE, "--students", "1", "3", "--method", "cd", "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr(sys, "argv", ["consistency.py", *SMOKE, "--out", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "consistency.py"), run_name="__main__")
    assert end.value.code == 0
    nets = (load_tensors(tmp_path / name / "seed0/students1-cd/cd/best.pt")["net"] for name in "ab")
    torch.testing.assert_close(*nets, atol=1e-4, rtol=1e-4)  # one beside others, the other alone: to rounding
    students = msd.load_students(tmp_path / "a/seed0/students3-cd")
    assert students.stack.sigma_min == edm.SIGMA_MIN
    x = msd.generate(students, torch.arange(8), range(8))
    assert x.shape == (8, 2) and torch.isfinite(x).all()
    assert list(load_json(tmp_path / "a/results-cd.json")["stages"]) == ["cd"]


@pytest.mark.slow
def test_toy_prompts_by_quadrant_with_guidance(tmp_path):
    argv = ["--dataset", "toy-prompts", *SMOKE, "--students", "4", "--partition", "quadrant", "--cfg", "1.5"]
    assert msd.main([*argv, "--out", str(tmp_path / "run")]) == 0
    label, E = torch.arange(32), toy_mog.prompts()
    students = msd.load_students(tmp_path / "run/seed0/students4-quadrant")
    assert torch.equal(msd.Router(students.parts)(label), msd.quadrant(E))
    x = msd.generate(students, label, range(32))
    assert x.shape == (32, 2) and torch.isfinite(x).all()
