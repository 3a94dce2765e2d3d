"""Multi-student distillation: partition the classes, run the same stage for each student, route [MSD Sec. 3, Fig. 1].

    Y = Y_1 + … + Y_K                                partition        disjoint, covering, of equal size [MSD Sec. 3.1]
    G_k = Distill(mu_teacher, F(D, Y_k))             main             [MSD Eq. 1]
    F_DM(D, Y_k) = (all of D_paired, C_{Y_k})        filter_dm        [MSD Sec. 3.2]: the KL term sees the student's own
                                                                      classes, the regression term every pair
    x = G_k(z; y) with y in Y_k                      Router, generate one student answers, one evaluation

The stages themselves know nothing of K: dmd.py trains any list of label sets. The toy's students of all K and all seeds train
as one stack (one batched matmul a layer), images' students one by one or on ranks of their own; they never touch each other, and
K = 1 here is dmd.py, bit for bit.

Not here: the losses (dmd.py), the teacher (edm.py), pictures (plot.py), sampling by command (sample.py).

Departures from the paper: none of its own; see edm.py, dmd.py and toy_mog.py.

Run      python msd.py --dataset toy --students 8
Sweep    python msd.py --dataset toy --students 1 2 4 8 --seeds 5
Images   python msd.py --dataset fashion-mnist --students 1 5
GPUs     torchrun --nproc-per-node 8 msd.py --dataset imagenet64 --students 4 (on each node; --student k runs one alone)
"""
import dataclasses
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor

import common
import data
import dmd
import edm
import plot
from common import flag


@dataclasses.dataclass
class Flags(dmd.Flags):
    """What only several students need, beside the stages' flags."""
    students: list[int] = flag([8], "number of students K; several numbers are compared (the toy's train as one stack)")
    student: int = flag(-1, "train only this student of each K, for a job array on a cluster; -1 = all", low=-1)
    partition: str = flag("consecutive", "how the classes are split", "dm", ("consecutive",))
    against: str = flag("", "tag of another variant in the same run folder: compare with it, K by K")
    target_l1: float = flag(0.0, "exit with 1 if the l1 of the largest K is above this; 0 = no target", low=0)


PRESETS = common.merge(edm.PRESETS, dmd.PRESETS, {
    ("fashion-mnist", "default"): dict(students=[1, 5]), ("fashion-mnist", "smoke"): dict(students=[1, 3]),
    ("cifar10", "default"): dict(students=[1, 5]), ("cifar10", "smoke"): dict(students=[2]),
    ("imagenet64", "default"): dict(students=[4]), ("imagenet64", "paper"): dict(students=[4]),
})


# ------------------------------------------------------------------------------------------- the paper's idea, in full

def partition(classes: int, students: int, how: str = "consecutive", embeddings: Tensor | None = None, seed: int = 0):
    """Split classes 0..classes-1 into Y_1..Y_K: a list of K sorted index tensors, disjoint and covering [MSD Sec. 3.1].

    embeddings [classes, d] and seed are for strategies that look at the conditions or draw; `consecutive` needs neither.
    consecutive: blocks in numerical order, sizes within one of each other [MSD Sec. 4.1]. UserError if K is out of range."""
    if not 1 <= students <= classes:
        raise common.UserError(f"--students {students}: from 1 to {classes}, the number of classes")
    if how == "consecutive":
        return list(torch.arange(classes).tensor_split(students))
    raise common.UserError(f"--partition {how}: not known (one of: consecutive)")


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


class Router:
    """Which student answers? label [...] -> student index [...], by table look-up. UserError for an unknown label."""

    def __init__(self, parts: list[Tensor]):
        self.table = torch.empty(sum(len(p) for p in parts), dtype=torch.int64)
        for k, part in enumerate(parts):
            self.table[part] = k

    def __call__(self, label: Tensor) -> Tensor:
        if label.numel() and not (0 <= int(label.min()) and int(label.max()) < len(self.table)):
            raise common.UserError(f"class {int(label.max() if label.min() >= 0 else label.min())}: "
                                   f"this run has classes 0 to {len(self.table) - 1}")
        return self.table[label.cpu()].to(label.device)


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
    block_label = label.new_zeros(len(count), int(count.max()))
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
    saved = common.load_tensors(path)
    try:
        facts = data.facts(saved["dataset"], saved.get("resolution", 0))
        G = edm.Precond(facts.net(len(saved["partition"]), saved["size"]), facts.sigma_data)
        G.load_state_dict(saved["net"])
        G = edm.ready(G.net, G.sigma_data, flags, "cpu") if flags else G
        return {**saved, "facts": facts, "parts": [torch.tensor(p) for p in saved["partition"]]}, G.requires_grad_(False)
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise common.UserError(f"{path}: not a students' checkpoint of this code") from None


def load_students(folder, name: str = "best.pt", flags=None) -> Students:
    """Read a students' stage folder (seed0/students8/dm) or its parent. UserError if it holds none.

    Of image students only the list of classes is read now; a network is read when a label asks for it. flags: --precision."""
    folder = Path(folder)
    folder = folder / "dm" if (folder / "dm").is_dir() else folder
    if folder.name.startswith("student") and folder.name[7:].isdigit():
        raise common.UserError(f"{folder}: one student of several; give the folder of all, {folder.parent.parent}")
    own = sorted(folder.glob("student[0-9]*"), key=lambda p: int(p.name.removeprefix("student")))
    if not own:
        if not folder.is_dir():
            raise common.UserError(f"{folder}: no such students' folder (such as runs/toy/seed0/students8)")
        saved, G = _read_students(folder / name, flags)
        return Students(saved["facts"], G, Router(saved["parts"]), saved["seconds"])
    about = [common.load_json(f / "config.json", "students", "student", "classes", "dataset") for f in own]
    K = about[0]["students"]
    ready = [f for f in own if (f / name).exists()]
    if [a["student"] for a in about] != list(range(K)) or len(ready) < K:
        missing = sorted(set(range(K)) - {int(f.name.removeprefix("student")) for f in ready})
        raise common.UserError(f"{folder}: student {', '.join(map(str, missing))} of {K} is not trained yet; run that one first "
                               f"(--student {missing[0] if missing else 0})")
    seconds = sum(common.load_json(f / "done.json", "seconds")["seconds"] for f in own)
    return Students(data.facts(about[0]["dataset"], about[0].get("resolution", 0)), Separate(own, name, flags),
                    Router([torch.tensor(a["classes"]) for a in about]), seconds)


@torch.no_grad()
def generate(run, label: Tensor, seeds) -> Tensor:
    """One-step samples [B, *shape] of classes label [B] (int64), from the latents of `seeds` (B integers).

    run: a students' folder (runs/toy/seed0/students8), or what `load_students` returned."""
    label = torch.as_tensor(label)
    students = run if isinstance(run, Students) else load_students(run)
    if len(seeds) != len(label):
        raise common.UserError(f"generate: {len(label)} labels but {len(seeds)} seeds; give one seed per sample")
    students.G.to(label.device)
    z = latents(seeds, students.facts.shape).to(label.device)
    return route(students.G, students.router, z, label)


# ---------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(flags: Flags, inputs: dmd.Inputs, device) -> dict:
    """Sample every student set of the run, measure it against the teacher and the data, and return results.json."""
    facts, N, seeds, judge = data.facts(flags.dataset, flags.resolution), flags.eval_samples, edm.seeds(flags), inputs.judge
    label = data.stratified(N, facts.classes)
    chunk = 16_384 if facts.stacked else facts.chunk
    of_k: dict[str, list] = {str(K): [] for K in flags.students}
    teacher, floor, floor_data = [], [], []
    for seed in seeds:
        report, real = inputs.references[seed]["report"], inputs.references[seed]["real"]
        floor.append(inputs.references[seed]["floor"])
        floor_data.append(inputs.references[seed]["floor_data"])
        y = common.load_shards(Path(flags.out) / f"seed{seed}" / "reference", "report")
        teacher.append({"floor": floor[-1], f"{facts.metric}_data": judge.distance(report, real), **judge.check(y, label)})
        for K in flags.students:
            folder = dmd.stage_folder(flags, seed, K)
            students = load_students(folder, flags=flags)
            students.G.to(device)
            z = torch.randn(N, *facts.shape, generator=common.generator(seed, "report z"))
            order = torch.arange(N) if facts.stacked else students.router(label).argsort(stable=True)   # one student at a time
            x = torch.empty_like(z)
            for rows in order.split(chunk):
                x[rows] = route(students.G, students.router, z[rows].to(device), label[rows].to(device)).cpu()
            x = x if facts.stacked else common.to_uint8(x)
            common.save_tensors(folder / "samples.pt", {"x": x, "label": label, "student": students.router(label)})
            mine = judge.statistics(x, label)
            per_class = [judge.distance(mine, report, [c]) for c in range(facts.classes)] if facts.classes <= 100 else []
            of_k[str(K)].append({
                facts.metric: judge.distance(mine, report), f"{facts.metric}_data": judge.distance(mine, real),
                "per_class": per_class, "per_class_mean": sum(per_class) / max(1, len(per_class)), **judge.check(x, label),
                "seconds": students.seconds})

    def mean(values):
        return torch.tensor(values, dtype=torch.float64).mean(0).tolist()

    def summary(per_seed):
        out = {k: mean([p[k] for p in per_seed]) for k in per_seed[0]}
        sd = torch.tensor([p[facts.metric] for p in per_seed], dtype=torch.float64).std().item() if len(per_seed) > 1 else None
        return {**out, f"{facts.metric}_sd": sd, "per_seed": per_seed}

    return {"dataset": flags.dataset, "seeds": seeds, "samples": N, "config": dmd.config(flags, seeds[0]),
            "metric": facts.metric, "title": judge.title, "floor": mean(floor), "floor_data": mean(floor_data),
            "teacher": {**{k: mean([t[k] for t in teacher]) for k in teacher[0]}, "per_seed": teacher,
                        "evaluations": 2 * flags.sampler_steps - 1},
            "students": {K: summary(r) for K, r in of_k.items()}}


COLUMNS = {"within": ("within", "4 std", ".4f"), "modes": ("modes", "of 64", ".1f"), "mode_min": ("emptiest", "mode", ".2f"),
           "mode_max": ("fullest", "mode", ".2f"), "right class": ("right", "class", ".4f")}


def table(results: dict) -> str:
    """results.json as the table that a run ends with."""
    m, name, t = results["metric"], results["title"], results["teacher"]
    shown = {k: c for k, c in COLUMNS.items() if k in t}
    head = [("", ""), (m + " to", "teacher"), ("", "± sd"), (m + " to", "data"), *[c[:2] for c in shown.values()], ("train", "s")]
    rows = [["teacher", f"{results['floor']:.4f}*", "", f"{t[m + '_data']:.4f}", *[f"{t[k]:{c[2]}}" for k, c in shown.items()], ""]]
    for K, r in sorted(results["students"].items(), key=lambda item: int(item[0])):
        sd = "" if r[m + "_sd"] is None else f"{r[m + '_sd']:.4f}"
        rows.append([f"{K} student" + "s" * (K != "1"), f"{r[m]:.4f}", sd, f"{r[m + '_data']:.4f}",
                     *[f"{r[k]:{c[2]}}" for k, c in shown.items()], f"{r['seconds']:.0f}"])
    rows = [list(line) for line in zip(*head)] + rows
    lines = [f"{line[0]:>12} " + " ".join(f"{cell:>9}" for cell in line[1:]) for line in rows]
    lines.append((f"{m}: {name}. " if name != m else "") + f"* the floor: two draws of the teacher. Two draws of the data (images: training against test "
                 f"images): {results['floor_data']:.4f}. Seeds: {len(results['seeds'])}. Train s: of all students together.")
    return "\n".join(lines)


def comparison(name: str, a: dict, b: dict, metric: str) -> str:
    """One line: is a's distance below b's, paired by seed? a, b: entries of results["students"]."""
    a, b = ([p[metric] for p in r["per_seed"]] for r in (a, b))
    v = common.verdict(a, b)
    error = "" if v["error"] is None else f" ± {v['error']:.4f} (standard error)"
    return (f"{name}: {sum(a) / len(a):.4f} against {sum(b) / len(b):.4f}, ratio {sum(a) / sum(b):.2f}, "
            f"paired difference {v['mean']:.4f}{error}, n = {v['n']}: {v['verdict']}")


# --------------------------------------------------------------------------------------------------------- the command

def rank_map(students: int, world: int) -> list[str]:
    """Which rank trains which image student: each student its own ranks if there are enough, else students in turn."""
    if world >= students:
        groups = torch.arange(world).tensor_split(students)
        return [f"student {k}: ranks {g[0]}-{g[-1]}" if len(g) > 1 else f"student {k}: rank {g[0]}" for k, g in enumerate(groups)]
    return [f"rank {r}: students {' '.join(str(k) for k in range(r, students, world))}" for r in range(world)]


def estimate(flags: Flags, device) -> float:
    """Seconds the whole run will take from nothing on this machine alone, from timed forward passes: within a factor of two."""
    facts = data.facts(flags.dataset, flags.resolution)

    def forward(members: int, batch: int) -> float:
        net = edm.ready(facts.net(members, flags.teacher_size), facts.sigma_data, flags, device).requires_grad_(False)
        timed = batch if facts.stacked else min(batch, 64 if device.type == "cuda" else 16 if math.prod(facts.shape) < 4096 else 1)
        label = torch.zeros(members, timed, dtype=torch.int64, device=device)
        z = torch.zeros(members, timed, *facts.shape, device=device)
        times = []
        for _ in range(5 if facts.stacked else 3):
            begin = time.perf_counter()
            dmd.one_step(net, z, label).sum().item()
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2] * batch / timed

    members = flags.seeds * (sum(flags.students) if flags.student < 0 else sum(K > flags.student for K in flags.students))
    one = forward(members, flags.batch) if facts.stacked else members * forward(1, flags.batch)
    turn = 4.5 * one                                                # forward, backward, optimizer
    kl = flags.steps - dmd.first_kl_step(flags)
    dm = flags.steps * turn * (flags.reg_weight > 0) + kl * (turn + 2 * flags.draws * one + flags.ttur * (turn + one))
    drawn = (2 if facts.stacked else 1) * flags.eval_samples + flags.pairs
    solve = drawn * (2 * flags.sampler_steps - 1) / facts.chunk * forward(1, facts.chunk) * flags.seeds
    seeds = flags.seeds if facts.stacked else 1
    train = flags.teacher_steps * 4.5 * forward(seeds, flags.teacher_batch) * flags.seeds / seeds if flags.teacher in ("train", "exact") else 0
    judge = 0 if facts.stacked else 60
    return dm + (kl > 0) * flags.fake_warmup * turn + solve + train + judge + 5


def memory(flags: Flags, count: int) -> str:
    """What a rank keeps beside the activations, for a network of `count` weights: how large a GPU a student needs."""
    held = {"teacher": 1, "start": 1, "G": 1, "mu_fake": 1, "average of G": 1, "best of them": 1, "gradients": 2, "AdamW": 4}
    return (f"memory of a student's rank, without activations: {sum(held.values()) * count * 4 / 2 ** 30:.2f} GiB in float32 ("
            + ", ".join(f"{k} {v * count * 4 / 2 ** 30:.2f}" for k, v in held.items()) + ")")


def dry_run(flags: Flags, facts: data.Facts, parts: dict) -> None:
    """Every value with its source, parameters, memory, and which rank trains what: without data, weights or allocation."""
    with torch.device("meta" if not facts.stacked else "cpu"):
        count = sum(p.numel() for p in facts.net(1, flags.teacher_size).parameters())
    print(common.describe(flags))
    print(f"parameters: {count:,} a network; " + "; ".join(f"K = {K}: {K * count:,}, of which a sample uses {count:,}" for K in parts))
    print(memory(flags, count))
    if flags.reg_weight > 0:
        size = flags.pairs * math.prod(facts.shape) * (4 if facts.stacked else 2)
        print(f"pairs: {flags.pairs:,} times {(2 * flags.sampler_steps - 1)} evaluations of the teacher, {size / 2 ** 20:,.0f} MiB on disk, "
              f"shared by all students")
    worlds = sorted({1, int(os.environ.get("WORLD_SIZE", 1))} | ({2, 4 * max(parts)} if not facts.stacked else set()))
    for K in parts:
        for world in worlds:
            what = "; ".join(rank_map(K, world)) if not facts.stacked else f"one stack of {K} students, its batch shared by all ranks"
            each = flags.batch // max(1, world // K) if not facts.stacked else flags.batch // world
            print(f"K = {K}, {world} rank{'s' * (world > 1)} ({each} samples a rank and update): {what}")


@common.command
def main(argv=None):
    """G_k = Distill(mu_teacher, F(D, Y_k)) for every k [MSD Eq. 1]: teacher, pairs, students, evaluation, figures.

    Returns 1 if --target-l1 is missed, else 0."""
    flags = common.parse(Flags, PRESETS, argv, __doc__)
    dmd.check_flags(flags)
    facts = data.facts(flags.dataset, flags.resolution)
    flags.students = sorted(set(flags.students))
    parts = {K: partition(facts.classes, K, flags.partition) for K in flags.students}
    if flags.student >= max(flags.students) or (flags.student >= 0 and facts.stacked):
        raise common.UserError(f"--student {flags.student}: " + ("the toy's students train as one stack; leave the flag out" if facts.stacked
                                                                 else f"from 0 to {max(flags.students) - 1}, or leave the flag out for all"))
    if flags.dry_run:
        print_plan(flags, parts, "")
        dry_run(flags, facts, parts)
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
    with common.alone(Path(flags.out), ranks):
        inputs = dmd.get_inputs(flags, device, ranks)
    members, pair_index = [], []
    for i, seed in enumerate(edm.seeds(flags)):
        for K, part in parts.items():
            for k, classes_k in enumerate(part):
                if flags.student in (-1, k):
                    kl_classes, index = filter_dm(inputs.pairs["label"][i], classes_k, flags.filter_pairs)
                    members.append(common.Member(seed, K, k, tuple(kl_classes.tolist())))
                    pair_index.append(index)
    dmd.distil(flags, members, pair_index, inputs, device, ranks)
    code = 0
    if flags.student >= 0 and ranks.rank == 0:
        print(f"student {flags.student} is trained; when all are, the same command without --student evaluates them")
    elif ranks.rank == 0:
        code = report(flags, evaluate(flags, inputs, device), theirs)
    common.leave(ranks)
    return code


def print_plan(flags: Flags, parts: dict, where: str) -> None:
    """What is going to happen, and which student gets which classes."""
    print(f"msd: {flags.dataset}, K = {', '.join(map(str, flags.students))}, {flags.seeds} seed(s), {flags.steps} updates of batch "
          f"{flags.batch} per student{where}, into {flags.out}", flush=True)
    for K, part in parts.items():
        shown = [" ".join(map(str, p.tolist())) if len(p) <= 12 else f"{p[0]}-{p[-1]}" for p in part]
        sizes = [str(len(p)) for p in part]
        if K > 16:
            shown, sizes = [*shown[:8], "…", shown[-1]], sorted(set(sizes), reverse=True)
        print(f"  K = {K}: classes " + " | ".join(shown) + f"   (sizes {', '.join(sizes)})")


def check_ranks(flags: Flags, facts: data.Facts, ranks: common.Ranks) -> None:
    """Do batches and ranks divide? Asked before anything is made. UserError if not."""
    if flags.teacher in ("train", "exact"):
        ranks.parts(flags.teacher_batch, flags.micro_batch)
    for K in flags.students:
        alone = facts.stacked or flags.student >= 0
        each = ranks.size if alone else ranks.size // K if ranks.size >= K and ranks.size % K == 0 else 1
        if not alone and ranks.size > K and ranks.size % K:
            raise common.UserError(f"{ranks.size} ranks cannot be shared evenly by {K} students; start {K * (ranks.size // K)} or "
                                   f"{K * (ranks.size // K + 1)}, or one job per student with --student")
        share, rest = divmod(flags.batch, each)
        if rest or (flags.micro_batch and share % min(share, flags.micro_batch)):
            raise common.UserError(f"--batch {flags.batch} with {each} ranks a student and --micro-batch {flags.micro_batch}: does not "
                                   f"divide; choose a multiple of {each}{f' x {flags.micro_batch}' if flags.micro_batch else ''}")


def read_against(flags: Flags) -> dict:
    """results.json of --against. UserError if it is not there, or of other seeds."""
    other = Path(flags.out) / f"results-{flags.against}.json"
    if not other.exists():
        raise common.UserError(f"--against {flags.against}: no {other}; run that variant with --tag {flags.against} first")
    theirs = common.load_json(other, "seeds", "students")
    if theirs.get("samples") != flags.eval_samples:
        raise common.UserError(f"--against {flags.against}: {other} was measured with {theirs.get('samples')} samples; give --eval-samples")
    if theirs["seeds"] != edm.seeds(flags):
        raise common.UserError(f"--against {flags.against}: {other} has seeds {theirs['seeds']}, this run {edm.seeds(flags)}")
    return theirs


def report(flags: Flags, results: dict, theirs: dict | None) -> int:
    """Write results.json, print the table and the verdicts, draw the figures; 1 if --target-l1 is missed, else 0."""
    path = Path(flags.out) / f"results{common.suffix(flags.tag)}.json"
    if path.exists():                                               # keep the other K of the same seeds and flags
        old = common.load_json(path, "students")
        if all(old.get(k) == results[k] for k in ("seeds", "config", "samples")):
            results["students"] = {**old["students"], **results["students"]}
        else:
            kept = path.with_suffix(".previous.json")
            path.replace(kept)
            print(f"\n{path} was of other seeds or flags: moved to {kept}")
    common.save_json(path, results)
    print("\n" + table(results))
    rows, m = results["students"], results["metric"]
    metrics = [m] if m == "l1" else [f"{m}_data", m]                # images: the data are the reference of the headline
    for name in metrics:
        what = "" if name == m else ", to the data"
        if len(flags.students) > 1:
            low, high = str(flags.students[0]), str(flags.students[-1])
            print("\n" + comparison(f"K = {high} below K = {low}{what}?", rows[high], rows[low], name))
        if theirs:
            for K in (K for K in map(str, flags.students) if K in theirs["students"]):
                print(comparison(f"K = {K}{what}, {flags.tag or 'this'} below {flags.against}?", rows[K], theirs["students"][K], name))
    figures = plot.draw(Path(flags.out), flags.tag)
    print(f"\nresults: {path}\nfigures: " + " ".join(map(str, figures)))
    largest = results["students"][str(flags.students[-1])][m]
    if flags.target_l1 and largest > flags.target_l1:
        print(f"{m} of {flags.students[-1]} students is {largest:.4f}, above the target {flags.target_l1}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
