"""Clipping with Equinox: a plain `eqx.filter_jit` loop around `optax.chain`.

    python examples/equinox_loop.py

An MLP learns scikit-learn's handwritten digits. `eqx.filter` leaves None where the model
holds something that is no array (here the activation function); clippers pass None
through, so the optimizer needs no mask. Takes a few seconds.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optaxclip

STEPS, BATCH_SIZE, PRINT_EVERY = 300, 64, 50

# An Equinox weight is [out, in]: one unit's weights lie along the last axis.
tx = optax.chain(optaxclip.clip_by_unit_norm(0.3, unit_axes=-1), optax.adam(3e-3))


def loss_fn(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@eqx.filter_jit
def train_step(model: eqx.nn.MLP, opt_state: optax.OptState, x: jax.Array, y: jax.Array):
    """One step: gradient, clip, Adam."""
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


def main() -> None:
    """Trains, and prints how it goes."""
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.data / 16).astype(np.float32), data.target, random_state=0
    )
    model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        batch = rng.choice(len(x), BATCH_SIZE, replace=False)
        model, opt_state, loss = train_step(model, opt_state, x[batch], y[batch])
        if step % PRINT_EVERY == 0:
            stats = optaxclip.clip_stats(opt_state)["clip_by_unit_norm"]
            print(
                f"step {step}: loss {loss:.3f}, largest unit norm {stats.pre_clip_norm:.3f},"
                f" {int(stats.clipped_count)} of {int(stats.count)} steps clipped"
            )

    predictions = jax.vmap(model)(jnp.asarray(x_test)).argmax(axis=-1)
    print(f"test accuracy {np.mean(predictions == y_test):.1%}")


if __name__ == "__main__":
    main()
