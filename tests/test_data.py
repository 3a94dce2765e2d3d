"""Reading images in the forms that people have, the stream's order, and what is said of files that are wrong."""
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import images
import run
from conftest import write_idx
from flags import UserError


def source(dataset, path, out, resolution=0):
    return data.source(run.Flags(dataset=dataset, data=str(path), out=str(out), resolution=resolution))


def picture(value: int, side: int = 64, channels: int = 3) -> np.ndarray:
    x = np.full((side, side, channels), value, np.uint8)
    x[0, 1] = 255 - value  # not symmetric: rows and columns must not be swapped
    return x[..., 0] if channels == 1 else x


def save(path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_zip(path, labels=(1, 2), draw=lambda i: picture(10 + i), listing=""):
    """EDM's dataset_tool layout: uncompressed PNGs in numbered folders and dataset.json."""
    names = [f"00000/img{i:08d}.png" for i in range(len(labels))]
    with zipfile.ZipFile(path, "w") as z:
        for i, name in enumerate(names):
            Image.fromarray(draw(i)).save(file := io.BytesIO(), format="png")
            z.writestr(name, file.getvalue())
        if listing is not None:
            z.writestr("dataset.json", listing or json.dumps({"labels": list(zip(names, map(int, labels)))}))
    return path


def draws(*classes):
    return common.Draws("teacher", [common.Student(0, 1, 0, classes or tuple(range(10)))])


def test_names_of_the_flag_are_the_datasets():
    assert run.NAMES == tuple(data.DATASETS)


# -------------------------------------------------------------- the forms

def test_fashion_mnist_is_padded_and_pooled(tiny, tmp_path):
    big, small = source("fashion-mnist", tiny, tmp_path, 32), source("fashion-mnist", tiny, tmp_path)
    assert big.x.shape == (200, 1, 32, 32) and small.x.shape == (200, 1, 16, 16)
    assert small.test[0].shape == (100, 1, 16, 16)
    assert big.x[:, :, :2].max() == 0 and big.x[:, :, :, -2:].max() == 0
    blocks = big.x.float().unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert (small.x.float() - blocks).abs().max() <= 0.5
    assert small.label[:12].tolist() == [*range(10), 0, 1]


def test_zip_with_dataset_json(tmp_path):
    """Decoded once, and again if it has changed; grey images among coloured ones become coloured."""
    path = make_zip(tmp_path / "d.zip", [3, 999, 0], lambda i: picture(10 + i, channels=3 if i else 1))
    first, kept = source("imagenet64", path, tmp_path / "out"), tmp_path / "out/data/imagenet64-train.pt"
    assert first.x.shape == (3, 3, 64, 64) and first.label.tolist() == [3, 999, 0]
    assert first.x[:, 0, 5, 5].tolist() == [10, 11, 12] and first.x[1, 2, 0, 1] == 244 and first.x[1, 2, 1, 0] == 11
    made, again = kept.stat().st_mtime_ns, source("imagenet64", path, tmp_path / "out")
    assert torch.equal(again.x, first.x) and torch.equal(again.label, first.label) and kept.stat().st_mtime_ns == made
    pooled = source("imagenet64", path, tmp_path / "out32", 32)
    assert pooled.x.shape == (3, 3, 32, 32) and pooled.x[2, 0, 9, 9] == 12
    make_zip(path, [5, 6, 7, 8])
    assert source("imagenet64", path, tmp_path / "out").label.tolist() == [5, 6, 7, 8]


def test_class_folders(tmp_path):
    for c in range(10):
        save(tmp_path / f"train/n{c:04d}/a.png", picture(20 + c, 32))
    save(tmp_path / "train/n0003/b.png", picture(99, 32))
    save(tmp_path / "train/beside.png", picture(0, 32))
    found = source("cifar10", tmp_path / "train", tmp_path / "out")
    assert found.label.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9] and found.x[4, 0, 3, 3] == 99


def test_official_batches_are_renumbered(tmp_path):
    """Labels 1… follow map_clsloc.txt; everyone else's follow the sorted WordNet ids."""
    (tmp_path / "map_clsloc.txt").write_text("n03 1 fox\nn01 2 setter\nn02 3 husky\n")
    for name, labels in (("train_data_batch_1", [1, 2]), ("train_data_batch_2", [3, 1]), ("val_data", [2])):
        x = np.zeros((len(labels), 3, 64, 64), np.uint8)
        x[:, 1, 0, 2] = labels
        np.savez(tmp_path / f"{name}.npz", data=x.reshape(len(labels), -1), labels=labels, mean=np.zeros(3))
    found = source("imagenet64", tmp_path, tmp_path / "out")
    assert found.label.tolist() == [2, 0, 1, 2] and found.x[:, 1, 0, 2].tolist() == [1, 2, 3, 1]
    assert found.test[1].tolist() == [0]


def test_a_run_folder_belongs_to_one_set_of_images(tiny, tmp_path):
    flags = run.Flags(dataset="fashion-mnist", data=str(tiny), out=str(tmp_path))
    for _ in range(2):
        data.same_data(flags, held := data.source(flags))
    held.label[3] += 1
    with pytest.raises(UserError, match="images"):
        data.same_data(flags, held)


# ------------------------------------------------------------- the stream

def numbered(n: int, flip=False) -> data.Images:
    x = torch.arange(n)[:, None, None, None].expand(n, 1, 2, 2).to(torch.uint8).clone()
    x[:, :, :, 1] = 255
    return data.Images(x, torch.arange(n) % 10, flip)


def seen(source, steps, batch):
    return [((source.batch(draws(), s, batch)[0][0, :, 0, 0, 0] + 1) * 127.5).round().long().tolist() for s in steps]


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    source = numbered(30)
    first, second = seen(source, range(0, 3), 10), seen(source, range(3, 6), 10)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(30)) and sum(first, []) != sum(second, [])
    assert sum(seen(numbered(30), range(0, 12), 5), []) == sum(first + second, [])  # batches do not matter
    assert seen(numbered(30), [4], 10) == seen(source, [4], 10) == [second[1]]  # nor what was read before: resume


def test_classes_are_filtered_and_labels_never_renumbered():
    x, label = numbered(40).batch(draws(4, 7), 0, 8)
    assert set(label[0].tolist()) == {4, 7} and x.shape == (1, 8, 1, 2, 2) and -1 <= x.min() and x.max() <= 1
    assert torch.equal(((x[0, :, 0, 0, 0] + 1) * 127.5).round().long() % 10, label[0])
    for source in (numbered(5), data.Generated(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), [0])):
        with pytest.raises(UserError, match="no data, or no --pairs, of the classes 9 to 9"):
            source.batch(draws(9), 0, 2)


def test_parts_of_a_batch_are_the_batch():
    whole = numbered(40, flip=True).batch(draws(), 3, 8)
    parts = [numbered(40, flip=True).batch(draws(), 3, 8, slice(i, i + 4)) for i in (0, 4)]
    assert all(torch.equal(torch.cat(two, 1), one) for two, one in zip(zip(*parts), whole))


def test_half_of_the_images_are_mirrored():
    x, _ = numbered(200, flip=True).batch(draws(), 0, 200)
    assert 70 < (x[0, :, 0, 0, 0] == 1).sum() < 130
    assert (numbered(200).batch(draws(), 0, 200)[0][0, :, 0, 0, 1] == 1).all()


def test_rounding_there_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(x)), x)
    assert images.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# -------------------------------------------------------------- bad input

def half_zip(path):
    raw = bytearray(make_zip(path, [1, 2, 3]).read_bytes())
    at = raw.find(b"IDAT", raw.find(b"img00000001"))
    raw[at + 8:at + 30] = b"\0" * 22
    path.write_bytes(raw)


def idx(folder, labels=5, highest=0, cut=None):
    for stem in ("train", "t10k"):
        write_idx(folder / f"{stem}-images-idx3-ubyte", np.zeros((5, 28, 28)))
        write_idx(folder / f"{stem}-labels-idx1-ubyte", np.full(labels, highest))
    raw = (folder / "train-images-idx3-ubyte").read_bytes()
    (folder / "train-images-idx3-ubyte").write_bytes(raw[:cut])


def half_batches(folder):
    np.savez(folder / "train_data_batch_1.npz", data=np.zeros((1, 12288), np.uint8), labels=[1])
    (folder / "train_data_batch_2.npz").write_bytes(b"no")
    (folder / "map_clsloc.txt").write_text("n01 1 a\n")


WRONG = [  # (dataset, how the folder, or else the zip, is made, what is said)
    ("fashion-mnist", lambda p: None, "no .png or .jpg"), ("imagenet64", lambda p: p.rmdir(), "nothing in"),
    ("fashion-mnist", lambda p: idx(p, highest=10), "labels from 10 to 10"),
    ("fashion-mnist", lambda p: idx(p, labels=4), r"images \[5, 1, 16, 16\], 4 labels"),
    ("fashion-mnist", lambda p: idx(p, cut=100), "train-images-idx3-ubyte: damaged"),
    ("imagenet64", half_batches, "batch_2.npz: damaged"),
    ("cifar10", lambda p: save(p / "n0/a.png", picture(20, 32)), "1 class folders, not 10"),
    ("zip", half_zip, "img00000001.png: damaged"),
    ("zip", lambda p: make_zip(p, [-1, 3]), "labels from -1 to 3"),
    ("zip", lambda p: make_zip(p, listing=None), "dataset.json.*no item named"),
    ("zip", lambda p: make_zip(p, listing='{"labels": []}'), "dataset.json: damaged.*00000/img00000000.png"),
    ("zip", lambda p: make_zip(p, draw=lambda i: picture(9, 64 >> i)), "img00000001.png: damaged.*32"),
    ("zip", lambda p: make_zip(p, draw=lambda i: picture(9, channels=1)), r"images \[2, 1, 64, 64\].*\[3, 64, 64\]"),
]


@pytest.mark.parametrize("dataset, make, match", WRONG)
def test_wrong_files(tmp_path, dataset, make, match):
    """Each is one line; nothing half decoded stays."""
    place = tmp_path / ("d.zip" if dataset == "zip" else "in")
    if dataset != "zip":
        place.mkdir()
    make(place)
    with pytest.raises(UserError, match=match) as error:
        source(dataset.replace("zip", "imagenet64"), place, tmp_path / "out")
    assert "\n" not in str(error.value) and not list((tmp_path / "out").rglob("*.tmp"))


def test_resolutions():
    assert data.facts("imagenet64", 16).shape == (3, 16, 16) and data.facts("cifar10", 32) == data.facts("cifar10")
    for name, resolution in (("fashion-mnist", 64), ("imagenet64", 48), ("toy", 16), ("cifar10", 4)):
        with pytest.raises(UserError, match="--resolution"):
            data.facts(name, resolution)


def test_reported_and_selected_images_are_others():
    """Of the training images where there are no test images: 10, or at most half."""
    x, label = torch.arange(40).reshape(40, 1, 1, 1).to(torch.uint8), torch.arange(40) % 2
    for number, wanted in ((10, 10), (99, 20)):
        (*_, a), (held, _, b) = data.Images(x, label).truth(0, number)
        assert len(b) == wanted and sorted([*a.tolist(), *b.tolist()]) == [*range(40)] and held is x
