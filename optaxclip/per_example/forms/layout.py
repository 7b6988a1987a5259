"""Which axes of a parameter the factors of its gradient stand for.

A factored gradient is an array `[K, I, O]`: `K` batches of an outer product `I x O`. A
`Layout` says which axes of the parameter make up each of the three, so that a transpose, a
reshape or a slice of the parameter moves labels and no data.

>>> layout = Layout((2, 3, 4), "float32", ((), (0,), (1, 2)))
>>> print(layout.sizes, layout.reshaped((2, 12)).roles)
(1, 2, 12) ((), (0,), (1,))
>>> print(layout.placed((5, 3, 4), (range(3, 5), range(3), range(4))).part)
(range(3, 5), range(0, 3), range(0, 4))
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[int, ...]
Ranges = tuple[range, ...]
Roles = tuple[Axes, Axes, Axes]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parameter's shape and dtype; its axes by role, in the order they are flattened in."""

    shape: tuple[int, ...]
    dtype: Any
    roles: Roles
    split: tuple[int, ...] | None = None
    """The shape whose axes `roles` names, where an axis of the parameter has two roles."""
    part: Ranges | None = None
    """Along each axis, where the gradient may differ from zero; None: everywhere."""

    @property
    def named(self) -> tuple[int, ...]:
        """The shape whose axes `roles` names."""
        return self.part_shape if self.split is None else self.split

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the part that the factors stand for."""
        return self.shape if self.part is None else tuple(map(len, self.part))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(K, I, O)`."""
        k, i, o = (math.prod(self.named[a] for a in axes) for axes in self.roles)
        return k, i, o

    def to_parameter(self, blocks: jax.Array) -> jax.Array:
        """`[..., K, I, O]` -> `[..., *shape]`, in the parameter's dtype."""
        part = self.to_part(blocks)
        if self.part is None:
            return part
        lead = part.ndim - len(self.shape)
        zero = jnp.zeros((), part.dtype)
        padding = [
            (first(r), d - 1 - last(r), abs(r.step) - 1)
            for r, d in zip(self.part, self.shape, strict=True)
        ]
        return lax.pad(self._reversed(part), zero, [(0, 0, 0)] * lead + padding)

    def to_part(self, blocks: jax.Array) -> jax.Array:
        """`[..., K, I, O]` -> `[..., *part_shape]`, in the parameter's dtype."""
        lead = blocks.shape[:-3]
        order = sum(self.roles, ())
        split = blocks.reshape(*lead, *(self.named[a] for a in order))
        back = [len(lead) + order.index(a) for a in range(len(order))]
        part = split.transpose(*range(len(lead)), *back).astype(self.dtype)
        return part.reshape((*lead, *self.part_shape))  # of float0 NumPy, which wants a tuple

    def from_parameter(self, stacked: jax.Array) -> jax.Array:
        """`[..., *shape]` -> `[..., K, I, O]`."""
        lead = stacked.shape[: stacked.ndim - len(self.shape)]
        order = [len(lead) + a for a in sum(self.roles, ())]
        split = self._part_of(stacked).reshape(*lead, *self.named)
        return split.transpose(*range(len(lead)), *order).reshape(*lead, *self.sizes)

    def add_part(self, total: jax.Array, blocks: jax.Array) -> jax.Array:
        """`total + to_parameter(blocks)`, touching no more than the part."""
        if self.part is None or any(r.step != 1 for r in self.part):
            return total + self.to_parameter(blocks)
        starts = [r.start for r in self.part]
        return lax.dynamic_update_slice(total, self._part_of(total) + self.to_part(blocks), starts)

    def apart(self, other: "Layout") -> bool:
        """Whether the parts of the parameter that two layouts stand for are disjoint."""
        if self.part is None or other.part is None:
            return False
        pairs = zip(self.part, other.part, strict=True)
        return any(_disjoint(x, y) for x, y in pairs if x != y)

    def _part_of(self, whole: jax.Array) -> jax.Array:
        if self.part is None:
            return whole
        lead = whole.shape[: whole.ndim - len(self.shape)]
        ones = (1,) * len(lead)
        part = lax.slice(
            whole,
            (*(0 for _ in lead), *map(first, self.part)),
            (*lead, *(last(r) + 1 for r in self.part)),
            (*ones, *(abs(r.step) for r in self.part)),
        )
        return self._reversed(part)

    def _reversed(self, part: jax.Array) -> jax.Array:
        lead = part.ndim - len(self.shape)
        return lax.rev(part, [lead + a for a, r in enumerate(self.part or ()) if r.step < 0])

    def swapped(self) -> "Layout":
        """With rows and columns exchanged."""
        k, i, o = self.roles
        return dataclasses.replace(self, roles=(k, o, i))

    def cast(self, dtype: Any) -> "Layout":
        """The layout of a parameter of `dtype` that was cast to this one's."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def placed(self, shape: tuple[int, ...], ranges: Ranges) -> "Layout":
        """The layout of an array of `shape`, from that of its part at `ranges`."""
        inside = map(range, self.shape) if self.part is None else self.part
        part = tuple(map(_compose, ranges, inside))
        split = None if self.named == tuple(map(len, part)) else self.named
        if part == tuple(map(range, shape)):
            return dataclasses.replace(self, shape=shape, split=split, part=None)
        return dataclasses.replace(self, shape=shape, split=split, part=part)

    def transposed(self, permutation: Axes, shape: tuple[int, ...]) -> "Layout | None":
        """The layout of x, from that of its transpose; None if no axis stays whole."""
        runs = {a: [a] for a in range(len(shape))}
        if self.split is not None:
            blocks = [] if 0 in shape else _blocks(self.part_shape, self.split)
            if not blocks or any(len(ours) > 1 for ours, _ in blocks):
                return None
            runs = {ours[0]: theirs for ours, theirs in blocks}
        order = [a for place in range(len(shape)) for a in runs.get(permutation.index(place), ())]
        at = {a: place for place, a in enumerate(order)}
        k, i, o = (tuple(at[a] for a in axes if a in at) for axes in self.roles)
        split = self.split and tuple(self.split[a] for a in order)
        part = self.part and tuple(self.part[permutation.index(a)] for a in range(len(shape)))
        return Layout(shape, self.dtype, (k, i, o), split, part)

    def reshaped(self, shape: tuple[int, ...]) -> "Layout | None":
        """The layout of x, from that of its reshape; None if its part is no box there."""
        part = self.part and _ranges_in(shape, self.shape, self.part)
        if part is None and self.part is not None:
            return None
        part_shape = shape if part is None else tuple(map(len, part))
        roles = self._roles_in(part_shape)
        if roles is None:
            return dataclasses.replace(self, shape=shape, split=self.named, part=part)
        return Layout(shape, self.dtype, roles, part=part)

    def _roles_in(self, shape: tuple[int, ...]) -> Roles | None:
        """The roles of the axes of another shape; None if one has two."""
        named = self.named
        if 0 in shape:
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


def first(numbers: range) -> int:
    """The least of them. `min` walks through them all: seconds for a long axis cut into parts."""
    return min(numbers[0], numbers[-1])


def last(numbers: range) -> int:
    """The largest of them."""
    return max(numbers[0], numbers[-1])


def _disjoint(x: range, y: range) -> bool:
    """Whether two ranges have no number in common, where that is quick to see."""
    if not x or not y:
        return True
    if max(first(x), first(y)) > min(last(x), last(y)):
        return True
    return (x.start - y.start) % math.gcd(x.step, y.step) != 0


def _compose(outer: range, inner: range) -> range:
    """The numbers `outer[k]` for k in `inner`."""
    start, step = outer.start, outer.step
    return range(start + step * inner.start, start + step * inner.stop, step * inner.step)


def _ranges_in(shape: tuple[int, ...], old: tuple[int, ...], part: Ranges) -> Ranges | None:
    """The ranges of a part in another shape, where it is a box in axes that both have."""
    if 0 in shape:
        return None
    ranges = list(map(range, shape))
    for ours, theirs in _blocks(old, shape):
        if len(ours) == len(theirs) == 1:
            ranges[theirs[0]] = part[ours[0]]
        elif any(part[a] != range(old[a]) for a in ours):
            return None
    return tuple(ranges)


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
