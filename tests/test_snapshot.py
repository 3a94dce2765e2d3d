"""NVIDIA's snapshots, made here in their format: nothing of them runs, and the weights compute what they did there."""
import io
import math
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import snapshot
import unet
from flags import UserError
from test_unet import awake

NET = unet.UNet(16, 3, 10, unet.Size(32, (1, 2), 1, (8,)))
BOMB = "open('ran', 'w').close()"  # in the working directory, an empty folder of the test


def reconstruct(meta):
    raise AssertionError("never called")


reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


class Part(nn.Module):
    """A module of NVIDIA's that ours has not."""

    def __init__(self, kind="Conv2d", weight=None, **attributes):
        super().__init__()
        self.register_parameter("weight", weight)
        vars(self).update({"kind": kind, "_init_kwargs": {}, **attributes})


def snapshot_of(resolution=16, channels=3, classes=10, width=32, mult=(1, 2), blocks=1, attention=(8,), augment=0):
    """{"ema": …}: modules such as ours, with random weights and what else is in NVIDIA's."""
    net = awake(unet.UNet(resolution, channels, classes, unet.Size(width, mult, blocks, attention)))
    args = dict(label_dim=classes, model_channels=width, channel_mult=list(mult), num_blocks=blocks, dropout=0.1,
                attn_resolutions=list(attention), img_resolution=resolution)
    for part in reversed(list(net.modules())):  # a block after its convolutions
        if isinstance(part, unet.Conv):
            part.up, part.down, part.fused_resample = False, False, False
        elif isinstance(part, unet.Block):
            part.num_heads, part.skip_scale, part.adaptive_scale = part.heads, 1, True
            part._init_kwargs = {"init": {"init_weight": np.float64(1 / 3)}}
            if part.heads:
                part.qkv.weight.data *= 5  # attention that is far from uniform
            if part.resample:
                part.skip = Part()
                for conv in (part.conv0, part.skip):
                    conv.up, conv.down, conv.fused_resample = part.resample == "up", part.resample == "down", False
                    conv.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    net.map_label.weight.data = net.map_label.weight.data.t()
    net.map_noise = Part("PositionalEmbedding", num_channels=width, max_positions=10000, endpoint=False)
    if augment:
        net.map_augment = Part("Linear", nn.Parameter(torch.ones(width, augment)))
    del net.frequency, net.size
    vars(net).update(kind="DhariwalUNet", _init_kwargs=dict(in_channels=channels, out_channels=channels, **args))
    ema = Part("EDMPrecond", use_fp16=True, sigma_data=0.5, _init_kwargs=dict(img_channels=channels, **args))
    ema.model = net
    return {"ema": ema, "loss_fn": Part("EDMLoss"), "augment_pipe": None, "dataset_kwargs": {"use_labels": True}}


class Pickler(pickle.Pickler):
    """Modules as NVIDIA's are pickled: by their attributes, and with source code that would leave a file behind."""

    def reducer_override(self, part):
        if type(part) is nn.ModuleDict or not isinstance(part, nn.Module):
            return NotImplemented
        meta = dict(type="class", version=6, module_src=BOMB, class_name=vars(part).get("kind", ""), state=vars(part))
        return reconstruct, (meta,)


def dump(data, path, protocol=4):
    """Pickle it, with NVIDIA's module names standing in sys.modules meanwhile. Returns the path."""
    with pytest.MonkeyPatch.context() as patch, open(path, "wb") as file:
        for name in ("torch_utils", "torch_utils.persistence"):
            patch.setitem(sys.modules, name, types.SimpleNamespace(_reconstruct_persistent_obj=reconstruct))
        Pickler(file, protocol).dump(data)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A path for the file; the working directory stays empty and NVIDIA's modules stay away, whatever is read."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    torch.manual_seed(0)
    yield tmp_path / "net.pkl"
    assert not list((tmp_path / "work").iterdir()) and {p.name for p in tmp_path.iterdir()} <= {"work", "net.pkl"}
    assert not [m for m in sys.modules if m.startswith(("torch_utils", "dnnlib", "training", "_imported_module"))]


def refused(path, *words):
    with pytest.raises(UserError) as error:
        snapshot.read(path)
    line = str(error.value)
    assert line.isprintable() and len(line) < 300 + len(str(path)) and line.startswith(f"{path}: damaged, or not what")
    assert all(w in line for w in words), line


# ---------- the oracle: NVIDIA's network by its definition, in float64

def normalised(part, x):
    return F.group_norm(x, part.num_groups, part.weight, part.bias, part.eps)


def convolved(part, x):
    if part.down:
        x = sum(x[:, :, i::2, j::2] * part.resample_filter[0, 0, i, j] for i in (0, 1) for j in (0, 1))
    if part.up:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) * 4 * part.resample_filter[0, 0, 0, 0]
    return x if part.weight is None else F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)


def attended(part, x):
    """Head by head; channel c of head h has its query at 3 (64 h + c), then its key and value."""
    qkv = convolved(part.qkv, normalised(part.norm2, x)).flatten(2)  # [B, 3 C, H W]
    size, out = x.shape[1] // part.num_heads, []
    for head in range(part.num_heads):
        at = 3 * (size * head + torch.arange(size))
        weight = (qkv[:, at].transpose(1, 2) @ qkv[:, at + 1] / math.sqrt(size)).softmax(2)  # [B, query, key]
        out.append(qkv[:, at + 2] @ weight.transpose(1, 2))
    return x + convolved(part.proj, torch.cat(out, 1).reshape(x.shape))


def applied(part, x, embed):
    scale, shift = F.linear(embed, part.affine.weight, part.affine.bias)[..., None, None].chunk(2, 1)
    h = normalised(part.norm1, convolved(part.conv0, F.silu(normalised(part.norm0, x)))) * (1 + scale) + shift
    x = convolved(part.conv1, F.silu(h)) + (convolved(part.skip, x) if part.skip is not None else x)
    return attended(part, x) if part.num_heads else x


@torch.no_grad()
def oracle(net, x, c_noise, label):
    half, skips = net.map_noise.num_channels // 2, []
    turns = torch.stack([c_noise * 10000 ** (-i / half) for i in range(half)], 1)
    embed = F.linear(torch.cat([turns.cos(), turns.sin()], 1), net.map_layer0.weight, net.map_layer0.bias)
    embed = F.linear(F.silu(embed), net.map_layer1.weight, net.map_layer1.bias)
    embed = F.silu(embed + net.map_label.weight[:, label].t())
    for name, part in net.enc.items():
        x = convolved(part, x) if name.endswith("conv") else applied(part, x, embed)
        skips.append(x)
    for name, part in net.dec.items():
        x = applied(part, torch.cat([x, skips.pop()], 1) if "block" in name else x, embed)
    return convolved(net.out_conv, F.silu(normalised(net.out_norm, x)))


def left_out(data):
    """num_blocks, attn_resolutions, channel_mult_emb, sigma_data are not in NVIDIA's files: 3, (32, 16, 8), 4, 0.5."""
    for part in (data["ema"], data["ema"].model):
        del part._init_kwargs["num_blocks"], part._init_kwargs["attn_resolutions"]
    del data["ema"].sigma_data


def halves(data):
    """Float16, and a tensor that is not contiguous."""
    net = data["ema"].model.half()
    net.map_layer1.weight = nn.Parameter(net.map_layer1.weight.data.t().contiguous().t())
    net.enc["8x8_down"].skip.resample_filter = torch.full((1, 1, 2, 2), 0.25)


@pytest.mark.parametrize("options, change", [
    (dict(resolution=8, width=64, attention=(4,)), None),  # two heads
    (dict(augment=9, channels=1), None),
    (dict(resolution=8, mult=(2, 1), attention=(8, 4), classes=2), None),
    (dict(resolution=8, mult=(2,), blocks=3, attention=(32, 16, 8)), left_out), (dict(), halves)])
def test_weights_compute_what_they_did(place, options, change):
    data = snapshot_of(**options)
    if change:
        change(data)
    found = snapshot.read(dump(data, place))
    given = dict(resolution=16, channels=3, classes=10, width=32, mult=(1, 2), blocks=1, attention=(8,)) | options
    shape = found.resolution, found.channels, found.classes, found.size
    assert (*shape[:3], *found.size) == tuple(given.values())[:7] and found.sigma_data == 0.5
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in found.state.values())
    net = unet.UNet(*shape).double()
    net.load_state_dict(found.state, strict=True)
    x = torch.randn(3, found.channels, found.resolution, found.resolution, dtype=torch.float64)
    c_noise, label = torch.tensor([-1.5, 0.2, 1.1], dtype=torch.float64), torch.tensor([0, found.classes - 1, 1])
    wanted = oracle(data["ema"].model.double(), x, c_noise, label)
    with torch.no_grad():
        torch.testing.assert_close(net(x, c_noise, label), wanted, rtol=0, atol=1e-5 * wanted.std().item())


def test_places_are_named_as_there():
    """And what no shape tells is as there; how wide they are, the parameter counts of test_unet.py say."""
    assert " ".join(NET.enc) == "16x16_conv 16x16_block0 8x8_down 8x8_block0"
    assert " ".join(NET.dec) == "8x8_in0 8x8_in1 8x8_block0 8x8_block1 16x16_up 16x16_block0 16x16_block1"
    assert (NET.out_norm.num_groups, NET.out_norm.eps, NET.dec["8x8_in0"].heads) == (8, 1e-5, 1)


def test_imagenet_is_size_B():
    assert unet.SIZES["B"] == tuple(tuple(v) if isinstance(v, list) else v for v in snapshot.DEFAULTS["DhariwalUNet"].values())


@pytest.mark.parametrize("protocol", [4, 5])
def test_numpy_scalars_and_protocols(place, protocol):
    data = snapshot_of()
    data["ema"].sigma_data = np.float64(0.5)
    assert snapshot.read(dump(data, place, protocol)).sigma_data == 0.5
    data["ema"].sigma_data = np.float64(0.4)
    refused(dump(data, place, protocol), "sigma_data is 0.4; only 0.5")
    names = "numpy.core.multiarray", "numpy._core.multiarray"  # before numpy 2, and from 2 on
    assert snapshot.ALLOWED[names[0], "scalar"] is snapshot.ALLOWED[names[1], "scalar"]


# --------------------------------------------------------------- hostile

def global_(module, name):
    """Pickle opcodes that ask for module.name."""
    return b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"


@pytest.mark.parametrize("raw, word", [
    *((raw, "Error: ") for raw in (b"<html>404</html>", b"PK\x03\x04 of torch.save", b"\x00" * 100, "ä\n".encode())),
    *((b"\x80\x04" + raw, word) for raw, word in (
        (b"\x96" + (4).to_bytes(8, "little") + b"four.", "KeyError: 150"),  # a bytearray
        (b"\x8e" + (2 ** 40).to_bytes(8, "little") + b".", ""),  # a terabyte of bytes
        (global_("torch._utils", "_rebuild_tensor_v2") + b"N}\x8c\x07__doc__\x8c\x01xs\x86b.", "no object of the file"),
        (global_("torch.nn.modules.container", "ModuleDict") + b"N}\x8c\x05state}s\x86b.", "no object of the file"),
        (global_("collections", "OrderedDict") + b")R}\x8c\x03getNsb.", "no object of the file"),
        (global_("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}\x85R.", "class_name"),
        (b"Q.", ""), (b"(((", ""), (b"0.", ""), (b".", ""))),
    *((left, "") for left in (0, 1, 2, 11, 1000, 0.5, -1))])  # how much there is of an honest one
def test_no_honest_pickle_or_not_all_of_it(place, raw, word):
    if not isinstance(raw, bytes):
        whole = dump(snapshot_of(), place).read_bytes()
        raw = whole[:int(raw * len(whole)) if isinstance(raw, float) else raw]
    place.write_bytes(raw)
    refused(place, word)
    assert snapshot._tensor.__doc__ is None and snapshot._Node.state == {}


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
    ("torch.serialization", "os.system"), ("torch._utils", "sys.modules"), ("collections", "OrderedDict.update"),
    ("torch_utils.persistence", "dnnlib.util.eval"), ("torch.storage", "torch.load"), ("datetime", "date"),
    ("numpy", "load"), ("a\nb\x1b[2J", "c\n")])
@pytest.mark.parametrize("call", [b"\x8c\x0etouch ran; #\n\n\x85R.", b"."])
def test_other_globals(place, module, name, call):
    place.write_bytes(b"\x80\x04" + global_(module, name) + call)
    refused(place, "refused, nothing of it was run", f"{module}.{name}" if name.isidentifier() else "asks for")


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def legacy(value, zipped=False):
    """The bytes that torch.save wrote before its zip format, as for every tensor in NVIDIA's files."""
    torch.save(value, raw := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return raw.getvalue()


def numbers(tensor, zipped=False):
    """What stands behind a tensor in the file."""
    raw = tensor.untyped_storage()
    return legacy(torch.storage.TypedStorage(wrap_storage=raw, dtype=tensor.dtype, _internal=True), zipped)


def storage(raw):
    return Evil(torch.storage._load_from_bytes, raw)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place_it", [
    lambda data, evil: data.update(loss_fn=evil),
    lambda data, evil: data.update(ema=evil),
    lambda data, evil: vars(data["ema"]).update(sigma_data=evil),
    lambda data, evil: data["ema"].model._init_kwargs.update(dropout=evil),
    lambda data, evil: data["ema"].model.enc["16x16_conv"]._parameters.update(bias=evil),
])
@pytest.mark.parametrize("evil, word", [
    (Evil(os.system, "touch ran"), "system"), (Evil(eval, BOMB), "builtins.eval"),
    (storage(pickle.dumps(Evil(os.system, "touch ran"))), "more than numbers"),
    (storage(legacy({"x": Evil(os.system, "touch ran")})), "more than numbers"),
    (storage(legacy(Evil(eval, BOMB))), "more than numbers"),
])
def test_code_runs_nowhere(place, place_it, evil, word):
    data = snapshot_of()
    place_it(data, evil)
    refused(dump(data, place), "refused, nothing of it was run", word)


@pytest.mark.parametrize("data, word", [
    *(({"": storage(raw)}, "damaged or holds more than numbers") for raw in (
        b"", b"junk", legacy([1]), legacy(torch.zeros(3)), numbers(torch.zeros(3).int()),
        numbers(torch.zeros(4), zipped=True), numbers(torch.zeros(99))[:-5])),
    *(({"": Evil(torch._utils._rebuild_tensor_v2, storage(numbers(torch.zeros(4))), *view, False, {})}, "RuntimeError")
      for view in ((0, (5,), (1,)), (2, (3,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2 ** 50,), (1,)))),
    ([], "it holds"), ("ema", "TypeError"), (7, "TypeError"), ({}, "it holds"),
    *(({"ema": ema}, "Error: ") for ema in (None, "ema", {"weight": 1}, torch.zeros(3)))])
def test_a_storage_is_numbers_a_tensor_stays_inside_and_ema_is_a_network(place, data, word):
    refused(dump(data, place), word)


# ---------------------------------------------------------- other networks

def argued(**args):
    """Recorded arguments, in both places."""
    def changed(data, net):
        for part in (data["ema"], net):
            part._init_kwargs.update(args)
        vars(data["ema"]).update(sigma_data=args.get("sigma_data", 0.5))
    return changed


def change(name, **attributes):
    """Attributes of a module of the network."""
    return lambda data, net: vars(net.get_submodule(name)).update(attributes)


def qkv(value, dtype):
    return change("enc.8x8_block0.qkv", _parameters={"weight": torch.full((192, 64, 1, 1), value, dtype=dtype)})


def filters(value):
    return change("enc.8x8_down.conv0", _buffers={"resample_filter": value})


def one_number(data, net):
    """Tensors of stride 0 take no room in the file: they may have the right shapes, but the file is too short."""
    data["ema"] = snapshot_of(width=256)["ema"]
    for p in data["ema"].model.parameters():
        p.data = torch.zeros(1).expand(p.shape)


ABSURD = [(argued(**{name: value}), f"its {name} is ") for name, values in {
    "img_resolution": [-16, "16", 2 ** 40, 1 << 9999, None, 16.0, True, [16], torch.zeros(2)],
    "in_channels": [0, 10 ** 10], "out_channels": [6], "label_dim": [None, -1, 10 ** 12], "channel_mult_emb": [2],
    "channel_mult": ["12", [0, 1], [1] * 99, [1, 10 ** 10], [1, "2"], None, [[1], [2]]], "model_channels": [33, 10 ** 10],
    "num_blocks": [0, 10 ** 9], "attn_resolutions": ["8", [2 ** 40]], "sigma_data": [0, math.nan, torch.ones(1)],
}.items() for value in values]
LIES = [(argued(**args), words) for args, words in [  # did a network of terabytes take memory, this would not return
    (dict(model_channels=2048, channel_mult=[16] * 6, img_resolution=1024, num_blocks=8), "its length is"),
    (dict(label_dim=100_000, model_channels=2048), "its length is"),
    (dict(img_resolution=18, channel_mult=[1, 2, 3]), "does not halve"),
    (dict(in_channels=10 ** 9, out_channels=10 ** 9), "its length is"), (dict(model_channels=10 ** 9), "overflow"),
    (dict(channel_mult=[1, 10 ** 9]), "overflow"), (dict(label_dim=0), "map_label is too much"),
    (dict(model_channels=150), "ValueError"), (dict(channel_mult=[]), "IndexError"),
    (dict(num_blocks=2), "16x16_block1.norm0.weight is NoneType"), (dict(attn_resolutions=[]), "8x8_block0.norm2 is too much"),
    (dict(label_dim=11), "map_label.weight is [128, 10]"),
    (dict(in_channels=1, out_channels=1), "enc.16x16_conv.weight is [32, 3, 3, 3]"),
]]
OTHERS = [
    (change("", kind="SongUNet"), "norm2 is too much"),
    (change("", kind="Dhariwal"), "network is Dhariwal; only DhariwalUNet or SongUNet can be loaded"),
    (lambda data, net: vars(data["ema"]).update(kind="Precond"), "EDM2's preconditioning is Precond; only EDMPrecond"),
    (lambda data, net: data.pop("ema"), "it holds loss_fn, augment_pipe, dataset_kwargs: StyleGAN's"),
    (change("", kind=["DhariwalUNet"]), "network is list"),
    (lambda data, net: vars(data["ema"]).update(kind="iDDPMPrecond\n" * 99), "preconditioning is iDDPMPrecond"),
    (lambda data, net: vars(data["ema"]).update(_modules={"model": torch.zeros(1)}), "AttributeError: "),
    (lambda data, net: vars(data["ema"]).update(_modules=7), "TypeError: "),
    (change("map_label", _parameters={"weight": torch.zeros(10, 128)}), "map_label.weight is [10, 128]; only [128, 10"),
    (change("out_norm", _parameters={"weight": torch.ones(32), "bias": "[32]"}), "out_norm.bias is str"),
    (change("enc.8x8_block0.qkv", _parameters={}), "8x8_block0.qkv.weight is NoneType"),
    (lambda data, net: net.dec.update({"4x4_block0": Part("UNetBlock")}), "dec.4x4_block0 is too much"),
    (change("out_norm", _buffers={"mean\n": torch.zeros(3)}), "out_norm.mean\\n is too much"),
    (lambda data, net: net.enc.add_module("again", net.enc), "enc.again is too much"),
    (qkv(math.nan, torch.float32), "8x8_block0.qkv.weight, finite, is False"),
    (qkv(1e300, torch.float64), "8x8_block0.qkv.weight, finite, is False"),  # infinite as a float32
    (filters(torch.tensor([[[[0.1, 0.4], [0.25, 0.25]]]])), "8x8_down.conv0.resample_filter, the recorded one,"),
    (filters(torch.full((1, 1, 4, 4), 1 / 16)), "8x8_down.conv0.resample_filter is [1, 1, 4, 4]"),
    (one_number, "its length is"),
]


@pytest.mark.parametrize("edit, words", OTHERS + LIES + ABSURD)
def test_networks_of_another_kind(place, edit, words):
    data = snapshot_of()
    edit(data, data["ema"].model)
    refused(dump(data, place), words)
