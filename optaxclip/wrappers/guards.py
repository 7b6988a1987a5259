"""Guards: drop a whole step atomically, leaving parameters and optimizer state as they were."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._arguments import check_count, check_opt_state, check_transform
from optaxclip._leaves import Tree
from optaxclip._numerics import as_float32, once_compiled
from optaxclip.measure.norms import By, Norm
from optaxclip.thresholds.outliers import mean_plus_std, mean_plus_std_of_values
from optaxclip.wrappers.watched import FirstNonfinite, Watched, first_steps

_NAMES = 5


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`: its counters and the wrapped optimizer's state."""

    skipped_count: jax.Array
    """Steps skipped, int32."""
    consecutive_count: jax.Array
    """Steps skipped in a row up to now, int32."""
    stuck: jax.Array
    """Whether `max_consecutive` was ever reached, bool; see `raise_if_stuck`."""
    inner_state: Tree
    seen_count: jax.Array
    """Steps seen, skipped ones too, int32."""
    nonfinite: FirstNonfinite
    """Which leaf was not finite, and when first."""


def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    of: str | tuple[str, ...] | None = None,
    norm: By | Norm = "global",
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips, as a whole, every step whose gradient or loss has a NaN or an infinity.

    On such a step the updates are zeros and the state of `inner` (moments, schedules,
    clipping statistics) stays exactly as it was; only this guard's counters move.

    Args:
      inner: the optimizer to guard; put the guard outermost, so that weight decay and
        schedules are skipped too.
      of: what has to be finite, as for `skip_outliers`, such as `("gradient", "update", "loss")`.
        None: the gradient, and the loss wherever one is passed as `update(..., loss=loss)`.
      norm: a `Norm`, for its `exclude=` (a frozen part that is NaN, say) and its `axis_name=`.
      max_consecutive: after this many skipped steps in a row `stuck` is set, for
        `raise_if_stuck` in the host loop. Steps go on being skipped. None: never. Static.

    Returns:
      A gradient transformation with a `SkipNonfiniteState`.

    Raises:
      ValueError: max_consecutive below 1; a value named in `of` that was not passed, or is no real
        scalar.
      TypeError: max_consecutive is no whole number, or is traced; `of` is no name or tuple of
        names.

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
    check_transform(inner, "inner")
    inner = optax.with_extra_args_support(inner)
    watched = Watched.make(of, norm)

    def init_fn(params: Tree) -> SkipNonfiniteState:
        # Each counter is a buffer of its own, for all of them may be donated.
        return SkipNonfiniteState(
            skipped_count=jnp.zeros((), jnp.int32),
            consecutive_count=jnp.zeros((), jnp.int32),
            stuck=jnp.zeros((), bool),
            inner_state=inner.init(params),
            seen_count=jnp.zeros((), jnp.int32),
            nonfinite=watched.never(params),
        )

    def update_fn(
        updates: Tree, state: SkipNonfiniteState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, SkipNonfiniteState]:
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        seen = watched.look(updates, new_updates, extra_args)
        nonfinite, finite = first_steps(state.nonfinite, watched.finite(seen), state.seen_count)
        skipped, consecutive, stuck = _count(finite, *state[:3], max_consecutive=max_consecutive)
        return _select(finite, new_updates, None), SkipNonfiniteState(
            skipped,
            consecutive,
            stuck,
            _select(finite, new_inner, state.inner_state),
            optax.safe_increment(state.seen_count),
            nonfinite,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class LossState(NamedTuple):
    """What `skip_outliers` with `of=None` knows of the loss; a step without one changes nothing."""

    seen_count: jax.Array
    """Steps that were given a loss, int32."""
    norm: jax.Array
    """The last loss, float32."""
    threshold: jax.Array
    """What it was held to, float32; the largest float while nothing is known."""
    threshold_state: Tree
    beyond_count: jax.Array
    """Steps on which it was beyond that, or not finite, int32."""


class SkipOutliersState(NamedTuple):
    """State of `skip_outliers`: its counters, the wrapped optimizer's state, what it measured.

    What is measured is one number, that of the gradient if `of` is None; where `of` is a tuple, a
    dict by its names.
    """

    skipped_count: jax.Array
    """Steps skipped, int32."""
    consecutive_count: jax.Array
    """Steps skipped in a row up to now, int32."""
    stuck: jax.Array
    """Whether `max_consecutive` was ever reached, bool; see `raise_if_stuck`."""
    inner_state: Tree
    seen_count: jax.Array
    """Steps seen, skipped ones too, int32."""
    norm: Any
    """The last norm, or value, float32."""
    threshold: Any
    """What it was held to, float32; the largest float while nothing is known."""
    threshold_state: Tree
    beyond_count: Any
    """Steps on which it was beyond that, or not finite, int32."""
    nonfinite: FirstNonfinite
    """Which leaf was not finite, and when first."""
    loss: LossState | None
    """The same of the loss, if `of` is None."""


def skip_outliers(
    inner: optax.GradientTransformation,
    threshold: Any = None,
    *,
    of: str | tuple[str, ...] | None = None,
    norm: By | Norm = "global",
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips, as a whole, every step whose gradient, update or loss is far from usual.

    A step happens if `n <= c` for each n that is measured. Otherwise updates are zeros and the
    state of `inner` (moments, schedules, clipping statistics) stays exactly as it was.

    Args:
      inner: the optimizer to guard; put the guard outermost.
      threshold: c: a number, a traced scalar, a schedule of the steps seen, or a `Threshold`;
        or a dict of these by the names in `of`. None: `thresholds.mean_plus_std()` for norms,
        `thresholds.mean_plus_std_of_values()` for values.
      of: what is measured: `"gradient"`, `"update"` (which `inner` made), the name of a real scalar
        that is passed to `update`, such as `"loss"`, or a tuple of these. None: the gradient, and
        the loss wherever one is passed; a threshold that is no dict by name is the gradient's,
        and the loss need only be finite.
      norm: a `Norm`, or its `by`, of gradient and update. Of several norms each must be within its
        bound. `exclude=` leaves a part out.
      max_consecutive: after this many skipped steps in a row `stuck` is set, for
        `raise_if_stuck` in the host loop. None: never. Static.

    Returns:
      A gradient transformation with a `SkipOutliersState`.

    Raises:
      ValueError: a threshold that is NaN, or negative for a norm; a dict with other names than
        `of`; max_consecutive below 1; a value that was not passed, or is no real scalar.
      TypeError: a threshold that is no number; `of` is no name or tuple of names.

    Guarantees:
      Nothing of a skipped step survives. What is NaN or infinite is skipped, whatever the
      threshold. Devices whose losses differ take their mean, and skip alike.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_outliers(optax.sgd(1.0))
      >>> params = {"w": jnp.ones(1)}
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for loss in [*64 * [1.0, 1.1], 50.0]:
      ...     updates, state = update({"w": jnp.ones(1)}, state, params, loss=loss)
      >>> print(updates["w"], state.loss.beyond_count, state.beyond_count)
      [0.] 1 0
    """
    if max_consecutive is not None:
        check_count(max_consecutive, "max_consecutive")
    check_transform(inner, "inner")
    inner = optax.with_extra_args_support(inner)
    watched = Watched.make(of, norm)
    limits = watched.limits(threshold, {False: mean_plus_std(), True: mean_plus_std_of_values()})

    def init_fn(params: Tree) -> SkipOutliersState:
        # Each scalar is a buffer of its own, for all of them may be donated.
        def each(dtype: Any) -> dict[str, jax.Array]:
            return {name: jnp.zeros((), dtype) for name in watched.names}

        memories = watched.init(limits, params)
        of_each = each(jnp.float32), each(jnp.float32), memories, each(jnp.int32)
        number, bound, memory, beyond_count = map(watched.only, of_each)
        return SkipOutliersState(
            skipped_count=jnp.zeros((), jnp.int32),
            consecutive_count=jnp.zeros((), jnp.int32),
            stuck=jnp.zeros((), bool),
            inner_state=inner.init(params),
            seen_count=jnp.zeros((), jnp.int32),
            norm=number,
            threshold=bound,
            threshold_state=memory,
            beyond_count=beyond_count,
            nonfinite=watched.never(params),
            loss=LossState(jnp.zeros((), jnp.int32), *map(watched.aside, of_each))
            if of is None
            else None,
        )

    def update_fn(
        updates: Tree, state: SkipOutliersState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, SkipOutliersState]:
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        seen = watched.look(updates, new_updates, extra_args)
        loss = state.loss
        before = watched.each(state.threshold_state, loss and loss.threshold_state)
        counts = watched.each(state.beyond_count, loss and loss.beyond_count)
        measured, bounds, within, memories = {}, {}, {}, {}
        for name, x in seen.items():
            measured[name], bounds[name], within[name], memories[name] = x.judged(
                limits[name], before[name], state.seen_count, params, extra_args
            )
        nonfinite, finite = first_steps(state.nonfinite, watched.finite(seen), state.seen_count)
        usual, beyond = _usual(finite, measured, within, {name: counts[name] for name in seen})
        skipped, consecutive, stuck = _count(usual, *state[:3], max_consecutive=max_consecutive)
        norms, bounds = jax.tree.map(as_float32, (measured, bounds))
        of_each = norms, bounds, memories, beyond
        if loss is not None and watched.aside(norms) is not None:
            seen_count = optax.safe_increment(loss.seen_count)
            loss = LossState(seen_count, *map(watched.aside, of_each))
        number, bound, memory, beyond_count = map(watched.only, of_each)
        return _select(usual, new_updates, None), SkipOutliersState(
            skipped,
            consecutive,
            stuck,
            _select(usual, new_inner, state.inner_state),
            optax.safe_increment(state.seen_count),
            number,
            bound,
            memory,
            beyond_count,
            nonfinite,
            loss,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@once_compiled
def _usual(finite: jax.Array, measured: Any, within: Any, beyond: Any) -> tuple[jax.Array, Any]:
    """Whether the step happens, and how often each number was beyond its bound."""
    passed = {name: within[name] & jnp.isfinite(n) for name, n in measured.items()}
    counts = {
        name: jnp.where(ok, beyond[name], optax.safe_increment(beyond[name]))
        for name, ok in passed.items()
    }
    return jnp.all(jnp.stack([finite, *passed.values()])), counts


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
def _select(happened: jax.Array, new: Tree, old: Tree | None) -> Tree:
    """The new tree, or where the step is skipped the old one; None: zeros."""

    def select(n: Any, o: Any = None) -> Any:
        if n.dtype == jax.dtypes.float0:
            return n
        return jnp.where(happened, n, jnp.zeros_like(n) if o is None else o)

    return jax.tree.map(select, new) if old is None else jax.tree.map(select, new, old)


def raise_if_stuck(opt_state: Tree) -> None:
    """Raises if some guard in `opt_state` ever skipped `max_consecutive` steps in a row.

    For the host loop, outside jit, as often as you log: it waits for the state. However late, it
    raises, and goes on raising after a recovery. A guard without `max_consecutive` never raises.

    Args:
      opt_state: the state of an optimizer with a guard anywhere inside.

    Raises:
      FloatingPointError: with the number of steps skipped in all, and in a row up to now; which
        leaves were not finite, and on which step first, counted from 0; how often each number that
        is measured was beyond its bound.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
      >>> grads = {"w": jnp.array(jnp.inf)}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> optaxclip.raise_if_stuck(state)
      Traceback (most recent call last):
      ...
      FloatingPointError: a guard skipped max_consecutive steps in a row because what ...
    """
    check_opt_state(opt_state)
    guards = (SkipNonfiniteState, SkipOutliersState)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, guards)):
        if isinstance(state, guards):
            raise_if_stuck(state.inner_state)
            # Flax NNX wraps each array of a state in a variable, a node with one leaf.
            skipped, consecutive, stuck = (jax.tree.leaves(x)[0] for x in state[:3])
            if bool(stuck):
                outlier = "an outlier or " if isinstance(state, SkipOutliersState) else ""
                raise FloatingPointError(
                    "a guard skipped max_consecutive steps in a row because what it looks at was"
                    f" {outlier}not finite, got {int(skipped)} steps skipped in all,"
                    f" {int(consecutive)} in a row up to now{_reasons(state)}. Look at the loss"
                    " and the data of these steps, lower the learning rate, or resume from a"
                    " checkpoint."
                )


def _reasons(state: SkipNonfiniteState | SkipOutliersState) -> str:
    """What was how often beyond its bound; what was not finite and when first, in that order."""
    reasons = ""
    if isinstance(state, SkipOutliersState):
        counts = state.beyond_count
        named = counts.items() if isinstance(counts, dict) else [("", counts)]
        if state.loss is not None and int(jax.tree.leaves(state.loss.seen_count)[0]):
            named = [("gradient", counts), ("loss", state.loss.beyond_count)]
        numbers = [f"{name} {int(jax.tree.leaves(x)[0])}".strip() for name, x in named]
        reasons = f"; steps beyond the bound: {', '.join(numbers)}"
    if not isinstance(state.nonfinite, FirstNonfinite):
        return reasons
    (steps,) = jax.tree.leaves(state.nonfinite)
    found = sorted(
        (int(step), name)
        for name, step in zip(state.nonfinite.names, np.asarray(steps), strict=True)
        if step >= 0
    )
    first = [f"{name} (step {step})" for step, name in found[:_NAMES]]
    more = len(found) - _NAMES
    first += [f"{more} more"] if more > 0 else []
    return reasons + (f"; first not finite: {', '.join(first)}" if first else "")
