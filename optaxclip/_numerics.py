"""Numbers: in which dtype they are added, products that keep a dtype, maxima that keep NaN."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

UNKNOWN = float(np.finfo(np.float32).max)
"""Stands in states for a norm or a bound that is not known: an infinity would stop a program under
`jax_debug_infs`. 0.1.0 had one there, which counts as unknown too."""


def accumulator(dtype: Any) -> Any:
    """The real dtype in which numbers of `dtype` are added: float32, or float64 for 64 bits."""
    return jnp.dtype(jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32)


def wider(*dtypes: Any) -> Any:
    """The dtype that numbers of all of them are promoted to, under strict promotion too.

    A user who forbids promotion means that of the loss.
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """All in the widest of their dtypes."""
    dtype = wider(*(x.dtype for x in arrays)) if arrays else None
    return [x.astype(dtype) for x in arrays]


def added(arrays: Sequence[jax.Array]) -> jax.Array:
    """Their sum, in the widest of their dtypes."""
    return functools.reduce(jnp.add, alike(arrays))


def as_float32(x: jax.Array) -> jax.Array:
    """What is finite stays finite."""
    if x.dtype == jnp.float32:
        return x
    largest = jnp.asarray(jnp.finfo(jnp.float32).max, x.dtype)
    return jnp.where(jnp.isfinite(x), jnp.minimum(x, largest), x).astype(jnp.float32)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` for a real factor; complex x part by part, without promotion."""
    if jnp.iscomplexobj(x):
        factor = factor.astype(x.real.dtype)
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor.astype(x.dtype)


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor`, rounded once to the dtype of x."""
    wide = x if jnp.iscomplexobj(x) else x.astype(accumulator(x.dtype))
    return rounded(times(wide, factor), x.dtype)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """In another dtype; of 8 bits, where infinity may be NaN, its largest stands for more."""
    if dtype.itemsize == 1:
        largest = jnp.asarray(jnp.finfo(dtype).max, x.dtype)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    return x.astype(dtype)


def root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), x)


def maximum_of(x: jax.Array, axis: Any = None) -> jax.Array:
    """`max x`, of numbers >= 0; NaN where there is one, which `jnp.max` on CPU loses (JAX 0.10)."""
    return from_marked(jnp.max(marked(x), axis=axis))


# A vector of 1000 scalars in one step is one kernel of 1000 formulas: long to compile.
_AT_ONCE = 32


def stacked(scalars: Sequence[jax.Array]) -> jax.Array:
    """The vector of some scalars; of many in steps that XLA keeps apart."""
    if len(scalars) <= _AT_ONCE:
        return jnp.stack(scalars)
    starts = range(0, len(scalars), _AT_ONCE)
    parts = [jnp.stack(scalars[i : i + _AT_ONCE]) for i in starts]
    return jnp.concatenate(lax.optimization_barrier(parts))


def marked(x: jax.Array) -> jax.Array:
    """Numbers >= 0 in an order in which NaN is the largest, and infinity next.

    So a maximum of ordinary numbers does. The largest float stands for infinity, and what is as
    large comes out one unit of rounding smaller.
    """
    largest, below = _largest_two(x.dtype)
    finite = jnp.minimum(x, jnp.where(jnp.isinf(x), largest, below))
    return jnp.where(jnp.isnan(x), jnp.inf, finite)


def from_marked(x: jax.Array) -> jax.Array:
    """The number that `marked` stands for."""
    largest, _ = _largest_two(x.dtype)
    return jnp.where(jnp.isinf(x), jnp.nan, jnp.where(x == largest, jnp.inf, x))


def _largest_two(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    largest = np.asarray(jnp.finfo(dtype).max, dtype)
    return largest, np.nextafter(largest, np.zeros_like(largest))


def once_compiled(fun: Callable) -> Callable:
    """Compiled, for use outside jit: its keyword arguments are static, and hashable or it is not.

    Closures compile anew at each call outside jit, and primitive by primitive a step is slow. A
    traced number among the settings, as `optax.inject_hyperparams` makes them, cannot be hashed:
    such a call runs primitive by primitive.
    """
    compiled: dict[tuple[str, ...], Callable] = {}

    @functools.wraps(fun)
    def call(*args: Any, **settings: Any) -> Any:
        try:
            hash(tuple(settings.values()))
        except TypeError:
            return fun(*args, **settings)
        names = tuple(settings)
        if names not in compiled:
            compiled[names] = jax.jit(fun, static_argnames=names)
        return compiled[names](*args, **settings)

    return call
