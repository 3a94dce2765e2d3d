"""Every picture, drawn from the files of a run folder alone: `python plot.py runs/toy [TAG]` draws them again.

With --compare TAG TAG …: variants side by side ("none": the one without a tag; TAG/dm: an earlier stage).

  msd.py      figure4, l1, students, teacher (the toy); samples, fd (images); training, gan, stages, figure8 (both)
  o2mkd.py    samples-o2mkd, students-o2mkd, losses-o2mkd, drift-o2mkd, curve-o2mkd

The one file that imports matplotlib. Every figure is made by `page`, whose layout keeps all text whole.
"""
import argparse
import csv
import math
import os
import re
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
PLANE = {"xlabel": "$x_1$", "ylabel": "$x_2$", "aspect": "equal"}  # of the toy's samples
VIEW = PLANE | {"xlim": (-0.65, 0.65), "ylim": (-0.65, 0.65)}


class Whole(ConstrainedLayoutEngine):
    """Layout of every figure: no text is cut off or lies on another, however few or many panels there are.

    matplotlib finds room for labels, legends and the height of titles, but lets a title run over the sides of its
    panel: here titles and axis labels are broken into lines as long as their panel."""

    def execute(self, fig):
        for _ in range(4):  # more lines leave the panels less room
            super().execute(fig)
            changed = [break_lines(text, 0.97 * fig.bbox.width) for text in fig.texts]
            for ax in fig.axes:
                changed += [break_lines(text, ax.bbox.width) for text in (ax.title, ax.xaxis.label)]
                changed += [break_lines(ax.yaxis.label, ax.bbox.height)]
            if not any(changed):
                return


def break_lines(text, room: float) -> bool:
    """Break a text into lines of at most `room` pixels; smaller letters if a word is longer. Did anything change?"""
    def length(words: str) -> float:
        text.set_text(words)
        box = text.get_window_extent()
        return box.height if text.get_rotation() else box.width

    before, lines = text.get_text(), [""]
    for word in re.findall(r"(?:\$[^$]*\$|\S)+", before):  # a formula is one word
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    longest = length("\n".join(lines))
    if longest > room:
        text.set_fontsize(0.98 * text.get_fontsize() * room / longest)
    return text.get_text() != before or longest > room


def page(columns: int, width: float, height: float, pictures=False, sharey=False):
    """A figure and its axes [columns], each `width` x `height` inches with its labels; pictures: no gaps between."""
    layout = Whole(compress=pictures)
    fig, axes = plt.subplots(1, columns, figsize=(columns * width, height), layout=layout, sharey=sharey, squeeze=False)
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


def named(results: dict) -> str:
    """The distance, as an axis names it."""
    return "$\\ell_1$" if results["metric"] == "l1" else results["title"]


def save(fig: plt.Figure, path: Path) -> Path:
    """Save a figure, atomically; returns its path."""
    run.write_atomic(path, lambda t: fig.savefig(t, format="png"))
    plt.close(fig)
    return path


def beside(path: Path, document: Path) -> str:
    """The path of a picture as a document in another folder names it."""
    return os.path.relpath(path, document.parent)


# ---------------------------------------- curves

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


def curves(xlabel: str, shown: list, sharey: bool = False):
    """A panel for each (title, y axis, its scale, lines [(label, style, colour, (x, y))], dotted levels) with lines."""
    shown = [panel for panel in shown if panel[3]]
    fig, axes = page(len(shown), max(4.8, 7.4 / len(shown)), 4, sharey=sharey)
    for ax, (title, ylabel, scale, lines, dotted) in zip(axes, shown):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale=scale)
        for label, style, colour, (x, y) in lines:
            ax.plot(x, y, style, color=colour, label=label, marker="o" if len(x) < 15 else None)
        for level in dotted:
            ax.axhline(level, ls=":", color="k", lw=1)
        legend(ax)
    return fig, axes


# curves of a stage: title, y axis, its scale, metrics ("…, ": of each noise level, for the largest K), dotted levels
PANELS = {
    "dm": [("Gap that drives the KL term", r"mean $|\mu_{fake} - \mu_{real}|$", "log", ["gap"], []),
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
    largest = runs[max(runs)]
    distance = ("Distance of each student on its own classes", ylabel, "linear", [metric], [])
    for title, unit, scale, names, dotted in [distance, *PANELS[stage]]:
        lines = []
        for i, (K, metrics) in enumerate(runs.items()):
            for name, style in zip(names, ("-", "--")):
                if name in metrics:
                    label = f"K = {K}" if len(names) == 1 else name if i == 0 else None
                    lines.append((label, style, shade(i, len(runs)), over_students(metrics[name])))
        bands = [name for name in largest if names[0].endswith(", ") and name.startswith(names[0])]
        for i, name in enumerate(bands):
            lines.append((name.split(", ")[1], "-", shade(i, len(bands)), over_students(largest[name])))
        shown.append((title, unit, scale, lines, dotted))
    return curves(f"generator updates of {stage.upper()}", shown)[0]


def losses(folder: Path, N: int) -> plt.Figure:
    """[O2MKD Fig. 9]: each loss of one student's training, relative to its first value; single batches."""
    lines = []
    for i, (name, of_student) in enumerate(read_metrics(folder).items()):
        steps, value = next(iter(of_student.values()))  # a student that starts as the teacher begins at 0
        lines.append((f"{name} loss", "-", shade(i, 3), (steps, np.array(value) / (value[0] or 1.0))))
    title = f"Losses of a student (N = {N}), first seed"
    return curves("updates", [(title, "loss of the batch / that of the first", "log", lines, [])])[0]


def teacher_error(e: dict) -> plt.Figure:
    """The trained denoiser against the exact one, by noise level."""
    title, ylabel = "The trained teacher against the exact denoiser", r"RMS error of $D$ / $c_{out}(\sigma)$"
    lines = [("the teacher", "-", BLUE, (e["sigma"], e["error"]))]
    fig, (ax,) = curves(r"noise level $\sigma$ (dotted: std of a Gaussian)", [(title, ylabel, "log", lines, [])])
    ax.axvline(toy_mog.STD, ls=":", color="k", lw=1)
    ax.set_xscale("log")
    return fig


def steps_curve(results: dict) -> plt.Figure:
    """[O2MKD Fig. 6]: distance to the data against the multiply-adds of a sample, for each sampler a line per N."""
    cost, shown = results["cost"], []
    for sampler in ("heun", "ddim"):
        runs = {int(s.split("-")[1]): of_n for s, of_n in results["stages"].items() if s.startswith(f"{sampler}-")}
        lines = []
        for i, N in enumerate(sorted(cost, key=int)):
            each = cost[N]["multiply_adds"] / results["teacher"]["evaluations"] / 1e6
            steps = [n for n in sorted(runs) if N in runs[n]]
            x = [each * (2 * n - 1 if sampler == "heun" else n) for n in steps]
            y = [runs[n][N][f"{results['metric']}_data"] for n in steps]
            label, colour = (f"N = {N}", shade(i, len(cost))) if int(N) else ("teacher", ORANGE)
            lines.append((label, "-", colour, (x, y)))
        title = f"{sampler}; from left to right {', '.join(map(str, sorted(runs)))} steps"
        shown.append((title, f"{named(results)} to the data", "linear", lines, []))
    fig, axes = curves("million multiply-adds of a sample", shown, sharey=True)
    for ax in axes:
        log2_axis(ax)
    return fig


def feature_drift(found: dict) -> plt.Figure:
    """[O2MKD Fig. 1]: the teacher's bottleneck by noise level: its activations; how far every two levels are apart."""
    fig, (left, right) = page(2, 5.6, 4.2)
    sigma, q = np.array(found["sigma"]), np.array(found["quantiles"])
    left.fill_between(sigma, q[:, 0], q[:, 4], color=BLUE, alpha=0.25, lw=0, label="1 to 99 %")
    left.fill_between(sigma, q[:, 1], q[:, 3], color=BLUE, alpha=0.5, lw=0, label="25 to 75 %")
    left.plot(sigma, q[:, 2], color=DARK, label="median")
    left.set(title="Activations of the bottleneck", xlabel=r"noise level $\sigma$", ylabel="activation", xscale="log")
    legend(left)
    fig.colorbar(right.imshow(found["distance"], origin="lower"), ax=right)
    ticks = range(0, len(sigma), math.ceil(len(sigma) / 5))
    names = [f"{sigma[i]:.2g}" for i in ticks]
    right.set(title="Fréchet distance of the features of two levels", xlabel=r"$\sigma$", ylabel=r"$\sigma$",
              xticks=ticks, xticklabels=names, yticks=ticks, yticklabels=names)
    return fig


# ---------------------------------------- samples and distances

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


def side_by_side(home: Path, toy: bool, teacher: str, folders: dict, differences: bool = False) -> plt.Figure:
    """[MSD Fig. 4, 9]: samples of the teacher, so titled, and of students {title: folder}: of the toy histograms, and
    how they differ from the teacher's; of images a row for each of the first 12 classes."""
    made = {title: run.load_tensors(folder / "samples.pt") for title, folder in folders.items()}
    sets = {teacher: run.load_shards(home / "reference", "report")} | {title: s["x"] for title, s in made.items()}
    if not toy:
        label = next(iter(made.values()))["label"]
        pick = torch.cat([(label == c).nonzero()[:8, 0] for c in label.unique()[:12]])
        return image_panels({title: images.to_uint8(x[pick]) for title, x in sets.items()}, 8)
    e, panels = toy_mog.EXTENT, []
    for title, x in sets.items():
        panels.append((title, toy_mog.histogram(x)[:-1].numpy() / len(x), DENSITY))  # the last bin: outside
    share = panels[0][1]
    for title, other, _ in panels[1:] if differences else ():
        panels.append((f"|difference|, {title.split(',')[0]}", np.abs(other - share), GAP))
    fig, axes = page(len(panels), 3.4, 4.2, pictures=True)
    for ax, (title, values, colours) in zip(axes, panels):
        ax.imshow(values.reshape(toy_mog.BINS, -1).T ** 0.5, cmap=colours, vmin=0, extent=(-e, e, -e, e),
                  vmax=np.quantile(share[share > 0], 0.98) ** 0.5, interpolation="nearest", origin="lower")
        ax.set(title=title, xticks=[], yticks=[], **VIEW)
        ax.spines[:].set_visible(True)
    fig.suptitle(f"Mixture of 64 Gaussians, 8 classes: histograms of {len(x):,} samples; colour: square root of share")
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
    right.set(title="Class 0 close up; circles: 4 std of the data's Gaussians", xlim=(0.36, 0.64), ylim=(-0.14, 0.14),
              **PLANE)
    return fig


def scatter(arrays: dict, names: list[str]) -> plt.Figure:
    """A panel per sampler {name: x [N, 2]}, coloured by class: "label" [N]."""
    fig, axes = page(len(names), 4.8, 5, pictures=True)
    for ax, name in zip(axes, names):
        ax.scatter(*arrays[name].T, c=arrays["label"] % toy_mog.CLASSES, s=6, cmap="tab10", vmin=0, vmax=9)
        ax.set(title=f"{name}, N = {len(arrays['label'])}, a colour per class", **VIEW)
    return fig


def bars(results: dict, rows: dict) -> plt.Figure:
    """[MSD Table 1, 5]: distance against K, stages {stage: {K: row}} side by side: to the data, but of the toy's DM or
    CD alone to the teacher."""
    m, toy, t = results["metric"], results["metric"] == "l1", results["teacher"]
    to, lines = "teacher", {"floor: two draws of the teacher": results.get("floor")}
    if not toy or list(rows) not in (["dm"], ["cd"]):
        m, to, floor = f"{m}_data", "data", "two draws of the data" if toy else "test images"
        lines = {f"teacher, {t['evaluations']} evaluations": t[m], floor: results["floor_data"]}
    if m in (bound := results.get("bound", {})):
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
    ax.set(xticks=range(len(ks)), xticklabels=ks, ylabel=f"{named(results)} to the {to}", ylim=(0, None),
           xlabel="number of students" + (f" of size {results['size']}" if "size" in results else " by noise level"))
    fig.suptitle("Stage by stage" if len(rows) > 1 else "More students, better samples?")
    legend(ax, above=True)
    return fig


def figure8(sets: dict) -> plt.Figure:
    """[MSD Fig. 8]: distance to the data against the classes that a student covers: a line per size {size: results}."""
    names = list(dict.fromkeys(stage for r in sets.values() for stage in r["stages"]))
    fig, axes = page(len(names), 5.2, 4, sharey=True)
    for ax, stage in zip(axes, names):
        for i, (size, r) in enumerate(sets.items()):
            m, of_k = f"{r['metric']}_data", r["stages"].get(stage, {})
            ks = sorted(of_k, key=int)
            error = [of_k[K][f"{m}_sd"] or 0 for K in ks]
            ax.errorbar([r["classes_of_data"] / int(K) for K in ks], [of_k[K][m] for K in ks], error, marker="o",
                        capsize=3, color=shade(i, len(sets)), label=f"{size}: {r['parameters']:,} parameters")
        ax.axhline(r["teacher"][m], ls="--", color=ORANGE, lw=1, label="teacher")
        ax.set(title=f"after {stage.upper()}", xlabel="classes that a student covers")
        log2_axis(ax)
    axes[0].set(ylabel=f"{named(r)} to the data", ylim=(0, 1.05 * axes[0].get_ylim()[1]))
    legend(axes[-1])
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


# ---------------------------------------- the command

def compare(out: Path, tags: list[str]) -> plt.Figure:
    """The largest K of each TAG or TAG/STAGE, the teacher first. UserError if they don't belong together."""
    folders, homes = {}, set()
    for name in tags:
        tag, _, stage = name.partition("/")
        tag = "" if tag == "none" else tag
        results = run.load_json(out / f"results{run.suffix(tag)}.json", "seeds", "stages")
        rows, home, m = results["stages"], out / f"seed{results['seeds'][0]}", f"{results['metric']}_data"
        stage = stage or list(rows)[-1]
        homes.add(home)
        if stage not in rows or len(homes) > 1:
            raise UserError(f"--compare {name}: no stage {stage}, or another first seed than {tags[0]}")
        K = max(rows[stage], key=int)
        title = f"{name}, K = {K}, {stage.upper()}: to data {short(rows[stage][K]['per_seed'][0][m])}"
        folders[title] = home / f"students{K}{run.suffix(tag)}" / stage
    teacher = f"teacher: {named(results)} to data {short(results['teacher']['per_seed'][0][m])}"
    return side_by_side(home, m == "l1_data", teacher, folders)


def draw(out, tag: str = "") -> list[Path]:
    """Draw every figure that the files of a run folder allow; returns their paths."""
    out, suffix = Path(out), run.suffix(tag)  # a tag that cannot be part of a file's name has no results
    results = run.load_json(out / f"results{suffix}.json", "seeds", "students", "stages", "metric")
    home, m, t, rows = out / f"seed{results['seeds'][0]}", results["metric"], results["teacher"], results["stages"]
    toy, by_noise = m == "l1", "method" in results  # by noise level: the tags are o2mkd and o2mkd-TAG
    ks, last = sorted(map(int, results["students"])), "o2mkd" if by_noise else list(rows)[-1]

    def folders(stage: str) -> dict:
        name = f"o2mkd{{}}{suffix.removeprefix('-o2mkd')}" if by_noise else f"students{{}}{suffix}/{stage}"
        return {K: home / name.format(K) for K in ks}

    cost, evaluations, titles = "one evaluation", t["evaluations"], {}
    if by_noise:  # the teacher's kept samples are always Heun's
        cost, evaluations = f"{evaluations} evaluations in turn", 2 * results["steps"] - 1
    for K in sorted({ks[0], ks[-1]}) if toy else ks:
        l1 = f"; to the teacher: $\\ell_1 = {results['students'][str(K)]['per_seed'][0]['l1']:.3f}$" if toy else ""
        titles[f"{K} student{'s' * (K > 1)}, {cost}{l1}"] = folders(last)[K]
    floor = f"; two draws of it: $\\ell_1 = {t['per_seed'][0]['floor']:.3f}$" if toy else ""
    samples = side_by_side(home, toy, f"teacher, {evaluations} evaluations{floor}", titles, differences=True)
    against_k = bars(results, {last: results["students"]})
    if by_noise:
        figures = {"samples": samples, "students": against_k}
        first, drift = folders(last)[ks[0]] / ("" if toy else "student0"), home / "teacher" / "drift.json"
        if read_metrics(first):
            figures["losses"] = losses(first, ks[0])
        if drift.exists():
            figures["drift"] = feature_drift(run.load_json(drift, "sigma"))
        if any(stage.startswith("heun-") for stage in rows):
            figures["curve"] = steps_curve(results)
        return [save(fig, out / "figures" / f"{name}{suffix}.png") for name, fig in figures.items()]
    figures = {"figure4": samples, "l1": against_k} if toy else {"samples": samples, "fd": against_k}
    if toy:
        figures["students"] = by_student(folders(last)[ks[-1]], ks[-1])
    for stage in filter(rows.get, PANELS):
        name, of, to = ("gan", f"{m}_data", "data") if stage == "adm" else ("training", m, "teacher" if toy else "data")
        figures[name] = training(folders(stage), stage, of, f"{named(results)} to the {to}")
    if last not in ("dm", "cd"):
        figures["stages"] = bars(results, rows)
    if (error := home / "teacher" / "error.json").exists():
        figures["teacher"] = teacher_error(run.load_json(error, "sigma", "error"))
    figures = {f"{name}{suffix}": fig for name, fig in figures.items()}
    paths = [out / f"results{run.suffix(size)}.json" for size in ("XXS", "XS", "S", "B", "")]
    sizes = [r for r in map(run.load_json, filter(Path.exists, paths)) if len(r["students"]) > 1]
    if len(sizes) > 1:
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
