"""All runs of a search: what is missing is computed, round by round, and kept."""

import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip.selection.folds import Pairs, batches
from optaxclip.selection.runs import (
    Jobs,
    Outcome,
    Shared,
    Training,
    most_bytes,
    program,
    traceable,
    width_for,
)
from optaxclip.selection.saved import Saved, digest, without_addresses


@dataclasses.dataclass(frozen=True)
class Search:
    """Which runs there are. The threshold changes fastest: its neighbours share their batches."""

    thresholds: np.ndarray
    pairs: Pairs
    seeds: int
    steps: int
    batch_size: int
    entropy: np.ndarray
    """Of the key, for NumPy."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Folds, seeds, thresholds."""
        return len(self.pairs), self.seeds, len(self.thresholds)

    def jobs(self, runs: np.ndarray) -> Jobs:
        """What to do in these runs."""
        fold, seed, threshold = np.unravel_index(runs, self.shape)
        order = [self._batches(int(f), int(s)) for f, s in zip(fold, seed, strict=True)]
        fold, seed = fold.astype(np.int32), seed.astype(np.int32)
        return Jobs(self.thresholds[threshold], fold, seed, np.stack(order))

    @functools.cached_property
    def _batches(self) -> Any:
        def drawn(fold: int, seed: int) -> np.ndarray:
            entropy = [*map(int, self.entropy), fold, seed]
            return batches(self.pairs[fold][0], self.steps, self.batch_size, entropy)

        return functools.lru_cache(maxsize=4)(drawn)


def run_all(
    search: Search,
    training: Training,
    shared: Shared,
    width: int | None,
    progress: bool,
    resume_dir: Any,
) -> Outcome:
    """The outcome of every run, `[folds, seeds, thresholds]`: computed here, or before."""
    devices = jax.local_devices()
    runs = int(np.prod(search.shape))
    one = Jobs(*(field[0] for field in search.jobs(np.zeros(1, int))))
    train, evaluate = traceable(training)
    traced = train.trace(one, shared)  # the faults of the arguments come out here
    scored = evaluate.trace(traced.out_info, one.fold, shared)
    if width is not None:
        chosen = min(width, runs)
    else:
        own = most_bytes(traced.jaxpr.jaxpr) + one.batches.nbytes
        chosen = width_for(own, most_bytes(scored.jaxpr.jaxpr), runs, devices)
    flags, numbers = np.zeros(runs, bool), np.zeros((3, runs), np.float32)
    outcomes = Outcome(numbers[0], flags, numbers[1], numbers[2])
    done = np.zeros(runs, bool)
    saved = None
    if resume_dir is not None:
        experiment = {**fingerprint(search, shared, (traced, scored)), "runs_at_once": chosen}
        saved = Saved(resume_dir, experiment, ("runs_at_once",) if width is None else ())
        chosen = saved.experiment["runs_at_once"]
        saved.load(outcomes, done)

    waiting = np.flatnonzero(~done)
    if waiting.size:
        mesh = Mesh(np.asarray(devices), ("runs",))
        shared = jax.device_put(shared, NamedSharding(mesh, P()))
        compute = program(training, chosen, tuple(devices))
    with _Progress(runs, int(done.sum()), progress) as report:
        size = chosen * len(devices)
        rounds = [waiting[first : first + size] for first in range(0, len(waiting), size)]
        begun: list[Any] = []
        for k, now in enumerate(rounds):
            # One round is always under way while the results of the one before are kept.
            for later in rounds[k + len(begun) : k + 2]:
                filled = np.resize(later, size)  # the last round may have room to spare
                begun.append(compute(search.jobs(filled), shared))
            for field, new in zip(outcomes, jax.device_get(begun.pop(0)), strict=True):
                field[now] = new[: len(now)]
            if saved is not None:
                saved.add(now, outcomes)
            report(len(now))
    return Outcome(*(field.reshape(search.shape) for field in outcomes))


def fingerprint(search: Search, shared: Shared, programs: tuple[Any, ...]) -> dict[str, Any]:
    """What the results follow from, by name."""
    texts = [without_addresses(traced.lower().as_text()) for traced in programs]
    return {
        "thresholds": search.thresholds.tolist(),
        "folds": digest(search.pairs),
        "seeds": search.seeds,
        "steps": search.steps,
        "batch_size": search.batch_size,
        "key": digest(shared.key),
        "data": digest(shared.data),
        "functions": digest(*texts, *(traced.jaxpr.consts for traced in programs)),
        "versions": f"jax {jax.__version__}, numpy {np.__version__}",
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
