"""Bounds for guards: what is far beyond the last norms or values, and is not learned from."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._arguments import check_at_least, check_between, check_bound, check_count, narrowed
from optaxclip._leaves import Tree
from optaxclip._numerics import UNKNOWN, as_float32, once_compiled
from optaxclip.measure.norms import Norm
from optaxclip.thresholds.given import Context, Threshold
from optaxclip.thresholds.learned import Learned, RelearnAfter, Rule, push, relearn_after_of
from optaxclip.thresholds.rules import Percentile, WindowMoments


def mean_plus_std(
    num_stds: Any = 6.0, *, window: int = 128, relearn_after: RelearnAfter = "auto"
) -> Threshold:
    """`mean + k std` of the last norms that were no outliers, for `skip_outliers`.

    The deviation is at least 1 % of the mean (1e-6 with `relearn_after=None`).

    Args:
      num_stds: k >= 0.
      window: how many past norms count, >= 1; the first half are a warm-up. Static.
      relearn_after: >= window // 2: after so many steps in a row beyond the bound the norm has
        changed for good, and the bound is learned anew from the last `window // 2` norms.
        `"auto"`: 64, or `window // 2` if that is more. None: never. Static.

    Returns:
      A `Threshold`. In the warm-up it is twice the median norm so far (with `relearn_after`; else
      the largest float). A norm beyond it is never learned from.

    Raises:
      ValueError: an argument out of its range.

    Example:
      >>> import optax, optaxclip
      >>> from optaxclip.thresholds import mean_plus_std
      >>> tx = optaxclip.skip_outliers(optax.adam(1e-3), mean_plus_std(4.0, window=64))

    Source: the window of 128 and 6 std is that of OLMo's and Levanter's skip-step optimizers,
    which look at the loss too and learn from outliers.
    """
    check_bound(num_stds, "num_stds", schedule=False)
    return _learned(lambda robust: WindowMoments(num_stds, window, robust), window, relearn_after)


def multiple_of_quantile(
    quantile: Any = 0.99,
    *,
    factor: Any = 2.0,
    window: int = 128,
    relearn_after: RelearnAfter = "auto",
) -> Threshold:
    """A multiple of the q-th quantile of the last norms that were no outliers.

    Args:
      quantile: q in [0, 1].
      factor: >= 1: the bound is `factor` times the quantile, beyond which a share 1 - q of ordinary
        steps lies.
      window, relearn_after: as for `mean_plus_std`.

    Returns:
      A `Threshold`, for `skip_outliers`.

    Raises:
      ValueError: an argument out of its range.

    Example:
      >>> import optax, optaxclip
      >>> from optaxclip.thresholds import multiple_of_quantile
      >>> tx = optaxclip.skip_outliers(optax.adam(1e-3), multiple_of_quantile(0.9))
    """
    check_between(quantile, "quantile", 0, 1)
    check_at_least(factor, "factor", 1)
    return _learned(
        lambda robust: Percentile(100 * quantile, window, True, factor), window, relearn_after
    )


def _learned(rule: Any, window: int, relearn_after: RelearnAfter) -> Threshold:
    check_count(window, "window")
    warmup = max(window // 2, 1)
    relearn_after = relearn_after_of(relearn_after, 64, warmup)
    made: Rule = rule(relearn_after is not None)
    return Learned(made, warmup, relearn_after, outliers_count=False)


Published = Literal["olmo-core", "maxtext", "levanter"]


def mean_plus_std_of_values(
    num_stds: Any = 6.0, *, window: int = 128, relearn_after: int | None = 64
) -> Threshold:
    """`mean + k std` of the last values that were no outliers: of losses, which may be negative.

    Args:
      num_stds: k >= 0.
      window: how many past values count, >= 2; no bound before half of it is known. Static.
      relearn_after: after so many steps in a row beyond the bound it is learned anew, from the
        values that come. None: never. Static.

    Returns:
      A `Threshold`, for `skip_outliers(of="loss")`. A value beyond it is never learned from; the
      least spread is 1e-6.

    Raises:
      ValueError: an argument out of its range.

    Example:
      >>> import optax, optaxclip
      >>> from optaxclip.thresholds import mean_plus_std_of_values
      >>> tx = optaxclip.skip_outliers(optax.adam(1e-3), mean_plus_std_of_values(4.0), of="loss")
    """
    check_bound(num_stds, "num_stds", schedule=False)
    check_count(window, "window", least=2)
    if relearn_after is not None:
        check_count(relearn_after, "relearn_after")
    least = max(2, window // 2)
    return narrowed(RollingMoments(num_stds, window, least, 0, 1e-6, False, relearn_after))


def as_published(which: Published, num_stds: Any = 6.0, *, window: int = 128) -> Threshold:
    """The rule of a published skip-step optimizer, to the letter, of norms and values alike.

    `mean + k std` of the last `window` numbers, outliers included. `"olmo-core"` and `"maxtext"`:
    with the unbiased deviation, from half a window on. `"levanter"`: with the biased one, but at
    least 1e-6, of `window + 1` numbers, one step later.

    Args:
      which: whose.
      num_stds: k >= 0.
      window: >= 2. Static.

    Returns:
      A `Threshold`, for `skip_outliers(of=("gradient", "loss"))`. Different here: a number that is
      NaN or infinite is never learned from, where it would block a window of steps.

    Raises:
      ValueError: an unknown name; an argument out of its range.

    Example:
      >>> import optax, optaxclip
      >>> from optaxclip.thresholds import as_published
      >>> rule = as_published("olmo-core")
      >>> tx = optaxclip.skip_outliers(optax.adam(1e-3), rule, of=("gradient", "loss"))

    Source: `SkipStepOptimizer` of OLMo-core (c757b7c; before, it took `|n - mean|`),
    `skip_step_on_spikes` of MaxText, `SkipStepConfig` of Levanter.
    """
    if which not in get_args(Published):
        raise ValueError(f"unknown rule, got {which!r}. Use one of {get_args(Published)}.")
    check_bound(num_stds, "num_stds", schedule=False)
    check_count(window, "window", least=2)
    least = max(2, window // 2)
    if which == "levanter":
        return narrowed(RollingMoments(num_stds, window + 1, least, 0, 1e-6, True, None))
    return narrowed(RollingMoments(num_stds, window, least - 1, 1, 0.0, True, None))


class RollingState(NamedTuple):
    """State of `RollingMoments`."""

    recent: jax.Array
    """The last numbers, oldest first, [window, size]; the largest float where none."""
    streak: jax.Array
    """Steps in a row beyond the bound, [size], int32."""


@dataclasses.dataclass(frozen=True)
class RollingMoments:
    """`mean + k max(std, floor)` of a window of numbers of any sign, once `least` are known."""

    num_stds: Any
    window: int
    least: int
    ddof: int
    """What is subtracted from the number of values in the variance's denominator."""
    floor: float
    outliers_count: bool
    relearn_after: int | None

    def init(self, norm: Norm, params: Tree) -> RollingState:
        size = norm.groups(norm.leaves(params)).size
        empty = jnp.full((self.window, size), UNKNOWN, jnp.float32)
        return RollingState(empty, jnp.zeros(size, jnp.int32))

    def bound(
        self, norms: jax.Array, state: RollingState, context: Context
    ) -> tuple[jax.Array, RollingState]:
        del context
        bounds, state = _rolled(norms, state, threshold=self)
        return bounds.astype(norms.dtype), state

    def _step(self, n: jax.Array, state: RollingState) -> tuple[jax.Array, RollingState]:
        n = lax.stop_gradient(as_float32(n))
        known = state.recent < UNKNOWN
        count = jnp.sum(known, axis=0).astype(n.dtype)
        mean = jnp.sum(jnp.where(known, state.recent, 0.0), axis=0) / jnp.maximum(count, 1)
        deviation = jnp.where(known, state.recent - mean[None], 0.0)
        total = jnp.sum(jnp.square(deviation), axis=0)
        std = jnp.sqrt(total / jnp.maximum(count - self.ddof, 1))
        bounds = mean + self.num_stds * jnp.maximum(std, self.floor)
        bounds = jnp.where(count >= self.least, jnp.minimum(bounds, UNKNOWN), UNKNOWN)
        beyond = n > bounds
        counted = jnp.isfinite(n) if self.outliers_count else jnp.isfinite(n) & ~beyond
        recent = jnp.where(counted[None], push(state.recent, n), state.recent)
        streak = jnp.where(beyond, state.streak + 1, 0)
        if self.relearn_after is not None:
            again = streak >= self.relearn_after
            recent = jnp.where(again[None], UNKNOWN, recent)
            streak = jnp.where(again, 0, streak)
        return bounds, RollingState(recent, streak)


@once_compiled
def _rolled(
    norms: jax.Array, state: RollingState, *, threshold: RollingMoments
) -> tuple[jax.Array, RollingState]:
    return threshold._step(norms, state)
