"""Multi-student distillation: partition the classes, run the same stage for each student, route [MSD Sec. 3, Fig. 1].

    Y = Y_1 + … + Y_K                                partition        disjoint, covering, of equal size [MSD Sec. 3.1]
    G_k = Distill(mu_teacher, F(D, Y_k))             main             [MSD Eq. 1]
    F_DM(D, Y_k) = (all of D_paired, C_{Y_k})        filter_dm        [MSD Sec. 3.2]: the KL term sees the student's own
                                                                      classes, the regression term every pair
    x = G_k(z; y) with y in Y_k                      Router, generate one student answers, one evaluation

The stages themselves know nothing of K: dmd.py trains any list of label sets. The students of all K and all seeds train as
one stack (one batched matmul a layer) and never touch each other: K = 1 here is dmd.py, bit for bit.

Not here: the losses (dmd.py), the teacher (edm.py), pictures (plot.py), sampling by command (sample.py).

Departures from the paper: none of its own; see edm.py, dmd.py and toy_mog.py.

Run      python msd.py --dataset toy --students 8
Sweep    python msd.py --dataset toy --students 1 2 4 8 --seeds 5
"""
import dataclasses
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
    students: list[int] = flag([8], "number of students K; several numbers train as one stack and are compared")
    partition: str = flag("consecutive", "how the classes are split", "dm", ("consecutive",))
    against: str = flag("", "tag of another variant in the same run folder: compare with it, K by K")
    target_l1: float = flag(0.0, "exit with 1 if the l1 of the largest K is above this; 0 = no target", low=0)


PRESETS = common.merge(edm.PRESETS, dmd.PRESETS)


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

    Rows are sorted into a block per student, so that each student of the stack runs once."""
    k = router(label)                                                                           # [B]
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


@dataclasses.dataclass
class Students:
    """The K trained generators of one stage folder, with their router."""
    dataset: str
    G: edm.Precond
    router: Router
    seconds: float                                                  # of training, of the whole stack


def load_students(folder, name: str = "best.pt") -> Students:
    """Read a students' stage folder (seed0/students8/dm) or its parent. UserError if it holds none."""
    folder = Path(folder)
    folder = folder / "dm" if (folder / "dm").is_dir() else folder
    saved = common.load_tensors(folder / name)
    try:
        facts = data.DATASETS[saved["dataset"]]
        parts = [torch.tensor(p) for p in saved["partition"]]
        G = edm.Precond(facts.net(len(parts), saved["size"]), facts.sigma_data)
        G.load_state_dict(saved["net"])
        return Students(saved["dataset"], G.requires_grad_(False), Router(parts), saved["seconds"])
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise common.UserError(f"{folder / name}: not a students' checkpoint of this code") from None


@torch.no_grad()
def generate(run, label: Tensor, seeds) -> Tensor:
    """One-step samples [B, *shape] of classes label [B] (int64), from the latents of `seeds` (B integers).

    run: a students' folder (runs/toy/seed0/students8), or what `load_students` returned."""
    students = run if isinstance(run, Students) else load_students(run)
    if len(seeds) != len(label):
        raise common.UserError(f"generate: {len(label)} labels but {len(seeds)} seeds; give one seed per sample")
    z = latents(seeds, data.DATASETS[students.dataset].shape).to(label.device)
    return route(students.G, students.router, z, label)


# ---------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(flags: Flags, inputs: dmd.Inputs) -> dict:
    """Sample every student set of the run, measure it against the teacher and the data, and return results.json."""
    facts, N, seeds = data.DATASETS[flags.dataset], flags.eval_samples, edm.seeds(flags)
    label = data.stratified(N, facts.classes)
    rows: dict[str, list] = {str(K): [] for K in flags.students}
    teacher, floor, floor_data = [], [], []
    for seed in seeds:
        select, report = inputs.references[seed]["select"], inputs.references[seed]["report"]
        real = [facts.statistics(facts.sample(label, common.generator(seed, name)), label) for name in ("real 1", "real 2")]
        floor.append(facts.distance(select, report))
        floor_data.append(facts.distance(*real))
        stored = common.load_tensors(Path(flags.out) / f"seed{seed}" / "reference" / "samples.pt")["report"]
        teacher.append({"floor": floor[-1], f"{facts.metric}_data": facts.distance(report, real[0]),
                        **facts.check(stored["y"][0], stored["label"][0])})
        for K in flags.students:
            folder = dmd.stage_folder(flags, seed, K)
            students = load_students(folder)
            z = torch.randn(N, *facts.shape, generator=common.generator(seed, "report z"))
            x = torch.cat([route(students.G, students.router, a, b) for a, b in zip(z.split(16_384), label.split(16_384))])
            common.save_tensors(folder / "samples.pt", {"x": x, "label": label, "student": students.router(label)})
            mine = facts.statistics(x, label)
            per_class = [facts.distance(mine, report, [c]) for c in range(facts.classes)]
            rows[str(K)].append({
                facts.metric: facts.distance(mine, report), f"{facts.metric}_data": facts.distance(mine, real[0]),
                "per_class": per_class, "per_class_mean": sum(per_class) / len(per_class), **facts.check(x, label),
                "seconds": students.seconds})

    def mean(values):
        return torch.tensor(values, dtype=torch.float64).mean(0).tolist()

    def summary(per_seed):
        out = {k: mean([p[k] for p in per_seed]) for k in per_seed[0]}
        sd = torch.tensor([p[facts.metric] for p in per_seed], dtype=torch.float64).std().item() if len(per_seed) > 1 else None
        return {**out, f"{facts.metric}_sd": sd, "per_seed": per_seed}

    return {"dataset": flags.dataset, "seeds": seeds, "samples": N, "config": dmd.config(flags, seeds[0]),
            "metric": facts.metric, "floor": mean(floor), "floor_data": mean(floor_data),
            "teacher": {**{k: mean([t[k] for t in teacher]) for k in teacher[0]}, "per_seed": teacher,
                        "evaluations": 2 * flags.sampler_steps - 1},
            "students": {K: summary(r) for K, r in rows.items()}}


def table(results: dict) -> str:
    """results.json as the table that a run ends with."""
    m = results["metric"]
    lines = [f"{'':>12} {m + ' to':>9} {'':>7} {m + ' to':>9} {'within':>7} {'modes':>6} {'emptiest':>9} {'fullest':>8} {'train':>7}",
             f"{'':>12} {'teacher':>9} {'± sd':>7} {'data':>9} {'4 std':>7} {'of 64':>6} {'mode':>9} {'mode':>8} {'s':>7}"]

    def line(name, first, sd, r, seconds):
        return (f"{name:>12} {first:>9} {sd:>7} {r[m + '_data']:>9.4f} {r['within']:>7.4f} {r['modes']:>6.1f} "
                f"{r['mode_min']:>9.2f} {r['mode_max']:>8.2f} {seconds:>7}")
    t = results["teacher"]
    lines.append(line("teacher", f"{results['floor']:.4f}*", "", t, ""))
    for K, r in sorted(results["students"].items(), key=lambda item: int(item[0])):
        sd = "" if r[m + "_sd"] is None else f"{r[m + '_sd']:.4f}"
        lines.append(line(f"{K} student" + "s" * (K != "1"), f"{r[m]:.4f}", sd, r, f"{r['seconds']:.0f}"))
    lines.append(f"* the floor: two draws of the teacher. Two draws of the data: {results['floor_data']:.4f}. "
                 f"Seeds: {len(results['seeds'])}. Train s: of the whole stack.")
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
    """Which rank trains which student: each student its own ranks if there are enough, else students in turn."""
    if world >= students:
        groups = torch.arange(world).tensor_split(students)
        return [f"student {k}: ranks {g[0]}-{g[-1]}" if len(g) > 1 else f"student {k}: rank {g[0]}" for k, g in enumerate(groups)]
    return [f"rank {r}: students {' '.join(str(k) for k in range(r, students, world))}" for r in range(world)]


def estimate(flags: Flags, device) -> float:
    """Seconds the whole run will take from nothing, from a timed forward pass: within a factor of two."""
    facts = data.DATASETS[flags.dataset]

    def forward(members: int, batch: int) -> float:
        net = edm.Precond(facts.net(members, facts.sizes[0]), facts.sigma_data).to(device).requires_grad_(False)
        label = torch.zeros(members, batch, dtype=torch.int64, device=device)
        z = torch.zeros(members, batch, *facts.shape, device=device)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            dmd.one_step(net, z, label).sum().item()
            times.append(time.perf_counter() - begin)
        return sorted(times)[2]

    members = flags.seeds * sum(flags.students)
    one = forward(members, flags.batch)
    turn = 4.5 * one                                                # forward, backward, optimizer
    kl = flags.steps - dmd.first_kl_step(flags)
    dm = flags.steps * turn * (flags.reg_weight > 0) + kl * (turn + 2 * flags.draws * one + flags.ttur * (turn + one))
    solve = (2 * flags.eval_samples + flags.pairs) * (2 * flags.sampler_steps - 1) / 8192 * forward(1, 8192) * flags.seeds
    train = flags.teacher_steps * 4.5 * forward(flags.seeds, flags.teacher_batch) if flags.teacher in ("train", "exact") else 0
    return dm + (kl > 0) * flags.fake_warmup * turn + solve + train + 5


@common.command
def main(argv=None):
    """G_k = Distill(mu_teacher, F(D, Y_k)) for every k [MSD Eq. 1]: teacher, pairs, students, evaluation, figures.

    Returns 1 if --target-l1 is missed, else 0."""
    flags = common.parse(Flags, PRESETS, argv, __doc__)
    dmd.check_flags(flags)
    facts = data.DATASETS[flags.dataset]
    flags.students = sorted(set(flags.students))
    parts = {K: partition(facts.classes, K, flags.partition) for K in flags.students}
    device = common.device(flags.device, flags.threads)
    seconds = estimate(flags, device)
    print(f"msd: {flags.dataset}, K = {', '.join(map(str, flags.students))}, {flags.seeds} seed(s), {flags.steps} updates of batch "
          f"{flags.batch} per student, on {device} ({torch.get_num_threads()} threads), about "
          f"{f'{seconds / 60:.1f} min' if seconds > 90 else f'{seconds:.0f} s'} from nothing, into {flags.out}")
    for K, part in parts.items():
        print(f"  K = {K}: classes " + " | ".join(" ".join(map(str, p.tolist())) for p in part)
              + f"   (sizes {', '.join(str(len(p)) for p in part)})")
    if flags.dry_run:
        net = facts.net(1, facts.sizes[0])
        count = sum(p.numel() for p in net.parameters())
        print(common.describe(flags))
        print(f"parameters: {count:,} a network; " + "; ".join(f"K = {K}: {K * count:,}, of which a sample uses {count:,}" for K in parts))
        for K in parts:
            print(f"K = {K}, 1 rank: " + "; ".join(rank_map(K, 1)))
        return 0
    if flags.against:
        other = Path(flags.out) / f"results-{flags.against}.json"
        if not other.exists():
            raise common.UserError(f"--against {flags.against}: no {other}; run that variant with --tag {flags.against} first")
        theirs = common.load_json(other, "seeds", "students")
        if theirs["seeds"] != edm.seeds(flags):
            raise common.UserError(f"--against {flags.against}: {other} has seeds {theirs['seeds']}, this run {edm.seeds(flags)}")
    inputs = dmd.get_inputs(flags, device)
    members, pair_index = [], []
    for i, seed in enumerate(edm.seeds(flags)):
        for K, part in parts.items():
            for k, classes_k in enumerate(part):
                kl_classes, index = filter_dm(inputs.pairs["label"][i], classes_k, flags.filter_pairs)
                members.append(common.Member(seed, K, k, tuple(kl_classes.tolist())))
                pair_index.append(index)
    dmd.distil(flags, members, pair_index, inputs, device)
    results = evaluate(flags, inputs)
    path = Path(flags.out) / f"results{common.suffix(flags.tag)}.json"
    if path.exists():                                               # keep the other K of the same seeds and flags
        old = common.load_json(path, "students")
        if all(old.get(k) == results[k] for k in ("seeds", "config")):
            results["students"] = {**old["students"], **results["students"]}
        else:
            kept = path.with_suffix(".previous.json")
            path.replace(kept)
            print(f"\n{path} was of other seeds or flags: moved to {kept}")
    common.save_json(path, results)
    print("\n" + table(results))
    rows, m = results["students"], facts.metric
    if len(flags.students) > 1:
        low, high = str(flags.students[0]), str(flags.students[-1])
        print("\n" + comparison(f"K = {high} below K = {low}?", rows[high], rows[low], m))
    if flags.against:
        for K in (K for K in map(str, flags.students) if K in theirs["students"]):
            print(comparison(f"K = {K}, {flags.tag or 'this'} below {flags.against}?", rows[K], theirs["students"][K], m))
    figures = plot.draw(Path(flags.out), flags.tag)
    print(f"\nresults: {path}\nfigures: " + " ".join(map(str, figures)))
    largest = results["students"][str(flags.students[-1])][facts.metric]
    if flags.target_l1 and largest > flags.target_l1:
        print(f"l1 of {flags.students[-1]} students is {largest:.4f}, above the target {flags.target_l1}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
