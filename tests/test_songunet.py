"""SongUNet equals what EDM's own code computes: its snapshots and outputs, made with it, lie in tests/data.

NAME.pkl: EDMPrecond around SongUNet as that code pickles it (random weights, without its source text); NAME.pt: x, sigma
at 12 levels, label, and its D in float64 with the label and without."""
import re

import numpy as np
import pytest
import torch

import data
import fid
import msd
import run
import snapshot
import songunet
import students
from conftest import ROOT, refused
from flags import parse
from test_data import save
from test_msd import SMOKE
from test_unet import awake

DDPMPP = songunet.Size(128, (2, 2, 2), 4)  # edm-cifar10-32x32-*-vp.pkl
NCSNPP = songunet.Size(128, (2, 2, 2), 4, (16,), 2, "fourier", "residual", "standard", (1, 3, 3, 1))  # …-ve.pkl
CASES = sorted((ROOT / "tests/data").glob("*.pkl"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_released_kinds_compute_what_they_do_there(path):
    """DDPM++ (vp) and NCSN++ (ve), with and without classes, and the skip variants, at every level of noise."""
    there = torch.load(path.with_suffix(".pt"))
    found = students.load_network(path)
    assert len(there["sigma"]) == 12 and found.facts.classes == int(there["label"].max()) + 1
    for name, label in (("D", there["label"]), ("free", None)):
        D = found.net.double()(there["x"].double(), there["sigma"], label)
        wanted = there[name].double()
        assert ((D - wanted).flatten(1).norm(dim=1) < 1e-5 * wanted.flatten(1).norm(dim=1)).all(), name


def test_the_cases_are_all_kinds():
    sizes = [songunet.Size(*students.load_network(path).size) for path in CASES]
    for field, kinds in (("embedding", {"positional", "fourier"}), ("encoder", {"standard", "skip", "residual"}),
                         ("decoder", {"standard", "skip"}), ("filter", {(1, 1), (1, 3, 3, 1)}), ("noise", {1, 2})):
        assert {getattr(size, field) for size in sizes} == kinds
    assert min(size.width for size in sizes) == 8


@pytest.mark.parametrize("size, resolution, classes, count", [  # EDM's counts, less 9 augmentation labels and a bias
    (DDPMPP, 32, 10, 55_735_299 - 10 * 128), (NCSNPP, 32, 10, 56_400_643 - 10 * 256)])
def test_parameter_counts(size, resolution, classes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in songunet.SongUNet(resolution, 3, classes, size).parameters()) == count


@pytest.mark.parametrize("size", [DDPMPP, NCSNPP])
def test_leading_dimensions_and_bottleneck(size):
    net, seen = awake(songunet.SongUNet(8, 3, 4, size._replace(width=8, blocks=1, attention=(4,)))), []
    net.enc["2x2_block0"].register_forward_hook(lambda m, i, o: seen.append(o))
    x, c, label = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 3), torch.randint(4, (2, 3))
    out, features = net(x, c, label, features=True)
    assert out.shape == x.shape and features.shape == (2, 3, *net.bottleneck) and net.bottleneck == (16, 2, 2)
    assert torch.equal(seen[0], features.flatten(0, 1)) and torch.equal(features, net(x, c, label, features="only"))
    assert not torch.allclose(out, net(x, c, None)) and net.label_embeddings().shape == (4, 8 * size.noise)


def test_a_resolution_that_does_not_halve():
    with pytest.raises(ValueError, match="resolution 6 does not halve 2 times"):
        songunet.SongUNet(6, 3, 4, DDPMPP)


@pytest.mark.parametrize("name, edit, words", [
    ("cond-vp", lambda net: net.state["_init_kwargs"].update(resample_filter=[1, 3, 3, 1]), "resample_filter is [1, 1, 2, 2]"),
    ("cond-vp", lambda net: net.state["_init_kwargs"].update(embedding_type="fourier"), "map_noise.freqs is NoneType"),
    ("cond-vp", lambda net: net.state["_init_kwargs"].update(encoder_type="odd"), "its encoder_type is odd; only residual or skip"),
    ("cond-ve", lambda net: net.state["_init_kwargs"].update(encoder_type="standard"), "aux_residual is too much"),
    ("cond-ve", lambda net: net.state["_init_kwargs"].update(img_resolution=7), "does not halve")])
def test_others_are_refused(name, edit, words):
    with open(ROOT / f"tests/data/{name}.pkl", "rb") as file:
        held = snapshot._Reader(file).load()["ema"]
    held.state["_init_kwargs"] = dict(held.state["_init_kwargs"])
    edit(held.state["_modules"]["model"])
    edit(held)
    with pytest.raises(ValueError, match=re.escape(words)):
        snapshot._network(held, 10 ** 6)


# ------------------------------------------------ a teacher without classes

class Corner(torch.nn.Module):
    """48 numbers of each image."""

    def forward(self, x: torch.Tensor, return_features: bool = False):
        return x[:, :, :4, :4].flatten(1).float() / 255


@pytest.fixture
def unconditional(tmp_path, monkeypatch):
    """argv of msd.py on 8-pixel images without classes, with an NCSN++ teacher without classes."""
    facts = data.DATASETS["cifar10-uncond"]
    monkeypatch.setitem(data.DATASETS, "cifar10-uncond", data.replace(facts, shape=(3, 8, 8)))
    monkeypatch.setattr("plot.draw", lambda *_: [])
    monkeypatch.setattr(fid.Inception, "dimension", 48)
    torch.jit.script(Corner()).save(str(tmp_path / "inception.pt"))
    rng = np.random.default_rng(0)
    for i in range(12):
        save(tmp_path / f"in/{i}.png", rng.integers(0, 255, (8, 8, 3), np.uint8))
    return ["--dataset", "cifar10-uncond", "--preset", "smoke", "--data", str(tmp_path / "in"), "--distance", "l2", "--teacher",
            str(ROOT / "tests/data/uncond-ve.pkl"), "--features", str(tmp_path / "inception.pt"), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("stages", ["dm,adm", "tsm,dm --student-size XXS", "cd"])
def test_a_teacher_without_classes_goes_through_every_stage(unconditional, tmp_path, stages):
    line = [*unconditional, "--stages", *stages.split()]
    assert msd.main(line) == 0
    tag = students.tag_of(parse(msd.Flags, msd.PRESETS, line))
    assert run.load_json(tmp_path / f"out/results{run.suffix(tag)}.json")["students"]["1"]["fd"] >= 0


def test_one_class_one_student(unconditional, capsys):
    assert "more than the dataset has classes" in refused(capsys, msd.main, [*unconditional, "--students", "2"])
    assert "has one class" in refused(capsys, msd.main, [*unconditional, "--partition", "random"])
    other = [*SMOKE, "--teacher", str(ROOT / "tests/data/uncond-ve.pkl")]
    assert "(3, 8, 8), 1 classes; needed: toy" in refused(capsys, msd.main, other)
