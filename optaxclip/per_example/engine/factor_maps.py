"""Operations on parameters alone that make new factors of a form's; rules as in `isometries`.

Sums, products by numbers and vectors, matrix products, rows looked up or overwritten.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._numerics import accumulator, wider
from optaxclip.per_example.engine.isometries import Moved, Passage, through
from optaxclip.per_example.forms.contractions import by_examples, einsum
from optaxclip.per_example.forms.forms import Dense, Form, Gathered, Outer, scale
from optaxclip.per_example.forms.layout import Layout

# A factor may grow by so much when rows of a table are put in their places.
_MOST_ROWS = 4

# Arithmetic.


@through(P.neg_p)
def _neg(form: Any, to: Passage) -> Moved:
    return [(0, scale(form, -1))]


@through(P.add_p)
def _add(form: Any, to: Passage) -> Moved:
    return [(p, _summed(form, to.operands[p].shape)) for p in to.active]


@through(P.sub_p)
def _sub(form: Any, to: Passage) -> Moved:
    found = [(p, _summed(form, to.operands[p].shape)) for p in to.active]
    return [(p, scale(x, -1) if p == 1 else x) for p, x in found]


def _summed(form: Any, shape: tuple[int, ...]) -> Form:
    """Of an operand that was broadcast: summed over what it was repeated along."""
    if shape == form.shape:
        return form
    # A scalar is repeated along all axes, anything else along those where its length is one.
    axes = [a for a, d in enumerate(form.shape) if not shape or shape[a] != d]
    wide = form.layout.cast(accumulator(form.dtype))

    def some(form: Any) -> jax.Array:
        stacked = replace(form, layout=wide).materialize()
        return jnp.sum(stacked, axis=[1 + a for a in axes]).reshape(len(stacked), *shape)

    return Dense(by_examples(some, math.prod(form.shape), form).astype(form.dtype))


@through(P.mul_p)
def _mul(form: Any, to: Passage) -> Moved:
    if len(to.active) != 1:
        return None
    (mine,) = to.active
    factor = to.operands[1 - mine]
    return _times(form, factor, to.repeated[1 - mine], mine)


def _times(form: Any, factor: Any, axis: int | None, position: int) -> Moved:
    """Times a scalar, or a vector along one axis."""
    if jnp.ndim(factor) == 0:
        return [(position, scale(form, factor))]
    shape = jnp.shape(factor)
    if axis is None:
        axes = [a for a, d in enumerate(shape) if d > 1]
        axis = axes[0] if len(axes) == 1 and len(shape) == len(form.shape) else None
    if axis is None or form.layout.split is not None or form.layout.part is not None:
        return None
    vector = jnp.moveaxis(factor, axis, 0).reshape(shape[axis], -1)[:, 0]
    if shape[axis] != form.shape[axis]:
        return None
    found = _along(form, axis, lambda x, at: x * _placed_at(vector, at, x.ndim).astype(x.dtype))
    return None if found is None else [(position, found)]


def _placed_at(vector: Any, axis: int, ndim: int) -> Any:
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _along(form: Any, axis: int, fun: Callable[[Any, int], Any], size: int | None = None) -> Any:
    """The form with `fun(factor, axis)` of the factor that has an axis of the parameter.

    `size` is the length that it has afterwards, if another. None where ids stand for that axis.
    """
    layout = form.layout
    role = next(r for r, axes in enumerate(layout.roles) if axis in axes)
    shape = list(layout.shape)
    if size is not None:
        shape[axis] = size
    new = replace(layout, shape=tuple(shape))
    if isinstance(form, Gathered):
        if role != 2:
            return None
        return replace(form, right=_expanded(form.right, 2, layout, role, axis, fun), layout=new)
    if role == 0:  # blocks: both factors have them
        if size is not None:
            return None
        return replace(form, right=_expanded(form.right, 1, layout, role, axis, fun), layout=new)
    name = "left" if role == 1 else "right"
    changed = _expanded(getattr(form, name), 3, layout, role, axis, fun)
    return replace(form, **{name: changed}, layout=new)


def _expanded(
    factor: Any, at: int, layout: Layout, role: int, axis: int, fun: Callable[[Any, int], Any]
) -> Any:
    """`fun` of a factor with the axes that one of its own stands for apart."""
    axes = layout.roles[role]
    before, after = factor.shape[:at], factor.shape[at + 1 :]
    split = factor.reshape(*before, *(layout.shape[a] for a in axes), *after)
    return fun(split, at + axes.index(axis)).reshape(*before, -1, *after)


@through(P.div_p)
def _div(form: Any, to: Passage) -> Moved:
    divisor = to.operands[1]
    if to.active != (0,):
        return None
    return _times(form, 1 / divisor, to.repeated[1], 0)


# Rows looked up.


@through(P.gather_p)
def _rows(form: Any, to: Passage) -> Moved:
    """Whole rows along one axis, `w[ids]`: the factor with that axis is added up by row."""
    numbers, shape = to.params["dimension_numbers"], to.operands[0].shape
    sizes, ids = to.params["slice_sizes"], jnp.asarray(to.operands[1])
    axes = numbers.start_index_map
    if to.active != (0,) or len(axes) != 1 or numbers.operand_batching_dims or ids.ndim != 2:
        return None
    (axis,) = axes
    whole = all(n == d for a, (n, d) in enumerate(zip(sizes, shape, strict=True)) if a != axis)
    if sizes[axis] != 1 or not whole or numbers.collapsed_slice_dims != (axis,):
        return None
    out = next(a for a in range(len(form.shape)) if a not in numbers.offset_dims)
    if out != axis or form.layout.split is not None or form.layout.part is not None:
        return None
    if shape[axis] > _MOST_ROWS * form.shape[axis]:
        return None
    mode = lax.GatherScatterMode.from_any(to.params["mode"])
    index = ids[:, 0]
    if axis in form.layout.roles[0]:
        return _blocks(form, axis, to.operands[1], shape[axis])
    clipped = jnp.clip(index, 0, shape[axis] - 1)
    inside = (index == clipped) | (mode == lax.GatherScatterMode.CLIP)

    def add_up(factor: Any, at: int) -> Any:
        kept = jnp.where(_placed_at(inside, at, factor.ndim), factor, 0)
        rows = jax.ops.segment_sum(jnp.moveaxis(kept, at, 0), clipped, shape[axis])
        return jnp.moveaxis(rows, 0, at)

    found = _along(form, axis, add_up, shape[axis])
    return None if found is None else [(0, found)]


def _blocks(form: Any, axis: int, ids: Any, size: int) -> Moved:
    """Blocks looked up by number, each with factors of its own.

    As many forms as the block that is looked up most often.
    """
    if isinstance(ids, jax.core.Tracer) or not isinstance(form, Outer):
        return None
    index = np.asarray(ids)[:, 0]
    if index.min(initial=0) < 0 or index.max(initial=0) >= size:
        return None
    earlier = np.array([np.sum(index[:k] == i) for k, i in enumerate(index)])
    found: list[tuple[int, Form]] = []
    for time in range(int(earlier.max(initial=-1)) + 1):
        (chosen,) = np.nonzero(earlier == time)
        at = index[chosen]

        def place(factor: Any, a: int, chosen: Any = chosen, at: Any = at) -> Any:
            rows = jnp.moveaxis(factor, a, 0)[chosen]
            whole = jnp.zeros((size, *rows.shape[1:]), rows.dtype).at[at].set(rows)
            return jnp.moveaxis(whole, 0, a)

        layout = form.layout
        left, right = (_expanded(x, 1, layout, 0, axis, place) for x in (form.left, form.right))
        shape = tuple(size if a == axis else d for a, d in enumerate(layout.shape))
        found.append(
            (0, replace(form, left=left, right=right, layout=replace(layout, shape=shape)))
        )
    return found


@through(P.scatter_p)
def _overwritten(form: Any, to: Passage) -> Moved:
    """`w.at[ids].set(x)` of whole rows: what was overwritten receives nothing."""
    numbers, shape = to.params["dimension_numbers"], to.operands[0].shape
    axes = numbers.scatter_dims_to_operand_dims
    if to.active != (0,) or len(axes) != 1 or numbers.inserted_window_dims != axes:
        return None
    (axis,) = axes
    window = [to.operands[2].shape[a] for a in numbers.update_window_dims]
    if window != [d for a, d in enumerate(shape) if a != axis]:
        return None
    if form.layout.split is not None or form.layout.part is not None:
        return None
    ids = jnp.asarray(to.operands[1]).reshape(-1)
    mode = lax.GatherScatterMode.from_any(to.params["mode"])
    if mode == lax.GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, shape[axis] - 1)
    ids = jnp.where(ids < 0, shape[axis], ids)  # out of bounds, and dropped
    kept = jnp.ones(shape[axis], bool).at[ids].set(False, mode="drop")
    if isinstance(form, Gathered) and form.layout.roles[1] == (axis,):
        return [(0, replace(form, right=jnp.where(kept[form.ids][:, :, None], form.right, 0)))]
    found = _along(form, axis, lambda x, at: jnp.where(_placed_at(kept, at, x.ndim), x, 0))
    return None if found is None else [(0, found)]


@through(P.dot_general_p)
def _product(form: Any, to: Passage) -> Moved:
    """`M = P Q`: with `dM_b = l r^T`, `dP_b = l (Q r)^T` and `dQ_b = (P^T l) r^T`."""
    (contract, contract2), (batch, _) = to.params["dimension_numbers"]
    layout = form.layout
    if not isinstance(form, Outer) or batch or layout.split or layout.part or layout.roles[0]:
        return None
    first, second = to.operands
    free = [a for a in range(first.ndim) if a not in contract]
    free2 = [a for a in range(second.ndim) if a not in contract2]
    n = len(free)
    if set(layout.roles[1]) != set(range(n)):
        form, layout = (
            replace(form, left=form.right, right=form.left, layout=layout.swapped()),
            layout.swapped(),
        )
    if set(layout.roles[1]) != set(range(n)):
        return None
    rows = tuple(free[a] for a in layout.roles[1])
    columns = tuple(free2[a - n] for a in layout.roles[2])
    order = tuple(contract)
    roles: Any = ((), rows, order)
    right = _through(form.right, second, columns, contract2)
    one = Outer(form.left, right, Layout(first.shape, first.dtype, roles), form.precision)
    roles = ((), tuple(contract2), columns)
    left = _through(form.left, first, rows, contract)
    two = Outer(left, form.right, Layout(second.shape, second.dtype, roles), form.precision)
    return [(0, one), (1, two)]


def _through(factor: Any, matrix: Any, axes: tuple[int, ...], left: Sequence[int]) -> Any:
    """A factor [B, 1, T, axes] times a matrix: [B, 1, T, left]."""
    flat = matrix.transpose(*axes, *left).reshape(factor.shape[-1], -1)
    product = einsum("bkti,io->bkto", factor, flat)
    return product.astype(wider(factor.dtype, flat.dtype))
