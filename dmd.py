"""Stage 1, DM: a one-step generator whose samples are distributed as the teacher's [MSD Sec. 3.2, App. I.2].

Trains G(sigma_max z; sigma_max, label) and, beside it, a "fake" denoiser mu_fake of G's own samples; both start from the
teacher's weights. Two flags choose between the paper's two variants of DM:
  DMD    --reg-weight 0.25 --ttur 1     a regression loss on pairs (z, y) of the teacher's ODE keeps the modes
  DMD2   --reg-weight 0    --ttur 5     no pairs; the fake denoiser takes N updates per update of G (TTUR)

  gradient of the KL divergence          [MSD Eq. 5, Eq. 6]        dm_gradient, dm_loss
  the scores in it, as denoisers         [MSD Eq. 7]               score
  the fake denoiser's loss               [MSD Eq. 8]               edm.denoising_loss
  regression loss on the pairs           [MSD Eq. 9]               regression_loss, make_pairs, lpips_distance

The preset of imagenet64 is App. D.2.1; the paper does not say how a student's best checkpoint is found during training: here by
the judge, on its own classes. Not here: the partition and F_DM's label sets (msd.py), the adversarial head.

Departures from the paper, on the toy (`--preset paper`: App. D.1's numbers; where it is silent, D.2.1's and DMD's)
 1. G first trains by regression alone (--reg-warmup; precedent: App. D.4) and mu_fake gets a head start (--fake-warmup): at
    sigma = 80 the teacher's weights say "class mean", and from there the KL term loses modes.
 2. w_t = 1 / c_out(sigma): the paper's 1 / mean |x - mu_real| is, in 2-D, a mean of two numbers and often near 0.
 3. The KL term sees bins 0 to 450 of 1000 (sigma <= 1.6), not 0 to 749: the rings have radius 0.1. mu_fake trains on the same.
 4. Four noise draws per sample, one per quarter of the bins, averaged: they need no backward pass through G.
 5. AdamW betas (0.5, 0.99): mu_fake lags behind G, and momentum 0.9 turns that lag into oscillation (modes die and return).
 6. 64 000 pairs at weight 1, not 1 000 at 0.25 (`--preset few-pairs`); RMS distance for LPIPS, which needs images.
 7. An average of G's weights is kept, at the best of several evaluations on draws that are not reported.

Departures on the small images (fashion-mnist): 1, 5, 7, larger learning rates that decay linearly, and the RMS distance for
LPIPS, which costs a hundred times the network; w_t, bins, pairs and the weight 0.25 are the paper's.

Run      python dmd.py --dataset toy
Many GPUs    torchrun --nproc-per-node 8 dmd.py --dataset imagenet64 --teacher edm-imagenet-64x64-cond-adm.pkl
"""
import copy
import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import common
import data
import edm
import fid
from common import flag


@dataclasses.dataclass
class Flags(edm.Flags):
    """The DM stage's flags, beside the teacher's."""
    steps: int = flag(3000, "updates of the generator", "dm", low=1)
    batch: int = flag(128, "batch per student", "dm", low=1)
    lr: float = flag(1e-2, "learning rate of G (AdamW) with the KL term", "dm", low=0)
    reg_lr: float = flag(1e-2, "learning rate of G while it trains by regression alone", "dm", low=0)
    fake_lr: float = flag(5e-3, "learning rate of the fake denoiser", "dm", low=0)
    beta1: float = flag(0.5, "AdamW's first beta, of both: momentum makes the pair of them overshoot", "dm", low=0)
    beta2: float = flag(0.99, "AdamW's second beta", "dm", low=0)
    decay: str = flag("linear", "schedule of both learning rates after warm-up", "dm", ("linear", "cosine", "constant"))
    warmup: int = flag(100, "warm-up updates, at the start and again when the KL term sets in", "dm", low=0)
    clip_norm: float = flag(0.0, "clip each student's gradient norm; 0 = off", "dm", low=0)
    ema: float = flag(0.99, "decay of the average of G's weights (what is kept and sampled)", "dm", low=0)
    dm_weight: float = flag(1.0, "weight of the KL term; 0 = regression only", "dm", low=0)
    reg_weight: float = flag(1.0, "weight of the regression term beside the KL term; 0 = none", "dm", low=0)
    reg_warmup: int = flag(1000, "first updates of G by regression alone (its weight is then 1)", "dm", low=0)
    fake_warmup: int = flag(400, "updates of the fake denoiser before the KL term sets in", "dm", low=0)
    ttur: int = flag(1, "updates of the fake denoiser per update of G", "dm", low=1)
    fake: str = flag("net", "fake denoiser: a network, or a kernel-density estimate (toy only, an oracle)", "dm", ("net", "kde"))
    kde_points: int = flag(2048, "samples per class of the kernel-density estimate", "dm", low=1)
    draws: int = flag(4, "noise draws per generated sample in the KL term", "dm", low=1)
    bins: list[int] = flag([0, 450], "lowest and highest noise bin of the KL term, of 1000", "dm")
    fake_bins: list[int] = flag([0, 450], "lowest and highest noise bin of the fake denoiser's training", "dm")
    normaliser: str = flag("c_out", "w_t of the KL gradient", "dm", ("mean_abs", "c_out"))
    grad_clip: float = flag(0.0, "clip each coordinate of the KL gradient; 0 = off", "dm", low=0)
    distance: str = flag("l2", "regression distance: root mean square, mean square, or LPIPS (VGG)", "dm", ("l2", "mse", "lpips"))
    filter_pairs: bool = flag(False, "keep only the pairs of the student's own classes: the strategy that App. B.4 rejects", "dm")
    bug: str = flag("none", "plant a silent bug, for EXERCISES.md", "dm", ("none", "a", "b", "c"), later=True)
    pairs: int = flag(64_000, "pairs (z, y) from the teacher's ODE, a fixed set", "pairs", low=1)
    select_samples: int = flag(16_000, "samples per student of each such evaluation", "dm", low=8)
    tag: str = flag("", "suffix of the students' folders: variants of one teacher side by side")
    eval_every: int = flag(250, "updates between evaluations, which choose best.pt", "dm", low=1)


PRESETS = {
    ("toy", "default"): {},
    # the paper's 1 000 pairs: regression alone memorises them, so it weighs less and the KL term sets in earlier
    ("toy", "few-pairs"): dict(pairs=1000, reg_weight=0.25, reg_warmup=400, steps=2500),
    # App. D.1: 200 000 iterations, 1e-7, 1000 pairs, "the first 750 of the 1000 steps"; DMD (I.2): regression, 1:1, no EMA
    ("toy", "paper"): dict(steps=200_000, lr=1e-7, reg_lr=1e-7, fake_lr=1e-7, pairs=1000, reg_weight=0.25, beta1=0.9, beta2=0.999, decay="constant", ttur=1, ema=0.0,
                           reg_warmup=0, fake_warmup=0, bins=[0, 749], fake_bins=[0, 749], draws=1, normaliser="mean_abs", clip_norm=10.0,
                           warmup=500, eval_every=5000),
    # ours, for 2 CPU cores
    ("fashion-mnist", "default"): dict(steps=700, batch=64, lr=5e-4, reg_lr=1e-3, fake_lr=2e-3, reg_weight=0.25, reg_warmup=400, fake_warmup=150, bins=[20, 980],
                                       fake_bins=[0, 999], draws=1, normaliser="mean_abs", pairs=10_000, select_samples=2000, eval_every=100, ema=0.995, warmup=50),
    ("fashion-mnist", "smoke"): dict(steps=6, batch=4, reg_warmup=2, fake_warmup=2, warmup=1, pairs=40, eval_every=3, select_samples=40, bins=[0, 700], fake_bins=[0, 750]),
    # DMD's CIFAR-10 run where it is known (regression weight 0.25, 1:1, bins 20 to 980), ours elsewhere; not run to its end
    ("cifar10", "default"): dict(steps=300_000, batch=256, lr=5e-5, reg_lr=5e-5, fake_lr=5e-5, beta1=0.9, beta2=0.999, decay="constant", warmup=500, clip_norm=10.0, ema=0.0,
                                 reg_weight=0.25, reg_warmup=0, fake_warmup=0, draws=1, bins=[20, 980], fake_bins=[0, 999], normaliser="mean_abs",
                                 distance="lpips", pairs=100_000, select_samples=10_000, eval_every=5000),
    ("cifar10", "smoke"): dict(steps=3, batch=2, reg_warmup=1, fake_warmup=1, warmup=1, pairs=20, eval_every=3, select_samples=20),
    # [MSD App. D.2.1] to the letter; where it is silent, DMD: 1:1, bins 20 to 980 for the KL term and all for mu_fake, no EMA
    ("imagenet64", "default"): dict(steps=200_000, batch=128, lr=2e-6, reg_lr=2e-6, fake_lr=2e-6, beta1=0.9, beta2=0.999, decay="constant", warmup=500, clip_norm=10.0, ema=0.0,
                                    reg_weight=0.25, reg_warmup=0, fake_warmup=0, draws=1, bins=[20, 980], fake_bins=[0, 999], normaliser="mean_abs",
                                    distance="lpips", pairs=10_000, select_samples=10_000, eval_every=5000),
    ("toy", "smoke"): dict(steps=12, batch=16, reg_warmup=4, fake_warmup=3, warmup=2, pairs=64, eval_every=6, kde_points=64, select_samples=400),
}
PRESETS["imagenet64", "paper"] = PRESETS["imagenet64", "default"]


# ---------------------------------------------------------------------------------------------------------- the losses

def score(x_t: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """s(x_t, t) = -(x_t - mu(x_t, t)) / sigma_t^2 of the denoised estimate mu [..., *shape] [MSD Eq. 7] (alpha_t = 1)."""
    return -(x_t - mu) / edm.like(sigma, x_t) ** 2


def dm_gradient(x: Tensor, mu_real: Tensor, mu_fake: Tensor, sigma: Tensor, normaliser: str = "mean_abs",
                clip: float | None = None, sigma_data: float = 0.5) -> Tensor:
    """Gradient of the KL divergence in the generated sample x, [..., *shape] [MSD Eq. 6].

    w_t (s_fake - s_real) = (w_t / sigma^2) (mu_fake - mu_real): with scores from Eq. 7, x_t cancels. A step against it moves
    x towards mu_real and away from mu_fake. The paper's w_t = sigma^2 CS / ||mu_real - x||_1 [MSD App. D.2.1] divides by the
    sample's mean |x - mu_real| (`mean_abs`); `c_out` divides by c_out(sigma) instead, so the gradient is in units of the
    network's output. `clip` bounds every coordinate. No gradient flows through it."""
    if normaliser == "mean_abs":                                    # the floor: where x is already what mu_real says
        scale = edm.per_sample((x - mu_real).abs()).clamp(min=1e-5)
    elif normaliser == "c_out":
        scale = sigma * sigma_data / (sigma ** 2 + sigma_data ** 2).sqrt()
    else:
        raise ValueError(f"normaliser {normaliser!r}: mean_abs or c_out")
    grad = (mu_fake - mu_real) / edm.like(scale, x)
    return (grad.clamp(-clip, clip) if clip else grad).detach()


def dm_loss(x: Tensor, grad: Tensor) -> Tensor:
    """Per-sample surrogate [...] of the KL divergence: its gradient in x [..., *shape] is grad / elements of x [MSD Eq. 6].

    Half the mean square of x - stop(x - grad): the value means nothing, the derivative is all."""
    return 0.5 * edm.per_sample((x - (x - grad).detach()) ** 2)


def regression_loss(x: Tensor, y: Tensor, distance="l2") -> Tensor:
    """l(G(z), y), per sample [...] [MSD Eq. 9]; x = G(sigma_max z), y the teacher's sample from the same z.

    l2: root mean square; mse: mean square; or a function such as `lpips_distance` returns."""
    if callable(distance):
        return distance(x, y)
    if distance == "l2":
        gap = (x - y).flatten(-3) if x.ndim > 3 else x - y
        return torch.linalg.vector_norm(gap, dim=-1) / math.sqrt(gap.shape[-1])
    return edm.per_sample((x - y) ** 2)


def lpips_distance(device, random_weights: bool = False):
    """LPIPS with the VGG trunk of the lpips library, images enlarged to 224 bilinearly [MSD App. D.2.1].

    Returns distance(x, y) -> [...] for x, y [..., C, H, W] in [-1, 1]; grey images are repeated to three channels.
    UserError if VGG's weights are neither here nor can be fetched; random_weights: without them, for tests."""
    import lpips                                                    # slow to import, and only here
    try:
        net = lpips.LPIPS(net="vgg", pnet_rand=random_weights, verbose=False).to(device).requires_grad_(False).eval()
    except Exception as error:                                      # urllib and torch raise several types
        where = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
        raise common.UserError(f"--distance lpips needs torchvision's VGG-16 weights and could not fetch them "
                               f"({type(error).__name__}): put vgg16-397923af.pth at {where}, or take --distance l2") from None

    def distance(x: Tensor, y: Tensor) -> Tensor:
        a, b = (F.interpolate(v.flatten(0, -4).expand(-1, 3, -1, -1), (224, 224), mode="bilinear") for v in (x, y.to(x.dtype)))
        return net(a, b).reshape(x.shape[:-3])
    return distance


@torch.no_grad()
def kl_gradient(x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor, teacher, mu_fake, normaliser: str, clip: float,
                sigma_data: float) -> tuple[Tensor, Tensor]:
    """`dm_gradient` [M, b, *shape] of samples x, averaged over n noise draws each, and the gap |mu_fake - mu_real| [M].

    sigma [M, b, n], noise [M, b, n, *shape]: the same diffused x_t goes to both denoisers, with the sample's own label."""
    b, n = sigma.shape[1:]
    sigma, noise = sigma.flatten(1), noise.flatten(1, 2)
    x, label = x.repeat_interleave(n, 1), label.repeat_interleave(n, 1)                         # [M, b n, *shape]
    x_t = x + edm.like(sigma, x) * noise
    mu_real, fake = teacher(x_t, sigma, label), mu_fake(x_t, sigma, label)
    grad = dm_gradient(x, mu_real, fake, sigma, normaliser, clip, sigma_data)
    return grad.unflatten(1, (b, n)).mean(2), edm.per_sample((fake - mu_real).abs()).mean(-1)


def one_step(G, z: Tensor, label: Tensor | None) -> Tensor:
    """x = G(sigma_max z; sigma_max, label): z [..., *shape] has unit variance and is scaled here, exactly once.

    label [...] (int64), None, or, of a network with fixed embeddings, embeddings [..., d] themselves."""
    lead = z.shape[:1] if label is None else label.shape[:-1] if label.is_floating_point() else label.shape
    sigma = torch.full(lead, edm.SIGMA_MAX, dtype=z.dtype, device=z.device)
    return G(edm.SIGMA_MAX * z, sigma, label)


# --------------------------------------------------------------------------------------------------- data for the loop

def make_pairs(teacher, z: Tensor, label: Tensor, steps: int, chunk: int = 8192) -> Tensor:
    """y [..., N, *shape]: where the teacher's deterministic ODE takes each unit-variance latent z [MSD App. D.2.1].

    label is [..., N]. Serves the paired data D_paired as well as the teacher's own samples."""
    lead = label.ndim - 1
    return torch.cat([edm.heun(teacher, a, b, steps) for a, b in zip(z.split(chunk, lead), label.split(chunk, lead))], lead)


def solve(folder: Path, purpose: str, number: int, teacher, facts, seed: int, steps: int, device, ranks, quiet: bool) -> dict:
    """N samples of the teacher with their latents, {"z", "y": [1, N, *shape], "label": [1, N]}, made once and kept.

    Only y is stored, in files of facts.chunk samples (images as float16) that the ranks share out: what is there is not made
    again. z follows from the seed and the purpose, the label from the index."""
    z = torch.randn(1, number, *facts.shape, generator=common.generator(seed, purpose))
    label = data.stratified(number, facts.classes)[None]
    parts = list(zip(z.split(facts.chunk, 1), label.split(facts.chunk, 1)))
    todo = [i for i in ranks.share(len(parts)) if not common.shard(folder, purpose, i).exists()]
    if todo and ranks.rank == 0:
        print(f"{folder}: {number} samples of the teacher ({purpose}), {steps} Heun steps …", flush=True)
    for i in common.bar(todo, f"sampling ({purpose})", len(todo), quiet or ranks.rank > 0):
        y = make_pairs(teacher, parts[i][0].to(device), parts[i][1].to(device), steps)[0].cpu()
        common.save_tensors(common.shard(folder, purpose, i), {"y": y if facts.stacked else y.half()})
    ranks.wait()
    y = common.load_shards(folder, purpose, len(parts))
    if y.shape != z.shape[1:]:
        raise common.UserError(f"{folder}: its samples are {list(y.shape)}, not {list(z.shape[1:])}; delete that folder")
    return {"z": z, "y": y[None], "label": label}


def kde_denoiser(x_t: Tensor, sigma: Tensor, label: Tensor, cloud: Tensor) -> Tensor:
    """E[x0 | x_t] if x0 is one of the generated points in cloud [M, classes, P, 2]: a fake denoiser without a network.

    x_t [M, B, 2]; exact for the empirical distribution of the cloud, so consistent as P grows."""
    out = []
    for x, s, c, points in zip(x_t, sigma, label, cloud):
        near = points[c]                                                                        # [B, P, 2]
        weight = (-(x[:, None] - near).square().sum(-1) / (2 * s[:, None] ** 2)).softmax(-1)    # [B, P]
        out.append((weight[:, None] @ near)[:, 0])
    return torch.stack(out)


@torch.no_grad()
def make_cloud(G, draws, step: int, classes: int, points: int, shape) -> Tensor:
    """Fresh samples [M, classes, points, 2] of every class that a member owns, for `kde_denoiser`."""
    most = max(len(c) for c in draws.classes)
    own = torch.stack([c[torch.arange(most, device=c.device) % len(c)] for c in draws.classes])  # [M, most], some twice
    row = torch.arange(len(own), device=own.device)[:, None]
    z = draws.normal(step, "kde z", classes, points, *shape)[row, own].flatten(1, 2)            # keyed by class: neighbours
    x = one_step(G, z, own.repeat_interleave(points, 1))                                        # in the stack do not matter
    cloud = torch.zeros(len(own), classes, points, *shape, device=x.device)
    cloud[row, own] = x.unflatten(1, (most, points))
    return cloud


def kde_of(G, draws, step: int, classes: int, points: int, shape):
    """A fake denoiser (x, sigma, label) -> D without a network, from fresh samples of G."""
    cloud = make_cloud(G, draws, step, classes, points, shape)
    return lambda x, sigma, label: kde_denoiser(x, sigma, label, cloud)


def pick_pairs(draws, step: int, batch: int, pair_index: list) -> Tensor:
    """Indices [M, batch] of pairs, each member's from those it may use; one stream, however many those are."""
    pick = draws.integers(step, "pair", 0, 2 ** 62, batch)
    return torch.stack([index[p % len(index)] for index, p in zip(pair_index, pick)])


def paired_loss(G, pairs: dict, pick: Tensor, distance) -> Tensor:
    """`regression_loss` [M, b] of G on the pairs `pick` [M, b]; pairs as in `train`."""
    row = pairs["row"][:, None]
    x_ref = one_step(G, pairs["z"][row, pick], pairs["label"][row, pick])
    return regression_loss(x_ref, pairs["y"][row, pick].to(x_ref.dtype), distance)


def bins_in_strata(draws, step: int, purpose: str, low: int, high: int, batch: int, strata: int) -> Tensor:
    """Noise bins [M, batch, strata], uniform on low..high; a sample's draws fall into equal strata, one each."""
    u = draws.uniform(step, purpose, batch, strata)
    u = (u + torch.arange(strata, device=u.device)) / strata
    return (low + u * (high + 1 - low)).long().clamp(max=high)


@torch.no_grad()
def by_band(loss: Tensor, sigma: Tensor, name: str, edges=(0.0, 0.01, 0.1, 1.0, math.inf)) -> dict:
    """Mean of per-sample losses [M, B] within bands of sigma, {name: [M]}: one number over all levels hides what moves."""
    out = {}
    for low, high in zip(edges, edges[1:]):
        band = (sigma >= low) & (sigma < high)
        if band.any(1).all():
            out[f"{name}, {low:g} <= sigma < {high:g}"] = (loss * band).sum(1) / band.sum(1)
    return out


@torch.no_grad()
def own_distance(G, facts, judge, members, references: dict, samples: int, device, ranks) -> Tensor:
    """[M]: distance of each member's samples of its own classes from the reference's of those classes [MSD App. E].

    references: {seed: statistics} kept for selection; the latents differ from the reported ones. The ranks share the samples."""
    samples -= samples % ranks.size
    draws = common.Draws("select", members, device)
    label = torch.stack([c[torch.arange(samples, device=device) % len(c)] for c in draws.classes])
    z = draws.normal(0, "z", samples, *facts.shape)
    part, chunk = ranks.parts(samples)[0], min(4096, facts.chunk)
    x = torch.cat([one_step(G, a, b) for a, b in zip(z[:, part].split(chunk, 1), label[:, part].split(chunk, 1))], 1)
    x = ranks.gather(x.transpose(0, 1)).transpose(0, 1)
    return torch.tensor([judge.distance(judge.statistics(x[i], label[i]), references[m.seed], m.classes)
                         for i, m in enumerate(members)])


# ------------------------------------------------------------------------------------------------------------ training

def first_kl_step(flags: Flags) -> int:
    """The update at which the KL term sets in: after the regression phase, if there is one; never without a KL term."""
    return flags.steps if flags.dm_weight == 0 else flags.reg_warmup if flags.reg_weight > 0 else 0


def train(run: common.Stage, flags: Flags, members, teacher, net, pairs: dict, pair_index: list, judge, references: dict, device,
          fake_net=None):
    """Train the stack of generators that `net` initialises; returns (last, best) averaged weights of each member.

    members: M students, each with its classes Y_k; KL conditions come from these alone [MSD Sec. 3.2, F_DM]
    teacher: denoiser (x, sigma, label) -> mu_real, [M, B, ...], never changed;  net, fake_net: stacks of M Precond nets that G and mu_fake
             start from, copied; without fake_net (students of the teacher's size) both start from `net`
    pairs:   {"z", "y": [seeds, N, *shape], "label": [seeds, N], "row": [M]}, row m tells member m's seed
    pair_index: per member, the pairs it may use: all of them, or `--filter-pairs`;  judge, references: see own_distance"""
    facts = data.facts(flags.dataset, flags.resolution)
    draws, ranks = common.Draws("dm", members, device), run.ranks
    names = [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    G, mu_fake = copy.deepcopy(net), copy.deepcopy(fake_net or net)
    ema, best = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net).requires_grad_(False)
    edm.compiled(flags, G, mu_fake, ema)
    betas = (flags.beta1, flags.beta2)
    opt_G = torch.optim.AdamW(G.parameters(), lr=flags.lr, betas=betas, weight_decay=flags.weight_decay, fused=True)
    opt_fake = torch.optim.AdamW(mu_fake.parameters(), lr=flags.fake_lr, betas=betas, weight_decay=flags.weight_decay, fused=True)
    record = {"distance": torch.full((len(members),), float("inf"))}
    start = run.resume(G=G, mu_fake=mu_fake, ema=ema, best=best, opt_G=opt_G, opt_fake=opt_fake, record=record)

    B, n, shape = flags.batch, flags.draws, facts.shape
    parts = ranks.parts(B, flags.micro_batch)                       # one part, unless ranks or memory ask for more
    (low, high), (fake_low, fake_high) = flags.bins, flags.fake_bins
    grid = edm.sigma_bins().float().to(device)
    distance = lpips_distance(device) if flags.distance == "lpips" and flags.reg_weight > 0 else flags.distance
    first_kl = first_kl_step(flags)
    for step in run.range(start):
        kl = step >= first_kl                                       # two phases, each with its own warm-up and decay
        begin, end = (first_kl, flags.steps) if kl else (0, first_kl)
        rate = common.learning_rate(1.0, step - begin, end - begin, flags.warmup, flags.decay)
        common.set_learning_rate(opt_G, rate * (flags.lr if kl else flags.reg_lr))

        # the generator's turn
        opt_G.zero_grad()
        loss, made = torch.zeros(len(members), device=device), []
        for part in parts:
            terms = 0
            if kl:
                label = draws.label(step, "label", B)[:, part]                                  # [M, b], from Y_k
                x = one_step(G, draws.normal(0 if flags.bug == "c" else step, "z", B, *shape)[:, part], label)
                sigma = grid[bins_in_strata(draws, step, "sigma", low, high, B, n)][:, part]    # [M, b, n]
                noise = draws.normal(step, "noise", B * n, *shape).unflatten(1, (B, n))[:, part]
                fake = mu_fake if flags.fake == "net" else kde_of(G, draws, step, facts.classes, flags.kde_points, shape)
                grad, gap = kl_gradient(x, label, sigma, noise, teacher, fake, flags.normaliser, flags.grad_clip, facts.sigma_data)
                terms = flags.dm_weight * dm_loss(x, grad)
                made.append((x.detach(), label))
            if flags.reg_weight > 0:
                pick = pick_pairs(draws, step, B, pair_index)[:, part]                          # [M, b]
                reg = paired_loss(G if flags.bug != "a" else lambda x, *rest: G(x / edm.SIGMA_MAX, *rest), pairs, pick, distance)
                terms = terms + (flags.reg_weight if kl else 1.0) * reg
            share = terms.sum(-1) / B                                                           # [M]
            share.sum().backward()
            loss += share.detach()
        run.check(step, loss, names)
        ranks.add_gradients(G)
        common.clip_gradients(G, flags.clip_norm, len(members))
        opt_G.step()
        common.ema_update(ema, G, flags.ema, step)

        # the fake denoiser's turns: the first on G's samples of this step, the others on fresh ones
        head_start = flags.fake_warmup > 0 and step + 1 == max(1, first_kl) < flags.steps
        common.set_learning_rate(opt_fake, flags.fake_lr * (rate if kl and not head_start else 1.0))
        turns = flags.fake_warmup if head_start else flags.ttur if kl else 0
        for turn in range(turns if flags.fake == "net" else 0):
            opt_fake.zero_grad()
            fake_loss = torch.zeros(len(members), device=device)
            for i, part in enumerate(parts):
                if turn == 0 and kl:
                    x, label = made[i]
                else:
                    label = draws.label(step, f"fake label {turn}", B)[:, part]
                    with torch.no_grad():
                        x = one_step(G, draws.normal(step, f"fake z {turn}", B, *shape)[:, part], label)
                sigma_fake = grid[draws.integers(step, f"fake sigma {turn}", fake_low, fake_high + 1, B)][:, part]
                noise = draws.normal(step, f"fake noise {turn}", B, *shape)[:, part]
                denoise = mu_fake if flags.bug != "b" else lambda x, sigma, label: mu_fake(x, sigma.roll(1, -1), label)
                fake_losses = edm.denoising_loss(denoise, x, label, sigma_fake, noise, facts.sigma_data)
                share = fake_losses.sum(-1) / B
                share.sum().backward()
                fake_loss += share.detach()
            run.check(step, fake_loss, names)
            ranks.add_gradients(mu_fake)
            common.clip_gradients(mu_fake, flags.clip_norm, len(members))
            opt_fake.step()

        if (step + 1) % 50 == 0:
            run.log(step + 1, **({"regression": reg.mean(-1)} if flags.reg_weight > 0 else {}), **({"gap": gap} if kl else {}),
                    **(by_band(fake_losses, sigma_fake, "fake loss") if kl and flags.fake == "net" else {}))
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            keep_best(run, step + 1, own_distance(ema, facts, judge, members, references, flags.select_samples, device, ranks),
                      ema, best, record, facts.metric)
        run.save(step + 1, G=G, mu_fake=mu_fake, ema=ema, best=best, opt_G=opt_G, opt_fake=opt_fake, record=record)
    return ema, best


@torch.no_grad()
def keep_best(run: common.Stage, step: int, distance: Tensor, ema, best, record: dict, metric: str) -> None:
    """Copy into `best` the members of `ema` whose distance [M] is the lowest so far; log it."""
    better = distance < record["distance"]
    record["distance"] = torch.where(better, distance, record["distance"])
    for b, e in zip(best.parameters(), ema.parameters()):
        chosen = better.to(b.device).reshape(-1, *[1] * (b.ndim - 1))                           # a stack of one: all or nothing
        b.copy_(torch.where(chosen, e, b))
    run.log(step, **{metric: distance})
    run.show(**{metric: distance.mean().item()})


# ------------------------------------------------------------------------------------------------------ the whole stage

def check_flags(flags: Flags) -> None:
    """Raise UserError for values that are fine alone but not together."""
    facts = data.DATASETS[flags.dataset]
    for name in ("bins", "fake_bins"):
        bins = getattr(flags, name)
        if len(bins) != 2 or not 0 <= bins[0] <= bins[1] <= 999:
            raise common.UserError(f"{common.option(name)} {' '.join(map(str, bins))}: give two numbers, lowest and highest of 0 to 999")
    if flags.dm_weight > 0 and not flags.fake_bins[0] <= flags.bins[0] <= flags.bins[1] <= flags.fake_bins[1]:
        raise common.UserError(f"--bins {' '.join(map(str, flags.bins))}: the fake denoiser trains on bins {flags.fake_bins[0]} to "
                               f"{flags.fake_bins[1]} only; widen --fake-bins")
    if flags.distance == "lpips" and facts.stacked:
        raise common.UserError(f"--distance lpips: needs images; {flags.dataset} takes l2 or mse")
    if flags.teacher == "exact" and facts.exact is None:
        raise common.UserError(f"--teacher exact: {flags.dataset} has no closed form; train one or give a checkpoint's path")
    if flags.fake == "kde" and facts.exact is None:
        raise common.UserError(f"--fake kde: an oracle for the toy; {flags.dataset} needs --fake net")
    for name in ("tag", "against"):                                 # the second is msd.py's
        common.check_tag(common.option(name), getattr(flags, name, ""))
    for name in ("pairs", "eval_samples", "select_samples") if not facts.stacked else ():
        if getattr(flags, name) < 2 * facts.classes:                # every class needs a mean and a covariance
            raise common.UserError(f"{common.option(name)} {getattr(flags, name)}: at least two per class, {2 * facts.classes}")
    edm.check_guidance(flags)
    for name in ("beta1", "beta2", "ema", "teacher_ema"):
        if getattr(flags, name) >= 1:
            raise common.UserError(f"{common.option(name)} {getattr(flags, name)}: must be below 1")
    if flags.dm_weight == 0 and flags.reg_weight == 0:
        raise common.UserError("--dm-weight 0 and --reg-weight 0: nothing is left to train on")
    if flags.dm_weight > 0 and flags.reg_weight > 0 and flags.reg_warmup >= flags.steps:
        raise common.UserError(f"--reg-warmup {flags.reg_warmup}: must be below --steps {flags.steps}, or the KL term never "
                               f"sets in (for regression alone: --dm-weight 0)")


@dataclasses.dataclass
class Inputs:
    """What every student of every sweep needs; row i belongs to the i-th seed."""
    teachers: list                                                  # Precond stacks of one
    pairs: dict                                                     # {"z", "y": [seeds, N, *shape], "label": [seeds, N]}
    references: dict                                                # {seed: {"select", "report", "real": statistics, "floor", "floor_data": float}}
    judge: data.Judge


def get_inputs(flags: Flags, device, ranks, get_teachers=edm.get_teachers) -> Inputs:
    """Teacher, pairs, the judge and what it compares with, for each seed: made now, or reused from the run folder.

    get_teachers(flags, source, device, ranks) gives the networks whose weights students start from, one per seed."""
    facts = data.facts(flags.dataset, flags.resolution)
    source = data.opened(flags, ranks)
    if not facts.stacked:                                           # what is wanted hours from now: is it there?
        data.same_data(flags, source())
        if ranks.rank == 0 and flags.features:
            fid.Inception(flags.features, device)
        regression = flags.reg_weight > 0 or getattr(flags, "adm_reg_weight", 0) > 0 or "post" in getattr(flags, "stages", "")
        needed = flags.distance == "lpips" and regression or "cd" in getattr(flags, "stages", "") and flags.cd_distance == "lpips"
        if ranks.rank == 0 and needed:
            lpips_distance("cpu")
        ranks.wait()
    teachers = get_teachers(flags, source, device, ranks)
    judge = data.judge(flags, source, device, ranks)
    pairs, references = [], {}
    for seed, D in zip(edm.seeds(flags), teachers):
        folder = Path(flags.out) / f"seed{seed}" / "pairs" / str(flags.pairs)
        common.check_config(folder, {**edm.lineage(flags, seed), "sampler_steps": flags.sampler_steps, **common.stage_config(flags, "pairs")})
        pairs.append(solve(folder, "pairs", flags.pairs, edm.mu_teacher(flags, D, facts.exact), facts, seed, flags.sampler_steps, device, ranks, flags.quiet))
        references[seed] = get_reference(flags, seed, D, judge, device, ranks)
        if not facts.stacked:
            n = min(flags.pairs, flags.eval_samples)                # two draws of equal size: the distance depends on it
            y = common.load_shards(Path(flags.out) / f"seed{seed}" / "reference", "report")
            a, b = (judge.statistics(x[:n], pairs[-1]["label"][0, :n]) for x in (pairs[-1]["y"][0], y))
            references[seed]["floor"] = judge.distance(a, b)
    joined = {k: torch.cat([p[k] for p in pairs]).to(device) for k in ("z", "y", "label")}
    return Inputs(teachers, joined, references, judge)


def get_reference(flags, seed: int, D, judge: data.Judge, device, ranks) -> dict:
    """What samples of a seed are compared with: the teacher's own (made now, or reused) and the data. Statistics, as in `Inputs`; of
    images without "floor". flags: the teacher's are enough."""
    facts, folder = data.facts(flags.dataset, flags.resolution), Path(flags.out) / f"seed{seed}" / "reference"
    common.check_config(folder, {**edm.lineage(flags, seed), **common.stage_config(flags, "samples")})
    denoise = edm.mu_teacher(flags, D, facts.exact)
    drawn = {p: solve(folder, p, flags.eval_samples, denoise, facts, seed, flags.sampler_steps, device, ranks, flags.quiet)
             for p in (("select", "report") if facts.stacked else ("report",))}
    out = {p: judge.statistics(d["y"][0], d["label"][0]) for p, d in drawn.items()} | judge.truth(seed, flags.eval_samples)
    if "select" in drawn:                                           # two draws of the teacher: nothing can be told apart below it
        return out | {"floor": judge.distance(out["select"], out["report"])}
    return out | {"select": out["real"]}                            # images: choose by the data [MSD App. E]


def stage_folder(flags: Flags, seed: int, students: int, stage: str = "dm", tag: str | None = None) -> Path:
    """OUT/seedS/studentsK[-TAG]/STAGE; tag: another than --tag."""
    return Path(flags.out) / f"seed{seed}" / f"students{students}{common.suffix(flags.tag if tag is None else tag)}" / stage


@dataclasses.dataclass(frozen=True)
class Start:
    """What one student's generator begins with."""
    name: str                                                       # for config.json: teacher, random, or where and a hash of its flags
    size: object                                                    # of its network
    load: Callable                                                  # load() -> Precond, a stack of one
    home: Path | None = None                                        # the stage folder that it comes from, if it does


def read_students(path: Path) -> tuple[dict, edm.Precond]:
    """A checkpoint of students: what it says about them (facts, size, partition …) and their frozen stack. UserError if it is none."""
    saved = common.load_tensors(path)
    try:
        facts = data.facts(saved["dataset"], saved.get("resolution", 0))
        G = edm.Precond(facts.net(len(saved["partition"]), saved["size"]), facts.sigma_data, saved.get("sigma_min", 0.0))
        G.load_state_dict(saved["net"])
        return {**saved, "facts": facts}, G.requires_grad_(False)
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise common.UserError(f"{path}: not a students' checkpoint of this code") from None


def load_student(home: Path, name: str, k: int) -> edm.Precond:
    """Student k of a stage folder, frozen, a stack of one."""
    path = home / f"student{k}" / name if (home / f"student{k}").is_dir() else home / name
    return _row(path, path.stat().st_mtime_ns if path.exists() else 0, k if path.parent == home else 0)


@functools.lru_cache(maxsize=2)
def _row(path: Path, changed: int, k: int) -> edm.Precond:
    saved, G = _read(path, changed)
    members = len(saved["partition"])
    if not k < members:
        raise common.UserError(f"{path}: {members} students, but number {k} is asked for")
    one = edm.Precond(saved["facts"].net(1, saved["size"]), G.sigma_data, G.sigma_min).requires_grad_(False)
    one.load_state_dict(common.rows_of(G, slice(k, k + 1), members))
    return one


_read = functools.lru_cache(maxsize=1)(lambda path, changed: read_students(path))     # a stack's rows are asked for one after another


def start_from(home: Path, name: str, k: int, classes: tuple[int, ...] = ()) -> Start:
    """The start that another stage's folder holds. UserError if that stage is not there, or is of other classes than these."""
    path = home / f"student{k}" if (home / f"student{k}").is_dir() else home
    if not (path / name).exists():
        raise common.UserError(f"{path}: no {name} to start from; train that stage first")
    flags = common.load_json(path / "config.json")
    digest = hashlib.blake2b(repr(sorted(flags.items())).encode(), digest_size=4).hexdigest()
    saved = common.load_tensors(path / name, mmap=True)             # mapped: not read whole for its size
    if not isinstance(saved, dict) or "size" not in saved:
        raise common.UserError(f"{path / name}: not a students' checkpoint of this code")
    theirs = saved.get("partition", [[]])[k if path == home else 0] if classes else []
    if classes and sorted(theirs) != sorted(classes):
        raise common.UserError(f"{home}: its student {k} has the classes {' '.join(map(str, theirs))}, this one {' '.join(map(str, sorted(classes)))}; "
                               f"start from students of the same --partition")
    return Start(f"{home.parent.name}/{home.name} {digest}", saved["size"], lambda: load_student(home, name, k), home)


def random_start(facts: data.Facts, size, seed: int) -> Start:
    """Fresh weights, the same for all students of a seed."""
    def load():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(edm.PYTORCH_SEED + seed)
            return edm.Precond(facts.net(1, size), facts.sigma_data).requires_grad_(False)
    return Start("random", size, load)


def config(flags: Flags, seed: int, start: Start | None = None) -> dict:
    """The flags that determine the students of a seed, but for K and the partition."""
    begin = {} if start is None or start.name == "teacher" else {"start": start.name, **common.stage_config(flags, "size")}
    return {**ancestry(flags, seed), **begin, "sampler_steps": flags.sampler_steps, "weight_decay": flags.weight_decay,
            **common.stage_config(flags, "pairs"), **common.stage_config(flags, "dm")}


def ancestry(flags: Flags, seed: int) -> dict:
    """What determines teacher, weights to start from, and judge of a seed: part of every student's config.json."""
    judge = {} if data.DATASETS[flags.dataset].stacked else {"features": Path(flags.features).name or "classifier"}
    weights = {"weights of exact": [common.stage_config(flags, "tsm"), flags.noise_law, flags.P_mean, flags.P_std, flags.teacher_size,
                                    getattr(flags, "init", "")]} if flags.teacher == "exact" else {}
    return {**edm.lineage(flags, seed), **judge, **weights}


def generators(flags: Flags, starts: list[Start], device) -> edm.Precond:
    """The stack of generators at their starts, [M, ...]."""
    return edm.stacked([s.load() for s in starts], starts[0].size, data.facts(flags.dataset, flags.resolution), flags, device)


def networks(flags: Flags, starts: list[Start], row: list[int], inputs: Inputs, device):
    """Stacks of M: the generators at their start, mu_teacher, and mu_fake at its start, which is the teacher's weights.

    row: per member, which teacher. mu_fake has the teacher's size, whatever the generators' is."""
    facts, size = data.facts(flags.dataset, flags.resolution), inputs.teachers[0].size
    G = generators(flags, starts, device)
    fake = edm.stacked([inputs.teachers[r] for r in row], size, facts, flags, device)
    return G, teacher_of(flags, row, inputs.teachers, device), fake


def teacher_of(flags, row: list[int], teachers: list, device):
    """mu_teacher of a stack of M members: the closed form, or their seeds' networks, frozen. row: per member, which of `teachers`."""
    facts = data.facts(flags.dataset, flags.resolution)
    D = teachers[row[0]]
    if flags.teacher != "exact" and len(row) > 1:
        D = edm.stacked([teachers[r] for r in row], D.size, facts, flags, device).requires_grad_(False)
    edm.compiled(flags, D)
    return edm.mu_teacher(flags, D, facts.exact)


def distil(flags: Flags, members: list, pair_index: list, starts: list[Start], inputs: Inputs, device, ranks) -> None:
    """G_k = Distill_DM(mu_teacher, F_DM(D, Y_k)) for all members [MSD Eq. 2, first line]: best.pt and ema.pt in each folder."""
    seeds = edm.seeds(flags)

    def train_stack(run, index: list[int]) -> dict:
        stack, row = [members[i] for i in index], [seeds.index(members[i].seed) for i in index]
        net, teacher, fake = networks(flags, [starts[i] for i in index], row, inputs, device)
        ema, best = train(run, flags, stack, teacher, net, {**inputs.pairs, "row": torch.tensor(row, device=device)},
                          [pair_index[i].to(device) for i in index], inputs.judge,
                          {s: r["select"] for s, r in inputs.references.items()}, device, fake)
        return {"best.pt": best, "ema.pt": ema}
    homes = [stage_folder(flags, m.seed, m.students) for m in members]
    train_all(flags, "dm", members, homes, [config(flags, m.seed, s) for m, s in zip(members, starts)], flags.steps, train_stack, starts, ranks)


def train_all(flags: Flags, stage: str, members: list, homes: list[Path], configs: list[dict], steps: int, train_stack, starts: list[Start],
              ranks, results: tuple[str, ...] = ("best.pt", "ema.pt")) -> None:
    """Train every folder of `members` that lacks `results`: train_stack(run, index) -> {file: nets of the stack members[index]}.

    homes: per member, its stage's folder (seed0/students8/dm); configs: the flags that determine it. The toy's students train
    as one stack, on all ranks; images have a folder per student, and the students of one K go to ranks of their own."""
    facts, files = data.facts(flags.dataset, flags.resolution), (*results, "done.json")
    of_folder: dict[Path, list[int]] = {}
    sets: dict[Path, list[Path]] = {}                               # the folders of one seed and one K
    for i, (m, home) in enumerate(zip(members, homes)):
        folder = home if facts.stacked else home / f"student{m.student}"
        of_folder.setdefault(folder, []).append(i)
        sets.setdefault(home, []).append(folder)
    for folder, index in of_folder.items():
        first = members[index[0]]
        mine = {"partition": [members[i].classes for i in index]} if facts.stacked else {"student": first.student, "classes": first.classes}
        common.check_config(folder, {**configs[index[0]], "students": first.students, **mine})
        if common.finished(folder, files) and ranks.rank == 0:
            print(f"{folder}: already trained, reused")

    def train_group(group: list[Path], ranks) -> None:              # as one stack, which leaves its weights in these folders
        slices, chosen = {}, []
        for folder in group:
            slices[folder] = slice(len(chosen), len(chosen) + len(of_folder[folder]))
            chosen += of_folder[folder]
        stack = [members[i] for i in chosen]
        name = stage if facts.stacked else f"{stage}, student {stack[0].student} of {stack[0].students}"
        run = common.Stage(name, slices, steps, flags.save_every, flags.quiet, ranks)
        nets = train_stack(run, chosen)
        for folder, rows in slices.items() if run.main else ():
            about = {"dataset": facts.name, "resolution": facts.resolution, "size": starts[chosen[0]].size,
                     "partition": [m.classes for m in stack[rows]], "seconds": run.seconds()}
            for file, D in nets.items():
                about |= {"sigma_min": D.sigma_min} if D.sigma_min else {}
                common.save_tensors(folder / file, {**about, "net": common.rows_of(D, rows, len(stack))})
            common.save_json(folder / "done.json", {"seconds": run.seconds()})

    todo = ranks.first(lambda: common.unfinished(list(of_folder), files, facts.stacked))
    if facts.stacked:
        for group in todo:
            train_group(group, ranks)
    else:
        for folders in sets.values():
            mine, own = ranks.split(len(folders))
            for folder in [folders[i] for i in mine if [folders[i]] in todo]:
                train_group([folder], own)
    ranks.wait()


@common.command
def main(argv=None):
    """Distil one student that covers every class: msd.py with K = 1, without its figures."""
    flags = common.parse(Flags, PRESETS_ALL, argv, __doc__)
    check_flags(flags)
    if flags.dry_run:
        print(common.describe(flags))
        return
    if flags.teacher == "exact":
        raise common.UserError("--teacher exact: it has no weights to start from; python msd.py --teacher exact --students 1 makes them by TSM")
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    facts = data.facts(flags.dataset, flags.resolution)
    if ranks.rank == 0:
        print(f"dmd: one student of {flags.dataset}, {flags.steps} updates of batch {flags.batch}, on {device}, into {flags.out}")
    with common.alone(Path(flags.out), ranks):
        inputs = get_inputs(flags, device, ranks)
    members = [common.Member(seed, 1, 0, tuple(range(facts.classes))) for seed in edm.seeds(flags)]
    everything = torch.arange(flags.pairs)
    starts = [Start("teacher", D.size, lambda D=D: D) for D in inputs.teachers]
    distil(flags, members, [everything] * len(members), starts, inputs, device, ranks)
    for m in members if ranks.rank == 0 else ():
        print(f"seed {m.seed}: {stage_folder(flags, m.seed, 1)}")
    common.leave(ranks)


PRESETS_ALL = common.merge(edm.PRESETS, PRESETS)

if __name__ == "__main__":
    main()
