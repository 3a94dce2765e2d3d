"""Every picture, drawn from the files of a run folder alone: `python plot.py runs/toy` draws them again.

With --compare TAG TAG …: variants of one run folder side by side ("none": the one without a tag; TAG/dm: an earlier stage).

of the toy
  figure4.png        teacher, fewest students, most students, their difference                      [MSD Fig. 4]
  l1.png             l1 against K, per seed, with the floor                                         [MSD Fig. 4, Table 5]
  students.png       samples coloured by the student that made them                                 [MSD Fig. 1]
  teacher.png        the teacher's error by noise level, where the exact denoiser is known
of images
  samples.png        a row per class: the teacher, then the students of each K                      [MSD Fig. 9]
  fd.png             Frechet distance to the data against K, with the teacher's and the floor
of both
  training.png       curves that move: distance, |mu_fake - mu_real|, losses by noise level         [MSD Fig. 6]
  stages.png         distance to the data after each stage, beside the teacher's                    [MSD Table 1]
  gan.png            ADM: distance, the critic's accuracy, GAN losses, GAN term beside DM term
  figure8.png        student size, classes covered, stage: where runs of several sizes are          [MSD Fig. 8]
of students by noise level (o2mkd.py), figures NAME-o2mkd.png: samples, students (distance against N), losses [O2MKD Fig. 9],
  drift (the teacher's features by noise level) [O2MKD Fig. 1], curve (distance against multiply-adds) [O2MKD Fig. 6]

The one file that imports matplotlib.
"""
import csv
import os
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

import common
import toy_mog

plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 110, "font.size": 10, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.titlesize": 11, "legend.frameon": False})
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#9ecae1", "#2171b5", "#08306b", "#000000"])
GAP = LinearSegmentedColormap.from_list("gap", ["#ffffff", "#fdae6b", "#d94801", "#4a1486"])


def read_metrics(folder: Path) -> dict:
    """metrics.csv -> {name: {student: (steps, values)}}; of image students, the files of all student folders."""
    rows: dict = defaultdict(lambda: defaultdict(lambda: ([], [])))
    own = sorted(folder.glob("student[0-9]*/metrics.csv"))
    for path in own or [folder / "metrics.csv"]:
        with open(path, newline="") as f:
            for r in csv.DictReader(f):
                if not r["value"]:                                  # a row that a full disk or a kill cut off
                    continue
                steps, values = rows[r["name"]][path.parent.name if own else int(r["student"])]
                steps.append(int(r["step"]))
                values.append(float(r["value"]))
    return rows


def over_students(by_student: dict) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the students of one metric."""
    at = defaultdict(list)                                          # a student may lack a step: no sample fell into that band
    for steps, values in by_student.values():
        for step, value in zip(steps, values):
            at[step].append(value)
    return np.array(sorted(at)), np.array([np.mean(at[step]) for step in sorted(at)])


def _image(ax, share: np.ndarray, title: str, cmap, top: float, xlabel: str = "") -> None:
    e = toy_mog.EXTENT
    ax.imshow(share[:-1].reshape(toy_mog.BINS, -1).T ** 0.5, origin="lower", extent=(-e, e, -e, e), cmap=cmap, vmin=0,
              vmax=top ** 0.5, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], xlim=(-0.65, 0.65), ylim=(-0.65, 0.65), xlabel=xlabel)
    for spine in ax.spines.values():
        spine.set_visible(True)


def _share(x) -> np.ndarray:
    h = toy_mog.histogram(x).double()
    return (h / h.sum()).numpy()


def _of_reference(results: dict) -> int:
    """Evaluations of the teacher's kept samples, which are always Heun's."""
    return 2 * results["steps"] - 1 if "steps" in results else results["teacher"]["evaluations"]


def _each(results: dict) -> str:
    """What a student's sample costs: one evaluation, but of those by noise level as many as the teacher's."""
    return f"{results['teacher']['evaluations']} evaluations in turn" if "method" in results else "one evaluation"


def figure4(out: Path, results: dict, home: Path, folders: dict) -> plt.Figure:
    """[MSD Fig. 4]: 200 x 200 histograms of the first seed's samples, and where they differ."""
    teacher = _share(common.load_shards(home / "reference", "report"))
    ks = sorted(folders)
    shown = [ks[0], ks[-1]] if len(ks) > 1 else ks
    fig, axes = plt.subplots(1, len(shown) * 2 + 1, figsize=(3.4 * (2 * len(shown) + 1), 3.9))
    top = np.quantile(teacher[teacher > 0], 0.98)
    t = results["teacher"]
    _image(axes[0], teacher, f"Teacher, {_of_reference(results)} evaluations", DENSITY, top,
           f"two draws of it: $\\ell_1$ = {t['per_seed'][0]['floor']:.3f}")
    for i, K in enumerate(shown):
        share = _share(common.load_tensors(folders[K] / "samples.pt")["x"])
        name = f"{K} student" + "s" * (K > 1)
        value = results["students"][str(K)]["per_seed"][0]["l1"]
        _image(axes[1 + i], share, f"{name}, {_each(results)}", DENSITY, top, f"$\\ell_1$ to teacher = {value:.3f}")
        _image(axes[1 + len(shown) + i], np.abs(share - teacher), f"|difference|, {name}", GAP, top)
    who = "Smaller students, in turn along the trajectory," if "method" in results else "One-step students"
    fig.suptitle(f"{who} of a 2-D mixture of 64 Gaussians (8 classes): histograms of {results['samples']:,} samples, colour = square root of share")
    return fig


def l1_against_k(results: dict) -> plt.Figure:
    """l1 to the teacher against K (after ADM: to the data), one dot per seed; dashed: the floor (the teacher)."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    ks = sorted(map(int, results["students"]))
    rows = [results["students"][str(k)] for k in ks]
    x, m = np.arange(len(ks)), "l1" if _last(results) in ("dm", "cd") else "l1_data"
    ax.bar(x, [r[m] for r in rows], width=0.6, color="#9ecae1", label="mean over seeds, pooled over classes")
    for i, r in enumerate(rows):
        ax.plot([i] * len(r["per_seed"]), [p[m] for p in r["per_seed"]], "o", ms=4, color="#08306b",
                label="one seed" if i == 0 else None)
        ax.annotate(f"{r[m]:.3f}", (i, r[m] / 2), ha="center", color="#08306b")
    low, name = (results["floor"], "floor: two draws of the teacher") if m == "l1" else (results["teacher"][m], "the teacher")
    ax.axhline(low, ls="--", color="#d94801", label=f"{name}, {low:.3f}")
    if "bound" in results:
        ax.axhline(results["bound"]["l1"], ls=":", color="k", label=f"{results['bound']['points']}-point Heun sampler, {results['bound']['l1']:.3f}")
    reference = "teacher" if m == "l1" else "data"
    ax.set(xticks=x, xticklabels=ks, xlabel=f"number of students {'N' if 'method' in results else 'K'}", ylabel=f"$\\ell_1$ to the {reference} (0 to 1)",
           title="More students, better samples?" if len(ks) > 1 else f"Distance to the {reference}")
    ax.set_ylim(0, max(r[m] for r in rows) * 1.45 + 0.02)
    ax.legend(fontsize=8, loc="upper right")
    return fig


def by_student(folders: dict) -> plt.Figure:
    """The largest K's samples, a colour per student, and one class close up."""
    K = max(folders)
    s = common.load_tensors(folders[K] / "samples.pt")
    x, student, label = s["x"][:20_000].numpy(), s["student"][:20_000].numpy(), s["label"][:20_000].numpy()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.8))
    for k in range(K):
        left.plot(*x[student == k].T, ".", ms=1, alpha=0.5, color=plt.cm.tab10(k % 10))
        centre = x[student == k].mean(0) * 0.45
        left.annotate(f"$G_{{{k + 1}}}$", centre, ha="center", va="center", color=plt.cm.tab10(k % 10), fontsize=12)
    left.set(aspect="equal", xlim=(-0.65, 0.65), ylim=(-0.65, 0.65), title=f"{K} students: who generates what", xlabel="$x_1$", ylabel="$x_2$")
    near = label == 0
    right.plot(*x[near].T, ".", ms=2, alpha=0.6, color=plt.cm.tab10(int(student[near][0]) % 10))
    for m in toy_mog.means()[0].numpy():
        right.add_patch(plt.Circle(m, 4 * toy_mog.STD, fill=False, lw=0.8, color="k"))
    right.set(aspect="equal", title="class 0 close up; circles: 4 std of the data's Gaussians", xlabel="$x_1$",
              xlim=(0.36, 0.64), ylim=(-0.14, 0.14))
    return fig


def training(folders: dict, metric: str, title: str) -> plt.Figure:
    """Curves of the first seed, means over the students of each K: of DM four panels, of CD two."""
    runs = {K: read_metrics(f) for K, f in sorted(folders.items())}
    runs = {K: m for K, m in runs.items() if m}
    K, last = list(runs.items())[-1]
    cd = any(n.startswith("consistency loss") for n in last)
    loss, name = ("consistency loss, ", "Consistency loss") if cd else ("fake loss, ", "Fake denoiser's loss")
    panels = {metric: ("Distance of each student on its own classes", title), "gap": ("Gap that drives the KL term", "mean $|\\mu_{fake} - \\mu_{real}|$"),
              "regression": ("Regression loss", "distance to $y$"), loss: (f"{name} by noise level, K = {K}", "distance of neighbours" if cd else "weighted loss")}
    panels = {k: v for k, v in panels.items() if not cd or k in (metric, loss)}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.25 * len(panels), 3.8))
    for ax, (what, (heading, ylabel)) in zip(axes, panels.items()):
        if what == loss:
            bands = [n for n in last if n.startswith(loss)]
            for i, band in enumerate(bands):
                ax.plot(*over_students(last[band]), color=plt.cm.plasma(i / max(1, len(bands))), label=band.removeprefix(loss))
        for i, (students, m) in enumerate(runs.items()):
            if what in m:
                ax.plot(*over_students(m[what]), color=plt.cm.viridis(i / max(1, len(runs))), label=f"K = {students}", marker="o" if what == metric else None, ms=3)
        ax.set(title=heading, ylabel=ylabel, xlabel="generator updates", yscale="log" if ax.lines and (what in ("gap", "regression") or cd and what == loss) else "linear")
        if ax.lines:
            ax.legend(fontsize=8)
        else:
            ax.text(0.5, 0.5, "not used in this run", ha="center", transform=ax.transAxes)
    return fig


def teacher_error(home: Path) -> plt.Figure:
    """The trained denoiser against the exact one, by noise level."""
    e = common.load_json(home / "teacher" / "error.json")
    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    ax.loglog(e["sigma"], e["error"], "o-", color="#2171b5")
    ax.axvline(toy_mog.STD, ls=":", color="k", lw=1)
    ax.text(toy_mog.STD * 1.15, max(e["error"]) * 0.8, "std of a Gaussian", fontsize=8)
    ax.set(xlabel="noise level $\\sigma$", ylabel="RMS error of $D$ / $c_{out}(\\sigma)$",
           title="The trained teacher against the exact denoiser")
    return fig


def scatter(arrays: dict, names: list[str]) -> plt.Figure:
    """Samples coloured by class, a panel per sampler."""
    fig, axes = plt.subplots(1, len(names), figsize=(4.8 * len(names), 4.8), squeeze=False)
    for ax, name in zip(axes[0], names):
        ax.scatter(*arrays[name].T, c=arrays["label"], s=6, cmap="tab10", vmin=0, vmax=9)
        ax.set(aspect="equal", xlim=(-0.65, 0.65), ylim=(-0.65, 0.65), title=f"{name}, {len(arrays['label'])} samples",
               xlabel="$x_1$", ylabel="$x_2$")
    fig.tight_layout()
    return fig


def tiles(x, columns: int) -> np.ndarray:
    """Images x [N, C, H, W], uint8, as one picture [rows H, columns W, 3], row by row."""
    x = np.asarray(x)
    x = np.concatenate([x, np.zeros((-len(x) % columns, *x.shape[1:]), np.uint8)])
    n, c, h, w = x.shape
    picture = x.reshape(n // columns, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, c)
    return np.repeat(picture, 3, 2) if c == 1 else picture


def image_panels(panels: dict, columns: int) -> plt.Figure:
    """Panels of images side by side: {title: x [N, C, H, W] uint8}, `columns` images wide each."""
    pictures = {title: tiles(x, columns) for title, x in panels.items()}
    h, w = next(iter(pictures.values())).shape[:2]
    each = min(9.0, max(2.6, 16 / len(pictures)))
    fig, axes = plt.subplots(1, len(pictures), figsize=(each * len(pictures), each * h / w + 0.5), squeeze=False)
    for ax, (title, picture) in zip(axes[0], pictures.items()):
        ax.imshow(picture, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    fig.tight_layout()
    return fig


def image_samples(results: dict, home: Path, folders: dict, columns: int = 8, rows: int = 12) -> plt.Figure:
    """The first seed's reported samples, a row per class (the first 12): the teacher, then the students of each K."""
    sets = {f"teacher, {_of_reference(results)} evaluations": (common.load_shards(home / "reference", "report"), None)}
    for K, folder in sorted(folders.items()):
        s = common.load_tensors(folder / "samples.pt")
        sets[f"{K} student{'s' * (K > 1)}, {_each(results)}"] = (s["x"], s["label"])
    label = next(v for _, v in sets.values() if v is not None)
    pick = torch.cat([(label == c).nonzero()[:columns, 0] for c in label.unique()[:rows]])
    return image_panels({k: common.to_uint8(x[pick]) for k, (x, _) in sets.items()}, columns)


def fd_against_k(results: dict) -> plt.Figure:
    """Frechet distance to the data against K, one dot per seed; dashed: the teacher's own, dotted: test against training images."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    ks = sorted(map(int, results["students"]))
    rows = [results["students"][str(k)] for k in ks]
    ax.bar(np.arange(len(ks)), [r["fd_data"] for r in rows], width=0.6, color="#9ecae1")
    for i, r in enumerate(rows):
        ax.plot([i] * len(r["per_seed"]), [p["fd_data"] for p in r["per_seed"]], "o", ms=4, color="#08306b")
        ax.annotate(f"{r['fd_data']:.2f}", (i, r["fd_data"] / 2), ha="center", color="#08306b")
    t = results["teacher"]
    ax.axhline(t["fd_data"], ls="--", color="#d94801", label=f"teacher, {t['evaluations']} evaluations: {t['fd_data']:.2f}")
    ax.axhline(results["floor_data"], ls=":", color="k", label=f"test images: {results['floor_data']:.2f}")
    ax.set(xticks=range(len(ks)), xticklabels=ks, xlabel=f"number of students {'N' if 'method' in results else 'K'}", ylabel=f"{results['title']} to the training images",
           ylim=(0, max([t["fd_data"], *[r["fd_data"] for r in rows]]) * 1.4 + 1e-3))
    ax.legend(fontsize=8, loc="upper right")
    return fig


def _last(results: dict) -> str:
    """The last stage of a run."""
    return list(results.get("stages", {"dm": None}))[-1]


def _who(results: dict) -> str:
    return f"size {results['size']}, " if isinstance(results.get("size"), str) else ""


def stages(results: dict) -> plt.Figure:
    """Distance to the data after each stage, for each K, one dot per seed; dashed: the teacher's; dotted: two draws of the data."""
    m, ks = f"{results['metric']}_data", sorted(map(int, results["students"]))
    fig, ax = plt.subplots(figsize=(5.6, 3.8))
    top = results["teacher"][m]
    for j, (stage, of_k) in enumerate(results["stages"].items()):
        at = np.arange(len(ks)) + (j - (len(results["stages"]) - 1) / 2) * 0.36
        value = [of_k[str(K)][m] if str(K) in of_k else 0 for K in ks]
        ax.bar(at, value, width=0.34, color=["#c6dbef", "#6baed6", "#fdae6b"][j % 3], label=stage.upper())
        for x, K, v in zip(at, ks, value):
            seeds = of_k.get(str(K), {}).get("per_seed", [])
            ax.plot([x] * len(seeds), [p[m] for p in seeds], "o", ms=3, color="#08306b")
            ax.annotate(f"{v:.3g}", (x, 0.01 * v), ha="center", va="bottom", fontsize=8, color="#08306b")
            top = max([top, *[p[m] for p in seeds]])
    ax.axhline(results["teacher"][m], ls="--", color="#d94801", label=f"teacher, {results['teacher']['evaluations']} evaluations: {results['teacher'][m]:.3g}")
    ax.axhline(results["floor_data"], ls=":", color="k", label=f"two draws of the data: {results['floor_data']:.3g}")
    ax.set(xticks=range(len(ks)), xticklabels=ks, xlabel="number of students K", ylim=(0, top * 1.55),
           ylabel=("$\\ell_1$" if m == "l1_data" else results["title"]) + " to the data", title=f"{_who(results)}stage by stage")
    ax.legend(fontsize=8, ncols=2, loc="upper right")
    return fig


def gan(folders: dict, metric: str, title: str) -> plt.Figure:
    """What a healthy ADM stage looks like: the metric falls; critic near chance; losses level; the GAN a part of the push."""
    fig, axes = plt.subplots(1, 4, figsize=(17, 3.8))
    runs = {K: read_metrics(f) for K, f in sorted(folders.items())}
    for i, (K, m) in enumerate(runs.items()):
        colour = plt.cm.viridis(i / max(1, len(runs)))
        for ax, names in zip(axes, ((metric,), ("right on real", "right on fake"), ("GAN loss of G", "GAN loss of the critic"),
                                    ("push of the DM term", "push of the GAN"))):
            for name, style in zip(names, ("-", "--")):
                if name in m:
                    ax.plot(*over_students(m[name]), style, color=colour, marker="o" if name == metric else None, ms=3,
                            label=f"K = {K}" + (f", {name}" if len(names) > 1 and i == 0 else ""))
    axes[1].axhline(0.5, ls=":", color="k", lw=1)
    axes[2].axhline(np.log(2), ls=":", color="k", lw=1)
    axes[2].axhline(2 * np.log(2), ls=":", color="k", lw=1)
    for ax, title, ylabel in zip(axes, ("Distance of each student on its own classes", "Critic: share that it gets right (dotted: chance)",
                                        "GAN losses (dotted: an undecided critic's)", "Push on a sample: DM term, GAN term"),
                                 (title, "share", "softplus", "RMS gradient in x, weighted")):
        ax.set(title=title, ylabel=ylabel, xlabel="generator updates of ADM")
        if ax.lines and ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    axes[3].set_yscale("log" if axes[3].lines else "linear")
    return fig


def figure8(sets: dict) -> plt.Figure:
    """[MSD Fig. 8]: distance to the data against the classes that a student covers, a line per size, a panel per stage."""
    stage_names = list(dict.fromkeys(s for r in sets.values() for s in r["stages"]))
    fig, axes = plt.subplots(1, len(stage_names), figsize=(5.2 * len(stage_names), 4), squeeze=False, sharey=True)
    for ax, stage in zip(axes[0], stage_names):
        for i, (size, r) in enumerate(sets.items()):
            m = f"{r['metric']}_data"
            rows = {int(K): v for K, v in r["stages"].get(stage, {}).items()}
            ks = sorted(rows, reverse=True)
            covered = [r["classes_of_data"] / K for K in ks]
            error = [np.std([p[m] for p in rows[K]["per_seed"]], ddof=1) if len(rows[K]["per_seed"]) > 1 else 0 for K in ks]
            ax.errorbar(covered, [rows[K][m] for K in ks], error, marker="o", ms=4, capsize=3, color=plt.cm.viridis(i / len(sets)),
                        label=f"{size}: {r['parameters']:,} parameters")
            ax.axhline(r["teacher"][m], ls="--", color="#d94801", lw=1, label="teacher" if i + 1 == len(sets) else None)
        ax.set(title=f"after {stage.upper()}", xlabel="classes that a student covers", xscale="log", ylabel="distance to the data" if ax is axes[0][0] else "")
        ticks = sorted({r["classes_of_data"] / int(K) for r in sets.values() for K in r["stages"].get(stage, {})})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    axes[0][0].set_ylim(0, 1.35 * axes[0][0].get_ylim()[1])         # room for the legend
    axes[0][0].legend(fontsize=8, ncols=2, loc="upper left")
    return fig


def compare(out: Path, tags: list[str]) -> plt.Figure:
    """The largest K of several variants TAG or TAG/STAGE side by side, the teacher first. UserError if one is not there."""
    panels, first_about = {}, None
    for name in tags:
        tag, _, stage = name.partition("/")
        tag = "" if tag == "none" else tag
        common.check_tag("--compare", tag)
        path = out / f"results{common.suffix(tag)}.json"
        if not path.exists():
            have = ", ".join(p.stem.removeprefix("results").removeprefix("-") or "none" for p in sorted(out.glob("results*.json")) if "previous" not in p.stem)
            raise common.UserError(f"--compare {name}: no {path}; this run folder has: {have or 'no results'}")
        results = common.load_json(path, "seeds", "students", "metric")
        home, m = out / f"seed{results['seeds'][0]}", results["metric"]
        about = (results["seeds"][0], results.get("classes"), m)
        if about != (first_about := first_about or about):
            raise common.UserError(f"--compare {name}: of another first seed or other classes than {tags[0]}: not to be laid side by side")
        stage = stage or _last(results)
        rows = results.get("stages", {"dm": results["students"]}).get(stage)
        if not rows:
            raise common.UserError(f"--compare {name}: that run has no stage {stage}")
        K = max(map(int, rows))
        value = rows[str(K)]["per_seed"][0][f"{m}_data"]
        panels[f"{name}, K = {K}, {stage.upper()}: {m} to data {value:.3g}"] = common.load_tensors(home / f"students{K}{common.suffix(tag)}" / stage / "samples.pt")
    first = common.load_shards(home / "reference", "report")
    if m == "l1":
        share = {f"teacher, to data {results['teacher']['per_seed'][0]['l1_data']:.3f}": _share(first), **{k: _share(s["x"]) for k, s in panels.items()}}
        values = next(iter(share.values()))
        top = np.quantile(values[values > 0], 0.98)
        fig, axes = plt.subplots(1, len(share), figsize=(3.6 * len(share), 3.9))
        for ax, (title, values) in zip(axes, share.items()):
            _image(ax, values, title, DENSITY, top)
        return fig
    label = next(iter(panels.values()))["label"]
    pick = torch.cat([(label == c).nonzero()[:8, 0] for c in label.unique()[:10]])
    return image_panels({"teacher": common.to_uint8(first[pick]), **{k: common.to_uint8(s["x"][pick]) for k, s in panels.items()}}, 8)


def claim(name: str, text: str, numbers: dict, metric: str, lines: dict, curves: dict) -> plt.Figure:
    """A claim of reproduce.py: numbers {row: [one per seed]} as dots with their mean; lines {name: level}; curves {row: (samples, distance)}."""
    fig, axes = plt.subplots(1, 1 + bool(curves), figsize=(5.6 + 5.2 * bool(curves), 1.8 + 0.3 * len(numbers) if not curves else max(3.6, 1.8 + 0.3 * len(numbers))),
                             squeeze=False)
    ax, rows = axes[0][0], list(numbers)
    colour = {row: plt.cm.viridis(0.9 * i / max(1, len(rows) - 1)) for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        v = np.array(numbers[row])
        ax.plot(v, [i] * len(v), "o", ms=4, alpha=0.6, color=colour[row])
        ax.plot([v.mean()] * 2, [i - 0.32, i + 0.32], color=colour[row], lw=2.5)
        ax.annotate(f" {v.mean():.3f}", (v.max(), i), va="center", fontsize=8)
    for j, (label, level) in enumerate(lines.items()):
        ax.axvline(level, ls="--" if j == 0 else ":", color="#d94801" if j == 0 else "k", lw=1, label=f"{label}: {level:.3f}")
    low, high = ax.get_xlim()
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6 - 0.5 * len(lines)), xlim=(low, high + 0.12 * (high - low)),
           xlabel={"l1": "$\\ell_1$ to the teacher's samples", "l1_data": "$\\ell_1$ to the data", "mode_min": "share of the emptiest mode (1 = fair)"}.get(metric, metric))
    if lines:
        ax.legend(fontsize=8, loc="upper right")
    for row, (x, y) in curves.items():
        axes[0][1].plot(x, y, "-o", ms=3, color=colour[row], label=row)
    if curves:
        axes[0][1].set(xlabel="samples that a student has seen", ylabel="$\\ell_1$ on its own classes, first seed", xscale="log", yscale="log")
        axes[0][1].legend(**({"fontsize": 8} if len(curves) < 5 else {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}))
    fig.suptitle(textwrap.fill(f"{name}: {text}", 130 if curves else 64), fontsize=10)
    return fig


def losses(folder: Path, N: str) -> plt.Figure:
    """[O2MKD Fig. 9]: each loss of one student's training, relative to its first value; single batches."""
    fig, ax = plt.subplots(figsize=(6.4, 3.8))
    for i, (name, curves) in enumerate(read_metrics(folder).items()):
        steps, value = next(iter(curves.values()))                  # a student that starts as the teacher begins at 0
        ax.plot(steps, np.array(value) / (value[0] or 1.0), lw=0.9, marker="." if len(value) < 10 else None, color=plt.cm.plasma(0.8 * i / 3), label=f"{name} loss")
    ax.set(yscale="log", xlabel="updates", ylabel="loss of the batch / that of the first", title=f"Losses of a student (N = {N}), first seed")
    ax.legend(fontsize=8)
    return fig


def feature_drift(found: dict) -> plt.Figure:
    """[O2MKD Fig. 1]: the teacher's bottleneck by noise level: quantiles of its activations; distance of the features of every two levels."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2))
    sigma, q = np.array(found["sigma"]), np.array(found["quantiles"])
    for low, high, alpha in ((0, 4, 0.25), (1, 3, 0.5)):
        left.fill_between(sigma, q[:, low], q[:, high], color="#2171b5", alpha=alpha, lw=0, label=("1 to 99 %", "25 to 75 %")[low])
    left.plot(sigma, q[:, 2], color="#08306b", label="median")
    left.set(xscale="log", xlabel="noise level $\\sigma$", ylabel="activations of the bottleneck", title="Range of the bottleneck's activations")
    left.legend(fontsize=8)
    shown = right.imshow(np.array(found["distance"]), origin="lower", cmap="viridis")
    ticks = list(range(0, len(sigma), 5))
    right.set(xticks=ticks, xticklabels=[f"{sigma[i]:.2g}" for i in ticks], yticks=ticks, yticklabels=[f"{sigma[i]:.2g}" for i in ticks],
              xlabel="$\\sigma$", ylabel="$\\sigma$", title="Fréchet distance of the features of two levels")
    fig.colorbar(shown, ax=right)
    return fig


def steps_curve(results: dict) -> plt.Figure:
    """[O2MKD Fig. 6]: distance to the data against the multiply-adds of a whole sample, teacher and students, both samplers."""
    fig, axes = plt.subplots(1, 2, figsize=(10.4, 4), sharey=True)
    m = f"{results['metric']}_data"
    for ax, sampler in zip(axes, ("heun", "ddim")):
        runs = sorted(((int(s.split("-")[1]), of_n) for s, of_n in results["stages"].items() if s.startswith(sampler + "-")), key=lambda r: r[0])
        for i, N in enumerate(sorted({N for _, of_n in runs for N in of_n} & results["cost"].keys(), key=int)):
            each = results["cost"][N]["multiply_adds"] / results["teacher"]["evaluations"]
            points = [(each * (2 * n - 1 if sampler == "heun" else n), n, of_n[N][m]) for n, of_n in runs if N in of_n]
            ax.plot([p[0] for p in points], [p[2] for p in points], "o-", ms=4, color="#d94801" if N == "0" else plt.cm.viridis(i / 4),
                    label="teacher" if N == "0" else f"N = {N}")
            for cost, n, value in points:
                ax.annotate(f" {n}", (cost, value), fontsize=7)
        ax.set(xscale="log", xlabel="million multiply-adds of a sample", title=f"{sampler}; beside each point its number of steps")
        low, high = ax.get_xlim()
        ticks = [a * 10.0 ** b for b in range(3, 15) for a in (1, 2, 5) if low < a * 10.0 ** b < high]
        ax.set_xticks(ticks, [f"{t / 1e6:g}" for t in ticks])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    axes[0].set_ylabel(("$\\ell_1$" if m == "l1_data" else results["title"]) + " to the data")
    return fig


def draw_o2mkd(out: Path, results: dict, suffix: str) -> list[Path]:
    """The figures of o2mkd.py, from its results and run folder."""
    home = out / f"seed{results['seeds'][0]}"
    folders = {int(N): home / f"o2mkd{N}{suffix.removeprefix('-o2mkd')}" for N in results["students"]}
    folders = {N: f for N, f in folders.items() if (f / "samples.pt").exists()}
    if not folders:
        raise common.UserError(f"{home}: no samples.pt of the students that its results name; run o2mkd.py with --out {out} again")
    toy = results["metric"] == "l1"
    figures = {"samples": figure4(out, results, home, folders) if toy else image_samples(results, home, folders),
               "students": (l1_against_k if toy else fd_against_k)({**results, "stages": {"o2mkd": results["students"]}})}
    where = folders[min(folders)] if toy else folders[min(folders)] / "student0"
    if (where / "metrics.csv").exists() and read_metrics(where):
        figures["losses"] = losses(where, min(folders))
    if (home / "teacher" / "drift.json").exists():
        figures["drift"] = feature_drift(common.load_json(home / "teacher" / "drift.json", "sigma"))
    if any(s.startswith("heun-") for s in results["stages"]):
        figures["curve"] = steps_curve(results)
    else:
        (out / "figures" / f"curve{suffix}.png").unlink(missing_ok=True)                        # of other results
    return [save(fig, out / "figures" / f"{name}{suffix}.png") for name, fig in figures.items()]


def beside(path: Path, document: Path) -> str:
    """The path of a picture as a document in another folder names it."""
    return os.path.relpath(path, document.parent)


def draw(out, tag: str = "") -> list[Path]:
    """Draw every figure that the files of run folder `out` allow; returns their paths. UserError if there is no run."""
    out, suffix = Path(out), common.suffix(tag)
    path = out / f"results{suffix}.json"
    if not path.exists():
        have = ", ".join(p.stem.removeprefix("results").removeprefix("-") or "the one without a tag" for p in sorted(out.glob("results*.json")) if "previous" not in p.stem)
        raise common.UserError(f"{path}: no such file; " + (f"{out} has: {have}" if have else f"run msd.py or o2mkd.py with --out {out} first"))
    results = common.load_json(path, "seeds", "students", "samples", "metric")
    home = out / f"seed{results['seeds'][0]}"
    if results.get("method") == "o2mkd":
        return draw_o2mkd(out, results, suffix)

    def stage_folders(stage: str) -> dict:
        found = {int(K): home / f"students{K}{suffix}" / stage for K in results["students"]}
        return {K: f for K, f in found.items() if common.finished(f, ("samples.pt",))
                and (common.finished(f, ("metrics.csv",)) or list(f.glob("student*/metrics.csv")))}
    folders = stage_folders(_last(results))
    if not folders:
        raise common.UserError(f"{home}: the students' folders that {path} names are gone; run msd.py with --out {out} again")
    specialised = "classes" in results                              # its samples are of some classes only
    if results["metric"] == "l1":
        figures = {"students": by_student(folders)} if not specialised else {}
        figures |= {"figure4": figure4(out, results, home, folders)} if not specialised else {}
        figures["l1"] = l1_against_k(results)
    else:
        figures = {"samples": image_samples(results, home, folders)} if not specialised else {}
        figures["fd"] = fd_against_k(results)
    name = "$\\ell_1$" if results["metric"] == "l1" else results["title"]
    for stage in ("dm", "cd"):                                      # a folder belongs to one of them
        if stage in results.get("stages", {"dm": 0}) and stage_folders(stage):
            figures["training"] = training(stage_folders(stage), results["metric"], f"{name} to the {'teacher' if results['metric'] == 'l1' else 'data'}")
    if _last(results) not in ("dm", "cd"):
        figures["stages"] = stages(results)
    if "adm" in results.get("stages", {}) and stage_folders("adm"):
        figures["gan"] = gan(stage_folders("adm"), f"{results['metric']}_data", f"{name} to the data")
    if (home / "teacher" / "error.json").exists():
        figures["teacher"] = teacher_error(home)
    written = []
    sizes = {}
    for other in sorted(set(out.glob("results*.json")) - set(out.glob("results-o2mkd*.json"))):     # runs of several sizes, of several K each
        r = common.load_json(other)
        if "classes_of_data" in r and len(r["students"]) > 1 and other.stem in ("results", f"results-{r['size']}"):
            sizes[r["size"]] = r
    if len(sizes) > 1:
        fig = figure8(dict(sorted(sizes.items(), key=lambda item: item[1]["parameters"])))
        written.append(save(fig, out / "figures" / "figure8.png"))
    return written + [save(fig, out / "figures" / f"{name}{suffix}.png") for name, fig in figures.items()]


def save(fig: plt.Figure, path: Path) -> Path:
    """Save a figure, atomically; returns its path."""
    fig.tight_layout()
    common.write_atomic(path, lambda t: fig.savefig(t, format="png"))
    plt.close(fig)
    return path


@common.command
def main(argv=None):
    """python plot.py RUN_FOLDER [TAG]; python plot.py RUN_FOLDER --compare TAG TAG …"""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 2 and argv[1] == "--compare":
        fig = compare(Path(argv[0]), argv[2:])
        print(save(fig, Path(argv[0]) / "figures" / f"compare-{'-'.join(argv[2:]).replace('/', '-')}.png"))
        return
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise common.UserError("usage: python plot.py RUN_FOLDER [TAG], or RUN_FOLDER --compare TAG TAG …, such as python plot.py runs/toy")
    print("\n".join(map(str, draw(*argv))))


if __name__ == "__main__":
    main()
