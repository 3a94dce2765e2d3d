"""Fréchet distance between two sets of images: the number by which every table of the papers compares generators.

Features of both sets, a mean and a covariance each, then the distance between the two Gaussians.

  distance                                [Heusel et al. 2017]                frechet_distance
  mean and covariance                     as EDM's fid.py: float64, unbiased  statistics, Moments
  features of the published numbers       NVIDIA's TorchScript Inception      Inception: "FID"
  features to be had without a download   a small convnet trained here        Classifier: "FD (our classifier)"
  FID of a partition, which selects the checkpoint of its student  [MSD App. E]   --classes

Not here: which classifier, how many samples and which reference a dataset takes (data.py).

Departures
 1. The trace of the root of C1 C2 is the sum of the singular values of C1^(1/2) C2^(1/2), its roots from symmetric
    eigendecompositions: never complex, and sound for fewer images than features, where a general matrix root is not.
 2. An FD in the features of our classifier is no FID: the two cannot be compared, nor two FDs of two classifiers.

Statistics: npz with mu and sigma (EDM's layout); --save adds n, the classes and a fingerprint of the features.
inception-2015-12-05.pt: nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics. A TorchScript file is a program;
give only that one.

Run      python fid.py --images samples.npz --ref imagenet-64x64.npz --features inception-2015-12-05.pt
         --images and --ref take an npz of the ADM evaluator, a folder of PNG or JPEG, or a students' folder of a run
"""
import dataclasses
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import UserError, flag

INCEPTION = "inception-2015-12-05.pt"


@dataclasses.dataclass
class Flags:
    """Flags of the command."""
    images: str = flag("", "what to measure: npz (arr_0, arr_1), folder of PNG or JPEG, or a students' folder of a run")
    ref: str = flag("", "the reference: npz of statistics (mu, sigma), or images as above; all of it is used")
    features: str = flag(INCEPTION, "NVIDIA's TorchScript Inception (FID), or a classifier's file (FD)")
    number: int = flag(0, "how many of --images to use, a fixed random choice; 0 = all", low=0)
    classes: list[int] = flag([], "only these labels, in both: the distance of a partition; none = all")
    save: str = flag("", "write the statistics of --images to this npz")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    threads: int = flag(0, "CPU threads; 0 = as many as there are cores, at most 8", low=0)
    quiet: bool = flag(False, "no progress bars")


# --------------------------------------------------------------------------------------------- statistics and distance

class Moments:
    """Mean and unbiased covariance of features that come in pieces, float64; any split gives the same to rounding."""

    def __init__(self):
        self.n, self._mean, self._scatter = 0, None, None

    def add(self, features: Tensor) -> "Moments":
        """Take in features [B, d]; returns itself. ValueError if they are not finite or of another d."""
        x = torch.as_tensor(features).detach().cpu().double()
        if x.ndim != 2 or not torch.isfinite(x).all():
            raise ValueError(f"features must be finite and [N, d]; these are {list(x.shape)}")
        piece = Moments()
        if len(x):
            piece.n, piece._mean = len(x), x.mean(0)
            piece._scatter = (x - piece._mean).T @ (x - piece._mean)                            # [d, d]
        return self.merge(piece)

    def merge(self, other: "Moments") -> "Moments":
        """Take in what `other` has seen; returns itself. Scatters about the own mean: sums of squares would cancel."""
        if not self.n:
            self.n, self._mean, self._scatter = other.n, other._mean, other._scatter
        elif other.n:
            if len(self._mean) != len(other._mean):
                raise ValueError(f"features of {len(self._mean)} and of {len(other._mean)} numbers")
            n, gap = self.n + other.n, other._mean - self._mean
            self._scatter = self._scatter + other._scatter + gap.outer(gap) * (self.n * other.n / n)
            self.n, self._mean = n, self._mean + gap * (other.n / n)
        return self

    def mean(self) -> Tensor:
        """[d]. ValueError of nothing."""
        if not self.n:
            raise ValueError("no features yet")
        return self._mean

    def cov(self) -> Tensor:
        """[d, d], divided by n - 1. ValueError if n < 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.n}")
        return self._scatter / (self.n - 1)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and unbiased covariance [d, d] of features [N, d], float64. ValueError if N < 2 or not finite."""
    moments = Moments().add(features)
    return moments.mean(), moments.cov()


def _root(cov: Tensor) -> Tensor:
    """A [d, r] with A A^T = cov [d, d] of rank r. Eigenvalues below rounding are dropped: the root of 1e-16 is 1e-8."""
    value, vector = torch.linalg.eigh((cov + cov.T) / 2)
    keep = value > len(cov) * torch.finfo(value.dtype).eps * value.abs().max()
    return vector[:, keep] * value[keep].sqrt()


def frechet_distance(mu1, cov1, mu2, cov2) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians [Heusel et al. 2017], in float64; 0 = equal.

    ValueError if shapes differ or anything is not finite."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).detach().cpu().double() for a in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or not cov1.shape == cov2.shape == mu1.shape * 2:
        raise ValueError(f"means {list(mu1.shape)}, {list(mu2.shape)}; covariances {list(cov1.shape)}, {list(cov2.shape)}")
    if not all(torch.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError("means and covariances must be finite")
    root = torch.linalg.svdvals(_root(cov1).T @ _root(cov2)).sum()                              # tr (C1 C2)^(1/2)
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).item())


# ------------------------------------------------------------------------------------------------------------ features

class Inception:
    """NVIDIA's TorchScript Inception: the 2048 features of which EDM's numbers and reference statistics are made."""
    name, dimension = "FID", 2048

    def __init__(self, path, device="cpu"):
        """UserError if the file is missing, no TorchScript, or gives no 2048 features."""
        self.device = device
        what = f"--features takes NVIDIA's TorchScript Inception, {INCEPTION}, or a classifier of this code"
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; {what}")
        try:
            with warnings.catch_warnings():                         # torch announces the end of TorchScript; the file is one
                warnings.simplefilter("ignore")
                self.net = torch.jit.load(str(path), map_location=device).eval()
            probe = self.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        except Exception as error:                                  # a foreign program may fail in any way
            raise UserError(f"{path}: not the Inception file ({type(error).__name__}); {what}") from None
        if probe.shape != (2, self.dimension) or not torch.isfinite(probe).all():
            raise UserError(f"{path}: gives {list(probe.shape)} for 2 images, not 2048 features each; {what}")

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 64) -> Tensor:
        """[N, 2048] float32 on the CPU, of uint8 images [N, C, H, W]; grey ones are repeated to three channels."""
        return torch.cat([self.net(x.expand(-1, 3, -1, -1).contiguous().to(self.device), return_features=True).float().cpu()
                          for x in images.split(batch)])


class Classifier(nn.Module):
    """A small convnet for images of `shape` (C, H, W), 16 pixels or more: about 125 000 weights, 64 features."""
    name, dimension = "FD (our classifier)", 64

    def __init__(self, shape, classes: int):
        super().__init__()
        self.shape, self.classes, self.accuracy = tuple(shape), classes, float("nan")
        self.conv = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((self.shape[0], 32), (32, 64), (64, 64)))
        self.norm = nn.ModuleList(nn.GroupNorm(8, b) for b in (32, 64, 64))
        self.feature, self.out = nn.Linear(64 * 4 * 4, self.dimension), nn.Linear(self.dimension, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Penultimate activations [B, 64] of x [B, C, H, W] in [-1, 1]; they still know where in the image things are."""
        for i, (conv, norm) in enumerate(zip(self.conv, self.norm)):
            x = F.relu(norm(conv(x if i == 0 else F.max_pool2d(x, 2))))
        return F.silu(self.feature(F.adaptive_avg_pool2d(x, 4).flatten(1)))               # ReLU leaves a third of them dead

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))                                                          # logits [B, classes]

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 512) -> Tensor:
        """[N, 64] float32 on the CPU, of uint8 images [N, C, H, W]. UserError if they are not of `shape`."""
        if tuple(images.shape[1:]) != self.shape:
            raise UserError(f"the images are {_kind(images.shape[1:])}, the classifier's {_kind(self.shape)}")
        return torch.cat([self.embed(common.to_float(x.to(self.out.weight.device))).cpu() for x in images.split(batch)])


def _kind(shape) -> str:
    return f"{'grey' if shape[0] == 1 else 'colour'} {shape[2]} x {shape[1]}"


def train_classifier(x: Tensor, label: Tensor, classes: int, seed: int = 0, epochs: int = 3, device="cpu",
                     quiet: bool = False, batch: int = 128, lr: float = 3e-3) -> Classifier:
    """A Classifier trained on uint8 images x [N, C, H, W], label [N]; on a CPU bit-identical for equal arguments.

    `.accuracy` is the share of right answers during the last epoch."""
    if x.dtype != torch.uint8 or x.ndim != 4 or len(x) != len(label) or not ((label >= 0) & (label < classes)).all():
        raise ValueError(f"uint8 images [N, C, H, W] and labels below {classes} wanted, not {x.dtype} {list(x.shape)}")
    net, g = Classifier(x.shape[1:], classes), common.generator("classifier", seed, "init")
    for layer in (*net.conv, net.feature, net.out):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
        nn.init.zeros_(layer.bias)
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    batches = [rows for epoch in range(epochs)
               for rows in torch.randperm(len(x), generator=common.generator("classifier", seed, epoch)).split(batch)]
    right = torch.zeros((), dtype=torch.long, device=device)
    for step, rows in enumerate(common.bar(batches, "classifier", len(batches), quiet)):
        common.set_learning_rate(optimizer, common.learning_rate(lr, step, len(batches), len(batches) // 10, "cosine"))
        target = label[rows].to(device)
        logits = net(common.to_float(x[rows].to(device)))
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= len(batches) - len(batches) // epochs:           # the last epoch
            right += (logits.argmax(1) == target).sum()
    if not torch.isfinite(loss):
        raise UserError("classifier: the loss is not finite")
    net.accuracy = right.item() / len(x)
    if not quiet:
        print(f"classifier: {net.accuracy:.1%} of its last epoch right, seed {seed}")
    return net.requires_grad_(False).eval()


def save_classifier(path, net: Classifier) -> None:
    """Weights and the facts of its shape, atomically."""
    common.save_tensors(Path(path), {"kind": "fid.Classifier", "shape": list(net.shape), "classes": net.classes,
                                     "accuracy": net.accuracy, "net": {k: v.cpu() for k, v in net.state_dict().items()}})


def load_classifier(path) -> Classifier:
    """Frozen, on the CPU. UserError if the file is missing, damaged or something else."""
    saved = common.load_tensors(Path(path))
    try:
        if saved["kind"] != "fid.Classifier":
            raise ValueError
        net = Classifier(saved["shape"], saved["classes"])
        net.load_state_dict(saved["net"])
        net.accuracy = saved["accuracy"]
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise UserError(f"{path}: not a classifier of this code") from None
    return net.requires_grad_(False).eval()


def extractor(path, device="cpu") -> Inception | Classifier:
    """The Inception or a Classifier, told apart by the file's list of contents: nothing foreign is run to find out."""
    try:
        with zipfile.ZipFile(path) as f:
            script = any(name.endswith("/constants.pkl") for name in f.namelist())              # only TorchScript has them
    except (OSError, zipfile.BadZipFile):
        script = True                                               # Inception says what is wrong with it
    return Inception(path, device) if script else load_classifier(path).to(device)


def moments(net, images: Tensor, quiet: bool = True) -> Moments:
    """Moments of the features of uint8 images [N, C, H, W], computed in pieces: features of all need not fit in memory."""
    out, pieces = Moments(), images.split(1024)
    for piece in common.bar(pieces, "features", len(pieces), quiet):
        out.add(net.features(piece))
    return out


# ------------------------------------------------------------------------------------------------------------- sources

def read_images(path, quiet: bool = True) -> tuple[Tensor, Tensor | None]:
    """uint8 images [N, C, H, W], C = 1 or 3, and labels [N] int64 or None. UserError, with the file's name, on anything else.

    path: an npz of the ADM evaluator (arr_0 [N, H, W, C], arr_1 [N] optional), a folder of PNG or JPEG, or a folder of a
    run that holds one samples.pt (x [N, C, H, W], label [N])."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if not p.name.startswith("."))
        samples = [p for p in files if p.name == "samples.pt" and "reference" not in p.relative_to(path).parts]
        if len(samples) > 1:
            raise UserError(f"{path}: samples of several stages; give one: {', '.join(str(p.parent) for p in samples)}")
        if not samples:
            return _read_folder(path, [p for p in files if p.suffix.lower() in (".png", ".jpg", ".jpeg")], quiet), None
        path = samples[0]
    if path.suffix == ".npz":
        arrays, names = _read_npz(path, "arr_0", "arr_1")
        if "arr_0" not in arrays:
            raise UserError(f"{path}: no images: arr_0 is missing, there is only {' '.join(names)}")
        try:
            x, label = (torch.as_tensor(arrays[k]) if k in arrays else None for k in ("arr_0", "arr_1"))
        except TypeError:
            raise UserError(f"{path}: arr_0 and arr_1 must hold numbers") from None
        layout, channels = "N, H, W, C", -1
    elif path.suffix == ".pt":
        saved = common.load_tensors(path)
        x, label = (saved.get(k) if isinstance(saved, dict) else None for k in ("x", "label"))
        layout, channels = "N, C, H, W", 1
    else:
        raise UserError(f"{path}: " + ("an npz, a folder of PNG or JPEG, or a students' folder of a run is wanted"
                                       if path.exists() else "no such file or folder"))
    if not (isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 4 and x.shape[channels] in (1, 3) and x.numel()):
        held = f"{str(x.dtype)[6:]} {list(x.shape)}" if isinstance(x, Tensor) else "nothing of the kind"
        raise UserError(f"{path}: wanted are uint8 images [{layout}] with C = 1 or 3; it holds {held}")
    if label is not None and (label.shape != x.shape[:1] or label.is_floating_point()):
        raise UserError(f"{path}: {len(x)} images, but labels {str(label.dtype)[6:]} {list(label.shape)}")
    x = x.movedim(channels, 1).clone(memory_format=torch.contiguous_format)  # .contiguous() leaves odd strides where C = 1
    return x, label if label is None else label.long()


def _read_npz(path: Path, *wanted: str) -> tuple[dict, list[str]]:
    """Those of the wanted arrays that the file holds, and the names of all that it holds."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in wanted if name in f.files}, f.files
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:                                      # numpy and zipfile raise many types for a damaged file
        raise UserError(f"{path}: not a readable npz ({type(error).__name__})") from None


def _read_folder(folder: Path, files: list[Path], quiet: bool) -> Tensor:
    if not files:
        raise UserError(f"{folder}: no PNG or JPEG images, and no samples.pt")
    images = []
    for path in common.bar(files, "reading", len(files), quiet):
        try:
            with Image.open(path) as image:
                mode, pixels = image.mode, np.array(image)
        except Exception as error:                                  # PIL raises half a dozen types for a damaged file
            raise UserError(f"{path}: not a readable image ({type(error).__name__})") from None
        if mode not in ("L", "RGB"):
            raise UserError(f"{path}: of mode {mode}; save it as plain grey or RGB")
        images.append(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).movedim(-1, 0))                  # [C, H, W]
        if images[-1].shape != images[0].shape:
            raise UserError(f"{files[0]} is {_kind(images[0].shape)}, {path} is {_kind(images[-1].shape)}: not alike")
    return torch.stack(images)


def _chosen(path: str, classes: list[int], number: int, quiet: bool) -> Tensor:
    """The images [N, C, H, W] of these classes (none = all), and `number` of those (0 = all), always the same ones."""
    x, label = read_images(path, quiet)
    if classes and label is None:
        raise UserError(f"--classes: {path} has no labels")
    for c in classes:
        if not (label == c).any():
            raise UserError(f"--classes {c}: {path} has no image of this class")
    x = x[torch.isin(label, torch.tensor(classes))] if classes else x
    if len(x) < number:
        raise UserError(f"--number {number}: {path} has only {len(x):,} images{' of these classes' * bool(classes)}")
    x = x[torch.randperm(len(x), generator=common.generator("fid", "number"))[:number].sort().values] if number else x
    if len(x) < 2:
        raise UserError(f"{path}: a covariance needs 2 images or more, not {len(x)}")
    return x


def _key(net) -> str:
    """What the features are: statistics of different ones must not meet."""
    return f"{net.name} {common.fingerprint(net.net if isinstance(net, Inception) else net)}"


def save_statistics(path, net, moments: Moments, classes=()) -> None:
    """npz, atomically: mu [d] and sigma [d, d] as EDM names them; n, the classes (none = all), and what the features are."""
    arrays = {"mu": moments.mean(), "sigma": moments.cov(), "n": moments.n, "classes": np.array(sorted(classes), int),
              "features": _key(net)}
    def write(temporary):
        with open(temporary, "wb") as f:                            # given a name, numpy would append .npz to it
            np.savez(f, **arrays)
    common.write_atomic(Path(path), write)


def load_statistics(path, net, classes=()) -> tuple[Tensor, Tensor, int | None] | None:
    """mu, cov and n (None: not said) of an npz; None if it has none of these classes and features, but images.

    UserError if it has neither, or statistics of other features. ADM's reference files hold images and statistics: the
    latter come from far more images and go first."""
    saved, names = _read_npz(Path(path), "mu", "sigma", "n", "classes", "features")
    ours = {"n", "classes", "features"} <= {*names}                 # else EDM's or ADM's: of all classes
    held = saved["classes"].tolist() if ours else []
    there = "mu" in saved and "sigma" in saved
    if "arr_0" in names and not (there and held == sorted(classes) and saved["mu"].shape == (net.dimension,)):
        return None
    if not there:
        raise UserError(f"{path}: a reference holds mu and sigma, or images arr_0; this one: {' '.join(names)}")
    if held != sorted(classes):
        raise UserError(f"--classes: {path} holds statistics of {f'classes {held}' if held else 'all classes'}, no labels; "
                        "write others with --save")
    if ours and str(saved["features"]) != _key(net):
        raise UserError(f"{path}: statistics of {saved['features']}, but --features is {_key(net)}")
    mu, cov = saved["mu"], saved["sigma"]
    if mu.shape != (net.dimension,) or cov.shape != mu.shape * 2:
        raise UserError(f"{path}: mu {list(mu.shape)}, sigma {list(cov.shape)}, but --features gives {net.dimension} numbers")
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise UserError(f"{path}: mu or sigma is not finite")
    return torch.as_tensor(mu), torch.as_tensor(cov), int(saved["n"]) if ours else None


# -------------------------------------------------------------------------------------------------------- command line

@common.command
def main(argv=None):
    """Measure --images against --ref, or only save their statistics."""
    flags = common.parse(Flags, {(None, None): {}}, argv, __doc__)
    if not flags.images:
        raise UserError("--images: say what to measure: an npz, a folder of PNG or JPEG, or a students' folder of a run")
    if not flags.ref and not flags.save:
        raise UserError("--ref: say what to compare with: an npz of statistics, or images (or --save, for statistics alone)")
    if flags.save and not flags.save.endswith(".npz"):
        raise UserError(f"--save {flags.save}: give a name that ends in .npz")
    classes = sorted(set(flags.classes))
    net = extractor(flags.features, common.device(flags.device, flags.threads))
    x = _chosen(flags.images, classes, flags.number, flags.quiet)
    reference = load_statistics(flags.ref, net, classes) if flags.ref.endswith(".npz") else None
    if flags.ref and not reference:
        y = _chosen(flags.ref, classes, 0, flags.quiet)
        if x.shape[1:] != y.shape[1:]:
            raise UserError(f"{flags.images} is {_kind(x.shape[1:])}, {flags.ref} is {_kind(y.shape[1:])}: not alike")
        there = moments(net, y, flags.quiet)
        reference = there.mean(), there.cov(), there.n
    here = moments(net, x, flags.quiet)
    fewest = min(here.n, reference[2] or here.n) if reference else here.n
    if fewest < net.dimension:
        print(f"warning: {fewest:,} images for {net.dimension:,} features: a distance comes out too large", file=sys.stderr)
    if flags.save:
        save_statistics(flags.save, net, here, classes)
        print(f"written: {flags.save} ({here.n:,} images)")
    if reference:
        distance = frechet_distance(here.mean(), here.cov(), *reference[:2])
        of = f" of classes {' '.join(map(str, classes))}" if classes else ""
        print(f"{net.name}: {distance:.4g} ({here.n:,} images{of} against {flags.ref})")


if __name__ == "__main__":
    main()
