"""Convolutions with a parameter as kernel: any rank, stride, padding, dilation, and groups."""

import dataclasses
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
    I O numbers per group and example, or the patches, T I: whatever is smaller, and the patches
    for windows of more than 64 elements. A parameter in the images' place has gradients of about
    the size of the cotangent: they are stacked.
    """
    if ctx.position == 0 or kernel.size == 0:
        return Dense(ctx.vjp())
    numbers, out = dimension_numbers, ctx.cotangent
    groups = feature_group_count * batch_group_count  # one of them is 1
    split = numbers.lhs_spec[0 if batch_group_count > 1 else 1]
    names = _names(numbers.lhs_spec, split, "nc")
    out_names = _names(numbers.out_spec, numbers.out_spec[1], "no")
    channels_out, channels_in, *window = (kernel.shape[a] for a in numbers.rhs_spec)
    t = out.size // (ctx.examples * channels_out)
    layout = _layout(kernel, numbers.rhs_spec, groups)
    by_element = channels_out <= t * groups and math.prod(window) <= _MOST_SHIFTS
    moving = [False] * len(window)
    if by_element:
        fewer = channels_out < channels_in * groups
        moving = _moving_cotangents(window_strides, lhs_dilation, fewer)
    axes = [
        _Axis(images.shape[1 + x], out.shape[1 + y], *rest)
        for x, y, *rest in zip(
            numbers.lhs_spec[2:], numbers.out_spec[2:], window, window_strides, lhs_dilation,
            rhs_dilation, padding, moving, strict=True,
        )
    ]  # fmt: skip
    of_images, of_out = ([(0, 0, 0)] * x.ndim for x in (images, out))
    for axis, x, y in zip(axes, numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True):
        of_images[1 + x], of_out[1 + y] = axis.edges
    images = _grouped(_padded(images, of_images), 1 + split, groups)
    out = _grouped(_padded(out, of_out), 1 + numbers.out_spec[1], groups)

    if by_element:
        blocks = []
        for element in itertools.product(*map(range, window)):
            left, right = images, out
            for axis, name, k in zip(axes, _SPATIAL, element, strict=False):
                if axis.moving:
                    right = axis.seeing(right, k, out_names.index(name))
                else:
                    left = axis.seen(left, k, names.index(name))
            blocks.append(_product(left, names, right, out_names, precision))
        stacked = jnp.stack(blocks, axis=2).reshape(ctx.examples, *layout.sizes)
        return Dense(layout.to_parameter(stacked))

    for axis, name in zip(axes, _SPATIAL, strict=False):
        seen = [axis.seen(images, k, names.index(name)) for k in range(axis.window)]
        images = jnp.stack(seen, axis=-1)
    elements, order = _ELEMENTS[: len(window)], f"bgn{_SPATIAL[: len(window)]}"
    left = jnp.einsum(f"{names}{elements}->{order}{elements}c", images)
    right = jnp.einsum(f"{out_names}->{order}o", out)
    shape, (_, i, o) = (ctx.examples, groups, t), layout.sizes
    return Outer(left.reshape(*shape, i), right.reshape(*shape, o), layout, precision)


_SPATIAL, _ELEMENTS = "xyzuvw", "ijklmr"


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A spatial axis: which places of the images are seen through element `k` of the window."""

    size: int
    """Of the images."""
    out_size: int
    window: int
    stride: int
    dilation: int
    """Of the images."""
    spread: int
    """Dilation of the window."""
    padding: tuple[int, int]
    moving: bool
    """Whether the cotangents are shifted, and the images stay."""

    @property
    def edges(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """How the images and the cotangents are padded."""
        if not self.moving:
            return (*self.padding, self.dilation - 1), (0, 0, 0)
        low = self.padding[0]
        after = low + (self.size - 1) * self.dilation + 1 - self.out_size
        return (0, 0, 0), (max(0, (self.window - 1) * self.spread - low), max(0, after), 0)

    def seen(self, images: Any, k: int, at: int) -> Any:
        """Those places of the images, one for each cotangent."""
        return _slice(images, k * self.spread, self.out_size, self.stride, at)

    def seeing(self, out: Any, k: int, at: int) -> Any:
        """The cotangents that see the images through `k`, one for each place; zero where none."""
        _, (before, _, _) = self.edges
        start = before + self.padding[0] - k * self.spread
        return _slice(out, start, self.size, self.dilation, at)


def _moving_cotangents(strides: Any, dilations: Any, fewer: bool) -> list[bool]:
    """Along which spatial axes the cotangents are shifted, and the images stay.

    A shift is a copy, so that the side with fewer channels moves. Strides hold the cotangents in
    their place. Dilated images (transposed convolutions) stay as they are: shifted, each copy
    would be mostly zeros. Of an autoencoder on a CPU such copies take 1.0x the time and 14.6 times
    the memory of a plain gradient, without them it is 0.3x and 2.3 times.
    """
    strided, dilated = any(s > 1 for s in strides), any(d > 1 for d in dilations)
    default = not strided and (dilated or fewer)
    return [s == 1 and (d > 1 or default) for s, d in zip(strides, dilations, strict=True)]


def _padded(x: Any, edges: Any) -> Any:
    return lax.pad(x, jnp.zeros((), x.dtype), edges) if any(map(any, edges)) else x


def _slice(x: Any, start: int, size: int, stride: int, axis: int) -> Any:
    return lax.slice_in_dim(x, start, start + max((size - 1) * stride + 1, 0), stride, axis=axis)


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
