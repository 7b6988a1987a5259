"""Which axes of a parameter the factors of its gradient stand for.

A factored gradient is an array `[K, I, O]`: `K` batches of an outer product `I x O`. A
`Layout` says which axes of the parameter make up each of the three, so that a transpose or a
reshape of the parameter moves labels and no data.
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

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(K, I, O)`."""
        k, i, o = (math.prod(self.shape[a] for a in axes) for axes in self.roles)
        return k, i, o

    def to_parameter(self, blocks: jax.Array) -> jax.Array:
        """`[..., K, I, O]` -> `[..., *shape]`, in the parameter's dtype."""
        lead = blocks.shape[:-3]
        order = sum(self.roles, ())
        split = blocks.reshape(*lead, *(self.shape[a] for a in order))
        back = [len(lead) + order.index(a) for a in range(len(self.shape))]
        return split.transpose(*range(len(lead)), *back).astype(self.dtype)

    def from_parameter(self, stacked: jax.Array) -> jax.Array:
        """`[..., *shape]` -> `[..., K, I, O]`."""
        n = stacked.ndim - len(self.shape)
        order = [n + a for a in sum(self.roles, ())]
        return stacked.transpose(*range(n), *order).reshape(*stacked.shape[:n], *self.sizes)

    def swapped(self) -> "Layout":
        """With rows and columns exchanged."""
        k, i, o = self.roles
        return dataclasses.replace(self, roles=(k, o, i))

    def cast(self, dtype: Any) -> "Layout":
        """Of a parameter that was cast to this one's dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transposed(self, permutation: Axes, shape: tuple[int, ...]) -> "Layout":
        """Of `x`, given that of `transpose(x, permutation)`."""
        k, i, o = (tuple(permutation[a] for a in axes) for axes in self.roles)
        return Layout(shape, self.dtype, (k, i, o))

    def reshaped(self, shape: tuple[int, ...]) -> "Layout | None":
        """Of `x` with `shape`, given that of `reshape(x)`; None if axes of two roles merge."""
        if math.prod(shape) == 0:
            return None
        roles = [[a for a in axes if self.shape[a] != 1] for axes in self.roles]
        for theirs, ours in _blocks(self.shape, shape):
            role = next(r for r in roles if theirs[0] in r)
            at = role.index(theirs[0])
            if role[at : at + len(theirs)] == theirs:
                # Out of the way of the numbers still to be replaced.
                role[at : at + len(theirs)] = [-1 - a for a in ours]
            elif [self.shape[a] for a in theirs] == [shape[a] for a in ours]:
                for old, new in zip(theirs, ours, strict=True):
                    role = next(r for r in roles if old in r)
                    role[role.index(old)] = -1 - new
            else:
                return None
        k, i, o = (tuple(-1 - a for a in axes) for axes in roles)
        ones = tuple(a for a, d in enumerate(shape) if d == 1)
        return Layout(shape, self.dtype, (k + ones, i, o))


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
