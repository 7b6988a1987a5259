"""Two accidents that a clipper of the gradient does not see, each survived by one line.

* A shard of bad data: 30 batches with nonsense for targets. Under an absolute error the gradient is
  hardly longer than ever, only the loss jumps. `skip_outliers(adam)`, given the loss, drops them.
* A sensor that was off is switched on. The gradient is hardly longer than ever, but Adam has seen
  none for the weights of that sensor: their second moments are zero, and for dozens of steps the
  update is many times its usual length. A clipper after Adam holds it.

A small network learns a function of 32 of its inputs in both. Each run is shown without the line,
with the same for the gradient, which does little here, and with it.

    python examples/two_spikes.py             # half a minute on 2 cores

A table goes to the terminal, `two_spikes.png` and `results.json` to the folder `--out`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _plots import LOOK, in_full
from matplotlib.figure import Figure

import optaxclip

INPUTS, USED, HIDDEN, BATCH, STEPS = 256, 32, 64, 16, 900
EVENT, SHARD = 500, 30
COLOURS = ("#3b3b3b", "#56b4e9", "#0072b2")
ADAM = optax.adam(3e-3)


class Curves(NamedTuple):
    """One number a step."""

    error: np.ndarray
    """On sound data, after the step."""
    loss: np.ndarray
    gradient: np.ndarray
    update: np.ndarray


class Accident(NamedTuple):
    """What happens, and the line that helps."""

    title: str
    lines: dict[str, Callable[[], optax.GradientTransformationExtraArgs]]
    """Without it, for the gradient, and with it."""
    shown: str
    """What spikes."""


ACCIDENTS = {
    "loss": Accident(
        "a shard of bad data",
        {
            "adam": lambda: ADAM,
            'skip_outliers(adam, of="gradient")': lambda: optaxclip.skip_outliers(
                ADAM, of="gradient"
            ),
            "skip_outliers(adam)": lambda: optaxclip.skip_outliers(ADAM),  # the loss too
        },
        "loss",
    ),
    "update": Accident(
        "a sensor is switched on",
        {
            "adam": lambda: ADAM,
            "chain(zclip(), adam)": lambda: optax.chain(optaxclip.zclip(), ADAM),
            "chain(adam, clip_by_global_norm(c))": lambda: optax.chain(
                ADAM, optaxclip.clip_by_global_norm(0.05)
            ),
        },
        "update",
    ),
}


def train(tx: optax.GradientTransformation, accident: str) -> Curves:
    """One run; the same data and the same first parameters every time."""
    keys = jax.random.split(jax.random.key(0), 4)
    used = jnp.arange(INPUTS) < USED  # the others tell nothing, and may be off
    truth = jnp.where(used, jax.random.normal(keys[0], (INPUTS,)) / 6, 0.0)
    params = {
        "in": jnp.where(used[:, None], jax.random.normal(keys[1], (INPUTS, HIDDEN)) / 8, 0.0),
        "out": jax.random.normal(keys[2], (HIDDEN,)) / 8,
    }
    tx = optax.with_extra_args_support(tx)

    def batch(step: jax.Array, size: int = BATCH) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.fold_in(keys[3], step), (size, INPUTS))
        if accident == "update":
            x = jnp.where(used | (step >= EVENT), x, 0.0)
        return x, jnp.sin(x @ truth)

    def loss_of(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(jnp.tanh(x @ params["in"]) @ params["out"] - y))

    def step(carry: tuple, i: jax.Array) -> tuple:
        params, state = carry
        x, y = batch(i)
        if accident == "loss":
            bad = (i >= EVENT) & (i < EVENT + SHARD)
            y = jnp.where(bad, -50.0 * y, y)
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = tx.update(grads, state, params, loss=loss)
        params = optax.apply_updates(params, updates)
        error = loss_of(params, *batch(i + 10_000, 512))
        return (params, state), (error, loss, optax.tree.norm(grads), optax.tree.norm(updates))

    _, found = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS)))()
    return Curves(*map(np.asarray, found))


def figure_of(curves: dict[str, dict[str, Curves]]) -> Figure:
    """A row for each accident: what spikes, what does not, and what becomes of the error."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        for (name, accident), row in zip(ACCIDENTS.items(), axes, strict=True):
            plain = curves[name]["adam"]
            row[0].plot(getattr(plain, accident.shown), color="#d55e00", label=accident.shown)
            row[0].plot(plain.gradient, color="#8a8f98", label="gradient")
            row[0].set(yscale="log", title=f"{accident.title}: under Adam alone")
            # The first is wide, to be seen where the second does the same.
            looks = zip(COLOURS, (3, 1.2, 1.2), strict=True)
            for (run, found), (colour, width) in zip(curves[name].items(), looks, strict=True):
                row[1].plot(found.error, color=colour, label=run, lw=width)
            row[1].set(yscale="log", title="error on sound data")
            for ax in row:
                in_full(ax.yaxis)
                ax.legend(fontsize=7.5, handlelength=1.2)
        for ax in axes[-1]:
            ax.set(xlabel="step", xlim=(EVENT - 200, STEPS))
        return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("two_spikes"))
    args = parser.parse_args(argv)
    curves: dict[str, dict[str, Curves]] = {}
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':36}{'error before':>13}{'worst after':>13}{'at the end':>12}")
    for name, accident in ACCIDENTS.items():
        curves[name] = {run: train(make(), name) for run, make in accident.lines.items()}
        results[name] = {}
        print(accident.title)
        for run, found in curves[name].items():
            row = {
                "before": float(found.error[EVENT - 50 : EVENT].mean()),
                "worst": float(found.error[EVENT:].max()),
                "end": float(found.error[-50:].mean()),
                "gradient": spike(found.gradient),
                "spike": spike(getattr(found, accident.shown)),
            }
            results[name][run] = row
            print(f"{run:36}{row['before']:13.3f}{row['worst']:13.3f}{row['end']:12.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    figure_of(curves).savefig(args.out / "two_spikes.png", dpi=150)
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"picture and numbers: {args.out}")


def spike(numbers: np.ndarray) -> float:
    """The largest after the event, in units of the usual one before."""
    return float(numbers[EVENT : EVENT + 60].max() / np.median(numbers[EVENT - 100 : EVENT]))


if __name__ == "__main__":
    main()
