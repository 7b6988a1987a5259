"""Error feedback: what a clipper cut off is given back on later steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._arguments import check_transform
from optaxclip._leaves import Leaves, Tree
from optaxclip._numerics import accumulator, once_compiled, rounded


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`."""

    carry: Tree
    """What has been cut off so far: an array like each leaf, in float32 at least."""
    inner_state: Tree
    """The clipper's."""


def error_feedback(
    clipper: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Clips without bias in the long run: what is cut off is added to the next gradient.

    With D the carry, which starts at zero: `h = g + D`, `u = clip(h)`, `D = h - u`. So all updates
    and the carry add up to the sum of all gradients, but for rounding.

    Args:
      clipper: any clipper, alone: not an optimizer, whose steps are no part of the gradient.

    Returns:
      A gradient transformation with an `ErrorFeedbackState`; `clip_stats` finds the clipper's
      statistics, which are about h. The carry takes an array like the parameters.

    Raises:
      ValueError: updates unlike the tree `init` saw.

    Edge cases:
      | every gradient exceeds the bound | D grows without end: take c above the mean gradient |
      | a spike, clipped by norm | is paid back over many steps: against bad batches use a guard |
      | NaN, infinity in h or u | D stays as it was there; u is the clipper's affair |
      | bf16, float16 | D is float32 |
      | integer, float0, None, empty leaves | pass through |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.error_feedback(optaxclip.clip_by_value(1.0))
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for g in [3.0, 0.0, -0.5]:
      ...     updates, state = tx.update({"w": jnp.array([g, 0.1])}, state)
      ...     print(updates["w"], state.carry["w"])
      [1.  0.1] [2. 0.]
      [1.  0.1] [1. 0.]
      [0.5 0.1] [0. 0.]

    Source: Elesedy and Hutter (U-Clip), arXiv 2302.02971. Different here: what is not finite is
    not carried.
    """
    check_transform(clipper, "clipper")
    clipper = optax.with_extra_args_support(clipper)

    def init_fn(params: Tree) -> ErrorFeedbackState:
        leaves = Leaves.of(params)
        carry = [jnp.zeros_like(x, _wide(x)) for x in leaves.arrays]  # split as they are
        return ErrorFeedbackState(leaves.alone(carry), clipper.init(params))

    def update_fn(
        updates: Tree, state: ErrorFeedbackState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ErrorFeedbackState]:
        leaves = Leaves.of(updates)
        carry = leaves.check_like(state.carry)
        wide, sums = _with_carry(leaves.arrays, carry)
        clipped, inner = clipper.update(
            leaves.replace(sums), state.inner_state, params, **extra_args
        )
        new_carry = _rest(wide, Leaves.of(clipped).arrays, carry)
        return clipped, ErrorFeedbackState(leaves.alone(new_carry), inner)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@once_compiled
def _with_carry(arrays: list[jax.Array], carry: list[jax.Array]) -> Any:
    """The sums, in the carry's dtype and in that of the leaves."""
    wide = [x.astype(d.dtype) + d for x, d in zip(arrays, carry, strict=True)]
    return wide, [rounded(h, x.dtype) for h, x in zip(wide, arrays, strict=True)]


@once_compiled
def _rest(wide: list[jax.Array], taken: list[jax.Array], carry: list[jax.Array]) -> list[jax.Array]:
    """What was cut off, or the carry where that is not finite."""

    def one(h: jax.Array, u: jax.Array, d: jax.Array) -> jax.Array:
        kept = h - u.astype(h.dtype)
        return jnp.where(jnp.isfinite(kept), kept, d)

    return [one(*hud) for hud in zip(wide, taken, carry, strict=True)]


def _wide(x: jax.Array) -> Any:
    return x.dtype if jnp.iscomplexobj(x) else accumulator(x.dtype)
