"""Guards: drop a whole step atomically, leaving parameters and optimizer state as they were."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._leaves import Tree
from optaxclip.norms import AxisName, Norm


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
    max_consecutive: int | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step whose gradient has a NaN or an infinity, whole.

    On such a step the updates are zeros and the state of `inner` (moments, schedules,
    clipping statistics) stays exactly as it was; only this guard's counters move.

    Args:
      inner: the optimizer to guard; put the guard outermost, so that weight decay and
        schedules are skipped too.
      max_consecutive: after this many skipped steps in a row `stuck` is set, for
        `raise_if_stuck` in the host loop. Steps go on being skipped. None: never.
      axis_name: mesh axes to decide over, as in `Norm`. Devices decide alike.

    Returns:
      A gradient transformation with a `SkipNonfiniteState`.

    Raises:
      ValueError: max_consecutive below 1.

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
    if max_consecutive is not None and max_consecutive < 1:
        raise ValueError(
            f"max_consecutive must be >= 1, got {max_consecutive}. Pass None never to give up."
        )
    inner = optax.with_extra_args_support(inner)
    norm = Norm(axis_name=axis_name)

    def init_fn(params: Tree) -> SkipNonfiniteState:
        zero = jnp.zeros((), jnp.int32)
        return SkipNonfiniteState(
            zero, jnp.zeros((), jnp.int32), jnp.zeros((), bool), inner.init(params)
        )

    def update_fn(
        updates: Tree, state: SkipNonfiniteState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, SkipNonfiniteState]:
        # A norm is finite exactly when every element is. XLA shares it with a clipper inside.
        leaves = norm.leaves(updates)
        finite = jnp.isfinite(norm.measure(leaves, norm.layout(leaves))[0])
        new_updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        nothing = jax.tree.map(jnp.zeros_like, new_updates)
        new_updates = _select(finite, new_updates, nothing)
        new_inner = _select(finite, new_inner, state.inner_state)
        consecutive = jnp.where(finite, 0, optax.safe_increment(state.consecutive_count))
        stuck = state.stuck
        if max_consecutive is not None:
            stuck = stuck | (consecutive >= max_consecutive)
        skipped = jnp.where(finite, state.skipped_count, optax.safe_increment(state.skipped_count))
        return new_updates, SkipNonfiniteState(skipped, consecutive, stuck, new_inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _select(pick_new: jax.Array, new: Tree, old: Tree) -> Tree:
    def select(n: Any, o: Any) -> Any:
        return n if n.dtype == jax.dtypes.float0 else jnp.where(pick_new, n, o)

    return jax.tree.map(select, new, old)


def raise_if_stuck(opt_state: Tree) -> None:
    """Raises if some guard in `opt_state` skipped `max_consecutive` steps in a row.

    For the host loop, outside jit, as often as you log: it waits for the state. A guard
    without `max_consecutive` never raises.

    Args:
      opt_state: the state of an optimizer with `skip_nonfinite` anywhere inside.

    Raises:
      FloatingPointError: with the number of steps skipped.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=1)
      >>> grads = {"w": jnp.array(jnp.inf)}
      >>> _, state = tx.update(grads, tx.init(grads), grads)
      >>> optaxclip.raise_if_stuck(state)
      Traceback (most recent call last):
      ...
      FloatingPointError: the gradient is not finite, got 1 steps skipped, 1 of them in a ...
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SkipNonfiniteState))
    for state in states:
        if isinstance(state, SkipNonfiniteState):
            raise_if_stuck(state.inner_state)
            # Flax NNX wraps each array of a state in a variable, a node with one leaf.
            skipped, consecutive, stuck = (jax.tree.leaves(x)[0] for x in state[:3])
            if bool(stuck):
                raise FloatingPointError(
                    f"the gradient is not finite, got {int(skipped)} steps skipped,"
                    f" {int(consecutive)} of them in a row. Look at the loss and the"
                    " data of these steps, lower the learning rate, or resume from a checkpoint."
                )
