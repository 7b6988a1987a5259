"""The tables of `robustness_study.py`, in markdown."""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from _pages import fill, table
from _plots import LOOK
from _study_figures import FIGURES
from _study_models import MODELS
from _study_results import Results, Row, interval, named
from _study_training import CLIPPERS, STRICTNESS


def shown(values: np.ndarray, scale: float = 1.0, digits: int = 1) -> str:
    """`mean ± half`, bold where the interval leaves out zero."""
    mean, half = (scale * x for x in interval(values))
    text = f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")
    return f"**{text}**" if np.isfinite(half) and abs(mean) > half else text


def percent(logs: np.ndarray) -> str:
    """The same of logarithms of ratios, as a change in per cent."""
    mean, half = interval(logs)
    change = [100 * np.expm1(x) for x in (mean, mean - half, mean + half)]
    text = f"{change[0]:+.0f} %"
    if np.isfinite(half):
        text += f" ({change[1]:+.0f} to {change[2]:+.0f})"
    return f"**{text}**" if np.isfinite(half) and abs(mean) > half else text


def write_report(rows: list[Row], steps: int, out: Path) -> None:
    """tables.md and three figures."""
    results = Results(rows, steps)
    text = [f"<!-- {name} -->\n{make(results)}\n" for name, make in TABLES.items()]
    (out / "tables.md").write_text("\n".join(text), encoding="utf-8")
    with mpl.rc_context(LOOK):
        for name, draw in FIGURES.items():
            draw(results).savefig(out / f"robustness_{name}.png", dpi=100)


def fill_page(page: Path, out: Path) -> None:
    """Puts those of the tables into the page that it has a mark for."""
    text, tables = page.read_text(encoding="utf-8"), (out / "tables.md").read_text("utf-8")
    found = re.findall(r"<!-- (\w+) -->\n(.*?)\n\n?(?=<!--|\Z)", tables, re.DOTALL)
    fill(page, {name: body for name, body in found if f"<!-- {name} -->" in text})


def _stability(results: Results) -> str:
    rows = []
    for cell in results.cells:
        cells = []
        for clipper in CLIPPERS:
            accuracy = results.values("accuracy", cell, "plain", "stress", clipper)
            failed = int(results.values("failed", cell, "plain", "stress", clipper).sum())
            text = f"{100 * accuracy.mean():.0f} ± {100 * np.std(accuracy):.0f}"
            cells.append(text + (f", {failed} failed" if failed else ""))
        rows.append([named(cell), *cells])
    total = [
        sum(results.values("failed", c, "plain", "stress", k).sum() for c in results.cells)
        for k in CLIPPERS
    ]
    runs = len(results.cells) * len(results.seeds)
    rows.append(["failed, of all", *(f"{n:.0f} of {runs}" for n in total)])
    how = {"regularisers": ["plain"], "setting": "stress"}
    gains = [shown(results.effects("accuracy", c, **how), 100, 0) for c in CLIPPERS[1:]]
    rows.append(["change, points", "", *gains])
    return table(["accuracy, %", *CLIPPERS], rows)


def _effects(results: Results) -> str:
    rows = []
    for clipper in CLIPPERS[1:]:
        clipped = [
            results.values("clip_rate", c, r, "base", clipper).mean()
            for c in results.cells
            for r in results.regularisers
        ]
        rows.append(
            [
                clipper,
                f"{100 * np.mean(clipped):.0f} %",
                shown(results.effects("accuracy", clipper), 100),
                shown(results.spread(clipper), 100, 2),
                percent(results.effects("steps", clipper, ratio=True)),
                percent(results.effects("sensitivity", clipper, ratio=True)),
                percent(results.effects("sensitivity_of_probabilities", clipper, ratio=True)),
                shown(results.effects("adversarial", clipper), 100),
                shown(results.effects("noise", clipper), 100),
            ]
        )
    head = ["", "clipped", "accuracy", "spread over seeds", "steps to the target"]
    head += ["sensitivity of logits", "of probabilities", "under attack", "under noise"]
    return table(head, rows)


def _models(results: Results) -> str:
    rows = []
    for model in MODELS:
        cells = [c for c in results.cells if c[1] == model]
        if not cells:
            continue
        texts = []
        for clipper in CLIPPERS[1:]:
            where = {"cells": cells, "by_seed": True}
            stress = {"setting": "stress", "regularisers": ["plain"]}
            base = shown(results.effects("accuracy", clipper, **where), 100)
            stressed = results.effects("accuracy", clipper, **where, **stress)
            texts.append(f"{base}; {shown(stressed, 100, 0)}")
        rows.append([model, *texts])
    return table(["accuracy: base; stress", *CLIPPERS[1:]], rows)


def _regularisers(results: Results) -> str:
    rows = []
    for regulariser in results.regularisers:
        own = results.effects_of(regulariser) if regulariser != "plain" else None
        rows.append(
            [
                regulariser,
                "" if own is None else shown(own, 100),
                *(
                    shown(results.effects("accuracy", c, regularisers=[regulariser]), 100)
                    for c in CLIPPERS[1:]
                ),
            ]
        )
    return table(["accuracy", "by itself", *CLIPPERS[1:]], rows)


def _price(results: Results) -> str:
    runs, rows = len(results.cells) * len(results.seeds), []
    for strict in STRICTNESS:

        def over(measure: str, strict: float = strict) -> np.ndarray:
            return np.array([results.values(measure, c, "plain", "strict", strict)
                             for c in results.cells])  # fmt: skip

        def before(measure: str) -> np.ndarray:
            return np.array([results.values(measure, c, "plain", "base", "none")
                             for c in results.cells])  # fmt: skip

        targets = np.array([results.target(c) for c in results.cells])
        accuracy = over("accuracy")
        ratios = [
            np.mean(np.log(np.maximum(over(m), 1e-6) / np.maximum(before(m), 1e-6)), axis=1)
            for m in ("steps", "sensitivity")
        ]
        rows.append(
            [
                f"{strict:g}",
                f"{100 * np.mean(over('clip_rate')):.0f} %",
                shown(np.mean(accuracy - before("accuracy"), axis=1), 100),
                *map(percent, ratios),
                f"{np.sum(accuracy < targets[:, None])} of {runs}",
            ]
        )
    head = ["bound over the median norm", "clipped", "accuracy", "steps to the target"]
    return table([*head, "sensitivity of logits", "below the target at the end"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "stability": _stability,
    "effects": _effects,
    "models": _models,
    "regularisers": _regularisers,
    "price": _price,
}
