"""Time of a training step with each aggregator: gradient, aggregation and Adam.

    python benchmarks/aggregators.py           # MLP, language model, CNN: minutes on 2 cores
    python benchmarks/aggregators.py --quick   # the MLP alone

All steps run in one process in a new random order every round; quoted is the median over rounds
of time / time in that round. The first table is relative to a plain gradient and Adam, with
jax-privacy's `clipped_grad` at its best micro-batch next to it, if it is installed. The second is
relative to `clip_per_example`; a blank is a stack of gradients beyond 1 GB. Prints markdown; writes
JSON with `--json`, and `--markdown` writes the documentation's page; with `--rows` from what was
measured before:

    python benchmarks/aggregators.py --rows out/rows.json --markdown docs/aggregators_cost.md
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _models as models
import jax
import jax.numpy as jnp
import optax
from _measure import compiled, interleaved, machine, ratios, save

import optaxclip
from optaxclip.per_example import (
    centered_clip,
    coordinate_median,
    coordinate_trimmed_mean,
    example_quantile,
    geometric_median,
    trim_by_norm,
)
from optaxclip.thresholds import split_evenly

try:
    from jax_privacy.clipping import clipped_grad as privacy_clipped_grad
except ImportError:
    privacy_clipped_grad = None

MODELS: dict[str, Callable[[], models.Workload]] = {
    "MLP B=256": lambda: models.mlp(256),
    "LM B=16 T=64": lambda: models.lm(16, 64, d=128, layers=2),
    "CNN B=64": lambda: models.cnn(64),
}
QUICK = ("MLP B=256",)
PLAIN, AGAIN, FLAT, PRIVACY = "plain", "plain again", "clip_per_example", "jax-privacy"
MICROBATCHES = (1, 8, None)

AGGREGATORS: dict[str, Any] = {
    FLAT: optaxclip.clip_per_example(1.0),
    "clip_per_example again": optaxclip.clip_per_example(1.0),
    "clip_per_example, by leaf": optaxclip.clip_per_example(split_evenly(1.0), by="leaf"),
    "clip_per_example, quantile": optaxclip.clip_per_example(example_quantile(0.5)),
    "trim_by_norm": trim_by_norm(0.1),
    "centered_clip, 1 iteration": centered_clip(1.0),
    "geometric_median, 4 iterations": geometric_median(iterations=4),
    "coordinate_median": coordinate_median(),
    "coordinate_trimmed_mean": coordinate_trimmed_mean(0.1),
}
# Measured up to this many bytes of stacked gradients: they are sorted, for seconds a step.
STACKED = ("coordinate_median", "coordinate_trimmed_mean")
MOST_BYTES = 2**30


PAGE = """# What aggregators cost

Time of a training step, gradient and Adam included, with each example's gradient clipped, relative
to one with a plain gradient; jax-privacy's `clipped_grad` at the fastest of its micro-batch sizes,
which stands in brackets:

{steps}

A step with each aggregator relative to one with `clip_per_example`. A blank is a stack of gradients
beyond 1 GB, which is not measured:

{aggregators}

{machine}. {noise} Medians over interleaved rounds. The language model has 2 layers of width 128.

`centered_clip` and `geometric_median` take norms of differences, one or more times a step, so that
they go through the factors again. `coordinate_median` and `coordinate_trimmed_mean` sort the
gradients, which have to be stacked for it.

This page is written by `benchmarks/aggregators.py --markdown`.
"""


def main() -> None:
    """Measures every model, or reads what was measured, and prints the two tables."""
    args = _arguments()
    if args.rows:
        parts = [json.loads(path.read_text()) for path in args.rows]
        found = parts[0] | {"models": {k: v for part in parts for k, v in part["models"].items()}}
    else:
        models = {model: measure(MODELS[model](), args.rounds) for model in args.models}
        found = {"machine": machine(), "models": models}
    steps, aggregators = _tables(found["models"])
    noise = [row["over plain"][AGAIN] for row in found["models"].values()]
    noise = f"The plain step against itself (A/A): {min(noise):.2f}x to {max(noise):.2f}x."
    print(f"{steps}\n\n{aggregators}\n\n{found['machine']}\n{noise}")
    save(found, args.json)
    if args.markdown:
        args.markdown.write_text(
            PAGE.format(steps=steps, aggregators=aggregators, machine=found["machine"], noise=noise)
        )


def _tables(found: dict[str, dict]) -> tuple[str, str]:
    head = f"{' | '.join(found)} |\n| --- |{' ---: |' * len(found)}"
    steps = [f"| a step of | {head}"]
    for name, label in ((PLAIN, "grad + Adam"), (FLAT, "per_example_grad + clip + Adam")):
        steps.append(_row(label, [row["over plain"][name] for row in found.values()]))
    best = [_best_privacy(row["over plain"]) for row in found.values()]
    if None not in best:
        cells = (f"{time:.2f}x ({size})" for time, size in best)
        steps.append(f"| jax-privacy + Adam (its best micro-batch) | {' | '.join(cells)} |")
    aggregators = [f"| over {FLAT} | {head}"]
    for name in AGGREGATORS:
        if name != FLAT:
            aggregators.append(_row(name, [row["over flat"].get(name) for row in found.values()]))
    return "\n".join(steps), "\n".join(aggregators)


def measure(work: models.Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Times of all steps over those of the plain step and of flat clipping."""
    variants, slow = {}, {}
    for name, (init, step) in _steps(work).items():
        state = jax.jit(init)(work.params)
        executable, _ = compiled(step, work.params, state, work.batch)
        run = functools.partial(executable, work.params, state, work.batch)
        (slow if name in STACKED else variants)[name] = run
    times = interleaved(variants, rounds)
    # Few rounds will do for what takes a hundred times as long.
    few = interleaved({FLAT: variants[FLAT], **slow}, max(2, rounds // 5))
    return {
        "over plain": ratios(times, PLAIN),
        "over flat": {**ratios(times, FLAT), **ratios(few, FLAT)},
    }


def _steps(work: models.Workload) -> dict[str, tuple[Callable, Callable]]:
    """`init(params)` and `step(params, state, batch)`, by name."""
    examples = len(jax.tree.leaves(work.batch)[0])

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(work.loss, (None, 0))(params, batch))

    plain, adam = jax.grad(mean_loss), optax.adam(1e-3)
    steps = {PLAIN: _step(plain, adam), AGAIN: _step(plain, adam)}
    stacked = examples * sum(x.nbytes for x in jax.tree.leaves(work.params))
    for name, aggregator in AGGREGATORS.items():
        if name in STACKED and stacked > MOST_BYTES:
            continue
        grad = optaxclip.per_example_grad(work.loss)
        steps[name] = _step(grad, optax.chain(aggregator, optax.adam(1e-3)))
    if privacy_clipped_grad is not None:
        for size in (size for size in MICROBATCHES if size is None or examples % size == 0):
            grad = privacy_clipped_grad(
                work.loss, l2_clip_norm=1.0, normalize_by=examples, keep_batch_dim=False,
                microbatch_size=size,
            )  # fmt: skip
            steps[f"{PRIVACY} {size or 'none'}"] = _step(grad, adam)
    return steps


def _step(grad: Callable, tx: Any) -> tuple[Callable, Callable]:
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(grad(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def _best_privacy(over_plain: dict[str, float]) -> Any:
    """Time and micro-batch; None without jax-privacy."""
    found = [(t, n.split()[-1]) for n, t in over_plain.items() if n.startswith(PRIVACY)]
    return min(found, default=None)


def _row(label: str, cells: list[float | None]) -> str:
    return f"| {label} | {' | '.join('' if t is None else f'{t:.2f}x' for t in cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="take the figures of these JSONs, measure nothing"
    )
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    args = parser.parse_args()
    args.models = list(QUICK) if args.quick else args.models
    return args


if __name__ == "__main__":
    main()
