"""Sample the teacher or the routed students of a run folder.

Seed s gives the same latent bit for bit, and the same sample to 1e-5, whatever else is in the batch (with --S_churn 0);
teacher and students start from the same latents, so their samples can be compared point by point.

Run      python sample.py --run runs/toy --students 8 --classes 0 3 --seeds 0-63
         writes samples.npz (teacher and students: x [N, 2]; label [N]; seed [N]) and samples.png
"""
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

import common
import data
import dmd
import edm
import msd
import plot
from common import flag


@dataclasses.dataclass
class Flags:
    """Flags of the sampling command."""
    run: str = flag("runs/toy", "the run folder, or one of its seed folders")
    students: int = flag(8, "which students of the run: K")
    tag: str = flag("", "the tag they were trained with")
    of: str = flag("both", "whom to sample", choices=("both", "teacher", "students"))
    classes: list[int] = flag([], "classes, used in turn; none = all")
    seeds: str = flag("0-999", "seeds, one sample each: 0-63 or 3,14,15")
    steps: int = flag(40, "steps of the teacher's Heun sampler", low=2)
    S_churn: float = flag(0.0, "stochasticity of the teacher's sampler [EDM Alg. 2]; 0 = deterministic", low=0)
    out: str = flag("samples", "writes OUT.npz and OUT.png")
    timing: int = flag(16_384, "samples of the speed measurement; 0 = none", low=0)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    threads: int = flag(0, "CPU threads; 0 = as many as there are cores, at most 8", low=0)


def parse_seeds(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. UserError on anything else."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise common.UserError(f"--seeds {text}: give ranges and numbers such as 0-63 or 3,14,15") from None
    if not seeds:
        raise common.UserError(f"--seeds {text}: an empty range")
    return seeds


def run_folder(path: str) -> Path:
    """The seed folder meant by --run: itself, or the first one inside. UserError if there is none."""
    path = Path(path)
    homes = [path] if (path / "teacher").is_dir() or list(path.glob("students*")) else sorted(path.glob("seed*"))
    if not homes:
        raise common.UserError(f"--run {path}: no run folder; train one with: python msd.py --out {path}")
    return homes[0]


@torch.no_grad()
def sample_teacher(D, z: torch.Tensor, label: torch.Tensor, steps: int, S_churn: float, seeds: list[int]) -> torch.Tensor:
    """Multi-step samples [N, *shape] from latents z [N, *shape]. Churn's noise is keyed by all seeds together."""
    g = common.generator("churn", tuple(seeds), device=z.device) if S_churn else None
    return torch.cat([edm.heun(D, a[None], b[None], steps, S_churn=S_churn, generator=g)[0]
                      for a, b in zip(z.split(8192), label.split(8192))])


def per_second(function, number: int) -> float:
    """Samples per second: the best of three runs after a warm-up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        function().sum().item()                                     # .item() waits for a GPU
        times.append(time.perf_counter() - begin)
    return number / min(times[1:])


@common.command
def main(argv=None):
    """Draw samples, time both samplers, write npz and png."""
    flags = common.parse(Flags, {(None, None): {}}, argv, __doc__)
    device = common.device(flags.device, flags.threads)
    home, seeds = run_folder(flags.run), parse_seeds(flags.seeds)
    if not Path(flags.out).name:
        raise common.UserError(f"--out {flags.out}: give a file name without ending, such as samples")
    samplers, evaluations = {}, {}
    folder = home / f"students{flags.students}{common.suffix(flags.tag)}"
    if flags.of != "students":
        config = folder / "dm" / "config.json"
        if config.exists() and common.load_json(config, "teacher")["teacher"] == "exact":
            D = data.DATASETS[common.load_json(config, "dataset")["dataset"]].exact
        elif (home / "teacher" / "ema.pt").exists():
            D = edm.load_teacher(home / "teacher" / "ema.pt").to(device)
        else:
            raise common.UserError(f"{home / 'teacher'}: no teacher here (it came from a file?); sample with --of students")
        samplers["teacher"] = lambda z, label: sample_teacher(D, z, label, flags.steps, flags.S_churn, seeds)
        evaluations["teacher"] = 2 * flags.steps - 1
    if flags.of != "teacher":
        if not folder.is_dir():
            have = ", ".join(sorted(p.name for p in home.glob("students*"))) or "none"
            raise common.UserError(f"--students {flags.students}: {home} has no folder {folder.name} (it has: {have})")
        students = msd.load_students(folder)
        students.G.to(device)
        samplers["students"] = lambda z, label: msd.route(students.G, students.router, z, label)
        evaluations["students"] = 1
    facts = data.DATASETS[students.dataset if "students" in samplers else "toy"]
    classes = torch.tensor(flags.classes or range(facts.classes))
    if not ((classes >= 0) & (classes < facts.classes)).all():
        raise common.UserError(f"--classes {' '.join(map(str, flags.classes))}: this run has classes 0 to {facts.classes - 1}")
    label = classes[torch.arange(len(seeds)) % len(classes)].to(device)
    z = msd.latents(seeds, facts.shape).to(device)
    arrays = {"label": label.cpu().numpy(), "seed": np.array(seeds)}
    speed = {}
    with torch.no_grad():
        for name, sampler in samplers.items():
            arrays[name] = sampler(z, label).cpu().numpy()
            if flags.timing:
                many = data.stratified(flags.timing, facts.classes, device)
                zz = torch.randn(flags.timing, *facts.shape, generator=common.generator("timing")).to(device)
                speed[name] = per_second(lambda: sampler(zz, many), flags.timing)
    for name in samplers:
        print(f"{name:>8}: {len(seeds)} samples, {evaluations[name]} function evaluation{'s' * (evaluations[name] > 1)} per sample"
              + (f", {speed[name]:,.0f} samples per second" if speed else ""))
    if len(speed) == 2:
        print(f"   ratio: {speed['students'] / speed['teacher']:.1f} times the samples per second, "
              f"{evaluations['teacher']} times fewer evaluations")
    out = Path(flags.out)
    common.write_atomic(out.with_name(out.name + ".npz"), lambda t: _save_npz(t, arrays))
    common.write_atomic(out.with_name(out.name + ".png"), lambda t: plot.scatter(arrays, list(samplers)).savefig(t, format="png"))
    print(f"written: {out.with_name(out.name + '.npz')} {out.with_name(out.name + '.png')}")


def _save_npz(path: Path, arrays: dict) -> None:
    with open(path, "wb") as f:                                     # given a name, numpy would append .npz to it
        np.savez(f, **arrays)


if __name__ == "__main__":
    main()
