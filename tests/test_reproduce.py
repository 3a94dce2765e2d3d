"""Claims: verdicts computed from numbers, both ways; a table that names only what is there; killed, it goes on."""
import json
import re

import pytest

import dmd
import flags
import msd
import reproduce
from claims import AFTER, CLAIMS, FEWER, RUNS, Entry
from conftest import ROOT, refused
from reproduce import judge

GOOD, BAD, NEAR = [0.20, 0.21, 0.19, 0.22, 0.20], [0.30, 0.31, 0.29, 0.31, 0.30], [0.21, 0.20, 0.19, 0.22, 0.205]
NUMBERS = {"good": GOOD, "bad": BAD, "near": NEAR, "one": GOOD[:1], "one worse": BAD[:1]}


@pytest.mark.parametrize("comparisons, verdict", [
    (["good below bad"], "holds"),
    (["bad below good"], "does not hold: the reverse does"),
    (["good below near"], "does not hold: not told apart"),
    (["bad above good"], "holds"),                                  # where more is better
    (["good above bad"], "does not hold: the reverse does"),
    (["good below bad", "good below near"], "holds in 1 of 2 comparisons"),
    (["good below bad", "bad below good"], "holds in 1 of 2 comparisons, the reverse in 1"),
    (["good below near", "bad below good"], "does not hold: the reverse does in 1 of 2 comparisons"),
    (["one below one worse"], "measured: as claimed"),              # one seed decides nothing
    (["one worse below one"], "measured: not as claimed"),
    (["one below one worse", "one above one worse"], "measured: in part as claimed"),
])
def test_verdict_both_ways(comparisons, verdict):
    assert judge(comparisons, NUMBERS)[0] == verdict


def test_a_comparison_takes_the_seeds_that_both_have():
    assert judge(["short below bad"], {"short": GOOD[:3], "bad": BAD})[1]["short below bad"]["n"] == 3


@pytest.mark.parametrize("side, expected", [
    ("a", [1.0, 2.0]), ("1.1 x a", [1.1, 2.2]), ("a / b", [2.0, 4.0]), ("1 x 128", [7.0]), ("2 x 1 x 128", [14.0]),
    ("XS, K = 1 / XS, K = 8", [3.0]), ("absent", []), ("1.1 x absent", []), ("a / absent", [])])
def test_sides_of_a_comparison(side, expected):
    numbers = {"a": [1.0, 2.0], "b": [0.5, 0.5], "1 x 128": [7.0], "XS, K = 1": [3.0], "XS, K = 8": [1.0]}
    assert reproduce.values(side, numbers) == expected


def test_claims_name_rows_and_runs_that_exist():
    """Comparisons are of the claim's own entries, entries of rows that runs leave; all runs are used, in order."""
    assert set(reproduce.needed(list(CLAIMS.values()))) == set(RUNS)
    jobs = {name: reproduce.job(name, reproduce.Flags()) for name in RUNS}
    for c in CLAIMS.values():
        numbers = {e.name: [1.0] for e in c.entries}
        assert len(numbers) == len(c.entries), c.id
        for comparison in c.comparisons:
            assert all(reproduce.values(side, numbers) for side in reproduce.sides(comparison)), comparison
        for e in c.entries:
            stages = jobs[e.run].flags.order() if jobs[e.run].module is msd else ("o2mkd",)
            assert e.K in (0, *jobs[e.run].flags.students) and (e.stage in stages or e.stage not in msd.ONE_STEP), e
        runs = reproduce.needed([c])
        for name in runs:
            assert all(runs.index(before) < runs.index(name) for before in AFTER.get(name, ()))


@pytest.mark.parametrize("size", ["", "quick", "smoke"])
def test_every_run_is_a_legal_command(size):
    for name in RUNS:
        job = reproduce.job(name, reproduce.Flags(**({size: True} if size else {})))
        flags.check(job.flags, job.module.CONFLICTS)
        full_length = "fashion" in name or not size
        assert job.flags.run.seeds == (1 if size or "fashion" in name else FEWER.get(name, 5))
        assert job.flags.teacher.steps < 6000 or full_length


def test_quick_is_a_fifth():
    """… of what the run says itself, or its preset; but the pairs that a claim compares stay."""
    few, long = (reproduce.job(name, reproduce.Flags(quick=True)).flags.dm for name in ("pairs1000", "batch32-long"))
    assert (few.steps, few.reg_warmup, few.pairs) == (500, 80, 1000)
    assert (long.steps, long.reg_warmup, long.fake_warmup, long.batch) == (2400, 800, 320, 32)


def test_results_md_says_what_judge_finds_in_results_json():
    """Every comparison in RESULTS.md that is still claimed: difference, error, n and verdict, from the kept seeds."""
    kept, sections, seen = json.loads((ROOT / "docs/data/RESULTS.json").read_text()), {}, 0
    for part in (ROOT / "RESULTS.md").read_text().split("\n## ")[1:]:
        sections[part.split(":")[0]] = part
    for c in CLAIMS.values():
        rows = {e.name: kept[c.id].get(e.name) or [] for e in c.entries}
        numbers = {name: [row[c.metric] for row in of_seed] for name, of_seed in rows.items()}
        for comparison in c.comparisons:
            written = re.search(rf"^\| {re.escape(comparison)} \| (.*) \|$", sections[c.id], re.M)
            if written:
                v = judge([comparison], numbers)[1][comparison]
                error = "" if v["error"] is None else f" ± {v['error']:.4f}"
                assert written[1] == f"{v['mean']:.4f}{error} | {v['n']} | {v['verdict']}", (c.id, comparison)
                seen += 1
    assert seen > 80


def test_training_cost_counts_what_a_loop_asks():
    """One update of DM: G twice with backward (KL, regression), mu_teacher and mu_fake once a draw, mu_fake trained."""
    job = reproduce.job("dm", reproduce.Flags())
    job.flags.dm.steps, job.flags.dm.reg_warmup, job.flags.dm.fake_warmup = 1, 0, 0
    facts = msd.facts_of(job.flags)
    evaluation = reproduce.evaluate.multiply_adds(reproduce.edm.Precond(facts.net(1)), facts)
    matrices = [p for name, p in facts.net(1).named_parameters() if p.shape[1] > 1 and name != "table"]
    assert evaluation == sum(p.numel() for p in matrices)           # every weight once a sample
    f = job.flags.dm
    asked = 3 + 3 + f.draws + f.draws + 3
    job.flags.dm.batch = 10 ** 12 // evaluation
    tflop = float(reproduce.training_cost(Entry("", "dm", "dm", 2), job)[1])
    assert abs(tflop - 2 * 2 * asked) < 0.01


@pytest.mark.parametrize("argv, words", [
    (["--claim", "reg,fig44"], ["--claim fig44", "did you mean fig4?"]),
    ([], ["one of --claim NAME, --all"]),
    (["--all", "--claim", "fig4"], ["one of --claim NAME, --all"]),
    (["--claim", "fig4-images", "--quick"], ["the toy only"]),
])
def test_refused(capsys, argv, words):
    line = refused(capsys, reproduce.main, argv)
    assert all(word in line for word in words)


def test_list_and_dry_run(capsys, tmp_path):
    reproduce.main(["--list", "--out", str(tmp_path / "q")])
    text = capsys.readouterr().out
    assert all(f"  {id} " in text for id in CLAIMS)
    reproduce.main(["--claim", "reg", "--smoke", "--dry-run", "--out", str(tmp_path / "q")])
    text = capsys.readouterr().out
    assert "4 of 4 runs" in text and "python msd.py --students 2 --reg-weight 0 --ttur 5" in text
    assert not list(tmp_path.iterdir())


def test_a_killed_claim_goes_on_without_repeating_finished_runs(tmp_path, monkeypatch, capsys):
    """--smoke, one claim of each paper, to the end: table, every claim's section and figure, every seed as JSON."""
    started, step = [], dmd.kl_gradient

    def watched(name, main):
        def started_main(argv):
            started.append(name)
            return main(argv)
        return started_main

    def killed(*args):
        if next(count) == 3:
            raise KeyboardInterrupt                                 # in the midst of its training
        return step(*args)
    count = iter(range(1000))
    monkeypatch.setattr(msd, "main", watched("dm", msd.main))
    monkeypatch.setattr(reproduce.o2mkd, "main", watched("o2mkd", reproduce.o2mkd.main))
    monkeypatch.setattr(dmd, "kl_gradient", killed)
    (tmp_path / "docs/data").mkdir(parents=True)
    argv = ["--claim", "diversity,o2-cost", "--quick", "--smoke", "--out", str(tmp_path / "q"),
            "--results", str(tmp_path / "R.md"), "--figures", str(tmp_path / "figures")]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    assert stop.value.code == 130 and started == ["dm"]
    reproduce.main(argv)
    assert started == ["dm", "dm", "o2mkd"]
    reproduce.main(argv)
    assert started == ["dm", "dm", "o2mkd"]                         # all there: only judged and drawn again
    text, kept = (tmp_path / "R.md").read_text(), json.loads((tmp_path / "docs/data/R.json").read_text())
    for id in ("fig4", "diversity", "o2-cost"):                     # fig4 needs no other run than diversity
        assert f"| {id} |" in text and f"\n## {id}: " in text and f"](figures/claim-{id}.png)" in text
        assert (tmp_path / f"figures/claim-{id}.png").exists() and all(kept[id].values())
    assert "not measured" not in text and "| split |" not in text

    path = tmp_path / "q/results.json"
    path.write_text(path.read_text().replace('"seeds": [\n  0\n ]', '"seeds": [\n  1\n ]'))       # of someone's own run
    reproduce.main([*argv, "--dry-run"])
    assert "1 of 2 runs to do" in capsys.readouterr().out
    reproduce.main(["--table", *argv[2:]])                          # every claim, also those without a run
    text = (tmp_path / "R.md").read_text()
    assert all(f"| {id} |" in text for id in CLAIMS) and "measured: as claimed" in text
    assert text.count("| not measured | | not measured |") > 20
