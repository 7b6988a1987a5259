"""Operations on parameters alone through which a form goes back factored.

A rule takes the form of an output to those of the inputs: `[(input, form), ...]`, inputs that
receive nothing left out, or None where nothing factored is known. Reshapes, transposes, slices
and reversals move labels; scalar factors, matrix products and joins change the factors.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import Primitive, split_p, stack_p, unstack_p
from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._reductions import accumulator
from optaxclip.per_example.contractions import by_examples, einsum
from optaxclip.per_example.forms import Dense, Form, Gathered, Outer, scale
from optaxclip.per_example.layout import Layout


@dataclasses.dataclass(frozen=True)
class Passage:
    """The equation that a form goes back through."""

    primitive: Primitive
    output: int
    """Whose form it is."""
    active: tuple[int, ...]
    """The inputs that depend on parameters."""
    operands: tuple[Any, ...]
    params: dict[str, Any]


Moved = list[tuple[int, Form]] | None
Rule = Callable[[Any, Passage], Moved]  # of an Outer or a Gathered

_RULES: dict[Primitive | None, Rule] = {}


def moved(form: Form, passage: Passage) -> Moved:
    """The forms of the inputs, still factored; None if there are none."""
    rule = _RULES.get(passage.primitive)
    dtypes = (form.dtype, passage.operands[0].dtype)
    if rule is None or not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        return None
    if isinstance(form, Dense) and passage.primitive in _PARTS and not form.reason:
        form = _as_outer(form)
    if not isinstance(form, Outer | Gathered) or math.prod(form.shape) == 0:
        return None
    return rule(form, passage)


def _as_outer(form: Dense) -> Outer:
    """Stacked gradients as outer products with one, so that they can be part of a whole."""
    count, shape = form.stacked.shape[0], form.shape
    layout = Layout(shape, form.dtype, ((), tuple(range(len(shape))), ()))
    ones = jnp.ones((count, 1, 1, 1), form.dtype)
    return Outer(form.stacked.reshape(count, 1, 1, -1), ones, layout)


def _rule(*primitives: Primitive | None) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


# Relabelling.


def _relabelled(form: Any, layout: Layout | None) -> Moved:
    return None if layout is None else [(0, replace(form, layout=layout))]


@_rule(P.reshape_p)
def _reshape(form: Any, to: Passage) -> Moved:
    transposes = to.params["dimensions"] is not None
    return None if transposes else _relabelled(form, form.layout.reshaped(to.operands[0].shape))


@_rule(P.squeeze_p)
def _squeeze(form: Any, to: Passage) -> Moved:
    return _relabelled(form, form.layout.reshaped(to.operands[0].shape))


@_rule(P.broadcast_in_dim_p)
def _new_axes(form: Any, to: Passage) -> Moved:
    same = to.operands[0].size == math.prod(form.shape)
    return _relabelled(form, form.layout.reshaped(to.operands[0].shape)) if same else None


@_rule(P.transpose_p)
def _transpose(form: Any, to: Passage) -> Moved:
    layout = form.layout.transposed(to.params["permutation"], to.operands[0].shape)
    return _relabelled(form, layout)


@_rule(P.convert_element_type_p)
def _cast(form: Any, to: Passage) -> Moved:
    return _relabelled(form, form.layout.cast(to.operands[0].dtype))


@_rule(P.copy_p)
def _same(form: Any, to: Passage) -> Moved:
    return [(0, form)]


# Parts of a whole.


def _placed(form: Any, to: Passage, ranges: Iterable[range]) -> Moved:
    return _relabelled(form, form.layout.placed(to.operands[0].shape, tuple(ranges)))


@_rule(P.slice_p)
def _slice(form: Any, to: Passage) -> Moved:
    steps = to.params["strides"] or (1,) * len(form.shape)
    ends = to.params["limit_indices"]
    return _placed(form, to, map(range, to.params["start_indices"], ends, steps))


@_rule(P.dynamic_slice_p)
def _dynamic_slice(form: Any, to: Passage) -> Moved:
    whole, *starts = to.operands
    if any(isinstance(x, jax.core.Tracer) for x in starts):
        return None
    room = (d - n for d, n in zip(whole.shape, form.shape, strict=True))
    first = [min(max(int(x), 0), most) for x, most in zip(starts, room, strict=True)]
    return _placed(form, to, [range(x, x + n) for x, n in zip(first, form.shape, strict=True)])


@_rule(split_p)
def _split(form: Any, to: Passage) -> Moved:
    axis, sizes = to.params["axis"], to.params["sizes"]
    ranges = list(map(range, form.shape))
    start = int(sum(sizes[: to.output]))
    ranges[axis] = range(start, start + int(sizes[to.output]))
    return _placed(form, to, ranges)


@_rule(unstack_p)
def _unstack(form: Any, to: Passage) -> Moved:
    axis, shape = to.params["axis"], form.shape
    layout = form.layout.reshaped((*shape[:axis], 1, *shape[axis:]))
    if layout is None:
        return None
    ranges = [*map(range, shape[:axis]), range(to.output, to.output + 1), *map(range, shape[axis:])]
    return _placed(replace(form, layout=layout), to, ranges)


@_rule(P.rev_p)
def _rev(form: Any, to: Passage) -> Moved:
    back = to.params["dimensions"]
    sizes = enumerate(form.shape)
    return _placed(form, to, [range(d)[::-1] if a in back else range(d) for a, d in sizes])


_PARTS = frozenset({P.slice_p, P.dynamic_slice_p, split_p, unstack_p})


# Joins.


@_rule(P.concatenate_p)
def _concatenate(form: Any, to: Passage) -> Moved:
    axis, start, found = to.params["dimension"], 0, []
    for k, operand in enumerate(to.operands):
        pieces = _cut(form, [start if a == axis else 0 for a in range(operand.ndim)], operand.shape)
        if pieces is None:
            return None
        found += [(k, piece) for piece in pieces]
        start += operand.shape[axis]
    return found


@_rule(stack_p)
def _stack(form: Any, to: Passage) -> Moved:
    axis, found = to.params["axis"], []
    for k, operand in enumerate(to.operands):
        shape = (*operand.shape[:axis], 1, *operand.shape[axis:])
        pieces = _cut(form, [k if a == axis else 0 for a in range(len(shape))], shape)
        if pieces is None:
            return None
        for piece in pieces:
            found.append((k, replace(piece, layout=piece.layout.reshaped(operand.shape))))
    return found


@_rule(P.pad_p)
def _pad(form: Any, to: Passage) -> Moved:
    config = to.params["padding_config"]
    if to.active != (0,) or any(low < 0 or high < 0 or inside for low, high, inside in config):
        return None
    pieces = _cut(form, [int(low) for low, _, _ in config], to.operands[0].shape)
    return None if pieces is None else [(0, piece) for piece in pieces]


def _cut(form: Any, starts: Sequence[int], shape: tuple[int, ...]) -> list[Any] | None:
    """The form of the box of a `shape` at `starts`: [] if it is zero, None if not factored."""
    layout = form.layout
    if layout.split is not None:
        return None
    part, cuts = [], []
    for here, start, size in zip(
        layout.part or map(range, layout.shape), starts, shape, strict=True
    ):
        low, high = max(min(here), start), min(max(here) + 1, start + size)
        if low >= high:
            return []
        if here.step == 1:
            cuts.append(slice(low - here.start, high - here.start))
            part.append(range(low - start, high - start))
        elif low == min(here) and high == max(here) + 1:
            cuts.append(slice(None))
            part.append(range(here.start - start, here.stop - start, here.step))
        else:
            return None
    whole = Layout(tuple(map(len, part)), layout.dtype, layout.roles).placed(shape, tuple(part))
    return _cut_factors(form, cuts, whole)


def _cut_factors(form: Any, cuts: list[slice], layout: Layout) -> list[Any] | None:
    sizes = form.layout.named
    k, i, o = form.layout.roles

    def cut(factor: Any, axis: int, axes: tuple[int, ...]) -> Any:
        """Cut the axes that make up one axis of a factor."""
        before, after = factor.shape[:axis], factor.shape[axis + 1 :]
        split = factor.reshape(*before, *(sizes[a] for a in axes), *after)
        split = split[(*(slice(None),) * axis, *(cuts[a] for a in axes))]
        return split.reshape(*before, -1, *after)

    if isinstance(form, Outer):
        left, right = cut(cut(form.left, 3, i), 1, k), cut(cut(form.right, 3, o), 1, k)
        return [Outer(left, right, layout)]
    if len(i) != 1:
        return None
    rows = range(sizes[i[0]])[cuts[i[0]]]
    inside = (form.ids >= rows.start) & (form.ids < rows.stop)
    right = jnp.where(inside[:, :, None], cut(form.right, 2, o), 0)
    return [Gathered(jnp.clip(form.ids - rows.start, 0, len(rows) - 1), right, layout)]


# Arithmetic.


@_rule(P.neg_p)
def _neg(form: Any, to: Passage) -> Moved:
    return [(0, scale(form, -1))]


@_rule(P.add_p)
def _add(form: Any, to: Passage) -> Moved:
    return [(p, _summed(form, to.operands[p].shape)) for p in to.active]


@_rule(P.sub_p)
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


@_rule(P.mul_p)
def _mul(form: Any, to: Passage) -> Moved:
    if len(to.active) != 1:
        return None
    (mine,) = to.active
    factor = to.operands[1 - mine]
    return [(mine, scale(form, factor))] if jnp.ndim(factor) == 0 else None


@_rule(P.div_p)
def _div(form: Any, to: Passage) -> Moved:
    divisor = to.operands[1]
    if to.active != (0,) or jnp.ndim(divisor) != 0:
        return None
    return [(0, scale(form, 1 / divisor))]


@_rule(P.dot_general_p)
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
        form, layout = Outer(form.right, form.left, layout.swapped()), layout.swapped()
    if set(layout.roles[1]) != set(range(n)):
        return None
    rows = tuple(free[a] for a in layout.roles[1])
    columns = tuple(free2[a - n] for a in layout.roles[2])
    order = tuple(contract)
    roles: Any = ((), rows, order)
    right = _through(form.right, second, columns, contract2)
    one = Outer(form.left, right, Layout(first.shape, first.dtype, roles))
    roles = ((), tuple(contract2), columns)
    left = _through(form.left, first, rows, contract)
    return [(0, one), (1, Outer(left, form.right, Layout(second.shape, second.dtype, roles)))]


def _through(factor: Any, matrix: Any, axes: tuple[int, ...], left: Sequence[int]) -> Any:
    """A factor [B, 1, T, axes] times a matrix: [B, 1, T, left]."""
    flat = matrix.transpose(*axes, *left).reshape(factor.shape[-1], -1)
    product = einsum("bkti,io->bkto", factor, flat)
    return product.astype(jnp.promote_types(factor.dtype, flat.dtype))
