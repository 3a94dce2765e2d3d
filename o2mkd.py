"""One-to-many knowledge distillation: one teacher, N small students, each at home in a range of noise levels [O2MKD].

[Ma and Zhang 2024, arXiv 2410.04191]; msd.py splits the classes instead. The sampler keeps its many steps and passes
from student to student: an evaluation costs one student, whatever N is.

  ranges of the noise levels, their owners   [O2MKD Sec. O2MKD]       ranges, Router, routed
  own range with probability p, else all     [O2MKD Eq. 4, Eq. 5]     draw_bins
  denoising loss + lambda KD                 [O2MKD Eq. 2, Eq. 3]     o2mkd_loss
  KD by features [Zagoruyko 2017], [Tung and Mori 2019], [Tian 2020]  FEATURE_LOSSES
  students merged into one                   [Ilharco 2023]           merge

Departures from the paper, whose formulas and most numbers are not in its text
 1. Timesteps are edm.sigma_bins, losses EDM's, samplers Heun's and its first order, DDIM; networks know the class.
    p, lambda and N were chosen on the toy's seed 0.
 2. Small students start from random weights, alike within a seed: which of the teacher's to keep is not said.
 3. Features are the bottleneck's. Contrastive KD compares with the batch, not a memory bank. Attention KD: the norm is
    squared; ToyNet's units are its positions. Narrow U-Nets may have no self-attention.

Run      python o2mkd.py --dataset toy --students 1 4 --merge
GPUs     torchrun --nproc-per-node 4 o2mkd.py --dataset imagenet64 --students 4
"""
import copy
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import edm
import evaluate
import fid
import run
import teacher
from common import AdamW, Average, Draws, Student, generator, learning_rate, leave, world
from edm import level
from flags import UserError, check, command, describe, flag, parse, values
from images import to_uint8
from plot import read_metrics
from students import Start, distil, load_network, one_of, random_start, start_from, whole

NAME, BY = "o2mkd", ""  # no best checkpoint is chosen
USES = {k: k for k in ("p", "kd", "steps", "batch", "lr", "decay", "ema")}
BINS = 1000  # of edm.sigma_bins
# lambda: the better of two, on the toy's seed 0
LAMBDA = {"prediction": 1.0, "attention": 1.0, "similarity": 30.0, "contrastive": 0.03}


@dataclass
class Flags:
    """Students by noise level (O2MKD)"""
    prefix = ""
    run: run.Flags
    teacher: edm.Flags
    students: list[int] = flag([4], "numbers of students N", low=1)
    scheme: str = flag("uniform", "uniform; small, large: more students at that noise; or bins: 0-99,100-999")
    p: float = flag(0.75, "chance that an update's sigma are of the own range", low=0, below=1 + 1e-9)
    kd: str = flag("prediction", "what is distilled", choices=tuple(LAMBDA))
    kd_weight: float = flag(-1.0, "lambda, weight of KD; 0 = none; -1 = this KD's own", low=-1)
    keep: float = flag(0.5, "width of the students, as a share of the teacher's channels", low=0)
    student_size: str = flag("", "their size by name, in the place of --keep", choices=("", "B", "S", "XS", "XXS"))
    init: str = flag("", "start from o2mkd1 or o2mkd1-TAG, one student for all levels; none = the teacher's weights "
                         "or random ones", pattern=r"(o2mkd1(-[\w.-]+)?)?")
    steps: int = flag(4000, "updates of every student", low=1)
    batch: int = flag(256, "batch per student", low=1)
    lr: float = flag(1e-2, "learning rate (AdamW)", low=0)
    decay: str = flag("cosine", "its schedule after warm-up", choices=("cosine", "linear", "constant"))
    ema: float = flag(0.998, "decay of the average of the weights", low=0, below=1)
    sampler: str = flag("heun", "of teacher and students in the table", choices=tuple(edm.SAMPLERS))
    merge: bool = flag(False, "also the students merged into one")
    inspect: int = flag(-1, "also student k alone, and k in its range with the teacher elsewhere", low=-1)
    curve: list[int] = flag([], "also these numbers of steps, by both samplers", low=2)

    @property
    def weight(self) -> float:
        """lambda"""
        return LAMBDA[self.kd] if self.kd_weight < 0 else self.kd_weight


# ours: the paper prints none; cifar10, imagenet64: never run
LONG = dict(steps=200_000, batch=512, decay="constant")
PRESETS = {"run": run.PRESETS, "teacher": edm.PRESETS, "": {
    ("toy", "smoke"): dict(steps=12, batch=16),
    ("fashion-mnist", "default"): dict(steps=1500, batch=64, lr=2e-3),
    ("fashion-mnist", "smoke"): dict(steps=4, batch=4),
    ("cifar10", "default"): dict(LONG, lr=1e-3, ema=0.9993), ("cifar10", "smoke"): dict(steps=2, batch=2),
    ("imagenet64", "default"): dict(LONG, lr=1e-4, ema=0.9999)}}
CONFLICTS = [
    (lambda f: f.kd in FEATURE_LOSSES and (f.teacher.which == "exact" or f.teacher.cfg != 1),
     "--kd {f.kd}: the closed form has no features, and --cfg guides predictions alone"),
    *teacher.CONFLICTS,
]


# ---- ranges and router

def ranges(number: int, scheme: str = "uniform") -> list[int]:
    """Edges [number + 1]: student i owns the bins edges[i] … edges[i + 1] - 1 of edm.sigma_bins.

    small, large: edges at T (i/N)^2, mirrored: more students there [O2MKD, Scheme-B, Scheme-A]. UserError if not every
    bin has one owner."""
    place = [i / number for i in range(number + 1)]
    power = {"uniform": place, "small": [u * u for u in place], "large": [1 - (1 - u) ** 2 for u in place]}
    edges = [round(BINS * u) for u in power.get(scheme, [0])] + [int(n) + 1 for n in re.findall(r"-(\d+)", scheme)]
    bins = ",".join(f"{a}-{b - 1}" for a, b in zip(edges, edges[1:]))
    if scheme not in (*power, bins) or edges != sorted({*edges}) or (len(edges), edges[-1]) != (number + 1, BINS):
        raise UserError(f"--scheme {scheme}: not {number} ranges that cover the bins 0 to {BINS - 1} once, none empty")
    return edges


class Router:
    """Which student k [...] answers? The owner of the sigma [...] passed to the network; the outer ranges are open."""

    def __init__(self, edges: list[int]):
        self.bounds = edm.sigma_bins(BINS)[edges[1:-1]].float()  # a sampler passes float32 levels

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.bucketize(sigma.float(), self.bounds.to(sigma.device), right=True)


def routed(denoisers: list, router: Router):
    """The denoiser (x, sigma, label) -> D that asks each sample's own student; the teacher in the place of some makes
    the paper's hybrid (FID2)."""
    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        k = router(sigma)
        owners = k.unique().tolist()
        if len(owners) == 1:
            return denoisers[owners[0]](x, sigma, label)
        out = torch.empty_like(x)
        for i in owners:
            out[k == i] = denoisers[i](x[k == i][None], sigma[k == i][None], label[k == i][None])[0]
        return out
    return denoise


def draw_bins(batch, low: Tensor, high: Tensor, p: float) -> Tensor:
    """Noise bins [M, b]: with probability p, tossed per student and update, uniform on its low … high - 1 [M], else on
    all [O2MKD Eq. 4, Eq. 5]."""
    own = batch.once("own")[:, None] < p  # [M, 1]
    low, high = torch.where(own, low[:, None], 0), torch.where(own, high[:, None], BINS)
    return torch.minimum((low + batch.uniform("sigma") * (high - low)).long(), high - 1)  # rounding up at the end


# ---- the losses

def pooled(h: Tensor) -> Tensor:
    """Features [M, b, C]: of images the mean over positions."""
    return h.mean((-2, -1)) if h.ndim > 3 else h


def attention_loss(h: Tensor, h_teacher: Tensor) -> Tensor:
    """||A(h) - A(h_teacher)||^2 [M] [Zagoruyko and Komodakis 2017, Eq. 2]; A, of norm 1: mean squares over C of
    h [M, b, C, H, W], squares of h [M, b, C]."""
    squares = (v.square().mean(-3).flatten(-2) if v.ndim > 3 else v.square() for v in (h, h_teacher))
    a, b = (F.normalize(v, dim=-1) for v in squares)
    return (a - b).square().sum(-1).mean(-1)


def similarity_loss(h: Tensor, h_teacher: Tensor) -> Tensor:
    """||S(h) - S(h_teacher)||_F^2 / b^2 [M] [Tung and Mori 2019, Eq. 4]; S: the batch's products, rows of norm 1."""
    f, g = h.flatten(2), h_teacher.flatten(2)  # of any two widths
    return (F.normalize(f @ f.mT, dim=-1) - F.normalize(g @ g.mT, dim=-1)).square().mean((-2, -1))


def contrastive_loss(h: Tensor, h_teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Do features tell their sample among the teacher's [Tian 2020]? Cross-entropy [M] of cosines, less its own."""
    s, t = (F.normalize(pooled(v), dim=-1) for v in (h, h_teacher))
    gain = (s @ t.mT / temperature).log_softmax(-1) - (t @ t.mT / temperature).log_softmax(-1)
    return -gain.diagonal(dim1=-2, dim2=-1).mean(-1)


FEATURE_LOSSES = {"attention": attention_loss, "similarity": similarity_loss, "contrastive": contrastive_loss}


class Projection(nn.Module):
    """A linear layer per student, trained beside it, from its features to the teacher's width [Romero 2015]; nothing
    where this KD takes any two widths."""

    def __init__(self, kd: str, students: list[Student], inside: tuple, outside: tuple):
        super().__init__()
        self.weight, a, b = None, inside[0], outside[0]
        if a != b and (kd == "contrastive" or kd == "attention" and len(inside) == 1):
            drawn = [torch.randn(a, b, generator=generator(s.seed, "projection")) for s in students]
            self.weight = nn.Parameter(torch.stack(drawn) * a ** -0.5)  # [M, a, b]

    def forward(self, h: Tensor) -> Tensor:
        return h if self.weight is None else torch.bmm(pooled(h), self.weight)


def o2mkd_loss(student, teacher, x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor, lam: float,
               kd: str = "prediction", project=nn.Identity()) -> tuple[Tensor, dict]:
    """Denoising loss + lambda KD of data x [M, b, *shape], batch mean [M] [O2MKD Eq. 2, Eq. 3]; its parts, detached.

    teacher: frozen, and not asked if lambda is 0. Beside features, "prediction" is watched only."""
    x_t = x + edm.like(sigma, x) * noise
    D, h = student(x_t, sigma, label, features=True)

    def away(target: Tensor) -> Tensor:  # EDM's loss, and TSM's: only the target differs
        return (edm.loss_weight(sigma) * edm.per_sample((D - target) ** 2)).mean(-1)
    parts = {"denoising": away(x)}
    if lam > 0 and kd in FEATURE_LOSSES:
        target, h_teacher = teacher(x_t, sigma, label, features=True)
        parts |= {"prediction": away(target), kd: FEATURE_LOSSES[kd](project(h), h_teacher)}
    elif lam > 0:
        parts["prediction"] = away(teacher(x_t, sigma, label))
    loss = parts["denoising"] + lam * parts[kd] if lam > 0 else parts["denoising"]
    return loss, {name: v.detach() for name, v in parts.items()}


# ---- training

def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.steps, flags.batch


def train(run, flags, task) -> dict:
    """Train the stack task.G on task.real, each student at home in its range; {file: the weights to keep in it}."""
    G, kd, mu_teacher, project = task.G, flags.kd, task.teacher, nn.Identity()
    if kd in ("similarity", "contrastive") and (len(run.slices) > 1 or run.ranks.size > 1):
        raise UserError(f"--kd {kd} relates all samples of a batch: no --micro-batch, one rank per student")
    if kd in FEATURE_LOSSES:
        mu_teacher = task.teacher_net
        project = Projection(kd, run.students, G.net.bottleneck, mu_teacher.net.bottleneck).to(task.device)
    own = [ranges(s.K, flags.scheme)[s.k:][:2] for s in run.students]
    low, high = torch.tensor(own, device=task.device).T  # [M]
    start = copy.deepcopy(G).requires_grad_(False)  # theta_0
    average, opt = Average(G, flags.ema), AdamW(nn.ModuleList([G, project]), run)
    state = dict(student=G, **average.state(), optimizer=opt)
    state |= {"project": project} if [*project.parameters()] else {}

    for step in run.steps(state):
        for batch in run.batches(step):
            x, label = task.real(batch)  # [M, b, *shape]
            sigma = level(draw_bins(batch, low, high, flags.p))  # [M, b]
            loss, parts = o2mkd_loss(G, mu_teacher, x, label, sigma, batch.normal("noise"), flags.weight, kd, project)
            opt.add(loss * (x.shape[1] / run.batch))  # [M]
        opt.step(step, learning_rate(flags.lr, step, flags.steps, edm.WARMUP, flags.decay))
        average.update(step)
        if (step + 1) % 20 == 0 or step == 0:
            run.log(step + 1, **parts)  # of one batch
        run.save(step + 1, state)
    return {"start.pt": start, "ema.pt": average.now}


# ---- who has what

def folder_of(flags, seed: int, N: int) -> Path:
    """OUT/seedS/o2mkdN[-TAG]"""
    return Path(flags.run.out) / f"seed{seed}" / f"o2mkd{N}{run.suffix(flags.run.tag)}"


def start_of(flags, given) -> Start:
    """theta_0, of all students of a seed. UserError if of another size."""
    size = flags.student_size or (given.size if flags.keep == 1 else given.facts.narrowed(given.size, flags.keep))
    if flags.init:
        start = start_from(folder_of(flags, given.seed, 1).with_name(flags.init), "ema.pt", 0)
    elif given.net and given.size == size:
        start = Start("teacher", size, lambda: given.net)
    else:
        start = random_start(given.facts, size, given.seed)
    if start.size != size:
        raise UserError(f"--init {flags.init}: of size {start.size}, not {size}; give its --keep")
    return start


@dataclass
class Students:
    """A denoiser each; seconds, flops: of training, all together."""
    facts: data.Facts
    start: edm.Precond  # theta_0
    denoisers: list[edm.Precond]
    router: Router
    seconds: float
    flops: float

    def to(self, device):
        for D in (self.start, *self.denoisers):
            D.to(device)
        return self


def load_students(folder) -> Students:
    """Of a folder (runs/toy/seed0/o2mkd4); OSError if it has none."""
    folder = Path(folder)
    first = folder if (folder / "ema.pt").exists() else folder / "student0"
    start, about = load_network(first / "start.pt"), run.load_json(first / "config.json")
    facts, edges, N = start.facts, about["edges"], about["students"]
    places = [folder] if first == folder else [folder / f"student{k}" for k in range(N)]
    found = [load_network(place / "ema.pt") for place in places]
    denoisers = [one_of(network, k) for network in found for k in range(len(network.parts))]
    seconds, flops = sum(n.seconds for n in found), sum(n.flops * len(n.parts) for n in found)
    return Students(facts, one_of(start, 0), denoisers, Router(edges), seconds, flops)


def merge(start: edm.Precond, students: list[edm.Precond], c: float | None = None) -> edm.Precond:
    """theta_0 + c sum_i (theta_i - theta_0) [Ilharco 2023]; c = None: 1/N, the students' mean."""
    c, states, merged = 1 / len(students) if c is None else c, [D.state_dict() for D in students], copy.deepcopy(start)
    merged.load_state_dict({k: v + c * sum(s[k] - v for s in states) for k, v in start.state_dict().items()})
    return merged


# ---- probes of the claims

def steadiness(folder: Path) -> dict:
    """{loss: {"fall", "variation"}} of training curves [O2MKD Fig. 9]: from the first twentieth to the last; standard
    deviation over mean within a tenth, of the last five. Means over students."""
    out = {}
    for name, curves in read_metrics(folder).items():
        found = []
        for _, curve in curves.values():
            v = torch.tensor(curve, dtype=torch.float64)
            n, tenths = max(1, len(v) // 20), [w for w in v.tensor_split(10)[5:] if len(w)]
            found.append([1 - v[-n:].mean() / v[:n].mean(), sum(w.std(correction=0) / w.mean() for w in tenths) / 5])
        out[name] = dict(zip(("fall", "variation"), torch.tensor(found).mean(0).tolist()))
    return out


@torch.no_grad()
def drift(D: edm.Precond, x: Tensor, label: Tensor, seed: int) -> dict:
    """The bottleneck by sigma, on data x [1, n, *shape]: quantiles, Frechet distances of two levels [O2MKD Fig. 1]."""
    g, sigmas = generator(seed, "drift"), level(torch.linspace(0, BINS - 1, 21).long()).tolist()
    features, quantiles, distance = [], [], torch.zeros(21, 21)
    for sigma in sigmas:
        noise = torch.randn(x.shape, generator=g).to(x)
        h = D.bottleneck(x + sigma * noise, torch.full(label.shape, sigma).to(x), label)
        quantiles.append(h.flatten()[:1_000_000].quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).to(h)).tolist())
        features.append(fid.statistics(pooled(h)[0].cpu()))
    for i, j in torch.combinations(torch.arange(21)).tolist():
        distance[i, j] = distance[j, i] = fid.frechet_distance(*features[i], *features[j])
    return {"sigma": sigmas, "quantiles": quantiles, "distance": distance.tolist()}


def gradual(found: dict) -> dict:
    """The largest distance of neighbours, and the mean of levels half the grid apart: larger, unless one jumps."""
    d = torch.tensor(found["distance"])
    return {"neighbours": d.diagonal(1).max().item(), "far": d.diagonal(len(d) // 2).mean().item()}


# ---- what a run ends with

def measured(flags: Flags, given, N: int, device):
    """(name, row) of N students in turn, and what else is asked for; N = 0: the teacher."""
    facts, mu, seed, number = given.facts, given.mu_teacher, given.seed, flags.run.eval_samples
    folder, n_steps = folder_of(flags, seed, N), flags.teacher.sampler_steps

    def by(denoise, steps=n_steps, sampler=flags.sampler):
        def sample(z, label):
            z, label = z[None].to(device), label[None].to(device)
            x = teacher.make_pairs(denoise, z, label, steps, facts.chunk, order=edm.SAMPLERS[sampler])[0]
            return x if facts.stacked else to_uint8(x)
        return sample

    def latents(purpose, n=number):
        return torch.randn(n, *facts.shape, generator=generator(seed, purpose)), data.stratified(n, facts.classes)

    def row(name, sample, **more):
        return name, evaluate.measure(given, number, sample, **more)

    if N:
        found = load_students(folder).to(device)
        denoise, D = routed(found.denoisers, found.router), found.denoisers[0]
        yield row(NAME, by(denoise), keep=folder, seconds=found.seconds, teraflops=found.flops / 1e12)
        for name, of_loss in steadiness(folder).items():
            yield f"loss-{name}", of_loss
    else:
        denoise, D, path = mu, given.net, folder.with_name("teacher") / "drift.json"
        if D and not path.exists():
            everyone = Draws("drift", [Student(seed, 1, 0, tuple(range(facts.classes)))])
            batch = given.source().batch(everyone, 0, 2000 if facts.stacked else 500)
            run.save_json(path, drift(D, *(v.to(device) for v in batch), seed))
        for name, value in gradual(run.load_json(path)).items() if D else ():
            yield f"drift-{name}", {"distance": value}
        if flags.sampler != "heun":  # the kept samples are Heun's
            yield "teacher", evaluate.teacher_row(given, by(mu)(*latents("teacher z")))
    if D:
        adds = evaluate.multiply_adds(denoise, facts, device) * edm.evaluations(n_steps, flags.sampler)
        kept = max(N, 1) * sum(p.numel() for p in D.parameters())
        yield "cost", {"parameters": kept, "multiply_adds": adds}
    if flags.merge and N > 1:  # c is chosen on other latents and data
        (z, label), scan = latents("merge z", number // 5), {}
        for c in (0.25 / N, 0.5 / N, 0.75 / N, 1 / N, 1.25 / N, 1.5 / N):
            mine = given.judge.statistics(by(merge(found.start, found.denoisers, c))(z, label), label)
            scan[c] = given.judge.distance(mine, given.references["real_select"])
        c = min(scan, key=scan.get)
        yield row("merged-mean", by(merge(found.start, found.denoisers)))
        yield row("merged", by(merge(found.start, found.denoisers, c)), c=c, scan=[*scan.values()])
    if N > 1 and 0 <= flags.inspect < N:
        k, D = flags.inspect, found.denoisers[flags.inspect]
        yield row(f"alone-{k}", by(D))
        yield row(f"hybrid-{k}", by(routed([D if i == k else mu for i in range(N)], found.router)))
    for steps in flags.curve:
        for sampler in edm.SAMPLERS:
            yield row(f"{sampler}-{steps}", by(denoise, steps, sampler))


def report(flags: Flags, inputs: dict, device) -> None:
    """results-o2mkd.json, table, verdicts, figures."""
    steps = flags.teacher.sampler_steps
    rows = evaluate.collected((name, N, row) for given in inputs.values() for N in (0, *flags.students)
                              for name, row in measured(flags, given, N, device))
    of_teacher, cost = rows.pop("teacher", {}).get("0"), {N: of[0] for N, of in rows.pop("cost").items()}
    own = values(flags, *USES, "scheme", "keep", "student_size", "init", "sampler")
    config = {**inputs[flags.run.seed].ancestry, **own, "kd_weight": flags.weight, "sampler_steps": steps}
    results = evaluate.results_of(
        flags.run, inputs, rows, edm.evaluations(steps, flags.sampler), of_teacher, NAME, configs={NAME: config},
        cost=cost, steps=steps, sampler=flags.sampler, edges={str(N): ranges(N, flags.scheme) for N in flags.students})
    path = Path(flags.run.out) / f"results-o2mkd{run.suffix(flags.run.tag)}.json"
    evaluate.report(path, results)


@command
def main(argv=None) -> int:
    """One teacher, N students, each at home in its range of the noise levels; then what they are worth, in turn."""
    flags = parse(Flags, PRESETS, argv, __doc__)
    check(flags, CONFLICTS)
    for N in flags.students:
        print(f"o2mkd: N = {N}, ranges end before the bins {ranges(N, flags.scheme)[1:]}")
    if flags.run.dry_run:
        print(describe(flags))
        return 0
    ranks = world(run.device(flags.run.device))
    inputs = teacher.prepare(flags, ranks, students_by_class=False)  # {seed: Given}

    students = []
    for seed, given in inputs.items():
        theta_0 = start_of(flags, given)
        Y = tuple(range(given.facts.classes))
        students += [Student(seed, N, k, Y, theta_0) for N in flags.students for k in range(N)]

    shares = [whole(inputs[s.seed].facts) for s in students]
    distil(sys.modules[__name__], students, shares, inputs, flags, ranks,
           home=lambda stage, flags, s: folder_of(flags, s.seed, s.K),
           more=lambda s: {"edges": ranges(s.K, flags.scheme), "size": s.start.size, "kd_weight": flags.weight})

    if ranks.rank == 0:
        report(flags, inputs, ranks.device)
    leave(ranks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
