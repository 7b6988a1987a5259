"""From the sums of each device's parts to those of whole leaves, in one collective."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from optaxclip._compat import varying_axes
from optaxclip._leaves import Leaves, Tree, leaves_with_path, path_name, place
from optaxclip.measure.reductions import Kind

Axes = tuple[str, ...]
"""Names of axes of a mesh."""


def over_mesh(parts: dict[Axes, jax.Array], kind: Kind) -> jax.Array:
    """The sums, or maxima, of whole leaves from those of each device's parts, [scales, numbers].

    `parts` are by the mesh axes that the leaves are split over. Along any other axis the first
    device alone contributes, so that one collective does for leaves split in different ways.
    """
    every = tuple(sorted({axis for axes in parts for axis in axes}))
    joined = functools.reduce(kind.join, [_spoken_for(x, a, every) for a, x in parts.items()])
    return kind.collective(joined, every) if every else joined


def check_reduced(updates: Leaves, params: Tree) -> None:
    """Raises where a gradient varies over a mesh axis that its parameter does not vary over."""
    varying = list(map(varying_axes, updates.arrays))
    if params is None or not any(varying):
        return
    of_params = {
        path_name(key_path): varying_axes(x)
        for key_path, x in leaves_with_path(params)
        if hasattr(x, "dtype")
    }
    for path, axes in zip(updates.paths, varying, strict=True):
        extra = tuple(axis for axis in axes if axis not in of_params.get(path, axes))
        if extra:
            raise ValueError(
                f"a gradient must vary over the mesh axes of its parameter, got {place(path)}"
                f" varying over {extra}, where the parameter is the same on all devices. Reduce it"
                f" before it is clipped: jax.lax.pmean(grads, {extra}), or psum for a sum. If each"
                " device shall hold a part of it (reduce-scatter), pass the same part of the"
                " parameters, or none."
            )


def placed(part: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    """The part of an array that a device holds in its place in the whole, zero elsewhere."""
    if part.shape == shape:
        return part
    starts = _starts(part.shape, shape, spec)
    return lax.dynamic_update_slice(jnp.zeros(shape, part.dtype), part, starts)


def part_of(whole: jax.Array, shape: tuple[int, ...], spec: P) -> jax.Array:
    """The part of an array that a device holds; of a scalar the scalar."""
    if not whole.ndim or whole.shape == shape:
        return whole
    return lax.dynamic_slice(whole, _starts(shape, whole.shape, spec), shape)


def _starts(part: tuple[int, ...], whole: tuple[int, ...], spec: P) -> list[Any]:
    return [
        lax.axis_index(_names(entry)) * d if d < n else 0
        for entry, d, n in zip(_padded(spec, len(part)), part, whole, strict=True)
    ]


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
