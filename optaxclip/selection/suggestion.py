"""`suggest_threshold`: a threshold from the norms of a run."""

import warnings
from typing import Any

import numpy as np

from optaxclip._arguments import check_between


def suggest_threshold(norms: Any, *, target_clip_rate: float = 0.05) -> float:
    """The bound that would have clipped a given share of the steps of a run.

    The smallest of the recorded norms that at most `target_clip_rate` of them exceed.

    Args:
      norms: norms before clipping, of any shape: `clip_stats(...)[...].pre_clip_norm` step by
        step, of a run without clipping (a bound of `inf` measures and does not clip).
      target_clip_rate: from 0 (the largest norm) to below 1.

    Returns:
      The bound, a float.

    Raises:
      ValueError: no finite norm; a negative one; a rate out of range; a bound of 0, where that
        many steps had no gradient.

    Edge cases:
      Norms that are NaN or infinite are left out, with a warning that says how many: they come
      from steps that no bound would have mended (see `skip_nonfinite`).

    Example:
      >>> import optaxclip
      >>> print(optaxclip.suggest_threshold([1.0, 9.0, 2.0, 3.0], target_clip_rate=0.25))
      3.0
    """
    check_between(target_clip_rate, "target_clip_rate", 0.0, 1.0, last=False, example=0.05)
    recorded = np.asarray(norms, float).ravel()
    known = np.sort(recorded[np.isfinite(recorded)])
    if not known.size:
        raise ValueError(
            f"norms must hold a finite number, got {recorded.size} without one. Record"
            " clip_stats(opt_state)[...].pre_clip_norm at every step."
        )
    if known[0] < 0:
        raise ValueError(f"norms must be >= 0, got {known[0]}. Pass norms, not their logarithms.")
    if known.size < recorded.size:
        warnings.warn(
            f"{recorded.size - known.size} of {recorded.size} norms are not finite and were left"
            " out.",
            stacklevel=2,
        )
    above = int(target_clip_rate * known.size + 1e-9)  # 0.29 * 100 is just below 29
    bound = float(known[known.size - 1 - above])
    if bound == 0:
        raise ValueError(
            f"the bound would be 0, got {np.mean(known == 0):.0%} of norms that are. Record them"
            " where the gradient is not zero, or pass a smaller target_clip_rate."
        )
    return bound
