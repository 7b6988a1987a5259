"""The measures, the table and the plot of `medical_diagnosis.py`."""

import dataclasses
from typing import Any

import matplotlib as mpl
import numpy as np
from _pages import table
from _plots import LOOK
from matplotlib.figure import Figure
from scipy import stats

COLOURS = {"none": "#3b3b3b", "global": "#0072b2", "per_example": "#d55e00"}
BINS = 10
DRAWN = 5  # of ten, the inner ones hold a few patients each
MEASURES = {
    "sensitivity": "sensitivity, %",
    "specificity": "specificity, %",
    "brier": "Brier score",
    "calibration": "calibration error",
    "log_loss": "log loss",
    "unsure": "said 0.2 to 0.8, %",
}
PERCENT = ("sensitivity", "specificity", "unsure")


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What a model said of patients it had not seen."""

    method: str
    seed: int
    threshold: float
    probability: np.ndarray
    malignant: np.ndarray

    def measures(self) -> dict[str, float]:
        """By name, as in `MEASURES`."""
        p, y = self.probability, self.malignant
        ill, well = p[y == 1], p[y == 0]
        sure = np.clip(np.where(y == 1, p, 1 - p), 1e-7, 1)
        bins, share = _bins(p, y), 1 / len(p)
        return {
            "threshold": float(self.threshold),
            "sensitivity": 100 * float(np.mean(ill >= 0.5)),
            "specificity": 100 * float(np.mean(well < 0.5)),
            "brier": float(np.mean((p - y) ** 2)),
            "calibration": float(sum(n * share * abs(said - was) for said, was, n in bins)),
            "log_loss": float(-np.mean(np.log(sure))),
            "unsure": 100 * float(np.mean((p > 0.2) & (p < 0.8))),
        }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of the mean."""
    error = stats.sem(values) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, max(len(values) - 1, 1)) * error)


def table_of(
    found: list[Assessment], titles: dict[str, str], against: str | None = None
) -> list[str]:
    """A line for each method: its measures, or how they differ from another's, seed by seed."""
    head = f"{'' if against is None else f'to {titles[against]}':14}"
    head += "".join(f"{title:>20}" for title in MEASURES.values())
    lines = [head + ("  threshold" if against is None else "")]
    for method, cells in _cells(found, list(titles), against).items():
        line = f"{titles[method]:14}" + "".join(f"{cell:>20}" for cell in cells)
        if against is None:
            chosen = sorted(x.threshold for x in found if x.method == method)
            middle = chosen[len(chosen) // 2]
            line += f"  {middle:.3g} ({chosen[0]:.3g} to {chosen[-1]:.3g})"
        lines.append(line)
    return lines


def markdown_of(found: list[Assessment], titles: dict[str, str]) -> str:
    """The same two tables for a page."""
    none = next(iter(titles))
    tables = []
    for against, what in ((None, "over"), (none, f"of the difference to {titles[none]} over")):
        seeds = len({x.seed for x in found})
        head = [f"95 % intervals {what} {seeds} splits", *MEASURES.values()]
        rows = _cells(found, list(titles), against)
        tables.append(table(head, [[titles[m], *cells] for m, cells in rows.items()]))
    return "\n\n".join(tables)


def _cells(
    found: list[Assessment], methods: list[str], against: str | None
) -> dict[str, list[str]]:
    """`mean ± half` of each measure, or of its difference to another method's."""
    rows = {m: [x.measures() for x in found if x.method == m] for m in methods}
    base = [dict.fromkeys(MEASURES, 0.0)] * len(rows[methods[0]])
    sign = "" if against is None else "+"
    if against is not None:
        base = rows.pop(against)
    cells: dict[str, list[str]] = {method: [] for method in rows}
    for method, mine in rows.items():
        for name in MEASURES:
            pairs = zip(mine, base, strict=True)
            mean, half = interval([row[name] - other[name] for row, other in pairs])
            digits = 1 if name in PERCENT else 3
            cells[method].append(f"{mean:{sign}.{digits}f} ± {half:.{digits}f}")
    return cells


def figure_of(found: list[Assessment], titles: dict[str, str], searches: dict[str, Any]) -> Figure:
    """Cross-validation, reliability, and the two kinds of mistake."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(12, 3.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for method, search in searches.items():
            bounded = np.isfinite(search.thresholds)
            left.errorbar(
                search.thresholds[bounded],
                search.mean[bounded],
                search.standard_error[bounded],
                fmt="o-",
                color=COLOURS[method],
                ms=4,
                capsize=2,
                lw=1.3,
            )
            unclipped = search.mean[-1]
            left.axhline(unclipped, color=COLOURS["none"], lw=1, ls=":")
        left.set(
            xscale="log",
            title="Cross-validation, last seed; dotted: no bound",
            xlabel="threshold",
            ylabel="log loss",
        )
        middle.plot([0, 1], [0, 1], color="#8a8f98", lw=1, ls="--")
        for k, method in enumerate(titles):
            mine = [x for x in found if x.method == method]
            p, y = (
                np.concatenate([getattr(x, name) for x in mine])
                for name in ("probability", "malignant")
            )
            said, was, number = np.array(_bins(p, y, DRAWN)).T
            spread = np.abs(_wilson(was, number) - was)
            middle.errorbar(
                said + 0.01 * (k - 1), was, spread, fmt="o-", color=COLOURS[method], ms=4, lw=1.1
            )
            for at, name in enumerate(("sensitivity", "specificity")):
                mean, half = interval([x.measures()[name] for x in mine])
                right.errorbar(
                    at + 0.15 * (k - 1), mean, half, fmt="o", color=COLOURS[method], ms=5, capsize=3
                )
        middle.set(
            title="Reliability, all seeds",
            xlabel="stated probability of malignant",
            ylabel="share that were malignant",
        )
        right.set(title="Found, and left alone; 95 % intervals", ylabel="%", xlim=(-0.5, 1.5))
        right.set_xticks([0, 1], ["sensitivity", "specificity"])
        lines = [mpl.lines.Line2D([], [], color=COLOURS[m], lw=2.5) for m in titles]
        figure.legend(lines, titles.values(), loc="outside lower center", ncols=len(titles))
    return figure


def _wilson(share: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The ends of the 95 % interval of a share of `number`: lower, upper."""
    z = 1.96
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    # Rounding must not put a share of 0 or 1 outside of its interval.
    return np.stack([np.minimum(middle - half, share), np.maximum(middle + half, share)])


def _bins(p: np.ndarray, y: np.ndarray, number: int = BINS) -> list[tuple[float, float, int]]:
    """Mean probability, share of malignant and number, for each bin that holds a patient."""
    place = np.minimum((p * number).astype(int), number - 1)
    return [
        (float(p[place == k].mean()), float(y[place == k].mean()), int(np.sum(place == k)))
        for k in np.unique(place)
    ]
