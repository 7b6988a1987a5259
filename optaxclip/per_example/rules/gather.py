"""Rows read from a table of parameters: embeddings."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.per_example.forms import Gathered
from optaxclip.per_example.layout import Layout
from optaxclip.per_example.registry import RuleContext, register_rule


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

    Applies where whole rows are read along one axis. Rows out of bounds receive nothing,
    under `mode="clip"` the last row does.
    """
    numbers, shape = dimension_numbers, table.shape
    if ctx.position != 0 or numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    whole = tuple(1 if a == axis else d for a, d in enumerate(shape))
    if tuple(slice_sizes) != whole or tuple(numbers.collapsed_slice_dims) != (axis,):
        return None
    offsets = [1 + a for a in numbers.offset_dims]
    cotangent = ctx.cotangent
    batch = [a for a in range(1, cotangent.ndim) if a not in offsets]
    right = cotangent.transpose(0, *batch, *offsets)
    ids = indices[..., 0].reshape(ctx.examples, -1)
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
    return _rows(ctx, axis, ids, right, lax.GatherScatterMode.from_any(mode))


@register_rule(P.dynamic_slice_p)
def dynamic_slice(
    ctx: RuleContext, table: Any, *starts: Any, slice_sizes: Any, **params: Any
) -> Gathered | None:
    """One row, with its index clamped into the table: the gather of a single id."""
    partial = [a for a, d in enumerate(table.shape) if slice_sizes[a] != d]
    if ctx.position != 0 or len(partial) != 1 or slice_sizes[partial[0]] != 1:
        return None
    (axis,) = partial
    ids = jnp.asarray(starts[axis])
    if not ctx.batched[1 + axis]:
        ids = jnp.broadcast_to(ids, (ctx.examples,))
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))[:, None]
    # The row's own axis has length one.
    right = jnp.moveaxis(ctx.cotangent, 1 + axis, 1)
    return _rows(ctx, axis, ids, right, lax.GatherScatterMode.CLIP)


def _rows(
    ctx: RuleContext, axis: int, ids: Any, right: Any, mode: lax.GatherScatterMode
) -> Gathered:
    table = ctx.parameter
    rest = tuple(a for a in range(table.ndim) if a != axis)
    count = math.prod(table.shape[a] for a in rest)
    right = right.reshape(ctx.examples, ids.shape[1], count)
    rows = table.shape[axis]
    if mode != lax.GatherScatterMode.CLIP:
        inside = (ids >= 0) & (ids < rows)
        right = jnp.where(inside[:, :, None], right, jnp.zeros((), right.dtype))
    layout = Layout(table.shape, table.dtype, ((), (axis,), rest))
    return Gathered(jnp.clip(ids, 0, rows - 1), right, layout)
