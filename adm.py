"""Stage 2, ADM: distribution matching with an adversarial head; real data enter, so a student can surpass its teacher [MSD Sec. 3.2, App. I.3].

Goes on training the one-step generators of stage 1 (dmd.py). A small head on the bottleneck of the fake denoiser tells real data
from G's samples, both noised first; G is pushed by the KL term, as before, and by the head. Fake denoiser and head are one
network here, the critic, trained together; it takes several updates per update of G (TTUR). No pairs, no regression.

  G_k^(2) = Distill_ADM(mu_teacher, F_ADM(D, Y_k); G_k^(1))    [MSD Eq. 2, Eq. 4]     distil
  the KL term, the fake denoiser's loss                         [MSD Eq. 6, Eq. 8]     dmd.py, edm.denoising_loss
  non-saturating logistic GAN on noised samples                 [MSD App. I.3]         generator_loss, critic_loss
  head: 4 x 4 convolutions, group norm, SiLU                    [MSD App. D.2.1]       Head, Critic

The best DM checkpoint of each student is where it starts, and its best ADM checkpoint is kept by the same judge, against real
data, on draws that are not reported. The fake denoiser starts again from the teacher's weights, as the paper found better
(--adm-fake resume goes on with stage 1's last one, as DMD2 does). `--gan-weight 0` switches the GAN off: DM continued, the control.

What is healthy: gan.png, and README's "Is my ADM run healthy?". Not here: the pairs, the first stage (dmd.py), F_ADM (msd.py).

Departures from the paper
 1. "Middle block", "probability": the encoder's last block and a logit, as in the code that the paper builds on.
 2. Head from random weights (it has no teacher's), noise over all bins, TTUR of 5: not stated in the paper; DMD2's. What counts
    as an iteration is not stated either: --adm-steps counts updates of G, as everywhere here (DMD2 counts those of mu_fake).
On the toy and on the small images also
 3. TTUR of 2; mu_fake and head get a head start (--adm-fake-warmup) at G's first update; larger learning rates that decay; an
    average of G's weights is kept, and its start is a candidate for the best checkpoint.
 4. The toy: a small MLP for a head on ToyNet's middle layer, GAN weights 0.03 and 1, and the head sees bins 0 to 100 of 1000
    (sigma <= 0.017): above, real and generated samples look alike to it.

Run      python adm.py --dataset toy                  after python dmd.py --dataset toy
Many GPUs    torchrun --nproc-per-node 8 adm.py --dataset imagenet64
"""
import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common
import data
import dmd
import edm
import tsm
import unet
from common import flag


@dataclasses.dataclass
class Flags(tsm.Flags):
    """Flags of ADM; learning-rate decay, betas, bins, normaliser, clipping, EMA and evaluation are those of DM."""
    adm_steps: int = flag(1000, "updates of the generator", "adm", low=1)
    adm_batch: int = flag(128, "batch per student", "adm", low=1)
    adm_lr: float = flag(5e-4, "learning rate of G (AdamW)", "adm", low=0)
    adm_fake_lr: float = flag(5e-3, "learning rate of the fake denoiser and the head", "adm", low=0)
    adm_ttur: int = flag(2, "updates of the fake denoiser and the head per update of G", "adm", low=1)
    adm_fake: str = flag("restart", "the fake denoiser starts from the teacher's weights, or resumes stage 1's", "adm", ("restart", "resume"))
    adm_fake_warmup: int = flag(400, "further updates of the fake denoiser and the head at G's first update", "adm", low=0)
    adm_reg_weight: float = flag(0.0, "weight of the paired regression, kept from stage 1; 0 = none", "adm", low=0)
    gan_weight: float = flag(0.03, "weight of the GAN loss in G's; 0 = no GAN at all: DM continued", "adm", low=0)
    critic_weight: float = flag(1.0, "weight of the GAN loss in the fake denoiser's", "adm", low=0)
    gan_bins: list[int] = flag([0, 100], "lowest and highest noise bin of what the head sees, of 1000", "adm")
    gan_clean: bool = flag(False, "show the head clean samples instead of noised ones", "adm")


PAPER = dict(gan_weight=3e-3, critic_weight=1e-2, gan_bins=[0, 999], adm_ttur=5, adm_fake_warmup=0)         # [MSD App. D.2.1]; TTUR, bins: DMD2
PRESETS = {
    ("toy", "default"): {}, ("toy", "few-pairs"): {},
    ("toy", "paper"): dict(PAPER, adm_steps=100_000, adm_lr=1e-7, adm_fake_lr=1e-7),            # the paper has no ADM on its toy
    ("toy", "smoke"): dict(adm_steps=9, adm_batch=16, adm_fake_warmup=2),
    # ours, for 2 CPU cores
    ("fashion-mnist", "default"): dict(PAPER, adm_steps=300, adm_batch=64, adm_lr=2e-4, adm_fake_lr=1e-3, adm_fake_warmup=150, adm_ttur=2),
    ("fashion-mnist", "smoke"): dict(PAPER, adm_steps=4, adm_batch=4, adm_fake_warmup=1, adm_ttur=2),
    ("cifar10", "default"): dict(PAPER, adm_steps=100_000, adm_batch=256, adm_lr=5e-6, adm_fake_lr=5e-6),
    ("cifar10", "smoke"): dict(PAPER, adm_steps=2, adm_batch=2, adm_fake_warmup=1, adm_ttur=1),
    # [MSD App. D.2.1], 150 000 iterations read as updates of G; for smaller students D.2.2 (S) and B.6 (XS, XXS: "the same learning rate of 2e-6")
    ("imagenet64", "default"): dict(PAPER, adm_steps=150_000, adm_batch=192, adm_lr=5e-7, adm_fake_lr=5e-7),
    ("imagenet64", "default", "S"): dict(adm_batch=160),
    ("imagenet64", "default", "XS"): dict(adm_batch=224, adm_lr=2e-6, adm_fake_lr=2e-6),
    ("imagenet64", "default", "XXS"): dict(adm_batch=256, adm_lr=2e-6, adm_fake_lr=2e-6),
}
PRESETS |= {("imagenet64", "paper", *key[2:]): value for key, value in list(PRESETS.items()) if key[:2] == ("imagenet64", "default")}
# what ADM takes from DM's flags
SHARED = ("beta1", "beta2", "decay", "warmup", "clip_norm", "ema", "dm_weight", "draws", "bins", "fake_bins", "normaliser", "grad_clip", "select_samples", "eval_every")


# ---------------------------------------------------------------------------------------------------------- the losses

def generator_loss(logit: Tensor) -> Tensor:
    """softplus(-logit) [...] of generated samples: non-saturating; 0 where the head takes them for real [MSD App. I.3]."""
    return F.softplus(-logit)


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(fake) + softplus(-real) [...]: its minimiser is the logit log p_real / p_fake [MSD App. I.3]."""
    return F.softplus(fake) + F.softplus(-real)


class Head(nn.Module):
    """Bottleneck [M, B, *shape] -> logit [M, B]: is this sample real?

    shape (C, h, w): 4 x 4 convolutions of stride 2 down to 4 x 4, one more over all of it, group norm and SiLU after each, and a
    linear layer [MSD App. D.2.1]; M = 1. shape (width,): an MLP per member of the stack. seeds: M integers, of the initial weights."""

    def __init__(self, shape: tuple[int, ...], seeds: list[int]):
        super().__init__()
        self.shape, self.net = tuple(shape), None
        if len(shape) == 3:
            channels, side = shape[:2]
            layers, conv = [], dict(kernel_size=4, stride=2, padding=1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(edm.PYTORCH_SEED + seeds[0])
                while side > 4:
                    layers += [nn.Conv2d(channels, channels, **conv), unet.Norm(channels), nn.SiLU()]
                    side //= 2
                layers += [nn.Conv2d(channels, channels, side), unet.Norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
            self.net = nn.Sequential(*layers)
        else:
            width = shape[0]

            def normal(name: str, *size: int, std: float) -> nn.Parameter:
                return nn.Parameter(torch.stack([std * torch.randn(size, generator=common.generator(s, "head", name)) for s in seeds]))
            self.w0, self.b0 = normal("w0", width, width, std=width ** -0.5), normal("b0", 1, width, std=0.1)
            self.w1, self.b1 = normal("w1", width, width, std=width ** -0.5), normal("b1", 1, width, std=0.1)
            self.w2, self.b2 = normal("w2", width, 1, std=0.1 * width ** -0.5), normal("b2", 1, 1, std=0.0)

    def forward(self, h: Tensor) -> Tensor:
        if self.net is not None:
            return self.net(h.reshape(-1, *self.shape)).reshape(h.shape[:-3])
        h = F.silu(torch.baddbmm(self.b0, h, self.w0))
        h = F.silu(torch.baddbmm(self.b1, h, self.w1))
        return torch.baddbmm(self.b2, h, self.w2)[..., 0]


class Critic(nn.Module):
    """mu_fake and a head on its bottleneck, trained as one network: a denoiser of G's samples, and a logit [MSD App. I.3]."""

    def __init__(self, mu_fake: edm.Precond, head: Head):
        super().__init__()
        self.mu_fake, self.head = mu_fake, head

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """mu_fake(x; sigma, label) [..., *shape]."""
        return self.mu_fake(x, sigma, label)

    def logit(self, x_t: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Is the diffused sample x_t [M, B, *shape], of this class, real? [M, B]"""
        return self.head(self.mu_fake.bottleneck(x_t, sigma, label))


# ------------------------------------------------------------------------------------------------------------ training

def train(run: common.Stage, flags: Flags, members, teacher, net, fake_net, source, judge, references: dict, device,
          pairs: dict | None = None, pair_index: list | None = None):
    """Train the generators that `net` initialises against the critic; returns (last, best) averaged weights of each member.

    members: M students, each with its classes Y_k; KL conditions and real data come from these alone [MSD Sec. 3.2, F_ADM]
    teacher: denoiser -> mu_real, never changed;  net, fake_net: stacks of M that G and mu_fake start from, copied
    source: real data (data.py);  judge, references: see dmd.own_distance;  pairs, pair_index: see dmd.train, for --adm-reg-weight"""
    facts = data.facts(flags.dataset, flags.resolution)
    draws, ranks = common.Draws("adm", members, device), run.ranks
    names = [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    G = copy.deepcopy(net).requires_grad_(True)
    head = Head(fake_net.net.bottleneck, [m.seed for m in members]).to(device)
    critic = Critic(copy.deepcopy(fake_net), head)
    ema, best = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net).requires_grad_(False)
    edm.compiled(flags, G, critic.mu_fake, ema)
    betas = (flags.beta1, flags.beta2)
    opt_G = torch.optim.AdamW(G.parameters(), betas=betas, weight_decay=flags.weight_decay, fused=True)
    opt_critic = torch.optim.AdamW(critic.parameters(), betas=betas, weight_decay=flags.weight_decay, fused=True)
    record = {"distance": torch.full((len(members),), float("inf"))}
    start = run.resume(G=G, critic=critic, ema=ema, best=best, opt_G=opt_G, opt_critic=opt_critic, record=record)

    B, n, shape, gan = flags.adm_batch, flags.draws, facts.shape, flags.gan_weight > 0
    parts = ranks.parts(B, flags.micro_batch)                       # one part, unless ranks or memory ask for more
    grid = edm.sigma_bins().float().to(device)
    distance = dmd.lpips_distance(device) if flags.distance == "lpips" and flags.adm_reg_weight > 0 else flags.distance

    def diffused(x: Tensor, step: int, purpose: str, part: slice) -> tuple[Tensor, Tensor]:
        """x with noise of a random level, for the head; --gan-clean: as it is, called the lowest level."""
        if flags.gan_clean:
            return x, torch.full(x.shape[:2], edm.SIGMA_MIN, dtype=x.dtype, device=device)
        sigma = grid[draws.integers(step, f"{purpose} sigma", flags.gan_bins[0], flags.gan_bins[1] + 1, B)][:, part]
        return x + edm.like(sigma, x) * draws.normal(step, f"{purpose} noise", B, *shape)[:, part], sigma

    def evaluated(step: int) -> None:
        d = dmd.own_distance(ema, facts, judge, members, references, flags.select_samples, device, ranks)
        dmd.keep_best(run, step, d, ema, best, record, f"{facts.metric}_data")

    for step in run.range(start):
        if step == 0:
            evaluated(0)                                            # stage 1's checkpoint is the first candidate
        rate = common.learning_rate(1.0, step, flags.adm_steps, flags.warmup, flags.decay)
        note = (step + 1) % 50 == 0
        seen = {}                                                   # sums over the batch, of what is worth watching

        def watch(**values: Tensor) -> None:
            for name, value in values.items():
                seen[name] = seen.get(name, 0) + value.detach().sum(-1) / B

        # the generator's turn; the critic is only looked at
        critic.requires_grad_(False)
        common.set_learning_rate(opt_G, flags.adm_lr * rate)
        opt_G.zero_grad()
        loss, made = torch.zeros(len(members), device=device), []
        for part in parts:
            label = draws.label(step, "label", B)[:, part]                                      # [M, b], from Y_k
            x = dmd.one_step(G, draws.normal(step, "z", B, *shape)[:, part], label)
            sigma = grid[dmd.bins_in_strata(draws, step, "sigma", *flags.bins, B, n)][:, part]  # [M, b, n]
            noise = draws.normal(step, "noise", B * n, *shape).unflatten(1, (B, n))[:, part]
            grad, _ = dmd.kl_gradient(x.detach(), label, sigma, noise, teacher, critic, flags.normaliser, flags.grad_clip, facts.sigma_data)
            terms = flags.dm_weight * dmd.dm_loss(x, grad)
            if gan:
                fooled = generator_loss(critic.logit(*diffused(x, step, "gan", part), label))   # [M, b]
                terms = terms + flags.gan_weight * fooled
                if note:
                    push, = torch.autograd.grad(fooled.sum(), x, retain_graph=True)
                    watch(**{"GAN loss of G": fooled, "push of the GAN": flags.gan_weight * rms(push)})
            if note:
                watch(**{"push of the DM term": flags.dm_weight * rms(grad) / grad[0, 0].numel()})
            if flags.adm_reg_weight > 0:
                pick = dmd.pick_pairs(draws, step, B, pair_index)[:, part]
                terms = terms + flags.adm_reg_weight * dmd.paired_loss(G, pairs, pick, distance)
            share = terms.sum(-1) / B                                                           # [M]
            share.sum().backward()
            loss += share.detach()
            made.append((x.detach(), label))
        run.check(step, loss, names)
        ranks.add_gradients(G)
        common.clip_gradients(G, flags.clip_norm, len(members))
        opt_G.step()
        common.ema_update(ema, G, flags.ema, step)

        # the critic's turns: the first on G's samples of this step, the others on fresh ones; at the first step many, a head start
        critic.requires_grad_(True)
        head.requires_grad_(gan)
        turns = flags.adm_ttur + (flags.adm_fake_warmup if step == 0 else 0)
        done = step * flags.adm_ttur + (flags.adm_fake_warmup if step else 0)                   # turns before this step
        common.set_learning_rate(opt_critic, flags.adm_fake_lr * (1.0 if step == 0 else rate))
        for turn in range(turns):
            opt_critic.zero_grad()
            critic_losses = torch.zeros(len(members), device=device)
            for i, part in enumerate(parts):
                if turn == 0:
                    x, label = made[i]
                else:
                    label = draws.label(step, f"fake label {turn}", B)[:, part]
                    with torch.no_grad():
                        x = dmd.one_step(G, draws.normal(step, f"fake z {turn}", B, *shape)[:, part], label)
                sigma = grid[draws.integers(step, f"fake sigma {turn}", flags.fake_bins[0], flags.fake_bins[1] + 1, B)][:, part]
                noise = draws.normal(step, f"fake noise {turn}", B, *shape)[:, part]
                terms = denoising = edm.denoising_loss(critic, x, label, sigma, noise, facts.sigma_data)        # [M, b]
                if gan:
                    x_real, label_real = source.batch(draws, done + turn, B, part)              # of Y_k
                    real = critic.logit(*diffused(x_real, step, f"real {turn}", part), label_real)
                    fake = critic.logit(*diffused(x, step, f"fake {turn}", part), label)
                    told_apart = critic_loss(real, fake)
                    terms = terms + flags.critic_weight * told_apart
                    if note and turn + 1 == turns:
                        watch(**{"GAN loss of the critic": told_apart, "right on real": (real > 0).float(), "right on fake": (fake < 0).float()})
                if note and turn + 1 == turns:
                    watch(**{"fake loss": denoising})
                share = terms.sum(-1) / B
                share.sum().backward()
                critic_losses += share.detach()
            run.check(step, critic_losses, names)
            ranks.add_gradients(critic)
            common.clip_gradients(critic, flags.clip_norm, len(members))
            opt_critic.step()

        if note:
            run.log(step + 1, **{k: ranks.total(v) for k, v in seen.items()})
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.adm_steps:
            evaluated(step + 1)
        run.save(step + 1, G=G, critic=critic, ema=ema, best=best, opt_G=opt_G, opt_critic=opt_critic, record=record)
    return ema, best


def rms(v: Tensor) -> Tensor:
    """Root mean square over one sample's elements, [...]."""
    return edm.per_sample(v.detach() ** 2).sqrt()


# ------------------------------------------------------------------------------------------------------ the whole stage

def config(flags: Flags, seed: int, start: dmd.Start) -> dict:
    """The flags that determine the ADM students of a seed, but for K and the partition."""
    paired = ("sampler_steps", "pairs", *(("distance", "filter_pairs") if flags.adm_reg_weight > 0 else ()))
    pairs = {name: getattr(flags, name) for name in paired} if flags.adm_reg_weight > 0 or flags.real == "generated" else {}
    return {**dmd.ancestry(flags, seed), "start": start.name, "real": flags.real, **pairs, "weight_decay": flags.weight_decay,
            **{name: getattr(flags, name) for name in SHARED}, **common.stage_config(flags, "adm")}


def resumed_fake(home: Path, k: int) -> dict:
    """mu_fake of student k, a stack of one, as stage 1 left it in state.pt. UserError if there is none."""
    own = home / f"student{k}"
    path = (own if own.is_dir() else home) / "state.pt"
    try:
        saved = common.load_tensors(path, mmap=True)["parts"]
        saved["mu_fake"]
    except (common.UserError, KeyError, TypeError):
        raise common.UserError(f"{path}: no fake denoiser to be read from it; take --adm-fake restart, or delete {path.parent} to train that stage again") from None
    members = 1 if own.is_dir() else len(common.load_json(home / "config.json", "partition")["partition"])
    return {name: (v if members == 1 else v[k:k + 1]).clone() for name, v in saved["mu_fake"].items()}


def distil(flags: Flags, members: list, pair_index: list, starts: list[dmd.Start], inputs: dmd.Inputs, source, device, ranks) -> None:
    """G_k = Distill_ADM(mu_teacher, F_ADM(D, Y_k); G_k^(1)) for all members [MSD Eq. 2]: best.pt and ema.pt in each adm folder.

    starts: per member its stage-1 student; source() gives the real data."""
    seeds = edm.seeds(flags)

    def train_stack(run, index: list[int]) -> dict:
        stack, row = [members[i] for i in index], [seeds.index(members[i].seed) for i in index]
        net, teacher, fake = dmd.networks(flags, [starts[i] for i in index], row, inputs, device)
        if flags.adm_fake == "resume":
            states = [resumed_fake(starts[i].home, members[i].student) for i in index]
            fake.load_state_dict({k: torch.cat([s[k] for s in states]) if len(states) > 1 else states[0][k] for k in states[0]})
        references = {s: r["real_select"] for s, r in inputs.references.items()}
        ema, best = train(run, flags, stack, teacher, net, fake, source(), inputs.judge, references, device,
                          {**inputs.pairs, "row": torch.tensor(row, device=device)}, [pair_index[i].to(device) for i in index])
        return {"best.pt": best, "ema.pt": ema}
    out = [dmd.stage_folder(flags, m.seed, m.students, "adm") for m in members]
    dmd.train_all(flags, "adm", members, out, [config(flags, m.seed, s) for m, s in zip(members, starts)], flags.adm_steps, train_stack, starts, ranks)


def check_flags(flags: Flags) -> None:
    """Raise UserError for values that are fine alone but not together."""
    tsm.check_flags(flags)
    if len(flags.gan_bins) != 2 or not 0 <= flags.gan_bins[0] <= flags.gan_bins[1] <= 999:
        raise common.UserError(f"--gan-bins {' '.join(map(str, flags.gan_bins))}: give two numbers, lowest and highest of 0 to 999")
    if flags.gan_weight == flags.dm_weight == flags.adm_reg_weight == 0:
        raise common.UserError("--gan-weight 0, --dm-weight 0 and --adm-reg-weight 0: nothing is left to train on")
    if flags.gan_weight > 0 and flags.critic_weight == 0:
        raise common.UserError("--critic-weight 0: the head would never learn; --gan-weight 0 switches the GAN off")


@common.command
def main(argv=None):
    """ADM of one student that covers every class, from the DM student that dmd.py left: msd.py with K = 1, without its figures."""
    flags = common.parse(Flags, PRESETS_ALL, argv, __doc__)
    dmd.check_flags(flags)
    check_flags(flags)
    if flags.dry_run:
        print(common.describe(flags))
        return
    if flags.student_size:
        raise common.UserError(f"--student-size {flags.student_size}: python msd.py --students 1 --student-size {flags.student_size} "
                               f"--stages tsm,dm,adm trains smaller students")
    if flags.teacher == "exact":
        raise common.UserError("--teacher exact: python msd.py --teacher exact --students 1 --stages dm,adm also makes the weights it needs")
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    facts = data.facts(flags.dataset, flags.resolution)
    members = [common.Member(seed, 1, 0, tuple(range(facts.classes))) for seed in edm.seeds(flags)]
    starts = [dmd.start_from(dmd.stage_folder(flags, m.seed, 1), "best.pt", 0) for m in members]
    if ranks.rank == 0:
        print(f"adm: one student of {flags.dataset}, {flags.adm_steps} updates of batch {flags.adm_batch}, on {device}, into {flags.out}")
    source = data.opened(flags, ranks)
    with common.alone(Path(flags.out), ranks):
        inputs = dmd.get_inputs(flags, device, ranks)
    distil(flags, members, [torch.arange(flags.pairs)] * len(members), starts, inputs, real_data(flags, inputs, source), device, ranks)
    for m in members if ranks.rank == 0 else ():
        print(f"seed {m.seed}: {dmd.stage_folder(flags, m.seed, 1, 'adm')}")
    common.leave(ranks)


def real_data(flags: Flags, inputs: dmd.Inputs, source):
    """--real: what gives the real data when called: the dataset's source, or one of the teacher's samples."""
    if flags.real == "data":
        return source
    return lambda: data.Generated(inputs.pairs["y"], inputs.pairs["label"], edm.seeds(flags))


PRESETS_ALL = common.merge(tsm.PRESETS_ALL, PRESETS)

if __name__ == "__main__":
    main()
