"""Fréchet distance against closed forms, features, every source of images, and the command line."""
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

import common
import fid
from fid import Moments, frechet_distance, statistics


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=common.generator("test fid", seed), dtype=torch.float64)


def pictures(n, seed=0, shape=(1, 16, 16), shift=0):
    """uint8 images [n, *shape] of 3 classes: a bright bar at the top, in the middle or at the bottom, on noise."""
    g = common.generator("test fid pictures", seed)
    x = torch.randint(0, 120, (n, *shape), generator=g) + shift
    label = torch.arange(n) % 3
    for c in range(3):
        x[label == c, :, 5 * c:5 * c + 5] += 110
    return x.clamp(0, 255).to(torch.uint8), label


def refused(function, *args, words=()):
    with pytest.raises(common.UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# --------------------------------------------------------------------------------------------- statistics and distance

def test_diagonal_gaussians_have_a_closed_form():
    """|difference of means|^2 + sum (sqrt a - sqrt b)^2."""
    a, b = torch.tensor([4.0, 1.0, 0.25, 0.0]), torch.tensor([1.0, 9.0, 0.25, 2.0])
    mu1, mu2 = torch.tensor([1.0, 0, 0, 2]), torch.tensor([0.0, 0, 3, 2])
    want = 10 + (a.double().sqrt() - b.double().sqrt()).square().sum().item()
    assert frechet_distance(mu1, a.diag(), mu2, b.diag()) == pytest.approx(want, abs=1e-12)
    assert isinstance(frechet_distance(mu1.numpy(), a.diag().numpy(), mu2, b.diag()), float)


def test_covariances_that_do_not_commute():
    one = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    two = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    assert (one @ two - two @ one).abs().max() > 0.5
    want = (one + two).trace().item() - 2 * np.trace(sqrtm((one @ two).numpy())).real
    zero = torch.zeros(2)
    assert frechet_distance(zero, one, zero, two) == pytest.approx(want, abs=1e-9)
    assert frechet_distance(zero, two, zero, one) == pytest.approx(want, abs=1e-9)
    (mu1, one), (mu2, two) = (statistics(gaussian(300, 20, s) @ gaussian(20, 20, s + 9)) for s in (1, 2))
    want = ((mu1 - mu2).square().sum() + (one + two).trace()).item() - 2 * np.trace(sqrtm((one @ two).numpy())).real
    assert frechet_distance(mu1, one, mu2, two) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n", [200, 12])
def test_equal_is_zero_and_symmetric(n):
    a, b = statistics(gaussian(n, 32) * 3), statistics(gaussian(n, 32, 1) + 0.3)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-10)
    assert frechet_distance(*a, *b) > 1


def from_samples(x, y):
    """The distance of two sets of features without any [d, d] matrix."""
    a, b = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / n + b.square().sum() / m
            - 2 * torch.linalg.svdvals(a @ b.T).sum() / (n * m) ** 0.5).item()


def test_fewer_samples_than_features():
    """The cross term is the nuclear norm of the product of the centred samples: exact where a general root is complex."""
    x, y = gaussian(15, 80, 2), gaussian(25, 80, 3) * 2
    assert frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(from_samples(x, y), rel=1e-12)
    one, zero = torch.zeros(3, 3), torch.zeros(3)
    assert frechet_distance(zero, one, zero, torch.eye(3)) == pytest.approx(3)
    tiny = torch.diag(torch.tensor([1.0, -1e-17, 1e-17], dtype=torch.float64))
    assert frechet_distance(zero, tiny, zero, tiny) == pytest.approx(0, abs=1e-9)


def test_distance_refuses_nonsense():
    mu, cov = torch.zeros(2), torch.eye(2)
    for bad in ((mu, cov, torch.zeros(3), cov), (mu, cov, mu, torch.eye(3)), (mu, cov, mu, cov * float("nan")),
                (mu + float("inf"), cov, mu, cov)):
        with pytest.raises(ValueError):
            frechet_distance(*bad)


def test_statistics_are_numpys():
    x = gaussian(50, 7).float()
    mu, cov = statistics(x)
    assert mu.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mu, x.double().mean(0), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), atol=1e-12)
    for bad in (x[:1], x[:0], x[0], x * float("inf")):
        with pytest.raises(ValueError):
            statistics(bad)
    with pytest.raises(ValueError):
        Moments().mean()


def test_moments_in_pieces():
    """Also far from the origin, where a difference of sums of squares would lose digits."""
    x = gaussian(101, 6) + 1000
    mu, cov = statistics(x)
    for sizes in ([101], [1, 100], [50, 0, 51], [1] * 101):
        pieces = Moments()
        for part in x.split(sizes):
            pieces.add(part)
        assert pieces.n == 101
        torch.testing.assert_close(pieces.mean(), mu, rtol=1e-12, atol=0)
        torch.testing.assert_close(pieces.cov(), cov, rtol=1e-12, atol=1e-12)
    left, right = Moments().add(x[:30]), Moments().add(x[30:])
    merged = Moments().merge(left).merge(right).merge(Moments())
    torch.testing.assert_close(merged.cov(), cov, rtol=1e-12, atol=1e-12)
    assert (left.n, right.n) == (30, 71)                            # merging leaves the others as they were
    torch.testing.assert_close(left.cov(), statistics(x[:30])[1])
    with pytest.raises(ValueError):
        merged.add(gaussian(3, 5))


# ------------------------------------------------------------------------------------------------------------ features

@pytest.fixture(scope="module")
def classifier():
    torch.set_num_threads(1)
    return fid.train_classifier(*pictures(600), 3, seed=1, quiet=True)


def test_classifier_learns_and_repeats(classifier, capsys):
    x, label = pictures(300, seed=5)
    with torch.no_grad():
        right = (classifier(x.float() / 127.5 - 1).argmax(1) == label).float().mean()
    assert right > 0.95
    assert 0.5 < classifier.accuracy <= 1
    assert not any(p.requires_grad for p in classifier.parameters())
    torch.manual_seed(77)                                           # the global generator plays no part
    again = fid.train_classifier(*pictures(600), 3, seed=1)
    assert common.fingerprint(again) == common.fingerprint(classifier) and again.accuracy == classifier.accuracy
    assert f"classifier: {again.accuracy:.1%}" in capsys.readouterr().out
    x, label = pictures(64)
    assert common.fingerprint(fid.train_classifier(x, label, 3, seed=2, epochs=1, quiet=True)) \
        != common.fingerprint(fid.train_classifier(x, label, 3, seed=3, epochs=1, quiet=True))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (1, 32, 32), (3, 32, 32), (1, 28, 28)])
def test_classifier_shapes(shape):
    net = fid.Classifier(shape, 10)
    assert 100_000 < sum(p.numel() for p in net.parameters()) < 200_000
    x, _ = pictures(7, shape=shape)
    f = net.features(x, batch=3)
    assert f.shape == (7, 64) and f.dtype == torch.float32 and not f.requires_grad
    torch.testing.assert_close(f, net.features(x))
    assert net(x.float()).shape == (7, 10)


def test_classifier_refuses_nonsense(classifier):
    x, label = pictures(8)
    for bad in ((x.float(), label), (x[:, 0], label), (x, label[:3]), (x, label + 1), (x, label - 1)):
        with pytest.raises(ValueError):
            fid.train_classifier(*bad, 3, quiet=True)
    refused(classifier.features, pictures(8, shape=(3, 16, 16))[0], words=["colour 16 x 16", "grey 16 x 16"])
    refused(classifier.features, pictures(8, shape=(1, 32, 32))[0], words=["32 x 32", "16 x 16"])


def test_classifier_file(classifier, tmp_path):
    path = tmp_path / "classifier.pt"
    fid.save_classifier(path, classifier)
    back = fid.load_classifier(path)
    assert common.fingerprint(back) == common.fingerprint(classifier)
    assert (back.shape, back.classes, back.accuracy) == ((1, 16, 16), 3, classifier.accuracy)
    x, _ = pictures(5)
    assert torch.equal(back.features(x), classifier.features(x))
    assert isinstance(fid.extractor(path), fid.Classifier)
    for value in ({"net": 1}, [1], {"kind": "fid.Classifier", "shape": [1, 16, 16], "classes": 4, "net": back.state_dict()}):
        torch.save(value, tmp_path / "other.pt")
        refused(fid.load_classifier, tmp_path / "other.pt", words=["other.pt", "not a classifier"])
        refused(fid.extractor, tmp_path / "other.pt", words=["other.pt", "not a classifier"])
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:1000])
    refused(fid.load_classifier, tmp_path / "half.pt", words=["half.pt"])
    refused(fid.extractor, tmp_path / "half.pt", words=["half.pt", fid.INCEPTION, "classifier"])


class FakeInception(torch.nn.Module):
    """2048 numbers of each image: its first 12 x 12 x 3 corner and powers of it. Asks for uint8 and three channels."""

    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        f = x[:, :, :12, :12].flatten(1).float() / 255
        return torch.cat([f, f * f, f * f * f, f * f, f * f * f], 1)[:, :2048]


class Elsewhere(torch.nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool = False):
        return x.float().mean(3).mean(2)


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.float().mean(3).mean(2)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Folder with TorchScript files: the fake Inception, and two that are something else."""
    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, net in ((fid.INCEPTION, FakeInception()), ("elsewhere.pt", Elsewhere()), ("plain.pt", Plain())):
            torch.jit.script(net).save(str(folder / name))
    return folder


def test_inception(scripts, recwarn):
    net = fid.extractor(scripts / fid.INCEPTION)
    assert isinstance(net, fid.Inception) and not recwarn.list
    grey = pictures(5)[0]
    f = net.features(grey, batch=2)
    assert f.shape == (5, 2048) and f.dtype == torch.float32
    assert torch.equal(f, net.features(grey.repeat(1, 3, 1, 1)))


def test_not_the_inception(scripts, tmp_path):
    for name in ("elsewhere.pt", "plain.pt"):
        refused(fid.Inception, scripts / name, words=[name, fid.INCEPTION, "--features"])
        refused(fid.extractor, scripts / name, words=[name, fid.INCEPTION, "--features"])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "tensors.pt")
    for name in ("text.pt", "tensors.pt", "missing.pt"):
        refused(fid.Inception, tmp_path / name, words=[name, fid.INCEPTION, "--features"])
    refused(fid.extractor, tmp_path / "missing.pt", words=["missing.pt", "no such file"])


# ------------------------------------------------------------------------------------------------------------- sources

def save_npz(path, x, label=None):
    """ADM's layout, from x [N, C, H, W]."""
    arrays = {"arr_0": x.permute(0, 2, 3, 1).numpy()} | ({} if label is None else {"arr_1": label.numpy()})
    np.savez(path, **arrays)
    return str(path)


def save_images(folder, x, suffix=".png"):
    for i, image in enumerate(x):
        path = folder / f"{i // 10:05d}" / f"img{i:08d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(path)
    return str(folder)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_gives_the_same_images(tmp_path, channels):
    """Of unequal height and width, and random: any exchange of axes shows."""
    x = torch.randint(0, 256, (23, channels, 6, 9), generator=common.generator("test"), dtype=torch.uint8)
    label = torch.arange(23) % 4
    sources = save_npz(tmp_path / "a.npz", x, label), save_npz(tmp_path / "b.npz", x), save_images(tmp_path / "folder", x)
    for got, labels in map(fid.read_images, sources):
        assert torch.equal(got, x) and got.stride() == x.stride()
        assert labels is None or torch.equal(labels, label)
    assert fid.read_images(tmp_path / "a.npz")[1].dtype == torch.int64 and fid.read_images(tmp_path / "b.npz")[1] is None
    save_images(tmp_path / "jpg", x, ".JPG")
    assert fid.read_images(tmp_path / "jpg")[0].shape == x.shape


def test_samples_of_a_run(tmp_path):
    x, label = pictures(12)
    home = tmp_path / "run" / "seed0"
    common.save_tensors(home / "students3" / "dm" / "samples.pt", {"x": x, "label": label, "student": label})
    common.save_tensors(home / "reference" / "samples.pt", {"report": {"y": x}})
    Image.new("L", (4, 4)).save(home / "picture.png")
    for place in ("students3/dm/samples.pt", "students3/dm", "students3", "", ".."):
        got, labels = fid.read_images(home / place)
        assert torch.equal(got, x) and torch.equal(labels, label)
    common.save_tensors(home / "students1" / "dm" / "samples.pt", {"x": x, "label": label})
    refused(fid.read_images, home, words=["students1", "students3", "give one"])
    for value in ({"x": torch.randn(5, 2), "label": label[:5]}, {"x": x.float(), "label": label}, {"label": label}, 3):
        common.save_tensors(tmp_path / "toy" / "samples.pt", value)
        refused(fid.read_images, tmp_path / "toy", words=["samples.pt", "uint8"])


def test_bad_sources(tmp_path):
    x, label = pictures(8)
    good = save_images(tmp_path / "good", x)
    refused(fid.read_images, tmp_path / "nowhere", words=["nowhere", "no such"])
    refused(fid.read_images, tmp_path / "nowhere.npz", words=["nowhere.npz", "no such"])
    refused(fid.read_images, tmp_path / "nowhere.pt", words=["nowhere.pt", "no such"])
    (tmp_path / "empty").mkdir()
    refused(fid.read_images, tmp_path / "empty", words=["empty", "no PNG"])
    (tmp_path / "notes.txt").write_text("")
    refused(fid.read_images, tmp_path / "notes.txt", words=["notes.txt", "npz"])
    for shape, kind in (((1, 16, 17), "grey 17 x 16"), ((3, 16, 16), "colour 16 x 16")):
        save_images(tmp_path / kind, x)
        save_images(tmp_path / kind / "odd", pictures(1, shape=shape)[0])
        refused(fid.read_images, tmp_path / kind,
                words=["00000/img00000000.png", "odd/00000/img00000000.png", kind, "grey 16 x 16"])
    Image.new("RGBA", (16, 16)).save(tmp_path / "good" / "see-through.png")
    refused(fid.read_images, good, words=["see-through.png", "RGBA"])
    whole = (tmp_path / "good" / "00000" / "img00000003.png").read_bytes()
    for name, content in (("a.png", whole[:len(whole) // 2]), ("b.jpeg", b"hello"), ("c.png", b"")):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).write_bytes(content)
        refused(fid.read_images, tmp_path / name[0], words=[name, "not a readable image"])

    np.savez(tmp_path / "names.npz", images=x.numpy())
    refused(fid.read_images, tmp_path / "names.npz", words=["names.npz", "arr_0", "images"])
    whole = open(save_npz(tmp_path / "whole.npz", x, label), "rb").read()
    (tmp_path / "half.npz").write_bytes(whole[:len(whole) // 2])
    refused(fid.read_images, tmp_path / "half.npz", words=["half.npz", "not a readable npz"])
    (tmp_path / "flipped.npz").write_bytes(whole[:900] + bytes(b ^ 255 for b in whole[900:1000]) + whole[1000:])
    refused(fid.read_images, tmp_path / "flipped.npz", words=["flipped.npz", "not a readable npz"])
    np.save(tmp_path / "array.npy", x.numpy())
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refused(fid.read_images, tmp_path / "array.npz", words=["array.npz", "not a readable npz"])
    for array in (x.numpy(), x.permute(0, 2, 3, 1).numpy() / 255, x[:, 0].numpy(), x[:0].permute(0, 2, 3, 1).numpy()):
        np.savez(tmp_path / "odd.npz", arr_0=array)                 # channels first, floats, no channels, nothing
        refused(fid.read_images, tmp_path / "odd.npz", words=["odd.npz", "uint8 images [N, H, W, C]", str(list(array.shape))])
    for labels in (label[:5].numpy(), label.numpy() / 2, np.array(["a"] * 8), np.array([{}] * 8)):
        np.savez(tmp_path / "odd.npz", arr_0=x.permute(0, 2, 3, 1).numpy(), arr_1=labels)
        refused(fid.read_images, tmp_path / "odd.npz", words=["odd.npz"])


# -------------------------------------------------------------------------------------------------------- command line

@pytest.fixture
def files(classifier, tmp_path, monkeypatch):
    """A folder, also the current one, with a classifier, images and a reference of 3 classes."""
    monkeypatch.chdir(tmp_path)
    fid.save_classifier("classifier.pt", classifier)
    x, y = pictures(150, seed=2), pictures(210, seed=3, shift=9)
    save_npz("images.npz", *x)
    save_npz("reference.npz", *y)
    return x, y


def run(capsys, *argv, features="classifier.pt"):
    """Output and warnings of the command."""
    fid.main([*argv, "--features", str(features), "--threads", "1", "--quiet", "--device", "cpu"])
    captured = capsys.readouterr()
    return captured.out.strip(), captured.err.strip()


def number(line):
    return float(re.search(r": ([-+.e0-9]+) \(", line)[1])


def direct(net, x, y):
    return frechet_distance(*statistics(net.features(x)), *statistics(net.features(y)))


def misuse(capsys, *argv, words, features="classifier.pt"):
    with pytest.raises(SystemExit) as stop:
        run(capsys, *argv, features=features)
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    for word in words:
        assert word in err, err


def test_distance_in_the_classifier(capsys, files, classifier):
    (x, label), (y, there) = files
    out, err = run(capsys, "--images", "images.npz", "--ref", "reference.npz")
    assert out.startswith("FD (our classifier): ") and out.endswith("(150 images against reference.npz)") and not err
    assert number(out) == pytest.approx(direct(classifier, x, y), rel=1e-3)
    save_images(fid.Path("folder"), x)
    common.save_tensors(fid.Path("run/students2/dm/samples.pt"), {"x": x, "label": label})
    for source in ("folder", "run"):
        assert number(run(capsys, "--images", source, "--ref", "reference.npz")[0]) == number(out)
    assert number(run(capsys, "--images", "images.npz", "--ref", "images.npz")[0]) < 1e-6


def test_classes(capsys, files, classifier):
    """[MSD App. E]: the distance of a partition is that of its classes alone, on both sides."""
    (x, label), (y, there) = files
    for classes in ([1], [0, 2]):
        words = list(map(str, classes))
        out, _ = run(capsys, "--images", "images.npz", "--ref", "reference.npz", "--classes", *words)
        a, b = (torch.isin(t, torch.tensor(classes)) for t in (label, there))
        assert number(out) == pytest.approx(direct(classifier, x[a], y[b]), rel=1e-3)
        assert number(out) != pytest.approx(direct(classifier, x, y), rel=1e-2)
        assert f"{50 * len(classes)} images of classes {' '.join(words)}" in out
        run(capsys, "--images", "reference.npz", "--classes", *words, "--save", "part.npz")
        again, _ = run(capsys, "--images", "images.npz", "--ref", "part.npz", "--classes", *reversed(words))
        assert number(again) == number(out)
    misuse(capsys, "--images", "images.npz", "--ref", "part.npz", words=["part.npz", "classes [0, 2]"])
    misuse(capsys, "--images", "images.npz", "--ref", "reference.npz", "--classes", "7", words=["--classes 7", "images.npz"])
    run(capsys, "--images", "reference.npz", "--save", "all.npz")
    misuse(capsys, "--images", "images.npz", "--ref", "all.npz", "--classes", "1", words=["all.npz", "all classes", "--save"])
    save_images(fid.Path("folder"), x)
    misuse(capsys, "--images", "folder", "--ref", "reference.npz", "--classes", "1", words=["folder", "no labels"])
    misuse(capsys, "--images", "images.npz", "--ref", "folder", "--classes", "1", words=["folder", "no labels"])


def test_saved_statistics(capsys, files, classifier):
    (x, _), (y, _) = files
    out, _ = run(capsys, "--images", "reference.npz", "--save", "statistics.npz")
    assert out == "written: statistics.npz (210 images)"
    with np.load("statistics.npz") as saved:
        mu, cov = statistics(classifier.features(y))
        np.testing.assert_allclose(saved["mu"], mu, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(saved["sigma"], cov, rtol=1e-10, atol=1e-12)
        assert saved["n"] == 210
    want = number(run(capsys, "--images", "images.npz", "--ref", "reference.npz", "--save", "mine.npz")[0])
    assert number(run(capsys, "--images", "images.npz", "--ref", "statistics.npz")[0]) == want
    np.savez("foreign.npz", mu=mu, sigma=cov)                       # EDM's layout
    assert number(run(capsys, "--images", "images.npz", "--ref", "foreign.npz")[0]) == want
    fid.save_classifier("other.pt", fid.train_classifier(*pictures(30), 3, seed=4, epochs=1, quiet=True))
    misuse(capsys, "--images", "images.npz", "--ref", "statistics.npz", words=["statistics.npz", "--features"],
           features="other.pt")
    misuse(capsys, "--images", "statistics.npz", "--ref", "reference.npz", words=["statistics.npz", "arr_0", "mu"])


def test_adms_reference_holds_both(capsys, files, classifier):
    """Statistics first, of whatever more images they came; but the images where features or classes do not fit."""
    (x, label), (y, there) = files
    mu, cov = statistics(classifier.features(x))
    arrays = {"arr_0": y.permute(0, 2, 3, 1).numpy(), "arr_1": there.numpy()}
    np.savez("both.npz", mu=mu, sigma=cov, **arrays)
    assert number(run(capsys, "--images", "images.npz", "--ref", "both.npz")[0]) < 1e-6
    for more in ({}, {"classes": ["--classes", "1"]}):
        argv = more.get("classes", [])
        np.savez("both.npz", mu=mu if argv else np.zeros(2048), sigma=cov if argv else np.eye(2048), **arrays)
        assert run(capsys, "--images", "images.npz", "--ref", "both.npz", *argv)[0].split(" (")[1] \
            == run(capsys, "--images", "images.npz", "--ref", "reference.npz", *argv)[0].split(" (")[1]


def test_number_and_warning(capsys, files):
    out, err = run(capsys, "--images", "images.npz", "--ref", "reference.npz", "--number", "40")
    assert "(40 images against" in out and err.count("\n") == 0 and "40 images for 64 features" in err
    assert run(capsys, "--images", "images.npz", "--ref", "reference.npz", "--number", "40")[0] == out
    misuse(capsys, "--images", "images.npz", "--ref", "reference.npz", "--number", "151", words=["--number 151", "only 150"])
    misuse(capsys, "--images", "images.npz", "--ref", "reference.npz", "--number", "51", "--classes", "0",
           words=["--number 51", "only 50", "of these classes"])
    misuse(capsys, "--images", "images.npz", "--ref", "reference.npz", "--number", "1", words=["2 images"])


def test_fid(capsys, files, scripts):
    """The grey images, through what stands for the Inception; found in the current folder without --features."""
    (x, _), (y, _) = files
    out, err = run(capsys, "--images", "images.npz", "--ref", "reference.npz", features=scripts / fid.INCEPTION)
    assert out.startswith("FID: ") and "150 images for 2,048 features" in err
    net = fid.Inception(scripts / fid.INCEPTION)
    assert number(out) == pytest.approx(from_samples(net.features(x).double(), net.features(y).double()), rel=1e-3)
    argv = ["--images", "images.npz", "--ref", "reference.npz", "--threads", "1", "--quiet"]
    with pytest.raises(SystemExit):
        fid.main(argv)
    assert "inception-2015-12-05.pt: no such file" in capsys.readouterr().err


def test_misuse(capsys, files, scripts):
    both = ["--images", "images.npz", "--ref", "reference.npz"]
    misuse(capsys, words=["--images"])
    misuse(capsys, "--images", "images.npz", words=["--ref", "--save"])
    misuse(capsys, *both, "--save", "statistics", words=["--save statistics", ".npz"])
    misuse(capsys, *both, "--number", "-1", words=["--number -1"])
    misuse(capsys, *both, "--clases", "1", words=["--classes"])
    misuse(capsys, *both, words=["plain.pt", fid.INCEPTION], features=scripts / "plain.pt")
    misuse(capsys, "--images", "nowhere", "--ref", "reference.npz", words=["nowhere"])
    misuse(capsys, "--images", "images.npz", "--ref", "nowhere.npz", words=["nowhere.npz", "no such file"])
    misuse(capsys, "--images", "images.npz", "--ref", "nowhere", words=["nowhere", "no such file or folder"])
    save_npz("colour.npz", *pictures(80, shape=(3, 16, 16)))
    misuse(capsys, "--images", "images.npz", "--ref", "colour.npz", words=["grey 16 x 16", "colour 16 x 16"])
    misuse(capsys, "--images", "colour.npz", "--ref", "colour.npz", words=["colour 16 x 16", "the classifier's grey 16 x 16"])
    mu, cov = np.zeros(64), np.eye(64)
    for words, arrays in ((["mu and sigma", "m"], {"m": mu}), (["mu and sigma"], {"mu": mu}),
                          (["[2048]", "64"], {"mu": np.zeros(2048), "sigma": np.eye(2048)}),
                          (["[64, 3]"], {"mu": mu, "sigma": cov[:, :3]}), (["finite"], {"mu": mu, "sigma": cov + np.inf}),
                          (["[]"], {"mu": np.float64(0), "sigma": cov})):
        np.savez("bad.npz", **arrays)
        misuse(capsys, "--images", "images.npz", "--ref", "bad.npz", words=["bad.npz", *words])
