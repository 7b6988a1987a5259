"""From norms of the parts that devices hold to norms of the whole, in one collective."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from optaxclip._compat import varying_axes
from optaxclip._leaves import Leaves, Tree, path_name, place
from optaxclip.measure.reductions import power, vanishing

Axes = tuple[str, ...]
"""Names of axes of a mesh."""


def over_mesh(
    parts: dict[Axes, dict[int, jax.Array]],
    order: Any,
    shapes: Sequence[tuple[int, ...]],
    dtype: Any,
) -> list[jax.Array]:
    """Norms of parts, by the mesh axes they are split over and by slot -> norms, slot by slot.

    Each part is in range already; only scalars travel. Of what is whole on some axis, one device
    along it speaks for all, so that one collective does for leaves split in different ways.
    """
    every = tuple(sorted({axis for axes in parts for axis in axes}))
    vectors = {
        axes: jnp.concatenate(
            [
                part[slot].reshape(-1) if slot in part else jnp.zeros(math.prod(shape), dtype)
                for slot, shape in enumerate(shapes)
            ]
        )
        for axes, part in parts.items()
    }

    def all_reduce(pack: Callable, collective: Callable, join: Callable) -> jax.Array:
        packed = [_spoken_for(pack(v), axes, every) for axes, v in vectors.items()]
        return collective(functools.reduce(join, packed), every)

    def largest() -> jax.Array:
        """The maximum, with what `pmax` would lose: where there is NaN."""

        def pack(v: jax.Array) -> jax.Array:
            return jnp.stack([jnp.nan_to_num(v, posinf=jnp.inf), jnp.isnan(v).astype(dtype)])

        size, is_nan = all_reduce(pack, lax.pmax, jnp.maximum)
        return jnp.where(is_nan > 0, jnp.nan, size)

    if order == math.inf:
        norms = largest()
    elif order in (1, 2, "rms"):
        term, root = power(1 if order == 1 else 2, 1)
        scales = _scales(dtype)
        # Norms are >= 0. Without `maximum`, XLA makes v^2 scale^2 of it, which is inf * 0.
        sums = all_reduce(lambda v: term(jnp.maximum(v * scales[:, None], 0.0)), lax.psum, jnp.add)
        norms = _best(sums, scales, root)
    else:
        term, root = power(order, 1)
        unit = largest()
        unit = lax.stop_gradient(jnp.where((unit > 0) & (unit < jnp.inf), unit, 1.0))
        norms = unit * root(all_reduce(lambda v: term(v / unit), lax.psum, jnp.add))
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    pieces = jnp.split(norms, ends)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def check_reduced(updates: Leaves, params: Tree) -> None:
    """Raises where a gradient varies over a mesh axis that its parameter does not vary over."""
    varying = list(map(varying_axes, updates.arrays))
    if params is None or not any(varying):
        return
    of_params = {
        path_name(key_path): varying_axes(x)
        for key_path, x in jax.tree.leaves_with_path(params)
        if hasattr(x, "dtype")
    }
    for path, axes in zip(updates.paths, varying, strict=True):
        extra = tuple(axis for axis in axes if axis not in of_params.get(path, axes))
        if extra:
            raise ValueError(
                f"a gradient must vary over the mesh axes of its parameter, got {place(path)}"
                f" varying over {extra}, where the parameter is the same on all devices. Reduce it"
                f" before it is clipped: jax.lax.pmean(grads, {extra}), or psum for a sum."
            )


def placed(part: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    """The part of an array that a device holds in its place in the whole, zero elsewhere."""
    if part.shape == shape:
        return part
    starts = [
        lax.axis_index(_names(entry)) * d if d < whole else 0
        for entry, d, whole in zip(_padded(spec, part.ndim), part.shape, shape, strict=True)
    ]
    return lax.dynamic_update_slice(jnp.zeros(shape, part.dtype), part, starts)


def axes_of(spec: P) -> Axes:
    """The mesh axes that a leaf is split over."""
    return tuple(sorted(name for entry in spec for name in _names(entry)))


def _names(entry: Any) -> Axes:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _padded(spec: P, ndim: int) -> list[Any]:
    return [*spec, *[None] * (ndim - len(spec))]


def _spoken_for(x: jax.Array, axes: Axes, every: Axes) -> jax.Array:
    """`x` on one device along each axis it is whole on, zero on the others."""
    whole = [lax.axis_index(axis) == 0 for axis in every if axis not in axes]
    return jnp.where(functools.reduce(jnp.logical_and, whole), x, 0) if whole else x


def _scales(dtype: Any) -> np.ndarray:
    """1, and two powers of two that bring the square of any finite number into range."""
    low, high = (-560, 540) if dtype == jnp.float64 else (-80, 64)
    return np.asarray([1.0, 2.0**low, 2.0**high], dtype)


def _best(sums: jax.Array, scales: np.ndarray, root: Callable) -> jax.Array:
    """The norm from its sums at three scales: the unscaled one unless that left its range."""
    small, big = vanishing(sums[0]), jnp.isinf(sums[0])
    total = jnp.where(small, sums[2], jnp.where(big, sums[1], sums[0]))
    norm = root(total)
    scaled = norm / jnp.where(small, scales[2], jnp.where(big, scales[1], scales[0]))
    largest = jnp.finfo(norm.dtype).max
    return jnp.where(jnp.isfinite(norm), jnp.minimum(scaled, largest), norm)
