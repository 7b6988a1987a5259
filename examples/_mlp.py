"""A plain JAX network of dense layers, for examples that are about something else."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Params = list[tuple[jax.Array, jax.Array]]
"""Weights [in, out] and biases [out], layer by layer."""


def init(key: jax.Array, widths: Sequence[int]) -> Params:
    """Weights with He's variance, biases of zero."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o))
        for k, (i, o) in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def outputs(params: Params, x: jax.Array) -> jax.Array:
    """For one example or for many."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]
