"""MuCon: Muon that clips singular values where Muon makes all of them one.

Muon replaces the momentum of a matrix, `U diag(s) V^T`, by `U V^T`: directions in which there was
next to no gradient are moved as far as those in which there was much. MuCon (Yi, arXiv 2605.26459)
clips instead, `U diag(min(s, tau)) V^T`, and leaves the small ones small. It is Muon with another
middle: a chain of Optax's transforms and `clip_singular_values`.

A byte-level transformer learns the text of the Python standard library under Adam, under
`optax.contrib.muon` and under MuCon with several tau. The clipped momentum is divided by tau, so
that all of them have one learning rate, and towards tau = 0 MuCon becomes Muon; towards infinity,
gradient descent with momentum and a learning rate that vanishes. What is not a matrix between
layers has Adam in all of them.

In this run clipping wins nothing over Muon: the larger tau, the slower, with a learning rate two or
four times as large too.

    python examples/mucon.py            # half a minute on 2 cores

A table goes to the terminal, `mucon.png` and `results.json` to the folder `--out`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _plots import LOOK
from _text import standard_library, windows
from _transformer import Transformer, loss_fn
from flax import nnx
from matplotlib.figure import Figure
from optax.contrib import MuonDimensionNumbers

import optaxclip

CONTEXT, BATCH, STEPS = 32, 16, 100
RATE, ADAM_RATE, BETA = 0.02, 3e-3, 0.95
TAUS = (1e-3, 1e-2, 1e-1)


def axes_of(path: str, leaf: Any) -> tuple[int, ...] | None:
    """The axes of one matrix, or None for what is none: rows come first, the last is of columns.

    Kernels of queries, keys and values are (width, heads, head width): a matrix for each head.
    """
    if leaf.ndim < 2 or path.split("/")[0] in ("bytes", "places", "head"):
        return None
    if leaf.ndim == 2:
        return (0, 1)
    return (0, 1, 2) if "/out/" in path else (0, 2)


def labels(params: Any) -> Any:
    """`"matrix"` or `"other"` for each leaf."""
    return jax.tree.map_with_path(
        lambda path, x: "other" if axes_of(named(path), x) is None else "matrix", params
    )


def mucon(rate: Any, tau: Any) -> optax.GradientTransformation:
    """The recipe. Momentum as in Muon, but that its start is not corrected."""
    matrices = optax.chain(
        optax.trace(BETA, nesterov=True),
        optax.scale(1 - BETA),  # a mean of gradients, not a sum
        optaxclip.clip_singular_values(tau, unit_axes=axes_of),
        by_width(),
        optax.scale_by_learning_rate(rate / tau),
    )
    return optax.partition({"matrix": matrices, "other": optax.adam(ADAM_RATE)}, labels)


def by_width() -> optax.GradientTransformation:
    """Muon's factor for the shape of a matrix: `sqrt(max(1, columns / rows))`."""

    def scaled(path: Any, x: jax.Array) -> jax.Array:
        *rows, columns = (x.shape[a] for a in axes_of(named(path), x))
        return x * max(1.0, columns / np.prod(rows)) ** 0.5

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scaled, updates))


def muon(rate: Any) -> optax.GradientTransformation:
    """Optax's, of the same matrices."""

    def dimensions(path: Any, x: Any) -> MuonDimensionNumbers | None:
        axes = axes_of(named(path), x)
        return None if axes is None else MuonDimensionNumbers(axes[:-1], axes[-1])

    return optax.contrib.muon(
        rate,
        beta=BETA,
        adam_learning_rate=ADAM_RATE,
        muon_weight_dimension_numbers=lambda p: jax.tree.map_with_path(dimensions, p),
    )


def named(path: Any) -> str:
    """`"blocks/0/inner/kernel"` and so on."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def train(make: Callable[[Any], Any], settings: Sequence[float], steps: int) -> list[np.ndarray]:
    """The loss after each step; the same data and the same first parameters every time."""
    graph, params = nnx.split(Transformer(nnx.Rngs(0)))
    data = jnp.asarray(windows(standard_library(), 0, (steps, BATCH), CONTEXT + 1), jnp.uint8)

    @jax.jit  # once for all settings
    def run(setting: jax.Array) -> jax.Array:
        tx = make(setting)

        def step(carry: tuple, text: jax.Array) -> tuple:
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graph, p), text))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), data)[1]

    return [np.asarray(run(setting)) for setting in settings]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--taus", type=float, nargs="*", default=TAUS)
    parser.add_argument("--out", type=Path, default=Path("mucon"))
    args = parser.parse_args(argv)
    names = [f"MuCon, tau {tau:g}" for tau in args.taus]
    curves = {
        "Adam": train(optax.adam, [ADAM_RATE], args.steps)[0],
        "Muon": train(muon, [RATE], args.steps)[0],
        **dict(zip(names, train(lambda tau: mucon(RATE, tau), args.taus, args.steps), strict=True)),
    }
    last = max(args.steps // 10, 1)
    print(f"{'':20}{'loss at the end':>16}{'half-way':>10}")
    for name, curve in curves.items():
        middle = curve[args.steps // 2 - last : args.steps // 2].mean()
        print(f"{name:20}{curve[-last:].mean():16.3f}{middle:10.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(
        json.dumps({k: x.tolist() for k, x in curves.items()}, indent=1), encoding="utf-8"
    )
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        ax = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            style = {"color": "#8a8f98" if i == 0 else "#3b3b3b"} if i < 2 else {}
            smooth = np.convolve(curve, np.ones(last) / last, "valid")
            ax.plot(np.arange(len(smooth)) + last, smooth, label=name, lw=1.2, **style)
        ax.set(xlabel="step", ylabel=f"loss, mean of {last} steps")
        ax.legend(fontsize=7.5)
        figure.savefig(args.out / "mucon.png", dpi=110)
    print(f"picture and numbers: {args.out}")


if __name__ == "__main__":
    main()
