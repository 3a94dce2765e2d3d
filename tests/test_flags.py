"""Command lines: flag beats preset beats default; what is refused, one line each; every conflict has its command."""
import dataclasses
import json

import pytest

import flags
import msd
import o2mkd
from conftest import options, refused
from flags import Bins, UserError, check, command, flag, parse, typed


@dataclasses.dataclass
class Inner:
    """An inner heading"""
    prefix = "in_"
    steps: int = flag(7, "updates", low=1)
    lr: float = flag(0.1, "a rate of 10 %", low=0, below=1)
    named: str = flag("x", "without the prefix", name="named", record=False)


@dataclasses.dataclass
class Outer:
    """An outer heading"""
    prefix = ""
    inner: Inner
    dataset: str = flag("toy", "data")
    preset: str = flag("default", "a line of the table")
    student_size: str = flag("", "a size")
    P_mean: float = flag(-1.0, "a symbol")
    bins: Bins = flag(Bins(0, 450), "two bins")
    many: list[int] = flag([8], "numbers", low=1)
    words: tuple[str, ...] = flag(("a",), "words", choices=("a", "b", "c"))
    tag: str = flag("", "a name", pattern=r"[\w.-]{0,5}")
    yes: bool = flag(False, "a switch")


PRESETS = {"run": {("toy", "default"): {}, ("toy", "smoke"): {}, ("other", "smoke"): dict(like="toy")},
           "inner": {("toy", "smoke"): dict(steps=3, lr=0.5), ("toy", "smoke", "S"): dict(steps=4),
                     ("other", "smoke"): dict(lr=0.6)},
           "": {("toy", "smoke"): dict(bins=(1, 2))}}


def test_flag_beats_preset_beats_default():
    f = parse(Outer, PRESETS, [])
    assert (f.inner.steps, f.inner.lr, f.bins, f.many, f.yes) == (7, 0.1, Bins(0, 450), [8], False)
    f = parse(Outer, PRESETS, ["--preset", "smoke", "--in-steps", "5"])
    assert (f.inner.steps, f.inner.lr, f.bins) == (5, 0.5, Bins(1, 2)) and isinstance(f.bins, Bins)
    sources = {"in_steps": "flag", "in_lr": "preset smoke", "many": "default", "preset": "flag", "bins": "preset smoke"}
    assert f.source.items() >= sources.items()
    f = parse(Outer, PRESETS, ["--dataset", "other", "--preset", "smoke", "--student-size", "S"])
    assert (f.inner.steps, f.inner.lr, f.bins) == (4, 0.6, Bins(1, 2))  # of the size, its own, of the data it is like
    assert parse(Outer, PRESETS, []).many is not parse(Outer, PRESETS, []).many


def test_every_kind_of_value():
    line = "--bins 0 999 --many 1 2 3 --words b,c --P_mean -2.5 --yes --named y --tag a.b-c"
    f = parse(Outer, PRESETS, line.split())
    assert f.bins == (0, 999) and f.many == [1, 2, 3] and f.words == ("b", "c") and f.P_mean == -2.5 and f.yes
    assert f.inner.named == "y" and f.tag == "a.b-c" and not parse(Outer, PRESETS, ["--no-yes"]).yes
    assert flags.values(f.inner) == {"in_steps": 7, "in_lr": 0.1}  # what determines a result, as config.json calls it
    assert flags.values(f.inner, "named") == {"named": "y"}
    assert flags.settings(f, "inner", {"width": "bins.high"}) == {"in_steps": 7, "in_lr": 0.1, "width": 999}


@pytest.mark.parametrize("line, words", [
    ("--in-step 5", "did you mean --in-steps?"), ("--in-st 5", "--in-st"), ("--preset smook", "did you mean smoke?"),
    ("--words a,d", "d: no such choice"), ("--in-steps 0", "--in-steps 0: must be"),
    ("--in-steps many", "int"), ("--in-lr 1", "below 1"), ("--in-lr nan", "--in-lr nan"), ("--in-lr inf", "--in-lr inf"),
    (f"--in-steps {'9' * 20}", "--in-steps 999"), ("--many 2 0", "--many 0"), ("--many", "--many"),
    ("--bins 5", "--bins"), ("--bins 9 5", "--bins 9 5"), ("--bins 0 1000", "0 to 999"), ("--tag ../x", "../x"),
    ("--tag abcdef", "abcdef")])
def test_what_is_refused(line, words):
    with pytest.raises(UserError) as error:
        parse(Outer, PRESETS, line.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_commands_end_in_one_line(capsys, tmp_path):
    """What the user can mend, whoever says it; what is our own mistake keeps its trace."""
    def main(error):
        @command
        def fails(argv=None):
            if callable(error):
                return error()
            raise error
        return fails
    assert refused(capsys, main(UserError("so it is")), []) == "error: so it is"
    for wrong, words in ((lambda: open(tmp_path / "nowhere"), "nowhere"), (lambda: json.loads("[1"), "damaged"),
                         (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--micro-batch"),
                         (lambda: check(options(), [(lambda f: True, "--seed {f.run.seed}: no")]), "--seed 0: no")):
        assert words in refused(capsys, main(wrong), [])
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())()
    with pytest.raises(SystemExit) as end:
        main(KeyboardInterrupt())()
    assert end.value.code == 130 and "last checkpoint" in capsys.readouterr().err
    assert main(lambda: 0)() == 0


# -------------------------------------------------- the two big commands

FASHION = "--dataset fashion-mnist"
TEACHER = ["--cfg 2", f"--teacher exact {FASHION}", "--eval-samples 15"]
CONFLICTS = {
    msd: ["--students 9", "--method cd --stages adm", "--student 0", "--student-size XS", "--init dm --stages tsm",
          "--dm-weight 0 --reg-weight 0", "--fake-bins 0 100", "--reg-warmup 3000", "--distance lpips",
          f"{FASHION} --select-samples 19", *TEACHER],
    o2mkd: ["--ranges 3", "--kd attention --cfg 2 --label-dropout 0.1", "--inspect 0 --ranges 2", *TEACHER],
}


@pytest.mark.parametrize("module", CONFLICTS, ids=lambda module: module.__name__)
def test_every_conflict_has_a_command(capsys, tmp_path, module):
    """Line by line: the table of conflicts, and a command that the line ends, before anything is made."""
    assert len(CONFLICTS[module]) == len(module.CONFLICTS)
    for line, (_, text) in zip(CONFLICTS[module], module.CONFLICTS):
        argv = [*line.split(), "--out", str(tmp_path / "x")]
        said = refused(capsys, module.main, argv)
        assert said == "error: " + text.format(f=parse(module.Flags, module.PRESETS, argv)), line
        assert not text.endswith(".") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line, words", [
    (f"{FASHION} --student 1 --students 1", "--student 1"), ("--student-size XS --init teacher", "do not fit"),
    ("--student-size XS --method cd", "do not fit"), ("--stages adm --dm-weight 0 --gan-weight 0", "nothing is left"),
    (f"{FASHION} --pairs 19", "--pairs"), ("--bins 0 999", "--fake-bins"), ("--stages adm,dm", "--stages adm,dm"),
    ("--beta1 1", "--beta1 1"), ("--critic-weight 0", "--critic-weight 0"), ("--label-dropout 1", "--label-dropout 1"),
    ("--sampler-steps 1", "--sampler-steps 1"), ("--cfg 0", "--cfg 0"), ("--preset papre", "did you mean paper?")])
def test_bad_flags(capsys, line, words):
    """The other halves of conflicts, and bounds without which a number would be silently wrong."""
    assert words in refused(capsys, msd.main, line.split())


def test_stages_of_a_run():
    for line, order in (("", "dm"), ("--stages dm,adm", "dm,adm"), ("--stages tsm,dm,adm", "tsm,dm,adm"),
                        ("--method cd", "cd"), ("--stages cd", "cd"), ("--stages post", "post")):
        assert ",".join(options(line).order()) == order


def test_help_has_a_heading_for_each_group(capsys):
    with pytest.raises(SystemExit) as end:
        msd.main(["--help"])
    text = capsys.readouterr().out
    parts = [msd.Flags, *(f.type for f in dataclasses.fields(msd.Flags) if dataclasses.is_dataclass(f.type))]
    assert end.value.code == 0 and all(part.__doc__.splitlines()[0] + ":\n" in text for part in parts)
    names = [typed(part, f) for part in parts for f in dataclasses.fields(part) if f.metadata]
    assert len(names) == len(set(names)) and all(flags.option(name) in text for name in names)
    assert len(names) <= 80, len(names)
