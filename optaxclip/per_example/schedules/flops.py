"""Floating-point operations of a function, counted on its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import JaxprEqn, Primitive
from optaxclip._compat import primitives as P  # noqa: N812

# They move numbers and compute none.
_MOVING = frozenset({
    P.broadcast_in_dim_p, P.concatenate_p, P.convert_element_type_p, P.copy_p, P.dynamic_slice_p,
    P.dynamic_update_slice_p, P.gather_p, P.iota_p, P.pad_p, P.reshape_p, P.rev_p, P.select_n_p,
    P.slice_p, P.squeeze_p, P.stop_gradient_p, P.transpose_p,
})  # fmt: skip

_BODIES = ("jaxpr", "call_jaxpr", "body_jaxpr")


def flops(fun: Callable, *args: Any) -> int:
    """Operations of `fun(*args)`, from shapes alone.

    A product of matrices or a convolution counts 2 for each multiplication, anything else 1 for
    each element of its input or output, whichever is larger. Of a `while` one turn is counted, of a
    `cond` the dearest branch.
    """
    return flops_of(jax.make_jaxpr(fun)(*args))


def flops_of(jaxpr: Any, only: Primitive | None = None) -> int:
    """Operations of a jaxpr, or of one primitive in it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(eqn, only) for eqn in jaxpr.eqns)


def _of_equation(eqn: JaxprEqn, only: Primitive | None) -> int:
    params = eqn.params
    if "branches" in params:
        return max(flops_of(branch, only) for branch in params["branches"])
    for name in _BODIES:
        if hasattr(params.get(name), "eqns"):
            return params.get("length", 1) * flops_of(params[name], only)
    if eqn.primitive in _MOVING or (only is not None and eqn.primitive is not only):
        return 0
    outputs, inputs = ([_size(v) for v in vs] for vs in (eqn.outvars, eqn.invars))
    if eqn.primitive is P.dot_general_p:
        (contracted, _), _ = params["dimension_numbers"]
        lhs: Any = eqn.invars[0].aval
        return 2 * outputs[0] * math.prod(lhs.shape[a] for a in contracted)
    if eqn.primitive is P.conv_general_dilated_p:
        kernel: Any = eqn.invars[1].aval
        return 2 * outputs[0] * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return max(outputs + inputs, default=0)


def _size(variable: Any) -> int:
    """Elements of a floating-point array; 0 of anything else."""
    aval = variable.aval
    return aval.size if jnp.issubdtype(getattr(aval, "dtype", int), jnp.inexact) else 0
