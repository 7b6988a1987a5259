"""Which leaf belongs to which norm."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._numerics import stacked
from optaxclip.measure.platforms import cut

# The longest vector that `_apart` copies.
_FEW = 256

Blocks = list[jax.Array]
"""Numbers, one a norm: one vector [groups], or by unit one array a leaf, of its unit shape.

A vector of the units of all leaves would have to be gathered on a mesh: for `agc` of 10 leaves the
TPU compiler made 21 gathers and 29 permutes. So units stay split as their leaf is.
"""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which leaf belongs to which norm; made from shapes alone, so it is static under jit."""

    paths: tuple[str, ...]
    of_leaf: tuple[int, ...]
    """The group of each leaf."""
    unit_axes: tuple[tuple[int, ...], ...]
    """The axes to reduce, of each leaf."""
    unit_shapes: tuple[tuple[int, ...], ...]
    """The shape of each group's norms: `()`, or for units what broadcasts to the leaf."""
    labels: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """How many norms there are: groups, or units."""
        return sum(map(math.prod, self.unit_shapes))

    @property
    def names(self) -> tuple[str, ...]:
        """One name a norm: the label, the leaf's path, or `path[index of the unit]`."""
        if self.labels is not None:
            return self.labels
        return tuple(
            f"{path}[{','.join(map(str, index))}]" if shape else path
            for path, shape in zip(self.paths, self.unit_shapes, strict=True)
            for index in np.ndindex(*shape)
        )

    @property
    def members(self) -> list[list[int]]:
        """The leaves of each group."""
        members: list[list[int]] = [[] for _ in self.unit_shapes]
        for leaf, group in enumerate(self.of_leaf):
            members[group].append(leaf)
        return members

    @property
    def has_units(self) -> bool:
        """Whether some leaf has several norms."""
        return any(self.unit_shapes)

    def blocks(self, by_group: Sequence[jax.Array]) -> Blocks:
        """Of arrays group by group."""
        if self.has_units:
            return list(by_group)
        return [stacked(by_group)] if by_group else [jnp.zeros(0, jnp.float32)]

    def blocks_of(self, numbers: jax.Array | Sequence[jax.Array]) -> Blocks:
        """Of a vector in the order of `names`, of one number for all, or of what are blocks."""
        if isinstance(numbers, list | tuple):
            return list(numbers)
        numbers = jnp.asarray(numbers)
        if numbers.shape not in ((), (self.size,)):
            raise ValueError(
                f"bounds must be a scalar or of shape {(self.size,)}, got {numbers.shape}. Return"
                " one for each of the norms, in their order."
            )
        if not self.has_units:
            return [numbers]
        if numbers.ndim == 0:
            return [numbers] * len(self.unit_shapes)
        ends = np.cumsum([0, *map(math.prod, self.unit_shapes)])
        return [
            _apart(lax.slice_in_dim(numbers, first, last)).reshape(shape)
            for first, last, shape in zip(ends, ends[1:], self.unit_shapes, strict=False)
        ]

    def vector(self, blocks: Blocks) -> jax.Array:
        """One vector [size], in the order of `names`; [size, examples] with examples."""
        if not self.has_units:
            return jnp.broadcast_to(blocks[0], (self.size, *blocks[0].shape[1:]))
        whole = map(jnp.broadcast_to, blocks, self.unit_shapes)
        return jnp.concatenate([_apart(x.reshape(-1)) for x in whole])

    def by_leaf(self, blocks: Blocks) -> list[jax.Array]:
        """The numbers of each leaf: a scalar, or what broadcasts to it."""
        if self.has_units:
            each = blocks
        else:
            (vector,) = blocks
            each = cut(vector) if vector.ndim == 1 else [vector] * len(self.unit_shapes)
            if vector.ndim == 2:  # with examples
                each = list(vector)
        return [each[group] for group in self.of_leaf]


def _apart(x: jax.Array) -> jax.Array:
    """A copy, so that XLA may split the numbers over a mesh before it and have them whole after it.

    Without it XLA gathers or permutes them leaf by leaf; with it the exchange goes into the
    all-reduce that norms take anyway. It takes n^2 operations: longer vectors are left as they are.
    """
    if not 1 < x.size <= _FEW:
        return x
    # Two iotas: one alone would be split like x, and gathered.
    here, there = (lax.broadcasted_iota(jnp.int32, (x.size, x.size), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(here == there, x[None], 0.0), axis=1)
