"""Convolutions with a parameter as kernel: any rank, stride, padding, dilation, and groups."""

import math
from typing import Any

from jax import lax

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.per_example.forms import Dense, Outer
from optaxclip.per_example.layout import Layout
from optaxclip.per_example.registry import RuleContext, register_rule


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
) -> Outer | Dense | None:
    """`dL/dkernel_b = patches(x_b)^T g_b`.

    Cost: the patches hold T I numbers per group and example, the stacked gradient I O, and
    it needs no second contraction: it is kept where it is smaller, O <= T groups.
    """
    if ctx.position != 1 or batch_group_count != 1:
        return None
    numbers, groups = dimension_numbers, feature_group_count
    out = _leading(ctx.cotangent, numbers.out_spec)  # [B, N, O, *spatial]
    b, n, channels_out, *spatial = out.shape
    t = n * math.prod(spatial)
    if channels_out <= t * groups:
        return Dense(ctx.vjp())

    images = _leading(images, numbers.lhs_spec)
    images = images.reshape(b * n, *images.shape[2:])
    window = tuple(kernel.shape[a] for a in numbers.rhs_spec[2:])
    patches = lax.conv_general_dilated_patches(
        images, window, window_strides, padding, lhs_dilation, rhs_dilation, precision=precision
    )
    size_i = math.prod(window) * images.shape[1] // groups
    left = patches.reshape(b, n, groups, size_i, -1).transpose(0, 2, 1, 4, 3)
    right = out.reshape(b, n, groups, channels_out // groups, -1).transpose(0, 2, 1, 4, 3)
    return Outer(
        left.reshape(b, groups, t, size_i),
        right.reshape(b, groups, t, channels_out // groups),
        _layout(kernel, numbers.rhs_spec, groups),
    )


def _leading(x: Any, spec: Any) -> Any:
    """[B, ...] with batch and feature axes first, as [B, N, C, *spatial]."""
    return x.transpose(0, *(1 + a for a in spec))


def _layout(kernel: Any, spec: Any, groups: int) -> Layout:
    """K are the groups, I the input channels and the window, O the output channels."""
    o, *i = spec
    if groups == 1:
        return Layout(kernel.shape, kernel.dtype, ((), tuple(i), (o,)))
    # The output channels are split: groups, then channels within a group.
    shape = kernel.shape
    split = (*shape[:o], groups, shape[o] // groups, *shape[o + 1 :])
    rows = tuple(a + 1 if a > o else a for a in i)
    return Layout(shape, kernel.dtype, ((o,), rows, (o + 1,)), split)
