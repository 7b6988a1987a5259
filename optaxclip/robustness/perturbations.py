"""Changes of an input, example by example: their lengths and directions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip._leaves import Tree
from optaxclip._numerics import accumulator


def flat(x: jax.Array) -> jax.Array:
    """[B, size], in float32 at least."""
    return x.reshape(len(x), -1).astype(accumulator(x.dtype))


def lengths(rows: jax.Array, norm: float) -> jax.Array:
    """The norm of each row, [B]; neither overflows nor loses a NaN."""
    peak = jnp.max(jnp.abs(rows), axis=1)
    # XLA's maximum on CPU loses NaN in large arrays.
    peak = jnp.where(jnp.any(jnp.isnan(rows), axis=1), jnp.nan, peak)
    if norm != 2:
        return peak
    scale = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(rows / scale[:, None]), axis=1))


def larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger, or NaN where either is."""
    return jnp.where((y <= x) | jnp.isnan(x), x, y)


def steepest(slope: jax.Array, norm: float, otherwise: jax.Array) -> jax.Array:
    """The unit direction of steepest ascent; where there is no slope, `otherwise`."""
    rows, there = flat(slope), flat(otherwise)
    if norm == 2:
        length = lengths(rows, norm)[:, None]
        slopes = (length > 0) & (length < jnp.inf)
        found = jnp.where(slopes, rows / jnp.where(slopes, length, 1), there)
    else:
        found = jnp.where(jnp.isfinite(rows) & (rows != 0), jnp.sign(rows), there)
    return found.reshape(slope.shape).astype(slope.dtype)


def normal(keys: jax.Array, number: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal, shaped `like`; each example from its own key."""

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), like.shape[1:], like.dtype)

    return jax.vmap(draw)(keys)


def directions(keys: jax.Array, number: jax.Array, like: jax.Array, norm: float) -> jax.Array:
    """Of length 1: uniform on the sphere, or among the corners of the cube."""
    return steepest(normal(keys, number, like), norm, jnp.ones_like(like))


def in_ball(keys: jax.Array, number: jax.Array, like: jax.Array, norm: float) -> jax.Array:
    """Uniform in the unit ball."""

    def draw(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, number), 1)
        shape = () if norm == 2 else like.shape[1:]
        return jax.random.uniform(key, shape, like.dtype, minval=0.0 if norm == 2 else -1.0)

    uniform = jax.vmap(draw)(keys)
    if norm != 2:
        return uniform
    radii = uniform ** (1 / max(1, math.prod(like.shape[1:])))
    return directions(keys, number, like, norm) * radii.reshape(-1, *[1] * (like.ndim - 1))


def is_right(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Whether each answer is the label's and finite, [B]."""
    return (jnp.argmax(logits, axis=1) == y) & jnp.all(jnp.isfinite(logits), axis=1)


def in_batches(fun: Callable[..., Tree], batch_size: int | None, *arrays: jax.Array) -> Tree:
    """`fun` of arrays [B, ...], some examples at a time; a last batch is filled up and cut."""
    size = len(arrays[0])
    if batch_size is None or batch_size >= size:
        return fun(*arrays)
    rounds = -(-size // batch_size)
    order = jnp.arange(rounds * batch_size).reshape(rounds, batch_size) % size
    found = jax.lax.map(lambda index: fun(*(x[index] for x in arrays)), order)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], found)
