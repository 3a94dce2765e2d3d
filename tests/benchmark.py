"""Speed on this machine: medians of rounds that alternate, so that another job slows all alike. --quick: does it run?

  python tests/benchmark.py               the toy's stack, against its students one after another
  python tests/benchmark.py --sizes B S XS XXS --dataset imagenet64    one-step students of each size [MSD Table 7]
  python tests/benchmark.py --samples runs/toy/seed0/students8         one-step students against the teacher's sampler
  python tests/benchmark.py --unet EDM    our U-Net against NVIDIA's; EDM: a checkout of github.com/NVlabs/edm
  python tests/benchmark.py --main toy    the main job: where each second goes, and the share of the matmul limit
  python tests/benchmark.py --load 0 2    a DM update of the toy beside 0 and 2 busy processes, by threads
  python tests/benchmark.py --dm B XXS    a DM update of ImageNet-64 on this device: images a second and memory
"""
import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from statistics import mean, median

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ["TQDM_DISABLE"] = "1"
BEGAN = time.perf_counter()

import torch

import common
import data
import dmd
import edm
import evaluate
import msd
import plot
import run
import students
import teacher
import unet
from flags import parse
from rank_worker import stack

IMPORTS = time.perf_counter() - BEGAN
DEVICE = run.device("auto")
GPU = DEVICE.type == "cuda"


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function) -> float:
    begin = now()
    function()
    return now() - begin


def throughput(function, number: int) -> float:
    """Samples a second of function(), which makes `number`: the fastest of three calls."""
    return number / min(seconds(function) for _ in range(3))


def per_update(line: str, groups, size, pairs: int, middle=median) -> float:
    """Seconds of a DM update of a stack of students of these groups of classes."""
    flags = parse(msd.Flags, msd.PRESETS, f"--reg-warmup 0 --fake-warmup 0 --select-samples 8 {line}".split())
    marks = []
    with tempfile.TemporaryDirectory() as folder:
        training, *rest = stack(dmd, flags, groups, size, Path(folder), pairs, common.Ranks(device=DEVICE))
        training.pace = True
        training.save = lambda *a: marks.append(now())
        dmd.train(training, *rest)
    updates = [b - a for a, b in zip(marks, marks[1:-1])]
    return middle(updates)


def stacked(given) -> None:
    """An update of all eight students."""
    rounds, steps, groups = (1, 4, [[0], [1]]) if given.quick else (5, 40, [[k] for k in range(8)])
    for more in ("", "--dm-weight 0"):
        for batch in (64, 256):
            line, both = f"--batch {batch} {more} --steps {steps}", []
            for _ in range(rounds):
                alone = sum(per_update(line, [group], "B", 1000) for group in groups)
                both.append((1e3 * per_update(line, groups, "B", 1000), 1e3 * alone))
            a, b = map(median, zip(*both))
            print(f"{line}: stacked {a:.1f} ms, one after another {b:.1f} ms, ratio {b / a:.2f}")


def updates(given) -> None:
    batch, steps, pixels = (32, 12, 64) if GPU else (1, 4, 16 if given.quick else 64)
    for name in given.dm:
        line = f"--dataset imagenet64 --distance l2 --steps {steps} --batch {batch} --resolution {pixels}"
        each = per_update(line, [range(250)], unet.LAPTOP[name] if given.quick else name, 64)
        held = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if GPU else ""
        print(f"DM update, {name}, batch {batch}, {DEVICE}: {each:.2f} s, {batch / each:.1f} images a second{held}")


@torch.no_grad()
def sizes(given) -> None:
    """Two cost: a batch of 2 against one of 1; near 1: bound by launches, near 2: by arithmetic."""
    facts, times = data.facts(given.dataset), {}
    many = 16_384 if facts.stacked else 64 if GPU or facts.native < 64 else 4
    nets = {name: edm.Precond(facts.net(1, name), facts.sigma_data).to(DEVICE) for name in given.sizes}
    for name, n in [(name, n) for name in nets for n in (1, 2, many)] * (2 if given.quick else 6 if many == 4 else 100):
        z, label = torch.randn(1, n, *facts.shape, device=DEVICE), torch.zeros(1, n, dtype=torch.int64, device=DEVICE)
        times.setdefault((name, n), []).append(seconds(lambda: dmd.one_step(nets[name], z, label)))
    print(f"{given.dataset}, {torch.cuda.get_device_name() if GPU else 'CPU'}; {many} samples at a time:\n"
          f"{'size':>5} {'parameters':>12} {'multiply-adds':>15} {'latency':>11} {'two cost':>9} {'samples/s':>17}")
    for name, net in nets.items():
        one, two, batch = (median(times[name, n][1:]) for n in (1, 2, many))
        count, adds = sum(p.numel() for p in net.parameters()), evaluate.multiply_adds(net, facts, DEVICE)
        print(f"{name:>5} {count:>12,} {adds:>15,} {1e3 * one:>8.2f} ms {two / one:>8.2f}x {many / batch:>17,.2f}")


def samples(given) -> None:
    folder = Path(given.samples[0])
    found = students.load_students(folder).to(DEVICE)
    facts = found.facts
    D = students.load_network(folder.parent / "teacher" / "ema.pt").net.to(DEVICE)
    number = 8 if given.quick else 16_384 if facts.stacked else 100
    steps = run.load_json(folder.parent / "reference" / "config.json", "sampler_steps")["sampler_steps"]
    label, z = data.stratified(number, facts.classes), torch.randn(number, *facts.shape)
    fast = throughput(lambda: msd.sampled(found, z, label, DEVICE), number)
    slow = throughput(lambda: edm.heun(D, z[None].to(DEVICE), label[None].to(DEVICE), steps).cpu(), number)
    print(f"samples a second: teacher, {steps} steps: {slow:,.0f}; students: {fast:,.0f}; ratio {fast / slow:.1f}")


def unets(given, size: str = "XXS") -> None:
    sys.path.append(given.unet[0])  # after ours: only its `training` and `torch_utils` are wanted
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # it imports that to download files
    from training.networks import EDMPrecond
    s, (pixels, batch, rounds) = unet.SIZES[size], (16, 2, 2) if given.quick else (64, 32 if GPU else 2, 20)
    theirs = EDMPrecond(pixels, 3, 1000, model_type="DhariwalUNet", model_channels=s.width, channel_mult=list(s.mult),
                        num_blocks=s.blocks, attn_resolutions=list(s.attention), dropout=0.0, use_fp16=GPU)
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pkl"
        path.write_bytes(pickle.dumps({"ema": theirs}))
        ours = students.load_network(path).net.to(DEVICE).requires_grad_(True)
    theirs.to(DEVICE)
    x, sigma = 5 * torch.randn(batch, 3, pixels, pixels, device=DEVICE), torch.full((batch,), 5.0, device=DEVICE)
    label = torch.arange(batch, device=DEVICE)
    onehot = torch.nn.functional.one_hot(label, 1000).float()
    ours.net.precision = torch.float32
    gap = (ours(x, sigma, label) - theirs(x, sigma, onehot, force_fp32=True)).abs().max()
    print(f"{size}, {pixels} x {pixels}, batch {batch}, {DEVICE}; largest difference in float32: {gap:.1e}")
    kinds = {"theirs": None, "ours": None if GPU else torch.float32, "ours, bf16": torch.bfloat16}
    for what in ("forward", "forward + backward"):
        times = {kind: [] for kind in kinds}

        def call(kind: str):
            with torch.set_grad_enabled(what != "forward"):
                out = theirs(x, sigma, onehot) if kind == "theirs" else ours(x, sigma, label)
                return out.square().mean().backward() if what != "forward" else out
        for _ in range(rounds + 1):
            for kind, ours.net.precision in kinds.items():
                times[kind].append(seconds(lambda: call(kind)))
        each = {kind: median(t[1:]) for kind, t in times.items()}
        print(what, *(f"{kind} {1e3 * t:.0f} ms ({each['theirs'] / t:.2f})" for kind, t in each.items()), sep="; ")


def matmul_limit(students: int = 9, rows: int = 512, width: int = 128) -> float:
    """FLOPs a second of the batched product that the toy spends most on, alone."""
    a, b, n = torch.randn(students, rows, width), torch.randn(students, width, width // 2), 200
    return throughput(lambda: [torch.bmm(a, b) for _ in range(n)], n * students * rows * width * width)


def main_job(given) -> None:
    spent, work = {"imports": IMPORTS}, {}

    def timed(place, name: str, title) -> None:
        function = getattr(place, name)

        def wrapped(*args, **more):
            begin = now()
            out = function(*args, **more)
            spent[what] = spent.get(what := title(*args), 0.0) + now() - begin
            return out
        setattr(place, name, wrapped)
    timed(students, "_train", lambda stage, *rest: f"training: {stage.NAME}")
    timed(teacher, "solve", lambda folder, purpose, *rest: f"the teacher's samples: {purpose}")
    timed(evaluate, "collected", lambda *rest: "sampling and measuring the students")
    timed(plot, "draw", lambda *rest: "figures")
    loop = run.Run.seconds

    def noted(training) -> float:
        work[f"training: {training.name}"] = len(training.students) * training.flops
        return loop(training)
    run.Run.seconds = noted
    begin = now()
    with tempfile.TemporaryDirectory() as folder:
        msd.main(["--students", "8", "--out", folder, *["--preset", "smoke"] * given.quick])
    whole, limit = now() - begin + IMPORTS, matmul_limit()
    spent["the rest"] = whole - sum(spent.values())
    print(f"\n{torch.get_num_threads()} threads, {limit / 1e9:.0f} GFLOP/s in a batched product of the toy's size")
    for what, each in spent.items():
        share = f"   {work[what] / each / limit:.0%} of that" if what in work else ""
        print(f"{each:>7.1f} s  {what}{share}")
    print(f"{whole:>7.1f} s  the main job")


def load(given) -> None:
    """With one thread, with all, and with what run.paced takes."""
    groups, most = [[k] for k in range(8)] + [[*range(8)]], run.THREADS
    line = f"--steps {6 if given.quick else 200}"
    for n in map(int, given.load):
        busy = "import torch\nwhile True: torch.bmm(torch.zeros(9, 512, 128), torch.zeros(9, 128, 64))"
        others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(n)]
        time.sleep(5 * (n > 0))
        for name, threads, paced in (("1 thread", 1, False), (f"{most} threads", most, False), ("paced", most, True)):
            torch.set_num_threads(threads)
            run.THREADS = most if paced else 1  # 1: as they are
            print(f"beside {n}: {name} {1e3 * per_update(line, groups, 'B', 1000, mean):.0f} ms an update", flush=True)
        for process in others:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dataset", default="toy", choices=data.DATASETS)
    jobs = {"unet": unets, "samples": samples, "dm": updates, "sizes": sizes, "main": main_job, "load": load}
    for name in jobs:
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="OF")
    given = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for job in [job for name, job in jobs.items() if vars(given)[name]] or [stacked]:
        job(given)


if __name__ == "__main__":
    main()
