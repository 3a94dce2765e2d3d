"""SongUNet: the U-Nets DDPM++ and NCSN++, of EDM's released teachers for CIFAR-10, FFHQ and AFHQv2.

As unet.py, with these differences [Song et al. 2021, App. H; EDM Table 8]: the embedding is added to a block's
features, every sum of two is divided by sqrt 2, attention has one head and in the decoder stands first of all and at
the end of a level, resolutions change by a filter, and in the skip and residual variants the image itself enters every
level. All is float32, on a GPU too.

Departures: the class's bias is part of map_layer0's, classes are rows of a table; a new network has PyTorch's first
weights, and last layers of 0; no augmentation label, which is NVIDIA's at 0.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unet
from unet import Conv, zeroed

ROOT_HALF = math.sqrt(0.5)


class Size(NamedTuple):
    """Channels at level i are width * mult[i]; the resolution halves from level to level."""
    width: int
    mult: tuple[int, ...]
    blocks: int  # residual blocks a level, one more in the decoder
    attention: tuple[int, ...] = (16,)
    noise: int = 1  # times width: channels of the noise level's embedding
    embedding: str = "positional"  # or fourier: random frequencies
    encoder: str = "standard"  # skip: the shrunk image enters every level; residual: what became of it
    decoder: str = "standard"  # skip: every level adds to the grown image
    filter: tuple[int, ...] = (1, 1)  # of resampling, in each direction


def kernel(filter) -> Tensor:
    """[1, 1, n, n], of sum 1."""
    f = torch.tensor(filter, dtype=torch.float32)
    return (f.outer(f) / f.sum() ** 2)[None, None]


class Resample(nn.Module):
    """Half ("down") or twice ("up") the resolution, by a filter."""

    def __init__(self, filter, direction: str):
        super().__init__()
        self.direction, self.pad = direction, (len(filter) - 1) // 2
        self.register_buffer("kernel", kernel(filter), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        if self.direction == "down":
            return F.conv2d(x, k, stride=2, padding=self.pad, groups=x.shape[1])
        return F.conv_transpose2d(x, 4 * k, stride=2, padding=self.pad, groups=x.shape[1])


class Down(Conv):
    """Half the resolution: a convolution over a wider border, then the filter at every second pixel."""

    def __init__(self, inside: int, outside: int, filter):
        super().__init__(inside, outside, 3)
        self.blur = Resample(filter, "down")
        self.padding, self.blur.pad = (1 + self.blur.pad,) * 2, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.blur(F.conv2d(x, self.weight.to(x.dtype), padding=self.padding))
        return h + self.bias.to(x.dtype)[:, None, None]


class Block(unet.Block):
    """(x + conv(norm(conv(norm(x)) + embedding))) / sqrt 2; then self-attention, also so. Of unet.Block: `attend`."""

    def __init__(self, inside: int, outside: int, embed: int, filter, attention: bool = False,
                 resample: str | None = None):
        nn.Module.__init__(self)  # its layers are others
        self.resample, self.heads = resample, int(attention)
        self.blur = Resample(filter, resample) if resample else None
        self.norm0, self.conv0 = unet.Norm(inside, 1e-6), Conv(inside, outside, 3)
        self.affine = nn.Linear(embed, outside)
        self.norm1, self.conv1 = unet.Norm(outside, 1e-6), zeroed(Conv(outside, outside, 3))
        self.skip = Conv(inside, outside, 1) if inside != outside or resample else None
        if attention:
            self.norm2, self.qkv = unet.Norm(outside, 1e-6), Conv(outside, 3 * outside, 1)
            self.proj = zeroed(Conv(outside, outside, 1))

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        h = self.conv0(self.resampled(F.silu(self.norm0(x)))) + self.affine(embed).to(x.dtype)[..., None, None]
        x = self.resampled(x)
        x = ROOT_HALF * (self.conv1(F.silu(self.norm1(h))) + (x if self.skip is None else self.skip(x)))
        return ROOT_HALF * (x + self.proj(self.attend(self.norm2(x)))) if self.heads else x

    def resampled(self, x: Tensor) -> Tensor:
        return self.blur(x) if self.resample else x


class SongUNet(nn.Module):
    """F(x, c_noise, label) -> [..., C, H, W]: see unet.UNet. ValueError if the resolution does not halve."""

    def __init__(self, resolution: int, channels: int, classes: int, size: Size):
        super().__init__()
        width, embed, last = size.width, 4 * size.width, len(size.mult) - 1
        if resolution % 2 ** last:
            raise ValueError(f"resolution {resolution} does not halve {last} times")
        self.size, n = size, size.noise * width
        fourier, k = size.embedding == "fourier", torch.arange(n // 2)
        turns = 32 * math.pi * torch.randn(n // 2) if fourier else 10_000.0 ** (-k / (n // 2 - 1))
        self.register_buffer("frequency", turns, persistent=fourier)
        self.map_label = nn.Embedding(classes, n)
        self.map_layer0, self.map_layer1 = nn.Linear(n, embed), nn.Linear(embed, embed)

        def block(inside: int, outside: int, **how) -> Block:
            return Block(inside, outside, embed, size.filter, **how)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()  # named as in NVIDIA's files
        levels = [(f"{resolution >> i}x{resolution >> i}", width * mult, resolution >> i in size.attention)
                  for i, mult in enumerate(size.mult)]
        here, beside, skips = width, channels, []
        for at, outside, attention in levels:
            if not skips:
                self.enc[f"{at}_conv"] = Conv(channels, here, 3)
            else:
                self.enc[f"{at}_down"] = block(here, here, resample="down")
            if skips and size.encoder == "skip":
                self.enc[f"{at}_aux_down"] = Resample(size.filter, "down")
                self.enc[f"{at}_aux_skip"] = Conv(channels, here, 1)
            elif skips and size.encoder == "residual":
                self.enc[f"{at}_aux_residual"] = Down(beside, here, size.filter)
                beside = here
            skips.append(here)
            for i in range(size.blocks):
                self.enc[f"{at}_block{i}"] = block(here, outside, attention=attention)
                here = outside
                skips.append(here)
        self.levels, lowest, side = [at for at, *_ in levels], at, resolution >> last
        self.bottleneck = (here, side, side)  # shape, without leading dimensions
        for at, outside, attention in reversed(levels):
            if at == lowest:
                self.dec[f"{at}_in0"], self.dec[f"{at}_in1"] = block(here, here, attention=True), block(here, here)
            else:
                self.dec[f"{at}_up"] = block(here, here, resample="up")
            for i in range(size.blocks + 1):
                end = attention and i == size.blocks
                self.dec[f"{at}_block{i}"] = block(here + skips.pop(), outside, attention=end)
                here = outside
            if size.decoder == "skip" and at != lowest:
                self.dec[f"{at}_aux_up"] = Resample(size.filter, "up")
            if size.decoder == "skip" or at == self.levels[0]:
                self.dec[f"{at}_aux_norm"] = unet.Norm(here, 1e-6)
                self.dec[f"{at}_aux_conv"] = zeroed(Conv(here, channels, 3))

    label_embeddings = unet.UNet.label_embeddings

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None, features: bool | str = False):
        turn = (c_noise.reshape(-1, 1) * self.frequency).to(self.map_layer0.weight.dtype)
        embed = torch.cat([turn.sin(), turn.cos()], 1)
        embed = embed if label is None else embed + self.map_label(label.flatten())
        embed = F.silu(self.map_layer1(F.silu(self.map_layer0(embed))))
        enc, dec, blocks, skips = self.enc, self.dec, range(self.size.blocks), []
        h = beside = x.reshape(-1, *x.shape[-3:])
        for at in self.levels:  # beside h: the shrunk image, or what became of it
            h = enc[f"{at}_down"](h, embed) if skips else enc[f"{at}_conv"](h)
            if f"{at}_aux_skip" in enc:
                beside = enc[f"{at}_aux_down"](beside)
                h = h + enc[f"{at}_aux_skip"](beside)
            elif f"{at}_aux_residual" in enc:
                h = beside = ROOT_HALF * (h + enc[f"{at}_aux_residual"](beside))
            skips.append(h)
            for i in blocks:
                h = enc[f"{at}_block{i}"](h, embed)
                skips.append(h)
        bottleneck = h.reshape(*x.shape[:-3], *h.shape[1:])
        if features == "only":
            return bottleneck
        h, out = dec[f"{at}_in1"](dec[f"{at}_in0"](h, embed), embed), None
        for at in reversed(self.levels):
            h = dec[f"{at}_up"](h, embed) if f"{at}_up" in dec else h
            for i in (*blocks, len(blocks)):
                h = dec[f"{at}_block{i}"](torch.cat([h, skips.pop()], 1), embed)
            if f"{at}_aux_conv" in dec:
                made = dec[f"{at}_aux_conv"](F.silu(dec[f"{at}_aux_norm"](h)))
                out = made if out is None else made + dec[f"{at}_aux_up"](out)
        out = out.reshape(x.shape)
        return (out, bottleneck) if features else out
