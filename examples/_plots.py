"""The plots of `compare_clippers.py`, one function each; a colour means the same everywhere."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from _results import Results
from _training import CLIPPER_TITLES, SETTINGS, WORKLOADS, ClipCurves
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

COLOURS = {
    "none": "#3b3b3b",
    "value": "#e69f00",
    "global": "#0072b2",
    "leaf": "#009e73",
    "unit": "#b0569a",
    "agc": "#d55e00",
    "soft": "#56b4e9",
}
SMOOTHING = 10

LOOK = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3d434c",
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": "#5a616b",
    "ytick.color": "#5a616b",
    "legend.frameon": False,
    "axes.axisbelow": True,
}


def in_full(axis: Axis) -> None:
    """Marks a logarithmic axis of few decades at 1, 2 and 5, without powers of ten."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def accuracy_figure(results: Results) -> Figure:
    """Test accuracy at the end: a panel for each workload and setting."""
    workloads, settings = results.config["workloads"], results.config["settings"]
    clippers = results.config["clippers"]
    height = 0.7 + len(workloads) * (0.45 + 0.22 * len(clippers))
    figure, axes = _grid(len(workloads), len(settings), height, sharex=True, sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        for k, clipper in enumerate(clippers):
            row = results.row(workloads[i], settings[j], clipper)
            if row.lost_runs == row.runs:
                ax.text(4, k, "NaN", color=COLOURS[clipper], va="center", fontsize=8)
                continue
            mean, std = 100 * row.accuracy_mean, 100 * row.accuracy_std
            ax.errorbar(mean, k, xerr=std, fmt="o", color=COLOURS[clipper], ms=5, capsize=2)
            left = mean > 50
            ax.annotate(
                f"{mean:.1f}", (mean - std if left else mean + std, k), va="center", fontsize=7.5,
                xytext=(-7 if left else 7, 0), textcoords="offset points",
                ha="right" if left else "left", color="#3d434c",
            )  # fmt: skip
        ax.set(xlim=(0, 103), ylim=(len(clippers) - 0.4, -0.6))
        ax.set_yticks(range(len(clippers)), [CLIPPER_TITLES[c] for c in clippers])
        ax.grid(axis="y", visible=False)
        if i == 0:
            ax.set_title(SETTINGS[settings[j]].title)
        if i == len(workloads) - 1:
            ax.set_xlabel("test accuracy, %")
        if j == 0:
            ax.set_ylabel(WORKLOADS[workloads[i]].title, fontweight="bold", labelpad=10)
    return figure


def loss_figure(results: Results, workload: str) -> Figure:
    """Training loss: a panel for each setting, a line for each clipper."""
    settings = results.config["settings"]
    figure, axes = _grid(1, len(settings), 2.9, sharex=True)
    for setting, ax in zip(settings, axes[0], strict=True):
        draw_loss(ax, results, workload, setting, results.config["clippers"])
        ax.set(title=SETTINGS[setting].title, xlabel="step")
    axes[0, 0].set_ylabel("loss of the batch")
    _legend(figure, results.config["clippers"])
    return figure


def draw_loss(
    ax: Axes, results: Results, workload: str, setting: str, clippers: Sequence[str]
) -> None:
    """The median over seeds, smoothed; a cross where it stops being a number."""
    for clipper in clippers:
        losses = np.stack([r.loss for r in results.runs_of(workload, setting, clipper)])
        loss = np.median(np.where(np.isnan(losses), np.inf, losses), axis=0)
        loss = np.exp(_smooth(np.log(loss + 1e-12)))
        ax.plot(np.arange(len(loss)), loss, color=COLOURS[clipper], lw=1.4)
        if np.isnan(loss[-1]):
            last = np.flatnonzero(np.isfinite(loss))[-1]
            ax.plot(last, loss[last], "x", color=COLOURS[clipper], ms=7, mew=2)
    ax.set_yscale("log")


def norm_figure(results: Results, workload: str) -> Figure:
    """Pre-clip norm and bound of the first seed: settings down, clippers across."""
    settings, clippers = results.config["settings"], results.clipping
    height = 0.9 + 1.35 * len(settings)
    figure, axes = _grid(len(settings), len(clippers), height, sharex=True, sharey="col")
    for (i, j), ax in np.ndenumerate(axes):
        run = results.runs_of(workload, settings[i], clippers[j])[0]
        draw_norm(ax, run.clip, COLOURS[clippers[j]])
        if i == 0:
            bound = results.bounds[workload][clippers[j]]
            ax.set_title(f"{CLIPPER_TITLES[clippers[j]]}, {bound:g}")
        if i == len(settings) - 1:
            ax.set_xlabel("step")
        if j == 0:
            ax.set_ylabel(SETTINGS[settings[i]].title.replace(" + ", "\n+ "), fontsize=8)
    return figure


def draw_norm(ax: Axes, clip: ClipCurves, colour: str) -> None:
    """The norm that came in, and the bound."""
    ax.plot(clip.norm, color=colour, lw=0.9)
    ax.plot(clip.bound, color="black", lw=1.1, ls="--")
    ax.set_yscale("log")
    ax.minorticks_off()


def clip_rate_figure(results: Results, workload: str) -> Figure:
    """Share of the last 25 steps that were clipped, mean over seeds."""
    settings, window = results.config["settings"], 25
    figure, axes = _grid(1, len(settings), 2.7, sharex=True, sharey=True)
    for setting, ax in zip(settings, axes[0], strict=True):
        for clipper in results.clipping:
            counts = [r.clip.clipped_count for r in results.runs_of(workload, setting, clipper)]
            counts = np.mean(counts, axis=0)
            rate = 100 * (counts[window:] - counts[:-window]) / window
            ax.plot(np.arange(window, len(counts)), rate, color=COLOURS[clipper], lw=1.4)
        ax.set(title=SETTINGS[setting].title, xlabel="step", ylim=(-3, 103))
    axes[0, 0].set_ylabel(f"clipped, % of {window} steps")
    _legend(figure, results.clipping)
    return figure


def overview_figure(results: Results) -> Figure:
    """The most telling comparison of those that were run, on one picture."""
    workload, clippers = results.config["workloads"][0], results.config["clippers"]
    setting = _first(results.config["settings"], "spike", "label_noise")
    shown = _first(clippers, "global", *results.clipping)
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, *right = figure.subplots(1, 2 if results.clipping else 1, squeeze=False)[0]
    title = f"{WORKLOADS[workload].title} - {SETTINGS[setting].title}:"
    title += f" {_headline(results, workload, setting, shown)}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    draw_loss(left, results, workload, setting, clippers)
    left.set_title("Training loss, median over seeds", fontsize=11)
    left.set_xlabel("step", fontsize=10)
    _legend(left, clippers)
    for ax in right:
        draw_norm(ax, results.runs_of(workload, setting, shown)[0].clip, COLOURS[shown])
        ax.set_title(f"What {_named(shown)} measures; dashed: its bound", fontsize=11)
        ax.set_xlabel("step", fontsize=10)
    return figure


def _headline(results: Results, workload: str, setting: str, clipper: str) -> str:
    """The title of the overview."""
    said = {}
    for name in ("none", clipper):
        if row := results.row(workload, setting, name):
            how = "without clipping" if name == "none" else f"with {_named(name)}"
            lost = row.lost_runs == row.runs
            said[how] = "lost to NaN" if lost else f"{100 * row.accuracy_mean:.0f} %"
    return "test accuracy " + ", ".join(f"{score} {how}" for how, score in said.items())


def _named(clipper: str) -> str:
    return f"{CLIPPER_TITLES[clipper]} clipping" if clipper != "none" else "no clipping"


def _first(names: Sequence[str], *wanted: str) -> str:
    return next((name for name in wanted if name in names), names[0])


def _grid(rows: int, columns: int, height: float, **share) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(4.5, min(13.0, 3.2 * columns)), height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def _legend(where: Figure | Axes, clippers: Sequence[str]) -> None:
    lines = [mpl.lines.Line2D([], [], color=COLOURS[c], lw=2.5) for c in clippers]
    names = [CLIPPER_TITLES[c] for c in clippers]
    if isinstance(where, Figure):
        where.legend(lines, names, loc="outside lower center", ncols=len(names))
    else:
        where.legend(lines, names, loc="best", fontsize=9)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the last finite values, up to the last of them all.

    It looks back only, so that a spike starts on time, and bridges a skipped batch.
    """
    padded = np.concatenate([np.full(SMOOTHING - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, SMOOTHING)
    finite = np.isfinite(windows)
    total, count = np.where(finite, windows, 0.0).sum(axis=1), finite.sum(axis=1)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    mean[np.flatnonzero(np.isfinite(values))[-1] + 1 :] = np.nan
    return mean
