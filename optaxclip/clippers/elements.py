"""The clippers of SPAM and Stable-SPAM: single elements, to bounds learned from their past.

They share the safeguards of `adaptive`, steered by `relearn_after` as there.
"""

from typing import Any

from optaxclip._arguments import check_between, check_bound, narrowed
from optaxclip.clippers.learned import clip_learned
from optaxclip.clipping import NonFinite, Transform, clip_by
from optaxclip.measure.norms import AxisName, By, Norm
from optaxclip.responses import ShrinkAlike
from optaxclip.thresholds.elements import SecondMoments, Shares
from optaxclip.thresholds.learned import Learned, RelearnAfter, relearn_after_of
from optaxclip.thresholds.rules import MovingMean


def spam_clip(
    theta: Any = None,
    *,
    decay: Any = 0.999,
    warmup: int = 25,
    relearn_after: RelearnAfter = "auto",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    stats: bool = True,
    name: str | None = None,
) -> Transform:
    """Clips each element to a multiple of its own typical size: `|g| <= sqrt(theta v)`.

    v is the moving average of `g^2`, element by element, kept as the product of two: of the
    square of the leaf's largest element n, and of `(g / n)^2`, the element's share.

    Args:
      theta: >= 0: how far g^2 may exceed v. None: 3, which lets a spike pass as 1.7 times the
        typical size; with `relearn_after=None` the paper's 5000, which lets it pass as 71 times,
        so that it is meant for spikes of a thousand times.
      decay: of the moving averages, in [0, 1).
      warmup: how many steps of a leaf its level starts from, >= 1. Static.
      relearn_after: >= warmup: steps in a row on which a leaf's largest element exceeds its
        bound, after which its level starts anew from the last `warmup` steps. `"auto"`: 25, or
        the warm-up if that is longer. None: the paper's rule. Static.
      nonfinite, axis_name, name: as in `clip_by` and `Norm`.
      stats: as in `clip_by_value`. With Adam a step takes 2.05 times as
        long as Adam alone, with False 1.86 (25 leaves of 1024x1024, 2 CPU cores).

    Returns:
      A gradient transformation. Its state is one float32 array like the parameters (and
      `2 warmup + 3` numbers a leaf, with the safeguards). Its statistics count in bounds:
      `pre_clip_norm` is the largest `|g| / c` of any element, beside a `threshold` of 1.

    Raises:
      ValueError: an argument out of its range; updates unlike the tree `init` saw.

    Guarantees:
      After a lasting change of a leaf's level its bounds are at the new level within
      `relearn_after` steps; those of an element that changes alone follow by the moving average,
      by at most a tenth a step. A spike passes as at most `1.1 sqrt(theta)` times the root mean
      square, and so does the next one. NaN, infinite and zero gradients leave later steps as they
      would have been without.

    Edge cases:
      In the warm-up no element may exceed twice the median of its leaf's largest; the first
      step is unbounded. An element that was zero throughout the warm-up of its leaf has the
      bound of the leaf's largest, and comes to its own by the moving average.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.spam_clip(decay=0.5, warmup=4)
      >>> state, update = tx.init({"w": jnp.zeros(2)}), jax.jit(tx.update)
      >>> for scale in [1.0, 1.0, 1.0, 1.0, 100.0]:
      ...     updates, state = update({"w": scale * jnp.array([1.0, 0.1])}, state)
      >>> print(f"{updates['w'][0]:.3f}")
      1.732

    Source: Huang et al. (SPAM), arXiv 2501.06842. With `relearn_after=None` v is one average,
    which takes the clipped gradient and does not hold the present step, as there; the first
    `warmup` steps are unbounded, and an element whose v is 0, which there would be held at 0, is
    left alone. SPAM clips by Adam's own v and resets it with the momentum; here v is kept by the
    clipper and not reset. Different by default: theta; the safeguards; v as a product of averages,
    which takes the gradient as it came; the element's share holds the present step, rises
    by at most a tenth a step, and starts from 1 (as if on one step before the first all elements
    had been as large as the largest); and zeros do not count.
    """
    relearn_after = relearn_after_of(relearn_after, 25, warmup)
    if theta is None:
        theta = 5000.0 if relearn_after is None else 3.0
    check_bound(theta, "theta", schedule=False)
    check_between(decay, "decay", 0, 1, last=False)
    if relearn_after is None:
        threshold: Any = narrowed(SecondMoments(theta, decay, warmup))
    else:
        threshold = narrowed(Shares(theta, decay, warmup, relearn_after))
    norm = Norm("element", axis_name=axis_name)
    return clip_by(norm, threshold, nonfinite=nonfinite, stats=stats, name=name or "spam_clip")


def adaclip(
    decay: Any = 0.999,
    *,
    warmup: int = 25,
    relearn_after: RelearnAfter = "auto",
    by: By | Norm = "element",
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Clips each element to the moving average of its leaf's largest element.

    `g_i -> sign(g_i) min(|g_i|, c)`, with c the moving average of `max |g|` over steps.

    Args:
      decay: of the moving average, in [0, 1).
      warmup: how many steps of a leaf the average starts from, >= 1. Static.
      relearn_after: >= warmup: steps in a row beyond the bound after which the average starts
        anew from the last `warmup` steps. `"auto"`: 25, or the warm-up if that is longer. None:
        the paper's rule. Static.
      by, nonfinite, axis_name, name: as in `clip_by` and `Norm`. By `"leaf"`, leaves are scaled
        to the moving average of their norm.

    Returns:
      A gradient transformation. Steady steps have some element beyond the bound every other
      time, by a little.

    Raises:
      ValueError: an argument out of its range.

    Guarantees:
      After a lasting change of a leaf's level its bound is at the new level within
      `relearn_after` steps. A spike passes as about the typical largest element, and so does the
      next one. NaN, infinite and zero gradients leave later steps as they would have been without
      them.

    Edge cases:
      In the warm-up no element may exceed twice the median of its leaf's largest; the first
      step is unbounded.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adaclip(warmup=4)
      >>> state, update = tx.init({"w": jnp.zeros(2)}), jax.jit(tx.update)
      >>> for scale in [1.0, 1.2, 0.8, 1.0, 100.0]:
      ...     updates, state = update({"w": scale * jnp.array([1.0, 0.001])}, state)
      >>> print(updates["w"])
      [1.  0.1]

    Source: Huang et al. (Stable-SPAM), arXiv 2502.17055v1, AdaClip. With `relearn_after=None` the
    average holds the present step and is corrected for its start from zero, as there, and
    elements beyond c are multiplied by `c / max |g|`, as there: only the largest lands on c, one
    a little beyond c falls far below it. Different by default: such elements are all set to c;
    the present step does not count for itself; and the safeguards.
    """
    check_between(decay, "decay", 0, 1, last=False)
    relearn_after = relearn_after_of(relearn_after, 25, warmup)
    robust = relearn_after is not None
    threshold = Learned(MovingMean(decay, robust), warmup, relearn_after, ready=not robust)
    response = "rescale" if robust else ShrinkAlike()
    return clip_learned(by, threshold, nonfinite, axis_name, name or "adaclip", response)
