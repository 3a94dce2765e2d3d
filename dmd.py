"""Stage 1, DM: a one-step generator whose samples are distributed as the teacher's [MSD Sec. 3.2, App. I.2].

Trains G(sigma_max z; sigma_max, label) and, beside it, a "fake" denoiser mu_fake of G's own samples; both start from the
teacher's weights. Two flags choose between the paper's two variants of DM:
  DMD    --reg-weight 0.25 --ttur 1     a regression loss on pairs (z, y) of the teacher's ODE keeps the modes
  DMD2   --reg-weight 0    --ttur 5     no pairs; the fake denoiser takes N updates per update of G (TTUR)

  gradient of the KL divergence          [MSD Eq. 5, Eq. 6]        dm_gradient, dm_loss
  the scores in it, as denoisers         [MSD Eq. 7]               score
  the fake denoiser's loss               [MSD Eq. 8]               edm.denoising_loss
  regression loss on the pairs           [MSD Eq. 9]               regression_loss, make_pairs

Not here: the partition and F_DM's label sets (msd.py), the adversarial head.

Departures from the paper, on the toy (`--preset paper`: App. D.1's numbers; where it is silent, D.2.1's and DMD's)
 1. G first trains by regression alone (--reg-warmup; precedent: App. D.4) and mu_fake gets a head start (--fake-warmup): at
    sigma = 80 the teacher's weights say "class mean", and from there the KL term loses modes.
 2. w_t = 1 / c_out(sigma): the paper's 1 / mean |x - mu_real| is, in 2-D, a mean of two numbers and often near 0.
 3. The KL term sees bins 0 to 450 of 1000 (sigma <= 1.6), not 0 to 749: the rings have radius 0.1. mu_fake trains on the same.
 4. Four noise draws per sample, one per quarter of the bins, averaged: they need no backward pass through G.
 5. AdamW betas (0.5, 0.99): mu_fake lags behind G, and momentum 0.9 turns that lag into oscillation (modes die and return).
 6. 64 000 pairs at weight 1, not 1 000 at 0.25 (`--preset few-pairs`); RMS distance for LPIPS, which needs images.
 7. An average of G's weights is kept, at the best of several evaluations on draws that are not reported.

Run      python dmd.py --dataset toy
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

import common
import data
import edm
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
    reg_weight: float = flag(1.0, "weight of the regression term beside the KL term; 0 = none, and no pairs", "dm", low=0)
    reg_warmup: int = flag(1000, "first updates of G by regression alone (its weight is then 1)", "dm", low=0)
    fake_warmup: int = flag(400, "updates of the fake denoiser before the KL term sets in", "dm", low=0)
    ttur: int = flag(1, "updates of the fake denoiser per update of G", "dm", low=1)
    fake: str = flag("net", "fake denoiser: a network, or a kernel-density estimate (toy only, an oracle)", "dm", ("net", "kde"))
    kde_points: int = flag(2048, "samples per class of the kernel-density estimate", "dm", low=1)
    draws: int = flag(4, "noise draws per generated sample in the KL term", "dm", low=1)
    bins: list[int] = flag([0, 450], "lowest and highest noise bin of the KL term, of 1000", "dm")
    normaliser: str = flag("c_out", "w_t of the KL gradient", "dm", ("mean_abs", "c_out"))
    grad_clip: float = flag(0.0, "clip each coordinate of the KL gradient; 0 = off", "dm", low=0)
    distance: str = flag("l2", "regression distance: root mean square or mean square", "dm", ("l2", "mse"))
    filter_pairs: bool = flag(False, "keep only the pairs of the student's own classes: the strategy that App. B.4 rejects", "dm")
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
                           reg_warmup=0, fake_warmup=0, bins=[0, 749], draws=1, normaliser="mean_abs", clip_norm=10.0,
                           warmup=500, eval_every=5000),
    ("toy", "smoke"): dict(steps=12, batch=16, reg_warmup=4, fake_warmup=3, warmup=2, pairs=64, eval_every=6, kde_points=64, select_samples=400),
}


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
    if normaliser == "mean_abs":                                    # 1e-3: in 2-D a mean of two numbers often is near 0
        scale = edm.per_sample((x - mu_real).abs()) + 1e-3
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


def regression_loss(x: Tensor, y: Tensor, distance: str = "l2") -> Tensor:
    """l(G(z), y), per sample [...] [MSD Eq. 9]; x = G(sigma_max z), y the teacher's sample from the same z.

    l2: root mean square; mse: mean square."""
    if distance == "l2":
        gap = (x - y).flatten(-3) if x.ndim > 3 else x - y
        return torch.linalg.vector_norm(gap, dim=-1) / math.sqrt(gap.shape[-1])
    return edm.per_sample((x - y) ** 2)


def one_step(G, z: Tensor, label: Tensor | None) -> Tensor:
    """x = G(sigma_max z; sigma_max, label): z [..., *shape] has unit variance and is scaled here, exactly once."""
    sigma = torch.full(label.shape if label is not None else z.shape[:1], edm.SIGMA_MAX, dtype=z.dtype, device=z.device)
    return G(edm.SIGMA_MAX * z, sigma, label)


# --------------------------------------------------------------------------------------------------- data for the loop

def make_pairs(teacher, z: Tensor, label: Tensor, steps: int, chunk: int = 8192, name: str = "") -> Tensor:
    """y [..., N, *shape]: where the teacher's deterministic ODE takes each unit-variance latent z [MSD App. D.2.1].

    label is [..., N]. Serves the paired data D_paired as well as the teacher's own samples; `name` shows a progress bar."""
    lead = label.ndim - 1
    parts = list(zip(z.split(chunk, lead), label.split(chunk, lead)))
    return torch.cat([edm.heun(teacher, a, b, steps) for a, b in common.bar(parts, name, len(parts), not name)], lead)


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
def own_distance(G, facts, members, references: dict, samples: int, device, chunk: int = 4096) -> Tensor:
    """[M]: distance of each member's samples of its own classes from the teacher's of those classes [MSD App. E].

    references: {seed: statistics} of teacher samples kept for selection; the latents differ from the reported ones."""
    draws = common.Draws("select", members, device)
    label = torch.stack([c[torch.arange(samples, device=device) % len(c)] for c in draws.classes])
    z = draws.normal(0, "z", samples, *facts.shape)
    x = torch.cat([one_step(G, a, b) for a, b in zip(z.split(chunk, 1), label.split(chunk, 1))], 1)
    return torch.tensor([facts.distance(facts.statistics(x[i], label[i]), references[m.seed], m.classes)
                         for i, m in enumerate(members)])


# ------------------------------------------------------------------------------------------------------------ training

def first_kl_step(flags: Flags) -> int:
    """The update at which the KL term sets in: after the regression phase, if there is one; never without a KL term."""
    return flags.steps if flags.dm_weight == 0 else flags.reg_warmup if flags.reg_weight > 0 else 0


def train(run: common.Stage, flags: Flags, members, teacher, net, pairs: dict, pair_index: list, references: dict, device):
    """Train the stack of generators that `net` initialises; returns (last, best) averaged weights of each member.

    members: M students, each with its classes Y_k; KL conditions come from these alone [MSD Sec. 3.2, F_DM]
    teacher: denoiser (x, sigma, label) -> mu_real, [M, B, ...], never changed;  net: stack of M Precond nets, copied
    pairs:   {"z", "y": [seeds, N, *shape], "label": [seeds, N], "row": [M]}, row m tells member m's seed
    pair_index: per member, the pairs it may use: all of them, or `--filter-pairs`;  references: see own_distance"""
    facts = data.DATASETS[flags.dataset]
    draws = common.Draws("dm", members, device)
    names = [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    G, mu_fake = copy.deepcopy(net), copy.deepcopy(net)
    ema, best = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net).requires_grad_(False)
    betas = (flags.beta1, flags.beta2)
    opt_G = torch.optim.AdamW(G.parameters(), lr=flags.lr, betas=betas, weight_decay=flags.weight_decay, fused=True)
    opt_fake = torch.optim.AdamW(mu_fake.parameters(), lr=flags.fake_lr, betas=betas, weight_decay=flags.weight_decay, fused=True)
    record = {"distance": torch.full((len(members),), float("inf"))}
    start = run.resume(G=G, mu_fake=mu_fake, ema=ema, best=best, opt_G=opt_G, opt_fake=opt_fake, record=record)

    B, n, shape = flags.batch, flags.draws, facts.shape
    low, high = flags.bins
    grid = edm.sigma_bins().float().to(device)
    row = pairs["row"][:, None]
    first_kl = first_kl_step(flags)
    for step in run.range(start):
        kl = step >= first_kl                                       # two phases, each with its own warm-up and decay
        begin, end = (first_kl, flags.steps) if kl else (0, first_kl)
        rate = common.learning_rate(1.0, step - begin, end - begin, flags.warmup, flags.decay)
        common.set_learning_rate(opt_G, rate * (flags.lr if kl else flags.reg_lr))

        # the generator's turn
        loss = torch.zeros(len(members), device=device)
        if kl:
            label = draws.label(step, "label", B)                                               # [M, B], from Y_k
            x = one_step(G, draws.normal(step, "z", B, *shape), label)
            with torch.no_grad():
                sigma = grid[bins_in_strata(draws, step, "sigma", low, high, B, n)].flatten(1)  # [M, B n]
                x_n, label_n = x.repeat_interleave(n, 1), label.repeat_interleave(n, 1)
                x_t = x_n + edm.like(sigma, x_n) * draws.normal(step, "noise", B * n, *shape)
                mu_real = teacher(x_t, sigma, label_n)
                fake = (kde_denoiser(x_t, sigma, label_n, make_cloud(G, draws, step, facts.classes, flags.kde_points, shape))
                        if flags.fake == "kde" else mu_fake(x_t, sigma, label_n))
                grad = dm_gradient(x_n, mu_real, fake, sigma, flags.normaliser, flags.grad_clip, facts.sigma_data)
                gap = edm.per_sample((fake - mu_real).abs()).mean(-1)
            grad = grad.unflatten(1, (B, n)).mean(2)
            loss = loss + flags.dm_weight * dm_loss(x, grad).mean(-1)
        if flags.reg_weight > 0:
            pick = draws.integers(step, "pair", 0, 2 ** 62, B)      # wide: one stream, however many pairs a member may use
            pick = torch.stack([index[p % len(index)] for index, p in zip(pair_index, pick)])   # [M, B]
            x_ref = one_step(G, pairs["z"][row, pick], pairs["label"][row, pick])
            reg = regression_loss(x_ref, pairs["y"][row, pick], flags.distance).mean(-1)
            loss = loss + (flags.reg_weight if kl else 1.0) * reg
        run.check(step, loss, names)
        opt_G.zero_grad()
        loss.sum().backward()
        common.clip_gradients(G, flags.clip_norm, len(members))
        opt_G.step()
        common.ema_update(ema, G, flags.ema, step)

        # the fake denoiser's turns: the first on G's samples of this step, the others on fresh ones
        head_start = step + 1 == max(1, first_kl) < flags.steps
        common.set_learning_rate(opt_fake, flags.fake_lr * (rate if kl and not head_start else 1.0))
        turns = flags.fake_warmup if head_start else flags.ttur if kl else 0
        for turn in range(turns if flags.fake == "net" else 0):
            if turn > 0 or not kl:
                label = draws.label(step, f"fake label {turn}", B)
                with torch.no_grad():
                    x = one_step(G, draws.normal(step, f"fake z {turn}", B, *shape), label)
            sigma_fake = grid[draws.integers(step, f"fake sigma {turn}", 0, high + 1, B)]       # [M, B]
            noise = draws.normal(step, f"fake noise {turn}", B, *shape)
            fake_losses = edm.denoising_loss(mu_fake, x.detach(), label, sigma_fake, noise, facts.sigma_data)
            fake_loss = fake_losses.mean(-1)
            run.check(step, fake_loss, names)
            opt_fake.zero_grad()
            fake_loss.sum().backward()
            common.clip_gradients(mu_fake, flags.clip_norm, len(members))
            opt_fake.step()

        if (step + 1) % 50 == 0:
            run.log(step + 1, **({"regression": reg} if flags.reg_weight > 0 else {}), **({"gap": gap} if kl else {}),
                    **(by_band(fake_losses, sigma_fake, "fake loss") if kl and flags.fake == "net" else {}))
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            distance = own_distance(ema, facts, members, references, flags.select_samples, device)
            better = distance < record["distance"]
            record["distance"] = torch.where(better, distance, record["distance"])
            with torch.no_grad():
                for b, e in zip(best.parameters(), ema.parameters()):
                    b[better] = e[better]
            run.log(step + 1, **{facts.metric: distance})
            run.show(**{facts.metric: distance.mean().item()})
        run.save(step + 1, G=G, mu_fake=mu_fake, ema=ema, best=best, opt_G=opt_G, opt_fake=opt_fake, record=record)
    return ema, best


# ------------------------------------------------------------------------------------------------------ the whole stage

def check_flags(flags: Flags) -> None:
    """Raise UserError for values that are fine alone but not together."""
    if len(flags.bins) != 2 or not 0 <= flags.bins[0] <= flags.bins[1] <= 999:
        raise common.UserError(f"--bins {' '.join(map(str, flags.bins))}: give two numbers, lowest and highest of 0 to 999")
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
    """What every student of every sweep needs from the teacher; row i belongs to the i-th seed."""
    teachers: list                                                  # Precond stacks of one
    pairs: dict                                                     # {"z", "y": [seeds, N, *shape], "label": [seeds, N]}
    references: dict                                                # {seed: {"select", "report": statistics, ...}}


def get_inputs(flags: Flags, device) -> Inputs:
    """Teacher, pairs and the teacher's own samples of each seed: made now, or reused from the run folder."""
    facts = data.DATASETS[flags.dataset]
    teachers = edm.get_teachers(flags, device)
    pairs, references = [], {}
    for seed, D in zip(edm.seeds(flags), teachers):
        denoise = facts.exact if flags.teacher == "exact" else D
        home, lineage = Path(flags.out) / f"seed{seed}", edm.lineage(flags, seed)
        samples = common.stage_config(flags, "samples")

        def solved(purpose: str, number: int) -> dict:
            z = torch.randn(1, number, *facts.shape, generator=common.generator(seed, purpose)).to(device)
            label = data.stratified(number, facts.classes, device)[None]
            y = make_pairs(denoise, z, label, flags.sampler_steps, name="" if flags.quiet else f"sampling ({purpose})")
            return {"z": z.cpu(), "y": y.cpu(), "label": label.cpu()}

        def stored(folder: Path, config: dict, parts: dict[str, int]) -> dict:
            common.check_config(folder, {**lineage, **config})
            if not (folder / "samples.pt").exists():
                print(f"{folder}: {sum(parts.values())} samples of the teacher, {flags.sampler_steps} Heun steps …", flush=True)
                common.save_tensors(folder / "samples.pt", {k: solved(k, n) for k, n in parts.items()})
            return common.load_tensors(folder / "samples.pt")

        pairs.append(stored(home / "pairs" / str(flags.pairs), {
            "sampler_steps": flags.sampler_steps, **common.stage_config(flags, "pairs")}, {"pairs": flags.pairs})["pairs"])
        drawn = stored(home / "reference", samples, {"select": flags.eval_samples, "report": flags.eval_samples})
        references[seed] = {k: facts.statistics(v["y"][0], v["label"][0]) for k, v in drawn.items()}
    joined = {k: torch.cat([p[k] for p in pairs]).to(device) for k in ("z", "y", "label")}
    return Inputs(teachers, joined, references)


def stage_folder(flags: Flags, seed: int, students: int, stage: str = "dm") -> Path:
    """OUT/seedS/studentsK[-TAG]/STAGE."""
    return Path(flags.out) / f"seed{seed}" / f"students{students}{common.suffix(flags.tag)}" / stage


def config(flags: Flags, seed: int) -> dict:
    """The flags that determine the students of a seed, but for K and the partition."""
    return {**edm.lineage(flags, seed), "sampler_steps": flags.sampler_steps, "weight_decay": flags.weight_decay,
            **common.stage_config(flags, "pairs"), **common.stage_config(flags, "dm")}


def distil(flags: Flags, members: list, pair_index: list, inputs: Inputs, device) -> None:
    """G_k = Distill_DM(mu_teacher, F_DM(D, Y_k)) for all members [MSD Eq. 2, first line].

    Train every folder of `members` that is not finished, as one stack where it can; leave ema.pt and best.pt in each."""
    seeds = edm.seeds(flags)
    facts = data.DATASETS[flags.dataset]
    of_folder: dict[Path, list[int]] = {}
    for i, m in enumerate(members):
        of_folder.setdefault(stage_folder(flags, m.seed, m.students), []).append(i)
    for folder, index in of_folder.items():
        first = members[index[0]]
        common.check_config(folder, {**config(flags, first.seed), "students": first.students,
                                     "partition": [members[i].classes for i in index]})
        if common.finished(folder, ("best.pt", "ema.pt")):
            print(f"{folder}: already trained, reused")
    for group in common.unfinished(list(of_folder), ("best.pt", "ema.pt")):
        slices, chosen = {}, []
        for folder in group:
            slices[folder] = slice(len(chosen), len(chosen) + len(of_folder[folder]))
            chosen += of_folder[folder]
        stack = [members[i] for i in chosen]
        row = [seeds.index(m.seed) for m in stack]
        net = edm.Precond(facts.net(len(stack), facts.sizes[0]), facts.sigma_data).to(device)
        net.load_state_dict({k: torch.cat([inputs.teachers[r].state_dict()[k] for r in row]) for k in net.state_dict()})
        teacher = facts.exact if flags.teacher == "exact" else copy.deepcopy(net).requires_grad_(False)
        run = common.Stage("dm", slices, flags.steps, flags.save_every, flags.quiet)
        ema, best = train(run, flags, stack, teacher, net, {**inputs.pairs, "row": torch.tensor(row, device=device)},
                          [pair_index[i].to(device) for i in chosen],
                          {s: r["select"] for s, r in inputs.references.items()}, device)
        for folder, rows in slices.items():
            about = {"dataset": flags.dataset, "size": facts.sizes[0], "partition": [m.classes for m in stack[rows]],
                     "seconds": run.seconds()}
            for name, D in (("best.pt", best), ("ema.pt", ema)):
                net_rows = {k: v[rows].cpu().clone() for k, v in D.state_dict().items()}
                common.save_tensors(folder / name, {**about, "net": net_rows})


@common.command
def main(argv=None):
    """Distil one student that covers every class: msd.py with K = 1, without its figures."""
    flags = common.parse(Flags, PRESETS_ALL, argv, __doc__)
    check_flags(flags)
    if flags.dry_run:
        print(common.describe(flags))
        return
    device = common.device(flags.device, flags.threads)
    facts = data.DATASETS[flags.dataset]
    print(f"dmd: one student of {flags.dataset}, {flags.steps} updates of batch {flags.batch}, on {device}, into {flags.out}")
    inputs = get_inputs(flags, device)
    members = [common.Member(seed, 1, 0, tuple(range(facts.classes))) for seed in edm.seeds(flags)]
    everything = torch.arange(flags.pairs)
    distil(flags, members, [everything] * len(members), inputs, device)
    for m in members:
        print(f"seed {m.seed}: {stage_folder(flags, m.seed, 1)}")


PRESETS_ALL = common.merge(edm.PRESETS, PRESETS)

if __name__ == "__main__":
    main()
