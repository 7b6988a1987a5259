"""How large a norm may be: a number, a schedule, a tree of either, the parameters' norm.

A `Threshold` maps the vector of norms to bounds. It may keep state of fixed shape, so that bounds
can be learned from history.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import check_bound, check_count
from optaxclip._leaves import Leaves, Tree, first_difference, place
from optaxclip._numerics import accumulator
from optaxclip.measure.groups import Blocks, Groups
from optaxclip.measure.norms import Norm

Bounds = jax.Array | Blocks
"""A vector, a scalar, or by unit one array a leaf as `Norm.measure` gives them."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a threshold may look at besides the norms."""

    count: jax.Array
    """Steps taken before this one, an int32 scalar."""
    norm: Norm
    groups: Groups
    """Which leaf belongs to which norm; `groups.names` has a name for each."""
    updates: Leaves
    params: Tree | None
    extra_args: Mapping[str, Any]


@runtime_checkable
class Threshold(Protocol):
    """Where the bound comes from."""

    def init(self, norm: Norm, params: Tree) -> Tree:
        """The state before the first step: any tree of arrays whose shapes never change."""
        ...

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        """The bounds for the norms, [groups], and the next state.

        Bounds are a vector like the norms, or one scalar for all. In `clip_per_example` norms are
        [groups, examples], and bounds [groups].
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElementBounds:
    """One bound an element: an array of the shape of each counted leaf."""

    arrays: list[jax.Array]
    scales: list[jax.Array] | None = None
    """If given, the bounds of a leaf are its array, all > 0, times this number.

    So statistics need no array of bounds, which a CPU would store: of `spam_clip` in front of Adam
    they cost 0.4 of a step of Adam, not 2.4 (25 leaves of 1024x1024).
    """


@runtime_checkable
class ElementThreshold(Protocol):
    """Where bounds come from that differ from element to element.

    With `by="element"` each element is held to its own; otherwise what is bounded, by 1, is the
    norm of `g_i / c_i`.
    """

    def init(self, norm: Norm, params: Tree) -> Tree:
        """As in `Threshold`."""
        ...

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[ElementBounds, Tree]:
        """The bounds, and the next state; `norms` are the largest elements of each leaf."""
        ...


@dataclasses.dataclass(frozen=True)
class Given:
    """Bounds the user gives: one for all groups, or a tree prefix (for labels, a dict).

    Every entry is a number, a traced or concrete scalar array, or a schedule
    `count -> bound`. A negative number raises; a negative array counts as 0.
    """

    bounds: Tree
    argument: str = "threshold"

    def __post_init__(self) -> None:
        entries = jax.tree.leaves_with_path(self.bounds)
        for key_path, bound in entries or [((), self.bounds)]:
            check_bound(bound, self.argument + jax.tree_util.keystr(key_path))

    def init(self, norm: Norm, params: Tree) -> Tree:
        del norm, params
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        def scalar(key_path: Any, bound: Any) -> jax.Array:
            bound = jnp.asarray(bound(context.count) if callable(bound) else bound)
            if bound.ndim:
                raise ValueError(
                    f"{self.argument}{jax.tree_util.keystr(key_path)} must be a scalar, got shape"
                    f" {bound.shape}. Several bounds, one a leaf or label, are a tree of scalars; a"
                    " global norm has one."
                )
            return bound.astype(norms.dtype)

        bounds = jax.tree.map_with_path(scalar, self.bounds)
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(self.bounds)):
            return bounds, state
        groups = context.groups
        if context.norm.by == "group":
            self._check_labels(groups, context.updates)
            return groups.blocks([bounds[label] for label in groups.names])[0], state
        if context.norm.by == "global":
            raise ValueError(
                f"{self.argument} must be one bound for a global norm, got a tree:"
                f" {self.bounds!r}. Use clip_by_leaf_norm or clip_by_group_norm for several."
            )
        by_leaf = groups.blocks(context.updates.from_prefix(bounds, self.argument))
        return by_leaf if groups.has_units else by_leaf[0], state

    def _check_labels(self, groups: Groups, updates: Leaves) -> None:
        flat = isinstance(self.bounds, Mapping) and jax.tree_util.all_leaves(self.bounds.values())
        if not flat:
            raise TypeError(
                f"{self.argument} must map labels to bounds, got {self.bounds!r}. Pass a dict"
                f" with the keys {list(groups.names)}."
            )
        missing = [label for label in groups.names if label not in self.bounds]
        # What `optax.masked` or `optax.partition` have set aside needs no bound here.
        unused = [k for k in self.bounds if k not in groups.names] if updates.complete else []
        if missing or unused:
            problem = f"no leaf is labelled {unused[0]!r}" if unused else ""
            if missing:
                leaf = groups.paths[groups.members[groups.names.index(missing[0])][0]]
                problem = f"label {missing[0]!r} (of {place(leaf)}) has no bound"
            raise ValueError(
                f"every label needs a bound and every bound a leaf, got bounds for"
                f" {sorted(self.bounds)} and leaves labelled {list(groups.names)}: {problem}. Make"
                " the two agree; float('inf') leaves a group unclipped."
            )


@dataclasses.dataclass(frozen=True)
class Passed:
    """The bound that is passed to `update` by name: `tx.update(grads, state, params, bound=c)`.

    A scalar for all norms, or a vector of one for each. Negative counts as 0.
    """

    name: str = "bound"

    def init(self, norm: Norm, params: Tree) -> Tree:
        del norm, params
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        if context.extra_args.get(self.name) is None:
            raise ValueError(
                f"a bound from outside must be passed at each step, got no {self.name!r}. Call"
                f" tx.update(grads, state, params, {self.name}=...)."
            )
        return jnp.asarray(context.extra_args[self.name]).astype(norms.dtype), state


@dataclasses.dataclass(frozen=True)
class ParamNorm:
    """`ratio * max(||w||, eps)`: the same norm, taken of the parameters (arXiv 2102.06171)."""

    ratio: Any
    eps: Any = 1e-3

    def __post_init__(self) -> None:
        check_bound(self.ratio, "ratio")
        check_bound(self.eps, "eps", schedule=False)

    def init(self, norm: Norm, params: Tree) -> Tree:
        del norm, params
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        params = params_of(context.updates, context.params, context.norm)
        ratio = jnp.asarray(self.ratio(context.count) if callable(self.ratio) else self.ratio)
        eps = jnp.asarray(self.eps)
        sizes = context.norm.measure(params, context.groups)
        bounds = [ratio.astype(norms.dtype) * _at_least(x, eps).astype(norms.dtype) for x in sizes]
        return bounds if context.groups.has_units else bounds[0], state


@dataclasses.dataclass(frozen=True)
class ParamElements:
    """`ratio |w_i| + absolute`: a bound for each element (arXiv 2302.09178)."""

    ratio: Any
    absolute: Any = 1e-7

    def __post_init__(self) -> None:
        check_bound(self.ratio, "ratio")
        check_bound(self.absolute, "absolute", schedule=False)

    def init(self, norm: Norm, params: Tree) -> Tree:
        del norm, params
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[ElementBounds, Tree]:
        del norms
        ratio = jnp.asarray(self.ratio(context.count) if callable(self.ratio) else self.ratio)
        absolute = jnp.asarray(self.absolute)

        def one(w: jax.Array) -> jax.Array:
            dtype = accumulator(w.dtype)
            return jnp.abs(w).astype(dtype) * ratio.astype(dtype) + absolute.astype(dtype)

        params = params_of(context.updates, context.params, context.norm)
        return ElementBounds(list(map(one, params.arrays))), state


@dataclasses.dataclass(frozen=True)
class LargestBut:
    """The (k + 1)-th largest norm of the step, such as of tokens in `clip_backward`, or of units.

    With the response `"drop"` the k largest are removed; of equal ones fewer.
    """

    k: int

    def __post_init__(self) -> None:
        check_count(self.k, "k")

    def init(self, norm: Norm, params: Tree) -> Tree:
        size = norm.groups(norm.leaves(params)).size
        if size <= self.k:
            raise ValueError(
                f"k must be less than the number of norms, got {self.k} of {size}. Pass less, or"
                " more axes to keep apart."
            )
        return ()

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        if norms.ndim > 1:
            raise ValueError(
                f"LargestBut is of groups, got {norms.shape[-1]} examples. Use"
                " per_example.trim_by_norm to drop the largest examples."
            )
        return jax.lax.stop_gradient(jax.lax.top_k(norms, self.k + 1)[0][-1]), state


def params_of(updates: Leaves, params: Tree | None, norm: Norm) -> Leaves:
    """The parameters of the updates. Raises where there are none, or others."""
    if params is None:
        raise ValueError(
            "a bound relative to the parameters needs params, got None. Call"
            " tx.update(grads, state, params)."
        )
    # A whole Equinox model holds functions, and perhaps arrays that are not trained.
    arrays = jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, params)
    found = norm.leaves(arrays)
    if set(updates.paths) < set(found.paths):
        found = found.among(updates.paths)
    shapes = [x.shape for x in found.arrays]
    if found.paths != updates.paths or shapes != [x.shape for x in updates.arrays]:
        where = "in params", "in updates"
        raise ValueError(
            "params and updates must have the same leaves, got"
            f" {first_difference(found.named, updates.named, where)}. Pass the parameters the"
            " gradient was taken for."
        )
    return found


def _at_least(x: jax.Array, least: jax.Array) -> jax.Array:
    return jnp.maximum(x, least.astype(x.dtype))


def as_threshold(value: Any, argument: str = "threshold") -> Threshold:
    """`value` if it is a threshold already, else the bounds it gives."""
    if isinstance(value, type):
        raise TypeError(
            f"{argument} must be a bound or a Threshold, got the class {value.__name__}. Make one"
            f" of it: {value.__name__}(...)."
        )
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{argument} must be a bound or a Threshold, got a gradient transformation. Put the two"
            " side by side: optax.chain(clipper(bound), optimizer)."
        )
    return value if isinstance(value, Threshold) else Given(value, argument)


def non_negative(bounds: Blocks) -> Blocks:
    """Each bound or 0; NaN stays."""
    return [jnp.maximum(bound, 0.0) for bound in bounds]
