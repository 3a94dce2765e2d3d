"""One table of facts for every dataset, and one stream of (x, label) from it.

A stage file never asks which dataset it trains on: what differs is a value in DATASETS, or a preset.
Here: the toy. `real` draws (x, label) for a stack of students, each from its own classes Y_k: the filtered data of [MSD Eq. 1].
"""
import dataclasses
from typing import Callable

import torch
from torch import Tensor

import toy_mog


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rest of the code needs to know of a dataset."""
    shape: tuple[int, ...]                 # of one x
    classes: int                           # |Y|; of the dataset, never of a filtered part of it
    sigma_data: float                      # EDM's sigma_data
    net: Callable                          # net(students, size) -> the stack F(x, c_noise, label)
    sizes: tuple[str, ...]                 # names of the sizes that `net` knows, the teacher's first
    exact: Callable | None                 # the optimal denoiser (x, sigma, label) -> D, where there is one
    sample: Callable                       # sample(label, generator) -> x
    statistics: Callable                   # statistics(x, label) -> counts per class, what `distance` compares
    distance: Callable                     # distance(statistics, statistics, classes=None) -> float, 0 = equal
    metric: str                            # its name
    check: Callable                        # check(x, label) -> {name: value}, further numbers about samples


def toy_statistics(x: Tensor, label: Tensor) -> Tensor:
    """Histogram of each class, counts [8, bins^2 + 1], on the CPU."""
    x, label = x.cpu(), label.cpu()
    return torch.stack([toy_mog.histogram(x[label == c]) for c in range(toy_mog.CLASSES)])


def toy_distance(a: Tensor, b: Tensor, classes=None) -> float:
    """l1 of the histograms pooled over `classes` (default all), from two `toy_statistics`."""
    rows = slice(None) if classes is None else list(classes)
    return toy_mog.l1(a[rows].sum(0), b[rows].sum(0))


DATASETS = {
    "toy": Facts(shape=(2,), classes=toy_mog.CLASSES, sigma_data=0.5, net=toy_mog.toy_net, sizes=tuple(toy_mog.SIZES),
                 exact=toy_mog.denoiser, sample=toy_mog.sample, statistics=toy_statistics, distance=toy_distance,
                 metric="l1", check=toy_mog.coverage),
}


def real(facts: Facts, draws, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Real data x [M, batch, *shape] and labels [M, batch] of each member's classes, for one step of its stream."""
    label = draws.label(step, "data label", batch)
    x = torch.stack([facts.sample(row, g) for row, g in zip(label, draws.generators(step, "data"))])
    return x, label


def stratified(batch: int, classes: int, device="cpu") -> Tensor:
    """Labels [batch] in turn: 0, 1, …, classes - 1, 0, …: equal shares, as an evaluation wants them."""
    return torch.arange(batch, device=device) % classes
