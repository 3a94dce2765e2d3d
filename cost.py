"""What a run will cost: weights, memory, and the bill, whose rows of networks run.py will count.

stages: modules, in order, see students.py.
"""
import functools
import math
from pathlib import Path

import torch

import adm
import data
import dmd
import edm
import evaluate
import teacher
import tsm
import unet


@functools.cache
def network(facts: data.Facts, size):
    """To count; of images without memory."""
    with torch.device("cpu" if facts.stacked else "meta"):
        return facts.net(1, size)


def weights(facts: data.Facts, size) -> int:
    """Weights of a network."""
    return sum(p.numel() for p in network(facts, size).parameters())


def sizes_of(flags) -> tuple:
    """Of the teacher's network and the students'."""
    size = flags.teacher.size
    if Path(flags.teacher.which).is_file():
        size = teacher.loaded(flags, flags.facts).size
    return size, flags.student_size or size


def memory(flags) -> int:
    """Bytes that a student's rank holds in float32: weights, averages, gradients, AdamW's moments, pairs."""
    (t, s), stages = (weights(flags.facts, size) for size in sizes_of(flags)), {*flags.order()}
    pairs = flags.run.seeds * flags.dm.pairs * math.prod(flags.facts.shape)
    of_t, of_s = 1 + 4 * bool(stages & {"dm", "adm"}) + ("post" in stages), 6 + ("cd" in stages)
    return 4 * (t * of_t + s * of_s) + 6 * pairs


@functools.cache
def activations(facts: data.Facts, size) -> int:
    """Bytes kept of one sample's pass for the pass back, on a GPU."""
    net, sums = network(facts, size), []
    if isinstance(net, unet.UNet):
        net.precision = torch.bfloat16
    for b in (1, 2):  # what both keep are copies of weights
        kept, x = {}, torch.zeros(1, b, *facts.shape, device="meta")

        def keep(t):
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = net(x, x.new_ones(1, b), x.new_zeros(1, b).long())
        sums.append(sum(kept.values()) if out.requires_grad else 0)
    return sums[1] - sums[0]


def room(flags, stages: list) -> str:
    """Which --micro-batch fits, by the passes that are held at once."""
    t, s = (activations(flags.facts, size) for size in sizes_of(flags))
    held = {"dm": max(s + s * (flags.dm.reg_weight > 0), t), "adm": max(s + t, 3 * t)}
    train, names = flags.teacher.which == "train", [stage.NAME for stage in stages]
    batch = math.gcd(flags.teacher.batch * train, *(stage.length(flags)[1] for stage in stages))
    each = max([t * train, *(held.get(name, s) + dmd.LPIPS_BYTES * (name in dmd.with_lpips(flags)) for name in names)])

    def fits(gigabytes: int):
        most = int((0.9 * gigabytes * 2 ** 30 - memory(flags)) / each)
        return max((n for n in range(1, most + 1) if batch % n == 0), default="none")
    found = ", ".join(f"{n} GB: {fits(n)}" for n in (8, 16, 24, 80))
    return f"--micro-batch, estimated: {found} ({each / 2 ** 20:.0f} MiB a sample)"


def bill(flags, stages: list) -> list[tuple[str, float]]:
    """(what, how many evaluations of the teacher's network, for one sample each)."""
    facts, device = flags.facts, "cpu" if flags.facts.stacked else "meta"
    t, s = (evaluate.multiply_adds(network(facts, size), facts, device) for size in sizes_of(flags))
    ratio, each = s / t, edm.evaluations(flags.teacher.sampler_steps) * edm.guided(flags)
    drawn = flags.run.eval_samples * (1 + facts.stacked)
    rows = [("the teacher's training", edm.passes(flags)[0] * flags.teacher.batch)] * (flags.teacher.which == "train")
    if flags.teacher.which == "exact":
        rows.append(("weights for the closed form, by TSM", sum(tsm.passes(flags)) * flags.tsm.batch))
    if stages:
        rows += [(f"{flags.dm.pairs:,} pairs, {each} each", flags.dm.pairs * each),
                 (f"{drawn:,} samples to compare with", drawn * each)]
    for stage in stages:
        (of_t, of_s), (steps, batch) = stage.passes(flags), stage.length(flags)
        number = 1 if stage is tsm and flags.tsm.common else len(flags.asked())
        rows.append((f"{stage.NAME}, {number} networks", number * batch * (of_t + ratio * of_s)))
        if stage.NAME in dmd.with_lpips(flags):
            rows.append((f"{stage.NAME}, LPIPS", number * batch * steps * dmd.LPIPS_MULTIPLY_ADDS / t))
        if stage.BY:
            times = -(-steps // flags.dm.eval_every) + (stage in (dmd, adm))
            rows.append((f"{stage.NAME}, choosing the best", times * number * flags.dm.select_samples * ratio))
        if stage.BY and flags.student < 0:
            rows.append((f"{stage.NAME}, evaluation", 2 * len(flags.students) * flags.run.eval_samples * ratio))
    return [(what, flags.run.seeds * number) for what, number in rows]
