"""The gradient noise scale, and the batch size beyond which a larger one gains little.

* Handwritten digits: an MLP with layer normalisation is trained by SGD to one loss, with batches of
  4 to 256, each with the best of six learning rates. The curve through steps S and examples E,
  `(S / S_min - 1) (E / E_min - 1) = 1` (McCandlish et al., arXiv 1812.06162), has its knee at
  `E_min / S_min`. It stands beside the noise scale on the way there, measured in one run.
* A byte-level transformer: the noise scale of the whole, of the normalisation layers alone, which
  cost next to nothing (Gray et al., arXiv 2411.00999), and of the rest, in one run.

    python examples/batch_size.py                   # half a minute on 2 cores
    python examples/batch_size.py --cost            # and what measuring costs: as long again

The tables go to the terminal, `batch_size.png` and `results.json` to the folder `--out`; with
`--page` also into the documentation's page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _pages import fill, table
from _plots import LOOK, in_full
from _text import standard_library, windows
from _transformer import Transformer, loss_fn
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optaxclip

SIZES = (4, 8, 16, 32, 64, 128, 256)
RATES = tuple(0.16 * 2.0**k for k in range(6))
SEEDS, TARGET, EVERY = 3, 0.15, 2
WATCHED = 32
"""The batch size of the run in which the noise scale is measured."""
WIDTH, CONTEXT, BATCH, STEPS = 32, 32, 16, 120
PARTS = ("whole", "norm", "rest")


def digits() -> tuple[jax.Array, jax.Array]:
    """Standardised pixels and labels."""
    x, y = load_digits(return_X_y=True)
    return jnp.asarray((x - x.mean(0)) / (x.std(0) + 1e-3), jnp.float32), jnp.asarray(y)


def mlp(seed: int | jax.Array) -> dict[str, jax.Array]:
    """Parameters of two layers with a normalisation between them."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "in": jax.random.normal(keys[0], (64, WIDTH)) / 8,
        "norm/scale": jnp.ones(WIDTH),
        "norm/bias": jnp.zeros(WIDTH),
        "out": jax.random.normal(keys[1], (WIDTH, 10)) / WIDTH**0.5,
    }


def loss_of(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy of one example."""
    h = x @ p["in"]
    h = (h - h.mean()) * jax.lax.rsqrt(h.var() + 1e-6) * p["norm/scale"] + p["norm/bias"]
    logits = jax.nn.relu(h) @ p["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def mean_loss(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of a batch."""
    return jax.vmap(loss_of, (None, 0, 0))(p, x, y).mean()


def steps_to_target(data: tuple[jax.Array, jax.Array], size: int) -> np.ndarray:
    """Steps until the loss of an eighth of the data is below `TARGET`, `[RATES, SEEDS]`."""
    x, y = data
    most = 40 + 2400 // size

    def run(rate: jax.Array, seed: jax.Array) -> jax.Array:
        def step(p: dict, i: jax.Array) -> tuple[dict, None]:
            at = jax.random.randint(jax.random.fold_in(jax.random.key(seed), i), (size,), 0, len(x))
            grads = jax.grad(mean_loss)(p, x[at], y[at])
            return jax.tree.map(lambda w, g: w - rate * g, p, grads), None

        def some(carry: tuple) -> tuple:
            p, done, _ = carry
            p, _ = jax.lax.scan(step, p, done + jnp.arange(EVERY))
            return p, done + EVERY, mean_loss(p, x[::8], y[::8])

        def going(carry: tuple) -> jax.Array:
            return (carry[1] < most) & ~(carry[2] < TARGET)

        return jax.lax.while_loop(going, some, (mlp(seed), 0, jnp.asarray(1e9)))[1]

    over_seeds = jax.vmap(run, (None, 0))
    return np.asarray(jax.jit(jax.vmap(over_seeds, (0, None)))(jnp.array(RATES), jnp.arange(SEEDS)))


def parts_of(state: optaxclip.per_example.NoiseState) -> dict[str, jax.Array]:
    """The noise scale of the whole, of normalisation layers, and of the rest."""
    names = state.terms.names
    normalising = jnp.array(["norm" in name for name in names])
    parts = {"whole": jnp.ones(len(names), bool), "norm": normalising, "rest": ~normalising}
    sums = [(part @ state.terms.noise, part @ state.terms.signal) for part in parts.values()]
    return {k: noise / signal for k, (noise, signal) in zip(parts, sums, strict=True)}


def noise_on_the_way(data: tuple[jax.Array, jax.Array], rate: float, steps: int) -> dict:
    """The noise scale of one run of these steps: with this decay, means over nearly all of it."""
    x, y = data
    unclipped = optaxclip.clip_per_example(float("inf"))
    tx = optax.chain(optaxclip.watch_noise_scale(0.9999), unclipped, optax.sgd(rate))

    def step(carry: tuple, i: jax.Array) -> tuple:
        p, state = carry
        at = jax.random.randint(jax.random.fold_in(jax.random.key(0), i), (WATCHED,), 0, len(x))
        grads = optaxclip.per_example_grad(loss_of, batch_argnums=(1, 2))(p, x[at], y[at])
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    p = mlp(0)
    carry, _ = jax.jit(lambda: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps)))()
    return {k: float(v) for k, v in parts_of(carry[1][0]).items()}


def transformer_noise(steps: int) -> dict[str, np.ndarray]:
    """The noise scale after each step of a run of Adam, a moving average of some thirty steps."""
    graph, params = nnx.split(Transformer(nnx.Rngs(0)))
    data = jnp.asarray(windows(standard_library(), 0, (steps, BATCH), CONTEXT + 1), jnp.uint8)
    unclipped = optaxclip.clip_per_example(float("inf"))
    tx = optax.chain(optaxclip.watch_noise_scale(0.97), unclipped, optax.adam(3e-3))

    def loss(params: Any, text: jax.Array) -> jax.Array:
        return loss_fn(nnx.merge(graph, params), text[None])

    def step(carry: tuple, texts: jax.Array) -> tuple:
        params, state = carry
        grads = optaxclip.per_example_grad(loss)(params, texts)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), parts_of(state[0])

    _, found = jax.jit(lambda c, d: jax.lax.scan(step, c, d))((params, tx.init(params)), data)
    return {name: np.asarray(x) for name, x in found.items()}


def costs() -> dict[str, float]:
    """Operations of a step, by the compiler, over those of a plain gradient."""
    graph, params = nnx.split(Transformer(nnx.Rngs(0)))
    texts = jnp.asarray(windows(standard_library(), 0, (BATCH,), CONTEXT + 1), jnp.uint8)
    left_out = {"whole": None, "norm": lambda path, leaf: "norm" not in path}

    def loss(params: Any, text: jax.Array) -> jax.Array:
        return loss_fn(nnx.merge(graph, params), text[None])

    def measured(exclude: Any) -> Any:
        tx = optaxclip.watch_noise_scale(exclude=exclude)

        def step(params: Any, texts: jax.Array) -> tuple:
            grads = optaxclip.per_example_grad(loss)(params, texts)
            mean = optaxclip.per_example.weighted_sum(grads, jnp.full(BATCH, 1 / BATCH))
            return mean, tx.update(grads, tx.init(params), params)[1]

        return step

    def operations(step: Any) -> float:
        return jax.jit(step).lower(params, texts).compile().cost_analysis()["flops"]

    plain = operations(jax.grad(lambda p, texts: loss_fn(nnx.merge(graph, p), texts)))
    return {k: operations(measured(exclude)) / plain for k, exclude in left_out.items()}


def knee(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The curve in its other form, `S = S_min + E_min / B`, with relative errors of the steps.

    With `E = S B`, `(S - S_min) (E - E_min) = S_min E_min`.
    """
    steps, sizes = (np.array([row[k] for row in rows], float) for k in ("steps", "size"))
    terms = np.stack([np.ones_like(sizes), 1 / sizes], axis=1) / steps[:, None]
    least, examples = np.linalg.lstsq(terms, np.ones_like(sizes), rcond=None)[0]
    return {"steps": float(least), "examples": float(examples), "size": float(examples / least)}


def figure_of(rows: list[dict], fitted: dict, noise: dict, curves: dict) -> Figure:
    """Steps against batch size on the left; the transformer's noise scale on the right."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        sizes = np.array([row["size"] for row in rows], float)
        left.plot(sizes, [row["steps"] for row in rows], "o", color="#0072b2", label="measured")
        fit = fitted["steps"] + fitted["examples"] / sizes
        left.plot(sizes, fit, color="#8a8f98", lw=1, label="S_min + E_min / B")
        for name, colour in (("whole", "#d55e00"), ("norm", "#cc79a7")):
            left.axvline(noise[name], color=colour, lw=1, label=f"noise scale, {name}")
        left.axvline(fitted["size"], color="#8a8f98", lw=1, ls=":", label="E_min / S_min")
        left.set(xscale="log", yscale="log", xlabel="batch size", ylabel="steps", title="digits")
        # The whole is wide, to be seen behind the rest, which is nearly the same.
        looks = zip(PARTS, ("#d55e00", "#cc79a7", "#8a8f98"), (4, 1.5, 1.5), strict=True)
        for name, colour, width in looks:
            right.plot(curves[name], color=colour, label=name, lw=width)
        right.set(yscale="log", xlabel="step", title="transformer: noise scale, in examples")
        in_full(left.xaxis)
        for ax in (left, right):
            in_full(ax.yaxis)
            ax.legend(fontsize=7.5, handlelength=1.2)
        return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Runs both, prints the tables, writes picture and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("batch_size"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the transformer")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of batches of digits")
    parser.add_argument("--cost", action="store_true", help="also what measuring costs")
    parser.add_argument("--page", type=Path, help="also fill the tables of this page")
    args = parser.parse_args(argv)
    data, rows = digits(), []
    for size in args.sizes:
        steps = steps_to_target(data, size).mean(axis=1)
        best = int(np.argmin(steps))
        rows.append({"size": size, "rate": RATES[best], "steps": float(steps[best])})
    fitted = knee(rows)
    watched = min(rows, key=lambda row: abs(row["size"] - WATCHED))
    noise = noise_on_the_way(data, watched["rate"], int(watched["steps"]))
    curves = transformer_noise(args.steps)
    head = ("batch size", "learning rate", "steps", "examples", "steps / S_min", "examples / E_min")
    cells = [
        (
            str(row["size"]),
            f"{row['rate']:g}",
            f"{row['steps']:.0f}",
            f"{row['steps'] * row['size']:.0f}",
            f"{row['steps'] / fitted['steps']:.1f}",
            f"{row['steps'] * row['size'] / fitted['examples']:.1f}",
        )
        for row in rows
    ]
    sections = {
        "steps": table(head, cells),
        "noise": table(
            ("noise scale, in examples", "whole", "normalisation layers", "the rest"),
            [
                ("digits: the knee of the curve", f"{fitted['size']:.0f}", "", ""),
                ("digits, mean on the way to the loss", *(f"{noise[k]:.0f}" for k in PARTS)),
                *(
                    (f"transformer, step {i}", *(f"{curves[k][i - 1]:.1f}" for k in PARTS))
                    for i in range(args.steps // 4, args.steps + 1, args.steps // 4)
                ),
            ],
        ),
    }
    if args.cost:
        found = costs()
        sections["cost"] = table(
            ("operations, over those of a plain gradient", "whole", "normalisation layers"),
            [("by the compiler, on CPU", *(f"{found[k]:.2f}" for k in ("whole", "norm")))],
        )
    print("\n\n".join(sections.values()))
    if args.page:
        fill(args.page, sections)
    args.out.mkdir(parents=True, exist_ok=True)
    figure_of(rows, fitted, noise, curves).savefig(args.out / "batch_size.png", dpi=110)
    record = {"digits": rows, "knee": fitted, "noise": noise}
    record["transformer"] = {k: x.tolist() for k, x in curves.items()}
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
