"""Multi-student distillation: one teacher, K one-step students, each answering for classes of its own [MSD Sec. 3].

    Y = Y_1 + … + Y_K               partition                   [MSD Sec. 3.1]
    D_k = F(D, Y_k)                 filter_dm, filter_adm       [MSD Sec. 3.2]
    G_k = Distill(mu_teacher, D_k)  main, stage after stage     [MSD Eq. 1, 2, 4]
    x = G_k(z; y) with y in Y_k     Router, route, generate

A stage trains a stack of students, who never see each other: tsm, dm, adm; cd [MSD App. A.2]; post, a baseline. Not
here: the teacher (teacher.py), stacks and folders (students.py), distances and tables (evaluate.py), costs (cost.py).

Run      python msd.py --dataset toy --students 8
Stages   python msd.py --students 8 --student-size XS --stages tsm,dm,adm
GPUs     torchrun --nproc-per-node 8 msd.py --dataset imagenet64 --students 4
"""
import functools
import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import adm
import common
import consistency
import cost
import data
import dmd
import edm
import evaluate
import post
import run
import teacher
import tsm
from common import Student, generator
from flags import UserError, check, command, describe, flag, parse, settings, values
from images import to_uint8
from students import ONE_STEP, Data, Students, distil, first_start, load_students, stage_folder, tag_of

ORDERS = "teacher tsm dm adm tsm,dm tsm,adm dm,adm tsm,dm,adm post tsm,post cd tsm,cd".split()


@dataclass
class Flags:
    """Students by class (MSD)"""
    prefix = ""
    run: run.Flags
    teacher: edm.Flags
    churn: edm.Churn
    dm: dmd.Flags
    tsm: tsm.Flags
    adm: adm.Flags
    cd: consistency.Flags
    students: list[int] = flag([8], "numbers of students K; on the toy 1 trains along", low=1)
    student: int = flag(-1, "train only this student of each K, for a job array; -1 = all", low=-1)
    partition: str = flag("consecutive", "consecutive, random, kmeans (of label embeddings), quadrant (K = 4), "
                                         "or a file, a line per student")
    stages: str = flag("dm", "in order; teacher: no students", choices=ORDERS)
    method: str = flag("dmd", "cd: the same as --stages cd", choices=("dmd", "cd"))
    student_size: str = flag("", "none = the teacher's", choices=("", "B", "S", "XS", "XXS"))
    init: str = flag("", "what the first stage starts from: teacher, random, a checkpoint's path, or a stage (dm, "
                         "dm-TAG); none = teacher, for adm the dm stage")
    real: str = flag("data", "data of TSM, ADM and CD; generated: the pairs' y", choices=("data", "generated"))

    def __post_init__(self):
        if self.facts.stacked:  # one student for all classes trains in the same stack, to compare with
            self.students = sorted({1, *self.students})

    @property
    def facts(self) -> data.Facts:
        """Of the dataset, at this run's resolution."""
        return data.facts(self.run.dataset, self.run.resolution)

    def asked(self) -> list[tuple[int, int]]:
        """(K, k) of a seed's students to train."""
        return [(K, k) for K in self.students for k in range(K) if self.student in (-1, k)]

    def order(self) -> list[str]:
        """The stages of this run."""
        return ["cd"] if (self.method, self.stages) == ("cd", "dm") else self.stages.split(",")


PRESETS = {"run": run.PRESETS, "teacher": edm.PRESETS, "dm": dmd.PRESETS, "tsm": tsm.PRESETS, "adm": adm.PRESETS,
           "cd": consistency.PRESETS, "": {
    ("fashion-mnist", "default"): dict(students=[1, 5]), ("fashion-mnist", "smoke"): dict(students=[1, 3]),
    ("cifar10", "default"): dict(students=[1, 5]), ("cifar10", "smoke"): dict(students=[2]),
    **{(name, preset): dict(students=[1]) for name in run.WHOLE for preset in ("default", "smoke")},
    ("imagenet64", "default"): dict(students=[4])}}


CONFLICTS = [  # (is it so?, what to say), for flags.check
    (lambda f: not Path(f.init).is_file() and f.init not in ("", "teacher", "random", "tsm") and
               f.init.split("-")[0] not in ONE_STEP,
     "--init {f.init}: no such file, and none of teacher, random, tsm, dm, adm, post, cd (these four with -TAG)"),
    (lambda f: max(f.students) > f.facts.classes, "--students {f.students}: more than the dataset has classes"),
    (lambda f: f.method == "cd" and "cd" not in f.order(), "--method cd: needs --stages cd or tsm,cd"),
    (lambda f: f.student >= (0 if f.facts.stacked else max(f.students)),
     "--student {f.student}: from 0 to K - 1; not on the toy, whose students train as one stack"),
    (lambda f: f.student_size not in ("", cost.sizes_of(f)[0] or "B") and
               (f.init == "teacher" or not f.init and f.order()[0] in ("dm", "cd")),
     "--student-size {f.student_size}: the teacher's weights do not fit; begin with tsm"),
    (lambda f: f.init and f.order()[0] == "tsm", "--init {f.init}: TSM starts from random weights"),
    (lambda f: f.dm.dm_weight == 0 and ("dm" in f.order() and f.dm.reg_weight == 0 or
                                        "adm" in f.order() and f.adm.gan_weight == 0),
     "--dm-weight 0, without --reg-weight or --gan-weight: nothing is left to train on"),
    (lambda f: "dm" in f.order() and f.dm.dm_weight > 0 and dmd.first_kl_step(f.dm) >= f.dm.steps,
     "--reg-warmup: not below --steps: no KL term"),
    (lambda f: "cd" in f.order() and f.dm.conditioning_sigma != edm.SIGMA_MAX,
     "--conditioning-sigma {f.dm.conditioning_sigma}: CD begins at the highest level"),
    (lambda f: f.churn.S_min > f.churn.S_max or f.churn.S_churn == 0 and f.churn != edm.Churn(),
     "--S_churn {f.churn.S_churn}, --S_min {f.churn.S_min}, --S_max {f.churn.S_max}: no level would have noise"),
    (lambda f: f.dm.anneal > f.dm.bins.high, "--anneal {f.dm.anneal}: above the highest of --bins"),
    (lambda f: f.partition == "quadrant" and not {*f.students} <= {1, 4}, "--partition quadrant: needs --students 4"),
    (lambda f: f.facts.classes == 1 and f.partition != "consecutive",
     "--partition {f.partition}: {f.run.dataset} has one class, and so one student"),
    (lambda f: f.dm.distance == "lpips" and f.facts.stacked, "--distance lpips: needs images"),
    (lambda f: not f.facts.stacked and min(f.dm.pairs, f.dm.select_samples) < 2 * f.facts.classes,
     "--pairs and --select-samples: at least two per class"),
    *teacher.CONFLICTS,
]


# ---- F

def filter_dm(D: Data, Y_k: Tensor) -> Data:
    """F_DM(D, Y_k) = (D_paired, C_{Y_k}) [MSD Sec. 3.2]: the pairs stay whole; fewer would lose modes."""
    return D._replace(conditions=Y_k)


def filter_adm(D: Data, Y_k: Tensor) -> Data:
    """F_ADM(D, Y_k) = (D_real, C_{Y_k}) [MSD Sec. 3.2]; of D_real only what is of Y_k."""
    return D._replace(real=D.real[data.of_classes(D.real, Y_k)], conditions=Y_k)


def filter_pairs(D: Data, Y_k: Tensor) -> Data:
    """(the pairs of Y_k, C_{Y_k}): worse [MSD App. B.4]."""
    return D._replace(pairs=D.pairs[data.of_classes(D.pair_label[D.pairs], Y_k)], conditions=Y_k)


def stages_of(flags: Flags) -> list[tuple]:
    """[(stage, its F)] in order; TSM: one for all, or one each [MSD App. D.2.2]."""
    known = {"tsm": (tsm, (lambda D, Y_k: D) if flags.tsm.common else filter_adm), "adm": (adm, filter_adm),
             "dm": (dmd, filter_pairs if flags.dm.filter_pairs else filter_dm), "post": (post, filter_pairs),
             "cd": (consistency, filter_adm)}
    return [known[name] for name in flags.order() if name in known]


# ---- who has what, and who answers

def partition(classes: int, K: int, how: str = "consecutive", embeddings: Tensor | None = None, seed: int = 0):
    """[Y_1, …, Y_K], sorted, disjoint and covering [MSD Sec. 3.1]. UserError if that can't be.

    consecutive: blocks [MSD Sec. 4.1]; random: of a permutation; kmeans: clusters of embeddings [classes, d] [MSD App.
    B.1]; quadrant: for text [MSD App. D.3.1]; else a file."""
    if not 1 <= K <= classes:
        raise UserError(f"--students {K}: from 1 to {classes}")
    if how == "consecutive" or K == 1:
        return list(torch.arange(classes).tensor_split(K))
    if how == "random":
        order = torch.randperm(classes, generator=generator(seed, "partition", K))
        return [part.sort().values for part in order.tensor_split(K)]
    if how not in ("kmeans", "quadrant"):
        return read_partition(how, classes, K)
    k = kmeans(embeddings, K, seed) if how == "kmeans" else quadrant(embeddings)
    parts = [(k == i).nonzero()[:, 0] for i in range(K)]
    if sum(map(len, parts)) < classes or not all(map(len, parts)):
        raise UserError(f"--partition {how}: a part of {K} is empty, or a class is left over")
    return sorted(parts, key=lambda part: int(part[0])) if how == "kmeans" else parts


def quadrant(embeddings: Tensor) -> Tensor:
    """Quadrant, 0 to 3 counter-clockwise, of the first two entries of embeddings [..., d] [MSD App. D.3.1]."""
    right, up = embeddings[..., 0] >= 0, embeddings[..., 1] >= 0
    return torch.where(up, torch.where(right, 0, 1), torch.where(right, 3, 2))


def kmeans(points: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster index [N] of points [N, d]: Lloyd's algorithm, the best of several starts, whatever the points' order.
    A start: the farthest point in a random direction, then again and again the one farthest from those taken."""
    x, least, found, g = points.double().cpu(), torch.inf, None, generator(seed, "kmeans")
    for _ in range(8):
        first = int((x @ torch.randn(x.shape[1], generator=g, dtype=x.dtype)).argmax())
        centre = x[first:first + 1]
        while len(centre) < clusters:
            centre = torch.cat([centre, x[torch.cdist(x, centre).min(1).values.argmax()][None]])
        k = torch.full((len(x),), -1)
        while True:
            distance = torch.cdist(x, centre)
            new = distance.argmin(1)
            for empty in {*range(clusters)} - {*new.tolist()}:
                own = distance.gather(1, new[:, None])[:, 0]
                own[torch.bincount(new, minlength=clusters)[new] < 2] = -1  # never the last of a cluster
                new[own.argmax()] = empty  # the farthest from its own centre
                print(f"kmeans: cluster {empty} ran empty, and starts again")
            if torch.equal(new, k):
                break
            k = new
            centre = torch.stack([x[k == i].mean(0) for i in range(clusters)])
        spread = (x - centre[k]).square().sum().item()
        if spread < least - 1e-12:
            least, found = spread, k
    return found


def read_partition(path: str, classes: int, students: int) -> list[Tensor]:
    """A line of classes per student; # begins a comment. UserError unless each class is there once."""
    try:
        text = Path(path).read_text("utf-8-sig").replace(",", " ")
        parts = [sorted(map(int, line)) for line in (row.split("#")[0].split() for row in text.splitlines()) if line]
    except (OSError, ValueError) as error:
        raise UserError(f"--partition {path}: no choice, and no text file ({error})") from None
    listed = [c for part in parts for c in part]
    wrong = {*listed} ^ {*range(classes)} | {c for c in listed if listed.count(c) > 1}
    if wrong or len(parts) != students:
        what = f"class {min(wrong)} is missing, unknown or listed twice" if wrong else f"{len(parts)} lines"
        raise UserError(f"--partition {path}: {what}, for --students {students}")
    return [torch.tensor(part) for part in parts]


class Router:
    """Which student answers? label [...] -> k [...]. UserError for a class that is not there."""

    def __init__(self, parts: list[Tensor]):
        self.K, self.table = len(parts), torch.full((1 + int(torch.cat(parts).max()),), -1)
        for k, Y_k in enumerate(parts):
            self.table[Y_k] = k

    def __call__(self, label: Tensor) -> Tensor:
        if label.is_floating_point() or not ((label >= 0) & (label < len(self.table))).all():
            raise UserError(f"labels {label.flatten()[:4].tolist()} …: not in 0 to {len(self.table) - 1}")
        return self.table[label.cpu()].to(label.device)


def route(students: Students, router: Router, z: Tensor, label: Tensor) -> Tensor:
    """x [B, *shape] of z [B, *shape] and label [B]: each sample by its own student, one evaluation, in their order."""
    k = router(label)  # [B]
    if students.stack is None:
        x = torch.empty_like(z)
        for i in k.unique().tolist():
            x[k == i] = dmd.one_step(students[i], z[k == i], label[k == i])
        return x
    count = one_hot(k, router.K).cumsum(0)  # [B, K]
    place = count.gather(1, k[:, None])[:, 0] - 1  # [B]: a sample's row in its student's block
    block = router.K, int(count[-1].max())
    z_k, label_k = z.new_zeros(*block, *z.shape[1:]), label.new_zeros(block)  # padded
    z_k[k, place], label_k[k, place] = z, label
    return dmd.one_step(students.stack, z_k, label_k)[k, place]


@torch.no_grad()
def generate(folder, label: Tensor, seeds) -> Tensor:
    """One-step samples x [B, *shape] of the classes label [B], from B seeds.

    folder: runs/toy/seed0/students8, or Students."""
    label = torch.as_tensor(label)
    students = (folder if isinstance(folder, Students) else load_students(folder)).to(label.device)
    whole = not label.is_floating_point() and label.dtype != torch.bool
    if not whole or label.ndim != 1 or not 0 < len(label) == len(seeds):
        raise UserError(f"generate: labels {list(label.shape)} and {len(seeds)} seeds; one of each for a sample")
    z = common.latents(seeds, students.facts.shape).to(label.device)
    return route(students, Router(students.parts), z, label.long())


# ---- what a run ends with

def sampled(students: Students, z: Tensor, label: Tensor, device) -> Tensor:
    """One-step samples of labels [N] from latents z [N, *shape], on the CPU; images as uint8."""
    stacked, x, router = students.to(device).facts.stacked, torch.empty_like(z), Router(students.parts)
    order = torch.arange(len(label)) if stacked else router(label).argsort(stable=True)  # student after student
    for rows in order.split(16_384 if stacked else students.facts.chunk):
        x[rows] = route(students, router, z[rows].to(device), label[rows].to(device)).cpu()
    return x if stacked else to_uint8(x)


def measured(flags: Flags, inputs: dict, device):
    """(stage, K, row) of the students of every seed, stage and K of this run."""
    stages = [name for name in flags.order() if name in ONE_STEP]
    for seed, stage, K in itertools.product(inputs, stages, flags.students):
        folder = stage_folder(flags, seed, K, stage)
        best, last = load_students(folder), load_students(folder, "ema.pt")
        of_best, of_last = (functools.partial(sampled, found, device=device) for found in (best, last))
        yield stage, K, evaluate.measure(inputs[seed], flags.run.eval_samples, of_best, keep=folder, last=of_last,
                                         per_class=True, seconds=best.seconds, teraflops=best.flops / 1e12)


def report(flags: Flags, inputs: dict, device) -> None:
    """Measure the students of all one-step stages; results.json, table, verdicts, figures."""
    given, configs = inputs[flags.run.seed], {}
    rows = evaluate.collected(measured(flags, inputs, device))
    for stage, _ in stages_of(flags):
        before = flags.order()[:flags.order().index(stage.NAME)]
        configs[stage.NAME] = {**given.ancestry, **settings(flags, stage.NAME, stage.USES),
                               **values(flags, "partition", "student_size", "init"), "before": before}
    more = dict(size=flags.student_size or given.size, classes_of_data=given.facts.classes, configs=configs)
    results = evaluate.results_of(flags.run, inputs, rows, edm.evaluations(flags.teacher.sampler_steps), **more)
    path = Path(flags.run.out) / f"results{run.suffix(tag_of(flags))}.json"
    evaluate.report(path, results)


def title(flags: Flags) -> str:
    """What is going to happen, in a line."""
    stages = ", then ".join("{}: {} updates of batch {}".format(s.NAME, *s.length(flags)) for s, _ in stages_of(flags))
    K = ", ".join(map(str, flags.students))
    return f"msd: {flags.run.dataset}, K = {K}, {stages or 'the teacher alone'}, into {flags.run.out}"


def plan(flags: Flags) -> int:
    """--dry-run: every value with its source, ranks, and what the run will cost; without data."""
    stages = [stage for stage, _ in stages_of(flags)]
    t, s = (cost.weights(flags.facts, size) for size in cost.sizes_of(flags))
    print(title(flags), describe(flags), sep="\n")
    for K in flags.students:
        ranks = "one stack on all ranks" if flags.facts.stacked else f"{K} ranks: one a student; fewer: in turn"
        print(f"K = {K}: {K * s:,} parameters, of which a sample uses {s:,}; {ranks}")
        if flags.partition not in ("kmeans", "quadrant"):
            parts = partition(flags.facts.classes, K, flags.partition, seed=flags.run.seed)
            print("  lowest to highest class of each", " | ".join(f"{Y_k[0]}-{Y_k[-1]}" for Y_k in parts))
    print(f"a student's rank holds {cost.memory(flags) / 2 ** 30:.2f} GiB in float32, without activations")
    rows = cost.bill(flags, stages)
    if rows and not flags.facts.stacked:
        print(cost.room(flags, stages))
    if flags.teacher.which not in ("train", "exact") and not Path(flags.teacher.which).is_file():
        print(f"{flags.teacher.which} is not here: counted as size {flags.teacher.size or 'B'}")
    print(f"the bill, without judging, in evaluations of the teacher, {t:,} parameters:")
    for what, number in [*rows, ("in all", sum(number for _, number in rows))]:
        print(f"  {number:>22,.0f}  {what}")
    return 0


def divide(flags: Flags, ranks: common.Ranks) -> None:
    """Do ranks, batches and classes divide, are starts and room there? UserError if not."""
    out = Path(flags.run.out).absolute()
    place = next(p for p in (out, *out.parents) if p.exists())
    here, free = sum(p.stat().st_size for p in out.rglob("state*.pt") if p.exists()), shutil.disk_usage(place).free
    wanted = 2 * cost.memory(flags) * flags.run.seeds * len(flags.asked())
    if wanted > here + free:
        raise UserError(f"{place}: checkpoints want {wanted / 2 ** 30:.1f} GiB, free are {free / 2 ** 30:.1f}")
    given = teacher.Given(0, flags.facts, None, {}, False, 1.0, cost.sizes_of(flags)[0] or "B")
    for seed, (K, k) in itertools.product(flags.run.all_seeds(), flags.asked() if stages_of(flags) else ()):
        first_start(flags, Student(seed, K, k, ()), given)
    for K in flags.students:
        if flags.partition not in ("kmeans", "quadrant"):  # those want the teacher's embeddings
            partition(flags.facts.classes, K, flags.partition, seed=flags.run.seed)
        own = ranks if flags.facts.stacked or flags.student >= 0 else ranks.split(K)[1]
        for stage, _ in stages_of(flags):
            own.parts(stage.length(flags)[1], flags.run.micro_batch)


# ---- the command

@command
def main(argv=None) -> int:
    """G_k = Distill(mu_teacher, F(D, Y_k)) for every k [MSD Eq. 1], stage after stage [MSD Eq. 4]; then measured."""
    flags = parse(Flags, PRESETS, argv, __doc__)
    check(flags, CONFLICTS)
    if flags.run.dry_run:
        return plan(flags)
    ranks = common.world(run.device(flags.run.device))  # torchrun's, or this process alone
    divide(flags, ranks)
    if ranks.rank == 0:
        print(f"{title(flags)}, on {ranks.device}", flush=True)
    inputs = teacher.prepare(flags, ranks, churn=flags.churn)  # {seed: mu_teacher, D, references}

    students = []
    for seed, given in inputs.items():
        for K in flags.students:  # Y = Y_1 + … + Y_K
            parts = partition(given.facts.classes, K, flags.partition, given.embeddings(), seed)
            for k, Y_k in enumerate(parts):
                if flags.student in (-1, k):
                    students.append(first_start(flags, Student(seed, K, k, tuple(Y_k.tolist())), given))

    shares = {stage: [F(inputs[s.seed].D, torch.tensor(s.classes)) for s in students] for stage, F in stages_of(flags)}
    for stage, D_k in shares.items():  # each from the best of the one before
        students = distil(stage, students, D_k, inputs, flags, ranks)  # G_k = Distill(mu_teacher, D_k)

    if {*flags.order()} & {*ONE_STEP} and ranks.rank == 0 and flags.student < 0:
        report(flags, inputs, ranks.device)
    common.leave(ranks)
    return 0


def alone(stage: str) -> None:
    """`python dmd.py …`: this stage alone, one student for all classes."""
    raise SystemExit(main(["--students", "1", "--stages", stage, *sys.argv[1:]]))


if __name__ == "__main__":
    raise SystemExit(main())
