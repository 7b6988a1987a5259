"""Norms of arrays on one device: added in float32, and again, scaled, where that left its range."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Small leaves of one shape under one norm are added before they are reduced, this many at a time:
# a global norm over 1000 x 1024 in front of Adam is then 1.13x Adam, against 1.44x (2 CPU cores).
_SMALL = 16_384
_LEAVES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Terms:
    """A leaf to be reduced over `axes` to `shape`."""

    x: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def wide(self, dtype: Any) -> jax.Array:
        if jnp.iscomplexobj(self.x):
            return self.x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
        return self.x.astype(dtype)


def norms_of(slots: list[list[Terms]], order: Any, count: int, dtype: Any) -> jax.Array:
    """The norms of some slots of one shape, [slots, *shape]; for "rms" a sum over `count`.

    The rare second pass is one branch for all of them: a `cond` a slot would take longer than
    measuring a small leaf, and longer to compile.
    """

    def each(norm: Callable[[list[Terms]], jax.Array]) -> jax.Array:
        return jnp.stack([norm(leaves) for leaves in slots])

    def scaled() -> jax.Array:
        if len(slots) == 1 or jax.device_count() > 1:  # stacking would move leaves of a mesh
            return each(lambda leaves: _scaled(leaves, order, count, dtype))
        stacked = lax.optimization_barrier(jnp.stack([t.wide(dtype) for (t,) in slots]))
        first = slots[0][0]
        kept = (len(slots), *(first.shape or (1,) * first.x.ndim))
        terms = Terms(stacked, tuple(1 + a for a in first.axes), kept)
        return _scaled([terms], order, count, dtype).reshape(len(slots), *first.shape)

    if order == math.inf:
        if any(jnp.iscomplexobj(t.x) for leaves in slots for t in leaves):
            return scaled()
        return each(lambda leaves: _largest(leaves, dtype, jnp.abs))
    term, root = power(order, count)
    if order not in (1, 2, "rms"):
        return scaled()
    total = lax.optimization_barrier(each(lambda leaves: _sum(leaves, term, dtype)))
    # Units are often all zero (rows of an embedding): zeros cost a second pass elsewhere only.
    suspect = vanishing(total) & (total > 0) if total.ndim > 1 else vanishing(total)
    return lax.cond(jnp.any(suspect | jnp.isinf(total)), scaled, lambda: root(total))


def _scaled(leaves: list[Terms], order: Any, count: int, dtype: Any) -> jax.Array:
    """The norm by way of x / max |x|, whose powers neither overflow nor vanish."""
    info = jnp.finfo(dtype)
    largest = lax.stop_gradient(_largest(leaves, dtype, _larger_part))
    unit = jnp.clip(largest, info.tiny, 1 / info.tiny)
    if order == math.inf:
        norm = _largest(leaves, dtype, lambda x: jnp.abs(times(x, 1 / unit)))
    else:
        term, root = power(order, count)
        norm = root(_sum(leaves, term, dtype, 1 / unit))
    return jnp.minimum(norm * unit, jnp.maximum(largest, info.max))


def power(order: Any, count: int) -> tuple[Callable, Callable]:
    """The terms of a norm's sum, and the norm as a function of that sum."""
    if order == 1:
        return jnp.abs, lambda total: total
    if order == 2:
        return _abs_sq, _sqrt
    if order == "rms":
        return _abs_sq, lambda total: _sqrt(total / count)
    p = float(order)

    def root(total: jax.Array) -> jax.Array:
        positive = total > 0
        return jnp.where(positive, jnp.where(positive, total, 1.0) ** (1 / p), total)

    return lambda x: jnp.abs(x) ** p, root


def vanishing(total: jax.Array) -> jax.Array:
    """Whether terms of a sum of squares may have underflowed."""
    return total < (2.0**-420 if total.dtype == jnp.float64 else 2.0**-60)


def _sum(
    leaves: list[Terms], term: Callable, dtype: Any, scale: jax.Array | None = None
) -> jax.Array:
    """`sum term(x * scale)` over the leaves, reduced to their shape."""

    def wide_term(t: Terms) -> jax.Array:
        return term(t.wide(dtype) if scale is None else times(t.wide(dtype), scale))

    return _fold(leaves, wide_term, jnp.add, jnp.sum, dtype)


def _largest(leaves: list[Terms], dtype: Any, size: Callable) -> jax.Array:
    """`max size(x)` over the leaves, reduced to their shape; NaN wins."""
    return _fold(leaves, lambda t: size(t.x), jnp.maximum, jnp.max, dtype)


def _fold(
    leaves: list[Terms], value: Callable, join: Callable, reduce: Callable, dtype: Any
) -> jax.Array:
    """`value` of each leaf, reduced and joined."""
    parts = []
    for together in _joined_first(leaves):
        first = together[0]
        joined = functools.reduce(join, map(value, together))
        part = reduce(joined, axis=first.axes).reshape(first.shape)
        parts.append(part.astype(dtype))
    return parts[0] if len(parts) == 1 else reduce(jnp.stack(parts), axis=0)


def _joined_first(leaves: list[Terms]) -> list[list[Terms]]:
    """Leaves to join elementwise and reduce once: small and of one shape.

    With one device only. On a mesh, leaves of one shape may be sharded in different ways,
    and joining them would move them between devices.
    """
    if jax.device_count() > 1:
        return [[t] for t in leaves]
    alike: dict[Any, list[Terms]] = {}
    for i, t in enumerate(leaves):
        key = (t.x.shape, t.x.dtype) if t.x.size <= _SMALL else i
        alike.setdefault(key, []).append(t)
    return [
        members[k : k + _LEAVES_AT_ONCE]
        for members in alike.values()
        for k in range(0, len(members), _LEAVES_AT_ONCE)
    ]


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` for a real factor; complex x part by part, without promotion."""
    if jnp.iscomplexobj(x):
        factor = factor.astype(x.real.dtype)
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor.astype(x.dtype)


def _larger_part(x: jax.Array) -> jax.Array:
    """`|x|`, or of complex numbers the larger part, which unlike the modulus cannot overflow."""
    return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)


def _abs_sq(x: jax.Array) -> jax.Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _sqrt(x: jax.Array) -> jax.Array:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), x)  # finite slope at 0


def accumulator(dtype: Any) -> Any:
    """The real dtype in which numbers of `dtype` are added: float32, or float64 for 64 bits."""
    return jnp.dtype(jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32)
