"""The claims of both papers, as data: what a paper says, which runs test it, which of their rows are compared.

RUNS    NAME: a command without "python msd.py --students" (o2…: o2mkd.py); 5 seeds where nothing is said
CLAIMS  ID | metric | claim | what the paper has | a figure of the first run that belongs to it; then
        NAME: RUN K …: rows of a run after its last stage, of K students (0: the teacher, or once); # stands for K
        NAME: RUN/STAGE K …: after another stage
        A & B below C (or above): two comparisons. A side may be "1.1 x A", or the ratio "A / B"
Not here: what trains and judges them (reproduce.py); claims that were cut (docs/findings.md).
"""
import re
from typing import NamedTuple


def each(text: str, *values) -> str:
    """The text once for every value that its {} takes."""
    return "\n".join(text.format(*(v if isinstance(v, tuple) else (v,))) for v in values)


# ----------------------------------------------------------------- runs

LONG = "--steps 12000 --reg-warmup 4000 --fake-warmup 1600"  # four times those of dm
NARROW = "--student-size XXS --init random --steps 6000 --reg-warmup 2000"
FASHION = "--dataset fashion-mnist --seeds 1"
MANY = (250, 1000, 4000, 16000)
# in their order; adm and o2+ add to dm and o2; 37 steps of o2+ cost what the teacher's 10 do
RUNS = dict(line.split(": ") for line in f"""
dm: 1 2 4 8
cd: 1 2 4 8 --stages cd --seeds 2
batch32: 4 --batch 32
batch16: 8 --batch 16
batch32-own: 4 --batch 32 --filter-pairs
batch32-long: 4 --batch 32 {LONG}
batch128-XXS: 1 {NARROW}
batch32-XXS: 4 --batch 32 {NARROW}
steps12000: 1 {LONG}
random: 2 4 --partition random
kmeans: 2 4 --partition kmeans
{each("pairs{0}: 4 --preset few-pairs --pairs {0}", *MANY)}
{each("pairs{0}-own: 4 --preset few-pairs --pairs {0} --filter-pairs", *MANY)}
{each("pairs{0}-reg: 4 --preset few-pairs --pairs {0} --dm-weight 0", 1000, 16000)}
{each("pairs{0}-own-reg: 4 --preset few-pairs --pairs {0} --filter-pairs --dm-weight 0", 1000, 16000)}
ttur: 2 --reg-weight 0 --ttur 5
both: 2 --ttur 5
neither: 2 --reg-weight 0
adm: 8 --stages dm,adm
continued: 8 --stages adm --init dm --gan-weight 0
{each("{0}: 1 2 4 8 --stages tsm,dm,adm --seeds 3 --student-size {0}", "S", "XS", "XXS")}
XS-random: 8 --student-size XS --init random --steps 7000
XS-post: 8 --student-size XS --stages post
{each("prompts-{0}: 4 --dataset toy-prompts --seeds 3 --partition {0}", "random", "kmeans", "quadrant")}
fashion: 1 5 {FASHION}
o2: 1 2 4 8
o2+: 1 4 --merge --inspect 0 --curve 10 20 37
o2-p0: 4 --p 0 --inspect 0
o2-p25: 4 --p 0.25
o2-p50: 4 --p 0.5
o2-p100: 4 --p 1 --inspect 0
{each("o2-{0}: 1 4 --kd {0}", "attention", "similarity", "contrastive")}
o2-none: 1 4 --kd-weight 0
o2-small: 4 --scheme small
o2-large: 4 --scheme large
o2-fork: 1 4 --merge --init o2mkd1 --lr 2e-3
o2-fork50: 1 4 --merge --init o2mkd1 --lr 2e-3 --p 0.5
o2-same: 1 4 8 --keep 1
o2-keep70: 1 4 --keep 0.7
o2-2x2: 4 --ranges 2
o2-4x1: 4 --ranges 1
o2-4x2: 8 --ranges 2
o2-fashion: 1 4 {FASHION}
o2-fashion-fork: 1 4 --merge --init o2mkd1 --lr 1e-3 {FASHION}
""".strip().splitlines())
UNTAGGED = ("dm", "adm", "fashion", "o2", "o2+", "o2-fashion")
AFTER = {  # whose students a run starts from, or adds to
    "adm": "dm", "continued": "dm", "XS-post": "adm", "o2+": "o2", "o2-fork": "o2", "o2-fork50": "o2",
    "o2-fashion-fork": "o2-fashion",
}


# --------------------------------------------------------------- claims

class Entry(NamedTuple):
    """One row: of run `run`, after `stage`, with K students."""
    name: str
    run: str
    stage: str
    K: int


class Claim(NamedTuple):
    """One claim: comparisons {text: (what is to be lower, what higher)} of its entries' `metric`."""
    entries: list[Entry]
    comparisons: dict[str, tuple[str, str]]
    id: str
    metric: str
    text: str
    paper: str
    picture: str = ""


def entries(text: str) -> list[Entry]:
    """Of NAME: RUN K …, or NAME: RUN/STAGE K …"""
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


BY_K = "{0} = 8 & {0} = 2 below {0} = 1; {0} = 4 below {0} = 2; {0} = 8 below {0} = 4"
MERGED = "before{0}: {1} 4; merged{0}: {1}/merged 4; merged, c = 1/N{0}: {1}/merged-mean 4; one student{0}: {1} 1"
LOSSES = "similarity: o2-similarity/loss-similarity 1\n" + each("{0}: o2+/loss-{0} 1", "prediction", "denoising")
KINDS = ("prediction", "attention", "similarity", "contrastive")
STEPS = [(name, steps) for name in ("heun", "ddim") for steps in (10, 20, 37)]
FIG9 = "Fig. 9: relational KD steady, prediction KD not; both fall, the denoising loss does not"

CLAIMS = {c.id: c for c in map(claim, f"""
fig4 | l1 | more students, better quality (DM, F_DM) | FID, K = 1, 2, 4, 8: 2.60, 2.49, 2.37, 2.32
K = #: dm 1 2 4 8
{each(BY_K, "K")}

fig5 | l1 | the same with consistency distillation | l1 falls with K (Fig. 5)
K = #: cd 1 2 4 8
{each(BY_K, "K")}

batch | l1 | better even at the same effective batch | FID: 4 x 32: 2.53, 1 x 128: 2.60
1 x 128: dm 1; 4 x 32: batch32 4; 8 x 16: batch16 8; 4 x 128: dm 4; 4 x 32, own pairs: batch32-own 4
1 x 128, 12 000 updates: steps12000 1; 4 x 32, 12 000 updates: batch32-long 4
1 x 128, XXS, 6 000 updates: batch128-XXS 1; 4 x 32, XXS, 6 000 updates: batch32-XXS 4
4 x 32 & 8 x 16 & 4 x 32, own pairs below 1 x 128
{each("4 x 32, {0} updates below 1 x 128, {0} updates", "12 000", "XXS, 6 000")}

split | l1 | consecutive and k-means both better than random | FID, K = 4: 2.37, 2.39, 2.45
consecutive, K = #: dm 2 4; k-means, K = #: kmeans 2 4; random, K = #: random 2 4
{each("consecutive, K = {0} & k-means, K = {0} below random, K = {0}", 2, 4)}

split-prompts | l1 | quadrants and k-means of embeddings better than random (toy-prompts, K = 4) | Sec. 4.2: not compared
quadrants: prompts-quadrant 4; k-means: prompts-kmeans 4; random: prompts-random 4
quadrants & k-means below random

pairs | l1 | pairs shared whole beat partitioned ones (K = 4, DM + regression) | Fig. 7: partitioned ones lose modes
{each("{0}: pairs{0} 4; {0}, own: pairs{0}-own 4; {0} below {0}, own", *MANY)}

pairs-reg | l1 | the same by regression alone: nothing else makes up for lost modes | not in the paper
{each("{0}: pairs{0}-reg 4; {0}, own: pairs{0}-own-reg 4; {0} below {0}, own", 1000, 16000)}

reg | l1 | regression or TTUR makes DM work; with neither it is worse (K = 2) | Sec. I.2, no table
regression: dm 2; TTUR 5: ttur 2; both: both 2; neither: neither 2
regression & TTUR 5 below neither

methods | l1 | DMD and DMD2 (no GAN) beat CD (K = 2, preset budgets) | FID: DMD 2.54; DMD2 2.61; CTM > 5
DMD: dm 2; DMD2: ttur 2; CD: cd 2
DMD & DMD2 below CD

adm | l1_data | ADM after DM improves on DM continued | FID 2.37 -> 1.20
DM, K = 8: dm 8; ADM, K = 8: adm 8; DM continued: continued 8
ADM, K = 8 below DM continued

tsm | l1 | small students need TSM (XS, K = 8, equal updates, TSM's of batch 384 counted) | Sec. 3.3
TSM, DM: 4000 + 3000: XS/dm 8; random, DM: 7000: XS-random 8
TSM, DM: 4000 + 3000 below random, DM: 7000

small | l1_data | small students come close to same-sized ones (K = 8; within 10 %, our margin) | FID: S 2.88, B 1.20
B: adm 8; S: S 8; XS: XS 8
S & XS below 1.1 x B

fig8 | l1_data | quality rises with student size, falls with classes covered | Fig. 8
{each("{0}, K = #: {0} 1 2 4 8; {0}, K = 8 below {0}, K = 1", "XXS", "XS", "S")}
{each("XS, K = {0} below XXS, K = {0}; S, K = {0} below XS, K = {0}", 1, 8)}

post | l1_data | the three stages beat post-distillation (XS, K = 8) | FID 2.88 against 11.67
three stages: XS 8; post-distilled: XS-post 8
three stages below post-distilled

surpass | l1_data | ADM students surpass the teacher (K = 8) | FID 1.20 against 2.32
ADM: adm 8; the teacher, 79 evaluations: adm 0
ADM below the teacher, 79 evaluations

capacity | l1 | narrower nets gain more from K (ratio of K = 8 to K = 1) | stated, not measured
{each("{0}, K = #: {0}/dm 1 8", "XXS", "XS", "S")}; B, K = #: dm 1 8
{each("{0}, K = 8 / {0}, K = 1 below {1}, K = 8 / {1}, K = 1", ("XXS", "XS"), ("XS", "S"), ("S", "B"))}

compute | l1 | K students beat one at the same total training FLOPs | asked by reviewers
1 student, 1 unit: dm 1; 4 students, 1 unit: batch32 4; 8 students, 1 unit: batch16 8
1 student, 4 units: steps12000 1; 4 students, 4 units: dm 4
4 students, 1 unit & 8 students, 1 unit below 1 student, 1 unit; 4 students, 4 units below 1 student, 4 units

diversity | mode_min | more students cover the modes more evenly: the emptiest mode's share | asked by reviewers
K = #: dm 1 2 4 8
K = 8 above K = 1

o2-n | l1_data | N students by noise level beat one at the same cost (50 % of the channels, or 70 %) | \
FID, N = 1, 4, 8: 5.32, 4.62, 4.34 | samples-o2mkd
N = #: o2 1 2 4 8; 30 % removed, N = #: o2-keep70 1 4
{each(BY_K, "N")}; 30 % removed, N = 4 below 30 % removed, N = 1

o2-loss | l1_data | it works with each loss, and each loss beats none (weights chosen on seed 0) | \
FID, N = 1: no KD 5.84, with KD 5.32 to 5.51; N = 4: 4.62 to 4.81
prediction, N = #: o2 1 4
{each("{0}, N = #: o2-{0} 1 4", *KINDS[1:])}; no KD, N = #: o2-none 1 4
{each("{0}, N = 4 below {0}, N = 1", *KINDS)}
{each("{0}, N = 1 below no KD, N = 1", *KINDS)}

o2-p | l1_data | p between 0 and 1 is best; at p = 1 a student fails outside its range (N = 4) | \
FID, p = 1 and between: alone 432 and 5.27; teacher elsewhere 4.52 and 4.33
p = 0: o2-p0 4; p = 0.25: o2-p25 4; p = 0.5: o2-p50 4; p = 0.75: o2 4; p = 1: o2-p100 4
alone, p = 0: o2-p0/alone-0 4; alone, p = 0.75: o2+/alone-0 4; alone, p = 1: o2-p100/alone-0 4
{each("teacher elsewhere, p = {0}: {1}/hybrid-0 4", (0, "o2-p0"), (0.75, "o2+"), (1, "o2-p100"))}
p = 0.75 below p = 0 & p = 1
{each("{0}, p = 0.75 below {0}, p = 1", "alone", "teacher elsewhere")}

o2-scheme | l1_data | more students on small noise help (N = 4) | FID: small 4.23, uniform 4.33, large 4.52
small: o2-small 4; uniform: o2 4; large: o2-large 4
small below uniform; uniform below large

o2-merge | l1_data | N merged students still beat one (N = 4; from one trained student, or random weights) | \
FID: N = 1: 5.32; N = 4: 4.62, merged 4.75
{each(MERGED, ("", "o2-fork"), (", p = 0.5", "o2-fork50"), (", random start", "o2+"))}
{each("merged{0} below one student{0}", "", ", p = 0.5", ", random start")}

o2-same | l1_data | it helps without compression too | FID: teacher 4.19, students 3.78
the teacher: o2-same 0; N = #: o2-same 1 4 8
N = 8 & N = 4 below the teacher; N = 4 below N = 1

o2-steps | l1_data | it holds at any number of steps; at about equal multiply-adds students beat the teacher | \
Fig. 6: DDIM, against a student without KD; below the teacher under 500 G | curve-o2mkd
{each("teacher, {1} {0} steps: o2+/{0}-{1} 0; N = #, {1} {0} steps: o2+/{0}-{1} 1 4", *STEPS)}
{each("N = 4, {1} {0} steps below N = 1, {1} {0} steps", *STEPS)}
{each("N = 4, 37 {0} steps below teacher, 10 {0} steps", "heun", "ddim")}

o2-stable | variation | relational distillation is the steadiest: a batch's loss varies least (N = 1) | \
{FIG9} | losses-o2mkd-similarity
{LOSSES}
similarity below denoising & prediction

o2-fall | fall | distillation's losses fall clearly, the denoising loss does not (N = 1) | \
{FIG9} | losses-o2mkd-similarity
{LOSSES}
similarity & prediction above denoising

o2-why | distance | the teacher's features drift gradually with sigma (Frechet distance) | Fig. 1 | drift-o2mkd
largest step: o2+/drift-neighbours 0; half the grid apart: o2+/drift-far 0
largest step below half the grid apart

o2-cost | multiply_adds | N students cost one at inference: multiply-adds of a sample in 79 evaluations | \
a step: teacher 6.1 G, students 3.3 or 1.4 G, any N
the teacher: o2/cost 0; N = #: o2/cost 1 2 4 8
N = 8 below 1.001 x N = 1; N = 8 below the teacher

o2-both | l1_data | blocks of classes x noise ranges beat either alone, with as many networks | in neither paper
# ranges: o2 4 8; 2 blocks x 2 ranges: o2-2x2 4; 4 blocks: o2-4x1 4; 4 blocks x 2 ranges: o2-4x2 8
2 blocks x 2 ranges below 4 ranges & 4 blocks; 4 blocks x 2 ranges below 8 ranges

o2-n-images | fd_data | N students by noise level beat one, on Fashion-MNIST | FID, N = 1, 4: 5.32, 4.62
the teacher: o2-fashion 0; N = #: o2-fashion 1 4
N = 4 below N = 1

o2-merge-images | fd_data | N merged students still beat one, on Fashion-MNIST | FID: N = 4 merged 4.75; N = 1 5.32
{each(MERGED, ("", "o2-fashion-fork"))}
merged & merged, c = 1/N below one student

fig4-images | fd_data | more students, better quality, on Fashion-MNIST | FID, K = 1, 4: 2.60, 2.37
K = #: fashion 1 5
K = 5 below K = 1
""".strip().split("\n\n"))}
