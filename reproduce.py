"""Every claim of the papers as a command: train what it needs, compare, judge, draw. The claims: docs/claims.txt.

A verdict is computed, never typed: paired by seed, a is below b if a one-sided t test gives p <= 0.05 by Holm's
correction; if b is below a so clearly, the reverse holds; else the two are not told apart. One or two seeds
are only "measured".

  python reproduce.py --list              the claims
  python reproduce.py --claim split,reg   two of them; killed, the same command goes on
  python reproduce.py --all               all of the toy: hours
  python reproduce.py                     train nothing: RESULTS.md, docs/claims, docs/data of what is there

Of what the run folder lacks, RESULTS.md shows what docs/data/RESULTS.json keeps of the same command.
"""
import dataclasses
import re
import shlex
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import evaluate
import flags
import msd
import o2mkd
import plot
from flags import flag
from run import load_json, save_json, suffix, write_atomic

DOCS = Path(__file__).parent / "docs"


# ---- the claims, docs/claims.txt

class Entry(NamedTuple):
    """One row: of run `run`, after `stage`, with K students."""
    name: str
    run: str
    stage: str
    K: int


class Claim(NamedTuple):
    """One claim: its entries' `metric`, compared."""
    entries: list[Entry]
    comparisons: dict[str, tuple[str, str]]
    id: str
    metric: str
    text: str
    paper: str
    picture: str = ""


def entries(text: str) -> list[Entry]:
    """Of NAME: RUN K …"""
    name, rows = text.rsplit(": ", 1)
    place, *numbers = rows.split()
    run, _, stage = place.partition("/")
    words = ["--stages", "o2mkd"] if run.startswith("o2") else [*RUNS[run].split(), "--stages", "dm"]
    stage = stage or words[words.index("--stages") + 1].split(",")[-1]
    return [Entry(name.replace("#", K), run, stage, int(K)) for K in numbers]


def comparisons(text: str) -> dict[str, tuple[str, str]]:
    """{comparison: (what is to be lower, what higher)} of A & B below C, or above."""
    left, word, right = re.split(" (below|above) ", text)
    pairs = [(a, b) for b in right.split(" & ") for a in left.split(" & ")]
    return {f"{a} {word} {b}": (a, b) if word == "below" else (b, a) for a, b in pairs}


def claim(text: str) -> Claim:
    """Of a paragraph of the table."""
    head, *lines = text.splitlines()
    rows, compared = [], {}
    for part in "; ".join(lines).split("; "):
        if " below " in part or " above " in part:
            compared |= comparisons(part)
        else:
            rows += entries(part)
    return Claim(rows, compared, *head.split(" | "))


BLOCKS = [block for block in (DOCS / "claims.txt").read_text().strip().split("\n\n") if not block.startswith("//")]
RUNS = dict(line.split(": ") for line in BLOCKS[0].splitlines())
CLAIMS = {c.id: c for c in map(claim, BLOCKS[1:])}
UNTAGGED = ("dm", "adm", "poor", "o2", "o2+", "o2-fashion")
AFTER = {  # whose students a run starts from, or adds to
    "adm": "dm", "continued": "dm", "poor-continued": "poor", "XS-post": "adm", "XS-post64000": "adm", "o2+": "o2",
    "o2-fork": "o2", "o2-fork50": "o2", "o2-fashion-fork": "o2-fashion",
}


@dataclasses.dataclass
class Flags:
    """Of the reproduction"""
    prefix = ""
    claim: tuple[str, ...] = flag((), "such as split,reg", choices=tuple(CLAIMS))
    all: bool = flag(False, "all claims of the toy; name those on Fashion-MNIST")
    list: bool = flag(False, "print the claims")
    out: str = flag("runs/reproduce", "the run folder")
    dry_run: bool = flag(False, "print the commands that are still to do")


# ---- runs

class Job(NamedTuple):
    """A run of RUNS as a command, and what it has measured."""
    module: object  # msd or o2mkd
    argv: list[str]
    home: Path  # the run folder
    rows: dict  # {stage: {K: [what was measured, seed by seed]}}; {}: nothing, or other seeds

    def __str__(self):
        return f"python {self.module.__name__}.py {shlex.join(self.argv)}"


def job(name: str, f: Flags) -> Job:
    """A run of RUNS in this run folder; of another dataset or teacher, in a folder inside."""
    module = o2mkd if name.startswith("o2") else msd
    argv, home = ["--students", *RUNS[name].split()], Path(f.out)
    for word in [w for w in ("--dataset", "--teacher", "--teacher-steps") if w in argv]:  # of another teacher
        home /= Path(argv[argv.index(word) + 1]).stem
    argv += ["--out", str(home)]
    if name not in UNTAGGED:
        argv += ["--tag", name.removeprefix("o2-").removeprefix("fashion-")]
    argv += [*(() if "--seeds" in argv else ("--seeds", "5")), "--seed", "1"]  # seed 0 is for tuning
    values = flags.parse(module.Flags, module.PRESETS, argv).run
    path = home / f"results{'-o2mkd' * (module is o2mkd)}{suffix(values.tag)}.json"
    results = load_json(path, "stages", "teacher", "seeds") if path.exists() else {"seeds": []}
    return Job(module, argv, home, rows_of(results) if results["seeds"] == values.all_seeds() else {})


def rows_of(results: dict) -> dict:
    """Job.rows of results.json; K = 0: the teacher."""
    teacher = {"0": results["teacher"]["per_seed"]}
    rows = {stage: {K: row["per_seed"] for K, row in of_k.items()} for stage, of_k in results["stages"].items()}
    rows |= {stage: {**of_k, **teacher} for stage, of_k in rows.items() if stage in evaluate.STAGES}
    return {**rows, "cost": {N: [cost] for N, cost in results.get("cost", {}).items()}}  # measured once


def needed(claims: list[Claim]) -> list[str]:
    """The runs of these claims in the order of RUNS, with those that they start from."""
    names = {e.run for c in claims for e in c.entries}
    for name in reversed(RUNS):
        if name in names & {*AFTER}:
            names.add(AFTER[name])
    return [name for name in RUNS if name in names]


def finished(name: str, jobs: dict[str, Job]) -> bool:
    """Are all rows there that claims need of this run?"""
    return all(per_seed(e, jobs) for c in CLAIMS.values() for e in c.entries if e.run == name)


# ---- numbers, verdicts

def per_seed(entry: Entry, jobs: dict[str, Job]) -> list[dict]:
    """What was measured of an entry, seed by seed; [] if it is not there."""
    return jobs[entry.run].rows.get(entry.stage, {}).get(str(entry.K), [])


def values(side: str, numbers: dict[str, list[float]]) -> list[float]:
    """Per seed: an entry's numbers, "1.1 x NAME", or the ratio "NAME / NAME"; [] if they are not there."""
    if side in numbers:
        return numbers[side]
    a, ratio, b = side.partition(" / ")
    if ratio:
        return [x / y for x, y in zip(values(a, numbers), values(b, numbers))]
    factor, _, name = side.partition(" x ")
    return [float(factor) * v for v in numbers.get(name, [])]


def judge(comparisons: dict, numbers: dict[str, list[float]]) -> tuple[str, dict[str, dict]]:
    """(verdict of all, {comparison: evaluate.verdict}) of {comparison: (lower, higher)}, {entry: [one per seed]}.

    Holm's correction over the claim's comparisons, for each direction; p: the smaller of the two."""
    found = {}
    for comparison, sides in comparisons.items():
        low, high = (values(side, numbers) for side in sides)
        n = min(len(low), len(high))  # the seeds that both have
        found[comparison] = evaluate.verdict(low[:n], high[:n])
    tested = [v for v in found.values() if v["p"] is not None]
    p_of_claim = [v["p"] for v in tested]
    for v, p, reverse in zip(tested, evaluate.holm(p_of_claim), evaluate.holm([1 - p for p in p_of_claim])):
        v["p"] = min(p, reverse)
        v["verdict"] = "holds" if p <= 0.05 else "the reverse holds" if reverse <= 0.05 else "not told apart"
    n, count = len(found), Counter(v["verdict"] for v in found.values())
    holds, reverse = count["holds"], count["the reverse holds"]
    right = sum(v["mean"] > 0 for v in found.values())
    if count["measured"] == n:
        text = "measured: " + ("" if right == n else "in part " if right else "not ") + "as claimed"
    elif holds:
        text = "holds" + f" in {holds} of {n} comparisons" * (holds < n) + f", the reverse in {reverse}" * (reverse > 0)
    elif reverse:
        text = "does not hold: the reverse does" + f" in {reverse} of {n} comparisons" * (reverse < n)
    else:
        text = "does not hold: not told apart"
    return text, found


# ---- the report

HIDDEN = ("per_class", "per_class_mean", "seconds", "floor", "scan")  # what is measured, but is no column
HEAD = """
The toy, unless it says otherwise: l1 to the teacher's samples, l1_data to the data (0 = equal, 1 = disjoint), mean ±
standard deviation, seeds 1 to n, mostly 5 (seed 0 served for tuning). A verdict is a one-sided t test at 5 %, paired by
seed, with Holm's correction over a claim's comparisons, at equal updates of each student, or as the row says;
teraflops: of training these students in all stages. The papers' FID is on ImageNet-64, of O2MKD (o2-…) on CIFAR-10:
compare directions, not values.

| id | claim | paper | ours, mean ± sd | n | verdict |
|---|---|---|---|---|---|"""


def mean_sd(v: list[float]) -> str:
    """0.210 ± 0.004, the mean alone for one seed."""
    mean = statistics.fmean(v)
    sd = f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else ""
    return f"{mean:,.0f}" if mean > 1000 else f"{mean:.3f}{sd}"


def draw(claim: Claim, numbers: dict[str, list[float]], first: Job, figures: Path) -> list[str]:
    """Draw the claim's figure, copy the run's own that belongs to it; returns their names."""
    teacher = next((of_k["0"] for stage, of_k in first.rows.items() if stage in evaluate.STAGES), [])
    name = "floor" if claim.metric == "l1" else claim.metric
    levels = [row[name] for row in teacher if name in row]
    lines = {"the teacher": statistics.fmean(levels)} if levels else {}
    names = [f"claim-{claim.id}-{claim.picture.split('-')[0]}", f"claim-{claim.id}"]
    plot.save(plot.claim(claim.id, claim.text, numbers, claim.metric, lines), figures / f"{names[1]}.png")
    for picture in (first.home / f"figures/{claim.picture}.png", DOCS / f"claims/{names[0]}.png"):
        if picture.exists():
            shutil.copyfile(picture, figures / f"{names[0]}.png")
            return names
    return names[1:]


def section(claim: Claim, jobs: dict[str, Job], figures: Path) -> tuple[str, list[str]]:
    """A claim's line of the table, and its section."""
    missing = dict.fromkeys(f"`{jobs[e.run]}`" for e in claim.entries if not per_seed(e, jobs))
    note = ["Not measured: " + ", ".join(missing)] if missing else []
    claim = claim._replace(entries=[e for e in claim.entries if per_seed(e, jobs)])
    rows = {e.name: per_seed(e, jobs) for e in claim.entries}
    numbers = {name: [row[claim.metric] for row in rows[name]] for name in rows}
    compared = {c: ab for c, ab in claim.comparisons.items() if all(values(side, numbers) for side in ab)}
    line, text = f"| {claim.id} | {claim.text} | {claim.paper} | ", ["", f"## {claim.id}: {claim.text}", ""]
    if not compared:
        return line + "not measured | | not measured |", text + note
    verdict, found = judge(compared, numbers)
    left_out = len(claim.comparisons) - len(compared)
    verdict += f" ({left_out} more not measured)" * (left_out > 0)
    shown = [name for name in numbers if len(numbers) <= 6 or any(name in c for c in [*compared][:2])]
    line += "; ".join(f"{name}: {mean_sd(numbers[name])}" for name in shown) + " …" * (len(shown) < len(numbers))
    line += f" | {min(map(len, numbers.values()))} | {verdict} |"

    columns = {}
    for of_seed in rows.values():
        columns |= {m: v for m, v in of_seed[0].items() if m not in HIDDEN and not m.endswith("_last")}
    text += [f"The paper: {claim.paper}. Ours, {claim.metric}: **{verdict}**.", "",
             f"| | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for name, of_seed in rows.items():
        cells = [mean_sd([row[m] for row in of_seed]) if m in of_seed[0] else "" for m in columns]
        text.append(f"| {' | '.join([name, *cells])} | {len(of_seed)} |")
    text += ["", "| comparison | difference ± standard error | n | p (Holm), of the nearer verdict | verdict |",
             "|---|---|---|---|---|"]
    for comparison, v in found.items():
        error = "" if v["error"] is None else f" ± {v['error']:.4f}"
        p = "" if v["p"] is None else f"{v['p']:.2g}"
        text.append(f"| {comparison} | {v['mean']:.4f}{error} | {v['n']} | {p} | {v['verdict']} |")
    pictures = draw(claim, numbers, jobs[claim.entries[0].run], figures)
    text += ["", *note, *(f"\n![{name}](docs/claims/{name}.png)" for name in pictures)]
    return line, [*text, "", "Runs: " + "; ".join(f"`{jobs[name]}`" for name in needed([claim]))]


def write(jobs: dict[str, Job], f: Flags) -> None:
    """RESULTS.md, docs/claims (figures) and docs/data/RESULTS.json (every seed), of all that is there."""
    home, kept = Path(f.out), load_json(DOCS / "data/RESULTS.json")
    for name, j in jobs.items():
        old = kept.get(f"{name}: {RUNS[name]}", {})
        rows = {stage: old.get(stage, {}) | j.rows.get(stage, {}) for stage in old | j.rows}
        jobs[name] = j._replace(rows=rows)
    lines, bodies = zip(*(section(c, jobs, home / "docs/claims") for c in CLAIMS.values()))
    lines = [f"# Results\n\nWritten by `python reproduce.py`.{HEAD}", *lines]
    text = "\n".join(sum(bodies, lines)) + "\n"
    write_atomic(home / "RESULTS.md", lambda t: t.write_text(text))
    save_json(home / "docs/data/RESULTS.json", {f"{name}: {RUNS[name]}": j.rows for name, j in jobs.items() if j.rows})
    print(*lines, f"\nresults: {home}/RESULTS.md, docs/claims, docs/data/RESULTS.json", sep="\n")


# ---- the command

@flags.command
def main(argv=None):
    """Train what the chosen claims need, judge all that is there, write the table and the figures."""
    f = flags.parse(Flags, {}, argv, __doc__)
    if f.list:
        return print("\n".join(f"  {c.id:<15} {c.text}; the paper: {c.paper}" for c in CLAIMS.values()))
    toy = [c.id for c in CLAIMS.values() if not c.metric.startswith("fd")]
    names = needed([CLAIMS[id] for id in f.claim or (toy if f.all else ())])
    jobs = {name: job(name, f) for name in RUNS}
    todo = [name for name in names if not finished(name, jobs)]
    print(f"reproduce: {len(todo)} of {len(names)} runs to do, into {f.out}")
    for i, name in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {name}: {jobs[name]}", flush=True)
        if not f.dry_run:
            jobs[name].module.main(jobs[name].argv)
    if not f.dry_run:
        write({name: job(name, f) for name in RUNS}, f)


if __name__ == "__main__":
    main()
