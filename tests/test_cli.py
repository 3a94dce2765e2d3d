"""Command lines as a careless user types them: one line, exit code 2, nothing lost. And the house's own rules."""
import ast
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import adm
import benchmark
import common
import consistency
import dmd
import edm
import fid
import msd
import o2mkd
import plot
import reproduce
import sample
import tsm
from conftest import refused
from test_ranks import launch

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ["--preset", "smoke", "--quiet"]
ORDER = ["common", "toy_mog", "unet", "plot", "fid", "data", "snapshot", "edm", "dmd", "tsm", "adm", "consistency", "msd", "o2mkd",
         "sample", "reproduce"]


@pytest.mark.parametrize("argv, words", [
    (["--students", "0"], ["--students 0", "1 to 8"]),
    (["--students", "16"], ["--students 16", "1 to 8"]),
    (["--students", "many"], ["--students", "int"]),
    (["--preset", "papre"], ["papre", "did you mean paper?"]),
    (["--dataset", "toi"], ["toi", "did you mean toy?"]),
    (["--steqs", "5"], ["--steqs", "--steps"]),
    (["--fake", "kdee"], ["did you mean kde?"]),
    (["--device", "warp"], ["--device warp"]),
    (["--teacher", "nowhere.pt", "--preset", "smoke"], ["nowhere.pt", "no such file"]),
    (["--partition", "consecutif"], ["did you mean consecutive?"]),
    (["--steps", "0"], ["--steps 0"]),
    (["--batch", "-3"], ["--batch -3"]),
    (["--bins", "5"], ["--bins"]),
    (["--bins", "400", "20"], ["--bins"]),
    (["--reg-weight", "0", "--dm-weight", "0"], ["--reg-weight"]),
    (["--lr", "nan"], ["--lr"]),
    (["--sampler-steps", "1"], ["--sampler-steps"]),
])
def test_bad_flags(capsys, tmp_path, argv, words):
    line = refused(capsys, msd.main, [*argv, "--out", str(tmp_path / "x"), "--quiet"])
    for word in words:
        assert word in line
    assert not list(tmp_path.rglob("*.pt"))


def test_uneven_students_are_allowed_and_printed(capsys):
    msd.main(["--students", "3", "--dry-run"])
    assert "sizes 3, 3, 2" in capsys.readouterr().out


def test_dry_run_prints_every_value_and_source_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert msd.main(["--preset", "paper", "--students", "1", "8", "--batch", "64", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"--lr +1e-07 +preset paper", text) and re.search(r"--batch +64 +flag", text)
    assert re.search(r"--steps +200000 +preset paper", text) and re.search(r"--teacher-steps +100000 +preset paper", text)
    assert re.search(r"--bins +0 749 +preset paper", text) and re.search(r"--pairs +1000 ", text)
    assert re.search(r"--weight-decay +0.01 +default", text)
    assert "parameters:" in text and "one stack of 8 students" in text and "memory of a student's rank" in text
    assert not list(tmp_path.iterdir())


def test_a_folder_made_with_other_flags_is_refused(capsys, run):
    line = refused(capsys, msd.main, [*SMOKE, "--students", "3", "--seeds", "2", "--out", str(run), "--lr", "0.5"])
    assert "lr (0.01 there, 0.5 now)" in line and "--out" in line
    line = refused(capsys, msd.main, [*SMOKE, "--students", "3", "--out", str(run), "--teacher-steps", "61"])
    assert "teacher_steps (60 there, 61 now)" in line


def test_truncated_checkpoint_falls_back_to_the_one_before(capsys, tmp_path):
    argv = [*SMOKE, "--students", "2", "--steps", "40", "--save-every", "10", "--out", str(tmp_path)]
    assert msd.main(argv) == 0
    folder = tmp_path / "seed0" / "students2" / "dm"
    whole = common.load_tensors(folder / "ema.pt")["net"]
    (folder / "ema.pt").unlink()
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert msd.main(argv) == 0
    assert "damaged" in capsys.readouterr().err
    again = common.load_tensors(folder / "ema.pt")["net"]
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("name", ["best.pt", "ema.pt"])
def test_unreadable_results_of_a_finished_run(capsys, run, tmp_path, name):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    broken = out / "seed0" / ("students3/dm" if name == "best.pt" else "teacher") / name
    broken.write_bytes(b"not a checkpoint")
    argv = [*SMOKE, "--students", "1", "3", "--seeds", "2", "--out", str(out)]
    assert str(broken) in refused(capsys, msd.main, argv)


def test_checkpoints_never_run_code(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))
    torch.save({"net": Evil()}, tmp_path / "evil.pt")
    assert "evil.pt" in refused(capsys, msd.main, [*SMOKE, "--teacher", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "ran").exists()


def test_foreign_checkpoint_as_teacher(capsys, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert "not a teacher" in refused(capsys, msd.main, [*SMOKE, "--teacher", str(tmp_path / "other.pt"), "--out", str(tmp_path)])


def test_non_finite_loss_names_step_student_and_checkpoint(capsys, tmp_path, monkeypatch):
    count = iter(range(10 ** 6))
    original = dmd.dm_gradient

    def poisoned(x, *rest):
        grad = original(x, *rest)
        if next(count) == 25:
            grad[1] = float("nan")
        return grad
    monkeypatch.setattr(dmd, "dm_gradient", poisoned)
    argv = [*SMOKE, "--students", "3", "--steps", "60", "--reg-warmup", "4", "--save-every", "10", "--out", str(tmp_path)]
    line = refused(capsys, msd.main, argv)
    assert "not finite at step 29" in line and "student 1 of 3" in line and "step 20" in line
    monkeypatch.setattr(dmd, "dm_gradient", original)
    assert msd.main(argv) == 0                                      # nothing lost: the same command goes on


def test_no_write_permission(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, msd.main, [*SMOKE, "--out", str(tmp_path / "file" / "run")])
    assert "cannot write" in line and "--out" in line


def test_full_disk(capsys, tmp_path, monkeypatch):
    argv = [*SMOKE, "--students", "2", "--steps", "40", "--save-every", "10", "--out", str(tmp_path)]
    original, calls = torch.save, []

    def full(obj, path, *rest):
        calls.append(path)
        if "students2" in str(path) and len([c for c in calls if "students2" in str(c)]) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(obj, path, *rest)
    monkeypatch.setattr(torch, "save", full)
    line = refused(capsys, msd.main, argv)
    assert "No space left" in line and "intact" in line
    assert common.load_tensors(tmp_path / "seed0/students2/dm/state.pt")["step"] == 20
    monkeypatch.setattr(torch, "save", original)
    assert msd.main(argv) == 0


@pytest.mark.parametrize("argv, words", [
    (["--run", "nowhere"], ["nowhere", "train one"]),
    (["--students", "5"], ["--students 5", "students3"]),
    (["--classes", "9", "--students", "3"], ["--classes 9", "0 to 7"]),
    (["--seeds", "a-b"], ["--seeds a-b"]),
    (["--seeds", "5-1"], ["--seeds 5-1"]),
    (["--seeds", "0-999999999999", "--students", "3"], ["at most 10 million"]),
    (["--seeds", "18446744073709551616"], ["below 2^63"]),
    (["--tag", "../x", "--students", "3"], ["--tag ../x"]),
    (["--steps", "1", "--students", "3"], ["--steps 1"]),
    (["--threads", "-1"], ["--threads -1"]),
])
def test_bad_sampling(capsys, run, tmp_path, argv, words):
    base = [] if "--run" in argv else ["--run", str(run)]
    line = refused(capsys, sample.main, [*base, *argv, "--timing", "0", "--out", str(tmp_path / "s")])
    assert all(w in line for w in words)


@pytest.mark.parametrize("name, text", [("results.json", "{}"), ("results.json", "[1"), ("seed0/students3/dm/config.json", "null")])
def test_damaged_json(capsys, run, tmp_path, name, text):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    (out / name).write_text(text)
    line = refused(capsys, msd.main, [*SMOKE, "--students", "1", "3", "--seeds", "2", "--out", str(out)])
    assert name in line and "damaged" in line
    if name == "results.json":
        assert name in refused(capsys, plot.main, [str(out)])


def test_a_student_is_no_teacher(capsys, run, tmp_path):
    path = run / "seed0" / "students1" / "dm" / "best.pt"
    assert "not a teacher" in refused(capsys, msd.main, [*SMOKE, "--teacher", str(path), "--out", str(tmp_path)])


def test_against_is_checked_before_training(capsys, tmp_path):
    assert "--against nothing" in refused(capsys, msd.main, [*SMOKE, "--against", "nothing", "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("*.pt"))


def test_plot_without_a_run(capsys, tmp_path):
    assert "msd.py" in refused(capsys, plot.main, [str(tmp_path)])
    assert "usage" in refused(capsys, plot.main, [])


# ------------------------------------------------------------------------------------------------------------ the house

def modules():
    return sorted(p.stem for p in ROOT.glob("*.py"))


def test_import_order():
    """A file imports only files above it in DESIGN's table; only plot.py imports matplotlib."""
    assert set(modules()) <= set(ORDER)
    for name in modules():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        for other in imported & set(ORDER):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
        assert name == "plot" or "matplotlib" not in imported


def test_equation_index_both_ways():
    """Every [Paper Eq. n] tag in a function's docstring stands in README's index with that function, and the reverse."""
    tagged = set()
    for name in modules():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for paper, numbers in re.findall(r"\[(MSD|EDM|O2MKD) ((?:(?:Eq\.|Alg\.) \d+(?:, )?)+)(?:first line)?\]", ast.get_docstring(node) or ""):
                    tagged |= {(f"{paper} {n}", f"{name}.py::{node.name}") for n in re.findall(r"(?:Eq\.|Alg\.) \d+", numbers)}
    text = (ROOT / "README.md").read_text()
    section = text.split("## Equation index")[1].split("\n## ")[0]
    listed = set()
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    for row in re.findall(r"^\| ((?:MSD|EDM|O2MKD) [^|]+?) \| ([^|]+) \| ([^|]+) \|", section, re.M):
        for place in re.findall(r"`([a-z0-9_]+\.py::\w+)`", row[1]):
            listed.add((row[0], place))
        for test in re.findall(r"`(?:tests/\w+\.py::)?(test_\w+)`", row[2]):
            assert f"def {test}(" in tests, test
    assert tagged == listed, f"only in code: {tagged - listed}; only in README: {listed - tagged}"


def readme_commands():
    text = (ROOT / "README.md").read_text() + (ROOT / "EXERCISES.md").read_text()
    start = r"((?:\.venv/bin/)?python [a-z0-9_/]+\.py|torchrun (?:--[a-z-]+ \S+ )+[a-z0-9_/]+\.py)"
    lines = ["".join(m) for m in re.findall(rf"(?:^    |`){start}([^\n#`]*)", text, re.M)]
    lines += ["".join(m) for m in re.findall(rf"&& {start}([^\n#`]*)", text)]
    return sorted({" ".join(line.split()) for line in lines})


def long(line: str) -> bool:
    """Run with --run-slow only: two ranks, the variants of the tables, claims, planted bugs, the images' second and third command, and what other tests run too."""
    return ("reproduce.py --" in line and "--list" not in line or line.startswith("torchrun") and "imagenet64" not in line
            or any(w in line for w in ("runs/st", "runs/sweep", "runs/sign", "runs/reproduce", "--seeds 5", "--students 8 --out runs/toy", "--bug", "--tag dmd2", "--tag filter",
                                       "--tag short", "--tag reg", "--tag fork", "1 2 4 8 --method cd", "--preset paper", "benchmark.py --", "--students 4 --partition kmeans", "--partition quadrant"))
            and "--cfg" not in line
            or "o2mkd.py" in line and any(w in line for w in ("--curve", "--init", "--ranges", "--scheme", "--p ", "--dataset fashion-mnist"))
            or "fashion-mnist" in line and ("--against" in line or "--stages" in line))


@pytest.mark.parametrize("line", [pytest.param(line, marks=pytest.mark.slow) if long(line) else line
                                  for line in readme_commands()])
def test_commands_that_readme_prints(line, run, image_run, small, tiny, tmp_path, monkeypatch):
    """Each in process, at smoke size, in a folder that already holds smoke runs at runs/toy, runs/fashion-mnist and runs/small.

    Lines of imagenet64 and cifar10 need data that are not here: as --dry-run. torchrun lines: two ranks."""
    if "--dry-run" not in line:
        shutil.copytree(image_run if "fashion-mnist" in line else run, tmp_path / "runs" / ("fashion-mnist" if "fashion-mnist" in line else "toy"))
    if "--stages" in line or "--compare" in line or "--student-size" in line:
        shutil.copytree(small, tmp_path / "runs" / "small")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.split("&&")[-1])
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    script, argv, ranks = Path(words[at]).stem, words[at + 1:], words[0] == "torchrun"
    if script == "plot" and "--compare" in argv:
        argv = ["runs/small", "--compare", "none", "XXS/dm"]
    if script == "plot":
        plot.main(argv)
        return
    if script == "reproduce":
        full = ["--dry-run"] if "--all" in argv and "--quick" not in argv else []               # once is enough
        return reproduce.main([*argv, "--smoke", "--quiet", *full] if "--list" not in argv else argv)
    if script == "sample":
        if "--o2mkd" in argv:
            o2mkd.main([*SMOKE, "--students", "4", "--out", "runs/toy"])
        sample.main([*[w if w not in ("8", "5") else "3" for w in argv], "--timing", "64" if "runs/toy" in argv else "0", "--steps", "8"])
        return
    if script == "fid":
        sample.main(["--run", "runs/fashion-mnist", "--students", "3", "--seeds", "0-19", "--timing", "0"])
        return fid.main([w.replace("students5", "students3") for w in argv])
    if script == "benchmark":
        argv = [w for w in argv if not w.startswith("--unet") and "edm" not in w]               # that one needs a checkout
        return benchmark.main([*argv, "--quick"])
    module = {"msd": msd, "dmd": dmd, "edm": edm, "tsm": tsm, "adm": adm, "consistency": consistency, "o2mkd": o2mkd}[script]
    dry = [*argv, *([] if "--dry-run" in argv else ["--dry-run"])]
    assert not module.main(dry)                                     # the line as printed is a legal one
    if "imagenet64" in argv or "cifar10" in argv:
        return
    if "--dry-run" in argv and "fashion-mnist" in argv:
        return
    argv = [w for w in argv if not w.startswith("--dry-run")]
    if script == "o2mkd" and "--init" in argv:                      # its start: one student for all levels
        o2mkd.main([*SMOKE, "--students", "1", "--out", "runs/fresh", *(["--dataset", "fashion-mnist", "--data", str(tiny)] if "fashion-mnist" in argv else [])])
        argv += ["--out", "runs/fresh"]
    if "fashion-mnist" not in argv and ("--stages" in argv or "--student-size" in argv or script == "adm"):    # goes on from what is there
        for heavy in ("--seeds", "--steps", "--reg-warmup", "--tsm-steps", "--adm-steps", "--out", "--against"):
            if heavy in argv:
                del argv[argv.index(heavy):argv.index(heavy) + 2]
        if script == "adm":
            module.main([*SMOKE, "--out", "runs/toy"])
            return
        if "--students" in argv:
            at = argv.index("--students") + 1
            while at < len(argv) and argv[at].isdigit():
                del argv[at]
            argv.insert(at, "3")
        values = ["XXS" if w in ("XS", "S", "B") else "dm" if w == "dm-warm" else w for w in argv]
        sizes = [] if script == "tsm" else ["--adm-steps", "8", "--post-steps", "8"]
        assert not module.main([*values, *SMOKE, *sizes, "--tsm-steps", "12", "--out", "runs/small"])
        return
    if "--preset" in argv:
        argv[argv.index("--preset") + 1] = "smoke"
    for heavy in ("--steps", "--reg-warmup", "--pairs", "--target-l1", "--against", "--resolution", "--batch", "--teacher-steps", "--micro-batch"):
        if heavy in argv:                                           # belongs to the full run
            del argv[argv.index(heavy):argv.index(heavy) + 2]
    if "--seeds" in argv:
        argv[argv.index("--seeds") + 1] = "2"
    argv = argv + (["--out", "runs/fashion-mnist" if "--init" in argv else "runs/fresh"] if "--out" not in argv else []) + (["--preset", "smoke"] if "--preset" not in argv else [])
    argv += ["--quiet"] + (["--data", str(tiny)] if "fashion-mnist" in argv else [])
    if ranks:
        assert all(code == 0 for code, _ in launch(2, *argv))
    else:
        assert not module.main(argv)


def test_readme_has_the_two_commands_and_existing_files():
    text = (ROOT / "README.md").read_text()
    for end in ("msd.py --dataset toy --students 8", "-m pytest"):
        assert f"python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python {end}" in text
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    assert (ROOT / ".ci" / "run").read_text().count("-m pytest") == 1


@pytest.mark.parametrize("name", ["toy_mog", "unet", "snapshot", "fid", "edm", "dmd", "tsm", "adm", "consistency", "msd", "sample", "plot", "data",
                                  "common", "reproduce", "o2mkd"])
def test_public_names_have_docstrings(name):
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name in ("Flags",), f"{name}.py: {node.name}"


def test_exercises_name_functions_and_tests_that_exist():
    text = (ROOT / "EXERCISES.md").read_text()
    blanks = re.findall(r"^\*\*Blank\*\*: `(\w+)\.(\w+)`", text, re.M)
    judges = re.findall(r"^\*\*Judge\*\*: `python -m pytest (tests/\w+\.py) -k \"?([\w ]+?)\"?`", text, re.M)
    assert len(blanks) == len(judges) >= 3
    for (module, function), (path, words) in zip(blanks, judges):
        assert hasattr(sys.modules[module], function)
        assert any(w in (ROOT / path).read_text() for w in words.split(" or "))
