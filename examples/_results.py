"""What `compare_clippers.py` found: the runs, and one row of the table for each combination."""

import dataclasses
import functools
import itertools

import numpy as np
from _training import EVAL_EVERY, Run


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a workload, setting and clipper over all seeds."""

    workload: str
    setting: str
    clipper: str
    bound: float | None
    accuracy_mean: float
    accuracy_std: float
    clip_rate: float | None
    steps_to_90: int | None
    lost_runs: int
    runs: int
    us_per_step: float

    def cells(self) -> tuple[str, str, str, str]:
        """Accuracy, clip rate, steps to 90 % and time per step, to be read by people."""
        accuracy = f"{100 * self.accuracy_mean:.1f} ± {100 * self.accuracy_std:.1f}"
        if self.lost_runs == self.runs:
            accuracy = "lost to NaN"
        elif self.lost_runs:
            accuracy += f", {self.lost_runs} lost"
        rate = "-" if self.clip_rate is None else f"{100 * self.clip_rate:.0f} %"
        steps = "never" if self.steps_to_90 is None else str(self.steps_to_90)
        return accuracy, rate, steps, f"{self.us_per_step:.0f}"


@dataclasses.dataclass(frozen=True)
class Results:
    """Every run of a comparison."""

    config: dict
    bounds: dict[str, dict[str, float]]
    runs: list[Run]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """One row for each workload, setting and clipper."""
        names = (self.config[k] for k in ("workloads", "settings", "clippers"))
        return [self._row(*key) for key in itertools.product(*names)]

    @property
    def clipping(self) -> list[str]:
        """The clippers that clip."""
        return [c for c in self.config["clippers"] if c != "none"]

    def runs_of(self, workload: str, setting: str, clipper: str) -> list[Run]:
        """The runs of one row, by seed."""
        key = (workload, setting, clipper)
        return [r for r in self.runs if (r.workload, r.setting, r.clipper) == key]

    def rows_of(self, workload: str, setting: str) -> list[Row]:
        """The rows of one block of the table."""
        return [r for r in self.rows if (r.workload, r.setting) == (workload, setting)]

    def row(self, workload: str, setting: str, clipper: str) -> Row | None:
        """One row, or None where it was not run."""
        return next((r for r in self.rows_of(workload, setting) if r.clipper == clipper), None)

    def steps_to_90(self, run: Run) -> int | None:
        """Steps until the test accuracy first reached 90 % of the best in the block."""
        reached = np.flatnonzero(run.accuracy >= 0.9 * self._best[run.workload, run.setting])
        return EVAL_EVERY * int(reached[0] + 1) if reached.size else None

    @functools.cached_property
    def _best(self) -> dict[tuple[str, str], float]:
        """The best accuracy, mean over seeds, that any clipper had at any time."""
        workloads, settings, clippers = (
            self.config[k] for k in ("workloads", "settings", "clippers")
        )
        return {
            (w, s): max(
                float(np.mean([r.accuracy for r in self.runs_of(w, s, c)], axis=0).max())
                for c in clippers
            )
            for w, s in itertools.product(workloads, settings)
        }

    def _row(self, workload: str, setting: str, clipper: str) -> Row:
        runs = self.runs_of(workload, setting, clipper)
        final = [r.accuracy[-1] for r in runs]
        steps = np.median([self.steps_to_90(r) or np.inf for r in runs])
        return Row(
            workload=workload,
            setting=setting,
            clipper=clipper,
            bound=self.bounds[workload].get(clipper),
            accuracy_mean=float(np.mean(final)),
            accuracy_std=float(np.std(final)),
            clip_rate=None if clipper == "none" else float(np.mean([r.clip_rate for r in runs])),
            steps_to_90=int(steps) if np.isfinite(steps) else None,
            lost_runs=sum(r.lost for r in runs),
            runs=len(runs),
            us_per_step=1e6 * float(np.median([r.seconds_per_step for r in runs])),
        )
