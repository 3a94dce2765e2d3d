"""Stage 1, DM: a one-step generator whose samples are distributed as the teacher's [MSD Sec. 3.2, App. I.2].

Trains G(sigma_max z; sigma_max, label) and, beside it, a "fake" denoiser mu_fake of G's own samples; both start as the
teacher. Two flags choose between the paper's two variants of DM:
  DMD    --reg-weight 0.4  --ttur 2     a regression loss on pairs (z, y) of the teacher's ODE keeps the modes
  DMD2   --reg-weight 0    --ttur 5     no pairs; the fake denoiser takes N updates per update of G (TTUR)

  gradient of the KL divergence          [MSD Eq. 5, Eq. 6]        dm_gradient, kl_gradient, dm_loss
  the scores in it, as denoisers         [MSD Eq. 7]               dm_gradient: x_t cancels
  the fake denoiser's loss               [MSD Eq. 8]               edm.denoising_loss
  regression loss on the pairs           [MSD Eq. 9]               regression_loss, lpips_distance

Not here: the partition and F_DM (msd.py), the pairs (teacher.py), the adversarial head (adm.py).

Departures from the paper, on the toy (`--preset paper`: App. D.1's numbers; where it is silent, D.2.1's and DMD's)
 1. The KL term's lowest noise bin falls from 200 to 0 in the first 60 % of the updates (--anneal): under much noise
    modes still exchange mass, sharp ones no longer do. mu_fake gets a head start (--fake-warmup).
 2. w_t = sigma^2 / c_out(sigma): the paper's sigma^2 / mean |x - mu_real| divides, in 2-D, by a mean of two numbers.
 3. The KL term sees bins 0 to 300 of 1000 (sigma <= 0.32), not 0 to 749: the rings have radius 0.1.
 4. Four noise draws per sample, one per quarter of the bins, averaged: they need no backward pass through G.
 5. AdamW betas (0.5, 0.99) and two updates of mu_fake per update of G: mu_fake lags behind G, and momentum 0.9 turns
    that lag into oscillation: modes come and go.
 6. RMS distance, at weight 0.4, for LPIPS at 0.25, which needs images.
 7. An average of G's weights is kept, at the best of several evaluations, its start among them, on latents
    that are not reported [App. E].
 8. 2 500 updates at 1e-2 and 5e-3 that decay linearly, not 200 000 at 1e-7.
On the small images (fashion-mnist): 7, the betas of 5, regression alone at first and a head start for mu_fake, larger
learning rates that decay linearly, and the RMS distance for LPIPS, which costs a hundred times the network; w_t and the
weight 0.25 are the paper's, the KL term's bins DMD's.

Run      python dmd.py --dataset toy
"""
import math
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F

import edm
from common import AdamW, Average, Batch, learning_rate
from edm import level
from flags import Bins, UserError, flag
from run import reading

NAME, BY = "dm", "select"
USES = dict(sampler_steps="teacher.sampler_steps")  # what its result depends on beside its own flags


@dataclass
class Flags:
    """Stage 1, DM; what DM shares with ADM, CD and post-distillation"""
    prefix = ""
    steps: int = flag(2500, "updates of the generator", low=1)
    batch: int = flag(128, "batch per student", low=1)
    lr: float = flag(1e-2, "learning rate of G (AdamW) with the KL term", low=0)
    reg_lr: float = flag(1e-2, "learning rate of G while it trains by regression alone", low=0)
    fake_lr: float = flag(5e-3, "learning rate of the fake denoiser", low=0)
    beta1: float = flag(0.5, "AdamW's first beta, of G and mu_fake: 0.9 makes them oscillate", low=0, below=1)
    beta2: float = flag(0.99, "AdamW's second beta", low=0, below=1)
    decay: str = flag("linear", "schedule of both learning rates", choices=("linear", "cosine", "constant"))
    warmup: int = flag(100, "warm-up updates, at the start and again when the KL term sets in", low=0)
    clip_norm: float = flag(0.0, "clip each student's gradient norm; 0 = off", low=0)
    ema: float = flag(0.99, "decay of the average of G's weights (what is kept and sampled)", low=0, below=1)
    dm_weight: float = flag(1.0, "weight of the KL term; 0 = regression only", low=0)
    reg_weight: float = flag(0.4, "weight of the regression term beside the KL term; 0 = none", low=0)
    reg_warmup: int = flag(0, "first updates of G by regression alone (its weight is then 1)", low=0)
    fake_warmup: int = flag(400, "head start of mu_fake: updates when the KL term sets in, and at ADM's start", low=0)
    ttur: int = flag(2, "updates of the fake denoiser per update of G", low=1)
    draws: int = flag(4, "noise draws per generated sample in the KL term", low=1)
    bins: Bins = flag(Bins(0, 300), "lowest and highest noise bin of the KL term, of 1000")
    anneal: int = flag(200, "lowest noise bin at first; falls to that of --bins in 60 % of the updates of the KL term",
                       low=0, below=1000)
    normaliser: str = flag("c_out", "divisor of mu_fake - mu_real in the KL term", choices=("mean_abs", "c_out"))
    distance: str = flag("l2", "l of the regression and of CD: root mean square, mean square, or LPIPS (VGG)",
                         choices=("l2", "mse", "lpips"))
    filter_pairs: bool = flag(False, "keep only the pairs of a student's own classes: what App. B.4 rejects")
    conditioning_sigma: float = flag(edm.SIGMA_MAX, "noise level at which G generates [MSD App. D.4]", low=0.002,
                                     below=81, name="conditioning_sigma")
    pairs: int = flag(1000, "pairs (z, y) from the teacher's ODE, a fixed set", low=1)
    select_samples: int = flag(16_000, "samples per student of each evaluation that chooses best.pt", low=8)
    eval_every: int = flag(250, "updates between the evaluations that choose best.pt", low=1)

    @property
    def fake_bins(self) -> Bins:
        """The fake denoiser trains on 20 bins more at either end, where there are so many, as in DMD."""
        return Bins(max(0, self.bins.low - 20), min(999, self.bins.high + 20))


# DMD, where the paper is silent: 1:1, bins 20 to 980 for the KL term, warm-up, no EMA
DMD = dict(beta1=0.9, beta2=0.999, decay="constant", warmup=500, clip_norm=10.0, ema=0.0, reg_weight=0.25, reg_warmup=0,
           fake_warmup=0, ttur=1, draws=1, anneal=0, bins=(20, 980), normaliser="mean_abs")
PRESETS = {
    # App. D.1: 200 000 iterations, 1e-7, 1000 pairs, "the first 750 of the 1000 steps" (mu_fake: 770)
    ("toy", "paper"): dict(DMD, bins=(0, 749), steps=200_000, lr=1e-7, reg_lr=1e-7, fake_lr=1e-7, eval_every=5000),
    ("toy", "smoke"): dict(steps=12, batch=16, reg_warmup=4, fake_warmup=3, warmup=2, pairs=64, eval_every=6,
                           select_samples=400),
    # ours, for 2 CPU cores
    ("fashion-mnist", "default"): dict(steps=700, batch=64, lr=5e-4, reg_lr=1e-3, fake_lr=2e-3, reg_weight=0.25,
                                       reg_warmup=400, fake_warmup=150, ttur=1, draws=1, anneal=0, bins=(20, 980),
                                       normaliser="mean_abs", pairs=10_000, select_samples=2000, eval_every=100,
                                       ema=0.995, warmup=50),
    ("fashion-mnist", "smoke"): dict(steps=6, batch=4, reg_warmup=2, fake_warmup=2, ttur=1, warmup=1, pairs=40,
                                     eval_every=3, select_samples=40, anneal=0, bins=(0, 700)),
    # DMD's CIFAR-10 run where it is known, ours elsewhere; not run to its end
    ("cifar10", "default"): dict(DMD, steps=300_000, batch=256, lr=5e-5, reg_lr=5e-5, fake_lr=5e-5, distance="lpips",
                                 pairs=100_000, select_samples=10_000, eval_every=5000),
    ("cifar10", "smoke"): dict(steps=3, batch=2, reg_warmup=1, fake_warmup=1, warmup=1, pairs=20, eval_every=3,
                               anneal=0, select_samples=20),
    # [MSD App. D.2.1]; batches of smaller students: D.2.2
    ("imagenet64", "default"): dict(DMD, steps=200_000, batch=128, lr=2e-6, reg_lr=2e-6, fake_lr=2e-6, distance="lpips",
                                    pairs=10_000, select_samples=10_000, eval_every=5000),
    **{("imagenet64", "default", size): dict(batch=n) for size, n in (("S", 160), ("XS", 224), ("XXS", 256))},
}


# ---- the losses

def dm_gradient(x: Tensor, mu_real: Tensor, mu_fake: Tensor, sigma: Tensor, normaliser: str = "mean_abs",
                sigma_data: float = 0.5) -> Tensor:
    """Gradient of the KL divergence in the generated sample x, [..., *shape] [MSD Eq. 6].

    With scores s(x_t) = -(x_t - mu) / sigma^2 [MSD Eq. 7], w_t (s_fake - s_real) = (w_t / sigma^2) (mu_fake - mu_real):
    x_t cancels. A step against it moves x towards mu_real and away from mu_fake. The paper's w_t = sigma^2 CS /
    ||mu_real - x||_1 [MSD App. D.2.1] divides by the sample's mean |x - mu_real| (`mean_abs`); `c_out` divides by
    c_out(sigma): the gradient is in units of the network's output. No gradient flows through it."""
    if normaliser == "mean_abs":  # the floor: where x is already what mu_real says
        scale = edm.per_sample((x - mu_real).abs()).clamp(min=1e-5)
    else:  # c_out
        scale = sigma * sigma_data / (sigma ** 2 + sigma_data ** 2).sqrt()
    return ((mu_fake - mu_real) / edm.like(scale, x)).detach()


@torch.no_grad()
def kl_gradient(x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor, teacher, mu_fake, normaliser: str) -> tuple:
    """`dm_gradient` [M, b, *shape] of samples x, averaged over n noise draws each, and the gap |mu_fake - mu_real| [M].

    sigma [M, b, n], noise [M, b, n, *shape]: the same diffused x_t goes to both denoisers, with the sample's label."""
    b, n = sigma.shape[1:]
    sigma, noise = sigma.flatten(1), noise.flatten(1, 2)
    x, label = x.repeat_interleave(n, 1), label.repeat_interleave(n, 1)  # [M, b n, *shape]
    x_t = x + edm.like(sigma, x) * noise
    D_real, D_fake = teacher(x_t, sigma, label), mu_fake(x_t, sigma, label)
    grad = dm_gradient(x, D_real, D_fake, sigma, normaliser)
    return grad.unflatten(1, (b, n)).mean(2), edm.per_sample((D_fake - D_real).abs()).mean(-1)


def dm_loss(x: Tensor, grad: Tensor) -> Tensor:
    """Surrogate [...] of the KL divergence: its gradient in x is grad / elements of one sample [MSD Eq. 6].

    Half the mean square of x - stop(x - grad): the value means nothing, the derivative is all."""
    return 0.5 * edm.per_sample((x - (x - grad).detach()) ** 2)


def regression_loss(x: Tensor, y: Tensor, distance="l2") -> Tensor:
    """l(G(z), y), per sample [...] [MSD Eq. 9]; x = G(sigma z) (one_step), y the teacher's sample from the same z.

    l2: root mean square; mse: mean square; or a function such as `lpips_distance` returns."""
    if callable(distance):
        return distance(x, y)
    if distance == "l2":
        gap = (x - y).flatten(-3) if x.ndim > 3 else x - y
        return torch.linalg.vector_norm(gap, dim=-1) / math.sqrt(gap.shape[-1])
    return edm.per_sample((x - y) ** 2)


LPIPS_BYTES, LPIPS_MULTIPLY_ADDS = 117 << 20, 46e9  # of a sample: kept for the pass back; of y once, of x both ways


def with_lpips(flags) -> list:
    """The stages that compare by LPIPS."""
    on = {"dm": flags.dm.reg_weight > 0, "post": True, "cd": True}
    return [name for name in flags.order() if on.get(name) and flags.dm.distance == "lpips"]


def lpips_distance(device, random_weights: bool = False):
    """LPIPS with the VGG trunk of the lpips library, images enlarged to 224 bilinearly [MSD App. D.2.1].

    Returns distance(x, y) -> [...] for x, y [..., C, H, W] in [-1, 1]; grey images are repeated to three channels.
    UserError if VGG's weights are neither here nor can be fetched; random_weights: without them, for tests."""
    import lpips  # slow to import, and only here
    where = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    try:
        with reading(where, "torchvision's VGG-16 weights; --distance l2 needs none"):
            net = lpips.LPIPS(net="vgg", pnet_rand=random_weights, verbose=False).to(device)
    except URLError as error:
        raise UserError(f"--distance lpips: could not fetch {where.name} ({error.reason}): put it at {where}, "
                        "or take --distance l2") from None
    net.requires_grad_(False).eval()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        def enlarged(v: Tensor) -> Tensor:
            return F.interpolate(v.flatten(0, -4).expand(-1, 3, -1, -1), (224, 224), mode="bilinear")
        return net(enlarged(x), enlarged(y.to(x.dtype))).reshape(x.shape[:-3])
    return distance


def one_step(G, z: Tensor, label: Tensor | None) -> Tensor:
    """x = G(sigma z; sigma, label), sigma = G.sigma_in, by default sigma_max: z [..., *shape] has unit variance and is
    scaled here, exactly once.

    label [...] (int64), or None: without a class."""
    lead = z.shape[:1] if label is None else label.shape
    return G(G.sigma_in * z, torch.full(lead, G.sigma_in, dtype=z.dtype, device=z.device), label)


@torch.no_grad()
def fresh(G, batch: Batch) -> tuple[Tensor, Tensor]:
    """New samples x [M, b, *shape] of G, and their labels [M, b], for the fake denoiser."""
    label = batch.label()
    return one_step(G, batch.normal("z"), label), label


def in_strata(u: Tensor, low: int, high: int) -> Tensor:
    """Noise bins [M, b, n], low to high, from uniform u; a sample's n draws fall into equal strata, one each."""
    u = (u + torch.arange(u.shape[-1], device=u.device)) / u.shape[-1]
    return (low + u * (high + 1 - low)).long().clamp(max=high)


# ---- training

def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.dm.steps, flags.dm.batch


def passes(flags) -> tuple[int, int]:
    """See edm.passes."""
    f, first = flags.dm, min(first_kl_step(flags.dm), flags.dm.steps)
    kl, head = f.steps - first, f.fake_warmup if first < f.steps else 0
    turns = kl * f.ttur + head - f.ttur * (first == 0 < head)  # the head start is at step 0 then, in its turns' place
    drawn = turns - kl  # an update's first turn has its samples
    return kl * f.draws * (edm.guided(flags) + 1) + 3 * turns, 3 * kl + 3 * f.steps * (f.reg_weight > 0) + drawn


def first_kl_step(f: Flags) -> int:
    """The update at which the KL term sets in: after the regression phase, if there is one; never without a KL term."""
    return f.steps if f.dm_weight == 0 else f.reg_warmup if f.reg_weight > 0 else 0


def schedule(f: Flags, step: int) -> tuple[bool, float, float, int, Bins]:
    """Of an update: is the KL term on? learning rates of G and of mu_fake; turns of mu_fake; noise bins of the KL term.

    First regression alone, its last update with mu_fake's head start; then both, with a new warm-up and decay. The
    KL term begins with the upper bins: under much noise modes exchange mass, which sharp ones no longer can."""
    first = first_kl_step(f)
    kl = step >= first
    begin, end = (first, f.steps) if kl else (0, first)
    rate = learning_rate(1.0, step - begin, end - begin, f.warmup, f.decay)
    lr = rate * (f.lr if kl else f.reg_lr)
    left = 1 - (step - first) / (0.6 * max(1, f.steps - first))  # of the annealing
    bins = Bins(max(f.bins.low, round(f.anneal * left)), f.bins.high)
    if f.fake_warmup > 0 and step == max(0, first - 1) and first < f.steps:  # the head start
        return kl, lr, f.fake_lr, f.fake_warmup, bins
    return kl, lr, f.fake_lr * rate, f.ttur if kl else 0, bins


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Distil the stack task.G by distribution matching [MSD Eq. 2, first line]; returns {file: the weights to keep
    in it}.

    task.teacher, task.mu_fake: denoisers (x, sigma, label) -> [M, b, *shape]; task.pairs: draws from D_paired."""
    f, G, mu_fake = flags.dm, task.G, task.mu_fake                  # mu_fake starts as the teacher; so may G
    betas = f.beta1, f.beta2
    average = Average(G, f.ema, task.select)                        # of G's weights; of each student the best, too
    opt_G, opt_fake = AdamW(G, run, betas, f.clip_norm), AdamW(mu_fake, run, betas, f.clip_norm)
    state = dict(G=G, mu_fake=mu_fake, **average.state(), opt_G=opt_G, opt_fake=opt_fake)

    for step in run.steps(state):                                   # goes on where the last checkpoint stands
        if step == 0:
            average.choose(run, 0, f.eval_every)                    # the start may be kept, too
        kl, lr, fake_lr, turns, bins = schedule(f, step)
        regression = gap = fake_losses = sigma = None               # what this phase does not train is not logged

        # the generator's turn
        made = []
        for batch in run.batches(step):                             # one, unless ranks or --micro-batch ask for more
            losses = 0.0                                            # [M, b]: of M students, b samples each
            if kl:
                label = batch.label()                               # of Y_k alone: F_DM
                x = one_step(G, batch.normal("z"), label)           # [M, b, *shape]
                sigma = level(in_strata(batch.uniform("sigma", f.draws), *bins))                # [M, b, n]
                noise = batch.normal("noise", f.draws)              # [M, b, n, *shape]
                grad, gap = kl_gradient(x, label, sigma, noise, task.teacher, mu_fake, f.normaliser)
                losses = f.dm_weight * dm_loss(x, grad)             # [MSD Eq. 6]
                made.append((x.detach(), label))
            if f.reg_weight > 0:
                z, y, paired_label = task.pairs(batch)              # of every class: F_DM keeps the pairs whole
                regression = regression_loss(one_step(G, z, paired_label), y, task.distance)    # [MSD Eq. 9]
                losses = losses + (f.reg_weight if kl else 1.0) * regression
            opt_G.backward(losses)
        opt_G.step(step, lr)
        average.update(step)

        # the fake denoiser's turns: the first on the samples just made, the others on fresh ones
        for turn in range(turns):
            for i, batch in enumerate(run.batches(step, f"fake {{}} {turn}")):
                x, label = made[i] if turn == 0 and kl else fresh(G, batch)
                sigma = level(batch.integers("sigma", *f.fake_bins))                            # [M, b]
                fake_losses = edm.denoising_loss(mu_fake, x, label, sigma, batch.normal("noise"))       # [MSD Eq. 8]
                opt_fake.backward(fake_losses)
            opt_fake.step(step, fake_lr)

        if (step + 1) % 50 == 0:
            bands = edm.by_band(fake_losses, sigma, "fake loss")    # of the last micro-batch, as all logs
            run.log(step + 1, regression=regression, gap=gap, **bands)
        average.choose(run, step + 1, f.eval_every)                 # each student by its own classes [MSD App. E]
        run.save(step + 1, state)
    return {"best.pt": average.best, "ema.pt": average.now}


if __name__ == "__main__":
    import msd
    msd.alone(NAME)
