"""NVIDIA's EDM networks, such as edm-imagenet-64x64-cond-adm.pkl, read without running anything that is in the file.

Those pickles carry source code, which NVIDIA's loader executes. Here names outside ALLOWED are refused, objects become
records of attributes, and the network is compared, row by row, with what our U-Net computes. Not here: SongUNet.

Departures: interleaved queries, keys and values become three blocks, weights float32; dropout, the augmentation's input
and resampling filters, once seen to be plain means, are dropped.
"""
import io
import pickle
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

import run
import unet

DEFAULTS = dict(sigma_data=0.5, model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_emb=4,
                num_blocks=3, attn_resolutions=[32, 16, 8])  # of EDMPrecond and DhariwalUNet: files leave them out
ARGUMENTS = {  # within reason, and in our U-Net: see _fits
    "label_dim": range(1, 100_001), "img_resolution": range(1, 1025), "in_channels": range(1, 65),
    "model_channels": range(16, 2049, 2), "channel_mult_emb": 4, "num_blocks": range(1, 17), "sigma_data": 0.5,
    "channel_mult": [range(1, 17)], "attn_resolutions": [range(1, 1025)],
}


@dataclass
class Snapshot:
    """Arguments and weights (float32) of a unet.UNet, and sigma_data of its preconditioning."""
    resolution: int
    channels: int
    classes: int
    size: unet.Size
    sigma_data: float
    state: dict[str, Tensor]


def read(path) -> Snapshot:
    """The averaged network ("ema") in NVIDIA's file. UserError if it is damaged, hostile or of another kind."""
    with run.reading(path):
        with open(path, "rb") as file:
            try:
                return _network(_Reader(file).load()["ema"], file.seek(0, 2))
            except MemoryError:
                raise ValueError("a length that no memory holds") from None


def _network(ema, length: int) -> Snapshot:
    """Of a file of this many bytes. ValueError if it isn't what our U-Net computes."""
    model = ema.state["_modules"]["model"]
    _compare([("preconditioning", ema.kind, "EDMPrecond"), ("network", model.kind, "DhariwalUNet")])
    args = {**DEFAULTS, **ema.state["_init_kwargs"], **model.state["_init_kwargs"]}
    args["sigma_data"] = ema.state.get("sigma_data", args["sigma_data"])  # what NVIDIA's code computes with
    channels = args.setdefault("in_channels", args.get("img_channels"))
    _compare((name, args.get(name), wanted) for name, wanted in ARGUMENTS.items())
    _compare([("out_channels", args.get("out_channels", channels), channels)])
    mult, attention = tuple(args["channel_mult"]), tuple(args["attn_resolutions"])
    size = unet.Size(args["model_channels"], mult, args["num_blocks"], attention)
    shape = args["img_resolution"], channels, args["label_dim"], size
    with torch.device("meta"):  # shapes alone: the file has not earned any memory yet
        net = unet.UNet(*shape)
    least = 2 * sum(p.numel() for p in net.parameters())  # bytes, were the weights float16
    _compare([("length", length, range(least, 2 ** 62))])
    facts = _facts(net)
    places = {*dict(net.named_modules()), "map_augment", *(path.rpartition(".")[0] for path in facts)}
    attributes, tensors = _flat(model, places)
    _compare((path, attributes.get(path, value), value) for path, value in facts.items())  # default: as wanted
    _compare(_tensors(net, tensors))
    state = {}
    for name in net.state_dict():
        tensor = tensors[name]
        if name == "map_label.weight":
            tensor = tensor.t()  # [4 width, classes] there; here a row per class
        elif ".qkv." in name:  # output 3 c + j there, j C + c here; j: query, key, value
            tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        state[name] = tensor.float().contiguous()
    return Snapshot(*shape, float(args["sigma_data"]), state)


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
    """wanted: a range of whole numbers, [range] of up to 8, or the value itself."""
    if isinstance(wanted, range):
        return type(there) is int and there in wanted
    if isinstance(wanted, list):
        return isinstance(there, (list, tuple)) and len(there) <= 8 and all(_fits(v, wanted[0]) for v in there)
    return type(there) in (int, float, bool, str) and there == wanted


def _said(value) -> str:
    """A value of the file, or, of what could be long, its type."""
    return str(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__


def _compare(rows) -> None:
    """rows: (path, what is there, what is wanted). ValueError at the first that does not fit."""
    for path, there, wanted in rows:
        if not _fits(there, wanted):
            raise ValueError(f"its {_said(path)} is {_said(there)}; only {wanted} can be loaded")


def _flat(model: _Node, places: set[str]) -> tuple[dict, dict[str, Tensor]]:
    """{path: attribute}, {path: tensor}; a module out of place stays closed: a tensor too much."""
    attributes, tensors, todo = {}, {}, [("", model)]
    while todo:
        prefix, node = todo.pop()
        attributes |= {prefix + name: value for name, value in node.state.items()}
        held = {**node.state["_parameters"], **node.state["_buffers"]}
        for name, child in node.state["_modules"].items():
            if prefix + name in places and isinstance(child, _Node):
                todo.append((prefix + name + ".", child))
            else:
                held[name] = child
        tensors |= {prefix + name: tensor for name, tensor in held.items() if tensor is not None}
    return attributes, tensors


def _facts(net: unet.UNet) -> dict:
    """{path: attribute}: what makes NVIDIA's modules compute as ours do, and no shape tells."""
    facts = {"map_noise.num_channels": net.size.width, "map_noise.max_positions": 10_000, "map_noise.endpoint": False}
    for name, ours in net.named_modules():
        if isinstance(ours, unet.Block):
            facts |= {f"{name}.num_heads": ours.heads, f"{name}.skip_scale": 1, f"{name}.adaptive_scale": True}
            for conv in (f"{name}.conv0", f"{name}.skip"):  # both resample; `skip` even where it has no weights
                facts |= {f"{conv}.{way}": ours.resample == way for way in ("up", "down")}
                facts[f"{conv}.fused_resample"] = False
        elif isinstance(ours, unet.Norm):
            facts |= {f"{name}.num_groups": ours.num_groups, f"{name}.eps": ours.eps}
    return facts


def _tensors(net: unet.UNet, tensors: dict[str, Tensor]):
    """Rows: which tensors there are, of which shape, finite; filters are means of 2 x 2 pixels."""
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
