"""What a clipper adds to an optimizer's step: time and compile time, against Optax's clipper.

    python benchmarks/step_overhead.py            # the whole grid, about 20 minutes on 2 cores
    python benchmarks/step_overhead.py --quick    # Adam in float32 alone, about 3 minutes

A step is `update` and `apply_updates` in one jitted function with donated state. For each
tree, optimizer and dtype all variants run in one process on the same buffers, in a new random
order every round, and what is quoted is the median over rounds of time / time of the optimizer
alone in that round. The optimizer alone runs twice a round: the second is the "A/A" column,
which shows what the machine's noise is worth. Prints markdown; writes JSON with `--json`.
"""

import argparse
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
import jax.numpy as jnp
import optax

import optaxclip

TREES = {
    "25 x 1024x1024": [(1024, 1024)] * 25,
    "300 x 256x256": [(256, 256)] * 300,
    "1000 x 1024": [(1024,)] * 1000,
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "sgd+momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "lion": lambda: optax.lion(1e-4),
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# name: (Optax's, ours). Bounds are such that every step clips.
CLIPPERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "value": (lambda: optax.clip(0.5), lambda: optaxclip.clip_by_value(0.5)),
    "value, stats=False": (
        lambda: optax.clip(0.5),
        lambda: optaxclip.clip_by_value(0.5, stats=False),
    ),
    "global": (lambda: optax.clip_by_global_norm(1.0), lambda: optaxclip.clip_by_global_norm(1.0)),
    "rms": (lambda: optax.clip_by_block_rms(0.5), lambda: optaxclip.clip_by_leaf_rms(0.5)),
    "agc": (lambda: optax.adaptive_grad_clip(0.01), lambda: optaxclip.agc(0.01)),
}
ALONE, AGAIN = "alone", "alone again"


def main() -> None:
    """Runs the grid and prints the table."""
    args = _arguments()
    rows = []
    print("| tree | optimizer | dtype | clipper | Optax | optaxclip | compile: Optax | optaxclip |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    for tree in args.trees:
        for dtype in args.dtypes:
            for optimizer in args.optimizers:
                measured = measure(tree, optimizer, dtype, args.clippers, args.rounds)
                rows += measured
                for row in measured:
                    print(_markdown(row), flush=True)
    print(f"\n{_machine()}")
    noise = [row["alone_again"] for row in rows]
    print(f"The optimizer against itself (A/A): {min(noise):.2f}x to {max(noise):.2f}x.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": _machine(), "rows": rows}, indent=1) + "\n")


def measure(tree: str, optimizer: str, dtype: str, clippers: list[str], rounds: int) -> list[dict]:
    """One row a clipper: median ratios to the optimizer alone, and compile seconds."""
    tx = OPTIMIZERS[optimizer]()
    params, grads = (_arrays(tree, dtype, seed) for seed in (0, 1))
    transforms = {ALONE: optax.identity(), AGAIN: optax.identity()}
    for clipper in clippers:
        for system, make in zip(("optax", "optaxclip"), CLIPPERS[clipper], strict=True):
            transforms[f"{system} {clipper}"] = make()
    steps, compile_s, clip_states = {}, {}, {}
    opt_state = tx.init(params)
    for name, clip in transforms.items():
        clip_states[name] = clip.init(params)
        gc.collect()
        start = time.perf_counter()
        lowered = _step(clip, tx).lower(params, opt_state, clip_states[name], grads)
        steps[name] = lowered.compile()
        compile_s[name] = time.perf_counter() - start
    times = _interleaved(steps, params, opt_state, clip_states, grads, rounds)
    ratios = {
        name: statistics.median(t / base for t, base in zip(ts, times[ALONE], strict=True))
        for name, ts in times.items()
    }
    return [
        {
            "tree": tree,
            "optimizer": optimizer,
            "dtype": dtype,
            "clipper": clipper,
            "alone_ms": 1e3 * statistics.median(times[ALONE]),
            "alone_again": ratios[AGAIN],
            "alone_compile_s": compile_s[ALONE],
            "optax": ratios[f"optax {clipper}"],
            "optaxclip": ratios[f"optaxclip {clipper}"],
            "optax_compile_s": compile_s[f"optax {clipper}"],
            "optaxclip_compile_s": compile_s[f"optaxclip {clipper}"],
        }
        for clipper in clippers
    ]


def _step(clip: Any, tx: Any) -> Any:
    def step(params: Any, opt_state: Any, clip_state: Any, grads: Any) -> Any:
        updates, clip_state = clip.update(grads, clip_state, params)
        updates, opt_state = tx.update(updates, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, clip_state

    return jax.jit(step, donate_argnums=(0, 1, 2))


def _interleaved(
    steps: dict, params: Any, opt_state: Any, clip_states: dict, grads: Any, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; params and moments go from one to the next."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.freeze()  # what the garbage collector scans grows with every trace
    gc.disable()
    try:
        for round_ in range(rounds + 2):
            for name in random.Random(round_).sample(list(steps), len(steps)):
                jax.block_until_ready((params, opt_state))
                start = time.perf_counter()
                params, opt_state, clip_states[name] = steps[name](
                    params, opt_state, clip_states[name], grads
                )
                jax.block_until_ready((params, opt_state, clip_states[name]))
                if round_ >= 2:  # warm-up
                    times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def _arrays(tree: str, dtype: str, seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(TREES[tree]))
    return {
        f"p{i:04}": jax.random.normal(key, shape, DTYPES[dtype])
        for i, (key, shape) in enumerate(zip(keys, TREES[tree], strict=True))
    }


def _markdown(row: dict) -> str:
    cells = [
        *(row[k] for k in ("tree", "optimizer", "dtype", "clipper")),
        *(f"{row[k]:.2f}x" for k in ("optax", "optaxclip")),
        *(f"{row[k]:.1f} s" for k in ("optax_compile_s", "optaxclip_compile_s")),
    ]
    return f"| {' | '.join(cells)} |"


def _machine() -> str:
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else ""
    return (
        f"{device.device_kind} {kind}, {os.cpu_count()} cores; Python"
        f" {platform.python_version()}, jax {jax.__version__}, optax {optax.__version__},"
        f" optaxclip {optaxclip.__version__}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Adam in float32 alone")
    for name, table in (
        ("trees", TREES),
        ("optimizers", OPTIMIZERS),
        ("dtypes", DTYPES),
        ("clippers", CLIPPERS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=list(table), default=list(table))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    if args.quick:
        args.optimizers, args.dtypes = ["adam"], ["f32"]
    return args


if __name__ == "__main__":
    main()
