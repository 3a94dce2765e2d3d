"""Fréchet distance between two sets of images [Heusel et al. 2017].

"FID": features of NVIDIA's Inception (nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/
inception-2015-12-05.pt; a TorchScript file is a program: give only that one). "FD (our classifier)": of a small convnet
trained here; it is no FID.

Departure: the trace of the root of C1 C2 is the sum of the singular values of C1^(1/2) C2^(1/2), their roots from
symmetric eigendecompositions: never complex, and sound for fewer images than features.

    python fid.py --images samples.npz --ref imagenet-64x64.npz --features inception-2015-12-05.pt
"""
import math
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import images
import run
from common import generator, learning_rate
from flags import UserError, command, flag, parse

INCEPTION = "inception-2015-12-05.pt"


class Moments:
    """Mean and unbiased covariance of features that come in pieces, float64."""

    def __init__(self):
        self.n, self.mean, self._scatter = 0, 0.0, 0.0

    def add(self, features: Tensor) -> "Moments":
        """Take in features [B, d]; returns itself. Scatter about the own mean: sums of squares would cancel."""
        x = features.double()
        if len(x):
            n, mean = self.n + len(x), x.mean(0)
            gap = mean - self.mean
            self._scatter = self._scatter + (x - mean).T @ (x - mean) + gap.outer(gap) * (self.n * len(x) / n)  # [d, d]
            self.n, self.mean = n, self.mean + gap * (len(x) / n)
        return self

    def cov(self) -> Tensor:
        """[d, d], divided by n - 1; not finite if n < 2."""
        return self._scatter / (self.n - 1)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d, d] of features [N, d], float64."""
    moments = Moments().add(features)
    return moments.mean, moments.cov()


def _root(cov: Tensor) -> Tensor:
    """A [d, r], A A^T = cov [d, d]. Eigenvalues below rounding are dropped: the root of 1e-16 is 1e-8."""
    value, vector = torch.linalg.eigh((cov + cov.T) / 2)
    keep = value > len(cov) * torch.finfo(value.dtype).eps * value.abs().max()
    return vector[:, keep] * value[keep].sqrt()


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians, in float64; 0 = equal.

    ValueError if shapes differ or anything is not finite: max(0, nan) would be a perfect 0."""
    mu1, cov1, mu2, cov2 = four = [torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2)]
    alike = mu1.shape == mu2.shape and cov1.shape == cov2.shape == mu1.shape * 2
    if not alike or not all(torch.isfinite(a).all() for a in four):
        raise ValueError(f"not two finite Gaussians of one dimension: {[list(a.shape) for a in four]}")
    root = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()  # tr (C1 C2)^(1/2)
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).item())


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fake [N, d] among real [M, d], and of real among fake; among: nearer to one of them than its k-th
    nearest neighbour [Kynkäänniemi et al. 2019, Eq. 1, 2]. ValueError for fewer than k + 1."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{min(len(real), len(fake))} points: no {k}-th neighbour")

    def among(x: Tensor, of: Tensor) -> float:
        radius = torch.cat([torch.cdist(part, of).kthvalue(k + 1).values for part in of.split(1024)])  # 1st: itself
        return torch.cat([(torch.cdist(part, of) <= radius).any(1) for part in x.split(1024)]).double().mean().item()
    real, fake = real.double(), fake.double()
    return among(fake, real), among(real, fake)


class Inception:
    """NVIDIA's TorchScript Inception. UserError if the file is something else."""
    name, dimension = "FID", 2048

    def __init__(self, path, device="cpu"):
        self.device = device
        with run.reading(path, f"NVIDIA's {INCEPTION}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript's end is announced
            self.net = torch.jit.load(str(path), map_location=device).eval()
            probe = self.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
            if probe.shape != (2, self.dimension):
                raise ValueError(f"{list(probe.shape)} for 2 images")

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = 64) -> Tensor:
        """[N, 2048] float32 on the CPU, of uint8 images x [N, C, H, W], C = 1 or 3."""
        return torch.cat([self.net(part.expand(-1, 3, -1, -1).contiguous().to(self.device), return_features=True)
                         .float().cpu() for part in x.split(batch)])


class Classifier(nn.Module):
    """A small convnet for images of `shape` (C, H, W), 16 pixels or more."""
    name, dimension = "FD (our classifier)", 64

    def __init__(self, shape, classes: int):
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        self.conv = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((self.shape[0], 32), (32, 64), (64, 64)))
        self.norm = nn.ModuleList(nn.GroupNorm(8, b) for b in (32, 64, 64))
        self.feature, self.out = nn.Linear(64 * 4 * 4, self.dimension), nn.Linear(self.dimension, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Penultimate activations [B, 64] of x [B, C, H, W] in [-1, 1]."""
        for i, (conv, norm) in enumerate(zip(self.conv, self.norm)):
            x = F.relu(norm(conv(x if i == 0 else F.max_pool2d(x, 2))))
        return F.silu(self.feature(F.adaptive_avg_pool2d(x, 4).flatten(1)))  # ReLU leaves a third of them dead

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))  # logits [B, classes]

    @torch.no_grad()
    def features(self, x: Tensor, batch: int = 512) -> Tensor:
        """[N, 64] float32 on the CPU, of uint8 images x [N, *shape]. UserError for another shape."""
        if tuple(x.shape[1:]) != self.shape:
            raise UserError(f"images {list(x.shape[1:])}, but a classifier for {list(self.shape)}")
        device = self.out.weight.device
        return torch.cat([self.embed(images.to_float(part.to(device))).cpu() for part in x.split(batch)])


def train_classifier(x: Tensor, label: Tensor, classes: int, seed: int = 0, epochs: int = 3, device="cpu"):
    """A Classifier trained on uint8 images x [N, C, H, W], label [N]; on a CPU bit-identical for equal arguments."""
    net, g = Classifier(x.shape[1:], classes), generator("classifier", seed, "init")
    for layer in (*net.conv, net.feature, net.out):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
        nn.init.zeros_(layer.bias)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    orders = [torch.randperm(len(x), generator=generator("classifier", seed, epoch)) for epoch in range(epochs)]
    batches = [rows for order in orders for rows in order.split(128)]
    for step, rows in enumerate(run.bar(batches, "classifier")):
        optimizer.param_groups[0]["lr"] = learning_rate(3e-3, step, len(batches), len(batches) // 10, "cosine")
        loss = F.cross_entropy(net(images.to_float(x[rows].to(device))), label[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.requires_grad_(False).eval()
    right = net(images.to_float(x[:1000].to(device))).argmax(1).cpu() == label[:1000]
    print(f"classifier: {right.double().mean():.1%} of its first 1000 images right, seed {seed}")
    return net


def save_classifier(path, net: Classifier) -> None:
    """Atomically."""
    weights = {k: v.cpu() for k, v in net.state_dict().items()}
    run.save_tensors(Path(path), {"shape": list(net.shape), "classes": net.classes, "net": weights})


def load_classifier(path) -> Classifier:
    """Frozen, on the CPU. UserError if the file is damaged or something else."""
    saved = run.load_tensors(Path(path))
    with run.reading(path, "a classifier of this code"):
        net = Classifier(saved["shape"], saved["classes"])
        net.load_state_dict(saved["net"])
    return net.requires_grad_(False).eval()


def extractor(path, device="cpu") -> Inception | Classifier:
    """The Inception or a Classifier, told apart by the zip's list of contents: nothing foreign is run to find out."""
    with run.reading(path), zipfile.ZipFile(path) as f:
        script = any(name.endswith("/constants.pkl") for name in f.namelist())  # only TorchScript has them
    return Inception(path, device) if script else load_classifier(path).to(device)


@dataclass
class Flags:
    """Of the command"""
    prefix = ""
    images: str = flag("", "npz of the ADM evaluator, folder of PNG or JPEG, or a students' folder of a run")
    ref: str = flag("", "the same, or npz of statistics (mu, sigma)")
    features: str = flag(INCEPTION, "NVIDIA's TorchScript Inception (FID), or a classifier's file (FD)")
    device: str = flag("auto", "auto, cpu, cuda or mps")


def gaussian(path: str, net) -> tuple[Tensor, Tensor, float, torch.Size | None]:
    """mu [d], cov [d, d], of how many images, of which size; of statistics inf and None.

    ADM's files hold both: the statistics are of far more images, but the Inception's alone."""
    if path.endswith(".npz"):
        with run.reading(path), np.load(path) as f:
            if "mu" in f and (f["mu"].shape == (net.dimension,) or "arr_0" not in f):
                return f["mu"], f["sigma"], math.inf, None
    x, out = images.read(path), Moments()
    pieces = x.split(1024)  # features of all need not fit in memory
    for piece in run.bar(pieces, "features"):
        out.add(net.features(piece))
    return out.mean, out.cov(), out.n, x.shape[2:]


@command
def main(argv=None):
    """Measure --images against --ref."""
    f = parse(Flags, {}, argv, __doc__)
    if not (f.images and f.ref):
        raise UserError("--images and --ref: both are needed")
    net = extractor(f.features, run.device(f.device))
    (mu1, cov1, n, size), (mu2, cov2, of, other) = gaussian(f.images, net), gaussian(f.ref, net)
    if size and other and size != other:
        raise UserError(f"--images of {list(size)} pixels, --ref of {list(other)}")
    if min(n, of) < 2:
        raise UserError("--images and --ref: two images or more on either side")
    if min(n, of) < net.dimension:
        print(f"warning: {min(n, of):,} images for {net.dimension:,} features: too large a distance", file=sys.stderr)
    with run.reading(f.ref):
        distance = frechet_distance(mu1, cov1, mu2, cov2)
    print(f"{net.name}: {distance:.4g} ({n:,} images against {f.ref})")


if __name__ == "__main__":
    main()
