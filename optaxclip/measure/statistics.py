"""What a clipper did on its last step, and how often it had to: arrays of fixed shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._leaves import named_node
from optaxclip._numerics import as_float32, maximum_of, once_compiled, stacked
from optaxclip.measure.groups import Blocks, Groups
from optaxclip.measure.norms import Norm

Answer = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(norm, bound) -> (factor, norm afterwards)`."""

# Up to this many leaves, units or labelled groups are recorded one by one.
_MAX_RECORDED = 256


@named_node
class GroupStats(NamedTuple):
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
    """Group by group, for 2 to 256 leaves, units or labels (`stats="every"`: more); else None."""
    examples: ExampleStats | None = None
    """Of an aggregator of per-example gradients; else None."""


def empty_stats(norm: Norm, groups: Groups, *, every: bool = False) -> ClipStats:
    """The statistics before the first step; `every`: of more than 256 groups each, too."""
    by_group: Any = None
    several = norm.by in ("leaf", "unit", "group")
    if several and not groups.paths:
        # One leaf where other trees have a node: `optax.tree_map_params` takes its map of a state
        # from init of a tree without leaves.
        by_group = jnp.zeros((), jnp.float32)
    if several and groups.size > 1 and (every or groups.size <= _MAX_RECORDED):
        by_group = GroupStats(
            groups.names,
            jnp.zeros(groups.size, jnp.float32),
            jnp.zeros(groups.size, jnp.float32),
            jnp.ones(groups.size, jnp.float32),
            jnp.zeros(groups.size, jnp.int32),
        )
    return ClipStats(
        count=jnp.zeros((), jnp.int32),
        pre_clip_norm=jnp.zeros((), jnp.float32),
        post_clip_norm=jnp.zeros((), jnp.float32),
        threshold=jnp.zeros((), jnp.float32),
        clip_factor=jnp.ones((), jnp.float32),
        clipped_count=jnp.zeros((), jnp.int32),
        nonfinite_count=jnp.zeros((), jnp.int32),
        groups=by_group,
    )


def check_same_groups(stats: ClipStats, groups: Groups) -> None:
    """Raises where the groups are not those that `init` saw."""
    then = stats.groups.names if isinstance(stats.groups, GroupStats) else ()
    now = groups.names if stats.groups is not None else ()
    if then != now:
        differing = (name for name in (*now, *then) if name not in now or name not in then)
        raise ValueError(
            f"updates must have the groups that init saw, got {len(now)} for {len(then)}, and"
            f" {next(differing, 'their order')} differs. Call init with the tree the gradient is"
            " taken for."
        )


def record(
    stats: ClipStats, groups: Groups, norms: Blocks, bounds: Blocks, answer: Answer
) -> ClipStats:
    """The statistics after a step with these norms and bounds."""
    if not groups.size:
        return stats._replace(count=optax.safe_increment(stats.count))
    recorded = None
    if isinstance(stats.groups, GroupStats):
        norms, bounds = ([_vector(x, groups=groups)] for x in (norms, bounds))
        recorded = *norms, *bounds, answer(*norms, *bounds)[0]
    norm, bound, exceeded = worst(norms, bounds)
    return _recorded(stats, (norm, bound, exceeded, *answer(norm, bound)), recorded)


def record_nothing(stats: ClipStats, bounds: Blocks) -> ClipStats:
    """The statistics after a step in which nothing was measured."""
    unknown = jnp.full((), -1, jnp.float32)
    uncounted = jnp.full((), -1, jnp.int32)
    count, least = optax.safe_increment(stats.count), jnp.min(as_float32(bounds[0]))
    return ClipStats(count, unknown, unknown, least, unknown, uncounted, uncounted, None)


@once_compiled
def _recorded(stats: ClipStats, worst: Any, recorded: Any) -> ClipStats:
    norm, bound, exceeded, factor, afterwards = worst
    groups = stats.groups
    if isinstance(groups, GroupStats):
        n, c, f = recorded
        clipped_count = _count_if(~(n <= c), groups.clipped_count)
        groups = GroupStats(groups.names, n, c, as_float32(f), clipped_count)
    return ClipStats(
        count=optax.safe_increment(stats.count),
        pre_clip_norm=as_float32(norm),
        post_clip_norm=as_float32(afterwards),
        threshold=as_float32(bound),
        clip_factor=as_float32(factor),
        clipped_count=_count_if(exceeded, stats.clipped_count),
        nonfinite_count=_count_if(~jnp.isfinite(norm), stats.nonfinite_count),
        groups=groups,
        examples=stats.examples,
    )


@once_compiled
def _vector(blocks: Blocks, *, groups: Groups) -> jax.Array:
    return as_float32(groups.vector(blocks))


@once_compiled
def worst(norms: Blocks, bounds: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm and bound where n / c is largest, and whether any n exceeds its c.

    Norms that are not finite come first, and of equal ratios the larger norm. By maxima alone:
    where units are split over a mesh, whatever picks by an index would gather them.
    """
    pairs = [(n, jnp.broadcast_to(c, n.shape)) for n, c in zip(norms, bounds, strict=True)]
    if len(bounds) == 1 and bounds[0].ndim == 0:
        norm = maximum_of(norms[0])
        return norm, bounds[0], ~(norm <= bounds[0])
    ratio, beyond = _most([(_excess(n, c), (~(n <= c)).astype(n.dtype)) for n, c in pairs])
    # Groups may share a factor (they are clipped together in a warm-up), which rounding must not
    # tell apart: of those furthest out, the longest.
    far = [_excess(n, c) >= (1 - 1e-5) * ratio for n, c in pairs]
    furthest = [
        (jnp.where(out, n, 0.0), jnp.where(out, c, 0.0))
        for out, (n, c) in zip(far, pairs, strict=True)
    ]
    return *_most(furthest), beyond > 0


def _excess(n: jax.Array, c: jax.Array) -> jax.Array:
    """`n / c`; infinite where n is not finite."""
    ratio = jnp.where(n == 0, 0.0, n / jnp.where(n == 0, 1.0, c))
    return jnp.where(jnp.isfinite(n) & ~jnp.isnan(ratio), ratio, jnp.inf)


def _most(pairs: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The largest of either number, of all arrays."""
    first, second = ([maximum_of(x) for x in some] for some in zip(*pairs, strict=True))
    if len(pairs) == 1:
        return first[0], second[0]
    return maximum_of(stacked(first)), maximum_of(stacked(second))


def _count_if(happened: jax.Array, counter: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(counter), counter)
