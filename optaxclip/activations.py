"""Gradients of activations, clipped where they pass in the backward pass."""

import operator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_bound
from optaxclip._leaves import Leaves, place
from optaxclip.clipping import clip_by
from optaxclip.measure.norms import L2, Norm
from optaxclip.responses import Response, as_response
from optaxclip.thresholds.given import Threshold

_Tree = TypeVar("_Tree")


def clip_backward(
    x: _Tree,
    max_norm: Any,
    *,
    axes: int | tuple[int, ...] | None = None,
    response: str | Response = "rescale",
    ord: Any = L2,
) -> _Tree:
    """The identity, but the gradient that comes back through it is clipped.

    With g the gradient by the output, that by x is `factor(n, c) * g`, n the norm of g.

    Args:
      x: an array, or a tree of arrays such as the state of a simulator.
      max_norm: c >= 0: a number, a scalar array (traced too), or a `Threshold` without memory:
        `thresholds.LargestBut(4)` with `response="drop"` removes the four largest.
      axes: what one norm spans. None: all of x; an int or a tuple: these axes of each array, so
        that -1 clips each token of [batch, time, width]; (): each element by itself.
      response, ord: as in `clip_by` and `Norm`. Static.

    Returns:
      x, bit for bit. Its gradient keeps its dtypes; norms are taken in float32.

    Raises:
      ValueError: max_norm negative, NaN, or not a scalar; a threshold that learns; axes an array
        lacks; unknown parts.
      TypeError: a leaf that is no array; axes that are no integers.

    Edge cases:
      | under `jax.vmap` | each example has a norm of its own |
      | in a scan | each step's gradient is clipped, before it reaches the step in front |
      | the result is used twice | what comes back from both uses is added up, then clipped |
      | in `per_example_grad` | exact; if x is itself a parameter, its gradients are stacked |
      | inside `jax.shard_map` | the norm of what the device holds: nothing is communicated |
      | zero, NaN, infinity | as in `clip_by` |
      | integer, float0, None and empty leaves | pass through |
      | `jax.jvp`, `jax.jacfwd` | raise: clipping is not linear, so there is no forward mode |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> loss = lambda x: jnp.sum(optaxclip.clip_backward(x, 1.0, axes=-1) ** 2)
      >>> print(jax.grad(loss)(jnp.array([[3.0, 4.0], [0.1, 0.2]])))
      [[0.6 0.8]
       [0.2 0.4]]

    Source: Graves, arXiv 1308.0850, section 2.1, by element; the k largest tokens: axlearn.
    """
    norm = _norm(Leaves.of(x), axes, ord)
    as_response(response)
    threshold = max_norm if isinstance(max_norm, Threshold) else None
    if threshold is None:
        check_bound(max_norm, "max_norm", schedule=False)
        if jnp.ndim(max_norm):
            raise ValueError(
                f"max_norm must be a scalar, got shape {jnp.shape(max_norm)}. Call clip_backward on"
                " each part with its own."
            )
    elif jax.tree.leaves(threshold.init(norm, x)):
        raise ValueError(
            f"a backward pass has no state for a bound to be learned in, got"
            f" {type(threshold).__name__}. Pass a number, or LargestBut(k)."
        )

    @jax.custom_vjp
    def identity(x: _Tree, bound: Any) -> _Tree:
        return x

    def backward(bound: Any, gradient: Any) -> tuple[Any, None]:
        limit = bound if threshold is None else threshold
        tx = clip_by(norm, limit, response, stats=norm.by != "element")
        return tx.update(gradient, tx.init(gradient))[0], None

    identity.defvjp(lambda x, bound: (x, bound), backward)
    return identity(x, jnp.zeros(()) if threshold is not None else jnp.asarray(max_norm))


def _norm(leaves: Leaves, axes: Any, ord: Any) -> Norm:
    """Of what one device holds."""
    if axes is None:
        return Norm("global", ord, axis_name=())
    try:
        spanned = tuple(map(operator.index, axes if isinstance(axes, tuple | list) else (axes,)))
    except TypeError:
        raise TypeError(
            f"axes must be an int, a tuple of ints or None, got {axes!r}. Pass for example -1."
        ) from None
    for path, x in leaves.named:
        if not all(-x.ndim <= a < x.ndim for a in spanned):
            raise ValueError(
                f"axes must be axes of each array, got {axes!r} for shape {x.shape} at"
                f" {place(path)}. Clip arrays of other ranks by themselves, or pass None for one"
                " norm of all."
            )
    if not spanned:
        return Norm("element", ord, axis_name=())
    return Norm("unit", ord, unit_axes=spanned, axis_name=())
