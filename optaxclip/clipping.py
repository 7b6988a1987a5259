"""`clip_by(norm, threshold, response)`: the one engine behind every clipper; its statistics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optaxclip._leaves import Tree
from optaxclip.norms import By, Layout, Norm, Slots, accumulator, times
from optaxclip.responses import Rescale, Response, as_response
from optaxclip.thresholds import Context, as_threshold

NonFinite = Literal["propagate", "zero"]

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


class ClipStats(NamedTuple):
    """What a clipper did; float32 and int32 scalars, of one shape from `init` on.

    With several groups (leaves, units, elements) norm, threshold and factor are those of
    the group that exceeded its bound most on the last step.
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stats", "threshold_state"],
    meta_fields=["name"],
)
@dataclasses.dataclass(frozen=True)
class ClipState:
    """State of a clipper: its statistics and whatever its threshold remembers."""

    name: str
    stats: ClipStats
    threshold_state: Tree


def clip_by(
    norm: By | Norm,
    threshold: Any,
    response: str | Response = "rescale",
    *,
    nonfinite: NonFinite = "propagate",
    stats: bool = True,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A clipper from its three parts: what is measured, how large it may be, what then.

    `u = factor(n, c) * g` for each group of leaves, with n its norm and c its bound.

    Args:
      norm: a `Norm`, or its `by`: `"global"`, `"leaf"`, `"unit"`, `"element"`.
      threshold: a number >= 0, a scalar array (traced too), a schedule `count -> bound`, a
        tree prefix of these (a dict by label for groups), or a `Threshold`. In the units
        of the norm.
      response: `"rescale"`, `"rational"`, `"sqrt"`, `"tanh"`, `"normalize"`, `"drop"`, or
        a `Response`.
      nonfinite: what becomes of a group with NaN or infinite elements. `"propagate"`: as in
        Optax, NaN stays NaN; an infinity turns the group's finite elements to 0 and itself
        to NaN. `"zero"`: the group becomes zeros (for elements, just these elements). Either
        way the step is counted. To drop the whole step use `skip_nonfinite`.
      stats: False leaves the statistics out, for elementwise clippers alone, where measuring
        costs a pass over the gradient; norms, factor and counters are then -1.
      name: how `clip_stats` calls this clipper.

    Returns:
      A gradient transformation whose state is a `ClipState`. Updates keep structure,
      shapes and dtypes.

    Raises:
      ValueError: unknown parts; a bound that is negative or NaN; trees that do not match.
      TypeError: a leaf that is no array; a bound that is no number.

    Guarantees:
      A group inside its bound comes out bit for bit (but XLA may flush subnormal numbers).
      A rescaled group of float32 or wider has norm <= c (1 + 1e-6), one of 16 bits
      c (1 + eps of its dtype), for norms up to 1e37 c. A bound of 0 gives zeros. The
      derivative is finite, also at zero.

    Edge cases:
      A traced bound below 0 counts as 0; a NaN bound makes the updates NaN. Integer, float0,
      None, MaskedNode and empty leaves pass through uncounted.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by("leaf", 1.0, "sqrt", name="soft")
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], optaxclip.clip_stats(state)["soft"].pre_clip_norm)
      [0.58834845 0.7844646 ] 5.0
    """
    measured = norm if isinstance(norm, Norm) else Norm(norm)
    limit = as_threshold(threshold)
    answer = as_response(response)
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"unknown nonfinite, got {nonfinite!r}. Use one of {get_args(NonFinite)}.")
    if not stats and measured.by != "element":
        raise ValueError(
            f"stats=False saves nothing for a {measured.by} norm, which is measured anyway. Drop"
            " the argument."
        )
    name = name or f"clip_by_{measured.by}"

    def init_fn(params: Tree) -> ClipState:
        layout = measured.layout(measured.leaves(params))
        return ClipState(name, _empty_stats(measured, layout), limit.init(measured, params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ClipState]:
        leaves = measured.leaves(updates)
        layout = measured.layout(leaves)
        _check_same_groups(state.stats, layout)
        norms = measured.measure(leaves, layout) if stats else _unmeasured(layout)
        context = Context(state.stats.count, measured, layout, leaves, params, extra_args)
        bounds, threshold_state = limit.bound(norms, state.threshold_state, context)
        bounds = _non_negative(bounds)

        def clip(x: jax.Array, norm: jax.Array, bound: jax.Array) -> jax.Array:
            if measured.by == "element":
                return _clip_elements(x, bound, answer, nonfinite)
            return _clip_leaf(x, norm, bound, answer, nonfinite)

        arrays = [
            clip(x, norms[slot], bounds[slot])
            for x, slot in zip(leaves.arrays, layout.slots, strict=True)
        ]
        record = _record if stats else _record_nothing
        new_stats = record(state.stats, norms, bounds, answer, clip)
        return leaves.replace(arrays), ClipState(state.name, new_stats, threshold_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_stats(opt_state: Tree) -> dict[str, ClipStats]:
    """The statistics of every clipper in an optimizer state, however deep, by name.

    Looks through chain, named_chain, masked, partition, MultiSteps, inject_hyperparams,
    apply_if_finite, the guards of this library and any other pytree. Of two clippers with
    one name, the second is called `name_2`, and so on; `name=` tells them apart.

    Args:
      opt_state: the state of an optimizer, or any tree that holds it.

    Returns:
      `{name: ClipStats}`, in the order of the tree; empty without a clipper. For a logger:
      `{f"{name}/{k}": v for name, s in stats.items() for k, v in s._asdict().items()}`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> stats = optaxclip.clip_stats(state)["clip_by_global_norm"]
      >>> print(stats.pre_clip_norm, stats.clip_factor)
      5.0 0.2
    """
    found: dict[str, ClipStats] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ClipState)):
        if isinstance(node, ClipState):
            key, repeat = node.name, 2
            while key in found:
                key, repeat = f"{node.name}_{repeat}", repeat + 1
            found[key] = _unwrapped(node.stats)
    return found


def _unwrapped(stats: ClipStats) -> ClipStats:
    """Flax NNX wraps each array of a state in a variable, a node with one leaf."""
    fields = {k: jax.tree.leaves(x)[0] for k, x in stats._asdict().items() if k != "groups"}
    groups = stats.groups
    if groups is not None:
        groups = GroupStats(groups.names, *jax.tree.leaves(groups))
    return stats._replace(**fields, groups=groups)


def _non_negative(bounds: Slots) -> Slots:
    """Each bound or 0; NaN stays. One bound for all stays one array."""
    clamped = {id(bound): jnp.maximum(bound, 0.0) for bound in bounds}
    return tuple(clamped[id(bound)] for bound in bounds)


def _unmeasured(layout: Layout) -> Slots:
    return tuple(jnp.zeros(shape, jnp.float32) for shape in layout.unit_shapes)


def _clip_leaf(
    x: jax.Array, norm: jax.Array, bound: jax.Array, response: Response, nonfinite: NonFinite
) -> jax.Array:
    clipped = _scale(x, response.factor(norm, bound))
    if nonfinite == "zero":
        clipped = jnp.where(jnp.isfinite(norm), clipped, jnp.zeros_like(x))
    return clipped


def _clip_elements(
    x: jax.Array, bound: jax.Array, response: Response, nonfinite: NonFinite
) -> jax.Array:
    if response == Rescale() and not jnp.iscomplexobj(x):
        bound = bound.astype(x.dtype)
        clipped = jnp.clip(x, -bound, bound)
    else:
        modulus = jnp.abs(x).astype(accumulator(x.dtype))
        clipped = _scale(x, response.factor(modulus, bound.astype(modulus.dtype)))
    if nonfinite == "zero":
        clipped = jnp.where(jnp.isfinite(x), clipped, jnp.zeros_like(x))
    return clipped


def _scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor`, rounded once to the leaf's dtype."""
    wide = x if jnp.iscomplexobj(x) else x.astype(accumulator(x.dtype))
    return times(wide, factor).astype(x.dtype)


def _empty_stats(norm: Norm, layout: Layout) -> ClipStats:
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


def _check_same_groups(stats: ClipStats, layout: Layout) -> None:
    if stats.groups is not None and stats.groups.names != layout.names:
        then, now = stats.groups.names, layout.names
        differing = (name for name in (*now, *then) if name not in now or name not in then)
        raise ValueError(
            f"updates must have the groups that init saw, got {len(now)} for {len(then)}, and"
            f" {next(differing, 'their order')} differs. Call init with the tree the gradient is"
            " taken for."
        )


def _record(
    stats: ClipStats, norms: Slots, bounds: Slots, response: Response, clip: Callable
) -> ClipStats:
    count = optax.safe_increment(stats.count)
    if not norms:
        return stats._replace(count=count)

    def answer(norm: jax.Array, bound: jax.Array) -> jax.Array:
        """The factor; 0 where a group that is not finite was zeroed."""
        factor = response.factor(norm, bound)
        zeroed = (clip(norm, norm, bound) == 0) & ~jnp.isfinite(norm)
        return jnp.where(zeroed, 0.0, factor)

    norm, bound, exceeded = _worst(norms, bounds)
    groups = stats.groups
    if groups is not None:
        n, c = _flat(norms), _flat(_broadcast(bounds, norms))
        clipped_count = _count_if(~(n <= c), groups.clipped_count)
        groups = GroupStats(groups.names, n, c, answer(n, c), clipped_count)
    return ClipStats(
        count=count,
        pre_clip_norm=norm,
        post_clip_norm=clip(norm, norm, bound),
        threshold=bound,
        clip_factor=answer(norm, bound),
        clipped_count=_count_if(exceeded, stats.clipped_count),
        nonfinite_count=_count_if(~jnp.isfinite(norm), stats.nonfinite_count),
        groups=groups,
    )


def _record_nothing(stats: ClipStats, norms: Slots, bounds: Slots, *_: Any) -> ClipStats:
    count = optax.safe_increment(stats.count)
    if not norms:
        return stats._replace(count=count)
    unknown = jnp.full((), -1, jnp.float32)
    uncounted = jnp.full((), -1, jnp.int32)
    least = jnp.min(_flat(bounds))
    return ClipStats(count, unknown, unknown, least, unknown, uncounted, uncounted, None)


def _worst(norms: Slots, bounds: Slots) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norm and bound where n / c is largest, and whether any n exceeds its c.

    Norms that are not finite come first.
    """
    if all(bound is bounds[0] for bound in bounds) and bounds[0].ndim == 0:
        norm, (bound,) = _max(norms), _flat(bounds[:1])
        return norm, bound, ~(norm <= bound)
    if len(norms) > _AT_ONCE:
        starts = range(0, len(norms), _AT_ONCE)
        parts = [_worst(norms[i : i + _AT_ONCE], bounds[i : i + _AT_ONCE]) for i in starts]
        worst_norms, worst_bounds, exceeded = zip(*parts, strict=True)
        norm, bound, _ = _worst(worst_norms, worst_bounds)
        return norm, bound, jnp.any(jnp.stack(exceeded))
    n, c = _flat(norms), _flat(_broadcast(bounds, norms))
    zero = n == 0
    excess = jnp.where(zero, 0.0, n / jnp.where(zero, 1.0, c))
    at = jnp.argmax(jnp.where(jnp.isfinite(n), excess, jnp.nan))  # NaN is largest for argmax
    return n[at], c[at], ~jnp.all(n <= c)


def _max(norms: Slots) -> jax.Array:
    while len(norms) > _AT_ONCE:
        starts = range(0, len(norms), _AT_ONCE)
        norms = tuple(jnp.max(_flat(norms[i : i + _AT_ONCE])) for i in starts)
    return jnp.max(_flat(norms))


def _broadcast(bounds: Slots, norms: Slots) -> Slots:
    return tuple(jnp.broadcast_to(c, n.shape) for c, n in zip(bounds, norms, strict=True))


def _flat(slots: Slots) -> jax.Array:
    """All slots in one float32 vector; what is finite stays finite."""
    vectors = [x.reshape(-1) for x in slots]
    vector = vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors)
    vector = jax.lax.optimization_barrier(vector)
    if vector.dtype == jnp.float32:
        return vector
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(jnp.isfinite(vector), jnp.minimum(vector, largest), vector).astype(jnp.float32)


def _count_if(happened: jax.Array, counter: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(counter), counter)
