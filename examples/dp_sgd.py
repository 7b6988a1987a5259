"""Differentially private training: clipping from here, noise and accounting from elsewhere.

    pip install '.[examples,privacy]'
    python examples/dp_sgd.py
    python examples/dp_sgd.py --noise 1 1.5 3 --print-every 10 --plot out/dp_sgd.png

An MLP in Flax NNX learns scikit-learn's handwritten digits by DP-SGD (with Adam). Each library does
its own part: `clip_per_example` bounds what one example can do, jax-privacy adds the noise,
dp-accounting computes the epsilon. This library adds no noise and accounts for no privacy.

What the guarantee rests on: every example is in each batch with the same probability, independently
(Poisson sampling), so batches differ in size; they are padded to one shape, and padding is masked.
The sum is divided by the expected batch size, not by that of the batch. The noise has standard
deviation `--noise` times the bound. Epsilon holds for adding or removing one example; nothing else
that looks at the data is paid for, such as choosing these settings. The random numbers here are
for a demonstration: a deployment needs a secure generator.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _plots import LOOK
from flax import nnx
from jax_privacy.noise_addition import gaussian_privatizer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip
from optaxclip.per_example import masked

# Renyi's orders as dp-accounting has them, but without those near 1: at a noise of one bound its
# series for them does not converge, of which it warns, and they give no epsilon below 20.
ORDERS = (*(k / 10 for k in range(17, 110)), *range(11, 64), 128, 256, 512, 1024)
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#b0569a", "#3b3b3b")


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.hidden(x)))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with each noise, and draws the picture."""
    options = parse(argv)
    digits = load_digits()
    data = train_test_split(
        (digits.data / 16).astype(np.float32), digits.target, random_state=options.seed
    )
    found = {noise: train(noise, data, options) for noise in options.noise}
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(LOOK):
            figure(found, options.delta).savefig(options.plot, dpi=110)


def train(noise: float, data: Any, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Prints epsilon, delta and accuracy as it goes; epsilons and accuracies."""
    x, x_test, y, y_test = data
    probability = options.batch_size / len(x)

    # First in the chain: what is divided is the noisy sum.
    tx = optax.chain(
        optaxclip.clip_per_example(options.max_norm, mean="sum"),
        gaussian_privatizer(stddev=noise * options.max_norm, prng_key=options.seed),
        optax.scale(1 / options.batch_size),
        optax.adam(options.learning_rate),
    )
    graph, params = nnx.split(MLP(nnx.Rngs(options.seed)), nnx.Param)
    params = nnx.as_pure(params)
    state = tx.init(params)

    def loss(params, example):
        x, label = example
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    @jax.jit
    def train_step(params, state, x, y, real):
        grads = optaxclip.per_example_grad(loss)(params, (x, y))
        updates, state = tx.update(masked(grads, real), state, params)
        return optax.apply_updates(params, updates), state

    drawn = np.random.default_rng(options.seed).random((options.steps, len(x))) < probability
    capacity = int(drawn.sum(axis=1).max())
    accountant, accounted = dp_accounting.rdp.RdpAccountant(ORDERS), 0
    event = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise))
    print(f"{len(x)} examples, {probability:.1%} of them a step, noise {noise:g} bounds")
    found = []
    for i, chosen in enumerate(drawn, 1):
        batch = np.flatnonzero(chosen)
        real = np.arange(capacity) < len(batch)
        batch = np.pad(batch, (0, capacity - len(batch)))
        params, state = train_step(params, state, x[batch], y[batch], real)
        if i % options.print_every == 0 or i == options.steps:
            accountant.compose(event, i - accounted)
            accounted = i
            right = nnx.merge(graph, params)(jnp.asarray(x_test)).argmax(axis=-1) == y_test
            epsilon = accountant.get_epsilon(options.delta)
            found.append((epsilon, float(right.mean())))
            # No clip_stats here: how many examples were clipped is private, too.
            print(
                f"step {i}: epsilon {epsilon:.2f}, delta {options.delta:g},"
                f" accuracy {right.mean():.1%}"
            )
    return found


def figure(found: dict[float, list[tuple[float, float]]], delta: float) -> Figure:
    """Accuracy against the epsilon spent, a line for each noise."""
    picture = Figure(figsize=(6, 3.6), layout="constrained")
    ax = picture.subplots()
    for k, (noise, curve) in enumerate(found.items()):
        epsilons, accuracies = np.array(curve).T
        look = {"color": COLOURS[k % len(COLOURS)], "ms": 3, "lw": 1.4}
        ax.plot(epsilons, 100 * accuracies, "o-", label=f"{noise:g}", **look)
    ax.set(xlabel=f"epsilon, for delta {delta:g}", ylabel="test accuracy, %", xlim=(0, None))
    ax.set_title("What accuracy costs in privacy")
    ax.legend(title="noise, in bounds")
    return picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-norm", type=float, default=0.5, help="bound of each example")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[1.5], help="standard deviations, in bounds"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="expected")
    parser.add_argument("--delta", type=float, default=1e-4, help="below one in the examples")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--print-every", type=int, default=50)
    parser.add_argument("--plot", type=Path, help="also draw accuracy against epsilon here (PNG)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
