"""What a clipper did on its last step, and how often it had to: arrays of fixed shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip.measure.norms import Bundles, Layout, Norm, flat
from optaxclip.measure.reductions import largest
from optaxclip.responses import Response

# The worst of 1000 slots in one step is one kernel of 1000 formulas, which compiles for 22 s; in
# steps of this many it takes 5 s (2 CPU cores).
_AT_ONCE = 32

# Up to this many leaves, units or labelled groups are recorded one by one.
_MAX_RECORDED = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pre_clip_norm", "threshold", "clip_factor", "clipped_count"],
    meta_fields=["names"],
)
@dataclasses.dataclass(frozen=True)
class GroupStats:
    """The last step group by group: arrays `[groups]`, with the groups' names."""

    names: tuple[str, ...]
    pre_clip_norm: jax.Array
    threshold: jax.Array
    clip_factor: jax.Array
    clipped_count: jax.Array


class ExampleStats(NamedTuple):
    """What an aggregator saw in the finite examples of the last step; scalars."""

    mean_norm: jax.Array
    """Of the gradients as they came in, float32; 0 where no example was finite."""
    median_norm: jax.Array
    max_norm: jax.Array
    clipped_fraction: jax.Array
    """Share of them beyond their bound, float32."""
    noise_scale: jax.Array
    """The simple gradient noise scale of what was averaged, `tr(S) / |G|^2` in examples: about the
    batch size beyond which larger batches help little. -1 where it is not known."""
    nonfinite_count: jax.Array
    """Examples with NaN or infinity, in all steps, int32."""


class ClipStats(NamedTuple):
    """What a clipper did; float32 and int32 scalars, of one shape from `init` on.

    With several groups (leaves, units, elements, examples) norm, threshold and factor are those
    of the group that exceeded its bound most on the last step.
    """

    count: jax.Array  # type: ignore[assignment]  # as in Optax's states; hides tuple.count
    """Steps taken."""
    pre_clip_norm: jax.Array
    """The norm that came in."""
    post_clip_norm: jax.Array
    """The norm that went out."""
    threshold: jax.Array
    """The bound."""
    clip_factor: jax.Array
    """What the gradient was multiplied by; 1 if it was left alone."""
    clipped_count: jax.Array
    """Steps on which some group was not within its bound (NaN never is)."""
    nonfinite_count: jax.Array
    """Steps on which some element was NaN or infinite."""
    groups: GroupStats | None = None
    """Group by group, for 2 to 256 leaves, units or labels; else None."""
    examples: ExampleStats | None = None
    """Of an aggregator of per-example gradients; else None."""


def empty_stats(norm: Norm, layout: Layout) -> ClipStats:
    """The statistics before the first step."""
    groups = None
    if norm.by in ("leaf", "unit", "group") and 1 < layout.size <= _MAX_RECORDED:
        groups = GroupStats(
            layout.names,
            jnp.zeros(layout.size, jnp.float32),
            jnp.zeros(layout.size, jnp.float32),
            jnp.ones(layout.size, jnp.float32),
            jnp.zeros(layout.size, jnp.int32),
        )
    return ClipStats(
        count=jnp.zeros((), jnp.int32),
        pre_clip_norm=jnp.zeros((), jnp.float32),
        post_clip_norm=jnp.zeros((), jnp.float32),
        threshold=jnp.zeros((), jnp.float32),
        clip_factor=jnp.ones((), jnp.float32),
        clipped_count=jnp.zeros((), jnp.int32),
        nonfinite_count=jnp.zeros((), jnp.int32),
        groups=groups,
    )


def check_same_groups(stats: ClipStats, layout: Layout) -> None:
    """Raises where the groups are not those that `init` saw."""
    if stats.groups is not None and stats.groups.names != layout.names:
        then, now = stats.groups.names, layout.names
        differing = (name for name in (*now, *then) if name not in now or name not in then)
        raise ValueError(
            f"updates must have the groups that init saw, got {len(now)} for {len(then)}, and"
            f" {next(differing, 'their order')} differs. Call init with the tree the gradient is"
            " taken for."
        )


def record(
    stats: ClipStats,
    layout: Layout,
    norms: Bundles,
    bounds: Bundles,
    response: Response,
    clip_norm: Callable[[jax.Array, jax.Array], jax.Array],
) -> ClipStats:
    """The statistics after a step with these norms and bounds."""
    count = optax.safe_increment(stats.count)
    if not norms:
        return stats._replace(count=count)

    def factor(norm: jax.Array, bound: jax.Array) -> jax.Array:
        """The factor; 0 where a group that is not finite was zeroed."""
        zeroed = (clip_norm(norm, bound) == 0) & ~jnp.isfinite(norm)
        return jnp.where(zeroed, 0.0, response.factor(norm, bound))

    norm, bound, exceeded = _worst(norms, bounds)
    groups = stats.groups
    if groups is not None:
        n, c = layout.vector(norms), layout.vector(_broadcast(bounds, norms))
        clipped_count = _count_if(~(n <= c), groups.clipped_count)
        groups = GroupStats(groups.names, n, c, factor(n, c), clipped_count)
    return ClipStats(
        count=count,
        pre_clip_norm=norm,
        post_clip_norm=clip_norm(norm, bound),
        threshold=bound,
        clip_factor=factor(norm, bound),
        clipped_count=_count_if(exceeded, stats.clipped_count),
        nonfinite_count=_count_if(~jnp.isfinite(norm), stats.nonfinite_count),
        groups=groups,
        examples=stats.examples,
    )


def record_nothing(
    stats: ClipStats, layout: Layout, norms: Bundles, bounds: Bundles, *_: Any
) -> ClipStats:
    """The statistics after a step in which nothing was measured."""
    count = optax.safe_increment(stats.count)
    if not norms:
        return stats._replace(count=count)
    unknown = jnp.full((), -1, jnp.float32)
    uncounted = jnp.full((), -1, jnp.int32)
    least = jnp.min(flat(bounds))
    return ClipStats(count, unknown, unknown, least, unknown, uncounted, uncounted, None)


def _worst(norms: Bundles, bounds: Bundles) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm and bound where n / c is largest, and whether any n exceeds its c.

    Norms that are not finite come first, and of equal ratios the larger norm.
    """
    if all(bound is bounds[0] for bound in bounds) and bounds[0].ndim == 0:
        norm, (bound,) = _max(norms), flat(bounds[:1])
        return norm, bound, ~(norm <= bound)
    if len(norms) > _AT_ONCE:
        starts = range(0, len(norms), _AT_ONCE)
        parts = [_worst(norms[i : i + _AT_ONCE], bounds[i : i + _AT_ONCE]) for i in starts]
        worst_norms, worst_bounds, exceeded = zip(*parts, strict=True)
        norm, bound, _ = _worst(worst_norms, worst_bounds)
        return norm, bound, jnp.any(jnp.stack(exceeded))
    n, c = flat(norms), flat(_broadcast(bounds, norms))
    zero = n == 0
    excess = jnp.where(zero, 0.0, n / jnp.where(zero, 1.0, c))
    excess = jnp.where(jnp.isfinite(n) & ~jnp.isnan(excess), excess, jnp.inf)
    # Groups may share a factor (they are clipped together in a warm-up), which rounding must not
    # tell apart: of those furthest out, the longest. NaN is largest for argmax.
    furthest = excess >= (1 - 1e-5) * jnp.max(excess)
    at = jnp.argmax(jnp.where(furthest, n, -1.0))
    return n[at], c[at], ~jnp.all(n <= c)


def _max(norms: Bundles) -> jax.Array:
    while len(norms) > _AT_ONCE:
        starts = range(0, len(norms), _AT_ONCE)
        norms = tuple(largest(flat(norms[i : i + _AT_ONCE])) for i in starts)
    return largest(flat(norms))


def _broadcast(bounds: Bundles, norms: Bundles) -> Bundles:
    return tuple(jnp.broadcast_to(c, n.shape) for c, n in zip(bounds, norms, strict=True))


def _count_if(happened: jax.Array, counter: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(counter), counter)
