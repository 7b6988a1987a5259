"""What a guard looks at: norms of the gradient and of the update, and values the caller passes."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import varying_axes
from optaxclip._leaves import Leaves, Tree, named_node
from optaxclip._numerics import UNKNOWN, maximum_of, once_compiled
from optaxclip.measure.groups import Blocks, Groups
from optaxclip.measure.norms import Norm
from optaxclip.measure.statistics import worst
from optaxclip.thresholds.given import Context, Threshold, as_threshold, non_negative

_GRADIENT, _UPDATE, _LOSS = "gradient", "update", "loss"
_BY_DEFAULT = (_GRADIENT, _LOSS)
_ONE = Norm("global")


@named_node
class FirstNonfinite(NamedTuple):
    """When what a guard looks at was first not finite, by name."""

    names: tuple[str, ...]
    """Paths of leaves, `"update of "` and a path, and names of values."""
    step: jax.Array
    """[names], int32: the step, counted from 0; -1 if it never happened."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One thing that was measured: norms, or a value the caller passed."""

    norm: Norm
    leaves: Leaves
    groups: Groups
    numbers: Blocks
    finite: jax.Array
    """[names]: which of the leaves were finite."""

    def judged(
        self, limit: Threshold, state: Tree, count: jax.Array, params: Tree, extra: Mapping
    ) -> tuple[jax.Array, jax.Array, jax.Array, Tree]:
        """The number furthest beyond its bound, the bound, whether all are within; next state."""
        context = Context(count, self.norm, self.groups, self.leaves, params, extra)
        vector = self.groups.vector(self.numbers)
        found, state = limit.bound(vector, state, context)
        bounds = self.groups.blocks_of(found)
        if self.norm is _ONE:  # a value, which may be negative, and so may its bound
            (n,), c = vector, jnp.ravel(bounds[0])[0]
            return n, c, n <= c, state
        n, c, beyond = worst(self.numbers, non_negative(bounds))
        return n, c, ~beyond, state


@dataclasses.dataclass(frozen=True)
class Level:
    """A bound of values, which may be negative."""

    number: float

    def init(self, norm: Norm, params: Tree) -> Tree:
        del norm, params
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[jax.Array, Tree]:
        del context
        return jnp.asarray(self.number, norms.dtype), state


@dataclasses.dataclass(frozen=True)
class Watched:
    """The names of what a guard looks at, and the norm of gradient and update.

    None: the gradient, and the loss in steps that are given one. States then keep the numbers of
    the loss apart, in a field of their own: all others are as with `"gradient"`.
    """

    of: str | tuple[str, ...] | None
    norm: Norm

    @classmethod
    def make(cls, of: Any, norm: Any) -> "Watched":
        """Raises for what cannot be names."""
        names = _BY_DEFAULT if of is None else (of,) if isinstance(of, str) else of
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
            raise TypeError(
                f"of must be a name or a tuple of names, got {of!r}. Use 'gradient', 'update', and"
                " the names of what is passed to update, such as 'loss'."
            )
        return cls(of, norm if isinstance(norm, Norm) else Norm(norm))

    @property
    def names(self) -> tuple[str, ...]:
        """In the order given."""
        if self.of is None:
            return _BY_DEFAULT
        return (self.of,) if isinstance(self.of, str) else self.of

    def only(self, by_name: dict[str, Any]) -> Any:
        """What states hold: one number for one name, a dict for several."""
        return by_name if isinstance(self.of, tuple) else by_name[self.names[0]]

    def aside(self, by_name: dict[str, Any]) -> Any:
        """What states hold apart: of the loss, with `of=None`; else None."""
        return by_name.get(_LOSS) if self.of is None else None

    def each(self, held: Any, aside: Any) -> dict[str, Any]:
        """The dict that `only` and `aside` were given."""
        if self.of is None:
            return {_GRADIENT: held, _LOSS: aside}
        return {self.of: held} if isinstance(self.of, str) else held

    def limits(self, threshold: Any, default: Mapping[bool, Any]) -> dict[str, Threshold]:
        """The threshold of each; `default[is a value]` where none is given."""
        own = not isinstance(self.of, str) and isinstance(threshold, Mapping)
        if self.of is None:  # any other dict is of bounds by leaf or label
            own = own and set(threshold) == set(self.names)
        if own and set(threshold) != set(self.names):
            raise ValueError(
                f"a dict of thresholds must have the names of what is measured, got"
                f" {sorted(threshold)} for {sorted(self.names)}. Give each its own, or one for all."
            )
        found = {}
        for name in self.names:
            given = threshold[name] if own else threshold
            if self.of is None and not own and name == _LOSS and threshold is not None:
                given = UNKNOWN  # finite, and no more
            value = name not in (_GRADIENT, _UPDATE)
            if value and isinstance(given, numbers.Real) and not math.isnan(given):
                given = Level(float(given))
            found[name] = as_threshold(default[value] if given is None else given)
        return found

    def init(self, limits: Mapping[str, Threshold], params: Tree) -> dict[str, Tree]:
        """The first state of each threshold."""
        one = jnp.zeros(())
        return {
            name: limit.init(self.norm, params)
            if name in (_GRADIENT, _UPDATE)
            else limit.init(_ONE, one)
            for name, limit in limits.items()
        }

    def look(self, updates: Tree, new_updates: Tree, extra: Mapping[str, Any]) -> dict[str, Seen]:
        """What is measured in this step."""
        trees = {_GRADIENT: updates, _UPDATE: new_updates}
        missing = self.of is None and extra.get(_LOSS) is None
        return {
            name: self._of_tree(trees[name]) if name in trees else self._of_value(name, extra)
            for name in self.names
            if not (missing and name == _LOSS)
        }

    def finite(self, seen: Mapping[str, Seen]) -> list[jax.Array]:
        """For each name of `never` whether it was finite; a loss that is missing was."""
        return [seen[k].finite if k in seen else jnp.ones(1, bool) for k in self.names]

    def never(self, params: Tree) -> Any:
        """No leaf was ever anything but finite."""
        paths = [path or "the root" for path in self.norm.leaves(params).paths]
        trees = {_GRADIENT: paths, _UPDATE: [f"update of {path}" for path in paths]}
        if not paths and set(trees) & set(self.names):
            return jnp.full((), -1, jnp.int32)  # one leaf instead of a node, as for `GroupStats`
        names = tuple(itertools.chain(*(trees.get(name, [name]) for name in self.names)))
        return FirstNonfinite(names, jnp.full(len(names), -1, jnp.int32))

    def _of_tree(self, tree: Tree) -> Seen:
        leaves = self.norm.leaves(tree)
        groups = self.norm.groups(leaves)
        if self.norm.by not in ("global", "group"):
            numbers = self.norm.measure(leaves, groups)
            return Seen(self.norm, leaves, groups, numbers, _finite(numbers, groups=groups))
        # By leaf, so that the one that is not finite has a name; XLA shares their sums with a
        # clipper inside.
        by_leaf = dataclasses.replace(self.norm, by="leaf", labels=None)
        (lengths,) = by_leaf.measure(leaves, by_leaf.groups(leaves))
        if self.norm.ord == "rms":  # which needs the sizes of whole leaves, also on a mesh
            numbers = self.norm.measure(leaves, groups)
        else:
            numbers = [_joined(lengths, groups=groups, ord=self.norm.ord)]
        return Seen(self.norm, leaves, groups, numbers, jnp.isfinite(lengths))

    def _of_value(self, name: str, extra: Mapping[str, Any]) -> Seen:
        if extra.get(name) is None:
            raise ValueError(
                f"a guard of {name!r} must be given it at each step, got none. Call"
                f" tx.update(grads, state, params, {name}=...)."
            )
        value = jnp.asarray(extra[name])
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be a real scalar, got {value.dtype} of shape {value.shape}. Pass the"
                " mean over the batch."
            )
        names = self.norm.axis_name
        names = names(name, value) if callable(names) else names
        axes = varying_axes(value) or ((names,) if isinstance(names, str) else tuple(names or ()))
        value = value.astype(jnp.float32)
        if axes:  # devices that saw different batches decide alike
            value = lax.pmean(value, axes)
        leaves = Leaves([value], [name], [0], value)
        return Seen(_ONE, leaves, _ONE.groups(leaves), [value[None]], jnp.isfinite(value)[None])


@once_compiled
def _finite(numbers: Blocks, *, groups: Groups) -> jax.Array:
    """Of norms by leaf, unit or element: which leaves are finite."""
    if not groups.has_units:
        return jnp.isfinite(numbers[0])
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in numbers])


@once_compiled
def _joined(lengths: jax.Array, *, groups: Groups, ord: Any) -> jax.Array:
    """The norms of groups from those of their leaves."""
    if not groups.paths:
        return jnp.zeros(groups.size, lengths.dtype)
    member = np.arange(groups.size)[:, None] == np.asarray(groups.of_leaf)[None]
    own = jnp.where(member, lengths[None], 0.0)
    largest = maximum_of(own, axis=1)
    if ord == math.inf:
        return largest
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sum((own / scale[:, None]) ** ord, axis=1) ** (1 / ord)


@once_compiled
def first_steps(record: Any, finite: list[jax.Array], count: jax.Array) -> Any:
    """The record after a step, and whether all was finite in it."""
    every = jnp.concatenate(finite)
    if not isinstance(record, FirstNonfinite):
        return record, jnp.all(every)
    first = jnp.where(~every & (record.step < 0), count, record.step)
    return FirstNonfinite(record.names, first), jnp.all(every)
