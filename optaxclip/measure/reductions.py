"""Norms of arrays on one device: added in float32, and again, scaled, where that left its range."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import is_partitioned

# Leaves of one shape under one norm share a kernel. Measured in front of Adam, as multiples of Adam
# on 2 CPU cores, for a global norm (and for the largest element):
# - 1000 x 1024: added before they are reduced 1.03, several to a reduction 1.07, one by one 1.44.
# - 300 x 256x256: several to a reduction 1.14 (1.17), one by one 1.25 (1.30).
# - 25 x 1024x1024: one by one 1.18 (1.26), several to a reduction, which keeps a core waiting at
#   the end, 1.26, parts of one leaf to a reduction 1.17 (1.16); that compiles more slowly.
# - 7 x 2048x2048: one by one 1.10 (1.19), parts of one leaf to a reduction 1.24 (1.26).
_SMALL = 2**12
_SMALL_AT_ONCE = 16
_MEDIUM = 2**19
_LARGE = 2**20
_AT_ONCE = 8
# A reduction of several operands adds one number after the other, so it takes them in short rows.
_LONGEST_ROW = 512
_SHORTEST_ROW = 32


@dataclasses.dataclass(frozen=True)
class Terms:
    """A leaf to be reduced over `axes` to `shape`, times a scale that broadcasts to it."""

    x: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    scale: jax.Array | None = None

    def wide(self, dtype: Any) -> jax.Array:
        if jnp.iscomplexobj(self.x):
            dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
        x = self.x.astype(dtype)
        if self.scale is None:
            return x
        return _exactly(times(x, self.scale))


def norms_of(
    slots: list[list[Terms]], order: Any, count: int, dtype: Any, nan: bool = True
) -> jax.Array:
    """The norms of some slots of one shape, [slots, *shape]; for "rms" a sum over `count`.

    With `nan` False a largest element may be infinite where it is NaN, which spares storing leaves
    for the pass that tells. The rare second pass is one branch for all of them: a `cond` a slot
    would take longer than measuring a small leaf, and longer to compile.
    """
    if order == math.inf and not any(jnp.iscomplexobj(t.x) for leaves in slots for t in leaves):
        # In bf16 XLA would round each maximum: clip_by_value in front of Adam took 1.9 times Adam.
        return _largest(slots, lambda t: jnp.abs(t.wide(dtype)), dtype, nan)

    def scaled() -> jax.Array:
        return _scaled(slots, order, count, dtype)

    if order not in (1, 2, "rms"):
        return scaled()
    term, root = power(order, count)
    total = lax.optimization_barrier(_TOTAL.each(slots, lambda t: term(t.wide(dtype)), dtype))
    # Units are often all zero (rows of an embedding): zeros cost a second pass elsewhere only.
    suspect = vanishing(total) & (total > 0) if total.ndim > 1 else vanishing(total)
    return lax.cond(jnp.any(suspect | jnp.isinf(total)), scaled, lambda: root(total))


def _scaled(slots: list[list[Terms]], order: Any, count: int, dtype: Any) -> jax.Array:
    """The norms by way of x / max |x|, whose powers neither overflow nor vanish."""
    shape = (len(slots), *slots[0][0].shape)
    slots = _stacked(slots, dtype)
    info = jnp.finfo(dtype)
    largest = lax.stop_gradient(_LARGEST.each(slots, lambda t: _no_nan(_larger_part(t.x)), dtype))
    unit = jnp.clip(largest, info.tiny, 1 / info.tiny)
    slots = [
        [dataclasses.replace(t, scale=for_leaf(1 / unit[k])) for t in leaves]
        for k, leaves in enumerate(slots)
    ]
    if order == math.inf:
        norms = _largest(slots, lambda t: jnp.abs(t.wide(dtype)), dtype)
    else:
        term, root = power(order, count)
        norms = root(_TOTAL.each(slots, lambda t: term(t.wide(dtype)), dtype))
    return jnp.minimum(norms * unit, jnp.maximum(largest, info.max)).reshape(shape)


def _stacked(slots: list[list[Terms]], dtype: Any) -> list[list[Terms]]:
    """Small leaves as one, for passes that are rare: that compiles faster."""
    first = slots[0][0]
    if first.x.size > _SMALL or len(slots) == 1 or not _joinable(slots):
        return slots
    stacked = lax.optimization_barrier(jnp.stack([t.wide(dtype) for (t,) in slots]))
    kept = (len(slots), *(first.shape or (1,) * first.x.ndim))
    return [[Terms(stacked, tuple(1 + a for a in first.axes), kept)]]


def _largest(slots: list[list[Terms]], size: Callable, dtype: Any, nan: bool = True) -> jax.Array:
    """`max size(x)` slot by slot, NaN where there is one: XLA's maximum on CPU loses it."""
    found = _LARGEST.each(slots, lambda t: _no_nan(size(t)), dtype)
    if not nan:
        return found

    def with_nan() -> jax.Array:
        def nan_or_zero(t: Terms) -> jax.Array:
            return jnp.where(jnp.isnan(t.x), jnp.nan, 0.0).astype(dtype)

        return found + _TOTAL.each(_stacked(slots, dtype), nan_or_zero, dtype).reshape(found.shape)

    return lax.cond(jnp.any(jnp.isinf(found)), with_nan, lambda: found)


def largest(x: jax.Array) -> jax.Array:
    """`max x`, NaN where there is one: `jnp.max` loses it in arrays of thousands on CPU."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, jnp.max(_no_nan(x)))


def _no_nan(x: jax.Array) -> jax.Array:
    """With infinity for NaN."""
    return jnp.where(jnp.isnan(x), jnp.inf, x)


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


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """A reduction of leaves to numbers >= 0, several leaves in one kernel where that is faster."""

    join: Callable[[Any, Any], Any]
    reduce: Callable[..., jax.Array]
    in_parts: bool
    """Whether parts of one large leaf share a kernel."""

    def each(self, slots: list[list[Terms]], value: Callable, dtype: Any) -> jax.Array:
        """`value` of the leaves, reduced slot by slot: [slots, *shape]."""
        if _joinable(slots):
            parts = [_parts(t) if self.in_parts else [t] for (t,) in slots]
            found: dict[int, jax.Array] = {}
            for together in _alike([part for some in parts for part in some]):
                found.update(zip(map(id, together), self._together(together, value), strict=True))
            reduced = [functools.reduce(self.join, (found[id(t)] for t in some)) for some in parts]
        else:
            reduced = [self._over(leaves, value, dtype) for leaves in slots]
        return jnp.stack([x.astype(dtype) for x in reduced])

    def _over(self, leaves: list[Terms], value: Callable, dtype: Any) -> jax.Array:
        parts = []
        for together in _alike(leaves):
            if together[0].x.size <= _SMALL:
                joined = functools.reduce(self.join, map(value, together))
                parts.append(self._alone(joined, together[0]))
            else:
                parts += self._together(together, value)
        parts = [part.astype(dtype) for part in parts]
        return parts[0] if len(parts) == 1 else self.reduce(jnp.stack(parts), axis=0)

    def _alone(self, x: jax.Array, t: Terms) -> jax.Array:
        return _on_every_device(self.reduce(x, axis=t.axes).reshape(t.shape))

    def _together(self, leaves: list[Terms], value: Callable) -> list[jax.Array]:
        row = _row(leaves[0].x.size)
        if len(leaves) == 1 or row < _SHORTEST_ROW:
            return [self._alone(value(t), t) for t in leaves]

        @jax.custom_jvp
        def by_row(*rows: jax.Array) -> tuple[jax.Array, ...]:
            zeros = tuple(jnp.zeros((), x.dtype) for x in rows)
            return tuple(lax.reduce(rows, zeros, lambda a, b: tuple(map(self.join, a, b)), (1,)))

        @by_row.defjvp
        def jvp(rows: Any, tangents: Any) -> Any:
            one = functools.partial(self.reduce, axis=1)
            pairs = [jax.jvp(one, (x,), (t,)) for x, t in zip(rows, tangents, strict=True)]
            return tuple(x for x, _ in pairs), tuple(t for _, t in pairs)

        return [self.reduce(x) for x in by_row(*(value(t).reshape(-1, row) for t in leaves))]


_TOTAL = _Reduction(jnp.add, jnp.sum, in_parts=False)
_LARGEST = _Reduction(jnp.maximum, jnp.max, in_parts=True)


def _joinable(slots: list[list[Terms]]) -> bool:
    """Whether each slot is one leaf, and leaves may be joined."""
    return jax.device_count() == 1 and all(len(leaves) == 1 for leaves in slots)


def _parts(t: Terms) -> list[Terms]:
    """A leaf, cut along its first axis if its parts are reduced faster together."""
    rows = t.x.shape[0] if t.x.ndim else 1
    if t.shape or not _MEDIUM < t.x.size <= _LARGE or rows % _AT_ONCE:
        return [t]
    cuts = range(0, rows + 1, rows // _AT_ONCE)
    return [
        dataclasses.replace(t, x=lax.slice_in_dim(t.x, *ends)) for ends in itertools.pairwise(cuts)
    ]


def _alike(leaves: list[Terms]) -> list[list[Terms]]:
    """Leaves of one shape and dtype that share a kernel.

    With one device only. On a mesh, leaves of one shape may be sharded in different ways,
    and joining them would move them between devices.
    """
    alike: dict[Any, list[Terms]] = {}
    for i, t in enumerate(leaves):
        shared = jax.device_count() == 1 and not t.shape and t.x.size <= _MEDIUM
        alike.setdefault((t.x.shape, t.x.dtype) if shared else i, []).append(t)
    groups = []
    for members in alike.values():
        most = _SMALL_AT_ONCE if members[0].x.size <= _SMALL else _AT_ONCE
        groups += [members[k : k + most] for k in range(0, len(members), most)]
    return groups


def _on_every_device(units: jax.Array) -> jax.Array:
    """Norms of units, which XLA may have split over a mesh, whole on every device.

    What devices scatter is added up in the all-reduce that norms take anyway. Asked for a vector
    of all units, XLA would gather leaf by leaf: `agc` of 100 leaves, split over 8 devices, took
    266 collectives, and takes 1 so.
    """
    if not units.ndim or not is_partitioned():
        return units
    flat = units.reshape(-1)
    whole = jnp.zeros_like(flat).at[jnp.arange(flat.size)].add(flat, mode="promise_in_bounds")
    return whole.reshape(units.shape)


def for_leaf(units: jax.Array) -> jax.Array:
    """The same numbers for use with a leaf: split as it is, where XLA splits it.

    XLA would otherwise carry the leaf's sharding over to whatever the numbers were made of.
    """
    if not units.ndim or not is_partitioned():
        return units
    flat = units.reshape(-1)
    return flat.at[jnp.arange(flat.size)].get(mode="promise_in_bounds").reshape(units.shape)


def _row(size: int) -> int:
    """The longest row, within limits, that leaves of this size can be cut into."""
    return next(d for d in range(min(size, _LONGEST_ROW), 0, -1) if size % d == 0)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` for a real factor; complex x part by part, without promotion."""
    if jnp.iscomplexobj(x):
        factor = factor.astype(x.real.dtype)
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor.astype(x.dtype)


def _exactly(x: jax.Array) -> jax.Array:
    """`x`, rounded to what it is, so that XLA computes it.

    Of one number many times, such as the zeros of a frozen leaf, it otherwise makes `(x s)^2` into
    `x^2 s^2`: zero times infinity.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(_exactly(x.real), _exactly(x.imag))
    return lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, jnp.finfo(x.dtype).nmant)


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
