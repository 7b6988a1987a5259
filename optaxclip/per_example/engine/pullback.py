"""From a use back to the parameter, through code that does not depend on the example.

Where `isometries` knows a way, a form stays factored. Anything else is a VJP, which needs the
gradients stacked.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._compat import source_line
from optaxclip._numerics import accumulator
from optaxclip.per_example.engine import factor_maps as factor_maps  # registers its rules
from optaxclip.per_example.engine.assumptions import is_linear
from optaxclip.per_example.engine.isometries import Passage, moved
from optaxclip.per_example.engine.program import Block, Equation, Found
from optaxclip.per_example.engine.registry import RuleContext, rule_of, stacked_vjp
from optaxclip.per_example.forms.forms import Dense, Form, Shared, add, terms

# Their VJPs put stacked gradients in place, and need no more room than the parameter's part.
_PLACING = frozenset({P.slice_p, P.dynamic_slice_p, P.pad_p, P.concatenate_p})


def pull_back(block: Block, values: Mapping[int, Any], cotangents: Found) -> None:
    """Replace the cotangents of a block's own known values by those of its inputs, in place."""
    origins = {n: equation for equation in block.once for n in equation.outputs}
    for equation in reversed(block.once):
        arrived = [add(f) if (f := cotangents.pop(n, None)) else None for n in equation.outputs]
        positions = tuple(p for p, i in enumerate(equation.inputs) if i in block.active)
        if not positions or not any(arrived):
            continue

        def give(p: int, form: Form, equation: Equation = equation) -> None:
            cotangents.setdefault(equation.inputs[p], []).append(form)

        linear = is_linear(equation.eqn)
        stuck: list[Form | None] = []
        for output, form in enumerate(arrived):
            kept: list[Form] = []
            for term in terms(form) if form is not None else ():
                passage = _passage(equation, output, positions, values, origins)
                found = moved(term, passage) if linear else None
                if found is None and linear:
                    found = _shared(term, passage, equation)
                if found is None:
                    kept.append(term)
                for p, x in found or ():
                    if p in positions:
                        give(p, x)
            stuck.append(add(kept) if kept else None)
        if any(stuck):
            forms = _by_rule(equation, positions, values, stuck) if linear else None
            forms = forms or _dense(equation, positions, values, stuck)
            for p, form in zip(positions, forms, strict=True):
                give(p, form)


def _shared(term: Form, passage: Passage, equation: Equation) -> list[tuple[int, Form]] | None:
    """A term that depends on the example by a factor alone, `c_b g`: g is pulled back once for all.

    It begins at a number that is made of many, such as a penalty on the weights.
    """
    eqn, operands = equation.eqn, passage.operands
    most = max(operands[p].size for p in passage.active)
    if isinstance(term, Dense) and math.prod(term.shape) == 1 < most:
        term = Shared(term.stacked.reshape(-1), jnp.ones((1, *term.shape), term.dtype))
    if not isinstance(term, Shared):
        return None
    cotangents = []
    for k in equation.differentiable:
        aval: Any = eqn.outvars[k].aval
        zeros = jnp.zeros((1, *aval.shape), aval.dtype)
        cotangents.append(term.gradient.astype(aval.dtype) if k == passage.output else zeros)
    none_batched = (False,) * len(operands)
    found = stacked_vjp(eqn, passage.active, none_batched, operands, tuple(cotangents))
    return [(p, Shared(term.scales, x)) for p, x in zip(passage.active, found, strict=True)]


def _by_rule(
    equation: Equation, positions: tuple[int, ...], values: Mapping[int, Any], arrived: list[Any]
) -> list[Form] | None:
    """Of a parameter that met a constant, `h_0 W`: the constant is like data all examples share.

    None where there is no rule, or where the parameters are no larger than what they make.
    """
    eqn, operands = equation.eqn, tuple(values[i] for i in equation.inputs)
    rule = rule_of(eqn.primitive)
    if rule is None or len(arrived) != 1:
        return None
    if max(operands[p].size for p in positions) <= math.prod(arrived[0].shape):
        return None
    cotangent = arrived[0].materialize()
    examples = cotangent.shape[0]
    if not jnp.issubdtype(cotangent.dtype, jnp.floating):
        return None
    found: list[Form] = []
    for p in positions:
        others = tuple(k != p for k in range(len(operands)))
        given = tuple(
            jnp.broadcast_to(x, (examples, *jnp.shape(x))) if other else x
            for x, other in zip(operands, others, strict=True)
        )
        ctx = RuleContext(eqn, p, others, given, (cotangent,))
        real = jnp.issubdtype(ctx.parameter.dtype, jnp.floating)
        form = rule(ctx, *given, **eqn.params) if real else None
        if form is None or (isinstance(form, Dense) and ctx.parameter.size > cotangent[0].size):
            return None
        found.append(form)
    return found


def _passage(
    equation: Equation,
    output: int,
    positions: tuple[int, ...],
    values: Mapping[int, Any],
    origins: Mapping[int, Equation],
) -> Passage:
    operands = tuple(values[i] for i in equation.inputs)
    made = tuple(origins.get(i) for i in equation.inputs)
    repeated = tuple(
        _repeated(e, x) if e is not None else None for e, x in zip(made, operands, strict=True)
    )
    return Passage(
        equation.eqn.primitive, output, positions, operands, equation.eqn.params, repeated
    )


def _repeated(made: Equation, operand: Any) -> int | None:
    """The only axis along which a value varies that was broadcast from a vector."""
    if made.eqn.primitive is not P.broadcast_in_dim_p:
        return None
    vector: Any = made.eqn.invars[0].aval
    axes = [d for d, n in zip(made.eqn.params["broadcast_dimensions"], vector.shape, strict=True)
            if n > 1]  # fmt: skip
    return axes[0] if len(axes) == 1 else None


def _dense(
    equation: Equation, positions: tuple[int, ...], values: Mapping[int, Any], arrived: list[Any]
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
