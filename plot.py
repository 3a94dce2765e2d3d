"""Every picture, drawn from the files of a run folder alone: `python plot.py runs/toy` draws them again.

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

The one file that imports matplotlib.
"""
import csv
import sys
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


def _over_students(by_student: dict) -> tuple[np.ndarray, np.ndarray]:
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


def figure4(out: Path, results: dict, home: Path, folders: dict) -> plt.Figure:
    """[MSD Fig. 4]: 200 x 200 histograms of the first seed's samples, and where they differ."""
    teacher = _share(common.load_shards(home / "reference", "report"))
    ks = sorted(folders)
    shown = [ks[0], ks[-1]] if len(ks) > 1 else ks
    fig, axes = plt.subplots(1, len(shown) * 2 + 1, figsize=(3.4 * (2 * len(shown) + 1), 3.9))
    top = np.quantile(teacher[teacher > 0], 0.98)
    t = results["teacher"]
    _image(axes[0], teacher, f"Teacher, {t['evaluations']} evaluations", DENSITY, top,
           f"two draws of it: $\\ell_1$ = {t['per_seed'][0]['floor']:.3f}")
    for i, K in enumerate(shown):
        share = _share(common.load_tensors(folders[K] / "samples.pt")["x"])
        name = f"{K} student" + "s" * (K > 1)
        value = results["students"][str(K)]["per_seed"][0]["l1"]
        _image(axes[1 + i], share, f"{name}, one evaluation", DENSITY, top, f"$\\ell_1$ to teacher = {value:.3f}")
        _image(axes[1 + len(shown) + i], np.abs(share - teacher), f"|difference|, {name}", GAP, top)
    fig.suptitle("One-step students of a 2-D mixture of 64 Gaussians (8 classes): histograms of "
                 f"{results['samples']:,} samples, colour = square root of share")
    return fig


def l1_against_k(results: dict) -> plt.Figure:
    """l1 against K with one dot per seed; dashed: the floor, two draws of the teacher."""
    fig, ax = plt.subplots(figsize=(5.2, 3.8))
    ks = sorted(map(int, results["students"]))
    rows = [results["students"][str(k)] for k in ks]
    x = np.arange(len(ks))
    ax.bar(x, [r["l1"] for r in rows], width=0.6, color="#9ecae1", label="mean over seeds, pooled over classes")
    for i, r in enumerate(rows):
        ax.plot([i] * len(r["per_seed"]), [p["l1"] for p in r["per_seed"]], "o", ms=4, color="#08306b",
                label="one seed" if i == 0 else None)
        ax.annotate(f"{r['l1']:.3f}", (i, r["l1"] / 2), ha="center", color="#08306b")
    ax.axhline(results["floor"], ls="--", color="#d94801", label=f"floor: two draws of the teacher, {results['floor']:.3f}")
    ax.set(xticks=x, xticklabels=ks, xlabel="number of students K", ylabel="$\\ell_1$ to the teacher (0 to 1)",
           title="More students, better samples?" if len(ks) > 1 else "Distance to the teacher")
    ax.set_ylim(0, max(r["l1"] for r in rows) * 1.45 + 0.02)
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
    """Curves of the first seed, means over the students of each K."""
    fig, axes = plt.subplots(1, 4, figsize=(17, 3.8))
    runs = {K: read_metrics(f) for K, f in sorted(folders.items())}
    runs = {K: m for K, m in runs.items() if m}
    for i, (K, m) in enumerate(runs.items()):
        colour = plt.cm.viridis(i / max(1, len(runs)))
        for ax, name in zip(axes, (metric, "gap", "regression")):
            if name in m:
                ax.plot(*_over_students(m[name]), color=colour, label=f"K = {K}", marker="o" if name == metric else None, ms=3)
    K, m = list(runs.items())[-1]
    bands = [n for n in m if n.startswith("fake loss")]
    for i, name in enumerate(bands):
        axes[3].plot(*_over_students(m[name]), color=plt.cm.plasma(i / max(1, len(bands))), label=name.removeprefix("fake loss, "))
    for ax, title, ylabel in zip(axes, (
            "Distance of each student on its own classes", "Gap that drives the KL term",
            "Regression loss", f"Fake denoiser's loss by noise level, K = {K}"),
            (title, "mean $|\\mu_{fake} - \\mu_{real}|$", "distance to $y$", "weighted loss")):
        ax.set(title=title, ylabel=ylabel, xlabel="generator updates")
        if ax.lines:
            ax.legend(fontsize=8)
        else:
            ax.text(0.5, 0.5, "not used in this run", ha="center", transform=ax.transAxes)
    axes[1].set_yscale("log" if axes[1].lines else "linear")
    axes[2].set_yscale("log" if axes[2].lines else "linear")
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
    sets = {f"teacher, {results['teacher']['evaluations']} evaluations": (common.load_shards(home / "reference", "report"), None)}
    for K, folder in sorted(folders.items()):
        s = common.load_tensors(folder / "samples.pt")
        sets[f"{K} student{'s' * (K > 1)}, one evaluation"] = (s["x"], s["label"])
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
    ax.set(xticks=range(len(ks)), xticklabels=ks, xlabel="number of students K", ylabel=f"{results['title']} to the training images",
           ylim=(0, max([t["fd_data"], *[r["fd_data"] for r in rows]]) * 1.4 + 1e-3))
    ax.legend(fontsize=8, loc="upper right")
    return fig


def draw(out, tag: str = "") -> list[Path]:
    """Draw every figure that the files of run folder `out` allow; returns their paths. UserError if there is no run."""
    out, suffix = Path(out), common.suffix(tag)
    path = out / f"results{suffix}.json"
    if not path.exists():
        raise common.UserError(f"{path}: no such file; run msd.py with --out {out} first")
    results = common.load_json(path, "seeds", "students", "samples", "metric")
    home = out / f"seed{results['seeds'][0]}"
    folders = {int(K): home / f"students{K}{suffix}" / "dm" for K in results["students"]}
    folders = {K: f for K, f in folders.items() if common.finished(f, ("samples.pt",))
               and (common.finished(f, ("metrics.csv",)) or list(f.glob("student*/metrics.csv")))}
    if not folders:
        raise common.UserError(f"{home}: the students' folders that {path} names are gone; run msd.py with --out {out} again")
    if results["metric"] == "l1":
        figures = {"figure4": figure4(out, results, home, folders), "l1": l1_against_k(results), "students": by_student(folders)}
    else:
        figures = {"samples": image_samples(results, home, folders), "fd": fd_against_k(results)}
    name = "$\\ell_1$ to the teacher" if results["metric"] == "l1" else f"{results['title']} to the data"
    figures["training"] = training(folders, results["metric"], name)
    if (home / "teacher" / "error.json").exists():
        figures["teacher"] = teacher_error(home)
    written = []
    for name, fig in figures.items():
        fig.tight_layout()
        written.append(out / "figures" / f"{name}{suffix}.png")
        common.write_atomic(written[-1], lambda t: fig.savefig(t, format="png"))
        plt.close(fig)
    return written


@common.command
def main(argv=None):
    """python plot.py RUN_FOLDER [TAG]"""
    argv = sys.argv[1:] if argv is None else argv
    if not 1 <= len(argv) <= 2 or argv[0].startswith("-"):
        raise common.UserError("usage: python plot.py RUN_FOLDER [TAG], such as python plot.py runs/toy")
    print("\n".join(map(str, draw(*argv))))


if __name__ == "__main__":
    main()
