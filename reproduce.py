"""Every claim of the papers as a command: train what it needs, compare, judge, draw [MSD Table 1, 5, 6, Fig. 4 to 8], [O2MKD].

A claim is a line of CLAIMS: what the paper says, which runs it needs, which pairs of rows are compared. A run is a line of RUNS: a
command line of msd.py or o2mkd.py, kept in one run folder under its tag, so that claims share runs, and all share teachers. Its
students of all K and all seeds train as one stack.

A verdict is computed, never typed: paired by seed, a is below b if the mean difference exceeds t(0.95, n - 1) standard errors
(`common.verdict`); if b is below a by as much, the reverse holds; else the two are not told apart. One seed is only "measured".
A claim holds if all its comparisons do; if some do, the table says how many, and its section which.

  python reproduce.py --list                  the claims, and what is there of them
  python reproduce.py --claim split           one claim; several are separated by commas
  python reproduce.py --all                   all of them: says beforehand how many hours
  python reproduce.py --all --quick           all, small: one seed, a fifth of the updates; nothing but "measured"
  python reproduce.py --table                 train nothing: table and figures of what is there

Killed, the same command goes on: a finished run is not started again (OUT/runs.json), an unfinished one goes on where its last
checkpoint stands. Writes OUT/RESULTS.md, OUT/RESULTS.json (every seed) and OUT/figures/claim-ID.png; what each run printed: OUT/logs.

Not here: what the runs do (msd.py, o2mkd.py), the papers' own scale: the numbers beside ours are FID on ImageNet-64 or CIFAR-10.
"""
import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
import shutil
from pathlib import Path

import common
import data
import msd
import o2mkd
import plot
from common import flag


@dataclasses.dataclass
class Flags:
    """Flags of the reproduction."""
    claim: str = flag("", "which claims, separated by commas; see --list")
    all: bool = flag(False, "all claims of the toy")
    list: bool = flag(False, "print the claims, and which runs they need")
    table: bool = flag(False, "train nothing: table and figures of what is there")
    quick: bool = flag(False, "one seed, a fifth of the updates, fewer samples, in a folder of its own")
    images: bool = flag(False, "with --all: the claims on Fashion-MNIST too")
    seeds: int = flag(5, "number of seeds of every run", low=1)
    out: str = flag("", "the run folder; none = runs/reproduce, or runs/quick")
    results: str = flag("", "where the table goes; none = OUT/RESULTS.md")
    figures: str = flag("", "where the figures go; none = OUT/figures")
    smoke: bool = flag(False, "with --quick: sizes for tests, which measure nothing")
    dry_run: bool = flag(False, "say what would be trained, and how long it would take")
    quiet: bool = flag(False, "no progress bars")


# -------------------------------------------------------------------------------------------------------- runs and claims

PROMPT_SPLITS = ("random", "kmeans", "quadrant")
PAIRS = (250, 1000, 4000, 16_000)
SIZES = {"XXS": "XXS", "XS": "XS", "S": "S", "B": ""}                # tag of the students of each size, after TSM; B: the teacher's size and weights
P, O2P = (0, 25, 50, 100), {75: "o2mkd"}                           # p in per cent; 75 is the preset's
STEPS = (10, 20, 37)                                                # 37 of the smaller students cost what 10 of the teacher do
KDS = {"prediction": "o2mkd", "attention": "o2mkd-attention", "similarity": "o2mkd-similarity", "contrastive": "o2mkd-contrastive", "no KD": "o2mkd-none"}
RUNS = {                                                            # tag: the command line of msd.py, or of the named script; "": the untagged students
    "": "--students 1 2 4 8",
    "cd": "--students 1 2 4 8 --method cd",
    "batch32": "--students 4 --batch 32", "batch16": "--students 8 --batch 16",
    "batch32-own": "--students 4 --batch 32 --filter-pairs",
    "batch32-long": "--students 4 --batch 32 --steps 12000 --reg-warmup 4000 --fake-warmup 1600",
    "batch128-XXS": "--students 1 --student-size XXS --init random --steps 6000 --reg-warmup 2000",
    "batch32-XXS": "--students 4 --batch 32 --student-size XXS --init random --steps 6000 --reg-warmup 2000",
    "steps12000": "--students 1 --steps 12000 --reg-warmup 4000 --fake-warmup 1600",              # four times all of ""
    "random": "--students 2 4 --partition random", "kmeans": "--students 2 4 --partition kmeans",
    **{f"pairs{n}{own}{reg}": f"--students 4 --preset few-pairs --pairs {n}" + " --filter-pairs" * bool(own) + " --dm-weight 0" * bool(reg)
       for reg in ("", "-reg") for n in (PAIRS if not reg else (1000, 16_000)) for own in ("", "-own")},
    "ttur": "--students 2 --reg-weight 0 --ttur 5", "both": "--students 2 --ttur 5", "neither": "--students 2 --reg-weight 0",
    "adm": "--students 8 --stages dm,adm", "adm2": "--students 2 --stages dm,adm",              # untagged too: further stages of ""
    "continued": "--students 8 --stages adm --init dm --gan-weight 0",
    "continued-reg": "--students 8 --stages adm --init dm --gan-weight 0 --adm-reg-weight 1",
    "warm": "--students 2 --stages dm --dm-weight 0 --steps 1000 --reg-warmup 1000",
    "joint-fast": "--students 2 --stages adm --init dm-warm --adm-steps 3000 --adm-reg-weight 1 --adm-lr 2e-3",
    **{size: f"--students 1 2 4 8 --student-size {size} --stages tsm,dm,adm" for size in ("S", "XS", "XXS")},
    "XS-random": "--students 8 --student-size XS --stages dm --init random --steps 7000",
    "XS-post": "--students 8 --student-size XS --stages post",
    **{f"prompts-{how}": f"--dataset toy-prompts --students 4 --partition {how}" for how in PROMPT_SPLITS},
    "fashion": "--dataset fashion-mnist --students 1 5",
    # students by noise level: the tag is o2mkd-TAG
    "o2mkd": "o2mkd.py --students 1 2 4 8",
    "o2mkd+": f"o2mkd.py --students 1 4 --merge --inspect 0 --curve {' '.join(map(str, STEPS))}",                 # untagged too: more of the same students
    **{f"o2mkd-p{p}": f"o2mkd.py --students 4 --p {p / 100:g}" + " --inspect 0" * (p in (0, 100)) for p in P},
    **{f"o2mkd-{kd}": f"o2mkd.py --students 1 4 --kd {kd}" for kd in ("attention", "similarity", "contrastive")},
    "o2mkd-none": "o2mkd.py --students 1 4 --kd-weight 0",
    "o2mkd-small": "o2mkd.py --students 4 --scheme small", "o2mkd-large": "o2mkd.py --students 4 --scheme large",
    "o2mkd-fork": "o2mkd.py --students 1 4 --init o2mkd1 --lr 2e-3 --merge",
    "o2mkd-fork50": "o2mkd.py --students 1 4 --init o2mkd1 --lr 2e-3 --merge --p 0.5",
    "o2mkd-same": "o2mkd.py --students 1 4 8 --keep 1",
    "o2mkd-keep70": "o2mkd.py --students 1 4 --keep 0.7",
    "o2mkd-2x2": "o2mkd.py --students 4 --ranges 2", "o2mkd-4x1": "o2mkd.py --students 4 --ranges 1", "o2mkd-4x2": "o2mkd.py --students 8 --ranges 2",
    "o2mkd-fashion": "o2mkd.py --dataset fashion-mnist --students 1 4",
    "o2mkd-fashion-fork": "o2mkd.py --dataset fashion-mnist --students 1 4 --init o2mkd1 --lr 1e-3 --merge",
}
FEWER = {"cd": 2, "S": 3, "XS": 3, "XXS": 3, **{f"prompts-{how}": 3 for how in PROMPT_SPLITS}}      # long ones: at most so many seeds
UNTAGGED = ("", "adm", "adm2", "fashion", "o2mkd", "o2mkd+", "o2mkd-fashion")
AFTER = {"adm": [""], "adm2": [""], "continued": [""], "continued-reg": [""], "joint-fast": ["warm"], "XS-post": ["", "adm"],
         "o2mkd+": ["o2mkd"], "o2mkd-fork": ["o2mkd"], "o2mkd-fork50": ["o2mkd"], "o2mkd-fashion-fork": ["o2mkd-fashion"]}
IMAGES = ("fig4-images", "o2-n-images", "o2-merge-images")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured set of students: of run `tag`, after `stage`, with K students; K = 0: the teacher itself."""
    name: str
    tag: str
    stage: str
    K: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim: below = ((a, b), …), pairs of row names; a's `metric` must be below b's, or above where `more` is set."""
    id: str
    text: str
    paper: str
    rows: tuple[Row, ...]
    below: tuple[tuple[str, str], ...]
    metric: str = "l1"
    more: bool = False
    curve: str = ""                        # the stage whose curves stand beside the dots, against samples seen
    picture: str = ""                      # a figure of the first row's run folder that belongs to it


def _of_k(tag: str, stage: str, ks=(1, 2, 4, 8), prefix: str = "") -> tuple[Row, ...]:
    return tuple(Row(f"{prefix}K = {K}", tag, stage, K) for K in ks)


CLAIMS = {c.id: c for c in (
    Claim("fig4", "more students, better one-step quality (DM, F_DM)", "FID, K = 1, 2, 4, 8: 2.60, 2.49, 2.37, 2.32", _of_k("", "dm"),
          (("K = 8", "K = 1"), ("K = 2", "K = 1"), ("K = 4", "K = 2"), ("K = 8", "K = 4"))),
    Claim("fig5", "more students, better quality, with consistency distillation too", "l1 falls with K (Fig. 5)", _of_k("cd", "cd"),
          (("K = 8", "K = 1"), ("K = 2", "K = 1"), ("K = 4", "K = 2"), ("K = 8", "K = 4")), curve="cd"),
    Claim("batch", "better even at the same effective batch", "FID: 4 x 32: 2.53, 1 x 128: 2.60",
          (Row("1 x 128", "", "dm", 1), Row("4 x 32", "batch32", "dm", 4), Row("8 x 16", "batch16", "dm", 8), Row("4 x 128", "", "dm", 4),
           Row("4 x 32, own pairs", "batch32-own", "dm", 4), Row("1 x 128, 12 000 updates", "steps12000", "dm", 1), Row("4 x 32, 12 000 updates", "batch32-long", "dm", 4),
           Row("1 x 128, XXS, 6 000 updates", "batch128-XXS", "dm", 1), Row("4 x 32, XXS, 6 000 updates", "batch32-XXS", "dm", 4)),
          (("4 x 32", "1 x 128"), ("8 x 16", "1 x 128"), ("4 x 32, own pairs", "1 x 128"), ("4 x 32, 12 000 updates", "1 x 128, 12 000 updates"),
           ("4 x 32, XXS, 6 000 updates", "1 x 128, XXS, 6 000 updates")), curve="dm"),
    Claim("split", "consecutive and k-means both better than random", "FID, K = 4: 2.37, 2.39, 2.45",
          tuple(Row(f"{name}, K = {K}", tag, "dm", K) for K in (2, 4) for name, tag in (("consecutive", ""), ("k-means", "kmeans"), ("random", "random"))),
          tuple((f"{name}, K = {K}", f"random, K = {K}") for K in (2, 4) for name in ("consecutive", "k-means"))),
    Claim("split-prompts", "quadrants and k-means of embeddings better than random (toy-prompts, K = 4)", "Sec. 4.2: quadrants for text, not compared",
          tuple(Row(name, f"prompts-{how}", "dm", 4) for name, how in (("quadrants", "quadrant"), ("k-means", "kmeans"), ("random", "random"))),
          (("quadrants", "random"), ("k-means", "random"))),
    Claim("pairs", "paired data shared whole beat partitioned (K = 4, DM + regression)", "Fig. 7: partitioned pairs lose modes and end worse",
          tuple(Row(f"{n}{', own' if own else ''}", f"pairs{n}{own}", "dm", 4) for n in PAIRS for own in ("", "-own")),
          tuple((f"{n}", f"{n}, own") for n in PAIRS)),
    Claim("pairs-reg", "the same by regression alone, where nothing else can make up for lost modes", "not in the paper",
          tuple(Row(f"{n}{', own' if own else ''}", f"pairs{n}{own}-reg", "dm", 4) for n in (1000, 16_000) for own in ("", "-own")),
          tuple((f"{n}", f"{n}, own") for n in (1000, 16_000))),
    Claim("reg", "regression (with its warm-up) or TTUR makes DM work; with neither it is worse (K = 2)", "Sec. I.2, no table",
          (Row("regression", "", "dm", 2), Row("TTUR 5", "ttur", "dm", 2), Row("both", "both", "dm", 2), Row("neither", "neither", "dm", 2)),
          (("regression", "neither"), ("TTUR 5", "neither")), curve="dm"),
    Claim("methods", "DMD and DMD2 (without GAN) strike a good balance, CD is worse (K = 2, each with its preset's budget)",
          "FID and images seen: DMD 2.54, 130M; DMD2 2.61, 110M; CTM > 5, 3M",
          (Row("DMD", "", "dm", 2), Row("DMD2", "ttur", "dm", 2), Row("CD", "cd", "cd", 2)), (("DMD", "CD"), ("DMD2", "CD")), curve="dm"),
    Claim("adm", "ADM after DM improves on DM continued; two stages beat GAN from the start", "FID 2.37 -> 1.20; DMD2: 1.28 against 1.51",
          (Row("DM, K = 8", "", "dm", 8), Row("ADM, K = 8", "", "adm", 8), Row("DM continued", "continued", "adm", 8), Row("continued with regression", "continued-reg", "adm", 8),
           Row("two stages, K = 2", "", "adm", 2), Row("GAN from the start, K = 2", "joint-fast", "adm", 2)),
          (("ADM, K = 8", "DM continued"), ("ADM, K = 8", "continued with regression"), ("two stages, K = 2", "GAN from the start, K = 2")), "l1_data"),
    Claim("tsm", "small students do not converge properly without TSM (XS, K = 8, equal updates, TSM's of batch 384 counted)", "Sec. 3.3",
          (Row("TSM, DM: 4000 + 3000", "XS", "dm", 8), Row("random, DM: 7000", "XS-random", "dm", 8)), (("TSM, DM: 4000 + 3000", "random, DM: 7000"),)),
    Claim("small", "small students (TSM, DM, ADM) come close to same-sized ones (within 10 %, K = 8)", "FID: S 2.88, B 1.20",
          (Row("B", "", "adm", 8), Row("S", "S", "adm", 8), Row("XS", "XS", "adm", 8)), (("S", "1.1 x B"), ("XS", "1.1 x B")), "l1_data"),            # the margin is ours
    Claim("fig8", "quality rises with student size, falls with classes covered", "Fig. 8",
          tuple(Row(f"{size}, K = {K}", size, "adm", K) for size in ("XXS", "XS", "S") for K in (1, 2, 4, 8)),
          (*((f"{size}, K = 8", f"{size}, K = 1") for size in ("XXS", "XS", "S")),
           *((f"{a}, K = {K}", f"{b}, K = {K}") for K in (1, 8) for a, b in (("XS", "XXS"), ("S", "XS")))), "l1_data"),
    Claim("post", "the three stages beat post-distillation (XS, K = 8)", "FID 2.88 against 11.67",
          (Row("three stages", "XS", "adm", 8), Row("post-distilled", "XS-post", "post", 8)), (("three stages", "post-distilled"),), "l1_data"),
    Claim("surpass", "ADM students surpass the teacher (K = 8)", "FID 1.20 against 2.32",
          (Row("ADM", "", "adm", 8), Row("the teacher, 79 evaluations", "", "adm", 0)), (("ADM", "the teacher, 79 evaluations"),), "l1_data"),
    Claim("capacity", "K's gain is one of capacity: narrower nets gain more (ratio of K = 8 to K = 1)", "stated, not measured",
          tuple(Row(f"{size}, K = {K}", tag, "dm", K) for size, tag in SIZES.items() for K in (1, 8)),
          tuple((f"{a}, K = 8 / {a}, K = 1", f"{b}, K = 8 / {b}, K = 1") for a, b in (("XXS", "XS"), ("XS", "S"), ("S", "B")))),
    Claim("compute", "K students against one at K times the compute: same total training FLOPs", "asked by reviewers",
          (Row("1 student, 1 unit", "", "dm", 1), Row("4 students, 1 unit", "batch32", "dm", 4), Row("8 students, 1 unit", "batch16", "dm", 8),
           Row("1 student, 4 units", "steps12000", "dm", 1), Row("4 students, 4 units", "", "dm", 4)),
          (("4 students, 1 unit", "1 student, 1 unit"), ("8 students, 1 unit", "1 student, 1 unit"), ("4 students, 4 units", "1 student, 4 units"))),
    Claim("diversity", "more students cover the modes more evenly: the emptiest mode's share", "asked by reviewers", _of_k("", "dm"), (("K = 8", "K = 1"),), "mode_min", True),
    Claim("o2-n", "N students by noise level beat one of the same size at the same inference cost (half of the channels; also 30 % removed)",
          "FID by relational KD, N = 1, 4, 8: 5.32, 4.62, 4.34",
          (*(Row(f"N = {N}", "o2mkd", "o2mkd", N) for N in (1, 2, 4, 8)), *(Row(f"30 % removed, N = {N}", "o2mkd-keep70", "o2mkd", N) for N in (1, 4))),
          (("N = 8", "N = 1"), ("N = 2", "N = 1"), ("N = 4", "N = 2"), ("N = 8", "N = 4"), ("30 % removed, N = 4", "30 % removed, N = 1")), "l1_data", picture="samples-o2mkd"),
    Claim("o2-loss", "it works with each distillation loss, and each loss beats none (their weights were chosen on seed 0)", "FID, N = 1 -> 4: 5.36 -> 4.73, 5.51 -> 4.81, 5.32 -> 4.62, 5.44 -> 4.75; without KD 5.84",
          tuple(Row(f"{name}, N = {N}", tag, "o2mkd", N) for name, tag in KDS.items() for N in (1, 4)),
          (*((f"{name}, N = 4", f"{name}, N = 1") for name in KDS if name != "no KD"), *((f"{name}, N = 1", "no KD, N = 1") for name in KDS if name != "no KD")), "l1_data"),
    Claim("o2-p", "p = 0 and p = 1 are both worse than between; p = 1 fails outside its range (N = 4; student 0 alone, or with the teacher elsewhere)",
          "FID of one student, p = 1 and between: alone 432 and 5.27; teacher elsewhere 4.52 and 4.33",
          (*(Row(f"p = {p / 100:g}", O2P.get(p, f"o2mkd-p{p}"), "o2mkd", 4) for p in (0, 25, 50, 75, 100)),
           *(Row(f"{name}, p = {p / 100:g}", "o2mkd+" if p == 75 else f"o2mkd-p{p}", f"{stage}-0", 4) for name, stage in (("alone", "alone"), ("teacher elsewhere", "hybrid"))
             for p in (0, 75, 100))),
          (("p = 0.75", "p = 0"), ("p = 0.75", "p = 1"), ("alone, p = 0.75", "alone, p = 1"), ("teacher elsewhere, p = 0.75", "teacher elsewhere, p = 1")), "l1_data"),
    Claim("o2-scheme", "more students on small noise help (N = 4)", "FID: small 4.23, uniform 4.33, large 4.52",
          tuple(Row(name, tag, "o2mkd", 4) for name, tag in (("small", "o2mkd-small"), ("uniform", "o2mkd"), ("large", "o2mkd-large"))),
          (("small", "uniform"), ("uniform", "large")), "l1_data"),
    Claim("o2-merge", "N students merged into one are still better than one student (N = 4; all from one trained student, or from random weights)",
          "FID, N = 4: 4.62 before, 4.75 after; one student 5.32",
          tuple(Row(f"{name}{of}", tag, stage, N) for tag, of in (("o2mkd-fork", ""), ("o2mkd-fork50", ", p = 0.5"), ("o2mkd+", ", random start"))
                for name, stage, N in (("before", "o2mkd", 4), ("merged", "merged", 4), ("merged, c = 1/N", "merged-mean", 4), ("one student", "o2mkd", 1))),
          (("merged", "one student"), ("merged, p = 0.5", "one student, p = 0.5"), ("merged, random start", "one student, random start")), "l1_data"),
    Claim("o2-same", "it helps without compression: students of the teacher's size that start from it", "FID: teacher 4.19, students 3.78",
          (Row("the teacher", "o2mkd-same", "o2mkd", 0), *(Row(f"N = {N}", "o2mkd-same", "o2mkd", N) for N in (1, 4, 8))),
          (("N = 8", "the teacher"), ("N = 4", "the teacher"), ("N = 4", "N = 1")), "l1_data"),
    Claim("o2-steps", "it holds at any number of sampling steps (here against one distilled student); at about equal multiply-adds students beat the teacher",
          "Fig. 6: at every number of DDIM steps, against a student without KD; below the teacher under 500 G",
          tuple(Row(f"{who}, {n} {sampler} steps", "o2mkd+", f"{sampler}-{n}", K) for sampler in ("heun", "ddim") for who, K in (("teacher", 0), ("N = 1", 1), ("N = 4", 4)) for n in STEPS),
          (*((f"N = 4, {n} {s} steps", f"N = 1, {n} {s} steps") for s in ("heun", "ddim") for n in STEPS),
           *((f"N = 4, {STEPS[2]} {s} steps", f"teacher, {STEPS[0]} {s} steps") for s in ("heun", "ddim"))), "l1_data",
          picture="curve-o2mkd"),
    *(Claim(name, text, "Fig. 9: relational KD steady and falling, prediction KD unsteady but falling, the denoising loss neither",
            tuple(Row(loss, "o2mkd-similarity" if loss == "similarity" else "o2mkd+", f"loss-{loss}", 1) for loss in ("similarity", "prediction", "denoising")),
            below, metric, more, picture="losses-o2mkd-similarity")
      for name, text, below, metric, more in (
          ("o2-stable", "relational distillation is the steadiest supervision: coefficient of variation of a batch's loss (one student)",
           (("similarity", "denoising"), ("similarity", "prediction")), "variation", False),
          ("o2-fall", "both kinds of distillation fall clearly, the denoising loss does not: relative fall from the first twentieth of the training to the last (one student)",
           (("similarity", "denoising"), ("prediction", "denoising")), "fall", True))),
    Claim("o2-why", "the teacher's feature distributions drift with sigma, gradually: Frechet distance of the bottleneck's features, the largest between neighbouring levels of 21 "
          "below the mean of levels half the grid apart", "Fig. 1, no numbers",
          (Row("largest step", "o2mkd+", "drift-neighbours", 0), Row("half the grid apart", "o2mkd+", "drift-far", 0)), (("largest step", "half the grid apart"),), "distance",
          picture="drift-o2mkd"),
    Claim("o2-cost", "N students keep N times the weights, but a sample costs one student: multiply-adds of a sample in 79 evaluations", "CIFAR-10, a step: teacher 6.1 G, students 3.3 or 1.4 G, any N",
          (Row("the teacher", "o2mkd", "cost", 0), *(Row(f"N = {N}", "o2mkd", "cost", N) for N in (1, 2, 4, 8))), (("N = 8", "1.001 x N = 1"), ("N = 8", "the teacher")), "multiply_adds"),
    Claim("o2-both", "both ideas at once: blocks of classes x noise ranges beat either alone, at the same number of networks", "in neither paper",
          (Row("4 ranges", "o2mkd", "o2mkd", 4), Row("2 blocks x 2 ranges", "o2mkd-2x2", "o2mkd", 4), Row("4 blocks", "o2mkd-4x1", "o2mkd", 4),
           Row("8 ranges", "o2mkd", "o2mkd", 8), Row("4 blocks x 2 ranges", "o2mkd-4x2", "o2mkd", 8)),
          (("2 blocks x 2 ranges", "4 ranges"), ("2 blocks x 2 ranges", "4 blocks"), ("4 blocks x 2 ranges", "8 ranges")), "l1_data"),
    Claim("o2-n-images", "N students by noise level beat one, on Fashion-MNIST (ours: FD, our classifier)", "FID, N = 1, 4: 5.32, 4.62",
          (Row("the teacher", "o2mkd-fashion", "o2mkd", 0), *(Row(f"N = {N}", "o2mkd-fashion", "o2mkd", N) for N in (1, 4))), (("N = 4", "N = 1"),), "fd_data"),
    Claim("o2-merge-images", "N students merged into one are still better than one student, on Fashion-MNIST", "FID, N = 4: 4.62 before, 4.75 after; one student 5.32",
          tuple(Row(name, "o2mkd-fashion-fork", stage, N) for name, stage, N in (("before", "o2mkd", 4), ("merged", "merged", 4), ("merged, c = 1/N", "merged-mean", 4), ("one student", "o2mkd", 1))),
          (("merged", "one student"), ("merged, c = 1/N", "one student")), "fd_data"),
    Claim("fig4-images", "more students, better quality, on Fashion-MNIST (ours: FD, our classifier)", "FID, K = 1, 4: 2.60, 2.37",
          (Row("K = 1", "fashion", "dm", 1), Row("K = 5", "fashion", "dm", 5)), (("K = 5", "K = 1"),), "fd_data"),
)}


# --------------------------------------------------------------------------------------------------------------- the runs

def script(tag: str):
    """The module whose command a run is: msd, or o2mkd."""
    return o2mkd if RUNS[tag].startswith("o2mkd.py") else msd


def typed(tag: str, flags: Flags) -> str:
    """A run as one types it."""
    return f"python {script(tag).__name__}.py {shlex.join(command_line(tag, flags))}"


def parsed(tag: str, flags: Flags):
    """All values of a run."""
    return common.parse(script(tag).Flags, script(tag).PRESETS, command_line(tag, flags))


def tag_of(tag: str) -> str:
    """The --tag that a run is kept under."""
    return "" if tag in UNTAGGED else tag.removeprefix("o2mkd-").removeprefix("fashion-")


def command_line(tag: str, flags: Flags) -> list[str]:
    """The arguments of msd.py or o2mkd.py for a run."""
    argv = [*RUNS[tag].removeprefix("o2mkd.py ").split(), "--out", str(home(tag, flags))]
    argv += ["--tag", tag_of(tag)] if tag_of(tag) else []
    if "fashion-mnist" in argv:
        return argv
    argv += ["--seeds", "1" if flags.quick else str(min(flags.seeds, FEWER.get(tag, flags.seeds)))]
    if flags.smoke:                                                 # the preset's own pairs and updates
        for name in ("--preset", "--steps", "--reg-warmup", "--adm-steps", "--tsm-steps", "--pairs"):
            if name in argv:
                del argv[argv.index(name):argv.index(name) + 2]
        return argv + ["--preset", "smoke", "--eval-samples", "400"]
    if flags.quick:
        full = common.parse(script(tag).Flags, script(tag).PRESETS, argv)
        dm = () if getattr(full, "method", "") == "cd" else ("steps", "reg_warmup", "fake_warmup")
        for name in (*dm, "tsm_steps", "adm_steps", "adm_fake_warmup", "cd_steps", "eval_every", "teacher_steps"):
            argv += [common.option(name), str(max(1, getattr(full, name) // (3 if name == "teacher_steps" else 5)))] if hasattr(full, name) else []
        argv += ["--eval-samples", "20000"]
        if script(tag) is msd:
            argv += ["--select-samples", "4000"] + (["--pairs", "16000"] if "--pairs" not in argv and full.pairs > 16_000 else [])
    return argv


def home(tag: str, flags: Flags) -> Path:
    """The run folder of a run: of another dataset than the toy, a folder inside."""
    argv = RUNS[tag].split()
    return Path(folder(flags)) / (argv[argv.index("--dataset") + 1] if "--dataset" in argv else "")


def folder(flags: Flags) -> str:
    """The run folder."""
    return flags.out or ("runs/smoke" if flags.smoke else "runs/quick" if flags.quick else "runs/reproduce")


def results_of(tag: str, flags: Flags) -> Path:
    """Where msd.py or o2mkd.py leaves the numbers of a run."""
    return home(tag, flags) / f"results{'-o2mkd' * (script(tag) is o2mkd)}{common.suffix(tag_of(tag))}.json"


def finished(flags: Flags) -> dict:
    """{tag: what `said` of it} of the runs that have ended."""
    path = Path(folder(flags)) / "runs.json"
    return {tag: text for tag, text in (common.load_json(path) if path.exists() else {}).items() if tag in RUNS and there(tag, flags)}


def there(tag: str, flags: Flags) -> bool:
    """Does the results file hold what this run leaves: its last stage, all its K, all its seeds?"""
    path = results_of(tag, flags)
    if not path.exists():
        return False
    results, full = common.load_json(path, "students", "seeds"), parsed(tag, flags)
    if script(tag) is o2mkd:
        stages = ["o2mkd", *(f"{s}-{n}" for n in full.curve for s in ("heun", "ddim"))]
        also = [("merged", max(full.students))] * full.merge + [(f"alone-{full.inspect}", max(full.students))] * (full.inspect >= 0)
    else:
        stages, also = ["cd" if full.method == "cd" else full.stages.split(",")[-1]], []
    of = results.get("stages", {"dm": results["students"]})
    return results["seeds"] == list(range(full.seeds)) and all(str(K) in of.get(s, {}) for s, K in [*((s, K) for s in stages for K in full.students), *also])


def said(tag: str, flags: Flags) -> str:
    """A run as runs.json keeps it: its command line and a hash of all values, defaults too: a run of other values is another run."""
    argv = command_line(tag, flags)
    full = parsed(tag, flags)
    values = [(f.name, getattr(full, f.name)) for f in dataclasses.fields(full) if f.name not in ("quiet", "device", "threads", "against", "target_l1")]
    return f"{shlex.join(argv)} # {hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()}"


def needed(claims: list[Claim]) -> list[str]:
    """The runs of these claims in the order of RUNS, each after those that it goes on from."""
    tags = {r.tag if (r.tag, r.stage) != ("", "adm") else {8: "adm", 2: "adm2", 0: "adm"}[r.K] for c in claims for r in c.rows}
    while more := {t for tag in tags for t in AFTER.get(tag, [])} - tags:
        tags |= more
    return [tag for tag in RUNS if tag in tags]


def hours(tag: str, flags: Flags, device, shared: bool) -> float:
    """How long a run will take, as its script estimates it; shared: with teachers, pairs and the teacher's samples."""
    full = parsed(tag, flags)
    facts = data.facts(full.dataset, full.resolution)
    if script(tag) is o2mkd:
        return o2mkd.estimate(full, facts, o2mkd.size_of(full, facts, full.teacher_size or facts.sizes[0]), device, shared) / 3600
    msd.check_stages(full, facts)
    return msd.estimate(full, device, shared) / 3600


def train(tags: list[str], flags: Flags) -> None:
    """Run each tag that has not ended; its output goes to OUT/logs, bars stay on the screen."""
    out = Path(folder(flags))
    for i, tag in enumerate(tags):
        argv, name = command_line(tag, flags), tag or "dm"
        print(f"[{i + 1}/{len(tags)}] {name}: {typed(tag, flags)}", flush=True)
        log = out / "logs" / f"{name}.log"
        try:
            with open(log, "a") as file, contextlib.redirect_stdout(file):
                script(tag).main([*argv, *(["--quiet"] if flags.quiet else [])])
        except SystemExit as stopped:
            if stopped.code:
                print(f"{name} stopped ({log})" + "; the same command goes on from here" * (stopped.code == 130))
                raise
        common.save_json(out / "runs.json", {**finished(flags), tag: said(tag, flags)})


# ------------------------------------------------------------------------------------------------------- numbers, verdicts

def per_seed(row: Row, flags: Flags) -> list[dict] | None:
    """What was measured of a row, seed by seed; None if it is not there."""
    path = results_of(row.tag, flags)
    if not path.exists():
        return None
    results = common.load_json(path, "students", "teacher", "seeds")
    if results["seeds"] != list(range(len(results["seeds"]))):      # of a run by hand: not to be paired with the others
        return None
    of_k = results.get("stages", {"dm": results["students"]}).get(row.stage, {})
    if row.stage == "cost":                                         # measured once
        return [results["cost"][str(row.K)]] if str(row.K) in results.get("cost", {}) else None
    if row.K == 0 and (row.stage in msd.ONE_STEP or row.stage == "o2mkd"):
        return results["teacher"]["per_seed"]
    return of_k[str(row.K)]["per_seed"] if str(row.K) in of_k else None


def values(name: str, numbers: dict[str, list[float]]) -> list[float]:
    """Per seed: a row's numbers, "1.1 x ROW", or the ratio "ROW / ROW"."""
    if " / " in name:
        a, b = (numbers[n] for n in name.split(" / "))
        return [x / y for x, y in zip(a, b)]
    factor, _, rest = name.partition(" x ")
    return [float(factor) * v for v in numbers[rest]] if rest in numbers and name not in numbers else numbers[name]


def measured(name: str, numbers: dict[str, list[float]]) -> bool:
    """Are the rows that a comparison's side is made of there?"""
    try:
        return bool(values(name, numbers))
    except KeyError:
        return False


def judge(claim: Claim, numbers: dict[str, list[float]]) -> tuple[str, list[tuple[str, dict]]]:
    """(the claim's verdict, [(comparison, common.verdict …)]) from numbers {row name: [one per seed]}.

    A comparison that does not hold says whether its reverse does, or whether the two are not told apart."""
    found = []
    for a, b in claim.below:
        left, right = values(a, numbers), values(b, numbers)
        n = min(len(left), len(right))                              # the seeds that both have
        left, right = (right, left) if claim.more else (left, right)
        v = common.verdict(left[:n], right[:n])
        if v["verdict"] == "does not hold":
            v["verdict"] = "the reverse holds" if common.verdict(right[:n], left[:n])["verdict"] == "holds" else "not told apart"
        found.append((f"{a} {'above' if claim.more else 'below'} {b}", v))
    said = [v["verdict"] for _, v in found]
    if all(s == "measured" for s in said):
        if all(v["mean"] == 0 for _, v in found):
            return "measured: equal", found
        return "measured: " + ("as claimed" if all(v["mean"] > 0 for _, v in found) else "not as claimed"
                               if all(v["mean"] <= 0 for _, v in found) else "in part as claimed"), found
    holds, reverse = said.count("holds"), said.count("the reverse holds")
    if holds == len(said):
        return "holds", found
    if holds:
        return f"holds in {holds} of {len(said)} comparisons" + (f", the reverse in {reverse}" if reverse else ""), found
    return "does not hold" + (": the reverse does" if reverse == len(said) else f": the reverse does in {reverse} of {len(said)} comparisons" if reverse
                              else ": not told apart"), found


def mean_sd(v: list[float]) -> str:
    """0.210 ± 0.004, the mean alone for one seed."""
    mean = sum(v) / len(v)
    sd = math.sqrt(sum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else 0
    if mean > 1000:
        return f"{mean:,.0f}"
    return f"{mean:.3f} ± {sd:.3f}" if len(v) > 1 else f"{mean:.3f}"


def section(claim: Claim, flags: Flags) -> tuple[str, list[str]]:
    """A claim's line of the table, and its section; draws its figure."""
    found = {r.name: per_seed(r, flags) for r in claim.rows}
    absent = {r.tag: r for r in claim.rows if not found[r.name]}
    missing = "Not measured: " + ", ".join(f"`{typed(tag, flags)}`" for tag in absent)
    found = {name: seeds for name, seeds in found.items() if seeds}
    numbers = {name: [p[claim.metric] for p in seeds] for name, seeds in found.items()}
    below = tuple(pair for pair in claim.below if all(measured(name, numbers) for name in pair))
    if not below:
        return f"| {claim.id} | {claim.text} | {claim.paper} | not measured | | not measured |", ["", f"## {claim.id}: {claim.text}", "", missing]
    left_out = len(claim.below) - len(below)
    claim = dataclasses.replace(claim, below=below, rows=tuple(r for r in claim.rows if r.name in found))
    n = min(map(len, numbers.values()))
    verdict, comparisons = judge(claim, numbers)
    verdict += f" ({left_out} more not measured)" if left_out else ""
    shown = list(numbers) if len(numbers) <= 6 else list(dict.fromkeys(x for pair in claim.below[:2] for x in pair if x in numbers)) or list(numbers)[:4]
    line = (f"| {claim.id} | {claim.text} | {claim.paper} | " + "; ".join(f"{name}: {mean_sd(numbers[name])}" for name in shown)
            + (" …" if len(shown) < len(numbers) else "") + f" | {n} | {verdict} |")
    more = [k for k in (*METRICS, *MORE) if any(k in p[0] for p in found.values())]
    runs = needed([claim])
    seen, cost = {r.name: samples_seen(r, flags) for r in claim.rows}, {r.name: training_cost(r, flags) for r in claim.rows}
    text = ["", f"## {claim.id}: {claim.text}", "", f"The paper: {claim.paper}. Ours, {claim.metric}: **{verdict}**.", "",
            "| | " + " | ".join(more) + " | last stage: samples a student saw | its training, all students, TFLOP | seeds |", "|---" * (len(more) + 4) + "|"]
    text += [f"| {name} | " + " | ".join(mean_sd([p[k] for p in seeds]) if k in seeds[0] else "" for k in more)
             + f" | {f'{seen[name]:,}' if seen[name] else ''} | {cost[name]} | {len(seeds)} |" for name, seeds in found.items()]
    text += ["", "| comparison | difference ± standard error | n | verdict |", "|---|---|---|---|"]
    text += [f"| {name} | {v['mean']:.4f}" + (f" ± {v['error']:.4f}" if v["error"] is not None else "") + f" | {v['n']} | {v['verdict']} |" for name, v in comparisons]
    text += [""] + [s for r in claim.rows for s in split_lines(r, flags)] + ([missing] if absent else [])
    if claim.picture and (drawn := home(claim.rows[0].tag, flags) / "figures" / f"{claim.picture}.png").exists():
        shutil.copyfile(drawn, kept := figures_path(flags) / f"claim-{claim.id}-{claim.picture.split('-')[0]}.png")
        text += ["", f"![{claim.picture}]({plot.beside(kept, results_path(flags))})"]
    figure = plot.claim(claim.id, claim.text, numbers, claim.metric, lines(claim, flags), curves(claim, flags))
    path = figures_path(flags) / f"claim-{claim.id}.png"
    plot.save(figure, path)
    text += ["", f"![{claim.id}]({plot.beside(path, results_path(flags))})", "", "Runs: " + "; ".join(f"`{typed(t, flags)}`" for t in runs)]
    return line, text


def split_lines(row: Row, flags: Flags) -> list[str]:
    """For the claim about partitions: how alike the conditions of one student are."""
    if not row.name.startswith(("consecutive", "k-means", "random", "quadrants")):
        return []
    split = common.load_json(results_of(row.tag, flags)).get("partition", {}).get(str(row.K))
    if not split or None in split["within"]:
        return []
    return [f"- {row.name}: distance of two conditions' embeddings {mean_sd(split['within'])} within a student, {mean_sd(split['between'])} between; "
            f"sizes {' and '.join(sorted({'+'.join(map(str, sorted(s))) for s in split['sizes']}))}"]


def lines(claim: Claim, flags: Flags) -> dict:
    """Levels worth a line in the claim's figure: floor, teacher, bound."""
    all_results = [common.load_json(results_of(tag, flags)) for tag in dict.fromkeys(r.tag for r in claim.rows)]
    results, m = all_results[0], claim.metric
    out = {"the teacher": results["teacher"][m]} if m.endswith("_data") and claim.id != "surpass" else {"floor: two draws of the teacher": results["floor"]} if m == "l1" else {}
    return out | {f"{r['bound']['points']}-point Heun sampler": r["bound"][m] for r in all_results if m in r.get("bound", {})}


METRICS = ("l1", "l1_data", "fd", "fd_data", "within", "modes", "mode_min", "mode_max")              # columns of a claim's section
MORE = ("right class", "prediction_in", "prediction_out", "denoising_in", "denoising_out", "c", "parameters", "multiply_adds", "per_second", "fall", "variation", "distance")
# the flags that count a stage's updates, and its batch
COUNTED = {"dm": ("steps", "batch"), "adm": ("adm_steps", "adm_batch"), "cd": ("cd_steps", "cd_batch"), "post": ("post_steps", "batch")}


def samples_seen(row: Row, flags: Flags) -> int:
    """Samples that a student saw in its last stage: updates times batch; 0 for the teacher."""
    if row.K == 0:
        return 0
    path = next(iter(sorted(stage_folder(row, flags).glob("**/config.json"))), None)
    config = common.load_json(path) if path else {}
    steps, batch = COUNTED.get(row.stage, ("steps", "batch"))
    return config.get(steps, 0) * config.get(batch, 0)


def multiply_adds(facts: data.Facts, size: str) -> int:
    """Of one forward pass of the toy's network: every weight matrix once."""
    return sum(p[0].numel() for name, p in facts.net(1, size).named_parameters() if p.shape[1] > 1 and name != "table")


def training_cost(row: Row, flags: Flags) -> str:
    """TFLOP (2 per multiply-add) of a row's last stage, K students together, as a text; "" where it is not counted.

    In forward passes: forward and backward 3, a denoiser that is only asked 1. DM: G for KL and regression, mu_teacher and
    mu_fake once per noise draw, mu_fake's turns; CD: f, the target, the teacher twice; O2MKD: a student, the teacher once."""
    path = next(iter(sorted(stage_folder(row, flags).glob("config.json"))), None) if row.K and row.stage in ("dm", "cd", "o2mkd") else None
    if path is None:
        return ""
    c = common.load_json(path)
    facts = data.facts(c["dataset"])
    if row.stage == "cd":
        G, mu = 4 * c["cd_steps"], 2 * c["cd_steps"]
    elif row.stage == "o2mkd":
        G, mu = 3 * c["steps"], c["steps"]
    else:
        kl = c["steps"] - (c["steps"] if c["dm_weight"] == 0 else c["reg_warmup"] if c["reg_weight"] > 0 else 0)
        G = 3 * kl + 3 * c["steps"] * (c["reg_weight"] > 0) + (kl * (c["ttur"] - 1) + c["fake_warmup"] * (kl > 0))
        mu = kl * (2 * c["draws"] + 3 * c["ttur"]) + 3 * c["fake_warmup"] * (kl > 0)
    small = c["size"] if row.stage == "o2mkd" else c.get("student_size") or facts.sizes[0]
    total = row.K * c[COUNTED.get(row.stage, ("steps", "batch"))[1]] * 2 * (G * multiply_adds(facts, small) + mu * multiply_adds(facts, facts.sizes[0]))
    return f"{total / 1e12:.2f}"


def stage_folder(row: Row, flags: Flags) -> Path:
    """The row's stage folder of the first seed."""
    if script(row.tag) is o2mkd:
        return o2mkd.home(Flags(out=str(home(row.tag, flags))), 0, row.K, tag_of(row.tag))
    return home(row.tag, flags) / "seed0" / f"students{row.K}{common.suffix(tag_of(row.tag))}" / row.stage


def curves(claim: Claim, flags: Flags) -> dict:
    """{row name: (samples seen by a student, distance on its own classes)} of the first seed, where metrics are there."""
    out = {}
    for row in claim.rows if claim.curve else ():
        place = stage_folder(row, flags)
        if (place / "metrics.csv").exists():
            steps, value = plot.over_students(plot.read_metrics(place).get("l1", {}))
            out[row.name] = (steps * common.load_json(place / "config.json")[COUNTED[row.stage][1]], value)
    return out


# ------------------------------------------------------------------------------------------------------------ the command

def results_path(flags: Flags) -> Path:
    """Where the table goes."""
    return Path(flags.results or Path(folder(flags)) / "RESULTS.md")


def figures_path(flags: Flags) -> Path:
    """Where the figures go."""
    return Path(flags.figures or Path(folder(flags)) / "figures")


def check_places(flags: Flags) -> None:
    """Can the run folder and the table be written? Asked before hours of training. UserError if not."""
    for name, folder_ in (("--out", Path(folder(flags)) / "logs"), ("--results", results_path(flags).parent), ("--figures", figures_path(flags))):
        try:
            folder_.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder_, os.W_OK)
        except OSError:
            writable = False
        if not writable or results_path(flags).is_dir():
            raise common.UserError(f"{name}: {folder_} cannot be written; choose another {name}")


def write(claims: list[Claim], flags: Flags) -> None:
    """RESULTS.md and the figures of these claims."""
    made = [section(c, flags) for c in claims]
    head = ["# Results", "", "Written by `python reproduce.py`" + (" with `--smoke`: it measures nothing." if flags.smoke else
            " with `--quick`: one seed, a fifth of the updates; nothing here is a verdict on the paper." if flags.quick else "."),
            "The toy, unless it says otherwise: l1 to the teacher's samples, l1_data to the data (0 = equal, 1 = disjoint), mean ± standard deviation over "
            "the seeds. A verdict is a one-sided t test at 5 %, paired by seed, at equal updates of each student, or as the row says. The papers' numbers "
            "are FID, of MSD on ImageNet-64, of O2MKD (o2-…) on CIFAR-10: compare directions, not values.", "",
            "| id | claim | paper | ours, mean ± sd | n | verdict |", "|---|---|---|---|---|---|"]
    print("\n".join(head[-2:] + [line for line, _ in made]))
    text = "\n".join([*head, *[line for line, _ in made], *[t for _, body in made for t in body]]) + "\n"
    common.write_atomic(results_path(flags), lambda t: t.write_text(text))
    common.save_json(results_path(flags).with_suffix(".json"), {c.id: {r.name: per_seed(r, flags) for r in c.rows} for c in claims})
    print(f"\nresults: {results_path(flags)}\nfigures: {figures_path(flags)}/claim-*.png")


def chosen(flags: Flags) -> list[Claim]:
    """The claims asked for. UserError if one is not known, with names that sound like it."""
    if flags.quick and (flags.images or any(i in flags.claim for i in IMAGES)):
        raise common.UserError("--quick: the toy only; leave --images and claims on images out")
    if flags.all and flags.claim:
        raise common.UserError(f"--all and --claim {flags.claim}: one of them")
    if flags.images and not flags.all:
        raise common.UserError("--images: goes with --all; for the claim alone: --claim fig4-images")
    if flags.quick and flags.seeds != 5:
        raise common.UserError(f"--seeds {flags.seeds}: --quick is of one seed; leave one of them out")
    if flags.all:
        return [c for c in CLAIMS.values() if flags.images or c.id not in IMAGES]
    names = [n.strip() for n in flags.claim.split(",") if n.strip()]
    for n in names:
        if n not in CLAIMS:
            raise common.UserError(f"--claim {n}: not known{common.near(n, CLAIMS)} (one of {', '.join(CLAIMS)})")
    if not names:
        raise common.UserError("which claims? --claim NAME, --all, or --list to see them")
    return [CLAIMS[n] for n in names]


@common.command
def main(argv=None):
    """Train what the chosen claims need, judge them, write the table and the figures."""
    flags = common.parse(Flags, {(None, None): {}}, argv, __doc__)
    flags.quick = flags.quick or flags.smoke
    done = finished(flags)
    if flags.list:
        for c in CLAIMS.values():
            tags = needed([c])
            there = sum(done.get(t) == said(t, flags) for t in tags)
            print(f"  {c.id:<12} {c.text}\n               paper: {c.paper}; {there} of {len(tags)} runs are there")
        return
    if flags.table:
        check_places(flags)
        return write(list(CLAIMS.values()), flags)
    claims = chosen(flags)
    todo = [t for t in needed(claims) if done.get(t) != said(t, flags)]
    device = common.device("auto", 0)
    first = {home(t, flags): t for t in reversed(todo) if home(t, flags) not in {home(d, flags) for d in done}}       # makes what a folder's runs share
    total = sum(hours(t, flags, device, t in first.values()) for t in todo)
    print(f"reproduce: {', '.join(c.id for c in claims)}; {len(todo)} of {len(needed(claims))} runs to do, {1 if flags.quick else flags.seeds} seed(s), "
          f"about {f'{total:.1f} hours' if total > 1.5 else f'{60 * total:.0f} min'}, into {folder(flags)}", flush=True)
    if flags.dry_run:
        print("\n".join(f"  {typed(t, flags)}" for t in todo))
        return
    check_places(flags)
    train(todo, flags)
    done = finished(flags)
    everything = [c for c in CLAIMS.values() if c in claims or all(done.get(t) == said(t, flags) for t in needed([c]))]
    write(everything, flags)


if __name__ == "__main__":
    main()
