"""Operations on parameters alone through which a form goes back factored.

A rule takes the form of an output to those of the inputs: `[(input, form), ...]`, inputs that
receive nothing left out, or None where nothing factored is known. Here are those that move labels
and cut factors: identities, reshapes, transposes, parts of a whole and joins. Those that compute
new factors are in `factor_maps`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import Primitive, optimization_barrier_p, split_p, stack_p, unstack_p
from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.per_example.forms.forms import Dense, Form, Gathered, Outer
from optaxclip.per_example.forms.layout import Layout, first, last


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
    repeated: tuple[int | None, ...] = ()
    """Of each operand that was made from a vector by repeating it: the axis of the vector."""


Moved = list[tuple[int, Form]] | None
PassageRule = Callable[[Any, Passage], Moved]  # of an Outer or a Gathered

_RULES: dict[Primitive | None, PassageRule] = {}


def moved(form: Form, passage: Passage) -> Moved:
    """The forms of the inputs, still factored; None if there are none."""
    if passage.primitive in _IDENTITIES:
        return [(passage.output, form)]
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


def through(*primitives: Primitive | None) -> Callable[[PassageRule], PassageRule]:
    """Decorate the rule of the forms that go back through some primitives."""

    def register(rule: PassageRule) -> PassageRule:
        _RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


# Relabelling.


def _relabelled(form: Any, layout: Layout | None) -> Moved:
    return None if layout is None else [(0, replace(form, layout=layout))]


@through(P.reshape_p)
def _reshape(form: Any, to: Passage) -> Moved:
    transposes = to.params["dimensions"] is not None
    return None if transposes else _relabelled(form, form.layout.reshaped(to.operands[0].shape))


@through(P.squeeze_p)
def _squeeze(form: Any, to: Passage) -> Moved:
    return _relabelled(form, form.layout.reshaped(to.operands[0].shape))


@through(P.broadcast_in_dim_p)
def _new_axes(form: Any, to: Passage) -> Moved:
    same = to.operands[0].size == math.prod(form.shape)
    return _relabelled(form, form.layout.reshaped(to.operands[0].shape)) if same else None


@through(P.transpose_p)
def _transpose(form: Any, to: Passage) -> Moved:
    layout = form.layout.transposed(to.params["permutation"], to.operands[0].shape)
    return _relabelled(form, layout)


@through(P.convert_element_type_p)
def _cast(form: Any, to: Passage) -> Moved:
    return _relabelled(form, form.layout.cast(to.operands[0].dtype))


# Output k is input k: for the compiler, for a checkpoint's policy, for a device.
_IDENTITIES = frozenset({
    P.copy_p, P.name_p, P.sharding_constraint_p, P.device_put_p, P.reduce_precision_p,
    optimization_barrier_p,
})  # fmt: skip


# Parts of a whole.


def _placed(form: Any, to: Passage, ranges: Iterable[range]) -> Moved:
    return _relabelled(form, form.layout.placed(to.operands[0].shape, tuple(ranges)))


@through(P.slice_p)
def _slice(form: Any, to: Passage) -> Moved:
    steps = to.params["strides"] or (1,) * len(form.shape)
    ends = to.params["limit_indices"]
    return _placed(form, to, map(range, to.params["start_indices"], ends, steps))


@through(P.dynamic_slice_p)
def _dynamic_slice(form: Any, to: Passage) -> Moved:
    whole, *starts = to.operands
    if any(isinstance(x, jax.core.Tracer) for x in starts):
        return None
    room = (d - n for d, n in zip(whole.shape, form.shape, strict=True))
    begin = [min(max(int(x), 0), most) for x, most in zip(starts, room, strict=True)]
    return _placed(form, to, [range(x, x + n) for x, n in zip(begin, form.shape, strict=True)])


@through(split_p)
def _split(form: Any, to: Passage) -> Moved:
    axis, sizes = to.params["axis"], to.params["sizes"]
    ranges = list(map(range, form.shape))
    start = int(sum(sizes[: to.output]))
    ranges[axis] = range(start, start + int(sizes[to.output]))
    return _placed(form, to, ranges)


@through(unstack_p)
def _unstack(form: Any, to: Passage) -> Moved:
    axis, shape = to.params["axis"], form.shape
    layout = form.layout.reshaped((*shape[:axis], 1, *shape[axis:]))
    if layout is None:
        return None
    ranges = [*map(range, shape[:axis]), range(to.output, to.output + 1), *map(range, shape[axis:])]
    return _placed(replace(form, layout=layout), to, ranges)


@through(P.rev_p)
def _rev(form: Any, to: Passage) -> Moved:
    back = to.params["dimensions"]
    sizes = enumerate(form.shape)
    return _placed(form, to, [range(d)[::-1] if a in back else range(d) for a, d in sizes])


_PARTS = frozenset({P.slice_p, P.dynamic_slice_p, split_p, unstack_p})


# Joins.


@through(P.concatenate_p)
def _concatenate(form: Any, to: Passage) -> Moved:
    axis, start, found = to.params["dimension"], 0, []
    for k, operand in enumerate(to.operands):
        pieces = _cut(form, [start if a == axis else 0 for a in range(operand.ndim)], operand.shape)
        if pieces is None:
            return None
        found += [(k, piece) for piece in pieces]
        start += operand.shape[axis]
    return found


@through(stack_p)
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


@through(P.pad_p)
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
        low, high = max(first(here), start), min(last(here) + 1, start + size)
        if low >= high:
            return []
        if here.step == 1:
            cuts.append(slice(low - here.start, high - here.start))
            part.append(range(low - start, high - start))
        elif low == first(here) and high == last(here) + 1:
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
        return [Outer(left, right, layout, form.precision)]
    if len(i) != 1:
        return None
    rows = range(sizes[i[0]])[cuts[i[0]]]
    inside = (form.ids >= rows.start) & (form.ids < rows.stop)
    right = jnp.where(inside[:, :, None], cut(form.right, 2, o), 0)
    return [Gathered(jnp.clip(form.ids - rows.start, 0, len(rows) - 1), right, layout)]
