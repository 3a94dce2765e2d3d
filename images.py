"""Image files of every form -> uint8 images [N, C, H, W] and labels [N]. Skip this file on first reading.

  fashion-mnist    IDX files, .gz or not; 28 x 28 padded to 32, pooled to 16 (or --resolution 32)
  cifar10          the binary version, torchvision's folder, or imagenet64's first two
  imagenet64       EDM's dataset_tool zip with dataset.json; class folders of images; the official downsampled batches
                   (npz) with map_clsloc.txt beside them: their labels are in another order
  fid.py           an npz of the ADM evaluator; a folder of PNG or JPEG; a students' folder of a run

Archives and folders are decoded once into a memory-mapped array beside the run (OUT/data): a damaged image is found
before training begins, and a GPU is fed without workers.
"""
import contextlib
import gzip
import io
import json
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import run
from flags import UserError

DEBIAN = "/usr/share/datasets/fashion-mnist"  # apt-get install dataset-fashion-mnist
USUAL = {  # where data are looked for without --data
    "fashion-mnist": ("data/fashion-mnist", "data/FashionMNIST/raw", "~/data/FashionMNIST/raw", DEBIAN),
    "cifar10": ("data", "data/cifar10", "~/data"),
    "imagenet64": ("data/imagenet64", "data/imagenet64.zip", "data/imagenet-64x64.zip"),
}
MODES = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB"}     # PIL clips 16 bits


def to_float(x: Tensor) -> Tensor:
    """Pixels, uint8 0…255 -> [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> pixels 0…255, as EDM's generate.py rounds: 127.5 x + 128, cut off; uint8 stays as it is."""
    return x if x.dtype == torch.uint8 else (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@contextlib.contextmanager
def reading(path):
    """What fails inside is the file's fault, in one line: PIL, numpy, gzip, zipfile, torch raise dozens of types."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path}: damaged, or not what is wanted here ({what})") from None


def splits(known, given: str, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train": (x, label)}, of some datasets also "test", from the path `given` or, if it is "", the usual places.

    known: data.Facts; cache: the folder of decoded images. UserError if there are none, or not what `known` says."""
    name, found = known.name, {}
    places = [Path(p).expanduser() for p in ((given, f"{given}/FashionMNIST/raw") if given else USUAL[name])]
    for place in filter(Path.exists, places):
        found = found or _published(name, place)
        if not found and (name == "imagenet64" or name == "cifar10" and given):
            parts = ["train", "test"] if any(place.glob("val*.npz")) else ["train"]
            found = {split: _tree(place, known, cache, split) for split in parts}
    if not found and not given and name != "imagenet64":
        found = _downloaded(name)
    if not found:
        raise UserError(f"{name}: nothing in {given or ', '.join(USUAL[name])}; docs/images.md says what --data takes")
    return {split: _fitted(*pair, known, given or name) for split, pair in found.items()}


def _published(name: str, place: Path) -> dict:
    """fashion-mnist or cifar10 in a form of its own; {} if it is not there."""
    if name == "fashion-mnist" and any(place.glob("train-images-idx3-ubyte*")):
        return {"train": _idx_pair(place / "train"), "test": _idx_pair(place / "t10k")}
    for folder in (place, place / "cifar-10-batches-bin"):
        if name == "cifar10" and (folder / "data_batch_1.bin").exists():
            train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
            return {"train": _cifar(train), "test": _cifar([folder / "test_batch.bin"])}
    if name == "cifar10" and (place / "cifar-10-batches-py").exists():
        return {split: _pickled_cifar(place, split == "train") for split in ("train", "test")}
    return {}


def _idx_pair(stem: Path) -> tuple[Tensor, Tensor]:
    return _idx(f"{stem}-images-idx3-ubyte")[:, None], _idx(f"{stem}-labels-idx1-ubyte").long()


def _idx(name: str) -> Tensor:
    """One IDX file, .gz or plain."""
    path = Path(name + ".gz") if Path(name + ".gz").exists() else Path(name)
    with reading(path):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def _cifar(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Rows of a label and 3 x 32 x 32 pixels; `stack`: an empty file is damaged."""
    with reading(files[0].parent):
        rows = np.stack([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in files])
    rows = torch.from_numpy(rows.reshape(-1, 3073))
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def _pickled_cifar(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10
    with reading(folder):
        held = CIFAR10(folder, train=train)  # checks MD5 sums before it opens a pickle
    return torch.from_numpy(held.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(held.targets)


def _downloaded(name: str) -> dict:
    """Through torchvision, where there is internet; {} where there is none."""
    from torchvision.datasets import CIFAR10, FashionMNIST
    print(f"{name}: not found on this machine; trying to download it into data/ …", flush=True)
    try:
        for train in (True, False):
            {"fashion-mnist": FashionMNIST, "cifar10": CIFAR10}[name]("data", train=train, download=True)
    except Exception:  # urllib and torchvision raise a dozen types
        return {}
    return _published(name, Path("data/FashionMNIST/raw" if name == "fashion-mnist" else "data"))


def _fitted(x: Tensor, label: Tensor, known, where) -> tuple[Tensor, Tensor]:
    """Padded to the dataset's own size, pooled to the wanted one. UserError for other images or labels."""
    if known.native == 32 and x.shape[2:] == (28, 28):
        x = F.pad(x, (2, 2, 2, 2))
    times, rest = divmod(x.shape[-1], known.shape[-1])
    if times > 1 and not rest:
        x = torch.cat([F.avg_pool2d(part.float(), times).round().to(torch.uint8) for part in x.split(8192)])
    lowest, highest = label.aminmax()
    if x.shape != (len(label), *known.shape) or lowest < 0 or highest >= known.classes:
        raise UserError(f"{where}: images {list(x.shape)}, {len(label)} labels from {lowest} to {highest}; {known.name}"
                        f" needs {[len(label), *known.shape]}, labels from 0 to {known.classes - 1}")
    return x, label


def _tree(path: Path, known, cache: Path, split: str) -> tuple[Tensor, Tensor]:
    """(x, label) of a zip, class folders or npz batches; decoded into `cache`, unless that was done before."""
    target = cache / f"{known.name}-{split}.npy"
    notes = target.with_suffix(".json")
    held = [p.stat() for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()]
    about = {"path": str(path.resolve()), "files": len(held), "changed": max([s.st_mtime for s in held], default=0),
             "bytes": sum(s.st_size for s in held)}
    old = run.load_json(notes, "label") if target.exists() and notes.exists() else {}
    if old and old == {**old, **about}:
        return torch.from_numpy(np.load(target, mmap_mode="r+")), torch.tensor(old["label"])
    notes.unlink(missing_ok=True)  # no old labels beside new images
    batches = sorted(path.glob("*.npz"))
    if batches:
        x, label = _batches(path, [b for b in batches if ("val" in b.name) == (split == "test")])
        shape, fill = x.shape, lambda out: np.copyto(out, x)
    else:
        names, label, read_file = _listing(path, known.classes)
        shape, fill = _decoder(path, names, read_file)
    _store(target, shape, fill)
    run.save_json(notes, {**about, "label": label})
    return torch.from_numpy(np.load(target, mmap_mode="r+")), torch.tensor(label)


def _batches(folder: Path, files: list[Path]) -> tuple[np.ndarray, list[int]]:
    """The official batches (data [N, 3 H W], labels 1…1000) as x [N, 3, H, W] and labels by sorted WordNet id."""
    table, x, label = folder / "map_clsloc.txt", [], []
    with reading(table):  # lines such as "n02119789 1 kit_fox"
        ids = {int(number): wnid for wnid, number, *_ in map(str.split, table.read_text().splitlines())}
    place = {wnid: i for i, wnid in enumerate(sorted(ids.values()))}
    for path in run.bar(files, "reading batches", len(files)):
        with reading(path), np.load(path) as part:
            flat = part["data"]
            side = round((flat.shape[1] / 3) ** 0.5)
            x.append(flat.reshape(-1, 3, side, side))
            label += [place[ids[int(i)]] for i in part["labels"]]
    with reading(folder):
        return np.concatenate(x), label


def _files(path: Path):
    """Of a folder or zip: the images' names, the names of all files, and read_file(name) -> bytes."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))
        read_file = lambda name: (path / name).read_bytes()
    else:
        with reading(path):
            archive, lock = zipfile.ZipFile(path), threading.Lock()
        names = sorted(archive.namelist())

        def read_file(name: str) -> bytes:
            with lock:  # a ZipFile is not for several threads at once
                return archive.read(name)
    pictures = [n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg")) and "/." not in f"/{n}"]
    if not pictures:
        raise UserError(f"{path}: no .png or .jpg images in it")
    return pictures, names, read_file


def _listing(path: Path, classes: int):
    """Images, their labels, read_file: by dataset.json, or by a folder's place among the sorted class folders."""
    pictures, names, read_file = _files(path)
    if path.is_dir() and "dataset.json" not in names:
        pictures = [n for n in pictures if "/" in n]  # a picture beside the folders has no class
        folders = sorted({n.split("/")[0] for n in pictures})
        if len(folders) != classes:
            raise UserError(f"{path}: {len(folders)} class folders, not {classes}: labels are their places by name,"
                            f" so all must be there (or a dataset.json)")
        place = {folder: i for i, folder in enumerate(folders)}
        return pictures, [place[n.split("/")[0]] for n in pictures], read_file
    with reading(f"{path}: dataset.json"):  # {"labels": [["00000/img00000000.png", 0], …]}
        label = {name: int(c) for name, c in json.loads(read_file("dataset.json"))["labels"] or ()}
    without = [n for n in pictures if n not in label]
    if without:
        raise UserError(f"{path}: dataset.json lacks the labels of {without[0]} and {len(without) - 1} more images")
    return pictures, [label[n] for n in pictures], read_file


def _decoder(path: Path, names: list[str], read_file):
    """(shape [N, C, H, W], fill(out)) of images of one size.

    C = 1 if the first, middle and last one are grey; grey ones among coloured (ImageNet has some) become coloured."""
    def pixels(name: str, colour: bool) -> np.ndarray:
        with reading(f"{path}: {name}"), Image.open(io.BytesIO(read_file(name))) as image:
            mode = MODES[image.mode]
            x = np.asarray(image.convert("RGB" if colour else mode))
            return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)

    def fill(out: np.ndarray) -> None:
        blocks = range(0, len(names), 4096)
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            for begin in run.bar(blocks, f"decoding {path.name}", len(blocks)):
                block = pool.map(lambda name: pixels(name, colour), names[begin:begin + 4096])
                for i, x in enumerate(block, begin):
                    with reading(f"{path}: {names[i]}"):  # such as of another size than the first
                        out[i] = x
    colour = any(len(pixels(names[i], False)) == 3 for i in (0, len(names) // 2, -1))
    return (len(names), *pixels(names[0], colour).shape), fill


def _store(target: Path, shape, fill) -> None:
    """A file of an array uint8 that fill(out) has filled: whole, or not there."""
    def write(temporary):
        try:
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            with open(temporary, "r+b") as f:  # its room on the disk, before hours of decoding
                os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
            fill(out)
            out.flush()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    run.write_atomic(target, write)


def read(path) -> Tensor:
    """uint8 images [N, C, H, W], C = 1 or 3. UserError on anything else.

    path: npz with arr_0 [N, H, W, C], a folder of PNG or JPEG, or one of a run with one samples.pt (x [N, C, H, W])."""
    path = Path(path)
    samples = [p for p in sorted(path.rglob("samples.pt")) if "reference" not in p.relative_to(path).parts]
    if len(samples) > 1:
        raise UserError(f"{path}: samples of several stages; give one: {', '.join(str(p.parent) for p in samples)}")
    with reading(path):
        if samples:
            x = run.load_tensors(samples[0])["x"]
        elif path.is_dir():
            names, _, read_file = _files(path)
            shape, fill = _decoder(path, names, read_file)
            x = torch.empty(shape, dtype=torch.uint8)
            fill(x.numpy())
        else:
            with np.load(path) as f:
                x = torch.from_numpy(f["arr_0"]).movedim(-1, 1)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"{path}: uint8 images, grey or RGB, are needed; it holds {x.dtype} {list(x.shape)}")
    return x.clone(memory_format=torch.contiguous_format)  # .contiguous() leaves odd strides where C = 1
