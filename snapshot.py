"""NVIDIA's EDM networks, such as edm-imagenet-64x64-cond-adm.pkl, read without running anything that is in the file.

Those files are pickles that carry their own source code, which NVIDIA's loader executes. Here names outside ALLOWED are
refused, objects become records of attributes, and the network is compared, row by row, with what our U-Net computes
before anything of it is handed out.

Departures: the class matrix becomes a table of rows; queries, keys and values, interleaved in the file, become three
blocks; weights become float32; dropout and the input of the augmentation (zero when sampling) are dropped, as are the
filters of up- and downsampling, once seen to be plain means. Not here: EDM's other network, SongUNet (CIFAR-10).
"""
import io
import os
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import unet
from flags import UserError

DEFAULTS = dict(label_dim=0, sigma_data=0.5, model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_emb=4,
                num_blocks=3, attn_resolutions=[32, 16, 8])  # EDMPrecond's and DhariwalUNet's: files leave them out
ARGUMENTS = {  # what is within reason, and in our U-Net: see _fits
    "label_dim": range(1, 100_001), "img_resolution": range(1, 1025), "in_channels": range(1, 65),
    "model_channels": range(16, 2049, 2), "channel_mult_emb": 4, "num_blocks": range(1, 17), "sigma_data": (1e-3, 1e3),
    "channel_mult": [range(1, 17)], "attn_resolutions": [range(1, 1025)],
}


@dataclass
class Snapshot:
    """A network of NVIDIA's: the arguments of our unet.UNet, its weights, and sigma_data for the preconditioning."""
    resolution: int
    channels: int
    classes: int
    size: unet.Size
    sigma_data: float
    state: dict[str, Tensor]  # float32


def read(path) -> Snapshot:
    """The averaged network ("ema") in NVIDIA's file. UserError if it is damaged, hostile or of another kind."""
    try:
        return _read(Path(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; fetch it again, or give another of NVIDIA's edm-*.pkl files") from None


def _read(path: Path) -> Snapshot:
    ema = _load(path)
    model = _part(ema, "_modules").get("model")
    _compare([("preconditioning", ema.kind, "EDMPrecond"), ("network", getattr(model, "kind", None), "DhariwalUNet")])
    args = {**DEFAULTS, **_part(ema, "_init_kwargs"), **_part(model, "_init_kwargs")}
    args["sigma_data"] = ema.state.get("sigma_data", args["sigma_data"])  # the number that NVIDIA's code computes with
    channels = args.setdefault("in_channels", args.get("img_channels"))
    _compare([*((name, args.get(name), wanted) for name, wanted in ARGUMENTS.items()),
              ("out_channels", args.get("out_channels", channels), channels)])
    resolution, classes = args["img_resolution"], args["label_dim"]
    mult, attention = tuple(args["channel_mult"]), tuple(args["attn_resolutions"])
    size = unet.Size(args["model_channels"], mult, args["num_blocks"], attention)
    try:
        with torch.device("meta"):  # shapes alone: the file has not earned any memory yet
            net = unet.UNet(resolution, channels, classes, size)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"its recorded arguments describe no U-Net ({error})") from None
    least = 2 * sum(p.numel() for p in net.parameters())  # bytes, were the weights float16
    _compare([("length", os.path.getsize(path), range(least, 2 ** 62))])
    facts = _facts(net)
    modules, tensors = _flat(model, {*dict(net.named_modules()), *facts, "map_augment"})
    _compare(_attributes(facts, modules))
    _compare(_tensors(net, tensors))
    state = {}
    for name in net.state_dict():
        tensor = tensors[name]
        if name == "map_label.weight":
            tensor = tensor.t()  # [4 width, classes] there; here a row per class
        elif ".qkv." in name:  # output 3 c + j there, j C + c here; j: query, key, value
            tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        state[name] = tensor.float().contiguous()
    return Snapshot(resolution, channels, classes, size, float(args["sigma_data"]), state)


class _Node:
    """An object of the file, reduced to the name of its class and its attributes."""
    kind, state = "ModuleDict", {}  # the one class in these files that is torch's


def _node(kind, state=None) -> _Node:
    node = _Node()
    node.kind, node.state = kind, state if isinstance(state, dict) else {}
    return node


def _storage(raw: bytes) -> Tensor:
    """The numbers of one tensor, [n]: the file holds a small torch file for each. UserError for anything else in it."""
    try:
        if raw[:2] != b"PK":  # a zip could swell; NVIDIA's are not zipped
            stored = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            if isinstance(stored, torch.storage.TypedStorage) and stored.dtype.is_floating_point:
                return torch.empty(0, dtype=stored.dtype).set_(stored)
    except Exception:  # torch raises a dozen types for a damaged file
        pass
    raise UserError("refused: a tensor in it is damaged or holds more than numbers (nothing of it was run)")


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    return numbers.as_strided(size, stride, offset)  # an error outside the storage; `set_` would enlarge it


def _scalar(dtype: _Node, raw: bytes) -> float | int:
    return struct.unpack({"f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q"}[dtype.kind], raw)[0]


ALLOWED = {  # whole pairs: a dot inside a name could lead anywhere
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: _node(meta["class_name"], meta["state"]),
    ("torch.nn.modules.container", "ModuleDict"): _Node,
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): lambda name, *rest: _node(name),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,  # its name from numpy 2 on
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python: the one in C makes room for whatever memo index a file names."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise UserError(f"refused: it asks for {_said(f'{module}.{name}')} (nothing of it was run)")
        return ALLOWED[module, name]

    def build(self):
        """Set attributes: of the file's own objects only, never of the functions in ALLOWED."""
        state, node = self.stack.pop(), self.stack[-1]
        if not isinstance(node, _Node):
            raise pickle.UnpicklingError("not an object of the file")
        node.state = state if isinstance(state, dict) else {}

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: build}
    del dispatch[pickle.BYTEARRAY8[0]]  # it fills as much memory as the file names


def _load(path: Path) -> _Node:
    """The file's "ema"."""
    try:
        with open(path, "rb") as file:
            data = _Reader(file).load()
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise UserError(f"no pickle, truncated or damaged ({type(error).__name__})") from None
    ema = data.get("ema") if isinstance(data, dict) else None
    _compare([("ema is a network", isinstance(ema, _Node), True)])
    return ema


def _part(node: _Node, name: str) -> dict:
    """The attribute `name` if it is a dict; its entries by name."""
    part = node.state.get(name)
    return {key: value for key, value in part.items() if isinstance(key, str)} if isinstance(part, dict) else {}


def _fits(there, wanted) -> bool:
    """wanted: a range of whole numbers, [range] for a list of up to 8, (low, high) of numbers, or the value itself."""
    if isinstance(wanted, range):
        return type(there) is int and there in wanted
    if isinstance(wanted, list):
        return isinstance(there, (list, tuple)) and len(there) <= 8 and all(_fits(v, wanted[0]) for v in there)
    if isinstance(wanted, tuple):
        return type(there) in (int, float) and wanted[0] <= there <= wanted[1]
    return type(there) in (int, float, bool, str) and there == wanted


def _said(value) -> str:
    """A value of the file in a few printable characters; of what could be long only the type."""
    if isinstance(value, str):
        return ascii(value[:60])[1:-1]
    short = isinstance(value, float) or isinstance(value, int) and abs(value) < 10 ** 12
    return str(value) if short else type(value).__name__


def _compare(rows) -> None:
    """rows: (path in the file, what is there, what is wanted). UserError at the first that does not fit."""
    for path, there, wanted in rows:
        if not _fits(there, wanted):
            raise UserError(f"its {_said(path)} is {_said(there)}; only {wanted} can be loaded")


def _flat(model: _Node, places: set[str]) -> tuple[dict[str, _Node], dict[str, Tensor]]:
    """{name: module}, {name: tensor}, named as in a state dict; a module elsewhere stays closed: a tensor too much."""
    modules, tensors, todo = {}, {}, [("", model)]
    while todo:
        prefix, node = todo.pop()
        modules[prefix[:-1]] = node
        held = {**_part(node, "_parameters"), **_part(node, "_buffers")}
        for name, child in _part(node, "_modules").items():
            if prefix + name in places and isinstance(child, _Node):
                todo.append((f"{prefix}{name}.", child))
            else:
                held[name] = child
        tensors |= {prefix + name: tensor for name, tensor in held.items() if tensor is not None}
    return modules, tensors


def _facts(net: unet.UNet) -> dict[str, dict]:
    """{module: {attribute: value}}: what NVIDIA's modules must have to compute as ours do, and no shape tells."""
    facts = {"map_noise": {"num_channels": net.size.width, "max_positions": 10_000, "endpoint": False}}
    for name, ours in net.named_modules():
        if isinstance(ours, unet.Block):
            facts[name] = {"num_heads": ours.heads, "skip_scale": 1, "adaptive_scale": True}
            up, down = ours.resample == "up", ours.resample == "down"
            for conv in ("conv0", "skip"):  # both resample; `skip` even where it has no weights
                facts[f"{name}.{conv}"] = {"up": up, "down": down, "fused_resample": False}
        elif isinstance(ours, unet.Norm):
            facts[name] = {"num_groups": ours.num_groups, "eps": ours.eps}
    return facts


def _attributes(facts: dict[str, dict], modules: dict[str, _Node]):
    """Rows of the modules' attributes; those that a file leaves out are as they should be."""
    for name in sorted(facts.keys() & modules.keys()):
        for key, value in facts[name].items():
            yield f"{name}.{key}", modules[name].state.get(key, value), value


def _tensors(net: unet.UNet, tensors: dict[str, Tensor]):
    """Rows of the tensors: which there are, of which shape, finite, and filters that are means of 2 x 2 pixels."""
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    shapes["map_label.weight"].reverse()
    for name, block in net.named_modules():
        if isinstance(block, unet.Block) and block.resample:
            shapes |= {f"{name}.{conv}.resample_filter": [1, 1, 2, 2] for conv in ("conv0", "skip")}
    for name in sorted(tensors.keys() - shapes.keys() - {"map_augment.weight"}):
        yield name, "too much", "nothing there"
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        yield name, str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__, str(shape)
        yield f"{name}, finite,", bool(tensor.float().isfinite().all()), True
        if "filter" in name:
            yield f"{name}, a mean,", bool((tensor == 0.25).all()), True
