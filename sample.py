"""Sample the teacher or the routed students of a run folder.

Seed s gives the same latent bit for bit, and the same sample to 1e-5, whatever else is in the batch (with --S_churn 0);
teacher and students start from the same latents, so their samples can be compared one by one. Labels are routed: of K
image students only those that the classes need are read, and each runs once per batch.

Run      python sample.py --run runs/toy --students 8 --classes 0 3 --seeds 0-63
         writes samples.npz (teacher and students: x [N, 2]; label [N]; seed [N]) and samples.png
Images   python sample.py --run runs/fashion-mnist --students 5 --seeds 0-99 --folders
         writes samples-teacher.npz and samples-students.npz in the layout of the ADM evaluator (arr_0 uint8 [N, H, W, C],
         arr_1 labels; fid.py reads it too), a grid samples.png, and with --folders samples-students/000000.png … by seed
By noise level   python sample.py --run runs/toy --students 4 --o2mkd --steps 20 --sampler ddim
         the students of o2mkd.py, in turn along the trajectory; the teacher with the same sampler and steps
"""
import dataclasses
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import data
import edm
import msd
import o2mkd
import plot
from common import flag


@dataclasses.dataclass
class Flags:
    """Flags of the sampling command."""
    run: str = flag("runs/toy", "the run folder, or one of its seed folders")
    students: int = flag(8, "which students of the run: K")
    tag: str = flag("", "the tag they were trained with")
    of: str = flag("both", "whom to sample", choices=("both", "teacher", "students"))
    o2mkd: bool = flag(False, "the students are those by noise level of o2mkd.py, in as many steps as the teacher")
    classes: list[int] = flag([], "classes, used in turn; none = all")
    seeds: str = flag("0-999", "seeds, one sample each: 0-63 or 3,14,15")
    steps: int = flag(0, "steps of the multi-step sampler; 0 = as in the run", low=0)
    sampler: str = flag("heun", "heun, or ddim (first order, one evaluation a step)", choices=("heun", "ddim"))
    S_churn: float = flag(0.0, "stochasticity of the multi-step sampler [EDM Alg. 2]; 0 = deterministic", low=0)
    out: str = flag("samples", "writes OUT.npz and OUT.png")
    folders: bool = flag(False, "images: also a folder of PNG files, one per seed")
    timing: int = flag(-1, "samples of the speed measurement; 0 = none, -1 = the toy's 16384, 100 images", low=-1)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    threads: int = flag(0, "CPU threads; 0 = as many as there are cores, at most 8", low=0)


def parse_seeds(text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. UserError on anything else."""
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            first, last = int(first), int(last or first)
            if last - first >= 10_000_000 or last >= 2 ** 63:
                raise common.UserError(f"--seeds {text}: at most 10 million, each below 2^63")
            seeds += range(first, last + 1)
    except ValueError:
        raise common.UserError(f"--seeds {text}: give ranges and numbers such as 0-63 or 3,14,15") from None
    if not seeds:
        raise common.UserError(f"--seeds {text}: an empty range")
    return seeds


def run_folder(path: str) -> Path:
    """The seed folder meant by --run: itself, or the first one inside. UserError if there is none."""
    path = Path(path)
    homes = [path] if (path / "teacher").is_dir() or list(path.glob("students*")) or list(path.glob("o2mkd*")) else sorted(path.glob("seed*"))
    if not homes:
        raise common.UserError(f"--run {path}: no run folder; train one with: python msd.py --out {path}")
    return homes[0]


@torch.no_grad()
def sample_multistep(D, z: torch.Tensor, label: torch.Tensor, steps: int, sampler: str, S_churn: float, seeds: list[int], chunk: int):
    """Multi-step samples [N, *shape] from latents z [N, *shape]. Churn's noise is keyed by all seeds together."""
    g = common.generator("churn", tuple(seeds), device=z.device) if S_churn else None
    return torch.cat([edm.SAMPLERS[sampler](D, a[None], b[None], steps, S_churn=S_churn, generator=g)[0]
                      for a, b in zip(z.split(chunk), label.split(chunk))])


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
    common.check_tag("--tag", flags.tag)
    device = common.device(flags.device, flags.threads)
    home, seeds = run_folder(flags.run), parse_seeds(flags.seeds)
    if not Path(flags.out).name:
        raise common.UserError(f"--out {flags.out}: give a file name without ending, such as samples")
    if flags.steps == 1:
        raise common.UserError("--steps 1: the sampler needs at least 2 steps (0 = as in the run)")
    if flags.of == "students" and not flags.o2mkd and flags.source["sampler"] == "flag":
        raise common.UserError(f"--sampler {flags.sampler}: these students take one step; for those by noise level add --o2mkd")
    samplers, evaluations = {}, {}
    kind = "o2mkd" if flags.o2mkd else "students"
    folder = home / f"{kind}{flags.students}{common.suffix(flags.tag)}"
    about = next(iter(sorted(home.glob("reference/config.json")) + sorted(home.glob("teacher/config.json"))), None)
    about = common.load_json(about, "dataset") if about else {"dataset": "toy"}
    steps = flags.steps or about.get("sampler_steps", 40)
    if flags.of != "teacher":
        if not folder.is_dir():
            have = ", ".join(sorted(p.name for p in home.glob(f"{kind}[0-9]*"))) or "none"
            raise common.UserError(f"--students {flags.students}: {home} has no folder {folder.name} (it has: {have})")
        students = o2mkd.load_students(folder).to(device) if flags.o2mkd else msd.load_students(folder)
        if not flags.o2mkd:
            students.G.to(device)
    if flags.of != "students":
        if about.get("teacher") == "exact":
            D = data.DATASETS[about["dataset"]].exact
            facts = data.DATASETS[about["dataset"]]
        elif (home / "teacher" / "ema.pt").exists():
            D = edm.load_teacher(home / "teacher" / "ema.pt").to(device)
            facts = D.facts
        else:
            raise common.UserError(f"{home / 'teacher'}: no teacher here (it came from a file?); sample with --of students")
        D = edm.mu_teacher(types.SimpleNamespace(teacher="file", cfg=about.get("cfg", 1)), D)   # as the students' teacher was
        samplers["teacher"] = lambda z, label: sample_multistep(D, z, label, steps, flags.sampler, flags.S_churn, seeds, facts.chunk)
        evaluations["teacher"] = edm.evaluations(steps, flags.sampler)
    if flags.of != "teacher" and flags.o2mkd:
        facts, denoise = students.facts, o2mkd.routed(students.denoisers, students.router)
        samplers["students"] = lambda z, label: sample_multistep(denoise, z, label, steps, flags.sampler, flags.S_churn, seeds, facts.chunk)
        evaluations["students"] = edm.evaluations(steps, flags.sampler)
    elif flags.of != "teacher":
        facts, chunk = students.facts, students.facts.chunk
        samplers["students"] = lambda z, label: torch.cat([msd.route(students.G, students.router, a, b)
                                                           for a, b in zip(z.split(2 * chunk), label.split(2 * chunk))])
        evaluations["students"] = 1
    covered = (students.router.table >= 0).nonzero()[:, 0].tolist() if flags.of != "teacher" and not flags.o2mkd else range(facts.classes)
    classes = torch.tensor(flags.classes or covered)
    if not ((classes >= 0) & (classes < facts.classes)).all():
        raise common.UserError(f"--classes {' '.join(map(str, flags.classes))}: this run has classes 0 to {facts.classes - 1}")
    label = classes[torch.arange(len(seeds)) % len(classes)].to(device)
    z = msd.latents(seeds, facts.shape).to(device)
    timing = (2 * facts.chunk if facts.stacked else 100) if flags.timing < 0 else flags.timing
    made, speed = {}, {}
    with torch.no_grad():
        for name, sampler in samplers.items():
            made[name] = sampler(z, label).cpu()
            if timing:
                many = classes[torch.arange(timing) % len(classes)].to(device)
                zz = torch.randn(timing, *facts.shape, generator=common.generator("timing")).to(device)
                speed[name] = per_second(lambda: sampler(zz, many), timing)
    for name in samplers:
        print(f"{name:>8}: {len(seeds)} samples, {evaluations[name]} function evaluation{'s' * (evaluations[name] > 1)} per sample"
              + (f", {speed[name]:,.0f} samples per second" if speed else ""))
    if len(speed) == 2:
        print(f"   ratio: {speed['students'] / speed['teacher']:.1f} times the samples per second, "
              f"{evaluations['teacher'] / evaluations['students']:g} times fewer evaluations")
    write = write_points if facts.stacked else write_images
    print("written: " + " ".join(map(str, write(Path(flags.out), made, label.cpu().numpy(), np.array(seeds), flags.folders))))


def write_points(out: Path, made: dict, label: np.ndarray, seeds: np.ndarray, folders: bool) -> list[Path]:
    """The toy's samples: one npz (teacher, students: x [N, 2]; label; seed) and a picture."""
    arrays = {"label": label, "seed": seeds, **{k: x.numpy() for k, x in made.items()}}
    paths = [out.with_name(out.name + end) for end in (".npz", ".png")]
    common.write_atomic(paths[0], lambda t: _save_npz(t, arrays))
    common.write_atomic(paths[1], lambda t: plot.scatter(arrays, list(made)).savefig(t, format="png"))
    return paths


def write_images(out: Path, made: dict, label: np.ndarray, seeds: np.ndarray, folders: bool) -> list[Path]:
    """Images: an npz each in the ADM evaluator's layout (arr_0 uint8 [N, H, W, C], arr_1 labels), a grid, folders by seed."""
    paths, pixels = [], {name: common.to_uint8(x) for name, x in made.items()}
    for name, x in pixels.items():
        paths.append(out.with_name(f"{out.name}-{name}.npz"))
        rows = x.permute(0, 2, 3, 1).numpy()                                                    # [N, H, W, C]
        common.write_atomic(paths[-1], lambda t: _save_npz(t, {"arr_0": rows, "arr_1": label, "seed": seeds}))
        if folders:
            paths.append(out.with_name(f"{out.name}-{name}"))
            for old in paths[-1].glob("[0-9]*.png"):                # of another call: fid.py would measure both as one
                old.unlink()
            for row, seed in zip(rows, seeds):
                image = Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row)
                common.write_atomic(paths[-1] / f"{seed:06d}.png", lambda t: image.save(t, format="png"))
    columns = max(1, min(20, round(len(seeds) ** 0.5)))
    paths.append(out.with_name(out.name + ".png"))
    fig = plot.image_panels({name: x[:columns * columns] for name, x in pixels.items()}, columns)
    common.write_atomic(paths[-1], lambda t: fig.savefig(t, format="png"))
    return paths


def _save_npz(path: Path, arrays: dict) -> None:
    with open(path, "wb") as f:                                     # given a name, numpy would append .npz to it
        np.savez(f, **arrays)


if __name__ == "__main__":
    main()
