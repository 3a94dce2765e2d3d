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

import snapshot
import unet
from flags import UserError

BOMB = "open('ran', 'w').close()"  # in the working directory, an empty folder of the test


def reconstruct(meta):
    raise AssertionError("never called")


def named(function, module, name):
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


named(reconstruct, "torch_utils.persistence", "_reconstruct_persistent_obj")


class Part(nn.Module):
    """An object of NVIDIA's: pickled with its arguments and with source code that would leave a file behind."""

    def __init__(self, kind, weight=None, bias=None, buffer=None, args=None, **attributes):
        super().__init__()
        for name, shape in (("weight", weight), ("bias", bias)):
            values = torch.randn(shape) / math.sqrt(math.prod(shape[1:])) if shape else None
            self.register_parameter(name, nn.Parameter(values) if shape else None)
        if buffer is not None:
            self.register_buffer("resample_filter", buffer)
        self.__dict__.update(attributes, kind=kind, _init_args=(), _init_kwargs=args or {})

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "kind"}
        return reconstruct, (dict(type="class", version=6, module_src=BOMB, class_name=self.kind, state=state),)


class Scalar:
    """A numpy float64 as numpy before 2 ("numpy.core") and from 2 on ("numpy._core") pickles it."""

    def __init__(self, value, package):
        self.raw, self.package = np.float64(value).tobytes(), package

    def __reduce__(self):
        return getattr(sys.modules[f"{self.package}.multiarray"], "scalar"), (np.dtype("f8"), self.raw)


def linear(inside, outside, bias=True):
    return Part("Linear", (outside, inside), (outside,) if bias else None)


def conv(inside, outside, kernel, up=False, down=False):
    shape = (outside, inside, kernel, kernel) if kernel else None
    return Part("Conv2d", shape, (outside,) if kernel else None, torch.full((1, 1, 2, 2), 0.25) if up or down else None,
                up=up, down=down, fused_resample=False)


def norm(channels):
    part = Part("GroupNorm", (channels,), (channels,), num_groups=min(32, channels // 4), eps=1e-5)
    part.weight.data += 1
    return part


def block(inside, outside, embed, attention=False, up=False, down=False):
    heads = outside // 64 if attention else 0
    part = Part("UNetBlock", num_heads=heads, skip_scale=1, adaptive_scale=True, dropout=0.1, skip=None,
                args={"channels_per_head": 64, "init": {"init_weight": Scalar(1 / 3, "numpy._core")}})
    part.norm0, part.conv0 = norm(inside), conv(inside, outside, 3, up, down)
    part.affine, part.norm1, part.conv1 = linear(embed, 2 * outside), norm(outside), conv(outside, outside, 3)
    if inside != outside or up or down:
        del part.__dict__["skip"]
        part.skip = conv(inside, outside, int(inside != outside), up, down)
    if heads:
        part.norm2, part.qkv, part.proj = norm(outside), conv(outside, 3 * outside, 1), conv(outside, outside, 1)
        part.qkv.weight.data *= 3                                   # attention that is far from uniform
    return part


def snapshot_of(resolution=16, channels=3, classes=10, width=32, mult=(1, 2), blocks=1, attention=(8,), augment=0,
                **more):
    """{"ema": …} with random weights; `more`: further recorded arguments."""
    args = dict(label_dim=classes, model_channels=width, channel_mult=list(mult), num_blocks=blocks, dropout=0.1,
                attn_resolutions=list(attention), **({"augment_dim": augment} if augment else {}), **more)
    net = Part("DhariwalUNet", label_dropout=0,
               args=dict(img_resolution=resolution, in_channels=channels, out_channels=channels, **args))
    net.map_noise = Part("PositionalEmbedding", num_channels=width, max_positions=10000, endpoint=False)
    net.map_layer0, net.map_layer1 = linear(width, 4 * width), linear(4 * width, 4 * width)
    net.map_label = linear(classes, 4 * width, bias=False)
    if augment:
        net.map_augment = linear(augment, width, bias=False)
    net.enc, net.dec, here, skips = nn.ModuleDict(), nn.ModuleDict(), width * mult[0], []
    for level, m in enumerate(mult):
        r = resolution >> level
        if level:
            net.enc[f"{r}x{r}_down"] = block(here, here, 4 * width, down=True)
        else:
            net.enc[f"{r}x{r}_conv"] = conv(channels, here, 3)
        skips.append(here)
        for i in range(blocks):
            net.enc[f"{r}x{r}_block{i}"] = block(here, width * m, 4 * width, r in attention)
            here = width * m
            skips.append(here)
    for level, m in reversed(list(enumerate(mult))):
        r = resolution >> level
        if level == len(mult) - 1:
            net.dec[f"{r}x{r}_in0"] = block(here, here, 4 * width, attention=True)
            net.dec[f"{r}x{r}_in1"] = block(here, here, 4 * width)
        else:
            net.dec[f"{r}x{r}_up"] = block(here, here, 4 * width, up=True)
        for i in range(blocks + 1):
            net.dec[f"{r}x{r}_block{i}"] = block(here + skips.pop(), width * m, 4 * width, r in attention)
            here = width * m
    net.out_norm, net.out_conv = norm(here), conv(here, channels, 3)
    ema = Part("EDMPrecond", img_resolution=resolution, label_dim=classes, use_fp16=True, sigma_data=0.5,
               args=dict(img_resolution=resolution, img_channels=channels, model_type="DhariwalUNet", **args))
    ema.model = net
    return {"ema": ema, "loss_fn": Part("EDMLoss"), "augment_pipe": None, "dataset_kwargs": {"use_labels": True}}


def dump(data, path, protocol=4):
    """Pickle it, with NVIDIA's module names standing in sys.modules meanwhile. Returns the path."""
    fakes = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": types.ModuleType("persistence")}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    for package in ("numpy.core", "numpy._core"):
        fakes[f"{package}.multiarray"] = types.ModuleType("multiarray")
        fakes[f"{package}.multiarray"].scalar = named(lambda *a: None, f"{package}.multiarray", "scalar")
    before = {name: sys.modules.get(name) for name in fakes}
    try:
        sys.modules.update(fakes)
        path.write_bytes(pickle.dumps(data, protocol))
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
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


def refused(path, *words) -> str:
    with pytest.raises(UserError) as error:
        snapshot.read(path)
    line = str(error.value)
    assert line.isprintable() and len(line) < 400 + len(str(path)) and line.startswith(f"{path}: ")
    assert all(w in line for w in words), line
    return line


# --------------------------------------------------- the oracle: NVIDIA's network by its definition, slowly, in float64

def normalised(part, x):
    groups = x.reshape(len(x), part.num_groups, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + part.eps).sqrt()
    return groups.reshape(x.shape) * part.weight[:, None, None] + part.bias[:, None, None]


def convolved(part, x):
    if part.down:
        x = sum(x[:, :, i::2, j::2] * part.resample_filter[0, 0, i, j] for i in (0, 1) for j in (0, 1))
    if part.up:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) * 4 * part.resample_filter[0, 0, 0, 0]
    if part.weight is None:
        return x
    x = nn.functional.unfold(x, part.weight.shape[-1], padding=part.weight.shape[-1] // 2).transpose(1, 2) \
        @ part.weight.flatten(1).t() + part.bias
    return x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))


def attended(part, x):
    """Head by head, pixel by pixel; channel c of head h has its query at 3 (64 h + c), then its key and value."""
    qkv = convolved(part.qkv, normalised(part.norm2, x)).flatten(2)                             # [B, 3 C, H W]
    size, out = x.shape[1] // part.num_heads, torch.zeros_like(x).flatten(2)
    for head in range(part.num_heads):
        at = 3 * (size * head + torch.arange(size))
        for pixel in range(qkv.shape[2]):
            score = (qkv[:, at, pixel, None] * qkv[:, at + 1]).sum(1) / math.sqrt(size)         # [B, H W]
            out[:, size * head:size * (head + 1), pixel] = (score.softmax(1)[:, None] * qkv[:, at + 2]).sum(2)
    return x + convolved(part.proj, out.reshape(x.shape))


def applied(part, x, embed):
    silu = nn.functional.silu
    scale, shift = (embed @ part.affine.weight.t() + part.affine.bias)[..., None, None].chunk(2, 1)
    h = normalised(part.norm1, convolved(part.conv0, silu(normalised(part.norm0, x)))) * (1 + scale) + shift
    x = convolved(part.conv1, silu(h)) + (convolved(part.skip, x) if part.skip is not None else x)
    return attended(part, x) if part.num_heads else x


@torch.no_grad()
def oracle(net, x, c_noise, label):
    silu, half = nn.functional.silu, net.map_noise.num_channels // 2
    turns = torch.stack([c_noise * 10000 ** (-i / half) for i in range(half)], 1)
    embed = torch.cat([turns.cos(), turns.sin()], 1) @ net.map_layer0.weight.t() + net.map_layer0.bias
    embed = silu(embed) @ net.map_layer1.weight.t() + net.map_layer1.bias
    embed = silu(embed + torch.stack([net.map_label.weight[:, i] for i in label]))
    skips = []
    for name, part in net.enc.items():
        x = convolved(part, x) if name.endswith("conv") else applied(part, x, embed)
        skips.append(x)
    for name, part in net.dec.items():
        x = applied(part, torch.cat([x, skips.pop()], 1) if "block" in name else x, embed)
    return convolved(net.out_conv, nn.functional.silu(normalised(net.out_norm, x)))


def compare(data, path):
    """Read the file into our U-Net; its output equals the oracle's. Returns the snapshot."""
    found = snapshot.read(path)
    net = unet.UNet(found.resolution, found.channels, found.classes, found.size)
    net.load_state_dict(found.state, strict=True)
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in found.state.values())
    x = torch.randn(3, found.channels, found.resolution, found.resolution, dtype=torch.float64)
    c_noise, label = torch.tensor([-1.5, 0.2, 1.1], dtype=torch.float64), torch.tensor([0, found.classes - 1, 1])
    wanted = oracle(data["ema"].model.double(), x, c_noise, label)
    with torch.no_grad():
        torch.testing.assert_close(net.double()(x, c_noise, label), wanted, rtol=0, atol=1e-5 * wanted.std().item())
    return found


# -------------------------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("options, size", [
    (dict(resolution=8, width=64, attention=(4,)), unet.Size(64, (1, 2), 1, (4,))),             # two heads
    (dict(augment=9, channels=1, sigma_data=0.5), unet.Size(32, (1, 2), 1, (8,))),
    (dict(resolution=8, mult=(2, 1), attention=(8, 4), classes=2), unet.Size(32, (2, 1), 1, (8, 4))),
])
def test_weights_compute_what_they_did(place, options, size):
    data = snapshot_of(**options)
    found = compare(data, dump(data, place))
    assert found.size == size and found.sigma_data == 0.5
    assert (found.resolution, found.channels, found.classes) == tuple(
        {"resolution": 16, "channels": 3, "classes": 10, **options}[k] for k in ("resolution", "channels", "classes"))


def test_arguments_that_are_left_out(place):
    """num_blocks, attn_resolutions, channel_mult_emb, sigma_data are not in NVIDIA's files: 3, (32, 16, 8), 4, 0.5."""
    data = snapshot_of(resolution=8, mult=(2,), blocks=3, attention=(32, 16, 8))
    for part in (data["ema"], data["ema"].model):
        for name in ("num_blocks", "attn_resolutions"):
            del part._init_kwargs[name]
    del data["ema"].sigma_data
    found = compare(data, dump(data, place))
    assert found.size == unet.Size(32, (2,), 3, (32, 16, 8)) and found.sigma_data == 0.5


def test_imagenet_is_size_B():
    args = {**snapshot.DEFAULTS, "img_resolution": 64, "in_channels": 3, "label_dim": 1000}
    snapshot._compare((name, args[name], wanted) for name, wanted in snapshot.ARGUMENTS.items())
    mult, attention = tuple(args["channel_mult"]), tuple(args["attn_resolutions"])
    assert unet.SIZES["B"] == (args["model_channels"], mult, args["num_blocks"], attention)


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_numpy_scalars_and_protocols(place, package, protocol):
    data = snapshot_of()
    data["ema"].sigma_data = Scalar(0.4, package)
    assert snapshot.read(dump(data, place, protocol)).sigma_data == 0.4


def test_halves_and_non_contiguous_tensors(place):
    data = snapshot_of()
    net = data["ema"].model.half()
    net.map_layer1.weight = nn.Parameter(net.map_layer1.weight.data.t().contiguous().t())
    for part in net.modules():
        if getattr(part, "resample_filter", None) is not None:
            part.resample_filter = part.resample_filter.float()
    compare(data, dump(data, place))


# ------------------------------------------------------------------------------------------------------------- refusing

def test_missing_file_and_folder(place):
    for path in (place, place.parent / "work"):
        with pytest.raises(OSError, match=path.name):               # flags.command makes one line of it
            snapshot.read(path)


@pytest.mark.parametrize("left", [0, 1, 2, 11, 1000, 0.5, -1])
def test_truncated(place, left):
    whole = dump(snapshot_of(), place).read_bytes()
    place.write_bytes(whole[:int(left * len(whole)) if isinstance(left, float) else left])
    refused(place, "truncated")


@pytest.mark.parametrize("raw", [b"<html>404</html>", b"PK\x03\x04 of torch.save", b"\x00" * 100, "ä\n".encode()])
def test_not_a_pickle(place, raw):
    place.write_bytes(raw)
    refused(place, "no pickle")


def global_(module, name):
    """Pickle opcodes that ask for module.name."""
    return b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93"


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
    ("torch.serialization", "os.system"), ("torch._utils", "sys.modules"), ("collections", "OrderedDict.update"),
    ("torch_utils.persistence", "dnnlib.util.eval"), ("torch.storage", "torch.load"), ("datetime", "date"),
    ("numpy", "load"), ("a\nb\x1b[2J", "c\n")])
@pytest.mark.parametrize("call", [b"\x8c\x0etouch ran; #\n\n\x85R.", b"."])
def test_other_globals(place, module, name, call):
    place.write_bytes(b"\x80\x04" + global_(module, name) + call)
    line = refused(place, "refused", "nothing of it was run")
    assert "\n" in module + name or f"{module}.{name}" in line


class Evil:
    def __init__(self, function, argument):
        self.reduced = function, (argument,)

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


@pytest.mark.parametrize("place_it", [
    lambda data, evil: data.update(loss_fn=evil),
    lambda data, evil: data.update(ema=evil),
    lambda data, evil: data["ema"].__dict__.update(sigma_data=evil),
    lambda data, evil: data["ema"].model._init_kwargs.update(dropout=evil),
    lambda data, evil: data["ema"].model.enc["16x16_conv"]._parameters.update(bias=evil),
])
@pytest.mark.parametrize("evil, word", [
    (lambda: Evil(os.system, "touch ran"), "system"),
    (lambda: Evil(eval, BOMB), "builtins.eval"),
    (lambda: storage(pickle.dumps(Evil(os.system, "touch ran"))), "more than numbers"),
    (lambda: storage(legacy({"x": Evil(os.system, "touch ran")})), "more than numbers"),
    (lambda: storage(legacy(Evil(eval, BOMB))), "more than numbers"),
])
def test_code_runs_nowhere(place, place_it, evil, word):
    data = snapshot_of()
    place_it(data, evil())
    refused(dump(data, place), "refused", word, "nothing of it was run")


@pytest.mark.parametrize("raw", [b"", b"junk", legacy([1]), legacy(torch.zeros(3)), numbers(torch.zeros(3).int()),
                                 numbers(torch.zeros(4), zipped=True), numbers(torch.zeros(99))[:-5]])
def test_a_storage_is_a_storage(place, raw):
    data = snapshot_of()
    data["loss_fn"] = storage(raw)
    refused(dump(data, place), "damaged or holds more than numbers")


@pytest.mark.parametrize("raw", [
    b"\x96" + (4).to_bytes(8, "little") + b"four.",                                             # a bytearray
    b"\x8e" + (2 ** 40).to_bytes(8, "little") + b".",                                           # a terabyte of bytes
    global_("torch._utils", "_rebuild_tensor_v2") + b"N}\x8c\x07__doc__\x8c\x01xs\x86b.",  # attributes of our function
    global_("torch.nn.modules.container", "ModuleDict") + b"N}\x8c\x05state}s\x86b.",           # and of our class
    global_("collections", "OrderedDict") + b")R}\x8c\x03getNsb.",
    global_("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}\x85R.",
    b"Q.", b"(((", b"0.", b".",
])
def test_opcodes_that_no_honest_file_has(place, raw):
    place.write_bytes(b"\x80\x04" + raw)
    refused(place, "truncated or damaged")
    assert snapshot._tensor.__doc__ is None and snapshot._Node.state == {}


def test_a_tensor_cannot_reach_outside_its_storage(place):
    data, four = snapshot_of(), numbers(torch.zeros(4))

    class Outside:
        def __init__(self, *view):
            self.view = view

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage(four), *self.view, False, {})
    for view in ((0, (5,), (1,)), (2, (3,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2 ** 50,), (1,))):
        data["loss_fn"] = Outside(*view)
        refused(dump(data, place), "damaged")


@pytest.mark.parametrize("data", [{}, [], "ema", {"ema": None}, {"ema": {"weight": 1}}, {"ema": torch.zeros(3)}])
def test_no_network_in_it(place, data):
    refused(dump(data, place), "ema is a network")


def parts(data):
    return data["ema"], data["ema"].model


def stand_in(data, kind, of="model"):
    (data["ema"] if of == "ema" else data["ema"].model).kind = kind


def poison(data, value, dtype=torch.float32):
    layer = parts(data)[1].enc["8x8_block0"].qkv
    layer.weight = nn.Parameter(layer.weight.data.to(dtype))
    layer.weight.data[5, 3] = value


def resized(data):
    parts(data)[1].map_label.weight = nn.Parameter(torch.zeros(10, 128))


def filters(data, value):
    parts(data)[1].enc["8x8_down"].conv0.resample_filter = value


def change(name, **attributes):
    """Of a module of the network: its attributes."""
    def changed(data):
        part = parts(data)[1]
        for key in name.split("."):
            part = part[key] if isinstance(part, nn.ModuleDict) else getattr(part, key)
        part.__dict__.update(attributes)
    return changed


@pytest.mark.parametrize("change, words", [                         # one of each kind of row in snapshot.py's tables
    (lambda d: stand_in(d, "SongUNet"), ["network is SongUNet; only DhariwalUNet can be loaded"]),
    (lambda d: stand_in(d, "iDDPMPrecond\n" * 99, "ema"), ["preconditioning is iDDPMPrecond", "EDMPrecond"]),
    (lambda d: stand_in(d, ["DhariwalUNet"]), ["network is list"]),
    (lambda d: d["ema"]._modules.update(model=torch.zeros(1)), ["network is NoneType"]),
    (lambda d: d["ema"].__dict__.update(_modules=7), ["network is NoneType"]),
    (resized, ["map_label.weight is [10, 128]", "[128, 10]"]),
    (lambda d: parts(d)[1].out_norm._parameters.update(bias="[32]"), ["out_norm.bias is str"]),
    (lambda d: parts(d)[1].out_norm._parameters.clear(), ["out_norm.weight is NoneType"]),
    (lambda d: parts(d)[1].enc["8x8_block0"].__delattr__("qkv"), ["8x8_block0.qkv.weight is NoneType"]),
    (lambda d: parts(d)[1].dec.update({"4x4_block0": norm(8)}), ["dec.4x4_block0 is too much"]),
    (lambda d: parts(d)[1].out_norm.register_buffer("mean\n", torch.zeros(3)), ["out_norm.mean\\n is too much"]),
    (lambda d: parts(d)[1].enc.add_module("again", parts(d)[1].enc), ["enc.again is too much"]),
    (lambda d: poison(d, math.nan), ["8x8_block0.qkv.weight, finite, is False"]),
    (lambda d: poison(d, 1e300, torch.float64), ["8x8_block0.qkv.weight, finite, is False"]),   # infinite as a float32
    (lambda d: filters(d, torch.tensor([[[[0.1, 0.4], [0.25, 0.25]]]])), ["8x8_down.conv0.resample_filter, a mean,"]),
    (lambda d: filters(d, torch.full((1, 1, 4, 4), 1 / 16)), ["8x8_down.conv0.resample_filter is [1, 1, 4, 4]"]),
    (lambda d: filters(d, None), ["8x8_down.conv0.resample_filter is NoneType"]),
    (change("enc.8x8_block0", num_heads=2), ["8x8_block0.num_heads is 2; only 1"]),
    (change("enc.8x8_block0", skip_scale=0.5 ** 0.5), ["8x8_block0.skip_scale is 0.7"]),
    (change("enc.8x8_block0", skip_scale=torch.ones(2)), ["8x8_block0.skip_scale is Tensor"]),
    (change("enc.8x8_down.conv0", fused_resample=True), ["8x8_down.conv0.fused_resample is True"]),
    (change("enc.8x8_down.skip", down=False, up=True), ["8x8_down.skip.up is True"]),
    (change("out_norm", eps=1e-6), ["out_norm.eps is 1e-06"]),
    (change("map_noise", endpoint=True), ["map_noise.endpoint is True"]),
])
def test_networks_of_another_kind(place, change, words):
    data = snapshot_of()
    change(data)
    refused(dump(data, place), *words)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in {
    "img_resolution": [-16, "16", 2 ** 40, 1 << 9999, None, 16.0, True, [16], torch.zeros(2)],
    "in_channels": [0, 10 ** 9], "out_channels": [6], "label_dim": [0, None, -1, "ten", 10 ** 12],
    "channel_mult": ["12", [0, 1], [1] * 99, [1, 10 ** 9], [1, "2"], 3, None, [[1], [2]]],
    "model_channels": [-32, 33, 10 ** 9],
    "channel_mult_emb": [2], "num_blocks": [0, 10 ** 9, 1.5], "attn_resolutions": ["8", [0], [8.0], [2 ** 40]],
    "sigma_data": [0, math.nan, math.inf, "half", 1e30, torch.ones(1)],
}.items() for value in values])
def test_absurd_arguments(place, name, value):
    data = snapshot_of()
    for part in parts(data):
        part._init_kwargs[name] = value
    if name == "sigma_data":
        data["ema"].sigma_data = value
    refused(dump(data, place), f"its {name} is ")


@pytest.mark.parametrize("args, words", [
    (dict(model_channels=2048, channel_mult=[16] * 6, img_resolution=1024, num_blocks=8), "its length is"),
    (dict(label_dim=100_000, model_channels=2048), "its length is"),
    (dict(img_resolution=18, channel_mult=[1, 2, 3]), "does not halve"),
    (dict(model_channels=150), "describe no U-Net"),
    (dict(channel_mult=[]), "describe no U-Net"),
    (dict(num_blocks=2), "dec.8x8_block1.norm0.num_groups is 24"),
    (dict(attn_resolutions=[]), "8x8_block0.num_heads is 1; only 0"),
    (dict(label_dim=11), "map_label.weight is [128, 10]"),
    (dict(in_channels=1, out_channels=1), "enc.16x16_conv.weight is [32, 3, 3, 3]"),
])
def test_arguments_that_lie(place, args, words):
    """A network of terabytes is refused before it takes any memory: were it not, this would not return."""
    data = snapshot_of()
    data["ema"].model._init_kwargs.update(args)
    refused(dump(data, place), words)


def test_a_network_of_one_number_is_not_unfolded(place):
    """Tensors of stride 0 take no room in the file: they may have the right shapes, but the file is too short."""
    data = snapshot_of(width=256)
    for part in parts(data)[1].modules():
        for name, tensor in part._parameters.items() if isinstance(part, Part) else ():
            part._parameters[name] = tensor if tensor is None else torch.zeros(1).expand(tensor.shape)
    refused(dump(data, place), "its length is")
