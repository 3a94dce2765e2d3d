"""Run folders: flags of every run, atomic files, config.json, checkpoints, and the steps of a training between them.

A stage's folder holds config.json, metrics.csv, state.pt, state.prev.pt, and at the end ema.pt, best.pt.
Not here: what is trained (the stages), who is trained together (students.py).
"""
import contextlib
import csv
import ctypes
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import Batch, Draws, Ranks
from flags import UserError, flag, of_machine

THREADS = min(8, torch.get_num_threads())  # fewer: OMP_NUM_THREADS
WHOLE = ("cifar10-uncond", "ffhq64", "afhqv2-64")  # without classes: one
NAMES = ("toy", "toy-prompts", "fashion-mnist", "cifar10", *WHOLE, "imagenet64")  # data.DATASETS


@dataclass
class Flags:
    """Of every run"""
    prefix = ""
    dataset: str = flag("toy", "what to train on", choices=NAMES)
    preset: str = flag("default", "a line of PRESETS: default, paper or smoke")
    resolution: int = flag(0, "pixels, pooled from the dataset's own; 0 = its default", low=0)
    data: str = flag("", "file or folder of the images, see docs/images.md; none = the usual places")
    features: str = flag("", "NVIDIA's TorchScript Inception, for FID; none = our own classifier")
    out: str = flag("", "the run folder; none = runs/DATASET")
    tag: str = flag("", "suffix of the students' folders, for variants", pattern=r"(?!o2mkd|.*\.\.)[\w.-]{0,80}")
    seed: int = flag(0, "first seed; seed S lives in OUT/seedS", low=0)
    seeds: int = flag(1, "number of seeds, S, S+1, …", low=1)
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or mps")
    micro_batch: int = flag(0, "samples at a time through a network; 0 = a rank's share of the batch", low=0)
    save_every: int = flag(500, "updates between checkpoints", low=1)
    eval_samples: int = flag(100_000, "samples of every reported distance", low=8)
    dry_run: bool = flag(False, "print every value and its source, and stop")

    def __post_init__(self):
        self.out = self.out or f"runs/{self.dataset}"

    def all_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))


LARGE = dict(eval_samples=50_000, save_every=1000)
PRESETS = {
    ("toy", "default"): {}, ("toy", "paper"): {},
    ("toy", "smoke"): dict(eval_samples=800, save_every=20),
    **{("toy-prompts", name): dict(like=("toy", name)) for name in ("default", "paper", "smoke")},
    ("fashion-mnist", "default"): dict(eval_samples=10_000, save_every=250),
    ("fashion-mnist", "smoke"): dict(eval_samples=40, save_every=3),
    ("cifar10", "default"): LARGE, ("cifar10", "smoke"): dict(eval_samples=20, save_every=2),
    **{(name, preset): dict(like=("cifar10", preset)) for name in WHOLE for preset in ("default", "smoke")},
    ("imagenet64", "default"): LARGE,  # [MSD App. E]
    ("imagenet64", "paper"): dict(like=("imagenet64", "default")),
}


def suffix(tag: str) -> str:
    """--tag as the end of a name: "" or "-tag"."""
    return f"-{tag}" if tag else ""


def device(name: str) -> torch.device:
    """--device, tried; no TF32."""
    torch.set_num_threads(THREADS)
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU per rank
    try:
        found = torch.device("cpu" if name == "auto" else name)
        torch.zeros(1, device=found)
        if found.type == "cuda":
            torch.cuda.set_device(found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}") from None
    return found


def keep_memory() -> None:
    """Tell glibc to keep what is freed: else half of a large forward pass is fetching the same pages again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        if library.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD of malloc.h; old ones refuse as much
            library.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def paced(steps):
    """The toy's steps, with all threads or one, whichever is faster now (its bits are the same): beside other jobs,
    threads that wait for each other cost ten times. Tried on two steps each, again after 20 seconds and 100 steps."""
    trial, until, seconds = [], 0.0, {}
    for step in steps:
        begin = time.perf_counter()
        if begin >= until:
            trial, until, seconds = [1, THREADS] * 2, begin + 20 + 100 * min(seconds.values(), default=0), {}
        threads = trial.pop() if trial else min(seconds, key=seconds.get)
        torch.set_num_threads(threads)
        yield step
        seconds[threads] = min(seconds.get(threads, math.inf), time.perf_counter() - begin)
    torch.set_num_threads(min(seconds, key=seconds.get, default=THREADS))


# ---- files

TEMPORARY = "{}.{}-{}.tmp"


def write_atomic(path: Path, write) -> None:
    """`write(temporary_path)`, then rename: the file is old or new, never half. UserError if it can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY.format(path.name, platform.node(), os.getpid()))
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's, of a full disk
        raise UserError(f"cannot write {path} (disk full?); what was saved before is intact: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, value) -> None:
    """Atomically."""
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=1) + "\n"))


class Damaged(UserError):
    """A file that was read, and is not what it should be."""


@contextlib.contextmanager
def reading(path, wanted: str = "what is wanted here"):
    """What fails inside is the file's fault, Damaged, unless it is the machine's: PIL, numpy, zipfile, torch raise
    dozens of types."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if isinstance(error, UserError) or of_machine(error):
            raise
        what = ascii(f"{type(error).__name__}: {error}")[1:-1][:200]  # printable, whatever a hostile file says
        raise Damaged(f"{path}: damaged, or not {wanted} ({what})") from None


def load_json(path: Path, *keys: str) -> dict:
    """A JSON object with at least these keys. UserError if it is damaged, or another."""
    with reading(path, "JSON"):
        value = json.loads(path.read_text())
    if not isinstance(value, dict) or not {*keys} <= value.keys():
        raise Damaged(f"{path}: sound JSON, but not of this code ({', '.join(keys) or 'an object'} wanted)")
    return value


def save_tensors(path: Path, value) -> None:
    """Atomically."""
    write_atomic(path, lambda t: torch.save(value, t))


def load_tensors(path: Path, *keys: str, mmap: bool = False) -> dict:
    """A checkpoint with these keys, read without running code from it. UserError if it is damaged or foreign."""
    os.stat(path)  # is it there?
    with reading(path, "tensors alone, as this code saves them"):
        zipfile.ZipFile(path).close()  # a cut file mapped is EINVAL
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if missing := {*keys} - value.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return value


def shard(folder: Path, name: str, i: int) -> Path:
    """The i-th file of a long list of samples."""
    return folder / f"{name}-{i:04d}.pt"


def load_shards(folder: Path, name: str, number: int = 0) -> Tensor:
    """y [N, *shape] of the files name-0000.pt, name-0001.pt, … (all, or the first `number`)."""
    paths = [shard(folder, name, i) for i in range(number)] or sorted(folder.glob(f"{name}-*.pt"))
    return torch.cat([load_tensors(p)["y"] for p in paths or [shard(folder, name, 0)]])  # none: says what is missing


def bar(iterable, name: str, quiet: bool = False, **more):
    """A progress bar."""
    off = {"disable": True} if quiet or not iterable else {}  # else as TQDM_DISABLE says
    return tqdm(iterable, desc=name, mininterval=0.5, dynamic_ncols=True, **off, **more)


# ---- folders

@contextlib.contextmanager
def alone(folders: list, ranks: Ranks = Ranks()):
    """One job at a time writes into these folders; what killed ones left half written goes."""
    with contextlib.ExitStack() as held:
        for folder in sorted({Path(f) for f in folders}) if ranks.rank == 0 else ():  # all in one order: no deadlock
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print(f"{folder}: waiting for another job", flush=True)
                lock.acquire()
            held.callback(lock.release)
            for half in filter(Path.is_file, folder.glob(TEMPORARY.format("*", "*", "*[0-9]"))):
                half.unlink()
        ranks.wait()
        yield


def check_config(folder: Path, config: dict) -> None:
    """Write config.json, or compare with the one there. UserError if the folder was made with other flags."""
    path, config = folder / "config.json", json.loads(json.dumps(config))
    if not any((folder / name).exists() for name in ("config.json", "state.pt", "ema.pt")):
        return save_json(path, config)
    old = load_json(path)  # fails if weights lie there without it
    differ = [k for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
    if differ:
        what = ", ".join(f"{k} ({old.get(k)} there, {config.get(k)} now)" for k in differ)
        raise UserError(f"{folder} was made with other flags: {what}; give those, or another --out (students: --tag)")


@functools.lru_cache  # asked twice
def _step(path: Path, changed: int) -> int:
    """Of a checkpoint whose check sums are right: torch does not look where a file is mapped."""
    with reading(path, "a checkpoint"), zipfile.ZipFile(path) as file:
        if wrong := file.testzip():
            raise ValueError(f"check sum of {wrong}")
    return load_tensors(path, "step", mmap=True)["step"]


def saved_steps(folder: Path) -> dict[int, Path]:
    """{step: checkpoint}. A damaged one is set aside if the other is sound; UserError if none is."""
    steps, damaged = {}, {}
    for path in filter(Path.exists, (folder / "state.prev.pt", folder / "state.pt")):
        try:
            steps[_step(path, path.stat().st_mtime_ns)] = path
        except Damaged as error:
            damaged[path] = error
    for path, error in damaged.items():
        if not steps:
            raise UserError(f"{error}; there is no other checkpoint: to begin anew, move {folder} away")
        print(f"{error}: set aside for the checkpoint before it", file=sys.stderr)
        os.replace(path, f"{path}.damaged")
    return steps


def finished(folder: Path, results: tuple[str, ...]) -> bool:
    """Are the files there that a stage leaves at its end?"""
    return all((folder / name).exists() for name in results)


def unfinished(folders: list[Path], results: tuple[str, ...], stacked: bool) -> list[list[Path]]:
    """Folders without these results, in groups of equal step, that can train as one stack."""
    left = [f for f in folders if not finished(f, results)]
    if not stacked or not left:
        return [[f] for f in left]
    steps = {f: saved_steps(f) for f in left}
    shared = set.intersection(*map(set, steps.values()))
    newest = {f: 0 if shared else max(steps[f], default=0) for f in left}
    return [[f for f in left if newest[f] == step] for step in dict.fromkeys(newest.values())]


@dataclass
class Run:
    """One stage of one stack of students. A checkpoint of step n holds the state after n updates."""
    name: str
    students: list
    folders: dict[Path, slice]  # which students, rows of every tensor, each holds; a single one holds the tensors whole
    length: int  # updates
    batch: int  # of all ranks
    shape: tuple  # of a sample
    save_every: int = 500
    micro_batch: int = 0
    ranks: Ranks = field(default_factory=Ranks)  # all read, the first one writes
    title: str = ""
    keep_first: bool = False  # its first checkpoint
    pace: bool = False  # may threads come and go? The bits must stay

    def __post_init__(self):
        self.title, self.main = self.title or self.name, self.ranks.rank == 0
        self.draws = Draws(self.name, self.students, self.ranks.device)
        self.slices = self.ranks.parts(self.batch, self.micro_batch)
        self.rows, self.last, self.began, self.stop = [], 0, 0.0, False
        self.flops, self.of_net = 0.0, {}  # of training, of one student; {network: of a pass, of one sample}

    def batches(self, step: int, of: str = "{}") -> list[Batch]:
        """The micro-batches of an update: one, unless ranks or --micro-batch ask for more. of: see Batch."""
        return [Batch(self.draws, step, self.batch, self.shape, part, of) for part in self.slices]

    def steps(self, state: dict):
        """The steps that remain after the newest checkpoint, which is loaded into the parts of `state`.

        Ctrl-C and SIGTERM wait until the step is whole and saved; a second one does not."""
        def hold(number, frame):
            self.stop = True
            signal.signal(number, signal.default_int_handler)
        begin = self._resume(state)
        hook = register_module_forward_hook(self._count)
        before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            left = range(begin, self.length)
            with bar(left, self.title, not self.main, total=self.length, initial=begin) as self.bar:
                yield from paced(self.bar) if self.pace and THREADS > 1 else self.bar
        finally:
            hook.remove()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, net: torch.nn.Module, args: tuple, out) -> None:
        """Add a network's pass to the FLOPs; backward costs twice as much as forward, or once if net is frozen. Without
        what is no such network: ADM's head, O2MKD's projections, LPIPS."""
        if "bottleneck" not in vars(net):  # only the networks themselves
            return
        if net not in self.of_net:
            self.of_net[net] = 0.0  # not counted while it is measured
            with torch.no_grad(), FlopCounterMode(display=False) as count:
                net(*(v[:, :1] if torch.is_tensor(v) else v for v in args))
            self.of_net[net] = count.get_total_flops() / len(args[0])
        trained = next(net.parameters()).requires_grad
        passes = 1 + (1 + trained) * (out[0] if isinstance(out, tuple) else out).requires_grad
        self.flops += passes * args[0].shape[1] * self.ranks.size * self.of_net[net]

    def _resume(self, state: dict) -> int:
        saved = self.ranks.first(lambda: [saved_steps(f) for f in self.folders])
        self.last = begin = max(set.intersection(*map(set, saved)), default=0)
        self.began = time.perf_counter()
        if begin:
            found = [load_tensors(s[begin]) for s in saved]
            self.began -= found[0]["seconds"]
            self.flops = found[0].get("flops", 0.0)
            parts = found[0]["parts"]
            if len(found) > 1:  # scalars and what is no tensor are the same in all
                parts = tree_map(lambda *t: torch.cat(t) if torch.is_tensor(t[0]) and t[0].ndim else t[0],
                                 *[s["parts"] for s in found])
            for key, part in state.items():
                load = part.update if isinstance(part, dict) else part.load_state_dict
                load(parts[key])
        for path in [folder / "metrics.csv" for folder in self.folders] if self.main else ():  # not past `begin`
            lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if begin and re.match(r"\d+,", line) and int(line.split(",")[0]) <= begin]
            write_atomic(path, lambda t: t.write_text("".join(["step,seconds,student,name,value\n", *kept])))
        return begin

    def seconds(self) -> float:
        """Of training, in all sessions."""
        return time.perf_counter() - self.began

    def log(self, step: int, **values) -> None:
        """Numbers after `step` updates, a student's [M] or a sample's [M, b], for metrics.csv and the bar."""
        shown = {}
        for name, value in values.items():
            if value is not None:
                value = value.flatten(1).mean(1) if value.ndim > 1 else value
                self.rows.append((step, self.seconds(), name, value.tolist()))
                shown |= {} if "," in name else {name: f"{value.mean().item():.3g}"}
        self.bar.set_postfix(shown, refresh=False)

    def check(self, step: int, loss: Tensor) -> Tensor:
        """The loss [M] of all ranks. UserError if one is not finite."""
        loss = self.ranks.total(loss)
        bad = [str(s) for s, value in zip(self.students, loss.tolist()) if not math.isfinite(value)]
        if bad:
            raise UserError(f"{self.title}: the loss is not finite at step {step} ({', '.join(bad)[:80]}); last "
                            f"checkpoint: step {self.last} in {next(iter(self.folders))}")
        return loss

    def save(self, step: int, state: dict) -> None:
        """Checkpoint every save_every steps, at the end, and before a stop."""
        self.stop = self.ranks.any(self.stop)
        if step % self.save_every and step < self.length and not self.stop:
            return
        if step != self.last and self.main:
            trees = {k: p if isinstance(p, dict) else p.state_dict() for k, p in state.items()}
            for folder, rows in self.folders.items():
                self._write_rows(folder / "metrics.csv", rows)  # first: those past a resumed step are dropped
                own = trees
                if len(self.folders) > 1:
                    own = tree_map_only(Tensor, lambda t: t[rows].clone() if t.ndim else t, trees)
                new, path = folder / "state.new.pt", folder / "state.pt"
                save_tensors(new, {"step": step, "seconds": self.seconds(), "flops": self.flops, "parts": own})
                if path.exists():  # at any moment one of the two can be read
                    os.replace(path, folder / "state.prev.pt")
                if step == self.save_every and self.keep_first:
                    write_atomic(folder / "state.first.pt", lambda temporary: shutil.copyfile(new, temporary))
                os.replace(new, path)
            self.rows.clear()
        self.last = step
        if self.stop:
            raise KeyboardInterrupt

    def _write_rows(self, path: Path, students: slice) -> None:
        with open(path, "a", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            for step, seconds, name, values in self.rows:
                for student, value in enumerate(values[students]):
                    out.writerow([step, f"{seconds:.2f}", student, name, f"{value:.6g}"])
