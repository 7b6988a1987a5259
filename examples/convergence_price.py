"""The price of a strict bound: accuracy, steps to a target and direction, against the threshold.

An MLP learns scikit-learn's handwritten digits with SGD under four clippers, from a bound that
clips everything to none at all:
  global       the batch's gradient rescaled: shorter, but never turned,
  leaf         each leaf rescaled by itself,
  value        each element clipped,
  per_example  each example's gradient rescaled, then averaged.

The bound is given in units of what the clipper measures when nothing is clipped (the median over
training), so that the clippers can be compared: at 1 about half of the steps, or of the examples,
are clipped.

    python examples/convergence_price.py           # 4 clippers x 13 bounds x 5 seeds, 1 minute
    python examples/convergence_price.py --quick   # 4 bounds, 1 seed, shorter: 15 seconds

A table goes to the terminal; convergence_price.png and results.json to the folder `--out`. `--page
docs/choosing_a_threshold.md` also writes the table into that page, between its markers.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _mlp import Params, init, outputs
from _pages import fill, table
from _plots import LOOK
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip

WIDTHS = (64, 64, 10)
BATCH_SIZE, LEARNING_RATE, EVAL_EVERY, TARGET = 64, 0.3, 5, 0.9
CLIPPERS = {
    "global": optaxclip.clip_by_global_norm,
    "leaf": optaxclip.clip_by_leaf_norm,
    "value": optaxclip.clip_by_value,
    "per_example": optaxclip.clip_per_example,
}
TITLES = {
    "global": "global norm",
    "leaf": "leaf norm",
    "value": "value",
    "per_example": "per example",
}
COLOURS = {"global": "#0072b2", "leaf": "#009e73", "value": "#e69f00", "per_example": "#d55e00"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What training with one bound came to, mean over seeds."""

    clipper: str
    bound: float
    """In units of what is measured without clipping; infinite for none."""
    accuracy: float
    error: float
    """Standard error over seeds, of the accuracy."""
    steps: float
    """Steps to 90 % test accuracy, median over seeds; infinite if most never get there."""
    cosine: float
    """Between the clipped and the plain mean gradient, mean over training."""
    clipped: float
    """Share of steps, or examples."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table and writes the files."""
    options = parse(argv)
    start = time.perf_counter()
    bounds = [*np.geomspace(3e-3, 30, options.bounds - 1), np.inf]
    outcomes = []
    print(
        f"{'':12} {'bound':>8} {'accuracy %':>13} {'steps to 90 %':>14}"
        f" {'cosine':>7} {'clipped':>8}"
    )
    for clipper in options.clippers:
        run = jax.jit(functools.partial(train, clipper))
        inputs = [load(seed, options.steps) for seed in range(options.seeds)]
        free = [np.asarray(run(np.float32(np.inf), *given)[2]) for given in inputs]
        unit = float(np.median(free))
        for bound in bounds:
            runs = [jax.device_get(run(np.float32(bound * unit), *given)) for given in inputs]
            outcomes.append(outcome_of(clipper, bound, runs))
            print(line_of(outcomes[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(LOOK):
        figure = figure_of(outcomes, options.steps)
        figure.savefig(options.out / "convergence_price.png", dpi=100)
    record = [dataclasses.asdict(x) for x in outcomes]
    (options.out / "results.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if options.page:
        fill(options.page, {"price": markdown_of(outcomes)})
    print(f"{time.perf_counter() - start:.0f} s. See {options.out}/convergence_price.png")


def load(seed: int, steps: int) -> tuple[Any, ...]:
    """Parameters, data and batches of a run."""
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        (digits.data / 16).astype(np.float32),
        digits.target,
        random_state=seed,
        stratify=digits.target,
    )
    order = np.random.default_rng(seed).integers(0, len(x), (steps, BATCH_SIZE))
    params = init(jax.random.key(seed), WIDTHS)
    return params, x, y, x_test, y_test, order.reshape(-1, EVAL_EVERY, BATCH_SIZE)


def loss(params: Params, batch: Any) -> jax.Array:
    """Cross-entropy, for one example or the mean over many."""
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs(params, x), y))


def train(
    clipper: str, bound: Any, params: Params, x: Any, y: Any, x_test: Any, y_test: Any, order: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Test accuracy at each evaluation; cosine, norm and clipped share at each step."""
    clip, sgd = CLIPPERS[clipper](bound), optax.sgd(LEARNING_RATE)
    per_example = clipper == "per_example"

    def step(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
        params, state, before = carry
        batch = x[rows], y[rows]
        plain = jax.grad(loss)(params, batch)
        grads = optaxclip.per_example_grad(loss)(params, batch) if per_example else plain
        clipped, state = clip.update(grads, state, params)
        updates, _ = sgd.update(clipped, sgd.init(params), params)
        stats = optaxclip.clip_stats(state)[clip_name(clipper)]
        if per_example:
            seen = stats.examples.median_norm, stats.examples.clipped_fraction
        else:
            seen = stats.pre_clip_norm, (stats.clipped_count - before).astype(jnp.float32)
        turned = optax.tree.vdot(clipped, plain) / (
            optax.tree.norm(clipped) * optax.tree.norm(plain)
        )
        params = optax.apply_updates(params, updates)
        return (params, state, stats.clipped_count), (turned, *seen)

    def until_evaluation(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
        carry, seen = jax.lax.scan(step, carry, rows)
        right = outputs(carry[0], x_test).argmax(axis=-1) == y_test
        return carry, (jnp.mean(right), *seen)

    start = params, clip.init(params), jnp.zeros((), jnp.int32)
    return jax.lax.scan(until_evaluation, start, order)[1]


def clip_name(clipper: str) -> str:
    """As `clip_stats` calls it."""
    return CLIPPERS[clipper].__name__


def outcome_of(clipper: str, bound: float, runs: list[Any]) -> Outcome:
    """The mean over seeds."""
    curves = np.array([run[0] for run in runs])
    reached = [np.flatnonzero(curve >= TARGET) for curve in curves]
    steps = [EVAL_EVERY * (r[0] + 1.0) if r.size else np.inf for r in reached]
    ends = curves[:, -1]
    error = np.std(ends, ddof=1) / len(ends) ** 0.5 if len(ends) > 1 else 0.0
    cosine, clipped = (float(np.mean([run[k] for run in runs])) for k in (1, 3))
    return Outcome(
        clipper,
        float(bound),
        float(ends.mean()),
        float(error),
        float(np.quantile(steps, 0.5, method="higher")),
        cosine,
        clipped,
    )


def line_of(x: Outcome) -> str:
    """A line of the table."""
    accuracy, steps, cosine, clipped = cells_of(x)
    return (
        f"{TITLES[x.clipper]:12} {x.bound:8.3g} {accuracy:>13} {steps:>14} {cosine:>7} {clipped:>8}"
    )


def cells_of(x: Outcome) -> tuple[str, str, str, str]:
    """Accuracy, steps, cosine and share clipped, to be read by people."""
    accuracy = f"{100 * x.accuracy:.1f} ± {100 * x.error:.1f}"
    steps = f"{x.steps:.0f}" if np.isfinite(x.steps) else "never"
    return accuracy, steps, f"{x.cosine:.2f}", f"{100 * x.clipped:.0f} %"


def markdown_of(outcomes: list[Outcome]) -> str:
    """A row for each bound, with a cell for each clipper."""
    clippers = list(dict.fromkeys(x.clipper for x in outcomes))
    rows: dict[float, list[str]] = {}
    for x in outcomes:
        rows.setdefault(x.bound, []).append("; ".join(cells_of(x)))
    head = ["bound", *(TITLES[clipper] for clipper in clippers)]
    bounds = {b: f"{b:.2g}" if np.isfinite(b) else "none" for b in rows}
    return table(head, [[bounds[b], *cells] for b, cells in rows.items()])


def figure_of(outcomes: list[Outcome], steps: int) -> Figure:
    """Accuracy, steps to the target and cosine, each against the bound."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    accuracy, price, direction = figure.subplots(1, 3)
    bounds = sorted({x.bound for x in outcomes})
    at = np.array([*bounds[:-1], 3 * bounds[-2]])  # none stands a step to the right
    never = 1.35 * steps
    for clipper in dict.fromkeys(x.clipper for x in outcomes):
        mine = [x for x in outcomes if x.clipper == clipper]
        look = {"color": COLOURS[clipper], "ms": 4, "lw": 1.4}
        accuracy.errorbar(
            at,
            [100 * x.accuracy for x in mine],
            [100 * x.error for x in mine],
            fmt="o-",
            capsize=2,
            label=TITLES[clipper],
            **look,
        )
        price.plot(at, [min(x.steps, never) for x in mine], "o-", **look)
        direction.plot(at, [x.cosine for x in mine], "o-", **look)
    accuracy.set(title=f"Test accuracy after {steps} steps", ylabel="%")
    price.set(title=f"Steps to {TARGET:.0%} test accuracy", yscale="log")
    ticks = [t for t in (20, 50, 100, 200, 500, 1000) if t < never]
    price.set_yticks(ticks, [str(t) for t in ticks])
    price.axhline(never, color="#8a8f98", lw=0.8, ls=":")
    price.annotate(
        "not reached", (1, never), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    direction.set(title="Cosine with the plain mean gradient", ylim=(None, 1.02))
    for ax in (accuracy, price, direction):
        ax.set(xscale="log", xlabel="bound / what is measured without clipping")
        decades = [10.0**k for k in range(-2, 2)]
        ax.set_xticks([*decades, at[-1]], [f"{d:g}" for d in decades] + ["none"])
        ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=len(TITLES))
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(CLIPPERS)
    parser.add_argument("--clippers", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--bounds", type=int, help="how many, with none (default 13)")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default 5)")
    parser.add_argument("--steps", type=int, help=f"a multiple of {EVAL_EVERY} (default 600)")
    parser.add_argument("--out", type=Path, default=Path("out/convergence_price"), metavar="FOLDER")
    parser.add_argument("--page", type=Path, help="a page to write the table into")
    parser.add_argument("--quick", action="store_true", help="4 bounds, 1 seed, 200 steps")
    options = parser.parse_args(argv)
    options.bounds = options.bounds or (4 if options.quick else 13)
    options.seeds = options.seeds or (1 if options.quick else 5)
    options.steps = options.steps or (200 if options.quick else 600)
    if options.steps % EVAL_EVERY or options.bounds < 3:
        parser.error(f"--steps must be a multiple of {EVAL_EVERY}, and --bounds at least 3")
    return options


if __name__ == "__main__":
    main()
