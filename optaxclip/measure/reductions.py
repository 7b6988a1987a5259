"""What devices add up for a norm, each of its own part: sums that neither overflow nor vanish.

A sum of squares of float32 is right between 1e-19 and 1e19 alone. A second pass for the rest would
be a branch, and a GPU runs both sides of a small one. So every sum is taken such that nothing can
go wrong, in one read of the leaf (compilers' figures, 25 leaves of 1024x1024 in front of Adam):

* TPU: three sums at three scales, of which one is in range. Cycles 1.33x Adam, for 1.29x with one.
* CPU and GPU: one sum in float64, whose range holds the squares of all float32. On an H100 no
  kernel and no byte more than one sum of float32; three sums would be 129 kernels instead of 78.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._numerics import from_marked, marked, root

Axes = tuple[tuple[int, ...], ...]
"""For each leaf the axes to reduce, which stay with length one."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """Norms of order 1, 2 and "rms": from sums at several scales, [scales, *kept]."""

    ord: Any
    collective = staticmethod(lax.psum)
    join = staticmethod(jnp.add)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return _sums(tuple(arrays), axes, 1 if self.ord == 1 else 2, jnp.dtype(dtype))

    def norm(self, sums: jax.Array, count: int) -> jax.Array:
        """From the sum at that scale at which it is in range."""
        scales = _scales(sums.dtype)
        power = 1 if self.ord == 1 else 2
        small = sums[0] < (2.0**-420 if sums.dtype == jnp.float64 else 2.0**-60)
        total = jnp.where(small, sums[2], jnp.where(jnp.isinf(sums[0]), sums[1], sums[0]))
        scale = jnp.where(small, scales[2], jnp.where(jnp.isinf(sums[0]), scales[1], scales[0]))
        if self.ord == "rms":
            total = total / count
        found = root(total) if power == 2 else total
        # A norm past the largest float is that float.
        largest = jnp.finfo(sums.dtype).max
        return jnp.where(jnp.isfinite(found), jnp.minimum(found / scale, largest), found)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The norm of order infinity, [1, *kept]: infinity and NaN travel as the largest numbers."""

    collective = staticmethod(lax.pmax)
    join = staticmethod(jnp.maximum)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return [
            jnp.max(marked(_modulus(x, dtype)), axis=a, keepdims=True)[None]
            for x, a in zip(arrays, axes, strict=True)
        ]

    def norm(self, largest: jax.Array, count: int) -> jax.Array:
        """The largest modulus."""
        del count
        return from_marked(largest[0])


@dataclasses.dataclass(frozen=True)
class Powers:
    """Norms of other orders: `unit (sum |x / unit|^p)^(1/p)`, [1, *kept], in a unit near `max |x|`.

    The unit is found first, so that leaves are read twice.
    """

    ord: Any
    units: tuple[jax.Array, ...]
    """For each array, what broadcasts to it."""
    collective = staticmethod(lax.psum)
    join = staticmethod(jnp.add)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return [
            jnp.sum((_modulus(x, dtype) / unit) ** float(self.ord), axis=a, keepdims=True)[None]
            for x, unit, a in zip(arrays, self.units, axes, strict=True)
        ]

    def norm(self, total: jax.Array, count: int) -> jax.Array:
        """In units."""
        del count
        positive = total[0] > 0
        found = jnp.where(positive, total[0], 1.0) ** (1 / float(self.ord))
        return jnp.where(positive, found, total[0])


Kind = Sums | Largest | Powers


def unit_of(largest: jax.Array) -> jax.Array:
    """What to divide by, near the largest element: a number that is neither 0 nor infinite."""
    info = jnp.finfo(largest.dtype)
    return lax.stop_gradient(
        jnp.where(jnp.isfinite(largest), jnp.clip(largest, info.tiny, info.max), 1.0)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _sums(arrays: tuple[jax.Array, ...], axes: Axes, power: int, dtype: Any) -> list[jax.Array]:
    if dtype == jnp.float64 or not arrays:
        return _at_three_scales(arrays, axes, power, dtype)
    in_float64 = functools.partial(_in_float64, axes=axes, power=power)
    at_scales = functools.partial(_at_three_scales, axes=axes, power=power, dtype=dtype)
    return lax.platform_dependent(
        arrays, cpu=in_float64, cuda=in_float64, rocm=in_float64, default=at_scales
    )


@_sums.defjvp
def _sums_jvp(axes: Axes, power: int, dtype: Any, primals: Any, tangents: Any) -> Any:
    # The same sums, but without float64, which JAX does not transpose where it is not enabled.
    plain = functools.partial(_at_three_scales, axes=axes, power=power, dtype=dtype)
    return _sums(*primals, axes, power, dtype), jax.jvp(plain, primals, tangents)[1]


def _at_three_scales(
    arrays: Sequence[jax.Array], axes: Axes, power: int, dtype: Any
) -> list[jax.Array]:
    scales = _scales(dtype)
    found = []
    for x, a in zip(arrays, axes, strict=True):
        terms = (_terms(x, power, dtype, scale) for scale in scales)
        found.append(jnp.stack([jnp.sum(t, axis=a, keepdims=True) for t in terms]))
    return found


def _in_float64(arrays: Sequence[jax.Array], axes: Axes, power: int) -> list[jax.Array]:
    scales = _scales(jnp.float32).astype(np.float64) ** power
    found = []
    with jax.enable_x64(True):
        for x, a in zip(arrays, axes, strict=True):
            total = jnp.sum(_terms(x, power, jnp.float64, None), axis=a, keepdims=True)
            found.append(jnp.stack([(total * scale).astype(jnp.float32) for scale in scales]))
    return found


def _terms(x: jax.Array, power: int, dtype: Any, scale: Any) -> jax.Array:
    """`|x scale|^power`."""
    if power == 1:
        size = _modulus(x, dtype)
        return size if scale is None else size * jnp.asarray(scale, dtype)
    if jnp.iscomplexobj(x):
        return _terms(x.real, power, dtype, scale) + _terms(x.imag, power, dtype, scale)
    wide = x.astype(dtype)
    if scale is not None and scale != 1:
        # Without the minimum XLA makes x^2 scale^2 of it, and scale^2 is infinite.
        size = jnp.abs(wide) * jnp.asarray(scale, dtype)
        wide = jnp.minimum(size, jnp.finfo(dtype).max)
    return jnp.square(wide)


def _modulus(x: jax.Array, dtype: Any) -> jax.Array:
    """`|x|`; of a complex number whose parts are finite it is finite."""
    if not jnp.iscomplexobj(x):
        return jnp.abs(x.astype(dtype))
    size = jnp.abs(x).astype(dtype)
    finite = jnp.isfinite(x.real) & jnp.isfinite(x.imag)
    largest = jnp.asarray(jnp.finfo(x.real.dtype).max, dtype)
    return jnp.where(finite, jnp.minimum(size, largest), size)


def _scales(dtype: Any) -> np.ndarray:
    """1, and two powers of two that bring the square of any finite number into range."""
    low, high = (-560, 540) if dtype == jnp.float64 else (-80, 64)
    return np.asarray([1.0, 2.0**low, 2.0**high], dtype)
