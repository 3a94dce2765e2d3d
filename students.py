"""Students, in general: what they start from, where they lie, what a stage's loop is handed, and `distil`.

The toy's students of all K and seeds train as one stack (one batched matmul a layer), images' students one by one, or
on ranks of their own. A stage is a module: NAME, BY (the distance that chooses its best checkpoint), USES (flags of
others that its result depends on), length, train. Not here: a student's classes (msd.py), teacher and pairs
(teacher.py). """
import contextlib
import functools
import hashlib
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
import unet
from common import Draws, Ranks, Student
from flags import UserError, settings, values
from run import load_json, load_tensors, save_json, save_tensors

ONE_STEP = ("post", "cd", "dm", "adm")  # stages that leave generators; the last one there is, is served


# --------------------------------------------------- networks in files

@dataclass(frozen=True)
class Network:
    """A checkpoint: a frozen stack, and what the file says about it."""
    net: edm.Precond
    facts: data.Facts
    size: object  # of a network: a name in facts.sizes, or its fields
    parts: list | None  # the students' classes; None: a teacher
    seconds: float = 0.0  # of training


def load_network(path) -> Network:
    """A checkpoint of ours, or NVIDIA's EDM snapshot (.pkl); no code of the file is run. UserError if it is none."""
    path = Path(path)
    return _network(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a stack's rows are asked for one after another; a GPU may not hold 64 students
def _network(path: Path, changed: int) -> Network:
    if path.suffix == ".pkl":
        found = snapshot.read(path)
        D = edm.Precond(unet.UNet(found.resolution, found.channels, found.classes, found.size), found.sigma_data)
        D.net.load_state_dict(found.state)
        facts = replace(data.DATASETS["imagenet64"], name=path.name, classes=found.classes,
                        shape=(found.channels, found.resolution, found.resolution))
        return Network(D.requires_grad_(False), facts, tuple(found.size), None)
    saved = load_tensors(path)
    try:
        facts, parts = data.facts(saved["dataset"], saved.get("resolution", 0)), saved.get("partition")
        D = edm.Precond(facts.net(len(parts or [0]), saved["size"]), facts.sigma_data, saved.get("sigma_min", 0.0))
        D.load_state_dict(saved["net"])
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise UserError(f"{path}: not a checkpoint of this code (teacher/ema.pt, students8/dm/best.pt …)") from None
    return Network(D.requires_grad_(False), facts, saved["size"], parts, saved.get("seconds", 0.0))


def rows_of(net: nn.Module, rows: slice, students: int) -> dict:
    """The state of some students of a stack, on the CPU; a stack of one is taken whole."""
    return {k: (v if students == 1 else v[rows]).detach().cpu().clone() for k, v in net.state_dict().items()}


def stacked(nets: list[edm.Precond], size, facts: data.Facts, device) -> edm.Precond:
    """One stack of these stacks of one, all of this size."""
    out = edm.Precond(facts.net(len(nets), size), nets[0].sigma_data, nets[0].sigma_min).to(device)
    states = [n.state_dict() for n in nets]
    out.load_state_dict(states[0] if len(nets) == 1 else {k: torch.cat([s[k] for s in states]) for k in states[0]})
    return out


def one_of(network: Network, k: int) -> edm.Precond:
    """Student k of a stack, frozen, a stack of one."""
    if len(network.parts or [0]) == 1:
        return network.net
    D = edm.Precond(network.facts.net(1, network.size), network.net.sigma_data, network.net.sigma_min)
    D.load_state_dict(rows_of(network.net, slice(k, k + 1), len(network.parts)))
    return D.requires_grad_(False)


# -------------------------------------------------------------- starts

@dataclass(frozen=True)
class Start:
    """What one student's generator begins with."""
    name: str  # for config.json: teacher, random, or where and a hash
    size: object  # of its network
    load: Callable  # load() -> Precond, a stack of one


def random_start(facts: data.Facts, size, seed: int) -> Start:
    """Fresh weights, the same for all students of a seed; ToyNet's are the same for all seeds."""
    def load():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(edm.PYTORCH_SEED + seed)
            return edm.Precond(facts.net(1, size), facts.sigma_data).requires_grad_(False)
    return Start("random", size, load)


def start_from(home: Path, file: str, k: int, classes: tuple[int, ...] = ()) -> Start:
    """Student k of a stage's folder. UserError if it is of other classes than these; OSError if it is not there."""
    place = home / f"student{k}" if (home / f"student{k}").is_dir() else home
    saved = load_tensors(place / file, mmap=True)  # mapped: not read whole for its size
    digest = hashlib.blake2b(repr(sorted(load_json(place / "config.json").items())).encode(), digest_size=4).hexdigest()
    row = k if place == home else 0
    if classes and sorted(saved["partition"][row]) != sorted(classes):
        raise UserError(f"{home}: its student {k} has other classes; start from students of the same --partition")
    name = f"{home.parent.name}/{home.name} {digest}"
    return Start(name, saved["size"], lambda: one_of(load_network(place / file), row))


def checkpoint(path: str, facts: data.Facts) -> Start:
    """--init PATH: a teacher's or a single student's checkpoint. UserError if of other data, or a stack of several."""
    found = load_network(path)
    if (found.facts.shape, found.facts.classes) != (facts.shape, facts.classes) or len(found.parts or [0]) > 1:
        raise UserError(f"--init {path}: {len(found.parts or [0])} network(s) of {found.facts.name}; needed is one of "
                        f"{facts.name}, {facts.shape}")
    return Start(common.fingerprint(found.net), found.size, lambda: found.net)


def first_start(flags, s: Student, given) -> Student:
    """Student s at what its first stage starts from: --init, else the teacher's weights, for adm the dm stage.

    UserError if it is not there, or of another size."""
    first, size = flags.order()[0], flags.student_size or given.size
    init = flags.init or {"tsm": "random", "adm": "dm" + run.suffix(tag_of(flags))}.get(
        first, "random" if first == "post" and flags.student_size else "teacher")
    stage, _, tag = init.partition("-")
    if init == "teacher":
        start = Start("teacher", given.size, lambda: given.net)
    elif init == "random":
        start = random_start(given.facts, size, s.seed)
    elif init == "tsm":
        start = start_from(tsm_home(flags, s, size), "ema.pt", 0 if flags.tsm.common else s.k)
    elif stage in ONE_STEP:
        start = start_from(stage_folder(flags, s.seed, s.K, stage, tag), "best.pt", s.k, s.classes)
    else:
        start = checkpoint(init, given.facts)
    if start.size != size:
        raise UserError(f"--init {init}: of size {start.size}, not {size}; give another --student-size")
    return replace(s, start=start)


# ----------------------------------------------------------------- folders

def tag_of(flags) -> str:
    """--tag; without one, smaller students, other partitions and methods have folders of their own."""
    last = flags.order()[-1]
    own = [flags.student_size, split_name(flags.partition), last if last in ("post", "cd") else ""]
    return flags.run.tag or "-".join(filter(None, own))


def split_name(how: str) -> str:
    """A partition as part of a tag: nothing for the paper's own, its name, or file-NAME."""
    known = {"consecutive": "", "random": "random", "kmeans": "kmeans", "quadrant": "quadrant"}
    return known.get(how, "file-" + "".join(c for c in Path(how).stem if c.isalnum() or c in "_-")[:40])


def stage_folder(flags, seed: int, K: int, stage: str, tag: str | None = None) -> Path:
    """OUT/seedS/studentsK[-TAG]/STAGE; tag: another than this run's."""
    tag = tag_of(flags) if tag is None else tag
    return Path(flags.run.out) / f"seed{seed}" / f"students{K}{run.suffix(tag)}" / stage


def tsm_home(flags, s: Student, size) -> Path:
    """Where a TSM network lies: seed0/tsm/XS-4000, common to all, or in the student's own stage folder."""
    if not flags.tsm.common:
        return stage_folder(flags, s.seed, s.K, "tsm")
    name = size if isinstance(size, str) else "teacher"
    generated = "-generated" * (flags.real == "generated")
    return Path(flags.run.out) / f"seed{s.seed}" / "tsm" / f"{name}-{flags.tsm.steps}{generated}"


def home_of(stage, flags, s: Student) -> Path:
    """The folder of a student's stage, for msd.py's stages."""
    if stage is edm:
        return Path(flags.run.out) / f"seed{s.seed}" / "teacher"
    return tsm_home(flags, s, s.start.size) if stage is tsm else stage_folder(flags, s.seed, s.K, stage.NAME)


def config(stage, flags, s: Student, given) -> dict:
    """What determines a student of this stage, but for K and the partition: its config.json."""
    out = {**(given.ancestry if stage.BY else given.lineage), **settings(flags, stage.NAME, stage.USES)}
    if "real" in out and out["real"] == "generated":
        out |= values(flags.teacher, "sampler_steps") | values(flags.dm, "pairs")
    if stage is edm:
        return {k: v for k, v in out.items() if k not in ("teacher", "cfg") and (k != "label_dropout" or v)}
    if stage is tsm:
        return {**out, "size": s.start.size}
    if stage is dmd and s.start.name == "teacher":
        return out
    if stage is dmd:
        out["student_size"] = flags.student_size
    if stage is post:
        out |= {"imitated": imitated(flags, s).name, "post_steps": post.length(flags)[0]}
    return {**out, "start": s.start.name}


def imitated(flags, s: Student) -> Start:
    """The student that post-distillation copies: its namesake after ADM, of full size, with the partition's tag."""
    home = stage_folder(flags, s.seed, s.K, "adm", split_name(flags.partition))
    return start_from(home, "best.pt", s.k, s.classes)


# ----------------------------------------------- what a loop is handed

class Selection:
    """select(G) -> [M]: the distance of each student's samples of its own classes from the reference's [MSD App. E].

    by: the reference, "select" (of images: the data) or "real_select"; toy: another draw than the reported one, as the
    latents are. Ranks share the samples."""

    def __init__(self, by: str, students: list[Student], inputs: dict, samples: int, ranks: Ranks):
        given = inputs[students[0].seed]
        self.facts, self.judge, self.ranks = given.facts, given.judge, ranks
        self.name = self.facts.metric + "_data" * (by == "real_select")
        self.of, self.students = students, len(students)
        self.samples = samples - samples % ranks.size
        self.references = {seed: g.references[by] for seed, g in inputs.items()}

    @torch.no_grad()
    def __call__(self, G) -> Tensor:
        draws, n = Draws("select", self.of, self.ranks.device), self.samples
        label = torch.stack([c[torch.arange(n, device=c.device) % len(c)] for c in draws.classes])
        z, part = draws.normal(0, "z", n, *self.facts.shape), self.ranks.parts(n)[0]
        chunk = min(4096, self.facts.chunk)
        chunks = zip(z[:, part].split(chunk, 1), label[:, part].split(chunk, 1))
        x = torch.cat([dmd.one_step(G, a, b) for a, b in chunks], 1)
        x = self.ranks.gather(x.transpose(0, 1)).transpose(0, 1)
        distance = [self.judge.distance(self.judge.statistics(a, c), self.references[s.seed], s.classes)
                    for s, a, c in zip(self.of, x, label)]
        return torch.tensor(distance)


class Task:
    """What a stage's loop is handed, for a stack of M students; each network is made when the loop asks for it."""

    def __init__(self, stage, students: list[Student], shares: list, inputs: dict, flags, ranks: Ranks):
        self.flags, self.students, self.shares, self.inputs = flags, students, shares, inputs
        self.given = [inputs[s.seed] for s in students]  # [M]: each student's teacher and data
        self.facts, self.device = self.given[0].facts, ranks.device
        if stage.BY:
            self.select = Selection(stage.BY, students, inputs, flags.dm.select_samples, ranks)
        self.draws = Draws(stage.NAME, [replace(s, classes=tuple(D.real.tolist())) for s, D in zip(students, shares)],
                           ranks.device)

    @functools.cached_property
    def G(self) -> edm.Precond:
        """The stack of networks to train, at its start."""
        return stacked([s.start.load() for s in self.students], self.students[0].start.size, self.facts, self.device)

    @functools.cached_property
    def teacher_net(self) -> edm.Precond:
        """The teacher's networks, unguided, frozen, as a stack: with features."""
        known = self.given[0].net
        return known if len(self.given) == 1 else self._teachers().requires_grad_(False)

    def _teachers(self) -> edm.Precond:
        return stacked([g.net for g in self.given], self.given[0].size, self.facts, self.device)

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
        """post.py: the one-step students to imitate, frozen."""
        starts = [imitated(self.flags, s) for s in self.students]
        return stacked([s.load() for s in starts], starts[0].size, self.facts, self.device).requires_grad_(False)

    @functools.cached_property
    def distance(self):
        """l of the regression: a name, or LPIPS."""
        name = self.flags.dm.distance
        return dmd.lpips_distance(self.device) if name == "lpips" else name

    @functools.cached_property
    def _pairs(self) -> tuple[dict, Tensor]:
        """D_paired {"z", "y": [seeds, N, *shape], "label": [seeds, N]}, and each student's row of it, [M, 1]."""
        seeds = list(dict.fromkeys(s.seed for s in self.students))
        of_seed = [self.inputs[seed].pairs for seed in seeds]
        joined = of_seed[0] if len(seeds) == 1 else {k: torch.cat([p[k] for p in of_seed]) for k in of_seed[0]}
        return joined, torch.tensor([[seeds.index(s.seed)] for s in self.students], device=self.device)

    def pairs(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        """z, y [M, b, *shape] and label [M, b]: pairs drawn from those of D_k; one stream, however many these are."""
        tensors, row = self._pairs
        drawn = batch.integers("pair", 0, 2 ** 62 - 1)
        own = [D.pairs.to(drawn.device) for D in self.shares]
        pick = torch.stack([index[p % len(index)] for index, p in zip(own, drawn)])  # [M, b]
        z, y, label = (tensors[k][row, pick] for k in ("z", "y", "label"))
        return z, y.to(z.dtype), label

    def real(self, batch, at: int | None = None) -> tuple[Tensor, Tensor]:
        """Real data x [M, b, *shape] in [-1, 1] and labels [M, b], of D_k's classes; at: another step's."""
        at = batch.step if at is None else at
        return self.given[0].real().batch(self.draws, at, batch.size, batch.part)


# ------------------------------------------------------------- a stage

class Data(NamedTuple):
    """D, or a student's share D_k = F(D, Y_k) of it. Indices only: the tensors are shared."""
    pairs: Tensor  # which of D_paired, the teacher's (z, y)
    pair_label: Tensor  # the class of each of all pairs
    real: Tensor  # classes of D_real
    conditions: Tensor  # C: classes that G is asked for


def whole(facts: data.Facts, pairs: int = 0, real: Tensor | None = None) -> Data:
    """D of a dataset; real: its classes that there are data of."""
    classes = torch.arange(facts.classes)
    return Data(torch.arange(pairs), data.stratified(pairs, facts.classes), classes if real is None else real, classes)


def distil(stage, students: list[Student], shares: list, inputs: dict, flags, ranks: Ranks, home=home_of,
           more=lambda s: {}) -> list[Student]:
    """G_k = Distill(mu_teacher, D_k) for all k [MSD Eq. 1]: trained, or reused; the students, each at its new start.

    shares: D_k of each student; inputs: {seed: teacher.Given}; home(stage, flags, s): its folder; more(s): what its
    config.json also holds. The toy's students train as one stack, on all ranks; images have a folder per student, and
    the students of one K go to ranks of their own."""
    facts, files = inputs[students[0].seed].facts, ("best.pt", "ema.pt") if stage.BY else ("ema.pt",)
    trainees = students
    if stage is tsm:  # from random weights; of all, one network a seed
        size, classes = flags.student_size or inputs[students[0].seed].size, tuple(range(facts.classes))
        trainees = [replace(s, start=random_start(facts, size, s.seed)) for s in students]
        if flags.tsm.common:
            trainees = [replace(s, K=1, k=0, classes=classes) for s in trainees]
    sets: dict[Path, dict[Path, list]] = {}  # {home: {folder: [(student, D_k)]}}
    for s, D in dict(zip(trainees, shares)).items():  # equal students, of a common TSM, once
        place = home(stage, flags, s)
        folder = place if facts.stacked or stage is edm else place / f"student{s.k}"
        sets.setdefault(place, {}).setdefault(folder, []).append((replace(s, classes=tuple(D.conditions.tolist())), D))
    folders = {folder: rows for of_home in sets.values() for folder, rows in of_home.items()}
    for folder, rows in folders.items():
        s = rows[0][0]
        own = {"partition": [s.classes for s, _ in rows]} if facts.stacked else {"student": s.k, "classes": s.classes}
        own = {} if stage is edm else {"students": s.K, **own, **more(s)}
        run.check_config(folder, {**config(stage, flags, s, inputs[s.seed]), **own})
        if run.finished(folder, files) and ranks.rank == 0:
            print(f"{folder}: already trained, reused")
    shared = stage is tsm and flags.tsm.common  # jobs of an array share it
    with run.alone(flags.run.out, ranks) if shared else contextlib.nullcontext():
        todo = ranks.first(lambda: run.unfinished(list(folders), files, facts.stacked))
        if facts.stacked or stage is edm:
            for group in todo:
                _train(stage, {folder: folders[folder] for folder in group}, inputs, flags, ranks)
        else:
            for of_home in sets.values():
                mine, own_ranks = ranks.split(len(of_home))
                for i in mine:
                    folder = list(of_home)[i]
                    if [folder] in todo:
                        _train(stage, {folder: folders[folder]}, inputs, flags, own_ranks)
        ranks.wait()
    return [replace(s, start=start_from(home(stage, flags, t), files[0], t.k)) for s, t in zip(students, trainees)]


def _train(stage, folders: dict, inputs: dict, flags, ranks: Ranks) -> None:
    """As one stack, which leaves its weights in these folders {folder: [(student, D_k)]}."""
    slices, students, shares = {}, [], []
    for folder, rows in folders.items():
        slices[folder] = slice(len(students), len(students) + len(rows))
        students += [s for s, _ in rows]
        shares += [D for _, D in rows]
    facts, first, (steps, batch) = inputs[students[0].seed].facts, students[0], stage.length(flags)
    title = stage.NAME if facts.stacked or stage is edm else f"{stage.NAME}, student {first.k} of {first.K}"
    training = run.Run(stage.NAME, students, slices, steps, batch, facts.shape, flags.run.save_every,
                       flags.run.micro_batch, ranks, title)
    kept = stage.train(training, flags, Task(stage, students, shares, inputs, flags, ranks))
    for folder, rows in slices.items() if training.main else ():
        about = {"dataset": facts.name, "resolution": facts.resolution, "size": first.start.size,
                 "seconds": training.seconds()}
        about |= {} if stage is edm else {"partition": [s.classes for s in students[rows]]}
        save_json(folder / "done.json", {"seconds": training.seconds()})
        for file, D in kept.items():
            about |= {"sigma_min": D.sigma_min} if D.sigma_min else {}
            save_tensors(folder / file, {**about, "net": rows_of(D, rows, len(students))})


# ----------------------------------------------------------------- of a finished stage

@dataclass
class Students:
    """The K trained generators of one stage folder: a stack, or, of images, networks that are read when asked for."""
    facts: data.Facts
    parts: list[Tensor]  # Y_1 … Y_K
    stack: edm.Precond | None
    files: list[Path]
    seconds: float  # of training, all together
    device: str | torch.device = "cpu"

    def to(self, device) -> "Students":
        self.device = device
        if self.stack is not None:
            self.stack.to(device)
        return self

    def __getitem__(self, k: int) -> edm.Precond:
        """Image student k, frozen."""
        return load_network(self.files[k]).net.to(self.device)


def load_students(folder, file: str = "best.pt") -> Students:
    """Read a students' stage folder (seed0/students8/adm), or the last stage in their folder.

    Of image students only the list of classes is read now. UserError if one is not trained yet."""
    folder = Path(folder)
    folder = next((folder / stage for stage in reversed(ONE_STEP) if list((folder / stage).glob(f"**/{file}"))), folder)
    own = sorted(folder.glob("student[0-9]*"), key=lambda p: int(p.name.removeprefix("student")))
    if not own:
        found = load_network(folder / file)
        return Students(found.facts, [torch.tensor(p) for p in found.parts or ()], found.net, [], found.seconds)
    about = [load_json(f / "config.json", "students", "student", "classes", "dataset") for f in own]
    missing = {*range(about[0]["students"])} - {a["student"] for a, f in zip(about, own) if (f / file).exists()}
    if missing:
        raise UserError(f"{folder}: student {min(missing)} is not trained yet; run it first (--student {min(missing)})")
    seconds = sum(load_json(f / "done.json", "seconds")["seconds"] for f in own)
    facts = data.facts(about[0]["dataset"], about[0].get("resolution", 0))
    return Students(facts, [torch.tensor(a["classes"]) for a in about], None, [f / file for f in own], seconds)
