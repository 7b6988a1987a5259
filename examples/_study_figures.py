"""The figures of `robustness_study.py`."""

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from _study_models import MODELS
from _study_results import Results, interval, named
from _study_training import CLIPPERS, STRICTNESS
from matplotlib.figure import Figure

COLOURS = dict(
    zip(CLIPPERS, ("#3b3b3b", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#b0569a"), strict=True)
)


def _stability_figure(results: Results) -> Figure:
    """Accuracy of every run, base and stress."""
    figure = Figure(figsize=(9, 0.9 + 0.62 * len(results.cells)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, setting in zip(axes, ("base", "stress"), strict=True):
        for i, cell in enumerate(results.cells):
            for k, clipper in enumerate(CLIPPERS):
                found = results.values("accuracy", cell, "plain", setting, clipper)
                at = np.full(len(found), i + 0.13 * (k - 2.5))
                ax.plot(100 * found, at, "o", color=COLOURS[clipper], ms=3.5, alpha=0.85, mew=0)
        ax.set(xlim=(-2, 102), xlabel="test accuracy at the end, %; 0: NaN")
        ax.grid(axis="y", visible=False)
        for i in range(1, len(results.cells)):
            ax.axhline(i - 0.5, color="#e6e8ec", lw=0.7)
    axes[0].set_title("Usual learning rate")
    axes[1].set_title("Stress: a larger one")
    axes[0].set_yticks(range(len(results.cells)), [named(c) for c in results.cells])
    axes[0].set_ylim(len(results.cells) - 0.4, -0.6)
    _legend(figure, CLIPPERS)
    return figure


def _sensitivity_figure(results: Results) -> Figure:
    """Changes against no clipping: a dot for each model and data set, the mean and its interval."""
    panels = (
        ("sensitivity", "Sensitivity of the logits, %", True),
        ("sensitivity_of_probabilities", "Sensitivity of the probabilities, %", True),
        ("adversarial", "Accuracy under attack, points", False),
    )
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (measure, title, ratio) in zip(axes, panels, strict=True):
        ax.axvline(0, color="#8a8f98", lw=0.8)
        for k, clipper in enumerate(CLIPPERS[1:]):
            found = results.effects(measure, clipper, ratio=ratio)
            mean, half = interval(found)
            scale = (lambda x: 100 * np.expm1(x)) if ratio else (lambda x: 100 * x)
            ax.plot(scale(found), np.full(len(found), k + 0.22), "o", color="#b8bcc4", ms=3, mew=0)
            if np.isfinite(half):
                ends = [scale(mean - half), scale(mean + half)]
                ax.plot(ends, [k, k], color=COLOURS[clipper], lw=2)
            ax.plot(scale(mean), k, "o", color=COLOURS[clipper], ms=6)
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(CLIPPERS) - 1), CLIPPERS[1:])
    axes[0].set_ylim(len(CLIPPERS) - 1.4, -0.6)
    figure.supxlabel("change against no clipping", fontsize=9, color="#3d434c")
    return figure


def _price_figure(results: Results) -> Figure:
    """Accuracy and steps to the target against the bound."""
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    styles = {"digits": "-", "cancer": "--"}
    colours = dict(zip(MODELS, ("#0072b2", "#d55e00", "#009e73", "#b0569a"), strict=True))
    for cell in results.cells:
        look = {"color": colours[cell[1]], "ls": styles[cell[0]], "lw": 1.4, "marker": "o", "ms": 3}
        for ax, measure, scale in ((left, "accuracy", 100), (right, "steps", 1)):
            found = [
                scale * results.values(measure, cell, "plain", "strict", s).mean()
                for s in STRICTNESS
            ]
            ax.plot(STRICTNESS, found, **look)
    left.set(xscale="log", title="Accuracy at the end, %", xlabel="bound over the median norm")
    right.set(title="Steps to the target (all if missed)", xlabel="bound over the median norm")
    lines = [
        mpl.lines.Line2D([], [], color=colours[m], ls=styles[d], lw=1.8) for d, m in results.cells
    ]
    names = [named(c) for c in results.cells]
    figure.legend(lines, names, loc="outside lower center", ncols=4)
    return figure


def _legend(figure: Figure, clippers: Sequence[str]) -> None:
    lines = [mpl.lines.Line2D([], [], color=COLOURS[c], marker="o", ls="", ms=5) for c in clippers]
    names = ["no clipping" if c == "none" else c for c in clippers]
    figure.legend(lines, names, loc="outside lower center", ncols=len(clippers))


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "stability": _stability_figure,
    "sensitivity": _sensitivity_figure,
    "price": _price_figure,
}
