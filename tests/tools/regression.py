"""A linear regression to choose thresholds for, quick to import: other processes train it too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip

THRESHOLDS = (0.05, 0.5, 50.0)


def clipped_sgd(threshold):
    return optax.chain(optaxclip.clip_by_global_norm(threshold), optax.sgd(0.2))


def per_example_sgd(threshold):
    return optax.chain(optaxclip.clip_per_example(threshold), optax.sgd(0.2))


def zeros(key):
    return jnp.zeros(3)


def error(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def linear_data(number=23):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((number, 3)).astype(np.float32)
    return x, x @ np.array([1.0, -2.0, 3.0], np.float32)


def linear(thresholds=THRESHOLDS, make_optimizer=clipped_sgd, **changes):
    """Its cross-validation."""
    settings = {
        "init_fn": zeros,
        "loss_fn": error,
        "metric_fn": error,
        "data": linear_data(),
        "folds": 4,
        "steps": 12,
        "batch_size": 5,
        "mode": "min",
        "progress": False,
    }
    settings = settings | {"key": jax.random.key(0)} | changes
    return optaxclip.cross_validate(make_optimizer, thresholds, **settings)
