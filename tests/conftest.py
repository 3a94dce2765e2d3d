"""Paths, the --run-slow switch, and one tiny trained run shared by the tests that only read it."""
import sys
from pathlib import Path

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


@pytest.fixture
def double():
    """Float64 as the default: equivalences are compared to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished smoke run of msd.py with K = 1, 3 and two seeds: the run folder."""
    import msd
    out = tmp_path_factory.mktemp("shared") / "run"
    assert msd.main(["--preset", "smoke", "--students", "1", "3", "--seeds", "2", "--out", str(out), "--quiet"]) == 0
    return out
