"""The named clippers whose bound is learned from past norms: a few lines each over `clip_by`.

They share one set of safeguards (`thresholds.Learned`), steered by `relearn_after`:

* Norms that are zero, NaN or infinite are never learned from.
* In the warm-up a norm is bounded by twice the median of those before it, and each norm counts
  for at most twice the median: one spike spoils nothing.
* Later a norm counts for at most twice its bound.
* After `relearn_after` steps in a row beyond the bound the level has changed for good: the rule
  starts anew from the latest norms.

`relearn_after=None` turns them off and leaves the published rule, except that norms which are
zero, NaN or infinite are still not learned from. All take `by=` (`"global"`, `"leaf"`, `"unit"`,
`"element"`: the largest element of each leaf; or a `Norm`, which then has the `axis_name`),
`nonfinite=`, `axis_name=` and `name=`, as `clip_by` and `Norm` do. The bound is a constant to
differentiation. State is kept in float32.
"""

from typing import Any, get_args

from optaxclip._arguments import (
    check_at_least,
    check_between,
    check_bound,
    check_count,
    check_positive,
)
from optaxclip.clipping import NonFinite, Transform, clip_by
from optaxclip.measure.norms import AxisName, By, Norm
from optaxclip.responses import Response
from optaxclip.thresholds.given import Threshold
from optaxclip.thresholds.learned import AtMost, Learned, RelearnAfter, relearn_after_of
from optaxclip.thresholds.rules import (
    MeanOverRoot,
    Mode,
    Percentile,
    Quantile,
    Ratio,
    WindowMoments,
    ZScore,
)


def autoclip(
    percentile: Any = 10.0,
    *,
    window: int = 1024,
    relearn_after: int | None = 150,
    by: By | Norm = "global",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips to a percentile of the past norms: `g * min(1, c / n)`, c the p-th percentile.

    Args:
      percentile: p from 0 to 100. The paper's 10 clips nine steps in ten: it is normalised
        descent with a learned length. 95 protects from spikes and leaves the rest alone.
      window: how many past norms count, >= 1; 8 bytes of state each. Static.
      relearn_after: steps in a row beyond the bound after which the window is emptied but for
        the last 25 norms. With p = 10 a steady run of 150 happens once in 10^7 steps; with
        p = 95, 25 is as safe. None: the paper's rule. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: percentile outside [0, 100], window < 1, relearn_after < 25.

    Edge cases:
      | first step | unbounded: nothing is known |
      | the next 24, a warm-up | at most twice the median norm so far |
      | a spike | passes as about the bound, and so does the next one |
      | a lasting change of level | the bound is there within `relearn_after` steps |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.autoclip(95.0)
      >>> state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
      >>> for norm in [1.0, 1.2, 0.9, 50.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state)
      >>> print(updates["w"])
      [2.]

    Source: Seetharaman et al. (AutoClip), arXiv 2007.14469, algorithm 1, which takes the percentile
    of all norms, the present one among them. Here: of a window, and the present one only with
    `relearn_after=None`; safeguards.
    """
    check_between(percentile, "percentile", 0, 100)
    check_count(window, "window")
    robust = relearn_after is not None
    rule = Percentile(percentile, window, robust)
    threshold = Learned(rule, 25 if robust else 1, relearn_after)
    return clip_learned(by, threshold, nonfinite, axis_name, name or "autoclip")


def zclip(
    z_threshold: Any = 2.5,
    *,
    decay: Any = 0.97,
    mode: Mode = "zscore",
    max_norm: Any = 1.0,
    warmup: int = 25,
    relearn_after: RelearnAfter = "auto",
    by: By | Norm = "global",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips norms that stand out from their moving average: `z = (n - mu) / sigma > k`.

    With mu and sigma the moving average and standard deviation of the norms, a norm with
    z > k is bounded by `mu + sigma k^2 / z` (`"zscore"`: the further out, the shorter), by mu
    (`"mean"`), or by `mu + k sigma` (`"percentile"`).

    Args:
      z_threshold, decay: k >= 0; the decay of the moving averages, in [0, 1).
      mode: what an outlier becomes, as above.
      max_norm: a bound that always holds too, >= 0: a number, traced scalar, schedule, or `inf`.
      warmup: how many norms the averages start from. Static.
      relearn_after: >= warmup: steps in a row beyond the bound of z after which the averages start
        anew from the last `warmup` norms. `"auto"`: 25, or the warm-up if longer. None: the
        paper's rule: after a lasting rise to three times the norm it clips for good. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: an argument out of its range; unknown mode.

    Edge cases:
      | first step, then the warm-up | bounded by `max_norm`; by twice the median norm so far too |
      | norms that do not vary | sigma is 1 % of mu (1e-6 with `relearn_after=None`) |
      | a spike, and the next one | as about mu (by `"percentile"` at most `mu + k sigma`) |
      | a lasting change of level | the bound is there within `relearn_after` steps |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.zclip(warmup=4)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [0.1, 0.12, 0.09, 0.11, 5.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates.round(3))
      [0.105]

    Source: Kumar et al. (ZClip), arXiv 2504.02507, equations 4 to 8, and the authors' code for
    `"mean"` and `"percentile"`. Different here: safeguards, and the relative floor of sigma.
    """
    check_bound(z_threshold, "z_threshold", schedule=False)
    check_bound(max_norm, "max_norm")
    check_between(decay, "decay", 0, 1, last=False)
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode, got {mode!r}. Use one of {get_args(Mode)}.")
    relearn_after = relearn_after_of(relearn_after, 25, warmup)
    rule = ZScore(z_threshold, decay, mode, relearn_after is not None)
    threshold = AtMost(Learned(rule, warmup, relearn_after), max_norm)
    return clip_learned(by, threshold, nonfinite, axis_name, name or "zclip")


def adagc(
    ratio: Any = 1.05,
    *,
    decay: Any = 0.98,
    max_norm: Any = 1.0,
    warmup: int = 100,
    relearn_after: RelearnAfter = "auto",
    by: By | Norm = "leaf",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips each leaf to a multiple of the moving average of its clipped norm.

    After the warm-up, leaf by leaf, `c = ratio * gamma` and
    `gamma = decay * gamma + (1 - decay) * min(n, c)`.

    Args:
      ratio: >= 0; 1.05 clips about four steps in ten at 10 % noise.
      decay: of the moving average, in [0, 1).
      max_norm: the bound on all leaves together in the warm-up, >= 0; a number or an array.
      warmup: how many norms gamma starts from. Static.
      relearn_after: >= warmup: steps in a row beyond the bound after which gamma starts anew
        from the last `warmup` norms. `"auto"`: 100, or the warm-up if that is longer. None: the
        paper's rule, by which the bound grows 0.1 % a step. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: an argument out of its range.

    Edge cases:
      | warm-up | all leaves together to `max_norm`, and each to twice its median so far |
      | a leaf with a zero gradient at first | has its warm-up when it wakes |
      | a spike | passes as at most `ratio * gamma` |
      | a lasting change of a leaf's level | its bound is there within `relearn_after` steps |
      | NaN, infinity, zero | a leaf does not learn from them: later steps are as without them |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adagc(warmup=3)
      >>> state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
      >>> for norm in [0.1, 0.12, 0.08, 5.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state)
      >>> print(updates["w"].round(3))
      [0.105]

    Source: Wang et al. (AdaGC), arXiv 2502.11034, algorithm 1. Different here: safeguards, and
    gamma starts from the mean of the warm-up, not its smallest norm (`relearn_after=None`: that).
    """
    check_bound(ratio, "ratio", schedule=False)
    check_bound(max_norm, "max_norm", schedule=False)
    check_between(decay, "decay", 0, 1, last=False)
    relearn_after = relearn_after_of(relearn_after, 100, warmup)
    rule = Ratio(ratio, decay, max_norm, relearn_after is not None)
    threshold = Learned(rule, warmup, relearn_after)
    return clip_learned(by, threshold, nonfinite, axis_name, name or "adagc")


def clip_by_history(
    num_stds: Any = 3.0,
    *,
    window: int = 128,
    relearn_after: RelearnAfter = "auto",
    by: By | Norm = "global",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips to `mean + k max(std, floor)` of the last norms, taken before they are clipped.

    Args:
      num_stds: k >= 0.
      window: how many past norms count, >= 2; the warm-up is the first half. Static.
      relearn_after: >= window // 2: steps in a row beyond the bound after which the window is
        emptied but for the last `window // 2` norms. `"auto"`: 64, or `window // 2` if that is
        more. None: the published rule. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: an argument out of its range.

    Edge cases:
      | first step | unbounded: nothing is known |
      | warm-up | at most twice the median norm so far |
      | norms that do not vary | std is 1 % of their mean (1e-6 with `relearn_after=None`) |
      | a lasting change of level | the bound is there within `relearn_after` steps |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_history(window=8)
      >>> state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
      >>> for norm in [1.0, 1.2, 0.8, 1.0, 50.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state)
      >>> print(updates["w"].round(3))
      [1.424]

    Source: Levanter, `optim/clip_update_norm.py`, for updates (chain it after
    `scale_by_adam` to do as there). Different here: safeguards, and the floor.
    """
    check_bound(num_stds, "num_stds", schedule=False)
    check_count(window, "window", least=2)
    relearn_after = relearn_after_of(relearn_after, 64, window // 2)
    rule = WindowMoments(num_stds, window, relearn_after is not None)
    threshold = Learned(rule, window // 2, relearn_after)
    return clip_learned(by, threshold, nonfinite, axis_name, name or "clip_by_history")


def clip_by_quantile(
    quantile: Any = 0.95,
    *,
    step_size: Any = 0.05,
    init: Any = None,
    relearn_after: int | None = 25,
    by: By | Norm = "global",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips to a bound that finds a quantile by itself: `C <- C exp(-eta (1[n <= C] - q))`.

    Args:
      quantile: q in [0, 1]: the share of steps to leave alone.
      step_size: eta > 0. A larger one follows the level sooner and wavers more.
      init: the first C, > 0. None: the quantile of a warm-up of 25 norms.
      relearn_after: >= 25: steps in a row beyond the bound after which C is the quantile of
        the last 25 norms. None: the published rule. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation. Its state, besides 25 norms, is one number.

    Raises:
      ValueError: an argument out of its range.

    Edge cases:
      | first step | without `init` unbounded: nothing is known |
      | the next 24, a warm-up | without `init` at most twice the median norm so far |
      | q = 0, q = 1 | the bound only falls, only rises, but for learning anew |
      | a lasting change of level | the bound is there within `relearn_after` steps |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_quantile(0.5, step_size=0.2, init=1.0)
      >>> state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
      >>> for norm in [3.0, 3.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state)
      >>> print(updates["w"].round(3))
      [1.105]

    Source: Andrew, Thakkar, McMahan, Ramaswamy, arXiv 1905.03871, the geometric update of
    algorithm 1, there for the norms of users in one round, here for one norm a step.
    """
    check_between(quantile, "quantile", 0, 1)
    check_positive(step_size, "step_size")
    if init is not None:
        check_positive(init, "init")
    rule = Quantile(quantile, step_size, init)
    threshold = Learned(rule, 25, relearn_after, ready=init is not None)
    return clip_learned(by, threshold, nonfinite, axis_name, name or "clip_by_quantile")


def gradient_stabilizer(
    decay: Any = 0.7,
    *,
    sq_decay: Any = 0.9,
    eps: Any = 1e-8,
    outlier: Any = 2.0,
    by: By | Norm = "leaf",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Keeps each leaf's direction and makes its length `m / (sqrt(v) + eps)`, about 1.

    m and v are bias-corrected moving averages of the leaf's norm n and of n^2, the present step
    included. The gradient becomes `g / n * m / (sqrt(v) + eps)`: its length has no unit and is at
    most 1.41 with the default decays, so put Adam or a learning rate of its own behind it.

    Args:
      decay, sq_decay: of m and v, in [0, 1).
      eps: >= 0, in the unit of the norm.
      outlier: >= 1: a norm counts in m and v for at most this many times the m before it.
        `float("inf")`: the published rule. After a spike of a thousand times it makes the next
        hundred gradients too short, a hundredth of their length at worst.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation. Its `threshold` is the length that results; `clipped_count` counts
      the steps with n beyond it, and so depends on the unit of the loss.

    Raises:
      ValueError: an argument out of its range.

    Edge cases:
      | first step | length `n / (n + eps)` |
      | a spike after steady norms | comes out with length 1.14 (0.95 with `outlier=inf`) |
      | a lasting rise | the next twenty gradients are up to 1.41 long |
      | a lasting fall, a spike on the first step | the next gradients are too short until v |
      | | forgets: of a thousand times, some 140 of them, of length 0.004 at worst |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.gradient_stabilizer()
      >>> state, update = tx.init({"w": jnp.zeros(1)}), jax.jit(tx.update)
      >>> for norm in [0.1, 0.12, 0.08, 5.0]:
      ...     updates, state = update({"w": jnp.array([norm])}, state)
      >>> print(updates["w"].round(3))
      [1.006]

    Source: Huang et al. (GradientStabilizer), arXiv 2502.17055; the form is that of the authors'
    code for AdaGN. Different here: `outlier`, and norms of zero are not learned from.
    """
    check_between(decay, "decay", 0, 1, last=False)
    check_between(sq_decay, "sq_decay", 0, 1, last=False)
    check_bound(eps, "eps", schedule=False)
    check_at_least(outlier, "outlier", 1)
    rule = MeanOverRoot(decay, sq_decay, eps, outlier)
    threshold = Learned(rule, 1, None, ready=True)
    name = name or "gradient_stabilizer"
    return clip_learned(by, threshold, nonfinite, axis_name, name, "normalize")


def clip_learned(
    by: By | Norm,
    threshold: Threshold,
    nonfinite: NonFinite,
    axis_name: AxisName,
    name: str,
    response: str | Response = "rescale",
) -> Transform:
    """`clip_by`, where `by` may be a whole `Norm`."""
    if isinstance(by, Norm) and axis_name is not None:
        raise ValueError(
            f"axis_name is part of a Norm, got axis_name={axis_name!r} beside one. Pass it inside:"
            " by=Norm(..., axis_name=...)."
        )
    norm = by if isinstance(by, Norm) else Norm(by, axis_name=axis_name)
    return clip_by(norm, threshold, response, nonfinite=nonfinite, name=name)
