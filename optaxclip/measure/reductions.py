"""What devices add up for a norm, each of its own part, and the norm that follows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._numerics import from_marked, marked, root, stacked
from optaxclip.measure.platforms import Axes, largest, modulus, power_sums, scales_of


@dataclasses.dataclass(frozen=True)
class Sums:
    """Norms of order 1, 2 and "rms": from sums at several scales, [scales, *kept]."""

    ord: Any
    collective = staticmethod(lax.psum)
    join = staticmethod(jnp.add)
    reduce = staticmethod(jnp.sum)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return power_sums(tuple(arrays), axes, self._power, jnp.dtype(dtype))

    def whole(self, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The same of whole arrays, [scales, arrays]."""
        return power_sums(tuple(arrays), None, self._power, jnp.dtype(dtype))

    @property
    def _power(self) -> int:
        return 1 if self.ord == 1 else 2

    def norm(self, sums: jax.Array, count: Any) -> jax.Array:
        """From the sum at that scale at which it is in range."""
        scales = scales_of(sums.dtype)
        small = sums[0] < (2.0**-420 if sums.dtype == jnp.float64 else 2.0**-60)
        total = jnp.where(small, sums[2], jnp.where(jnp.isinf(sums[0]), sums[1], sums[0]))
        scale = jnp.where(small, scales[2], jnp.where(jnp.isinf(sums[0]), scales[1], scales[0]))
        if self.ord == "rms":
            total = total / jnp.asarray(count, total.dtype)
        found = root(total) if self._power == 2 else total
        # A norm past the largest float is that float.
        largest = jnp.finfo(sums.dtype).max
        return jnp.where(jnp.isfinite(found), jnp.minimum(found / scale, largest), found)


@dataclasses.dataclass(frozen=True)
class Largest:
    """The norm of order infinity, [1, *kept]: infinity and NaN travel as the largest numbers."""

    nan: bool = True
    """Whether NaN has to be kept."""
    collective = staticmethod(lax.pmax)
    join = staticmethod(jnp.maximum)
    reduce = staticmethod(jnp.max)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return [
            jnp.max(marked(modulus(x, dtype)), axis=a, keepdims=True)[None]
            for x, a in zip(arrays, axes, strict=True)
        ]

    def whole(self, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The same of whole arrays, [1, arrays]."""
        return largest(arrays, dtype, self.nan)[None]

    def norm(self, found: jax.Array, count: Any) -> jax.Array:
        """The largest modulus."""
        del count
        return from_marked(found[0])


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
    reduce = staticmethod(jnp.sum)

    def of(self, arrays: Sequence[jax.Array], axes: Axes, dtype: Any) -> list[jax.Array]:
        """What the norms of these arrays are made of."""
        return [
            jnp.sum((modulus(x, dtype) / unit) ** float(self.ord), axis=a, keepdims=True)[None]
            for x, unit, a in zip(arrays, self.units, axes, strict=True)
        ]

    def whole(self, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The same of whole arrays, [1, arrays]."""
        every = tuple(tuple(range(x.ndim)) for x in arrays)
        return stacked([x.reshape(()) for x in self.of(arrays, every, dtype)])[None]

    def norm(self, total: jax.Array, count: Any) -> jax.Array:
        """In units."""
        del count
        positive = total[0] > 0
        found = jnp.where(positive, total[0], 1.0) ** (1 / float(self.ord))
        return jnp.where(positive, found, total[0])


Kind = Sums | Largest | Powers


def unit_of(largest: jax.Array) -> jax.Array:
    """What to divide by, near the largest element: a number whose inverse is an ordinary number."""
    tiny = jnp.finfo(largest.dtype).tiny
    unit = jnp.where(jnp.isfinite(largest), jnp.clip(largest, tiny, 1 / tiny), 1.0)
    return lax.stop_gradient(unit)
