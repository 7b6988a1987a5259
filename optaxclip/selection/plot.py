"""The picture of a cross-validation; Matplotlib is imported here, and only here."""

from typing import Any

import numpy as np


def figure_of(found: Any) -> Any:
    """Scores above, clip rate below, against the threshold."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plot needs Matplotlib, got none. Run: pip install 'optaxclip[plot]'"
        ) from missing

    at = found.thresholds.astype(float)
    finite = at[np.isfinite(at)]
    unbounded = not np.isfinite(at[-1])
    if unbounded:  # one step of the grid further
        ratio = finite[-1] / finite[-2] if len(finite) > 1 else 10.0
        at[-1] = (finite[-1] if len(finite) else 1.0) * max(ratio, 1.5)
    known_rate = np.isfinite(found.clip_rate).any()
    figure = Figure(figsize=(6.4, 4.6 if known_rate else 3.4), layout="constrained")
    if known_rate:
        top, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        below.plot(at, 100 * found.clip_rate, "o-", color="#5a616b", ms=3, lw=1)
        below.set(ylabel="clipped, %", ylim=(-5, 105), yticks=(0, 50, 100))
        last = below
    else:
        top = last = figure.subplots()
    folds = np.where(np.isfinite(found.fold_scores), found.fold_scores, np.nan)
    top.plot(at, folds, "o", color="#b9c3cf", ms=3, zorder=1)
    mean = np.where(np.isfinite(found.mean), found.mean, np.nan)
    error = np.where(np.isfinite(found.standard_error), found.standard_error, 0)
    top.errorbar(at, mean, error, fmt="o-", color="#0072b2", ms=5, capsize=3, zorder=3)
    if not found.failed.all():
        for name, value, style in (
            ("best", found.best, "-"),
            ("strictest within one standard error", found.one_standard_error, "--"),
        ):
            place = at[np.searchsorted(found.thresholds, value)]
            top.axvline(place, color="#d55e00", ls=style, lw=1, label=f"{name}: {value:.3g}")
        top.legend(frameon=False, fontsize=8)
    for place, count in zip(at, found.failures, strict=True):
        if count:
            top.annotate(
                f"{count} failed",
                (place, 0.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=7,
                color="#d55e00",
            )
    top.set_ylabel("score")
    last.set(xscale="log", xlabel="threshold")
    if unbounded:
        last.set_xticks([at[-1]], ["none"], minor=True)
    for ax in {top, last}:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e8ec", lw=0.7)
    return figure
