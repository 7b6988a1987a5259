"""Robust aggregators: what one update is when some examples are wrong, not just long.

Each is a formula; what they share is in `batch`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from optaxclip._arguments import check_between, check_count, check_positive
from optaxclip._leaves import Leaves, Tree
from optaxclip._numerics import accumulator
from optaxclip.per_example.aggregators.batch import WHOLE, Answer, Batch, aggregator
from optaxclip.per_example.aggregators.statistics import noise_scale_of
from optaxclip.per_example.forms.incoming import sq_norm
from optaxclip.responses import Drop, Rescale
from optaxclip.thresholds.given import Context, as_threshold, non_negative


def trim_by_norm(fraction: Any, *, name: str | None = None) -> aggregating.Aggregator:
    """Leaves out the examples with the longest gradients and averages the others.

    `1/(N - k) sum_(kept) g_b`, k = floor(fraction N) of N finite examples.

    Args:
      fraction: the share to leave out, in [0, 1): a number or a traced scalar. With wrong labels,
        about their share: early in training those are the long gradients.
      name: how `clip_stats` calls this aggregator.

    Returns:
      An aggregator, as `clip_per_example` is. Its statistics have the longest kept norm as the
      bound and the share left out as `clipped_fraction`.

    Raises:
      ValueError: a fraction out of range; gradients as for `clip_per_example`.

    Guarantees:
      Factored gradients and stacked ones give equal results, and factored ones are not stacked.
      An example with NaN or infinity changes nothing but a counter; a batch of them gives zeros.

    Edge cases:
      Of equal norms, those of the examples that come first are kept. At least one example is
      kept, whatever a traced fraction.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.per_example.trim_by_norm(0.25)
      >>> grads = jnp.array([[1.0], [2.0], [3.0], [-50.0]])
      >>> print(tx.update(grads, tx.init(jnp.zeros(1)))[0])
      [2.]

    Source: folklore; trimmed losses: Shen & Sanghavi, arXiv 1810.11874.
    """
    check_between(fraction, "fraction", 0, 1, last=False)

    def rule(batch: Batch, memory: Tree, context: Context) -> Answer:
        kept_number = batch.number - _share(fraction, batch.number, batch.number - 1)
        last = jnp.finfo(batch.norms.dtype).max
        order = jnp.argsort(jnp.where(batch.finite, batch.norms, last))
        rank = jnp.argsort(order)  # stable: of equal norms the first comes first
        kept = batch.finite & (rank.astype(kept_number.dtype) < kept_number)
        sums = batch.sum(kept.astype(batch.norms.dtype))
        divisor = jnp.maximum(kept_number, 1)
        noise = noise_scale_of(batch.sq_norms, kept, sq_norm(sums))
        bound = jnp.max(jnp.where(kept, batch.norms, 0))
        update = [x / divisor.astype(x.dtype) for x in sums]
        return Answer(update, bound=bound, response=Drop(), kept=kept, noise_scale=noise)

    return aggregator(name or "trim_by_norm", rule)


def centered_clip(
    max_norm: Any, *, iterations: int = 1, name: str | None = None
) -> aggregating.Aggregator:
    """Clips around the last update instead of zero: `v += mean_b clip(g_b - v, c)`.

    Args:
      max_norm: c >= 0, for the distance from v: a number, a traced scalar, a schedule or a
        `Threshold` (which sees the distances).
      iterations: how often, >= 1. Static.
      name: how `clip_stats` calls this aggregator.

    Returns:
      An aggregator, as `clip_per_example` is, whose state holds v, the last update, in float32 at
      least. Norm, factor and `clipped_fraction` are those of the distances in the last iteration.

    Raises:
      ValueError: a bound that is negative or NaN; iterations < 1; another tree than at `init`;
        gradients as for `clip_per_example`.

    Guarantees:
      Factored gradients and stacked ones give equal results, and factored ones are not stacked:
      `|g - v|^2 = |g|^2 - 2 <g, v> + |v|^2`. An example moves v by at most c / N an iteration. One
      with NaN or infinity changes nothing but a counter; a batch of them gives zeros and leaves v.

    Edge cases:
      v is zero at first, so the first iteration clips as `clip_per_example` does. A distance much
      shorter than the gradients comes out too large by what rounding may add, never too small.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.per_example.centered_clip(1.0, iterations=3)
      >>> grads = jnp.array([[3.0], [3.2], [2.8], [-50.0]])
      >>> print(f"{tx.update(grads, tx.init(jnp.zeros(1)))[0][0]:.3f}")
      1.500

    Source: Karimireddy, He & Jaggi, arXiv 2012.10333.
    """
    limit = as_threshold(max_norm, "max_norm")
    check_count(iterations, "iterations")

    def init(leaves: Leaves, params: Tree) -> Tree:
        start = [jnp.zeros(x.shape, accumulator(x.dtype)) for x in leaves.arrays]
        return limit.init(WHOLE, params), start

    def rule(batch: Batch, memory: Tree, context: Context) -> Answer:
        limit_state, point = memory
        context.updates.check_like(point)
        distances = batch.distances(point)
        seen = jnp.where(batch.finite, distances, jnp.nan)
        bounds, limit_state = limit.bound(seen[None], limit_state, context)
        (found,) = non_negative(context.groups.blocks_of(bounds))
        bound = found.reshape(())
        for k in range(iterations):
            distances = batch.distances(point) if k else distances
            weights = batch.mean_weights() * Rescale().factor(distances, bound)
            stays = 1 - jnp.sum(weights)
            moved = zip(point, batch.sum(weights), strict=True)
            point = [stays.astype(v.dtype) * v + x for v, x in moved]
        some = jnp.any(batch.finite)
        measured = jnp.where(batch.finite, distances, batch.norms)
        return Answer([jnp.where(some, v, 0) for v in point], (limit_state, point), measured, bound)

    return aggregator(name or "centered_clip", rule, init)


def geometric_median(
    *, iterations: int = 4, eps: Any = 1e-6, name: str | None = None
) -> aggregating.Aggregator:
    """The point with the least sum of distances from the gradients, `argmin_z sum_b |g_b - z|`.

    Smoothed Weiszfeld: from the mean on, `z = sum_b w_b g_b / sum_b w_b` with
    `w_b = 1 / max(|g_b - z|, eps)`.

    Args:
      iterations: how often, >= 1; each costs as much as two weighted sums. Static.
      eps: the distance within which a gradient weighs no more, > 0: a number or a traced scalar.
      name: how `clip_stats` calls this aggregator.

    Returns:
      An aggregator, as `clip_per_example` is; its bound is the largest float. The noise scale is
      that of the gradients as they came in.

    Raises:
      ValueError: iterations < 1; an eps that is not > 0 and finite; gradients as for
        `clip_per_example`.

    Guarantees:
      Factored gradients and stacked ones give equal results, and factored ones are not stacked:
      inner products are all it takes. An example with NaN or infinity changes nothing but a
      counter; a batch of them gives zeros.

    Edge cases:
      Less than half of the examples, wherever they are, move the median by a bounded amount;
      four iterations are near it, not at it, when they are far away. A distance much shorter
      than the gradients comes out too large by what rounding may add, never too small.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.per_example.geometric_median(iterations=20)
      >>> grads = jnp.array([[1.0], [2.0], [3.0], [3.1], [-50.0]])
      >>> print(f"{tx.update(grads, tx.init(jnp.zeros(1)))[0][0]:.2f}")
      2.00

    Source: Pillutla, Kakade & Harchaoui (RFA), arXiv 1912.13445, algorithm 2.
    """
    check_count(iterations, "iterations")
    check_positive(eps, "eps")

    def rule(batch: Batch, memory: Tree, context: Context) -> Answer:
        sums = batch.sum(batch.finite.astype(batch.norms.dtype))
        noise = noise_scale_of(batch.sq_norms, batch.finite, sq_norm(sums))
        divisor = jnp.maximum(batch.number, 1)
        point = [x / divisor.astype(x.dtype) for x in sums]
        info = jnp.finfo(batch.norms.dtype)
        least = jnp.clip(jnp.asarray(eps).astype(batch.norms.dtype), info.tiny, info.max)
        for _ in range(iterations):
            distances = jnp.maximum(batch.distances(point), least)
            # Relative to the nearest: 1 / distance may overflow, and so may a sum of them.
            nearest = jnp.min(jnp.where(batch.finite, distances, info.max))
            nearness = jnp.where(batch.finite, nearest / distances, 0)
            point = batch.sum(nearness / jnp.maximum(jnp.sum(nearness), 1))
        return Answer(point, noise_scale=noise)

    return aggregator(name or "geometric_median", rule)


def coordinate_median(*, name: str | None = None) -> aggregating.Aggregator:
    """The median of each coordinate over the examples.

    Stacks the gradients of all examples, [B, *shape], factored or not: it costs the memory of
    `vmap(grad)`, and sorts it.

    Args:
      name: how `clip_stats` calls this aggregator.

    Returns:
      An aggregator, as `clip_per_example` is; its bound is the largest float, its noise scale -1.

    Raises:
      ValueError: gradients as for `clip_per_example`.

    Guarantees:
      NumPy's median over the finite examples, that of the two in the middle averaged. An example
      with NaN or infinity changes nothing but a counter; a batch of them gives zeros.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.per_example.coordinate_median()
      >>> grads = jnp.array([[1.0, 9.0], [2.0, 7.0], [-50.0, 8.0]])
      >>> print(tx.update(grads, tx.init(jnp.zeros(2)))[0])
      [1. 8.]

    Source: Yin, Chen, Ramchandran & Bartlett, arXiv 1803.01498, definition 1.
    """

    def rule(batch: Batch, memory: Tree, context: Context) -> Answer:
        number = jnp.sum(batch.finite)

        def middle(rows: jax.Array) -> jax.Array:
            low, high = rows[jnp.maximum(number - 1, 0) // 2], rows[number // 2]
            return jnp.where(number > 0, (low + high) / 2, 0)

        return Answer([middle(rows) for rows in batch.sorted()])

    return aggregator(name or "coordinate_median", rule)


def coordinate_trimmed_mean(fraction: Any, *, name: str | None = None) -> aggregating.Aggregator:
    """The mean of each coordinate without its largest and smallest values.

    Of N finite examples floor(fraction N) are left out at either end. Stacks the gradients of
    all examples, [B, *shape], factored or not: it costs the memory of `vmap(grad)`, and sorts it.

    Args:
      fraction: the share to leave out at either end, in [0, 0.5): a number or a traced scalar.
      name: how `clip_stats` calls this aggregator.

    Returns:
      An aggregator, as `clip_per_example` is; its bound is the largest float, its noise scale -1.

    Raises:
      ValueError: a fraction out of range; gradients as for `clip_per_example`.

    Guarantees:
      An example with NaN or infinity changes nothing but a counter; a batch of them gives zeros.

    Edge cases:
      At least one value, or the two in the middle, is kept, whatever a traced fraction.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.per_example.coordinate_trimmed_mean(0.25)
      >>> grads = jnp.array([[1.0], [2.0], [4.0], [-50.0]])
      >>> print(tx.update(grads, tx.init(jnp.zeros(1)))[0])
      [1.5]

    Source: Yin, Chen, Ramchandran & Bartlett, arXiv 1803.01498, definition 2.
    """
    check_between(fraction, "fraction", 0, 0.5, last=False)

    def rule(batch: Batch, memory: Tree, context: Context) -> Answer:
        ends = _share(fraction, batch.number, jnp.floor((batch.number - 1) / 2))

        def mean(rows: jax.Array) -> jax.Array:
            rank = jnp.arange(len(rows), dtype=ends.dtype).reshape(-1, *(1,) * (rows.ndim - 1))
            inside = (rank >= ends) & (rank < batch.number - ends)
            divisor = jnp.maximum(batch.number - 2 * ends, 1).astype(rows.dtype)
            return jnp.sum(jnp.where(inside, rows, 0), axis=0) / divisor

        return Answer([mean(rows) for rows in batch.sorted()])

    return aggregator(name or "coordinate_trimmed_mean", rule)


def _share(fraction: Any, number: jax.Array, most: jax.Array) -> jax.Array:
    """`floor(fraction N)`, from 0 to `most`; 0.7 N may round to just below its integer."""
    share = jnp.floor(jnp.asarray(fraction).astype(number.dtype) * number * (1 + 1e-6))
    return jnp.clip(share, 0, jnp.maximum(most, 0))
