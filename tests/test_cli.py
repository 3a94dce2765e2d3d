"""Command lines as a careless user types them: one line, exit code 2, nothing lost. What the documents print."""
import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import data
import dmd
import msd
import o2mkd
import sample
from conftest import ROOT, SMALL, options, refused, same, trained
from run import load_tensors
from students import whole
from test_house import TREES
from test_msd import AGAIN, weights
from test_ranks import launch

SMOKE = ["--preset", "smoke"]


# ------------------------------------------------------------ mistakes

@pytest.mark.parametrize("argv, words", [
    ("--device warp", "--device warp"), ("--teacher nowhere.pt", "nowhere.pt"), ("--teacher {tmp}/evil.pt", "evil.pt"),
    ("--teacher {run}/students1/dm/best.pt", "student"), ("--teacher {tmp}/other.pt", "or not a checkpoint of this code"),
    ("--out {tmp}/other.pt/run", "other.pt"), ("--init {tmp}/other.pt", "other.pt"), ("--init some-where", "some-where"),
    ("--init dm-lost", "students1-lost"), ("--init {run}/students3/dm/best.pt", "--init"), ("--stages post", "best.pt")])
def test_mistakes_of_files(capsys, run, tmp_path, argv, words):
    """What is there is not what it should be; a file's code never runs."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    torch.save({"net": Evil()}, tmp_path / "evil.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    line = f"--teacher {{run}}/teacher/ema.pt --out {{tmp}}/o {argv}".format(run=run / "seed0", tmp=tmp_path)
    assert words in refused(capsys, msd.main, [*SMOKE, *line.split()])
    assert not (tmp_path / "ran").exists()


def test_a_folder_made_with_other_flags_is_refused(capsys, run):
    for more, words in (("--lr 0.5", "lr (0.01 there, 0.5 now)"), ("--teacher-steps 61", "(60 there, 61 now)")):
        assert words in refused(capsys, msd.main, [*AGAIN, "--out", str(run), *more.split()])


@pytest.mark.parametrize("name, content", [
    ("seed0/students3/dm/best.pt", "no checkpoint"), ("seed0/teacher/ema.pt", "no checkpoint"),
    ("seed0/students3/dm/config.json", "null")])
def test_damaged_files_of_a_finished_run(capsys, run, tmp_path, name, content):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert name in refused(capsys, msd.main, [*AGAIN, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("argv, words", [
    ("--run nowhere", "nowhere"), ("--students 5", "of students there are"), ("--seeds a-b", "a-b"),
    ("--seeds 5-1", "--seeds 5-1"), ("--seeds 0-999999999999", "10 million")])
def test_bad_sampling(capsys, run, tmp_path, argv, words):
    base = ["--run", str(run), "--students", "3", "--out", str(tmp_path / "s")]
    assert words in refused(capsys, sample.main, [*base, *argv.split()])


# ------------------------------------------------- interrupted, resumed

SAVING = [*SMOKE, "--students", "2", "--save-every", "3", "--out"]


def test_truncated_checkpoint_falls_back_to_the_one_before(capsys, tmp_path, undrawn):
    assert msd.main([*SAVING, str(tmp_path)]) == 0
    folder, whole = tmp_path / "seed0" / "students2" / "dm", weights(tmp_path, K=2)
    (folder / "ema.pt").unlink()
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:1000])
    assert msd.main([*SAVING, str(tmp_path)]) == 0
    assert "damaged" in capsys.readouterr().err and (folder / "state.pt.damaged").exists()
    assert same(whole, weights(tmp_path, K=2))


def test_non_finite_loss_names_step_student_and_checkpoint(capsys, tmp_path, monkeypatch, undrawn):
    count, original = iter(range(10 ** 6)), dmd.dm_gradient

    def poisoned(x, *rest):
        grad = original(x, *rest)
        if next(count) == 4:
            grad[2] = float("nan")
        return grad
    monkeypatch.setattr(dmd, "dm_gradient", poisoned)
    line = refused(capsys, msd.main, [*SAVING, str(tmp_path)])
    assert "not finite at step 8" in line and "student 1 of 2" in line and "step 6" in line
    monkeypatch.setattr(dmd, "dm_gradient", original)
    assert msd.main([*SAVING, str(tmp_path)]) == 0  # nothing lost: the same command goes on


def test_full_disk(capsys, tmp_path, monkeypatch, undrawn):
    original, calls = torch.save, []

    def full(value, path, *rest):
        calls.extend([path] if "students2" in str(path) else [])
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(value, path, *rest)
    monkeypatch.setattr(torch, "save", full)
    line = refused(capsys, msd.main, [*SAVING, str(tmp_path)])
    assert "No space left" in line and "intact" in line
    assert load_tensors(tmp_path / "seed0/students2/dm/state.pt")["step"] == 6
    monkeypatch.setattr(torch, "save", original)
    assert msd.main([*SAVING, str(tmp_path)]) == 0


# ------------------------------------------ what the documents print

def printed() -> list[str]:
    """Every command line of README.md, docs/commands.md and EXERCISES.md, indented, in backticks, or after &&."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/commands.md", "EXERCISES.md"))
    start = r"((?:\.venv/bin/)?python [a-z0-9_/]+\.py|torchrun (?:--[a-z-]+ \S+ )+[a-z0-9_/]+\.py)"
    found = re.findall(rf"(?:^    |`|&& ){start}([^\n#`]*)", text, re.M)
    return sorted({" ".join("".join(line).removeprefix(".venv/bin/").split()) for line in found})


def words_of(line: str) -> tuple[str, list[str]]:
    """The script and its arguments."""
    words = shlex.split(line)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    return words[at], words[at + 1:]


def command(script: str, *argv: str) -> None:
    """python SCRIPT ARGV, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, (script, argv)


TRAIN = [f"{name}.py" for name in ("msd", "o2mkd", "edm", "dmd", "tsm", "adm", "consistency")]


def test_printed_lines_are_legal(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, argv in map(words_of, printed()):
        if script == "msd.py":  # most lines: what is counted of a network once is not counted again
            assert msd.main([*argv, "--dry-run"]) == 0
        elif script in [*TRAIN, "reproduce.py"]:
            command(script, *argv, "--dry-run")
    assert len(printed()) > 60 and not list(tmp_path.iterdir())


def to_run():
    """Lines that do not only print, or need data that are not here. With --run-slow all, else the first of a kind."""
    known = set()
    for line in sorted(printed(), key=lambda line: ("fashion" in line, line)):
        script, argv = words_of(line)
        if not any(word in line for word in ("--dry-run", "imagenet64", "cifar10", "--unet", "--all", "--claim")):
            marks = [mark for mark in ("--stages", "--compare", "--o2mkd", "--list") if mark in argv]
            kind = "a stage alone" if script in TRAIN[2:] else script, "fashion" in line and script not in TRAIN, *marks
            yield pytest.param(line, marks=pytest.mark.slow if kind in known or line.startswith("torchrun") else ())
            known.add(kind)


@pytest.mark.parametrize("line", [*to_run()])
def test_commands_that_are_printed(line, run, image_run, small, tiny, tmp_path, monkeypatch):
    """At smoke size, where smoke runs have been made: of images, after all stages, or after DM."""
    script, argv = words_of(line)
    fashion, staged = "fashion-mnist" in line, any(w in argv for w in ("--stages", "--compare", "--student-size"))
    home, noise = "runs/fashion-mnist" if fashion else "runs/toy", "--o2mkd" in argv
    shutil.copytree(image_run if fashion and "--compare" not in argv else small if staged else run, tmp_path / home)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    mine, K = ["--dataset", "fashion-mnist", "--data", str(tiny)] * fashion, ["--students", "4" if noise else "3"]
    if noise or script == "o2mkd.py" and "--init" in argv:  # students to sample, or to start from
        o2mkd.main([*SMOKE, "--students", "4" if noise else "1", "--out", home, *mine])
    if script == "fid.py":
        sample.main(["--run", home, *K, "--seeds", "0-19"])
    if script in TRAIN:
        for name in ("--steps", "--reg-warmup", "--pairs", "--tsm-steps", "--seed", "--seeds", "--save-every"):
            if name in argv:
                del argv[argv.index(name):argv.index(name) + 2]
        argv += [*SMOKE, *mine, *(K if script == "msd.py" and "quadrant" not in argv else [])]
        argv += ["--out", home if "--init" in argv or staged or script == "adm.py" else "runs/new"]
        argv += SMALL[SMALL.index("--save-every"):] * staged + ["--student-size", "XXS"] * ("--student-size" in argv)
    elif "--compare" in argv:
        argv = [home, "--compare", "none", "XXS/dm"]
    else:
        argv = [w.replace("students5", "students3").replace("students8", "students3") for w in argv]
        K = [] if "docs/data/fashion" in line else K
        argv += {"sample.py": [*K, "--seeds", "0-9"], "tests/benchmark.py": ["--quick"]}.get(script, [])
    if line.startswith("torchrun"):
        assert all(code == 0 for code, _ in launch(tmp_path / "words", msd.main, *argv))
    else:
        command(script, *argv)


def test_the_two_commands_and_all_links():
    """Of README.md and docs/: files exist, and headings that are linked to."""
    text = (ROOT / "README.md").read_text()
    for end in ("msd.py --dataset toy --students 8", "-m pytest"):
        assert f"python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python {end}" in text
    assert (ROOT / ".ci" / "run").read_text().count("-m pytest") == 1
    for page in (ROOT / "README.md", ROOT / "EXERCISES.md", *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {path}#{anchor}"


def test_equation_index_both_ways():
    """Every [Paper Eq. n] of a function's docstring stands in docs/equations.md with that function, and the reverse."""
    tagged, listed, number = set(), set(), r"(?:Eq\.|Alg\.) \d+"
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                tags = re.findall(rf"\[(MSD|EDM|O2MKD) ((?:{number}(?:, )?)+)", ast.get_docstring(node) or "")
                for paper, numbers in tags:
                    tagged |= {(f"{paper} {n}", f"{name}.py::{node.name}") for n in re.findall(number, numbers)}
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    index = (ROOT / "docs/equations.md").read_text()
    for tag, places, checks in re.findall(r"^\| ((?:MSD|EDM|O2MKD) [^|]+?) \| ([^|]+) \| ([^|]+) \|", index, re.M):
        listed |= {(tag, place) for place in re.findall(r"`([a-z0-9_]+\.py::\w+)`", places)}
        for test in re.findall(r"`(test_\w+)`", checks):
            assert f"def {test}(" in tests, test
    assert tagged == listed, f"only in code: {tagged - listed}; only in the index: {listed - tagged}"


# ---------------------------------------------------------- exercises

def test_exercises_name_functions_and_tests_that_exist():
    text = (ROOT / "EXERCISES.md").read_text()
    blanks = re.findall(r"^\*\*Blank\*\*: `(\w+)\.(\w+)`", text, re.M)
    judges = re.findall(r"^\*\*Judge\*\*: `python -m pytest (tests/\w+\.py) -k \"?([\w ]+?)\"?`", text, re.M)
    assert len(blanks) == len(judges) >= 3
    for (module, function), (path, names) in zip(blanks, judges):
        assert hasattr(sys.modules[module], function)
        tests = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M)
        assert all(any(name in test for test in tests) for name in names.split(" or ")), names


@pytest.mark.parametrize("bug", "abc")
def test_silent_bugs_are_patches_of_today(tmp_path, monkeypatch, bug):
    """exercises/bug-*.patch apply to dmd.py, change what it trains, and can be taken back.

    After a change of dmd.py: plant the bug by hand, `git diff -U1 dmd.py > exercises/bug-a.patch`, take it out again."""
    patch, copy, bugged = ROOT / f"exercises/bug-{bug}.patch", tmp_path / "dmd.py", type(dmd)("bugged")
    shutil.copy(ROOT / "dmd.py", copy)
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    monkeypatch.setitem(sys.modules, "bugged", bugged)
    exec(compile(copy.read_text(), "bugged.py", "exec"), vars(bugged))
    subprocess.run(["git", "apply", "-R", patch], cwd=tmp_path, check=True)
    assert copy.read_bytes() == (ROOT / "dmd.py").read_bytes()
    students, shares = [common.Student(0, 1, 0, tuple(range(8)))], [whole(data.facts("toy"), pairs=24)]
    flags = options("--steps 8 --reg-warmup 4")
    clean, wrong = (trained(stage, students, flags, tmp_path / name, shares=shares)["ema.pt"].state_dict()
                    for name, stage in (("clean", dmd), ("wrong", bugged)))
    assert not same(clean, wrong)


@pytest.mark.parametrize("name", TREES)
def test_public_names_have_docstrings(name):
    for node in TREES[name].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.py: {node.name}"
