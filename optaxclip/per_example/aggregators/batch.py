"""One batch of per-example gradients, and the aggregator that follows from a formula for it.

`aggregator` checks and measures the gradients, drops what is not finite, and keeps the statistics
that `clip_per_example` keeps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from optax.experimental import aggregating

from optaxclip._leaves import Leaves, Tree
from optaxclip._numerics import UNKNOWN, accumulator, maximum_of, root
from optaxclip.clipping import ClipState, answered, check_state
from optaxclip.measure.norms import Norm
from optaxclip.measure.statistics import empty_stats, record
from optaxclip.per_example.aggregators.statistics import empty_example_stats, record_examples
from optaxclip.per_example.forms.cancellation import Terms, settled
from optaxclip.per_example.forms.explicit_axes import of_gradients
from optaxclip.per_example.forms.forms import Form, over_examples
from optaxclip.per_example.forms.incoming import Incoming, sq_norm, total
from optaxclip.per_example.forms.trees import cast, masked
from optaxclip.responses import Rescale, Response
from optaxclip.thresholds.given import Context

Arrays = list[jax.Array]
WHOLE = Norm("global")


@dataclasses.dataclass(frozen=True)
class Batch:
    """The gradients of the finite examples; all others are zero."""

    forms: list[Form]
    """In float32 at least."""
    norms: jax.Array
    """[B]; NaN or infinite for the others."""
    finite: jax.Array
    """[B]."""

    @property
    def number(self) -> jax.Array:
        """How many examples are finite."""
        return jnp.sum(self.finite).astype(self.norms.dtype)

    @property
    def sq_norms(self) -> jax.Array:
        """[B]; zero for the others."""
        return jnp.where(self.finite, jnp.square(self.norms), 0)

    def sum(self, weights: jax.Array) -> Arrays:
        """`sum_b c_b g_b`."""
        return [form.weighted_sum(weights) for form in self.forms]

    def along(self, direction: Arrays) -> jax.Array:
        """`<g_b, v>` for one v, [B]: the transpose of `sum`, so nothing is stacked."""
        transposed = jax.linear_transpose(self.sum, jax.typeof(self.norms))
        return transposed(direction)[0]

    def distances(self, point: Arrays) -> jax.Array:
        """`|g_b - v|`, [B]; also where v is so close to a gradient that the terms cancel."""
        squares, length = self.sq_norms, sq_norm(point)
        total = squares - 2 * self.along(point) + length
        size = jnp.square(root(squares) + root(length))
        elements = sum(x.size for x in point)
        return root(settled(Terms(total, size, size), elements, lambda: self._distances(point)))

    def _distances(self, point: Arrays) -> jax.Array:
        """Their squares from the gradients themselves, of one example after the other."""

        def one(b: jax.Array) -> jax.Array:
            alone = over_examples(lambda x: lax.dynamic_slice_in_dim(x, b, 1), self.forms)
            return sq_norm([f.materialize()[0] - v for f, v in zip(alone, point, strict=True)])

        return lax.map(one, jnp.arange(self.norms.shape[0]))

    def mean_weights(self) -> jax.Array:
        """[B], that make `sum` the mean."""
        return jnp.where(self.finite, 1 / jnp.maximum(self.number, 1), 0)

    def sorted(self) -> Arrays:
        """The gradients stacked, each coordinate in order; those of the others last."""

        def one(form: Form) -> jax.Array:
            stacked = form.materialize()
            finite = self.finite.reshape(-1, *(1,) * (stacked.ndim - 1))
            last = jnp.finfo(stacked.dtype).max
            return jnp.sort(jnp.where(finite, stacked, last), axis=0)

        return [one(form) for form in self.forms]


class Answer(NamedTuple):
    """One update, and what the statistics say of it."""

    update: Arrays
    memory: Tree = ()
    norms: jax.Array | None = None
    """What was compared with the bound, [B]; None: the norms."""
    bound: Any = UNKNOWN
    response: Response = Rescale()
    kept: jax.Array | None = None
    """Examples within the bound; None: those whose norm is."""
    noise_scale: jax.Array | None = None


Combine = Callable[[Batch, Tree, Context], Answer]


def aggregator(
    name: str, rule: Combine, init: Callable[[Leaves, Tree], Tree] = lambda leaves, params: ()
) -> aggregating.Aggregator:
    """The aggregator of a rule: checks, norms, what is not finite, statistics."""

    def init_fn(params: Tree) -> ClipState:
        leaves = WHOLE.leaves(params)
        stats = empty_stats(WHOLE, WHOLE.groups(leaves))._replace(examples=empty_example_stats())
        return ClipState(name, stats, init(leaves, params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ClipState]:
        check_state(state)
        incoming = Incoming.of(updates, params)
        leaves = WHOLE.leaves(incoming.like)
        groups = WHOLE.groups(leaves)
        forms = [incoming.forms[i] for i in leaves.positions]
        norms = root(total([form.sq_norm() for form in forms], incoming.size))
        finite = jnp.isfinite(norms)
        wide = [cast(masked(form, finite), accumulator(form.dtype)) for form in forms]
        context = Context(state.stats.count, WHOLE, groups, leaves, params, extra_args)
        answer = rule(Batch(wide, norms, finite), state.threshold_state, context)

        def after(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
            return answered(norm, bound, response=answer.response, nonfinite="zero", elements=False)

        measured = norms if answer.norms is None else answer.norms
        bound = jnp.asarray(answer.bound, measured.dtype)
        stats = record(state.stats, groups, [maximum_of(measured)[None]], [bound], after)
        beyond = ~(measured <= bound) if answer.kept is None else ~answer.kept
        stats = record_examples(stats, norms, finite, beyond, answer.noise_scale)
        sums = incoming.zeros()
        for i, x in zip(leaves.positions, answer.update, strict=True):
            sums[i] = x.astype(incoming.forms[i].dtype)
        return incoming.update(sums), ClipState(state.name, stats, answer.memory)

    return aggregating.Aggregator(init_fn, of_gradients(update_fn))
