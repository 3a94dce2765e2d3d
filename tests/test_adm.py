"""ADM: GAN losses and their optimum, the head, who gets gradients, F_ADM, where it starts from."""
import shutil

import pytest
import torch

import adm
import common
import dmd
import edm
import msd
import toy_mog
import unet
from common import Student
from conftest import ALL, Asked, denoiser, options, same, trained
from run import load_json, load_tensors, save_tensors

SMOKE = ["--preset", "smoke"]
LOOP = "--adm-steps 5 --adm-batch 8 --fake-warmup 3 --adm-ttur 2 --warmup 1 --draws 2 --select-samples 80 "
ONE = [Student(0, 1, 0, ALL)]


def test_losses_at_known_logits():
    """Non-saturating logistic: log 2 for an undecided critic, linear where it is wrong, 0 where it is right."""
    logit = torch.tensor([0.0, 30.0, -30.0])
    torch.testing.assert_close(adm.generator_loss(logit), torch.tensor([0.693147, 0.0, 30.0]), atol=1e-5, rtol=0)
    both = adm.critic_loss(logit, -logit)
    torch.testing.assert_close(both, torch.tensor([2 * 0.693147, 0.0, 60.0]), atol=1e-5, rtol=0)
    x = torch.tensor([0.5], requires_grad=True)  # G climbs the logit; the critic parts real and fake
    assert torch.autograd.grad(adm.generator_loss(x).sum(), x)[0] < 0
    assert torch.autograd.grad(adm.critic_loss(x, x.detach()).sum(), x)[0] < 0
    assert torch.autograd.grad(adm.critic_loss(x.detach(), x).sum(), x)[0] > 0


def two_gaussians(n: int):
    """Powers 1, x, x^2 of real N(0.3, 0.5^2) and fake N(-0.2, 0.8^2), and log p_real / p_fake in these."""
    g = torch.Generator().manual_seed(0)
    (m, s), (k, t) = (0.3, 0.5), (-0.2, 0.8)
    real, fake = (a + b * torch.randn(n, generator=g, dtype=torch.float64) for a, b in ((m, s), (k, t)))
    constant = torch.log(torch.tensor(t / s)).item() - m ** 2 / (2 * s ** 2) + k ** 2 / (2 * t ** 2)
    best = [constant, m / s ** 2 - k / t ** 2, 0.5 / t ** 2 - 0.5 / s ** 2]
    return powers(real), powers(fake), torch.tensor(best, dtype=torch.float64)


def powers(x):
    return torch.stack([torch.ones_like(x), x, x ** 2], -1)


def test_critic_loss_is_stationary_at_log_p_real_over_p_fake():
    real, fake, best = two_gaussians(100_000)

    def gradient(w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(adm.critic_loss(real @ w, fake @ w).mean(), w)[0]
    per_sample = fake * torch.sigmoid(fake @ best)[:, None] - real * torch.sigmoid(-real @ best)[:, None]
    error = per_sample.std(0) / len(real) ** 0.5
    assert (gradient(best).abs() < 4 * error).all() and (error < 0.01).all()
    assert (gradient(best + 0.2).abs() > 4 * error).any()  # the check can fail


def test_a_fitted_quadratic_critic_is_the_log_ratio():
    real, fake, best = two_gaussians(100_000)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = adm.critic_loss(real @ w, fake @ w).mean()
        loss.backward()
        return loss
    optimizer.step(closure)
    x = powers(torch.linspace(-1, 1.2, 100, dtype=torch.float64))
    assert (x @ w - x @ best).abs().max() < 0.1


@pytest.mark.parametrize("shape, convolutions", [((768, 8, 8), 1), ((64, 4, 4), 0), ((32, 2, 2), 0), ((16, 16, 16), 2)])
def test_image_head(shape, convolutions):
    """[MSD App. D.2.1]: stride-2 convolutions down to 4 x 4, one over all of it, a linear layer; a logit a sample."""
    with torch.device("meta"):
        head = adm.Head(shape, [0])
        strided = [m for m in head.net if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
        assert len(strided) == convolutions and all(m.kernel_size == (4, 4) for m in strided)
        assert head(torch.randn(1, 5, *shape)).shape == (1, 5)


def test_toy_head_rows_are_independent(double):
    """Student k's logit depends on student k's rows and its own seed's weights alone."""
    h = torch.randn(3, 5, 16)
    together = adm.Head((16,), [0, 1, 0])(h)
    torch.testing.assert_close(adm.Head((16,), [1])(h[1:2])[0], together[1], atol=1e-13, rtol=0)
    assert together.shape == (3, 5)


@pytest.mark.parametrize("kind", ["toy", "image"])
def test_logit_reads_the_bottleneck(kind):
    """The logit is the head on the bottleneck of mu_fake at (x_t, sigma, label), as of a whole forward pass."""
    net = toy_mog.ToyNet(2, 16) if kind == "toy" else unet.UNet(16, 1, 10, unet.Size(16, (1, 2), 1, ()))
    mu_fake, M, shape = edm.Precond(net), (2 if kind == "toy" else 1), ((2,) if kind == "toy" else (1, 16, 16))
    critic = adm.Critic(mu_fake, adm.Head(net.bottleneck, list(range(M))))
    x, sigma, label = torch.randn(M, 4, *shape), torch.rand(M, 4) + 0.1, torch.randint(8, (M, 4))
    D, middle = mu_fake(x, sigma, label, features=True)
    logit = critic.logit(x, sigma, label)
    torch.testing.assert_close(logit, critic.head(middle))
    torch.testing.assert_close(critic(x, sigma, label), D)
    gradients = torch.autograd.grad(logit.sum(), list(mu_fake.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)  # the critic trains the encoder too


def test_critic_of_images_is_float32_outside():
    """bf16 inside the net, as on a GPU: the logit and its gradient in x stay float32 and finite."""
    net = unet.UNet(16, 1, 10, unet.Size(16, (1, 2), 1, (8,)))
    net.precision = torch.bfloat16
    critic = adm.Critic(edm.Precond(net), adm.Head(net.bottleneck, [0]))
    x = torch.randn(1, 3, 1, 16, 16, requires_grad=True)
    logit = critic.logit(x, torch.full((1, 3), 0.5), torch.zeros(1, 3, dtype=torch.int64))
    gradient, = torch.autograd.grad(logit.sum(), x)
    assert logit.dtype == gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.any()


# ------------------------------------------------------------- the loop

def test_f_adm_real_data_and_conditions_are_the_students_own(tmp_path, drawn):
    """[MSD Sec. 3.2], watched from outside: labels that reach the teacher, labels and places of the real samples."""
    group, asked = [Student(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)], Asked()
    trained(adm, group, options(LOOP + "--adm-batch 32"), tmp_path, teacher=asked)
    for k, s in enumerate(group):
        assert asked.classes(k) == {*torch.cat(drawn, 1)[k].tolist()} == {*s.classes}
    assert len(drawn) == 5 * 2 + 3 and not torch.equal(drawn[0], drawn[1])  # new data for every turn of the critic


def test_gradients_flow_only_where_they_may(tmp_path, monkeypatch):
    """In G's turn the critic (mu_fake and head) gets none and stays as it is, in its own turn G; the teacher always."""
    frozen, nets, turns, original = denoiser(seed=3), {}, [], common.AdamW.step

    def step(self, *args):  # after the turn's backward passes, before its update
        mine = type(self.net).__name__  # Critic, or Precond: G
        nets[mine] = self.net
        for name, net in nets.items():
            got = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
            assert bool(got) == (name == mine)
            assert name == "Precond" or not got or got > {f"head.{n}" for n, _ in net.head.named_parameters()}
        turns.append((mine, {name: common.fingerprint(net) for name, net in nets.items()}))
        return original(self, *args)
    monkeypatch.setattr(common.AdamW, "step", step)
    before = common.fingerprint(frozen)
    trained(adm, ONE, options(LOOP + "--adm-ttur 1 --fake-warmup 0"), tmp_path, teacher=frozen)
    assert [name for name, _ in turns] == ["Precond", "Critic"] * 5
    for (mine, a), (_, b) in zip(turns[1:], turns[2:]):  # what this turn's update changes
        assert [name for name in a if a[name] != b[name]] == [mine]
    assert common.fingerprint(frozen) == before and all(p.grad is None for p in frozen.parameters())


def test_gan_weight_0_is_distribution_matching_alone(tmp_path, monkeypatch, drawn):
    """The control: no real data are asked for and the head never learns."""
    heads, original = [], adm.Head
    monkeypatch.setattr(adm, "Head", lambda *a: heads.append(original(*a)) or heads[-1])
    trained(adm, ONE, options(LOOP + "--gan-weight 0"), tmp_path)
    assert not drawn and common.fingerprint(heads[0]) == common.fingerprint(original((16,), [0]))


def test_dm_weight_0_is_the_gan_alone(tmp_path, monkeypatch):
    """G moves its samples to where the head takes them for real; another teacher makes no difference."""
    monkeypatch.setattr(adm.Critic, "logit", lambda self, x, sigma, label: 5 * x[..., 0])
    flags, z, label = options(LOOP + "--dm-weight 0 --adm-lr 3e-3"), torch.randn(1, 100, 2), torch.arange(100)[None] % 8
    a, b = (trained(adm, ONE, flags, tmp_path / str(i), teacher=denoiser(seed=i))["ema.pt"] for i in (3, 4))
    assert same(a.state_dict(), b.state_dict())
    before, after = (dmd.one_step(G, z, label)[..., 0].mean() for G in (denoiser(12), a))
    assert after > before + 0.01


def test_the_critic_learns_to_tell_real_from_generated(tmp_path, monkeypatch):
    losses, original = [], adm.critic_loss
    monkeypatch.setattr(adm, "critic_loss", lambda *logits: losses.append(original(*logits)) or losses[-1])
    trained(adm, ONE, options(LOOP + "--adm-steps 40 --adm-batch 32 --adm-lr 0 --fake-warmup 0"), tmp_path)
    assert torch.stack(losses[-10:]).mean() < 0.7 * torch.stack(losses[:3]).mean()


def test_the_head_sees_its_own_bins(tmp_path, monkeypatch):
    levels, original = [], adm.Critic.logit

    def logit(self, x, sigma, label):
        levels.append(sigma)
        return original(self, x, sigma, label)
    monkeypatch.setattr(adm.Critic, "logit", logit)
    for low, high, least, most in ((7, 7, 0, 0.01), (0, 999, 50, 80.1)):
        trained(adm, ONE, options(LOOP + f"--adm-batch 256 --gan-bins {low} {high}"), tmp_path / str(low))
        seen = torch.cat([s.flatten() for s in levels])
        levels.clear()
        assert seen.min() < 0.01 and least < seen.max() < most


# ---------------------------------------------------------- whole runs

def test_adm_starts_from_the_chosen_dm_students(run, tmp_path):
    """With a learning rate of 0 nothing moves: ADM's weights are dm/best.pt of each student, and not ema.pt."""
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    best = load_tensors(out / "seed0/students3/dm/best.pt")
    best["net"] = {k: 1.01 * v for k, v in best["net"].items()}  # in a run as short as this the two could be equal
    save_tensors(out / "seed0/students3/dm/best.pt", best)
    assert msd.main([*SMOKE, "--students", "3", "--stages", "dm,adm", "--adm-lr", "0", "--out", str(out)]) == 0
    assert same(*(load_tensors(out / "seed0/students3" / name / "best.pt")["net"] for name in ("dm", "adm")))
    assert "\n0," in (out / "seed0/students3/adm/metrics.csv").read_text()  # the start is the first candidate
    results = load_json(out / "results.json")
    assert list(results["stages"]) == ["dm", "adm"] and results["students"] == results["stages"]["adm"]
    assert {p.name for p in (out / "figures").iterdir()} >= {"gan.png", "stages.png"}
