"""Speed of the stack: students trained together against one after another. Run: python tests/benchmark.py

Times whole DM updates (generator, `ttur` fake updates, regression) on this machine; medians of repeated rounds, alternating."""
import statistics
import sys
import tempfile
import time
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
        dmd.train(run, flags, members, teacher, net, pairs, [torch.arange(flags.pairs)] * len(members), data.TOY_JUDGE, reference, torch.device("cpu"))
    per_step = 1 + (flags.ttur if flags.dm_weight else 0)           # the loss is checked once per turn
    return (marks[-per_step] - marks[per_step]) / (steps - 2)       # from the second update to the last


def main():
    quick = "--quick" in sys.argv
    torch.set_num_threads(min(2, torch.get_num_threads()))
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


if __name__ == "__main__":
    main()
