"""Two processes of tests, --run-slow, commands in a process of their own, tiny data, smoke runs that tests share, and
a stage's loop without the files of a run."""
import contextlib
import gzip
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two threads beside another job make small networks ten times slower
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what has looked at a GPU can't be forked
os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported; commands in processes of their own inherit it

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import edm
import evaluate
import golden
import msd
import plot
import post
import run as runs
import students
import teacher
import toy_mog
from common import Ranks, Student, generator
from flags import parse

ALL = tuple(range(8))
SMALL = ["--preset", "smoke", "--student-size", "XXS", "--stages", "tsm,dm,adm", "--students", "3", "--save-every", "4",
         "--adm-steps", "8", "--tsm-steps", "12"]


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests that train for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; runs with --run-slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --run-slow"))


class Sent:
    """Keeps the reports of a process's tests in a file, for the other process to show."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        pickle.dump(self.config.hook.pytest_report_to_serializable(config=self.config, report=report), self.file)
        self.file.flush()


def pytest_runtestloop(session):
    """Two processes, a core each, take turns at the files of tests, the largest first; the second reports at the end."""
    config, asked, files = session.config, session.config.option, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    alone = asked.collectonly or asked.usepdb or asked.trace or session.testsfailed or not hasattr(os, "fork")
    if alone or len(files) < 2:
        return None  # pytest's own loop
    order = sorted(files.values(), key=lambda items: -items[0].path.stat().st_size)
    taken, reports = multiprocessing.Value("i", 0), tempfile.TemporaryFile()

    def mine():
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(order):
                return
            yield from order[i]

    config._tmp_path_factory.getbasetemp()  # one for both
    end, second = "", os.fork()
    try:
        if not second:
            capture = config.pluginmanager.getplugin("capturemanager")
            capture.stop_global_capturing()
            capture.start_global_capturing()  # into files of its own
            config.get_terminal_writer()._file = open(os.devnull, "w")
            config.pluginmanager.register(Sent(config, reports))
        items = mine()
        item = next(items, None)
        while item and not session.shouldfail and not session.shouldstop:
            following = next(items, None)
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following
    except BaseException:
        if second:
            raise
        end = traceback.format_exc()
    finally:
        taken.value = len(order)  # where one stops, the other does
        if not second:
            pickle.dump(end, reports)
            reports.flush()
            os._exit(0)
    os.waitpid(second, 0)
    reports.seek(0)
    end = "the second process of tests is gone"
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while not isinstance(report := pickle.load(reports), str):
            report = config.hook.pytest_report_from_serializable(config=config, data=report)
            config.hook.pytest_runtest_logreport(report=report)
        end = report
    session.shouldfail = session.shouldfail or end
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    return True


def refused(capsys, main, argv) -> str:
    """The one line that a misuse prints; checks exit code 2 and the absence of a stack trace."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err and "MSD_DEBUG" not in err
    return err.splitlines()[-1]


@pytest.fixture
def double():
    """Float64 as the default: equivalences are compared to 1e-12."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------ a loop, on the toy, alone

def options(line: str = ""):
    """msd.py's flags at smoke size, with those of a command line."""
    return parse(msd.Flags, msd.PRESETS, ["--preset", "smoke", *line.split()])


def denoiser(width: int = 16, seed: int = 0, jitter: float = 0.3) -> edm.Precond:
    """A ToyNet in its preconditioning, a stack of one, with random weights everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        D = edm.Precond(toy_mog.ToyNet(1, width), 0.5)
    g = torch.Generator().manual_seed(seed)
    for p in D.parameters():
        p.data += jitter * torch.randn(p.shape, generator=g)
    return D


def given(seed: int = 0, pairs: int = 24, width: int = 16) -> teacher.Given:
    """A seed's teacher (the closed form, with weights of its own for mu_fake), data, pairs and references."""
    facts = data.facts("toy")
    label, many = data.stratified(pairs, 8)[None], data.stratified(800, 8)
    z = torch.randn(1, pairs, 2, generator=generator(seed, "pairs"))
    made = {"z": z, "y": teacher.make_pairs(toy_mog.denoiser, z, label, 8), "label": label}
    judge, mixture = evaluate.toy_judge(facts), data.Mixture(facts)
    drawn = {of: judge.statistics(toy_mog.sample(many, generator(of)), many) for of in ("select", "real_select")}
    return teacher.Given(
        seed, facts, source=lambda: mixture, lineage={}, exact=True, cfg=1.0, size=(width, 2), net=denoiser(width, 1),
        D=students.whole(facts, pairs), real=lambda: mixture, judge=judge, pairs=made, references=drawn)


def task_of(stage, group, flags, shares=None, inputs=None, width: int = 12, **parts) -> students.Task:
    """students.Task of a group of toy students, each with D_k = F(D, Y_k), or these shares.

    width: of the networks to train, which start alike; parts: what a loop is handed in the place of the Task's own."""
    if any(s.start is None for s in group):
        group = [replace(s, start=students.Start("test", (width, 2), lambda: denoiser(width))) for s in group]
    inputs = inputs or {s.seed: given(s.seed) for s in group}
    if shares is None:
        known = {edm: lambda D, Y_k: D} if stage is edm else dict(msd.stages_of(replace(flags, stages=stage.NAME)))
        shares = [known[stage](inputs[s.seed].D, torch.tensor(s.classes)) for s in group]
    task = students.Task(stage, group, shares, inputs, flags, Ranks())
    if stage is post:
        best = [denoiser(16, 1)] * len(group)
        parts.setdefault("imitated", students.stacked(best, (16, 2), task.facts, "cpu").requires_grad_(False))
    vars(task).update(parts)
    return task


def trained(stage, group, flags, folder, **more) -> dict:
    """{file: weights} of stage.train on a stack of toy students; more: see task_of."""
    task = task_of(stage, group, flags, **more)
    one = runs.Run(stage.NAME, task.students, {Path(folder): slice(0, len(group))}, *stage.length(flags), (2,),
                   save_every=flags.run.save_every, micro_batch=flags.run.micro_batch)
    return stage.train(one, flags, task)


@torch.no_grad()
def error_by_level(D, exact, levels, facts, seed: int, points: int = 20_000):
    """RMS difference of D from the exact denoiser per level, in units of c_out(sigma)."""
    g = generator(seed, "error by level")
    label = data.stratified(points, facts.classes)[None]
    x, noise = facts.sample(label, g), torch.randn(1, points, *facts.shape, generator=g)
    out = []
    for level in levels.tolist():
        sigma = torch.full(label.shape, level)
        x_t = x + level * noise
        square = edm.per_sample((D(x_t, sigma, label) - exact(x_t, sigma, label)) ** 2).mean()
        out.append((square * edm.loss_weight(sigma[0, 0], facts.sigma_data)).sqrt())
    return torch.stack(out)


def assert_stack_is_its_members(train):
    """Nothing crosses students: train(students, name) -> state of a stack, together and one by one, in float64."""
    group = [Student(0, 2, 0, (0, 1, 2, 3)), Student(0, 2, 1, (4, 5, 6, 7)), Student(1, 1, 0, ALL)]
    together = train(group, "all")
    for i, s in enumerate(group):
        for k, v in train([s], f"one{i}").items():
            torch.testing.assert_close(together[k][i:i + 1], v, atol=1e-12, rtol=1e-12)


def same(a: dict, b: dict) -> bool:
    """Are two states equal bit for bit?"""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Asked:
    """A denoiser that keeps what it is asked, (sigma, label); of the mixture, or of D."""

    def __init__(self, D=toy_mog.denoiser):
        self.D, self.calls = D, []

    def __call__(self, x, sigma, label):
        self.calls.append((sigma, label))
        return self.D(x, sigma, label)

    def classes(self, k: int) -> set:
        """Those of student k."""
        return set(torch.cat([label[k] for _, label in self.calls]).tolist())


def forked(main, argv, words: Path, **environment) -> int:
    """The process of main(argv) in a copy of this one, which need not import torch again; what it says: a file. It may
    take ten minutes."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.alarm(600)
        os.environ.update(environment)
        sys.stdout = sys.stderr = words.open("w", buffering=1)
        code = main([*map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code or 0)


def exit_code(process: int) -> int:
    """Waits for the end of a process; -n: of signal n."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_after(monkeypatch, name: str, at: int):
    """From now on the stage of this name dies at the end of update `at`, after its checkpoint if there is one."""
    original = runs.Run.save

    def save(self, step, state):
        original(self, step, state)
        if (self.draws.stage, step) == (name, at):
            raise Killed
    monkeypatch.setattr(runs.Run, "save", save)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Labels [M, b] of every batch of the toy's data; each sample is checked to be of its class."""
    labels, original = [], data.Mixture.batch

    def batch(self, *args):
        x, label = original(self, *args)
        nearest = (x[:, :, None, None] - toy_mog.means()).norm(dim=-1).flatten(2).argmin(2) // toy_mog.MODES
        assert torch.equal(nearest, label)
        labels.append(label)
        return x, label
    monkeypatch.setattr(data.Mixture, "batch", batch)
    return labels


# ----------------------------------------------------- shared run folders

@pytest.fixture(scope="session", autouse=True)
def small_figures():
    """Figures are drawn in many tests and looked at in none."""
    plot.plt.rcParams.update({"figure.dpi": 20, "savefig.dpi": 20})


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without their figures, which take longer than the rest of a smoke run."""
    monkeypatch.setattr(plot, "draw", lambda *args: [])


def finished(out: Path, *argv: str) -> Path:
    """The folder of a finished smoke run of msd.py, without figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "draw", lambda *args: [])
        assert msd.main(["--preset", "smoke", *argv, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished smoke run of msd.py with K = 1, 3 and two seeds: the run folder."""
    return finished(tmp_path_factory.mktemp("shared") / "run", "--students", "1", "3", "--seeds", "2")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Three students of the teacher's size after DM and ADM, three XXS ones after all three stages: the run folder."""
    out = tmp_path_factory.mktemp("small") / "run"
    finished(out, "--students", "3", "--stages", "dm,adm", "--save-every", "4", "--adm-steps", "8")
    return finished(out, *SMALL)


def write_idx(path: Path, values: np.ndarray, zipped: bool = False) -> None:
    """An IDX file of uint8 values, as Fashion-MNIST comes."""
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    raw = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder in Fashion-MNIST's form: 200 training images of ten bars, zipped, and 100 to test with."""
    golden.tiny(folder := tmp_path_factory.mktemp("tiny") / "data")
    for path in folder.glob("train-*"):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


@pytest.fixture(scope="session")
def image_run(tmp_path_factory, tiny):
    """A finished smoke run of msd.py on tiny images with K = 1, 3: the run folder."""
    return finished(tmp_path_factory.mktemp("shared") / "images", "--dataset", "fashion-mnist", "--data", str(tiny))
