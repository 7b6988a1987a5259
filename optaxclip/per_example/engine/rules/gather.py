"""Rows read from a table of parameters: embeddings."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._numerics import wider
from optaxclip.per_example.engine.registry import RuleContext, register_rule
from optaxclip.per_example.forms.forms import Gathered
from optaxclip.per_example.forms.layout import Layout


@register_rule(P.gather_p)
def gather(
    ctx: RuleContext,
    table: Any,
    indices: Any,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    mode: Any,
    **params: Any,
) -> Gathered | None:
    """`dL/dtable_b[v] = sum_t [ids_bt = v] g_bt`.   Cost: none, until it is contracted.

    Applies where single rows are read along some axes, whole along the others. Rows out of
    bounds receive nothing; under `mode="clip"` the first or the last row does.
    """
    numbers, shape = dimension_numbers, table.shape
    if ctx.position != 0 or numbers.operand_batching_dims:
        return None
    rows = tuple(a for a in numbers.start_index_map if slice_sizes[a] == 1)
    if any(slice_sizes[a] != d for a, d in enumerate(shape) if a not in rows) or not rows:
        return None
    offsets = [1 + a for a in numbers.offset_dims]
    cotangent = ctx.cotangent
    batch = [a for a in range(1, cotangent.ndim) if a not in offsets]
    right = cotangent.transpose(0, *batch, *offsets)
    places = {a: indices[..., k] for k, a in enumerate(numbers.start_index_map)}
    return _rows(ctx, rows, places, right, lax.GatherScatterMode.from_any(mode))


@register_rule(P.dynamic_slice_p)
def dynamic_slice(
    ctx: RuleContext, table: Any, *starts: Any, slice_sizes: Any, **params: Any
) -> Gathered | None:
    """`dL/dtable_b[v] = [id_b = v] g_b`, ids clamped.   Cost: none, until it is contracted.

    The gather of a single row.
    """
    partial = [a for a, d in enumerate(table.shape) if slice_sizes[a] != d]
    if ctx.position != 0 or len(partial) != 1 or slice_sizes[partial[0]] != 1:
        return None
    (axis,) = partial
    index = jnp.asarray(starts[axis])
    if not ctx.batched[1 + axis]:
        index = jnp.broadcast_to(index, (ctx.examples,))
    # The row's own axis has length one.
    right = jnp.moveaxis(ctx.cotangent, 1 + axis, 1)
    return _rows(ctx, (axis,), {axis: index}, right, lax.GatherScatterMode.CLIP)


def _rows(
    ctx: RuleContext,
    axes: tuple[int, ...],
    places: dict[int, Any],
    right: Any,
    mode: lax.GatherScatterMode,
) -> Gathered:
    """Rows along `axes`; `places` are the starts along these and along axes read whole."""
    table = ctx.parameter
    rest = tuple(a for a in range(table.ndim) if a not in axes)
    dtype = wider(jnp.int32, *(index.dtype for index in places.values()))
    ids, inside = jnp.zeros((), dtype), jnp.ones((), bool)
    for axis, index in places.items():
        index = index.astype(dtype).reshape(ctx.examples, -1)
        last = table.shape[axis] - 1 if axis in axes else 0
        inside &= (index >= 0) & (index <= last)
        if axis in axes:
            ids = ids * table.shape[axis] + jnp.clip(index, 0, last)
    right = right.reshape(*ids.shape, math.prod(table.shape[a] for a in rest))
    if mode != lax.GatherScatterMode.CLIP:
        right = jnp.where(inside[:, :, None], right, jnp.zeros((), right.dtype))
    roles = ((), tuple(a for a in places if a in axes), rest)
    return Gathered(ids, right, Layout(table.shape, table.dtype, roles))
