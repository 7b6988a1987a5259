"""The sum of clipped per-example gradients of one call, in micro-batches if asked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._compat import as_varying
from optaxclip._leaves import Leaves, Tree
from optaxclip._numerics import accumulator, root
from optaxclip.per_example.arguments import Call
from optaxclip.per_example.costs import Costs, Method
from optaxclip.per_example.forms import Form, zero_like
from optaxclip.per_example.incoming import Incoming, total
from optaxclip.per_example.microbatches import accumulated
from optaxclip.per_example.schedules import best_microbatch_size, scheduled, second_pass
from optaxclip.per_example.trees import cast, masked, materialize, sq_norms
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
    """A tree prefix of the gradients: each bounds the norm of what is below it."""
    to_unit_norm: bool
    transform: Callable[[Tree], Tree] | None
    nan_safe: bool
    dtype: Any
    method: Method | Literal["auto"]

    def of_batch(self, call: Call, padding: jax.Array | None, size: int | None) -> Clipped:
        """The clipped sum, from micro-batches of `size` examples; `padding` [B] counts as zero."""
        likes: list[Tree] = []  # what a gradient is like, known once a part has been traced
        seen: list[Costs] = []
        whole = functools.partial(self._of_part, call, likes, seen)
        run = jax.jit(whole)  # traced once a size
        free = self.transform is None and call.spmd_axis_name is None
        if size is None and self.method == "auto" and free:

            def of_some(batch: list[jax.Array]) -> Clipped:
                return run(batch, None if padding is None else padding[: len(batch[0])])

            size = best_microbatch_size(call, of_some, seen)
        if size is None:
            part = whole(call.batch, padding)
            return part._replace(sums=self._as_asked(part.sums, likes[0]))

        def some(inputs: tuple[list[jax.Array], Any]) -> tuple[Tree, Clipped]:
            batch, padding = inputs
            if padding is None:
                part = run(batch, padding)
            else:  # nothing is computed for a micro-batch of padding alone
                shapes = jax.eval_shape(run, batch, padding)

                def alike(part: Clipped) -> Clipped:
                    leaves, structure = jax.tree.flatten(part)
                    return jax.tree.unflatten(structure, as_varying(leaves, [*batch, padding]))

                part = jax.lax.cond(
                    jnp.all(padding),
                    lambda: alike(jax.tree.map(_zeros, shapes)),
                    lambda: alike(run(batch, padding)),
                )
            return part.sums, part._replace(sums=())

        sums, parts = accumulated(some, (call.batch, padding), size)
        return parts._replace(sums=self._as_asked(sums, likes[0]))

    def _of_part(
        self,
        call: Call,
        likes: list[Tree],
        seen: list[Costs],
        batch: list[jax.Array],
        padding: jax.Array | None,
    ) -> Clipped:
        """The sum over some examples, in a dtype that is wide enough to go on adding."""
        call = dataclasses.replace(call, batch=batch)
        method = self.method if self.transform is None else "vmap"
        chosen, found = scheduled(call, method, seen)
        grads = call.like_params(found.forms, lambda leaf: zero_like(leaf, call.size))
        grad_norms = root(sq_norms(grads))
        if self.transform is not None:
            grads = jax.vmap(self.transform)(materialize(grads))
        incoming = Incoming.of(grads)
        likes.append(incoming.like)
        leaves = Leaves.of(incoming.like)
        groups, bounds = self._groups(leaves)

        squares = [
            total([incoming.forms[i].sq_norm() for i in members], call.size) for members in groups
        ]
        norms = [root(x) for x in squares]
        keep = jnp.ones(call.size, bool) if padding is None else ~padding
        if self.nan_safe:
            keep = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms), keep)
        weights = [
            jax.lax.stop_gradient(jnp.where(keep, self._factor(n, c), 0.0))
            for n, c in zip(norms, bounds, strict=True)
        ]
        mask = None if padding is None and not self.nan_safe else keep

        sums = incoming.zeros()
        for members, c in zip(groups, weights, strict=True):
            again = None
            if chosen == "two_pass":
                again = jax.tree.leaves(second_pass(_without_dropped(call, mask), c))
            for i in members:
                dtype = self._wide(incoming.forms[i].dtype)
                if again is None:
                    sums[i] = _weighted_sum(incoming.forms[i], c, mask, dtype)
                else:
                    some = True if mask is None else jnp.any(mask)
                    sums[i] = jnp.where(some, again[i].astype(dtype), 0)
        return Clipped(incoming.update(sums), found.losses, grad_norms, found.aux)

    def _groups(self, leaves: Leaves) -> tuple[list[list[int]], list[Any]]:
        """The positions of the leaves under each bound, and the bounds."""
        bounds, structure = jax.tree.flatten(self.bounds)
        numbered = jax.tree.unflatten(structure, range(len(bounds)))
        groups: list[list[int]] = [[] for _ in bounds]
        covering = leaves.from_prefix(numbered, "l2_clip_norm")
        for position, group in zip(leaves.positions, covering, strict=True):
            groups[group].append(position)
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

    def _wide(self, dtype: Any) -> Any:
        return jnp.promote_types(accumulator(dtype), self.dtype or dtype)

    def _as_asked(self, sums: Tree, like: Tree) -> Tree:
        """In `dtype`, or in that of the gradients."""

        def one(x: jax.Array, like: Any) -> jax.Array:
            if not jnp.issubdtype(like.dtype, jnp.inexact):
                return x
            return x.astype(self.dtype or like.dtype)

        return jax.tree.map(one, sums, like)


def _weighted_sum(form: Form, weights: jax.Array, mask: jax.Array | None, dtype: Any) -> jax.Array:
    """`sum_b c_b g_b` in a dtype, over the examples of the mask."""
    if mask is not None:
        form = masked(form, mask)
    return cast(form, dtype).weighted_sum(weights)


def _without_dropped(call: Call, keep: jax.Array | None) -> Call:
    """With a kept example in the place of each other one, which has weight 0: no 0 times NaN."""
    if keep is None:
        return call
    places = jnp.where(keep, jnp.arange(call.size), jnp.argmax(keep))
    return dataclasses.replace(call, batch=[x[places] for x in call.batch])


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)
