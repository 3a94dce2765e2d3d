"""Students, in general: what they start from, where they lie, what a stage's loop is handed, and `distil`.

A stage is a module: NAME, BY (what its best checkpoint is nearest to: "real_select", the data; "select", the teacher's
samples, but of images the data), USES (flags of others that its result depends on), length, passes, train. Not
here: a student's classes (msd.py), teacher and pairs (teacher.py).
"""
import functools
import hashlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

import common
import data
import dmd
import edm
import post
import run
import snapshot
import tsm
from common import Draws, Ranks, Student
from flags import UserError, settings, values
from run import load_json, load_tensors, save_tensors

ONE_STEP = ("post", "cd", "dm", "adm")  # stages that leave generators; the last one there is, is served


# ---- networks in files

@dataclass(frozen=True)
class Network:
    """A checkpoint: a frozen stack."""
    net: edm.Precond
    facts: data.Facts
    size: object  # a name in facts.sizes, or fields
    parts: list | None  # the students' classes; None: a teacher
    seconds: float = 0.0  # of training
    flops: float = 0.0  # of training one student, in all stages

    @functools.cached_property
    def fingerprint(self) -> str:
        return common.fingerprint(self.net)


def load_network(path) -> Network:
    """A checkpoint of ours, or NVIDIA's EDM snapshot (.pkl). UserError if it is none."""
    return _network(Path(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a stack's rows are asked for in turn
def _network(path: Path, changed: int) -> Network:
    with open(path, "rb") as file:
        pickled = file.read(1) == b"\x80"  # ours are zip files
    if pickled or path.suffix == ".pkl":
        found = snapshot.read(path)
        facts = replace(data.DATASETS["imagenet64"], name=path.name, classes=found.classes,
                        shape=(found.channels, found.resolution, found.resolution))
        D = edm.Precond(facts.net(1, found.size), found.sigma_data)
        D.net.load_state_dict(found.state)
        return Network(D.requires_grad_(False), facts, tuple(found.size), None)
    saved = load_tensors(path)
    with run.reading(path, "a checkpoint of this code"):
        facts, parts = data.facts(saved["dataset"], saved.get("resolution", 0)), saved.get("partition")
        D = edm.Precond(facts.net(len(parts or [0]), saved["size"]), facts.sigma_data, saved.get("sigma_min", 0.0),
                        saved.get("sigma_in", edm.SIGMA_MAX))
        D.load_state_dict(saved["net"])
    return Network(D.requires_grad_(False), facts, saved["size"], parts, saved.get("seconds", 0.0),
                   saved.get("flops", 0.0))


def rows_of(net: nn.Module, rows: slice, students: int) -> dict:
    """The state of some students of a stack, on the CPU."""
    return {k: (v if students == 1 else v[rows]).detach().cpu().clone() for k, v in net.state_dict().items()}


def stacked(nets: list[edm.Precond], size, facts: data.Facts, device, sigma_in: float = 0.0) -> edm.Precond:
    """One stack of these stacks of one; sigma_in: 0 = as they have it."""
    first, net = nets[0], facts.net(len(nets), size)
    out = edm.Precond(net, first.sigma_data, first.sigma_min, sigma_in or first.sigma_in).to(device)
    states = [n.state_dict() for n in nets]
    out.load_state_dict(states[0] if len(nets) == 1 else {k: torch.cat([s[k] for s in states]) for k in states[0]})
    return out


def one_of(network: Network, k: int) -> edm.Precond:
    """Student k of a stack, frozen, a stack of one."""
    stack = network.net
    if len(network.parts or [0]) == 1:
        return stack
    D = edm.Precond(network.facts.net(1, network.size), stack.sigma_data, stack.sigma_min, stack.sigma_in)
    D.load_state_dict(rows_of(stack, slice(k, k + 1), len(network.parts)))
    return D.requires_grad_(False)


# ---- starts

@dataclass(frozen=True)
class Start:
    """What one student's generator begins with."""
    name: str  # in config.json: teacher, random, or where and a hash
    size: object  # of its network
    load: Callable  # load() -> Precond, a stack of one
    flops: float = 0.0  # of its training, by the stages before


def random_start(facts: data.Facts, size, seed: int) -> Start:
    """Fresh weights, alike within a seed."""
    def load():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(edm.PYTORCH_SEED + seed)
            return edm.Precond(facts.net(1, size), facts.sigma_data).requires_grad_(False)
    return Start("random", size, load)


def start_from(home: Path, file: str, k: int, classes: tuple[int, ...] = ()) -> Start:
    """Student k of a stage's folder. UserError if it is of other classes than these."""
    place = home / f"student{k}" if (home / f"student{k}").is_dir() else home
    if not (place / file).exists():
        raise UserError(f"{place / file} is not there: train that stage, or give another --init")
    saved = load_tensors(place / file, "size", mmap=True)  # mapped: not read whole for its size
    made = repr(sorted(load_json(place / "config.json").items()))
    digest = hashlib.blake2b(made.encode(), digest_size=4).hexdigest()
    row = k if place == home else 0
    if classes and sorted(saved["partition"][row]) != sorted(classes):
        raise UserError(f"{home}: other classes; start from the same --partition")
    name = f"{home.parent.name}/{home.name} {digest}"
    return Start(name, saved["size"], lambda: one_of(load_network(place / file), row), saved.get("flops", 0.0))


def checkpoint(path: str, facts: data.Facts) -> Start:
    """--init PATH. UserError if it is not one network of this data."""
    found = load_network(path)
    if (found.facts.shape, found.facts.classes) != (facts.shape, facts.classes) or len(found.parts or [0]) > 1:
        what = f"{len(found.parts or [0])} network(s) of {found.facts.name}, {found.facts.shape}"
        raise UserError(f"--init {path}: {what}; needed: 1 of {facts.name}, {facts.shape}")
    return Start(found.fingerprint, found.size, lambda: found.net)


def first_start(flags, s: Student, given) -> Student:
    """Student s at --init, or what goes without. UserError if of another size."""
    size, without = flags.student_size or given.size, {"tsm": "random", "adm": "dm" + run.suffix(tag_of(flags))}
    without |= {"post": "random"} if flags.student_size else {}
    init = flags.init or without.get(flags.order()[0], "teacher")
    stage, _, tag = init.partition("-")
    if init == "teacher":
        start = Start("teacher", given.size, lambda: given.net)
    elif init == "random":
        start = random_start(given.facts, size, s.seed)
    elif init == "tsm":
        start = start_from(tsm_home(flags, s, size), "ema.pt", 0 if flags.tsm.common else s.k)
        start = replace(start, flops=start.flops / s.K) if flags.tsm.common else start
    elif stage in ONE_STEP:
        start = start_from(stage_folder(flags, s.seed, s.K, stage, tag), "best.pt", s.k, s.classes)
    else:
        start = checkpoint(init, given.facts)
    if start.size != size:
        raise UserError(f"--init {init}: of size {start.size}, not {size}")
    return replace(s, start=start)


# ---- folders

def tag_of(flags) -> str:
    """--tag; without one, of the size, partition and method."""
    own = [flags.student_size, split_name(flags.partition), *{"post", "cd"} & {flags.order()[-1]}]
    return flags.run.tag or "-".join(filter(None, own))


def split_name(how: str) -> str:
    """A partition as part of a tag; the paper's own is not named."""
    if how in ("consecutive", "random", "kmeans", "quadrant"):
        return how.removeprefix("consecutive")
    return "file-" + "".join(c for c in Path(how).stem if c.isalnum() or c in "_-")[:40]


def stage_folder(flags, seed: int, K: int, stage: str, tag: str | None = None) -> Path:
    """OUT/seedS/studentsK[-TAG]/STAGE."""
    name = f"students{K}{run.suffix(tag_of(flags) if tag is None else tag)}"
    return Path(flags.run.out) / f"seed{seed}" / name / stage


def tsm_home(flags, s: Student, size) -> Path:
    """seed0/tsm/XS-4000, common to all, or the student's own stage folder."""
    if not flags.tsm.common:
        return stage_folder(flags, s.seed, s.K, "tsm")
    name = f"{size if isinstance(size, str) else 'teacher'}-{flags.tsm.steps}"
    return Path(flags.run.out) / f"seed{s.seed}" / "tsm" / (name + "-generated" * (flags.real == "generated"))


def home_of(stage, flags, s: Student) -> Path:
    """The folder of a student's stage."""
    if stage is edm:
        return Path(flags.run.out) / f"seed{s.seed}" / "teacher"
    return tsm_home(flags, s, s.start.size) if stage is tsm else stage_folder(flags, s.seed, s.K, stage.NAME)


def config(stage, flags, s: Student, given) -> dict:
    """What determines a student of this stage, but for K and the partition: its config.json."""
    if stage is edm:
        return {k: v for k, v in given.lineage.items() if k not in ("teacher", "cfg")}
    out = {**(given.ancestry if stage.BY else given.lineage), **settings(flags, stage.NAME, stage.USES)}
    if out.get("real") == "generated":
        out |= values(flags.teacher, "sampler_steps") | values(flags.dm, "pairs")
    own = {"size": s.start.size} if stage is tsm else {"start": s.start.name}
    if stage is dmd:
        own = {} if s.start.name == "teacher" else {**own, "student_size": flags.student_size}
    if stage is post:
        own |= {"imitated": imitated(flags, s).name, "post_steps": post.length(flags)[0]}
    return {**out, **own}


def imitated(flags, s: Student) -> Start:
    """Whom post-distillation copies: the namesake of full size after ADM."""
    return start_from(stage_folder(flags, s.seed, s.K, "adm", split_name(flags.partition)), "best.pt", s.k, s.classes)


# ---- what a loop is handed

class Selection:
    """select(G) -> [M]: distances of each student's samples of its own classes from the reference's [MSD App. E].

    by: "select" or "real_select"; latents are not the reported ones. Ranks share the samples."""

    def __init__(self, by: str, students: list[Student], inputs: dict, samples: int, ranks: Ranks):
        given = inputs[students[0].seed]
        self.facts, self.judge, self.ranks = given.facts, given.judge, ranks
        self.name = self.facts.metric + "_data" * (by == "real_select")
        self.students, self.samples = students, samples - samples % ranks.size
        self.references = {seed: g.references[by] for seed, g in inputs.items()}

    @torch.no_grad()
    def __call__(self, G) -> Tensor:
        draws, n = Draws("select", self.students, self.ranks.device), self.samples
        label = torch.stack([c[data.stratified(n, len(c))] for c in draws.classes])
        z, part = draws.normal(0, "z", n, *self.facts.shape), self.ranks.parts(n)[0]
        chunks = zip(*(v[:, part].split(min(4096, self.facts.chunk), 1) for v in (z, label)))
        x = torch.cat([dmd.one_step(G, a, b) for a, b in chunks], 1)
        x = self.ranks.gather(x.transpose(0, 1)).transpose(0, 1)
        self.seen = x[:, :0 if self.facts.stacked else 20].half().cpu()  # of the same latents, for progress.png
        return torch.tensor([self.judge.distance(self.judge.statistics(a, c), self.references[s.seed], s.classes)
                             for s, a, c in zip(self.students, x, label)])


class Task:
    """What a stage's loop is handed, for a stack of M students; each network is made when the loop asks for it."""

    def __init__(self, stage, students: list[Student], shares: list, inputs: dict, flags, ranks: Ranks):
        self.flags, self.students, self.shares = flags, students, shares
        self.given = [inputs[s.seed] for s in students]  # [M]: each student's teacher and data
        self.facts, self.device = self.given[0].facts, ranks.device
        self.sigma_in = flags.dm.conditioning_sigma if stage.BY else edm.SIGMA_MAX
        if stage.BY:
            self.select = Selection(stage.BY, students, inputs, flags.dm.select_samples, ranks)
        of_real = [replace(s, classes=tuple(D.real.tolist())) for s, D in zip(students, shares)]
        self.draws = Draws(stage.NAME, of_real, ranks.device)

    @functools.cached_property
    def G(self) -> edm.Precond:
        """The stack of networks to train, at its start."""
        return self._stack([s.start for s in self.students], self.sigma_in)

    def _stack(self, starts: list[Start], sigma_in: float = 0.0) -> edm.Precond:
        return stacked([s.load() for s in starts], starts[0].size, self.facts, self.device, sigma_in)

    def _teachers(self) -> edm.Precond:
        return stacked([g.net for g in self.given], self.given[0].size, self.facts, self.device)

    @functools.cached_property
    def teacher_net(self) -> edm.Precond:
        """The teacher's networks, unguided, frozen: with features."""
        return self.given[0].net if len(self.given) == 1 else self._teachers().requires_grad_(False)

    @functools.cached_property
    def teacher(self) -> Callable:
        """mu_teacher(x, sigma, label) -> [M, b, *shape]: guided, frozen."""
        return self.given[0].guided(None if self.given[0].exact else self.teacher_net)

    @functools.cached_property
    def mu_fake(self) -> edm.Precond:
        """A stack of the teacher's networks to train, whatever the generators' size is."""
        return self._teachers()

    @functools.cached_property
    def imitated(self) -> edm.Precond:
        """For post.py: the one-step students to imitate, frozen."""
        return self._stack([imitated(self.flags, s) for s in self.students]).requires_grad_(False)

    @functools.cached_property
    def distance(self):
        """l of the regression: a name, or LPIPS."""
        return dmd.lpips_distance(self.device) if self.flags.dm.distance == "lpips" else self.flags.dm.distance

    def pairs(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        """z, y [M, b, *shape] and label [M, b], of D_k's pairs; one stream, however many these are."""
        drawn = batch.integers("pair", 0, 2 ** 62 - 1)
        pick = [D.pairs.to(p.device)[p % len(D.pairs)] for D, p in zip(self.shares, drawn)]  # [M] of [b]

        def of(name: str) -> Tensor:
            return torch.stack([given.pairs[name][0, p] for given, p in zip(self.given, pick)])
        z = of("z")
        return z, of("y").to(z.dtype), of("label")

    def real(self, batch, at: int | None = None) -> tuple[Tensor, Tensor]:
        """Real data x [M, b, *shape] and labels [M, b], of D_k's classes; at: number of the draw, if not the step."""
        return self.given[0].real().batch(self.draws, batch.step if at is None else at, batch.size, batch.part)


# ---- a stage

class Data(NamedTuple):
    """D, or a share D_k = F(D, Y_k). Indices only: the tensors are shared."""
    pairs: Tensor  # which of D_paired, the teacher's (z, y)
    pair_label: Tensor  # classes of all pairs
    real: Tensor  # classes of D_real
    conditions: Tensor  # C: classes that G is asked for


def whole(facts: data.Facts, pairs: int = 0) -> Data:
    """D of a dataset."""
    classes = torch.arange(facts.classes)
    return Data(torch.arange(pairs), data.stratified(pairs, facts.classes), classes, classes)


def distil(stage, students: list[Student], shares: list, inputs: dict, flags, ranks: Ranks, home=home_of,
           more=lambda s: {}) -> list[Student]:
    """G_k = Distill(mu_teacher, D_k) for all k [MSD Eq. 1]: trained, or reused; the students, each at its new start.

    shares: D_k of each; inputs: {seed: teacher.Given}; home(stage, flags, s): its folder; more(s): more of config.json.
    The toy's students train as one stack, on all ranks; image students of one K go to ranks of their own."""
    given, files, trainees = inputs[students[0].seed], ("best.pt", "ema.pt") if stage.BY else ("ema.pt",), students
    facts, shared = given.facts, stage is tsm and flags.tsm.common  # shared: one network a seed
    if stage is tsm:
        size = flags.student_size or given.size
        trainees = [replace(s, start=random_start(facts, size, s.seed)) for s in students]
    if shared:
        trainees = [replace(s, K=1, k=0, classes=tuple(range(facts.classes))) for s in trainees]
    folders: dict[Path, list] = {}  # {folder: [(student, D_k)]}
    for s, D in dict(zip(trainees, shares)).items():  # equal ones, of a common TSM, once
        place = home(stage, flags, s)
        folder = place if facts.stacked or stage is edm else place / f"student{s.k}"
        asked = replace(s, classes=tuple(D.conditions.tolist()))  # C of D_k: the classes that it is asked for
        folders.setdefault(folder, []).append((asked, D))
    with run.alone(list(folders), ranks):
        for folder, rows in folders.items():
            s, own = rows[0][0], {}
            if stage is not edm:
                stack, single = {"partition": [s.classes for s, _ in rows]}, {"student": s.k, "classes": s.classes}
                own = {"students": s.K, **(stack if facts.stacked else single), **more(s)}
            run.check_config(folder, {**config(stage, flags, s, inputs[s.seed]), **own})
            if run.finished(folder, files) and ranks.rank == 0:
                print(f"{folder}: already trained, reused")
        todo = ranks.first(lambda: run.unfinished(list(folders), files, facts.stacked))
        if facts.stacked:
            for group in todo:
                _train(stage, {folder: folders[folder] for folder in group}, inputs, flags, ranks)
        else:
            for _, of_home in itertools.groupby(folders, lambda folder: folder.parent):
                of_home = list(of_home)
                mine, own_ranks = ranks.split(len(of_home))
                for folder in (of_home[i] for i in mine if [of_home[i]] in todo):
                    _train(stage, {folder: folders[folder]}, inputs, flags, own_ranks)
        ranks.wait()
    after = [start_from(home(stage, flags, t), files[0], t.k) for t in trainees]
    return [replace(s, start=replace(a, flops=a.flops / s.K if shared else a.flops)) for s, a in zip(students, after)]


def _train(stage, folders: dict, inputs: dict, flags, ranks: Ranks) -> None:
    """Train these folders' students {folder: [(student, D_k)]} as one stack, and save their weights there."""
    slices, everyone = {}, []
    for folder, rows in folders.items():
        slices[folder] = slice(len(everyone), len(everyone) + len(rows))
        everyone += rows
    students, shares = map(list, zip(*everyone))
    first, facts = students[0], inputs[students[0].seed].facts
    title = stage.NAME if facts.stacked or stage is edm else f"{stage.NAME}, {first}"
    training = run.Run(stage.NAME, students, slices, *stage.length(flags), facts.shape, flags.run.save_every,
                       flags.run.micro_batch, ranks, title, facts.stacked and stage is dmd,
                       facts.name == "toy" and ranks.device.type == "cpu")
    kept = stage.train(training, flags, Task(stage, students, shares, inputs, flags, ranks))
    for folder, slots in slices.items() if training.main else ():
        about = {"dataset": facts.name, "resolution": facts.resolution, "size": first.start.size,
                 "seconds": training.seconds(), "flops": training.flops + students[slots][0].start.flops}
        about |= {} if stage is edm else {"partition": [s.classes for s in students[slots]]}
        for file, net in kept.items():
            about |= {"sigma_min": net.sigma_min, "sigma_in": net.sigma_in}
            save_tensors(folder / file, {**about, "net": rows_of(net, slots, len(students))})
        print(f"{folder}: trained", flush=True)


# ---- of a finished stage

@dataclass
class Students:
    """K trained generators: a stack, or images' networks, read when asked for."""
    facts: data.Facts
    parts: list[Tensor]  # Y_1 … Y_K
    stack: edm.Precond | None
    files: list[Path]
    seconds: float  # of training, all together
    flops: float
    device: str | torch.device = "cpu"

    def to(self, device) -> "Students":
        self.device = device
        if self.stack is not None:
            self.stack.to(device)
        return self

    def __getitem__(self, k: int) -> edm.Precond:
        return load_network(self.files[k]).net.to(self.device)


def load_students(folder, file: str = "best.pt") -> Students:
    """A stage folder (seed0/students8/adm), or the last stage of seed0/students8. OSError if one is not trained."""
    folder = Path(folder)
    folder = next((folder / stage for stage in reversed(ONE_STEP) if list((folder / stage).glob(f"**/{file}"))), folder)
    files = [folder / file]
    if list(folder.glob("student[0-9]*")):
        number = load_json(folder / "student0" / "config.json", "students")["students"]
        files = [folder / f"student{k}" / file for k in range(number)]
    saved = [load_tensors(path, "dataset", "partition", mmap=True) for path in files]
    facts = data.facts(saved[0]["dataset"], saved[0].get("resolution", 0))
    parts = [torch.tensor(Y_k) for s in saved for Y_k in s["partition"]]
    seconds = sum(s.get("seconds", 0.0) for s in saved)
    flops = sum(s.get("flops", 0.0) * len(s["partition"]) for s in saved)
    return Students(facts, parts, load_network(files[0]).net if facts.stacked else None, files, seconds, flops)
