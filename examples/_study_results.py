"""What `robustness_study.py` found: its CSV, and what is computed from it."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _study_models import DATA, MODELS
from _study_training import CLIPPERS, EVAL_EVERY, FAILED, REGULARISERS
from scipy.stats import t as student

Row = dict[str, Any]
TARGET = 0.95
"""Of the usual accuracy, for the steps to the target."""


def load(path: Path) -> list[Row]:
    """The rows of the CSV, numbers as numbers."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _parsed(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _parsed(name: str, text: str) -> Any:
    if name in ("data", "model", "regulariser", "setting", "curve"):
        return text
    if name == "seed":
        return int(text)
    if name == "variant" and text in CLIPPERS:
        return text
    return float(text)


class Results:
    """The runs, and what is computed from them."""

    def __init__(self, rows: list[Row], steps: int):
        self.steps = steps
        self.at = {
            (r["data"], r["model"], r["regulariser"], r["setting"], r["variant"], r["seed"]): r
            for r in rows
        }
        self.cells = [(d, m) for d in DATA for m in MODELS if any(k[:2] == (d, m) for k in self.at)]
        self.regularisers = [r for r in REGULARISERS if any(k[2] == r for k in self.at)]
        self.seeds = sorted({k[5] for k in self.at})

    def values(self, measure: str, cell: tuple, regulariser: str, setting: str, variant: Any):
        """One a seed."""
        rows = [self.at[(*cell, regulariser, setting, variant, s)] for s in self.seeds]
        if measure == "steps":
            return np.array([self.steps_to_target(r) for r in rows], float)
        if measure == "failed":
            usual = self.target(cell) / TARGET
            return np.array([r["accuracy"] < FAILED * usual for r in rows], float)
        return np.array([r[measure] for r in rows])

    def target(self, cell: tuple) -> float:
        """A share of the accuracy of plain, unclipped training, median over seeds."""
        rows = [self.at[(*cell, "plain", "base", "none", s)] for s in self.seeds]
        return TARGET * float(np.median([r["accuracy"] for r in rows]))

    def steps_to_target(self, row: Row) -> int:
        """The first evaluation at the target; all steps where there is none."""
        curve = np.array(row["curve"].split(), float)
        reached = np.flatnonzero(curve >= self.target((row["data"], row["model"])))
        return EVAL_EVERY * int(reached[0] + 1) if reached.size else self.steps

    def effects(
        self,
        measure: str,
        variant: Any,
        *,
        cells: Sequence[tuple] | None = None,
        regularisers: Sequence[str] | None = None,
        setting: str = "base",
        by_seed: bool = False,
        ratio: bool = False,
        against: Any = "none",
    ) -> np.ndarray:
        """With a clipper against without, paired by seed: a mean for each cell (or seed of it).

        A ratio is in per cent and formed from logarithms.
        """
        found = []
        for cell in cells or self.cells:
            rows = []
            for regulariser in regularisers or self.regularisers:
                a, b = (
                    self.values(measure, cell, regulariser, setting, v) for v in (variant, against)
                )
                both = np.log(np.maximum(a, 1e-6) / np.maximum(b, 1e-6)) if ratio else a - b
                rows.append(both)
            mean = np.mean(rows, axis=0)
            found += [*mean] if by_seed else [mean.mean()]
        return np.array(found)

    def effects_of(self, regulariser: str) -> np.ndarray:
        """What a regulariser does to the accuracy by itself: a mean for each cell."""
        return np.array(
            [
                np.mean(
                    self.values("accuracy", cell, regulariser, "base", "none")
                    - self.values("accuracy", cell, "plain", "base", "none")
                )
                for cell in self.cells
            ]
        )

    def spread(self, clipper: str) -> np.ndarray:
        """Standard deviation of the accuracy over seeds, with a clipper less without, by cell."""

        def std(cell: tuple, variant: str) -> float:
            found = [self.values("accuracy", cell, r, "base", variant) for r in self.regularisers]
            return float(np.sqrt(np.mean(np.var(found, axis=1))))

        return np.array([std(c, clipper) - std(c, "none") for c in self.cells])


def named(cell: tuple) -> str:
    """A model and its data, for people."""
    return f"{cell[1]}, {DATA[cell[0]].title}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)
