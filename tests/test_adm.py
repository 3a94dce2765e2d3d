"""ADM: GAN losses and their optimum, who gets gradients, F_ADM, where it starts from; a stack is its members; resume."""
import shutil

import pytest
import torch
from torch.nn import functional as F

import adm
import common
import data
import edm
import msd
import toy_mog
import unet
from conftest import assert_stack_is_its_members
from test_dmd import precond

SMOKE = ["--preset", "smoke", "--quiet"]


def test_losses_at_known_logits():
    """Non-saturating logistic: log 2 for an undecided critic, linear where it is wrong, 0 where it is right."""
    logit = torch.tensor([0.0, 30.0, -30.0])
    torch.testing.assert_close(adm.generator_loss(logit), torch.tensor([0.693147, 0.0, 30.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(adm.critic_loss(logit, -logit), torch.tensor([2 * 0.693147, 0.0, 60.0]), atol=1e-5, rtol=0)
    x = torch.tensor([0.5], requires_grad=True)                     # G climbs the logit; the critic parts real and fake
    assert torch.autograd.grad(adm.generator_loss(x).sum(), x)[0] < 0
    assert torch.autograd.grad(adm.critic_loss(x, x.detach()).sum(), x)[0] < 0 < torch.autograd.grad(adm.critic_loss(x.detach(), x).sum(), x)[0]


def two_gaussians(n: int):
    """Samples of real N(0.3, 0.5^2) and fake N(-0.2, 0.8^2), and the coefficients of log p_real / p_fake in 1, x, x^2."""
    g = torch.Generator().manual_seed(0)
    (m, s), (k, t) = (0.3, 0.5), (-0.2, 0.8)
    real, fake = m + s * torch.randn(n, generator=g, dtype=torch.float64), k + t * torch.randn(n, generator=g, dtype=torch.float64)
    best = [torch.log(torch.tensor(t / s)).item() - m ** 2 / (2 * s ** 2) + k ** 2 / (2 * t ** 2), m / s ** 2 - k / t ** 2, 0.5 / t ** 2 - 0.5 / s ** 2]
    return real, fake, torch.tensor(best, dtype=torch.float64)


def powers(x):
    return torch.stack([torch.ones_like(x), x, x ** 2], -1)


def test_critic_loss_is_stationary_at_log_p_real_over_p_fake():
    real, fake, best = two_gaussians(100_000)
    best.requires_grad_()
    loss = adm.critic_loss(powers(real) @ best, powers(fake) @ best)
    gradient = torch.autograd.grad(loss.mean(), best)[0]
    per_sample = powers(fake) * torch.sigmoid(powers(fake) @ best)[:, None] - powers(real) * torch.sigmoid(-powers(real) @ best)[:, None]
    error = per_sample.std(0) / len(real) ** 0.5
    assert (gradient.abs() < 4 * error).all() and (error < 0.01).all()
    wrong = (best.detach() + 0.2).requires_grad_()                  # the check can fail
    assert (torch.autograd.grad(adm.critic_loss(powers(real) @ wrong, powers(fake) @ wrong).mean(), wrong)[0].abs() > 4 * error).any()


def test_a_fitted_quadratic_critic_is_the_log_ratio():
    real, fake, best = two_gaussians(100_000)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = adm.critic_loss(powers(real) @ w, powers(fake) @ w).mean()
        loss.backward()
        return loss
    optimizer.step(closure)
    x = powers(torch.linspace(-1, 1.2, 100, dtype=torch.float64))
    assert (x @ w - x @ best).abs().max() < 0.1


@pytest.mark.parametrize("shape, convolutions", [((768, 8, 8), 1), ((64, 4, 4), 0), ((32, 2, 2), 0), ((16, 16, 16), 2)])
def test_image_head(shape, convolutions):
    """[MSD App. D.2.1]: stride-2 convolutions down to 4 x 4, one more over all of it, a linear layer; one logit a sample."""
    head = adm.Head(shape, [0])
    strided = [m for m in head.net if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == convolutions and all(m.kernel_size == (4, 4) for m in strided)
    assert head(torch.randn(1, 5, *shape)).shape == (1, 5)


def test_toy_head_rows_are_independent(double):
    """Member k's logit depends on member k's rows and its own seed's weights alone."""
    h = torch.randn(3, 5, 16)
    together = adm.Head((16,), [0, 1, 0])(h)
    torch.testing.assert_close(adm.Head((16,), [1])(h[1:2])[0], together[1], atol=1e-13, rtol=0)
    assert together.shape == (3, 5)


@pytest.mark.parametrize("kind", ["toy", "image"])
def test_logit_reads_the_bottleneck(kind):
    """The logit is the head on the bottleneck of mu_fake at (x_t, sigma, label): the same as from a whole forward pass."""
    net = toy_mog.ToyNet(2, 16) if kind == "toy" else unet.UNet(16, 1, 10, unet.Size(16, (1, 2), 1, ()))
    mu_fake, M, shape = edm.Precond(net), (2 if kind == "toy" else 1), ((2,) if kind == "toy" else (1, 16, 16))
    critic = adm.Critic(mu_fake, adm.Head(net.bottleneck, list(range(M))))
    x, sigma, label = torch.randn(M, 4, *shape), torch.rand(M, 4) + 0.1, torch.randint(8, (M, 4))
    c_in, c_noise = mu_fake.coefficients(sigma)[2:]
    _, middle = net(edm.like(c_in, x) * x, c_noise, label, features=True)
    torch.testing.assert_close(critic.logit(x, sigma, label), critic.head(middle))
    torch.testing.assert_close(critic(x, sigma, label), mu_fake(x, sigma, label))
    logit = critic.logit(x, sigma, label)
    gradients = torch.autograd.grad(logit.sum(), list(mu_fake.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)                          # the critic trains the encoder too


# ------------------------------------------------------------------------------------------------------------- the loop

def small_flags(**changes):
    flags = adm.Flags(dataset="toy", adm_steps=5, adm_batch=8, adm_fake_warmup=3, adm_ttur=2, warmup=1, draws=2, eval_every=100,
                      select_samples=80, save_every=100, quiet=True, pairs=24)
    for k, v in changes.items():
        assert hasattr(flags, k)
        setattr(flags, k, v)
    return flags


def small_train(tmp_path, members, flags, teacher=None, name="s", source=None, width=16):
    """adm.train on a stack of members with the exact teacher; generators of another width than mu_fake; returns ema."""
    def stack(seed, wide):
        one = precond(1, wide, seed)
        net = edm.Precond(toy_mog.ToyNet(len(members), wide), 0.5)
        net.load_state_dict({k: v.repeat(len(members), *[1] * (v.ndim - 1)) for k, v in one.state_dict().items()})
        return net
    label = data.stratified(flags.pairs, 8)[None]
    z = torch.randn(1, flags.pairs, 2, generator=common.generator("pairs"))
    pairs = {"z": z, "y": z / 2, "label": label, "row": torch.zeros(len(members), dtype=torch.int64)}
    reference = {0: data.toy_statistics(toy_mog.sample(data.stratified(800, 8), common.generator("ref")), data.stratified(800, 8))}
    run = common.Stage("adm", {tmp_path / name: slice(0, len(members))}, flags.adm_steps, flags.save_every, quiet=True)
    ema, best = adm.train(run, flags, members, teacher or toy_mog.denoiser, stack(0, 12), stack(1, width), source or data.Mixture(data.facts("toy")),
                          data.toy_judge(data.facts("toy")), reference, torch.device("cpu"), pairs, [torch.arange(flags.pairs)] * len(members))
    return ema


def test_f_adm_real_data_and_conditions_are_the_students_own(tmp_path):
    """[MSD Sec. 3.2], watched from outside: labels that reach the teacher, labels and places of the real samples."""
    members = [common.Member(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)]
    asked, real, means = [set(), set()], [set(), set()], toy_mog.means()

    def teacher(x, sigma, label):
        for k in range(2):
            asked[k] |= set(label[k].tolist())
        return toy_mog.denoiser(x, sigma, label)

    class Spy(data.Mixture):
        def batch(self, *args):
            x, label = super().batch(*args)
            for k in range(2):
                real[k] |= set(label[k].tolist())
                nearest = (x[k][:, None, None] - means).norm(dim=-1).flatten(1).argmin(1) // toy_mog.MODES
                assert torch.equal(nearest, label[k])               # the sample is of the class that it is said to be
            return x, label
    small_train(tmp_path, members, small_flags(adm_batch=32), teacher, source=Spy(data.facts("toy")))
    for k in range(2):
        assert asked[k] == real[k] == set(members[k].classes)
    own, index = msd.filter_adm(data.stratified(40, 8), torch.tensor([4, 5]))
    assert own.tolist() == [4, 5] and set(data.stratified(40, 8)[index].tolist()) == {4, 5}
    with pytest.raises(common.UserError):
        msd.filter_adm(torch.tensor([0, 1]), torch.tensor([5]))


def test_gradients_flow_only_where_they_may(tmp_path, monkeypatch):
    """In G's turn the critic (mu_fake and head) gets none, in the critic's turn G gets none, the teacher never."""
    teacher, seen = precond(seed=3), []
    before = common.fingerprint(teacher)
    original = common.clip_gradients

    def spy(net, *args):                                            # called after each backward, before the step
        critic = isinstance(net, adm.Critic)
        grads = {n: p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in net.named_parameters()}
        seen.append((critic, grads))
        others = nets["critic" if not critic else "G"] if len(nets) == 2 else []
        if not critic:
            nets["G"] = list(net.parameters())
            assert all(not p.requires_grad for p in others)         # looked at, not trained
        else:
            nets["critic"] = list(net.parameters())
            if "G" in held:
                assert all(torch.equal(a, p.grad) for a, p in zip(held["G"], nets["G"]))        # untouched by the critic's backward
        if not critic:
            held["G"] = [p.grad.clone() for p in net.parameters()]
        return original(net, *args)
    nets, held = {}, {}
    monkeypatch.setattr(common, "clip_gradients", spy)
    small_train(tmp_path, [common.Member(0, 1, 0, tuple(range(8)))], small_flags(adm_ttur=1, adm_fake_warmup=0), teacher)
    turns = [critic for critic, _ in seen]
    assert turns == [False, True] * 5
    for critic, grads in seen:
        if critic:
            assert all(v for n, v in grads.items() if n.startswith("head")) and any(v for n, v in grads.items() if n.startswith("mu_fake"))
        else:
            assert any(grads.values())
    assert common.fingerprint(teacher) == before and all(p.grad is None for p in teacher.parameters())


def test_the_critic_does_not_change_in_gs_turn_and_g_not_in_the_critics(tmp_path, monkeypatch):
    hashes = []
    original = common.clip_gradients
    kept = {}

    def spy(net, *args):
        kept["critic" if isinstance(net, adm.Critic) else "G"] = net
        if len(kept) == 2:
            hashes.append((isinstance(net, adm.Critic), common.fingerprint(kept["G"]), common.fingerprint(kept["critic"])))
        return original(net, *args)
    monkeypatch.setattr(common, "clip_gradients", spy)
    small_train(tmp_path, [common.Member(0, 1, 0, tuple(range(8)))], small_flags(adm_ttur=1, adm_fake_warmup=0))
    for (turn, G, critic), (_, G_next, critic_next) in zip(hashes, hashes[1:]):
        assert (G == G_next) == turn and (critic == critic_next) == (not turn)                  # hashes are taken before the step


def test_gan_weight_0_is_distribution_matching_alone(tmp_path, monkeypatch):
    """The control: no real data are asked for and the head never learns."""
    class NoData:
        def batch(self, *args):
            raise AssertionError("real data")
    heads = []
    original = adm.Head
    monkeypatch.setattr(adm, "Head", lambda *a: heads.append(original(*a)) or heads[-1])
    small_train(tmp_path, [common.Member(0, 1, 0, tuple(range(8)))], small_flags(gan_weight=0.0), source=NoData())
    assert common.fingerprint(heads[0]) == common.fingerprint(original((16,), [0]))


@pytest.mark.parametrize("changes", [dict(gan_clean=True), dict(adm_reg_weight=0.5), dict(dm_weight=0.0), dict(micro_batch=4)])
def test_variants_run(tmp_path, changes):
    ema = small_train(tmp_path, [common.Member(0, 1, 0, tuple(range(8)))], small_flags(**changes))
    assert all(torch.isfinite(p).all() for p in ema.parameters())


def test_clean_samples_reach_the_head_as_they_are(tmp_path, monkeypatch):
    levels = []
    original = adm.Critic.logit
    monkeypatch.setattr(adm.Critic, "logit", lambda self, x, sigma, label: levels.append(sigma) or original(self, x, sigma, label))
    members = [common.Member(0, 1, 0, tuple(range(8)))]
    small_train(tmp_path, members, small_flags(gan_clean=True))
    assert all((s == edm.SIGMA_MIN).all() for s in levels)
    levels.clear()
    small_train(tmp_path, members, small_flags(adm_batch=256, gan_bins=[0, 999]), name="noised")
    seen = torch.cat([s.flatten() for s in levels])
    assert seen.min() < 0.01 and seen.max() > 50                    # the full range


def test_micro_batches_are_the_whole_batch(tmp_path, double):
    members = [common.Member(0, 1, 0, tuple(range(8)))]
    a = small_train(tmp_path, members, small_flags(), name="whole").state_dict()
    b = small_train(tmp_path, members, small_flags(micro_batch=2), name="micro").state_dict()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-10, rtol=1e-10)


def test_stack_equals_separate_runs(tmp_path, double):
    flags = small_flags(adm_steps=40, clip_norm=1.0, adm_reg_weight=0.1)
    assert_stack_is_its_members(lambda members, name: small_train(tmp_path, members, flags, name=name).state_dict())


def test_generated_data_are_drawn_from_the_students_own_classes():
    """--real generated: y of the pairs in the place of the data, of Y_k alone; said when there are none."""
    label = torch.arange(8)[None].repeat(2, 3)
    source = data.Generated(torch.arange(48.0).reshape(2, 24, 1).expand(2, 24, 2), label, [3, 4])
    members = [common.Member(4, 2, 0, (0, 1)), common.Member(3, 2, 1, (5,))]
    y, drawn = source.batch(common.Draws("adm", members), 0, 50)
    assert y.shape == (2, 50, 2) and set(drawn[0].tolist()) == {0, 1} and set(drawn[1].tolist()) == {5}
    assert (y[0] >= 24).all() and (y[1] < 24).all()                 # each of its own seed's samples
    with pytest.raises(common.UserError):
        data.Generated(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), [0]).batch(common.Draws("adm", [common.Member(0, 2, 1, (7,))]), 0, 4)


# ------------------------------------------------------------------------------------------------------------ whole runs

def test_adm_starts_from_the_chosen_dm_students(run, tmp_path):
    """With a learning rate of 0 nothing moves: ADM's weights are dm/best.pt of each student, and not ema.pt."""
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    best = common.load_tensors(out / "seed0/students3/dm/best.pt")
    best["net"] = {k: 1.01 * v for k, v in best["net"].items()}     # in a run as short as this the two could be equal
    common.save_tensors(out / "seed0/students3/dm/best.pt", best)
    assert msd.main([*SMOKE, "--students", "3", "--stages", "dm,adm", "--adm-lr", "0", "--weight-decay", "0.01", "--ema", "0.99", "--out", str(out)]) == 0
    a, b = (common.load_tensors(out / "seed0/students3" / name / "best.pt")["net"] for name in ("dm", "adm"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    results = common.load_json(out / "results.json")
    assert list(results["stages"]) == ["dm", "adm"] and results["students"] == results["stages"]["adm"]
    assert {p.name for p in (out / "figures").iterdir()} >= {"gan.png", "stages.png"}


def test_one_student_is_adm_bit_for_bit(run, tmp_path):
    """K = 1 through the wrapper equals plain adm.py after dmd.py's student."""
    outs = [tmp_path / n for n in ("msd", "adm")]
    for out in outs:
        shutil.copytree(run, out)
    assert msd.main([*SMOKE, "--students", "1", "--stages", "adm", "--out", str(outs[0])]) == 0
    adm.main([*SMOKE, "--out", str(outs[1])])
    a, b = (common.load_tensors(out / "seed0/students1/adm/ema.pt")["net"] for out in outs)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_resumed_fake_denoiser_is_that_of_the_dm_stage(run, tmp_path, monkeypatch):
    """--adm-fake resume: ADM's mu_fake starts as stage 1 left it; restart: from the teacher's weights."""
    out, seen = tmp_path / "copy", []
    shutil.copytree(run, out)
    original = adm.train
    monkeypatch.setattr(adm, "train", lambda *a: seen.append({k: v.clone() for k, v in a[5].state_dict().items()}) or original(*a))
    for tag, how in (("a", "resume"), ("b", "restart")):
        assert msd.main([*SMOKE, "--students", "3", "--stages", "adm", "--init", "dm", "--adm-fake", how, "--tag", tag, "--out", str(out)]) == 0
    left = common.load_tensors(run / "seed0/students3/dm/state.pt")["parts"]["mu_fake"]
    teacher = common.load_tensors(run / "seed0/teacher/ema.pt")["net"]
    assert all(torch.equal(seen[0][k], left[k]) for k in left)
    assert all(torch.equal(seen[1][k][i], teacher[k][0]) for k in teacher for i in range(3))


def test_chosen_by_the_data_on_another_draw_than_the_reported(run, tmp_path, monkeypatch):
    """ADM's checkpoints are judged against real data that are not those of results.json, on latents that are not reported."""
    truth, seen = data.toy_judge(data.facts("toy")).truth(0, 800), []
    assert not torch.equal(truth["real"], truth["real_select"])
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    original = adm.train
    monkeypatch.setattr(adm, "train", lambda *a: seen.append(a[8][0]) or original(*a))
    assert msd.main([*SMOKE, "--students", "3", "--stages", "adm", "--out", str(out)]) == 0
    assert torch.equal(seen[0], truth["real_select"])


@pytest.mark.slow
def test_images(image_run, tiny, tmp_path, capsys):
    """ADM of three image students from their DM folders, sampled by the router afterwards; resumed fake denoiser as a variant."""
    out = tmp_path / "copy"
    shutil.copytree(image_run, out)
    argv = ["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), "--quiet", "--threads", "1", "--students", "3"]
    assert msd.main([*argv, "--stages", "dm,adm"]) == 0
    text = capsys.readouterr().out
    assert "3 students, adm" in text and "below the teacher?" in text
    for k in range(3):
        assert (out / f"seed0/students3/adm/student{k}/best.pt").exists()
    assert msd.load_students(out / "seed0/students3").G.folders[0].parent.name == "adm"
    assert msd.main([*argv, "--stages", "adm", "--init", "dm", "--tag", "resumed", "--adm-fake", "resume", "--student", "1"]) == 0
    assert (out / "seed0/students3-resumed/adm/student1/best.pt").exists()


def test_critic_of_images_trains_encoder_and_head_in_float32_outside(tmp_path):
    """bf16 inside the net, as on a GPU: the logit and its gradient in x stay float32 and finite."""
    net = unet.UNet(16, 1, 10, unet.Size(16, (1, 2), 1, (8,)))
    net.precision = torch.bfloat16
    critic = adm.Critic(edm.Precond(net), adm.Head(net.bottleneck, [0]))
    x = torch.randn(1, 3, 1, 16, 16, requires_grad=True)
    logit = critic.logit(x, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int64))
    F.softplus(-logit).sum().backward()
    assert logit.dtype == torch.float32 and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
