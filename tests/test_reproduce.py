"""Claims: verdicts computed from synthetic numbers, both ways; a killed claim goes on without repeating finished runs."""
import pytest

import common
import data
import dmd
import msd
import o2mkd
import reproduce
import tsm
from conftest import refused
from reproduce import Claim, Row


def claim(*below, **more):
    names = {x for pair in below for x in pair}
    return Claim("c", "a claim", "paper", tuple(Row(n, "", "dm", 1) for n in sorted(names)), below, **more)


GOOD, BAD, NEAR = [0.20, 0.21, 0.19, 0.22, 0.20], [0.30, 0.31, 0.29, 0.31, 0.30], [0.21, 0.20, 0.19, 0.22, 0.205]


def test_verdict_both_ways():
    verdict, found = reproduce.judge(claim(("a", "b")), {"a": GOOD, "b": BAD})
    assert verdict == "holds" and found[0][1]["n"] == 5
    assert reproduce.judge(claim(("b", "a")), {"a": GOOD, "b": BAD})[0] == "does not hold: the reverse does"
    assert reproduce.judge(claim(("a", "b")), {"a": GOOD, "b": NEAR})[0] == "does not hold: not told apart"
    assert reproduce.judge(claim(("a", "b"), more=True), {"a": BAD, "b": GOOD})[0] == "holds"   # where more is better
    verdict, found = reproduce.judge(claim(("a", "b"), ("a", "c")), {"a": GOOD, "b": BAD, "c": NEAR})
    assert verdict == "holds in 1 of 2 comparisons" and [v["verdict"] for _, v in found] == ["holds", "not told apart"]
    assert reproduce.judge(claim(("a", "b"), ("b", "a")), {"a": GOOD, "b": BAD})[0] == "holds in 1 of 2 comparisons, the reverse in 1"
    assert reproduce.judge(claim(("a", "c"), ("b", "a")), {"a": GOOD, "b": BAD, "c": NEAR})[0] == "does not hold: the reverse does in 1 of 2 comparisons"
    assert reproduce.judge(claim(("a", "b")), {"a": GOOD[:1], "b": BAD[:1]})[0] == "measured: as claimed"
    assert reproduce.judge(claim(("b", "a")), {"a": GOOD[:1], "b": BAD[:1]})[0] == "measured: not as claimed"
    assert reproduce.judge(claim(("a", "b")), {"a": GOOD[:3], "b": BAD})[1][0][1]["n"] == 3     # the seeds that both have


def test_derived_values():
    numbers = {"a": [1.0, 2.0], "b": [0.5, 0.5], "1 x 128": [7.0], "XS, K = 1": [3.0], "XS, K = 8": [1.0]}
    assert reproduce.values("1.1 x a", numbers) == [1.1, 2.2] and reproduce.values("a / b", numbers) == [2.0, 4.0]
    assert reproduce.values("1 x 128", numbers) == [7.0] and reproduce.values("XS, K = 1 / XS, K = 8", numbers) == [3.0]


def test_claims_are_consistent():
    """Every comparison names rows of its claim, every row a run, every run is used and a legal command line."""
    used = set(reproduce.needed(list(reproduce.CLAIMS.values())))
    assert used == set(reproduce.RUNS)
    for c in reproduce.CLAIMS.values():
        numbers = {r.name: [1.0] for r in c.rows}
        assert len(numbers) == len(c.rows)
        for a, b in c.below:
            reproduce.values(a, numbers), reproduce.values(b, numbers)
        for r in c.rows:
            assert r.tag in reproduce.RUNS
        tags = reproduce.needed([c])
        for tag in tags:
            for before in reproduce.AFTER.get(tag, []):
                assert tags.index(before) < tags.index(tag)
    for quick in (False, True):
        flags = reproduce.Flags(quick=quick)
        for tag in reproduce.RUNS:
            full = reproduce.parsed(tag, flags)
            if reproduce.script(tag) is o2mkd:
                o2mkd.check_flags(full, data.facts(full.dataset))
            else:
                dmd.check_flags(full), tsm.check_flags(full), msd.check_stages(full, data.facts(full.dataset))
            assert reproduce.said(tag, flags) == reproduce.said(tag, flags) != reproduce.said(tag, reproduce.Flags(quick=not quick))
            assert full.seeds == (1 if quick or "fashion" in tag else reproduce.FEWER.get(tag, 5))


@pytest.mark.parametrize("argv, words", [
    (["--claim", "slpit"], ["--claim slpit", "did you mean split?"]),
    (["--claim", "fig44"], ["did you mean fig4?"]),
    ([], ["--list"]),
    (["--all", "--seeds", "0"], ["--seeds 0"]),
    (["--all", "--claim", "fig4"], ["one of them"]),
    (["--claim", "fig4", "--images"], ["--claim fig4-images"]),
    (["--claim", "fig4-images", "--quick"], ["the toy only"]),
    (["--all", "--quick", "--seeds", "3"], ["--seeds 3"]),
    (["--claim", "diversity", "--smoke", "--out", "/proc/nope"], ["--out", "cannot be written"]),
    (["--claim", "diversity", "--smoke", "--results", "/proc/nope/R.md"], ["--results", "cannot be written"]),
])
def test_refused(capsys, argv, words):
    line = refused(capsys, reproduce.main, argv)
    assert all(w in line for w in words)


def test_list_and_dry_run(capsys, tmp_path):
    reproduce.main(["--list"])
    text = capsys.readouterr().out
    assert all(id in text for id in reproduce.CLAIMS)
    reproduce.main(["--claim", "reg", "--smoke", "--dry-run", "--out", str(tmp_path / "q")])
    text = capsys.readouterr().out
    assert "4 of 4 runs" in text and "--ttur 5" in text and not list(tmp_path.iterdir())


def msd_of(flags):
    """The command line of the untagged run, without --seeds."""
    argv = reproduce.command_line("", flags)
    del argv[argv.index("--seeds"):argv.index("--seeds") + 2]
    return argv


def test_a_killed_claim_goes_on_without_repeating_finished_runs(tmp_path, monkeypatch, capsys):
    started, original, step = [], msd.main, dmd.kl_gradient

    def watched(argv):
        started.append(argv[argv.index("--tag") + 1] if "--tag" in argv else "dm")
        return original(argv)

    def killed(*args):
        if started == ["dm", "ttur"] and next(count) == 3:
            raise KeyboardInterrupt                                 # in the midst of its training
        return step(*args)
    count = iter(range(1000))
    monkeypatch.setattr(msd, "main", watched)
    monkeypatch.setattr(dmd, "kl_gradient", killed)
    argv = ["--claim", "reg,diversity", "--smoke", "--quiet", "--out", str(tmp_path / "q")]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    assert stop.value.code == 130 and started == ["dm", "ttur"]
    reproduce.main(argv)
    assert started == ["dm", "ttur", "ttur", "both", "neither"]
    reproduce.main(argv)
    assert len(started) == 5                                        # all there: only judged and drawn again
    original([*msd_of(reproduce.Flags(smoke=True, quick=True, out=str(tmp_path / "q"))), "--seed", "1", "--quiet"])     # someone's own run takes its place
    reproduce.main(argv)
    assert started[5:] == ["dm"]
    text = (tmp_path / "q/RESULTS.md").read_text()
    assert "| reg |" in text and "| diversity |" in text and "measured" in text and "not measured" not in text
    for id in ("reg", "diversity"):
        assert (tmp_path / f"q/figures/claim-{id}.png").exists() and f"](figures/claim-{id}.png)" in text
