"""From a use back to the parameter, through code that does not depend on the example.

Transposes, reshapes, casts and scalings keep a form factored. Anything else is a VJP, which
needs the gradients stacked.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from optaxclip._compat import Primitive, source_line
from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip.norms import accumulator
from optaxclip.per_example.forms import Dense, Form, Gathered, Outer, add, scale, terms
from optaxclip.per_example.program import Equation, Program
from optaxclip.per_example.registry import stacked_vjp

# Their VJPs put stacked gradients in place, and need no more room than the parameter's part.
_PLACING = frozenset({P.slice_p, P.dynamic_slice_p, P.pad_p, P.concatenate_p})


def pull_back(program: Program, values: dict[int, Any], cotangents: dict[int, list[Form]]) -> None:
    """Replace the cotangents of intermediate values by those of the parameters, in place."""
    for equation in reversed(program.once):
        arrived = [add(f) if (f := cotangents.pop(n, None)) else None for n in equation.outputs]
        positions = tuple(p for p, i in enumerate(equation.inputs) if i in program.active)
        if not positions or not any(arrived):
            continue
        stuck = arrived
        if len(arrived) == 1 and len(positions) == 1 and arrived[0] is not None:
            source = equation.inputs[positions[0]]
            kept: list[Form] = []
            for form in terms(arrived[0]):
                moved = _moved(form, equation, positions[0], values)
                if moved is None:
                    kept.append(form)
                else:
                    cotangents.setdefault(source, []).append(moved)
            stuck = [add(kept) if kept else None]
        if any(stuck):
            for p, form in zip(positions, _dense(equation, positions, values, stuck), strict=True):
                cotangents.setdefault(equation.inputs[p], []).append(form)


def _moved(form: Form, equation: Equation, position: int, values: dict[int, Any]) -> Form | None:
    """The form of the input, still factored; None if there is none."""
    rule = _FACTORED.get(equation.eqn.primitive)
    operands = [values[i] for i in equation.inputs]
    real = jnp.issubdtype(operands[position].dtype, jnp.floating) and jnp.issubdtype(
        form.dtype, jnp.floating
    )
    if rule is None or not real or not isinstance(form, Outer | Gathered):
        return None
    return rule(form, position, operands, equation.eqn.params)


def _dense(
    equation: Equation, positions: tuple[int, ...], values: dict[int, Any], arrived: list[Any]
) -> list[Form]:
    eqn, operands = equation.eqn, tuple(values[i] for i in equation.inputs)
    why = f"{eqn.primitive} of the parameter at {source_line(eqn)} is no isometry"
    stacks: list[Any] = [None if f is None else f.materialize() for f in arrived]
    examples = next(x.shape[0] for x in stacks if x is not None)
    cotangents = []
    for k in equation.differentiable:
        aval: Any = eqn.outvars[k].aval
        zeros = jnp.zeros((examples, *aval.shape), aval.dtype)
        cotangents.append(zeros if stacks[k] is None else stacks[k])
    found = [term for form in arrived if form is not None for term in terms(form)]
    reasons = [term.reason if isinstance(term, Dense) else why for term in found]
    if eqn.primitive is P.broadcast_in_dim_p:
        stacked: tuple[Any, ...] = (_summed(cotangents[0], operands[positions[0]].shape, eqn),)
    else:
        none_batched = (False,) * len(operands)
        stacked = stacked_vjp(eqn, positions, none_batched, operands, tuple(cotangents))
    grows = max(x.size for x in stacked) > sum(x.size for x in cotangents)
    if grows and eqn.primitive not in _PLACING:
        reasons.append(why)
    reason = "; ".join(dict.fromkeys(r for r in reasons if r))
    return [Dense(x, reason) for x in stacked]


def _summed(stacked: Any, shape: tuple[int, ...], eqn: Any) -> Any:
    """The transpose of a broadcast, added in float32 for 16-bit numbers."""
    dims = eqn.params["broadcast_dimensions"]
    lost = [
        1 + a
        for a in range(stacked.ndim - 1)
        if a not in dims or shape[dims.index(a)] != stacked.shape[1 + a]
    ]
    wide = accumulator(stacked.dtype) if jnp.issubdtype(stacked.dtype, jnp.floating) else None
    total = jnp.sum(stacked, axis=tuple(lost), dtype=wide).astype(stacked.dtype)
    return total.reshape(stacked.shape[0], *shape)


def _reshaped(form: Any, position: int, operands: list[Any], params: dict[str, Any]) -> Form | None:
    operand = operands[position]
    if operand.size != math.prod(form.shape) or params.get("dimensions") is not None:
        return None  # a broadcast, or a reshape that also transposes
    return replace(form, layout=form.layout.reshaped(operand.shape))


def _squeezed(form: Any, position: int, operands: list[Any], params: dict[str, Any]) -> Form:
    return replace(form, layout=form.layout.reshaped(operands[position].shape))


def _transposed(
    form: Any, position: int, operands: list[Any], params: dict[str, Any]
) -> Form | None:
    layout = form.layout.transposed(params["permutation"], operands[position].shape)
    return None if layout is None else replace(form, layout=layout)


def _cast(form: Any, position: int, operands: list[Any], params: dict[str, Any]) -> Form:
    return replace(form, layout=form.layout.cast(operands[position].dtype))


def _times(form: Form, position: int, operands: list[Any], params: dict[str, Any]) -> Form | None:
    factor = jnp.asarray(operands[1 - position])
    return scale(form, factor) if factor.ndim == 0 else None


def _divided(form: Form, position: int, operands: list[Any], params: dict[str, Any]) -> Form | None:
    divisor = jnp.asarray(operands[1])
    return scale(form, 1 / divisor) if position == 0 and divisor.ndim == 0 else None


_FACTORED: dict[Primitive, Callable[[Any, int, list[Any], dict[str, Any]], Form | None]] = {
    P.reshape_p: _reshaped,
    P.squeeze_p: _squeezed,
    P.broadcast_in_dim_p: _reshaped,
    P.transpose_p: _transposed,
    P.convert_element_type_p: _cast,
    P.copy_p: lambda form, *_: form,
    P.neg_p: lambda form, *_: scale(form, -1),
    P.mul_p: _times,
    P.div_p: _divided,
}
