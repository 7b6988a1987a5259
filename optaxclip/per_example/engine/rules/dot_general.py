"""Matrix products with a parameter on either side, for all dimension numbers."""

import math
from typing import Any

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._numerics import accumulator, wider
from optaxclip.per_example.engine.registry import RuleContext, register_rule
from optaxclip.per_example.forms.forms import Outer
from optaxclip.per_example.forms.layout import Layout


@register_rule(P.dot_general_p)
def dot_general(
    ctx: RuleContext, lhs: Any, rhs: Any, *, dimension_numbers: Any, precision: Any, **params: Any
) -> Outer:
    """`dL/dw_b[k] = sum_t x_b[k, t]^T g_b[k, t]`.   Cost: none, until it is contracted.

    K are the batch axes of the product, I the contracted axes, O the parameter's free axes
    and T the data's free axes.
    """
    contract, batch = dimension_numbers
    mine, other = ctx.position, 1 - ctx.position
    # In the parameter's order, so that the forms of all its uses agree.
    pairs = sorted(zip(contract[mine], contract[other], strict=True))
    rows, columns = tuple(a for a, _ in pairs), tuple(a for _, a in pairs)
    weight, data = ctx.parameter, (lhs, rhs)[other]
    data_ndim = data.ndim - 1  # without the examples
    free = _free(data_ndim, contract[other], batch[other])
    weight_free = _free(weight.ndim, contract[mine], batch[mine])

    left = data.transpose(0, *(1 + a for a in (*batch[other], *free, *columns)))
    # The output's axes: batch, then the free axes of lhs, then those of rhs.
    k = len(batch[0])
    n_free, n_weight = len(free), len(weight_free)
    start, start_weight = (k, k + n_free) if other == 0 else (k + n_weight, k)
    order = (*range(k), *range(start, start + n_free))
    order = (*order, *range(start_weight, start_weight + n_weight))
    right = ctx.cotangent.transpose(0, *(1 + a for a in order))

    roles = (tuple(batch[mine]), rows, weight_free)
    layout = Layout(weight.shape, weight.dtype, roles)
    size_k, size_i, size_o = layout.sizes
    t = math.prod(data.shape[1 + a] for a in free)
    if accumulator(left.dtype) != accumulator(right.dtype):  # of 32 and of 64 bits
        wide = wider(left.dtype, right.dtype)
        left, right = left.astype(wide), right.astype(wide)
    return Outer(
        left.reshape(ctx.examples, size_k, t, size_i),
        right.reshape(ctx.examples, size_k, t, size_o),
        layout,
        precision,
    )


def _free(ndim: int, *taken: Any) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if not any(a in axes for axes in taken))
