"""Stage 2, ADM: distribution matching with an adversarial head; real data enter [MSD Sec. 3.2, App. I.3].

Goes on training the one-step generators of stage 1 (dmd.py); with real data, a student can surpass its teacher. A small
head on the bottleneck of the fake denoiser tells real data from G's samples, both noised first; G is pushed by the KL
term, as before, and by the head. Fake denoiser and head are one network, the critic, trained together, with several
updates per update of G (TTUR). No pairs, no regression.

  G_k^(2) = Distill_ADM(mu_teacher, F_ADM(D, Y_k); G_k^(1))    [MSD Eq. 2, Eq. 4]     train
  the KL term, the fake denoiser's loss                         [MSD Eq. 6, Eq. 8]     dmd.py, edm.denoising_loss
  non-saturating logistic GAN on noised samples                 [MSD App. I.3]         generator_loss, critic_loss
  head: 4 x 4 convolutions, group norm, SiLU                    [MSD App. D.2.1]       Head, Critic

G starts from each student's best DM checkpoint; its best ADM checkpoint is the nearest to real data, on draws that are
not reported. The fake denoiser starts again as the teacher, as the paper found better. `--gan-weight 0`:
the KL term alone, no regression: the control. Not here: F_ADM (msd.py).

What is healthy (gan.png): the distance falls; the critic is right on a little more than half; its loss stays a little
below 2 log 2, G's a little above log 2, both flat. Right on nearly all: G is losing. On half throughout: the head
learns nothing. More: docs/faq.md.

Departures from the paper
 1. "Middle block", "probability": the encoder's last block and a logit, as in the code that the paper builds on.
 2. "Re-initialize the fakescore and GAN classifier model from teacher weights" (App. D.2.1): the teacher has no
    head, so the head is random. Noise over all bins, TTUR of 5: DMD2's. --adm-steps counts updates of G (DMD2: of
    mu_fake). G's start is a candidate for the best checkpoint.
 3. On the toy and on the small images: TTUR of 2; mu_fake and head get a head start (--fake-warmup) at G's first
    update; larger learning rates that decay; an average of G's weights is kept.
 4. The toy: a small MLP for a head on ToyNet's middle layer, GAN weights 0.03 and 1, and the head sees bins 0 to 100 of
    1000 (sigma <= 0.017): above, real and generated samples look alike to it.

Run      python adm.py --dataset toy                  after python dmd.py --dataset toy
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dmd
import edm
import unet
from common import AdamW, Average, Batch, generator, learning_rate
from edm import level
from flags import Bins, flag

NAME, BY = "adm", "real_select"
USES = {name: f"dm.{name}" for name in ("beta1", "beta2", "decay", "warmup", "clip_norm", "ema", "dm_weight", "draws",
                                        "bins", "normaliser", "select_samples", "eval_every", "conditioning_sigma")}
USES |= {"adm_fake_warmup": "dm.fake_warmup", "real": "real"}


@dataclass
class Flags:
    """Stage 2, ADM"""
    prefix = "adm_"
    steps: int = flag(1000, "updates of the generator", low=1)
    batch: int = flag(128, "batch per student", low=1)
    lr: float = flag(5e-4, "learning rate of G (AdamW)", low=0)
    fake_lr: float = flag(5e-3, "learning rate of the fake denoiser and the head", low=0)
    ttur: int = flag(2, "updates of the fake denoiser and the head per update of G", low=1)
    gan_weight: float = flag(0.03, "weight of the GAN loss in G's loss; 0 = no GAN: the KL term alone", low=0,
                             name="gan_weight")
    critic_weight: float = flag(1.0, "weight of the GAN loss in the critic's loss", low=1e-12, name="critic_weight")
    gan_bins: Bins = flag(Bins(0, 100), "lowest and highest noise bin of what the head sees, of 1000", name="gan_bins")


PAPER = dict(gan_weight=3e-3, critic_weight=1e-2, gan_bins=(0, 999), ttur=5)  # [MSD App. D.2.1]; TTUR, bins: DMD2
PRESETS = {
    ("toy", "paper"): dict(PAPER, steps=100_000, lr=1e-7, fake_lr=1e-7),  # the paper has no ADM on its toy
    ("toy", "smoke"): dict(steps=9, batch=16),
    # ours, for 2 CPU cores
    ("fashion-mnist", "default"): dict(PAPER, steps=300, batch=64, lr=2e-4, fake_lr=1e-3, ttur=2),
    ("fashion-mnist", "smoke"): dict(PAPER, steps=4, batch=4, ttur=2),
    ("cifar10", "default"): dict(PAPER, steps=100_000, batch=256, lr=5e-6, fake_lr=5e-6),
    ("cifar10", "smoke"): dict(PAPER, steps=2, batch=2, ttur=1),
    # [MSD App. D.2.1], 150 000 iterations read as updates of G; smaller students: D.2.2 (S), B.6 (XS, XXS: "the same
    # learning rate of 2e-6")
    ("imagenet64", "default"): dict(PAPER, steps=150_000, batch=192, lr=5e-7, fake_lr=5e-7),
    ("imagenet64", "default", "S"): dict(batch=160),
    ("imagenet64", "default", "XS"): dict(batch=224, lr=2e-6, fake_lr=2e-6),
    ("imagenet64", "default", "XXS"): dict(batch=256, lr=2e-6, fake_lr=2e-6),
}


# ---- the losses

def generator_loss(logit: Tensor) -> Tensor:
    """softplus(-logit) [...] of generated samples: non-saturating; 0 where they are taken for real [MSD App. I.3]."""
    return F.softplus(-logit)


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(fake) + softplus(-real) [...]: its minimiser is the logit log p_real / p_fake [MSD App. I.3]."""
    return F.softplus(fake) + F.softplus(-real)


class Head(nn.Module):
    """Bottleneck [M, B, *shape] -> logit [M, B]: is this sample real?

    shape (C, h, w): 4 x 4 convolutions of stride 2 down to 4 x 4, one more over all of it, group norm and SiLU after
    each, and a linear layer [MSD App. D.2.1]; M = 1. shape (width,): an MLP per student. seeds: M, of the weights."""

    def __init__(self, shape: tuple[int, ...], seeds: list[int]):
        super().__init__()
        self.net = None
        if len(shape) == 3:
            channels, side = shape[:2]
            layers, conv = [], dict(kernel_size=4, stride=2, padding=1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(edm.PYTORCH_SEED + seeds[0])
                while side > 4:
                    layers += [nn.Conv2d(channels, channels, **conv), unet.Norm(channels), nn.SiLU()]
                    side //= 2
                layers += [nn.Conv2d(channels, channels, side), unet.Norm(channels), nn.SiLU()]
                layers.append(nn.Conv2d(channels, 1, 1))
            self.net = nn.Sequential(*layers)
        else:
            width = shape[0]

            def normal(name: str, *size: int, std: float) -> nn.Parameter:
                drawn = [std * torch.randn(size, generator=generator(s, "head", name)) for s in seeds]
                return nn.Parameter(torch.stack(drawn))
            self.w0, self.b0 = normal("w0", width, width, std=width ** -0.5), normal("b0", 1, width, std=0.1)
            self.w1, self.b1 = normal("w1", width, width, std=width ** -0.5), normal("b1", 1, width, std=0.1)
            self.w2, self.b2 = normal("w2", width, 1, std=0.1 * width ** -0.5), normal("b2", 1, 1, std=0.0)

    def forward(self, h: Tensor) -> Tensor:
        if self.net is not None:
            return self.net(h.flatten(0, -4)).reshape(h.shape[:-3])
        h = F.silu(torch.baddbmm(self.b0, h, self.w0))
        h = F.silu(torch.baddbmm(self.b1, h, self.w1))
        return torch.baddbmm(self.b2, h, self.w2)[..., 0]


class Critic(nn.Module):
    """mu_fake and a head on its bottleneck, one network: a denoiser of G's samples, and a logit [MSD App. I.3]."""

    def __init__(self, mu_fake: edm.Precond, head: Head):
        super().__init__()
        self.mu_fake, self.head = mu_fake, head

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """mu_fake(x; sigma, label) [..., *shape]."""
        return self.mu_fake(x, sigma, label)

    def logit(self, x_t: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Is the diffused sample x_t [M, B, *shape], of this class, real? [M, B]"""
        return self.head(self.mu_fake.bottleneck(x_t, sigma, label))


def noised(x: Tensor, batch: Batch, bins: Bins) -> tuple[Tensor, Tensor]:
    """What the head sees of x [M, b, *shape]: x + sigma n, and sigma [M, b], of these bins."""
    sigma = level(batch.integers("sigma", *bins))
    return x + edm.like(sigma, x) * batch.normal("noise"), sigma


# ---- training

def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.adm.steps, flags.adm.batch


def passes(flags) -> tuple[int, int]:
    """See edm.passes; a critic's look counts as a whole pass."""
    f, dm, gan = flags.adm, flags.dm, flags.adm.gan_weight > 0
    turns = f.ttur * f.steps + dm.fake_warmup
    of_G = dm.draws * (edm.guided(flags) + 1) + 2 * gan
    return f.steps * of_G + turns * (3 + 6 * gan), 2 * f.steps + turns  # the first turn has its samples


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Train the stack task.G against the critic [MSD Eq. 2, second line]; returns {file: the weights to keep in it}.

    task.teacher, task.mu_fake: denoisers (x, sigma, label) -> [M, b, *shape]; task.real: draws from D_real."""
    f, dm, G, gan = flags.adm, flags.dm, task.G, flags.adm.gan_weight > 0
    head = Head(task.mu_fake.net.bottleneck, [s.seed for s in run.students]).to(run.ranks.device)
    critic = Critic(task.mu_fake, head)                             # mu_fake starts again as the teacher
    betas = dm.beta1, dm.beta2
    average = Average(G, dm.ema, task.select)                       # of G's weights; of each student the best, too
    opt_G, opt_critic = AdamW(G, run, betas, dm.clip_norm), AdamW(critic, run, betas, dm.clip_norm)
    state = dict(G=G, critic=critic, **average.state(), opt_G=opt_G, opt_critic=opt_critic)

    for step in run.steps(state):                                   # goes on where the last checkpoint stands
        if step == 0:
            average.choose(run, 0, dm.eval_every)                   # stage 1's checkpoint is the first candidate
        rate = learning_rate(1.0, step, f.steps, dm.warmup, dm.decay)
        gan_G = gan_critic = right_real = right_fake = None         # without a GAN

        # the generator's turn; the critic is only looked at
        critic.requires_grad_(False)
        made = []
        for batch in run.batches(step):
            label = batch.label()                                   # of Y_k alone: F_ADM
            x = dmd.one_step(G, batch.normal("z"), label)           # [M, b, *shape]
            sigma = level(dmd.in_strata(batch.uniform("sigma", dm.draws), *dm.bins))            # [M, b, n]
            noise = batch.normal("noise", dm.draws)                 # [M, b, n, *shape]
            grad, _ = dmd.kl_gradient(x, label, sigma, noise, task.teacher, critic, dm.normaliser)
            losses = dm.dm_weight * dmd.dm_loss(x, grad)            # [MSD Eq. 6]
            if gan:
                gan_G = generator_loss(critic.logit(*noised(x, replace(batch, of="gan {}"), f.gan_bins), label))
                losses = losses + f.gan_weight * gan_G             # [MSD App. I.3]
            pushes = gan_metrics(x, grad, gan_G, dm.dm_weight, f.gan_weight) if (step + 1) % 50 == 0 else {}
            opt_G.backward(losses)
            made.append((x.detach(), label))
        opt_G.step(step, f.lr * rate)
        average.update(step)

        # the critic's turns: the first on the samples just made, the others on fresh ones; at step 0 a head start
        critic.requires_grad_(True)
        head.requires_grad_(gan)
        head_start = dm.fake_warmup if step == 0 else 0
        before = step * f.ttur + (dm.fake_warmup if step else 0)    # turns before this step: which real data come next
        for turn in range(f.ttur + head_start):
            for i, batch in enumerate(run.batches(step, f"fake {{}} {turn}")):
                x, label = made[i] if turn == 0 else dmd.fresh(G, batch)
                sigma = level(batch.integers("sigma", *dm.fake_bins))                           # [M, b]
                losses = fake_losses = edm.denoising_loss(critic, x, label, sigma, batch.normal("noise"))  # [MSD Eq. 8]
                if gan:
                    x_real, y = task.real(batch, before + turn)     # of Y_k
                    logit_real = critic.logit(*noised(x_real, replace(batch, of=f"real {turn} {{}}"), f.gan_bins), y)
                    logit_fake = critic.logit(*noised(x, replace(batch, of=f"fake {turn} {{}}"), f.gan_bins), label)
                    gan_critic = critic_loss(logit_real, logit_fake)
                    losses = losses + f.critic_weight * gan_critic  # [MSD App. I.3]
                    right_real, right_fake = (logit_real > 0).float(), (logit_fake < 0).float()
                opt_critic.backward(losses)
            opt_critic.step(step, f.fake_lr * (rate if step else 1.0))

        if (step + 1) % 50 == 0:
            run.log(step + 1, **pushes, **{"fake loss": fake_losses, "GAN loss of the critic": gan_critic,
                                           "right on real": right_real, "right on fake": right_fake})
        average.choose(run, step + 1, dm.eval_every)                # each student by its own classes [MSD App. E]
        run.save(step + 1, state)
    return {"best.pt": average.best, "ema.pt": average.now}


def gan_metrics(x: Tensor, grad: Tensor, gan_G: Tensor | None, dm_weight: float, gan_weight: float) -> dict:
    """How hard DM term and GAN push a sample: RMS [M, b] of each weighted loss's gradient in x; the GAN loss of G."""
    def rms(v: Tensor) -> Tensor:
        return edm.per_sample(v ** 2).sqrt()
    out = {"push of the DM term": dm_weight * rms(grad) / grad[0, 0].numel()}
    if gan_G is not None:
        push, = torch.autograd.grad(gan_G.sum(), x, retain_graph=True)
        out |= {"GAN loss of G": gan_G, "push of the GAN": gan_weight * rms(push)}
    return out


if __name__ == "__main__":
    import msd
    msd.alone(NAME)
