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
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common
import data
import edm
import evaluate
import fid
import msd
import run
import students
import teacher
from common import AdamW, Average, Draws, Student, generator, learning_rate
from edm import level
from flags import UserError, check, command, describe, flag, near, parse, settings
from images import to_uint8
from plot import read_metrics
from students import load_network, one_of
from tsm import tsm_loss

NAME, BY = "o2mkd", ""                                   # no best checkpoint is chosen: the last average is kept
USES = {name: name for name in ("p", "kd", "steps", "batch", "lr", "decay", "ema")}
BINS = 1000                                              # noise levels: edm.sigma_bins(BINS)
# lambda of each KD, chosen on the toy's seed 0 among 1, 4; 1, 10; 30, 300; 0.03, 0.3 (the paper does not state it)
LAMBDA = {"prediction": 1.0, "attention": 1.0, "similarity": 30.0, "contrastive": 0.03}


@dataclass
class Flags:
    """Students by noise level (O2MKD)"""
    prefix = ""
    run: run.Flags
    teacher: edm.Flags
    students: list[int] = flag([4], "number of students N; several are compared (the toy's train as one stack)", low=1,
                               below=BINS + 1)
    ranges: int = flag(0, "noise ranges R; 0 = one per student; fewer: the classes are split too, into N / R blocks", low=0)
    scheme: str = flag("uniform", "the ranges: uniform in the 1000 bins; small or large: more students on small or on large "
                                  "sigma; or bins such as 0-99,100-999")
    p: float = flag(0.75, "chance that an update's sigma come from the student's own range, else from all", low=0,
                    below=1 + 1e-9)
    kd: str = flag("prediction", "what is distilled", choices=tuple(LAMBDA))
    kd_weight: float = flag(-1.0, "lambda, weight of KD beside the denoising loss; 0 = no KD; -1 = LAMBDA's of this KD", low=-1)
    keep: float = flag(0.5, "share of the teacher's channels that students keep; 1 = its size", low=1e-9, below=1 + 1e-9)
    student_size: str = flag("", "size of the students by name, in the place of --keep", choices=("", "B", "S", "XS", "XXS"))
    init: str = flag("", "what students start from: random, teacher (its size only), o2mkd1 or o2mkd1-TAG (one student for all "
                         "levels, trained before), or a checkpoint; none = teacher where it fits, else random")
    steps: int = flag(4000, "updates of every student", low=1)
    batch: int = flag(256, "batch per student", low=1)
    lr: float = flag(1e-2, "learning rate (AdamW)", low=0)
    decay: str = flag("cosine", "its schedule after 100 warm-up updates", choices=("cosine", "linear", "constant"))
    ema: float = flag(0.998, "decay of the average of the weights", low=0, below=1)
    sampler: str = flag("heun", "of teacher and students in the table: heun, or ddim (first order, one evaluation a step)",
                        choices=tuple(edm.SAMPLERS))
    merge: bool = flag(False, "also merge the N students into one, and choose its coefficient c on other draws")
    inspect: int = flag(-1, "also sample with this student alone, and with it in its range and the teacher elsewhere; -1 = none",
                        low=-1)
    curve: list[int] = flag([], "also compare at these numbers of steps, by both samplers", low=2)

    @property
    def weight(self) -> float:
        """lambda: --kd-weight, or LAMBDA's."""
        return LAMBDA[self.kd] if self.kd_weight < 0 else self.kd_weight


# all ours: the paper follows "default training configurations" that it does not print; cifar10, imagenet64: never run
LONG = dict(steps=200_000, batch=512, decay="constant")
PRESETS = {"run": run.PRESETS, "teacher": edm.PRESETS, "": {
    ("toy", "smoke"): dict(steps=12, batch=16),
    ("fashion-mnist", "default"): dict(steps=1500, batch=64, lr=2e-3), ("fashion-mnist", "smoke"): dict(steps=4, batch=4),
    ("cifar10", "default"): dict(LONG, lr=1e-3, ema=0.9993), ("cifar10", "smoke"): dict(steps=2, batch=2),
    ("imagenet64", "default"): dict(LONG, lr=1e-4, ema=0.9999), ("imagenet64", "paper"): dict(LONG, lr=1e-4, ema=0.9999)}}
CONFLICTS = [              # (is it so?, what to say): each would give a silently wrong number, or fail after hours
    (lambda f: f.ranges and any(N % f.ranges for N in f.students),
     "--ranges {f.ranges}: that many for each block of classes; --students must be multiples of it"),
    (lambda f: f.student_size and f.keep != 0.5, "--keep {f.keep} and --student-size {f.student_size}: one of them"),
    (lambda f: f.kd in FEATURE_LOSSES and (f.teacher.which == "exact" or f.teacher.cfg != 1),
     "--kd {f.kd}: the closed form has no features, and --cfg guides predictions alone; take --kd prediction"),
    (lambda f: f.kd in ("similarity", "contrastive") and f.run.micro_batch,
     "--micro-batch: --kd {f.kd} relates all samples of a batch; leave it out, or take another --kd"),
    (lambda f: f.inspect >= max(f.students), "--inspect {f.inspect}: a student of {f.students}, numbered from 0"),
    (lambda f: f.inspect >= 0 and f.ranges, "--inspect: a student for all classes; leave --ranges out"),
    (lambda f: max(f.students) == 1 and (f.merge or f.inspect >= 0), "--merge, --inspect: of several students"),
    *teacher.CONFLICTS,
]


# ------------------------------------------------------------------------------------------------------ ranges and router

def ranges(number: int, scheme: str = "uniform") -> list[int]:
    """Edges [number + 1] of the students' ranges: student i owns the bins edges[i] … edges[i + 1] - 1 of edm.sigma_bins.

    uniform: equally many bins each, the paper's t in [(i-1)T/N, iT/N); small, large: edges at T (i/N)^2 and mirrored, so that more
    students share the small (large) levels [O2MKD, Scheme-B, Scheme-A]; else bins as in `read_ranges`. UserError for more than there are."""
    if not 1 <= number <= BINS:
        raise UserError(f"{number} noise ranges: from 1 to {BINS}, the number of noise levels")
    place = [i / number for i in range(number + 1)]
    power = {"uniform": place, "small": [u * u for u in place], "large": [1 - (1 - u) ** 2 for u in place]}
    edges = read_ranges(scheme, number) if scheme not in power else [round(BINS * u) for u in power[scheme]]
    if any(a >= b for a, b in zip(edges, edges[1:])):
        raise UserError(f"--scheme {scheme}: {number} ranges leave a student without a noise level; fewer students, or uniform")
    return edges


def read_ranges(text: str, number: int) -> list[int]:
    """'0-99,100-999' -> [0, 100, 1000]: bins of each student, ascending, each bin once. UserError for gaps and overlaps."""
    words = ("uniform", "small", "large")
    try:
        found = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        if any(len(r) != 2 for r in found):
            raise ValueError
    except ValueError:
        raise UserError(f"--scheme {text}: neither {', '.join(words)} nor ranges of bins such as 0-99,100-999{near(text, words)}") from None
    expected = 0
    for low, high in found:
        if low != expected or high < low:
            what = "empty" if high < low else f"a gap: bins {expected} to {low - 1} have no student" if low > expected else f"an overlap at bin {low}"
            raise UserError(f"--scheme {text}: range {low}-{high} is {what}; ranges ascend and cover 0 to {BINS - 1} once")
        expected = high + 1
    if expected != BINS:
        raise UserError(f"--scheme {text}: ends at bin {expected - 1}; ranges cover 0 to {BINS - 1} once, and there is no other bin")
    if len(found) != number:
        raise UserError(f"--scheme {text}: {len(found)} ranges, but {number} are needed")
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


def draw_bins(batch, low: Tensor, high: Tensor, p: float) -> Tensor:
    """Noise bins [M, b]: with probability p, tossed per student and update, uniform on its own low … high - 1, else on all.

    [O2MKD Eq. 4, Eq. 5]; low, high [M]. A range that holds the share m of the bins is drawn p + (1 - p) m of the time."""
    own = batch.once("own")[:, None] < p                                                        # [M, 1]
    low, high = torch.where(own, low[:, None], 0), torch.where(own, high[:, None], BINS)
    bins = (low + batch.uniform("sigma") * (high - low)).long()
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
        drawn = [torch.randn(inside, outside, generator=generator(seed, "projection")) for seed in seeds]
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
    prediction = tsm_loss(lambda *_: D, lambda *_: target, x, label, sigma, noise, sigma_data).mean(-1)
    parts = {"denoising": denoising.detach(), "prediction": prediction.detach()}
    if not features:
        return denoising + lam * prediction, parts
    if kd == "contrastive":
        h, h_teacher = pooled(h), pooled(h_teacher)
    distilled = FEATURE_LOSSES[kd](project(h), h_teacher)
    parts[kd] = (distilled.mean(-1) if distilled.ndim > 1 else distilled)
    return denoising + lam * parts[kd], {**parts, kd: parts[kd].detach()}


# ---------------------------------------------------------------------------------------------------------------- training

def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.steps, flags.batch


def train(run, flags, task) -> dict:
    """Train the stack of students task.G, at home in their ranges; returns {file: the weights to keep in it}.

    task.teacher: mu_teacher (task.D: with features), frozen; task.real: data of each student's classes."""
    G, lam = task.G, flags.weight
    own = [edges(flags, s.K)[s.k % (len(edges(flags, s.K)) - 1):][:2] for s in run.students]
    low, high = torch.tensor(own, device=run.ranks.device).T                                    # [M]
    features = flags.kd in FEATURE_LOSSES and lam > 0
    project = projection(flags, run.students, G, task.D) if features else None
    average = Average(G, flags.ema)
    opt = AdamW(nn.ModuleList([G, project]) if project else G, run)
    state = dict(student=G, **average.state(), optimizer=opt, **({"project": project} if project else {}))
    for step in run.steps(state):
        for batch in run.batches(step):                             # one, unless ranks or --micro-batch ask for more
            x, label = task.real(batch)                                                         # [M, b, *shape]
            sigma = level(draw_bins(batch, low, high, flags.p))                                 # [M, b]
            loss, parts = o2mkd_loss(G, task.D if features else task.teacher, x, label, sigma, batch.normal("noise"), lam,
                                     flags.kd, project or (lambda h: h))
            opt.add(loss * (x.shape[1] / run.batch))                                            # [M]
        opt.step(step, learning_rate(flags.lr, step, flags.steps, edm.WARMUP, flags.decay))
        average.update(step)
        if (step + 1) % 20 == 0 or step == 0:
            run.log(step + 1, **parts)                              # of this one batch (its last micro-batch): how steady?
        run.save(step + 1, state)
    return {"ema.pt": average.now}


def projection(flags, students: list[Student], G, D) -> Projection | None:
    """The stack's Projection to the teacher's width, where this KD needs one."""
    inside, outside = G.net.bottleneck, D.net.bottleneck
    if not projects(flags.kd, inside, outside):
        return None
    return Projection([s.seed for s in students], inside[0], outside[0]).to(next(G.parameters()).device)


# ----------------------------------------------------------------------------------------------------------------- merging

def merge(start: nn.Module, students: list[nn.Module], c: float | None = None) -> dict:
    """theta_0 + c sum_i (theta_i - theta_0), a state [Ilharco 2023, task arithmetic]; c = None: 1/N, the students' mean.

    UserError if there is none, if the networks are of different sizes, or c is no number."""
    if not students or c is not None and not math.isfinite(c):
        raise UserError(f"merge: {'no students' if not students else f'c = {c}'}; give at least one student, and a finite c")
    c, first = 1 / len(students) if c is None else c, start.state_dict()
    others = [s.state_dict() for s in students]
    if any({k: v.shape for k, v in o.items()} != {k: v.shape for k, v in first.items()} for o in others):
        raise UserError("merge: students of different sizes; only networks of one size, from one start, can be merged")
    return {k: v + c * sum(o[k] - v for o in others) for k, v in first.items()}


def merge_folders(folders: list, c: float | None = None) -> edm.Precond:
    """All students of these folders (seed0/o2mkd4 …) merged into one, frozen. UserError if their data or starts differ."""
    found = [load_students(f) for f in folders]
    if len({(f.facts.name, common.fingerprint(f.start)) for f in found}) != 1:
        raise UserError("merge: students of different data or sizes, or that started from different weights (or no folder)")
    return as_one(found[0], [D for f in found for D in f.denoisers], c)


def as_one(found, denoisers: list, c: float | None = None) -> edm.Precond:
    """`merge` as a denoiser of its own, frozen."""
    out = copy.deepcopy(found.start)
    out.load_state_dict(merge(found.start, denoisers, c))
    return out


# --------------------------------------------------------------------------------------------------------- who has what

def tag_of(flags) -> str:
    """--tag, or the number of ranges."""
    return flags.run.tag or (f"{flags.ranges}ranges" if flags.ranges else "")


def home(stage, flags, s: Student) -> Path:
    """OUT/seedS/o2mkdN[-TAG]"""
    return folder_of(flags, s.seed, s.K)


def folder_of(flags, seed: int, N: int, tag: str | None = None) -> Path:
    tag = tag_of(flags) if tag is None else tag
    return Path(flags.run.out) / f"seed{seed}" / f"o2mkd{N}{run.suffix(tag)}"


def edges(flags, N: int) -> list[int]:
    """Edges of the R ranges of N students."""
    return ranges(flags.ranges or N, flags.scheme)


def blocks(flags, facts: data.Facts, N: int) -> list[Tensor]:
    """Classes of each of N students: student block * R + range has its block's."""
    R = flags.ranges or N
    return [part for part in msd.partition(facts.classes, N // R) for _ in range(R)]


def size_of(flags, facts: data.Facts, teacher_size):
    """The students' size: --student-size, or the teacher's with --keep of its channels."""
    return flags.student_size or (teacher_size if flags.keep == 1 else facts.narrowed(teacher_size, flags.keep))


def start_of(flags, given, N: int) -> students.Start:
    """What a student starts from; all of a seed from the same weights. UserError if it does not fit, or is not there."""
    size = size_of(flags, given.facts, given.size)
    fits = given.net is not None and size == given.size
    init = flags.init or ("teacher" if fits else "random")
    if init == "random":
        return students.random_start(given.facts, size, given.seed)
    if init == "teacher":
        start = students.Start("teacher", given.size if given.net else None, lambda: given.net)
    elif init.startswith("o2mkd1"):
        start = students.start_from(folder_of(flags, given.seed, 1, init[len("o2mkd1"):].removeprefix("-")), "ema.pt", 0)
    else:
        start = students.checkpoint(init, given.facts)
    if start.size != size:
        raise UserError(f"--init {init}: of size {start.size}, but the students are of {size}; give the --keep or "
                        f"--student-size of that one, or --init random")
    return start


@dataclass
class Students:
    """The N students of one folder: a denoiser each, and who owns what."""
    facts: data.Facts
    start: edm.Precond                                              # theta_0
    denoisers: list[edm.Precond]
    router: Router
    seconds: float                                                  # of training, all together

    def to(self, device) -> "Students":
        for D in (self.start, *self.denoisers):
            D.to(device)
        return self


def load_students(folder) -> Students:
    """Read a folder of students (runs/toy/seed0/o2mkd4). UserError if it holds none; FileNotFoundError if one is not there."""
    folder = Path(folder)
    about = next(iter([*folder.glob("config.json"), *sorted(folder.glob("student*/config.json"))]), None)
    if about is None:
        raise UserError(f"{folder}: no students by noise level; give a folder such as runs/toy/seed0/o2mkd4")
    about = run.load_json(about, "edges", "students", "dataset")
    facts, N, R = data.facts(about["dataset"], about.get("resolution", 0)), about["students"], len(about["edges"]) - 1
    files = [folder / ("" if facts.stacked else f"student{k}") / "ema.pt" for k in range(N)]
    denoisers = [one_of(load_network(file), k if facts.stacked else 0) for k, file in enumerate(files)]
    seconds = sum(run.load_json(f, "seconds")["seconds"] for f in dict.fromkeys(f.with_name("done.json") for f in files))
    router = Router(about["edges"], None if N == R else msd.partition(facts.classes, N // R))
    return Students(facts, load_network(folder / "start.pt").D, denoisers, router, seconds)


# ------------------------------------------------------------------------------------------------- probes of the claims

def steadiness(folder: Path) -> dict:
    """{loss: {"fall", "variation"}} of the training curves in a folder [O2MKD Fig. 9], means over its students.

    fall: how far the mean of the last twentieth lies below that of the first, relative to it; variation: standard deviation over
    mean within each tenth of the curve, so that a fall does not count, mean of the last five. The values are single batches'."""
    out = {}
    for name, curves in read_metrics(folder).items() if list(folder.glob("**/metrics.csv")) else ():
        found = []
        for _, v in curves.values():
            v = torch.tensor(v, dtype=torch.float64)
            n = max(1, len(v) // 20)
            found.append([1 - v[-n:].mean() / v[:n].mean(), sum(w.std(correction=0) / w.mean() for w in v.tensor_split(10)[5:] if len(w)) / 5])
        out[name] = dict(zip(("fall", "variation"), torch.tensor(found).mean(0).tolist()))
    return out


@torch.no_grad()
def inside_outside(D, teacher, router: Router, student: int, x: Tensor, label: Tensor, seed: int) -> dict:
    """Denoising and prediction loss of one student on data x [1, n, *shape], at levels of its own range and at the others [O2MKD Table 7]."""
    g, grid = generator(seed, "inside"), edm.sigma_bins(BINS).float()
    low, high = router.edges[student % router.ranges:][:2]
    own = torch.arange(BINS)
    own = (own >= low) & (own < high)
    out = {}
    for name, bins in (("in", own.nonzero()[:, 0]), ("out", (~own).nonzero()[:, 0])):
        if len(bins):
            sigma, noise = grid[bins[torch.randint(len(bins), x.shape[:2], generator=g)]], torch.randn(x.shape, generator=g)
            parts = o2mkd_loss(D, teacher, x, label, sigma.to(x.device), noise.to(x.device), 1.0)[1]
            out |= {f"{k}_{name}": v.mean().item() for k, v in parts.items()}
    return out


@torch.no_grad()
def drift(D: edm.Precond, x: Tensor, label: Tensor, seed: int, levels: int = 21) -> dict:
    """How the teacher's bottleneck features move with sigma [O2MKD Fig. 1], on data x [1, n, *shape]: at `levels` levels, equally spaced in
    bins, quantiles of all activations, and the Frechet distance of the features of every two levels."""
    g, grid = generator(seed, "drift"), edm.sigma_bins(BINS)[torch.linspace(0, BINS - 1, levels).long()].float()
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


# ---------------------------------------------------------------------------------------------------- what a run ends with

MERGES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)                         # c, in units of 1/N


def sampled(denoise, z: Tensor, label: Tensor, steps: int, sampler: str, facts: data.Facts, device) -> Tensor:
    """Samples of labels [N] from latents z [N, *shape], on the CPU; images as uint8."""
    solve, chunks = edm.SAMPLERS[sampler], zip(z.split(facts.chunk), label.split(facts.chunk))
    x = torch.cat([solve(denoise, a[None].to(device), b[None].to(device), steps)[0].cpu() for a, b in chunks])
    return x if facts.stacked else to_uint8(x)


def samplers(flags: Flags, inputs: dict, device):
    """What is sampled, one after another: the students of every seed and N in turn, and what else was asked for."""
    n_steps, number = flags.teacher.sampler_steps, flags.run.eval_samples
    for seed, given in inputs.items():
        facts, judge, mu = given.facts, given.judge, given.mu_teacher

        def by(denoise, steps: int = n_steps, sampler: str = flags.sampler):
            return lambda z, label: sampled(denoise, z, label, steps, sampler, facts, device)
        for N in (0, *flags.students):                              # 0: the teacher
            found, denoise = None, mu
            if N:
                folder = folder_of(flags, seed, N)
                found = load_students(folder).to(device)
                denoise = routed(found.denoisers, found.router)
                yield evaluate.Sampler(NAME, N, seed, by(denoise), keep=folder, seconds=found.seconds)
            if flags.merge and N > 1:                               # c is chosen on other latents, and another draw of the data
                z = torch.randn(number // 5, *facts.shape, generator=generator(seed, "merge z"))
                label, scan = data.stratified(len(z), facts.classes), []
                for c in MERGES:
                    x = by(as_one(found, found.denoisers, c / N))(z, label)
                    scan.append(judge.distance(judge.statistics(x, label), given.references["real_select"]))
                c = MERGES[scan.index(min(scan))] / N
                yield evaluate.Sampler("merged-mean", N, seed, by(as_one(found, found.denoisers)))
                yield evaluate.Sampler("merged", N, seed, by(as_one(found, found.denoisers, c)), more={"c": c, "scan": scan})
            if 0 <= flags.inspect < N > 1:
                k, D = flags.inspect, found.denoisers[flags.inspect]
                x, label = _some(given, "inspect", 20_000 if facts.stacked else 500)
                losses = inside_outside(D, mu, found.router, k, x.to(device), label.to(device), seed)
                yield evaluate.Sampler(f"alone-{k}", N, seed, by(D), more=losses)
                hybrid = routed([D if j == k else mu for j in range(N)], found.router)
                yield evaluate.Sampler(f"hybrid-{k}", N, seed, by(hybrid), more=losses)
            for steps in flags.curve:
                for sampler in edm.SAMPLERS:
                    yield evaluate.Sampler(f"{sampler}-{steps}", N, seed, by(denoise, steps, sampler))


def _some(given, purpose: str, number: int) -> tuple[Tensor, Tensor]:
    """Data x [1, number, *shape] of all classes, and their labels."""
    everyone = [Student(given.seed, 1, 0, tuple(range(given.facts.classes)))]
    return given.source().batch(Draws(purpose, everyone), 0, number)


def probes(flags: Flags, inputs: dict, device) -> dict:
    """{stage: {str(N): [a Row per seed]}}: drift of the teacher's features, steadiness of each loss."""
    rows: dict = {}
    for seed, given in inputs.items():
        if given.net is not None:
            path = Path(flags.run.out) / f"seed{seed}" / "teacher" / "drift.json"
            if not path.exists():
                x, label = _some(given, "drift", 2000 if given.facts.stacked else 500)
                run.save_json(path, drift(given.net, x.to(device), label.to(device), seed))
            for name, value in gradual(run.load_json(path, "distance")).items():
                row = evaluate.Row(more={"distance": value})
                rows.setdefault(f"drift-{name}", {}).setdefault("0", []).append(row)
        for N in flags.students:
            for name, found in steadiness(folder_of(flags, seed, N)).items():
                rows.setdefault(f"loss-{name}", {}).setdefault(str(N), []).append(evaluate.Row(more=found))
    return rows


def costs(flags: Flags, given, device) -> dict:
    """{str(N): parameters kept, multiply-adds of a sample (all its evaluations), samples a second}, of the first seed; 0: teacher."""
    facts, steps, out = given.facts, flags.teacher.sampler_steps, {}
    number = min(flags.run.eval_samples, 2 * facts.chunk if facts.stacked else 100)
    z, label = torch.randn(number, *facts.shape, generator=generator("timing")), data.stratified(number, facts.classes)
    for N in (0, *flags.students):
        found = load_students(folder_of(flags, given.seed, N)).to(device) if N else None
        D, denoise = (found.denoisers[0], routed(found.denoisers, found.router)) if N else (given.net, given.mu_teacher)
        if D is not None:                                           # the closed form is no network
            each = evaluate.multiply_adds(denoise, facts, device) * edm.evaluations(steps, flags.sampler)
            speed = evaluate.throughput(lambda: sampled(denoise, z, label, steps, flags.sampler, facts, device), number)
            out[str(N)] = {"parameters": max(N, 1) * sum(p.numel() for p in D.parameters()), "multiply_adds": each,
                           "per_second": speed}
    return out


def report(flags: Flags, inputs: dict, device) -> None:
    """Measure the students of every N; results-o2mkd.json, table, verdicts, figures."""
    steps, rows, first = flags.teacher.sampler_steps, probes(flags, inputs, device), next(iter(inputs.values()))
    of_teacher = None
    if flags.sampler != "heun":                                     # the kept samples are Heun's
        of_teacher = []
        for seed, given in inputs.items():
            z = torch.randn(flags.run.eval_samples, *given.facts.shape, generator=generator(seed, "teacher z"))
            label = data.stratified(len(z), given.facts.classes)
            y = sampled(given.mu_teacher, z, label, steps, flags.sampler, given.facts, device)
            of_teacher.append(evaluate.teacher_row(given, y))
    rows |= evaluate.measure_all(samplers(flags, inputs, device), inputs, flags.run.eval_samples)
    config = {**first.ancestry, **settings(flags, NAME, USES), "kd_weight": flags.weight, "scheme": flags.scheme,
              "ranges": flags.ranges, "keep": flags.keep, "student_size": flags.student_size, "init": flags.init,
              "sampler_steps": steps, "sampler": flags.sampler}
    results = evaluate.results_of(flags.run, inputs, rows, edm.evaluations(steps, flags.sampler), of_teacher, "o2mkd",
                                  configs={NAME: config}, steps=steps, sampler=flags.sampler,
                                  edges={str(N): edges(flags, N) for N in flags.students}, cost=costs(flags, first, device))
    path = Path(flags.run.out) / f"results-o2mkd{run.suffix(tag_of(flags))}.json"
    evaluate.report(path, results, evaluate.verdicts(results))


@command
def main(argv=None) -> int:
    """Train teacher and students, sample them in turn, compare, draw."""
    flags = parse(Flags, PRESETS, argv, __doc__)
    check(flags, CONFLICTS)
    ranks, facts = run.start(flags.run), data.facts(flags.run.dataset, flags.run.resolution)
    if ranks.rank == 0:
        print(f"o2mkd: {facts.name}, N = {', '.join(map(str, flags.students))}, {flags.run.seeds} seed(s), {flags.steps} updates of "
              f"batch {flags.batch}, KD by {flags.kd} (lambda {flags.weight:g}), p = {flags.p:g}, into {flags.run.out}", flush=True)
        grid = edm.sigma_bins(BINS)
        for N in flags.students:
            own = [f"{a}-{b - 1} ({grid[a]:.2g} to {grid[b - 1]:.2g})" for a, b in zip(edges(flags, N), edges(flags, N)[1:])]
            print(f"  N = {N}: bins (sigma) " + " | ".join(own if len(own) <= 8 else [*own[:4], "…", own[-1]]))
    if flags.run.dry_run:
        print(describe(flags))
        return 0
    inputs = teacher.prepare(flags, ranks, students_by_class=False)
    everyone = []
    for seed, given in inputs.items():
        for N in flags.students:
            start = start_of(flags, given, N)
            everyone += [Student(seed, N, k, tuple(part.tolist()), start) for k, part in enumerate(blocks(flags, facts, N))]
    shares = [msd.filter_adm(students.whole(facts), torch.tensor(s.classes)) for s in everyone]
    students.distil(sys.modules[__name__], everyone, shares, inputs, flags, ranks, home, lambda s: {
        "edges": edges(flags, s.K), "size": s.start.size, "kd_weight": flags.weight})
    for s in everyone if ranks.rank == 0 else ():                   # theta_0, for merging
        path = home(None, flags, s) / "start.pt"
        if not path.exists():
            run.save_tensors(path, {"dataset": facts.name, "resolution": facts.resolution, "size": s.start.size,
                                    "partition": [()], "net": s.start.load().state_dict()})
    if ranks.rank == 0:
        report(flags, inputs, ranks.device)
    common.leave(ranks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
