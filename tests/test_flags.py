"""Command lines: flag beats preset beats default; what is refused, one line each; every conflict has its command."""
import dataclasses
import os

import pytest

import flags
import msd
import o2mkd
from conftest import refused
from flags import Bins, UserError, check, command, parse, typed


def parsed(line: str, module=msd):
    return parse(module.Flags, module.PRESETS, line.split())


def test_flag_beats_preset_beats_default():
    f = parsed("--preset smoke --steps 5")
    assert (f.dm.steps, f.dm.pairs, f.dm.lr, f.adm.lr, f.students) == (5, 64, 1e-2, 5e-4, [1, 8])
    assert f.source.items() >= {"steps": "flag", "pairs": "preset smoke", "adm_lr": "default"}.items()
    lines = flags.describe(f).splitlines()
    assert any(line.split()[:4] == ["--pairs", "64", "preset", "smoke"] for line in lines)
    assert len(lines) == len(f.source)
    f = parsed("--dataset toy-prompts --preset paper")  # like the toy, and with values of its own
    assert (f.dm.lr, f.teacher.label_dropout, f.run.out) == (1e-7, 0.1, "runs/toy-prompts")
    f = parsed("--dataset imagenet64 --student-size XS --adm-batch 7")  # of a size
    assert (f.dm.batch, f.adm.lr, f.adm.batch, f.teacher.which) == (224, 2e-6, 7, "edm-imagenet-64x64-cond-adm.pkl")
    assert parsed("").students is not parsed("").students


def test_every_kind_of_value():
    f = parsed("--bins 20 450 --students 1 2 8 --P_mean -1.5 --filter-pairs --no-tsm-common --teacher exact")
    assert f.dm.bins == Bins(20, 450) and f.dm.fake_bins == Bins(0, 470) and f.students == [1, 2, 8]
    assert f.teacher.P_mean == -1.5 and f.dm.filter_pairs and not f.tsm.common and f.teacher.which == "exact"
    named = flags.values(f.adm)  # what determines a result, as config.json calls it
    assert {"adm_steps", "adm_lr", "gan_weight", "gan_bins"} <= named.keys() and named["adm_steps"] == f.adm.steps
    assert "teacher" not in flags.values(f.teacher) and flags.values(f.dm, "pairs") == {"pairs": 1000}
    assert flags.settings(f, "adm", {"adm_fake_warmup": "dm.fake_warmup"}) == {**named, "adm_fake_warmup": 400}


@pytest.mark.parametrize("line, words", [
    ("--steqs 5", "did you mean --steps?"), ("--step 5", "--step"), ("--preset papre", "did you mean paper?"),
    ("--dataset toi", "did you mean toy?"), ("--stages adm,dm", "--stages adm,dm"), ("--steps 0", "--steps 0: must be"),
    ("--steps many", "int"), ("--ema 1", "below 1"), ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"),
    (f"--seed {'9' * 20}", "--seed 999"), ("--students 2 0", "--students 0"), ("--students", "--students"),
    ("--bins 5", "--bins"), ("--bins 9 5", "--bins 9 5"), ("--bins 0 1000", "0 to 999"), ("--tag ../x", "--tag ../x"),
    ("--tag " + "x" * 81, "--tag x"), ("--beta1 1", "--beta1 1"), ("--critic-weight 0", "--critic-weight 0"),
    ("--label-dropout 1", "--label-dropout 1"), ("--sampler-steps 1", "--sampler-steps 1"), ("--cfg 0", "--cfg 0")])
def test_what_is_refused(line, words):
    """By kind; and bounds without which a number would be silently wrong."""
    with pytest.raises(UserError) as error:
        parsed(line)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_commands_end_in_one_line(capsys, tmp_path, monkeypatch):
    """What the user can mend, whoever says it; what is our own mistake keeps its trace."""
    def main(error):
        @command
        def fails(argv=None):
            if callable(error):
                return error()
            raise error
        return fails
    assert refused(capsys, main(UserError("so it is")), []) == "error: so it is"
    for wrong, words in ((lambda: open(tmp_path / "nowhere"), "nowhere"), (lambda: os.stat(""), "No such file"),
                         (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--micro-batch"),
                         (lambda: check(parsed(""), [(lambda f: True, "--seed {f.run.seed}: no")]), "--seed 0: no")):
        assert words in refused(capsys, main(wrong), [])
    for debug in ("", "1"):
        monkeypatch.setenv("MSD_DEBUG", debug)
        with pytest.raises(SystemExit, match="2"):
            main(ZeroDivisionError("no"))()
        err = capsys.readouterr().err
        assert "error: ZeroDivisionError: no (MSD_DEBUG=1 shows where)" in err and ("Traceback" in err) == bool(debug)
    with pytest.raises(SystemExit) as end:
        main(KeyboardInterrupt())()
    assert end.value.code == 130 and "last checkpoint" in capsys.readouterr().err
    assert main(lambda: 0)() == 0


# -------------------------------------------------- the two big commands

FASHION = "--dataset fashion-mnist"
UNCOND = "--dataset cifar10-uncond"
TEACHER = ["--cfg 2", f"--teacher exact {FASHION}", "--eval-samples 15", UNCOND]
CONFLICTS = {
    msd: ["--init nowhere", "--students 9", "--method cd --stages adm", "--student 0", "--student-size XS", "--init dm --stages tsm",
          "--dm-weight 0 --reg-weight 0", "--reg-warmup 3000", "--stages cd --conditioning-sigma 5", "--S_noise 1.003", "--anneal 301", "--dataset toy-prompts --partition quadrant",
          f"{UNCOND} --partition random", "--distance lpips",
          f"{FASHION} --select-samples 19", *TEACHER],
    o2mkd: ["--kd attention --cfg 2 --label-dropout 0.1", *TEACHER],
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
    (f"{FASHION} --pairs 19", "--pairs")])
def test_the_other_halves_of_conflicts(line, words):
    with pytest.raises(UserError, match=words):
        check(parsed(line), msd.CONFLICTS)


def test_stages_of_a_run():
    for line, order in (("", "dm"), ("--stages dm,adm", "dm,adm"), ("--stages tsm,dm,adm", "tsm,dm,adm"),
                        ("--method cd", "cd"), ("--stages cd", "cd"), ("--stages post", "post")):
        assert ",".join(parsed(line).order()) == order


def test_help_has_a_heading_for_each_group(capsys):
    with pytest.raises(SystemExit) as end:
        msd.main(["--help"])
    text = capsys.readouterr().out
    parts = [msd.Flags, *(f.type for f in dataclasses.fields(msd.Flags) if dataclasses.is_dataclass(f.type))]
    assert end.value.code == 0 and all(part.__doc__.splitlines()[0] + ":\n" in text for part in parts)
    names = [typed(part, f) for part in parts for f in dataclasses.fields(part) if f.metadata]
    assert len(names) == len(set(names)) and all(flags.option(name) in text for name in names)


def test_flags_are_few():
    assert len(parsed("").source) <= 88  # 80 were wished for; the paper, a preset or a README line needs each of these
