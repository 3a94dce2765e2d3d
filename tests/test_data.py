"""Reading images in the forms that people have, the stream's order, and what is said of files that are wrong."""
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
from conftest import write_idx

ALL = tuple(range(10))


def flags(dataset, path, out, resolution=0):
    return SimpleNamespace(dataset=dataset, data=str(path), out=str(out), resolution=resolution, quiet=True)


def picture(value: int, side: int = 64, channels: int = 3) -> np.ndarray:
    x = np.full((side, side, channels), value, np.uint8)
    x[0, 1] = 255 - value                                           # not symmetric: rows and columns must not be swapped
    return x[..., 0] if channels == 1 else x


def make_zip(path, labels, names=None, write=None, listing=True, **kind):
    """EDM's dataset_tool layout: uncompressed PNGs in numbered folders and dataset.json."""
    names = names or [f"00000/img{i:08d}.png" for i in range(len(labels))]
    with zipfile.ZipFile(path, "w") as z:
        for i, name in enumerate(names):
            with z.open(name, "w") as f:
                Image.fromarray((write or (lambda i: picture(10 + i, **kind)))(i)).save(f, format="png")
        if listing is not None:
            z.writestr("dataset.json", json.dumps({"labels": [[n, c] for n, c in zip(names, labels)]}) if listing is True else listing)
    return path


def draws(classes=ALL, seed=0, student=0, students=1, stage="teacher"):
    return common.Draws(stage, [common.Member(seed, students, student, tuple(classes))])


# ------------------------------------------------------------------------------------------------------------- the forms

def test_fashion_mnist_is_padded_and_pooled(tiny, tmp_path):
    big = data.source(flags("fashion-mnist", tiny, tmp_path, 32))
    small = data.source(flags("fashion-mnist", tiny, tmp_path))
    assert big.x.shape == (200, 1, 32, 32) and small.x.shape == (200, 1, 16, 16) and small.test[0].shape == (100, 1, 16, 16)
    assert big.x[:, :, :2].max() == 0 and big.x[:, :, :, -2:].max() == 0
    blocks = big.x.float().unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert (small.x.float() - blocks).abs().max() <= 0.5
    assert small.label[:12].tolist() == [*range(10), 0, 1]


def test_zip_with_dataset_json(tmp_path):
    source = data.source(flags("imagenet64", make_zip(tmp_path / "d.zip", [3, 999, 0]), tmp_path / "out"))
    assert source.x.shape == (3, 3, 64, 64) and source.label.tolist() == [3, 999, 0]
    assert source.x[:, 0, 5, 5].tolist() == [10, 11, 12] and source.x[1, 2, 0, 1] == 244 and source.x[1, 2, 1, 0] == 11
    again = data.source(flags("imagenet64", tmp_path / "d.zip", tmp_path / "out"))              # from the decoded array
    assert torch.equal(again.x, source.x) and torch.equal(again.label, source.label)
    pooled = data.source(flags("imagenet64", tmp_path / "d.zip", tmp_path / "out32", 32))
    assert pooled.x.shape == (3, 3, 32, 32) and pooled.x[2, 0, 9, 9] == 12


def test_a_changed_zip_is_decoded_again(tmp_path):
    path = make_zip(tmp_path / "d.zip", [3, 4])
    data.source(flags("imagenet64", path, tmp_path / "out"))
    make_zip(path, [5, 6, 7])
    assert data.source(flags("imagenet64", path, tmp_path / "out")).label.tolist() == [5, 6, 7]


def test_class_folders(tmp_path):
    root = tmp_path / "train"
    for c in range(10):
        (root / f"n{c:04d}").mkdir(parents=True)
        Image.fromarray(picture(20 + c, 32)).save(root / f"n{c:04d}" / "a.png")
    Image.fromarray(picture(99, 32)).save(root / "n0003" / "b.png")
    source = data.source(flags("cifar10", root, tmp_path / "out"))
    assert source.label.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9] and source.x[4, 0, 3, 3] == 99


def test_official_batches_are_renumbered(tmp_path):
    """Labels 1… follow map_clsloc.txt; everyone else's follow the sorted WordNet ids."""
    (tmp_path / "map_clsloc.txt").write_text("n03 1 fox\nn01 2 setter\nn02 3 husky\n")
    for name, labels in (("train_data_batch_1", [1, 2]), ("train_data_batch_2", [3, 1]), ("val_data", [2])):
        x = np.zeros((len(labels), 3, 64, 64), np.uint8)
        x[:, 1, 0, 2] = labels
        np.savez(tmp_path / f"{name}.npz", data=x.reshape(len(labels), -1), labels=labels, mean=np.zeros(3))
    source = data.source(flags("imagenet64", tmp_path, tmp_path / "out"))
    assert source.label.tolist() == [2, 0, 1, 2] and source.x[:, 1, 0, 2].tolist() == [1, 2, 3, 1]
    assert source.test[1].tolist() == [0]


def test_cifar_binary_version(tmp_path):
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = np.zeros((4, 3073), np.uint8)
        rows[:, 0], rows[:, 1 + 1024] = [1, 2, 3, 4], 77                                        # label, then red, green, blue
        (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
    source = data.source(flags("cifar10", tmp_path, tmp_path / "out"))
    assert source.x.shape == (20, 3, 32, 32) and source.label[:4].tolist() == [1, 2, 3, 4]
    assert source.x[0, 1, 0, 0] == 77 and source.x[0, 0, 0, 0] == 0 and source.flip


# ------------------------------------------------------------------------------------------------------------ the stream

def numbered(n: int, flip=False) -> data.Images:
    x = torch.arange(n)[:, None, None, None].expand(n, 1, 2, 2).to(torch.uint8).clone()
    x[:, :, :, 1] = 255
    return data.Images(x, torch.arange(n) % 10, flip)


def seen(source, d, steps, batch):
    return [((source.batch(d, s, batch)[0][0, :, 0, 0, 0] + 1) * 127.5).round().long().tolist() for s in steps]


def test_every_image_once_an_epoch_in_an_order_of_its_own(tiny):
    source, d = numbered(30), draws()
    first, second = seen(source, d, range(0, 3), 10), seen(source, d, range(3, 6), 10)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(30)) and sum(first, []) != sum(second, [])
    assert sum(seen(numbered(30), d, range(0, 12), 5), []) == sum(first + second, [])           # batches do not matter
    assert seen(numbered(30), d, [4], 10)[0] == second[1]                                       # nor what was read before: resume


def test_classes_are_filtered_and_labels_never_renumbered():
    source, d = numbered(40), draws(classes=(4, 7))
    x, label = source.batch(d, 0, 8)
    assert set(label[0].tolist()) == {4, 7} and x.shape == (1, 8, 1, 2, 2) and -1 <= x.min() and x.max() <= 1
    values = ((x[0, :, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(values % 10, label[0])
    with pytest.raises(common.UserError, match="no image of the classes"):
        numbered(5).batch(draws(classes=(9,)), 0, 2)


def test_parts_of_a_batch_are_the_batch():
    whole = numbered(40, flip=True).batch(draws(), 3, 8)
    parts = [numbered(40, flip=True).batch(draws(), 3, 8, slice(i, i + 4)) for i in (0, 4)]
    assert torch.equal(torch.cat([p[0] for p in parts], 1), whole[0]) and torch.equal(torch.cat([p[1] for p in parts], 1), whole[1])


def test_half_of_the_images_are_mirrored():
    x, _ = numbered(200, flip=True).batch(draws(), 0, 200)
    mirrored = (x[0, :, 0, 0, 0] == 1).sum()
    assert 70 < mirrored < 130 and (numbered(200).batch(draws(), 0, 200)[0][0, :, 0, 0, 1] == 1).all()


def test_rounding_there_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(x)), x)
    assert common.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_features_by_class_are_the_distance_of_the_parts():
    g = torch.Generator().manual_seed(0)
    f, label = torch.randn(300, 4, generator=g), torch.arange(300) % 3
    a, b = data.Features(f, label), data.Features(f + label[:, None], label)
    assert abs(data.feature_distance(a, b, [0])) < 1e-9 and abs(data.feature_distance(a, b, [2]) - 16) < 1e-6
    assert data.feature_distance(a, b) > 1


# ------------------------------------------------------------------------------------------------------------- bad input

def refused(match, *args):
    with pytest.raises(common.UserError, match=match) as error:
        data.source(flags(*args))
    assert "\n" not in str(error.value)


def test_bad_paths(tmp_path, monkeypatch):
    refused("no such file", "fashion-mnist", tmp_path / "nowhere", tmp_path)
    refused("four IDX files", "fashion-mnist", tmp_path, tmp_path)
    refused("no .png or .jpg", "imagenet64", tmp_path, tmp_path / "out")
    (tmp_path / "not.zip").write_text("hello")
    refused("not a whole zip", "imagenet64", tmp_path / "not.zip", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    refused("imagenet-64x64.zip", "imagenet64", "", tmp_path / "out")


def test_bad_idx(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((5, 28, 28)))
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((5, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(5))
    refused("no train-labels", "fashion-mnist", tmp_path, tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.full(5, 10))
    refused("labels from 10 to 10", "fashion-mnist", tmp_path, tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(4))
    refused("5 images but 4 labels", "fashion-mnist", tmp_path, tmp_path)
    raw = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw[:100])
    refused("not a whole IDX", "fashion-mnist", tmp_path, tmp_path)


def test_damaged_image_inside_a_zip(tmp_path):
    path = make_zip(tmp_path / "d.zip", [1, 2, 3])
    raw = bytearray(path.read_bytes())
    at = raw.find(b"IDAT", raw.find(b"img00000001"))
    raw[at + 8:at + 30] = b"\0" * 22
    path.write_bytes(raw)
    refused("img00000001.png: a damaged image", "imagenet64", path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.npy"))


@pytest.mark.parametrize("kind, match", [
    (dict(labels=[1, 1000]), "labels from 1 to 1000, but imagenet64 has classes 0 to 999"),
    (dict(labels=[-1, 3]), "labels from -1"),
    (dict(labels=[1, 2], listing=None), "dataset.json is missing"),
    (dict(labels=[1, 2], listing='{"labels": null}'), "dataset.json is missing or has none"),
    (dict(labels=[1, 2], listing='{"labels": [["00000/img00000000.png", 1]]}'), "no label for 00000/img00000001.png"),
    (dict(labels=[1, 2], listing='{"labels": 3'), "dataset.json is damaged"),
    (dict(labels=[1, 2], write=lambda i: picture(9, 64 >> i)), "images of several sizes"),
    (dict(labels=[1, 2], channels=1), "grey where colour"),
    (dict(labels=[1, 2], side=48), "48 pixels cannot be pooled to 64"),
    (dict(labels=[1, 2], write=lambda i: picture(9)[:32]), "32 x 64"),
])
def test_bad_zips(tmp_path, kind, match):
    refused(match, "imagenet64", make_zip(tmp_path / "d.zip", **kind), tmp_path / "out")


def test_missing_class_folders_and_batches(tmp_path):
    for c in range(3):
        (tmp_path / "train" / f"n{c}").mkdir(parents=True)
        Image.fromarray(picture(20, 32)).save(tmp_path / "train" / f"n{c}" / "a.png")
    refused("3 class folders with images, but the dataset has 10", "cifar10", tmp_path / "train", tmp_path / "out")
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((1, 12288), np.uint8), labels=[1])
    refused("map_clsloc.txt is missing", "imagenet64", tmp_path, tmp_path / "out")
    (tmp_path / "map_clsloc.txt").write_text("n01 1 a\n")
    (tmp_path / "train_data_batch_2.npz").write_bytes(b"no")
    refused("batch_2.npz: not a batch", "imagenet64", tmp_path, tmp_path / "out")


def test_resolutions():
    assert data.facts("imagenet64", 16).shape == (3, 16, 16)
    for name, resolution in (("fashion-mnist", 64), ("imagenet64", 48), ("toy", 16), ("cifar10", 4)):
        with pytest.raises(common.UserError, match="--resolution"):
            data.facts(name, resolution)
