"""What is asked of the functions, inputs and labels of `measures`."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Tree

Fun = Callable[[Tree, jax.Array], jax.Array]
Bounds = tuple[Any, Any] | None


def known(*values: Any) -> bool:
    """Whether they are there to be looked at, and not traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in values)


def inputs_of(x: Any) -> jax.Array:
    """x as an array [B, ...]; raises unless it is one of floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be floating point, got dtype {x.dtype}. Convert it; perturb the embeddings of"
            " integers."
        )
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"x must be [B, ...] with B >= 1, got shape {x.shape}. Pass a batch.")
    return x


def labels_of(fun: Fun, params: Tree, x: jax.Array, y: Any) -> jax.Array:
    """y as an array [B]; raises unless `fun` is a classifier of x and y labels for it."""
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"y must be integers, got dtype {y.dtype}. Pass class indices.")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"y must be [B] for inputs [B, ...], got shapes {y.shape} and {x.shape}. Pass one"
            " label per example."
        )
    shape = check_outputs(fun, params, x).shape
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"fun must return logits [B, K] with K >= 2, got shape {shape}. A single logit z is"
            " jnp.stack([0 * z, z], axis=-1)."
        )
    if known(y) and not np.all((np.asarray(y) >= 0) & (np.asarray(y) < shape[1])):
        raise ValueError(
            f"labels must lie in [0, {shape[1]}), got {np.min(y)} to {np.max(y)}. Number the"
            " classes from 0."
        )
    return y


def check_outputs(fun: Fun, params: Tree, x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of the outputs; raises unless they are one array [B, ...]."""
    found = jax.eval_shape(fun, params, x)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise ValueError(
            f"fun must return one array [B, ...], got {jax.tree.structure(found)}. Return the"
            " logits alone."
        )
    if found.shape[:1] != x.shape[:1] or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"fun must return floating point [B, ...] for inputs [B, ...], got {found.dtype}"
            f" {found.shape} for {x.shape}. jax.vmap(fun, (None, 0)) makes a function of a batch of"
            " one of an example."
        )
    return found


def check_norm(norm: Any) -> None:
    """Raises unless it is 2 or inf."""
    if not isinstance(norm, numbers.Real) or norm not in (2, math.inf):
        raise ValueError(f"norm must be 2 or inf, got {norm!r}. Pass 2 or float('inf').")


def check_radius(value: Any, argument: str = "radius", *, zero: bool = True) -> None:
    """Raises unless it is a finite length: a number, or a scalar array, which is looked at if it
    is not traced."""
    if isinstance(value, bool) or not isinstance(
        value, float | int | np.generic | jax.Array | np.ndarray
    ):
        raise TypeError(
            f"{argument} must be a number or a scalar array, got {value!r}. Pass for example 0.1."
        )
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"{argument} must be a scalar, got shape {jnp.shape(value)}. Use jax.vmap for several."
        )
    if known(value) and not (0 < float(value) < math.inf or (zero and float(value) == 0)):
        raise ValueError(
            f"{argument} must be finite and {'>=' if zero else '>'} 0, got {value}. Pass for"
            " example 0.1."
        )


def box_of(bounds: Any, x: jax.Array) -> Bounds:
    """The bounds as arrays; raises unless x lies within them."""
    if bounds is None:
        return None
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"clip_to must be (lowest, highest), got {bounds!r}. Pass (0.0, 1.0).")
    low, high = (jnp.asarray(b, x.dtype) for b in bounds)
    for bound in (low, high):
        if not _broadcasts(bound.shape, x.shape[1:]):
            raise ValueError(
                f"clip_to must broadcast to one example, got shape {bound.shape} for examples"
                f" {x.shape[1:]}. Pass numbers, or one bound per feature."
            )
    if known(low, high, x) and not bool(jnp.all((low <= x) & (x <= high))):
        raise ValueError(
            f"x must lie within clip_to, got values from {jnp.min(x)} to {jnp.max(x)}. Pass the"
            " bounds of the inputs as fun takes them."
        )
    return low, high


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in sizes)
