"""Fréchet distance against closed forms, features, every source of images, and the command line."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

import common
import fid
import images
import run
from fid import Moments, frechet_distance, statistics
from flags import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
ZERO, EYE = torch.zeros(2), torch.eye(2)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=common.generator("test fid", seed), dtype=torch.float64)


def pictures(n, seed=0, shape=(1, 16, 16), shift=0):
    """uint8 images [n, *shape] of 3 classes: a bright bar at the top, in the middle or at the bottom, on noise."""
    x = torch.randint(0, 120, (n, *shape), generator=common.generator("test fid pictures", seed)) + shift
    label = torch.arange(n) % 3
    for c in range(3):
        x[label == c, :, 5 * c:5 * c + 5] += 110
    return x.clamp(0, 255).to(torch.uint8), label


# ------------------------------------------------ statistics and distance

def test_diagonal_gaussians_have_a_closed_form():
    """|difference of means|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 9.0, 0.25, 2.0])
    mu1, mu2 = torch.tensor([1.0, 0, 0, 2]), torch.tensor([0.0, 0, 3, 2])
    want = 10 + (a.double().sqrt() - b.double().sqrt()).square().sum().item()
    assert frechet_distance(mu1.numpy(), a.diag().numpy(), mu2, b.diag()) == pytest.approx(want, abs=1e-12)


def test_covariances_that_do_not_commute():
    one = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    two = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    a, b = (statistics(gaussian(300, 20, s) @ gaussian(20, 20, s + 9)) for s in (1, 2))
    for mu1, cov1, mu2, cov2 in ((ZERO, one, ZERO, two), (ZERO, two, ZERO, one), (*a, *b)):
        assert (cov1 @ cov2 - cov2 @ cov1).abs().max() > 0.5
        root = np.trace(sqrtm((cov1 @ cov2).numpy())).real
        want = ((mu1 - mu2).square().sum() + (cov1 + cov2).trace()).item() - 2 * root
        assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n", [200, 12])
def test_equal_is_zero_and_symmetric(n):
    a, b = statistics(gaussian(n, 32) * 3), statistics(gaussian(n, 32, 1) + 0.3)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-9)
    assert 1 < frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-10)


def from_samples(x, y):
    """The distance of two sets of features without any [d, d] matrix."""
    a, b = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / n + b.square().sum() / m
            - 2 * torch.linalg.svdvals(a @ b.T).sum() / (n * m) ** 0.5).item()


def test_fewer_samples_than_features():
    """The cross term is the nuclear norm of the product of centred samples: exact where a general root is complex."""
    x, y = gaussian(15, 80, 2), gaussian(25, 80, 3) * 2
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(from_samples(x, y), rel=1e-12)
    assert frechet_distance(ZERO, 0 * EYE, ZERO, EYE) == pytest.approx(2)
    tiny = torch.diag(torch.tensor([1.0, -1e-17, 1e-17], dtype=torch.float64))
    assert frechet_distance(torch.zeros(3), tiny, torch.zeros(3), tiny) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bad", [
    (torch.zeros(3), EYE), (ZERO, torch.eye(3)), (ZERO, EYE * torch.nan), (ZERO + torch.inf, EYE),
    *(statistics(x) for x in (torch.ones(1, 2), torch.ones(0, 2), torch.full((9, 2), torch.inf)))])
def test_nonsense_is_no_distance(bad):
    for four in ((*bad, ZERO, EYE), (ZERO, EYE, *bad)):
        with pytest.raises(ValueError, match="finite"):
            frechet_distance(*four)


@pytest.mark.parametrize("sizes", [[101], [1, 100], [50, 0, 51], [1] * 101])
def test_moments_are_numpys_in_any_pieces(sizes):
    """Also far from the origin, where a difference of sums of squares would lose digits."""
    x, pieces = (gaussian(101, 6) + 1000).float(), Moments()
    for part in x.split(sizes):
        pieces.add(part)
    assert pieces.n == 101 and pieces.mean.dtype == pieces.cov().dtype == torch.float64
    np.testing.assert_allclose(pieces.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(pieces.cov(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------- features

@pytest.fixture(scope="module")
def classifier():
    return fid.train_classifier(*pictures(600), 3, seed=1)


def test_classifier_learns_and_repeats(classifier):
    x, label = pictures(300, seed=5)
    right = (classifier(images.to_float(x)).argmax(1) == label).float().mean()
    assert right > 0.95 and not any(p.requires_grad for p in classifier.parameters())
    small = []
    for seed in (2, 2, 3):
        torch.manual_seed(77 + len(small))  # the global generator plays no part
        small.append(common.fingerprint(fid.train_classifier(*pictures(64), 3, seed=seed, epochs=1)))
    assert small[0] == small[1] != small[2]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28)])
def test_classifier_shapes(shape):
    net, x = fid.Classifier(shape, 10), pictures(7, shape=shape)[0]
    f = net.features(x, batch=3)
    assert 100_000 < sum(p.numel() for p in net.parameters()) < 200_000 and net(x.float()).shape == (7, 10)
    assert f.shape == (7, 64) and f.dtype == torch.float32 and not f.requires_grad
    torch.testing.assert_close(f, net.features(x))


def test_classifier_file(classifier, tmp_path):
    fid.save_classifier(tmp_path / "classifier.pt", classifier)
    back = fid.extractor(tmp_path / "classifier.pt")
    assert common.fingerprint(back) == common.fingerprint(classifier) and (back.shape, back.classes) == ((1, 16, 16), 3)
    assert torch.equal(back.features(pictures(5)[0]), classifier.features(pictures(5)[0]))


def test_precision_and_recall_of_known_clouds():
    """Two far clusters: half of them all the same; samples beyond them; a grid whose balls are known."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 5, generator=g), torch.randn(200, 5, generator=g) + 99
    both = torch.cat([left, right])
    assert fid.precision_recall(both, both) == (1, 1)
    precision, recall = fid.precision_recall(both, torch.randn(200, 5, generator=g))
    assert precision > 0.8 and 0.4 < recall <= 0.5  # a mode is lost: recall alone falls
    precision, recall = fid.precision_recall(left, torch.cat([torch.randn(200, 5, generator=g), right]))
    assert 0.4 < precision <= 0.5 and recall > 0.8  # half of them is no data: precision alone falls
    line = torch.arange(10.0)[:, None]  # radii by k = 1: 1
    assert fid.precision_recall(line, torch.tensor([[-0.9], [-1.1], [4.5], [10.1]]), k=1) == (0.5, 1)
    with pytest.raises(ValueError, match="3 points: no 3-th neighbour"):
        fid.precision_recall(line, line[:3])


class FakeInception(torch.nn.Module):
    """2048 numbers of each image: its first 12 x 12 x 3 corner and powers of it. Asks for uint8 and three channels."""

    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        f = x[:, :, :12, :12].flatten(1).float() / 255
        return torch.cat([f, f * f, f * f * f, f * f, f * f * f], 1)[:, :2048]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Folder with TorchScript files: the fake Inception, and one that is something else."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, net in ((fid.INCEPTION, FakeInception()), ("elsewhere.pt", torch.nn.Flatten())):
        torch.jit.script(net).save(str(folder / name))
    return folder


@pytest.mark.parametrize("name, content, words", [
    ("elsewhere.pt", None, "not NVIDIA's"), ("missing.pt", None, ""), ("text.pt", b"hello", "damaged"),
    ("classes.pt", {"shape": [1, 16, 16], "classes": 4, "net": {}}, "not a classifier")])
def test_other_files_are_no_features(scripts, name, content, words):
    if content:
        (scripts / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, scripts / name)
    with pytest.raises((UserError, FileNotFoundError), match=f"{name}.*{words}") as error:
        fid.extractor(scripts / name)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- sources

def save_npz(path, x, **more):
    """ADM's layout, from x [N, C, H, W]."""
    np.savez(path, arr_0=x.permute(0, 2, 3, 1).numpy(), **more)
    return path


def save_images(folder, x, suffix=".png"):
    for i, image in enumerate(x):
        path = folder / f"{i // 10:05d}" / f"img{i:08d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_gives_the_same_images(tmp_path, channels):
    """Of unequal height and width, and random: any exchange of axes shows."""
    x = pictures(23, shape=(channels, 6, 9))[0]
    run.save_tensors(tmp_path / "run/students2/dm/samples.pt", {"x": x, "label": torch.arange(23)})
    run.save_tensors(tmp_path / "run/reference/samples.pt", {"report": {"y": x}})
    Image.new("L", (4, 4)).save(tmp_path / "run/picture.png")
    for path in (save_npz(tmp_path / "a.npz", x, arr_1=np.arange(23)), save_images(tmp_path / "folder", x),
                 tmp_path / "run", tmp_path / "run/students2"):
        got = images.read(path)
        assert torch.equal(got, x) and got.stride() == x.stride()
    assert images.read(save_images(tmp_path / "jpg", x, ".JPG")).shape == x.shape


def some(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def several_stages(place):
    for K in (1, 3):
        run.save_tensors(place / f"students{K}/dm/samples.pt", {"x": some(2, 1, 4, 4)})


@pytest.mark.parametrize("name, make, words", [
    ("runs", several_stages, "give one of .*students1.*students3"),
    ("toy", lambda p: run.save_tensors(p / "samples.pt", {"x": torch.zeros(5, 2)}), "uint8 images"),
    ("names.npz", lambda p: np.savez(p, images=np.zeros(3)), "names.npz: damaged.*arr_0"),
    ("float.npz", lambda p: save_npz(p, some(9, 1, 8, 8).float()), r"float32 \[9, 1, 8, 8\]"),
    ("first.npz", lambda p: np.savez(p, arr_0=some(9, 3, 8, 8).numpy()), r"\[9, 8, 3, 8\]"),
])
def test_bad_sources(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(UserError, match=words):
        images.read(tmp_path / name)


# ----------------------------------------------------------- command line

@pytest.fixture
def files(classifier, tmp_path, monkeypatch):
    """A folder, also the current one, with a classifier, images and a reference: x, y."""
    monkeypatch.chdir(tmp_path)
    fid.save_classifier("classifier.pt", classifier)
    x, y = pictures(150, seed=2)[0], pictures(210, seed=3, shift=9)[0]
    save_npz("images.npz", x)
    save_npz("reference.npz", y)
    return x, y


def distance(capsys, path, ref, features="classifier.pt"):
    """The number that the command prints, its line, and its warnings."""
    fid.main(["--images", str(path), "--ref", str(ref), "--features", str(features), "--device", "cpu"])
    out, err = capsys.readouterr()
    return float(re.search(r": ([-+.e0-9]+) \(", out)[1]), out, err


def test_distance_in_the_classifier(capsys, files, classifier):
    x, y = files
    there = statistics(classifier.features(y))
    got, out, err = distance(capsys, "images.npz", "reference.npz")
    assert got == pytest.approx(frechet_distance(*statistics(classifier.features(x)), *there), rel=1e-3)
    assert out.startswith("FD (our classifier): ") and "(150 images against reference.npz)" in out and not err
    np.savez("edm.npz", mu=there[0], sigma=there[1])  # EDM's layout
    assert distance(capsys, save_images(Path("folder"), x), "edm.npz")[0] == got
    assert distance(capsys, "images.npz", "images.npz")[0] < 1e-6
    assert "40 images for 64 features" in distance(capsys, save_npz(Path("few.npz"), x[:40]), "edm.npz")[2]
    save_npz("both.npz", x, mu=there[0], sigma=there[1])  # ADM's: statistics first, of whatever more images they came …
    assert distance(capsys, "images.npz", "both.npz")[0] == got
    save_npz("both.npz", y, mu=np.zeros(2048), sigma=np.eye(2048))  # … but the images where the features do not fit
    assert distance(capsys, "images.npz", "both.npz")[0] == got


def test_fid(capsys, files, scripts):
    """The grey images, through what stands for the Inception."""
    x, y = files
    got, out, err = distance(capsys, "images.npz", "reference.npz", scripts / fid.INCEPTION)
    assert out.startswith("FID: ") and "150 images for 2,048 features" in err
    net = fid.extractor(scripts / fid.INCEPTION)
    assert got == pytest.approx(from_samples(net.features(x).double(), net.features(y).double()), rel=1e-3)
    f = net.features(x[:5], batch=2)
    assert isinstance(net, fid.Inception) and f.shape == (5, 2048) and f.dtype == torch.float32
    assert torch.equal(f, net.features(x[:5].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("ref, features, words", [
    ("", "classifier.pt", "--images and --ref"),
    ("colour.npz", "classifier.pt", r"\[3, 16, 16\].*\[1, 16, 16\]"),
    ("infinite.npz", "classifier.pt", "infinite.npz.*finite"), ("big.npz", fid.INCEPTION, r"\[16, 16\].*\[32, 32\]")])
def test_misuse(capsys, files, scripts, ref, features, words):
    save_npz("colour.npz", pictures(8, shape=(3, 16, 16))[0])
    save_npz("big.npz", pictures(8, shape=(1, 32, 32))[0])
    np.savez("infinite.npz", mu=np.zeros(64), sigma=np.eye(64) + np.inf)
    with pytest.raises(SystemExit) as stop:
        distance(capsys, "images.npz", ref, scripts / features if features == fid.INCEPTION else features)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err and re.search(f"error: .*{words}.*\n$", err)
