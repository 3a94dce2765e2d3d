"""Speed: stacked students against one after another; data reading; our U-Net against NVIDIA's; a DM update on a GPU.

  python tests/benchmark.py               the toy's stack: whole DM updates (generator, fake updates, regression)
  python tests/benchmark.py --data        images a second that the stream delivers, and that are decoded from a zip
  python tests/benchmark.py --unet EDM    EDM: a checkout of github.com/NVlabs/edm; same weights, forward and backward
  python tests/benchmark.py --dm B XXS    a DM update at 64 x 64 on this device: images a second and memory
  python tests/benchmark.py --sizes B S XS XXS --dataset imagenet64      parameters, multiply-adds, latency, throughput [MSD Table 7]

Medians of repeated rounds, alternating, on this machine."""
import argparse
import copy
import pickle
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import common
import data
import dmd
import edm
import toy_mog


def seconds_per_update(members, batch: int, steps: int, **changes) -> float:
    """Train `members` for `steps` DM updates as one stack; seconds per update, start-up excluded."""
    flags = dmd.Flags(steps=steps, batch=batch, reg_warmup=0, fake_warmup=0, pairs=1000, eval_every=10 ** 9,
                      select_samples=8, save_every=10 ** 9, quiet=True, **changes)
    net = edm.Precond(toy_mog.toy_net(len(members)), 0.5)
    label = data.stratified(flags.pairs, 8)[None]
    z = torch.randn(1, flags.pairs, 2)
    pairs = {"z": z, "y": 0.5 * z, "label": label, "row": torch.zeros(len(members), dtype=torch.int64)}
    teacher = edm.Precond(toy_mog.toy_net(len(members)), 0.5).requires_grad_(False)
    reference = {0: torch.ones(8, 200 * 200 + 1, dtype=torch.int64)}
    with tempfile.TemporaryDirectory() as folder:
        run = common.Stage("dm", {Path(folder): slice(0, len(members))}, steps, 10 ** 9, quiet=True)
        marks = []
        check, run.check = run.check, lambda *a: marks.append(time.perf_counter()) or check(*a)
        dmd.train(run, flags, members, teacher, net, pairs, [torch.arange(flags.pairs)] * len(members), data.toy_judge(data.facts("toy")), reference, torch.device("cpu"))
    per_step = 1 + (flags.ttur if flags.dm_weight else 0)           # the loss is checked once per turn
    return (marks[-per_step] - marks[per_step]) / (steps - 2)       # from the second update to the last


def stack(quick: bool):
    """Eight toy students in one stack against one after another."""
    members = [common.Member(0, 8, k, (k,)) for k in range(8)]
    print(f"8 students, {torch.get_num_threads()} threads; milliseconds per DM update of all eight, medians")
    for name, changes in (("DM + regression (the default)", {}), ("regression only", {"dm_weight": 0.0})):
        for batch in (64, 256):
            steps, rounds = (4, 1) if quick else (40, 5)
            stacked, alone = [], []
            for _ in range(rounds):
                stacked.append(1e3 * seconds_per_update(members, batch, steps, **changes))
                alone.append(1e3 * sum(seconds_per_update([m], batch, steps, **changes) for m in members))
            a, b = statistics.median(stacked), statistics.median(alone)
            print(f"{name:<48} batch {batch:>3}: stacked {a:6.1f}, one after another {b:6.1f}, ratio {b / a:.2f}")


def stream(quick: bool):
    """Reading: decode a zip once, then batches of 128 from the memory-mapped array with one batch read ahead."""
    from types import SimpleNamespace
    from test_data import make_zip
    number = 200 if quick else 5000
    with tempfile.TemporaryDirectory() as folder:
        g = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (16, 64, 64, 3), generator=g).to(torch.uint8).numpy()
        path = make_zip(Path(folder) / "d.zip", [i % 1000 for i in range(number)], write=lambda i: pixels[i % 16])
        begin = time.perf_counter()
        source = data.source(SimpleNamespace(dataset="imagenet64", data=str(path), out=folder, resolution=0, quiet=True))
        print(f"decoding 64 x 64 PNG from a zip, once: {number / (time.perf_counter() - begin):,.0f} images a second")
        draws = common.Draws("teacher", [common.Member(0, 1, 0, tuple(range(1000)))])
        begin, steps = time.perf_counter(), 10 if quick else 300
        for step in range(steps):
            source.batch(draws, step, 128)
        print(f"streaming batches of 128 as float32: {128 * steps / (time.perf_counter() - begin):,.0f} images a second")


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def unets(edm_path: str, quick: bool, size: str = "XXS", resolution: int = 64):
    """Our U-Net against NVIDIA's DhariwalUNet with the same weights, forward and forward + backward, alternating."""
    import snapshot
    import unet
    sys.path.append(edm_path)                                       # after ours: only its `training` and `torch_utils` are wanted
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # it imports that to download files
    from training.networks import EDMPrecond
    s, device = unet.SIZES[size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolution, batch, rounds = (16, 2, 2) if quick else (resolution, 32 if device.type == "cuda" else 2, 20)
    D = EDMPrecond(resolution, 3, 1000, model_type="DhariwalUNet", model_channels=s.width, channel_mult=list(s.mult), num_blocks=s.blocks,
                   attn_resolutions=list(s.attention), dropout=0.0, use_fp16=device.type == "cuda")
    with torch.no_grad():
        for p in D.parameters():
            p.add_(0.02 * torch.randn_like(p))
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "net.pkl", "wb") as f:
            pickle.dump({"ema": D}, f)
        found = snapshot.read(Path(folder) / "net.pkl")
    ours = edm.Precond(unet.UNet(found.resolution, found.channels, found.classes, found.size), found.sigma_data)
    ours.net.load_state_dict(found.state)
    ours, theirs = ours.to(device), D.to(device)
    x, sigma = 5 * torch.randn(batch, 3, resolution, resolution, device=device), torch.full((batch,), 5.0, device=device)
    label = torch.arange(batch, device=device) % 1000
    onehot = torch.nn.functional.one_hot(label, 1000).float()
    calls = {"theirs": lambda: theirs(x, sigma, onehot), "ours": lambda: ours(x, sigma, label)}
    kinds = {"theirs": ("theirs", None), "ours": ("ours", None if device.type == "cuda" else torch.float32), "ours, bf16": ("ours", torch.bfloat16)}
    ours.net.precision = torch.float32
    with torch.no_grad():
        print(f"largest difference of the outputs in float32: {(calls['ours']() - theirs(x, sigma, onehot, force_fp32=True)).abs().max():.1e}")
    for what in ("forward", "forward + backward"):
        times = {k: [] for k in kinds}
        for _ in range(rounds + 1):
            for k, (who, precision) in kinds.items():
                ours.net.precision = precision

                def call():
                    with torch.set_grad_enabled(what != "forward"):
                        out = calls[who]()
                        if what != "forward":
                            out.square().mean().backward()
                times[k].append(seconds(call))
        first = [statistics.median(a / b for a, b in zip(times["theirs"][1:], times[k][1:])) for k in kinds]
        print(f"{size}, {resolution} x {resolution}, batch {batch}, {device}, {what}: " + "; ".join(
            f"{k} {1e3 * statistics.median(v[1:]):.0f} ms" + (f" (ratio {r:.2f})" if k != "theirs" else "")
            for (k, v), r in zip(times.items(), first)))


def updates(sizes: list[str], quick: bool):
    """One DM update (regression l2, KL term, fake denoiser, three AdamW-sized networks) at 64 x 64."""
    import unet
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in sizes[-1:] if quick else sizes:
        batch, steps = (32, 12) if device.type == "cuda" else (1, 4)
        flags = dmd.Flags(dataset="imagenet64", steps=steps, batch=batch, reg_warmup=0, fake_warmup=0, pairs=64, eval_every=10 ** 9, draws=1,
                          select_samples=8, save_every=10 ** 9, quiet=True, distance="l2")
        flags.preset = "default"
        facts = data.facts("imagenet64", 16 if quick else 0)
        flags.resolution = facts.shape[-1]
        net = edm.ready(facts.net(1, unet.LAPTOP["XXS"] if quick else size), 0.5, flags, device)
        z = torch.randn(1, 64, *facts.shape)
        pairs = {"z": z.to(device), "y": z.to(device), "label": data.stratified(64, 1000)[None].to(device), "row": torch.zeros(1, dtype=torch.int64, device=device)}
        class NoJudge:
            statistics, distance = staticmethod(lambda x, label: None), staticmethod(lambda a, b, c: 0.0)
        with tempfile.TemporaryDirectory() as folder:
            run = common.Stage("dm", {Path(folder): slice(0, 1)}, steps, 10 ** 9, quiet=True)
            run.save = lambda *a, **k: None
            marks = []
            check, run.check = run.check, lambda *a: marks.append(time.perf_counter()) or check(*a)
            dmd.train(run, flags, [common.Member(0, 4, 0, tuple(range(250)))], net.requires_grad_(False), copy.deepcopy(net).requires_grad_(True),
                      pairs, [torch.arange(64)], NoJudge, {0: None}, device)
        each = (marks[-2] - marks[2]) / (steps - 2)
        held = f", {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if device.type == "cuda" else ""
        print(f"DM update, {size}, {facts.shape[-1]} x {facts.shape[-1]}, batch {batch}, {device}: {each:.2f} s, {batch / each:.1f} images a second{held}")


def sizes(names: list[str], dataset: str, quick: bool):
    """[MSD Table 7]: parameters, multiply-adds, batch-1 latency and throughput of one-step students, and what bounds them."""
    from torch.utils.flop_counter import FlopCounterMode
    facts = data.facts(dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    many = 64 if device.type == "cuda" else 16_384 if facts.stacked else 64 if facts.shape[-1] < 64 else 4
    rounds, blocks = (1, 1) if quick else (50, 20) if facts.stacked else (5, 20) if facts.shape[-1] < 64 or device.type == "cuda" else (2, 3)
    many = 2 if quick else many

    def timed(net, batch: int) -> float:
        label = torch.zeros(1, batch, dtype=torch.int64, device=device)
        z = torch.randn(1, batch, *facts.shape, device=device)
        with torch.no_grad():
            seconds(lambda: dmd.one_step(net, z, label))
            return statistics.median([seconds(lambda: dmd.one_step(net, z, label)) for _ in range(rounds)])
    nets, macs, times = {}, {}, {(name, batch): [] for name in names for batch in (1, 2, many)}
    for name in names:
        with torch.device("meta"):
            net = edm.Precond(facts.net(1, name), facts.sigma_data)
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                dmd.one_step(net, torch.zeros(1, 1, *facts.shape), torch.zeros(1, 1, dtype=torch.int64))
        macs[name] = counter.get_total_flops() / 2
        nets[name] = edm.Precond(facts.net(1, name), facts.sigma_data).to(device)
    for _ in range(blocks):                                         # in turn, and the least of the blocks: a busy machine only adds
        for name, batch in times:
            times[name, batch].append(timed(nets[name], batch))
    print(f"{dataset}, one-step students, float32 on a CPU, bf16 inside on a GPU; {machine}")
    print(f"{'size':>5} {'parameters':>12} {'multiply-adds':>15} {'latency, batch 1':>17} {'two cost':>9}   {'samples a second':>16} (batch {many})")
    for name in names:
        count, (one, two, batch) = sum(p.numel() for p in nets[name].parameters()), (min(times[name, n]) for n in (1, 2, many))
        print(f"{name:>5} {count:>12,} {macs[name]:>15,.0f} {1e3 * one:>11.2f} ms {100 * (one / min(times[names[0], 1]) - 1):>+4.0f}%{two / one:>8.2f}x   "
              f"{many / batch:>16,.{0 if many / batch > 99 else 2}f}   "
              + ("launch-bound at batch 1: a second sample is nearly free" if two / one < 1.4 else "compute-bound"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--unet", metavar="EDM", help="folder of a checkout of NVlabs/edm")
    parser.add_argument("--dm", nargs="+", metavar="SIZE", choices=("B", "S", "XS", "XXS"))
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", choices=("B", "S", "XS", "XXS"))
    parser.add_argument("--dataset", default="toy", choices=tuple(data.DATASETS))
    args = parser.parse_args(argv)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if args.data:
        stream(args.quick)
    if args.unet:
        unets(args.unet, args.quick)
    if args.dm:
        updates(args.dm, args.quick)
    if args.sizes:
        sizes(args.sizes, args.dataset, args.quick)
    if not (args.data or args.unet or args.dm or args.sizes):
        stack(args.quick)


if __name__ == "__main__":
    main()
