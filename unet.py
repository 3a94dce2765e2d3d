"""The ADM U-Net as EDM trains it for ImageNet-64: the network of images, unless the teacher is a SongUNet.

Residual blocks with skip connections, self-attention at low resolutions, noise level and class entering every block as
a scale and a shift [Dhariwal and Nichol 2021, App. A; EDM Table 8]. Weights and embeddings are float32; on a GPU all
from the first to the last convolution runs in bfloat16 (float16 diverges).

Departures: classes are rows of a table; queries, keys and values lie in three blocks, not interleaved (snapshot.py
translates); attention is PyTorch's fused one; dropout is 0.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Size(NamedTuple):
    """Channels at level i are width * mult[i]; the resolution halves from level to level."""
    width: int
    mult: tuple[int, ...]
    blocks: int  # residual blocks a level
    attention: tuple[int, ...] = (32, 16, 8)  # resolutions with self-attention


SIZES = {  # [MSD Table 7]: 296, 173, 86, 26 million parameters
    "B": Size(192, (1, 2, 3, 4), 3),
    "S": Size(160, (1, 2, 2, 4), 3),
    "XS": Size(128, (1, 2, 2, 4), 2),
    "XXS": Size(96, (1, 2, 2, 2), 2),
}
LAPTOP = {  # ours, for 16 and 32 grey pixels on a CPU
    "B": Size(16, (1, 2, 4), 1, (8, 4)),  # it alone has 64 channels: a head of attention
    "S": Size(16, (1, 2, 2), 1, (8, 4)),
    "XS": Size(16, (1, 1, 2), 1, (8, 4)),
    "XXS": Size(16, (1, 1, 1), 1, (8, 4)),
}
CIFAR = {  # ours
    "B": Size(128, (1, 2, 2), 3, (16, 8)),
    "S": Size(96, (1, 2, 2), 3, (16, 8)),
    "XS": Size(64, (1, 2, 2), 2, (16, 8)),
    "XXS": Size(32, (1, 2, 2), 2, (16, 8)),
}


class Conv(nn.Conv2d):
    """Keeps the size of the image; runs in the dtype of its input."""

    def __init__(self, inside: int, outside: int, kernel: int):
        super().__init__(inside, outside, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class Norm(nn.GroupNorm):
    """At most 32 groups of at least 4 channels; in the dtype of its input."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, silent at the start."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Block(nn.Module):
    """x + conv(norm * (1 + scale) + shift), scale and shift from the embedding; then self-attention.

    resample: "up", "down" or None, before it."""

    def __init__(self, inside: int, outside: int, embed: int, attention: bool = False, resample: str | None = None):
        super().__init__()
        self.resample, self.heads = resample, outside // 64 if attention else 0
        self.norm0, self.conv0 = Norm(inside), Conv(inside, outside, 3)
        self.affine = nn.Linear(embed, 2 * outside)
        self.norm1, self.conv1 = Norm(outside), zeroed(Conv(outside, outside, 3))
        self.skip = Conv(inside, outside, 1) if inside != outside else None
        if self.heads:
            self.norm2, self.qkv = Norm(outside), Conv(outside, 3 * outside, 1)
            self.proj = zeroed(Conv(outside, outside, 1))

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        h = self.resampled(F.silu(self.norm0(x)))
        x = self.resampled(x)
        scale, shift = self.affine(embed).to(x.dtype)[..., None, None].chunk(2, 1)  # [B, outside, 1, 1]
        h = torch.addcmul(shift, self.norm1(self.conv0(h)), 1 + scale)
        x = self.conv1(F.silu(h)) + (self.skip(x) if self.skip is not None else x)
        return x + self.proj(self.attend(self.norm2(x))) if self.heads else x

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the pixels of x."""
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))  # [B, 3, heads, ch, HW]
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(1)  # [B, heads, HW, ch], as fused kernels want it
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


class UNet(nn.Module):
    """F(x, c_noise, label) -> [..., C, H, W], for x [..., C, H, W], c_noise [...], label [...] (None: no class).

    resolution: H = W. features=True: also the encoder's last output [..., *bottleneck]; "only": it alone. ValueError if
    the resolution does not halve."""

    def __init__(self, resolution: int, channels: int, classes: int, size: Size):
        super().__init__()
        width, embed, last = size.width, 4 * size.width, len(size.mult) - 1
        if resolution % 2 ** last:
            raise ValueError(f"resolution {resolution} does not halve {last} times")
        self.size, self.precision = size, None  # a dtype; None: bfloat16 on a GPU, else that of x
        frequency = 10_000 ** (-torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        self.register_buffer("frequency", frequency, persistent=False)
        self.map_layer0, self.map_layer1 = nn.Linear(width, embed), nn.Linear(embed, embed)
        self.map_label = nn.Embedding(classes, embed)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()  # named as in NVIDIA's files: resolution and place
        sides = [resolution >> level for level in range(last + 1)]
        levels = [(f"{r}x{r}", width * mult, r in size.attention) for r, mult in zip(sides, size.mult)]
        here, skips = levels[0][1], []
        for at, outside, attention in levels:
            if skips:
                self.enc[f"{at}_down"] = Block(here, here, embed, resample="down")
            else:
                self.enc[f"{at}_conv"] = Conv(channels, here, 3)
            skips.append(here)
            for i in range(size.blocks):
                self.enc[f"{at}_block{i}"] = Block(here, outside, embed, attention)
                here = outside
                skips.append(here)
        self.bottleneck = (here, sides[-1], sides[-1])  # shape, without leading dimensions
        self.dec[f"{at}_in0"], self.dec[f"{at}_in1"] = Block(here, here, embed, True), Block(here, here, embed)
        for at, outside, attention in reversed(levels):
            if f"{at}_in0" not in self.dec:
                self.dec[f"{at}_up"] = Block(here, here, embed, resample="up")
            for i in range(size.blocks + 1):
                self.dec[f"{at}_block{i}"] = Block(here + skips.pop(), outside, embed, attention)
                here = outside
        self.out_norm, self.out_conv = Norm(here), zeroed(Conv(here, channels, 3))

    def label_embeddings(self) -> Tensor:
        """[classes, d], learned: the columns of NVIDIA's map_label [MSD App. B.1]."""
        return self.map_label.weight.detach()

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None, features: bool | str = False):
        turn = (c_noise.reshape(-1, 1) * self.frequency).to(self.map_layer0.weight.dtype)
        embed = self.map_layer1(F.silu(self.map_layer0(torch.cat([turn.cos(), turn.sin()], 1))))
        embed = F.silu(embed if label is None else embed + self.map_label(label.flatten()))  # [B, 4 width]
        dtype = self.precision or (torch.bfloat16 if x.is_cuda else x.dtype)
        h, skips = x.reshape(-1, *x.shape[-3:]).to(dtype), []
        for block in self.enc.values():
            h = block(h) if isinstance(block, Conv) else block(h, embed)
            skips.append(h)
        bottleneck = h.reshape(*x.shape[:-3], *h.shape[1:])  # [..., channels, h, w]
        if features == "only":
            return bottleneck
        for name, block in self.dec.items():
            h = block(torch.cat([h, skips.pop()], 1) if "block" in name else h, embed)
        out = self.out_conv(F.silu(self.out_norm(h))).reshape(x.shape).to(x.dtype)
        return (out, bottleneck) if features else out
