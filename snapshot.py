"""NVIDIA's EDM networks, edm-imagenet-64x64-cond-adm.pkl or edm-cifar10-32x32-cond-vp.pkl, read without running
anything that is in the file.

Those pickles carry source code, which NVIDIA's loader executes. Here names outside ALLOWED are refused, objects become
records of attributes, and the network is compared, row by row, with what our U-Net or SongUNet computes.

Departures: interleaved queries, keys and values become three blocks, weights float32; dropout, the augmentation's input
and resampling filters, once seen to be ours, are dropped. A network without classes becomes one of one class, of
embedding 0; of a SongUNet, see songunet.py.
"""
import io
import math
import pickle
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

import run
import songunet
import unet
from songunet import SongUNet

ANY = range(1, 2 ** 31)
ARGUMENTS = {  # what our networks have: see _fits. Numbers: the length of the file bounds them
    "label_dim": range(2 ** 31), "img_resolution": ANY, "in_channels": ANY, "model_channels": range(2, 2 ** 31, 2),
    "channel_mult_emb": 4, "num_blocks": range(1, 65), "sigma_data": 0.5, "channel_mult": [ANY],
    "attn_resolutions": [ANY], "channel_mult_noise": ANY, "embedding_type": {"positional", "fourier"},
    "encoder_type": {"standard", "skip", "residual"}, "decoder_type": {"standard", "skip"}, "resample_filter": [ANY],
}
SAME = dict(sigma_data=0.5, channel_mult_emb=4, label_dim=0)
DEFAULTS = {  # of EDMPrecond and the networks: files leave them out. In the order of our Size
    "DhariwalUNet": dict(model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]),
    "SongUNet": dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16],
                     channel_mult_noise=1, embedding_type="positional", encoder_type="standard",
                     decoder_type="standard", resample_filter=[1, 1]),
}


OTHERS = {"Precond": "EDM2's ", "VPPrecond": "the VP baseline's ", "VEPrecond": "the VE baseline's ",
          "iDDPMPrecond": "iDDPM's "}


@dataclass
class Snapshot:
    """Arguments and weights (float32) of a UNet or SongUNet, and sigma_data of its preconditioning."""
    resolution: int
    channels: int
    classes: int
    size: unet.Size | songunet.Size
    sigma_data: float
    state: dict[str, Tensor]


def read(path) -> Snapshot:
    """The averaged network ("ema") in NVIDIA's file. UserError if it is damaged, hostile or of another kind."""
    with run.reading(path), open(path, "rb") as file:
        try:
            held = _Reader(file).load()
            if "ema" not in held:
                raise ValueError(f"it holds {_said(', '.join(map(str, held)))}: StyleGAN's, or another's")
            return _network(held["ema"], file.seek(0, 2))
        except MemoryError:
            raise ValueError("a length that no memory holds") from None


def _network(ema, length: int) -> Snapshot:
    """Of a file of this many bytes. ValueError if it isn't what our networks compute."""
    model = ema.state["_modules"]["model"]
    of = OTHERS.get(str(ema.kind), "")
    _compare([(f"{of}preconditioning", ema.kind, "EDMPrecond"), ("network", model.kind, {*DEFAULTS})])
    defaults, song = DEFAULTS[model.kind], model.kind == "SongUNet"
    args = {**SAME, **defaults, **ema.state["_init_kwargs"], **model.state["_init_kwargs"]}
    args["sigma_data"] = ema.state.get("sigma_data", args["sigma_data"])  # what NVIDIA's code computes with
    channels = args.setdefault("in_channels", args.get("img_channels"))
    _compare((name, args.get(name), ARGUMENTS[name]) for name in ARGUMENTS if song or name in args)
    _compare([("out_channels", args.get("out_channels", channels), channels)])
    fields = [tuple(v) if isinstance(v := args[name], list) else v for name in defaults]
    size, classes = (songunet if song else unet).Size(*fields), args["label_dim"]
    shape = args["img_resolution"], channels, max(1, classes), size
    with torch.device("meta"):  # shapes alone: the file has not earned any memory yet
        net = (SongUNet if song else unet.UNet)(*shape)
    least = 2 * sum(p.numel() for p in net.parameters())  # bytes, were the weights float16
    _compare([("length", length, range(least, 2 ** 62))])
    shapes = _shapes(net, classes)
    tensors = _flat(model, ["map_augment.weight", "map_noise.freqs", *shapes])
    _compare(_tensors(shapes, tensors, songunet.kernel(size.filter if song else (1, 1))))
    return Snapshot(*shape, float(args["sigma_data"]), _translated(net, tensors, classes))


def _translated(net, tensors: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """NVIDIA's tensors -> ours. [width, classes] of the labels -> a row per class, of a SongUNet times sqrt(classes);
    output 3 c + j of qkv -> j C + c; j: query, key, value."""
    state, song = {}, isinstance(net, SongUNet)
    for name, ours in net.state_dict().items():
        if name == "map_label.weight":
            given = tensors[name].t().double() if classes else torch.zeros(ours.shape)
            given = given * math.sqrt(classes) if song else given
        elif name == "map_layer0.bias" and song and classes:
            given = tensors[name].double() + tensors["map_layer0.weight"].double() @ tensors["map_label.bias"].double()
        elif name == "frequency":
            given = 2 * math.pi * tensors["map_noise.freqs"]
        elif ".qkv." in name:
            given = tensors[name].unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        else:
            given = tensors[name]
        state[name] = given.float().contiguous()
    return state


class _Node:
    """An object of the file, reduced to the name of its class and its attributes."""
    kind, state = "ModuleDict", {}  # the one class in these files that is torch's

    def __init__(self, *given):
        if given:
            self.kind, self.state = given


def _storage(raw: bytes) -> Tensor:
    """The numbers [n] of a tensor, from the small torch file that the pickle holds. ValueError for anything else."""
    try:
        if raw[:2] != b"PK":  # a zip could swell; NVIDIA's are not zipped
            stored = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            if isinstance(stored, torch.storage.TypedStorage) and stored.dtype.is_floating_point:
                return torch.empty(0, dtype=stored.dtype).set_(stored)
    except Exception:  # what torch says advises to load it unsafely
        pass
    raise ValueError("refused, nothing of it was run: a tensor in it is damaged or holds more than numbers")


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # an error outside the storage; `set_` would enlarge it


def _scalar(dtype: _Node, raw: bytes) -> float | int:
    return struct.unpack({"f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q"}[dtype.kind], raw)[0]


ALLOWED = {  # whole pairs: a dot inside a name could lead anywhere
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: _Node(meta["class_name"], meta["state"]),
    ("torch.nn.modules.container", "ModuleDict"): _Node,
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): lambda name, *rest: _Node(name, None),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,  # its name from numpy 2 on
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python: the one in C makes room for whatever memo index a file names."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise ValueError(f"refused, nothing of it was run: it asks for {_said(f'{module}.{name}')}")
        return ALLOWED[module, name]

    def build(self):
        """Attributes of the file's own objects, never of the functions in ALLOWED."""
        state, node = self.stack.pop(), self.stack[-1]
        if not isinstance(node, _Node):
            raise ValueError("attributes of what is no object of the file")
        node.state = state

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: build}
    del dispatch[pickle.BYTEARRAY8[0]]  # it fills as much memory as the file names


def _fits(there, wanted) -> bool:
    """wanted: a range of whole numbers, [range] of up to 8, a set of texts, or the value itself."""
    if isinstance(wanted, range):
        return type(there) is int and there in wanted
    if isinstance(wanted, list):
        return isinstance(there, (list, tuple)) and len(there) <= 8 and all(_fits(v, wanted[0]) for v in there)
    if isinstance(wanted, set):
        return type(there) is str and there in wanted
    return type(there) in (int, float, bool, str) and there == wanted


def _said(value) -> str:
    """A value of the file, or, of what could be long, its type."""
    return str(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__


def _compare(rows) -> None:
    """rows: (path, what is there, what is wanted). ValueError at the first that does not fit."""
    for path, there, wanted in rows:
        if not _fits(there, wanted):
            wanted = " or ".join(sorted(wanted)) if isinstance(wanted, set) else wanted
            raise ValueError(f"its {_said(path)} is {_said(there)}; only {wanted} can be loaded")


def _flat(model: _Node, names) -> dict[str, Tensor]:
    """{path: tensor}; a module without any of these names stays closed: a tensor too much."""
    places = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    tensors, todo = {}, [("", model)]
    while todo:
        prefix, node = todo.pop()
        held = {**node.state["_parameters"], **node.state["_buffers"]}
        for name, child in node.state["_modules"].items():
            if prefix + name in places and isinstance(child, _Node):
                todo.append((prefix + name + ".", child))
            else:
                held[name] = child
        tensors |= {prefix + name: tensor for name, tensor in held.items() if tensor is not None}
    return tensors


def _shapes(net, classes: int) -> dict[str, list]:
    """Of NVIDIA's tensors {path: shape}, of a network of ours."""
    shapes, song = {name: list(value.shape) for name, value in net.state_dict().items()}, isinstance(net, SongUNet)
    of_label = shapes.pop("map_label.weight")
    shapes |= {"map_label.weight": of_label[::-1]} if classes else {}
    shapes |= {"map_label.bias": of_label[1:]} if classes and song else {}
    shapes |= {"map_noise.freqs": shapes.pop("frequency")} if "frequency" in shapes else {}
    n = len(net.size.filter) if song else 2
    for name, part in net.named_modules():
        if isinstance(part, unet.Block) and part.resample:
            shapes |= {f"{name}.{conv}.resample_filter": [1, 1, n, n] for conv in ("conv0", "skip")}
        elif name.partition("_aux_")[2] in ("down", "up", "residual"):
            shapes[f"{name}.resample_filter"] = [1, 1, n, n]
    return shapes


def _tensors(shapes: dict[str, list], tensors: dict[str, Tensor], kernel: Tensor):
    """Rows: which tensors there are, of which shape, finite; of which filter."""
    for name in sorted(tensors.keys() - shapes.keys() - {"map_augment.weight"}):
        yield name, "too much", "nothing there"
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        yield name, str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__, str(shape)
        yield f"{name}, finite,", bool(tensor.float().isfinite().all()), True
        if "filter" in name:
            yield f"{name}, the recorded one,", bool((tensor == kernel).all()), True
