"""Multi-student distillation: partition the classes, run the same stages for each student, route [MSD Sec. 3, Fig. 1, Fig. 2].

    Y = Y_1 + … + Y_K                                partition        disjoint, covering [MSD Sec. 3.1]; in blocks, at random, by
                                                                      k-means or quadrants of embeddings, or from a file
    G_k = Distill(mu_teacher, F(D, Y_k))             main             [MSD Eq. 1]
    F_DM(D, Y_k) = (all of D_paired, C_{Y_k})        filter_dm        [MSD Sec. 3.2]: the KL term sees the student's own
                                                                      classes, the regression term every pair
    F_ADM(D, Y_k) = (D_real of Y_k, C_{Y_k})         filter_adm       [MSD Sec. 3.2]: GAN and KL term see Y_k alone
    TSM, then DM, then ADM                           run_stages       [MSD Eq. 4]: --stages tsm,dm,adm; without tsm: Eq. 2
    consistency distillation instead                 run_stages       [MSD App. A.2]: --method cd
    x = G_k(z; y) with y in Y_k                      Router, generate one student answers, one evaluation

The stages themselves know nothing of K: dmd.py trains any list of label sets. The toy's students of all K and all seeds train
as one stack (one batched matmul a layer), images' students one by one or on ranks of their own; they never touch each other, and
K = 1 here is dmd.py, bit for bit.

Not here: the losses (dmd.py, tsm.py, adm.py, consistency.py), the teacher (edm.py), pictures (plot.py), sampling by command (sample.py).

Departures from the paper: none of its own; see toy_mog.py, edm.py, dmd.py, tsm.py, adm.py and consistency.py.

Run      python msd.py --dataset toy --students 8
Stages   python msd.py --dataset toy --students 8 --stages dm,adm
         python msd.py --dataset toy --students 8 --student-size XS --stages tsm,dm,adm
CD       python msd.py --dataset toy --students 1 2 4 8 --method cd
Sweep    python msd.py --dataset toy --students 1 2 4 8 --seeds 5
Images   python msd.py --dataset fashion-mnist --students 1 5
GPUs     torchrun --nproc-per-node 8 msd.py --dataset imagenet64 --students 4 (on each node; --student k runs one alone)
"""
import collections
import contextlib
import dataclasses
import functools
import math
import operator
import os
import time
import types
from pathlib import Path

import torch
from torch import Tensor

import adm
import common
import consistency
import data
import dmd
import edm
import plot
import tsm
from common import flag


@dataclasses.dataclass
class Flags(consistency.Flags):
    """What only several students need, beside the stages' flags."""
    method: str = flag("dmd", "distribution matching, or consistency distillation (which is --stages cd)", choices=("dmd", "cd"))
    stages: str = flag("dm", "stages in order, such as dm,adm or tsm,dm,adm; post: the baseline of tsm.py; cd: consistency distillation")
    init: str = flag("", "what the first stage starts from: teacher, random, a checkpoint's path, or the students of another stage and tag "
                         "(dm, dm-TAG); none = the teacher's weights, for adm the dm stage")
    classes: str = flag("", "one specialised student, of these classes alone, such as 3,4")
    students: list[int] = flag([8], "number of students K; several numbers are compared (the toy's train as one stack)")
    student: int = flag(-1, "train only this student of each K, for a job array on a cluster; -1 = all", low=-1)
    partition: str = flag("consecutive", "how the classes are split: consecutive, random, kmeans (of the teacher's label embeddings), quadrant (of "
                                         "their first two entries; K = 4), or a file with one line of classes per student")
    against: str = flag("", "tag of another variant in the same run folder (none: the one without a tag): compare with it, K by K")
    target_l1: float = flag(0.0, "exit with 1 if the l1 of the largest K is above this; 0 = no target", low=0)


PRESETS = common.merge(consistency.PRESETS_ALL, {
    ("fashion-mnist", "default"): dict(students=[1, 5]), ("fashion-mnist", "smoke"): dict(students=[1, 3]),
    ("cifar10", "default"): dict(students=[1, 5]), ("cifar10", "smoke"): dict(students=[2]),
    ("imagenet64", "default"): dict(students=[4]), ("imagenet64", "paper"): dict(students=[4]),
})


# ------------------------------------------------------------------------------------------- the paper's idea, in full

HOWS = ("consecutive", "random", "kmeans", "quadrant")


def partition(classes: int, students: int, how: str = "consecutive", embeddings: Tensor | None = None, seed: int = 0):
    """Split classes 0..classes-1 into Y_1..Y_K: a list of K sorted index tensors, disjoint and covering [MSD Sec. 3.1].

    consecutive: blocks in numerical order, the paper's choice for ImageNet [MSD Sec. 4.1]; random: blocks of a permutation;
    kmeans: clusters of the conditions' embeddings [classes, d], of unequal sizes [MSD App. B.1]; quadrant: signs of their first
    two entries, the paper's rule for text [MSD Sec. 4.2], K = 4; else the path of a file: one line of classes per student.
    Sizes differ by at most one in consecutive and random. UserError if K is out of range, a quadrant empty, a file wrong."""
    if not 1 <= students <= classes:
        raise common.UserError(f"--students {students}: from 1 to {classes}, the number of classes")
    if how == "consecutive":
        return list(torch.arange(classes).tensor_split(students))
    if how == "random":
        order = torch.randperm(classes, generator=common.generator(seed, "partition", students))
        return [part.sort().values for part in order.tensor_split(students)]
    if how == "kmeans":
        k = kmeans(embeddings, students, seed)
        return sorted([(k == i).nonzero()[:, 0] for i in range(students)], key=lambda part: int(part[0]))
    if how == "quadrant":
        if students != 4:
            raise common.UserError(f"--partition quadrant: makes 4 students, not {students}; give --students 4")
        k = quadrant(embeddings)
        parts = [(k == i).nonzero()[:, 0] for i in range(4)]
        if not all(map(len, parts)):
            raise common.UserError(f"--partition quadrant: quadrant {next(i for i in range(4) if not len(parts[i])) + 1} of these embeddings' first two "
                                   f"entries is empty; take kmeans or consecutive")
        return parts
    return read_partition(how, classes, students)


def kmeans(points: Tensor, clusters: int, seed: int = 0, restarts: int = 8) -> Tensor:
    """Cluster index [N] of points [N, d]: Lloyd's algorithm, the best of several starts. Does not depend on the points' order.

    A start takes the farthest point in a random direction, then again and again the point farthest from those taken. A cluster
    that runs empty is given the point farthest from its own centre, and that is said."""
    x, best = points.double().cpu(), None
    g = common.generator(seed, "kmeans")
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


def distances(parts: list[Tensor], embeddings: Tensor) -> tuple[float, float]:
    """Mean distance of two different conditions of one part, and of two parts, by embeddings [classes, d]. nan where there are none."""
    k = torch.empty(len(embeddings), dtype=torch.int64)
    for i, part in enumerate(parts):
        k[part] = i
    d, same = torch.cdist(embeddings.double().cpu(), embeddings.double().cpu()), k[:, None] == k
    other = ~torch.eye(len(k), dtype=torch.bool)
    return d[same & other].mean().item(), d[~same].mean().item()


def filter_dm(pair_label: Tensor, classes_k: Tensor, filter_pairs: bool = False) -> tuple[Tensor, Tensor]:
    """F_DM(D, Y_k) = (D_paired, C_{Y_k}) [MSD Sec. 3.2]: the KL term's classes, and the indices of the usable pairs.

    The pairs stay whole, all classes: they are few, and fewer lose modes. `filter_pairs` keeps only the pairs of Y_k, the
    strategy that App. B.4 finds worse. UserError if then none is left."""
    if not filter_pairs:
        return classes_k, torch.arange(len(pair_label))
    own = torch.isin(pair_label.cpu(), classes_k).nonzero()[:, 0]
    if not len(own):
        raise common.UserError(f"--filter-pairs: no pair of the classes {classes_k.tolist()}; give more --pairs")
    return classes_k, own


def filter_adm(real_label: Tensor, classes_k: Tensor) -> tuple[Tensor, Tensor]:
    """F_ADM(D, Y_k) = (D_real of Y_k, C_{Y_k}) [MSD Sec. 3.2]: the KL and GAN classes, and the indices of the usable real data.

    A source's `batch` draws from exactly these (data.py); asked beforehand, since UserError if the data have none of them."""
    own = torch.isin(real_label.cpu(), classes_k).nonzero()[:, 0]
    if not len(own):
        raise common.UserError(f"ADM needs real data of the classes {classes_k.tolist()}, and there are none")
    return classes_k, own


class Router:
    """Which student answers? label [...] -> student index [...], by table look-up. UserError for an unknown label.

    classes: how many there are, if the parts do not cover them (one specialised student); embeddings [classes, d]: the conditions',
    for `unseen`."""

    def __init__(self, parts: list[Tensor], classes: int = 0, embeddings: Tensor | None = None):
        self.table = torch.full((classes or sum(len(p) for p in parts),), -1)
        for k, part in enumerate(parts):
            self.table[part] = k
        self.embeddings = embeddings
        self.centroids = None if embeddings is None else torch.stack([embeddings[part].mean(0) for part in parts])
        self.quadrants = embeddings is not None and len(parts) == 4 and all((quadrant(embeddings[part]) == k).all() for k, part in enumerate(parts))

    def unseen(self, embedding: Tensor) -> Tensor:
        """Student index [...] for embeddings [..., d]: a row of the table goes to its own student, another one by quadrant if the
        table is split so, else to the part with the nearest centroid. UserError if this router knows no embeddings."""
        if self.centroids is None:
            raise common.UserError("this router knows no embeddings; make it with Router(parts, embeddings=E)")
        flat = embedding.reshape(-1, embedding.shape[-1])
        k = quadrant(flat) if self.quadrants else torch.cdist(flat, self.centroids.to(flat)).argmin(-1)
        near, row = (flat[:, None] - self.embeddings.to(flat)).abs().amax(-1).min(-1)
        known = near < 1e-6
        k[known] = self(row[known])                                 # UserError if this run has no student for it
        return k.reshape(embedding.shape[:-1])

    def __call__(self, label: Tensor) -> Tensor:
        if label.is_floating_point():                               # embeddings, not indices
            return self.unseen(label)
        if label.numel() and not (0 <= int(label.min()) and int(label.max()) < len(self.table)):
            raise common.UserError(f"class {int(label.max() if label.min() >= 0 else label.min())}: "
                                   f"this run has classes 0 to {len(self.table) - 1}")
        student = self.table[label.cpu()]
        if (student < 0).any():
            raise common.UserError(f"class {int(label.cpu()[student < 0][0])}: no student for it; this run has the classes "
                                   f"{' '.join(map(str, (self.table >= 0).nonzero()[:, 0].tolist()))}")
        return student.to(label.device)


def route(G, router: Router, z: Tensor, label: Tensor) -> Tensor:
    """x [B, *shape] from z [B, *shape] and label [B]: every sample by its own student, one evaluation each.

    G: a stack, whose students answer a block of rows each, all at once; or `Separate` students, of which only those that
    the labels need are loaded, and each runs once."""
    k = router(label)                                                                           # [B]
    if isinstance(G, Separate):
        x = torch.empty_like(z)
        for i in k.unique().tolist():
            mine = k == i
            x[mine] = dmd.one_step(G.student(i), z[mine], label[mine])
        return x
    order = k.argsort(stable=True)
    count = torch.bincount(k, minlength=int(router.table.max()) + 1)                            # [K]
    place = torch.empty_like(k)
    place[order] = torch.arange(len(k), device=k.device) - (count.cumsum(0) - count)[k[order]]
    block_z = z.new_zeros(len(count), int(count.max()), *z.shape[1:])
    block_label = label.new_zeros(len(count), int(count.max()), *label.shape[1:])
    block_z[k, place], block_label[k, place] = z, label
    return dmd.one_step(G, block_z, block_label)[k, place]


def latents(seeds, shape) -> Tensor:
    """Unit-variance latents z [len(seeds), *shape]: each a function of its own seed alone."""
    return torch.stack([torch.randn(shape, generator=common.generator("latent", int(s))) for s in seeds])


class Separate:
    """Image students, each a file of its own, read when it is first needed and kept on `device` (of a GPU the last 8)."""
    KEEP = 8

    def __init__(self, folders: list[Path], name: str, flags=None):
        self.folders, self.name, self.flags, self.device, self.loaded = folders, name, flags, "cpu", {}

    def student(self, k: int) -> edm.Precond:
        """Student k, frozen. UserError if its file is no student's."""
        if k not in self.loaded:
            if len(self.loaded) >= self.KEEP and self.device != "cpu":
                self.loaded.pop(next(iter(self.loaded)))            # a GPU may not hold all 64
            self.loaded[k] = _read_students(self.folders[k] / self.name, self.flags)[1]
        return self.loaded[k].to(self.device)

    def to(self, device):
        self.device = device
        return self


@dataclasses.dataclass
class Students:
    """The K trained generators of one stage folder, with their router."""
    facts: data.Facts
    G: edm.Precond | Separate
    router: Router
    seconds: float                                                  # of training, all together


def _read_students(path: Path, flags=None) -> tuple[dict, edm.Precond]:
    saved, G = dmd.read_students(path)
    return saved, edm.ready(G.net, G.sigma_data, flags, "cpu", G.sigma_min).requires_grad_(False) if flags else G


ONE_STEP = ("post", "cd", "dm", "adm")                                    # stages that leave one-step generators; the last one there is, is served


def load_students(folder, name: str = "best.pt", flags=None) -> Students:
    """Read a students' stage folder (seed0/students8/adm), or the last stage in their folder. UserError if it holds none.

    Of image students only the list of classes is read now; a network is read when a label asks for it. flags: --precision."""
    folder = Path(folder)
    folder = next((folder / stage for stage in reversed(ONE_STEP) if list((folder / stage).glob(f"**/{name}"))), folder)
    if folder.name.startswith("student") and folder.name[7:].isdigit():
        raise common.UserError(f"{folder}: one student of several; give the folder of all, {folder.parent.parent}")
    own = sorted(folder.glob("student[0-9]*"), key=lambda p: int(p.name.removeprefix("student")))
    if not own:
        if not folder.is_dir() or list(folder.glob("seed[0-9]*")) or list(folder.glob("students[0-9]*")):
            raise common.UserError(f"{folder}: no {'such ' * (not folder.is_dir())}students' folder; give one such as runs/toy/seed0/students8")
        saved, G = _read_students(folder / name, flags)
        facts = saved["facts"]
        router = Router([torch.tensor(p) for p in saved["partition"]], facts.classes, facts.embeddings() if facts.embeddings else None)
        return Students(facts, G, router, saved["seconds"])
    about = [common.load_json(f / "config.json", "students", "student", "classes", "dataset") for f in own]
    K = about[0]["students"]
    ready = [f for f in own if (f / name).exists()]
    if [a["student"] for a in about] != list(range(K)) or len(ready) < K:
        missing = sorted(set(range(K)) - {int(f.name.removeprefix("student")) for f in ready})
        raise common.UserError(f"{folder}: student {', '.join(map(str, missing))} of {K} is not trained yet; run that one first "
                               f"(--student {missing[0] if missing else 0})")
    seconds = sum(common.load_json(f / "done.json", "seconds")["seconds"] for f in own)
    facts = data.facts(about[0]["dataset"], about[0].get("resolution", 0))
    return Students(facts, Separate(own, name, flags), Router([torch.tensor(a["classes"]) for a in about], facts.classes), seconds)


@torch.no_grad()
def generate(run, label: Tensor, seeds) -> Tensor:
    """One-step samples [B, *shape] of classes label [B] (int64), from the latents of `seeds` (B integers).

    Where conditions are embeddings (toy-prompts), label may be embeddings [B, d], also unseen ones: the router takes the student
    of their quadrant, or of the nearest centroid. run: a students' folder (runs/toy/seed0/students8), or what `load_students` returned."""
    students = run if isinstance(run, Students) else load_students(run)
    E = students.facts.embeddings() if students.facts.embeddings else None
    takes = f"generate: {students.facts.name} takes class indices [B]" + (f" or finite embeddings [B, {E.shape[1]}]" if E is not None else "")
    try:
        label = torch.as_tensor(label)
        seeds = [operator.index(s) for s in seeds]
    except (TypeError, ValueError, RuntimeError):
        raise common.UserError(f"{takes}, and one whole number per sample as its seed") from None
    if label.is_floating_point():
        if E is None or label.ndim != 2 or label.shape[1] != E.shape[1] or not label.isfinite().all():
            raise common.UserError(f"{takes}, not {list(label.shape)} of {str(label.dtype).removeprefix('torch.')}")
        label = label.to(E.dtype)
    elif label.ndim != 1 or label.dtype == torch.bool or not len(label):
        raise common.UserError(f"{takes}, not {list(label.shape)} of {str(label.dtype).removeprefix('torch.')}")
    else:
        label = label.long()
    if len(seeds) != len(label):
        raise common.UserError(f"generate: {len(label)} labels but {len(seeds)} seeds; give one seed per sample")
    students.G.to(label.device)
    z = latents(seeds, students.facts.shape).to(label.device)
    return route(students.G, students.router, z, label)


# ---------------------------------------------------------------------------------------------------------- evaluation

def sampled(students: Students, z: Tensor, label: Tensor, chunk: int, device) -> Tensor:
    """One-step samples of labels [N] from latents z [N, *shape], on the CPU; images as uint8."""
    students.G.to(device)
    stacked = students.facts.stacked
    order = torch.arange(len(label)) if stacked else students.router(label).argsort(stable=True)        # one student at a time
    x = torch.empty_like(z)
    for rows in order.split(chunk):
        x[rows] = route(students.G, students.router, z[rows].to(device), label[rows].to(device)).cpu()
    return x if stacked else common.to_uint8(x)


@torch.no_grad()
def evaluate(flags: Flags, inputs: dmd.Inputs, parts: dict, device) -> dict:
    """Sample every student set of the run's one-step stages, measure it against the teacher and the data: results.json."""
    facts, seeds, judge, m = data.facts(flags.dataset, flags.resolution), edm.seeds(flags), inputs.judge, data.DATASETS[flags.dataset].metric
    own = classes_of(flags, facts)                                  # --classes: everything is measured on these
    N = flags.eval_samples // (facts.classes if own else 1) * len(own or [0])
    whole = data.stratified(flags.eval_samples, facts.classes)
    label = torch.tensor(own)[torch.arange(N) % len(own)] if own else whole
    chunk = 16_384 if facts.stacked else facts.chunk

    def measure(folder: Path, seed: int, keep: bool) -> dict:
        report, real = inputs.references[seed]["report"], inputs.references[seed]["real"]
        students = load_students(folder, flags=flags)
        z = torch.randn(N, *facts.shape, generator=common.generator(seed, "report z"))
        x = sampled(students, z, label, chunk, device)
        if keep:
            common.save_tensors(folder / "samples.pt", {"x": x, "label": label, "student": students.router(label)})
        mine = judge.statistics(x, label)
        per_class = [judge.distance(mine, report, [c]) for c in own or range(facts.classes)] if facts.classes <= 100 else []
        last = judge.statistics(sampled(load_students(folder, "ema.pt", flags), z, label, chunk, device), label)
        return {m: judge.distance(mine, report, own), f"{m}_data": judge.distance(mine, real, own), "per_class": per_class,
                "per_class_mean": sum(per_class) / max(1, len(per_class)), **judge.check(x, label), "seconds": students.seconds,
                f"{m}_last": judge.distance(last, report, own), f"{m}_data_last": judge.distance(last, real, own)}

    stages = [s for s in flags.stages.split(",") if s in ONE_STEP]
    if own and facts.stacked:                                       # the floors, on these classes
        for r in inputs.references.values():
            r |= {"floor": judge.distance(r["select"], r["report"], own), "floor_data": judge.distance(r["real_select"], r["real"], own)}
    rows: dict = {stage: {str(K): [] for K in flags.students} for stage in stages}
    teacher, floor, floor_data, general = [], [], [], []
    for seed in seeds:
        report, real = inputs.references[seed]["report"], inputs.references[seed]["real"]
        floor.append(inputs.references[seed]["floor"])
        floor_data.append(inputs.references[seed]["floor_data"])
        y = common.load_shards(Path(flags.out) / f"seed{seed}" / "reference", "report")
        kept = torch.isin(whole, torch.tensor(own)) if own else slice(None)
        teacher.append({"floor": floor[-1], f"{m}_data": judge.distance(report, real, own), **judge.check(y[kept], whole[kept])})
        for stage in stages:
            for K in flags.students:
                rows[stage][str(K)].append(measure(dmd.stage_folder(flags, seed, K, stage), seed, True))
        if own and general_folder(flags, facts, seed, stages[-1]):
            general.append(measure(general_folder(flags, facts, seed, stages[-1]), seed, False))

    bounds = [cd_bound(flags, inputs, seed, device) for seed in seeds] if "cd" in stages else []
    by_stage = {stage: {K: summary(r, m) for K, r in of_k.items()} for stage, of_k in rows.items()}
    with torch.device("meta" if not facts.stacked else "cpu"):
        count = sum(p.numel() for p in facts.net(1, size_of(flags, inputs)).parameters())
    return {"dataset": flags.dataset, "seeds": seeds, "samples": N, "configs": {s: results_config(flags, seeds[0], s) for s in stages}, "metric": m, "title": judge.title, "floor": mean(floor), "floor_data": mean(floor_data),
            "teacher": {**{k: mean([t[k] for t in teacher]) for k in teacher[0]}, "per_seed": teacher,
                        "evaluations": 2 * flags.sampler_steps - 1},
            "size": flags.student_size or flags.teacher_size or facts.sizes[0], "parameters": count, "classes_of_data": facts.classes,
            "students": by_stage[stages[-1]], "stages": by_stage,
            **({"bound": {**{k: mean([b[k] for b in bounds]) for k in bounds[0]}, "points": flags.cd_points, "per_seed": bounds}} if bounds else {}),
            "partition": {str(K): split_of(flags, inputs, parts, K) for K in flags.students} if not own else {},
            **({"classes": own} if own else {}), **({"general": summary(general, m)} if len(general) == len(seeds) else {})}


def mean(values: list):
    """Over the seeds: of numbers a number, of lists a list."""
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def summary(per_seed: list[dict], m: str) -> dict:
    """Means over the seeds, standard deviations of the distances m and m_data, and every seed."""
    out = {k: mean([p[k] for p in per_seed]) for k in per_seed[0]}
    for name in (n for n in (m, f"{m}_data") if n in per_seed[0]):
        out[f"{name}_sd"] = torch.tensor([p[name] for p in per_seed], dtype=torch.float64).std().item() if len(per_seed) > 1 else None
    return {**out, "per_seed": per_seed}


def cd_bound(flags: Flags, inputs: dmd.Inputs, seed: int, device) -> dict:
    """What a perfect f gives: the distance of the N-point Heun sampler's own samples, from the reported latents. Made once and kept.

    A bound in that sense only: an f whose modes are by chance a little narrower can come nearer to the teacher's samples."""
    facts, judge, m = data.facts(flags.dataset, flags.resolution), inputs.judge, data.DATASETS[flags.dataset].metric
    own = classes_of(flags, facts)
    of = common.suffix("-".join(filter(None, ["_".join(map(str, own or [])), "" if facts.stacked else Path(flags.features).stem or "classifier"])))
    path = Path(flags.out) / f"seed{seed}" / "reference" / f"bound-{flags.cd_points}{of}.json"
    if not path.exists():
        label = data.stratified(flags.eval_samples, facts.classes)
        z = torch.randn(flags.eval_samples, *facts.shape, generator=common.generator(seed, "report z"))
        denoise = edm.mu_teacher(flags, inputs.teachers[edm.seeds(flags).index(seed)], facts.exact)
        chunks = list(zip(z.split(facts.chunk), label.split(facts.chunk)))
        x = torch.cat([consistency.bound(denoise, a[None].to(device), b[None].to(device), flags.cd_points)[0].cpu()
                       for a, b in common.bar(chunks, f"{flags.cd_points}-point sampler", len(chunks), flags.quiet)])
        mine = judge.statistics(x, label)
        common.save_json(path, {m: judge.distance(mine, inputs.references[seed]["report"], own), f"{m}_data": judge.distance(mine, inputs.references[seed]["real"], own)})
    return common.load_json(path)


def split_of(flags: Flags, inputs: dmd.Inputs, parts: dict, K: int) -> dict:
    """How alike are the conditions of one student? Per seed: sizes, and mean distances of the embeddings within and between students."""
    found = [distances(parts[seed, K], embeddings_of(flags, D)) for seed, D in zip(edm.seeds(flags), inputs.teachers)]
    return {"how": flags.partition, "sizes": [[len(p) for p in parts[seed, K]] for seed in edm.seeds(flags)],
            **{name: [f[i] if f[i] == f[i] else None for f in found] for i, name in enumerate(("within", "between"))}}


def embeddings_of(flags: Flags, D: edm.Precond) -> Tensor:
    """The conditions' embeddings [classes, d]: the dataset's fixed table, or the label embeddings of the teacher's network."""
    facts = data.facts(flags.dataset, flags.resolution)
    return facts.embeddings() if facts.embeddings else D.net.label_embeddings().cpu()


def size_of(flags: Flags, inputs: dmd.Inputs):
    """The students' size: --student-size, or that of the teacher at hand."""
    return flags.student_size or inputs.teachers[0].size


def results_config(flags: Flags, seed: int, stage: str) -> dict:
    """What must be equal for two runs' rows of a stage to stand in one table."""
    before = flags.stages.split(",")[:flags.stages.split(",").index(stage)]
    begin = before[-1] + common.suffix(flags.tag) if before else flags.init or ("dm" + common.suffix(flags.tag) if stage == "adm" else "")
    out = {**dmd.ancestry(flags, seed), "size": flags.student_size, "begin": begin, "sampler_steps": flags.sampler_steps, "weight_decay": flags.weight_decay}
    for name in {"dm": ("pairs", "dm"), "adm": ("adm", "real"), "post": ("post",), "cd": ("cd", "real")}[stage]:
        out |= common.stage_config(flags, name)
    out |= {"partition": flags.partition} if stage == "dm" or flags.partition != "consecutive" else {}
    return out | {n: getattr(flags, n) for n in {"dm": (), "adm": adm.SHARED, "post": tsm.POST_SHARED, "cd": consistency.SHARED}[stage]}


def general_folder(flags: Flags, facts: data.Facts, seed: int, stage: str) -> Path | None:
    """The general student that --classes is compared with: K = 1, of the same size, without a tag of its own; None if it is not there."""
    tag = own_tag(flags, facts, "")
    folder = dmd.stage_folder(flags, seed, 1, stage, tag=tag)
    if not list(folder.glob("**/best.pt")):
        return None
    for s in (s for s in flags.stages.split(",") if s in ONE_STEP):
        configs = [next(dmd.stage_folder(flags, seed, 1, s, tag=t).glob("**/config.json"), None) for t in (tag, flags.tag)]
        a, b = ({k: v for k, v in common.load_json(c).items() if k not in ("start", "students", "student", "partition", "classes")} if c else {} for c in configs)
        if a != b:
            print(f"{folder}: the general student was made with another {', '.join(sorted(k for k in {*a, *b} if a.get(k) != b.get(k)))}: not compared")
            return None
    return folder


COLUMNS = {"within": ("within", "4 std", ".4f"), "modes": ("modes", "(exp H)", ".1f"), "mode_min": ("emptiest", "mode", ".2f"),
           "mode_max": ("fullest", "mode", ".2f"), "right class": ("right", "class", ".4f")}


def table(results: dict) -> str:
    """results.json as the table that a run ends with."""
    m, name, t = results["metric"], results["title"], results["teacher"]
    shown = {k: c for k, c in COLUMNS.items() if k in t}
    head = [("", ""), (m + " to", "teacher"), ("", "± sd"), (m + " to", "data"), ("", "± sd"), *[c[:2] for c in shown.values()], ("train", "s")]
    rows = [["teacher", f"{results['floor']:.4f}*", "", f"{t[m + '_data']:.4f}", "", *[f"{t[k]:{c[2]}}" for k, c in shown.items()], ""]]
    if "bound" in results:
        rows.append([f"{results['bound']['points']}-point Heun", f"{results['bound'][m]:.4f}", "", f"{results['bound'][m + '_data']:.4f}", "", *[""] * len(shown), ""])
    lines_of = {(int(K), stage): r for stage, of_k in results["stages"].items() for K, r in of_k.items()}
    if "general" in results:
        lines_of[1, "general"] = results["general"]
    for (K, stage), r in sorted(lines_of.items(), key=lambda item: item[0][0]):
        sd = ["" if r.get(k + "_sd") is None else f"{r[k + '_sd']:.4f}" for k in (m, m + "_data")]
        who = f"{K} student" + "s" * (K != 1) + (f", {stage}" if len(lines_of) > len(results["students"]) else "")
        rows.append([who, f"{r[m]:.4f}", sd[0], f"{r[m + '_data']:.4f}", sd[1],
                     *[f"{r[k]:{c[2]}}" for k, c in shown.items()], f"{r['seconds']:.0f}"])
    rows = [list(line) for line in zip(*head)] + rows
    wide = max(12, *(len(line[0]) for line in rows))
    lines = [f"{line[0]:>{wide}} " + " ".join(f"{cell:>9}" for cell in line[1:]) for line in rows]
    lines.append((f"{m}: {name}. " if name != m else "") + f"* the floor: two draws of the teacher. Two draws of the data (images: training against test "
                 f"images): {results['floor_data']:.4f}. Seeds: {len(results['seeds'])}. Train s: of all students together, this stage.")
    return "\n".join(lines)


def comparison(name: str, a: dict, b: dict, metric: str, other: str = "") -> str:
    """One line: is a's distance below b's, paired by seed? a, b: entries of results["students"]; other: b's metric, if not the same."""
    a, b = ([p[name] for p in r["per_seed"]] for r, name in ((a, metric), (b, other or metric)))
    v = common.verdict(a, b)
    error = "" if v["error"] is None else f" ± {v['error']:.4f} (standard error)"
    return (f"{name}: {sum(a) / len(a):.4f} against {sum(b) / len(b):.4f}, ratio {sum(a) / sum(b):.2f}, "
            f"paired difference {v['mean']:.4f}{error}, n = {v['n']}: {v['verdict']}")


# ----------------------------------------------------------------------------------------------- beforehand: what, how long, where

def rank_map(students: int, world: int) -> list[str]:
    """Which rank trains which image student: each student its own ranks if there are enough, else students in turn."""
    if world >= students:
        groups = torch.arange(world).tensor_split(students)
        return [f"student {k}: ranks {g[0]}-{g[-1]}" if len(g) > 1 else f"student {k}: rank {g[0]}" for k, g in enumerate(groups)]
    return [f"rank {r}: students {' '.join(str(k) for k in range(r, students, world))}" for r in range(world)]


@functools.lru_cache
def _forward_seconds(facts: data.Facts, members: int, batch: int, size: str, precision: str, device) -> float:
    """A forward pass of a stack, timed once; of images at a smaller batch, scaled up."""
    net = edm.ready(facts.net(members, size), facts.sigma_data, types.SimpleNamespace(precision=precision), device).requires_grad_(False)
    timed = batch if facts.stacked else min(batch, 64 if device.type == "cuda" else 16 if math.prod(facts.shape) < 4096 else 1)
    label = torch.zeros(members, timed, dtype=torch.int64, device=device)
    z = torch.zeros(members, timed, *facts.shape, device=device)
    times = []
    for _ in range(5 if facts.stacked else 3):
        begin = time.perf_counter()
        dmd.one_step(net, z, label).sum().item()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * batch / timed


def estimate(flags: Flags, device, shared: bool = True) -> float:
    """Seconds the whole run will take from nothing on this machine alone, from timed forward passes: within a factor of two.

    shared: with what runs of one folder share: teacher, pairs, the teacher's samples."""
    facts = data.facts(flags.dataset, flags.resolution)

    def forward(members: int, batch: int, size: str = "") -> float:
        return _forward_seconds(facts, members, batch, size or flags.teacher_size, flags.precision, device)

    stages, seeds = flags.stages.split(","), flags.seeds if facts.stacked else 1
    members = flags.seeds * (sum(flags.students) if flags.student < 0 else sum(K > flags.student for K in flags.students))

    def all_students(batch: int, size: str = "") -> float:
        return forward(members, batch, size) if facts.stacked else members * forward(1, batch, size)
    turn, total = 4.5, 5.0                                          # forward, backward, optimizer
    if "dm" in stages:
        G, mu = all_students(flags.batch, flags.student_size), all_students(flags.batch)
        kl = flags.steps - dmd.first_kl_step(flags)
        total += flags.steps * turn * G * (flags.reg_weight > 0) + kl * (turn * G + 2 * flags.draws * mu + flags.ttur * (turn * mu + G))
        total += (kl > 0) * flags.fake_warmup * turn * mu
    if "cd" in stages:                                              # the teacher twice, the target once
        total += flags.cd_steps * ((turn + 1) * all_students(flags.cd_batch, flags.student_size) + 2 * all_students(flags.cd_batch))
        total += 2 * flags.cd_points * flags.eval_samples / facts.chunk * forward(1, facts.chunk) * flags.seeds
    if "adm" in stages:                                             # the head sees the encoder's half: once for G, twice for the critic
        G, mu, gan = all_students(flags.adm_batch, flags.student_size), all_students(flags.adm_batch), flags.gan_weight > 0
        total += flags.adm_steps * (turn * G + (2 * flags.draws + 2 * gan) * mu)
        total += (flags.adm_steps * flags.adm_ttur + flags.adm_fake_warmup) * ((turn + 4 * gan) * mu + G)
    if "post" in stages:
        total += tsm.post_steps(flags) * (turn * all_students(flags.batch, flags.student_size) + all_students(flags.batch))
    if "tsm" in stages or flags.teacher == "exact":
        many = seeds if flags.tsm_common else members if facts.stacked else 1
        times = 1 if facts.stacked else flags.seeds if flags.tsm_common else members
        total += times * flags.tsm_steps * (turn * forward(many, flags.tsm_batch, flags.student_size) + forward(many, flags.tsm_batch))
    if not shared:
        return total
    drawn = (2 if facts.stacked else 1) * flags.eval_samples + flags.pairs
    total += drawn * (2 * flags.sampler_steps - 1) / facts.chunk * forward(1, facts.chunk) * flags.seeds
    if flags.teacher == "train":
        total += flags.teacher_steps * turn * forward(seeds, flags.teacher_batch) * flags.seeds / seeds
    return total + (0 if facts.stacked else 60)


def memory(flags: Flags, student: int, teacher: int, head: int) -> str:
    """What a rank keeps beside the activations, for networks of these numbers of weights: how large a GPU a student needs."""
    held = {"teacher": teacher, "start": student, "f": student, "target": student, "average of f": student, "best of them": student, "gradients": student,
            "AdamW": 2 * student} if flags.stages.endswith("cd") else {"teacher": teacher, "starts": student + teacher, "G": student, "mu_fake": teacher, **({"head": head} if head else {}),
            "average of G": student, "best of them": student, "gradients": student + teacher + head, "AdamW": 2 * (student + teacher + head)}
    return (f"memory of a student's rank, without activations: {sum(held.values()) * 4 / 2 ** 30:.2f} GiB in float32 ("
            + ", ".join(f"{k} {v * 4 / 2 ** 30:.2f}" for k, v in held.items()) + ")")


def batches(flags: Flags) -> list[tuple[str, int]]:
    """Of each stage of this run: its batch flag, and the batch."""
    of_stage = {"tsm": "tsm_batch", "dm": "batch", "adm": "adm_batch", "post": "batch", "cd": "cd_batch"}
    return [(common.option(of_stage[s]), getattr(flags, of_stage[s])) for s in flags.stages.split(",")]


def dry_run(flags: Flags, facts: data.Facts) -> None:
    """Every value with its source, parameters, memory, and which rank trains what: without data, weights or allocation."""
    with torch.device("meta" if not facts.stacked else "cpu"):
        net = facts.net(1, flags.teacher_size)
        teacher = sum(p.numel() for p in net.parameters())
        head = sum(p.numel() for p in adm.Head(net.bottleneck, [0]).parameters()) if "adm" in flags.stages else 0
        count = sum(p.numel() for p in facts.net(1, flags.student_size or flags.teacher_size).parameters())
    print(common.describe(flags))
    print(f"parameters: {count:,} a network; " + "; ".join(f"K = {K}: {K * count:,}, of which a sample uses {count:,}" for K in flags.students)
          + (f"; teacher and fake denoiser: {teacher:,}" if count != teacher else ""))
    print(memory(flags, count, teacher, head))
    if flags.reg_weight > 0:
        size = flags.pairs * math.prod(facts.shape) * (4 if facts.stacked else 2)
        print(f"pairs: {flags.pairs:,} times {(2 * flags.sampler_steps - 1)} evaluations of the teacher, {size / 2 ** 20:,.0f} MiB on disk, "
              f"shared by all students")
    worlds = sorted({1, int(os.environ.get("WORLD_SIZE", 1))} | ({2, 4 * max(flags.students)} if not facts.stacked else set()))
    batch = batches(flags)[-1][1]                                   # of the last stage
    for K in flags.students:
        for world in worlds:
            what = "; ".join(rank_map(K, world)) if not facts.stacked else f"one stack of {K} students, its batch shared by all ranks"
            each = batch // max(1, world // K) if not facts.stacked else batch // world
            print(f"K = {K}, {world} rank{'s' * (world > 1)} ({each} samples a rank and update): {what}")


# -------------------------------------------------------------------------------------------------- stages in their order

ORDERS = ("tsm", "dm", "adm", "tsm,dm", "tsm,adm", "dm,adm", "tsm,dm,adm", "post", "tsm,post", "cd", "tsm,cd")


def check_stages(flags: Flags, facts: data.Facts) -> None:
    """--stages, --student-size, --init and --classes together; tidies them. UserError for what cannot be."""
    flags.stages = ",".join(s.strip() for s in flags.stages.split(","))
    if flags.method == "cd" and "cd" not in flags.stages:
        if flags.source["stages"] == "flag":
            raise common.UserError(f"--method cd: consistency distillation is one stage of its own; leave out --stages {flags.stages}")
        flags.stages = "cd"
    if flags.stages not in ORDERS:
        unknown = [s for s in flags.stages.split(",") if s not in ("tsm", *ONE_STEP)]
        raise common.UserError(f"--stages {flags.stages}: " + (f"{unknown[0] or 'nothing'} is no stage (tsm, dm, adm, post, cd)" if unknown else
                               f"not in this order; one of {'; '.join(ORDERS)}"))
    if flags.student_size == facts.sizes[0] and not flags.teacher_size:
        flags.student_size = ""                                     # the teacher's own
    stages = flags.stages.split(",")
    first, small = stages[0], bool(flags.student_size) and flags.student_size != flags.teacher_size
    if "adm" in stages:
        adm.check_flags(flags)
        before = stages[stages.index("adm") - 1] if first != "adm" else "" if Path(flags.init).is_file() else (flags.init or "dm").partition("-")[0]
        if flags.adm_fake == "resume" and before != "dm":
            raise common.UserError("--adm-fake resume: goes on with the fake denoiser of a dm stage; ADM does not start from one here")
    if flags.init and first == "tsm":
        raise common.UserError(f"--init {flags.init}: TSM starts from random weights; leave the flag out, or tsm")
    if small and flags.init == "teacher":
        raise common.UserError(f"--init teacher: its weights do not fit students of size {flags.student_size}; give --stages tsm,{flags.stages}")
    if small and not flags.init and first in ("dm", "cd"):
        raise common.UserError(f"--student-size {flags.student_size}: the teacher's weights do not fit; give --stages tsm,{flags.stages} (or "
                               f"--init random, which App. B.6 advises against)")
    if flags.classes:
        if flags.source["students"] == "flag" and flags.students != [1]:
            raise common.UserError("--classes: one specialised student; leave --students out")
        flags.students = [1]
    if "cd" in stages:
        consistency.check_flags(flags)
        meant = [n for n in ("steps", "batch", "lr") if flags.source[n] == "flag"]
        if meant:
            raise common.UserError(f"{common.option(meant[0])}: of the DM stage, which does not train here; for CD: --cd-{meant[0]}")
    if flags.bug != "none" and "dm" not in stages:
        raise common.UserError(f"--bug {flags.bug}: of the DM stage, which does not train here")
    if flags.tag.startswith("o2mkd"):
        raise common.UserError(f"--tag {flags.tag}: results-o2mkd… are those of o2mkd.py; choose another --tag")
    flags.tag = flags.tag or own_tag(flags, facts, flags.classes)


def classes_of(flags: Flags, facts: data.Facts) -> list[int] | None:
    """--classes as a sorted list, None for all. UserError if they are not classes of the dataset."""
    if not flags.classes:
        return None
    try:
        own = sorted({int(c) for c in flags.classes.replace(" ", ",").split(",") if c})
    except ValueError:
        own = []
    if not own or not (0 <= own[0] and own[-1] < facts.classes):
        raise common.UserError(f"--classes {flags.classes}: give some of 0 to {facts.classes - 1}, such as 3,4")
    return own


def own_tag(flags: Flags, facts: data.Facts, classes: str) -> str:
    """Without --tag: smaller students, specialised ones, other partitions and other methods have folders of their own."""
    own = classes_of(flags, facts) if classes else None
    how = "" if flags.partition == "consecutive" else partition_name(flags.partition)
    last = flags.stages.split(",")[-1]
    return "-".join(filter(None, [flags.student_size, f"classes{'_'.join(map(str, own))}" if own else "", how, last if last in ("post", "cd") else ""]))


def partition_name(how: str) -> str:
    """A partition as part of a tag: its name, or file-NAME."""
    return how if how in HOWS else "file-" + "".join(c for c in Path(how).stem if c.isalnum() or c in "_-")[:40]


def first_start(flags: Flags, facts: data.Facts, m: common.Member, teacher) -> dmd.Start:
    """What the first stage of member m starts from; teacher: whose weights, if it is the teacher. UserError if it is not there."""
    first = flags.stages.split(",")[0]
    init = flags.init or {"tsm": "random", "dm": "teacher", "cd": "teacher", "adm": "dm" + common.suffix(flags.tag),
                          "post": "random" if flags.student_size else "teacher"}[first]
    size = flags.student_size or (teacher.size if teacher else flags.teacher_size or facts.sizes[0])
    if init == "teacher":
        return dmd.Start("teacher", size, lambda: teacher)
    if init == "random":
        return dmd.random_start(facts, size, m.seed)
    stage, _, tag = init.partition("-")
    if Path(init).is_file():
        start = checkpoint(init, facts)
    elif Path(init).is_dir():
        raise common.UserError(f"--init {init}: a folder; for the students of a stage of this run give dm or dm-TAG, else a checkpoint's path")
    elif stage == "tsm" and tag:
        raise common.UserError(f"--init {init}: TSM networks have no tag; give tsm (and --tsm-steps) or the path of one")
    elif stage == "tsm":
        start = dmd.start_from(tsm.home(flags, m, size), "ema.pt", 0 if flags.tsm_common else m.student)
    elif stage in ONE_STEP:
        start = dmd.start_from(dmd.stage_folder(flags, m.seed, m.students, stage, tag), "best.pt", m.student, m.classes)
    else:
        raise common.UserError(f"--init {init}: no such file, and none of teacher, random, tsm, dm, adm, post, cd (with -TAG)")
    if start.size != size and (teacher or flags.teacher in ("train", "exact")):                 # the size of a teacher's file is not known yet
        raise common.UserError(f"--init {init}: students of size {start.size}, not {size}; give --student-size {start.size}, or another --init")
    return start


@functools.lru_cache
def checkpoint(path: str, facts: data.Facts) -> dmd.Start:
    """--init PATH: a teacher's or TSM network's checkpoint, or that of a single student. UserError if it is none, or of other data."""
    try:
        D = edm.load_teacher(path)
        size, found = D.size, D.facts
    except common.UserError:
        try:
            saved, D = dmd.read_students(Path(path))
        except common.UserError:
            raise common.UserError(f"--init {path}: neither a teacher's nor a student's checkpoint of this code") from None
        size, found = saved["size"], saved["facts"]
        if len(saved["partition"]) != 1:
            raise common.UserError(f"--init {path}: a stack of {len(saved['partition'])} students; one network is needed (msd.py goes on with each of "
                                   f"them by --init dm)") from None
    if (found.shape, found.classes) != (facts.shape, facts.classes):
        raise common.UserError(f"--init {path}: made for {found.name}, {'x'.join(map(str, found.shape))}, {found.classes} classes; this run has "
                               f"{facts.name}, {'x'.join(map(str, facts.shape))}, {facts.classes} classes")
    return dmd.Start(common.fingerprint(D), size, lambda: D)


def run_stages(flags: Flags, members: list, pair_index: list, inputs: dmd.Inputs, source, device, ranks) -> None:
    """Every stage in its order, each from the best checkpoints of the one before [MSD Eq. 4]."""
    facts, seeds = data.facts(flags.dataset, flags.resolution), edm.seeds(flags)
    real = adm.real_data(flags, inputs, source)
    starts = [first_start(flags, facts, m, inputs.teachers[seeds.index(m.seed)]) for m in members]
    if ("adm" in flags.stages or "cd" in flags.stages) and not (facts.stacked and flags.real == "data"):
        label = real().label                                        # are there data of every student's classes?
        for m in members:
            filter_adm(label if label.ndim == 1 else label[seeds.index(m.seed)], torch.tensor(m.classes))
    for stage in flags.stages.split(","):
        if stage == "tsm":
            denoisers = [facts.exact] * len(seeds) if flags.teacher == "exact" else inputs.teachers    # tsm.py guides them
            with common.alone(Path(flags.out), ranks) if flags.tsm_common else contextlib.nullcontext():    # jobs of an array share it
                starts = tsm.distil(flags, members, size_of(flags, inputs), denoisers, real, device, ranks)
            continue
        if stage == "dm":
            dmd.distil(flags, members, pair_index, starts, inputs, device, ranks)
        elif stage == "cd":
            consistency.distil(flags, members, starts, inputs, real, device, ranks)
        elif stage == "adm":
            adm.distil(flags, members, pair_index, starts, inputs, real, device, ranks)
        else:
            imitated = [imitated_by(flags, m) for m in members]
            tsm.distil_post(flags, members, starts, imitated, inputs, device, ranks)
        starts = [dmd.start_from(dmd.stage_folder(flags, m.seed, m.students, stage), "best.pt", m.student) for m in members]


# ------------------------------------------------------------------------------------------------------------ the command

@common.command
def main(argv=None):
    """G_k = Distill(mu_teacher, F(D, Y_k)) for every k [MSD Eq. 1]: teacher, pairs, students stage by stage, evaluation, figures.

    Returns 1 if --target-l1 is missed, else 0."""
    flags = common.parse(Flags, PRESETS, argv, __doc__)
    dmd.check_flags(flags)
    tsm.check_flags(flags)
    facts = data.facts(flags.dataset, flags.resolution)
    check_stages(flags, facts)
    flags.students = sorted(set(flags.students))
    own = classes_of(flags, facts)
    if own and flags.partition != "consecutive":
        raise common.UserError("--classes: one specialised student; leave --partition out")
    parts = None if flags.partition in ("kmeans", "quadrant") and not facts.embeddings and not own else parts_of(flags, facts, own)
    for K in flags.students:                                        # is it in range? Before anything is trained
        partition(facts.classes, K)
        if flags.partition == "quadrant":
            partition(facts.classes, K, "quadrant", torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]))
    if flags.student >= max(flags.students) or (flags.student >= 0 and facts.stacked):
        raise common.UserError(f"--student {flags.student}: " + ("the toy's students train as one stack; leave the flag out" if facts.stacked
                                                                 else f"from 0 to {max(flags.students) - 1}, or leave the flag out for all"))
    if flags.dry_run:
        print_plan(flags, parts, "")
        dry_run(flags, facts)
        return 0
    if flags.teacher not in ("train", "exact") and not Path(flags.teacher).is_file():
        raise common.UserError(f"--teacher {flags.teacher}: no such file" + (
            "; NVIDIA's EDM page offers edm-imagenet-64x64-cond-adm.pkl" if flags.teacher.endswith(".pkl") else ""))
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    check_ranks(flags, facts, ranks)
    if ranks.rank == 0:
        seconds = estimate(flags, device)
        print_plan(flags, parts, f", on {device} ({torch.get_num_threads()} threads, {ranks.size} rank{'s' * (ranks.size > 1)}), about "
                   f"{f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'} from nothing on one rank")
    theirs = read_against(flags) if flags.against else None
    for seed, K, k in [(seed, K, k) for seed in edm.seeds(flags) for K in flags.students for k in range(K) if flags.student in (-1, k)]:
        m = common.Member(seed, K, k, tuple(parts[seed, K][k].tolist()) if parts else ())
        check_folder(flags, m)                                      # is what they start from there? Hours later is too late
        first_start(flags, facts, m, None)
        if flags.stages.endswith("post"):
            imitated_by(flags, m)
    source = data.opened(flags, ranks)
    with common.alone(Path(flags.out), ranks):
        inputs = dmd.get_inputs(flags, device, ranks, weights_of_exact if flags.teacher == "exact" else edm.get_teachers)
    if parts is None:
        parts = parts_of(flags, facts, own, inputs)
    if ranks.rank == 0 and not own:
        print_parts(flags, inputs, parts)
    members = [common.Member(seed, K, k, tuple(classes_k.tolist())) for (seed, K), part in parts.items()
               for k, classes_k in enumerate(part) if flags.student in (-1, k)]
    pair_index = [filter_dm(inputs.pairs["label"][edm.seeds(flags).index(m.seed)], torch.tensor(m.classes), flags.filter_pairs)[1] for m in members]
    run_stages(flags, members, pair_index, inputs, source, device, ranks)
    code = 0
    if flags.stages == "tsm":
        if ranks.rank == 0:
            print("\n".join(sorted({str(tsm.home(flags, m, size_of(flags, inputs))) for m in members})))
    elif flags.student >= 0 and ranks.rank == 0:
        print(f"student {flags.student} is trained; when all are, the same command without --student evaluates them")
    elif ranks.rank == 0:
        code = report(flags, evaluate(flags, inputs, parts, device), theirs)
    common.leave(ranks)
    return code


def weights_of_exact(flags: Flags, source, device, ranks) -> list[edm.Precond]:
    """`--teacher exact` has no weights to start from: --init PATH, or TSM networks of full size, trained now or reused."""
    facts = data.facts(flags.dataset, flags.resolution)
    given = checkpoint(flags.init, facts) if Path(flags.init).is_file() else None
    if given is None or given.size != (flags.teacher_size or facts.sizes[0]):
        if ranks.rank == 0:
            print("teacher exact: no weights to start from; TSM of the teacher's size makes them")
        return tsm.teachers_by_tsm(flags, source, device, ranks)
    D = given.load()
    D.facts, D.size = facts, given.size
    return [edm.ready_teacher(D, flags, device) for _ in edm.seeds(flags)]


def imitated_by(flags: Flags, m: common.Member) -> dmd.Start:
    """The student that post-distillation of m copies: --post-of, untagged but for the partition. UserError if it is not there."""
    how = "" if flags.partition == "consecutive" else partition_name(flags.partition)
    return dmd.start_from(dmd.stage_folder(flags, m.seed, m.students, flags.post_of, how), "best.pt", m.student, m.classes)


def check_folder(flags: Flags, m: common.Member) -> None:
    """A students' folder belongs to one method and one partition: later, its last stage is served. UserError if it is another's."""
    folder = dmd.stage_folder(flags, m.seed, m.students).parent
    there = {stage for stage in ONE_STEP if (folder / stage).is_dir()}
    if there and ("cd" in there) != ("cd" in flags.stages.split(",")):
        raise common.UserError(f"{folder}: holds students of another method ({', '.join(sorted(there))}); give another --tag")
    for stage in there:
        own = folder / stage / f"student{m.student}"
        config = (own if own.is_dir() else folder / stage) / "config.json"
        old = common.load_json(config) if config.exists() else {}
        theirs = old.get("classes") or (old["partition"][m.student] if isinstance(old.get("partition"), list) and len(old["partition"]) > m.student else None)
        if theirs and m.classes and sorted(theirs) != sorted(m.classes):
            raise common.UserError(f"{folder}: its student {m.student} has the classes {' '.join(map(str, theirs))}, not {' '.join(map(str, m.classes))}: made with "
                                   f"another --partition; give another --tag")


def parts_of(flags: Flags, facts: data.Facts, own: list[int] | None, inputs: dmd.Inputs | None = None) -> dict:
    """{(seed, K): Y_1 … Y_K}. inputs: for the teacher's embeddings, where the partition looks at them."""
    if own:
        return {(seed, 1): [torch.tensor(own)] for seed in edm.seeds(flags)}
    E = [embeddings_of(flags, D) for D in inputs.teachers] if inputs else [facts.embeddings() if facts.embeddings else None] * flags.seeds
    return {(seed, K): partition(facts.classes, K, flags.partition, e, seed) for seed, e in zip(edm.seeds(flags), E) for K in flags.students}


def shown(part: list[Tensor]) -> str:
    """A partition in a line: classes 0 1 2 | 3 4 5 (sizes 3, 3)."""
    texts = [" ".join(map(str, p.tolist())) if len(p) <= 12 else f"{p[0]}-{p[-1]}" if int(p[-1] - p[0]) == len(p) - 1 else f"{p[0]} {p[1]} … {p[-1]}" for p in part]
    sizes = [str(len(p)) for p in part]
    if len(part) > 16:
        texts, sizes = [*texts[:8], "…", texts[-1]], sorted(set(sizes), reverse=True)
    return "classes " + " | ".join(texts) + f"   (sizes {', '.join(sizes)})"


def print_parts(flags: Flags, inputs: dmd.Inputs, parts: dict) -> None:
    """Of every seed whose partition is its own: which student has which classes; and how alike the classes of one student are."""
    for K in flags.students:
        split = split_of(flags, inputs, parts, K)
        for i, seed in enumerate(edm.seeds(flags)):
            if flags.partition in ("random", "kmeans") and K > 1:
                print(f"  K = {K}, seed {seed}, {flags.partition}: {shown(parts[seed, K])}")
        if K > 1:
            mean = {n: [v for v in split[n] if v is not None] for n in ("within", "between")}
            print(f"  K = {K}, {Path(flags.partition).name}: mean distance of two conditions' embeddings "
                  + ", ".join(f"{sum(v) / len(v):.2f} {n} students" if v else f"none {n} students (one class each)" for n, v in mean.items()))


def print_plan(flags: Flags, parts: dict | None, where: str) -> None:
    """What is going to happen, and which student gets which classes."""
    steps = {"tsm": flags.tsm_steps, "dm": flags.steps, "adm": flags.adm_steps, "post": tsm.post_steps(flags), "cd": flags.cd_steps}
    print(f"msd: {flags.dataset}, K = {', '.join(map(str, flags.students))}, {flags.seeds} seed(s), "
          + ", then ".join(f"{s}: {steps[s]} updates of batch {b}" for s, (_, b) in zip(flags.stages.split(","), batches(flags)))
          + (f", size {flags.student_size}" if flags.student_size else "") + f"{where}, into {flags.out}", flush=True)
    for K in flags.students:
        print(f"  K = {K}: " + (shown(parts[flags.seed, K]) if parts else f"by {flags.partition} of the teacher's embeddings, once it is there"))


def check_ranks(flags: Flags, facts: data.Facts, ranks: common.Ranks) -> None:
    """Do batches and ranks divide? Asked before anything is made. UserError if not."""
    if flags.teacher in ("train", "exact"):
        ranks.parts(flags.teacher_batch if flags.teacher == "train" else flags.tsm_batch, flags.micro_batch)
    if "tsm" in flags.stages and flags.tsm_common:                  # all ranks train it together
        ranks.parts(flags.tsm_batch, flags.micro_batch)
    for K in flags.students:
        ranks_each(flags, K, ranks, facts.stacked or flags.student >= 0, [b for b in batches(flags) if b[0] != "--tsm-batch" or not flags.tsm_common],
                   ", or one job per student with --student")


def ranks_each(flags, students: int, ranks: common.Ranks, together: bool, batches: list[tuple[str, int]], hint: str = "") -> int:
    """Ranks that each of `students` trains on; together: all train one stack, or one student. batches: (flag, batch) that they share.

    UserError if ranks, batches or --micro-batch do not divide."""
    each = ranks.size if together else max(1, ranks.size // students)
    if not together and ranks.size > students and ranks.size % students:
        raise common.UserError(f"{ranks.size} ranks cannot be shared evenly by {students} students; start {students * (ranks.size // students)} or "
                               f"{students * (ranks.size // students + 1)}{hint}")
    for name, batch in batches:
        share, rest = divmod(batch, each)
        if rest or (flags.micro_batch and share % min(share, flags.micro_batch)):
            raise common.UserError(f"{name} {batch} with {each} ranks a student and --micro-batch {flags.micro_batch}: does not "
                                   f"divide; choose a multiple of {each}{f' x {flags.micro_batch}' if flags.micro_batch else ''}")
    return each


def read_against(flags: Flags) -> dict:
    """results.json of --against. UserError if it is not there, or of other seeds."""
    other = Path(flags.out) / f"results{common.suffix('' if flags.against == 'none' else flags.against)}.json"
    if not other.exists():
        raise common.UserError(f"--against {flags.against}: no {other}; run that variant with --tag {flags.against} first")
    theirs = common.load_json(other, "seeds", "students")
    facts = data.facts(flags.dataset, flags.resolution)
    own = classes_of(flags, facts)
    if theirs.get("classes") != own:
        raise common.UserError(f"--against {flags.against}: {other} is of the classes {theirs.get('classes', 'all')}, this run of {own or 'all'}")
    if theirs.get("samples") != (flags.eval_samples // facts.classes * len(own) if own else flags.eval_samples):
        raise common.UserError(f"--against {flags.against}: {other} was measured with {theirs.get('samples')} samples; give the --eval-samples of that run")
    if theirs["seeds"] != edm.seeds(flags):
        raise common.UserError(f"--against {flags.against}: {other} has seeds {theirs['seeds']}, this run {edm.seeds(flags)}")
    return theirs


def set_aside(path: Path) -> None:
    """Results of other seeds or flags make room: NAME.previous.json, NAME.previous1.json, …; said so."""
    kept = next(p for p in (path.with_suffix(f".previous{i or ''}.json") for i in range(10_000)) if not p.exists())
    path.replace(kept)
    print(f"\n{path} was of other seeds or flags: moved to {kept}")


def merged(path: Path, results: dict) -> dict:
    """Results together with the other K and stages of the same seeds and flags that the file holds; a file of others is set aside."""
    if not path.exists():
        return results
    old = common.load_json(path, "students")
    configs = old.get("configs", {})
    both = configs.keys() & results["configs"].keys()
    if both and all(configs[s] == results["configs"][s] for s in both) and all(old.get(k) == results[k] for k in ("seeds", "samples")):
        stages = {s: {**old["stages"].get(s, {}), **results["stages"].get(s, {})} for s in ONE_STEP if s in {*old["stages"], *results["stages"]}}
        return {**results, "configs": {**configs, **results["configs"]}, "stages": stages, "students": list(stages.values())[-1],
                "partition": {**old.get("partition", {}), **results.get("partition", {})}, **{k: old[k] for k in ("bound",) if k in old and k not in results}}
    set_aside(path)
    return results


def verdicts(flags: Flags, results: dict, theirs: dict | None) -> list[str]:
    """What this run's numbers say: K against K, against another variant, stage against stage, against the teacher."""
    rows, m, stages = results["students"], results["metric"], flags.stages.split(",")
    ks, of_data, lines = [str(K) for K in flags.students], f"{results['metric']}_data", []
    to_teacher = m == "l1" and stages[-1] in ("dm", "cd")
    for name in [m] if to_teacher else [of_data, m]:                # where a stage judges by real data, they are the reference
        what = "" if to_teacher else ", to the teacher" if name == m else ", to the data"
        if len(ks) > 1:
            lines += ["", comparison(f"K = {ks[-1]} below K = {ks[0]}{what}?", rows[ks[-1]], rows[ks[0]], name)]
        for stage in (s for s in stages if s in ONE_STEP and theirs):                           # stage by stage where both have it, else last by last
            of_k, other = theirs.get("stages", {"dm": theirs["students"]}), stage
            if stage not in of_k:
                if stage != stages[-1]:
                    continue
                other = list(of_k)[-1]
            mine, yours = ("", "") if stage == other == "dm" and len(stages) == 1 else (f" ({stage})", f" ({other})")
            lines += [comparison(f"K = {K}{what}, {flags.tag or 'this'}{mine} below {flags.against}{yours}?", results["stages"][stage][K], of_k[other][K], name)
                      for K in ks if K in of_k[other]]
    if "bound" in results:
        lines.append(f"K = {ks[-1]}: {rows[ks[-1]][m] - results['bound'][m]:.4f} above the {results['bound']['points']}-point Heun sampler's own {m}, CD's bound")
    for K in ks if stages[-1] not in ("dm", "cd") else ():
        lines.append("")
        if "dm" in stages:
            before, after = (results["stages"][s][K][of_data] for s in ("dm", "adm"))
            lines.append(f"K = {K}, to the data: {before:.4f} after dm, {after:.4f} after adm, which trains longer (a control of equal length: "
                         f"--stages adm --init dm{common.suffix(flags.tag)} --gan-weight 0 --tag NAME)")
        lines.append(comparison(f"K = {K}, to the data, below the teacher?", rows[K], results["teacher"], of_data))
        lines.append(comparison(f"K = {K}, to the data, chosen checkpoints below the last ones?", rows[K], rows[K], of_data, f"{of_data}_last"))
    if "general" in results:
        lines += ["", comparison(f"to the data, the student of {flags.classes} below the general one on these classes?", rows["1"], results["general"], of_data)]
    elif flags.classes:
        lines += ["", f"no general student to compare with: the same command with --students 1 instead of --classes {flags.classes} trains it"]
    return lines


def report(flags: Flags, results: dict, theirs: dict | None) -> int:
    """Write results.json, print the table and the verdicts, draw the figures; 1 if --target-l1 is missed, else 0."""
    path = Path(flags.out) / f"results{common.suffix(flags.tag)}.json"
    whole = merged(path, results)
    common.save_json(path, whole)
    print("\n" + table(whole))
    print("\n".join(verdicts(flags, results, theirs)))
    figures = plot.draw(Path(flags.out), flags.tag)
    print(f"\nresults: {path}\nfigures: " + " ".join(map(str, figures)))
    largest = results["students"][str(flags.students[-1])][results["metric"]]
    if flags.target_l1 and largest > flags.target_l1:
        print(f"{results['metric']} of {flags.students[-1]} students is {largest:.4f}, above the target {flags.target_l1}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
