"""NVIDIA's EDM networks, such as edm-imagenet-64x64-cond-adm.pkl, read without running anything that is in the file.

Those files are pickles that carry their own source code, which NVIDIA's loader executes. Here names outside ALLOWED are
refused, objects become records of their attributes, and the network is checked before anything of it is handed out.

  the file without its code                                 ALLOWED, _Reader, _storage
  constructor arguments, with NVIDIA's defaults             DEFAULTS, _size
  does it compute what our U-Net computes?                  _facts, _checked
  its weights in our order                                  read

    snapshot = read(path)
    net = unet.UNet(snapshot.resolution, snapshot.channels, snapshot.classes, snapshot.size)
    net.load_state_dict(snapshot.state)

Departures: the class matrix becomes a table of rows; queries, keys and values, interleaved in the file, become three
blocks; every weight becomes float32; dropout and the input of the augmentation (zero when sampling) are dropped, and so
are the filters of up- and downsampling, once seen to be plain means. Not here: EDM's other network, SongUNet.
"""
import dataclasses
import io
import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor

import unet
from common import UserError

DEFAULTS = dict(label_dim=0, sigma_data=0.5, model_channels=192, channel_mult=[1, 2, 3, 4], channel_mult_emb=4,
                num_blocks=3, attn_resolutions=[32, 16, 8])         # EDMPrecond's and DhariwalUNet's: files leave them out
AGAIN = "download it again or give another"
WHICH = "give one of NVIDIA's edm-*.pkl or network-snapshot-*.pkl files"


@dataclasses.dataclass
class Snapshot:
    """A network of NVIDIA's: the arguments of our unet.UNet, its weights, and sigma_data for the preconditioning."""
    resolution: int
    channels: int
    classes: int
    size: unet.Size
    sigma_data: float
    state: dict[str, Tensor]                                        # float32


def read(path) -> Snapshot:
    """The averaged network ("ema") in NVIDIA's file. UserError, one line, if it is damaged, hostile or of another kind."""
    try:
        ema, length = _load(Path(path))
        model = _part(ema, "_modules").get("model")
        kind = getattr(model, "kind", None)
        if kind == "SongUNet":
            raise UserError("a SongUNet snapshot (DDPM++ or NCSN++, as for CIFAR-10); only the ADM kind, DhariwalUNet, can be "
                            "loaded; train this dataset's own teacher")
        if (ema.kind, kind) != ("EDMPrecond", "DhariwalUNet"):
            raise UserError(f"its preconditioning is {ema.kind} and its network {kind}; only EDMPrecond with DhariwalUNet "
                            f"can be loaded; train this dataset's own teacher")
        args = {**DEFAULTS, **_part(ema, "_init_kwargs"), **_part(model, "_init_kwargs")}
        args["sigma_data"] = ema.state.get("sigma_data", args["sigma_data"])    # the number that NVIDIA's code computes with
        resolution, channels, classes, size, sigma_data = _size(args)
        try:
            with torch.device("meta"):                              # shapes alone: the file has not earned any memory yet
                net = unet.UNet(resolution, channels, classes, size)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"its recorded arguments describe no U-Net ({error}); {AGAIN}") from None
        if 2 * sum(p.numel() for p in net.parameters()) > length:
            raise UserError(f"its recorded arguments describe a network larger than the file; {AGAIN}")
        state = {}
        for name, tensor in _checked(net, model).items():
            if name == "map_label.weight":
                tensor = tensor.t()                                 # [4 width, classes] there; here a row per class
            elif ".qkv." in name:                                   # output 3 c + j there, j C + c here; j: query, key, value
                tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            state[name] = tensor.float().contiguous()
        return Snapshot(resolution, channels, classes, size, sigma_data, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------- the file without its code

class _Node:
    """An object of the file, reduced to the name of its class and its attributes."""
    kind, state = "ModuleDict", {}                                  # the one class in these files that is torch's


def _fill(node: _Node, state) -> None:
    node.state = state if isinstance(state, dict) else {}


def _object(meta: dict) -> _Node:
    """In place of the function that would execute meta["module_src"]."""
    node = _Node()
    node.kind = _said(meta["class_name"])
    _fill(node, meta["state"])
    return node


def _storage(raw: bytes) -> Tensor:
    """The numbers of one tensor, [n]: the file holds a small torch file for each. UserError for anything else in it."""
    try:
        if raw[:2] != b"PK":                                        # a zip could swell; NVIDIA's are not zipped
            stored = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
            if isinstance(stored, torch.storage.TypedStorage) and stored.dtype.is_floating_point:
                return torch.empty(0, dtype=stored.dtype).set_(stored)
    except Exception:                                               # torch raises a dozen types for a damaged file
        pass
    raise UserError(f"refused: a tensor in it is damaged or holds more than numbers (nothing of it was run); {AGAIN}")


def _tensor(numbers: Tensor, offset: int, size: tuple, stride: tuple, *rest) -> Tensor:
    return numbers.as_strided(size, stride, offset)                 # RuntimeError outside the storage; `set_` would enlarge it


def _dtype(name: str, *rest) -> _Node:
    node = _Node()
    node.kind = name
    return node


def _scalar(dtype: _Node, raw: bytes) -> float | int:
    return struct.unpack({"f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q"}[dtype.kind], raw)[0]


ALLOWED = {                                                         # whole pairs: a dot inside a name could lead anywhere
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
    ("torch.nn.modules.container", "ModuleDict"): _Node,
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,                  # its name from numpy 2 on
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python: the one in C makes room for whatever memo index a file names."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise UserError(f"refused: it asks for {_said(f'{module}.{name}')}, which no EDM network needs (nothing of it was "
                            f"run); get the file from NVIDIA")
        return ALLOWED[module, name]

    def build(self):
        """Set attributes: of the file's own objects only, never of the functions in ALLOWED."""
        state, node = self.stack.pop(), self.stack[-1]
        if not isinstance(node, _Node):
            raise pickle.UnpicklingError("not an object of the file")
        _fill(node, state)

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: build}
    del dispatch[pickle.BYTEARRAY8[0]]                              # it fills as much memory as the file names


def _load(path: Path) -> tuple[_Node, int]:
    """The file's "ema", and the file's length in bytes."""
    first = b""
    try:
        with open(path, "rb") as file:
            first = file.peek(1)[:1]
            data = _Reader(file).load()
            length = file.seek(0, io.SEEK_END)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no such file; {WHICH}") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror}); {WHICH}") from None
    except Exception as error:                                      # a damaged pickle fails in a dozen ways
        if first not in (b"\x80", b""):
            raise UserError(f"not a pickle; {WHICH}") from None
        raise UserError(f"truncated or damaged ({type(error).__name__}); {AGAIN}") from None
    if not isinstance(data, dict) or not isinstance(data.get("ema"), _Node):
        raise UserError(f'holds no network called "ema"; {WHICH}')
    return data["ema"], length


def _said(value) -> str:
    """A value of the file in a few printable characters; of what could be long only the type."""
    if isinstance(value, str):
        return ascii(value[:60])[1:-1]
    if value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < 10 ** 12:
        return str(value)
    return type(value).__name__ if not isinstance(value, int) else "a huge number"


def _part(node: _Node, name: str) -> dict:
    """The attribute `name` if it is a dict; its entries by name."""
    part = node.state.get(name)
    return {key: value for key, value in part.items() if isinstance(key, str)} if isinstance(part, dict) else {}


# ------------------------------------------------------------------------------------------------- is it one of ours?

def _size(args: dict) -> tuple[int, int, int, unet.Size, float]:
    """resolution, channels, classes, size, sigma_data. UserError for what is out of reason, or not in our U-Net."""
    def whole(name, low, high, value):
        if type(value) is not int or not low <= value <= high:
            wanted = low if low == high else f"a whole number from {low} to {high}"
            raise UserError(f"its {name} is {_said(value)}; only {wanted} can be loaded; {AGAIN}")
        return value

    def several(name, low, high):
        values = args[name]
        if not isinstance(values, (list, tuple)) or not low <= len(values) <= 8:
            raise UserError(f"its {name} is {_said(values)}; only a list of {low} to 8 numbers can be loaded; {AGAIN}")
        return tuple(whole(name, 1, high, value) for value in values)

    if type(args["label_dim"]) in (int, type(None)) and not args["label_dim"]:
        raise UserError("an unconditional snapshot (label_dim 0), but students divide the classes; give a conditional one, "
                        "such as edm-imagenet-64x64-cond-adm.pkl")
    resolution = whole("img_resolution", 1, 1024, args.get("img_resolution"))
    channels = whole("in_channels", 1, 64, args.get("in_channels", args.get("img_channels")))
    whole("out_channels", channels, channels, args.get("out_channels", channels))
    whole("channel_mult_emb", 4, 4, args["channel_mult_emb"])
    size = unet.Size(whole("model_channels", 16, 2048, args["model_channels"]), several("channel_mult", 1, 16),
                     whole("num_blocks", 1, 16, args["num_blocks"]), several("attn_resolutions", 0, 1024))
    if size.width % 2:
        raise UserError(f"its model_channels is {size.width}; only an even number can be loaded; {AGAIN}")
    sigma_data = args["sigma_data"]
    if type(sigma_data) not in (int, float) or not 1e-3 <= sigma_data <= 1e3:
        raise UserError(f"its sigma_data is {_said(sigma_data)}; only a number from 0.001 to 1000 can be loaded; {AGAIN}")
    return resolution, channels, whole("label_dim", 1, 100_000, args["label_dim"]), size, float(sigma_data)


def _facts(net: unet.UNet) -> dict[str, dict]:
    """{module: {attribute: value}}: what NVIDIA's modules must have to compute as ours do, and no shape tells."""
    facts = {"map_noise": {"num_channels": net.size.width, "max_positions": 10_000, "endpoint": False}}
    for name, module in net.named_modules():
        if isinstance(module, unet.Block):
            facts[name] = {"num_heads": module.heads, "skip_scale": 1, "adaptive_scale": True}
            for conv in ("conv0", "skip"):                          # both resample; `skip` even where it has no weights
                facts[f"{name}.{conv}"] = {"up": module.resample == "up", "down": module.resample == "down",
                                           "fused_resample": False}
        elif isinstance(module, unet.Norm):
            facts[name] = {"num_groups": module.num_groups, "eps": module.eps}
    return facts


def _flat(model: _Node, places: set[str]) -> tuple[dict[str, _Node], dict[str, Tensor], set[str]]:
    """{name: module}, {name: tensor}, named as in a state dict, and the modules at no place of ours, which stay closed."""
    modules, tensors, strange, todo = {}, {}, set(), [("", model)]
    while todo:
        prefix, node = todo.pop()
        modules[prefix[:-1]] = node
        held = {**_part(node, "_parameters"), **_part(node, "_buffers")}
        tensors |= {prefix + name: tensor for name, tensor in held.items() if tensor is not None}
        for name, child in _part(node, "_modules").items():
            if prefix + name in places and isinstance(child, _Node):
                todo.append((f"{prefix}{name}.", child))
            elif child is not None:
                strange.add(prefix + name)
    return modules, tensors, strange


def _checked(net: unet.UNet, model: _Node) -> dict[str, Tensor]:
    """The tensors of our U-Net, by the same names, as they lie in the file. UserError unless each is there and sound."""
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    shapes["map_label.weight"] = shapes["map_label.weight"][::-1]
    filters = {f"{name}.{conv}.resample_filter": (1, 1, 2, 2) for name, block in net.named_modules()
               if isinstance(block, unet.Block) and block.resample for conv in ("conv0", "skip")}
    expected, facts = {**shapes, **filters}, _facts(net)
    modules, tensors, strange = _flat(model, {*dict(net.named_modules()), *facts, "map_augment"})
    for what, names in (("missing from", expected.keys() - tensors.keys()),
                        ("too many in", strange | (tensors.keys() - expected.keys() - {"map_augment.weight"}))):
        if names:
            raise UserError(f"{len(names)} parts are {what} it, such as {_said(min(names))}; {AGAIN}")
    for name, node in modules.items():
        for key, value in facts.get(name, {}).items():
            there = node.state.get(key, value)
            if type(there) not in (int, float, bool) or there != value:
                raise UserError(f"{key} of its {name} is {_said(there)}; only {value} can be loaded; {AGAIN}")
    for name, shape in expected.items():
        tensor = tensors[name]
        there = list(tensor.shape) if isinstance(tensor, Tensor) else _said(tensor)
        if there != list(shape):
            raise UserError(f"its {name} is {there}; only {list(shape)} can be loaded; {AGAIN}")
        if not tensor.float().isfinite().all():
            raise UserError(f"its {name} holds numbers that are not finite; {AGAIN}")
        if name in filters and (tensor != 0.25).any():
            raise UserError(f"its {name} is not the mean of 2 x 2 pixels, as our U-Net resamples; {AGAIN}")
    return {name: tensors[name] for name in shapes}
