"""The judge against closed forms, a sampler's row, results.json, its table, and verdicts of numbers by hand."""
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import common
import data
import evaluate
import fid
import run
import toy_mog
from conftest import refused
from evaluate import Judge
from golden import numbers

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
TOY = data.DATASETS["toy"]


@dataclass
class Given:
    """As teacher.Given, where nothing was trained."""
    seed: int
    facts: data.Facts
    judge: Judge
    references: dict


def mean_judge() -> Judge:
    """Statistics: the mean of x, by class; a distance of them that is easily done by hand."""
    def statistics(x, label):
        return torch.stack([x[label == c].double().mean() for c in range(8)])

    def distance(a, b, classes=None):
        rows = slice(None) if classes is None else list(classes)
        return (a[rows].mean() - b[rows].mean()).abs().item()
    return Judge("l1", statistics, distance, lambda x, label: {"within": len(x) / 100}, lambda seed, number: {})


def given(seed: int = 0, judge: Judge | None = None) -> Given:
    """The teacher's samples have mean 1, the data 3."""
    one = torch.ones(8, dtype=torch.float64)
    return Given(seed, TOY, judge or mean_judge(), {"report": one, "real": 3 * one, "floor": 0.25, "floor_data": 0.125})


# -------------------------------------------------------------- judge

def test_histograms_by_class_pool_to_the_histogram_of_all():
    judge, label = evaluate.toy_judge(TOY), data.stratified(4000, 8)
    x, y = (toy_mog.sample(label, common.generator(name)) for name in "ab")
    a, b = judge.statistics(x, label), judge.statistics(y, label)
    assert a.shape[0] == 8 and a.sum(1).tolist() == [500] * 8
    assert torch.equal(a.sum(0), toy_mog.histogram(x))
    assert judge.distance(a, a) == 0 and judge.distance(a, b) == toy_mog.l1(a.sum(0), b.sum(0))
    far = judge.statistics(torch.full_like(x, 9.0), label)
    assert judge.distance(a, far) == pytest.approx(1)  # disjoint
    mixed = torch.cat([a[:4], far[4:]])
    assert judge.distance(a, mixed, [0, 3]) == 0 and judge.distance(a, mixed, [7]) == pytest.approx(1)
    assert judge.distance(a, mixed) == pytest.approx(0.5)


def test_the_judge_of_the_toy():
    judge = evaluate.judge(run.Flags(), None, common.Ranks())
    truth = judge.truth(0, 800)
    assert judge.title == "l1" and not torch.equal(truth["real"], truth["real_select"])
    assert truth["floor_data"] == judge.distance(truth["real"], truth["real_select"]) > 0
    assert all(torch.equal(truth[k], judge.truth(0, 800)[k]) for k in ("real", "real_select"))
    label = data.stratified(800, 8)
    assert judge.check(toy_mog.sample(label, common.generator("x")), label)["within"] > 0.99


def test_features_by_class_are_the_distance_of_the_parts():
    """Shifting class c by c in 4 dimensions: a squared distance of 4 c^2."""
    g = torch.Generator().manual_seed(0)
    f, label = torch.randn(300, 4, generator=g), torch.arange(300) % 3
    a, b = evaluate.Features([f[:100], f[100:]], label), evaluate.Features([f + label[:, None]], label)
    assert abs(a.distance(b, [0])) < 1e-9 and a.distance(b, [2]) == pytest.approx(16, abs=1e-6) and a.distance(b) > 1
    assert torch.equal(a.some(999), f) and len(a.some(4)) == 4
    many = evaluate.Features([torch.arange(50_000.0)[:, None]], torch.arange(50_000) % 10)
    assert ((many.some(10_000)[:, 0] % 10).long().bincount() - 1000).abs().max() < 120  # every class alike
    with pytest.raises(evaluate.UserError, match="fewer than 2 images"):
        a.distance(b, [7])


def test_the_judge_of_images_is_made_once(tmp_path, capsys, monkeypatch):
    """A classifier and the data's features, of classes that differ in brightness; kept in OUT/data, then read."""
    label = torch.arange(200) % 10
    x = torch.randint(0, 20, (200, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    x = (x + 23 * label[:, None, None, None]).to(torch.uint8)
    flags = run.Flags(dataset="fashion-mnist", out=str(tmp_path), eval_samples=100)
    source = data.Images(x, label)
    judge = evaluate.judge(flags, lambda: source, common.Ranks())
    first = judge.truth(0, 100)
    kept = sorted((tmp_path / "data").glob("*.pt"))
    assert [p.name.split("-")[0] for p in kept] == ["classifier", "features", "features"]
    assert capsys.readouterr().out.count("made once") == 1
    monkeypatch.setattr(fid.Classifier, "features", lambda *_: pytest.fail("features were made again"))
    again = evaluate.judge(flags, lambda: source, common.Ranks())
    second = again.truth(0, 100)
    monkeypatch.undo()
    assert capsys.readouterr().out == "" and torch.equal(*(v["real"].some(200) for v in (first, second)))
    assert judge.title == "FD (our classifier)" and [len(first[k].label) for k in ("real", "real_select")] == [100, 100]
    x, label = (v[source.truth(0, 100)[0][2]] for v in (x, label))
    mine = again.statistics(x.float() / 127.5 - 1, label)  # floats are judged as the images that are saved
    assert abs(again.distance(mine, first["real"])) < 1e-6 and 0 <= again.check(x, label)["right class"] <= 1
    assert again.spread(mine, first["real"]) == {"precision": 1.0, "recall": 1.0}


# ---------------------------------------------------- a sampler's row

def test_measure_by_hand(tmp_path):
    """Class c sampled as c: mean 3.5, 2.5 from the teacher, 0.5 from the data; class by class |c - 1|."""
    seen = []

    def sample(z, label):
        seen.append((z, label))
        return label[:, None].float().expand(-1, 2)
    row = evaluate.measure(given(5), 80, sample, tmp_path, lambda z, label: sample(z, label) * 0 + 2, per_class=True,
                           seconds=7.0, c=4)
    by_class = [1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert row == {"l1": 2.5, "l1_data": 0.5, "per_class": by_class, "per_class_mean": 2.75, "within": 0.8,
                   "seconds": 7.0, "l1_last": 1.0, "l1_data_last": 1.0, "c": 4}
    z = torch.randn(80, 2, generator=common.generator(5, "report z"))
    assert all(torch.equal(a, z) and torch.equal(b, data.stratified(80, 8)) for a, b in seen) and len(seen) == 2
    saved = run.load_tensors(tmp_path / "samples.pt")
    assert torch.equal(saved["x"][:, 1], saved["label"].float())


def test_what_is_not_measured_has_no_name():
    assert evaluate.measure(given(), 16, lambda z, label: z * 0) == {"l1": 1.0, "l1_data": 3.0, "within": 0.16}
    assert evaluate.teacher_row(given(), torch.zeros(16, 2)) == {"l1_data": 3.0, "within": 0.16, "floor": 0.25}


def test_rows_stand_by_stage_and_number_in_the_order_of_seeds():
    rows = evaluate.collected((stage, K, {"l1": K + 10 * seed}) for seed in (0, 1) for stage in ("dm", "adm")
                              for K in (1, 3))
    assert {stage: list(of_k) for stage, of_k in rows.items()} == {"dm": ["1", "3"], "adm": ["1", "3"]}
    assert [row["l1"] for row in rows["adm"]["3"]] == [3, 13]


# ------------------------------------------------------- results.json

def test_summary_by_hand():
    """1 and 3: mean 2, standard deviation sqrt 2; of other numbers the mean alone."""
    rows = [{"l1": 1.0, "l1_data": 0.5, "per_class": [0.0, 2.0]}, {"l1": 3.0, "l1_data": 0.5, "per_class": [1.0, 4.0]}]
    assert evaluate.summary(rows) == {"l1": 2.0, "l1_data": 0.5, "per_class": [0.5, 3.0], "per_seed": rows,
                                      "l1_sd": pytest.approx(2 ** 0.5), "l1_data_sd": 0.0}
    assert evaluate.summary(rows[:1])["l1_sd"] is None and "within_sd" not in evaluate.summary([{"within": 1.0}])


def full(value: float) -> dict:
    checks = {"within": 0.9, "modes": 60.0, "mode_min": 0.1, "mode_max": 2.0, "even": 0.1}
    last = {"l1_last": value, "l1_data_last": value, "per_class": [value] * 8, "per_class_mean": value}
    return {"l1": value, "l1_data": value + 1, "seconds": 5.0, **checks, **last, "teraflops": 1.0}


def results(rows: dict, tmp_path: Path, seeds=(0, 1), **more) -> dict:
    flags = run.Flags(out=str(tmp_path), eval_samples=800)
    for seed in seeds:
        run.save_tensors(run.shard(tmp_path / f"seed{seed}" / "reference", "report", 0), {"y": torch.zeros(800, 2)})
    judge = replace(evaluate.toy_judge(TOY), distance=lambda *_: 0.5)
    return evaluate.results_of(flags, {seed: given(seed, judge) for seed in seeds}, rows, 15, **{"configs": {}, **more})


def test_every_number_stands_where_it_stood(tmp_path):
    """The names of the golden files, which were made before this report was: of MSD, and of O2MKD."""
    made = results({"dm": {K: [full(0.1), full(0.2)] for K in (1, 3)}}, tmp_path)
    own = ("/classes_of_data", "/partition")  # of msd.py
    golden = {k for k in GOLDEN["dm"]["results"]["results.json"] if not k.startswith(own)}
    assert set(numbers(made)) == golden | {"/teacher/l1_data_sd"}
    row = dict.fromkeys(("l1", "l1_data", "within", "modes", "mode_min", "mode_max", "even", "seconds", "teraflops"), 1.0)
    drift = {"drift-far": {0: [{"distance": 1.0}]}}
    made = results({"o2mkd": {4: [row]}, **drift}, tmp_path, (0,), method="o2mkd")
    own = ("/cost", "/edges", "/steps", "/stages/loss", "/stages/drift-n")  # of o2mkd.py
    golden = GOLDEN["o2mkd"]["results"]["results-o2mkd-small.json"]
    assert set(numbers(made)) == {k for k in golden if not k.startswith(own)}
    assert made["method"] == "o2mkd" and made["title"] == made["metric"] == "l1"


def test_the_last_stage_is_what_is_served(tmp_path):
    made = results({"dm": {8: [full(0.3)]}, "adm": {8: [full(0.1)]}}, tmp_path, (0,))
    assert made["students"] == made["stages"]["adm"] and made["students"]["8"]["l1"] == 0.1
    assert made["floor"] == made["teacher"]["floor"] == 0.25 and made["teacher"]["evaluations"] == 15


def test_merged_keeps_what_belongs_together_and_sets_aside_what_does_not(tmp_path, capsys):
    path = tmp_path / "results.json"

    def ended(stages: dict, config: dict, seeds=(0,), **more) -> dict:
        rows = {stage: {K: [full(0.1)] * len(seeds) for K in ks} for stage, ks in stages.items()}
        made = results(rows, tmp_path, seeds, configs={stage: config for stage in stages}, **more)
        whole = evaluate.merged(path, made)
        run.save_json(path, whole)
        return {stage: set(of_k) for stage, of_k in whole["stages"].items()}
    same = {"lr": 1.0, "bins": (0, 450)}  # a tuple is a list in the file
    assert ended({"adm": [3], "dm": [3]}, same, edges={"3": 1}) == {"adm": {"3"}, "dm": {"3"}}
    assert ended({"dm": [2]}, same, edges={"2": 1}) == {"dm": {"2", "3"}, "adm": {"3"}}
    kept = run.load_json(path)
    assert list(kept["stages"]) == ["dm", "adm"] and set(kept["students"]) == {"3"}
    assert set(kept["edges"]) == {"2", "3"} and not list(tmp_path.glob("*previous*"))
    for i, (config, seeds) in enumerate([({**same, "lr": 2.0}, (0,)), (same, (0, 1)), ({**same, "new": 1}, (0, 1))]):
        capsys.readouterr()
        assert ended({"dm": [1]}, config, seeds) == {"dm": {"1"}}
        assert "moved to" in capsys.readouterr().out and (tmp_path / f"results.previous{i or ''}.json").exists()
    assert set(run.load_json(tmp_path / "results.previous.json")["stages"]) == {"dm", "adm"}
    run.save_json(path, {"config": {}, "students": {}, "seeds": [0], "samples": 800})  # as O2MKD's once were
    assert ended({"dm": [1]}, same) == {"dm": {"1"}} and (tmp_path / "results.previous3.json").exists()


def test_the_table_shows_every_row_and_no_empty_column(tmp_path):
    made = results({"dm": {1: [full(0.5)], 8: [full(0.3)]}, "adm": {8: [full(0.1)]}}, tmp_path, (0,))
    lines = evaluate.table(made).splitlines()
    assert [" ".join(line.split()[:3]) for line in lines[1:-1]] == [
        "teacher, 15 evaluations", "1 student, dm", "8 students, dm", "8 students, adm"]
    assert lines[0].split() == ["l1", "l1_data", "within", "modes", "mode_min", "mode_max", "seconds",
                                "teraflops"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "l1_sd" in evaluate.table(results({"dm": {1: [full(0.5), full(0.3)]}}, tmp_path)).splitlines()[0]
    cost = {"0": {"parameters": 24162, "multiply_adds": 353000}, "4": {"parameters": 6450}}
    row = {"l1": 0.1, "l1_data": 0.2}
    rows = {"o2mkd": {4: [row]}, "merged": {4: [row]}, "heun-20": {0: [row]}}
    rows["drift-far"] = {0: [{"distance": 1.0}]}
    text = evaluate.table(results(rows, tmp_path, (0,), method="o2mkd", cost=cost))
    assert "24,162" in text and "4 students, merged" in text and text.count("6,450") == 1
    assert not any(word in text for word in ("heun-20", "drift", "seconds"))


def test_report_writes_prints_and_draws(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate.plot, "draw", lambda out, tag: drawn.append((out, tag)) or [out / "figures/l1.png"])
    made = results({"dm": {2: [full(0.5)], 8: [full(0.3)]}}, tmp_path, (0,))
    for name in ("results", "results-XS", "results-o2mkd-large"):
        evaluate.report(tmp_path / f"{name}.json", made)
    assert drawn == [(tmp_path, tag) for tag in ("", "XS", "o2mkd-large")]
    assert numbers(run.load_json(tmp_path / "results-XS.json")) == numbers(made)
    text = capsys.readouterr().out
    assert "8 students, dm" in text and "K = 8 below K = 2" in text
    assert f"results: {tmp_path}/results.json\nfigures: {tmp_path}/figures/l1.png" in text


# ------------------------------------------------------------- verdicts

def test_verdict_rule_both_ways():
    """t(0.95, n - 1) standard errors of the paired differences: 2.132 at n = 5, 2.920 at n = 3."""
    assert evaluate.verdict([1, 2, 3, 4, 5], [2, 3, 4.1, 5, 6])["verdict"] == "holds"
    assert evaluate.verdict([2, 3, 4.1, 5, 6], [1, 2, 3, 4, 5])["verdict"] == "does not hold"
    for spread, t in (([-1, 0, 1], 2.920), ([-2, -1, 0, 1, 2], 2.132)):
        n = len(spread)
        error = math.sqrt(sum(d * d for d in spread) / (n - 1) / n)
        for mean, word in ((1.001 * t * error, "holds"), (0.999 * t * error, "does not hold")):
            found = evaluate.verdict([0] * n, [mean + d for d in spread])
            assert found == {"mean": pytest.approx(mean), "error": pytest.approx(error), "n": n,
                             "p": pytest.approx(0.05, rel=0.01), "verdict": word}
    assert evaluate.verdict([1], [2]) == {"mean": 1, "error": None, "n": 1, "p": None, "verdict": "measured"}
    assert evaluate.verdict([1, 1], [2, 2])["verdict"] == "measured"
    equal = [evaluate.verdict([0] * 3, [mean] * 3) for mean in (1, 0, -1)]  # without spread
    assert [v["p"] for v in equal] == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError):
        evaluate.verdict([1, 2], [3])


def test_holm_by_hand():
    """The smallest p times the number of tests, the next times one less, never below the one before, at most 1."""
    assert evaluate.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert evaluate.holm([0.9, 0.8]) == [1.0, 1.0] and evaluate.holm([0.02]) == [0.02] and evaluate.holm([]) == []


def test_comparison_is_a_line_of_the_seeds():
    a, b = ([{"l1": v} for v in values] for values in ([1.0, 2.0, 3.0], [2.0, 4.0, 3.0]))
    line = evaluate.comparison("a below b?", a, b, "l1")
    assert line == ("a below b?: 2.0000 against 3.0000, ratio 0.67, "
                    "paired difference 1.0000 ± 0.5774 (standard error), p = 0.11, n = 3: does not hold")


@pytest.mark.parametrize("stages, more, questions", [
    ({"dm": [1, 8]}, {}, ["K = 8 below K = 1, to the teacher?"]),
    ({"dm": [8]}, {}, []),
    ({"cd": [1, 2]}, {}, ["K = 2 below K = 1, to the teacher?"]),
    ({"dm": [8], "adm": [8]}, {}, ["K = 8, to the data, below the teacher?"]),
    ({"post": [2, 10]}, {},
     ["K = 10 below K = 2, to the data?", "K = 10 below K = 2, to the teacher?",
      "K = 2, to the data, below the teacher?", "K = 10, to the data, below the teacher?"]),
    ({"o2mkd": [1, 4], "merged": [4]}, {"method": "o2mkd"},
     ["N = 4 below N = 1, to the data?", "N = 1, to the data, below the teacher?",
      "N = 4, to the data, below the teacher?", "N = 4 merged below N = 1, to the data?",
      "N = 4 merged below N = 4, to the data?"]),
])
def test_verdicts_of_a_run(tmp_path, stages, more, questions):
    made = results({stage: {K: [full(0.1)] for K in ks} for stage, ks in stages.items()}, tmp_path, (0,), **more)
    lines = evaluate.verdicts(made)
    assert len(lines) == len(questions) and all(line.startswith(q) for line, q in zip(lines, questions)), lines


# ------------------------------------------------------------ compare

@pytest.fixture
def variants(tmp_path):
    """A run folder with variants: none (dm and adm), reg, other seeds, fewer samples, another K, o2mkd."""
    def save(name, rows, seeds=(0,), **more):
        run.save_json(tmp_path / f"{name}.json", {**results(rows, tmp_path, seeds), **more})
    save("results", {"dm": {1: [full(0.5)], 8: [full(0.3)]}, "adm": {8: [full(0.2)]}})
    save("results-reg", {"dm": {8: [full(0.4)]}})
    save("results-five", {"dm": {8: [full(0.4 + seed) for seed in (2, 1, 0)]}}, (2, 1, 0))
    save("results-seeds", {"dm": {8: [full(0.4)]}}, (1,))
    save("results-few", {"dm": {8: [full(0.4)]}}, samples=100)
    save("results-four", {"dm": {4: [full(0.4)]}})
    save("results-o2mkd", {"o2mkd": {8: [full(0.6)]}})
    return tmp_path


def test_compare_k_by_k(variants, capsys):
    evaluate.main([str(variants), "--compare", "none", "reg", "none/dm"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1] for line in lines] == [" none/adm below reg/dm"] * 2 + [" none/adm below none/dm"] * 2
    assert "to the teacher?: 0.2000 against 0.4000" in lines[0] and "to the data?: 1.2000 against 1.4000" in lines[1]
    evaluate.main([str(variants), "--compare", "none/dm", "o2mkd"])
    assert "K = 8, none/dm below o2mkd/o2mkd, to the teacher?: 0.3000 against 0.6000" in capsys.readouterr().out


def test_compare_takes_the_seeds_that_both_have(variants, capsys):
    for names, numbers in ((["none", "five"], "0.2000 against 0.4000"), (["five", "none"], "0.4000 against 0.2000"),
                           (["five", "seeds"], "1.4000 against 0.4000")):
        evaluate.main([str(variants), "--compare", *names])
        line, _ = capsys.readouterr().out.splitlines()
        assert numbers in line and "n = 1" in line


@pytest.mark.parametrize("tags, words", [
    (["none", "nothing"], "results-nothing.json"), (["none", "seeds"], "no seed or K"),
    (["none", "few"], "numbers of samples"), (["none", "four"], "no seed or K"), (["none/tsm", "reg"], "none/tsm reg"),
])
def test_compare_refuses_what_is_not_alike(variants, capsys, tags, words):
    assert words in refused(capsys, evaluate.main, [str(variants), "--compare", *tags])
