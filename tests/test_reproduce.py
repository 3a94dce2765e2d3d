"""Claims: verdicts computed from numbers, both ways; rows and runs that exist; killed, it goes on."""
import json

import pytest

import cost
import dmd
import flags
import msd
import reproduce
from reproduce import AFTER, CLAIMS, RUNS, comparisons
from conftest import ROOT, refused
from evaluate import STAGES
from reproduce import judge, values

GOOD, BAD, NEAR = [0.20, 0.21, 0.19, 0.22, 0.20], [0.30, 0.31, 0.29, 0.31, 0.30], [0.21, 0.20, 0.19, 0.22, 0.205]
NUMBERS = {"good": GOOD, "bad": BAD, "near": NEAR, "short": GOOD[:3], "one": [0.2], "worse": [0.3]}
JOBS = {name: reproduce.job(name, reproduce.Flags()) for name in RUNS}


def typed(job):
    """The flags of a run, checked."""
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
    ("short below bad", "holds"),  # by seeds of both
    ("good below bad & near", "holds in 1 of 2 comparisons"),
    ("good below bad; bad below good", "holds in 1 of 2 comparisons, the reverse in 1"),
    ("bad & good below near", "does not hold: the reverse does in 1 of 2 comparisons"),
    ("one below worse", "measured: as claimed"),  # one seed decides nothing
    ("worse below one", "measured: not as claimed"),
    ("one below worse; one above worse", "measured: in part as claimed"),
])
def test_verdict_both_ways(text, verdict):
    found = {}
    for part in text.split("; "):
        found |= comparisons(part)
    assert judge(found, NUMBERS)[0] == verdict


@pytest.mark.parametrize("side, expected", [
    ("a", [1.0, 2.0]), ("1.1 x a", [1.1, 2.2]), ("a / b", [2.0, 4.0]), ("1 x 128", [7.0]), ("2 x 1 x 128", [14.0]),
    ("absent", []), ("a / absent", [])])
def test_sides_of_a_comparison(side, expected):
    assert values(side, {"a": [1.0, 2.0], "b": [0.5, 0.5], "1 x 128": [7.0]}) == expected


def test_claims_name_rows_and_runs_that_exist():
    """Comparisons are of the claim's entries, entries of rows that runs leave; all runs are used, in order."""
    assert len(CLAIMS) == 41 and set(reproduce.needed(list(CLAIMS.values()))) == set(RUNS)
    for c in CLAIMS.values():
        numbers = {e.name: [1.0] for e in c.entries}
        assert len(numbers) == len(c.entries) and c.comparisons, c.id
        assert all(values(side, numbers) for sides in c.comparisons.values() for side in sides), c.id
        for e in c.entries:
            f = typed(JOBS[e.run])
            stages = ["o2mkd"] if e.run.startswith("o2") else [stage.NAME for stage, _ in msd.stages_of(f)]
            assert e.K in (0, *f.students) and (e.stage in stages or e.stage not in STAGES), e
        runs = reproduce.needed([c])
        assert all(runs.index(AFTER[name]) < runs.index(name) for name in runs if name in AFTER)


def test_equal_compute(monkeypatch):
    """K x batch x updates of nets of one size."""
    costs = set()
    for e in CLAIMS["fig4-compute"].entries:
        f = typed(JOBS[e.run])
        costs.add((f.student_size, e.K * f.dm.batch * f.dm.steps))
    assert len(costs) == 2
    f = {name: typed(JOBS[f"fashion-{name}"]) for name in ("tsm", "free")}
    monkeypatch.chdir(ROOT)
    rows = [cost.bill(of, [stage for stage, _ in msd.stages_of(of)]) for of in f.values()]
    tsm, free = (sum(n for what, n in of if what.endswith("networks")) for of in rows)
    assert abs(free / tsm - 1) < 0.001


def test_every_run_is_a_legal_command():
    f = {name: typed(JOBS[name]) for name in RUNS}
    seeds = [f[name].run.seeds for name in ("dm", "o2", "XS", "cd", "fashion-two")]
    assert seeds == [5, 5, 5, 5, 1]
    assert all(of_run.run.seed == 1 for of_run in f.values())  # seed 0 is for tuning
    many, long = f["pairs64000"].dm, f["long"].dm
    assert (many.steps, many.fake_warmup, many.pairs) == (2500, 400, 64_000)
    assert (long.steps, long.fake_warmup, long.pairs) == (20_000, 400, 1000)


def test_results_md_says_what_judge_finds():
    """The verdict of every claim; difference, error, n and verdict of its comparisons, from the kept seeds."""
    kept, seen = json.loads((ROOT / "docs/data/RESULTS.json").read_text()), 0
    assert kept.keys() <= {f"{name}: {RUNS[name]}" for name in RUNS}  # none of a command that is no more
    jobs = {name: j._replace(rows=kept.get(f"{name}: {RUNS[name]}", {})) for name, j in JOBS.items()}
    sections = {part.split(":")[0]: part for part in (ROOT / "RESULTS.md").read_text().split("\n## ")[1:]}
    for c in CLAIMS.values():
        numbers = {e.name: [row[c.metric] for row in reproduce.per_seed(e, jobs)] for e in c.entries}
        there = {text: ab for text, ab in c.comparisons.items() if all(values(side, numbers) for side in ab)}
        verdict, found = judge(there, numbers) if there else ("", {})
        assert not there or f"**{verdict}" in sections[c.id], c.id
        for text, v in found.items():
            error, p = ("", "") if v["error"] is None else (f" ± {v['error']:.4f}", f"{v['p']:.2g}")
            assert f"\n| {text} | {v['mean']:.4f}{error} | {v['n']} | {p} | {v['verdict']} |\n" in sections[c.id]
        seen += len(found)
    assert seen > 30


def test_list_and_an_unknown_claim(capsys):
    reproduce.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*CLAIMS]
    assert "did you mean fig4?" in refused(capsys, reproduce.main, ["--claim", "reg,fig44"])


def test_a_killed_claim_goes_on(tmp_path, monkeypatch, capsys, undrawn):
    """One claim of each paper; fig4 needs another run, diversity does not."""
    step, count = dmd.kl_gradient, iter(range(1000))

    def killed(*args):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(*args)

    def printed(*argv):
        capsys.readouterr()
        reproduce.main(["--claim", "diversity,o2-cost", "--out", str(tmp_path), *argv])
        return capsys.readouterr().out

    reproduce.save_json(tmp_path / "none/data/RESULTS.json", {})
    monkeypatch.setattr(reproduce, "DOCS", tmp_path / "none")
    monkeypatch.setattr(dmd, "kl_gradient", killed)
    monkeypatch.setattr(reproduce, "CLAIMS", {id: CLAIMS[id] for id in ("fig4", "split", "diversity", "o2-cost")})
    for name in ("dm", "o2"):
        monkeypatch.setitem(RUNS, name, "1 2 4 8 --preset smoke --seeds 1")
    text = printed("--dry-run")
    assert "2 of 2 runs" in text and "python o2mkd.py --students 1 2 4 8" in text and not (tmp_path / "seed1").exists()
    with pytest.raises(SystemExit, match="130"):
        printed()
    assert "2 of 2 runs" in printed() and "0 of 2 runs" in printed("--dry-run")
    text, kept = (tmp_path / "RESULTS.md").read_text(), json.loads((tmp_path / "docs/data/RESULTS.json").read_text())
    for id in ("diversity", "o2-cost"):
        assert f"](docs/claims/claim-{id}.png)" in text and (tmp_path / f"docs/claims/claim-{id}.png").exists()
    assert kept.keys() == {f"{name}: 1 2 4 8 --preset smoke --seeds 1" for name in ("dm", "o2")}
    assert "measured: as claimed" in text and text.count("| not measured | | not measured |") == 1
    monkeypatch.setattr(reproduce, "DOCS", tmp_path / "docs")  # another folder shows what is kept, figures too
    reproduce.main(["--out", str(tmp_path / "b")])
    assert (tmp_path / "b/RESULTS.md").read_text() == text.replace(str(tmp_path), f"{tmp_path}/b")
    results = json.loads((tmp_path / "results.json").read_text())
    del results["stages"]["dm"]["2"]  # as after a run of other K in this folder
    (tmp_path / "results.json").write_text(json.dumps(results))
    reproduce.main(["--out", str(tmp_path)])
    assert (tmp_path / "RESULTS.md").read_text() == text
    monkeypatch.setitem(RUNS, "dm", "1 2 4 8 --preset smoke --seeds 2")  # other seeds
    assert "1 of 2 runs" in printed("--dry-run")
