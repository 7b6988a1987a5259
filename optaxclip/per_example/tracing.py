"""Follow the data: the cotangent of every use of a parameter, by one vmapped backward pass.

An equation in which a parameter meets the example is a use. A zero is added to its output (a
tap), and one `jax.vjp` with respect to the taps gives every cotangent. That backward pass
computes no weight gradient; a rule makes a form of operands and cotangent at each use.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import bind, source_line
from optaxclip.per_example.forms import Dense, Form, Outer, add
from optaxclip.per_example.layout import Layout
from optaxclip.per_example.program import Equation, Program, trace
from optaxclip.per_example.pullback import pull_back
from optaxclip.per_example.registry import RuleContext, rule_of, stacked_vjp


def value_and_forms(fun: Callable, params: Any, batch: Any) -> tuple[jax.Array, list[Form]]:
    """The loss of each example, [B], and the per-example gradients of each leaf of `params`."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    program = trace(fun, params, example)
    values = dict(program.constants)
    values.update(zip(program.params, jax.tree.leaves(params), strict=True))
    for equation in program.once:
        _evaluate(equation, values)

    losses, uses = _cotangents(program, values, jax.tree.leaves(batch))
    cotangents: dict[int, list[Form]] = {}
    for use in uses:
        for number, form in _forms(use, program):
            cotangents.setdefault(number, []).append(form)
    if program.loss in program.active:  # the example is not used
        cotangents.setdefault(program.loss, []).append(Dense(jnp.ones_like(losses)))
    pull_back(program, values, cotangents)

    count = losses.shape[0]
    forms = [
        add(cotangents[number]) if number in cotangents else _zero(values[number], count)
        for number in program.params
    ]
    return losses, forms


@dataclasses.dataclass(frozen=True)
class _Use:
    """A use with its operands, those that carry examples batched, and its cotangents."""

    equation: Equation
    operands: tuple[Any, ...]
    batched: tuple[bool, ...]
    cotangents: tuple[Any, ...]


def _evaluate(equation: Equation, values: dict[int, Any]) -> tuple[Any, ...]:
    operands = tuple(values[i] for i in equation.inputs)
    outputs = bind(equation.eqn, *operands)
    values.update(zip(equation.outputs, outputs, strict=True))
    return operands


def _cotangents(
    program: Program, values: dict[int, Any], batch: list[Any]
) -> tuple[jax.Array, list[_Use]]:
    uses = program.uses
    which = {equation: k for k, equation in enumerate(uses)}
    taps = [[_zeros(e.eqn.outvars[k].aval) for k in e.differentiable] for e in uses]

    def run(taps: list[list[Any]], example: list[Any]) -> tuple[Any, list[dict[int, Any]]]:
        local = dict(values)
        local.update(zip(program.example, example, strict=True))
        records: list[dict[int, Any]] = []
        for equation in program.each:
            operands = _evaluate(equation, local)
            if equation in which:
                tap = taps[which[equation]]
                for k, zero in zip(equation.differentiable, tap, strict=True):
                    local[equation.outputs[k]] = local[equation.outputs[k]] + zero
                records.append(
                    {p: x for p, x in enumerate(operands) if equation.inputs[p] not in values}
                )
        return local[program.loss], records

    def one(example: list[Any]) -> tuple[Any, list[dict[int, Any]], list[list[Any]]]:
        loss, pull, records = jax.vjp(lambda taps: run(taps, example), taps, has_aux=True)
        return loss, records, pull(jnp.ones_like(loss))[0]

    losses, records, cotangents = jax.vmap(one)(batch)
    found = []
    for equation, record, cotangent in zip(uses, records, cotangents, strict=True):
        operands = tuple(
            record[p] if p in record else values[i] for p, i in enumerate(equation.inputs)
        )
        batched = tuple(p in record for p in range(len(operands)))
        found.append(_Use(equation, operands, batched, tuple(cotangent)))
    return losses, found


def _zeros(aval: Any) -> jax.Array:
    return jnp.zeros(aval.shape, aval.dtype)


def _forms(use: _Use, program: Program) -> list[tuple[int, Form]]:
    """The form of each parameter operand, by the number of its value."""
    eqn, inputs = use.equation.eqn, use.equation.inputs
    found: list[tuple[int, Form]] = []
    left: list[int] = []
    rule = rule_of(eqn.primitive)
    for position, number in enumerate(inputs):
        if number not in program.active:
            continue
        ctx = RuleContext(eqn, position, use.batched, use.operands, use.cotangents)
        real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (ctx.parameter, *use.cotangents))
        form = rule(ctx, *use.operands, **eqn.params) if rule is not None and real else None
        if form is None:
            left.append(position)
        else:
            found.append((number, form))
    if left:
        why = f"no exact factored form for {eqn.primitive} at {source_line(eqn)}"
        stacked = stacked_vjp(eqn, tuple(left), use.batched, use.operands, use.cotangents)
        found += [(inputs[p], Dense(x, why)) for p, x in zip(left, stacked, strict=True)]
    return found


def _zero(parameter: jax.Array, count: int) -> Form:
    """The gradient of a parameter that is not used: no terms."""
    shape, dtype = parameter.shape, parameter.dtype
    layout = Layout(shape, dtype, ((), tuple(range(len(shape))), ()))
    return Outer(
        jnp.zeros((count, 1, 0, parameter.size), dtype), jnp.zeros((count, 1, 0, 1), dtype), layout
    )
