"""Losses, parameters and batches that several files of tests share; all in NumPy until traced."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from tools.agreement import normal


def mlp(params, example):
    x, y = example
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return jnp.sum((x @ w + b - y) ** 2)


def mlp_params(*widths):
    layers = enumerate(itertools.pairwise(widths))
    return [(normal(i, m, n), normal(9 + i, n)) for i, (m, n) in layers]


def mlp_batch(size=6):
    return normal(20, size, 5), normal(21, size, 3)


def tied(params, example):
    """A matrix product over time, a bias, a table that is looked up, and tied weights."""
    ids, x = example
    h = jnp.tanh(x @ params["w"] + params["b"]) + params["table"][ids]
    return jnp.sum((h @ params["w"].T) ** 2) * params["scale"]


def aggregate(tx, grads, params=None):
    """The first update of an aggregator."""
    like = jax.tree.map(lambda g: g[0], grads) if params is None else params
    return tx.update(grads, tx.init(like), params)


TIED_SHAPES = {"w": (3, 4), "b": (4,), "table": (6, 4), "scale": ()}
TIED_SIZE = 5


def tied_params():
    return {k: normal(i, *shape) for i, (k, shape) in enumerate(TIED_SHAPES.items())}


def tied_batch(growth=1.0):
    """Inputs of the k-th example grow with `k^growth`."""
    ids = np.random.default_rng(7).integers(0, 6, (TIED_SIZE, 2))
    sizes = np.arange(1, TIED_SIZE + 1)[:, None, None] ** growth
    return ids, normal(8, TIED_SIZE, 2, 3) * sizes
