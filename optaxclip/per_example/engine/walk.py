"""Two walks through a block: forward with taps, and from the cotangents of the taps to forms.

A use is an equation in which a parameter meets the example. A zero is added to its output (a
tap), and its operands that carry the example are recorded. A control-flow equation carries
the taps and records of its bodies. Both walks nest as the blocks do.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import jax.numpy as jnp

from optaxclip._compat import source_line
from optaxclip.per_example.engine.program import (
    Block,
    Equation,
    Found,
    Values,
    evaluate_once,
    merge,
)
from optaxclip.per_example.engine.pullback import pull_back
from optaxclip.per_example.engine.registry import RuleContext, rule_of, stacked_vjp
from optaxclip.per_example.forms.forms import Dense, Form, is_form

Taps = tuple[dict[int, Any], dict[int, Any]]
Record = dict[int, Any]
"""The operands of a use that depend on the example, by position."""
Records = dict[int, Any]


class Watch(Protocol):
    """Uses whose gradients are measured as the cotangent arrives, so that no tap is needed."""

    @property
    def uses(self) -> Set[Equation]: ...

    @property
    def links(self) -> bool:
        """Whether sums are wanted: parameters are differentiated, but through what is watched."""
        ...

    @property
    def steps(self) -> bool:
        """Whether the number of a scan's step is wanted."""
        ...

    def watched(
        self, block: Block, number: int, uses: Sequence[tuple[Equation, Record]], values: Values
    ) -> Any:
        """A value whose cotangent will be seen, given what its uses recorded."""
        ...


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """Nothing is watched: every use has a tap."""

    uses: Set[Equation] = frozenset()
    links: bool = False
    steps: bool = False

    def watched(self, block: Block, number: int, uses: Any, values: Values) -> Any:
        return values[number]


NOTHING: Watch = _Nothing()


def zero_taps(block: Block, watch: Watch = NOTHING) -> Taps:
    """The taps by the number of their value; those of control flow by its place in the block."""
    avals: dict[int, Any] = {}
    for equation in block.each:
        if isinstance(equation, Equation):
            avals.update(zip(equation.outputs, (v.aval for v in equation.eqn.outvars), strict=True))
    uses = [e for e in block.each if isinstance(e, Equation) and block.is_use(e)]
    uses = [e for e in uses if e not in watch.uses]
    tapped = {block.tapped[e.outputs[k]] for e in uses for k in e.differentiable}
    here = {n: jnp.zeros(avals[n].shape, avals[n].dtype) for n in tapped}
    return here, {k: e.taps(watch) for k, e in enumerate(block.each) if not isinstance(e, Equation)}


def run(
    block: Block, values: Values, taps: Taps, watch: Watch = NOTHING
) -> tuple[list[Any], Records]:
    """The outputs for one example, and the records. `values` gains what is evaluated."""
    here, within = taps
    records: Records = {}
    waiting: dict[int, list[tuple[Equation, Record]]] = {}
    for k, equation in enumerate(block.each):
        if not isinstance(equation, Equation):
            records[k] = equation.run(values, within[k], watch)
            continue
        operands = equation.evaluate(values, block.active if watch.links else ())
        record = {p: operands[p] for p in equation.recorded}
        if equation in watch.uses:
            number = block.tapped[equation.outputs[equation.differentiable[0]]]
            waiting.setdefault(number, []).append((equation, record))
        elif block.is_use(equation):
            records[k] = record
        for number in here.keys() & equation.outputs:
            values[number] += here[number]
        for number in waiting.keys() & set(equation.outputs):
            values[number] = watch.watched(block, number, waiting.pop(number), values)
    return [values[i] for i in block.outputs], records


def find_forms(
    block: Block, values: Mapping[int, Any], records: Records, cotangents: Taps
) -> Found:
    """The forms of the active values that the block takes from around it.

    `values` holds all known values, those of the block included; records and cotangents are
    batched.
    """
    found: Found = {}
    here, within = cotangents
    for k, equation in enumerate(block.each):
        if not isinstance(equation, Equation):
            merge(found, equation.forms(values, records[k], within[k]).items())
        elif k in records:
            arrived = [here[block.tapped[equation.outputs[p]]] for p in equation.differentiable]
            forms = forms_of_use(equation, values, records[k], arrived, block)
            merge(found, ((number, [form]) for number, form in forms))
    pull_back(block, values, found)
    return found


def body_forms(body: Block, values: Mapping[int, Any], records: Records, cotangents: Taps) -> Found:
    """`find_forms` of a body, whose known values are yet to be evaluated."""
    local = dict(values)
    evaluate_once(body, local)
    return find_forms(body, local, records, cotangents)


def forms_of_use(
    equation: Equation,
    values: Mapping[int, Any],
    record: Record,
    cotangents: list[Any],
    block: Block,
) -> list[tuple[int, Form]]:
    """The form of each parameter operand, by the number of its value."""
    eqn, inputs = equation.eqn, equation.inputs
    operands = tuple(record[p] if p in record else values[i] for p, i in enumerate(inputs))
    batched = tuple(p in record for p in range(len(operands)))
    found: list[tuple[int, Form]] = []
    left: list[int] = []
    rule = rule_of(eqn.primitive)
    for position, number in enumerate(inputs):
        if number not in block.active:
            continue
        ctx = RuleContext(eqn, position, batched, operands, tuple(cotangents))
        real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (ctx.parameter, *cotangents))
        form = rule(ctx, *operands, **eqn.params) if rule is not None and real else None
        if form is None:
            left.append(position)
        else:
            found.append((number, _checked(form, ctx)))
    if left:
        why = f"no exact factored form for {eqn.primitive} at {source_line(eqn)}"
        stacked = stacked_vjp(eqn, tuple(left), batched, operands, tuple(cotangents))
        found += [(inputs[p], Dense(x, why)) for p, x in zip(left, stacked, strict=True)]
    return found


def _checked(form: Any, ctx: RuleContext) -> Form:
    """What a rule returned. Raises unless it is a form shaped like the parameter."""
    shape = tuple(ctx.parameter.shape)
    if not is_form(form) or form.shape != shape:
        found = f"{type(form).__name__} of {form.shape}" if is_form(form) else repr(form)
        raise TypeError(
            f"a rule must return a form shaped like the parameter, got {found} for {shape}, of"
            f" {ctx.equation.primitive} at {ctx.source}. Return Outer, Gathered, Dense or Sum, or"
            " None where the rule does not apply."
        )
    return form
