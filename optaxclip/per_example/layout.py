"""Which axes of a parameter the factors of its gradient stand for.

A factored gradient is an array `[K, I, O]`: `K` batches of an outer product `I x O`. A
`Layout` says which axes of the parameter make up each of the three, so that a transpose or a
reshape of the parameter moves labels and no data.

>>> layout = Layout((2, 3, 4), "float32", ((), (0,), (1, 2)))
>>> print(layout.sizes, layout.reshaped((2, 12)).roles)
(1, 2, 12) ((), (0,), (1,))
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]
Roles = tuple[Axes, Axes, Axes]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parameter's shape and dtype; its axes by role, in the order they are flattened in."""

    shape: tuple[int, ...]
    dtype: Any
    roles: Roles
    split: tuple[int, ...] | None = None
    """The shape whose axes `roles` names, where an axis of the parameter has two roles."""

    @property
    def named(self) -> tuple[int, ...]:
        """The shape whose axes `roles` names."""
        return self.shape if self.split is None else self.split

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(K, I, O)`."""
        k, i, o = (math.prod(self.named[a] for a in axes) for axes in self.roles)
        return k, i, o

    def to_parameter(self, blocks: jax.Array) -> jax.Array:
        """`[..., K, I, O]` -> `[..., *shape]`, in the parameter's dtype."""
        lead = blocks.shape[:-3]
        order = sum(self.roles, ())
        split = blocks.reshape(*lead, *(self.named[a] for a in order))
        back = [len(lead) + order.index(a) for a in range(len(order))]
        parameter = split.transpose(*range(len(lead)), *back).astype(self.dtype)
        return parameter.reshape(*lead, *self.shape)

    def from_parameter(self, stacked: jax.Array) -> jax.Array:
        """`[..., *shape]` -> `[..., K, I, O]`."""
        lead = stacked.shape[: stacked.ndim - len(self.shape)]
        order = [len(lead) + a for a in sum(self.roles, ())]
        split = stacked.reshape(*lead, *self.named)
        return split.transpose(*range(len(lead)), *order).reshape(*lead, *self.sizes)

    def swapped(self) -> "Layout":
        """With rows and columns exchanged."""
        k, i, o = self.roles
        return dataclasses.replace(self, roles=(k, o, i))

    def cast(self, dtype: Any) -> "Layout":
        """Of a parameter that was cast to this one's dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transposed(self, permutation: Axes, shape: tuple[int, ...]) -> "Layout | None":
        """Of `x`, given that of `transpose(x, permutation)`; None if an axis has two roles."""
        if self.split is not None:
            return None
        k, i, o = (tuple(permutation[a] for a in axes) for axes in self.roles)
        return Layout(shape, self.dtype, (k, i, o))

    def reshaped(self, shape: tuple[int, ...]) -> "Layout":
        """Of `x` with `shape`, given that of `reshape(x)`."""
        roles = self._roles_in(shape)
        if roles is None:
            return dataclasses.replace(self, shape=shape, split=self.named)
        return Layout(shape, self.dtype, roles)

    def _roles_in(self, shape: tuple[int, ...]) -> Roles | None:
        """The roles of the axes of another shape; None if one has two."""
        named = self.named
        if math.prod(shape) == 0:
            return None
        roles = [[a for a in axes if named[a] != 1] for axes in self.roles]
        for theirs, ours in _blocks(named, shape):
            role = next(r for r in roles if theirs[0] in r)
            at = role.index(theirs[0])
            if role[at : at + len(theirs)] == theirs:
                # Negative, out of the way of the numbers still to be replaced.
                role[at : at + len(theirs)] = [-1 - a for a in ours]
            else:
                return None
        k, i, o = (tuple(-1 - a for a in axes) for axes in roles)
        ones = tuple(a for a, d in enumerate(shape) if d == 1)
        return (k + ones, i, o)


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes with equal products, axes of length one left out."""
    ours = [a for a, d in enumerate(old) if d != 1]
    theirs = [a for a, d in enumerate(new) if d != 1]
    blocks = []
    while ours:
        left, right = [ours.pop(0)], [theirs.pop(0)]
        while (a := math.prod(old[x] for x in left)) != (b := math.prod(new[x] for x in right)):
            if a < b:
                left.append(ours.pop(0))
            else:
                right.append(theirs.pop(0))
        blocks.append((left, right))
    return blocks
