"""One table of facts for every dataset, one stream of (x, label) from it, and one judge of samples.

A stage file never asks which dataset it trains on: what differs is a value in DATASETS, or a preset.

  facts       shape, classes, network, sampler batch …            known without the data
  source      the data: `batch` gives (x in [-1, 1], label), restricted to a student's own classes Y_k [MSD Eq. 1], in an
              order that is a function of the step alone, so that a killed run goes on with the very next batch
  judge       statistics of samples and their distance: histograms and l1 for the toy, features and FD for images

Forms that are read          where                                          what
  toy                        nowhere: sampled                               toy_mog.py
  fashion-mnist              IDX files, .gz or not                          28 x 28 padded to 32, pooled to 16 (or --resolution 32)
  cifar10                    the binary version, torchvision's folder, or as imagenet64's first two forms
  imagenet64                 EDM's dataset_tool zip with dataset.json; class folders of images; the official downsampled
                             npz batches with map_clsloc.txt beside them (their labels are in another order)

Images from archives and folders are decoded once, by all cores, into one array beside the run (OUT/data), which is then
memory-mapped: a damaged image is found before training begins, and no workers are needed to keep a GPU fed.
"""
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import common
import fid
import toy_mog
import unet


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rest of the code needs to know of a dataset before it sees any of it."""
    name: str
    shape: tuple[int, ...]                 # of one x
    classes: int                           # |Y|; of the dataset, never of a filtered part of it
    make: Callable                         # make(facts, students, size) -> the network F(x, c_noise, label)
    sizes: tuple[str, ...]                 # names of the sizes that `net` knows, the teacher's first
    stacked: bool                          # do students live in one stack [M, B, ...]? Else each is a stack of one
    chunk: int                             # samples per call of the teacher's sampler; one file each
    metric: str                            # l1 or fd
    native: int = 0                        # pixels of the data as they come
    flip: bool = False                     # mirrored half of the time
    sigma_data: float = 0.5                # EDM's sigma_data
    exact: Callable | None = None          # the optimal denoiser (x, sigma, label) -> D, where there is one …
    sample: Callable | None = None         # … and the sampler of the data, sample(label, generator) -> x, that goes with it
    embeddings: Callable | None = None     # embeddings() -> [classes, d], where conditions are rows of a fixed table
    meaning: Callable = lambda label: label  # the class [...] that a label [...] stands for, where several labels mean one
    fields: dict = dataclasses.field(default_factory=dict, compare=False)      # what each of `sizes` stands for: (width, depth), or a unet.Size

    @property
    def resolution(self) -> int:
        """Pixels of an image's side; 0 where x is no image. What checkpoints and config.json keep."""
        return self.shape[-1] if self.native else 0

    def net(self, students: int = 1, size=None):
        """A network of `students` students; size: one of `sizes`, the first if not given, or such a size's fields."""
        return self.make(self, students, size or self.sizes[0])

    def narrowed(self, size, keep: float) -> tuple:
        """The same architecture with about this share of a size's channels, as fields for `net`; image widths stay divisible for group norms."""
        width, *rest = self.fields[size] if isinstance(size, str) else size
        unit = 1 if not self.native else 32 if width >= 64 else 4
        return (max(unit, 4, round(width * keep / unit) * unit), *rest)


def _image_net(facts: Facts, students: int, size, sizes: dict) -> unet.UNet:
    if students != 1:
        raise ValueError("image students are not stacked: each has a network of its own")
    return unet.UNet(facts.shape[1], facts.shape[0], facts.classes, sizes[size] if isinstance(size, str) else unet.Size(*size))


def _images(name: str, channels: int, resolution: int, classes: int, sizes: dict, **more) -> Facts:
    return Facts(name, (channels, resolution, resolution), classes, functools.partial(_image_net, sizes=sizes), tuple(sizes),
                 stacked=False, metric="fd", fields=sizes, **more)


DATASETS = {
    "toy": Facts("toy", (2,), toy_mog.CLASSES, lambda facts, students, size: toy_mog.toy_net(students, size), tuple(toy_mog.SIZES),
                 stacked=True, chunk=8192, metric="l1", exact=toy_mog.denoiser, sample=toy_mog.sample, fields=toy_mog.SIZES),
    # text-like conditions: label picks a row of a fixed table of embeddings; partitions and router look at them
    "toy-prompts": Facts("toy-prompts", (2,), toy_mog.PROMPTS, lambda facts, students, size: toy_mog.toy_net(students, size, toy_mog.prompts()),
                         tuple(toy_mog.SIZES), stacked=True, chunk=8192, metric="l1", fields=toy_mog.SIZES, embeddings=toy_mog.prompts, meaning=toy_mog.prompt_class,
                         exact=lambda x, sigma, label=None: toy_mog.denoiser(x, sigma, None if label is None else toy_mog.prompt_class(label)),
                         sample=lambda label, generator: toy_mog.sample(toy_mog.prompt_class(label), generator)),
    "fashion-mnist": _images("fashion-mnist", 1, 16, 10, unet.LAPTOP, chunk=500, native=32, flip=False),
    "cifar10": _images("cifar10", 3, 32, 10, unet.CIFAR, chunk=500, native=32, flip=True),
    "imagenet64": _images("imagenet64", 3, 64, 1000, unet.SIZES, chunk=250, native=64, flip=False),
}


def facts(name: str, resolution: int = 0) -> Facts:
    """The facts of a dataset, at its own resolution or pooled to another. UserError if it can't be pooled to that."""
    known = DATASETS[name]
    if not resolution:
        return known
    if not known.native or resolution > known.native or known.native % resolution or resolution < 8:
        sizes = [r for r in (8, 16, 32, 64) if known.native and known.native % r == 0 and r <= known.native]
        raise common.UserError(f"--resolution {resolution}: {name} " + (f"can have {', '.join(map(str, sizes))}" if sizes
                                                                        else "has no resolution; leave the flag out"))
    return dataclasses.replace(known, shape=(known.shape[0], resolution, resolution))


def stratified(batch: int, classes: int, device="cpu") -> Tensor:
    """Labels [batch] in turn: 0, 1, …, classes - 1, 0, …: equal shares, as an evaluation wants them."""
    return torch.arange(batch, device=device) % classes


# ------------------------------------------------------------------------------------------------------------- sources

class Mixture:
    """The toy's source: fresh samples for every step."""

    def __init__(self, known: Facts):
        self.known = known

    def batch(self, draws: common.Draws, step: int, batch: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Data x [M, b, 2] and labels [M, b] of each member's classes: `part` of the batch of this step."""
        label = draws.label(step, "data label", batch)
        x = torch.stack([self.known.sample(row, g) for row, g in zip(label, draws.generators(step, "data"))])
        return x[:, part], label[:, part]

    def truth(self, seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
        """Two independent draws (x, label) of the data, equal shares of classes: what samples are compared with, and a floor."""
        label = stratified(number, self.known.classes)
        return [(self.known.sample(label, common.generator(seed, name)), label) for name in ("real 1", "real 2")]


class Images:
    """Images x [N, C, H, W] (uint8, possibly memory-mapped) and label [N] in memory, streamed without replacement."""

    def __init__(self, x: Tensor, label: Tensor, flip: bool = False, test: tuple[Tensor, Tensor] | None = None):
        self.x, self.label, self.flip, self.test = x, label, flip, test
        self.orders: dict = {}
        self.lock = threading.Lock()                                # the reader and the loop both ask for orders
        self.ahead: dict = {}
        self.worker = ThreadPoolExecutor(1)

    def order(self, member: common.Member, stage: str, epoch: int) -> Tensor:
        """The images of the member's classes in the order of this epoch."""
        key = (member, stage, epoch)
        with self.lock:
            if key not in self.orders:
                own = torch.isin(self.label, torch.tensor(member.classes)).nonzero()[:, 0]
                if not len(own):
                    raise common.UserError(f"the data have no image of the classes {list(member.classes)}")
                g = common.generator(member.seed, stage, member.students, member.student, epoch, "order")
                self.orders = {k: v for k, v in self.orders.items() if k[2] in (0, epoch - 1, epoch)}
                self.orders[key] = own[torch.randperm(len(own), generator=g)]
            return self.orders[key]

    def indices(self, member: common.Member, stage: str, first: int, number: int) -> Tensor:
        """Which images the member sees as its first-th, (first + 1)-th, … of the stage."""
        size, out = len(self.order(member, stage, 0)), []
        while number:
            epoch, at = divmod(first, size)
            out.append(self.order(member, stage, epoch)[at:at + number])
            first, number = first + len(out[-1]), number - len(out[-1])
        return torch.cat(out)

    def _read(self, draws: common.Draws, step: int, batch: int, part: slice) -> tuple[Tensor, Tensor]:
        index = torch.stack([self.indices(m, draws.stage, step * batch, batch)[part] for m in draws.members])  # [M, b]
        return self.x[index.flatten()].unflatten(0, index.shape), self.label[index]

    def batch(self, draws: common.Draws, step: int, batch: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """x [M, b, C, H, W] in [-1, 1] and labels [M, b], `part` of the batch of this step; the next step's is read ahead."""
        key = (draws.stage, tuple(draws.members), step, batch, part.start, part.stop)
        ready = self.ahead.pop(key, None)
        x, label = ready.result() if ready else self._read(draws, step, batch, part)
        after = (*key[:2], step + 1, *key[3:])
        self.ahead = {k: v for k, v in self.ahead.items() if k[2] >= step}
        self.ahead[after] = self.worker.submit(self._read, draws, step + 1, batch, part)
        x = common.to_float(x.to(draws.device))
        if self.flip:
            mirrored = draws.uniform(step, "flip", batch)[:, part, None, None, None] < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        return x, label.to(draws.device)

    def truth(self, seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
        """The training images, and the test images (without them: a draw of `number` training images)."""
        if self.test is not None:
            return [(self.x, self.label), self.test]
        drawn = torch.randperm(len(self.x), generator=common.generator("truth"))[:number].sort().values
        return [(self.x, self.label), (self.x[drawn], self.label[drawn])]

    def fingerprint(self) -> str:
        """A hash of the labels and of some of the images: tells other data apart."""
        some = self.x[torch.linspace(0, len(self.x) - 1, min(64, len(self.x))).long()]
        return hashlib.sha256(self.label.numpy().tobytes() + some.numpy().tobytes()).hexdigest()[:16]


class Generated:
    """A teacher's samples in the place of the data [MSD App. D.3.3]: y [seeds, N, *shape], label [seeds, N], drawn with replacement."""

    def __init__(self, y: Tensor, label: Tensor, seeds: list[int]):
        self.y, self.label, self.seeds = y, label, seeds

    def batch(self, draws: common.Draws, step: int, batch: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """y [M, b, *shape] and labels [M, b] of each member's classes: `part` of the batch of this step. UserError if it has none."""
        row, index = [self.seeds.index(m.seed) for m in draws.members], []
        for r, m, g in zip(row, draws.members, draws.generators(step, "generated")):
            own = torch.isin(self.label[r], torch.tensor(m.classes, device=self.label.device)).nonzero()[:, 0]
            if not len(own):
                raise common.UserError(f"--real generated: no pair of the classes {list(m.classes)}; give more --pairs")
            index.append(own[torch.randint(len(own), (batch,), generator=g, device=draws.device).to(own.device)])
        row, index = torch.tensor(row, device=self.y.device)[:, None], torch.stack(index)[:, part]
        y = self.y[row, index].to(torch.get_default_dtype() if self.y.dtype == torch.float16 else self.y.dtype)
        return y.to(draws.device), self.label[row, index].to(draws.device)


# --------------------------------------------------------------------------------------------------------- reading files

def _bad(path, what: str) -> common.UserError:
    return common.UserError(f"{path}: {what}")


def _idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file, plain or .gz."""
    for path in (folder / (name + ".gz"), folder / name):
        if path.exists():
            try:
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                dims = raw[3] if raw[:3] == b"\0\0\x08" else 0
                if dims not in (1, 3):
                    raise ValueError("not IDX")
                shape = np.frombuffer(raw, ">i4", dims, 4)
                return np.frombuffer(raw, np.uint8, int(np.prod(shape)), 4 + 4 * dims).reshape(shape)
            except (OSError, EOFError, ValueError, IndexError, gzip.zlib.error):
                raise _bad(path, "not a whole IDX file; fetch it again") from None
    raise _bad(folder, f"no {name}[.gz] in it")


def _fashion(places: list[Path]) -> dict:
    for folder in places:
        if any((folder / n).exists() for n in ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte")):
            return {split: (torch.from_numpy(_idx(folder, f"{stem}-images-idx3-ubyte").copy())[:, None],
                            torch.from_numpy(_idx(folder, f"{stem}-labels-idx1-ubyte").astype(np.int64)))
                    for split, stem in (("train", "train"), ("test", "t10k"))}
    return {}


def _cifar(places: list[Path]) -> dict:
    for folder in places:
        names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        inner = next((f for f in (folder, folder / "cifar-10-batches-bin") if (f / "data_batch_1.bin").exists()), None)
        if inner:
            out = {}
            for split, files in names.items():
                raw = []
                for name in files:
                    raw.append(np.fromfile(inner / name, np.uint8) if (inner / name).exists() else np.zeros(1, np.uint8))
                    if len(raw[-1]) == 0 or len(raw[-1]) % 3073:
                        raise _bad(inner / name, "missing or not a whole CIFAR-10 file; fetch the binary version again")
                rows = torch.from_numpy(np.concatenate(raw).reshape(-1, 3073))
                out[split] = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()
            return out
        if (folder / "cifar-10-batches-py").is_dir():               # pickles: torchvision checks their MD5 before it reads them
            from torchvision.datasets import CIFAR10
            try:
                sets = {s: CIFAR10(folder, train=s == "train") for s in ("train", "test")}
            except RuntimeError:
                raise _bad(folder / "cifar-10-batches-py", "damaged (its MD5 sums differ); fetch it again") from None
            return {s: (torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)) for s, d in sets.items()}
    return {}


def _download(name: str) -> dict:
    """Through torchvision, where there is internet; {} where there is none."""
    import torchvision.datasets as tv
    kind = {"fashion-mnist": tv.FashionMNIST, "cifar10": tv.CIFAR10}[name]
    try:
        print(f"{name}: not found on this machine; trying to download it into data/ …", flush=True)
        for train in (True, False):
            kind("data", train=train, download=True)
    except Exception:                                               # urllib and torchvision raise a dozen types
        return {}
    return {"fashion-mnist": _fashion, "cifar10": _cifar}[name]([Path("data/FashionMNIST/raw"), Path("data")])


def _listing(path: Path, classes: int) -> tuple[list[str], list[int], Callable]:
    """Names, labels and opener (name -> file object) of the images of a zip with dataset.json, or of class folders."""
    if path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:
            raise _bad(path, "not a whole zip file; make or fetch it again") from None
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".png", ".jpg", ".jpeg")))
        local = threading.local()                                   # a ZipFile is not for several threads at once

        def opener(name):
            if not hasattr(local, "archive"):
                local.archive = zipfile.ZipFile(path)
            return io.BytesIO(local.archive.read(name))
        text = archive.read("dataset.json") if "dataset.json" in archive.namelist() else None
    else:
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        opener = lambda name: open(path / name, "rb")
        text = (path / "dataset.json").read_bytes() if (path / "dataset.json").exists() else None
        if text is None and names:
            folders = sorted({Path(n).parts[0] for n in names if len(Path(n).parts) > 1})
            if len(folders) != classes:
                raise _bad(path, f"{len(folders)} class folders with images, but the dataset has {classes} classes: their "
                                 f"sorted names are the labels, so all must be there (or add a dataset.json)")
            number = {f: i for i, f in enumerate(folders)}
            names = [n for n in names if len(Path(n).parts) > 1]     # a picture beside the folders has no class
            return names, [number[Path(n).parts[0]] for n in names], opener
    if not names:
        raise _bad(path, "no .png or .jpg images in it")
    try:
        pairs = json.loads(text)["labels"] if text else None
        known = {k: int(v) for k, v in pairs} if pairs else {}
    except (ValueError, TypeError, KeyError):
        raise _bad(path, 'dataset.json is damaged; it must read {"labels": [["00000/img00000000.png", 0], …]}') from None
    if not known:
        raise _bad(path, "no labels: dataset.json is missing or has none, and classes are needed; make the zip again with labels")
    missing = [n for n in names if n.replace(os.sep, "/") not in known]
    if missing:
        raise _bad(path, f"dataset.json has no label for {missing[0]} and {len(missing) - 1} more images")
    return names, [known[n.replace(os.sep, "/")] for n in names], opener


def _decode(path: Path, listing, channels: int, target: Path, quiet: bool) -> np.ndarray:
    """All images of the listing as one memory-mapped array uint8 [N, C, H, W], made once, atomically."""
    names, _, opener = listing

    def one(name, grey_too=True):
        try:
            with opener(name) as f, Image.open(f) as image:
                image.load()
                grey = image.mode in ("L", "1", "I;16", "LA")       # ImageNet has some among its colour images
                x = np.asarray(image.convert("L" if grey and (channels == 1 or not grey_too) else "RGB"))
        except Exception:                                           # PIL and zipfile raise a dozen types for a damaged file
            raise _bad(f"{path}: {name}", "a damaged image; take it out or fetch the data again") from None
        x = x[None] if x.ndim == 2 else x.transpose(2, 0, 1)
        if x.shape[0] != channels:
            raise _bad(f"{path}: {name}", f"{'grey' if x.shape[0] == 1 else 'colour'} where "
                                          f"{'grey' if channels == 1 else 'colour'} images are expected")
        return x
    shape = one(names[0]).shape
    for name in (names[0], names[len(names) // 2], names[-1])[:1 if channels == 1 else 3]:
        try:
            one(name, grey_too=False)                               # all three grey: the data are
            break
        except common.UserError as error:
            wrong = error
    else:
        raise wrong
    with _array(target, (len(names), *shape)) as out, ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        blocks = range(0, len(names), 4096)
        for begin in common.bar(blocks, f"decoding {path.name}", len(blocks), quiet):
            for i, x in enumerate(pool.map(one, names[begin:begin + 4096]), begin):
                if x.shape != shape:
                    raise _bad(path, f"images of several sizes: {names[0]} is {shape[1]} x {shape[2]}, {names[i]} {x.shape[1]} x {x.shape[2]}")
                out[i] = x
    return np.load(target, mmap_mode="r+")


@contextlib.contextmanager
def _array(target: Path, shape):
    """A memory-mapped array uint8 to fill, renamed to `target` when it is whole and removed if it never is.

    Its space on the disk is reserved first: a full disk is a UserError now, not a crash in the middle."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            with open(temporary, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
        except OSError as error:
            raise common.UserError(f"cannot write {temporary}: {error.strerror}; choose another --out") from None
        yield out
        out.flush()
        os.replace(temporary, target)
    finally:
        if os.access(target.parent, os.W_OK):
            temporary.unlink(missing_ok=True)


def _batches(folder: Path, files: list[Path], target: Path, quiet: bool) -> tuple[np.ndarray, list[int]]:
    """The official downsampled batches (keys data [N, 3 H W], labels 1…1000) as one memory-mapped array, labels by WordNet id."""
    table = folder / "map_clsloc.txt"
    if not table.exists():
        raise _bad(folder, "map_clsloc.txt is missing (it comes with the downsampled ImageNet): these batches number the classes "
                           "in another order than everyone else, and it is needed to translate")
    try:
        ids = {int(number): wnid for wnid, number, *_ in map(str.split, table.read_text().splitlines())}
    except ValueError:
        raise _bad(table, "damaged: expected lines such as 'n02119789 1 kit_fox'") from None
    place = {wnid: i for i, wnid in enumerate(sorted(ids.values()))}
    x, label = [], []
    for path in common.bar(files, "reading batches", len(files), quiet):
        try:
            with np.load(path) as part:
                flat, numbers = part["data"], part["labels"]
            side = round((flat.shape[1] / 3) ** 0.5)
            x.append(flat.reshape(-1, 3, side, side))
            label += [place[ids[int(i)]] for i in numbers]
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, EOFError) as error:
            raise _bad(path, f"not a batch of the downsampled ImageNet ({type(error).__name__}: {error})".splitlines()[0]) from None
    if len({p.shape[1:] for p in x}) > 1 or len(label) != sum(map(len, x)):
        raise _bad(folder, "batches of several sizes, or labels that do not match the images")
    with _array(target, (len(label), *x[0].shape[1:])) as out:
        np.concatenate(x, out=out)
    return np.load(target, mmap_mode="r+"), label


def _from_tree(path: Path, facts_: Facts, cache: Path, split: str, quiet: bool) -> tuple[Tensor, Tensor]:
    """(x, label) of a zip, of class folders, or of npz batches; decoded once into `cache`."""
    target = cache / f"{facts_.name}-{split}.npy"
    held = [path.stat()] if path.is_file() else [p.stat() for p in path.rglob("*") if p.is_file()]
    about = {"path": str(path.resolve()), "files": len(held), "changed": max([s.st_mtime for s in held], default=0), "bytes": sum(s.st_size for s in held)}
    notes = target.with_suffix(".json")
    if target.exists() and notes.exists():
        old = common.load_json(notes, "label")
        if all(old.get(k) == v for k, v in about.items()):
            return torch.from_numpy(np.load(target, mmap_mode="r+")), torch.tensor(old["label"])
        notes.unlink(missing_ok=True)
    files = sorted(path.glob("*.npz")) if path.is_dir() else []
    if files:
        wanted = [f for f in files if ("val" in f.name) == (split == "test")]
        if not wanted:
            raise _bad(path, f"no {'val' if split == 'test' else 'train'}_data*.npz in it")
        x, label = _batches(path, wanted, target, quiet)
    else:
        listing = _listing(path, facts_.classes)
        label = listing[1]
        x = _decode(path, listing, facts_.shape[0], target, quiet)
    common.save_json(notes, {**about, "label": label})
    return torch.from_numpy(x), torch.tensor(label)


def _fit(x: Tensor, label: Tensor, facts_: Facts, where) -> tuple[Tensor, Tensor]:
    """Padded to the native size, pooled to the wanted one; shapes and labels checked. UserError otherwise."""
    if x.shape[1] != facts_.shape[0]:
        raise _bad(where, f"{x.shape[1]} channels, but {facts_.name} has {facts_.shape[0]}")
    if len(label) != len(x):
        raise _bad(where, f"{len(x)} images but {len(label)} labels")
    if len(label) and not (0 <= int(label.min()) and int(label.max()) < facts_.classes):
        raise _bad(where, f"labels from {int(label.min())} to {int(label.max())}, but {facts_.name} has classes 0 to {facts_.classes - 1}")
    side, want = x.shape[-1], facts_.shape[-1]
    if x.shape[-2] != side:
        raise _bad(where, f"images of {x.shape[-2]} x {side} pixels; square ones are needed")
    if side == 28 and facts_.native == 32:
        x, side = F.pad(x, (2, 2, 2, 2)), 32
    if side % want:
        raise _bad(where, f"images of {side} pixels cannot be pooled to {want}; give --resolution, or data of {facts_.native} pixels")
    if side != want:
        x = torch.cat([F.avg_pool2d(part.float(), side // want).round().to(torch.uint8) for part in x.split(8192)])
    return x, label


def opened(flags, ranks: common.Ranks) -> Callable:
    """source(), read when it is first asked for; of several ranks the first one reads before the others, and decodes."""
    known = functools.lru_cache(lambda: source(flags))
    if ranks.size > 1 and not facts(flags.dataset).stacked:
        if ranks.rank == 0:
            known()
        ranks.wait()
    return known


def source(flags):
    """The data of --dataset, from --data or the usual places. UserError if they can't be found or read.

    flags: needs dataset, resolution, data, out, quiet."""
    known = facts(flags.dataset, flags.resolution)
    if known.sample:
        return Mixture(known)
    given = Path(flags.data).expanduser() if flags.data else None
    if given and not given.exists():
        raise common.UserError(f"--data {flags.data}: no such file or folder")
    home = Path("~").expanduser()
    usual = {"fashion-mnist": [Path("data/fashion-mnist"), Path("data/FashionMNIST/raw"), home / "data/FashionMNIST/raw",
                               Path("/usr/share/datasets/fashion-mnist")],
             "cifar10": [Path("data"), Path("data/cifar10"), home / "data"]}.get(known.name, [Path("data/imagenet64"), Path("data/imagenet64.zip"), Path("data/imagenet-64x64.zip")])
    reader = {"fashion-mnist": _fashion, "cifar10": _cifar}.get(known.name, lambda places: {})
    hint = {"fashion-mnist": "give --data a folder with the four IDX files (Debian: apt-get install dataset-fashion-mnist)",
            "cifar10": "give --data the folder of the binary version (data_batch_1.bin …), or a zip of images with dataset.json",
            "imagenet64": "give --data EDM's imagenet-64x64.zip, class folders of images, or the folder of the npz batches"}[known.name]
    splits = reader([given, given / "FashionMNIST/raw"] if given else usual)
    tree = given or next((p for p in usual if p.exists() and known.name == "imagenet64"), None)
    if not splits and tree and known.name != "fashion-mnist":
        cache = Path(flags.out) / "data"
        splits = {"train": _from_tree(tree, known, cache, "train", flags.quiet)}
        if tree.is_dir() and list(tree.glob("val*.npz")):
            splits["test"] = _from_tree(tree, known, cache, "test", flags.quiet)
    if not splits and not given and known.name != "imagenet64":
        splits = _download(known.name)
    if not splits:
        raise common.UserError(f"{known.name}: {'nothing to read in ' + flags.data if given else 'no data found'}; {hint}")
    splits = {k: _fit(*v, known, given or known.name) for k, v in splits.items()}
    return Images(*splits["train"], known.flip, splits.get("test"))


# --------------------------------------------------------------------------------------------------------------- judge

@dataclasses.dataclass(frozen=True)
class Judge:
    """How good are samples? What a run selects its checkpoints by, and reports."""
    title: str                             # what its distance is called: l1, FID, FD (our classifier)
    statistics: Callable                   # statistics(x, label) -> what `distance` compares; x in [-1, 1] or uint8
    distance: Callable                     # distance(statistics, statistics, classes=None) -> float, 0 = equal
    check: Callable                        # check(x, label) -> {name: value}, further numbers about samples
    truth: Callable                        # truth(seed, number) -> {"real": statistics of the data, "floor_data": float, and
                                           # "real_select": the data's for choosing checkpoints (toy: another draw of them)}


def toy_statistics(x: Tensor, label: Tensor, classes: int = toy_mog.CLASSES) -> Tensor:
    """Histogram of each class, counts [classes, bins^2 + 1], on the CPU."""
    x, label = x.cpu(), label.cpu()
    return torch.stack([toy_mog.histogram(x[label == c]) for c in range(classes)])


def toy_distance(a: Tensor, b: Tensor, classes=None) -> float:
    """l1 of the histograms pooled over `classes` (default all), from two `toy_statistics`."""
    rows = slice(None) if classes is None else list(classes)
    return toy_mog.l1(a[rows].sum(0), b[rows].sum(0))


def toy_judge(known: Facts) -> Judge:
    """The judge of the toy's points: l1 of histograms, coverage of the Gaussians."""
    statistics = functools.partial(toy_statistics, classes=known.classes)

    def truth(seed: int, number: int) -> dict:
        drawn = [statistics(x, label) for x, label in Mixture(known).truth(seed, number)]
        return {"real": drawn[0], "real_select": drawn[1], "floor_data": toy_distance(*drawn)}
    return Judge("l1", statistics, toy_distance, lambda x, label: toy_mog.coverage(x, known.meaning(label)), truth)


class Features:
    """Features [N, d] of labelled images: mean and covariance of any set of classes [MSD App. E]."""

    def __init__(self, features: Tensor, label: Tensor):
        self.features, self.label, self.known = features, label.cpu(), {}

    def moments(self, classes=None) -> fid.Moments:
        """Of the images of these classes; kept, since a reference is asked again and again. UserError if they are under two."""
        key = None if classes is None else tuple(sorted(int(c) for c in classes))
        if key not in self.known:
            rows = self.features if key is None else self.features[torch.isin(self.label, torch.tensor(key))]
            if len(rows) < 2:
                raise common.UserError(f"classes {list(key or ())}: fewer than 2 images to take statistics of; give more samples")
            self.known[key] = fid.Moments()
            for piece in rows.split(16_384):
                self.known[key].add(piece)
        return self.known[key]


def feature_distance(a: Features, b: Features, classes=None) -> float:
    """Frechet distance of the features of two sets of images, over `classes` (default all)."""
    a, b = a.moments(classes), b.moments(classes)
    return fid.frechet_distance(a.mean(), a.cov(), b.mean(), b.cov())


def same_data(flags, images: Images) -> None:
    """The classifier and the features in OUT/data belong to these images. UserError if they were made from others."""
    try:
        common.check_config(Path(flags.out) / "data", {"dataset": flags.dataset, "resolution": images.x.shape[-1], "images": images.fingerprint()})
    except common.UserError:
        raise common.UserError(f"--out {flags.out}: made from other images, or at another resolution; give the --data and --resolution of "
                               f"that run, or choose another --out") from None


def judge(flags, source, device, ranks) -> Judge:
    """The judge of a dataset. Of images: by NVIDIA's Inception (--features PATH) or by a classifier trained here, once.

    source() gives the data. The classifier and the data's features are kept in OUT/data; the first rank makes them."""
    known = facts(flags.dataset, flags.resolution)
    if known.stacked:
        return toy_judge(known)
    home = Path(flags.out) / "data"
    if flags.features:
        net = fid.Inception(flags.features, device)
    else:
        path = home / f"classifier-{known.resolution}px.pt"
        if ranks.rank == 0 and not path.exists():
            print(f"{path}: training a classifier for {known.name}, the judge of images …", flush=True)
            fid.save_classifier(path, fid.train_classifier(source().x, source().label, known.classes, device=device, quiet=flags.quiet))
        ranks.wait()
        net = fid.load_classifier(path).to(device)

    def pixels(x: Tensor) -> Tensor:
        return common.to_uint8(x).cpu()   # a sample is judged as the image that would be saved

    def statistics(x: Tensor, label: Tensor) -> Features:
        return Features(net.features(pixels(x)), label)

    def check(x: Tensor, label: Tensor) -> dict:
        if not isinstance(net, fid.Classifier):
            return {}
        with torch.no_grad():
            said = torch.cat([net(common.to_float(p.to(device))).argmax(1).cpu() for p in pixels(x).split(1024)])
        return {"right class": (said == label.cpu()).double().mean().item()}

    @functools.lru_cache
    def real() -> dict:
        kept = home / f"features-{common.fingerprint(getattr(net, 'net', net))}.pt"             # of these very weights
        if ranks.rank == 0 and not kept.exists():
            print(f"{kept}: features of the data …", flush=True)
            sets = [(net.features(x), label) for x, label in source().truth(0, flags.eval_samples)]
            common.save_tensors(kept, {"features": [f for f, _ in sets], "label": [label for _, label in sets]})
        ranks.wait()
        saved = common.load_tensors(kept)
        sets = [Features(f, label) for f, label in zip(saved["features"], saved["label"])]
        return {"real": sets[0], "real_select": sets[0], "floor_data": feature_distance(*sets)}
    return Judge(net.name, statistics, feature_distance, check, lambda seed, number: dict(real()))
