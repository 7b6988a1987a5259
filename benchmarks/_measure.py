"""Timing that a shared machine does not spoil, and the words that describe the machine."""

import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import optaxclip


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, in a new random order every round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()  # what the garbage collector scans grows with every trace
    gc.disable()
    try:
        for round_ in range(rounds + 2):
            for name in random.Random(round_).sample(list(variants), len(variants)):
                start = time.perf_counter()
                jax.block_until_ready(variants[name]())
                if round_ >= 2:  # warm-up
                    times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, float]:
    """The median over rounds of time / time of `base` in that round."""
    return {
        name: statistics.median(t / b for t, b in zip(ts, times[base], strict=True))
        for name, ts in times.items()
    }


def compiled(fun: Callable, *args: Any, **jit_options: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds that tracing and compiling took."""
    gc.collect()
    start = time.perf_counter()
    executable = jax.jit(fun, **jit_options).lower(*args).compile()
    return executable, time.perf_counter() - start


def machine() -> str:
    """The device and the versions."""
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else ""
    return (
        f"{device.device_kind} {kind}, {os.cpu_count()} cores; Python"
        f" {platform.python_version()}, jax {jax.__version__}, optax {optax.__version__},"
        f" optaxclip {optaxclip.__version__}"
    )


def save(found: Any, path: Path | None) -> None:
    """Writes JSON, if asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
