"""mu_teacher and what its samples give: loaded or trained, guided, solved into pairs and references.

`prepare` makes it, or reuses the run folder's. --teacher: train; a checkpoint; NVIDIA's .pkl; exact: the toy's closed
form, with weights by TSM. Not here: training (edm.py), distances (evaluate.py).
"""
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import data
import dmd
import edm
import evaluate
import fid
import run
import students
import tsm
from common import Ranks, Student, generator
from flags import UserError, values

CONFLICTS = [  # for flags.check
    (lambda f: f.teacher.cfg != 1 and f.teacher.which == "train" and f.teacher.label_dropout == 0,
     "--cfg {f.teacher.cfg}: needs a teacher of --label-dropout 0.1"),
    (lambda f: f.teacher.which == "exact" and not data.DATASETS[f.run.dataset].exact,
     "--teacher exact: {f.run.dataset} has no closed form"),
    (lambda f: f.run.eval_samples < 2 * data.DATASETS[f.run.dataset].classes,
     "--eval-samples {f.run.eval_samples}: at least two per class"),
    (lambda f: data.DATASETS[f.run.dataset].classes == 1 and not f.run.features,
     "--features: NVIDIA's Inception is needed; our classifier has nothing to learn from one class"),
]


@dataclass
class Given:
    """What every student of a seed is handed."""
    seed: int
    facts: data.Facts
    source: Callable  # source() -> the data
    lineage: dict  # flags that determine mu_teacher
    exact: bool  # the closed form?
    cfg: float  # guidance scale
    size: object = None  # of the teacher's network
    net: edm.Precond | None = None  # its network, frozen, a stack of one
    D: students.Data = None  # the paper's D: which pairs, real data and classes
    real: Callable = None  # real() -> D_real: the data, or the teacher's samples
    judge: evaluate.Judge = None
    pairs: dict = field(default_factory=dict)  # {"z", "y": [1, N, *shape], "label": [1, N]}
    references: dict = field(default_factory=dict)  # "select", "report", "real" …: statistics; floors
    ancestry: dict = field(default_factory=dict)  # flags that determine teacher, start, judge

    def guided(self, D=None) -> Callable:
        """mu_teacher(x, sigma, label) of the networks D, or the closed form, with guidance [Ho and Salimans 2022]:
        D(x; none) + cfg (D(x; label) - D(x; none)). Students and mu_fake are not guided."""
        D = D or self.facts.exact
        if self.cfg == 1:
            return D

        def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            free = D(x, sigma, None)
            return free + self.cfg * (D(x, sigma, label) - free)
        return denoise

    @property
    def mu_teacher(self) -> Callable:
        """As distillation sees it: denoiser (x, sigma, label) -> [1, N, *shape]."""
        return self.guided(None if self.exact else self.net)

    def embeddings(self) -> Tensor:
        """The conditions' [classes, d]: of the dataset, or the teacher."""
        return self.facts.embeddings() if self.facts.embeddings else self.net.net.label_embeddings().cpu()


def prepare(flags, ranks: Ranks, students_by_class: bool = True, churn=edm.Churn()) -> dict[int, Given]:
    """{seed: Given}. For msd.py also pairs, and weights for the closed form. churn: of the references."""
    facts, churn = data.facts(flags.run.dataset, flags.run.resolution), vars(churn) if churn.S_churn else {}
    source, t, exact = data.opened(flags.run, ranks), flags.teacher, flags.teacher.which == "exact"
    network = None if t.which in ("train", "exact") else loaded(flags, facts)
    origin = {"dataset": facts.name, "teacher": network.fingerprint if network else t.which}
    origin |= {"resolution": facts.resolution} if facts.native else {}
    if t.which == "train":
        origin |= {k: v for k, v in values(t).items() if k != "label_dropout" or v}
    origin |= {"cfg": t.cfg} if t.cfg != 1 else {}
    size, net = (network.size, network.net.to(ranks.device)) if network else (t.size or "B", None)
    given = {seed: Given(seed, facts, source, {**origin, "seed": seed}, exact, t.cfg, size, net, real=source)
             for seed in flags.run.all_seeds()}
    only = students_by_class and flags.order() == ["teacher"]
    with run.alone([Path(flags.run.out) / "data"], ranks):  # jobs of an array share it
        if not facts.stacked:
            _at_hand(flags, source(), ranks, students_by_class)
            data.same_data(flags.run, source())
        judge = None if only else evaluate.judge(flags.run, source, ranks)
    if t.which == "train" or exact and students_by_class:
        _networks(flags, given, ranks)
    if only:
        return {}
    for g in given.values():
        g.judge, g.ancestry = judge, {**g.lineage, **churn}
        g.ancestry |= {} if facts.stacked else {"features": Path(flags.run.features).name or "classifier"}
        if students_by_class:
            if exact:  # what determines the weights that TSM makes
                of_tsm = values(flags.tsm) | {"tsm_decay": t.decay}
                g.ancestry["weights of exact"] = [of_tsm, t.noise_law, t.P_mean, t.P_std, t.size, flags.init]
            folder, n = Path(flags.run.out) / f"seed{g.seed}" / "pairs", flags.dm.pairs
            made = solve(folder / str(n), "pairs", n, g, t.sampler_steps, ranks)
            g.pairs = {k: v.to(ranks.device) for k, v in made.items()}  # D_paired
        g.references = _references(flags, g, ranks, churn)
    if not students_by_class:
        return given
    D, real = students.whole(facts, flags.dm.pairs), source
    if flags.real == "generated":
        y, label = (torch.cat([g.pairs[k] for g in given.values()]) for k in ("y", "label"))
        generated = data.Generated(y, label, list(given))
        D, real = D._replace(real=D.pair_label.unique()), lambda: generated
    for g in given.values():
        g.D, g.real = D, real
    return given


# ---- networks

def loaded(flags, facts: data.Facts) -> students.Network:
    """--teacher PATH. UserError if it is no teacher of this data, or none for --cfg."""
    path = Path(flags.teacher.which)
    found = students.load_network(path)
    if found.parts is not None or (found.facts.shape, found.facts.classes) != (facts.shape, facts.classes):
        kind = "students" if found.parts else f"{found.facts.name}, {found.facts.shape}, {found.facts.classes} classes"
        raise UserError(f"--teacher {path}: of {kind}; needed: {facts.name}, {facts.shape}, {facts.classes} classes")
    beside = path.with_name("config.json")
    if flags.teacher.cfg != 1 and not (beside.exists() and run.load_json(beside).get("label_dropout")):
        raise UserError(f"--cfg {flags.teacher.cfg}: {path} was not trained with --label-dropout")
    return found


def _at_hand(flags, images: data.Images, ranks: Ranks, students_by_class: bool) -> None:
    """Is at hand what is wanted later?"""
    classes = data.facts(flags.run.dataset).classes
    least = 4 if classes == 1 else 2  # precision and recall want four in all
    for _, label, rows in images.truth(0, flags.run.eval_samples):
        count = torch.bincount(label[rows], minlength=classes)
        if count.min() < least:
            few = ", ".join(f"{c}: {count[c]}" for c in (count < least).nonzero()[:8, 0])
            raise UserError(f"images of a class: {least} or more are wanted to report by, as many to choose by "
                            f"(--eval-samples); there are {few}")
    if ranks.rank == 0 and flags.run.features:
        fid.Inception(flags.run.features, ranks.device)
    if ranks.rank == 0 and students_by_class and dmd.with_lpips(flags):
        dmd.lpips_distance("cpu")
    ranks.wait()


def _networks(flags, given: dict[int, Given], ranks: Ranks) -> None:
    """Train the teachers; for the closed form networks by TSM."""
    facts, stage = next(iter(given.values())).facts, edm
    if flags.teacher.which == "exact":
        if Path(flags.init).is_file() and (start := students.checkpoint(flags.init, facts)).size == "B":
            for g in given.values():
                g.net = start.load().to(ranks.device)
            return
        stage = tsm
        flags = replace(flags, real="data", student_size="", tsm=replace(flags.tsm, common=True))
    everyone = [Student(seed, 1, 0, tuple(range(facts.classes)), students.random_start(facts, g.size, seed))
                for seed, g in given.items()]
    for s in students.distil(stage, everyone, [students.whole(facts)] * len(everyone), given, flags, ranks):
        given[s.seed].net = s.start.load().to(ranks.device)


# ---- samples of the teacher

def make_pairs(teacher, z: Tensor, label: Tensor, steps: int, chunk: int = 8192, **other) -> Tensor:
    """y [..., N, *shape], on the CPU: where the teacher's ODE takes unit-variance latents z, of label [..., N]
    [MSD App. D.2.1]. other: edm.heun's order and churn."""
    lead = label.ndim - 1
    chunks = zip(z.split(chunk, lead), label.split(chunk, lead))
    return torch.cat([edm.heun(teacher, a, b, steps, **other).cpu() for a, b in chunks], lead)


def solve(folder: Path, purpose: str, number: int, given: Given, steps: int, ranks: Ranks, churn: dict = {}) -> dict:
    """N samples of the teacher with their latents, {"z", "y": [1, N, *shape], "label": [1, N]}, made once.

    Only y is kept, in files of facts.chunk samples (images as float16), which the ranks share out."""
    facts = given.facts
    z = torch.randn(1, number, *facts.shape, generator=generator(given.seed, purpose))
    label = data.stratified(number, facts.classes)[None]
    parts = list(zip(z.split(facts.chunk, 1), label.split(facts.chunk, 1)))
    with run.alone([folder], ranks):
        asked = {"pairs" if purpose == "pairs" else "eval_samples": number}
        run.check_config(folder, {**given.lineage, "sampler_steps": steps, **asked, **churn})
        todo = [i for i in ranks.share(len(parts)) if not run.shard(folder, purpose, i).exists()]
        for i in run.bar(todo, f"sampling ({purpose})", ranks.rank > 0):
            g = dict(churn, generator=generator(given.seed, purpose, i, device=ranks.device)) if churn else {}
            y = make_pairs(given.mu_teacher, *(v.to(ranks.device) for v in parts[i]), steps, **g)[0]
            run.save_tensors(run.shard(folder, purpose, i), {"y": y if facts.stacked else y.half()})
        ranks.wait()
    y = run.load_shards(folder, purpose, len(parts))
    if y.shape != z.shape[1:]:
        raise UserError(f"{folder}: damaged; without it, it is made anew")
    return {"z": z, "y": y[None], "label": label}


def _references(flags, given: Given, ranks: Ranks, churn: dict) -> dict:
    """Statistics of the teacher's samples and the data; floors: two draws of one."""
    facts, judge, number, steps = given.facts, given.judge, flags.run.eval_samples, flags.teacher.sampler_steps
    folder = Path(flags.run.out) / f"seed{given.seed}" / "reference"

    def drawn(purpose: str) -> tuple[Tensor, Tensor]:
        made = solve(folder, purpose, number, given, steps, ranks, churn)
        return made["y"][0], made["label"][0]
    truth = judge.truth(given.seed, number)
    if facts.stacked:
        select, report = (judge.statistics(*drawn(purpose)) for purpose in ("select", "report"))
        return truth | {"select": select, "report": report, "floor": judge.distance(select, report)}
    y, label = drawn("report")
    out = truth | {"select": truth["real_select"]}  # by the data [MSD App. E]
    if ranks.rank == 0:  # who reports
        half = number // 2
        a, b = (judge.statistics(y[part], label[part]) for part in (slice(half), slice(half, None)))
        out |= {"report": evaluate.Features([*a.pieces, *b.pieces], label), "floor": judge.distance(a, b)}
    return out
