"""Forms of the steps of a loop as forms of what the loop was given.

A form of step `l` carries the steps on the second axis of its arrays, [B, L, ...].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._numerics import accumulator
from optaxclip.per_example.forms.forms import Dense, Form, Gathered, Outer, Sum, add
from optaxclip.per_example.forms.layout import Layout


def of_constant(form: Form) -> Form:
    """Of a value that all steps share: the steps are summed over, along T where it is factored."""
    if isinstance(form, Outer):
        left, right = (_merged(jnp.moveaxis(x, 1, 2), 2) for x in (form.left, form.right))
        return Outer(left, right, form.layout, form.precision)
    if isinstance(form, Gathered):
        return Gathered(_merged(form.ids, 1), _merged(form.right, 1), form.layout)
    if isinstance(form, Sum):
        return add([of_constant(x) for x in form.terms])
    dense: Any = _stacked_steps(form)
    wide = accumulator(dense.dtype) if jnp.issubdtype(dense.dtype, jnp.floating) else None
    stacked = jnp.sum(dense.stacked, axis=1, dtype=wide).astype(dense.dtype)
    return Dense(stacked, dense.reason)


def of_slices(form: Form, length: int) -> Form:
    """Of a value [L, ...] of which step `l` sees slice `l`: the steps become blocks K, or rows."""
    if isinstance(form, Outer):
        left, right = (_merged(x, 1) for x in (form.left, form.right))
        return Outer(left, right, _stacked(form.layout, length, 0), form.precision)
    if isinstance(form, Gathered):
        _, rows, _ = form.layout.sizes
        ids = form.ids + rows * jnp.arange(length, dtype=form.ids.dtype)[:, None]
        layout = _stacked(form.layout, length, 1)
        return Gathered(_merged(ids, 1), _merged(form.right, 1), layout)
    if isinstance(form, Sum):
        return add([of_slices(x, length) for x in form.terms])
    return _stacked_steps(form)


def _stacked_steps(form: Any) -> Dense:
    """A dense form as it is, one of scales [B, L] and gradients [1, L, *shape] stacked."""
    if isinstance(form, Dense):
        return form
    scales = form.scales.reshape(*form.scales.shape, *(1,) * (form.gradient.ndim - 2))
    return Dense((scales * form.gradient).astype(form.dtype))


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """With `axis` and the next one as one."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _stacked(layout: Layout, length: int, role: int) -> Layout:
    """With a new first axis, the slowest of a role."""
    k, i, o = (tuple(1 + a for a in axes) for axes in layout.roles)
    return dataclasses.replace(
        layout,
        shape=(length, *layout.shape),
        roles=((0, *k), i, o) if role == 0 else (k, (0, *i), o),
        split=None if layout.split is None else (length, *layout.split),
        part=None if layout.part is None else (range(length), *layout.part),
    )
