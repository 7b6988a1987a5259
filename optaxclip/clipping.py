"""`clip_by(norm, threshold, response)`: the one engine behind every clipper, and its state."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import check_opt_state
from optaxclip._leaves import Tree, named_node, path_name, place
from optaxclip._numerics import accumulator, once_compiled, rounded, scaled, times
from optaxclip.measure.groups import Blocks, Groups
from optaxclip.measure.mesh import check_reduced
from optaxclip.measure.norms import By, Norm
from optaxclip.measure.statistics import ClipStats as ClipStats
from optaxclip.measure.statistics import ExampleStats as ExampleStats
from optaxclip.measure.statistics import GroupStats as GroupStats
from optaxclip.measure.statistics import (
    check_same_groups,
    empty_stats,
    record,
    record_nothing,
)
from optaxclip.responses import Rescale, Response, ShrinkAlike, as_response
from optaxclip.thresholds.given import (
    Context,
    ElementBounds,
    ElementThreshold,
    Threshold,
    as_threshold,
    non_negative,
)

NonFinite = Literal["propagate", "zero"]
Transform: TypeAlias = optax.GradientTransformationExtraArgs

_SCALARS = [k for k in ClipStats._fields if k not in ("groups", "examples")]


@named_node
class ClipState(NamedTuple):
    """State of a clipper: its statistics and whatever its threshold remembers."""

    name: str
    stats: ClipStats
    threshold_state: Tree


def check_state(state: Any) -> None:
    """Raises for what did not come from `init`."""
    if not isinstance(state, ClipState):
        raise TypeError(
            f"the state of a clipper must come from its init, got {type(state).__name__}. Call"
            " state = tx.init(params) once, and pass on the state that update returns."
        )


def clip_by(
    norm: By | Norm,
    threshold: Any,
    response: str | Response = "rescale",
    *,
    nonfinite: NonFinite = "propagate",
    stats: bool | Literal["every"] = True,
    name: str | None = None,
) -> Transform:
    """A clipper from its three parts: what is measured, how large it may be, what then.

    `u = factor(n, c) * g` for each group of leaves, with n its norm and c its bound.

    Args:
      norm: a `Norm`, or its `by`: `"global"`, `"leaf"`, `"unit"`, `"element"`.
      threshold: c >= 0, in the units of the norm: a number, a scalar array (traced too), a schedule
        `count -> bound`, a tree prefix of these (a dict by label for groups), a `Threshold`, or an
        `ElementThreshold`: then n is the norm of `g_i / c_i` and its bound 1, also in statistics.
      response: `"rescale"`, `"rational"`, `"sqrt"`, `"tanh"`, `"normalize"`, `"automatic"`,
        `"psac"`, `"drop"`, or a `Response`.
      nonfinite: `"propagate"` or `"zero"`, see below. To drop the whole step use `skip_nonfinite`.
      stats: False, for elementwise clippers alone, saves a pass over the gradient; all but `count`
        and `threshold` are then -1. `"every"` keeps statistics of more than 256 groups, too.
      name: how `clip_stats` calls this clipper; None: `"clip_by_"` and what is measured.

    Returns:
      A gradient transformation whose state is a `ClipState`. Structure, shapes and dtypes stay.

    Raises:
      ValueError: unknown parts; a bound that is negative or NaN; trees that do not match; inside
        `jax.shard_map`, a gradient that varies over a mesh axis that `params`, if passed, do not.
      TypeError: a leaf that is no array; a bound that is no number.

    Edge cases:
      | n <= c, `"rescale"` | bit for bit what came in (but XLA may flush subnormal numbers) |
      | n > c, `"rescale"` | norm <= c (1 + 1e-6), in 16 bits c (1 + eps), for n up to 1e37 c |
      | zero gradient | zero, and the derivative is finite |
      | NaN, `"propagate"` | its group becomes NaN (by elements, it stays NaN) |
      | infinity, `"propagate"` | it becomes NaN, the rest of its group 0; by elements, +-c |
      | either, `"zero"` | its group becomes 0 (by elements, just these); `nonfinite_count` rises |
      | c = 0, c < 0 traced, c NaN | zeros, zeros, NaN |
      | integer, float0, None, `MaskedNode`, empty leaves | pass through uncounted |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by("leaf", 1.0, "sqrt", name="soft")
      >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(4), optaxclip.clip_stats(state)["soft"].pre_clip_norm)
      [0.5883 0.7845] 5.0
    """
    measured = norm if isinstance(norm, Norm) else Norm(norm)
    limit: Threshold | ElementThreshold = as_threshold(threshold)
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
        groups = measured.groups(measured.leaves(params))
        first = empty_stats(measured, groups, every=stats == "every")
        return ClipState(name, first, limit.init(measured, params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ClipState]:
        check_state(state)
        leaves = measured.leaves(updates)
        groups = measured.groups(leaves)
        check_same_groups(state.stats, groups)
        if measured.axis_name is None:
            check_reduced(leaves, params)
        norms = measured.measure(leaves, groups) if stats else [jnp.zeros(groups.size)]
        context = Context(state.stats.count, measured, groups, leaves, params, extra_args)
        found, threshold_state = limit.bound(groups.vector(norms), state.threshold_state, context)
        settings: dict[str, Any] = {
            "response": answer, "nonfinite": nonfinite, "groups": groups, "recorded": bool(stats)
        }  # fmt: skip
        by_element = isinstance(found, ElementBounds) and measured.by == "element"
        in_bounds = norms
        if isinstance(found, ElementBounds) and stats:
            # Each element has its own unit here, so that norms are in bounds.
            ratios = dataclasses.replace(leaves, arrays=_in_bounds(leaves.arrays, found))
            in_bounds = measured.measure(ratios, groups, nan=not by_element)
            in_bounds = _finite_where(norms, in_bounds)
        if isinstance(found, ElementBounds) and by_element:
            clipped, new_stats = _clipped_one_by_one(
                leaves.arrays, norms, found, in_bounds, state.stats, **settings
            )
        else:
            one = jnp.ones((), norms[0].dtype)
            bounds = groups.blocks_of(one if isinstance(found, ElementBounds) else found)
            clipped, new_stats = _clipped(
                leaves.arrays,
                in_bounds,
                bounds,
                state.stats,
                elements=measured.by == "element",
                **settings,
            )
        return leaves.replace(clipped), ClipState(state.name, new_stats, threshold_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_stats(opt_state: Tree) -> dict[str, ClipStats]:
    """The statistics of every clipper in an optimizer state, however deep, by name.

    Looks through chain, named_chain, masked, partition, MultiSteps, inject_hyperparams,
    apply_if_finite, the guards of this library and any other pytree. Of two clippers with
    one name, the second is called `name_2`, and so on; `name=` tells them apart.

    Args:
      opt_state: the state of an optimizer, or any tree that holds it.

    Returns:
      `{name: ClipStats}`, in the order of the tree; empty without a clipper. For a logger see
      `clip_scalars`.

    Raises:
      ValueError: a state that has lost its types, and so its names: `nnx.state(optimizer)`.
      TypeError: an optimizer in the place of its state.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> stats = optaxclip.clip_stats(state)["clip_by_global_norm"]
      >>> print(stats.pre_clip_norm, stats.clip_factor)
      5.0 0.2
    """
    check_opt_state(opt_state)
    found: dict[str, ClipStats] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ClipState)):
        if isinstance(node, ClipState):
            key, repeat = node.name, 2
            while key in found:
                key, repeat = f"{node.name}_{repeat}", repeat + 1
            found[key] = _unwrapped(node.stats)
    if not found:
        lost = jax.tree_util.DictKey("pre_clip_norm")
        for key_path, _ in jax.tree.leaves_with_path(opt_state):
            if lost in key_path:
                raise ValueError(
                    "the state of a clipper must have its type, which holds its name, got dicts at"
                    f" {place(path_name(key_path[: key_path.index(lost)]))}. Pass"
                    " optimizer.opt_state instead of nnx.state(optimizer), or restore into"
                    " optimizer.init(params)."
                )
    return found


def _unwrapped(stats: ClipStats) -> ClipStats:
    """Flax NNX wraps each array of a state in a variable, a node with one leaf."""
    fields = {k: jax.tree.leaves(x)[0] for k, x in zip(_SCALARS, stats, strict=False)}
    groups, examples = stats.groups, stats.examples
    if groups is not None:
        named = isinstance(groups, GroupStats)  # not of a tree without leaves
        groups = GroupStats(groups.names, *jax.tree.leaves(groups)) if named else None
    if examples is not None:
        examples = ExampleStats(*jax.tree.leaves(examples))
    return ClipStats(**fields, groups=groups, examples=examples)


@once_compiled
def _clipped(
    arrays: list[jax.Array],
    norms: Blocks,
    bounds: Blocks,
    stats: ClipStats,
    *,
    groups: Groups,
    response: Response,
    nonfinite: NonFinite,
    elements: bool,
    recorded: bool,
) -> tuple[list[jax.Array], ClipStats]:
    """The leaves, each times the factor of its group, or clipped by elements; the statistics."""
    bounds = non_negative(bounds)
    if elements:
        by_leaf = zip(arrays, groups.by_leaf(norms), groups.by_leaf(bounds), strict=True)
        clipped = [_clip_elements(x, n, c, response, nonfinite) for x, n, c in by_leaf]
    else:
        factors = [response.factor(n, c) for n, c in zip(norms, bounds, strict=True)]
        by_leaf = zip(arrays, groups.by_leaf(norms), groups.by_leaf(factors), strict=True)
        clipped = [scale_leaf(x, n, factor, nonfinite) for x, n, factor in by_leaf]
    if not recorded:
        return clipped, record_nothing(stats, bounds)

    def after(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
        return answered(norm, bound, response=response, nonfinite=nonfinite, elements=elements)

    return clipped, record(stats, groups, norms, bounds, after)


@once_compiled
def _clipped_one_by_one(
    arrays: list[jax.Array],
    norms: Blocks,
    found: ElementBounds,
    ratios: Blocks,
    stats: ClipStats,
    *,
    groups: Groups,
    response: Response,
    nonfinite: NonFinite,
    recorded: bool,
) -> tuple[list[jax.Array], ClipStats]:
    """The leaves, each element within its own bound; statistics of the largest ratios."""
    bounds = [jnp.maximum(x, 0.0) for x in found.arrays]
    if found.scales is not None:
        bounds = [x.astype(c.dtype) * c for x, c in zip(bounds, found.scales, strict=True)]
    by_leaf = zip(arrays, groups.by_leaf(norms), bounds, strict=True)
    clipped = [_clip_elements(x, n, c, response, nonfinite) for x, n, c in by_leaf]
    one = [jnp.ones(())]
    if not recorded:
        return clipped, record_nothing(stats, one)

    def after(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
        return answered(norm, bound, response=response, nonfinite=nonfinite, elements=True)

    return clipped, record(stats, groups, ratios, one, after)


def scale_leaf(x: jax.Array, norm: jax.Array, factor: jax.Array, nonfinite: NonFinite) -> jax.Array:
    """`x * factor`, or zeros where its norm is not finite and that is asked for."""
    clipped = scaled(x, factor)
    if nonfinite == "zero":
        clipped = jnp.where(jnp.isfinite(norm), clipped, jnp.zeros_like(x))
    return clipped


def _clip_elements(
    x: jax.Array, largest: jax.Array, bound: jax.Array, response: Response, nonfinite: NonFinite
) -> jax.Array:
    if response == Rescale() and not jnp.iscomplexobj(x):
        wide = x.astype(accumulator(x.dtype)) if x.dtype.itemsize == 1 else x
        bound = bound.astype(wide.dtype)
        clipped = rounded(jnp.clip(wide, -bound, bound), x.dtype)
    else:
        modulus = jnp.abs(x).astype(accumulator(x.dtype))
        bound = bound.astype(modulus.dtype)
        if isinstance(response, ShrinkAlike):
            factor = response.of_elements(modulus, largest.astype(modulus.dtype), bound)
        else:
            factor = response.factor(modulus, bound)
        clipped = scaled(x, factor)
    if nonfinite == "zero":
        clipped = jnp.where(jnp.isfinite(x), clipped, jnp.zeros_like(x))
    return clipped


@once_compiled
def answered(
    norm: jax.Array, bound: jax.Array, *, response: Response, nonfinite: NonFinite, elements: bool
) -> tuple[jax.Array, jax.Array]:
    """The factor of a norm and what becomes of it: it is clipped as a single element would be.

    The factor is 0 where a group that is not finite was zeroed.
    """
    factor = response.factor(norm, bound)
    if elements:
        after = _clip_elements(norm, norm, jnp.broadcast_to(bound, norm.shape), response, nonfinite)
    else:
        after = scale_leaf(norm, norm, factor, nonfinite)
    return jnp.where((after == 0) & ~jnp.isfinite(norm), 0.0, factor), after


@once_compiled
def _in_bounds(arrays: list[jax.Array], found: ElementBounds) -> list[jax.Array]:
    """`x / bound`, with no `|x|` that XLA could share with the norm and would then store."""

    def one(x: jax.Array, bound: jax.Array, scale: jax.Array | None) -> jax.Array:
        wide = x if jnp.iscomplexobj(x) else x.astype(accumulator(x.dtype))
        if scale is None:
            return times(wide, _inverse(bound))
        # Not the bound itself, which XLA would store for this.
        return times(wide, _inverse(scale)) / bound.astype(wide.dtype)

    scales: Sequence[jax.Array | None] = found.scales or [None] * len(arrays)
    return [one(*of_leaf) for of_leaf in zip(arrays, found.arrays, scales, strict=True)]


def _inverse(x: jax.Array) -> jax.Array:
    """`1 / x`, and for 0 the largest float: 0 times it is 0, and all else far beyond the bound."""
    info = jnp.finfo(x.dtype)
    return jnp.where(x < info.tiny, info.max, 1 / jnp.maximum(x, info.tiny))


@once_compiled
def _finite_where(norms: Blocks, ratios: Blocks) -> Blocks:
    """Norms in bounds of what has the norms `norms`: finite where those are."""

    def one(n: jax.Array, ratio: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(n), jnp.minimum(ratio, jnp.finfo(ratio.dtype).max), n)

    return list(map(one, norms, ratios))
