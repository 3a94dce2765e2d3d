"""Multi-student distillation: one teacher, K one-step students, each answering for classes of its own [MSD Sec. 3].

    Y = Y_1 + … + Y_K                    partition                    disjoint, covering              [MSD Sec. 3.1]
    D_k = F(D, Y_k)                      filter_dm, filter_adm        what student k learns from      [MSD Sec. 3.2]
    G_k = Distill(mu_teacher, D_k)       main                         for all k, stage after stage    [MSD Eq. 1, 2, 4]
    x = G_k(z; y) with y in Y_k          Router, route, generate      one student answers, once

A stage knows nothing of K: it trains a stack of students, whoever they are; students never see each other. Stages: tsm, dm,
adm in this order (tsm.py, dmd.py, adm.py); cd, consistency distillation instead [MSD App. A.2] (consistency.py); post, a
baseline (post.py). Not here: teacher, pairs and references (teacher.py), stacks and folders (students.py), distances and
tables (evaluate.py), pictures (plot.py), sampling by command (sample.py).

Run      python msd.py --dataset toy --students 8
Stages   python msd.py --students 8 --student-size XS --stages tsm,dm,adm
Sweep    python msd.py --students 1 2 4 8 --seeds 5
Images   python msd.py --dataset fashion-mnist --students 1 5
GPUs     torchrun --nproc-per-node 8 msd.py --dataset imagenet64 --students 4 (on each node; --student k runs one alone)
"""
import collections
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import adm
import common
import consistency
import data
import dmd
import edm
import evaluate
import post
import run
import teacher
import tsm
from common import Student, generator
from flags import UserError, check, command, describe, flag, near, parse, settings
from images import to_uint8
from students import ONE_STEP, Data, Students, distil, first_start, load_students, stage_folder, tag_of

ORDERS = (("teacher",), ("tsm",), ("dm",), ("adm",), ("tsm", "dm"), ("tsm", "adm"), ("dm", "adm"), ("tsm", "dm", "adm"),
          ("post",), ("tsm", "post"), ("cd",), ("tsm", "cd"))
HOWS = ("consecutive", "random", "kmeans", "quadrant")


@dataclass
class Flags:
    """Students by class (MSD)"""
    prefix = ""
    run: run.Flags
    teacher: edm.Flags
    dm: dmd.Flags
    tsm: tsm.Flags
    adm: adm.Flags
    cd: consistency.Flags
    students: list[int] = flag([8], "number of students K; several are compared, K by K", low=1)
    student: int = flag(-1, "train only this student of each K, for a job array on a cluster; -1 = all", low=-1)
    partition: str = flag("consecutive", "consecutive, random, kmeans (of the teacher's label embeddings), quadrant (of their "
                                         "first two entries; K = 4), or a file: a line of classes per student")
    stages: tuple[str, ...] = flag(("dm",), "stages in order, such as dm,adm or tsm,dm,adm; cd; post; teacher: no students",
                                   choices=("teacher", "tsm", "dm", "adm", "cd", "post"))
    method: str = flag("dmd", "distribution matching, or cd: the same as --stages cd", choices=("dmd", "cd"))
    student_size: str = flag("", "size of the students: B, S, XS or XXS; none = the teacher's",
                             choices=("", "B", "S", "XS", "XXS"))
    init: str = flag("", "what the first stage starts from: teacher, random, a checkpoint's path, or the students of another "
                         "stage and tag (dm, dm-TAG); none = the teacher's weights, for adm the dm stage")
    real: str = flag("data", "real data of TSM, ADM and CD: the dataset, or the teacher's samples (y of the pairs)",
                     choices=("data", "generated"))

    def order(self) -> tuple[str, ...]:
        """The stages of this run."""
        return ("cd",) if self.method == "cd" and "cd" not in self.stages else self.stages


PRESETS = {"run": run.PRESETS, "teacher": edm.PRESETS, "dm": dmd.PRESETS, "tsm": tsm.PRESETS, "adm": adm.PRESETS,
           "cd": consistency.PRESETS, "": {
    ("fashion-mnist", "default"): dict(students=[1, 5]), ("fashion-mnist", "smoke"): dict(students=[1, 3]),
    ("cifar10", "default"): dict(students=[1, 5]), ("cifar10", "smoke"): dict(students=[2]),
    ("imagenet64", "default"): dict(students=[4]), ("imagenet64", "paper"): dict(students=[4])}}


def facts_of(f: Flags) -> data.Facts:
    return data.facts(f.run.dataset, f.run.resolution)


def small(f: Flags) -> bool:
    """Are the students of another size than the teacher that is trained here?"""
    return f.student_size not in ("", f.teacher.size or facts_of(f).sizes[0])


CONFLICTS = [              # (is it so?, what to say): each would give a silently wrong number, or fail after hours
    (lambda f: f.order() not in ORDERS, "--stages: not in this order; tsm,dm,adm or a part of it, cd, tsm,cd, post or tsm,post"),
    (lambda f: f.method == "cd" and f.stages not in (("dm",), ("cd",), ("tsm", "cd")),
     "--method cd: consistency distillation is a stage of its own; leave out --stages"),
    (lambda f: max(f.students) > facts_of(f).classes, "--students {f.students}: more students than the dataset has classes"),
    (lambda f: f.partition == "quadrant" and f.students != [4], "--partition quadrant: makes 4 students; give --students 4"),
    (lambda f: f.student >= max(f.students), "--student {f.student}: there are {f.students} students, numbered from 0"),
    (lambda f: f.student >= 0 and facts_of(f).stacked, "--student: the toy's students train as one stack; leave it out"),
    (lambda f: small(f) and f.init == "teacher" or small(f) and not f.init and f.order()[0] in ("dm", "cd"),
     "--student-size {f.student_size}: the teacher's weights do not fit; give --stages tsm,… (or --init random, which App. B.6 "
     "advises against)"),
    (lambda f: f.init and f.order()[0] == "tsm", "--init {f.init}: TSM starts from random weights; leave the flag out, or tsm"),
    (lambda f: "dm" in f.order() and f.dm.dm_weight == f.dm.reg_weight == 0,
     "--dm-weight 0 and --reg-weight 0: nothing is left to train on"),
    (lambda f: "adm" in f.order() and f.adm.gan_weight == f.dm.dm_weight == 0,
     "--gan-weight 0 and --dm-weight 0: nothing is left to train on"),
    (lambda f: f.dm.dm_weight > 0 and not f.dm.fake_bins.low <= f.dm.bins.low <= f.dm.bins.high <= f.dm.fake_bins.high,
     "--bins: reach beyond --fake-bins, where the fake denoiser never trains"),
    (lambda f: "dm" in f.order() and f.dm.dm_weight > 0 and dmd.first_kl_step(f.dm) >= f.dm.steps,
     "--reg-warmup {f.dm.reg_warmup}: must be below --steps {f.dm.steps}, or the KL term never sets in (for regression alone: "
     "--dm-weight 0)"),
    (lambda f: f.dm.distance == "lpips" and facts_of(f).stacked, "--distance lpips: needs images; the toy takes l2 or mse"),
    (lambda f: not facts_of(f).stacked and min(f.dm.pairs, f.run.eval_samples, f.dm.select_samples) < 2 * facts_of(f).classes,
     "--pairs, --eval-samples and --select-samples: at least two per class, which needs a mean and a covariance"),
    *teacher.CONFLICTS,
]


# ------------------------------------------------------------------------------------------------------ F, and who has what

def filter_dm(D: Data, Y_k: Tensor) -> Data:
    """F_DM(D, Y_k) = (D_paired, C_{Y_k}): the KL term asks for Y_k alone, the pairs stay whole [MSD Sec. 3.2].

    They are few, and fewer lose modes."""
    return D._replace(conditions=Y_k)


def filter_adm(D: Data, Y_k: Tensor) -> Data:
    """F_ADM(D, Y_k) = (D_real of Y_k, C_{Y_k}): the head, too, sees Y_k alone [MSD Sec. 3.2]. UserError if D_real has none."""
    real = Y_k[torch.isin(Y_k, D.real)]
    if not len(real):
        raise UserError(f"real data of the classes {Y_k.tolist()} are needed, and there are none")
    return D._replace(real=real, conditions=Y_k)


def filter_pairs(D: Data, Y_k: Tensor) -> Data:
    """(the pairs of Y_k, C_{Y_k}): the strategy that App. B.4 finds worse. UserError if no pair is left."""
    pairs = D.pairs[torch.isin(D.pair_label[D.pairs], Y_k)]
    if not len(pairs):
        raise UserError(f"--filter-pairs: no pair of the classes {Y_k.tolist()}; give more --pairs")
    return D._replace(pairs=pairs, conditions=Y_k)


def stages_of(flags: Flags) -> list[tuple]:
    """[(stage, its F)] in their order. TSM: one network, the start of all, on the whole data; or one a student [App. D.2.2]."""
    known = {"tsm": (tsm, (lambda D, Y_k: D) if flags.tsm.common else filter_adm), "adm": (adm, filter_adm),
             "dm": (dmd, filter_pairs if flags.dm.filter_pairs else filter_dm), "post": (post, filter_dm),
             "cd": (consistency, filter_adm)}
    return [known[name] for name in flags.order()]


def partition(classes: int, K: int, how: str = "consecutive", embeddings: Tensor | None = None, seed: int = 0) -> list[Tensor]:
    """[Y_1, …, Y_K], sorted, disjoint and covering [MSD Sec. 3.1].

    consecutive: blocks in numerical order, the paper's choice for ImageNet [MSD Sec. 4.1]; random: blocks of a permutation;
    kmeans: clusters of the conditions' embeddings [classes, d], of unequal sizes [MSD App. B.1]; quadrant: signs of their
    first two entries, the paper's rule for text [MSD Sec. 4.2], K = 4; else the path of a file: one line of classes per
    student. Sizes differ by at most one in consecutive and random. UserError if K is out of range, a part empty, a file wrong."""
    if not 1 <= K <= classes:
        raise UserError(f"--students {K}: from 1 to {classes}, the number of classes")
    if how == "consecutive":
        return list(torch.arange(classes).tensor_split(K))
    if how == "random":
        order = torch.randperm(classes, generator=generator(seed, "partition", K))
        return [part.sort().values for part in order.tensor_split(K)]
    if how not in HOWS:
        return read_partition(how, classes, K)
    k = kmeans(embeddings, K, seed) if how == "kmeans" else quadrant(embeddings)
    parts = [(k == i).nonzero()[:, 0] for i in range(K)]
    if not all(map(len, parts)) or len(k.unique()) > K:
        raise UserError(f"--partition {how}: with {K} students a part is empty, or a class is left over; take consecutive")
    return sorted(parts, key=lambda part: int(part[0])) if how == "kmeans" else parts


class Router:
    """Which student answers? label [...] -> k [...], by table look-up; an embedding [..., d] that the table does not hold goes
    to the student of its quadrant, if the table is split so, else to that of the nearest centroid. UserError for other labels.

    embeddings [classes, d]: the conditions', for those."""

    def __init__(self, parts: list[Tensor], embeddings: Tensor | None = None):
        self.K, self.table = len(parts), torch.full((1 + int(torch.cat(parts).max()),), -1)
        for k, Y_k in enumerate(parts):
            self.table[Y_k] = k
        self.embeddings = E = embeddings
        self.centroids = None if E is None else torch.stack([E[Y_k].mean(0) for Y_k in parts])
        self.quadrants = E is not None and self.K == 4 and all((quadrant(E[Y_k]) == k).all() for k, Y_k in enumerate(parts))

    def __call__(self, label: Tensor) -> Tensor:
        if label.is_floating_point():
            return self.unseen(label)
        if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < len(self.table):
            raise UserError(f"class {int(label.min())} to {int(label.max())}: this run has 0 to {len(self.table) - 1}")
        return self.table[label.cpu()].to(label.device)

    def unseen(self, embedding: Tensor) -> Tensor:
        """Student index [...] of embeddings [..., d]; a row of the table goes to its own student."""
        if self.centroids is None:
            raise UserError("this run's conditions are class numbers, not embeddings")
        flat = embedding.reshape(-1, embedding.shape[-1])
        k = quadrant(flat) if self.quadrants else torch.cdist(flat, self.centroids.to(flat)).argmin(-1)
        gap, row = (flat[:, None] - self.embeddings.to(flat)).abs().amax(-1).min(-1)
        known = gap < 1e-6
        k[known] = self(row[known])
        return k.reshape(embedding.shape[:-1])


def router_of(students: Students) -> Router:
    """The router of these students."""
    return Router(students.parts, students.facts.embeddings() if students.facts.embeddings else None)


def route(students: Students, router: Router, z: Tensor, label: Tensor) -> Tensor:
    """x [B, *shape] from z [B, *shape] and label [B]: every sample by its own student, one evaluation, in the order they came.

    A stack's students answer a block of rows each, all at once; of image students only those that are needed are read."""
    k = router(label)                                                                           # [B]
    if students.stack is None:
        x = torch.empty_like(z)
        for i in k.unique().tolist():
            x[k == i] = dmd.one_step(students[i], z[k == i], label[k == i])
        return x
    order, count = k.argsort(stable=True), torch.bincount(k, minlength=router.K)                # [B], [K]
    place = torch.empty_like(k)                                                                 # [B]: row in its block
    place[order] = torch.arange(len(k), device=k.device) - (count.cumsum(0) - count)[k[order]]
    z_k = z.new_zeros(len(count), int(count.max()), *z.shape[1:])                               # [K, most, *shape], padded
    label_k = label.new_zeros(len(count), int(count.max()), *label.shape[1:])
    z_k[k, place], label_k[k, place] = z, label
    return dmd.one_step(students.stack, z_k, label_k)[k, place]


@torch.no_grad()
def generate(folder, label: Tensor, seeds) -> Tensor:
    """One-step samples x [B, *shape] of the classes label [B] (of toy-prompts also embeddings [B, d]).

    seeds: B integers; a seed is a latent, whatever else is in the batch. folder: runs/toy/seed0/students8, or what
    `load_students` returned. UserError for a class that the run does not have."""
    students = (folder if isinstance(folder, Students) else load_students(folder)).to(label.device)
    if len(seeds) != len(label):
        raise UserError(f"generate: {len(label)} labels but {len(seeds)} seeds; give one seed per sample")
    return route(students, router_of(students), common.latents(seeds, students.facts.shape).to(label.device), label)


# -------------------------------------------------------------------------------------------------- ways to split classes

def kmeans(points: Tensor, clusters: int, seed: int = 0, restarts: int = 8) -> Tensor:
    """Cluster index [N] of points [N, d]: Lloyd's algorithm, the best of several starts. Does not depend on the points' order.

    A start takes the farthest point in a random direction, then again and again the point farthest from those taken. A cluster
    that runs empty is given the point farthest from its own centre, and that is said."""
    x, best = points.double().cpu(), None
    g = generator(seed, "kmeans")
    for _ in range(restarts):
        first = int((x @ torch.randn(x.shape[1], generator=g, dtype=x.dtype)).argmax())
        centre = x[first:first + 1]
        while len(centre) < clusters:
            centre = torch.cat([centre, x[torch.cdist(x, centre).min(1).values.argmax()][None]])
        k = torch.full((len(x),), -1)
        while True:
            distance = torch.cdist(x, centre)
            new = distance.argmin(1)
            for empty in set(range(clusters)) - set(new.tolist()):
                own = distance.gather(1, new[:, None])[:, 0]
                own[torch.bincount(new, minlength=clusters)[new] < 2] = -1                      # never the last of a cluster
                print(f"kmeans: cluster {empty} ran empty; it starts again from the condition farthest from its own centre, {int(own.argmax())}")
                new[own.argmax()] = empty
            if torch.equal(new, k):
                break
            k = new
            centre = torch.stack([x[k == i].mean(0) for i in range(clusters)])
        spread = (x - centre[k]).square().sum().item()
        if best is None or spread < best[0] - 1e-12:
            best = (spread, k)
    return best[1]


def quadrant(embeddings: Tensor) -> Tensor:
    """Which quadrant the first two entries of embeddings [..., d] lie in: 0 to 3, counter-clockwise [MSD Sec. 4.2]."""
    right, up = embeddings[..., 0] >= 0, embeddings[..., 1] >= 0
    return torch.where(up, torch.where(right, 0, 1), torch.where(right, 3, 2))


def read_partition(path: str, classes: int, students: int):
    """A user's partition: a text file with one line of classes per student. UserError for a class that is missing, doubled or unknown."""
    if Path(path).is_dir():
        raise common.UserError(f"--partition {path}: a folder; give a text file with one line of classes per student")
    try:
        lines = [line.split("#")[0].replace(",", " ").split() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise common.UserError(f"--partition {path}: not a text file (UTF-8) with one line of classes per student") from None
    except OSError:
        raise common.UserError(f"--partition {path}: no such file, and none of {', '.join(HOWS)}{common.near(path, HOWS)}") from None
    words = [c for line in lines for c in line if not (c.isdecimal() and len(c) < 10)]
    if words:
        raise common.UserError(f"--partition {path}: not a class number: {words[0][:20]!r}; one line of classes per student, such as 0 1 2 3")
    parts = [sorted(map(int, line)) for line in lines if line]
    listed = [c for part in parts for c in part]
    wrong = [c for c in listed if not 0 <= c < classes]
    if wrong:
        raise common.UserError(f"--partition {path}: class {wrong[0]} is not one of 0 to {classes - 1}")
    doubled = [c for c, n in collections.Counter(listed).items() if n > 1]
    missing = sorted(set(range(classes)) - set(listed))
    if doubled or missing:
        raise common.UserError(f"--partition {path}: class {doubled[0] if doubled else missing[0]} is {'listed twice' if doubled else 'missing'}; "
                               f"every class of 0 to {classes - 1} belongs to exactly one student")
    if len(parts) != students:
        raise common.UserError(f"--partition {path}: {len(parts)} students (lines), but --students {students}")
    return [torch.tensor(part) for part in parts]


def likeness(parts: list[Tensor], embeddings: Tensor) -> tuple[float | None, float | None]:
    """Mean distance of two different conditions of one part, and of two parts, by embeddings [classes, d]; None: no such two."""
    k = torch.empty(len(embeddings), dtype=torch.int64)
    for i, part in enumerate(parts):
        k[part] = i
    d, same = torch.cdist(embeddings.double().cpu(), embeddings.double().cpu()), k[:, None] == k
    within, between = d[same & ~torch.eye(len(k), dtype=torch.bool)], d[~same]
    return tuple(v.mean().item() if len(v) else None for v in (within, between))


def shown(parts: list[Tensor]) -> str:
    """A partition in a line: classes 0 1 2 | 3 4 5 (sizes 3, 3)."""
    texts, sizes = [], [str(len(p)) for p in parts]
    for p in parts:
        block = f"{p[0]}-{p[-1]}" if int(p[-1] - p[0]) == len(p) - 1 else f"{p[0]} {p[1]} … {p[-1]}"
        texts.append(" ".join(map(str, p.tolist())) if len(p) <= 12 else block)
    if len(parts) > 16:
        texts, sizes = [*texts[:8], "…", texts[-1]], sorted(set(sizes), reverse=True)
    return "classes " + " | ".join(texts) + f"   (sizes {', '.join(sizes)})"


# ---------------------------------------------------------------------------------------------------- what a run ends with

def sampled(students: Students, router: Router, z: Tensor, label: Tensor, device) -> Tensor:
    """One-step samples of labels [N] from latents z [N, *shape], on the CPU; images as uint8, one student after the other."""
    students.to(device)
    stacked, chunk = students.facts.stacked, 16_384 if students.facts.stacked else students.facts.chunk
    order = torch.arange(len(label)) if stacked else router(label).argsort(stable=True)
    x = torch.empty_like(z)
    for rows in order.split(chunk):
        x[rows] = route(students, router, z[rows].to(device), label[rows].to(device)).cpu()
    return x if stacked else to_uint8(x)


def samplers(flags: Flags, device):
    """The students of every seed, stage and K of this run, one after another, to be measured."""
    for seed in flags.run.all_seeds():
        for stage in (name for name in flags.order() if name in ONE_STEP):
            for K in flags.students:
                folder = stage_folder(flags, seed, K, stage)
                best, last = load_students(folder), load_students(folder, "ema.pt")
                router = router_of(best)
                yield evaluate.Sampler(stage, K, seed, lambda z, c: sampled(best, router, z, c, device), folder, router,
                                       best.seconds, lambda z, c: sampled(last, router, z, c, device), per_class=True)


def bound(flags: Flags, given, device) -> dict:
    """What a perfect f of CD gives: the distances of the N-point Heun sampler's own samples. Made once and kept.

    A bound in that sense only: an f whose modes are by chance a little narrower can come nearer to the teacher's samples."""
    facts, N, m, judge = given.facts, flags.cd.points, given.facts.metric, given.judge
    of = "" if facts.stacked else run.suffix(Path(flags.run.features).stem or "classifier")
    path = Path(flags.run.out) / f"seed{given.seed}" / "reference" / f"bound-{N}{of}.json"
    if not path.exists():
        label = data.stratified(flags.run.eval_samples, facts.classes)
        z = torch.randn(len(label), *facts.shape, generator=generator(given.seed, "report z"))
        chunks = list(zip(z.split(facts.chunk), label.split(facts.chunk)))
        x = [consistency.bound(given.mu_teacher, a[None].to(device), b[None].to(device), N)[0].cpu()
             for a, b in run.bar(chunks, f"{N}-point sampler", len(chunks))]
        mine = judge.statistics(torch.cat(x), label)
        found = {name: judge.distance(mine, given.references[of]) for name, of in ((m, "report"), (f"{m}_data", "real"))}
        run.save_json(path, found)
    return run.load_json(path)


def report(flags: Flags, inputs: dict, parts: dict, device) -> int:
    """Measure the students of all one-step stages; results.json, table, verdicts, figures."""
    facts, more = facts_of(flags), {}
    rows = evaluate.measure_all(samplers(flags, device), inputs, flags.run.eval_samples)
    if "cd" in rows:
        of_seed = [bound(flags, given, device) for given in inputs.values()]
        means = {k: evaluate.mean([b[k] for b in of_seed]) for k in of_seed[0]}
        more["bound"] = {**means, "points": flags.cd.points, "per_seed": of_seed}
    more["partition"] = {}
    for K in flags.students:
        of_seed = [parts[seed, K] for seed in inputs]
        found = [likeness(p, inputs[seed].embeddings()) for seed, p in zip(inputs, of_seed)]
        more["partition"][str(K)] = {"how": flags.partition, "sizes": [[len(Y_k) for Y_k in p] for p in of_seed],
                                     "within": [a for a, _ in found], "between": [b for _, b in found]}
    with torch.device("cpu" if facts.stacked else "meta"):
        net = facts.net(1, flags.student_size or next(iter(inputs.values())).size)
    before = [*flags.order()]
    configs = {stage.NAME: {**next(iter(inputs.values())).ancestry, **settings(flags, stage.NAME, stage.USES), "seed": 0,
                            "partition": flags.partition, "size": flags.student_size, "init": flags.init, "tag": tag_of(flags),
                            "before": before[:before.index(stage.NAME)]} for stage, _ in stages_of(flags) if stage.NAME in rows}
    results = evaluate.results_of(
        flags.run, inputs, rows, 2 * flags.teacher.sampler_steps - 1, configs=configs,
        size=flags.student_size or flags.teacher.size or facts.sizes[0], classes_of_data=facts.classes,
        parameters=sum(p.numel() for p in net.parameters()), **more)
    path = Path(flags.run.out) / f"results{run.suffix(tag_of(flags))}.json"
    evaluate.report(path, results, evaluate.verdicts(results))
    return 0


def title(flags: Flags) -> str:
    """What is going to happen, in a line."""
    stages = ", then ".join("{}: {} updates of batch {}".format(s.NAME, *s.length(flags)) for s, _ in stages_of(flags))
    return (f"msd: {flags.run.dataset}, K = {', '.join(map(str, flags.students))}, {flags.run.seeds} seed(s), "
            f"{stages or 'teacher alone'}, into {flags.run.out}")


def plan(flags: Flags) -> int:
    """--dry-run: every value with its source, parameters, memory, and which rank trains what; without data or weights."""
    facts, world = facts_of(flags), int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("cpu" if facts.stacked else "meta"):
        teacher_net, student_net = facts.net(1, flags.teacher.size), facts.net(1, flags.student_size or flags.teacher.size)
        head = adm.Head(teacher_net.bottleneck, [0]) if "adm" in flags.order() else torch.nn.Module()
    t, s, h = (sum(p.numel() for p in net.parameters()) for net in (teacher_net, student_net, head))
    print(title(flags) + "\n" + describe(flags))
    for K in flags.students:
        learnt = flags.partition in ("kmeans", "quadrant") and not facts.embeddings
        E = facts.embeddings() if facts.embeddings else None
        print(f"K = {K}: {K * s:,} parameters, of which a sample uses {s:,}; " + ("by the teacher's embeddings, once it is there"
              if learnt else shown(partition(facts.classes, K, flags.partition, E, flags.run.seed))))
        for ranks in sorted({1, world} | (set() if facts.stacked else {2, 4 * K})):
            print(f"  {ranks} rank(s): " + ("one stack, its batch shared" if facts.stacked else "; ".join(rank_map(K, ranks))))
    fake = {"mu_fake": t, **({"head": h} if h else {})} if {"dm", "adm"} & {*flags.order()} else {}
    trained = s + sum(fake.values())
    held = {"teacher": t, "G": s, **fake, "averages": 2 * s, "gradients": trained, "AdamW": 2 * trained}
    print(f"memory of a student's rank, without activations: {sum(held.values()) * 4 / 2 ** 30:.2f} GiB in float32 ("
          + ", ".join(f"{k} {v * 4 / 2 ** 30:.2f}" for k, v in held.items()) + ")")
    print(f"pairs: {flags.dm.pairs:,} times {2 * flags.teacher.sampler_steps - 1} evaluations of the teacher ({t:,} parameters), "
          f"shared by all students")
    return 0


def rank_map(students: int, world: int) -> list[str]:
    """Which rank trains which image student: each student its own ranks if there are enough, else students in turn."""
    if world >= students:
        groups = torch.arange(world).tensor_split(students)
        return [f"student {k}: ranks {g[0]}-{g[-1]}" if len(g) > 1 else f"student {k}: rank {g[0]}" for k, g in enumerate(groups)]
    return [f"rank {r}: students {' '.join(map(str, range(r, students, world)))}" for r in range(world)]


# ------------------------------------------------------------------------------------------------------------ the command

@command
def main(argv=None) -> int:
    """G_k = Distill(mu_teacher, F(D, Y_k)) for every k [MSD Eq. 1], stage after stage [MSD Eq. 4]; then what they are worth."""
    flags = parse(Flags, PRESETS, argv, __doc__)
    check(flags, CONFLICTS)
    if flags.run.dry_run:
        return plan(flags)
    ranks = run.start(flags.run)                                             # torchrun's, or this process alone
    if ranks.rank == 0:
        print(f"{title(flags)}, on {ranks.device}", flush=True)
    inputs = teacher.prepare(flags, ranks)                                   # {seed: mu_teacher, D, what to compare with}

    students, parts = [], {}
    for seed, given in inputs.items():
        for K in flags.students:                                             # Y = Y_1 + … + Y_K
            parts[seed, K] = partition(given.facts.classes, K, flags.partition, given.embeddings(), seed)
            for k, Y_k in enumerate(parts[seed, K]):
                students += [first_start(flags, Student(seed, K, k, tuple(Y_k.tolist())), given)] * (flags.student in (-1, k))

    for stage, F in stages_of(flags):                                        # each from the best of the one before
        shares = [F(inputs[s.seed].D, torch.tensor(s.classes)) for s in students]                       # D_k
        students = distil(stage, students, shares, inputs, flags, ranks)     # G_k = Distill(mu_teacher, D_k)

    measured = {*flags.order()} & {*ONE_STEP} and ranks.rank == 0 and flags.student < 0
    code = report(flags, inputs, parts, ranks.device) if measured else 0
    common.leave(ranks)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
