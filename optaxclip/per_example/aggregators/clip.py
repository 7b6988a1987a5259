"""Per-example clipping inside `optax.chain`: from per-example gradients to one update."""

import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from optax.experimental import aggregating

from optaxclip._leaves import LeafFn, Tree
from optaxclip._numerics import alike, maximum_of, root
from optaxclip.clipping import ClipState, NonFinite, answered, check_state
from optaxclip.measure.norms import Norm
from optaxclip.measure.statistics import check_same_groups, empty_stats, record
from optaxclip.per_example.aggregators.statistics import (
    empty_example_stats,
    noise_scale_of,
    record_examples,
)
from optaxclip.per_example.forms.explicit_axes import of_gradients
from optaxclip.per_example.forms.incoming import Incoming, sq_norm, total
from optaxclip.per_example.forms.trees import masked
from optaxclip.responses import Response, as_response
from optaxclip.thresholds.given import Context, as_threshold, non_negative


def clip_per_example(
    max_norm: Any,
    *,
    by: Literal["global", "leaf"] | Tree | LeafFn = "global",
    response: str | Response = "rescale",
    mean: Literal["batch", "sum"] | Any = "batch",
    nan_safe: bool = True,
    name: str | None = None,
) -> aggregating.Aggregator:
    """Clips the gradient of every example and averages: `1/B sum_b min(1, c / |g_b|) g_b`.

    Put it first in `optax.chain`, and give `update` what `per_example_grad` or `vmap(grad)` makes,
    with `params`, to which shapes are then held. No example moves the update further than c / B;
    with a bound on each of several groups, than `sqrt(sum_k c_k^2) / B`.

    Args:
      max_norm: c >= 0: a number, a traced scalar, a schedule or a `Threshold`, such as
        `split_evenly(c)` or `example_quantile(q)`; of several groups also a tree prefix of these.
      by: what one norm is taken over: `"global"`, an example's whole gradient; `"leaf"`; or labels,
        as in `clip_by_group_norm`, with `max_norm` a dict by label if they have a bound each.
      response: as in `clip_by`: `"rescale"`, `"automatic"`, `"psac"`, `"drop"` and so on.
      mean: what the sum is divided by. `"batch"`: B, dropped examples included; `"sum"`: 1; or a
        number, such as the expected batch size under Poisson sampling.
      nan_safe: whether an example with NaN or infinity is left out, or makes the update NaN.
      name: how `clip_stats` calls this aggregator; None: `"clip_per_example"`.

    Returns:
      An `optax.experimental.aggregating.Aggregator` with a `ClipState`. Statistics are about the
      worst example, and in `examples` about all of them (`ExampleStats`).

    Raises:
      ValueError: unknown `by`, `response` or `mean`; a bound that is negative, NaN or for another
        tree; gradients without examples, of different batch sizes, or not shaped like params.

    Edge cases:
      | an example with NaN, infinity | left out, in `nonfinite_count`; of nothing else: zeros |
      | norms beyond 1e19, below 1e-19 (float32); integers | not finite, zero; zero updates |
      | inside `jax.shard_map` | `jax.lax.pmean` the updates: they are of a device's examples |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_per_example(1.0)
      >>> grads = jnp.array([[30.0, 40.0], [0.6, 0.0], [jnp.nan, 0.0]])  # of three examples
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> examples = optaxclip.clip_stats(state)["clip_per_example"].examples
      >>> print((updates * 3).round(3), examples.max_norm, examples.nonfinite_count)
      [1.2 0.8] 50.0 1

    Source: Abadi et al., arXiv 1607.00133; `"automatic"`: 2206.07136; `"psac"`: 2212.00328.
    """
    measured = norm_by(by)
    limit = as_threshold(max_norm, "max_norm")
    answer = as_response(response)
    _check_mean(mean)
    name = name or "clip_per_example"

    def init_fn(params: Tree) -> ClipState:
        groups = measured.groups(measured.leaves(params))
        stats = empty_stats(measured, groups)._replace(examples=empty_example_stats())
        return ClipState(name, stats, limit.init(measured, params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ClipState]:
        check_state(state)
        incoming = Incoming.of(updates, params)
        forms, size = incoming.forms, incoming.size
        leaves = measured.leaves(incoming.like)
        groups = measured.groups(leaves)
        check_same_groups(state.stats, groups)

        moving = [forms[i] for i in leaves.positions]
        squares = alike([total([moving[i].sq_norm() for i in m], size) for m in groups.members])
        norms = jnp.stack([root(x) for x in squares]) if squares else jnp.zeros((0, size))
        finite = jnp.all(jnp.isfinite(norms), axis=0)
        count = state.stats.count
        context = Context(count, measured, groups, leaves, params, extra_args)
        # A threshold that learns must not see the finite parts of an example that is dropped.
        seen = jnp.where(finite[None], norms, jnp.nan) if nan_safe else norms
        found, threshold_state = limit.bound(seen, state.threshold_state, context)
        (bounds,) = non_negative(groups.blocks_of(found))
        c = jnp.broadcast_to(bounds, groups.size)[:, None]

        factors = answer.factor(norms, c)
        if nan_safe:
            factors = jnp.where(finite[None], factors, 0.0)
            moving = [masked(form, finite) for form in moving]
        weights = factors / _divisor(mean, size)

        sums = incoming.zeros()
        by_leaf = groups.by_leaf([weights])
        for i, form, weight in zip(leaves.positions, moving, by_leaf, strict=True):
            sums[i] = form.weighted_sum(weight)

        def after(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
            nonfinite: NonFinite = "zero" if nan_safe else "propagate"
            return answered(norm, bound, response=answer, nonfinite=nonfinite, elements=False)

        stats = record(state.stats, groups, [maximum_of(norms, axis=1)], [bounds], after)
        exceeded = jnp.any(~(norms <= c), axis=0)
        clipped = total([jnp.square(f) * x for f, x in zip(factors, squares, strict=True)], size)
        moved = [sums[i] for i in leaves.positions]
        noise = noise_scale_of(clipped, finite, sq_norm(moved) * _divisor(mean, size) ** 2)
        stats = record_examples(stats, root(total(squares, size)), finite, exceeded, noise)
        return incoming.update(sums), ClipState(state.name, stats, threshold_state)

    return aggregating.Aggregator(init_fn, of_gradients(update_fn))


def norm_by(by: Any) -> Norm:
    """The norms of an example: of its whole gradient, of each leaf, or of each label."""
    if by == "global" or by == "leaf":
        return Norm(by)
    if isinstance(by, str):
        raise ValueError(
            f"unknown by, got {by!r}. Use 'global', 'leaf', or labels: a tree prefix of strings or"
            " a function (path, leaf) -> label."
        )
    return Norm("group", labels=by)


def _check_mean(mean: Any) -> None:
    if isinstance(mean, jax.Array | np.ndarray) and mean.ndim == 0:
        return
    number = isinstance(mean, numbers.Real) and 0 < float(mean) < math.inf
    if not number and mean not in ("batch", "sum"):
        raise ValueError(
            f"unknown mean, got {mean!r}. Use 'batch', 'sum', or a number > 0 to divide by."
        )


def _divisor(mean: Any, size: int) -> Any:
    if isinstance(mean, str):
        return size if mean == "batch" else 1
    return mean
