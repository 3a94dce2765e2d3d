"""What is known of each dataset, and one stream of (x, label) from it.

A stage never asks which dataset it trains on: what differs is a value in DATASETS, or a preset. `batch` gives (x in
[-1, 1], label) of a student's own classes Y_k [MSD Eq. 1], in an order that depends on the step alone: a killed run
goes on with the next one.
"""
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import images
import run
import songunet
import toy_mog
import unet
from common import Draws, Ranks, Student, generator
from flags import UserError
from images import Pair


@dataclass(frozen=True)
class Facts:
    """Of a dataset, before any of it is seen."""
    name: str
    shape: tuple[int, ...]  # of one x
    classes: int  # |Y|; of the dataset, never of a filtered part of it
    sizes: dict = field(compare=False)  # {name of a size: (width, depth), or a unet.Size}
    stacked: bool  # do students live in one stack [M, B, ...]? Else each is a stack of one
    chunk: int  # samples per call of the teacher's sampler; one file each
    metric: str  # l1 or fd
    native: int = 0  # pixels of the data as they come
    flip: bool = False  # mirrored half of the time
    sigma_data: float = 0.5
    exact: Callable | None = None  # the optimal denoiser (x, sigma, label) -> D, where there is one
    sample: Callable | None = None  # the sampler of the data that goes with it, (label, generator) -> x
    embeddings: Callable | None = None  # () -> [classes, d]: conditions are rows of a fixed table

    @property
    def resolution(self) -> int:
        """Pixels of an image's side; 0 where x is no image."""
        return self.shape[-1] if self.native else 0

    def net(self, students: int = 1, size=None):
        """F(x, c_noise, label) of so many students; size: a name (none: B), or its fields. Of images: one."""
        size = size or "B"
        size = self.sizes[size] if isinstance(size, str) else size
        if self.stacked:
            return toy_mog.ToyNet(students, *size, self.embeddings and self.embeddings())
        net, kind = (unet.UNet, unet.Size) if len(size) == 4 else (songunet.SongUNet, songunet.Size)
        return net(self.shape[1], self.shape[0], self.classes, kind(*size))

    def narrowed(self, size, keep: float) -> tuple:
        """About this share of a size's channels, as fields for `net`."""
        width, *rest = self.sizes[size] if isinstance(size, str) else size
        unit = 1 if not self.native else 32 if width >= 64 else 4
        return (max(unit, 4, round(width * keep / unit) * unit), *rest)


TOY = dict(shape=(2,), sizes=toy_mog.SIZES, stacked=True, chunk=8192, metric="l1", exact=toy_mog.denoiser,
           sample=toy_mog.sample)
IMAGES = dict(stacked=False, metric="fd")
DATASETS = {known.name: known for known in (
    Facts("toy", classes=toy_mog.CLASSES, **TOY),
    Facts("toy-prompts", classes=toy_mog.PROMPTS, embeddings=toy_mog.prompts, **TOY),
    Facts("fashion-mnist", (1, 16, 16), 10, sizes=unet.LAPTOP, chunk=500, native=32, **IMAGES),
    Facts("cifar10", (3, 32, 32), 10, sizes=unet.CIFAR, chunk=500, native=32, flip=True, **IMAGES),
    Facts("cifar10-uncond", (3, 32, 32), 1, sizes=unet.CIFAR, chunk=500, native=32, flip=True, **IMAGES),
    *(Facts(name, (3, 64, 64), 1, unet.CIFAR, chunk=250, native=64, **IMAGES) for name in ("ffhq64", "afhqv2-64")),
    Facts("imagenet64", (3, 64, 64), 1000, sizes=unet.SIZES, chunk=250, native=64, **IMAGES),
)}


def facts(name: str, resolution: int = 0) -> Facts:
    """At the dataset's own resolution, or pooled to another. UserError if it can't be."""
    known = DATASETS[name]
    possible = [r for r in (0, 8, 16, 32, 64) if r <= known.native]
    if resolution not in possible:
        raise UserError(f"--resolution {resolution}: {name} can have one of {possible}")
    return replace(known, shape=(known.shape[0], resolution, resolution)) if resolution else known


def stratified(batch: int, classes: int) -> Tensor:
    """Labels [batch] 0, 1, …, classes - 1, 0, …: equal shares."""
    return torch.arange(batch) % classes


def of_classes(label: Tensor, classes) -> Tensor:
    """Where label [N] is one of these. UserError if nowhere."""
    index = torch.isin(label, torch.as_tensor(classes, device=label.device)).nonzero()[:, 0]
    if not len(index):
        raise UserError(f"no data, or no --pairs, of the classes {min(classes)} to {max(classes)}")
    return index


@dataclass
class Mixture:
    """The toy's source: new samples at every step."""
    known: Facts

    def batch(self, draws: Draws, step: int, batch: int, part: slice = slice(None)) -> Pair:
        """x [M, b, 2] and labels [M, b] of each student's classes: `part` of this step's batch."""
        label = draws.label(step, "data label", batch)
        x = torch.stack([self.known.sample(row, g) for row, g in zip(label, draws.generators(step, "data"))])
        return x[:, part], label[:, part]

    def truth(self, seed: int, number: int) -> list[Pair]:
        """Two independent draws (x, label) of the data, equal shares of classes."""
        label = stratified(number, self.known.classes)
        return [(self.known.sample(label, generator(seed, name)), label) for name in ("real 1", "real 2")]


class Images:
    """Images x [N, C, H, W] (uint8, possibly memory-mapped) and label [N], streamed without replacement."""

    def __init__(self, x: Tensor, label: Tensor, flip: bool = False, test: Pair | None = None):
        self.x, self.label, self.flip, self.test = x, label, flip, test
        self.order = functools.lru_cache(maxsize=8)(self.order)  # of the loop's thread and of the worker's
        self.ahead, self.worker = {}, ThreadPoolExecutor(1)

    def order(self, student: Student, stage: str, epoch: int) -> Tensor:
        """The images of the student's classes in this epoch's order."""
        own = of_classes(self.label, student.classes)
        g = generator(student.seed, stage, student.K, student.k, epoch, "order")
        return own[torch.randperm(len(own), generator=g)]

    def indices(self, student: Student, stage: str, first: int, number: int) -> Tensor:
        """The student's first-th, (first + 1)-th, … image of the stage."""
        size, out = len(self.order(student, stage, 0)), []
        while number:
            epoch, at = divmod(first, size)
            out.append(self.order(student, stage, epoch)[at:at + number])
            first, number = first + len(out[-1]), number - len(out[-1])
        return torch.cat(out)

    def _read(self, draws: Draws, step: int, batch: int, part: slice) -> Pair:
        index = torch.stack([self.indices(s, draws.stage, step * batch, batch)[part] for s in draws.students])
        return self.x[index.flatten()].unflatten(0, index.shape), self.label[index]

    def batch(self, draws: Draws, step: int, batch: int, part: slice = slice(None)) -> Pair:
        """x [M, b, C, H, W] in [-1, 1] and labels [M, b]; the next step's are read ahead."""
        key = (draws.stage, tuple(draws.students), batch, part.start, part.stop)
        at, ready = self.ahead.pop(key, (-1, None))
        x, label = ready.result() if at == step else self._read(draws, step, batch, part)
        self.ahead[key] = step + 1, self.worker.submit(self._read, draws, step + 1, batch, part)
        x = images.to_float(x.to(draws.device))
        if self.flip:
            mirrored = draws.uniform(step, "flip", batch)[:, part, None, None, None] < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return x, label.to(draws.device)

    def truth(self, seed: int, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(x, label, which rows) of two sets without a common image, to report and to select by: the training and the
        test images, or, without test images, all others and `number` of the training images (at most half)."""
        if self.test is not None:
            return [(x, label, torch.arange(len(x))) for x, label in ((self.x, self.label), self.test)]
        order, n = torch.randperm(len(self.x), generator=generator("truth")), min(number, len(self.x) // 2)
        order = order[self.label[order].argsort(stable=True)]  # class by class: each gives its share
        held = torch.zeros(len(order), dtype=torch.bool)
        held[order[(torch.arange(n) * len(order)) // n]] = True
        return [(self.x, self.label, part.nonzero()[:, 0]) for part in (~held, held)]

    def fingerprint(self) -> str:
        """Of the labels and of some images."""
        some = self.x[torch.linspace(0, len(self.x) - 1, min(64, len(self.x))).long()]
        return hashlib.sha256(self.label.numpy().tobytes() + some.numpy().tobytes()).hexdigest()[:16]


@dataclass
class Generated:
    """A teacher's samples as data, drawn with replacement [MSD App. D.3.3]."""
    y: Tensor  # [seeds, N, *shape]
    label: Tensor  # [seeds, N]
    seeds: list[int]

    def batch(self, draws: Draws, step: int, batch: int, part: slice = slice(None)) -> Pair:
        """y [M, b, *shape] and labels [M, b]."""
        row, index = [self.seeds.index(s.seed) for s in draws.students], []
        for r, s, g in zip(row, draws.students, draws.generators(step, "generated")):
            own = of_classes(self.label[r], s.classes)
            index.append(own[torch.randint(len(own), (batch,), generator=g, device=draws.device).to(own.device)])
        row, index = torch.tensor(row, device=self.y.device)[:, None], torch.stack(index)[:, part]
        y = self.y[row, index].to(torch.get_default_dtype() if self.y.dtype == torch.float16 else self.y.dtype)
        return y.to(draws.device), self.label[row, index].to(draws.device)


def source(flags: run.Flags):
    """The data of --dataset, from --data or the usual places."""
    known = facts(flags.dataset, flags.resolution)
    if known.sample:
        return Mixture(known)
    found = images.splits(known, flags.data, Path(flags.out) / "data")
    return Images(*found["train"], known.flip, found.get("test"))


def opened(flags: run.Flags, ranks: Ranks) -> Callable:
    """source(), which reads when first asked; of several ranks the first decodes."""
    once = functools.cache(lambda: source(flags))
    if ranks.size > 1 and not facts(flags.dataset).stacked:
        if ranks.rank == 0:
            once()
        ranks.wait()
    return once


def same_data(flags: run.Flags, held: Images) -> None:
    """OUT/data belongs to these images. UserError if its features were made from others."""
    about = {"dataset": flags.dataset, "resolution": held.x.shape[-1], "images": held.fingerprint()}
    run.check_config(Path(flags.out) / "data", about)
