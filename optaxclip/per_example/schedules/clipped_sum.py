"""The sum of clipped per-example gradients of one call, in micro-batches if asked."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._compat import as_varying
from optaxclip._leaves import Leaves, Tree, place
from optaxclip._numerics import root
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.forms.forms import zero_like
from optaxclip.per_example.forms.incoming import Incoming, total
from optaxclip.per_example.forms.trees import materialize
from optaxclip.per_example.schedules.choice import Chooser, Part, chooser, in_parts
from optaxclip.per_example.schedules.costs import Method
from optaxclip.per_example.schedules.factored import see, stacked
from optaxclip.per_example.schedules.weighed import Weighed, Weighing, from_forms, weighed
from optaxclip.responses import Rescale


class Clipped(NamedTuple):
    """What comes of one batch."""

    sums: Tree
    values: jax.Array
    """Losses, [B]."""
    grad_norms: jax.Array
    """Before clipping and before the transform, [B]; NaN and infinity as they came."""
    aux: Tree
    """[B, ...]."""


@dataclasses.dataclass(frozen=True)
class Clipping:
    """How the gradient of an example is clipped, and how the sum is taken."""

    bounds: Tree
    """A tree prefix of the gradients: each bounds the norm of what is below it; one of several
    numbers those of the slices of a leaf."""
    to_unit_norm: bool
    transform: Callable[[Tree], Tree] | None
    nan_safe: bool
    dtype: Any
    method: Method | Literal["auto"]
    memory: float | None

    def of_batch(self, call: Call, padding: jax.Array | None, size: int | None) -> Clipped:
        """The clipped sum, from micro-batches of `size` examples; `padding` [B] counts as zero."""
        if self.transform is None:
            part, like, how = self._plain(call, size)
        else:
            part, like = self._transformed(call, self.transform)
            how = Chooser(call.size, "vmap", size)
        of_some = part if padding is None else _unless_padding(part)
        sums, found = in_parts(part, (call.batch, padding), how, of_some)
        return found._replace(sums=self._as_asked(sums, like))

    def _plain(self, call: Call, size: int | None) -> tuple[Part, Tree, Chooser]:
        """What one part gives, the tree that its sums are like, and how a schedule is chosen."""
        seen = see(call)
        like = call.like_params(list(map(_type, call.params)), _type_of_zero)
        numbers = call.like_params([*range(len(call.params))], lambda leaf: -1)
        leaves, numbers = jax.tree.leaves(like), jax.tree.leaves(numbers)
        groups, bounds = self._groups(like)
        of_param = [groups[numbers.index(k)] for k in range(len(call.params))]
        wanted: Any = "auto" if size is None and call.spmd_axis_name is None else size
        how = chooser(call, seen, of_param, self.method, wanted, self.memory)

        def part(method: Method, inputs: Any) -> tuple[list[jax.Array], Clipped]:
            batch, padding = inputs
            some = dataclasses.replace(call, batch=batch)
            found = weighed(some, seen, method, self._how(of_param, bounds, padding))
            zeros = [zero_like(x, 1).weighted_sum(jnp.zeros(1)) for x in leaves]
            sums = [zeros[i] if k < 0 else found.sums[k] for i, k in enumerate(numbers)]
            return sums, Clipped((), found.losses, _norms(found, some.size), found.aux)

        return part, like, how

    def _transformed(self, call: Call, transform: Callable) -> tuple[Part, Tree]:
        """The same from stacked gradients that go through a function first."""

        def gradients(batch: list[jax.Array]) -> tuple[Any, Tree]:
            some = dataclasses.replace(call, batch=batch)
            found = stacked(some)
            grads = call.like_params(found.forms, lambda leaf: zero_like(leaf, some.size))
            return found, grads

        def part(method: Method, inputs: Any) -> tuple[list[jax.Array], Clipped]:
            batch, padding = inputs
            found, grads = gradients(batch)
            moved = Incoming.of(jax.vmap(transform)(materialize(grads)))
            groups, bounds = self._groups(moved.like)
            how = self._how(groups, bounds, padding)
            moving = [i for i, group in enumerate(groups) if group >= 0]
            before = total([form.sq_norm() for form in found.forms], moved.size)
            after = found._replace(forms=[moved.forms[i] for i in moving])
            how = dataclasses.replace(how, groups=[groups[i] for i in moving])
            sums = moved.zeros()
            for i, x in zip(moving, from_forms(after, how).sums, strict=True):
                sums[i] = x
            return sums, Clipped((), found.losses, root(before), found.aux)

        def like(batch: list[jax.Array]) -> Tree:
            _, grads = gradients(batch)
            return jax.vmap(transform)(materialize(grads))

        types = jax.eval_shape(like, call.batch)
        return part, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), types)

    def _how(self, groups: Sequence[int], bounds: list[Any], padding: jax.Array | None) -> Weighing:
        """How the gradients of each group are weighed."""

        def weights(group: int, squares: jax.Array, row: Any = None) -> jax.Array:
            bound = bounds[group] if row is None else jnp.asarray(bounds[group])[row]
            return self._factor(root(squares), bound)

        rows = frozenset(g for g, bound in enumerate(bounds) if jnp.ndim(bound) == 1)
        return Weighing(groups, weights, padding, self.nan_safe, self.dtype, rows)

    def _groups(self, like: Tree) -> tuple[list[int], list[Any]]:
        """The bound over each leaf, by number, -1 where nothing is bounded; and the bounds."""
        leaves = Leaves.of(like)
        bounds, structure = jax.tree.flatten(self.bounds)
        numbered = jax.tree.unflatten(structure, range(len(bounds)))
        groups = [-1] * len(jax.tree.leaves(like))
        covering = leaves.from_prefix(numbered, "l2_clip_norm")
        for position, group in zip(leaves.positions, covering, strict=True):
            groups[position] = group
        for path, leaf, group in zip(leaves.paths, leaves.arrays, covering, strict=True):
            shape = jnp.shape(bounds[group])
            if shape and (shape != leaf.shape[:1] or covering.count(group) > 1):
                raise ValueError(
                    f"a bound in l2_clip_norm must be a number, or of one leaf one number for each"
                    f" slice along its first axis, got shape {shape} for {place(path)} of shape"
                    f" {tuple(leaf.shape)}. Pass a number, or an array of shape"
                    f" {tuple(leaf.shape[:1])} for that leaf alone."
                )
        return groups, bounds

    def _factor(self, norm: jax.Array, bound: Any) -> jax.Array:
        """`min(1, c / n)`, over c if to unit norm; never NaN."""
        c = jnp.maximum(jnp.asarray(bound).astype(norm.dtype), 0)
        factor = Rescale().factor(norm, c)
        if self.to_unit_norm:  # with c = 0 the limit, g / n
            some, zero = c > 0, norm == 0
            direction = jnp.where(zero, 0.0, 1 / jnp.where(zero, 1.0, norm))
            factor = jnp.where(some, factor / jnp.where(some, c, 1.0), direction)
        return jnp.where(jnp.isfinite(norm), factor, 0.0)

    def _as_asked(self, sums: list[jax.Array], like: Tree) -> Tree:
        """A tree in `dtype`, or in the dtypes of the gradients."""
        types, structure = jax.tree.flatten(like)
        wanted = [
            self.dtype or t.dtype if jnp.issubdtype(t.dtype, jnp.inexact) else x.dtype
            for x, t in zip(sums, types, strict=True)
        ]
        return jax.tree.unflatten(
            structure,
            [x.astype(d) if x.dtype != d else x for x, d in zip(sums, wanted, strict=True)],
        )


def _norms(found: Weighed, size: int) -> jax.Array:
    """`|g_b|` over all groups, [B]."""
    by_group = found.squares.values()
    return root(total([jnp.sum(x.reshape(size, -1), axis=1) for x in by_group], size))


def _unless_padding(part: Part) -> Part:
    """Zeros for a micro-batch of padding alone, without computing anything."""

    def some(method: Method, inputs: tuple[list[jax.Array], jax.Array]) -> Any:
        batch, padding = inputs
        run = jax.jit(functools.partial(part, method))  # traced once
        shapes = jax.eval_shape(run, inputs)

        def alike(found: Any) -> Any:
            leaves, structure = jax.tree.flatten(found)
            return jax.tree.unflatten(structure, as_varying(leaves, [*batch, padding]))

        return jax.lax.cond(
            jnp.all(padding),
            lambda: alike(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)),
            lambda: alike(run(inputs)),
        )

    return some


def _type(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _type_of_zero(leaf: Any) -> jax.ShapeDtypeStruct:
    """Of the gradient of a leaf that does not move."""
    return jax.eval_shape(lambda: zero_like(leaf, 1).weighted_sum(jnp.zeros(1)))
