"""Every number of some small commands, to compare with after a change that must change none: `python tests/golden.py` checks
tests/golden.json, `python tests/golden.py --write` makes it again. The weights' hashes depend on torch and on the processor.

Of each command: a hash of every ema.pt and best.pt, every measured number of results*.json, every config.json."""
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
FASHION = "--dataset fashion-mnist --preset smoke --data {data}"
COMMANDS = {                                   # name: command lines of one run folder; {data}: a tiny Fashion-MNIST
    "dm": ["msd.py --preset smoke --students 1 3 --seeds 2"],
    "default": ["msd.py --students 2 --steps 30 --reg-warmup 10 --fake-warmup 3 --pairs 200 --batch 16 --warmup 2 --eval-every 10 "
                  "--select-samples 400 --eval-samples 800 --teacher-steps 40 --teacher-batch 32 --sampler-steps 8"],
    "ttur": ["msd.py --preset smoke --students 2 --reg-weight 0 --ttur 3 --draws 1 --normaliser mean_abs --clip-norm 1 --init random"],
    "regression": ["msd.py --preset smoke --students 2 --dm-weight 0 --decay cosine --noise-law bins"],
    "stages": ["msd.py --preset smoke --students 3 --stages dm,adm", "msd.py --preset smoke --students 3 --stages tsm,dm,adm --student-size XS",
               "msd.py --preset smoke --students 3 --stages post --student-size XS",
               "msd.py --preset smoke --students 3 --stages adm --init dm --tag continued --gan-weight 0"],
    "generated": ["msd.py --preset smoke --students 2 --stages tsm,dm,adm --student-size XXS --real generated --no-tsm-common --filter-pairs"],
    "cd": ["msd.py --preset smoke --students 1 2 --method cd --save-every 5"],
    "partition": ["msd.py --preset smoke --students 3 --partition kmeans", "msd.py --preset smoke --students 3 --partition random"],
    "prompts": ["msd.py --preset smoke --dataset toy-prompts --students 4 --partition quadrant --cfg 1.5"],
    "exact": ["msd.py --preset smoke --teacher exact --students 2 --stages dm,adm"],
    "o2mkd": ["o2mkd.py --preset smoke --students 1 2 --merge --inspect 0 --curve 3 4", "o2mkd.py --preset smoke --students 4 --tag small --scheme small",
              "o2mkd.py --preset smoke --students 2 --kd similarity --tag similarity --p 0.5", "o2mkd.py --preset smoke --students 2 --kd attention --tag attention",
              "o2mkd.py --preset smoke --students 2 --kd contrastive --tag contrastive --sampler ddim", "o2mkd.py --preset smoke --students 2 --init o2mkd1 --tag fork --merge"],
    "fashion": [f"msd.py {FASHION} --stages dm,adm", f"msd.py {FASHION} --students 2 --stages tsm,dm --student-size XXS --teacher-size XS --init-no"],
    "fashion-cd": [f"msd.py {FASHION} --students 2 --method cd", f"o2mkd.py {FASHION} --students 2 --merge"],
    "ranks": ["2: msd.py --preset smoke --students 2 --stages dm,adm"],
    "ranks-images": [f"2: msd.py {FASHION} --students 1 --stages tsm,dm --student-size XXS --teacher-size XS"],
    "micro": ["msd.py --preset smoke --students 2 --stages dm,adm --micro-batch 8"],
    "killed": ["kill: msd.py --preset smoke --students 2 --stages dm,adm --steps 60 --save-every 3"],
}
COMMANDS["fashion"][1] = f"msd.py {FASHION} --students 2 --stages tsm,dm,adm --student-size XXS --teacher-size XXS --no-tsm-common --tag own"
BEFORE = {"adm": " --adm-fake-warmup 3", "post": " --post-steps 0"}        # flags of commit f349c87 that are the rule now


def tiny(folder: Path) -> None:
    """Ten classes of bars in Fashion-MNIST's form."""
    folder.mkdir()
    r = np.random.default_rng(0)
    for stem, n in (("train", 200), ("t10k", 100)):
        label = np.arange(n) % 10
        x = r.integers(0, 60, (n, 28, 28))
        for i, c in enumerate(label):
            x[i, 2 * c:2 * c + 6, 4:24] += 150
        for name, v in (("images-idx3", x), ("labels-idx1", label)):
            head = bytes([0, 0, 8, v.ndim]) + np.array(v.shape, ">i4").tobytes()
            (folder / f"{stem}-{name}-ubyte").write_bytes(head + v.astype(np.uint8).tobytes())


def execute(line: str, out: Path, data: Path, root: Path) -> None:
    how, _, command = line.rpartition(": ")
    if root != ROOT:                                                       # the commit of the beginning
        command += BEFORE["adm"] * ("adm" in command and "fashion" not in command) + BEFORE["post"] * ("post" in command)
        command += " --adm-fake-warmup 2" * ("adm" in command and "fashion" in command)
    argv = command.format(data=data).split()
    argv = [sys.executable, *(["-m", "torch.distributed.run", "--nproc-per-node", how] if how.isdigit() else []), str(root / argv[0]), *argv[1:], "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1" if how.isdigit() else "2", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"}
    if how == "kill":                                                      # at the first checkpoint of each stage, and of the second run
        for stage in ("dm", "adm"):
            p = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while p.poll() is None and not list(out.glob(f"seed*/students*/{stage}/state.pt")):
                time.sleep(0.01)
            p.send_signal(signal.SIGTERM)
            p.wait()
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr[-3000:]}"


def fingerprint(path: Path) -> str:
    net = torch.load(path, map_location="cpu", weights_only=True)["net"]
    h = hashlib.sha256()
    for name in sorted(net):
        h.update(name.encode() + net[name].contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def numbers(value, name: str = "") -> dict:
    """{path: number} of a results.json, without times and configurations."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in ("seconds", "per_second", "configs", "config")}
        return {k: v for key, part in value.items() for k, v in numbers(part, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in numbers(part, f"{name}/{i}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}


def measured(name: str, root: Path = ROOT) -> dict:
    """Run a command of COMMANDS in a new folder: {"weights", "results", "configs"}, by file."""
    with tempfile.TemporaryDirectory() as place:
        out, data = Path(place) / "run", Path(place) / "data"
        tiny(data)
        for line in COMMANDS[name]:
            execute(line, out, data, root)
        found = {"weights": {}, "results": {}, "configs": {}}
        for path in sorted(out.rglob("*")):
            key = str(path.relative_to(out))
            if path.name in ("ema.pt", "best.pt"):
                found["weights"][key] = fingerprint(path)
            elif re.match(r"results[^/]*\.json$", key):
                found["results"][key] = numbers(json.loads(path.read_text()))
            elif path.name == "config.json" and path.parent.name != "data":
                found["configs"][key] = json.loads(path.read_text())
    return found


def gone(config: dict) -> dict:
    """A config.json without the hashes of other configurations."""
    hashed = re.compile(r"^(.*/.*) [0-9a-f]{8}$")
    return {k: hashed.sub(r"\1", v) if isinstance(v, str) else v for k, v in config.items()}


def differences(found: dict, kept: dict) -> list[str]:
    """What is not as it was: weights, numbers, configurations; files that are new do not count."""
    out = [f"{path}: other weights" for path, v in kept["weights"].items() if found["weights"].get(path) != v]
    for path, old in kept["results"].items():
        new = found["results"].get(path, {})
        bad = [k for k, v in old.items() if not (new.get(k) == v or v != v and new.get(k) != new.get(k))]
        out += [f"{path}: {len(bad)} of {len(old)} numbers, such as {k}: {old[k]} before, {new.get(k)} now" for k in bad[:1]]
    for path, old in kept["configs"].items():
        new, old = gone(found["configs"].get(path, {})), gone(old)
        out += [f"{path}: {k}: {old.get(k)} before, {new.get(k)} now" for k in {*old, *new} if old.get(k) != new.get(k)]
    return out


def machine() -> str:
    """What the last digit depends on."""
    return f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    names = [a for a in sys.argv[1:] if a in COMMANDS] or list(COMMANDS)
    root = next((Path(a) for a in sys.argv[1:] if a.startswith("/")), ROOT)
    path = ROOT / "tests/golden.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        begin, found = time.time(), measured(name, root)
        if "--write" in sys.argv:
            kept = {**kept, "machine": machine(), name: found}
            path.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
        else:
            print("\n".join(f"  {line}" for line in differences(found, kept[name])))
        print(f"{name}: {time.time() - begin:.0f} s, {len(found['weights'])} networks, {sum(map(len, found['results'].values()))} numbers", flush=True)
