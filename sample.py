"""Sample the teacher or the routed students of a run folder.

Seed s gives the same latent bit for bit, and the same sample to 1e-5, whatever else is in the batch (with --S_churn 0);
teacher and students start from the same latents. Not here: speed (tests/benchmark.py).

Run      python sample.py --run runs/toy --students 8 --classes 0 3 --seeds 0-63
         writes samples.npz (teacher and students: x [N, 2]; label, seed [N]) and samples.png
Images   python sample.py --run docs/data/fashion --seeds 0-99 --folders
         writes samples-teacher.npz, samples-students.npz as the ADM evaluator and fid.py read them (arr_0 uint8
         [N, H, W, C], arr_1 labels), a grid samples.png, and folders of PNG files
By noise level   python sample.py --run runs/toy --students 4 --o2mkd --steps 20 --sampler ddim
"""
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import edm
import msd
import o2mkd
import plot
import run
import students
from common import generator, latents
from flags import UserError, command, flag, parse
from images import to_uint8
from teacher import Given, make_pairs


@dataclass
class Flags:
    """Sampling"""
    prefix = ""
    churn: edm.Churn
    run: str = flag("runs/toy", "the run folder (its first seed), or a seed's")
    students: int = flag(0, "their number K; none = the most there are", low=0)
    tag: str = flag("", "their tag")
    of: str = flag("both", "whom to sample (a teacher from a file is not in the run folder)",
                   choices=("both", "teacher", "students"))
    o2mkd: bool = flag(False, "students by noise level, in as many steps as the teacher")
    classes: list[int] = flag([], "classes, used in turn; none = all")
    seeds: str = flag("0-999", "one sample each: 0-63 or 3,14,15", pattern=r"\d+(-\d+)?(,\d+(-\d+)?)*")
    sampler: str = flag("heun", "the multi-step sampler: heun, or ddim of first order", choices=tuple(edm.SAMPLERS))
    steps: int = flag(0, "its steps; none = as in the run", low=2)
    out: str = flag("samples", "OUT.npz, OUT.png")
    folders: bool = flag(False, "images: also PNG files by seed, OUT-WHO/000000.png")
    device: str = flag("auto", "auto, cpu, cuda or mps")


def parse_seeds(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]."""
    ends = [part.split("-") for part in text.split(",")]
    seeds = [range(int(end[0]), int(end[-1]) + 1) for end in ends]
    if not all(seeds) or sum(map(len, seeds)) > 10_000_000:
        raise UserError(f"--seeds {text}: from low to high, at most 10 million")
    return [*itertools.chain(*seeds)]


def teacher_of(home: Path, about: dict, device) -> Given:
    """The teacher of a seed folder; about: its flags, guidance among them."""
    if about.get("teacher") == "exact":
        return Given(0, data.facts(about["dataset"]), None, about, True, about.get("cfg", 1))
    if not (home / "teacher" / "ema.pt").exists():
        raise UserError(f"{home}: no teacher in it; --of students")
    found = students.load_network(home / "teacher" / "ema.pt")
    return Given(0, found.facts, None, about, False, about.get("cfg", 1), net=found.net.to(device))


@command
def main(argv=None):
    """Draw samples, print their cost, write files."""
    flags = parse(Flags, {}, argv, __doc__)
    device, path, seeds = run.device(flags.device), Path(flags.run), parse_seeds(flags.seeds)
    home = min(path.glob("seed[0-9]*"), key=lambda p: (len(p.name), p.name), default=path)
    configs = [*home.glob("reference/config.json"), *home.glob("teacher/config.json")]
    about = run.load_json(configs[0], "dataset") if configs else {}
    steps = flags.steps or about.get("sampler_steps", 40)
    kind, end = "o2mkd" if flags.o2mkd else "students", run.suffix(flags.tag)
    named = [re.fullmatch(rf"{kind}(\d+){re.escape(end)}", p.name) for p in home.glob(f"{kind}*")]
    there = sorted(int(m[1]) for m in named if m)
    K = flags.students or max(there, default=0)
    if flags.of != "teacher" and K not in there:
        raise UserError(f"{home}: of {kind}{end} there are {there}; or --of teacher")
    folder = home / f"{kind}{K}{end}"
    denoisers, one_step = {}, None
    if flags.of != "students":
        given = teacher_of(home, about, device)
        facts, denoisers["teacher"] = given.facts, given.mu_teacher
    if flags.of != "teacher" and flags.o2mkd:
        found = o2mkd.load_students(folder).to(device)
        facts, denoisers["students"] = found.facts, o2mkd.routed(found.denoisers, found.router)
    elif flags.of != "teacher":
        one_step = students.load_students(folder)
        facts = one_step.facts
    known = sorted(torch.cat(one_step.parts).tolist()) if one_step else range(facts.classes)
    if not {*flags.classes} <= {*known}:
        raise UserError(f"--classes {flags.classes}: the run has {known[0]} to {known[-1]}")
    classes = torch.tensor(flags.classes or known)
    label, z = classes[torch.arange(len(seeds)) % len(classes)].to(device), latents(seeds, facts.shape).to(device)
    made, how = {}, dict(chunk=facts.chunk, order=edm.SAMPLERS[flags.sampler], **vars(flags.churn))
    for who, D in denoisers.items():
        g = generator("churn", tuple(seeds), device=device)  # keyed by all seeds together
        made[who] = make_pairs(D, z[None], label[None], steps, generator=g, **how)[0]
    cost = dict.fromkeys(made, edm.evaluations(steps, flags.sampler))
    if one_step:
        made["students"] = msd.sampled(one_step, z, label, device)
        cost["students"] = 1
    label = label.cpu().numpy()
    if facts.stacked:
        paths = [save_npz(f"{flags.out}.npz", {"label": label, "seed": np.array(seeds), **made})]
        picture = plot.scatter(made, label, facts.classes)
    else:
        made, paths, columns = {who: to_uint8(x) for who, x in made.items()}, [], min(20, math.ceil(len(seeds) ** 0.5))
        for who, x in made.items():
            paths += write_images(f"{flags.out}-{who}", x, label, seeds, flags.folders)
        picture = plot.image_panels({who: x[:columns * columns] for who, x in made.items()}, columns)
    paths.append(plot.save(picture, Path(f"{flags.out}.png")))
    for who, n in cost.items():
        print(f"{who:>8}: {len(seeds)} samples, {n} function evaluation{'s' * (n > 1)} per sample")
    if len({*cost.values()}) == 2:
        print(f"   ratio: {cost['teacher'] / cost['students']:g} times fewer evaluations")
    print(f"   from: {one_step.files[0].parents[not facts.stacked] if one_step else home}\nwritten:", *paths)


def write_images(name: str, x: Tensor, label: np.ndarray, seeds: list[int], folders: bool) -> list[Path]:
    """x [N, C, H, W] into NAME.npz; folders: also into NAME/SEED.png."""
    rows, folder = x.permute(0, 2, 3, 1).numpy(), Path(name)  # [N, H, W, C]
    files = [f"{seed:06d}.png" for seed in seeds]
    if folders and {p.name for p in folder.glob("*.png")} - {*files}:
        raise UserError(f"{folder}: has other images, which fid.py would count; another --out")
    paths = [save_npz(f"{name}.npz", {"arr_0": rows, "arr_1": label, "seed": np.array(seeds)})]
    if folders:
        for row, file in zip(rows, files):
            image = Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row)
            run.write_atomic(folder / file, lambda t: image.save(t, format="png"))
        paths.append(folder)
    return paths


def save_npz(path: str, arrays: dict) -> Path:
    """Atomically."""
    def write(temporary: Path):
        with open(temporary, "wb") as f:  # given a name, numpy would append .npz to it
            np.savez(f, **arrays)
    run.write_atomic(Path(path), write)
    return Path(path)


if __name__ == "__main__":
    main()
