"""What is measured of a sampler, and what a run says at its end: one report for both papers.

A judge compares samples: l1 of histograms (toy), a Frechet distance (images). A row is measured of each sampler; rows
of all seeds become results.json, a table, verdicts, figures. Two results files of a run folder, K by K:

    python evaluate.py runs/toy --compare none reg          results.json with results-reg.json
    python evaluate.py runs/toy --compare XS/dm XS none     XS after DM with XS at its end, and with results.json
"""
import argparse
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import fid
import images
import plot
import run
import toy_mog
from flags import UserError, command


# ---- judge

@dataclass(frozen=True)
class Judge:
    """How good are samples? What a run selects its checkpoints by, and reports."""
    title: str  # of its distance: l1, FID, FD (our classifier)
    statistics: Callable  # (x, label) -> what `distance` compares; x in [-1, 1] or uint8
    distance: Callable  # (statistics, statistics, classes=None) -> float, 0 = equal
    check: Callable  # (x, label) -> {name: value}, further numbers
    truth: Callable  # (seed, number) -> {"real", "real_select": statistics of the data, "floor_data": float}
    spread: Callable = lambda mine, real: {}  # (statistics, those of the data) -> {name: value}


def toy_judge(facts: data.Facts) -> Judge:
    """Of the toy's points: l1 of histograms [classes, bins^2 + 1], pooled over classes; coverage of the Gaussians."""
    def statistics(x: Tensor, label: Tensor) -> Tensor:
        x, label = x.cpu(), label.cpu()
        return torch.stack([toy_mog.histogram(x[label == c]) for c in range(facts.classes)])

    def distance(a: Tensor, b: Tensor, classes=None) -> float:
        rows = slice(None) if classes is None else list(classes)
        return toy_mog.l1(a[rows].sum(0), b[rows].sum(0))

    def truth(seed: int, number: int) -> dict:  # two draws
        real, select = (statistics(x, label) for x, label in data.Mixture(facts).truth(seed, number))
        return {"real": real, "real_select": select, "floor_data": distance(real, select)}
    return Judge("l1", statistics, distance, toy_mog.coverage, truth)


class Features:
    """Features of labelled images, in pieces [n, d] that may lie in files, and their moments over any classes."""

    def __init__(self, pieces: list[Tensor], label: Tensor):
        self.pieces, self.label, self.known = pieces, label.cpu(), {}

    def moments(self, classes=None) -> fid.Moments:
        """Kept: a reference is asked often. UserError for fewer than 2 images."""
        key = None if classes is None else tuple(sorted(map(int, classes)))
        if key not in self.known:
            found = fid.Moments()
            for piece, label in zip(self.pieces, self.label.split([*map(len, self.pieces)])):
                found.add(piece if key is None else piece[torch.isin(label, torch.tensor(key))])
            if found.n < 2:
                raise UserError(f"classes {list(key or ())}: fewer than 2 images to judge by")
            self.known[key] = found
        return self.known[key]

    def some(self, number: int) -> Tensor:
        """Features [number or all, d] of images drawn at random."""
        order = torch.randperm(len(self.label), generator=common.generator("some"))
        pick = order[:number].sort().values
        first, out = 0, []
        for piece in self.pieces:
            out.append(piece[pick[(pick >= first) & (pick < first + len(piece))] - first])
            first += len(piece)
        return torch.cat(out)

    def distance(self, other: "Features", classes=None) -> float:
        """Frechet distance over `classes` (default all)."""
        a, b = self.moments(classes), other.moments(classes)
        return fid.frechet_distance(a.mean, a.cov(), b.mean, b.cov())


def judge(run_flags: run.Flags, source: Callable, ranks: common.Ranks) -> Judge:
    """Of images: by NVIDIA's Inception (--features PATH), or by a classifier trained on source(), the data."""
    facts, device = data.facts(run_flags.dataset, run_flags.resolution), ranks.device
    if facts.stacked:
        return toy_judge(facts)

    def trained() -> fid.Classifier:
        path = Path(run_flags.out) / "data" / f"classifier-{facts.resolution}px.pt"
        if ranks.rank == 0 and not path.exists():
            print(f"{path}: made once, to judge images …", flush=True)
            fid.save_classifier(path, fid.train_classifier(source().x, source().label, facts.classes, device=device))
        ranks.wait()
        return fid.load_classifier(path).to(device)

    def extracted(name: str, x: Tensor, label: Tensor, rows: Tensor) -> Features:  # shared out, never held
        folder, parts = Path(run_flags.out) / "data", rows.split(16_384)
        files = [run.shard(folder, f"features-{name}", i) for i in range(len(parts))]
        todo = [i for i in ranks.share(len(parts)) if not files[i].exists()]
        for i in run.bar(todo, "features of the data", ranks.rank > 0):
            run.save_tensors(files[i], {"y": net.features(x[parts[i]])})
        ranks.wait()
        return Features([run.load_tensors(file, "y", mmap=True)["y"] for file in files], label[rows])

    def statistics(x: Tensor, label: Tensor) -> Features:  # judged as the image that is saved
        return Features([net.features(images.to_uint8(x).cpu())], label)

    @torch.no_grad()
    def check(x: Tensor, label: Tensor) -> dict:
        if run_flags.features:
            return {}
        parts = images.to_uint8(x).cpu().split(1024)
        logits = torch.cat([net(images.to_float(part.to(device))).cpu() for part in parts])
        return {"right class": (logits.argmax(1) == label.cpu()).double().mean().item()}

    def spread(mine: Features, of_data: Features) -> dict:
        pair = fid.precision_recall(of_data.some(10_000), mine.some(10_000))
        return dict(zip(("precision", "recall"), pair))
    net = fid.Inception(run_flags.features, device) if run_flags.features else trained()
    weights = common.fingerprint(net.net if run_flags.features else net)
    report, select = (extracted(f"{weights}-{name}-{len(of[2])}", *of) for name, of in
                      zip(("report", "select"), source().truth(0, run_flags.eval_samples)))
    real = {"real": report, "real_select": select, "floor_data": report.distance(select)}
    return Judge(net.name, statistics, Features.distance, check, lambda seed, number: real, spread)


# ---- a sampler's row, {name in results.json: value}

@torch.no_grad()
def measure(given, number: int, sample: Callable, keep: Path | None = None, last: Callable | None = None,
            per_class: bool = False, **more) -> dict:
    """Of `number` samples, equally many a class; more: what only this sampler has. given: the seed's teacher.Given.

    sample: (z [N, *shape], label [N]) -> x [N, *shape] on the CPU, images as uint8; keep: folder for samples.pt;
    last: as `sample`, by the last checkpoint instead of the chosen one; per_class: also class by class?"""
    facts, judge, report, real = given.facts, given.judge, given.references["report"], given.references["real"]
    z = torch.randn(number, *facts.shape, generator=common.generator(given.seed, "report z"))
    label, m = data.stratified(number, facts.classes), facts.metric
    x = sample(z, label)
    if keep:
        run.save_tensors(keep / "samples.pt", {"x": x, "label": label})
    mine = judge.statistics(x, label)
    row = {m: judge.distance(mine, report), f"{m}_data": judge.distance(mine, real), **judge.check(x, label),
           **judge.spread(mine, real), **more}
    if per_class and facts.classes <= 100:
        row["per_class"] = [judge.distance(mine, report, [c]) for c in range(facts.classes)]
        row["per_class_mean"] = sum(row["per_class"]) / facts.classes
    if last:
        mine = judge.statistics(last(z, label), label)
        row |= {f"{m}_last": judge.distance(mine, report), f"{m}_data_last": judge.distance(mine, real)}
    return row


def collected(rows) -> dict:
    """{stage: {K: [a row per seed]}} of rows (stage, K, row)."""
    out: dict = {}
    for stage, K, row in run.bar(rows, "sampling"):
        out.setdefault(stage, {}).setdefault(str(K), []).append(row)
    return out


def teacher_row(given, y: Tensor) -> dict:
    """Of the teacher's samples y [N, *shape], equally many a class; floor: two draws of it."""
    judge, real, label = given.judge, given.references["real"], data.stratified(len(y), given.facts.classes)
    mine = judge.statistics(y, label)
    return {f"{given.facts.metric}_data": judge.distance(mine, real), **judge.check(y, label),
            **judge.spread(mine, real), "floor": given.references["floor"]}


@torch.no_grad()
def multiply_adds(denoise: Callable, facts: data.Facts, device="cpu") -> int:
    """Of one evaluation of denoise(x, sigma, label), for one sample."""
    x, sigma = torch.zeros(1, 1, *facts.shape, device=device), torch.ones(1, 1, device=device)
    with FlopCounterMode(display=False) as count:
        denoise(x, sigma, torch.zeros(1, 1, dtype=torch.int64, device=device))
    return count.get_total_flops() // 2


# ---- results.json

STAGES = ("post", "cd", "dm", "adm", "o2mkd")  # the last of these is "students"; merged, heun-20 … stand beside
COLUMNS = ("{}", "{}_sd", "{}_data", "{}_data_sd", "within", "modes", "mode_min", "mode_max", "right class",
           "precision", "recall", "seconds", "teraflops", "parameters", "multiply_adds")


def summary(rows: list[dict]) -> dict:
    """Means over the seeds, and every seed; of the distances to teacher and data also the standard deviation."""
    out = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        out[name] = values.mean(0).tolist()
        if name in ("l1", "l1_data", "fd", "fd_data"):
            out[f"{name}_sd"] = values.std().item() if len(rows) > 1 else None
    return {**out, "per_seed": rows}


def last_of(stages: dict) -> str:
    """The stage that is "students" in results.json."""
    return [stage for stage in STAGES if stage in stages][-1]


def results_of(run_flags: run.Flags, given: dict, rows: dict, evaluations: int, teacher: list[dict] | None = None,
               method: str = "", **more) -> dict:
    """results.json, of rows {stage: {K: [a row per seed]}} and given {seed: teacher.Given}.

    evaluations: of the teacher, for a sample; teacher: its rows, if not of its kept samples; method: o2mkd, or "";
    more: further names, among them configs = {stage: dict}, equal for runs that share a table."""
    first, home = next(iter(given.values())), Path(run_flags.out)
    stages = {stage: {str(K): summary(per_seed) for K, per_seed in of_k.items()} for stage, of_k in rows.items()}
    if teacher is None:
        teacher = [teacher_row(g, run.load_shards(home / f"seed{s}/reference", "report")) for s, g in given.items()]
    of_teacher = summary(teacher)
    floor = summary([{"data": g.references["floor_data"]} for g in given.values()])["data"]
    return {**({"method": method} if method else {"floor": of_teacher["floor"]}), "dataset": run_flags.dataset,
            "seeds": list(given), "samples": run_flags.eval_samples, "metric": first.facts.metric,
            "title": first.judge.title, "floor_data": floor, "teacher": {**of_teacher, "evaluations": evaluations},
            **more, "students": stages[last_of(stages)], "stages": stages}


def merged(path: Path, results: dict) -> dict:
    """Results, with other K and stages of the same seeds, samples and configs that the file holds; a file of others is
    set aside: NAME.previous.json, NAME.previous1.json …"""
    new = json.loads(json.dumps(results))  # a tuple is a list there
    if not path.exists():
        return new
    old = {}
    with contextlib.suppress(run.Damaged), run.reading(path):
        found = run.load_json(path, "students", "stages")
        old = {**found, "stages": {**found["stages"]}, "configs": {**found.get("configs", {})}}
    both = old.get("configs", {}).keys() & new["configs"].keys()
    mine, theirs = ([r.get("seeds"), r.get("samples"), [r["configs"][stage] for stage in both]] for r in (new, old))
    if not both or mine != theirs:
        names = (path.with_suffix(f".previous{i or ''}.json") for i in range(10_000))
        aside = next(name for name in names if not name.exists())
        print(f"\n{path} was damaged, or of other seeds or flags: moved to {path.replace(aside)}")
        return new
    out = {**new, "stages": {}}
    for name in {"configs", "edges", "cost"} & new.keys():
        out[name] = {**old.get(name, {}), **new[name]}
    for stage in dict.fromkeys([*STAGES, *old["stages"], *new["stages"]]):  # in this order
        if of_k := {**old["stages"].get(stage, {}), **new["stages"].get(stage, {})}:
            out["stages"][stage] = of_k
    return {**out, "students": out["stages"][last_of(out["stages"])]}


def table(results: dict) -> str:
    """A line for the teacher and for each K and stage, a column for each number that one of them has."""
    m, teacher, cost, rows = results["metric"], results["teacher"], results.get("cost", {}), []
    lines = {f"teacher, {teacher['evaluations']} evaluations": {m: teacher.get("floor")} | teacher | cost.get("0", {})}
    for stage, of_k in results["stages"].items():
        if not stage.startswith(("heun-", "ddim-")):  # those: figure "curve"
            rows += [(int(K), stage, row) for K, row in of_k.items() if m in row]
    for K, stage, row in sorted(rows, key=lambda r: r[0]):
        lines[f"{K} student{'s' * (K != 1)}, {stage}"] = row | (cost.get(str(K), {}) if stage == "o2mkd" else {})
    text = [["", *lines]]  # column by column
    for name in (column.format(m) for column in COLUMNS):
        values = [row.get(name) for row in lines.values()]
        if any(value is not None for value in values):
            text.append([name, *("" if value is None else plot.short(value) for value in values)])
    wide = [max(map(len, column)) for column in text]
    out = ["  ".join(f"{cell:>{w}}" for cell, w in zip(line, wide)) for line in zip(*text)]
    floor = plot.short(results["floor_data"])
    what = m if results["title"] == m else f"{m}, {results['title']},"
    out.append(f"{what} to the teacher's samples (its own: two draws); {m}_data: to the data (two draws: {floor}); "
               f"{len(results['seeds'])} seed(s)")
    return "\n".join(out)


def report(path: Path, results: dict) -> None:
    """Write results.json; print the table and the verdicts; draw the figures."""
    with run.alone([path.parent, path.parent / "figures"]):
        whole = merged(path, results)
        run.save_json(path, whole)
    print("\n" + table(whole), *verdicts(results), sep="\n")
    figures = plot.draw(path.parent, path.stem.removeprefix("results").removeprefix("-"))
    print(f"\nresults: {path}\nfigures:", *figures)


# ---- verdicts

def verdict(a: list[float], b: list[float]) -> dict:
    """Is a below b, paired by seed? Holds if a one-sided t test of b - a gives p <= 0.05; one or two: measured."""
    difference = [y - x for x, y in zip(a, b, strict=True)]
    n, mean = len(difference), sum(difference) / len(difference)
    if n < 3:
        return {"mean": mean, "error": None, "n": n, "p": None, "verdict": "measured"}
    from scipy.special import stdtr  # slow to import, and only here
    error = math.sqrt(sum((d - mean) ** 2 for d in difference) / (n - 1) / n)
    p = float(stdtr(n - 1, -mean / error)) if error else 0.5 - 0.5 * ((mean > 0) - (mean < 0))
    return {"mean": mean, "error": error, "n": n, "p": p, "verdict": "holds" if p <= 0.05 else "does not hold"}


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p of several tests: the i-th smallest of n times n - i, never below the one before."""
    out, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        out[i] = least = max(least, min(1.0, (len(p) - rank) * p[i]))
    return out


def comparison(question: str, a: list[dict], b: list[dict], metric: str) -> str:
    """One line: is a's distance below b's? a, b: a row per seed."""
    a, b = [row[metric] for row in a], [row[metric] for row in b]
    v = verdict(a, b)
    error = "" if v["error"] is None else f" ± {v['error']:.4f} (standard error), p = {v['p']:.2g}"
    return (f"{question}: {sum(a) / len(a):.4f} against {sum(b) / len(b):.4f}, ratio {sum(a) / sum(b):.2f}, "
            f"paired difference {v['mean']:.4f}{error}, n = {v['n']}: {v['verdict']}")


def verdicts(results: dict) -> list[str]:
    """What a run's numbers say: most students against fewest, against the teacher, merged ones."""
    m, by_level, stages, lines = results["metric"], "method" in results, results["stages"], []
    rows = {K: row["per_seed"] for K, row in sorted(results["students"].items(), key=lambda item: int(item[0]))}
    fewest, most, letter, to_data = [*rows][0], [*rows][-1], "N" if by_level else "K", f"{m}_data"
    compress = last_of(stages) in ("dm", "cd")  # the teacher is the aim; else the data are
    for metric, what in ((to_data, "data"), (m, "teacher")) if len(rows) > 1 else ():
        if not (by_level if metric == m else compress and m == "l1"):
            question = f"{letter} = {most} below {letter} = {fewest}, to the {what}?"
            lines.append(comparison(question, rows[most], rows[fewest], metric))
    for K in () if compress else rows:
        question = f"{letter} = {K}, to the data, below the teacher?"
        lines.append(comparison(question, rows[K], results["teacher"]["per_seed"], to_data))
    for N, row in stages.get("merged", {}).items():
        for other in dict.fromkeys((fewest, N)):
            question = f"N = {N} merged below N = {other}, to the data?"
            lines.append(comparison(question, row["per_seed"], rows[other], to_data))
    return lines


def compare(out: Path, names: list[str]) -> list[str]:
    """Is the first below each of the others, K by K, on the seeds that both have? names: TAG, TAG/STAGE; none: no tag.

    UserError if they share no seed or K, or have other numbers of samples."""
    found, lines = [], []
    for name in names:
        tag, _, stage = name.partition("/")
        path = out / f"results{run.suffix('' if tag == 'none' else tag)}.json"
        results = run.load_json(path, "seeds", "samples", "metric", "students", "stages")
        with run.reading(path, "results of this code"):
            rows = results["stages"].get(stage, {}) if stage else results["students"]
            name = name if stage or "method" in results else f"{name}/{list(results['stages'])[-1]}"
            found.append((name, results, {K: dict(zip(results["seeds"], row["per_seed"])) for K, row in rows.items()}))
    (first, mine, a), *others = found
    for name, theirs, b in others:
        seeds, ks = [seed for seed in mine["seeds"] if seed in theirs["seeds"]], [K for K in a if K in b]
        if not seeds or not ks or mine["samples"] != theirs["samples"]:
            raise UserError(f"--compare {first} {name}: no seed or K that both have, or other numbers of samples")
        for K in ks:
            for metric, what in ((mine["metric"], "teacher"), (f"{mine['metric']}_data", "data")):
                question = f"K = {K}, {first} below {name}, to the {what}?"
                lines.append(comparison(question, [a[K][s] for s in seeds], [b[K][s] for s in seeds], metric))
    return lines


@command
def main(argv=None):
    """Compare variants of a run folder; p is of one comparison alone."""
    parser = argparse.ArgumentParser(description=compare.__doc__)
    parser.add_argument("run", type=lambda text: Path(text).expanduser(), help="the run folder")
    parser.add_argument("--compare", nargs="+", metavar="TAG", required=True, help="the first with each of the others")
    given = parser.parse_args(argv)
    if len(given.compare) < 2:
        parser.error("--compare: two tags or more; none is the run without one")
    print(*compare(given.run, given.compare), sep="\n")


if __name__ == "__main__":
    main()
