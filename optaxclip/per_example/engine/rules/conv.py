"""Convolutions with a parameter as kernel: any rank, stride, padding, dilation, and groups."""

import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.per_example.engine.registry import RuleContext, register_rule
from optaxclip.per_example.forms.contractions import einsum
from optaxclip.per_example.forms.forms import Dense, Outer
from optaxclip.per_example.forms.layout import Layout

# Each element of a larger window would be a matrix product of its own.
_MOST_SHIFTS = 64


@register_rule(P.conv_general_dilated_p)
def conv(
    ctx: RuleContext,
    images: Any,
    kernel: Any,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    precision: Any,
    **params: Any,
) -> Outer | Dense:
    """`dL/dkernel_b[k] = shift_k(x_b)^T g_b`, for each element k of the window.

    Cost: as many operations as the gradient of the whole batch. Kept are the stacked gradients,
    I O numbers per group and example, or the patches, T I: whatever is smaller. A parameter
    in the images' place has gradients of about the size of the cotangent: they are stacked.
    """
    if ctx.position == 0 or kernel.size == 0:
        return Dense(ctx.vjp())
    numbers, out = dimension_numbers, ctx.cotangent
    groups = feature_group_count * batch_group_count  # one of them is 1
    split = numbers.lhs_spec[0 if batch_group_count > 1 else 1]
    names = _names(numbers.lhs_spec, split, "nc")
    out_names = _names(numbers.out_spec, numbers.out_spec[1], "no")
    sizes = [out.shape[1 + a] for a in numbers.out_spec[2:]]
    window = [kernel.shape[a] for a in numbers.rhs_spec[2:]]

    edges = [(0, 0, 0)] * images.ndim
    for a, (low, high), dilation in zip(numbers.lhs_spec[2:], padding, lhs_dilation, strict=True):
        edges[1 + a] = (low, high, dilation - 1)
    images = _grouped(lax.pad(images, jnp.zeros((), images.dtype), edges), 1 + split, groups)
    out = _grouped(out, 1 + numbers.out_spec[1], groups)

    def shifted(x: Any, axis: int, by: int) -> Any:
        """What element `by` of the window sees along a spatial axis."""
        start, stride = by * rhs_dilation[axis], window_strides[axis]
        stop = start + max((sizes[axis] - 1) * stride + 1, 0)
        return lax.slice_in_dim(x, start, stop, stride, axis=names.index(_SPATIAL[axis]))

    channels_out = kernel.shape[numbers.rhs_spec[0]]
    t = out.size // (ctx.examples * channels_out)
    layout = _layout(kernel, numbers.rhs_spec, groups)
    if channels_out <= t * groups and math.prod(window) <= _MOST_SHIFTS:
        blocks = []
        for element in itertools.product(*map(range, window)):
            seen = functools.reduce(lambda x, at: shifted(x, *at), enumerate(element), images)
            blocks.append(_product(seen, names, out, out_names, precision))
        stacked = jnp.stack(blocks, axis=2).reshape(ctx.examples, *layout.sizes)
        return Dense(layout.to_parameter(stacked))

    for axis, size in enumerate(window):
        images = jnp.stack([shifted(images, axis, by) for by in range(size)], axis=-1)
    elements, order = _ELEMENTS[: len(window)], f"bgn{_SPATIAL[: len(window)]}"
    left = jnp.einsum(f"{names}{elements}->{order}{elements}c", images)
    right = jnp.einsum(f"{out_names}->{order}o", out)
    shape, (_, i, o) = (ctx.examples, groups, t), layout.sizes
    return Outer(left.reshape(*shape, i), right.reshape(*shape, o), layout, precision)


_SPATIAL, _ELEMENTS = "xyzuvw", "ijklmr"


def _grouped(x: Any, axis: int, groups: int) -> Any:
    """With the groups on an axis of their own, before the axis that held them."""
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _names(spec: Any, grouped: int, letters: str) -> str:
    """A letter for each axis: examples b, groups g, then those of the spec."""
    named = dict(zip(spec, letters + _SPATIAL, strict=False))
    named[grouped] = f"g{named[grouped]}"
    return "b" + "".join(named[a] for a in range(len(spec)))


def _product(x: Any, names: str, out: Any, out_names: str, precision: Any) -> Any:
    """`x^T out`, summed over images and places: [B, G, C, O].

    Axes of length one are left out, and places made one axis where they are neighbours: else
    XLA transposes the images for each product, and a small CNN takes 1.3 times as long.
    """
    groups = x.shape[names.index("g")]
    (x, names), (out, out_names) = _squeezed(x, names), _squeezed(out, out_names)
    merged, merged_out = _merged(x, names), _merged(out, out_names)
    if merged and merged_out:
        (x, names), (out, out_names) = merged, merged_out
    spec = f"{names},{out_names}->{'bgco' if 'g' in names else 'bco'}"
    product = einsum(spec, x, out, precision=precision)
    return product.reshape(product.shape[0], groups, *product.shape[-2:])


def _squeezed(x: Any, names: str) -> tuple[Any, str]:
    single = [a for a, name in enumerate(names) if name in "ng" and x.shape[a] == 1]
    return x.squeeze(single), "".join(name for a, name in enumerate(names) if a not in single)


def _merged(x: Any, names: str) -> tuple[Any, str] | None:
    run = "".join(a for a in names if a not in "bgco")
    if not run or run != "".join(sorted(run)) or run not in names:
        return None
    at = names.index(run)
    x = x.reshape(*x.shape[:at], -1, *x.shape[at + len(run) :])
    return x, names.replace(run, "n")


def _layout(kernel: Any, spec: Any, groups: int) -> Layout:
    """K are the groups, I the window and the input channels, O the output channels."""
    o, c, *window = spec
    i = (*window, c)
    if groups == 1:
        return Layout(kernel.shape, kernel.dtype, ((), i, (o,)))
    # The output channels are split: groups, then channels within a group.
    shape = kernel.shape
    split = (*shape[:o], groups, shape[o] // groups, *shape[o + 1 :])
    rows = tuple(a + 1 if a > o else a for a in i)
    return Layout(shape, kernel.dtype, ((o,), rows, (o + 1,)), split)
