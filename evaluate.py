"""What is measured of a sampler, and what a run says at its end: one report for both papers.

  judge          statistics of samples and their distance: l1 of histograms (toy), a Frechet distance (images)
  measure        Sampler -> Row: how far its samples are from the data and from the teacher's samples
  results_of     rows of all seeds -> results.json; then `report`: merged, table, verdicts, figures

It knows nothing of students or training: it is handed samplers. Not here: pictures (plot.py), claims (claims.py).

Compare    python evaluate.py runs/toy --compare none reg          results.json with results-reg.json, K by K
           python evaluate.py runs/toy --compare XS/dm XS none     XS after DM with XS at its end, and with results.json
"""
import argparse
import functools
import json
import math
import timeit
from dataclasses import dataclass, field
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


# -------------------------------------------------------------------------------------------------------------- judge

@dataclass(frozen=True)
class Judge:
    """How good are samples? What a run selects its checkpoints by, and reports."""
    title: str                             # what its distance is called: l1, FID, FD (our classifier)
    statistics: Callable                   # (x, label) -> what `distance` compares; x in [-1, 1] or uint8
    distance: Callable                     # (statistics, statistics, classes=None) -> float, 0 = equal
    check: Callable                        # (x, label) -> {name: value}, further numbers about samples
    truth: Callable                        # (seed, number) -> {"real", "real_select": statistics of the data (toy: two
                                           # draws, images: one set), "floor_data": float}


def toy_statistics(x: Tensor, label: Tensor, classes: int = toy_mog.CLASSES) -> Tensor:
    """Histogram of each class, counts [classes, bins^2 + 1], on the CPU."""
    x, label = x.cpu(), label.cpu()
    return torch.stack([toy_mog.histogram(x[label == c]) for c in range(classes)])


def toy_distance(a: Tensor, b: Tensor, classes=None) -> float:
    """l1 of the histograms pooled over `classes` (default all), from two `toy_statistics`."""
    rows = slice(None) if classes is None else list(classes)
    return toy_mog.l1(a[rows].sum(0), b[rows].sum(0))


def toy_judge(facts: data.Facts) -> Judge:
    """The judge of the toy's points: l1 of histograms, coverage of the Gaussians."""
    statistics = functools.partial(toy_statistics, classes=facts.classes)

    def truth(seed: int, number: int) -> dict:
        drawn = [statistics(x, label) for x, label in data.Mixture(facts).truth(seed, number)]
        return {"real": drawn[0], "real_select": drawn[1], "floor_data": toy_distance(*drawn)}
    return Judge("l1", statistics, toy_distance, lambda x, label: toy_mog.coverage(x, facts.meaning(label)), truth)


class Features:
    """Features [N, d] of labelled images: mean and covariance of any set of classes [MSD App. E]."""

    def __init__(self, features: Tensor, label: Tensor):
        self.features, self.label, self.known = features, label.cpu(), {}

    def moments(self, classes=None) -> fid.Moments:
        """Of the images of these classes; kept, as a reference is asked often."""
        key = None if classes is None else tuple(sorted(int(c) for c in classes))
        if key not in self.known:
            rows = self.features if key is None else self.features[torch.isin(self.label, torch.tensor(key))]
            if len(rows) < 2:
                raise UserError(f"classes {list(key or ())}: fewer than 2 images; give more samples")
            self.known[key] = fid.Moments()
            for piece in rows.split(16_384):
                self.known[key].add(piece)
        return self.known[key]


def feature_distance(a: Features, b: Features, classes=None) -> float:
    """Frechet distance of the features of two sets of images, over `classes` (default all)."""
    a, b = a.moments(classes), b.moments(classes)
    return fid.frechet_distance(a.mean(), a.cov(), b.mean(), b.cov())


def judge(run_flags: run.Flags, source: Callable, ranks: common.Ranks) -> Judge:
    """The judge of a dataset. Of images: by NVIDIA's Inception (--features PATH) or by a classifier trained here, once.

    source() gives the data. The classifier and the data's features are kept in OUT/data; the first rank makes them."""
    facts = data.facts(run_flags.dataset, run_flags.resolution)
    if facts.stacked:
        return toy_judge(facts)
    home, device = Path(run_flags.out) / "data", ranks.device
    if run_flags.features:
        net = fid.Inception(run_flags.features, device)
    else:
        path = home / f"classifier-{facts.resolution}px.pt"
        if ranks.rank == 0 and not path.exists():
            print(f"{path}: training a classifier for {facts.name}, the judge of images …", flush=True)
            made = fid.train_classifier(source().x, source().label, facts.classes, device=device)
            fid.save_classifier(path, made)
        ranks.wait()
        net = fid.load_classifier(path).to(device)

    def pixels(x: Tensor) -> Tensor:
        return images.to_uint8(x).cpu()                             # a sample is judged as the image that is saved

    def check(x: Tensor, label: Tensor) -> dict:
        if not isinstance(net, fid.Classifier):
            return {}
        with torch.no_grad():
            logits = [net(images.to_float(part.to(device))).cpu() for part in pixels(x).split(1024)]
        return {"right class": (torch.cat(logits).argmax(1) == label.cpu()).double().mean().item()}

    @functools.lru_cache
    def real() -> dict:
        path = home / f"features-{common.fingerprint(getattr(net, 'net', net))}.pt"             # of these very weights
        if ranks.rank == 0 and not path.exists():
            print(f"{path}: features of the data …", flush=True)
            x, label = zip(*source().truth(0, run_flags.eval_samples))
            run.save_tensors(path, {"features": [net.features(part) for part in x], "label": list(label)})
        ranks.wait()
        kept = run.load_tensors(path)
        sets = [Features(f, label) for f, label in zip(kept["features"], kept["label"])]
        return {"real": sets[0], "real_select": sets[0], "floor_data": feature_distance(*sets)}
    return Judge(net.name, lambda x, label: Features(net.features(pixels(x)), label), feature_distance, check,
                 lambda seed, number: dict(real()))


# ------------------------------------------------------------------------------------------- a sampler and its row

@dataclass
class Row:
    """What is measured of one sampler, with one seed. None: not measured, and not in results.json."""
    to_teacher: float | None = None        # distance of its samples to the teacher's samples: "l1", of images "fd"
    to_data: float | None = None           # the same distance to the data: "l1_data", "fd_data"
    per_class: list | None = None          # to the teacher's samples, class by class
    checks: dict = field(default_factory=dict)      # toy: within, modes, mode_min, mode_max; images: right class
    seconds: float | None = None           # of training in this stage, all its students together
    last: tuple = (None, None)             # to_teacher, to_data of the last checkpoint instead of the chosen one
    more: dict = field(default_factory=dict)        # {name: value} that only this kind of sampler has

    def numbers(self, metric: str) -> dict:
        """{name in results.json: value}; metric: l1 or fd."""
        mean_class = None if self.per_class is None else sum(self.per_class) / max(1, len(self.per_class))
        named = {metric: self.to_teacher, f"{metric}_data": self.to_data, "per_class": self.per_class,
                 "per_class_mean": mean_class, **self.checks, "seconds": self.seconds,
                 f"{metric}_last": self.last[0], f"{metric}_data_last": self.last[1], **self.more}
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class Sampler:
    """Whose samples are measured: K students in turn, one merged from them, the teacher in fewer steps …"""
    stage: str                             # where its row stands: dm, adm, cd, post, o2mkd, merged, heun-20 …
    K: int                                 # number of students; 0: the teacher
    seed: int                              # of its run
    sample: Callable                       # (z [N, *shape], label [N]) -> x [N, *shape] on the CPU, images as uint8
    keep: Path | None = None               # the folder for samples.pt
    student: Callable | None = None        # label [N] -> which student answers [N]; kept with the samples
    seconds: float | None = None           # of training
    last: Callable | None = None           # as `sample`, by the last checkpoint
    per_class: bool = False                # also class by class?
    more: dict = field(default_factory=dict)        # for Row.more


@torch.no_grad()
def measure(sampler: Sampler, given, number: int) -> Row:
    """Measure `number` samples, equally many a class. given: the seed's teacher.Given (judge, references, facts)."""
    facts, judge, report, real = given.facts, given.judge, given.references["report"], given.references["real"]
    z = torch.randn(number, *facts.shape, generator=common.generator(sampler.seed, "report z"))
    label = data.stratified(number, facts.classes)
    x = sampler.sample(z, label)
    if sampler.keep:
        who = {"student": sampler.student(label)} if sampler.student else {}
        run.save_tensors(sampler.keep / "samples.pt", {"x": x, "label": label, **who})
    mine = judge.statistics(x, label)
    row = Row(judge.distance(mine, report), judge.distance(mine, real), checks=judge.check(x, label),
              seconds=sampler.seconds, more=sampler.more)
    if sampler.per_class:
        row.per_class = [judge.distance(mine, report, [c]) for c in range(facts.classes) if facts.classes <= 100]
    if sampler.last:
        last = judge.statistics(sampler.last(z, label), label)
        row.last = judge.distance(last, report), judge.distance(last, real)
    return row


def measure_all(samplers, given: dict, number: int) -> dict:
    """Rows {stage: {K: [one per seed]}} of samplers; given: {seed: teacher.Given}."""
    rows: dict = {}
    for s in run.bar(samplers, "sampling", None):
        rows.setdefault(s.stage, {}).setdefault(str(s.K), []).append(measure(s, given[s.seed], number))
    return rows


def teacher_row(given, y: Tensor, statistics=None) -> Row:
    """Row of the teacher, from its samples y [N, *shape], equally many a class; statistics: of y, if known already."""
    label = data.stratified(len(y), given.facts.classes)
    mine = given.judge.statistics(y, label) if statistics is None else statistics
    floor = {k: v for k, v in given.references.items() if k == "floor"}
    to_data = given.judge.distance(mine, given.references["real"])
    return Row(to_data=to_data, checks=given.judge.check(y, label), more=floor)


@torch.no_grad()
def multiply_adds(denoise: Callable, facts: data.Facts, device="cpu") -> int:
    """Of one evaluation of denoise(x, sigma, label) for one sample."""
    x, sigma = torch.zeros(1, 1, *facts.shape, device=device), torch.ones(1, 1, device=device)
    with FlopCounterMode(display=False) as count:
        denoise(x, sigma, torch.zeros(1, 1, dtype=torch.int64, device=device))
    return count.get_total_flops() // 2


def throughput(function: Callable, number: int) -> float:
    """Samples a second of function(), which makes `number`: the fastest of three calls."""
    return number / min(timeit.repeat(function, repeat=3, number=1))


# -------------------------------------------------------------------------------------------------------- results.json

STAGES = ("post", "cd", "dm", "adm", "o2mkd")        # the last of these is "students"; merged, heun-20 … stand beside
COLUMNS = {"within": ("within", ".4f"), "modes": ("modes", ".1f"), "mode_min": ("emptiest", ".2f"),
           "mode_max": ("fullest", ".2f"), "right class": ("right class", ".4f"), "seconds": ("train s", ".0f"),
           "parameters": ("parameters", ","), "multiply_adds": ("mult-adds", ".3g"),
           "per_second": ("samples/s", ",.0f")}


def mean(values: list):
    """Over the seeds: of numbers a number, of lists a list."""
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def summary(rows: list[dict], metric: str = "") -> dict:
    """Means over the seeds, and every seed; of the distances to teacher and data, if a metric is given, also the sd."""
    out = {name: mean([r[name] for r in rows]) for name in rows[0]}
    for name in (metric, f"{metric}_data"):
        if name in rows[0]:
            values = torch.tensor([r[name] for r in rows], dtype=torch.float64)
            out[f"{name}_sd"] = values.std().item() if len(rows) > 1 else None
    return {**out, "per_seed": rows}


def students_of(stages: dict) -> dict:
    """{K: row} of the last stage."""
    return stages[[s for s in STAGES if s in stages][-1]]


def results_of(run_flags: run.Flags, given: dict, rows: dict, evaluations: int, teacher: list[Row] | None = None,
               method: str = "", **more) -> dict:
    """results.json, of rows {stage: {K: [a Row per seed]}} and given {seed: teacher.Given}.

    evaluations: of the teacher, a sample; teacher: its rows, if not of its kept samples; method: o2mkd, or "" for MSD;
    more: further names, among them configs = {stage: dict}, in which runs that share a table agree."""
    first, stages = next(iter(given.values())), {}
    m = first.facts.metric
    for stage, of_k in rows.items():
        stages[stage] = {str(K): summary([row.numbers(m) for row in per_seed], m) for K, per_seed in of_k.items()}
    if teacher is None:
        kept = [run.load_shards(Path(run_flags.out) / f"seed{seed}" / "reference", "report") for seed in given]
        teacher = [teacher_row(g, y, g.references["report"]) for g, y in zip(given.values(), kept)]
    of_teacher = summary([row.numbers(m) for row in teacher], m if method else "")              # MSD's never had the sd
    return {**({"method": method} if method else {"floor": of_teacher["floor"]}),
            "dataset": run_flags.dataset, "seeds": list(given), "samples": run_flags.eval_samples, "metric": m,
            "title": first.judge.title, "floor_data": mean([g.references["floor_data"] for g in given.values()]),
            "teacher": {**of_teacher, "evaluations": evaluations}, **more,
            "students": students_of(stages), "stages": stages}


def _identity(results: dict, stages) -> list:
    """What results in one table have in common, without flags that are constants now."""
    configs = json.loads(json.dumps([results["configs"][s] for s in stages]))
    for config in configs:
        for name in run.RETIRED.keys() & config.keys():
            if run.RETIRED[name] in (None, config[name]):
                del config[name]
    return [results["seeds"], results["samples"], configs]


def merged(path: Path, results: dict) -> dict:
    """Results together with other K and stages of the same seeds, samples and configs that the file holds.

    A file of others is set aside: NAME.previous.json, NAME.previous1.json, …"""
    if not path.exists():
        return results
    old = run.load_json(path, "students")
    both = sorted(old.get("configs", {}).keys() & results["configs"].keys())
    if not both or _identity(old, both) != _identity(results, both):
        names = (path.with_suffix(f".previous{i or ''}.json") for i in range(10_000))
        aside = next(name for name in names if not name.exists())
        path.replace(aside)
        print(f"\n{path} was of other seeds or flags: moved to {aside}")
        return results
    out = {**{k: old[k] for k in old if k == "bound"}, **results}
    for name in ("configs", "partition", "edges", "cost"):
        if name in results:
            out[name] = {**old.get(name, {}), **results[name]}
    stages = dict.fromkeys([*STAGES, *old["stages"], *results["stages"]])                       # in this order
    stages = {s: {**old["stages"].get(s, {}), **results["stages"].get(s, {})} for s in stages}
    out["stages"] = {stage: of_k for stage, of_k in stages.items() if of_k}
    return {**out, "students": students_of(out["stages"])}


def table(results: dict) -> str:
    """A line for the teacher and for each K and stage, a column for each number that one of them has."""
    m, teacher, cost = results["metric"], results["teacher"], results.get("cost", {})
    name = f"teacher, {teacher['evaluations']} evaluations"
    lines = [(name, {m: teacher.get("floor"), **teacher, **cost.get("0", {})})]
    if "bound" in results:
        lines.append((f"{results['bound']['points']}-point Heun", results["bound"]))
    rows = []
    for stage, of_k in results["stages"].items():
        if not stage.startswith(("heun-", "ddim-")):                # those: figure "curve"
            rows += [(int(K), stage, row) for K, row in of_k.items() if m in row]
    for K, stage, row in sorted(rows, key=lambda r: r[0]):
        own_cost = cost.get(str(K), {}) if stage == "o2mkd" else {}
        lines.append((f"{K} student{'s' * (K != 1)}, {stage}", {**row, **own_cost}))
    columns = {m: (f"{m} to teacher", ".4f"), f"{m}_sd": ("± sd", ".4f"), f"{m}_data": (f"{m} to data", ".4f"),
               f"{m}_data_sd": ("± sd", ".4f"), **COLUMNS}
    text = [["", *[who for who, _ in lines]]]                       # column by column
    for name, (title, form) in columns.items():
        cells = ["" if row.get(name) is None else f"{row[name]:{form}}" for _, row in lines]
        text += [[title, *cells]] if any(cells) else []
    wide = [max(map(len, column)) for column in text]
    out = ["  ".join(f"{cell:>{w}}" for cell, w in zip(line, wide)) for line in zip(*text)]
    out.append(f"{m}: {results['title']}. Teacher to teacher: two draws. Two draws of the data (of images: "
               f"training, test): {results['floor_data']:.4f}. Seeds: {len(results['seeds'])}. Train s: all students.")
    return "\n".join(out)


def report(path: Path, results: dict, lines: list[str]) -> None:
    """Write results, beside what the file holds already; print the table and the lines; draw the figures."""
    whole = merged(path, results)
    run.save_json(path, whole)
    print("\n" + table(whole) + "\n" + "\n".join(lines))
    figures = plot.draw(path.parent, path.stem.removeprefix("results").removeprefix("-"))
    print(f"\nresults: {path}\nfigures: " + " ".join(map(str, figures)))


# ------------------------------------------------------------------------------------------------------------ verdicts

T = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}         # t(0.95, n - 1)


def verdict(a: list[float], b: list[float]) -> dict:
    """Is a below b, paired by seed? Holds if the mean of b - a exceeds t(0.95, n - 1) standard errors."""
    difference = [y - x for x, y in zip(a, b, strict=True)]
    n = len(difference)
    mean = sum(difference) / n
    if n == 1:
        return {"mean": mean, "error": None, "n": n, "verdict": "measured"}
    error = math.sqrt(sum((d - mean) ** 2 for d in difference) / (n - 1) / n)
    holds = mean > T.get(n, T[10]) * error
    return {"mean": mean, "error": error, "n": n, "verdict": "holds" if holds else "does not hold"}


def comparison(name: str, a: dict, b: dict, metric: str, other: str = "") -> str:
    """One line: is a's distance below b's? a, b: entries of results["students"]; other: b's metric, if not the same."""
    a, b = [r[metric] for r in a["per_seed"]], [r[other or metric] for r in b["per_seed"]]
    v = verdict(a, b)
    error = "" if v["error"] is None else f" ± {v['error']:.4f} (standard error)"
    return (f"{name}: {sum(a) / len(a):.4f} against {sum(b) / len(b):.4f}, ratio {sum(a) / sum(b):.2f}, "
            f"paired difference {v['mean']:.4f}{error}, n = {v['n']}: {v['verdict']}")


def verdicts(results: dict) -> list[str]:
    """What a run's numbers say: most students against fewest, against the teacher, chosen against last, merged."""
    rows, stages, m, of_data = results["students"], results["stages"], results["metric"], f"{results['metric']}_data"
    ks, by_level = sorted(rows, key=int), results.get("method") == "o2mkd"
    most, letter, last = ks[-1], "N" if by_level else "K", [s for s in STAGES if s in stages][-1]
    compress = last in ("dm", "cd")                                 # the teacher is the aim; else the data are
    asked = {} if compress and m == "l1" else {of_data: "data"}
    asked |= {} if by_level else {m: "teacher"}
    lines = []
    for name, what in asked.items() if len(ks) > 1 else ():
        question = f"{letter} = {most} below {letter} = {ks[0]}, to the {what}?"
        lines.append(comparison(question, rows[most], rows[ks[0]], name))
    for K in ks if not compress else ():
        about = f"{letter} = {K}, to the data"
        lines.append(comparison(f"{about}, below the teacher?", rows[K], results["teacher"], of_data))
        if "dm" in stages:                                          # no verdict: adm has trained for longer
            lines.append(f"{about}: {stages['dm'][K][of_data]:.4f} after dm, {rows[K][of_data]:.4f} after adm too")
        if not by_level:
            question = f"{about}, chosen checkpoints below the last ones?"
            lines.append(comparison(question, rows[K], rows[K], of_data, f"{of_data}_last"))
    for N, row in stages.get("merged", {}).items():
        for other in sorted({N, ks[0]}, key=int):
            lines.append(comparison(f"N = {N} merged below N = {other}, to the data?", row, rows[other], of_data))
    if "bound" in results:
        lines.append(f"K = {most}: {rows[most][m] - results['bound'][m]:.4f} above CD's bound")
    return lines


def compare(out: Path, names: list[str]) -> list[str]:
    """Is the first below each of the others, K by K? names: TAG, none (without a tag), TAG/STAGE."""
    found = []
    for name in names:
        tag, _, stage = name.partition("/")
        path = out / f"results{run.suffix('' if tag == 'none' else tag)}.json"
        results = run.load_json(path, "dataset", "seeds", "samples", "metric", "students")
        rows = results.get("stages", {}).get(stage, {}) if stage else results["students"]
        found.append((name, results, {K: row for K, row in rows.items() if results["metric"] in row}))
    (first, mine, rows), *others = found
    m, lines = mine["metric"], []
    for name, theirs, other_rows in others:
        for key in ("dataset", "seeds", "samples"):
            if mine[key] != theirs[key]:
                raise UserError(f"--compare {first} {name}: of {key} {mine[key]} and {theirs[key]}: not comparable")
        shared = sorted(rows.keys() & other_rows.keys(), key=int)
        if not shared:
            raise UserError(f"--compare {first} {name}: no K that both have ({' '.join(rows)}; {' '.join(other_rows)})")
        for K in shared:
            for metric, what in ((m, "teacher"), (f"{m}_data", "data")):
                question = f"K = {K}, {first} below {name}, to the {what}?"
                lines.append(comparison(question, rows[K], other_rows[K], metric))
    return lines


@command
def main(argv=None):
    """Compare variants of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--compare", nargs="+", metavar="TAG", required=True, help="the first with each of the others")
    given = parser.parse_args(argv)
    if len(given.compare) == 1:
        parser.error("--compare: two tags or more; none is the run without a tag")
    print("\n".join(compare(given.run, given.compare)))


if __name__ == "__main__":
    main()
