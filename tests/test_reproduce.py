"""Claims: verdicts computed from numbers, both ways; a table that names only what is there; killed, it goes on."""
import json

import pytest

import dmd
import flags
import msd
import o2mkd
import reproduce
from claims import AFTER, CLAIMS, RUNS, comparisons
from conftest import ROOT, refused
from evaluate import STAGES
from reproduce import judge, values

GOOD, BAD, NEAR = [0.20, 0.21, 0.19, 0.22, 0.20], [0.30, 0.31, 0.29, 0.31, 0.30], [0.21, 0.20, 0.19, 0.22, 0.205]
NUMBERS = {"good": GOOD, "bad": BAD, "near": NEAR, "short": GOOD[:3], "one": GOOD[:1], "one worse": BAD[:1]}
JOBS = {name: reproduce.job(name, reproduce.Flags()) for name in RUNS}


def typed(job):
    """The values of a run's flags, checked."""
    f = flags.parse(job.module.Flags, job.module.PRESETS, job.argv)
    flags.check(f, job.module.CONFLICTS)
    return f


@pytest.mark.parametrize("text, verdict", [
    ("good below bad", "holds"),
    ("bad below good", "does not hold: the reverse does"),
    ("good below near", "does not hold: not told apart"),
    ("bad above good", "holds"),  # where more is better
    ("good above bad", "does not hold: the reverse does"),
    ("good & near below bad", "holds"),
    ("short below bad", "holds"),  # of the seeds that both have
    ("good below bad & near", "holds in 1 of 2 comparisons"),
    ("good below bad; bad below good", "holds in 1 of 2 comparisons, the reverse in 1"),
    ("bad & good below near", "does not hold: the reverse does in 1 of 2 comparisons"),
    ("one below one worse", "measured: as claimed"),  # one seed decides nothing
    ("one worse below one", "measured: not as claimed"),
    ("one below one worse; one above one worse", "measured: in part as claimed"),
])
def test_verdict_both_ways(text, verdict):
    found = {}
    for part in text.split("; "):
        found |= comparisons(part)
    assert judge(found, NUMBERS)[0] == verdict


@pytest.mark.parametrize("side, expected", [
    ("a", [1.0, 2.0]), ("1.1 x a", [1.1, 2.2]), ("a / b", [2.0, 4.0]), ("1 x 128", [7.0]), ("2 x 1 x 128", [14.0]),
    ("XS, K = 1 / XS, K = 8", [3.0]), ("absent", []), ("1.1 x absent", []), ("a / absent", [])])
def test_sides_of_a_comparison(side, expected):
    numbers = {"a": [1.0, 2.0], "b": [0.5, 0.5], "1 x 128": [7.0], "XS, K = 1": [3.0], "XS, K = 8": [1.0]}
    assert values(side, numbers) == expected


def test_claims_name_rows_and_runs_that_exist():
    """Comparisons are of the claim's own entries, entries of rows that runs leave; all runs are used, in order."""
    assert len(CLAIMS) == 33 and set(reproduce.needed(list(CLAIMS.values()))) == set(RUNS)
    for c in CLAIMS.values():
        numbers = {e.name: [1.0] for e in c.entries}
        assert len(numbers) == len(c.entries) and c.comparisons, c.id
        for comparison, sides in c.comparisons.items():
            assert all(values(side, numbers) for side in sides), comparison
        for e in c.entries:
            f = typed(JOBS[e.run])
            stages = ["o2mkd"] if JOBS[e.run].module is o2mkd else [stage.NAME for stage, _ in msd.stages_of(f)]
            assert e.K in (0, *f.students) and (e.stage in stages or e.stage not in STAGES), e
        runs = reproduce.needed([c])
        assert all(runs.index(AFTER[name]) < runs.index(name) for name in runs if name in AFTER)


def test_equal_compute_is_equal_compute():
    """Claim compute: K x batch x updates, of them without KL term, and mu_fake's head start; nets are the same."""
    costs = []
    for e in CLAIMS["compute"].entries:
        f, units = typed(JOBS[e.run]).dm, 4 if "4 units" in e.name else 1
        costs.append([e.K * f.batch * n / units for n in (f.steps, f.reg_warmup, f.fake_warmup)])
    assert len(costs) == 5 and all(cost == costs[0] for cost in costs)


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_is_a_legal_command(quick):
    """--quick: a fifth of what the run says, or its preset; but the pairs that a claim compares stay."""
    f = {name: typed(reproduce.job(name, reproduce.Flags(quick=quick))) for name in RUNS}
    fewer = {"fashion": 1, "o2-fashion": 1, "cd": 2, "S": 3, "XS": 3, "XXS": 3, "prompts-random": 3}
    assert all(f[name].run.seeds == (1 if quick else fewer.get(name, 5)) for name in (*fewer, "dm", "o2", "XS-post"))
    few, long, d = f["pairs1000"].dm, f["batch32-long"].dm, 5 if quick else 1
    assert (few.steps, few.reg_warmup, few.pairs) == (2500 // d, 400 // d, 1000)
    assert (long.steps, long.reg_warmup, long.fake_warmup, long.batch) == (12000 // d, 4000 // d, 1600 // d, 32)


def test_results_md_says_what_judge_finds_in_results_json():
    """Every comparison: difference, error, n and verdict, from the kept seeds; and the verdict of every claim."""
    kept, seen = json.loads((ROOT / "docs/data/RESULTS.json").read_text()), 0
    sections = {part.split(":")[0]: part for part in (ROOT / "RESULTS.md").read_text().split("\n## ")[1:]}
    for c in CLAIMS.values():
        numbers = {e.name: [row[c.metric] for row in kept[c.id][e.name] or []] for e in c.entries}
        there = {text: ab for text, ab in c.comparisons.items() if f"\n| {text} | " in sections[c.id]}
        assert there == {text: ab for text, ab in c.comparisons.items() if all(values(name, numbers) for name in ab)}
        verdict, found = judge(there, numbers) if there else ("", {})
        assert f"**{verdict}" in sections[c.id] or not there, c.id
        for text, v in found.items():
            error = "" if v["error"] is None else f" ± {v['error']:.4f}"
            assert f"\n| {text} | {v['mean']:.4f}{error} | {v['n']} | {v['verdict']} |\n" in sections[c.id]
        seen += len(found)
    assert seen > 80


def test_list_dry_run_and_an_unknown_claim(capsys, tmp_path):
    line = refused(capsys, reproduce.main, ["--claim", "reg,fig44"])
    assert "--claim fig44" in line and "did you mean fig4?" in line
    reproduce.main(["--list"])
    text = capsys.readouterr().out
    assert all(f"  {id} " in text for id in CLAIMS)
    reproduce.main(["--claim", "reg", "--dry-run", "--out", str(tmp_path / "q")])
    text = capsys.readouterr().out
    assert "4 of 4 runs" in text and "python msd.py --students 2 --reg-weight 0 --ttur 5" in text
    assert not list(tmp_path.iterdir())


def test_a_killed_claim_goes_on_without_repeating_finished_runs(tmp_path, monkeypatch, capsys):
    """One claim of each paper, to the end: table, sections and figures, every seed as JSON; the others not measured."""
    started, step, count = [], dmd.kl_gradient, iter(range(1000))

    def killed(*args):
        if next(count) == 3:
            raise KeyboardInterrupt  # in the midst of its training
        return step(*args)

    monkeypatch.setattr(dmd, "kl_gradient", killed)
    for module, name in ((msd, "dm"), (o2mkd, "o2")):
        main = module.main
        monkeypatch.setattr(module, "main", lambda argv, name=name, main=main: (started.append(name), main(argv)))
        monkeypatch.setitem(RUNS, name, f"{RUNS[name]} --preset smoke --seeds 1")
    argv = ["--claim", "diversity,o2-cost", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    assert stop.value.code == 130 and started == ["dm"]
    reproduce.main(argv)
    assert started == ["dm", "dm", "o2"]
    text, kept = (tmp_path / "RESULTS.md").read_text(), json.loads((tmp_path / "docs/data/RESULTS.json").read_text())
    for id in ("fig4", "diversity", "o2-cost"):  # fig4 needs no other run than diversity
        assert f"\n## {id}: " in text and f"](docs/claims/claim-{id}.png)" in text
        assert (tmp_path / f"docs/claims/claim-{id}.png").exists() and all(kept[id].values())
    assert "measured: as claimed" in text and text.count("| not measured | | not measured |") > 20

    monkeypatch.setitem(RUNS, "dm", "1 2 4 8 --preset smoke --seeds 2")  # these seeds are not there
    capsys.readouterr()
    reproduce.main([*argv, "--dry-run"])
    assert "1 of 2 runs to do" in capsys.readouterr().out
