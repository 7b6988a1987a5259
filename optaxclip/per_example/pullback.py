"""From a use back to the parameter, through code that does not depend on the example.

Where `isometries` knows a way, a form stays factored. Anything else is a VJP, which needs the
gradients stacked.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._compat import source_line
from optaxclip._reductions import accumulator
from optaxclip.per_example.forms import Dense, Form, add, terms
from optaxclip.per_example.isometries import Passage, moved
from optaxclip.per_example.program import Block, Equation, Found
from optaxclip.per_example.registry import stacked_vjp

# Their VJPs put stacked gradients in place, and need no more room than the parameter's part.
_PLACING = frozenset({P.slice_p, P.dynamic_slice_p, P.pad_p, P.concatenate_p})


def pull_back(block: Block, values: Mapping[int, Any], cotangents: Found) -> None:
    """Replace the cotangents of a block's own known values by those of its inputs, in place."""
    for equation in reversed(block.once):
        arrived = [add(f) if (f := cotangents.pop(n, None)) else None for n in equation.outputs]
        positions = tuple(p for p, i in enumerate(equation.inputs) if i in block.active)
        if not positions or not any(arrived):
            continue
        stuck: list[Form | None] = []
        for output, form in enumerate(arrived):
            kept: list[Form] = []
            for term in terms(form) if form is not None else ():
                found = moved(term, _passage(equation, output, positions, values))
                if found is None:
                    kept.append(term)
                for p, x in found or ():
                    if p in positions:
                        cotangents.setdefault(equation.inputs[p], []).append(x)
            stuck.append(add(kept) if kept else None)
        if any(stuck):
            for p, form in zip(positions, _dense(equation, positions, values, stuck), strict=True):
                cotangents.setdefault(equation.inputs[p], []).append(form)


def _passage(
    equation: Equation, output: int, positions: tuple[int, ...], values: Mapping[int, Any]
) -> Passage:
    operands = tuple(values[i] for i in equation.inputs)
    return Passage(equation.eqn.primitive, output, positions, operands, equation.eqn.params)


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
