"""The claims of both papers, as data: what a paper says, which runs test it, which of their rows are compared.

A run is a command; runs share teachers, pairs and one run folder, and all its K and seeds train as one stack.
An entry names rows of a run: "K = #: batch32 2 4" are "K = 2" and "K = 4", what run batch32 measures of 2 and of 4
students after its last stage; XS/dm 4: after another; of 0 students: of the teacher, or once.
A comparison is "A below B" or "A above B", of two names; a side may also be "1.1 x A", or the ratio "A / B".

Not here: what trains and judges them (reproduce.py). Cut with their flags, with the rows that were measured in
docs/findings.md: ADM against DM continued with regression, and against a GAN from the start.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One row: of run `run`, after `stage`, with K students."""
    name: str
    run: str
    stage: str
    K: int


@dataclass(frozen=True)
class Claim:
    """One claim: `comparisons` of its entries' `metric`."""
    id: str
    text: str
    paper: str
    entries: tuple[Entry, ...]
    comparisons: tuple[str, ...]
    metric: str = "l1"
    curves: bool = False                   # do training curves stand beside the dots?
    picture: str = ""                      # a figure of the first entry's run folder that belongs to it


# --------------------------------------------------------------------------------------------------------------- runs

PAIRS = "--students 4 --preset few-pairs --pairs"
SMALL = "--students 1 2 4 8 --stages tsm,dm,adm --student-size"
XXS = "--student-size XXS --init random --steps 6000 --reg-warmup 2000 --students"
PROMPTS = "--dataset toy-prompts --students 4 --partition"
FORK = "--students 1 4 --merge --init o2mkd1 --lr"
RUNS = {                                   # in their order; o2mkd… are commands of o2mkd.py, the others of msd.py
    "dm": "--students 1 2 4 8",
    "cd": "--students 1 2 4 8 --stages cd",
    "batch32": "--students 4 --batch 32",
    "batch16": "--students 8 --batch 16",
    "batch32-own": "--students 4 --batch 32 --filter-pairs",
    "batch32-long": "--students 4 --batch 32 --steps 12000 --reg-warmup 4000 --fake-warmup 1600",
    "batch128-XXS": f"{XXS} 1",
    "batch32-XXS": f"{XXS} 4 --batch 32",
    "steps12000": "--students 1 --steps 12000 --reg-warmup 4000 --fake-warmup 1600",     # four times all of dm
    "random": "--students 2 4 --partition random",
    "kmeans": "--students 2 4 --partition kmeans",
    **{f"pairs{n}": f"{PAIRS} {n}" for n in (250, 1000, 4000, 16000)},
    **{f"pairs{n}-own": f"{PAIRS} {n} --filter-pairs" for n in (250, 1000, 4000, 16000)},
    **{f"pairs{n}-reg": f"{PAIRS} {n} --dm-weight 0" for n in (1000, 16000)},
    **{f"pairs{n}-own-reg": f"{PAIRS} {n} --filter-pairs --dm-weight 0" for n in (1000, 16000)},
    "ttur": "--students 2 --reg-weight 0 --ttur 5",
    "both": "--students 2 --ttur 5",
    "neither": "--students 2 --reg-weight 0",
    "adm": "--students 8 --stages dm,adm",
    "continued": "--students 8 --stages adm --init dm --gan-weight 0",
    "S": f"{SMALL} S",
    "XS": f"{SMALL} XS",
    "XXS": f"{SMALL} XXS",
    "XS-random": "--students 8 --student-size XS --stages dm --init random --steps 7000",
    "XS-post": "--students 8 --student-size XS --stages post",
    **{f"prompts-{how}": f"{PROMPTS} {how}" for how in ("random", "kmeans", "quadrant")},
    "fashion": "--dataset fashion-mnist --students 1 5",
    "o2mkd": "--students 1 2 4 8",
    "o2mkd+": "--students 1 4 --merge --inspect 0 --curve 10 20 37",       # 37 cost what the teacher's 10 do
    "o2mkd-p0": "--students 4 --p 0 --inspect 0",
    "o2mkd-p25": "--students 4 --p 0.25",
    "o2mkd-p50": "--students 4 --p 0.5",
    "o2mkd-p100": "--students 4 --p 1 --inspect 0",
    **{f"o2mkd-{kd}": f"--students 1 4 --kd {kd}" for kd in ("attention", "similarity", "contrastive")},
    "o2mkd-none": "--students 1 4 --kd-weight 0",
    "o2mkd-small": "--students 4 --scheme small",
    "o2mkd-large": "--students 4 --scheme large",
    "o2mkd-fork": f"{FORK} 2e-3",
    "o2mkd-fork50": f"{FORK} 2e-3 --p 0.5",
    "o2mkd-same": "--students 1 4 8 --keep 1",
    "o2mkd-keep70": "--students 1 4 --keep 0.7",
    "o2mkd-2x2": "--students 4 --ranges 2",
    "o2mkd-4x1": "--students 4 --ranges 1",
    "o2mkd-4x2": "--students 8 --ranges 2",
    "o2mkd-fashion": "--dataset fashion-mnist --students 1 4",
    "o2mkd-fashion-fork": f"{FORK} 1e-3 --dataset fashion-mnist",
}
UNTAGGED = ("dm", "adm", "fashion", "o2mkd", "o2mkd+", "o2mkd-fashion")    # adm, o2mkd+: more of the same students
FEWER = {"cd": 2, "S": 3, "XS": 3, "XXS": 3, "prompts-random": 3, "prompts-kmeans": 3, "prompts-quadrant": 3}  # seeds
AFTER = {                                  # whose students a run starts from, or adds to
    "adm": ("dm",), "continued": ("dm",), "XS-post": ("dm", "adm"), "o2mkd+": ("o2mkd",), "o2mkd-fork": ("o2mkd",),
    "o2mkd-fork50": ("o2mkd",), "o2mkd-fashion-fork": ("o2mkd-fashion",),
}


def last_stage(run: str) -> str:
    """The stage that a run ends with."""
    words = RUNS[run].split()
    if run.startswith("o2mkd"):
        return "o2mkd"
    return words[words.index("--stages") + 1].split(",")[-1] if "--stages" in words else "dm"


# ------------------------------------------------------------------------------------------------------------- claims

def each(text: str, *values) -> str:
    """The text once for every value that its {} takes."""
    return "; ".join(text.format(*(v if isinstance(v, tuple) else (v,))) for v in values)


def entry(text: str) -> list[Entry]:
    """NAME: RUN K …, or NAME: RUN/STAGE K …; # in the name stands for K."""
    name, rows = text.strip().rsplit(": ", 1)
    place, *numbers = rows.split()
    run, _, stage = place.partition("/")
    return [Entry(name.replace("#", K), run, stage or last_stage(run), int(K)) for K in numbers]


def claim(id: str, text: str, paper: str, entries: str, comparisons: str, *metric: str, **more) -> Claim:
    """A claim whose entries and comparisons are told as texts, with semicolons between them."""
    rows = sum(map(entry, entries.split(";")), [])
    return Claim(id, text, paper, tuple(rows), tuple(c.strip() for c in comparisons.split(";")), *metric, **more)


BY_K = "{0} = 8 below {0} = 1; {0} = 2 below {0} = 1; {0} = 4 below {0} = 2; {0} = 8 below {0} = 4"
MERGED = "before{0}: {1} 4; merged{0}: {1}/merged 4; merged, c = 1/N{0}: {1}/merged-mean 4; one student{0}: {1} 1"
LOSSES = ("similarity: o2mkd-similarity/loss-similarity 1; prediction: o2mkd+/loss-prediction 1;"
          "denoising: o2mkd+/loss-denoising 1")
FIG9 = "Fig. 9: relational KD steady and falling, prediction KD unsteady but falling, the denoising loss neither"

CLAIMS = {c.id: c for c in (
    claim("fig4", "more students, better one-step quality (DM, F_DM)", "FID, K = 1, 2, 4, 8: 2.60, 2.49, 2.37, 2.32",
        "K = #: dm 1 2 4 8", each(BY_K, "K")),
    claim("fig5", "more students, better quality, with consistency distillation too", "l1 falls with K (Fig. 5)",
        "K = #: cd 1 2 4 8", each(BY_K, "K"), curves=True),
    claim("batch", "better even at the same effective batch", "FID: 4 x 32: 2.53, 1 x 128: 2.60",
        "1 x 128: dm 1; 4 x 32: batch32 4; 8 x 16: batch16 8; 4 x 128: dm 4; 4 x 32, own pairs: batch32-own 4;"
        "1 x 128, 12 000 updates: steps12000 1; 4 x 32, 12 000 updates: batch32-long 4;"
        "1 x 128, XXS, 6 000 updates: batch128-XXS 1; 4 x 32, XXS, 6 000 updates: batch32-XXS 4",
        "4 x 32 below 1 x 128; 8 x 16 below 1 x 128; 4 x 32, own pairs below 1 x 128;"
        + each("4 x 32, {0} updates below 1 x 128, {0} updates", "12 000", "XXS, 6 000"), curves=True),
    claim("split", "consecutive and k-means both better than random", "FID, K = 4: 2.37, 2.39, 2.45",
        "consecutive, K = #: dm 2 4; k-means, K = #: kmeans 2 4; random, K = #: random 2 4",
        each("consecutive, K = {0} below random, K = {0}; k-means, K = {0} below random, K = {0}", 2, 4)),
    claim("split-prompts", "quadrants and k-means of embeddings better than random (toy-prompts, K = 4)",
        "Sec. 4.2: quadrants for text, not compared",
        "quadrants: prompts-quadrant 4; k-means: prompts-kmeans 4; random: prompts-random 4",
        "quadrants below random; k-means below random"),
    claim("pairs", "paired data shared whole beat partitioned (K = 4, DM + regression)",
        "Fig. 7: partitioned pairs lose modes and end worse",
        each("{0}: pairs{0} 4; {0}, own: pairs{0}-own 4", 250, 1000, 4000, 16000),
        each("{0} below {0}, own", 250, 1000, 4000, 16000)),
    claim("pairs-reg", "the same by regression alone, where nothing else can make up for lost modes",
        "not in the paper", each("{0}: pairs{0}-reg 4; {0}, own: pairs{0}-own-reg 4", 1000, 16000),
        each("{0} below {0}, own", 1000, 16000)),
    claim("reg", "regression (with its warm-up) or TTUR makes DM work; with neither it is worse (K = 2)",
        "Sec. I.2, no table", "regression: dm 2; TTUR 5: ttur 2; both: both 2; neither: neither 2",
        "regression below neither; TTUR 5 below neither", curves=True),
    claim("methods",
        "DMD and DMD2 (without GAN) strike a good balance, CD is worse (K = 2, each with its preset's budget)",
        "FID and images seen: DMD 2.54, 130M; DMD2 2.61, 110M; CTM > 5, 3M",
        "DMD: dm 2; DMD2: ttur 2; CD: cd 2", "DMD below CD; DMD2 below CD", curves=True),
    claim("adm", "ADM after DM improves on DM continued", "FID 2.37 -> 1.20",
        "DM, K = 8: dm 8; ADM, K = 8: adm 8; DM continued: continued 8", "ADM, K = 8 below DM continued", "l1_data"),
    claim("tsm",
        "small students do not converge properly without TSM (XS, K = 8, equal updates, TSM's of batch 384 counted)",
        "Sec. 3.3", "TSM, DM: 4000 + 3000: XS/dm 8; random, DM: 7000: XS-random 8",
        "TSM, DM: 4000 + 3000 below random, DM: 7000"),
    claim("small", "small students (TSM, DM, ADM) come close to same-sized ones (within 10 %, K = 8)",
        "FID: S 2.88, B 1.20", "B: adm 8; S: S 8; XS: XS 8",
        "S below 1.1 x B; XS below 1.1 x B", "l1_data"),                   # the margin is ours
    claim("fig8", "quality rises with student size, falls with classes covered", "Fig. 8",
        "XXS, K = #: XXS 1 2 4 8; XS, K = #: XS 1 2 4 8; S, K = #: S 1 2 4 8",
        each("{0}, K = 8 below {0}, K = 1", "XXS", "XS", "S") + ";"
        + each("XS, K = {0} below XXS, K = {0}; S, K = {0} below XS, K = {0}", 1, 8), "l1_data"),
    claim("post", "the three stages beat post-distillation (XS, K = 8)", "FID 2.88 against 11.67",
        "three stages: XS 8; post-distilled: XS-post 8", "three stages below post-distilled", "l1_data"),
    claim("surpass", "ADM students surpass the teacher (K = 8)", "FID 1.20 against 2.32",
        "ADM: adm 8; the teacher, 79 evaluations: adm 0", "ADM below the teacher, 79 evaluations", "l1_data"),
    claim("capacity", "K's gain is one of capacity: narrower nets gain more (ratio of K = 8 to K = 1)",
        "stated, not measured",
        "XXS, K = #: XXS/dm 1 8; XS, K = #: XS/dm 1 8; S, K = #: S/dm 1 8; B, K = #: dm 1 8",
        each("{0}, K = 8 / {0}, K = 1 below {1}, K = 8 / {1}, K = 1", ("XXS", "XS"), ("XS", "S"), ("S", "B"))),
    claim("compute", "K students against one at K times the compute: same total training FLOPs", "asked by reviewers",
        "1 student, 1 unit: dm 1; 4 students, 1 unit: batch32 4; 8 students, 1 unit: batch16 8;"
        "1 student, 4 units: steps12000 1; 4 students, 4 units: dm 4",
        "4 students, 1 unit below 1 student, 1 unit; 8 students, 1 unit below 1 student, 1 unit;"
        "4 students, 4 units below 1 student, 4 units"),
    claim("diversity", "more students cover the modes more evenly: the emptiest mode's share", "asked by reviewers",
        "K = #: dm 1 2 4 8", "K = 8 above K = 1", "mode_min"),

    claim("o2-n", "N students by noise level beat one of the same size at the same inference cost "
        "(half of the channels; also 30 % removed)", "FID by relational KD, N = 1, 4, 8: 5.32, 4.62, 4.34",
        "N = #: o2mkd 1 2 4 8; 30 % removed, N = #: o2mkd-keep70 1 4",
        each(BY_K, "N") + "; 30 % removed, N = 4 below 30 % removed, N = 1", "l1_data", picture="samples-o2mkd"),
    claim("o2-loss",
        "it works with each distillation loss, and each loss beats none (their weights were chosen on seed 0)",
        "FID, N = 1 -> 4: 5.36 -> 4.73, 5.51 -> 4.81, 5.32 -> 4.62, 5.44 -> 4.75; without KD 5.84",
        "prediction, N = #: o2mkd 1 4; attention, N = #: o2mkd-attention 1 4; similarity, N = #: o2mkd-similarity 1 4;"
        "contrastive, N = #: o2mkd-contrastive 1 4; no KD, N = #: o2mkd-none 1 4",
        each("{0}, N = 4 below {0}, N = 1", "prediction", "attention", "similarity", "contrastive") + ";"
        + each("{0}, N = 1 below no KD, N = 1", "prediction", "attention", "similarity", "contrastive"), "l1_data"),
    claim("o2-p", "p = 0 and p = 1 are both worse than between; p = 1 fails outside its range "
        "(N = 4; student 0 alone, or with the teacher elsewhere)",
        "FID of one student, p = 1 and between: alone 432 and 5.27; teacher elsewhere 4.52 and 4.33",
        "p = 0: o2mkd-p0 4; p = 0.25: o2mkd-p25 4; p = 0.5: o2mkd-p50 4; p = 0.75: o2mkd 4; p = 1: o2mkd-p100 4;"
        + each("{0}, p = 0: o2mkd-p0/{1} 4; {0}, p = 0.75: o2mkd+/{1} 4; {0}, p = 1: o2mkd-p100/{1} 4",
               ("alone", "alone-0"), ("teacher elsewhere", "hybrid-0")),
        "p = 0.75 below p = 0; p = 0.75 below p = 1; alone, p = 0.75 below alone, p = 1;"
        "teacher elsewhere, p = 0.75 below teacher elsewhere, p = 1", "l1_data"),
    claim("o2-scheme", "more students on small noise help (N = 4)", "FID: small 4.23, uniform 4.33, large 4.52",
        "small: o2mkd-small 4; uniform: o2mkd 4; large: o2mkd-large 4",
        "small below uniform; uniform below large", "l1_data"),
    claim("o2-merge", "N students merged into one are still better than one student "
        "(N = 4; all from one trained student, or from random weights)",
        "FID, N = 4: 4.62 before, 4.75 after; one student 5.32",
        each(MERGED, ("", "o2mkd-fork"), (", p = 0.5", "o2mkd-fork50"), (", random start", "o2mkd+")),
        each("merged{0} below one student{0}", "", ", p = 0.5", ", random start"), "l1_data"),
    claim("o2-same", "it helps without compression: students of the teacher's size that start from it",
        "FID: teacher 4.19, students 3.78", "the teacher: o2mkd-same 0; N = #: o2mkd-same 1 4 8",
        "N = 8 below the teacher; N = 4 below the teacher; N = 4 below N = 1", "l1_data"),
    claim("o2-steps", "it holds at any number of sampling steps (here against one distilled student); "
        "at about equal multiply-adds students beat the teacher",
        "Fig. 6: at every number of DDIM steps, against a student without KD; below the teacher under 500 G",
        each("teacher, {1} {0} steps: o2mkd+/{0}-{1} 0; N = #, {1} {0} steps: o2mkd+/{0}-{1} 1 4",
             ("heun", 10), ("heun", 20), ("heun", 37), ("ddim", 10), ("ddim", 20), ("ddim", 37)),
        each("N = 4, 10 {0} steps below N = 1, 10 {0} steps; N = 4, 20 {0} steps below N = 1, 20 {0} steps;"
             "N = 4, 37 {0} steps below N = 1, 37 {0} steps; N = 4, 37 {0} steps below teacher, 10 {0} steps",
             "heun", "ddim"), "l1_data", picture="curve-o2mkd"),
    claim("o2-stable", "relational distillation is the steadiest supervision: "
        "coefficient of variation of a batch's loss (one student)", FIG9,
        LOSSES, "similarity below denoising; similarity below prediction", "variation",
        picture="losses-o2mkd-similarity"),
    claim("o2-fall", "both kinds of distillation fall clearly, the denoising loss does not: "
        "relative fall from the first twentieth of the training to the last (one student)",
        FIG9, LOSSES, "similarity above denoising; prediction above denoising", "fall",
        picture="losses-o2mkd-similarity"),
    claim("o2-why", "the teacher's feature distributions drift with sigma, gradually: Frechet distance of "
        "the bottleneck's features, the largest between neighbouring levels of 21 below the mean of levels half the "
        "grid apart", "Fig. 1, no numbers",
        "largest step: o2mkd+/drift-neighbours 0; half the grid apart: o2mkd+/drift-far 0",
        "largest step below half the grid apart", "distance", picture="drift-o2mkd"),
    claim("o2-cost", "N students keep N times the weights, but a sample costs one student: "
        "multiply-adds of a sample in 79 evaluations", "CIFAR-10, a step: teacher 6.1 G, students 3.3 or 1.4 G, any N",
        "the teacher: o2mkd/cost 0; N = #: o2mkd/cost 1 2 4 8",
        "N = 8 below 1.001 x N = 1; N = 8 below the teacher", "multiply_adds"),
    claim("o2-both",
        "both ideas at once: blocks of classes x noise ranges beat either alone, at the same number of networks",
        "in neither paper", "# ranges: o2mkd 4 8; 2 blocks x 2 ranges: o2mkd-2x2 4; 4 blocks: o2mkd-4x1 4;"
        "4 blocks x 2 ranges: o2mkd-4x2 8",
        "2 blocks x 2 ranges below 4 ranges; 2 blocks x 2 ranges below 4 blocks; 4 blocks x 2 ranges below 8 ranges",
        "l1_data"),
    claim("o2-n-images", "N students by noise level beat one, on Fashion-MNIST (ours: FD, our classifier)",
        "FID, N = 1, 4: 5.32, 4.62", "the teacher: o2mkd-fashion 0; N = #: o2mkd-fashion 1 4",
        "N = 4 below N = 1", "fd_data"),
    claim("o2-merge-images", "N students merged into one are still better than one student, on Fashion-MNIST",
        "FID, N = 4: 4.62 before, 4.75 after; one student 5.32", each(MERGED, ("", "o2mkd-fashion-fork")),
        "merged below one student; merged, c = 1/N below one student", "fd_data"),
    claim("fig4-images", "more students, better quality, on Fashion-MNIST (ours: FD, our classifier)",
        "FID, K = 1, 4: 2.60, 2.37", "K = #: fashion 1 5", "K = 5 below K = 1", "fd_data"),
)}
