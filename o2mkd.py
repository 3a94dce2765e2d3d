"""One-to-Many Knowledge Distillation: one teacher, N multi-step students, each at home in a range of noise levels [O2MKD].

The sibling of msd.py [Ma and Zhang 2024, arXiv 2410.04191]: there a student answers for some of the classes, in one step; here
for some of the noise levels, and a sampling trajectory passes from student to student. A student is a smaller denoiser, trained
as the teacher was, with the teacher's knowledge beside the data; at inference every evaluation costs one student, however many.

  ranges over the noise levels            [O2MKD Sec. O2MKD, non-uniform ranges]   ranges, read_ranges, Router
  own range with probability p, else all  [O2MKD Eq. 4, Eq. 5]                     draw_bins
  denoising loss + lambda KD              [O2MKD Eq. 2, Eq. 3]                     o2mkd_loss: edm.denoising_loss, tsm.tsm_loss
  KD by features at the bottleneck        [Zagoruyko 2017], [Tung and Mori 2019], [Tian 2020]    attention_loss, similarity_loss, contrastive_loss
  sampling in turn; one student alone; a student in its range, the teacher elsewhere (FID2)      routed
  N students merged into one              [Ilharco 2023] task arithmetic           merge
  both ideas: blocks of classes x ranges  in neither paper                         --students 4 --ranges 2

EDM training, TSM and this are one loss, lambda ||D(x + sigma n) - target||^2 with another target and another law of sigma. Not
here: the samplers and the denoising loss (edm.py), the prediction loss (tsm.py), classes (msd.py), figures (plot.py).

Departures from the paper, whose formulas and most numbers are not in its text
 1. "Timesteps" are the 1000 bins of edm.sigma_bins, drawn uniformly; DDIM is the first-order sampler, Heun's the default.
    The losses are EDM's, on D and weighted by lambda(sigma), where the paper has DDPM's on the noise; networks are class-conditional.
 2. p, the weight of KD and N "for most experiments" are not stated: ours by Flags and LAMBDA, chosen on the toy's seed 0, which the
    reported five include. p is tossed per student and update, as stated.
 3. Smaller students start from random weights, all of a seed from the same ones (or --init); which weights the paper keeps of
    the removed channels is not stated. Merging it does not define: theta_0 + c sum(theta_i - theta_0).
 4. Features are those of one layer, the bottleneck. Contrastive KD: the other samples of the batch instead of a memory bank, minus
    what the teacher's own features give. Attention transfer: the squared norm.
 5. ToyNet has no positions: hidden units stand for them in attention transfer, after the linear layer if widths differ.
 6. Narrowed U-Nets keep widths that group norms can divide; attention wants 64 channels a head, so a narrow laptop net has none.

Run      python o2mkd.py --dataset toy --students 4
         python o2mkd.py --dataset toy --students 1 4 --merge --curve 10 20 40
Images   python o2mkd.py --dataset fashion-mnist --students 4
GPUs     torchrun --nproc-per-node 4 o2mkd.py --dataset imagenet64 --students 4
"""
import copy
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import dmd
import edm
import fid
import msd
import plot
import tsm
from common import flag

BINS = 1000                                # noise levels: edm.sigma_bins(BINS)
# lambda of each KD, chosen on the toy's seed 0 among 1, 4; 1, 10; 30, 300; 0.03, 0.3 (the paper does not state it)
LAMBDA = {"prediction": 1.0, "attention": 1.0, "similarity": 30.0, "contrastive": 0.03}


@dataclasses.dataclass
class Flags(edm.Flags):
    """Flags of O2MKD, beside those of the teacher."""
    students: list[int] = flag([4], "number of students N; several numbers are compared (the toy's train as one stack)")
    ranges: int = flag(0, "noise ranges R; 0 = one per student; fewer: the classes are split too, into N / R blocks", low=0)
    scheme: str = flag("uniform", "the ranges: uniform in the 1000 bins; small or large: more students on small or on large sigma; or bins such as 0-99,100-999")
    p: float = flag(0.75, "chance that an update's sigma come from the student's own range, else from all", "o2mkd", low=0)
    kd: str = flag("prediction", "what is distilled", "o2mkd", tuple(LAMBDA))
    kd_weight: float = flag(-1.0, "lambda, weight of KD beside the denoising loss; 0 = no KD; -1 = LAMBDA's of this KD", "o2mkd", low=-1)
    keep: float = flag(0.5, "share of the teacher's channels that students keep; 1 = its size", low=0)
    student_size: str = flag("", "size of the students by name, in the place of --keep", choices=("", "B", "S", "XS", "XXS"))
    init: str = flag("", "what students start from: random, teacher (its size only), o2mkd1 or o2mkd1-TAG (one student for all levels, trained "
                         "before), or a checkpoint; none = teacher where it fits, else random")
    steps: int = flag(4000, "updates of every student", "o2mkd", low=1)
    batch: int = flag(256, "batch per student", "o2mkd", low=1)
    lr: float = flag(1e-2, "learning rate (AdamW)", "o2mkd", low=0)
    decay: str = flag("cosine", "its schedule after 100 warm-up updates", "o2mkd", ("cosine", "linear", "constant"))
    ema: float = flag(0.998, "decay of the average of the weights", "o2mkd", low=0)
    sampler: str = flag("heun", "of teacher and students in the table: heun, or ddim (first order, one evaluation a step)", choices=("heun", "ddim"))
    merge: bool = flag(False, "also merge the N students into one, and choose its coefficient c on other draws")
    inspect: int = flag(-1, "also sample with this student alone, and with it in its range and the teacher elsewhere; -1 = none", low=-1)
    curve: list[int] = flag([], "also compare at these numbers of steps, by both samplers")
    tag: str = flag("", "suffix of the students' folders: variants of one teacher side by side")


PRESETS = common.merge(edm.PRESETS, {      # all ours: the paper follows "default training configurations" that it does not print; cifar10, imagenet64: never run
    ("toy", "smoke"): dict(steps=12, batch=16),
    ("fashion-mnist", "default"): dict(steps=1500, batch=64, lr=2e-3),
    ("fashion-mnist", "smoke"): dict(steps=4, batch=4),
    ("cifar10", "default"): dict(steps=200_000, batch=512, lr=1e-3, decay="constant", ema=0.9993), ("cifar10", "smoke"): dict(steps=2, batch=2),
    ("imagenet64", "default"): dict(steps=200_000, batch=512, lr=1e-4, decay="constant", ema=0.9999),
    ("imagenet64", "paper"): dict(steps=200_000, batch=512, lr=1e-4, decay="constant", ema=0.9999),
})


# ------------------------------------------------------------------------------------------------------ ranges and router

def ranges(number: int, scheme: str = "uniform") -> list[int]:
    """Edges [number + 1] of the students' ranges: student i owns the bins edges[i] … edges[i + 1] - 1 of edm.sigma_bins.

    uniform: equally many bins each, the paper's t in [(i-1)T/N, iT/N); small, large: edges at T (i/N)^2 and mirrored, so that more
    students share the small (large) levels [O2MKD, Scheme-B, Scheme-A]; else bins as in `read_ranges`. UserError for more than there are."""
    if not 1 <= number <= BINS:
        raise common.UserError(f"{number} noise ranges: from 1 to {BINS}, the number of noise levels")
    place = [i / number for i in range(number + 1)]
    power = {"uniform": place, "small": [u * u for u in place], "large": [1 - (1 - u) ** 2 for u in place]}
    edges = read_ranges(scheme, number) if scheme not in power else [round(BINS * u) for u in power[scheme]]
    if any(a >= b for a, b in zip(edges, edges[1:])):
        raise common.UserError(f"--scheme {scheme}: {number} ranges leave a student without a noise level; fewer students, or uniform")
    return edges


def read_ranges(text: str, number: int) -> list[int]:
    """'0-99,100-999' -> [0, 100, 1000]: bins of each student, ascending, each bin once. UserError for gaps and overlaps."""
    words = ("uniform", "small", "large")
    try:
        found = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        if any(len(r) != 2 for r in found):
            raise ValueError
    except ValueError:
        raise common.UserError(f"--scheme {text}: neither {', '.join(words)} nor ranges of bins such as 0-99,100-999{common.near(text, words)}") from None
    expected = 0
    for low, high in found:
        if low != expected or high < low:
            what = "empty" if high < low else f"a gap: bins {expected} to {low - 1} have no student" if low > expected else f"an overlap at bin {low}"
            raise common.UserError(f"--scheme {text}: range {low}-{high} is {what}; ranges ascend and cover 0 to {BINS - 1} once")
        expected = high + 1
    if expected != BINS:
        raise common.UserError(f"--scheme {text}: ends at bin {expected - 1}; ranges cover 0 to {BINS - 1} once, and there is no other bin")
    if len(found) != number:
        raise common.UserError(f"--scheme {text}: {len(found)} ranges, but {number} are needed")
    return [0, *[high + 1 for _, high in found]]


class Router:
    """Which student answers at (sigma, label)? By the sigma that is passed to the network: each of a Heun step's two evaluations goes
    to its own owner. Student i owns [sigma of bin edges[i], sigma of bin edges[i + 1]); the first and last ranges are open outwards.

    parts: blocks of classes (msd.partition); student block * R + range answers for its block's classes in its range."""

    def __init__(self, edges: list[int], parts: list[Tensor] | None = None):
        self.edges, self.ranges = edges, len(edges) - 1
        self.bounds = edm.sigma_bins(BINS)[edges[1:-1]].float()     # a sampler passes float32 levels
        self.of_class = msd.Router(parts) if parts else None
        self.students = self.ranges * len(parts or [()])

    def __call__(self, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """Student index [...] (int64) for sigma [...] and label [...]."""
        k = torch.bucketize(sigma.float(), self.bounds.to(sigma.device), right=True)
        return k + self.ranges * self.of_class(label) if self.of_class else k


def routed(denoisers: list, router: Router):
    """The denoiser (x, sigma, label) -> D that asks each sample's own student: any sampler takes it.

    denoisers: one callable per student: a teacher in its place makes the paper's hybrid, N times the teacher is the teacher. UserError if
    they are not as many as the router's students."""
    if len(denoisers) != router.students:
        raise common.UserError(f"routed: {len(denoisers)} denoisers for a router of {router.students} students")

    def denoise(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        k = router(sigma, label)
        owners = k.unique().tolist()
        if len(owners) == 1:
            return denoisers[owners[0]](x, sigma, label)
        out = torch.empty_like(x)
        for i in owners:
            mine = k == i
            out[mine] = denoisers[i](x[mine][None], sigma[mine][None], None if label is None else label[mine][None])[0]
        return out
    return denoise


def draw_bins(draws: common.Draws, step: int, batch: int, low: Tensor, high: Tensor, p: float) -> Tensor:
    """Noise bins [M, batch]: with probability p, tossed per student and update, uniform on its own low … high - 1, else on all bins.

    [O2MKD Eq. 4, Eq. 5]; low, high [M]. A range that holds the share m of the bins is drawn p + (1 - p) m of the time."""
    own = draws.uniform(step, "own")[:, None] < p                                               # [M, 1]
    low, high = torch.where(own, low[:, None], 0), torch.where(own, high[:, None], BINS)
    bins = (low + draws.uniform(step, "sigma", batch) * (high - low)).long()
    return torch.minimum(bins, high - 1)                            # rounding up at the end


# -------------------------------------------------------------------------------------------------------------- the losses

def attention_map(h: Tensor) -> Tensor:
    """Where a layer h [M, b, C, H, W] is active: mean square over channels, [M, b, H W] of norm 1. Of h [M, b, C] (ToyNet): per unit."""
    return F.normalize(h.square().mean(-3).flatten(-2) if h.ndim > 3 else h.square(), dim=-1)


def attention_loss(h: Tensor, h_teacher: Tensor) -> Tensor:
    """||A(h) - A(h_teacher)||^2 of the normalised attention maps, per sample [M, b] [Zagoruyko and Komodakis 2017, Eq. 2]."""
    return (attention_map(h) - attention_map(h_teacher)).square().sum(-1)


def similarity_loss(h: Tensor, h_teacher: Tensor) -> Tensor:
    """||S(h) - S(h_teacher)||_F^2 / b^2 with S the batch's inner products, rows of norm 1: one value per student [M] [Tung and Mori 2019, Eq. 4]."""
    f, g = (v.flatten(2) for v in (h, h_teacher))                                               # [M, b, features]: any two widths
    return (F.normalize(f @ f.mT, dim=-1) - F.normalize(g @ g.mT, dim=-1)).square().mean((-2, -1))


def contrastive_loss(h: Tensor, h_teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Does a student's feature tell its own sample among the batch's teacher features? Cross-entropy [M] over cosine similarities.

    [Tian 2020] in-batch. The teacher's own value is taken off: equal features give 0; a student can be below. h [M, b, d], or images,
    then averaged over positions."""
    s, t = (F.normalize(pooled(v), dim=-1) for v in (h, h_teacher))
    return -((s @ t.mT / temperature).log_softmax(-1) - (t @ t.mT / temperature).log_softmax(-1)).diagonal(dim1=-2, dim2=-1).mean(-1)


def pooled(h: Tensor) -> Tensor:
    """Features [M, b, C]: of images the mean over positions."""
    return h.mean((-2, -1)) if h.ndim > 3 else h


FEATURE_LOSSES = {"attention": attention_loss, "similarity": similarity_loss, "contrastive": contrastive_loss}


class Projection(nn.Module):
    """A linear layer per student, trained beside it, that takes its features [M, b, inside] to the teacher's width [Romero 2015].

    seeds: of each of the M members; students of a seed start from the same layer."""

    def __init__(self, seeds: list[int], inside: int, outside: int):
        super().__init__()
        drawn = [torch.randn(inside, outside, generator=common.generator(seed, "projection")) for seed in seeds]
        self.weight = nn.Parameter(torch.stack(drawn) * inside ** -0.5)                         # [M, inside, outside]

    def forward(self, h: Tensor) -> Tensor:
        return torch.bmm(h, self.weight)


def projects(kd: str, inside: tuple, outside: tuple) -> bool:
    """Does this KD compare features unit by unit, of networks whose bottlenecks have other widths?"""
    return inside[0] != outside[0] and (kd == "contrastive" or kd == "attention" and len(inside) == 1)


def o2mkd_loss(student, teacher, x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor, lam: float, kd: str = "prediction",
               project=lambda h: h, sigma_data: float = 0.5) -> tuple[Tensor, dict]:
    """Denoising loss + lambda KD, one value per student [M], mean over the batch [O2MKD Eq. 2, Eq. 3]; and its parts {name: [M]}, detached.

    x [M, b, *shape] data, sigma, label [M, b]. student and teacher: (x, sigma, label) -> D; of features also with features=True -> (D, h).
    One pass through each; no gradient flows into the teacher, which is not asked if lambda is 0. Beside features, "prediction" is watched only."""
    x_t, features = x + edm.like(sigma, x) * noise, kd in FEATURE_LOSSES and lam > 0
    D = student(x_t, sigma, label, **({"features": True} if features else {}))
    D, h = D if features else (D, None)
    denoising = edm.denoising_loss(lambda *_: D, x, label, sigma, noise, sigma_data).mean(-1)
    if lam == 0:
        return denoising, {"denoising": denoising.detach()}
    with torch.no_grad():
        target = teacher(x_t, sigma, label, **({"features": True} if features else {}))
    target, h_teacher = target if features else (target, None)
    prediction = tsm.tsm_loss(lambda *_: D, lambda *_: target, x, label, sigma, noise, sigma_data).mean(-1)
    parts = {"denoising": denoising.detach(), "prediction": prediction.detach()}
    if not features:
        return denoising + lam * prediction, parts
    if kd == "contrastive":
        h, h_teacher = pooled(h), pooled(h_teacher)
    distilled = FEATURE_LOSSES[kd](project(h), h_teacher)
    parts[kd] = (distilled.mean(-1) if distilled.ndim > 1 else distilled)
    return denoising + lam * parts[kd], {**parts, kd: parts[kd].detach()}


def weight_of(flags: Flags) -> float:
    """lambda: --kd-weight, or LAMBDA's."""
    return LAMBDA[flags.kd] if flags.kd_weight < 0 else flags.kd_weight


# ---------------------------------------------------------------------------------------------------------------- training

def train(run: common.Stage, flags: Flags, members, low: Tensor, high: Tensor, teacher, net: edm.Precond, project, source, device) -> edm.Precond:
    """Train the stack of students that `net` initialises; returns their averaged weights.

    members: M students, with their classes; low, high [M]: own bins low … high - 1;  teacher: as in o2mkd_loss, never changed
    project: None, or the stack's Projection;  source: real data of each member's classes"""
    facts, lam = data.facts(flags.dataset, flags.resolution), weight_of(flags)
    draws = common.Draws("o2mkd", members, device)
    student, ema = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net).requires_grad_(False)
    edm.compiled(flags, student)
    weights = [*student.parameters(), *(project.parameters() if project else ())]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.999), weight_decay=flags.weight_decay, fused=True)
    start = run.resume(student=student, ema=ema, optimizer=optimizer, **({"project": project} if project else {}))

    B, grid, names = flags.batch, edm.sigma_bins(BINS).float().to(device), [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    for step in run.range(start):
        optimizer.zero_grad()
        loss = torch.zeros(len(members), device=device)
        for part in run.ranks.parts(B, flags.micro_batch):
            x, label = source.batch(draws, step, B, part)                                       # [M, b, *shape]
            sigma = grid[draw_bins(draws, step, B, low, high, flags.p)][:, part]                # [M, b]
            noise = draws.normal(step, "noise", B, *facts.shape)[:, part]
            value, parts = o2mkd_loss(student, teacher, x, label, sigma, noise, lam, flags.kd, project or (lambda h: h), facts.sigma_data)
            share = value * (x.shape[1] / B)                                                    # [M]
            share.sum().backward()
            loss += share.detach()
        loss = run.check(step, loss, names)
        for each in (student, project) if project else (student,):
            run.ranks.add_gradients(each)
        common.set_learning_rate(optimizer, common.learning_rate(flags.lr, step, flags.steps, 100, flags.decay))
        optimizer.step()
        common.ema_update(ema, student, flags.ema, step)
        if (step + 1) % 20 == 0 or step == 0:
            run.log(step + 1, **parts)                              # of this one batch (its last micro-batch): how steady is it?
            run.show(**{name: value.mean().item() for name, value in parts.items()})
        run.save(step + 1, student=student, ema=ema, optimizer=optimizer, **({"project": project} if project else {}))
    return ema


# ----------------------------------------------------------------------------------------------------------------- merging

def merge(start: nn.Module, students: list[nn.Module], c: float | None = None) -> dict:
    """theta_0 + c sum_i (theta_i - theta_0), a state [Ilharco 2023, task arithmetic]; c = None: 1/N, the students' mean.

    UserError if there is none, if the networks are of different sizes, or c is no number."""
    if not students or c is not None and not math.isfinite(c):
        raise common.UserError(f"merge: {'no students' if not students else f'c = {c}'}; give at least one student, and a finite c")
    c, first = 1 / len(students) if c is None else c, start.state_dict()
    others = [s.state_dict() for s in students]
    if any({k: v.shape for k, v in o.items()} != {k: v.shape for k, v in first.items()} for o in others):
        raise common.UserError("merge: students of different sizes; only networks of one size, from one start, can be merged")
    return {k: v + c * sum(o[k] - v for o in others) for k, v in first.items()}


def merge_folders(folders: list, c: float | None = None) -> edm.Precond:
    """All students of these folders (seed0/o2mkd4 …) merged into one. UserError if their data, sizes or starts differ."""
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    found = [load_students(f) for f in folders]
    if not found:
        raise common.UserError("merge: no folders; give at least one, such as runs/toy/seed0/o2mkd4")
    for other in found[1:]:
        if other.facts != found[0].facts:
            raise common.UserError(f"merge: {folders[0]} has students of {found[0].facts.name}, {other.folder} of {other.facts.name}; they cannot be merged")
        if other.size != found[0].size:
            raise common.UserError(f"merge: {folders[0]} has students of size {found[0].size}, {other.folder} of {other.size}; they cannot be merged")
        if common.fingerprint(other.start) != common.fingerprint(found[0].start):
            raise common.UserError(f"merge: the students of {folders[0]} and {other.folder} started from different weights; they cannot be merged")
    return as_one(found[0], [D for f in found for D in f.denoisers], c)


def as_one(found, denoisers: list, c: float | None = None) -> edm.Precond:
    """`merge` as a denoiser of its own, frozen."""
    out = copy.deepcopy(found.start)
    out.load_state_dict(merge(found.start, denoisers, c))
    return out


# --------------------------------------------------------------------------------------------------------- the whole stage

def home(flags, seed: int, students: int, tag: str | None = None) -> Path:
    """OUT/seedS/o2mkdN[-TAG]; tag: another than --tag."""
    return Path(flags.out) / f"seed{seed}" / f"o2mkd{students}{common.suffix(flags.tag if tag is None else tag)}"


def split(flags: Flags, facts: data.Facts, students: int) -> tuple[list[int], list[Tensor] | None]:
    """Edges of the R ranges, and the N / R blocks of classes (None: one block of all)."""
    R = flags.ranges or students
    if students % R:
        raise common.UserError(f"--students {students} --ranges {R}: {R} ranges for each block of classes; give a multiple of {R} students")
    return ranges(R, flags.scheme), None if students == R else msd.partition(facts.classes, students // R)


def blocks(flags: Flags, facts: data.Facts, N: int) -> list[Tensor]:
    """Classes of each of N students: student block * R + range has its block's."""
    edges, parts = split(flags, facts, N)
    return [part for part in parts or [torch.arange(facts.classes)] for _ in edges[1:]]


def size_of(flags: Flags, facts: data.Facts, teacher_size) -> object:
    """The students' size: --student-size, or the teacher's with --keep of its channels."""
    if flags.student_size:
        return flags.student_size
    return teacher_size if flags.keep == 1 else facts.narrowed(teacher_size, flags.keep)


def start_of(flags: Flags, facts: data.Facts, m: common.Member, size, teacher) -> dmd.Start:
    """What a student starts from; all of a seed from the same weights. UserError if it does not fit, or is not there."""
    fits = teacher is not None and size == teacher.size
    init = flags.init or ("teacher" if fits else "random")
    if init == "teacher":
        if not fits:
            raise common.UserError("--init teacher: " + ("its weights fit students of its own size only; give --keep 1, or --init random" if teacher else
                                                         "the closed form has none; give --init random"))
        return dmd.Start("teacher", size, lambda: teacher)
    if init == "random":
        return dmd.random_start(facts, size, m.seed)
    if init.startswith("o2mkd1"):
        start = dmd.start_from(home(flags, m.seed, 1, init.removeprefix("o2mkd1").removeprefix("-")), "ema.pt", 0)
    else:
        start = msd.checkpoint(init, facts)
    if start.size != size:
        raise common.UserError(f"--init {init}: of size {start.size}, but the students are of {size}; give the --keep or --student-size of that one")
    return start


def distil(flags: Flags, members: list, starts: list[dmd.Start], teachers: list, source, device, ranks) -> None:
    """Train the students of every N and seed, or reuse them: ema.pt and start.pt (theta_0) in seedS/o2mkdN."""
    facts, seeds = data.facts(flags.dataset, flags.resolution), edm.seeds(flags)
    edges = {N: split(flags, facts, N)[0] for N in flags.students}

    def train_stack(run, index: list[int]) -> dict:
        stack, row = [members[i] for i in index], [seeds.index(members[i].seed) for i in index]
        net = dmd.generators(flags, [starts[i] for i in index], device)
        own = [edges[m.students][m.student % (len(edges[m.students]) - 1):][:2] for m in stack]
        low, high = torch.tensor(own, device=device).T
        teacher = dmd.teacher_of(flags, row, teachers, device)
        inside = facts.net(1, starts[index[0]].size).bottleneck if flags.kd in FEATURE_LOSSES else (0,)
        outside = teachers[0].net.bottleneck if flags.kd in FEATURE_LOSSES else (0,)
        project = Projection([m.seed for m in stack], inside[0], outside[0]).to(device) if projects(flags.kd, inside, outside) else None
        return {"ema.pt": train(run, flags, stack, low, high, teacher, net, project, source(), device)}
    homes = [home(flags, m.seed, m.students) for m in members]
    configs = [{**edm.lineage(flags, m.seed), "start": s.name, "size": s.size, "edges": edges[m.students], "weight_decay": flags.weight_decay,
                **common.stage_config(flags, "o2mkd"), "kd_weight": weight_of(flags)} for m, s in zip(members, starts)]
    dmd.train_all(flags, "o2mkd", members, homes, configs, flags.steps, train_stack, starts, ranks, ("ema.pt",))
    for folder, start in dict(zip(homes, starts)).items() if ranks.rank == 0 else ():
        if not (folder / "start.pt").exists():
            D = start.load()
            common.save_tensors(folder / "start.pt", {"dataset": facts.name, "resolution": facts.resolution, "size": start.size, "partition": [()],
                                                      "net": D.state_dict()})


@dataclasses.dataclass
class Students:
    """The N students of one folder: a denoiser each, and who owns what."""
    folder: Path
    facts: data.Facts
    size: object
    start: edm.Precond                                              # theta_0
    denoisers: list[edm.Precond]
    router: Router
    seconds: float                                                  # of training, all together

    def to(self, device):
        for D in (self.start, *self.denoisers):
            D.to(device)
        return self


def load_students(folder, flags=None) -> Students:
    """Read a folder of students (runs/toy/seed0/o2mkd4). flags: --precision. UserError if it holds none, or not all."""
    folder = Path(folder)
    about = next(iter([folder / "config.json"] if (folder / "config.json").exists() else sorted(folder.glob("student*/config.json"))), None)
    about = common.load_json(about) if about else {}
    if not {"edges", "students", "dataset"} <= about.keys():
        raise common.UserError(f"{folder}: no students by noise level; give a folder such as runs/toy/seed0/o2mkd4")
    facts, N, R = data.facts(about["dataset"], about.get("resolution", 0)), about["students"], len(about["edges"]) - 1
    missing = [k for k in range(N) if not (folder / ("" if facts.stacked else f"student{k}") / "ema.pt").exists()]
    if missing:
        raise common.UserError(f"{folder}: student {missing[0]} of {N} is not trained yet; run that command again")
    if not (folder / "start.pt").exists():
        raise common.UserError(f"{folder}: its start.pt is gone; the o2mkd.py command that made the students writes it again")
    saved, start = dmd.read_students(folder / "start.pt")
    nets = [start, *(dmd.load_student(folder, "ema.pt", k) for k in range(N))]
    start, *denoisers = [edm.ready(D.net, D.sigma_data, flags, "cpu").requires_grad_(False) for D in nets] if flags else nets
    seconds = sum(common.load_json(f, "seconds")["seconds"] for f in folder.glob("done.json" if facts.stacked else "student*/done.json"))
    return Students(folder, facts, saved["size"], start, denoisers, Router(about["edges"], None if N == R else msd.partition(facts.classes, N // R)), seconds)


# -------------------------------------------------------------------------------------------------------------- evaluation

def sampled(denoise, z: Tensor, label: Tensor, steps: int, sampler: str, facts: data.Facts, device) -> Tensor:
    """Samples of labels [N] from latents z [N, *shape], on the CPU; images as uint8."""
    x = torch.cat([edm.SAMPLERS[sampler](denoise, a[None].to(device), b[None].to(device), steps)[0].cpu() for a, b in zip(z.split(facts.chunk), label.split(facts.chunk))])
    return x if facts.stacked else common.to_uint8(x)


@torch.no_grad()
def cost(D: edm.Precond, denoise, facts: data.Facts, steps: int, sampler: str, networks: int, number: int, device) -> dict:
    """Parameters kept, multiply-adds of a sample (all its evaluations), samples a second (`number` at once), of `networks` networks like D
    which `denoise` asks in turn."""
    x, sigma, label = torch.zeros(1, 1, *facts.shape, device=device), torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as count:
        denoise(x, sigma, label)
    z, many = torch.randn(number, *facts.shape, generator=common.generator("timing")), data.stratified(number, facts.classes)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        sampled(denoise, z, many, steps, sampler, facts, device)
        times.append(time.perf_counter() - begin)
    return {"parameters": networks * sum(p.numel() for p in D.parameters()), "multiply_adds": count.get_total_flops() // 2 * edm.evaluations(steps, sampler),
            "per_second": number / min(times)}


def steadiness(folder: Path) -> dict:
    """{loss: {"fall", "variation"}} of the training curves in a folder [O2MKD Fig. 9], means over its students.

    fall: how far the mean of the last twentieth lies below that of the first, relative to it; variation: standard deviation over
    mean within each tenth of the curve, so that a fall does not count, mean of the last five. The values are single batches'."""
    out = {}
    for name, curves in plot.read_metrics(folder).items() if list(folder.glob("**/metrics.csv")) else ():
        found = []
        for _, v in curves.values():
            v = torch.tensor(v, dtype=torch.float64)
            n = max(1, len(v) // 20)
            found.append([1 - v[-n:].mean() / v[:n].mean(), sum(w.std(correction=0) / w.mean() for w in v.tensor_split(10)[5:] if len(w)) / 5])
        out[name] = dict(zip(("fall", "variation"), torch.tensor(found).mean(0).tolist()))
    return out


@torch.no_grad()
def inside_outside(D, teacher, router: Router, student: int, facts: data.Facts, x: Tensor, label: Tensor, seed: int, device) -> dict:
    """Denoising and prediction loss of one student on data x [1, n, *shape], at levels of its own range and at the others [O2MKD Table 7]."""
    g, grid = common.generator(seed, "inside"), edm.sigma_bins(BINS).float()
    low, high = router.edges[student % router.ranges:][:2]
    own = torch.arange(BINS)
    own = (own >= low) & (own < high)
    out = {}
    for name, bins in (("in", own.nonzero()[:, 0]), ("out", (~own).nonzero()[:, 0])):
        if len(bins):
            sigma, noise = grid[bins[torch.randint(len(bins), x.shape[:2], generator=g)]], torch.randn(x.shape, generator=g)
            parts = o2mkd_loss(D, teacher, x.to(device), label.to(device), sigma.to(device), noise.to(device), 1.0, sigma_data=facts.sigma_data)[1]
            out |= {f"{k}_{name}": v.mean().item() for k, v in parts.items()}
    return out


@torch.no_grad()
def drift(D: edm.Precond, facts: data.Facts, x: Tensor, label: Tensor, seed: int, levels: int = 21) -> dict:
    """How the teacher's bottleneck features move with sigma [O2MKD Fig. 1], on data x [1, n, *shape]: at `levels` levels, equally spaced in
    bins, quantiles of all activations, and the Frechet distance of the features of every two levels."""
    g, grid = common.generator(seed, "drift"), edm.sigma_bins(BINS)[torch.linspace(0, BINS - 1, levels).long()].float()
    features, quantiles = [], []
    for sigma in grid.tolist():
        h = D.bottleneck(x + sigma * torch.randn(x.shape, generator=g).to(x), torch.full(label.shape, sigma).to(x), label)
        quantiles.append(h.flatten()[:1_000_000].quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).to(h)).tolist())
        features.append(fid.statistics(pooled(h)[0].cpu()))
    distance = torch.zeros(levels, levels)
    for i, j in torch.combinations(torch.arange(levels)).tolist():
        distance[i, j] = distance[j, i] = fid.frechet_distance(*features[i], *features[j])
    return {"sigma": grid.tolist(), "quantiles": quantiles, "distance": distance.tolist()}


def gradual(found: dict) -> dict:
    """The largest Frechet distance of neighbouring levels, and the mean of levels half of the grid apart: {"neighbours", "far"}.

    Gradually: no single step is as large as the way between distant levels. One abrupt jump would be."""
    d = torch.tensor(found["distance"])
    return {"neighbours": d.diagonal(1).max().item(), "far": d.diagonal(len(d) // 2).mean().item()}


MERGES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)                         # c, in units of 1/N


@torch.no_grad()
def evaluate(flags: Flags, teachers: list, references: dict, judge: data.Judge, source, device) -> dict:
    """Sample the students of every N in turn, and what else was asked for: results-o2mkd.json, whose "stages" name what was sampled."""
    facts, seeds, m = data.facts(flags.dataset, flags.resolution), edm.seeds(flags), data.DATASETS[flags.dataset].metric
    label, steps = data.stratified(flags.eval_samples, facts.classes), flags.sampler_steps
    rows: dict = {"o2mkd": {}}                                      # {stage: {N: [one per seed]}}
    teacher_rows, costs, timed = [], {}, min(flags.eval_samples, 2 * facts.chunk if facts.stacked else 100)

    def measure(stage: str, N: int, seed: int, denoise, steps: int = steps, sampler: str = flags.sampler, keep: Path | None = None, more: dict | None = None):
        z = torch.randn(flags.eval_samples, *facts.shape, generator=common.generator(seed, "report z"))
        x = sampled(denoise, z, label, steps, sampler, facts, device)
        if keep:
            common.save_tensors(keep / "samples.pt", {"x": x, "label": label})
        mine, real, report = judge.statistics(x, label), references[seed]["real"], references[seed]["report"]
        found = {f"{m}_data": judge.distance(mine, real), m: judge.distance(mine, report), **judge.check(x, label), **(more or {})}
        rows.setdefault(stage, {}).setdefault(str(N), []).append(found)
        return found[f"{m}_data"]

    bar = common.bar([(seed, N) for seed in seeds for N in (0, *flags.students)], "sampling", len(seeds) * (1 + len(flags.students)), flags.quiet)
    for seed, N in bar:                                             # N = 0: the teacher
        D_T, r = teachers[seeds.index(seed)], references[seed]
        denoise_T = denoise = edm.mu_teacher(flags, D_T, facts.exact)
        one = [common.Member(seed, 1, 0, tuple(range(facts.classes)))]
        if N == 0:
            y, mine = common.load_shards(Path(flags.out) / f"seed{seed}" / "reference", "report"), r["report"]
            if flags.sampler != "heun":                             # the reference is Heun's
                z = torch.randn(flags.eval_samples, *facts.shape, generator=common.generator(seed, "teacher z"))
                y = sampled(denoise_T, z, label, steps, flags.sampler, facts, device)
                mine = judge.statistics(y, label)
            teacher_rows.append({f"{m}_data": judge.distance(mine, r["real"]), **judge.check(y, label), **({"floor": r["floor"]} if "floor" in r else {})})
            if D_T is not None:
                where = Path(flags.out) / f"seed{seed}" / "teacher" / "drift.json"
                if not where.exists():
                    x, c = source().batch(common.Draws("drift", one), 0, 2000 if facts.stacked else 500)
                    common.save_json(where, drift(D_T, facts, x.to(device), c.to(device), seed))
                for name, value in gradual(common.load_json(where, "distance")).items():
                    rows.setdefault(f"drift-{name}", {}).setdefault("0", []).append({"distance": value})
            if seed == seeds[0] and D_T is not None:                # the closed form is no network
                costs["0"] = cost(D_T, denoise_T, facts, steps, flags.sampler, 1, timed, device)
        else:
            folder = home(flags, seed, N)
            found = load_students(folder, flags).to(device)
            denoise = routed(found.denoisers, found.router)
            value = measure("o2mkd", N, seed, denoise, keep=folder, more={"seconds": found.seconds})
            bar.set_postfix({f"{m} to data, N = {N}": f"{value:.3f}"})
            if seed == seeds[0]:
                costs[str(N)] = cost(found.denoisers[0], denoise, facts, steps, flags.sampler, N, timed, device)
            for name, value in steadiness(folder).items():
                rows.setdefault(f"loss-{name}", {}).setdefault(str(N), []).append(value)
        if flags.merge and N > 1:
            z = torch.randn(flags.eval_samples // 5, *facts.shape, generator=common.generator(seed, "merge z"))
            scan = {}
            for c in MERGES:                                        # chosen on other latents; of the toy, on another draw of the data too
                x = sampled(as_one(found, found.denoisers, c / N), z, label[:len(z)], steps, flags.sampler, facts, device)
                scan[c] = judge.distance(judge.statistics(x, label[:len(z)]), r["real_select"])
            best = min(scan, key=scan.get)
            measure("merged-mean", N, seed, as_one(found, found.denoisers))
            measure("merged", N, seed, as_one(found, found.denoisers, best / N), more={"c": best / N, "scan": list(scan.values())})
        if 0 <= flags.inspect < N > 1:
            k, D = flags.inspect, found.denoisers[flags.inspect]
            x, c = source().batch(common.Draws("inspect", one), 0, 20_000 if facts.stacked else 500)
            losses = inside_outside(D, denoise_T, found.router, k, facts, x, c, seed, device)
            measure(f"alone-{k}", N, seed, D, more=losses)
            measure(f"hybrid-{k}", N, seed, routed([D if j == k else denoise_T for j in range(N)], found.router), more=losses)
        for n in flags.curve:
            for sampler in ("heun", "ddim"):
                measure(f"{sampler}-{n}", N, seed, denoise, n, sampler)

    stages = {stage: {N: msd.summary(r, m) for N, r in of_n.items()} for stage, of_n in rows.items()}
    return {"method": "o2mkd", "dataset": flags.dataset, "seeds": seeds, "samples": flags.eval_samples, "metric": m, "title": judge.title, "steps": steps,
            "sampler": flags.sampler, "floor_data": sum(references[s]["floor_data"] for s in seeds) / len(seeds),
            "config": {**dmd.ancestry(flags, seeds[0]), **common.stage_config(flags, "o2mkd"), "kd_weight": weight_of(flags),
                       **{n: getattr(flags, n) for n in ("weight_decay", "scheme", "ranges", "keep", "student_size", "init", "sampler_steps", "sampler")}},
            "teacher": {**msd.summary(teacher_rows, m), "evaluations": edm.evaluations(steps, flags.sampler)},
            "edges": {str(N): split(flags, facts, N)[0] for N in flags.students}, "cost": costs, "students": stages["o2mkd"], "stages": stages}


def table(results: dict) -> str:
    """What a run ends with: teacher, every N, and what else was sampled, by the distance to the data."""
    m, t = f"{results['metric']}_data", results["teacher"]
    shown = {k: c for k, c in msd.COLUMNS.items() if k in t}
    head = [("", ""), (m.split("_")[0] + " to", "data"), ("", "± sd"), *[c[:2] for c in shown.values()], ("para-", "meters"), ("mult-adds", "a sample"), ("samples", "a second")]

    def line(name: str, r: dict, c: dict | None) -> list[str]:
        sd = "" if r.get(m + "_sd") is None else f"{r[m + '_sd']:.4f}"
        return [name, f"{r[m]:.4f}", sd, *[f"{r[k]:{f[2]}}" for k, f in shown.items()], *([f"{c['parameters']:,}", f"{c['multiply_adds'] / 1e6:.3g} M",
                f"{c['per_second']:,.0f}"] if c else [""] * 3)]
    rows = [[a for a, _ in head], [b for _, b in head], line(f"teacher, {t['evaluations']} evaluations", t, results["cost"].get("0"))]
    for stage, of_n in results["stages"].items():
        for N, r in of_n.items():
            if m in r and not stage.startswith(("heun-", "ddim-")):     # those: figure "curve"
                name = f"{N} student" + "s" * (N != "1") if N != "0" else "teacher"
                rows.append(line(name + ("" if stage == "o2mkd" else f", {stage}"), r, results["cost"].get(N) if stage == "o2mkd" else None))
    wide = max(len(r[0]) for r in rows)
    lines = [f"{r[0]:>{wide}} " + " ".join(f"{cell:>10}" for cell in r[1:]) for r in rows]
    name = results["title"] if results["title"] != results["metric"] else "l1"
    return "\n".join([*lines, f"{name} to the data; two draws of the data (images: training against test images): {results['floor_data']:.4f}. "
                              f"{results['steps']} steps of {results['sampler']}. Seeds: {len(results['seeds'])}. A sample uses one student an evaluation."])


def verdicts(results: dict) -> list[str]:
    """What the numbers say: N against 1, against the teacher, merged against one student and against the unmerged."""
    rows, m = results["students"], f"{results['metric']}_data"
    most, stages, out = max(rows, key=int), results["stages"], []
    if "1" in rows and most != "1":
        out.append(msd.comparison(f"N = {most} below N = 1, to the data?", rows[most], rows["1"], m))
    out.append(msd.comparison(f"N = {most}, to the data, below the teacher?", rows[most], results["teacher"], m))
    for N, r in stages.get("merged", {}).items():
        chosen, among = (", ".join(f"{c:.3g}" for c in cs) for cs in ([p["c"] for p in r["per_seed"]], [c / int(N) for c in MERGES]))
        out.append(f"N = {N} merged: c = {chosen} (1/N = {1 / int(N):.3g}) chosen among {among}; {r[m]:.4f} after, {rows[N][m]:.4f} before")
        if "1" in rows:
            out.append(msd.comparison(f"N = {N} merged below N = 1, to the data?", r, rows["1"], m))
    return out


# ------------------------------------------------------------------------------------------------------------- the command

def check_flags(flags: Flags, facts: data.Facts) -> None:
    """Raise UserError for values that are wrong, or fine alone but not together; tidies them."""
    if flags.p > 1:
        raise common.UserError(f"--p {flags.p}: a probability, from 0 to 1")
    flags.students, flags.curve = sorted(set(flags.students)), sorted(set(flags.curve))
    for N in flags.students:
        if not 1 <= N <= BINS:
            raise common.UserError(f"--students {N}: from 1 to {BINS}, the number of noise levels")
        if flags.ranges and N // flags.ranges > facts.classes:
            raise common.UserError(f"--students {N} --ranges {flags.ranges}: {N // flags.ranges} blocks of classes, but there are {facts.classes} classes")
        split(flags, facts, N)                                      # is every range there, are there classes enough?
    if not 0 < flags.keep <= 1:
        raise common.UserError(f"--keep {flags.keep}: a share of the teacher's channels, above 0 and at most 1")
    if flags.student_size and flags.source["keep"] == "flag":
        raise common.UserError(f"--keep {flags.keep} and --student-size {flags.student_size}: one of them")
    known = ("", "random", "teacher")
    if flags.init not in known and flags.init != "o2mkd1" and not flags.init.startswith("o2mkd1-") and not Path(flags.init).is_file():
        raise common.UserError(f"--init {flags.init}: " + ("students that differ cannot all be the start; one student for all levels can: o2mkd1" if flags.init.startswith("o2mkd")
                                                           else "no such file, and none of teacher, random, o2mkd1, o2mkd1-TAG"))
    same = flags.student_size == (flags.teacher_size or facts.sizes[0]) or flags.keep == 1 and not flags.student_size
    if flags.init == "teacher" and flags.teacher == "train" and not same:
        raise common.UserError("--init teacher: its weights fit students of its own size only; give --keep 1, or --init random")
    if flags.kd_weight == 0 and flags.source["kd"] == "flag":
        raise common.UserError(f"--kd {flags.kd} and --kd-weight 0: nothing would be distilled; leave one of them out")
    if flags.kd_weight < 0 and flags.kd_weight != -1:
        raise common.UserError(f"--kd-weight {flags.kd_weight}: at least 0; -1 = the one in LAMBDA")
    for name in ("ema", "teacher_ema"):
        if getattr(flags, name) >= 1:
            raise common.UserError(f"{common.option(name)} {getattr(flags, name)}: must be below 1")
    if flags.teacher == "exact" and facts.exact is None:
        raise common.UserError(f"--teacher exact: {flags.dataset} has no closed form; train one or give a checkpoint's path")
    if flags.kd in FEATURE_LOSSES and (flags.teacher == "exact" or flags.cfg != 1):
        raise common.UserError(f"--kd {flags.kd}: " + ("--teacher exact has no features; take --kd prediction" if flags.teacher == "exact" else
                                                       "guidance (--cfg) guides predictions, not features; take --kd prediction"))
    if flags.kd in ("similarity", "contrastive") and flags.micro_batch:
        raise common.UserError(f"--micro-batch: --kd {flags.kd} relates all samples of a batch; leave it out, or take another --kd")
    if flags.inspect >= max(flags.students):
        raise common.UserError(f"--inspect {flags.inspect}: a student of {max(flags.students)}, from 0 to {max(flags.students) - 1}")
    if max(flags.students) == 1 and (flags.merge or flags.inspect >= 0):
        raise common.UserError(f"--{'merge' if flags.merge else 'inspect'}: of several students; give --students too, such as 1 4")
    if flags.inspect >= 0 and flags.ranges:
        raise common.UserError("--inspect: a student for all classes; leave --ranges out")
    if any(n < 2 for n in flags.curve):
        raise common.UserError(f"--curve {' '.join(map(str, flags.curve))}: every sampler needs at least 2 steps")
    if flags.eval_samples < 2 * facts.classes:
        raise common.UserError(f"--eval-samples {flags.eval_samples}: at least two per class, {2 * facts.classes}")
    common.check_tag("--tag", flags.tag)
    edm.check_guidance(flags)
    flags.tag = flags.tag or (f"{flags.ranges}ranges" if flags.ranges else "")


def check_ranks(flags: Flags, facts: data.Facts, ranks: common.Ranks) -> None:
    """Do batches and ranks divide? Asked before anything is made. UserError if not."""
    if flags.teacher == "train":
        ranks.parts(flags.teacher_batch, flags.micro_batch)
    for N in flags.students:
        if msd.ranks_each(flags, N, ranks, facts.stacked, [("--batch", flags.batch)]) > 1 and flags.kd in ("similarity", "contrastive"):
            raise common.UserError(f"{ranks.size} ranks: --kd {flags.kd} relates all samples of a batch; start at most one rank per student")


def print_plan(flags: Flags, facts: data.Facts, where: str) -> None:
    """What is going to happen, and which student gets which noise levels and classes."""
    print(f"o2mkd: {flags.dataset}, N = {', '.join(map(str, flags.students))}, {flags.seeds} seed(s), {flags.steps} updates of batch {flags.batch}, KD by "
          f"{flags.kd} (lambda {weight_of(flags):g}), p = {flags.p:g}, size {size_of(flags, facts, flags.teacher_size or facts.sizes[0])}{where}, into {flags.out}", flush=True)
    grid = edm.sigma_bins(BINS)
    for N in flags.students:
        edges, parts = split(flags, facts, N)
        shown = [f"{a}-{b - 1} ({grid[a]:.2g} to {grid[b - 1]:.2g})" for a, b in zip(edges, edges[1:])]
        print(f"  N = {N}: bins (sigma) " + " | ".join(shown if len(shown) <= 8 else [*shown[:4], "…", shown[-1]]) + (f", for each of {msd.shown(parts)}" if parts else ""))


def estimate(flags: Flags, facts: data.Facts, size, device, shared: bool = True) -> float:
    """Seconds that the run will take from nothing on this machine, from timed forward passes: within a factor of two.

    shared: with what runs of one folder share: the teacher, its samples."""
    def forward(members: int, batch: int, kind) -> float:
        return msd._forward_seconds(facts, members, batch, kind, flags.precision, device)
    big, n, N = flags.teacher_size or facts.sizes[0], flags.seeds, len(flags.students)
    members, times = (sum(flags.students) * n, 1) if facts.stacked else (1, sum(flags.students) * n)
    total = 5 + flags.steps * times * (4.5 * forward(members, flags.batch, size) + forward(members, flags.batch, big))
    passes = sum(3 * k for k in flags.curve)                        # both samplers
    once = edm.evaluations(flags.sampler_steps, flags.sampler)
    drawn = [(size, once * N * (1 + 3 * flags.merge + 2 * (flags.inspect >= 0)) + passes * N), (big, passes)]
    if shared:
        drawn.append((big, edm.evaluations(flags.sampler_steps) * (2 if facts.stacked else 1)))
        total += (flags.teacher == "train") * flags.teacher_steps * 4.5 * forward(n if facts.stacked else 1, flags.teacher_batch, big) * (1 if facts.stacked else n)
    return total + sum(k * flags.eval_samples / facts.chunk * forward(1, facts.chunk, kind) * n for kind, k in drawn)


@common.command
def main(argv=None):
    """Train teacher and students, sample them in turn, compare, draw."""
    flags = common.parse(Flags, PRESETS, argv, __doc__)
    facts = data.facts(flags.dataset, flags.resolution)
    check_flags(flags, facts)
    if flags.dry_run:
        print_plan(flags, facts, "")
        print(common.describe(flags))
        big = flags.teacher_size or facts.sizes[0]
        with torch.device("meta" if not facts.stacked else "cpu"):
            teacher, student = (sum(p.numel() for p in facts.net(1, s).parameters()) for s in (big, size_of(flags, facts, big)))
        print(f"parameters: teacher {teacher:,}, a student {student:,}; " + "; ".join(f"N = {N}: {N * student:,}, of which an evaluation uses {student:,}" for N in flags.students))
        return
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    check_ranks(flags, facts, ranks)
    seeds, source = edm.seeds(flags), data.opened(flags, ranks)
    with common.alone(Path(flags.out), ranks):
        if not facts.stacked:
            data.same_data(flags, source())
            ranks.wait()
        teachers = [None] * len(seeds) if flags.teacher == "exact" else edm.get_teachers(flags, source, device, ranks)
        size = size_of(flags, facts, teachers[0].size if teachers[0] else flags.teacher_size or facts.sizes[0])
        members = [common.Member(seed, N, k, tuple(part.tolist())) for seed in seeds for N in flags.students for k, part in enumerate(blocks(flags, facts, N))]
        starts = [start_of(flags, facts, m, size, teachers[seeds.index(m.seed)]) for m in members]      # are they there? Before hours of training
        if ranks.rank == 0:
            seconds = estimate(flags, facts, size, device)
            print_plan(flags, facts, f", on {device} ({torch.get_num_threads()} threads, {ranks.size} rank{'s' * (ranks.size > 1)}), about "
                       f"{f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'} from nothing")
        judge = data.judge(flags, source, device, ranks)
        references = {seed: dmd.get_reference(flags, seed, D, judge, device, ranks) for seed, D in zip(seeds, teachers)}
    distil(flags, members, starts, teachers, source, device, ranks)
    if ranks.rank == 0:
        report(flags, evaluate(flags, teachers, references, judge, source, device))
    common.leave(ranks)


def report(flags: Flags, results: dict) -> None:
    """Write results-o2mkd.json, beside what the same flags and seeds left there before; print the table and verdicts; draw."""
    name = common.suffix(flags.tag)
    path = Path(flags.out) / f"results-o2mkd{name}.json"
    if path.exists():
        old = common.load_json(path, "config", "stages", "seeds")
        if all(old[k] == results[k] for k in ("config", "seeds", "samples")):
            stages = {s: {**old["stages"].get(s, {}), **results["stages"].get(s, {})} for s in {**old["stages"], **results["stages"]}}
            results = {**results, "stages": stages, "students": stages["o2mkd"], "cost": {**old["cost"], **results["cost"]}, "edges": {**old["edges"], **results["edges"]}}
        else:
            msd.set_aside(path)
    common.save_json(path, results)
    print("\n" + table(results) + "\n" + "\n".join(verdicts(results)))
    figures = plot.draw(Path(flags.out), "o2mkd" + name)
    print(f"\nresults: {path}\nfigures: " + " ".join(map(str, figures)))


if __name__ == "__main__":
    main()
