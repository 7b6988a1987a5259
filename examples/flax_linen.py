"""Clipping with Flax Linen: a `TrainState` whose optimizer clips, and what the clipper did.

    python examples/flax_linen.py

An MLP learns scikit-learn's handwritten digits. Every epoch prints the loss and the share of
steps that were clipped; the end prints the clipper's statistics. Takes a few seconds.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip

EPOCHS, BATCH_SIZE = 5, 64


class MLP(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    """One step; the clipper is part of `state.tx`, so nothing here knows of it."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    """Trains, and prints how it goes."""
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.data / 16).astype(np.float32), data.target, random_state=0
    )
    model = MLP()
    # The guard goes outermost: a NaN gradient then changes neither clipper nor Adam.
    tx = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(3e-3)))
    params = model.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(x))[: len(x) // BATCH_SIZE * BATCH_SIZE]
        losses = []
        for batch in order.reshape(-1, BATCH_SIZE):
            state, loss = train_step(state, x[batch], y[batch])
            losses.append(loss)
        stats = optaxclip.clip_stats(state.opt_state)["clip_by_global_norm"]
        clipped = int(stats.clipped_count) / int(stats.count)
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}, {clipped:.0%} of steps clipped so far")

    predictions = model.apply({"params": state.params}, x_test).argmax(axis=-1)
    print(f"test accuracy {np.mean(predictions == y_test):.1%}")
    print("the clipper's last step and counters:")
    for name, value in stats._asdict().items():
        if name not in ("groups", "examples"):  # these are no scalars
            print(f"  {name:15} {value.item():.4g}")


if __name__ == "__main__":
    main()
