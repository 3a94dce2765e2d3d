"""Every claim of the papers as a command: train what it needs, compare, judge, draw. The claims are a table: claims.py.

A verdict is computed, never typed: paired by seed, a is below b if the mean difference exceeds t(0.95, n - 1) standard
errors; if b is below a by as much, the reverse holds; else the two are not told apart. One seed is only "measured".

  python reproduce.py --list                  the claims, and how many of their runs are finished
  python reproduce.py --claim split,reg       two claims
  python reproduce.py --all                   all of them: hours
  python reproduce.py --all --quick           all, small: one seed, a fifth of the updates; nothing but "measured"
  python reproduce.py --claim o2-p --dry-run  the commands that are still to do
  python reproduce.py --table                 train nothing: table and figures of what is there

Runs share a run folder. Killed, the same command goes on: a run whose rows are there is not started again, another goes
on from its checkpoint. Writes OUT/RESULTS.md, RESULTS.json (every seed), figures; what runs printed: OUT/logs.
"""
import contextlib
import dataclasses
import shlex
import shutil
import statistics
from pathlib import Path

import data
import dmd
import edm
import evaluate
import msd
import o2mkd
import plot
from claims import AFTER, CLAIMS, FEWER, RUNS, UNTAGGED, Claim, Entry
from flags import check, command, flag, option, parse, typed
from run import load_json, save_json, suffix, write_atomic
from students import stage_folder


@dataclasses.dataclass
class Flags:
    """Of the reproduction"""
    prefix = ""
    claim: tuple[str, ...] = flag((), "which claims, such as split,reg", choices=tuple(CLAIMS))
    all: bool = flag(False, "all claims of the toy")
    images: bool = flag(False, "with --all: those on Fashion-MNIST too")
    list: bool = flag(False, "print the claims, and how many of their runs are finished")
    table: bool = flag(False, "train nothing: table and figures of what is there")
    quick: bool = flag(False, "one seed, a fifth of the updates, fewer samples, in a folder of its own")
    smoke: bool = flag(False, "one seed, and sizes for tests, which measure nothing")
    seeds: int = flag(5, "number of seeds of every run, but of some long ones", low=1)
    out: str = flag("", "the run folder; none = runs/reproduce, runs/quick or runs/smoke")
    results: str = flag("", "where the table goes; none = OUT/RESULTS.md")
    figures: str = flag("", "where the figures go; none = OUT/figures")
    dry_run: bool = flag(False, "print the commands that are still to do, and stop")


def chosen(flags: Flags) -> list[Claim]:
    """The claims asked for."""
    images = flags.images or flags.table or flags.list
    return [c for c in CLAIMS.values() if (c.id in flags.claim if flags.claim else images or not on_images(c))]


def on_images(claim: Claim) -> bool:
    """Does it need Fashion-MNIST?"""
    return claim.metric.startswith("fd")


CONFLICTS = [
    (lambda f: [f.claim != (), f.all, f.list, f.table].count(True) != 1, "one of --claim NAME, --all, --table, --list"),
    (lambda f: (f.quick or f.smoke) and (f.claim or f.all) and any(map(on_images, chosen(f))),
     "--quick, --smoke: claims of the toy only; images would train at full length"),
]


# --------------------------------------------------------------------------------------------------------------- runs

@dataclasses.dataclass
class Job:
    """A run of RUNS as a command, and what it has measured."""
    module: object                         # msd or o2mkd
    argv: list[str]
    flags: object                          # all its values
    home: Path                             # its run folder
    results: dict                          # its results.json; {}: not there, or of seeds that cannot be paired

    def __str__(self):
        return f"python {self.module.__name__}.py {shlex.join(self.argv)}"


SHORTER = dict(steps=5, reg_warmup=5, fake_warmup=5, tsm_steps=5, adm_steps=5, cd_steps=5, teacher_steps=3,
               eval_every=5, eval_samples=5, select_samples=4, pairs=4)            # what --quick divides them by


def folder(flags: Flags) -> Path:
    """The run folder."""
    return Path(flags.out or "runs/" + ("smoke" if flags.smoke else "quick" if flags.quick else "reproduce"))


def job(name: str, flags: Flags) -> Job:
    """A run of RUNS in this run folder; on another dataset than the toy, in a folder inside."""
    module = o2mkd if name.startswith("o2mkd") else msd
    argv, home = RUNS[name].split(), folder(flags)
    if "--dataset" in argv:
        home /= argv[argv.index("--dataset") + 1]
    argv += ["--out", str(home)]
    if name not in UNTAGGED:
        argv += ["--tag", name.removeprefix("o2mkd-").removeprefix("fashion-")]
    if "fashion-mnist" not in argv:
        number = 1 if flags.quick or flags.smoke else min(flags.seeds, FEWER.get(name, flags.seeds))
        argv += ["--seeds", str(number)]
        if flags.smoke:                                             # the preset's own sizes
            for word in {"--preset", *map(option, SHORTER)} & {*argv}:
                del argv[argv.index(word):argv.index(word) + 2]
            argv += ["--preset", "smoke"]
        elif flags.quick:
            argv += shorter(parse(module.Flags, module.PRESETS, argv))
    values = parse(module.Flags, module.PRESETS, argv)
    path = home / f"results{'-o2mkd' * (module is o2mkd)}{suffix(values.run.tag)}.json"
    results = load_json(path, "stages", "teacher", "seeds") if path.exists() else {}
    paired = results and results["seeds"] == list(range(len(results["seeds"])))
    return Job(module, argv, values, home, results if paired else {})


def shorter(values) -> list[str]:
    """The flags that make a run short; pairs that were typed are what a claim compares, and stay."""
    argv = []
    for group in filter(dataclasses.is_dataclass, [values, *vars(values).values()]):
        for f in dataclasses.fields(group):
            name = typed(type(group), f) if f.metadata else ""
            if name in SHORTER and (name != "pairs" or values.source[name] != "flag"):
                argv += [option(name), str(max(1, getattr(group, f.name) // SHORTER[name]))]
    return argv


def needed(claims: list[Claim]) -> list[str]:
    """The runs of these claims in the order of RUNS, with those that they start from."""
    names = {e.run for c in claims for e in c.entries}
    names |= {before for name in names for before in AFTER.get(name, ())}
    return [name for name in RUNS if name in names]


def finished(name: str, jobs: dict[str, Job]) -> bool:
    """Are all rows there that claims need of this run, of all its seeds?"""
    entries, seeds = [e for c in CLAIMS.values() for e in c.entries if e.run == name], jobs[name].flags.run.seeds
    return all(len(per_seed(e, jobs)) == (1 if e.stage == "cost" else seeds) for e in entries)


# --------------------------------------------------------------------------------------------------- numbers, verdicts

def per_seed(entry: Entry, jobs: dict[str, Job]) -> list[dict]:
    """What was measured of an entry, seed by seed; [] if it is not there."""
    results, K = jobs[entry.run].results, str(entry.K)
    if entry.stage == "cost":                                       # measured once
        return [c for N, c in results.get("cost", {}).items() if N == K]
    row = results.get("stages", {}).get(entry.stage, {}).get(K, {})
    if K == "0" and entry.stage in evaluate.STAGES:
        row = results.get("teacher", {})
    return row.get("per_seed", [])


def values(side: str, numbers: dict[str, list[float]]) -> list[float]:
    """Per seed: an entry's numbers, "1.1 x NAME", or the ratio "NAME / NAME"; [] if they are not there."""
    if side in numbers:
        return numbers[side]
    if " / " in side:
        a, b = (numbers.get(name, []) for name in side.split(" / "))
        return [x / y for x, y in zip(a, b)]
    factor, _, name = side.partition(" x ")
    return [float(factor) * v for v in numbers.get(name, [])]


def sides(comparison: str) -> list[str]:
    """[what is claimed to be lower, what to be higher] of "A below B", or of "B above A"."""
    return comparison.split(" below ") if " below " in comparison else comparison.split(" above ")[::-1]


def judge(comparisons, numbers: dict[str, list[float]]) -> tuple[str, dict[str, dict]]:
    """(verdict of all, {comparison: evaluate.verdict of it}) from numbers {entry: [one per seed]}.

    A comparison that does not hold says whether its reverse does, or whether the two are not told apart."""
    found = {}
    for comparison in comparisons:
        low, high = (values(side, numbers) for side in sides(comparison))
        n = min(len(low), len(high))                                # the seeds that both have
        v = found[comparison] = evaluate.verdict(low[:n], high[:n])
        if v["verdict"] == "does not hold":
            reverse = evaluate.verdict(high[:n], low[:n])["verdict"] == "holds"
            v["verdict"] = "the reverse holds" if reverse else "not told apart"
    verdicts, right = [v["verdict"] for v in found.values()], [v["mean"] > 0 for v in found.values()]
    holds, reverse, n = verdicts.count("holds"), verdicts.count("the reverse holds"), len(verdicts)
    if verdicts.count("measured") == n:
        text = "measured: " + ("as claimed" if all(right) else "in part as claimed" if any(right) else "not as claimed")
    elif holds:
        text = "holds" if holds == n else f"holds in {holds} of {n} comparisons"
        text += f", the reverse in {reverse}" * (reverse > 0)
    else:
        where = f" in {reverse} of {n} comparisons" * (reverse < n)
        text = "does not hold: " + (f"the reverse does{where}" if reverse else "not told apart")
    return text, found


# --------------------------------------------------------------------------------------------------------- the report

METRICS = ("l1", "l1_data", "fd", "fd_data", "within", "modes", "mode_min", "mode_max", "right class", "prediction_in",
           "prediction_out", "denoising_in", "denoising_out", "c", "parameters", "multiply_adds", "per_second", "fall",
           "variation", "distance")        # columns of a claim's section


def mean_sd(v: list[float]) -> str:
    """0.210 ± 0.004, the mean alone for one seed."""
    mean = statistics.fmean(v)
    if mean > 1000:
        return f"{mean:,.0f}"
    return f"{mean:.3f} ± {statistics.stdev(v):.3f}" if len(v) > 1 else f"{mean:.3f}"


def length(entry: Entry, job: Job) -> tuple[int, int]:
    """Updates of an entry's stage, and its batch."""
    if job.module is o2mkd:
        return o2mkd.length(job.flags)
    return next(stage.length(job.flags) for stage, _ in msd.stages_of(job.flags) if stage.NAME == entry.stage)


def training_cost(entry: Entry, job: Job) -> list[str]:
    """Samples that a student saw in its last stage; TFLOP (2 per multiply-add) of it, all students together; or "".

    In evaluations: with backward 3, without 1. DM: G for KL and regression, mu_teacher and mu_fake once per noise draw,
    mu_fake's turns; CD: f, the target, the teacher twice; O2MKD: a student, the teacher once."""
    if entry.K == 0:
        return ["", ""]
    facts, f, (n, batch) = data.facts(job.flags.run.dataset), job.flags, length(entry, job)
    if entry.stage not in ("dm", "cd", "o2mkd") or not facts.stacked:
        return [f"{n * batch:,}", ""]
    small, big = f.student_size or facts.sizes[0], facts.sizes[0]
    if entry.stage == "cd":
        G, mu = 4 * n, 2 * n
    elif entry.stage == "o2mkd":
        G, mu, small = 3 * n, n, o2mkd.size_of(f, facts, big)
    else:
        dm, kl = f.dm, n - dmd.first_kl_step(f.dm)
        head_start = dm.fake_warmup * (kl > 0)
        G = 3 * kl + 3 * n * (dm.reg_weight > 0) + kl * (dm.ttur - 1) + head_start
        mu = kl * (2 * dm.draws + 3 * dm.ttur) + 3 * head_start
    one, teacher = (evaluate.multiply_adds(edm.Precond(facts.net(1, size)), facts) for size in (small, big))
    return [f"{n * batch:,}", f"{2 * entry.K * batch * (G * one + mu * teacher) / 1e12:.2f}"]


def curves(claim: Claim, jobs: dict[str, Job]) -> dict:
    """{entry: (samples seen by a student, distance on its own classes)} of the first seed, where metrics are there."""
    out = {}
    for e in claim.entries if claim.curves else ():
        place = stage_folder(jobs[e.run].flags, 0, e.K, e.stage)
        if (place / "metrics.csv").exists():
            steps, value = plot.over_students(plot.read_metrics(place)["l1"])
            out[e.name] = steps * length(e, jobs[e.run])[1], value
    return out


def levels(claim: Claim, jobs: dict[str, Job]) -> dict:
    """Levels worth a line in the claim's figure: floor, teacher, bound of CD."""
    results, m = [jobs[e.run].results for e in claim.entries], claim.metric
    out = {"floor: two draws of the teacher": results[0]["floor"]} if m == "l1" else {}
    out |= {"the teacher": results[0]["teacher"][m]} if m.endswith("_data") else {}
    bounds = [r["bound"] for r in results if "bound" in r and m in r["bound"]]
    return out | {f"{bound['points']}-point Heun sampler": bound[m] for bound in bounds}


def section(claim: Claim, jobs: dict[str, Job], table: Path, figures: Path) -> tuple[str, list[str]]:
    """A claim's line of the table, and its section; draws its figure."""
    rows = {e: per_seed(e, jobs) for e in claim.entries}
    missing = dict.fromkeys(f"`{jobs[e.run]}`" for e in rows if not rows[e])
    note = ["Not measured: " + ", ".join(missing)] if missing else []
    claim = dataclasses.replace(claim, entries=tuple(e for e in rows if rows[e]))
    numbers = {e.name: [row[claim.metric] for row in rows[e]] for e in claim.entries}
    below = [c for c in claim.comparisons if all(values(side, numbers) for side in sides(c))]
    line, text = f"| {claim.id} | {claim.text} | {claim.paper} | ", ["", f"## {claim.id}: {claim.text}", ""]
    if not below:
        return line + "not measured | | not measured |", text + note
    verdict, found = judge(below, numbers)
    left_out = len(claim.comparisons) - len(below)
    verdict += f" ({left_out} more not measured)" * (left_out > 0)
    shown = [name for name in numbers if len(numbers) <= 6 or any(name in c for c in below[:2])]
    line += "; ".join(f"{name}: {mean_sd(numbers[name])}" for name in shown) + " …" * (len(shown) < len(numbers))
    line += f" | {min(map(len, numbers.values()))} | {verdict} |"

    columns = [m for m in METRICS if any(m in rows[e][0] for e in claim.entries)]
    head = ["", *columns, "last stage: samples a student saw", "its training, all students, TFLOP", "seeds"]
    text += [f"The paper: {claim.paper}. Ours, {claim.metric}: **{verdict}**.", "",
             f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for e in claim.entries:
        cells = [mean_sd([row[m] for row in rows[e]]) if m in rows[e][0] else "" for m in columns]
        text.append(f"| {' | '.join([e.name, *cells, *training_cost(e, jobs[e.run])])} | {len(rows[e])} |")
    text += ["", "| comparison | difference ± standard error | n | verdict |", "|---|---|---|---|"]
    for comparison, v in found.items():
        error = "" if v["error"] is None else f" ± {v['error']:.4f}"
        text.append(f"| {comparison} | {v['mean']:.4f}{error} | {v['n']} | {v['verdict']} |")

    drawn = [figures / f"claim-{claim.id}.png"]
    figure = plot.claim(claim.id, claim.text, numbers, claim.metric, levels(claim, jobs), curves(claim, jobs))
    plot.save(figure, drawn[0])
    picture = jobs[claim.entries[0].run].home / "figures" / f"{claim.picture}.png"
    if picture.exists():                                            # of the run itself
        drawn.insert(0, figures / f"claim-{claim.id}-{claim.picture.split('-')[0]}.png")
        shutil.copyfile(picture, drawn[0])
    text += ["", *note, *(f"\n![{path.stem}]({plot.beside(path, table)})" for path in drawn)]
    return line, [*text, "", "Runs: " + "; ".join(f"`{jobs[name]}`" for name in needed([claim]))]


HEAD = """
The toy, unless it says otherwise: l1 to the teacher's samples, l1_data to the data (0 = equal, 1 = disjoint), mean ±
standard deviation over the seeds. A verdict is a one-sided t test at 5 %, paired by seed, at equal updates of each
student, or as the row says. The papers' numbers are FID, of MSD on ImageNet-64, of O2MKD (o2-…) on CIFAR-10: compare
directions, not values.

| id | claim | paper | ours, mean ± sd | n | verdict |
|---|---|---|---|---|---|"""


def write(claims: list[Claim], jobs: dict[str, Job], flags: Flags) -> None:
    """RESULTS.md, RESULTS.json (in docs/data, if it stands beside a folder docs) and the figures of these claims."""
    table = Path(flags.results or folder(flags) / "RESULTS.md")
    figures = Path(flags.figures or folder(flags) / "figures")
    data_folder = table.parent / "docs/data"
    kept = (data_folder if data_folder.is_dir() else table.parent) / f"{table.stem}.json"
    made = [section(c, jobs, table, figures) for c in claims]
    kind = " with `--smoke`: it measures nothing" if flags.smoke else \
        " with `--quick`: one seed, a fifth of the updates; no verdict on the paper" if flags.quick else ""
    lines = [line for line, _ in made]
    text = [f"# Results\n\nWritten by `python reproduce.py`{kind}.{HEAD}", *lines, *sum([body for _, body in made], [])]
    print("\n".join(lines))
    write_atomic(table, lambda t: t.write_text("\n".join(text) + "\n"))
    save_json(kept, {c.id: {e.name: per_seed(e, jobs) or None for e in c.entries} for c in claims})
    print(f"\nresults: {table}, {kept}\nfigures: {figures}/claim-*.png")


# -------------------------------------------------------------------------------------------------------- the command

@command
def main(argv=None):
    """Train what the chosen claims need, judge them, write the table and the figures."""
    flags = parse(Flags, {}, argv, __doc__)
    check(flags, CONFLICTS)
    claims, jobs = chosen(flags), {name: job(name, flags) for name in RUNS}
    done = {name for name in RUNS if finished(name, jobs)}
    if flags.table:
        return write(claims, jobs, flags)
    if flags.list:
        for c in claims:
            runs = needed([c])
            print(f"  {c.id:<15} {c.text}\n{'':18}paper: {c.paper}; {len(done & {*runs})} of {len(runs)} runs finished")
        return
    todo = [name for name in needed(claims) if name not in done]
    print(f"reproduce: {len(claims)} claim(s), {len(todo)} of {len(needed(claims))} runs to do, into {folder(flags)}")
    logs = folder(flags) / "logs"
    for i, name in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {name}: {jobs[name]}", flush=True)
        if not flags.dry_run:                                       # bars stay on the screen
            logs.mkdir(parents=True, exist_ok=True)
            with open(logs / f"{name}.log", "a") as log, contextlib.redirect_stdout(log):
                jobs[name].module.main(jobs[name].argv)
    if not flags.dry_run:
        jobs = {name: job(name, flags) for name in RUNS}
        write([c for c in CLAIMS.values() if c in claims or all(finished(n, jobs) for n in needed([c]))], jobs, flags)


if __name__ == "__main__":
    main()
