"""All runs of a search: what is missing is computed, round by round, and kept."""

import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip._runs import Jobs, Outcome, Shared, Training, bytes_of, program, width_for
from optaxclip._saved import Saved, digest, without_addresses


def train_all(
    training: Training,
    jobs: Jobs,
    shared: Shared,
    width: int | None,
    progress: bool,
    resume_dir: Any,
) -> Outcome:
    """The outcome of every job: computed here, or before."""
    devices = jax.local_devices()
    runs = len(jobs.threshold)
    one = jax.tree.map(lambda x: x[0], jobs)
    traced = jax.jit(training.train).trace(one, shared)  # the arguments' faults come out here
    scoring = jax.jit(training.evaluate).trace(traced.out_info, one.fold, shared)
    chosen = (
        min(width, runs)
        if width
        else width_for(bytes_of(traced.jaxpr.jaxpr), bytes_of(scoring.jaxpr.jaxpr), runs, devices)
    )
    outcomes = Outcome(
        np.zeros(runs, np.float32),
        np.zeros(runs, bool),
        np.zeros(runs, np.float32),
        np.zeros(runs, np.float32),
    )
    done = np.zeros(runs, bool)
    saved = None
    if resume_dir is not None:
        experiment = fingerprint(training, jobs, shared, (traced, scoring))
        experiment["runs_at_once"] = chosen
        free = ("runs_at_once",) if width is None else ()
        saved = Saved(resume_dir, experiment, free)
        chosen = saved.experiment["runs_at_once"]
        saved.load(outcomes, done)

    waiting = np.flatnonzero(~done)
    if not waiting.size:
        return outcomes
    mesh = Mesh(np.asarray(devices), ("runs",))
    shared = jax.device_put(shared, NamedSharding(mesh, P()))
    compute = program(training, chosen, tuple(devices))
    with _Progress(runs, int(done.sum()), progress) as report:
        size = chosen * len(devices)
        for first in range(0, len(waiting), size):
            now = waiting[first : first + size]
            filled = np.resize(now, size)  # the last round may have room to spare
            round_ = Jobs(*(field[filled] for field in jobs))
            found = jax.device_get(compute(round_, shared))
            for field, new in zip(outcomes, found, strict=True):
                field[now] = new[: len(now)]
            if saved is not None:
                saved.add(now, outcomes)
            report(len(now))
    return outcomes


def fingerprint(
    training: Training, jobs: Jobs, shared: Shared, programs: tuple[Any, ...]
) -> dict[str, Any]:
    """What the results follow from, by name."""
    texts = [without_addresses(traced.lower().as_text()) for traced in programs]
    return {
        "thresholds": sorted({float(c) for c in jobs.threshold}),
        "folds": digest(shared.folds),
        "seeds": int(jobs.seed.max()) + 1,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "key": digest(shared.key),
        "data": digest(shared.data),
        "functions": digest(*texts, *(traced.jaxpr.consts for traced in programs)),
        "jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
    }


class _Progress:
    """A line on stderr: rewritten on a terminal, elsewhere a new one for every tenth."""

    def __init__(self, runs: int, done: int, shown: bool):
        self.runs, self.done, self.before = runs, done, done
        self.shown = shown
        self.start = time.perf_counter()

    def __enter__(self) -> "_Progress":
        if self.before and self.shown:
            print(f"{self.before} of {self.runs} runs are there", file=sys.stderr)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shown and sys.stderr.isatty():
            print(file=sys.stderr)

    def __call__(self, number: int) -> None:
        tenth = 10 * self.done // self.runs
        self.done += number
        if not self.shown:
            return
        passed = time.perf_counter() - self.start
        left = passed / (self.done - self.before) * (self.runs - self.done)
        filled = 20 * self.done // self.runs
        bar = "#" * filled + "." * (20 - filled)
        line = f"[{bar}] {self.done} of {self.runs} runs, {passed:.0f} s, {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{line} ", end="", file=sys.stderr, flush=True)
        elif 10 * self.done // self.runs > tenth:
            print(line, file=sys.stderr, flush=True)
