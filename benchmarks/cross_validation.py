"""What `cross_validate` costs over a jitted training loop written by hand.

    python benchmarks/cross_validation.py

Both train an MLP on scikit-learn's digits with 16 thresholds on 5 folds, 80 runs. By hand: one
jitted function of threshold and batches, called in two Python loops, with the batches drawn by
NumPy. Times are a run's, interleaved; then the first call of each, which traces and compiles.
"""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import interleaved, machine, ratios
from sklearn.datasets import load_digits

import optaxclip

STEPS, BATCH_SIZE, FOLDS, ROUNDS = 100, 64, 5, 5
THRESHOLDS = np.geomspace(0.01, 10, 16)
WIDTHS = {"MLP 64-32-10": (64, 32, 10), "MLP 64-256-256-10": (64, 256, 256, 10)}


def main() -> None:
    """Prints the table."""
    digits = load_digits()
    data = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    print(machine())
    print(f"{'':20} {'by hand':>9} {'cross_validate':>15} {'ratio':>6}   first call of each")
    for title, widths in WIDTHS.items():
        functions = Functions(widths)
        by_hand = functions.by_hand(data)
        variants = {"hand": by_hand, "ours": lambda f=functions: f.searched(data)}
        first = {name: _seconds(variant) for name, variant in variants.items()}
        times = interleaved(variants, ROUNDS)
        runs = len(THRESHOLDS) * FOLDS
        hand, ours = (1e3 * np.median(times[name]) / runs for name in variants)
        print(
            f"{title:20} {hand:6.1f} ms {ours:12.1f} ms {ratios(times, 'hand')['ours']:5.2f}x"
            f"   {first['hand']:.1f} s, {first['ours']:.1f} s"
        )


class Functions:
    """A model and its training."""

    def __init__(self, widths: tuple[int, ...]):
        self.widths = widths

    def init(self, key: jax.Array) -> Any:
        """He's variance."""
        keys = jax.random.split(key, len(self.widths))
        pairs = zip(keys, itertools.pairwise(self.widths), strict=False)
        return [
            (jax.random.normal(k, pair) * (2 / pair[0]) ** 0.5, jnp.zeros(pair[1]))
            for k, pair in pairs
        ]

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        """Of a batch."""
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = params[-1]
        return x @ w + b

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Cross-entropy."""
        x, y = batch
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(self.logits(params, x), y))

    def accuracy(self, params: Any, batch: Any) -> jax.Array:
        """Share of right answers."""
        return jnp.mean(self.logits(params, batch[0]).argmax(axis=-1) == batch[1])

    def optimizer(self, threshold: jax.Array) -> optax.GradientTransformation:
        """Clipped Adam."""
        return optax.chain(optaxclip.clip_by_global_norm(threshold), optax.adam(1e-3))

    def searched(self, data: Any) -> np.ndarray:
        """All runs by `cross_validate`."""
        return optaxclip.cross_validate(
            self.optimizer,
            THRESHOLDS,
            init_fn=self.init,
            loss_fn=self.loss,
            metric_fn=self.accuracy,
            data=data,
            folds=FOLDS,
            steps=STEPS,
            batch_size=BATCH_SIZE,
            key=jax.random.key(0),
            progress=False,
        ).scores

    def by_hand(self, data: Any) -> Any:
        """All runs in loops."""

        @jax.jit
        def train(threshold, key, x, y, batches, validation):
            optimizer = self.optimizer(threshold)
            params = self.init(key)

            def step(carry, batch):
                params, state = carry
                grads = jax.grad(self.loss)(params, (x[batch], y[batch]))
                updates, state = optimizer.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
            return self.accuracy(params, (x[validation], y[validation]))

        x, y = map(jnp.asarray, data)
        parts = np.array_split(np.random.default_rng(0).permutation(len(x)), FOLDS)

        def all_runs() -> list[float]:
            scores = []
            for threshold, fold in itertools.product(THRESHOLDS, range(FOLDS)):
                rng = np.random.default_rng(fold)
                rows = np.concatenate([p for k, p in enumerate(parts) if k != fold])
                epochs = -(-STEPS // (len(rows) // BATCH_SIZE))
                cut = len(rows) // BATCH_SIZE * BATCH_SIZE
                order = np.concatenate([rng.permutation(rows)[:cut] for _ in range(epochs)])
                batches = order[: STEPS * BATCH_SIZE].reshape(STEPS, BATCH_SIZE)
                key = jax.random.key(fold)
                scores.append(float(train(threshold, key, x, y, batches, parts[fold])))
            return scores

        return all_runs


def _seconds(fun: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fun())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
