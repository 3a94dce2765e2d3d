"""What goes wrong around the code: unreadable files, odd machines and environments, odd images, two owners of a folder."""
import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import dmd
import evaluate
import fid
import images
import msd
import o2mkd
import reproduce
import run as runs
import sample
import teacher
from conftest import ROOT, finished, refused, same
from flags import UserError, command, option, parse
from run import load_tensors
from test_data import save
from test_msd import SMOKE, weights

SAVING = [*SMOKE, "--students", "2", "--save-every", "3", "--out"]


# ---------------------------------------------- only damage is damage

@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("saving") / "run", "--students", "2", "--save-every", "3")


@pytest.fixture
def stopped(saving, tmp_path, monkeypatch):
    """A run folder whose DM stage was stopped: two checkpoints, no weights."""
    monkeypatch.setattr("plot.draw", lambda *_: [])
    folder = shutil.copytree(saving, tmp_path / "run") / "seed0/students2/dm"
    (folder / "ema.pt").unlink()
    return folder


PASSING = [OSError(code, os.strerror(code)) for code in (errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM)]
PASSING += [RuntimeError("unable to mmap 99 bytes from file: Cannot allocate memory (12)"), torch.OutOfMemoryError("full")]


@pytest.mark.parametrize("fault", PASSING, ids=str)
@pytest.mark.parametrize("name", ["state.pt", "state.prev.pt"])
def test_a_passing_fault_is_no_damage(stopped, monkeypatch, capsys, fault, name):
    """One line, nothing renamed, nothing trained; the same command goes on once the fault has passed."""
    there, load = sorted(stopped.iterdir()), torch.load

    def fails(path, *args, **more):
        if Path(path).name == name:
            raise fault
        return load(path, *args, **more)
    monkeypatch.setattr(torch, "load", fails)
    refused(capsys, msd.main, [*SAVING, str(stopped.parents[2])])
    assert sorted(stopped.iterdir()) == there
    monkeypatch.setattr(torch, "load", load)
    assert runs.saved_steps(stopped).keys() == {9, 12}


def test_damaged_checkpoints(stopped, capsys):
    """Of one, the other is taken; with none that can be read it stops, and touches nothing."""
    flipped = bytearray((stopped / "state.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (stopped / "state.pt").write_bytes(flipped)
    (stopped / "state.prev.pt").write_bytes(b"half")
    there = {p: p.read_bytes() for p in stopped.iterdir()}
    line = refused(capsys, msd.main, [*SAVING, str(stopped.parents[2])])
    assert "state.prev.pt: damaged" in line and "no other checkpoint" in line
    assert {p: p.read_bytes() for p in stopped.iterdir()} == there


@pytest.mark.parametrize("cut", [0, 9000, -100])
def test_a_cut_checkpoint_gives_way_to_the_other(stopped, cut, capsys):
    (stopped / "state.pt").write_bytes((stopped / "state.pt").read_bytes()[:cut])
    assert runs.saved_steps(stopped).keys() == {9} and "state.pt: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed0/teacher/ema.pt", "seed0/reference/select-0000.pt"])
def test_sound_tensors_of_another_kind_are_named(stopped, name, capsys):
    torch.save([1], stopped.parents[2] / name)
    assert Path(name).name in refused(capsys, msd.main, [*SAVING, str(stopped.parents[2])])


def test_a_log_that_is_no_text_does_not_stop_the_run(stopped):
    (stopped / "metrics.csv").write_bytes(b"\xff\xfex\n")
    assert msd.main([*SAVING, str(stopped.parents[2])]) == 0


@pytest.mark.parametrize("make, words", [
    (lambda p: torch.save(torch.nn.Linear(1, 1), p), "not tensors alone"), (lambda p: p.write_bytes(b""), "damaged"),
    (lambda p: torch.save({"net": 1}, p), "not a checkpoint of this code"), (lambda p: p.mkdir(), "Is a directory"),
    (lambda p: p.symlink_to(p.with_name("gone")), "No such file")])
def test_a_file_that_the_user_names(tmp_path, capsys, make, words):
    """What it is; never the advice to delete it."""
    make(tmp_path / "mine.pt")
    line = refused(capsys, msd.main, [*SMOKE, "--teacher", str(tmp_path / "mine.pt"), "--out", str(tmp_path / "out")])
    assert "mine.pt" in line and words in line and "delete" not in line


def test_json_of_another_form(tmp_path):
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="sound JSON, but not of this code .seeds wanted."):
        runs.load_json(tmp_path / "results.json", "seeds")


def test_lpips_weights(tmp_path, monkeypatch):
    """Damaged where they lie, or not fetched: two different lines."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/vgg16-397923af.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="vgg16-397923af.pth: damaged"):
        dmd.lpips_distance("cpu")


def test_a_download_that_was_stopped_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "USUAL", {"fashion-mnist": ("data",)})
    place = tmp_path / "data/FashionMNIST/raw"
    place.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(images, "_torchvision", lambda *a, **more: asked.append(more) or 1 / 0)
    (place / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 7]))
    with pytest.raises(UserError):
        images.splits(data.facts("fashion-mnist"), "", tmp_path)
    assert asked == [{"name": "fashion-mnist", "download": True}]


# ------------------------------------------------------ the boundary

@pytest.mark.parametrize("env, argv, words", [
    ({"WORLD_SIZE": "2"}, "", "RANK"), ({"WORLD_SIZE": ""}, "--students 9", "more than the dataset has"),
    ({"WORLD_SIZE": "two"}, "", "two")])
def test_environments(capsys, tmp_path, monkeypatch, env, argv, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        msd.main([*SMOKE, "--out", str(tmp_path / "o"), *argv.split()])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last


def test_a_terminal_without_the_ellipsis(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    command(lambda argv=None: print("a…b", flush=True))()
    assert raw.getvalue() == b"a?b\n"


@pytest.mark.slow
def test_an_old_python_is_told_so():
    code = "import sys; sys.version_info = (3, 9); import msd"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr == "error: Python 3.10 or newer is needed\n"


# ------------------------------------------------------------- images

def png(x, mode=None) -> bytes:
    out = io.BytesIO()
    Image.fromarray(x, mode).save(out, "png")
    return out.getvalue()


def zip_of(path: Path, files: dict, labels=None) -> Path:
    with zipfile.ZipFile(path, "w") as f:
        for name, content in files.items():
            f.writestr(name, content)
        if labels is not None:
            f.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


COLOUR = png(np.full((8, 8, 3), 7, np.uint8))
RAMP = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)


def test_one_reader_decides_what_an_image_is(tmp_path, capsys):
    """For training and for fid.py: hidden and a Mac's names are no data, links are followed, the rest is counted."""
    for i in range(10):
        save(tmp_path / f"in/n{i}/a.png", np.full((8, 8, 3), i, np.uint8))
    (tmp_path / "in/.hidden").mkdir()
    for name in (".hidden/a.png", "n0/._a.png", "__MACOSX/n0/a.png", "n3/b.webp"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_bytes(b"no image")
    (tmp_path / "in/n9").rename(tmp_path / "elsewhere")
    (tmp_path / "in/n9").symlink_to(tmp_path / "elsewhere")
    x, label = images._labelled(tmp_path / "in", "train", 10)
    assert label.tolist() == [*range(10)] and x[:, 0, 0, 0].tolist() == [*range(10)]
    assert torch.equal(images.read(tmp_path / "in"), x)
    assert "not read: 1 .webp" in capsys.readouterr().out


def test_16_bits_are_scaled_and_what_is_transparent_is_laid_on_white(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    clear = np.dstack([noise, np.zeros((8, 8), np.uint8)])
    path = zip_of(tmp_path / "a.zip", {"a.png": COLOUR, "b.png": png(RAMP), "c.png": png(clear), "d.png": COLOUR},
                  [["a.png", 0], ["b.png", 1], ["c.png", 2], ["d.png", 3]])
    x, label = images._labelled(path, "train", 4)
    assert x[1, 0].tolist() == x[1, 2].tolist() == (RAMP >> 8).tolist() and x[2].unique().tolist() == [255]
    assert "1 images are in part transparent, such as c.png" in capsys.readouterr().out
    assert images._labelled(zip_of(tmp_path / "g.zip", {"b.png": png(RAMP)}, [["b.png", 0]]), "train", 1)[0].shape[1] == 1


def method_9(path: Path) -> Path:
    """A zip whose entries say Deflate64, as Explorer's beyond 2 GB."""
    raw = bytearray(path.read_bytes())
    for sign, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        start = raw.find(sign)
        while start >= 0:
            raw[start + at] = 9
            start = raw.find(sign, start + 4)
    path.write_bytes(raw)
    return path


A = {"a.png": COLOUR}


@pytest.mark.parametrize("make, words", [
    (lambda p: zip_of(p, A, [["a.png", 0.7]]), "the label of a.png is 0.7"),
    (lambda p: zip_of(p, A, [["a.png", [0, 1]]]), r"the label of a.png is \[0, 1\]"),
    (lambda p: zip_of(p, {"d/a.png": COLOUR, "d/dataset.json": "{}"}), "at the top.*no item named"),
    (lambda p: zip_of(p, {"d\\a.png": COLOUR}, [["d/a.png", 0]]), "a.png"),
    (lambda p: method_9(zip_of(p, A, [["a.png", 0]])), "method 9"),
    (lambda p: zip_of(p, {"a.txt": "x"}), "no .png or .jpg in it, but {'.txt': 1}")])
def test_odd_zips(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        images._labelled(make(tmp_path / "a.zip"), "train", 2)
    assert images._labelled(zip_of(tmp_path / "b.zip", A, {"a.png": 0}), "train", 2)[1].tolist() == [0]  # keyed labels


@pytest.mark.parametrize("make, words", [
    (lambda p: os.mkfifo(p), ""), (lambda p: p.mkdir(), ""), (lambda p: p.symlink_to("/nowhere"), "No such file.*b.png"),
    (lambda p: save(p, np.zeros((4, 4, 3), np.uint8)), r"b.png: .*\[3, 8, 8\] as a.png")])
def test_odd_things_among_pictures(tmp_path, make, words):
    """A pipe hangs nobody, a folder is no picture; a link to nowhere and another size are named."""
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    make(tmp_path / "b.png")
    with pytest.raises((UserError, OSError), match=words) if words else contextlib.nullcontext():
        assert len(images.read(tmp_path)) == 1


def test_decoded_images_that_are_damaged_are_decoded_again(tmp_path):
    place, read = zip_of(tmp_path / "a.zip", A, [["a.png", 0]]), lambda: images._cached(reader, tmp_path / "c", place, "train")
    reader = lambda *_: images._labelled(place, "train", 1)
    x = read()[0].clone()
    for content in (b"", (tmp_path / "c-train.pt").read_bytes()[:-50]):
        (tmp_path / "c-train.pt").write_bytes(content)
        assert torch.equal(read()[0], x)


def test_damaged_results_are_set_aside(tmp_path):
    for content in ("{", '{"a": 1}'):
        (tmp_path / "results.json").write_text(content)
        assert evaluate.merged(tmp_path / "results.json", {"configs": {}, "seeds": 1, "samples": 1})["seeds"] == 1
    assert [p.read_text() for p in sorted(tmp_path.glob("*.previous*"))] == ["{", '{"a": 1}']


# ------------------------------------------------- one owner of a folder

def test_a_folder_in_use_is_waited_for_and_cleaned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("plot.draw", lambda *_: [])
    folder = tmp_path / "seed0/students2/dm"
    folder.mkdir(parents=True)
    left = [folder / "state.new.pt.host-77.tmp", tmp_path / "results.json.host-77.tmp", tmp_path / "seed0/reference/y.pt.host-1.tmp"]
    left[2].parent.mkdir()
    mine = tmp_path / "thesis.tmp"
    for path in (*left, mine):
        path.write_bytes(b"half")
    seen, held = [], threading.Event()

    def other():
        with filelock.FileLock(folder / ".lock"):
            held.set()
            while not (tmp_path / "seed0/teacher/ema.pt").exists():  # then comes the folder that is held
                time.sleep(0.1)
            time.sleep(1)
            seen.append(left[0].exists())
    threading.Thread(target=other).start()
    held.wait()
    assert msd.main([*SAVING, str(tmp_path)]) == 0
    assert seen == [True] and f"{folder}: waiting for another job" in capsys.readouterr().out
    assert [*tmp_path.rglob("*.tmp")] == [mine]


@pytest.mark.slow
def test_the_same_command_twice_at_once(tmp_path):
    """One trains, one waits and reuses: the same end as alone."""
    argv = [sys.executable, "msd.py", *SAVING[:-2], "1", "--out", str(tmp_path / "two")]
    both = [subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    texts = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert any("waiting" in out for out, _ in texts) and any("reused" in out for out, _ in texts)
    assert msd.main([*SAVING, str(tmp_path / "one")]) == 0
    assert same(weights(tmp_path / "two", K=2), weights(tmp_path / "one", K=2))


# ------------------------------------------------------ refused early

def test_a_full_disk_and_classes_without_images_are_seen_before_training(tmp_path, capsys, monkeypatch):
    f = parse(msd.Flags, msd.PRESETS, ["--dataset", "fashion-mnist", "--preset", "smoke"])
    with pytest.raises(UserError, match="images of a class: .* there are 1: 1"):
        teacher._at_hand(f, data.Images(torch.zeros(38, 1), torch.tensor([0, 0, 0, 0, 1, 1, *[*range(2, 10)] * 4])), common.Ranks(), True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("usage", (), {"free": 1000}))
    assert "checkpoints want" in refused(capsys, msd.main, [*SAVING, str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    f = parse(msd.Flags, msd.PRESETS, ["--out=~/x", "--data", "~/d"])
    assert (f.run.out, f.run.data) == (f"{tmp_path}/x", f"{tmp_path}/d")


def test_paced_keeps_to_what_is_faster(monkeypatch):
    """Two threads that cost ten times are tried on two steps in a hundred, and left."""
    clock, used, now = [0.0], [], [1]
    monkeypatch.setattr(runs, "THREADS", 2)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    for step in runs.paced(range(1000)):
        used.append(now[0])
        clock[0] += {1: 0.1, 2: 1.0 if step < 500 else 0.05}[now[0]]
    assert used[:4] == [2, 1, 2, 1] and used[:500].count(2) < 12 and used[500:].count(1) < 310


@pytest.mark.slow  # two threads, where there is no second core, take ten times as long
@pytest.mark.parametrize("module, line", [
    (msd, "--stages dm,adm"), (msd, "--stages tsm,dm --student-size XS"), (msd, "--method cd --cd-batch 256"),
    (o2mkd, "--merge")])
def test_threads_that_come_and_go_change_no_bit(module, line, tmp_path, monkeypatch):
    """Weights, chosen checkpoints and every measured number."""
    monkeypatch.setattr("plot.draw", lambda *_: [])
    more = ["--batch", "256", *(["--adm-batch", "256", "--eval-every", "3"] if module is msd else [])]
    monkeypatch.setattr(runs, "THREADS", 2)
    try:
        for out, even in (("a", 0), ("b", 1)):
            def alternating(steps, even=even):
                for step in steps:
                    torch.set_num_threads(1 + (step + even) % 2)
                    yield step
            monkeypatch.setattr(runs, "paced", alternating)
            assert module.main([*SMOKE, "--students", "2", *more, *line.split(), "--out", str(tmp_path / out)]) == 0
    finally:
        torch.set_num_threads(1)
    for path in (tmp_path / "a").rglob("*.pt"):
        if path.name in ("ema.pt", "best.pt"):
            one, other = (load_tensors(tmp_path / out / path.relative_to(tmp_path / "a"))["net"] for out in "ab")
            assert same(one, other), path
    for path in (tmp_path / "a").glob("results*.json"):
        one, other = (re.sub(r'"seconds": .*', "", (tmp_path / out / path.name).read_text()) for out in "ab")
        assert one == other


# --------------------------------------------------------------- fuzz

@pytest.mark.slow
def test_killed_twenty_times_at_random(tmp_path):
    """SIGKILL at random moments of a run through all stages; the same command again and again: bit-exact end, nothing
    half written left."""
    stages = [*SMOKE, "--students", "2", "--stages", "tsm,dm,adm", "--student-size", "XXS", "--save-every", "1", "--out"]
    assert msd.main([*stages, str(tmp_path / "whole")]) == 0
    rng, argv, kills = random.Random(0), [sys.executable, "msd.py", *stages, str(tmp_path / "killed")], 0
    for _ in range(20):
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(2.5, 7))  # importing takes 2
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and kills >= 5, (done.stderr, kills)
    for path in sorted((tmp_path / "whole").rglob("ema.pt")) + sorted((tmp_path / "whole").rglob("best.pt")):
        other = load_tensors(tmp_path / "killed" / path.relative_to(tmp_path / "whole"))
        assert same(load_tensors(path)["net"], other["net"]), path
    assert not list((tmp_path / "killed").rglob("*.tmp"))


COMMANDS = {
    "msd": (msd, msd.Flags, SMOKE), "o2mkd": (o2mkd, o2mkd.Flags, SMOKE), "sample": (sample, sample.Flags, []),
    "fid": (fid, fid.Flags, []), "reproduce": (reproduce, reproduce.Flags, ["--claim", "fig4"])}
HOSTILE = ["", "-1", "0", "nan", "1e309", "9" * 30, "/nowhere/x", "\N{PILE OF POO}\n"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_with_hostile_values(name, tmp_path, monkeypatch, capsys):
    """Exit 2 and one line, or it works; never a trace, nor an error that nobody foresaw."""
    module, cls, base = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plot.draw", lambda *_: [])
    seen = parse(cls, getattr(module, "PRESETS", {}), []).source
    for flag in seen:
        for value in HOSTILE:
            argv = [*base, f"{option(flag)}={value}", *(["--dry-run"] if "dry_run" in seen else [])]
            capsys.readouterr()
            try:
                module.main(argv)
            except SystemExit as end:
                err = capsys.readouterr().err.strip()
                assert end.code in (0, 2) and "Traceback" not in err and "MSD_DEBUG" not in err, (argv, err)
                assert end.code == 0 or err.splitlines()[-1].startswith("error: "), (argv, err)


FAULTS = {
    "missing": lambda p: p.unlink(), "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) * 2 // 3]),
    "flipped": lambda p: p.write_bytes(bytes(b ^ (255 * (i == len(p.read_bytes()) // 2)) for i, b in enumerate(p.read_bytes()))),
    "a folder": lambda p: (p.unlink(), p.mkdir()), "nowhere": lambda p: (p.unlink(), p.symlink_to("gone"))}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A finished smoke run of one student."""
    return finished(tmp_path_factory.mktemp("single") / "run", "--students", "1")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_that_a_command_reads(fault, single, tmp_path, monkeypatch, capsys):
    """One line that names the file, or it works; no other file is touched by a command that is refused."""
    monkeypatch.setattr("plot.draw", lambda *_: [])
    again, run = [*SMOKE, "--students", "1", "--out"], single
    for path in sorted(run.rglob("*")):
        if path.suffix not in (".pt", ".json", ".csv"):
            continue
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        hit = copy / path.relative_to(run)
        FAULTS[fault](hit)
        before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
        capsys.readouterr()
        try:
            assert msd.main([*again, str(copy)]) == 0
        except SystemExit as end:
            err = capsys.readouterr().err.strip()
            last = err.splitlines()[-1]
            assert end.code == 2 and last.startswith("error: ") and "MSD_DEBUG" not in last, (hit, err)
            assert hit.name in last or hit.parent.name in last, (hit, last)
            kept = {p: p.stat().st_mtime_ns for p in before if p.exists()}
            changed = {p for p in before if kept.get(p) != before[p] and p.name != "samples.pt"}  # those are made anew
            assert changed <= {hit}, hit
