"""Paths, the --run-slow switch, and one tiny trained run shared by the tests that only read it."""
import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests that train for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; runs with --run-slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --run-slow"))


SMALL = ["--preset", "smoke", "--quiet", "--student-size", "XXS", "--stages", "tsm,dm,adm", "--students", "3", "--save-every", "4", "--adm-steps", "8",
         "--tsm-steps", "12", "--post-steps", "8"]


def refused(capsys, main, argv) -> str:
    """The one line that a misuse prints; checks exit code 2 and the absence of a stack trace."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    return err.splitlines()[-1]


def assert_stack_is_its_members(train):
    """Nothing crosses students: train(members, name) -> state of a stack, together and one by one, in float64."""
    import common
    members = [common.Member(0, 2, 0, (0, 1, 2, 3)), common.Member(0, 2, 1, (4, 5, 6, 7)), common.Member(0, 1, 0, tuple(range(8)))]
    together = train(members, "all")
    for i, m in enumerate(members):
        for k, v in train([m], f"one{i}").items():
            torch.testing.assert_close(together[k][i:i + 1], v, atol=1e-12, rtol=1e-12)


@pytest.fixture
def double():
    """Float64 as the default: equivalences are compared to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def small_figures():
    """Figures are drawn in many tests and looked at in none."""
    import plot
    plot.plt.rcParams.update({"figure.dpi": 20, "savefig.dpi": 20})


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished smoke run of msd.py with K = 1, 3 and two seeds: the run folder."""
    import msd
    out = tmp_path_factory.mktemp("shared") / "run"
    assert msd.main(["--preset", "smoke", "--students", "1", "3", "--seeds", "2", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Three students of the teacher's size after DM and ADM, and three XXS ones after all three stages: the run folder."""
    import msd
    out = tmp_path_factory.mktemp("small") / "run"
    assert msd.main(["--preset", "smoke", "--quiet", "--students", "3", "--stages", "dm,adm", "--save-every", "4", "--adm-steps", "8", "--out", str(out)]) == 0
    assert msd.main([*SMALL, "--out", str(out)]) == 0
    return out


def write_idx(path: Path, values: np.ndarray, zipped: bool = False) -> None:
    """An IDX file of uint8 values, as Fashion-MNIST comes."""
    raw = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder in Fashion-MNIST's form: 200 training and 100 test images of ten bars."""
    folder, r = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for stem, n in (("train", 200), ("t10k", 100)):
        label = np.arange(n) % 10
        x = r.integers(0, 60, (n, 28, 28))
        for i, c in enumerate(label):
            x[i, 2 * c:2 * c + 6, 4:24] += 150
        write_idx(folder / f"{stem}-images-idx3-ubyte{'.gz' if stem == 'train' else ''}", x, stem == "train")
        write_idx(folder / f"{stem}-labels-idx1-ubyte{'.gz' if stem == 'train' else ''}", label, stem == "train")
    return folder


@pytest.fixture(scope="session")
def image_run(tmp_path_factory, tiny):
    """A finished smoke run of msd.py on tiny images with K = 1, 3: the run folder."""
    import msd
    out = tmp_path_factory.mktemp("shared") / "images"
    assert msd.main(["--dataset", "fashion-mnist", "--preset", "smoke", "--data", str(tiny), "--out", str(out), "--quiet",
                     "--threads", "1"]) == 0
    return out
