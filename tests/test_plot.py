"""Pictures whole: every figure at its smallest and its largest, from files made here: no text cut off or on another."""
import csv
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

import plot
import toy_mog

BANDS = ("0 <= sigma < 0.01", "0.01 <= sigma < 0.1", "0.1 <= sigma < 1", "1 <= sigma < inf")
CURVES = {
    "dm": ("{m}", "gap", "regression", *(f"fake loss, {band}" for band in BANDS)),
    "cd": ("{m}", *(f"consistency loss, {band}" for band in BANDS)),
    "adm": ("{m}_data", "right on real", "right on fake", "GAN loss of G", "GAN loss of the critic",
            "push of the DM term", "push of the GAN"),
    "post": ("regression",),
}


# ------------------------------------------------------------------------------------------------------------ the check

def problems(fig) -> list[str]:
    """What is wrong with the text that a figure really draws: cut off, on other text; a legend on a panel."""
    texts, draw = [], Text.draw

    def noted(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            texts.append((text.get_text(), Text.get_window_extent(text, renderer)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        fig.canvas.draw()
    page, found = fig.bbox.padded(0.5), []
    for i, (name, box) in enumerate(texts):
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1:
            found.append(f"cut off: {name!r}")
        found += [f"{other!r} on {name!r}" for other, b in texts[:i] if b.padded(-1).overlaps(box.padded(-1))]
    for legend in fig.findobj(Legend):
        found += ["a legend on a panel" for ax in fig.axes if legend.get_window_extent().overlaps(ax.bbox.padded(-1))]
    return found


@pytest.fixture
def drawn(monkeypatch):
    """{name of the file: what is wrong with its figure}, noted as figures are saved, at the size of plot.py."""
    found = {}

    def savefig(fig, path, **more):
        assert path.name not in found
        found[path.name.split(".")[0]] = problems(fig)
        path.touch()
    monkeypatch.setitem(plot.plt.rcParams, "figure.dpi", 110)
    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def whole(found: dict, *names: str) -> None:
    """These figures were drawn, and nothing is wrong with any."""
    assert sorted(found) == sorted(names)
    assert not any(found.values()), {name: what[:6] for name, what in found.items() if what}


def test_the_check_sees_what_is_wrong():
    fig, axes = plot.plt.subplots(1, 2)
    assert problems(fig) == []
    axes[0].set_title("a title that is much wider than its panel")
    axes[1].set_title("a title that is much wider than its panel")
    fig.suptitle("a title that is much wider than its figure, " * 3)
    axes[0].plot([0, 1], label="one")
    axes[0].legend()
    assert {problem.split()[0] for problem in problems(fig)} == {"cut", "a", "'a"}
    plot.plt.close(fig)


# ---------------------------------------------------------------------------------------------------------- run folders

def row(value: float, m: str, seeds: int) -> dict:
    """What is measured of a set of students: distance m, distance to the data, per seed."""
    values = [value * (1 + 0.02 * s) for s in range(seeds)]
    per_seed = [{m: v, f"{m}_data": 0.9 * v, "floor": 0.054} for v in values]
    means = {k: float(np.mean([p[k] for p in per_seed])) for k in per_seed[0]}
    return means | {f"{m}_data_sd": 0.02 * value if seeds > 1 else None, "per_seed": per_seed}


def write_metrics(folder, names, steps: int, students: int) -> None:
    """metrics.csv of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["step", "seconds", "student", "name", "value"])
        for i, name in enumerate(names):
            for step in np.linspace(steps / 20, steps, 6).astype(int):
                out.writerows([[step, 1.0, k, name, 0.3 * (i + 1) * step ** -0.4] for k in range(students)])


def samples(m: str, n: int, classes: int):
    """x, label: points of the mixture or small images."""
    label = torch.arange(n) % classes
    if m == "l1":
        return toy_mog.sample(label % 8, torch.Generator().manual_seed(0)), label
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8), label


def write_results(out, tag: str, results: dict, m: str, seeds: int) -> None:
    """results.json of a tag, and the teacher's samples."""
    name = {"l1": "l1", "fd": "FD (of a classifier's features)"}[m]
    common = {"dataset": {"l1": "toy", "fd": "fashion-mnist"}[m], "seeds": list(range(seeds)), "samples": 100_000, "metric": m, "title": name, "floor": 0.054,
              "floor_data": 0.051, "teacher": {**row(0.1, m, seeds), "evaluations": 79}}
    reference = out / "seed0" / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    torch.save({"y": samples(m, 1200, {"l1": 8, "fd": 10}[m])[0]}, reference / "report-0000.pt")
    (out / f"results{'-' * bool(tag)}{tag}.json").write_text(json.dumps(common | results))


def msd_run(out, ks, stages=("dm",), m="l1", seeds=1, tag="", steps=3000, classes=8, scale=1.0, **more):
    """The run folder of msd.py with these K and stages; scale: of its distances."""
    rows = {stage: {str(K): row(scale * (0.25 - 0.02 * i - 0.03 * j), m, seeds) for i, K in enumerate(ks)}
            for j, stage in enumerate(stages)}
    results = {"stages": rows, "students": rows[stages[-1]], "classes_of_data": classes, "configs": {}}
    write_results(out, tag, {**results, "size": tag or "B", **more}, m, seeds)
    x, label = samples(m, 1200, classes)
    for K in ks:
        for stage in stages:
            folder = out / "seed0" / f"students{K}{'-' * bool(tag)}{tag}" / stage
            names = [name.format(m=m) for name in CURVES[stage]]
            if m == "l1":
                write_metrics(folder, names, steps, K)
            else:
                for k in range(K):
                    write_metrics(folder / f"student{k}", names, steps, 1)
                    record = {"seen": [torch.zeros(1, 20, 1, 8, 8)] * 6}
                    torch.save({"parts": {"record": record}}, folder / f"student{k}" / "state.pt")
            torch.save({"x": x, "label": label, }, folder / "samples.pt")


def o2mkd_run(out, ns, m="l1", seeds=1, tag="o2mkd", curve=(), levels=21):
    """The run folder of o2mkd.py with these N; curve: numbers of sampling steps."""
    rows = {"o2mkd": {str(N): row(0.2 - 0.02 * i, m, seeds) for i, N in enumerate(ns)}}
    for n in curve:
        for sampler in ("heun", "ddim"):
            rows[f"{sampler}-{n}"] = {str(N): row(0.4 / n ** 0.5 + 0.001 * N, m, seeds) for N in (0, *ns)}
    cost = {str(N): {"multiply_adds": 1.9e6 if N == 0 else 0.5e6} for N in (0, *ns)}
    results = {"method": "o2mkd", "steps": 40, "cost": cost, "stages": rows, "students": rows["o2mkd"]}
    write_results(out, tag, results, m, seeds)
    x, label = samples(m, 1200, {"l1": 8, "fd": 10}[m])
    for N in ns:
        folder = out / "seed0" / f"o2mkd{N}{tag.removeprefix('o2mkd')}"
        write_metrics(folder if m == "l1" else folder / "student0", ("similarity", "prediction", "denoising"), 3000, 1)
        torch.save({"x": x, "label": label}, folder / "samples.pt")
    sigma = np.geomspace(0.002, 80, levels)
    drift = {"sigma": sigma.tolist(), "quantiles": np.outer(sigma ** 0.1, [-2, -1, 0, 1, 2]).tolist(),
             "distance": np.abs(np.subtract.outer(np.arange(levels), np.arange(levels))).tolist()}
    (out / "seed0" / "teacher").mkdir()
    (out / "seed0" / "teacher" / "drift.json").write_text(json.dumps(drift))


# ---------------------------------------------------------------------------------------------------------- the figures

SMALL, LARGE = (8,), (1, 2, 4, 8, 64)
TOY = ("figure4", "training")
IMAGES = ("samples", "fd", "training")


@pytest.mark.parametrize("ks, stages, more, names", [
    (SMALL, ("dm",), {}, TOY),
    ((1,), ("cd",), {}, TOY),
    (LARGE, ("dm", "adm", "post"), {"seeds": 5, "steps": 900_000}, (*TOY, "stages", "gan")),
    (LARGE, ("cd",), {"seeds": 5}, TOY),
    (SMALL, ("dm",), {"m": "fd", "scale": 100}, (*IMAGES, "progress-dm")),
    (LARGE, ("dm", "adm"), {"m": "fd", "classes": 1000, "steps": 2_000_000}, (*IMAGES, "progress-dm", "progress-adm", "stages", "gan")),
    ((1, 64), ("cd",), {"m": "fd", "classes": 64}, (*IMAGES, "progress-cd"))])
def test_msd(tmp_path, drawn, ks, stages, more, names):
    msd_run(tmp_path, ks, stages, **more)
    paths = plot.draw(tmp_path)
    assert sorted(p.stem for p in paths) == sorted(names) and all(p.parent == tmp_path / "figures" for p in paths)
    whole(drawn, *names)


@pytest.mark.parametrize("sizes, ks, stages", [
    (("B", "XXS"), (1, 2), ("dm",)), (("B", "S", "XS", "XXS"), (1, 2, 3, 4, 5, 6, 7, 8), ("dm", "adm", "post"))])
def test_figure8(tmp_path, drawn, sizes, ks, stages):
    for i, size in enumerate(sizes):
        msd_run(tmp_path, ks, stages, tag="" if size == "B" else size, scale=1 + 0.3 * i)
    plot.draw(tmp_path, "XXS")
    names = ("figure4", "training", *(["stages", "gan"] if len(stages) > 1 else []))
    whole(drawn, "figure8", *(f"{name}-XXS" for name in names))


@pytest.mark.parametrize("ns, m, more, names", [
    ((4,), "l1", {}, ()), ((4,), "fd", {}, ()), ((1,), "l1", {"curve": (20,), "levels": 3}, ("curve",)),
    ((1, 2, 4, 8, 64), "l1", {"curve": (10, 20, 37, 40, 80), "seeds": 5}, ("curve",)),
    ((1, 4), "fd", {"curve": (2, 1000), "tag": "o2mkd-fork"}, ("curve",))])
def test_o2mkd(tmp_path, drawn, ns, m, more, names):
    o2mkd_run(tmp_path, ns, m, **more)
    tag = more.get("tag", "o2mkd")
    plot.draw(tmp_path, tag)
    whole(drawn, *(f"{name}-{tag}" for name in ("samples", *["fd"] * (m == "fd"), "losses", "drift", *names)))


LONG = "relational distillation is the steadiest supervision: coefficient of variation of a batch's loss (one student)"
NAMED = [f"{i} x 128, XXS, 12 000 updates, teacher elsewhere, random start" for i in range(12)]


@pytest.mark.parametrize("text, metric, rows, seeds, lines", [
    ("more", "l1", ["K = 8"], 1, {}), (2 * LONG, "multiply_adds", ["N = 1"], 1, {}),
    (LONG, "l1_data", ["K = 1", "K = 8"], 2, {"the teacher": 0.09}),
    (3 * LONG, "l1", NAMED, 10, {"floor: two draws of the teacher": 0.054, "18-point Heun sampler": 0.17}),
    (LONG, "fd_data", [f"K = {i}" for i in range(20)], 5, {"the teacher": 0.04})])
def test_claim(tmp_path, drawn, text, metric, rows, seeds, lines):
    unit = {"multiply_adds": 1.9e6, "fd_data": 30.0}.get(metric, 0.2)
    numbers = {name: [unit * (1 + 0.1 * i + 0.01 * s) for s in range(seeds)] for i, name in enumerate(rows)}
    plot.save(plot.claim("o2-steps", text, numbers, metric, lines), tmp_path / "claim.png")
    whole(drawn, "claim")


def test_samples(tmp_path, drawn):
    for n in (1, 300):
        x, label = samples("l1", n, 10)
        for names in (["students"], ["teacher", "students", "another"]):
            fig = plot.scatter(dict.fromkeys(names, x), label, 10)
            plot.save(fig, tmp_path / f"scatter{n}-{len(names)}.png")
    for n, columns, panels in ((1, 1, 1), (4, 2, 3), (64, 8, 2), (400, 20, 1), (60, 5, 12)):
        images = {f"{i} students, 79 evaluations in turn": samples("fd", n, 10)[0] for i in range(panels)}
        plot.save(plot.image_panels(images, columns), tmp_path / f"images{n}.png")
    whole(drawn, "scatter1-1", "scatter1-3", "scatter300-1", "scatter300-3",
          "images1", "images4", "images64", "images400", "images60")


# ---------------------------------------------------------------------------------------------------------- the numbers

def test_a_mean_over_students_that_lack_a_step():
    steps, values = plot.over_students({0: ([10, 20], [1.0, 3.0]), 1: ([20], [5.0])})
    assert steps.tolist() == [10, 20] and values.tolist() == [1.0, 4.0]


def test_a_row_of_metrics_that_was_cut_off(tmp_path):
    write_metrics(tmp_path, ["l1"], 100, 1)
    with open(tmp_path / "metrics.csv", "a") as f:
        f.write("200,1.0,0,l1,")
    assert max(plot.read_metrics(tmp_path)["l1"][0][0]) == 100


def test_files_are_written(tmp_path):
    msd_run(tmp_path, (1, 2))
    for path in plot.draw(tmp_path):
        assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("argv, words", [
    ([], "run"), (["{out}/none"], "results.json"), (["{out}", "XL"], "results-XL.json"),
    (["{out}", "../XS"], "results-../XS.json"), (["{out}", "XS"], "report")])
def test_refused(tmp_path, capsys, argv, words):
    msd_run(tmp_path, (1,))
    rows = {"1": row(0.2, "l1", 1)}
    write_results(tmp_path, "XS", {"students": rows, "stages": {"dm": rows}, "seeds": [1]}, "l1", 1)
    with pytest.raises(SystemExit) as stop:
        plot.main([word.format(out=tmp_path) for word in argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
