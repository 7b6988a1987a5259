"""For a logger: what clippers, guards and watchers in an optimizer state did, as plain numbers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import check_count, check_positive
from optaxclip._leaves import LeafFn, Tree, named_node
from optaxclip._numerics import as_float32
from optaxclip.clipping import clip_stats
from optaxclip.measure.norms import Norm
from optaxclip.per_example import NoiseState
from optaxclip.wrappers.guards import SkipNonfiniteState, SkipOutliersState
from optaxclip.wrappers.watched import FirstNonfinite

_GUARDS = {SkipNonfiniteState: "skip_nonfinite", SkipOutliersState: "skip_outliers"}
_OF_GUARDS = (
    "skipped_count", "consecutive_count", "stuck", "seen_count", "norm", "threshold",
    "beyond_count",
)  # fmt: skip


@named_node
class PrefixNorms(NamedTuple):
    """The norms of the last step by prefix."""

    names: tuple[str, ...]
    norm: jax.Array
    """[names], float32."""


@named_node
class WatchState(NamedTuple):
    """State of `watch_norms`."""

    name: str
    total: jax.Array
    """The norm of everything, float32."""
    by_prefix: Any
    """`PrefixNorms`; of a tree without leaves one number."""


def watch_norms(
    *,
    depth: int | None = 1,
    of: str = "updates",
    ord: Any = 2,
    exclude: LeafFn | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norms of what passes by, or of the parameters, and changes nothing.

    One norm for each prefix of the leaves' names, for `clip_scalars`. In front of the optimizer it
    sees gradients, behind it updates, anywhere the parameters:
    `chain(watch_norms(name="gradient"), adam, watch_norms(name="update"))`.

    Args:
      depth: how many parts of a name are one prefix: with 1, `"block/dense/kernel"` belongs to
        `"block"`. None: each leaf for itself, however many there are. Static.
      of: `"updates"`, what passes by, or `"params"`.
      ord: as for `Norm`. Static.
      exclude: `(path, leaf) -> bool`, true for what is not measured.
      name: how `clip_scalars` calls it; None: the value of `of`.

    Returns:
      A gradient transformation with a `WatchState`.

    Raises:
      ValueError: an unknown `of` or `ord`; `depth` below 1; params missing where they are watched.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.watch_norms(name="gradient"), optax.sgd(0.1))
      >>> grads = {"body": {"w": jnp.array([3.0, 4.0])}, "head": jnp.array([12.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(optaxclip.clip_scalars(state))
      {'gradient/norm': 13.0, 'gradient/norm/body': 5.0, 'gradient/norm/head': 12.0}
    """
    if of not in ("updates", "params"):
        raise ValueError(f"of must be 'updates' or 'params', got {of!r}. Use one of the two.")
    if depth is not None:
        check_count(depth, "depth")

    def label(path: str, leaf: Any) -> str:
        return "/".join(path.split("/")[:depth]) or "the root"

    by_prefix = Norm("group", ord=ord, labels=label, exclude=exclude)
    whole = Norm("global", ord=ord, exclude=exclude)

    def init_fn(params: Tree) -> WatchState:
        prefixes = by_prefix.groups(by_prefix.leaves(params)).names
        norms = PrefixNorms(prefixes, jnp.zeros(len(prefixes), jnp.float32))
        total = jnp.zeros((), jnp.float32)
        return WatchState(name or of, total, norms if prefixes else jnp.zeros((), jnp.float32))

    def update_fn(
        updates: Tree, state: WatchState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, WatchState]:
        del extra_args
        if of == "params" and params is None:
            raise ValueError(
                "a watcher of parameters needs params, got None. Call"
                " tx.update(grads, state, params)."
            )
        leaves = whole.leaves(params if of == "params" else updates)
        groups = by_prefix.groups(leaves)
        (total,) = whole.measure(leaves, whole.groups(leaves))
        (norms,) = by_prefix.measure(leaves, groups)
        found = PrefixNorms(groups.names, as_float32(norms)) if groups.size else state.by_prefix
        return updates, WatchState(state.name, as_float32(total[0]), found)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_scalars(
    opt_state: Tree, *, since: Mapping[str, float] | None = None
) -> dict[str, float | int | bool]:
    """Everything that clippers, guards and watchers in an optimizer state know, for any logger.

    One call, one transfer from the device, numbers of Python. It waits for the step.

    Args:
      opt_state: the state of an optimizer, or any tree that holds it; of Flax NNX too.
      since: what this function returned at an earlier step. `clip_rate` is then the share of steps
        clipped since: a moving average over the steps between two entries.

    Returns:
      By name, flat: of a clipper `NAME/FIELD` for the scalars of `ClipStats`, `NAME/clip_rate` (of
      all steps so far), `NAME/FIELD/GROUP` for each leaf, unit or label, `NAME/examples/FIELD`; of
      a guard `skip_outliers/FIELD`, by `of` too, and `.../first_nonfinite/LEAF` with the step, for
      leaves that ever were not finite; of a watcher `NAME/norm` and `NAME/norm/PREFIX`, or
      `NAME/noise_scale`, `NAME/noise`, `NAME/signal` and `NAME/noise_scale/LEAF`.

    Raises:
      ValueError: a state without its types, as for `clip_stats`.
      KeyError: `since` has no entry for a clipper of this state.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_leaf_norm(1.0)))
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> found = optaxclip.clip_scalars(state)
      >>> print(found["clip_by_leaf_norm/pre_clip_norm/w"], found["skip_nonfinite/skipped_count"])
      5.0 0
    """
    found: dict[str, Any] = {}
    for name, stats in clip_stats(opt_state).items():
        scalars = stats._asdict()
        groups, examples = scalars.pop("groups"), scalars.pop("examples")
        found |= {f"{name}/{field}": x for field, x in scalars.items()}
        if groups is not None:
            for field, xs in zip(groups._fields[1:], groups[1:], strict=True):
                found |= {f"{name}/{field}/{k}": (xs, i) for i, k in enumerate(groups.names)}
        if examples is not None:
            found |= {f"{name}/examples/{k}": x for k, x in examples._asdict().items()}
    _of_others(opt_state, found)
    arrays = jax.device_get({k: x[0] if isinstance(x, tuple) else x for k, x in found.items()})
    numbers = {
        k: (arrays[k][x[1]] if isinstance(x, tuple) else arrays[k]).item() for k, x in found.items()
    }
    for key in [k for k in numbers if k.endswith("/clipped_count")]:
        name = key.removesuffix("/clipped_count")
        steps = numbers.get(f"{name}/count")
        if steps is not None and numbers[key] >= 0:
            before = [0, 0] if since is None else [since[key], since[f"{name}/count"]]
            numbers[f"{name}/clip_rate"] = (numbers[key] - before[0]) / max(steps - before[1], 1)
    return {k: x for k, x in numbers.items() if "/first_nonfinite/" not in k or x >= 0}


def _of_others(tree: Tree, found: dict[str, Any]) -> None:
    """Adds what guards and watchers hold, the outer before the inner."""
    kinds = (*_GUARDS, WatchState, NoiseState)
    nodes: list[Any] = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds))
    for node in nodes:
        if isinstance(node, WatchState):
            own = _free(node.name, found)
            # Flax NNX wraps each array of a state in a variable, a node with one leaf.
            found[f"{own}/norm"], norms = jax.tree.leaves(node)
            found |= _named(f"{own}/norm", node.by_prefix, norms)
        elif isinstance(node, NoiseState):
            own = _free(node.name, found)
            found |= {f"{own}/{k}": x for k, x in node.whole.items()}
            found |= {f"{own}/noise_scale/{k}": x for k, x in node.by_leaf.items() if k != "global"}
        elif isinstance(node, SkipNonfiniteState | SkipOutliersState):
            own = _free(_GUARDS[type(node)], found)
            loss = getattr(node, "loss", None)
            for field in _OF_GUARDS:
                held: Any = getattr(node, field, ())
                several = isinstance(held, dict)
                by_name = {f"/{k}": x for k, x in held.items()} if several else {"": held}
                by_name["/loss"] = by_name.get("/loss", getattr(loss, field, ()))
                leaves = {k: jax.tree.leaves(x) for k, x in by_name.items()}
                found |= {f"{own}/{field}{k}": x[0] for k, x in leaves.items() if x}
            (steps,) = jax.tree.leaves(node.nonfinite)
            found |= _named(f"{own}/first_nonfinite", node.nonfinite, steps)
            _of_others(node.inner_state, found)


def _named(prefix: str, node: Any, numbers: jax.Array) -> dict[str, Any]:
    """Where each number of a node with names is; of a tree without leaves there is none."""
    names = node.names if isinstance(node, PrefixNorms | FirstNonfinite) else ()
    return {f"{prefix}/{name}": (numbers, i) for i, name in enumerate(names)}


def _free(name: str, found: Mapping[str, Any]) -> str:
    """The name, or `name_2` and so on where it is taken."""
    own, repeat = name, 2
    while any(key.startswith(f"{own}/") for key in found):
        own, repeat = f"{name}_{repeat}", repeat + 1
    return own


def raise_if_frozen(opt_state: Tree, *, eps: float = 1e-8, b2: float = 0.999) -> None:
    """Raises if a clipper makes gradients so short that Adam's `eps` swallows the updates.

    Adam divides by `sqrt(v) + eps`. Where the root of the second moment is below eps, the update is
    shorter than the learning rate, and far below it training stands still. For the host loop, now
    and then: it reads the second moments.

    Args:
      opt_state: a state with a clipper and `optax.adam` or one of its kind, in any order.
      eps: that of the optimizer, > 0.
      b2: that of the optimizer.

    Raises:
      FloatingPointError: more than half of the elements that ever had a gradient are below eps,
        and some clipper shortened the last gradient.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1e-9), optax.adam(1e-3))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> optaxclip.scalars.raise_if_frozen(state)
      Traceback (most recent call last):
      ...
      FloatingPointError: clipping froze training, got a second moment of Adam below eps=1e-08 ...
    """
    check_positive(eps, "eps")
    clippers = {k: float(s.clip_factor) for k, s in clip_stats(opt_state).items()}
    shortened = {k: factor for k, factor in clippers.items() if 0 <= factor < 1}
    for node in jax.tree.leaves(opt_state, is_leaf=_has_moments):
        if not _has_moments(node) or not shortened:
            continue
        (count,) = jax.tree.leaves(node.count)
        correction = 1 - b2 ** max(int(count), 1)
        roots = [np.sqrt(np.asarray(v, np.float64) / correction) for v in jax.tree.leaves(node.nu)]
        moved = sum(int(np.sum(r > 0)) for r in roots)
        below = sum(int(np.sum((r > 0) & (r < eps))) for r in roots)
        if below > moved / 2:
            name = min(shortened, key=lambda k: shortened[k])
            raise FloatingPointError(
                f"clipping froze training, got a second moment of Adam below eps={eps:g} in"
                f" {below / moved:.0%} of the elements; {name} multiplied the last gradient by"
                f" {shortened[name]:.2g}. Raise its bound, pass a smaller eps to Adam, or clip"
                " after Adam instead."
            )


def _has_moments(x: Any) -> bool:
    """Whether this is the state of Adam or of one of its kind."""
    return isinstance(x, tuple) and {"count", "nu"} <= set(getattr(x, "_fields", ()))
