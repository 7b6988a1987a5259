"""Bounds for guards: a norm far beyond the last ones is an outlier, and is not learned from."""

from typing import Any

from optaxclip._arguments import check_at_least, check_between, check_bound, check_count
from optaxclip.thresholds.given import Threshold
from optaxclip.thresholds.learned import Learned, RelearnAfter, Rule, relearn_after_of
from optaxclip.thresholds.rules import Percentile, WindowMoments


def mean_plus_std(
    num_stds: Any = 6.0, *, window: int = 128, relearn_after: RelearnAfter = "auto"
) -> Threshold:
    """`mean + k std` of the last norms that were no outliers, for `skip_outliers`.

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
      factor: >= 1; without it every (1 - q)-th step would be beyond the bound.
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
