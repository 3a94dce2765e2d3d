"""Every picture, drawn from the files of a run folder alone: `python plot.py runs/toy [TAG]` draws them again.

With --compare TAG TAG …: variants side by side (none: the one without a tag; TAG/dm: an earlier stage). The one file
that imports matplotlib. Every figure is made by `page`, whose layout keeps all text whole.
"""
import argparse
import csv
import math
import os
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.layout_engine import ConstrainedLayoutEngine

import images
import run
import toy_mog
from flags import UserError, command

plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 3,
                     "lines.markersize": 4})
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#9ecae1", "#2171b5", "#08306b", "#000000"])
GAP = LinearSegmentedColormap.from_list("gap", ["#ffffff", "#fdae6b", "#d94801", "#4a1486"])
DARK, BLUE, ORANGE = "#08306b", "#2171b5", "#d94801"
VIEW = dict(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-0.65, 0.65), ylim=(-0.65, 0.65))  # of the toy's x
CLOSE = VIEW | dict(xlim=(0.36, 0.64), ylim=(-0.14, 0.14))


class Whole(ConstrainedLayoutEngine):
    """Layout of every figure: titles and labels are broken into lines as long as their panel, so that no text is cut
    off or lies on another. A formula is one word: no spaces in it."""

    def execute(self, fig):
        for _ in range(5):  # more lines leave the panels less room
            super().execute(fig)
            rooms = [(text, 0.97 * fig.bbox.width) for text in fig.texts]
            for ax in fig.axes:
                rooms += [(ax.title, ax.bbox.width), (ax.xaxis.label, ax.bbox.width), (ax.yaxis.label, ax.bbox.height)]
            for text, room in rooms:
                words, box = text.get_text(), text.get_window_extent()
                excess = (box.height if text.get_rotation() else box.width) / room
                if excess > 1:
                    letters = max(map(len, words.split("\n"))) / excess
                    text.set_text(textwrap.fill(words, int(letters), break_on_hyphens=False))


def page(columns: int, width: float, height: float, pictures=False, sharey=False):
    """A figure and its axes [columns], each `width` x `height` inches with its labels; pictures: no gaps between."""
    fig, axes = plt.subplots(1, columns, figsize=(columns * width, height), layout=Whole(compress=pictures),
                             sharey=sharey, squeeze=False)
    for ax in axes[0]:
        ax.locator_params(axis="x", nbins=int(width))  # room for six digits
    return fig, axes[0]


def legend(ax, above: bool = False) -> None:
    """Right of the panel, or above one without a title: never over the data."""
    ax.legend(loc="lower left" if above else "upper left", bbox_to_anchor=(0, 1) if above else (1, 1))


def levels(line, values: dict) -> None:
    """Lines {label: level}, by ax.axhline or ax.axvline: the first dashed, the others dotted."""
    for i, (label, level) in enumerate(values.items()):
        line(level, ls=":" if i else "--", color="k" if i else ORANGE, lw=1, label=f"{label}: {short(level)}")


def log2_axis(ax) -> None:
    """A logarithmic x axis with ticks at powers of 2."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")


def shade(i: int, n: int):
    """The colour of the i-th of n lines."""
    return plt.cm.viridis(0.9 * i / max(1, n - 1))


def short(value: float) -> str:
    """A number, with three digits."""
    return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def aim(results: dict, stages) -> str:
    """Which distance is asked of these stages: to the data, but of the toy's DM or CD alone to the teacher."""
    return "l1" if results["metric"] == "l1" and {*stages} <= {"dm", "cd"} else f"{results['metric']}_data"


def distance(results: dict, m: str) -> str:
    """A distance, as an axis names it; those of images by which checkpoints are chosen are to the data, too."""
    name = "$\\ell_1$" if results["metric"] == "l1" else results["title"]
    return f"{name} to the {'teacher' if m == 'l1' else 'data'}"


def save(fig: plt.Figure, path: Path) -> Path:
    """Save a figure, atomically; returns its path."""
    run.write_atomic(path, lambda t: fig.savefig(t, format="png"))
    plt.close(fig)
    return path


def beside(path: Path, document: Path) -> str:
    """The path of a picture as a document in another folder names it."""
    return os.path.relpath(path, document.parent)


# ------------------------------------------------------------- curves

def read_metrics(folder: Path) -> dict:
    """metrics.csv -> {name: {student: (steps, values)}}; of image students, the files of all student folders."""
    rows: dict = defaultdict(lambda: defaultdict(lambda: ([], [])))
    own = sorted(folder.glob("student[0-9]*/metrics.csv"))
    for path in own or [folder / "metrics.csv"]:
        for r in csv.DictReader(path.read_text().splitlines()):
            if r["value"]:  # else a full disk or a kill cut the row off
                steps, values = rows[r["name"]][path.parent.name if own else int(r["student"])]
                steps.append(int(r["step"]))
                values.append(float(r["value"]))
    return rows


def over_students(by_student: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over the students of one metric."""
    at = defaultdict(list)  # a student without samples in a band lacks a step
    for steps, values in by_student.values():
        for step, value in zip(steps, values):
            at[step].append(value)
    return np.array(sorted(at)), np.array([np.mean(at[step]) for step in sorted(at)])


def curves(xlabel: str, shown: list, doubling: bool = False):
    """A panel for each (title, y axis, its scale, {label: (style, colour, (x, y) or (x, y, error))}, dotted levels) that
    has lines. doubling: x in powers of 2; y and legend are shared."""
    shown = [panel for panel in shown if panel[3]]
    fig, axes = page(len(shown), max(4.8, 7.4 / len(shown)), 4, sharey=doubling)
    for ax, (title, ylabel, scale, lines, dotted) in zip(axes, shown):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel if ax is axes[0] or not doubling else "", yscale=scale)
        for label, (style, colour, xy) in lines.items():
            ax.errorbar(*xy, fmt=style, color=colour, label=label, marker="o" if len(xy[0]) < 15 else None)
        for level in dotted:
            ax.axhline(level, ls=":", color="k", lw=1)
        if doubling:
            log2_axis(ax)
        if ax is axes[-1] or not doubling:
            legend(ax)
    return fig, axes


# curves of a stage: title, y axis, its scale, metrics ("…, ": of each noise level, for the largest K), dotted levels
PANELS = {
    "dm": [("Gap that drives the KL term", r"mean $|\mu_{fake}-\mu_{real}|$", "log", ["gap"], []),
           ("Regression loss", "distance to $y$", "log", ["regression"], []),
           ("Fake denoiser's loss, largest K", "weighted loss", "linear", ["fake loss, "], [])],
    "cd": [("Consistency loss, largest K", "distance of neighbours", "log", ["consistency loss, "], [])],
    "adm": [("Critic (dotted: chance)", "share it gets right", "linear", ["right on real", "right on fake"], [0.5]),
            ("GAN losses (dotted: an undecided critic's)", "softplus", "linear",
             ["GAN loss of G", "GAN loss of the critic"], [np.log(2), 2 * np.log(2)]),
            ("Push on a sample", "RMS gradient in x, weighted", "log", ["push of the DM term", "push of the GAN"], [])]}


def training(folders: dict, stage: str, metric: str, ylabel: str) -> plt.Figure:
    """[MSD Fig. 6]: a stage's curves {K: folder}: a colour per K, means over its students."""
    runs, shown = {K: read_metrics(folder) for K, folder in folders.items()}, []
    distances = ("Distance of each student on its own classes", ylabel, "linear", [metric], [])
    for title, unit, scale, names, dotted in [distances, *PANELS[stage]]:
        lines, largest = {}, runs[max(runs)]
        for i, (K, metrics) in enumerate(runs.items()):
            for name, style in zip(filter(metrics.get, names), ("-", "--")):
                label = f"K = {K}" + f": {name}" * (len(names) > 1)
                lines[label] = style, shade(i, len(runs)), over_students(metrics[name])
        bands = [name for name in largest if names[0].endswith(", ") and name.startswith(names[0])]
        for i, name in enumerate(bands):
            lines[name.split(", ")[1]] = "-", shade(i, len(bands)), over_students(largest[name])
        shown.append((title, unit, scale, lines, dotted))
    return curves(f"generator updates of {stage.upper()}", shown)[0]


def losses(folder: Path, N: int) -> plt.Figure:
    """[O2MKD Fig. 9]: each loss of one student's training, relative to its first value; single batches."""
    lines = {}
    for name, of_student in read_metrics(folder).items():
        steps, value = next(iter(of_student.values()))  # a student that starts as the teacher begins at 0
        lines[f"{name} loss"] = "-", shade(len(lines), 3), (steps, np.array(value) / (value[0] or 1.0))
    title = f"Losses of a student (N = {N}), first seed"
    return curves("updates", [(title, "loss of the batch / that of the first", "log", lines, [])])[0]


def teacher_error(e: dict) -> plt.Figure:
    """The trained denoiser against the exact one, by noise level."""
    title, ylabel = "The trained teacher against the exact denoiser", r"RMS error of $D$ / $c_{out}(\sigma)$"
    lines = {"the teacher": ("-", BLUE, (e["sigma"], e["error"]))}
    fig, (ax,) = curves(r"noise level $\sigma$ (dotted: std of a Gaussian)", [(title, ylabel, "log", lines, [])])
    ax.axvline(toy_mog.STD, ls=":", color="k", lw=1)
    ax.set_xscale("log")
    return fig


def steps_curve(results: dict) -> plt.Figure:
    """[O2MKD Fig. 6]: distance to the data against the multiply-adds of a sample, for each sampler a line per N."""
    cost, m, shown = results["cost"], f"{results['metric']}_data", []
    for sampler in ("heun", "ddim"):
        stages, lines = [stage for stage in results["stages"] if stage.startswith(sampler)], {}
        runs = {n: results["stages"][f"{sampler}-{n}"] for n in sorted(int(stage.split("-")[1]) for stage in stages)}
        for i, N in enumerate(sorted(cost, key=int)):
            each = cost[N]["multiply_adds"] / results["teacher"]["evaluations"] / 1e6
            xy = [(each * (2 * n - 1 if sampler == "heun" else n), of_n[N][m]) for n, of_n in runs.items() if N in of_n]
            label, colour = (f"N = {N}", shade(i, len(cost))) if int(N) else ("teacher", ORANGE)
            lines[label] = "-", colour, np.reshape(xy, (-1, 2)).T
        title = f"{sampler}; from left to right {', '.join(map(str, runs))} steps"
        shown.append((title, distance(results, m), "linear", lines, []))
    return curves("million multiply-adds of a sample", shown, doubling=True)[0]


def figure8(sets: dict) -> plt.Figure:
    """[MSD Fig. 8]: distance to the data against the classes that a student covers: a line per size {size: results}."""
    shown = []
    for stage in dict.fromkeys(stage for r in sets.values() for stage in r["stages"]):
        lines = {}
        for i, (size, r) in enumerate(sets.items()):
            m, of_k = f"{r['metric']}_data", r["stages"].get(stage, {})
            xy = [(r["classes_of_data"] / int(K), row[m], row[f"{m}_sd"] or 0) for K, row in of_k.items()]
            lines[f"{size}: {r['parameters']:,} parameters"] = "-", shade(i, len(sets)), np.reshape(xy, (-1, 3)).T
        lines["teacher"] = "--", ORANGE, ([1, r["classes_of_data"]], [r["teacher"][m]] * 2)
        shown.append((f"after {stage.upper()}", distance(r, m), "linear", lines, []))
    fig, axes = curves("classes that a student covers", shown, doubling=True)
    axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])
    return fig


def feature_drift(found: dict) -> plt.Figure:
    """[O2MKD Fig. 1]: the teacher's bottleneck by noise level: its activations; how far every two levels are apart."""
    fig, (left, right) = page(2, 5.6, 4.2)
    sigma, q = found["sigma"], np.array(found["quantiles"]).T
    for i, label in enumerate(("1 to 99 %", "25 to 75 %")):
        left.fill_between(sigma, q[i], q[4 - i], color=BLUE, alpha=0.3, lw=0, label=label)
    left.plot(sigma, q[2], color=DARK, label="median")
    left.set(title="Activations of the bottleneck", xlabel=r"noise level $\sigma$", ylabel="activation", xscale="log")
    legend(left)
    fig.colorbar(right.pcolormesh(sigma, sigma, found["distance"], shading="gouraud"), ax=right)
    right.set(title="Fréchet distance of the features of two levels", xlabel=r"$\sigma$", ylabel=r"$\sigma$",
              xscale="log", yscale="log", aspect="equal")
    return fig


# --------------------------------------------- samples and distances

def image_panels(panels: dict, columns: int) -> plt.Figure:
    """Panels of images side by side: {title: x [N, C, H, W] uint8}, `columns` images wide each."""
    n, c, h, w = next(iter(panels.values())).shape
    rows, width = math.ceil(n / columns), min(9.0, max(2.6, 16 / len(panels)))
    fig, axes = page(len(panels), width, width * rows * h / (columns * w) + 0.8, pictures=True)
    for ax, (title, x) in zip(axes, panels.items()):
        x = np.concatenate([x, np.zeros((rows * columns - n, c, h, w), np.uint8)])
        picture = x.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
        ax.imshow(np.repeat(picture, 3 // c, 2), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    return fig


def titled(who: str, results: dict, row: dict, m: str) -> str:
    """A panel's title: whose samples, and how far they are, with the first seed."""
    first = row["per_seed"][0]
    return f"{who}: {distance(results, m)} {short(first[m if m in first else 'floor'])}"


def side_by_side(home: Path, teacher: str, folders: dict, differences: bool = False) -> plt.Figure:
    """[MSD Fig. 4, 9]: samples of the teacher, so titled, and of students {title: folder}: of the toy histograms, and
    how they differ from the teacher's; of images a row for each of the first 12 classes."""
    made = {title: run.load_tensors(folder / "samples.pt") for title, folder in folders.items()}
    sets = {teacher: run.load_shards(home / "reference", "report")} | {title: s["x"] for title, s in made.items()}
    if sets[teacher].ndim > 2:
        label = next(iter(made.values()))["label"]
        pick = torch.cat([(label == c).nonzero()[:8, 0] for c in label.unique()[:12]])
        return image_panels({title: images.to_uint8(x[pick]) for title, x in sets.items()}, 8)
    e, shares = toy_mog.EXTENT, {title: toy_mog.histogram(x)[:-1].numpy() / len(x) for title, x in sets.items()}
    panels = [(title, share, DENSITY) for title, share in shares.items()]  # without the last bin, which is outside
    for title in folders if differences else ():
        panels.append((f"|difference|, {title.split(',')[0]}", np.abs(shares[title] - shares[teacher]), GAP))
    fig, axes = page(len(panels), 3.4, 4.2, pictures=True)
    top = np.quantile(shares[teacher][shares[teacher] > 0], 0.98)
    for ax, (title, values, colours) in zip(axes, panels):
        ax.imshow(values.reshape(toy_mog.BINS, -1).T ** 0.5, cmap=colours, vmin=0, vmax=top ** 0.5,
                  extent=(-e, e, -e, e), interpolation="nearest", origin="lower")
        ax.set(title=title, xticks=[], yticks=[], **VIEW)
        ax.spines[:].set_visible(True)
    fig.suptitle(f"Histograms of {len(sets[teacher]):,} samples; colour: square root of share")
    return fig


def by_student(folder: Path, K: int) -> plt.Figure:
    """[MSD Fig. 1]: K students' samples, a colour each, and one class close up."""
    s = run.load_tensors(folder / "samples.pt")
    x, student, label = (s[name][:20_000].numpy() for name in ("x", "student", "label"))
    colours = {"cmap": plt.get_cmap("tab10" if K <= 10 else "turbo", K), "vmin": 0.5, "vmax": K + 0.5}
    fig, (left, right) = page(2, 5.4, 4.8)
    shown = left.scatter(*x.T, s=1, c=student + 1, **colours)
    fig.colorbar(shown, ax=left, label="student", ticks=range(1, K + 1, math.ceil(K / 16)))
    left.set(title="Who generates what", **VIEW)
    right.scatter(*x[label == 0].T, s=2, c=student[label == 0] + 1, **colours)
    for m in toy_mog.means()[0].numpy():
        right.add_patch(plt.Circle(m, 4 * toy_mog.STD, fill=False, lw=0.8))
    right.set(title="Class 0 close up; circles: 4 std of the data's Gaussians", **CLOSE)
    return fig


def scatter(arrays: dict, names: list[str]) -> plt.Figure:
    """A panel per sampler {name: x [N, 2]}, coloured by class: "label" [N]."""
    fig, axes = page(len(names), 4.8, 5, pictures=True)
    for ax, name in zip(axes, names):
        ax.scatter(*arrays[name].T, c=arrays["label"] % toy_mog.CLASSES, s=6, cmap="tab10", vmin=0, vmax=9)
        ax.set(title=f"{name}, N = {len(arrays['label'])}, a colour per class", **VIEW)
    return fig


def bars(results: dict, rows: dict) -> plt.Figure:
    """[MSD Table 1, 5]: distance against K, stages {stage: {K: row}} side by side."""
    m, t, bound = aim(results, rows), results["teacher"], results.get("bound", {})
    lines = {"floor: two draws of the teacher": results.get("floor")}
    if m != "l1":
        floor = "two draws of the data" if m == "l1_data" else "test images"
        lines = {f"teacher, {t['evaluations']} evaluations": t[m], floor: results["floor_data"]}
    if m in bound:
        lines[f"{bound['points']}-point Heun sampler"] = bound[m]
    ks, width = sorted(map(int, set().union(*rows.values()))), 0.8 / len(rows)
    fig, (ax,) = page(1, max(5.6, 1 + 0.6 * len(ks) * len(rows)), 4.4)
    ax.plot([], [], "o", color=DARK, label="one seed")
    for j, (stage, of_k) in enumerate(rows.items()):
        x = [ks.index(int(K)) + (j - (len(rows) - 1) / 2) * width for K in of_k]
        ax.bar(x, [row[m] for row in of_k.values()], 0.94 * width, color=("#c6dbef", "#6baed6", "#fdae6b")[j % 3],
               label=f"after {stage.upper()}, mean over seeds")
        for at, row in zip(x, of_k.values()):
            ax.plot([at] * len(row["per_seed"]), [p[m] for p in row["per_seed"]], "o", color=DARK)
            ax.annotate(short(row[m]), (at, 0), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    levels(ax.axhline, lines)
    ax.set(xticks=range(len(ks)), xticklabels=ks, ylabel=distance(results, m), ylim=(0, None),
           xlabel="number of students" + (f" of size {results['size']}" if "size" in results else " by noise level"))
    fig.suptitle("Stage by stage" if len(rows) > 1 else "More students, better samples?")
    legend(ax, above=True)
    return fig


METRICS = {
    "l1": "$\\ell_1$ to the teacher's samples", "l1_data": "$\\ell_1$ to the data",
    "fd_data": "Fréchet distance to the data", "mode_min": "share of the emptiest mode (1 = fair)",
    "variation": "coefficient of variation of the loss", "fall": "relative fall of the loss",
    "distance": "Fréchet distance of features", "multiply_adds": "million multiply-adds of a sample"}


def claim(name: str, text: str, numbers: dict, metric: str, lines: dict, curves: dict) -> plt.Figure:
    """A claim: numbers {row: [one per seed]} as dots; lines {name: level}; curves {row: (samples, distance)}."""
    unit, n = 1e6 if metric == "multiply_adds" else 1, len(numbers)
    rows = {row: textwrap.fill(row, 40) for row in numbers}
    height = 2.3 + 0.2 * len(lines) + n * (0.16 + 0.16 * max(row.count("\n") + 1 for row in rows.values()))
    fig, axes = page(1 + bool(curves), 6.2, max(height, 4.0) if curves else height)
    ax, right = axes[0], axes[-1]
    for i, (row, values) in enumerate(numbers.items()):
        v = np.array(values) / unit
        ax.plot(v, [i] * len(v), "o", alpha=0.6, color=shade(i, n))
        ax.plot([v.mean()] * 2, [i - 0.32, i + 0.32], color=shade(i, n), lw=2.5)
        ax.annotate(short(v.mean()), (v.max(), i), (6, 0), textcoords="offset points", va="center", fontsize=8)
        if row in curves:
            right.plot(curves[row][0] / 1000, curves[row][1], "-o", color=shade(i, n), label=rows[row])
    levels(ax.axvline, {label: level / unit for label, level in lines.items()})
    ax.margins(x=0.12)  # room for the last number
    ax.set(yticks=range(n), yticklabels=rows.values(), ylim=(n - 0.4, -0.6),
           xlabel=f"{METRICS.get(metric, metric)} (dot: one seed, bar: their mean)")
    if lines:
        legend(ax, above=True)
    if curves:
        right.set(yscale="log", ylabel="$\\ell_1$ on its own classes, first seed",
                  xlabel="thousands of samples that a student has seen")
        log2_axis(right)
        legend(right)
    fig.suptitle(f"{name}: {text}", fontsize=10)
    return fig


# -------------------------------------------------------- the command

def compare(out: Path, tags: list[str]) -> plt.Figure:
    """The largest K of each TAG or TAG/STAGE, the teacher first. UserError if they don't belong together."""
    folders, homes = {}, set()
    for name in tags:
        tag, _, stage = name.partition("/")
        suffix = run.suffix("" if tag == "none" else tag)
        results = run.load_json(out / f"results{suffix}.json", "seeds", "stages")
        rows, home, m = results["stages"], out / f"seed{results['seeds'][0]}", f"{results['metric']}_data"
        stage = stage or list(rows)[-1]
        homes.add(home)
        if stage not in rows or len(homes) > 1:
            raise UserError(f"--compare {name}: no stage {stage}, or another first seed than {tags[0]}")
        K = max(rows[stage], key=int)
        title = titled(f"{name}, K = {K}, {stage.upper()}", results, rows[stage][K], m)
        folders[title] = home / f"students{K}{suffix}" / stage
    return side_by_side(home, titled("teacher", results, results["teacher"], m), folders)


def draw(out, tag: str = "") -> list[Path]:
    """Draw every figure that the files of a run folder allow; returns their paths."""
    out, suffix = Path(out), run.suffix(tag)  # a tag that cannot be part of a file's name has no results
    results = run.load_json(out / f"results{suffix}.json", "seeds", "students", "stages", "metric")
    home, rows, toy = out / f"seed{results['seeds'][0]}", results["stages"], results["metric"] == "l1"
    ks, by_noise = sorted(map(int, results["students"])), "method" in results
    last = "o2mkd" if by_noise else list(rows)[-1]

    def folder(K: int, stage: str) -> Path:  # by noise level the tags are o2mkd and o2mkd-TAG
        return home / (f"o2mkd{K}{suffix.removeprefix('-o2mkd')}" if by_noise else f"students{K}{suffix}/{stage}")

    evaluations, m = results["teacher"]["evaluations"], aim(results, [last])
    cost = f"{evaluations} evaluations in turn" if by_noise else "one evaluation"
    teacher = f"teacher, {2 * results['steps'] - 1 if by_noise else evaluations} evaluations"  # its kept samples: Heun's
    shown = {}
    for K in sorted({ks[0], ks[-1]}) if toy else ks:
        title = titled(f"{K} student{'s' * (K > 1)}, {cost}", results, results["students"][str(K)], m)
        shown[title] = folder(K, last)
    samples = side_by_side(home, titled(teacher, results, results["teacher"], m), shown, differences=True)
    against_k = bars(results, {last: results["students"]})
    if by_noise:
        figures = {"samples": samples, "students": against_k}
        first, drift = folder(ks[0], last) / ("" if toy else "student0"), home / "teacher" / "drift.json"
        if read_metrics(first):
            figures["losses"] = losses(first, ks[0])
        if drift.exists():
            figures["drift"] = feature_drift(run.load_json(drift, "sigma"))
        if any(stage.startswith("heun-") for stage in rows):
            figures["curve"] = steps_curve(results)
    else:
        figures = {"figure4": samples, "l1": against_k} if toy else {"samples": samples, "fd": against_k}
        if toy:
            figures["students"] = by_student(folder(ks[-1], last), ks[-1])
        for stage in filter(rows.get, PANELS):
            name, m = ("gan", aim(results, rows)) if stage == "adm" else ("training", results["metric"])
            figures[name] = training({K: folder(K, stage) for K in ks}, stage, m, distance(results, m))
        if last not in ("dm", "cd"):
            figures["stages"] = bars(results, rows)
        if (error := home / "teacher" / "error.json").exists():
            figures["teacher"] = teacher_error(run.load_json(error, "sigma", "error"))
    figures = {f"{name}{suffix}": fig for name, fig in figures.items()}
    paths = [out / f"results{run.suffix(size)}.json" for size in ("XXS", "XS", "S", "B", "")]
    sizes = [r for r in map(run.load_json, filter(Path.exists, paths)) if len(r["students"]) > 1]
    if len(sizes) > 1 and not by_noise:
        figures["figure8"] = figure8({r["size"]: r for r in sizes})
    return [save(fig, out / "figures" / f"{name}.png") for name, fig in figures.items()]


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("tag", nargs="?", default="")
    parser.add_argument("--compare", nargs="+", metavar="TAG")
    given = parser.parse_args(argv)
    if given.compare:
        path = given.run / "figures" / f"compare-{'-'.join(given.compare).replace('/', '-')}.png"
        print(save(compare(given.run, given.compare), path))
    else:
        print("\n".join(map(str, draw(given.run, given.tag))))


if __name__ == "__main__":
    main()
