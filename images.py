"""Image files of every form -> uint8 images [N, C, H, W] and labels [N]. Skip this file on first reading.

Fashion-MNIST's IDX files; torchvision's folder of CIFAR-10; for any dataset EDM's zip with
dataset.json, class folders, and ImageNet's official batches (npz) with map_clsloc.txt beside them. The last three are
decoded once, into OUT/data: a damaged image is found before training begins, and a GPU is fed without workers.
"""
import contextlib
import gzip
import io
import json
import os
import stat
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import run
from flags import UserError
from run import reading

Pair = tuple[Tensor, Tensor]  # x [..., C, H, W] and label [...]


def to_float(x: Tensor) -> Tensor:
    """Pixels, uint8 0…255 -> [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> pixels 0…255, as EDM's generate.py rounds: 127.5 x + 128, cut off; uint8 stays as it is."""
    return x if x.dtype == torch.uint8 else (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _idx_pair(folder: Path, split: str) -> Pair:
    stem = folder / ("train" if split == "train" else "t10k")
    return _idx(f"{stem}-images-idx3-ubyte")[:, None], _idx(f"{stem}-labels-idx1-ubyte").long()


def _idx(name: str) -> Tensor:
    path = Path(name + ".gz") if Path(name + ".gz").exists() else Path(name)
    with reading(path):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def _torchvision(folder: Path, split: str, name: str = "cifar10", download: bool = False) -> Pair:
    from torchvision.datasets import CIFAR10, FashionMNIST
    kind = CIFAR10 if name == "cifar10" else FashionMNIST
    held = kind(folder, train=split == "train", download=download)  # checks MD5 sums before it opens a pickle
    x = torch.as_tensor(held.data)
    return (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()), torch.as_tensor(held.targets)


def _batches(folder: Path, split: str) -> Pair:
    """Labels 1…1000 of lines such as "n02119789 1 kit_fox" become places of the sorted WordNet ids."""
    lines, x, label = (folder / "map_clsloc.txt").read_text().splitlines(), [], []
    ids = {int(number): wnid for wnid, number, *_ in map(str.split, lines)}
    place = {wnid: i for i, wnid in enumerate(sorted(ids.values()))}
    for path in sorted(folder.glob("*.npz")):
        if ("val" in path.name) == (split == "test"):
            with reading(path), np.load(path) as part:
                side = round((part["data"].shape[1] / 3) ** 0.5)
                x.append(part["data"].reshape(-1, 3, side, side))
                label += [place[ids[int(i)]] for i in part["labels"]]
    return torch.from_numpy(np.concatenate(x)), torch.tensor(label)


def _labelled(path: Path, split: str, classes: int) -> Pair:
    """Labels by dataset.json, or by the places of the sorted class folders."""
    pictures, read_file = _files(path)
    if classes == 1:
        label = [0] * len(pictures)
    elif path.is_dir() and not (path / "dataset.json").exists():
        pictures = [n for n in pictures if "/" in n]  # a picture beside the folders has no class
        place = {folder: i for i, folder in enumerate(sorted({n.split("/")[0] for n in pictures}))}
        if len(place) != classes:
            raise UserError(f"{path}: {len(place)} class folders, not {classes}; labels are their places by name")
        label = [place[n.split("/")[0]] for n in pictures]
    else:
        with reading(f"{path}: dataset.json", 'EDM\'s {"labels": [["00000/img00000000.png", 0], …]}, at the top'):
            of = dict(json.loads(read_file("dataset.json"))["labels"])
            label = [of[n] for n in pictures]
            if wrong := [n for n, c in zip(pictures, label) if type(c) is not int]:
                raise ValueError(f"the label of {wrong[0]} is {of[wrong[0]]}, no whole number")
    return _pixels(path, pictures, read_file), torch.tensor(label)


def _walk(folder: Path) -> list[Path]:
    """The files in it, in linked folders too."""
    found = sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return [path for path in found if stat.S_ISREG(path.stat().st_mode)]  # no pipe; a link to nowhere is named


def _files(path: Path):
    """Of a folder or zip: the images' names, and read_file(name) -> bytes. Hidden files, and a Mac's, are no data."""
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in _walk(path)]
        read_file = lambda name: (path / name).read_bytes()
    else:
        archive, lock = zipfile.ZipFile(path), threading.Lock()
        names = sorted(archive.namelist())

        def read_file(name: str) -> bytes:
            method = archive.getinfo(name).compress_type
            known = f"packed by deflate (8) or not at all (0), without password; method {method}"
            with lock, reading(f"{path}: {name}", known):  # a ZipFile is not for several threads at once
                return archive.read(name)
    names = [n for n in names if "/." not in f"/{n}" and "__MACOSX/" not in f"/{n}" and not n.endswith("/")]
    pictures = [n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg"))]
    others = Counter(Path(n).suffix for n in {*names} - {*pictures, "dataset.json"})
    if not pictures:
        raise UserError(f"{path}: no .png or .jpg in it, but {dict(others)} (docs/images.md)")
    if others:
        print(f"{path}: not read: {', '.join(f'{n} {kind}' for kind, n in others.items())}", flush=True)
    return pictures, read_file


def _pixels(path: Path, names: list[str], read_file) -> Tensor:
    """uint8 [N, C, H, W]; C = 1 if the first, middle and last are grey. 16 bits are scaled; what is transparent is laid
    on white."""
    clear = []

    def pixels(name: str, colour: bool = False) -> np.ndarray:
        with reading(f"{path}: {name}"), Image.open(io.BytesIO(read_file(name))) as image:
            grey = image.mode[0] in "1LI" and not colour
            if image.mode[0] == "I":  # PIL would clip them
                image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
                clear.extend([name] * (layer.getextrema()[3][0] < 255))
            x = np.asarray(image.convert("L" if grey else "RGB"))
            return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)

    def fill(i: int) -> None:
        with reading(f"{path}: {names[i]}", f"{list(out.shape[1:])} as {names[0]}"):
            out[i] = pixels(names[i], colour)
    colour = any(len(pixels(names[i])) == 3 for i in (0, len(names) // 2, -1))
    out = np.empty((len(names), *pixels(names[0], colour).shape), np.uint8)
    blocks = range(0, len(names), 4096)
    with ThreadPoolExecutor(min(32, len(getattr(os, "sched_getaffinity", lambda _: range(4))(0)))) as pool:
        for begin in run.bar(blocks, f"decoding {path.name}"):
            list(pool.map(fill, range(begin, min(begin + 4096, len(names)))))
    if clear:
        print(f"{path}: {len({*clear})} images are in part transparent, such as {clear[0]}: laid on white", flush=True)
    return torch.from_numpy(out)


USUAL = {  # without --data
    "fashion-mnist": ("data/fashion-mnist", "data", "~/data", "/usr/share/datasets/fashion-mnist"),
    "cifar10": ("data", "data/cifar10", "~/data"),
    "imagenet64": ("data/imagenet64", "data/imagenet64.zip", "data/imagenet-64x64.zip"),
    "ffhq64": ("data/ffhq-64x64.zip", "data/ffhq64"), "afhqv2-64": ("data/afhqv2-64x64.zip", "data/afhqv2-64"),
}
FORMS = [  # (dataset, a file that tells a form of its own, its reader (folder, split) -> Pair); the rest is decoded
    ("fashion-mnist", "train-images-idx3-ubyte*", _idx_pair),
    ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte*", _idx_pair),
    ("cifar10", "cifar-10-batches-py", _torchvision),
]


def splits(known, given: str, cache: Path) -> dict[str, Pair]:
    """{"train": (x, label)}, often also "test", from the path `given` or, if it is "", the usual places.

    known: data.Facts; cache: a folder for decoded images. UserError if there are none, or others."""
    name = known.name.removesuffix("-uncond")
    places = [Path(os.path.expanduser(p)) for p in ([given] if given else USUAL[name])]
    decode = bool(given) or known.native == 64  # elsewhere a folder such as data/ may hold anything
    for place in places:
        for of, sign, reader in FORMS:
            for hit in place.glob(sign) if of == name else ():
                try:
                    return _fitted(known, hit.parent, reader)
                except FileNotFoundError:
                    if given:
                        raise  # else of a download that was stopped
        if decode and place.exists():
            reader = _batches if any(place.glob("*.npz")) else partial(_labelled, classes=known.classes)
            parts = ("train", "test") if any(place.glob("val*.npz")) else ("train",)
            return _fitted(known, place, partial(_cached, reader, cache / name), parts)
    nothing = f"{name}: nothing in {', '.join(map(str, places))} (docs/images.md)"
    if decode:
        raise UserError(nothing)
    print(f"{nothing}; trying to download it into data/ …", flush=True)
    return _fitted(known, Path("data"), partial(_torchvision, name=name, download=True))


def _cached(reader, cache: Path, place: Path, split: str) -> Pair:
    """reader(place, split), memory-mapped; done once."""
    target = cache.with_name(f"{cache.name}-{split}.pt")
    files = [p.stat() for p in _walk(place) or [place]]
    about = [str(place.resolve()), len(files), sum(s.st_size for s in files), sum(s.st_mtime_ns for s in files)]
    held = {}
    with contextlib.suppress(FileNotFoundError, run.Damaged):
        held = run.load_tensors(target, "about", "x", "label", mmap=True)
    if held.get("about") != about:
        x, label = reader(place, split)
        run.save_tensors(target, {"about": about, "x": x, "label": label})
        held = run.load_tensors(target, "x", "label", mmap=True)
    return held["x"], held["label"]


def _fitted(known, place: Path, reader, parts=("train", "test")) -> dict[str, Pair]:
    """Padded to the dataset's own size, pooled to the wanted one."""
    out = {}
    for split in parts:
        with reading(f"{known.name} in {place}"):
            x, label = reader(place, split)
        if known.native == 32 and x.shape[2:] == (28, 28):
            x = F.pad(x, (2, 2, 2, 2))
        times, rest = divmod(x.shape[-1], known.shape[-1])
        if times > 1 and not rest:
            x = torch.cat([F.avg_pool2d(part.float(), times).round().to(torch.uint8) for part in x.split(8192)])
        label = label * (known.classes > 1)  # all of one, where there are none
        lowest, highest = label.aminmax()
        if x.shape != (len(label), *known.shape) or lowest < 0 or highest >= known.classes:
            raise UserError(f"{place}: images {list(x.shape)}, {len(label)} labels from {lowest} to {highest}; "
                            f"{known.name}: {list(known.shape)}, from 0 to {known.classes - 1}")
        out[split] = x, label
    return out


def read(path) -> Tensor:
    """uint8 images [N, C, H, W], C = 1 or 3. UserError on anything else.

    path: npz with arr_0 [N, H, W, C], folder of PNG or JPEG, or of a run with one samples.pt (x [N, C, H, W])."""
    path = Path(path)
    samples = [p for p in sorted(path.rglob("samples.pt")) if "reference" not in p.relative_to(path).parts]
    if len(samples) > 1:
        raise UserError(f"{path}: several samples.pt; give one of {', '.join(str(p.parent) for p in samples)}")
    with reading(path):
        if samples:
            x = run.load_tensors(samples[0], "x")["x"]
        elif path.is_dir():
            x = _pixels(path, *_files(path))
        else:
            with np.load(path) as f:
                x = torch.from_numpy(f["arr_0"]).movedim(-1, 1)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"{path}: uint8 images, grey or RGB, are needed, not {x.dtype} {list(x.shape)}")
    return x.clone(memory_format=torch.contiguous_format)  # .contiguous() leaves odd strides where C = 1
