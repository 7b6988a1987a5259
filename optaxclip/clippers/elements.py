"""The clippers of SPAM and Stable-SPAM: single elements, to bounds learned from their past.

They share the safeguards of `clippers.learned`, steered by `relearn_after` as there.
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
        typical size; with `relearn_after=None` the paper's 5000, which lets it pass as 71 times.
      decay: of the moving averages, in [0, 1).
      warmup: how many steps of a leaf its level starts from, >= 1. Static.
      relearn_after: >= warmup: steps in a row on which a leaf's largest element exceeds its bound,
        after which its level starts anew from the last `warmup` steps. `"auto"`: 25, or the
        warm-up if longer. None: the paper's rule. Static.
      nonfinite, axis_name, stats, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation. Its state is a float32 array like the parameters. Statistics count
      in bounds: `pre_clip_norm` is the largest `|g| / c` of any element, beside a `threshold` of 1.

    Raises:
      ValueError: an argument out of its range; updates unlike the tree `init` saw.

    Edge cases:
      | first step, then the warm-up | unbounded; twice the median of the leaf's largest so far |
      | zero throughout the warm-up | an element starts with the bound of the leaf's largest |
      | a spike, and the next one | at most `1.1 sqrt(theta)` times the root mean square |
      | a leaf's level changes for good | its bounds are there within `relearn_after` steps |
      | one element's level changes | its bound follows v, by at most a tenth a step upwards |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.spam_clip(decay=0.5, warmup=4)
      >>> state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
      >>> for scale in [1.0, 1.0, 1.0, 1.0, 100.0]:
      ...     updates, state = update(scale * jnp.array([1.0, 0.1]), state)
      >>> print(f"{updates[0]:.3f}")
      1.732

    Source: Huang et al. (SPAM), arXiv 2501.06842; what is different here: `docs/guide/sources.md`.
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

    Edge cases:
      | first step, then the warm-up | unbounded; twice the median of the leaf's largest so far |
      | a spike | passes as about the typical largest element, and so does the next one |
      | a leaf's level changes for good | its bound is there within `relearn_after` steps |
      | NaN, infinity, zero | not learned from: later steps are as they would have been without |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adaclip(warmup=4)
      >>> state, update = tx.init({"w": jnp.zeros(2)}), jax.jit(tx.update)
      >>> for scale in [1.0, 1.2, 0.8, 1.0, 100.0]:
      ...     updates, state = update({"w": scale * jnp.array([1.0, 0.001])}, state)
      >>> print(updates["w"])
      [1.  0.1]

    Source: Huang et al. (Stable-SPAM), arXiv 2502.17055v1, AdaClip. Different here: elements beyond
    c are set to c, not scaled alike; the present step does not count for itself; safeguards. See
    `docs/guide/sources.md`.
    """
    check_between(decay, "decay", 0, 1, last=False)
    relearn_after = relearn_after_of(relearn_after, 25, warmup)
    robust = relearn_after is not None
    threshold = Learned(MovingMean(decay, robust), warmup, relearn_after, ready=not robust)
    response = "rescale" if robust else ShrinkAlike()
    return clip_learned(by, threshold, nonfinite, axis_name, name or "adaclip", response)
