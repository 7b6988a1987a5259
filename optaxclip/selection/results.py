"""What a cross-validation found: `CrossValidation`."""

import csv
import dataclasses
import os
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True, repr=False)
class CrossValidation:
    """The scores of every run, and the thresholds that follow from them.

    Arrays `[thresholds, folds, seeds]`. A run has failed when its score or its parameters are
    not finite at the end; its score is then the worst there is, `-inf` (`inf` for `mode="min"`).
    `print` shows a table.
    """

    thresholds: np.ndarray
    """[thresholds], increasing, as they were given."""
    scores: np.ndarray
    """What `metric_fn` gave."""
    failed: np.ndarray
    """Booleans."""
    clip_rates: np.ndarray
    """Share of steps that were clipped (of an aggregator: of examples); NaN where unknown."""
    norms: np.ndarray
    """The norm the clipper measured on the last step (of an aggregator: the examples' mean)."""
    mode: Literal["max", "min"] = "max"

    @property
    def fold_scores(self) -> np.ndarray:
        """Mean over the seeds that finished, `[thresholds, folds]`; the worst where none did."""
        return self._mean(self.scores)

    @property
    def mean(self) -> np.ndarray:
        """Mean over the folds that have a score, `[thresholds]`; the worst where none has."""
        return self._mean(self._units)

    @property
    def standard_error(self) -> np.ndarray:
        """Of `mean`: standard deviation over folds / sqrt(folds), `[thresholds]`.

        Over seeds where there is one fold. Infinite where fewer than two have a score.
        """
        known = np.isfinite(self._units)
        units = np.where(known, self._units, 0.0)
        count = known.sum(axis=-1)
        mean = units.sum(axis=-1) / np.maximum(count, 1)
        squares = np.square(np.where(known, units - mean[:, None], 0.0))
        variance = squares.sum(axis=-1) / np.maximum(count - 1, 1)
        return np.where(count > 1, np.sqrt(variance / np.maximum(count, 1)), np.inf)

    @property
    def failures(self) -> np.ndarray:
        """How many runs failed, `[thresholds]`."""
        return self.failed.sum(axis=(1, 2))

    @property
    def clip_rate(self) -> np.ndarray:
        """Mean over runs, `[thresholds]`; NaN where unknown."""
        return self.clip_rates.mean(axis=(1, 2))

    @property
    def final_norm(self) -> np.ndarray:
        """Median over runs of `norms`, `[thresholds]`."""
        norms = np.where(np.isnan(self.norms) & self.failed, np.inf, self.norms)
        return np.quantile(norms, 0.5, axis=(1, 2), method="higher")

    @property
    def best(self) -> float:
        """The threshold with the best mean, of those with the fewest failures."""
        return float(self.thresholds[self._best])

    @property
    def one_standard_error(self) -> float:
        """The strictest threshold whose mean is within a standard error of the best's.

        The error is that of the best threshold. Of those with the fewest failures. Where there
        is but one score each there is no error, and this is `best`.
        """
        best = self._best
        error = self.standard_error[best]
        within = self._loss <= self._loss[best] + (error if np.isfinite(error) else 0.0)
        return float(self.thresholds[np.argmax(within & self._candidates)])

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one row per run; a failed run has no score."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(
                ["threshold", "fold", "seed", "score", "failed", "clip_rate", "final_norm"]
            )
            for at in np.ndindex(self.scores.shape):
                score = "" if self.failed[at] else float(self.scores[at])
                rate, norm = float(self.clip_rates[at]), float(self.norms[at])
                threshold = float(self.thresholds[at[0]])
                table.writerow([threshold, *at[1:], score, int(self.failed[at]), rate, norm])

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Scores and clip rate against the threshold: a Matplotlib figure, saved to `path`.

        Raises:
          ImportError: without Matplotlib (extra `plot`).
        """
        from optaxclip.selection.plot import figure_of

        figure = figure_of(self)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __repr__(self) -> str:
        head = f"{'threshold':>10} {'score':>9} {'+-':>8} {'clipped':>8} {'last norm':>10}"
        lines = [head + f" {'failed':>7}" * bool(self.failed.any())]
        rows = zip(
            self.thresholds,
            self.mean,
            self.standard_error,
            self.clip_rate,
            self.final_norm,
            self.failures,
            strict=True,
        )
        for threshold, mean, error, rate, norm, failures in rows:
            cells = f"{threshold:10.4g} {_or_dash(mean, '9.4f')} {_or_dash(error, '8.4f')}"
            cells += f" {_or_dash(rate, '8.0%')} {_or_dash(norm, '10.3g')}"
            lines.append(cells + f" {failures:7d}" * bool(self.failed.any()))
        if not self.failed.all():
            lines.append(f"best {self.best:.4g}; within one standard error, the strictest:")
            lines[-1] += f" {self.one_standard_error:.4g}"
        return "\n".join(lines)

    @property
    def _units(self) -> np.ndarray:
        """What the error is over: folds, or the seeds of a single one."""
        return self.scores[:, 0] if self.scores.shape[1] == 1 else self.fold_scores

    @property
    def _worst(self) -> float:
        return -np.inf if self.mode == "max" else np.inf

    @property
    def _loss(self) -> np.ndarray:
        return -self.mean if self.mode == "max" else self.mean

    @property
    def _candidates(self) -> np.ndarray:
        if self.failed.all():
            raise ValueError(
                f"every run failed, got {self.failed.size} of {self.failed.size} whose score or"
                " parameters are not finite. Lower the learning rate, or try smaller thresholds."
            )
        return self.failures == self.failures.min()

    @property
    def _best(self) -> int:
        return int(np.argmin(np.where(self._candidates, self._loss, np.inf)))

    def _mean(self, scores: np.ndarray) -> np.ndarray:
        """Over the last axis, of what is finite."""
        known = np.isfinite(scores)
        total = np.where(known, scores, 0.0).sum(axis=-1)
        count = known.sum(axis=-1)
        return np.where(count > 0, total / np.maximum(count, 1), self._worst)


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else format("-", f">{form.split('.')[0]}")
