"""Run folders: one owner, atomic files, config.json, checkpoints, and the steps of a training between them.

  files        `write_atomic`, `save_json`, `load_json`, `save_tensors`, `load_tensors`, samples in `shard`s
  folders      `check_config`: a folder belongs to the flags that made it; `alone`: one job at a time; `unfinished`
  `Run`        one stage of one stack of students: its steps, batches, metrics.csv, state.pt; resumed bit for bit
  `start`      device, threads and ranks of a command

A folder holds config.json, metrics.csv, state.pt, state.prev.pt, and at the end ema.pt, best.pt, done.json. Skip this file
on first reading. Not here: what is trained (the stages), who is trained together (students.py).
"""
import contextlib
import csv
import fcntl
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import Batch, Draws, Ranks, world
from flags import UserError, flag

NAMES = ("toy", "toy-prompts", "fashion-mnist", "cifar10", "imagenet64")  # data.DATASETS
# flags of earlier versions that are constants now: {name in config.json: the value that they are}; None: it does not matter
RETIRED = {"weight_decay": 0.01, "fake": "net", "kde_points": None, "grad_clip": 0.0, "adm_fake": "restart", "adm_reg_weight": 0.0,
           "gan_clean": False, "post_of": "adm"}


@dataclass
class Flags:
    """Of every run"""
    prefix = ""
    dataset: str = flag("toy", "what to train on", choices=NAMES)
    preset: str = flag("default", "a line of PRESETS: default, few-pairs, paper or smoke")
    resolution: int = flag(0, "pixels of the images, pooled from the dataset's own; 0 = the dataset's default", low=0)
    data: str = flag("", "file or folder of the images; none = the usual places (data.py)")
    features: str = flag("", "of the Frechet distance: NVIDIA's TorchScript Inception; none = our own classifier")
    out: str = flag("runs/toy", "the run folder")
    tag: str = flag("", "suffix of the students' folders: variants of one teacher side by side",
                    pattern=r"(?!o2mkd|.*\.\.)[\w.-]{0,80}")
    seed: int = flag(0, "first seed; seed S lives in OUT/seedS", low=0)
    seeds: int = flag(1, "number of seeds, S, S+1, … (the toy's train as one stack)", low=1)
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or mps")
    micro_batch: int = flag(0, "samples that a rank takes through a network at a time; 0 = its share of the batch", low=0)
    save_every: int = flag(500, "updates between checkpoints", low=1)
    eval_samples: int = flag(100_000, "samples of every reported distance", low=8)
    dry_run: bool = flag(False, "print every value and its source, and stop")

    def all_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))


SMOKE = dict(eval_samples=800, save_every=20)
PRESETS = {
    ("toy", "default"): {}, ("toy", "few-pairs"): {}, ("toy", "paper"): {}, ("toy", "smoke"): SMOKE,
    ("toy-prompts", "default"): dict(like="toy", out="runs/toy-prompts"),
    ("toy-prompts", "few-pairs"): dict(like="toy", out="runs/toy-prompts"),
    ("toy-prompts", "paper"): dict(like="toy", out="runs/toy-prompts"),
    ("toy-prompts", "smoke"): dict(like="toy", out="runs/toy-prompts"),
    ("fashion-mnist", "default"): dict(out="runs/fashion-mnist", eval_samples=10_000, save_every=250),
    ("fashion-mnist", "smoke"): dict(out="runs/fashion-mnist", eval_samples=40, save_every=3),
    ("cifar10", "default"): dict(out="runs/cifar10", eval_samples=50_000, save_every=1000),
    ("cifar10", "smoke"): dict(out="runs/cifar10", eval_samples=20, save_every=2),
    ("imagenet64", "default"): dict(out="runs/imagenet64", eval_samples=50_000, save_every=1000),  # [MSD App. E]
}
PRESETS["imagenet64", "paper"] = PRESETS["imagenet64", "default"]


def suffix(tag: str) -> str:
    """--tag as the end of a name: "" or "-tag"."""
    return f"-{tag}" if tag else ""


def device(name: str) -> torch.device:
    """--device auto|cpu|cuda|mps, checked; also at most 8 CPU threads (fewer: OMP_NUM_THREADS), and no TF32."""
    torch.set_num_threads(max(1, min(8, torch.get_num_threads())))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # torchrun: a GPU per rank
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; start fewer ranks, or another --device") from None
    return torch.device(name)


def start(flags: Flags) -> Ranks:
    """The ranks of this command, which know their device: torchrun's, or this process alone."""
    return world(device(flags.device))


# --------------------------------------------------------------- files

def _failed_write(path: Path, error: Exception) -> UserError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"cannot write {path}: {text}; what was saved before is intact. Free some space or choose another "
                     f"--out, then run the same command again")


def write_atomic(path: Path, write) -> None:
    """`write(temporary_path)`, then rename: the file is old or new, never half. UserError if it can't be written."""
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if os.access(path.parent, os.W_OK):
            temporary.unlink(missing_ok=True)
        raise _failed_write(path, error) from None


def save_json(path: Path, value) -> None:
    """Atomically."""
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=1) + "\n"))


def load_json(path: Path, *keys: str) -> dict:
    """A JSON object of a run folder, with at least these keys. UserError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict) or any(k not in value for k in keys):
        raise UserError(f"{path}: damaged; delete it and run the same command again")
    return value


def save_tensors(path: Path, value) -> None:
    """Atomically."""
    write_atomic(path, lambda t: torch.save(value, t))


def load_tensors(path: Path, mmap: bool = False):
    """A checkpoint, read without running code from it. UserError if it is missing, truncated or foreign."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises a dozen types for a damaged file
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}): damaged or foreign; delete it and "
                        f"run the same command again, or give another file") from None


def shard(folder: Path, name: str, i: int) -> Path:
    """Where the i-th file of a long list of samples lies."""
    return folder / f"{name}-{i:04d}.pt"


def load_shards(folder: Path, name: str, number: int = 0) -> Tensor:
    """y [N, *shape] of the files name-0000.pt, name-0001.pt, … (all, or the first `number`)."""
    paths = [shard(folder, name, i) for i in range(number)] or sorted(folder.glob(f"{name}-*.pt"))
    if not paths:
        raise UserError(f"{folder}: no {name} samples in it; delete that folder and run the same command again")
    return torch.cat([load_tensors(p)["y"] for p in paths])


def bar(iterable, name: str, total: int, quiet: bool = False):
    """A progress bar for work that is not a training loop."""
    off = {"disable": True} if quiet or total == 0 else {}  # else as TQDM_DISABLE says
    return tqdm(iterable, desc=name, total=total, mininterval=0.5, dynamic_ncols=True, **off)


# ------------------------------------------------------------- folders

HELD: set[str] = set()  # folders that this process holds


@contextlib.contextmanager
def alone(folder: str, ranks: Ranks):
    """One job at a time makes what all jobs of a run folder share; a job that ends, however, frees the lock."""
    lock = None
    if folder in HELD:
        yield
        return
    HELD.add(folder)
    if ranks.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder) / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another job is making what both need; waiting for it …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: start jobs in turn
            pass
    ranks.wait()
    try:
        yield
    finally:
        HELD.discard(folder)
        if lock:
            lock.close()


def check_config(folder: Path, config: dict) -> None:
    """Write config.json, or compare with the one that is there. UserError if the folder was made with other flags."""
    path, config = folder / "config.json", json.loads(json.dumps(config))
    if not path.exists():
        if any((folder / name).exists() for name in ("state.pt", "ema.pt")):
            raise UserError(f"{folder}: holds weights, but no config.json that says with which flags they were made; delete "
                            f"that folder, or choose another --out or --tag")
        return save_json(path, config)
    old = {k: v for k, v in load_json(path).items() if k in config or k not in RETIRED or v != RETIRED[k] is not None}
    differ = [k for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
    if differ:
        what = ", ".join(f"{k} ({old.get(k)} there, {config.get(k)} now)" for k in differ)
        raise UserError(f"{folder} was made with other flags: {what}; give those flags, choose another --out (students: a "
                        f"--tag is enough), or delete that folder")


def saved_steps(folder: Path) -> dict[int, Path]:
    """{step: checkpoint} of the readable ones; a damaged one is set aside, and said so."""
    steps = {}
    for name in ("state.prev.pt", "state.pt"):
        path = folder / name
        if path.exists():
            try:
                steps[load_tensors(path, mmap=True)["step"]] = path  # mapped: not read whole
            except (UserError, KeyError, TypeError):
                print(f"{path} is damaged: set aside as {name}.damaged, going on from the checkpoint before it",
                      file=sys.stderr)
                os.replace(path, folder / (name + ".damaged"))
    return steps


def finished(folder: Path, results: tuple[str, ...]) -> bool:
    """Does the folder hold the files that a stage leaves at its end?"""
    return all((folder / name).exists() for name in results)


def unfinished(folders: list[Path], results: tuple[str, ...], stacked: bool = True) -> list[list[Path]]:
    """Folders without these results, in groups that share a checkpoint (or none): each group can train as one stack."""
    left = [f for f in folders if not finished(f, results)]
    if not stacked:
        return [[f] for f in left]
    groups: dict[int, list[Path]] = {}
    steps = {f: {0, *saved_steps(f)} for f in left}
    shared = max(set.intersection(*steps.values())) if left else 0
    for f in left:
        groups.setdefault(shared or max(steps[f]), []).append(f)
    return list(groups.values())


# -------------------------------------------------- a stage's training

def _map(tree, function):
    """`function` of every tensor that is no scalar, in dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return function(tree) if tree.ndim else tree
    if isinstance(tree, dict):
        return {k: _map(v, function) for k, v in tree.items()}
    return type(tree)(_map(v, function) for v in tree) if isinstance(tree, (list, tuple)) else tree


def _join(trees: list):
    """The trees' tensors, one after another along the first dimension: the inverse of taking rows."""
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees) if first.ndim else first
    if isinstance(first, dict):
        return {k: _join([t[k] for t in trees]) for k in first}
    return type(first)(_join(list(part)) for part in zip(*trees)) if isinstance(first, (list, tuple)) else first


class Run:
    """One stage of one stack of students: a folder per (seed, K), each holding its own students' rows of every tensor.

    folders: {folder: slice of the stack's students}; a stack of one folder saves its tensors whole. batch: of all ranks;
    shape: a sample's. step counts finished updates: a checkpoint of step n holds the state after n updates.
    ranks: those that train this stack together; all read, the first one writes."""

    def __init__(self, name: str, students: list, folders: dict[Path, slice], steps: int, batch: int, shape: tuple,
                 save_every: int = 500, micro_batch: int = 0, ranks: Ranks | None = None, title: str = ""):
        self.name, self.students, self.folders, self.length = name, students, folders, steps
        self.batch, self.shape, self.save_every = batch, shape, save_every
        self.ranks, self.title = ranks or Ranks(), title or name
        self.main = self.ranks.rank == 0
        self.draws = Draws(name, students, self.ranks.device)
        self.slices = self.ranks.parts(batch, micro_batch)
        self.rows: list[tuple] = []
        self.before = self.last = self.began = 0
        self.stop = False

    def batches(self, step: int, of: str = "{}") -> list[Batch]:
        """The micro-batches of an update: one, unless ranks or --micro-batch split it. of: see Batch."""
        return [Batch(self.draws, step, self.batch, self.shape, part, of) for part in self.slices]

    def steps(self, state: dict):
        """The steps that remain, on a bar; first the newest checkpoint is loaded into the modules and optimizers of `state`.

        Ctrl-C and SIGTERM are held until the step is whole and saved."""
        def hold(number, frame):
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            os.write(2, f"\n{self.title}: stopping after this step\n".encode())  # print is not safe here
        begin, old = self._resume(state), {}
        try:
            for s in (signal.SIGINT, signal.SIGTERM):
                old[s] = signal.signal(s, hold)
        except ValueError:  # not the main thread: leave the signals alone
            pass
        off = {} if self.main else {"disable": True}  # else as TQDM_DISABLE says
        self.bar = tqdm(range(begin, self.length), initial=begin, total=self.length, desc=self.title, unit="step",
                        mininterval=0.5, dynamic_ncols=True, **off)
        try:
            yield from self.bar
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def _resume(self, state: dict) -> int:
        if not self.main:
            self.ranks.wait()  # until the first rank has set damaged files aside
        saved = [saved_steps(f) for f in self.folders]
        if self.main:
            self.ranks.wait()
        self.last = begin = max(set.intersection(*(set(s) for s in saved)), default=0)
        if begin:
            found = [load_tensors(s[begin]) for s in saved]
            joined = _join([s["parts"] for s in found]) if len(found) > 1 else found[0]["parts"]
            for key, part in state.items():
                if isinstance(part, dict):
                    part.update(joined[key])
                else:
                    part.load_state_dict(joined[key])
            self.before = found[0]["seconds"]
        for folder in self.folders if self.main else ():
            self._trim(folder, begin)
        self.began = time.perf_counter()
        return begin

    def _trim(self, folder: Path, begin: int) -> None:
        """Drop the rows of metrics.csv past the step that is resumed."""
        path = folder / "metrics.csv"
        rows = [["step", "seconds", "student", "name", "value"]]
        if path.exists():
            with open(path, newline="") as f:
                rows += [r for r in csv.reader(f) if len(r) == 5 and r[0].isdigit() and int(r[0]) <= begin]

        def write(temporary):
            with open(temporary, "w", newline="") as f:
                csv.writer(f, lineterminator="\n").writerows(rows)
        write_atomic(path, write)

    def seconds(self) -> float:
        """Training seconds of this stage, earlier sessions counted in."""
        return self.before + time.perf_counter() - self.began

    def log(self, step: int, **values) -> None:
        """Note numbers of the state after `step` updates, written with the next save; means move on the bar.

        A value is one number a student [M] or one a sample [M, b]; None is left out."""
        shown = {}
        for name, value in values.items():
            if value is not None:
                value = value.detach().flatten(1).mean(1) if value.ndim > 1 else value.detach()
                self.rows.append((step, self.seconds(), name, value.cpu().tolist()))
                shown |= {} if "," in name else {name: f"{value.mean().item():.3g}"}
        self.bar.set_postfix(shown, refresh=False)

    def check(self, step: int, loss: Tensor) -> Tensor:
        """The loss [M] of all ranks; one that is not finite stops the run, naming step, student and last checkpoint."""
        loss = self.ranks.total(loss)
        finite = torch.isfinite(loss)
        if not finite.all():
            bad = ", ".join(str(s) for s, ok in zip(self.students, finite.tolist()) if not ok)
            where = f"step {self.last} in {next(iter(self.folders))}" if self.last else "none yet"
            raise UserError(f"{self.title}: the loss is not finite at step {step} ({bad[:80]}); last checkpoint: {where}; "
                            f"lower the learning rate or a loss's weight (and choose another --tag or --out)")
        return loss

    def save(self, step: int, state: dict) -> None:
        """Checkpoint every save_every steps, at the end, and when a stop was asked for (which then stops the run)."""
        self.stop = self.ranks.any(self.stop)
        if not (step % self.save_every == 0 or step == self.length or self.stop):
            return
        if step != self.last and self.main:
            self._flush()  # rows first: those past a resumed step are dropped
            trees = {k: p if isinstance(p, dict) else p.state_dict() for k, p in state.items()}
            for folder, rows in self.folders.items():
                own = trees if len(self.folders) == 1 else _map(trees, lambda t: t[rows].clone())
                self._save(folder, {"step": step, "seconds": self.seconds(), "parts": own})
        self.last = step
        if self.stop:
            raise KeyboardInterrupt

    def _save(self, folder: Path, state: dict) -> None:
        """state.pt becomes state.prev.pt once the new one is whole: at any moment one of the two can be read."""
        path, new = folder / "state.pt", folder / "state.new.pt"
        save_tensors(new, state)
        try:
            if path.exists():
                os.replace(path, folder / "state.prev.pt")
            os.replace(new, path)
        except OSError as error:
            raise _failed_write(path, error) from None

    def _flush(self) -> None:
        for folder, rows in self.folders.items():
            try:
                with open(folder / "metrics.csv", "a", newline="") as f:
                    out = csv.writer(f, lineterminator="\n")
                    for at, seconds, name, column in self.rows:
                        for student, value in enumerate(column[rows]):
                            out.writerow([at, f"{seconds:.2f}", student, name, f"{value:.6g}"])
            except OSError as error:
                raise _failed_write(folder / "metrics.csv", error) from None
        self.rows.clear()
