"""mu_teacher and what its samples give: loaded or trained, guided, solved into pairs and references.

Everything here is made, or reused from the run folder, before any student trains: `prepare`. --teacher train; a
checkpoint of ours; NVIDIA's .pkl; exact: the toy's closed form, with weights made by TSM. Not here: the training
(edm.py), the distances (evaluate.py).
"""
import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import common
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


CONFLICTS = [  # (is it so?, what to say), for flags.check
    (lambda f: f.teacher.cfg != 1 and f.teacher.which == "train" and f.teacher.label_dropout == 0,
     "--cfg {f.teacher.cfg}: the teacher never learns to do without a class; give --label-dropout 0.1 too"),
    (lambda f: f.teacher.which == "exact" and not data.DATASETS[f.run.dataset].exact,
     "--teacher exact: {f.run.dataset} has no closed form; train one or give a checkpoint's path"),
    (lambda f: f.run.eval_samples < 2 * data.DATASETS[f.run.dataset].classes,
     "--eval-samples {f.run.eval_samples}: at least two per class"),
]


@dataclass
class Given:
    """What every student of a seed is handed."""
    seed: int
    facts: data.Facts
    source: Callable  # source() -> the data, read when first asked for
    lineage: dict  # the flags that determine mu_teacher
    exact: bool  # is mu_teacher the closed form?
    cfg: float  # guidance scale
    size: object = None  # of the teacher's network
    net: edm.Precond | None = None  # its network, frozen, a stack of one
    D: students.Data = None  # the paper's D: which pairs, real data and classes
    real: Callable = None  # real() -> D_real: the data, or the teacher's samples
    judge: evaluate.Judge = None
    pairs: dict = field(default_factory=dict)  # {"z", "y": [1, N, *shape], "label": [1, N]}
    references: dict = field(default_factory=dict)  # "select", "report", "real", "real_select": statistics; floors
    ancestry: dict = field(default_factory=dict)  # the flags that determine teacher, start and judge

    def guided(self, D=None) -> Callable:
        """mu_teacher(x, sigma, label) of the networks D, or the closed form, with guidance [Ho and Salimans 2022]:
        D(x; none) + cfg (D(x; label) - D(x; none)). Students and mu_fake are not guided: they learn the guided one."""
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
        """The conditions' [classes, d]: the dataset's table, or the label embeddings that the teacher has learnt."""
        return self.facts.embeddings() if self.facts.embeddings else self.net.net.label_embeddings().cpu()


def prepare(flags, ranks: Ranks, students_by_class: bool = True) -> dict[int, Given]:
    """{seed: Given}. For students by class (msd.py) also weights where the closed form has none, and pairs."""
    facts = data.facts(flags.run.dataset, flags.run.resolution)
    source, t, exact = data.opened(flags.run, ranks), flags.teacher, flags.teacher.which == "exact"
    network = None if t.which in ("train", "exact") else _loaded(flags, facts)
    origin = {"dataset": facts.name, **({"resolution": facts.resolution} if facts.native else {})}
    if t.which == "train":
        origin |= {"teacher": "train", **{k: v for k, v in values(t).items() if k != "label_dropout" or v}}
    else:
        origin["teacher"] = "exact" if exact else common.fingerprint(network.net)
    origin |= {"cfg": t.cfg} if t.cfg != 1 else {}
    size = network.size if network else t.size or facts.sizes[0]
    given = {seed: Given(seed, facts, source, {**origin, "seed": seed}, exact, t.cfg, size, real=source)
             for seed in flags.run.all_seeds()}
    with run.alone(flags.run.out, ranks):  # jobs of an array share all this
        if not facts.stacked:
            data.same_data(flags.run, source())
            _at_hand(flags, ranks, students_by_class)
        for g in given.values():
            g.net = network.net.to(ranks.device) if network else None
        if t.which == "train" or exact and students_by_class:
            _networks(flags, given, ranks)
        if students_by_class and flags.order() == ["teacher"]:
            return {}
        judge = evaluate.judge(flags.run, source, ranks)
        for g in given.values():
            g.judge = judge
            g.ancestry = {**g.lineage}
            if not facts.stacked:
                g.ancestry["features"] = Path(flags.run.features).name or "classifier"
            if students_by_class:
                g.ancestry |= _weights_of_exact(flags) if exact else {}
                g.pairs = _pairs(flags, g, ranks)
            g.references = _references(flags, g, ranks)
        if students_by_class and flags.real == "generated":
            y, label = (torch.cat([g.pairs[k] for g in given.values()]) for k in ("y", "label"))
            generated = data.Generated(y, label, list(given))
            for g in given.values():
                g.real = lambda: generated
        for g in given.values() if students_by_class else ():
            present = None if facts.stacked and flags.real == "data" else g.real().label.unique().cpu()
            g.D = students.whole(facts, flags.dm.pairs, present)
    return given


# ------------------------------------------------------------ networks

def _loaded(flags, facts: data.Facts) -> students.Network:
    """--teacher PATH. UserError if it is a student's, or of other data, or --cfg asks it what it has not learnt."""
    path = Path(flags.teacher.which)
    found = students.load_network(path)
    if found.parts is not None or (found.facts.shape, found.facts.classes) != (facts.shape, facts.classes):
        kind = "students" if found.parts else f"{found.facts.name}, {found.facts.shape}, {found.facts.classes} classes"
        raise UserError(f"--teacher {path}: of {kind}; needed is a teacher of {facts.name}, {facts.shape}, "
                        f"{facts.classes} classes")
    beside = path.with_name("config.json")
    if flags.teacher.cfg != 1 and not (beside.exists() and run.load_json(beside).get("label_dropout")):
        raise UserError(f"--cfg {flags.teacher.cfg}: {path} was not trained with --label-dropout, as far as known, so "
                        f"its answer without a class means nothing")
    return found


def _at_hand(flags, ranks: Ranks, students_by_class: bool) -> None:
    """Is what is wanted hours from now at hand: the Inception network, LPIPS?"""
    if ranks.rank == 0 and flags.run.features:
        fid.Inception(flags.run.features, ranks.device)
    if ranks.rank == 0 and students_by_class and flags.dm.distance == "lpips":
        if {"post", "cd"} & {*flags.order()} or "dm" in flags.order() and flags.dm.reg_weight > 0:
            dmd.lpips_distance("cpu")
    ranks.wait()


def _networks(flags, given: dict[int, Given], ranks: Ranks) -> None:
    """Train the teachers (or reuse them), or, for the closed form, networks of its scores by TSM."""
    facts, stage = next(iter(given.values())).facts, edm
    if flags.teacher.which == "exact":
        if Path(flags.init).is_file() and (start := students.checkpoint(flags.init, facts)).size == facts.sizes[0]:
            for g in given.values():
                g.net = start.load().to(ranks.device)
            return
        if ranks.rank == 0:
            print("teacher exact: no weights to start from; TSM of the teacher's size makes them")
        stage = tsm
        flags = replace(flags, real="data", student_size="", tsm=replace(flags.tsm, common=True))
    everyone = [Student(seed, 1, 0, tuple(range(facts.classes)), students.random_start(facts, g.size, seed))
                for seed, g in given.items()]
    trained = students.distil(stage, everyone, [students.whole(facts)] * len(everyone), given, flags, ranks)
    for s in trained:
        given[s.seed].net = s.start.load().to(ranks.device)
        folder = students.home_of(stage, flags, s)
        if facts.exact and stage is edm and ranks.rank == 0 and not (folder / "error.json").exists():
            _compare(given[s.seed].net, facts, s.seed, folder)


def _weights_of_exact(flags) -> dict:
    """What determines the weights that TSM makes for the closed form."""
    t = flags.teacher
    return {"weights of exact": [{**values(flags.tsm), "tsm_decay": t.decay}, t.noise_law, t.P_mean, t.P_std, t.size,
                                 flags.init]}


# ---------------------------------------------- samples of the teacher

def make_pairs(teacher, z: Tensor, label: Tensor, steps: int, chunk: int = 8192) -> Tensor:
    """y [..., N, *shape]: where the teacher's deterministic ODE takes each unit-variance latent z [MSD App. D.2.1].

    label is [..., N]. Serves the paired data D_paired as well as the teacher's own samples."""
    lead = label.ndim - 1
    chunks = zip(z.split(chunk, lead), label.split(chunk, lead))
    return torch.cat([edm.heun(teacher, a, b, steps) for a, b in chunks], lead)


def solve(folder: Path, purpose: str, number: int, given: Given, steps: int, ranks: Ranks) -> dict:
    """N samples of the teacher with their latents, {"z", "y": [1, N, *shape], "label": [1, N]}, made once and kept.

    Only y is stored, in files of facts.chunk samples (images as float16) that the ranks share out: what is there is not
    made again. z follows from the seed and the purpose, the label from the index."""
    facts = given.facts
    z = torch.randn(1, number, *facts.shape, generator=generator(given.seed, purpose))
    label = data.stratified(number, facts.classes)[None]
    parts = list(zip(z.split(facts.chunk, 1), label.split(facts.chunk, 1)))
    todo = [i for i in ranks.share(len(parts)) if not run.shard(folder, purpose, i).exists()]
    if todo and ranks.rank == 0:
        print(f"{folder}: {number} samples of the teacher ({purpose}), {steps} Heun steps …", flush=True)
    for i in run.bar(todo, f"sampling ({purpose})", len(todo), ranks.rank > 0):
        y = make_pairs(given.mu_teacher, parts[i][0].to(ranks.device), parts[i][1].to(ranks.device), steps)[0].cpu()
        run.save_tensors(run.shard(folder, purpose, i), {"y": y if facts.stacked else y.half()})
    ranks.wait()
    y = run.load_shards(folder, purpose, len(parts))
    if y.shape != z.shape[1:]:
        raise UserError(f"{folder}: its samples are {list(y.shape)}, not {list(z.shape[1:])}; delete that folder")
    return {"z": z, "y": y[None], "label": label}


def _pairs(flags, given: Given, ranks: Ranks) -> dict:
    """D_paired of a seed, on the device."""
    folder = Path(flags.run.out) / f"seed{given.seed}" / "pairs" / str(flags.dm.pairs)
    run.check_config(folder, {**given.lineage, **values(flags.teacher, "sampler_steps"), **values(flags.dm, "pairs")})
    made = solve(folder, "pairs", flags.dm.pairs, given, flags.teacher.sampler_steps, ranks)
    return {k: v.to(ranks.device) for k, v in made.items()}


def _references(flags, given: Given, ranks: Ranks) -> dict:
    """What samples of a seed are compared with, as statistics: the teacher's own samples and the data.

    The floors: two draws of the teacher, of the data; nothing can be told apart below them."""
    facts, judge, number = given.facts, given.judge, flags.run.eval_samples
    folder = Path(flags.run.out) / f"seed{given.seed}" / "reference"
    config = {**given.lineage, **values(flags.teacher, "sampler_steps"), **values(flags.run, "eval_samples")}
    run.check_config(folder, config)
    drawn = {purpose: solve(folder, purpose, number, given, flags.teacher.sampler_steps, ranks)
             for purpose in (("select", "report") if facts.stacked else ("report",))}
    out = {purpose: judge.statistics(d["y"][0], d["label"][0]) for purpose, d in drawn.items()}
    out |= judge.truth(given.seed, number)
    if facts.stacked:
        return out | {"floor": judge.distance(out["select"], out["report"])}
    if given.pairs:  # two draws of equal size: the distance depends on it
        n, label = min(flags.dm.pairs, number), given.pairs["label"][0].cpu()
        a, b = (judge.statistics(y[:n], label[:n]) for y in (given.pairs["y"][0].cpu(), drawn["report"]["y"][0]))
        out["floor"] = judge.distance(a, b)
    return out | {"select": out["real"]}  # images: choose by the data [MSD App. E]


# ------------------------------------------ against the exact denoiser

@torch.no_grad()
def error_by_level(D, exact, levels: Tensor, facts: data.Facts, seed: int, points: int = 20_000) -> Tensor:
    """Root-mean-square difference of D from the exact denoiser on diffused data, in units of c_out(sigma), per level.

    In these units the network's whole target has unit variance: 0.05 is 5 %."""
    g = generator(seed, "error by level")
    label = data.stratified(points, facts.classes)[None]
    x, noise = facts.sample(label, g), torch.randn(1, points, *facts.shape, generator=g)
    out = []
    for level in levels.tolist():
        sigma = torch.full(label.shape, level)
        x_t = x + level * noise
        square = edm.per_sample((D(x_t, sigma, label) - exact(x_t, sigma, label)) ** 2).mean()
        out.append((square * edm.loss_weight(sigma[0, 0], facts.sigma_data)).sqrt())
    return torch.stack(out)


def _compare(D, facts: data.Facts, seed: int, folder: Path) -> None:
    """Print and keep (error.json) the trained teacher's error by noise level."""
    levels = torch.tensor([0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0, 80.0])
    error = error_by_level(copy.deepcopy(D).cpu(), facts.exact, levels, facts, seed)
    run.save_json(folder / "error.json", {"sigma": levels.tolist(), "error": error.tolist()})
    print(f"teacher of seed {seed} against the exact denoiser (RMS, in units of c_out):\n"
          "  sigma " + " ".join(f"{s:>6g}" for s in levels.tolist()) + "\n"
          "  error " + " ".join(f"{e:>6.3f}" for e in error.tolist()))
