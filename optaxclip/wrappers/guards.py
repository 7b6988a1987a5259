"""Guards: drop a whole step atomically, leaving parameters and optimizer state as they were."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip._numerics import as_float32, once_compiled
from optaxclip.measure.norms import By, Norm
from optaxclip.measure.statistics import worst
from optaxclip.thresholds.given import Context, as_threshold, non_negative
from optaxclip.thresholds.outliers import mean_plus_std


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: its counters and the wrapped optimizer's state."""

    skipped_count: jax.Array
    """Steps skipped, int32."""
    consecutive_count: jax.Array
    """Steps skipped in a row up to now, int32."""
    stuck: jax.Array
    """Whether `max_consecutive` was ever reached, bool; see `raise_if_stuck`."""
    inner_state: Tree


def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    norm: By | Norm = "global",
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step whose gradient has a NaN or an infinity, whole.

    On such a step the updates are zeros and the state of `inner` (moments, schedules,
    clipping statistics) stays exactly as it was; only this guard's counters move.

    Args:
      inner: the optimizer to guard; put the guard outermost, so that weight decay and
        schedules are skipped too.
      norm: a `Norm`, for its `exclude=` (a frozen part that is NaN, say) and its `axis_name=`.
      max_consecutive: after this many skipped steps in a row `stuck` is set, for
        `raise_if_stuck` in the host loop. Steps go on being skipped. None: never. Static.

    Returns:
      A gradient transformation with a `SkipNonfiniteState`.

    Raises:
      ValueError: max_consecutive below 1.
      TypeError: max_consecutive is no whole number, or is traced.

    Guarantees:
      Nothing is multiplied by zero, so nothing of the bad step survives. Steps without
      NaN or infinity equal those of `inner` bit for bit. Structure, shapes and dtypes of
      the state never change.

    Edge cases:
      Integer, float0 and None leaves are not looked at. Around `optax.MultiSteps` the guard
      skips single micro-batches; inside, whole accumulated gradients.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.adam(1e-3), max_consecutive=10)
      >>> params = {"w": jnp.ones(2)}
      >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
      >>> print(updates["w"], state.skipped_count)
      [0. 0.] 1
    """
    if max_consecutive is not None:
        check_count(max_consecutive, "max_consecutive")
    inner = optax.with_extra_args_support(inner)
    measured = norm if isinstance(norm, Norm) else Norm(norm)

    def init_fn(params: Tree) -> SkipNonfiniteState:
        # Each counter is a buffer of its own, for all of them may be donated.
        return SkipNonfiniteState(
            skipped_count=jnp.zeros((), jnp.int32),
            consecutive_count=jnp.zeros((), jnp.int32),
            stuck=jnp.zeros((), bool),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: Tree, state: SkipNonfiniteState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, SkipNonfiniteState]:
        # A norm is finite exactly when every element is. XLA shares it with a clipper inside.
        leaves = measured.leaves(updates)
        norms = measured.measure(leaves, measured.groups(leaves))
        finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(n)) for n in norms])
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        nothing = jax.tree.map(jnp.zeros_like, new_updates)
        new_updates = _select(finite, new_updates, nothing)
        new_inner = _select(finite, new_inner, state.inner_state)
        skipped, consecutive, stuck = _count(finite, *state[:3], max_consecutive=max_consecutive)
        return new_updates, SkipNonfiniteState(skipped, consecutive, stuck, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SkipOutliersState(NamedTuple):
    """State of `skip_outliers`: its counters, the wrapped optimizer's state, what it measured."""

    skipped_count: jax.Array
    """Steps skipped, int32."""
    consecutive_count: jax.Array
    """Steps skipped in a row up to now, int32."""
    stuck: jax.Array
    """Whether `max_consecutive` was ever reached, bool; see `raise_if_stuck`."""
    inner_state: Tree
    seen_count: jax.Array
    """Steps seen, skipped ones too, int32."""
    norm: jax.Array
    """The last gradient's norm, float32."""
    threshold: jax.Array
    """What it was held to, float32; the largest float while nothing is known."""
    threshold_state: Tree


def skip_outliers(
    inner: optax.GradientTransformation,
    threshold: Any = None,
    *,
    norm: By | Norm = "global",
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step whose gradient is far longer than usual, whole.

    A step happens if `n <= c`, with n the norm and c its bound. Otherwise updates are zeros and the
    state of `inner` (moments, schedules, clipping statistics) stays exactly as it was.

    Args:
      inner: the optimizer to guard; put the guard outermost.
      threshold: c: a number >= 0, a traced scalar, a schedule of the steps seen, or a `Threshold`
        such as `thresholds.mean_plus_std()`, which None stands for, or
        `thresholds.multiple_of_quantile()`.
      norm: a `Norm`, or its `by`. Of several norms each must be within its bound. `exclude=`
        leaves a part out.
      max_consecutive: after this many skipped steps in a row `stuck` is set, for
        `raise_if_stuck` in the host loop. None: never. Static.

    Returns:
      A gradient transformation with a `SkipOutliersState`.

    Raises:
      ValueError: a threshold that is negative or NaN; max_consecutive below 1.

    Guarantees:
      Nothing is multiplied by zero, so nothing of a skipped step survives. A gradient with a
      NaN or an infinity is skipped, whatever the threshold.

    Edge cases:
      The first finite gradient passes where the bound is learned.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_outliers(optax.sgd(1.0))
      >>> params = {"w": jnp.ones(1)}
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for norm in [1.0, 1.1, 0.9, 50.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state, params)
      >>> print(updates["w"], state.skipped_count)
      [0.] 1
    """
    limit = as_threshold(mean_plus_std() if threshold is None else threshold)
    if max_consecutive is not None:
        check_count(max_consecutive, "max_consecutive")
    inner = optax.with_extra_args_support(inner)
    measured = norm if isinstance(norm, Norm) else Norm(norm)

    def init_fn(params: Tree) -> SkipOutliersState:
        # Each scalar is a buffer of its own, for all of them may be donated.
        return SkipOutliersState(
            skipped_count=jnp.zeros((), jnp.int32),
            consecutive_count=jnp.zeros((), jnp.int32),
            stuck=jnp.zeros((), bool),
            inner_state=inner.init(params),
            seen_count=jnp.zeros((), jnp.int32),
            norm=jnp.zeros((), jnp.float32),
            threshold=jnp.zeros((), jnp.float32),
            threshold_state=limit.init(measured, params),
        )

    def update_fn(
        updates: Tree, state: SkipOutliersState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, SkipOutliersState]:
        leaves = measured.leaves(updates)
        groups = measured.groups(leaves)
        norms = measured.measure(leaves, groups)
        context = Context(state.seen_count, measured, groups, leaves, params, extra_args)
        found, threshold_state = limit.bound(groups.vector(norms), state.threshold_state, context)
        n, c, beyond = worst(norms, non_negative(groups.blocks_of(found)))
        usual = jnp.isfinite(n) & ~beyond
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        new_updates = _select(usual, new_updates, jax.tree.map(jnp.zeros_like, new_updates))
        skipped, consecutive, stuck = _count(usual, *state[:3], max_consecutive=max_consecutive)
        return new_updates, SkipOutliersState(
            skipped,
            consecutive,
            stuck,
            _select(usual, new_inner, state.inner_state),
            optax.safe_increment(state.seen_count),
            as_float32(n),
            as_float32(c),
            threshold_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@once_compiled
def _count(
    happened: jax.Array,
    skipped: jax.Array,
    consecutive: jax.Array,
    stuck: jax.Array,
    *,
    max_consecutive: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The counters after a step that happened or was skipped."""
    consecutive = jnp.where(happened, 0, optax.safe_increment(consecutive))
    if max_consecutive is not None:
        stuck = stuck | (consecutive >= max_consecutive)
    skipped = jnp.where(happened, skipped, optax.safe_increment(skipped))
    return skipped, consecutive, stuck


@once_compiled
def _select(pick_new: jax.Array, new: Tree, old: Tree) -> Tree:
    def select(n: Any, o: Any) -> Any:
        return n if n.dtype == jax.dtypes.float0 else jnp.where(pick_new, n, o)

    return jax.tree.map(select, new, old)


def raise_if_stuck(opt_state: Tree) -> None:
    """Raises if some guard in `opt_state` ever skipped `max_consecutive` steps in a row.

    For the host loop, outside jit, as often as you log: it waits for the state. However late, it
    raises, and goes on raising after a recovery. A guard without `max_consecutive` never raises.

    Args:
      opt_state: the state of an optimizer with a guard anywhere inside.

    Raises:
      FloatingPointError: with the number of steps skipped in all, and in a row up to now.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
      >>> grads = {"w": jnp.array(jnp.inf)}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> optaxclip.raise_if_stuck(state)
      Traceback (most recent call last):
      ...
      FloatingPointError: a guard skipped max_consecutive steps in a row because the ...
    """
    guards = (SkipNonfiniteState, SkipOutliersState)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, guards)):
        if isinstance(state, guards):
            raise_if_stuck(state.inner_state)
            # Flax NNX wraps each array of a state in a variable, a node with one leaf.
            skipped, consecutive, stuck = (jax.tree.leaves(x)[0] for x in state[:3])
            if bool(stuck):
                outlier = "an outlier or " if isinstance(state, SkipOutliersState) else ""
                raise FloatingPointError(
                    "a guard skipped max_consecutive steps in a row because the gradient was"
                    f" {outlier}not finite, got {int(skipped)} steps skipped in all,"
                    f" {int(consecutive)} in a row up to now. Look at the loss and the data of"
                    " these steps, lower the learning rate, or resume from a checkpoint."
                )
