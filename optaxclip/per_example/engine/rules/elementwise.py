"""Elementwise operations with a parameter: biases, scales, masks.

A parameter's stacked gradient has its own shape, which is that of the cotangent at most: nothing
smaller exists. Where it was broadcast, by an equation before this one or by this one itself (a
scalar, axes of length one), the transpose adds it up.
"""

from typing import Any

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.per_example.engine.registry import RuleContext, register_rule
from optaxclip.per_example.forms.forms import Dense


@register_rule(P.add_p, P.sub_p, P.mul_p, P.div_p, P.max_p, P.min_p, P.pow_p, P.atan2_p)
@register_rule(P.select_n_p, P.clamp_p)
def elementwise(ctx: RuleContext, *operands: Any, **params: Any) -> Dense | None:
    """`dL/dp_b = g_b * d(out)/dp`.   Cost: one operation per element of the output."""
    return Dense(ctx.vjp())


@register_rule(P.concatenate_p, P.pad_p, P.dynamic_update_slice_p, P.copy_p)
def placing(ctx: RuleContext, *operands: Any, **params: Any) -> Dense | None:
    """`dL/dp_b` is a part of the cotangent.   Cost: a copy."""
    return Dense(ctx.vjp())
