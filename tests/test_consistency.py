"""Consistency distillation: scalings, the Heun step, the loss of an exact solution map, who gets gradients, whose data."""
import math

import pytest
import torch

import common
import consistency
import data
import edm
import msd
import toy_mog
import unet
from conftest import assert_stack_is_its_members, refused

SMOKE = ["--preset", "smoke", "--quiet"]
NINE = [0.002, 0.0021, 0.005, 0.02, 0.1, 0.5, 2.5, 17.5, 80.0]


def full_net(students=1, width=16, seed=0, **more):
    """A ToyNet whose last layer is not small."""
    net = toy_mog.ToyNet(students, width, seed=seed, **more)
    with torch.no_grad():
        net.w_out.mul_(50)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f_is_the_identity_at_sigma_min_bit_for_bit(dtype):
    """f(x; sigma_min) = x, for points and images; with plain EDM scalings it is not."""
    x, label = 3 * torch.randn(1, 50, 2, dtype=dtype), data.stratified(50, 8)[None]
    D = edm.Precond(full_net().to(dtype), 0.5)
    sigma = torch.full((1, 50), edm.SIGMA_MIN, dtype=dtype)
    assert torch.equal(consistency.student_of(D)(x, sigma, label), x)
    assert not torch.equal(D(x, sigma, label), x)
    net = unet.UNet(16, 1, 10, "XXS", unet.LAPTOP).to(dtype)
    torch.nn.init.normal_(net.out_conv.weight)
    x = torch.randn(1, 3, 1, 16, 16, dtype=dtype)
    sigma = edm.sigma_bins(40).to(dtype)[:1].expand(1, 3)                                       # as training reads it from the grid
    assert torch.equal(consistency.student_of(edm.Precond(net, 0.5))(x, sigma, torch.zeros(1, 3, dtype=torch.int64)), x)


@pytest.mark.parametrize("sigma", NINE)
def test_boundary_scalings_against_their_closed_forms(sigma):
    """[Song et al. 2023, App. C], evaluated in plain Python."""
    for sd in (0.5, 1.3):
        c_skip, c_out, c_in = (v.item() for v in consistency.boundary_scalings(torch.tensor(sigma, dtype=torch.float64), sd))
        assert c_skip == pytest.approx(sd ** 2 / ((sigma - 0.002) ** 2 + sd ** 2), rel=1e-14)
        assert c_out == pytest.approx(sd * (sigma - 0.002) / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)
        assert c_in == pytest.approx(1 / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)
        plain = edm.Precond(None, sd).coefficients(torch.tensor(sigma, dtype=torch.float64))    # the teacher's stay EDM's
        assert plain[0].item() == pytest.approx(sd ** 2 / (sigma ** 2 + sd ** 2), rel=1e-14)
        assert plain[1].item() == pytest.approx(sd * sigma / math.sqrt(sd ** 2 + sigma ** 2), rel=1e-14)


S = 0.5                                    # one Gaussian of this std: its flow is x sqrt(S^2 + t'^2) / sqrt(S^2 + t^2)


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
    return consistency.consistency_loss(solution, solution, solve, S * x, None, grid[i + 1][None], grid[i][None], noise, "mse").mean().item()


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
    """`bound` is edm.heun's state before its last step: one Euler step to 0, which is the denoiser, makes them equal."""
    z, label = torch.randn(1, 64, 2, dtype=torch.float64), data.stratified(64, 8)[None]
    x = consistency.bound(toy_mog.denoiser, z, label, 20)
    end = toy_mog.denoiser(x, torch.full(label.shape, edm.SIGMA_MIN, dtype=torch.float64), label)
    torch.testing.assert_close(end, edm.heun(toy_mog.denoiser, z, label, 20), atol=1e-9, rtol=1e-9)


def test_target_gets_no_gradient_and_the_student_does():
    f, target, teacher = (consistency.student_of(edm.Precond(full_net(seed=s), 0.5)) for s in range(3))
    x, label = torch.randn(1, 20, 2), data.stratified(20, 8)[None]
    t, t_next = torch.full((1, 20), 0.3), torch.full((1, 20), 0.2)
    consistency.consistency_loss(f, target, lambda *at: consistency.heun_step(teacher, *at), x, label, t, t_next, torch.randn(1, 20, 2)).sum().backward()
    assert all(p.grad is None for net in (target, teacher) for p in net.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in f.parameters())


def test_level_law():
    grid = edm.sigma_bins(64)
    uniform = consistency.level_law(grid, 0.0)
    torch.testing.assert_close(uniform, torch.arange(1, 64, dtype=torch.float64) / 63)
    for focus in (0.0, 0.6, 1.0):
        law = consistency.level_law(grid, focus)
        assert law[-1].item() == pytest.approx(1) and (law.diff() >= 0).all()
        levels = [float(torch.distributions.Normal(-2, 1.4).cdf(grid[i].log())) for i in (0, 20, 40, 63)]
        want = [focus * (b - a) / (levels[3] - levels[0]) + (1 - focus) * (j - i) / 63
                for a, b, i, j in zip(levels, levels[1:], (0, 20, 40), (20, 40, 63))]
        i = consistency.draw_level(torch.rand(20_000, generator=common.generator("law")), law, 63)
        for share, (low, high) in zip(want, ((0, 20), (20, 40), (40, 63))):
            assert ((i >= low) & (i < high)).double().mean().item() == pytest.approx(share, abs=0.015)
        for top in (1, 7, 63):
            u = torch.rand(4000, generator=common.generator(top))
            i = consistency.draw_level(u, law, top)
            assert 0 <= i.min() and i.max() <= top - 1
            if focus == 0:
                count = torch.bincount(i, minlength=top).double() / 4000
                assert (count - 1 / top).abs().max() < 5 / math.sqrt(4000 * top) + 1e-12
    assert consistency.draw_level(torch.tensor([0.0, 1.0]), uniform, 63).tolist() == [0, 62]


# ------------------------------------------------------------------------------------------------------------- the loop

def small_train(tmp_path, members, name="s", source=None, teacher=None, steps=5, rise=0.3, batch=8):
    """consistency.train on a stack of members; returns the average's state."""
    flags = consistency.Flags(dataset="toy", cd_steps=steps, cd_batch=batch, cd_rise=rise, cd_points=8, warmup=1, eval_every=100, select_samples=80, save_every=100, quiet=True)
    one, net = full_net().state_dict(), full_net(len(members))
    net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in one.items()})
    reference = {0: data.toy_statistics(toy_mog.sample(data.stratified(800, 8), common.generator("ref")), data.stratified(800, 8))}
    run = common.Stage("cd", {tmp_path / name: slice(0, len(members))}, steps, 100, quiet=True)
    known = data.facts("toy")
    ema, best = consistency.train(run, flags, members, teacher or toy_mog.denoiser, consistency.student_of(edm.Precond(net, 0.5)), source or data.Mixture(known),
                                  data.toy_judge(known), reference, torch.device("cpu"))
    assert best.sigma_min == ema.sigma_min == edm.SIGMA_MIN
    return ema.state_dict()


def test_stack_equals_separate_students(tmp_path, double):
    assert_stack_is_its_members(lambda members, name: small_train(tmp_path, members, name))


def test_real_data_are_the_students_own_and_the_teacher_is_frozen(tmp_path):
    members = [common.Member(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
    teacher, asked = edm.Precond(full_net(2, seed=3), 0.5), [set(), set()]
    before = common.fingerprint(teacher)

    def watched(x, sigma, label):
        for k in range(2):
            asked[k] |= set(label[k].tolist())
        assert (sigma > 0).all()                                    # Heun's second evaluation never divides by 0
        return teacher(x, sigma, label)
    class Spy(data.Mixture):
        def batch(self, *args):
            x, label = super().batch(*args)
            nearest = (x[:, :, None, None] - toy_mog.means()).norm(dim=-1).flatten(2).argmin(2) // toy_mog.MODES
            assert torch.equal(nearest, label)                      # the sample is of the class that it is said to be
            return x, label
    small_train(tmp_path, members, teacher=watched, steps=12, source=Spy(data.facts("toy")))
    assert asked == [set(m.classes) for m in members]
    assert common.fingerprint(teacher) == before and all(p.grad is None for p in teacher.parameters())


def test_levels_come_in_from_below(tmp_path):
    """--cd-rise 0.5 of 12 updates: the top of 7 levels rises by at least one an update, and is reached at the sixth."""
    seen = []

    def watched(x, sigma, label):
        seen.append(sigma.max().item())
        return toy_mog.denoiser(x, sigma, label)
    grid = edm.sigma_bins(8).float()
    small_train(tmp_path, [common.Member(0, 1, 0, tuple(range(8)))], teacher=watched, steps=12, rise=0.5, batch=256)
    tops = [seen[i] for i in range(0, 24, 2)]                       # the first of a Heun step's two evaluations
    assert tops[0] == pytest.approx(grid[2].item()) and tops[2] == pytest.approx(grid[4].item())
    assert all(t == pytest.approx(80.0) for t in tops[5:])


def test_one_student_is_consistency_py_bit_for_bit(tmp_path, run):
    """msd.py --method cd with K = 1; its students answer through `generate` with their own scalings; the bound is reported."""
    import json
    import shutil
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
    assert msd.main([*SMOKE, "--students", "1", "3", "--method", "cd", "--out", str(tmp_path / "a")]) == 0
    consistency.main([*SMOKE, "--out", str(tmp_path / "b")])
    a, b = (common.load_tensors(tmp_path / name / "seed0/students1-cd/cd/best.pt") for name in "ab")
    assert all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])
    students = msd.load_students(tmp_path / "a/seed0/students3-cd")
    assert students.G.sigma_min == edm.SIGMA_MIN
    x = msd.generate(students, torch.arange(8), range(8))
    assert x.shape == (8, 2) and torch.isfinite(x).all()
    results = json.loads((tmp_path / "a/results-cd.json").read_text())
    assert results["bound"]["points"] == 8 and 0 <= results["bound"]["l1"] <= 1 and list(results["stages"]) == ["cd"]


@pytest.mark.slow
def test_resume_bit_for_bit(tmp_path, run, monkeypatch):
    import shutil
    argv = [*SMOKE, "--students", "3", "--method", "cd", "--cd-steps", "12", "--save-every", "4", "--eval-every", "3"]
    for name in ("whole", "killed"):
        shutil.copytree(run, tmp_path / name)
    assert msd.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    original, count = consistency.consistency_loss, iter(range(1000))

    def killed(*args):
        if next(count) == 9:
            raise RuntimeError("killed")
        return original(*args)
    monkeypatch.setattr(consistency, "consistency_loss", killed)
    with pytest.raises(RuntimeError):
        msd.main([*argv, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(consistency, "consistency_loss", original)
    assert msd.main([*argv, "--out", str(tmp_path / "killed")]) == 0
    for name in ("best.pt", "ema.pt"):
        a, b = (common.load_tensors(tmp_path / f / "seed0/students3-cd/cd" / name)["net"] for f in ("whole", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_images(tmp_path, image_run, tiny):
    import shutil
    shutil.copytree(image_run, tmp_path / "run")
    assert msd.main(["--dataset", "fashion-mnist", *SMOKE, "--data", str(tiny), "--students", "3", "--method", "cd", "--out", str(tmp_path / "run")]) == 0
    assert msd.load_students(tmp_path / "run/seed0/students3-cd/cd").G.student(0).sigma_min == edm.SIGMA_MIN


# ------------------------------------------------------------------------------------------------------ guidance, prompts

def test_guidance():
    """Scale 1 is the teacher itself; other scales go away from the answer without a class; only with a teacher that has one."""
    flags = edm.Flags()
    assert edm.mu_teacher(flags, toy_mog.denoiser) is toy_mog.denoiser
    flags.teacher = "exact"
    assert edm.mu_teacher(flags, None, toy_mog.denoiser) is toy_mog.denoiser
    x, sigma, label = torch.randn(1, 40, 2), torch.full((1, 40), 0.3), data.stratified(40, 8)[None]
    with_class, without = toy_mog.denoiser(x, sigma, label), toy_mog.denoiser(x, sigma, None)
    for scale in (0.0, 1.0000001, 3.0):
        flags.cfg = scale
        torch.testing.assert_close(edm.mu_teacher(flags, None, toy_mog.denoiser)(x, sigma, label), without + scale * (with_class - without))


def test_guidance_needs_label_dropout(capsys, tmp_path):
    line = refused(capsys, msd.main, [*SMOKE, "--cfg", "2", "--out", str(tmp_path)])
    assert "--cfg 2.0" in line and "--label-dropout" in line
    assert "--label-dropout 1.0" in refused(capsys, msd.main, [*SMOKE, "--label-dropout", "1", "--out", str(tmp_path)])
    assert "--label-dropout 1.5" in refused(capsys, edm.main, [*SMOKE, "--label-dropout", "1.5", "--out", str(tmp_path)])
    assert "--cfg 2.0" in refused(capsys, edm.main, [*SMOKE, "--cfg", "2", "--label-dropout", "0.1", "--out", str(tmp_path)])
    assert "1 = no guidance" in refused(capsys, msd.main, [*SMOKE, "--cfg", "0", "--out", str(tmp_path)])
    assert "trained here" in refused(capsys, msd.main, [*SMOKE, "--teacher", "exact", "--label-dropout", "0.1", "--out", str(tmp_path)])
    (tmp_path / "ema.pt").touch()
    assert "leave --cfg out" in refused(capsys, msd.main, [*SMOKE, "--teacher", str(tmp_path / "ema.pt"), "--cfg", "2", "--out", str(tmp_path / "x")])


def test_label_dropout_trains_the_score_without_a_class(tmp_path, monkeypatch, double):
    """Its share of the batch reaches the network with no class; the rest with its own; micro-batches see the same."""
    flags = edm.Flags(teacher_steps=2, teacher_batch=40, label_dropout=0.25, quiet=True)
    seen, original = [], edm.denoising_loss

    def spy(D, x, label, *rest):
        seen.append((None if label is None else label.shape[1], x.shape[1]))
        return original(D, x, label, *rest)
    monkeypatch.setattr(edm, "denoising_loss", spy)
    states = []
    for micro in (0, 8):
        flags.micro_batch = micro
        run = common.Stage("teacher", {tmp_path / str(micro): slice(0, 1)}, 2, 100, quiet=True)
        known = data.facts("toy")
        states.append(edm.train(run, flags, data.Mixture(known), [common.Member(0, 1, 0, tuple(range(8)))], torch.device("cpu")).state_dict())
        assert sum(n for label, n in seen if label is None) == 2 * 10 and sum(n for _, n in seen) == 2 * 40
        seen.clear()
    for k, v in states[0].items():
        torch.testing.assert_close(v, states[1][k], atol=1e-10, rtol=1e-10)


def test_prompts_see_their_embeddings():
    """toy-prompts: label is a row of E; the net sees E[label] alone; prompts of one class have the same data and exact denoiser."""
    facts = data.facts("toy-prompts")
    E = facts.embeddings()
    assert E.shape == (32, 8) and facts.classes == 32 and torch.equal(E, toy_mog.prompts())
    net = facts.net(2)
    x, c_noise = torch.randn(2, 32, 2), torch.zeros(2, 32)
    label = torch.arange(32).expand(2, 32)
    out = net(x, c_noise, label)
    net.E = E.flip(0)
    torch.testing.assert_close(net(x, c_noise, 31 - label), out)
    torch.testing.assert_close(net(x, c_noise, E[label]), out)      # the embeddings themselves
    x, sigma = torch.randn(1, 8, 2), torch.full((1, 8), 0.2)
    a, b = (facts.exact(x, sigma, torch.arange(8)[None] + shift) for shift in (0, 16))
    assert torch.equal(a, b) and torch.equal(a, toy_mog.denoiser(x, sigma, torch.arange(8)[None]))
    mine = data.toy_judge(facts)
    assert mine.truth(0, 3200)["real"].shape[0] == 32


@pytest.mark.slow
def test_toy_prompts_by_quadrant_with_guidance(tmp_path):
    argv = ["--dataset", "toy-prompts", *SMOKE, "--students", "4", "--partition", "quadrant", "--cfg", "1.5", "--out", str(tmp_path / "run")]
    assert msd.main(argv) == 0
    label = torch.arange(32)
    students = msd.load_students(tmp_path / "run/seed0/students4-quadrant")
    assert torch.equal(students.router(label), msd.quadrant(toy_mog.prompts()))
    E = toy_mog.prompts()
    x = msd.generate(students, label, range(32))
    assert x.shape == (32, 2) and torch.allclose(x, msd.generate(students, E, range(32)), atol=1e-6)
    assert torch.isfinite(msd.generate(students, E[:5] + 0.3, range(5))).all()                  # unseen ones
    assert torch.equal(x, msd.generate(students, E.double(), range(32)))
    for wrong in (E[:, :3], torch.rand(4), E * float("nan")):
        with pytest.raises(common.UserError, match="embeddings"):
            msd.generate(students, wrong, range(len(wrong)))
