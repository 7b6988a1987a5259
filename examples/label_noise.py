"""Wrong labels: what per-example clipping does that clipping the batch's gradient does not.

An MLP 64-256-256-10 learns scikit-learn's handwritten digits with Adam, while 0, 20, 40 or 60 % of
the training labels are replaced by another class:
  plain        cross-entropy, no clipping,
  global       the batch's gradient clipped to norm 0.1,
  per_example  every example's gradient clipped to norm 0.1,
  trim         the 40 % of examples with the longest gradients left out,
  phuber       no clipping, but the loss `phuber_cross_entropy` with tau 2.

An example that is mislabelled has a long gradient for as long as the model resists it. Clipped
one by one, these weigh no more than the others, and the majority decides; the norm of the batch's
gradient says nothing about any of them. It is no cure: a model that is large enough and is trained
long enough learns the wrong labels in the end, as the curves show, only later. A loss that lets
go of what it cannot fit (PHuber) does better, and so does trimming if you know how much to trim.
How long "long enough" is depends on the settings. With the pixels standardised instead of divided
by 16 (`--pixels standardized`) the same 1500 steps are enough to undo the gain.

    python examples/label_noise.py           # 60 runs, 1.5 minutes on 2 cores
    python examples/label_noise.py --quick   # two noise levels, one seed, 300 steps: 10 seconds
    python examples/label_noise.py --pixels standardized --noises 0.4

A table goes to the terminal; report.html, results.json and label_noise.png to the folder `--out`.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mlp import Params, init, outputs
from _noise_report import Outcome, write_noise_page, write_noise_report
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import optaxclip

BATCH_SIZE, EVAL_EVERY, LEARNING_RATE = 64, 50, 1e-3
NOISES = (0.0, 0.2, 0.4, 0.6)
WIDTHS = (64, 256, 256, 10)
PIXELS = {"scaled": "divided by 16", "standardized": "standardised"}
# What the page has of standardised pixels.
ASIDE, ASIDE_NOISE = ("plain", "global", "per_example"), 0.4
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss, and what happens to its gradients before Adam."""

    title: str
    clipper: Any
    per_example: bool = False
    loss: Callable[..., jax.Array] = cross_entropy


METHODS = {
    "plain": Method("cross-entropy", optax.identity()),
    "global": Method("+ global clip 0.1", optaxclip.clip_by_global_norm(0.1)),
    "per_example": Method("+ per-example clip 0.1", optaxclip.clip_per_example(0.1), True),
    "trim": Method("+ trim the longest 40 %", optaxclip.per_example.trim_by_norm(0.4), True),
    "phuber": Method("PHuber, tau 2", optax.identity(), loss=optaxclip.phuber_cross_entropy),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table and writes the files."""
    options = parse(argv)
    start = time.perf_counter()
    outcomes, aside = [], []
    for method in options.methods:
        program = jax.jit(functools.partial(train, METHODS[method]))
        for noise, seed in itertools.product(options.noises, range(options.seeds)):
            curve = program(*inputs(noise, seed, options.steps, options.pixels))
            outcomes.append(Outcome(method, noise, seed, np.asarray(curve)))
        print(row(method, options.noises, outcomes), flush=True)
        for seed in range(options.seeds if options.markdown and method in ASIDE else 0):
            curve = program(*inputs(ASIDE_NOISE, seed, options.steps, "standardized"))
            aside.append(Outcome(method, ASIDE_NOISE, seed, np.asarray(curve)))
    if {"global", "per_example"} <= set(options.methods):
        gains = [
            mean_accuracy(outcomes, "per_example", noise) - mean_accuracy(outcomes, "global", noise)
            for noise in options.noises
        ]
        listed = ", ".join(f"{g:+.1f}" for g in gains)
        print(f"per-example clip over global clip, points: {listed}")
    titles = {name: METHODS[name].title for name in options.methods}
    how = (
        f"MLP {'-'.join(map(str, WIDTHS))} on scikit-learn's digits, pixels"
        f" {PIXELS[options.pixels]}: Adam {LEARNING_RATE:g}, batches of {BATCH_SIZE},"
        f" {options.steps} steps, {options.seeds} seed{'s' if options.seeds > 1 else ''}. Training"
        " labels are replaced by another class with the probability given; test labels are right."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_noise_report(outcomes, titles, EVAL_EVERY, how, options.out)
    if options.markdown:
        write_noise_page(outcomes, aside, titles, how, options.markdown)
    record = [{**dataclasses.asdict(x), "curve": x.curve.tolist()} for x in outcomes]
    (options.out / "results.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    elapsed = time.perf_counter() - start
    print(f"{len(outcomes)} runs in {elapsed:.0f} s. See {options.out}/report.html")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(METHODS)
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--noises", nargs="+", type=_share, metavar="SHARE")
    parser.add_argument("--pixels", choices=list(PIXELS), default="scaled")
    parser.add_argument("--seeds", type=_positive, help="how many, from 0 on (default 3)")
    parser.add_argument("--steps", type=_positive, help=f"a multiple of {EVAL_EVERY} (1500)")
    parser.add_argument("--out", type=Path, default=Path("out/label_noise"), metavar="FOLDER")
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    parser.add_argument("--quick", action="store_true", help="noise 0 and 0.4, 1 seed, 300 steps")
    options = parser.parse_args(argv)
    options.noises = options.noises or ([0.0, 0.4] if options.quick else list(NOISES))
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.steps = options.steps or (300 if options.quick else 1500)
    if options.steps % EVAL_EVERY:
        parser.error(f"--steps must be a multiple of {EVAL_EVERY}, got {options.steps}")
    return options


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return int(text)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return float(text)


def inputs(noise: float, seed: int, steps: int, pixels: str) -> tuple[Any, ...]:
    """Parameters, data and the batches of a run."""
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.data, digits.target, random_state=seed, stratify=digits.target
    )
    scaler = StandardScaler().fit(x)
    x, x_test = (
        np.float32(z / 16 if pixels == "scaled" else scaler.transform(z)) for z in (x, x_test)
    )
    rng = np.random.default_rng(seed)
    other = (y + rng.integers(1, 10, y.shape)) % 10
    y = np.where(rng.random(y.shape) < noise, other, y)
    passes = -(-steps * BATCH_SIZE // len(x))
    order = np.concatenate([rng.permutation(len(x)) for _ in range(passes)])
    shape = (steps // EVAL_EVERY, EVAL_EVERY, BATCH_SIZE)
    params = init(jax.random.key(seed), WIDTHS)
    return params, x, y, x_test, y_test, order[: steps * BATCH_SIZE].reshape(shape)


def train(
    method: Method, params: Params, x: Any, y: Any, x_test: Any, y_test: Any, batches: Any
) -> jax.Array:
    """Test accuracy every EVAL_EVERY steps."""
    # An aggregator comes first in a chain; the rest of the loop is the same.
    tx = optax.chain(method.clipper, optax.adam(LEARNING_RATE))

    def loss(params: Params, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = example
        return jnp.mean(method.loss(outputs(params, x), y))

    grad = optaxclip.per_example_grad(loss) if method.per_example else jax.grad(loss)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = grad(params, (x[batch], y[batch]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def until_evaluation(carry: Any, batches: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, batches)
        right = outputs(carry[0], x_test).argmax(axis=-1) == y_test
        return carry, jnp.mean(right)

    return jax.lax.scan(until_evaluation, (params, tx.init(params)), batches)[1]


def mean_accuracy(outcomes: list[Outcome], method: str, noise: float) -> float:
    """At the end, over seeds, in percent."""
    found = [x.accuracy for x in outcomes if (x.method, x.noise) == (method, noise)]
    return 100 * float(np.mean(found))


def row(method: str, noises: Sequence[float], outcomes: list[Outcome]) -> str:
    """A line of the table; the first has a head."""
    cells = [f"{mean_accuracy(outcomes, method, noise):8.1f}" for noise in noises]
    line = f"{METHODS[method].title:26}" + "".join(cells)
    if len({x.method for x in outcomes}) > 1:
        return line
    head = f"{'test accuracy, %; noise':26}" + "".join(f"{100 * n:7.0f}%" for n in noises)
    return f"{head}\n{line}"


if __name__ == "__main__":
    raise SystemExit(main())
