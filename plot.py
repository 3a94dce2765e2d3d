"""Every picture, drawn from the files of a run folder alone: `python plot.py runs/toy [TAG]` draws them again.

The one file that imports matplotlib.
"""
import argparse
import contextlib
import csv
import math
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine

import common
import data
import dmd
import edm
import images
import run
import students
import toy_mog
from flags import command

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 8, "lines.markersize": 4})
VIEW = dict(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-0.65, 0.65), ylim=(-0.65, 0.65))


class Whole(ConstrainedLayoutEngine):
    """Titles and labels in lines as long as their panel; no spaces in a formula."""

    def execute(self, fig):
        for _ in range(5):  # more lines leave the panels less room
            super().execute(fig)
            rooms = [(text, 0.97 * fig.bbox.width) for text in fig.texts]
            for ax in fig.axes:
                rooms += [(ax.title, ax.bbox.width), (ax.xaxis.label, ax.bbox.width), (ax.yaxis.label, ax.bbox.height)]
            if not any([broken(text, room) for text, room in rooms]):
                break


def broken(text, room: float) -> bool:
    """Was it longer than `room` pixels? Now it has more lines."""
    words, box = text.get_text(), text.get_window_extent()
    excess = (box.height if text.get_rotation() else box.width) / room
    if excess > 1:
        letters = max(map(len, words.split("\n"))) / excess
        text.set_text(textwrap.fill(words, int(letters), break_on_hyphens=False))
    return excess > 1


def page(columns: int, width: float, height: float, sharey=False):
    """A figure and its axes [columns], of `width` x `height` inches each; no text is cut off or on another."""
    fig, axes = plt.subplots(1, columns, figsize=(columns * width, height), layout=Whole(compress=True), sharey=sharey,
                             squeeze=False)
    for ax in axes[0]:
        ax.locator_params(axis="x", nbins=int(width))  # room for six digits
    return fig, axes[0]


def shade(i: int, n: int):
    """The colour of the i-th of n lines."""
    return plt.cm.viridis(0.9 * i / max(1, n - 1))


def short(value: float) -> str:
    """A number, with three digits."""
    return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"


def aim(results: dict, stages) -> str:
    """The distance in question: to the data, but of the toy's DM or CD alone to the teacher."""
    return "l1" if results["metric"] == "l1" and {*stages} <= {"dm", "cd"} else f"{results['metric']}_data"


def distance(results: dict, m: str) -> str:
    """A distance in words; of images always to the data."""
    name = "$\\ell_1$" if results["metric"] == "l1" else results["title"]
    return f"{name} to the {'teacher' if m == 'l1' else 'data'}"


def save(fig: plt.Figure, path: Path) -> Path:
    """Save a figure, atomically; returns its path."""
    run.write_atomic(path, lambda t: fig.savefig(t, format="png"))
    plt.close(fig)
    return path


# ---- curves

def read_metrics(folder: Path) -> dict:
    """metrics.csv, of image students all of theirs -> {name: {student: (steps, values)}}."""
    rows: dict = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for path in sorted(folder.glob("**/metrics.csv")):
        for r in csv.DictReader(path.read_text(errors="replace").splitlines()):
            if r["value"]:  # else a full disk or a kill cut the row off
                steps, values = rows[r["name"]][int(r["student"]) if path.parent == folder else path.parent.name]
                steps.append(int(r["step"]))
                values.append(float(r["value"]))
    return rows


def over_students(by_student: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over the students of one metric; a student without samples in a band lacks a step."""
    steps, values = (np.concatenate(part) for part in zip(*by_student.values()))
    at = np.unique(steps)
    return at, np.array([values[steps == step].mean() for step in at])


def curves(xlabel: str, shown: list, doubling: bool = False):
    """A panel for each (title, y axis, scale, lines [(label, style, colour, (x, y) or (x, y, error))], *dotted levels)
    with lines; doubling: x in powers of 2, y and legend shared."""
    shown = [panel for panel in shown if panel[3]]
    fig, axes = page(len(shown), max(4.8, 7.4 / len(shown)), 4, sharey=doubling)
    for ax, (title, ylabel, scale, lines, *dotted) in zip(axes, shown):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale=scale)
        for label, style, colour, xy in lines:
            ax.errorbar(*xy, fmt=style, color=colour, label=label, marker="o" if len(xy[0]) < 15 else None)
        for level in dotted:
            ax.axhline(level, ls=":", color="k", lw=1)
        if doubling:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:.3g}")
        if not doubling or ax is axes[-1]:
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))  # never over the data
    return fig


# curves of a stage: title, y axis, its scale, metrics, dotted levels; "…, " and "": all that begin so, of one K
PANELS = {
    "dm": [("Gap that drives the KL term", r"mean $|\mu_{fake}-\mu_{real}|$", "log", ["gap"]),
           ("Regression loss", "distance to $y$", "log", ["regression"]),
           ("Fake denoiser's loss, largest K", "weighted loss", "linear", ["fake loss, "])],
    "cd": [("Consistency loss, largest K", "distance of neighbours", "log", ["consistency loss, "])],
    "adm": [("Critic (dotted: chance)", "share it gets right", "linear", ["right on real", "right on fake"], 0.5),
            ("GAN losses (dotted: an undecided critic's)", "softplus", "linear",
             ["GAN loss of G", "GAN loss of the critic"], math.log(2), 2 * math.log(2)),
            ("Push on a sample", "RMS gradient in x, weighted", "log", ["push of the DM term", "push of the GAN"])],
    "o2mkd": [("Losses of single batches, first seed, fewest students", "mean over students", "log", [""])]}


def training(folders: dict, stage: str, panels: list) -> plt.Figure:
    """[MSD Fig. 6], [O2MKD Fig. 9]: a stage's curves {K: folder}: a colour per K, means over its students."""
    runs, shown = {K: read_metrics(folder) for K, folder in folders.items()}, []
    for title, unit, scale, names, *dotted in panels:
        lines, all_of = [], names[0].endswith(", ") or not names[0]  # then a colour per metric
        for i, K in enumerate([max(runs)] if all_of else runs):
            found = [name for name in runs[K] if name.startswith(tuple(names))]
            for j, name in enumerate(found):
                label = f"K = {K}" if len(found) == 1 else name.split(", ")[-1] if i == 0 else None
                style, colour = ("-", shade(j, len(found))) if all_of else (("-", "--")[j], shade(i, len(runs)))
                lines.append((label, style, colour, over_students(runs[K][name])))
        shown.append((title, unit, scale, lines, *dotted))
    return curves(f"updates of {stage.upper()}", shown)


def steps_curve(results: dict) -> plt.Figure:
    """[O2MKD Fig. 6]: distance to the data against the multiply-adds of a sample, for each sampler a line per N."""
    cost, m, shown = results["cost"], f"{results['metric']}_data", []
    for sampler in edm.SAMPLERS:
        lines = []
        for i, N in enumerate(sorted(cost, key=int)):
            each, xy = cost[N]["multiply_adds"] / results["teacher"]["evaluations"] / 1e6, []
            for stage, of_n in results["stages"].items():
                if stage.startswith(f"{sampler}-") and N in of_n:
                    xy.append((each * edm.evaluations(int(stage.split("-")[1]), sampler), of_n[N][m]))
            if xy:
                label = f"N = {N}" if int(N) else "teacher"
                lines.append((label, "-", shade(i, len(cost)), np.transpose(sorted(xy))))
        shown.append((sampler, distance(results, m), "linear", lines))
    return curves("million multiply-adds of a sample", shown, doubling=True)


def figure8(sets: dict) -> plt.Figure:
    """[MSD Fig. 8]: distance to the data against the classes that a student covers, of {size: results}."""
    shown = []
    for stage in dict.fromkeys(stage for r in sets.values() for stage in r["stages"]):
        lines = []
        for i, (size, r) in enumerate(sets.items()):
            m, of_k = f"{r['metric']}_data", r["stages"].get(stage, {})
            xy = [(r["classes_of_data"] / int(K), row[m], row[f"{m}_sd"] or 0) for K, row in of_k.items()]
            lines.append((f"size {size}", "-", shade(i, len(sets)), np.reshape(sorted(xy), (-1, 3)).T))
        lines.append(("teacher", "--", "C1", ([1, r["classes_of_data"]], [r["teacher"][m]] * 2)))
        shown.append((f"after {stage.upper()}", distance(r, m), "linear", lines))
    fig = curves("classes that a student covers", shown, doubling=True)
    fig.axes[0].set_ylim(bottom=0)
    return fig


def feature_drift(found: dict) -> plt.Figure:
    """[O2MKD Fig. 1]: the teacher's bottleneck by noise level."""
    (fig, (left, right)), sigma = page(2, 5.6, 4.2), found["sigma"]
    left.plot(sigma, found["quantiles"], color="C0")
    left.set(title="Activations of the bottleneck: quantiles 1, 25, 50, 75, 99 %", xlabel=r"$\sigma$", xscale="log")
    fig.colorbar(right.pcolormesh(sigma, sigma, found["distance"], shading="gouraud"), ax=right)
    right.set(title="Fréchet distance of the features of two levels", xlabel=r"$\sigma$", xscale="log", yscale="log")
    return fig


# ---- samples and distances

def image_panels(panels: dict, columns: int) -> plt.Figure:
    """Panels of images side by side: {title: x [N, C, H, W] uint8}, `columns` images wide each."""
    n, c, h, w = next(iter(panels.values())).shape
    rows, width = math.ceil(n / columns), min(9.0, max(2.6, 16 / len(panels)))
    fig, axes = page(len(panels), width, width * rows * h / (columns * w) + 0.8)
    for ax, (title, x) in zip(axes, panels.items()):
        x = torch.cat([x, x.new_zeros(rows * columns - n, c, h, w)]).unflatten(0, (rows, columns))
        picture = x.permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c).expand(-1, -1, 3)
        ax.imshow(picture.numpy(), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    return fig


def progress(folders: dict, m: str) -> dict:
    """Samples of the same latents {"300 updates": x [N, C, H, W]} at the first evaluations and the last, for each K
    about 20; folders {K: of a stage}. Without K whose checkpoints lack them, or are gone."""
    panels = defaultdict(list)
    for K, folder in folders.items():
        there = filter(Path.exists, (folder / f"student{k}" / "state.pt" for k in range(K)))
        seen = [run.load_tensors(path, "parts", mmap=True)["parts"]["record"].get("seen", []) for path in there]
        at, _ = over_students(read_metrics(folder)[m])
        if [*map(len, seen)] == [len(at)] * K:
            for i in {2 ** j - 1 for j in range(10) if 2 ** j <= len(at)} | {len(at) - 1}:
                panels[at[i]] += [of_student[i][0, :max(1, 20 // K)] for of_student in seen]
    return {f"{step} updates": images.to_uint8(torch.cat(panels[step])) for step in sorted(panels)}


def samples_of(home: Path, results: dict, folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept samples and labels of students, or of the teacher."""
    if folder:
        made = run.load_tensors(folder / "samples.pt", "x", "label")
        return made["x"], made["label"]
    x = run.load_shards(home / "reference", "report")
    return x, data.stratified(len(x), data.facts(results["dataset"]).classes)


def side_by_side(home: Path, results: dict, shown: list, m: str, of_k: dict) -> plt.Figure:
    """[MSD Fig. 4, 9]: samples of the teacher and of students [(who, row, folder)], with their distance m; of the toy
    also this distance against K, of rows of_k {K: row}."""
    n = edm.evaluations(results["steps"]) if "method" in results else results["teacher"]["evaluations"]  # kept: Heun's
    sets = {}
    for who, row, folder in [(f"teacher, {n} evaluations", results["teacher"], None), *shown]:
        first = row["per_seed"][0]
        title = f"{who}: {distance(results, m)} {short(first[m if m in first else 'floor'])}"
        sets[title] = samples_of(home, results, folder)
    if results["metric"] != "l1":
        x, label = [*sets.values()][-1]
        pick = torch.cat([(label == c).nonzero()[:8, 0] for c in label.unique()[:12]])
        return image_panels({title: images.to_uint8(x[pick]) for title, (x, _) in sets.items()}, 8)
    fig, against = points(sets)
    for K, row in of_k.items():
        y = [seed[m] for seed in row["per_seed"]]
        against.plot([int(K)] * len(y), y, "o", color="C0")
    against.axhline(results["floor" if m == "l1" else "floor_data"], ls=":", color="k", lw=1)
    against.set_xscale("log", base=2)
    against.xaxis.set_major_formatter("{x:.3g}")
    against.set(xlabel="students (dotted: two draws)", title=distance(results, m), ylim=(0, None), box_aspect=1)
    return fig


CLOSE_UP = VIEW | dict(xlim=(0.36, 0.64), ylim=(-0.14, 0.14))  # of class 0


def points(sets: dict, number: int = 20_000):
    """Samples {title: (x [N, 2], label [N])}, below class 0 close up; red: astray (circles: 4 std). Returns the
    figure, and a free panel."""
    fig, axes = plt.subplots(2, 1 + len(sets), figsize=(3.6 + 3.6 * len(sets), 7.8), layout=Whole())
    axes[1, -1].axis("off")
    for (title, (x, label)), whole, ring in zip(sets.items(), *axes):
        astray = toy_mog.astray(x, label)
        for ax, view, size in ((whole, VIEW, 0.5), (ring, CLOSE_UP, 4)):
            for which, colour in ((~astray[:number], "0.25"), (astray[:number], "C3")):
                ax.scatter(*x[:number][which].T, s=size, c=colour, lw=0)
            ax.set(xticks=[], yticks=[], **view)
        whole.set(title=title, xlabel=f"astray: {astray.double().mean():.1%}", ylabel="")
        ring.set(xlabel="class 0 close up", ylabel="")
        for m in toy_mog.means()[0].numpy():
            ring.add_patch(plt.Circle(m, 4 * toy_mog.STD, fill=False, lw=0.8))
    fig.suptitle(f"{min(number, len(x)):,} samples each; red: beyond 4 std of every Gaussian of their class")
    return fig, axes[0, -1]


def why(home: Path, results: dict, folders: dict) -> plt.Figure:
    """What DM does to class 0 at its first checkpoint and its last, and whose latents go astray; folders {K: of DM}."""
    fig, axes = plt.subplots(2, 3, figsize=(12.6, 8.4), layout=Whole())
    for (field, fake, _), name in zip(axes, ("state.first.pt", "state.pt")):
        pull(field, fake, home / "teacher" / "ema.pt", folders[max(folders)], name)
    for ax, K in zip(axes[:, 2], (min(folders), max(folders))):
        x, label = samples_of(home, results, folders[K])
        z = torch.randn(*x.shape, generator=common.generator(results["seeds"][0], "report z"))
        of_0 = (label % toy_mog.CLASSES == 0).nonzero()[:2500, 0]
        z, x, label = z[of_0], x[of_0], torch.zeros(len(of_0)).long()
        mode, astray = toy_mog.nearest(x, label)[1], toy_mog.astray(x, label)
        ax.scatter(*z[~astray].T, s=4, c=mode[~astray], cmap="Pastel1")
        ax.scatter(*z[astray].T, s=4, color="C3")
        ax.set(title=f"Latents by the mode they reach, K = {K}; red: astray", xlabel="$z_1$", ylabel="$z_2$",
               aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    return fig


@torch.no_grad()
def pull(field, fake, teacher: Path, folder: Path, name: str, number: int = 1500) -> None:
    """Two panels of a checkpoint of DM, of the student of class 0, whose samples (G's own weights, not the average) are
    grey: mu_real - mu_fake at sigma = 0.03, and these samples noised to 0.3 and taken back by mu_fake's ODE."""
    D, best, saved = *map(students.load_network, (teacher, folder / "best.pt")), run.load_tensors(folder / name)
    row = next(k for k, Y_k in enumerate(best.parts) if 0 in Y_k)
    nets = []
    for part, size in (("G", best.size), ("mu_fake", D.size)):
        nets.append(edm.Precond(D.facts.net(1, size), D.facts.sigma_data, sigma_in=best.net.sigma_in))
        nets[-1].load_state_dict({key: value[row:row + 1] for key, value in saved["parts"][part].items()})
    (G, mu_fake), at = nets, torch.tensor([toy_mog.OUTER, 0.0])  # the centre of class 0
    grid = at + torch.cartesian_prod(*[torch.linspace(-0.13, 0.13, 20)] * 2)[None]  # [1, 400, 2]
    sigma, label = torch.full(grid.shape[:2], 0.03), torch.zeros(grid.shape[:2]).long()
    arrow = D.net(grid, sigma, label) - mu_fake(grid, sigma, label)
    field.quiver(*grid[0].T, *arrow[0].T, color="C0", angles="xy", scale=0.6)
    field.set_title(f"The KL term's pull after {saved['step']} updates")
    z, noise = common.latents(range(2 * number), (2,)).unflatten(0, (2, 1, number))  # [1, number, 2] each
    label = torch.zeros(z.shape[:2]).long()
    made, levels = dmd.one_step(G, z, label), edm.level(torch.arange(280, -1, -5))  # 0.26 … 0.002
    x = made + levels[0] * noise
    for a, b in zip(levels, [*levels[1:], 0]):  # Euler's method
        x = x + (b - a) * (x - mu_fake(x, a.expand(label.shape), label)) / a
    fake.scatter(*x[0].T, s=3, color="C1")
    fake.set_title("The fake denoiser follows: G's samples (grey), noised, then back by its ODE")
    for ax in (field, fake):
        ax.scatter(*made[0].T, s=3, color="0.4", zorder=0)
        ax.set(**CLOSE_UP)


def scatter(panels: dict, label, classes: int) -> plt.Figure:
    """A panel for each {title: x [N, 2]}, a colour for each class of label [N]."""
    fig, axes = page(len(panels), 5.4, 4.8)
    for ax, (title, x) in zip(axes, panels.items()):
        dots = ax.scatter(*x.T, s=3, c=label, cmap=plt.get_cmap("turbo", classes), vmin=-0.5, vmax=classes - 0.5)
        ax.set(title=title, **VIEW)
    fig.colorbar(dots, ax=axes[-1], label="class", ticks=range(0, classes, math.ceil(classes / 16)))
    return fig


METRICS = {
    "l1": "$\\ell_1$ to the teacher's samples", "l1_data": "$\\ell_1$ to the data",
    "fd_data": "Fréchet distance to the data", "even": "share of the emptiest mode, strays apart (1 = fair)",
    "multiply_adds": "million multiply-adds of a sample"}


def claim(name: str, text: str, numbers: dict, metric: str, lines: dict) -> plt.Figure:
    """Numbers {row: [one per seed]} as dots, with their mean; lines {name: level}."""
    unit, n = 1e6 if metric == "multiply_adds" else 1, len(numbers)
    fig, (ax,) = page(1, 6.2, 2.5 + 0.2 * len(lines) + 0.5 * n)
    for i, values in enumerate(numbers.values()):
        v = np.array(values) / unit
        ax.plot(v, [i] * len(v), "o", alpha=0.6, color=shade(i, n))
        ax.plot([v.mean()] * 2, [i - 0.32, i + 0.32], color=shade(i, n), lw=2.5)
        ax.annotate(short(v.mean()), (v.max(), i), (6, 0), textcoords="offset points", va="center", fontsize=8)
    for (label, level), style in zip(lines.items(), ("--", ":", "-.")):
        ax.axvline(level / unit, ls=style, color="C1", lw=1, label=f"{label}: {short(level / unit)}")
    ax.margins(x=0.12)  # room for the last number
    ax.set(yticks=range(n), yticklabels=[textwrap.fill(row, 40) for row in numbers], ylim=(n - 0.4, -0.6),
           xlabel=f"{METRICS.get(metric, metric)} (dot: one seed, bar: their mean)")
    if lines:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1))
    fig.suptitle(f"{name}: {text}", fontsize=10)
    return fig


def against_k(results: dict, rows: dict) -> plt.Figure:
    """[MSD Table 1, 5]: distance against K, of stages {stage: {K: row}}."""
    m, t, numbers = aim(results, rows), results["teacher"], {}
    lines = {"two draws of the teacher": results.get("floor")}
    if m != "l1":
        lines = {f"teacher, {t['evaluations']} evaluations": t[m], "two draws of the data": results["floor_data"]}
    for K in sorted(set().union(*rows.values()), key=int):
        for stage in (stage for stage in rows if K in rows[stage]):
            numbers[f"{K}, after {stage.upper()}"] = [seed[m] for seed in rows[stage][K]["per_seed"]]
    return claim("Number of students", "the more, the better?", numbers, distance(results, m), lines)


# ---- the command

def draw(out, tag: str = "") -> list[Path]:
    """Draw every figure that the files of a run folder allow; returns their paths."""
    out, suffix = Path(out), run.suffix(tag)
    results = run.load_json(out / f"results{suffix}.json", "seeds", "students", "stages", "metric")
    home, rows, toy = out / f"seed{results['seeds'][0]}", results["stages"], results["metric"] == "l1"
    ks, by_noise, shown = sorted(map(int, results["students"])), "method" in results, []
    last = "o2mkd" if by_noise else list(rows)[-1]

    def folder(K: int, stage: str) -> Path:  # where students lie; by noise level the tags are o2mkd and o2mkd-TAG
        return home / (f"o2mkd{K}{suffix.removeprefix('-o2mkd')}" if by_noise else f"students{K}{suffix}/{stage}")
    for K in sorted({ks[0], ks[-1]}) if toy else ks:
        title = f"{K} student{'s' * (K > 1)}, {'in turn' if by_noise else 'one evaluation'}"
        shown.append((title, results["students"][str(K)], folder(K, last)))
    of_k, figures = results["students"], {}
    name = "samples" if by_noise or not toy else "figure4"
    figures[name] = side_by_side(home, results, shown, aim(results, [last]), of_k)
    if not toy:
        figures["fd"] = against_k(results, {last: of_k})
    if by_noise:
        figures["losses"] = training({ks[0]: folder(ks[0], last)}, last, PANELS[last])
        if (drift := home / "teacher" / "drift.json").exists():
            figures["drift"] = feature_drift(run.load_json(drift))
        if any(stage.startswith("heun-") for stage in rows):
            figures["curve"] = steps_curve(results)
    else:
        dm = {K: folder(K, "dm") for K in ks}
        with contextlib.suppress(run.Damaged, FileNotFoundError):  # it wants both checkpoints
            if toy and "gap" in read_metrics(dm[ks[-1]]) and "cfg" not in results["configs"].get("dm", {}):
                figures["why"] = why(home, results, dm)
        for stage in filter(rows.get, PANELS):
            name, m = ("gan", aim(results, rows)) if stage == "adm" else ("training", results["metric"])
            homes, scale = {K: folder(K, stage) for K in ks}, "linear" if toy else "log"
            with contextlib.suppress(run.Damaged):
                if panels := {} if toy else progress(homes, m):
                    figures[f"progress-{stage}"] = image_panels(panels, 5)
            first = ("Distance of each student on its own classes", distance(results, m), scale, [m])
            figures[name] = training(homes, stage, [first, *PANELS[stage]])
        if last not in ("dm", "cd"):
            figures["stages"] = against_k(results, rows)
    paths = {out / "figures" / f"{name}{suffix}.png": fig for name, fig in figures.items()}
    files = [out / f"results{run.suffix(size)}.json" for size in ("XXS", "XS", "S", "B", "")]
    sizes = [r for r in map(run.load_json, filter(Path.exists, files)) if len(r["students"]) > 1]
    if len(sizes) > 1:
        paths[out / "figures" / "figure8.png"] = figure8({r["size"]: r for r in sizes})
    return [save(fig, path) for path, fig in paths.items()]


@command
def main(argv=None):
    """Draw the figures of a run folder again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("tag", nargs="?", default="")
    given = parser.parse_args(argv)
    print(*draw(given.run, given.tag), sep="\n")


if __name__ == "__main__":
    main()
