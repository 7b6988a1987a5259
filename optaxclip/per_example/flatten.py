"""From a function to a `Program`: inline calls, split by dependence, nest control flow.

A known equation goes to the outermost block that has its inputs, out of the loops and
checkpoints around it: what a body computes from its constants alone is evaluated, and pulled
back through, once.
"""

import itertools
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np

from optaxclip._compat import (
    JaxprEqn,
    Primitive,
    inlined_jaxpr,
    is_literal,
    live_jaxpr,
    primitives,
)
from optaxclip.per_example.branches import flatten_cond
from optaxclip.per_example.checkpoint import flatten_checkpoint
from optaxclip.per_example.program import Block, ControlFlow, Equation, Program, reach
from optaxclip.per_example.scan import flatten_scan


def trace(fun: Callable, params: list[Any], example: list[Any]) -> tuple[Program, Any]:
    """The program of `fun(params, example) -> (loss, aux)`; the structure of `aux`."""
    closed, (_, aux) = jax.make_jaxpr(fun, return_shape=True)(params, example)
    count = len(params)
    builder = Builder()
    consts = [builder.constant(c) for c in closed.consts]
    inputs = [builder.known() if k < count else builder.data() for k in range(len(closed.in_avals))]
    builder.active.update(inputs[:count])
    loss, *others = builder.inline(live_jaxpr(closed.jaxpr), consts, inputs)
    loss = builder.met(loss, closed.out_avals[0])
    block = builder.close([loss, *others])
    builder.differentiated.add(loss)
    reach(block, builder.differentiated)
    program = Program(builder.constants, tuple(inputs[:count]), tuple(inputs[count:]), block)
    return program, jax.tree.structure(aux)


class Builder:
    """Numbers values and sorts equations into blocks."""

    def __init__(self) -> None:
        self.constants: dict[int, Any] = {}
        self.active: set[int] = set()
        self.differentiated: set[int] = set()
        self.once: list[list[Equation]] = [[]]
        """Known equations of the block at hand and of those around it, outermost first."""
        self.each: list[list[Equation | ControlFlow]] = [[]]
        self.outermost = 0
        """The outermost block that known equations may go to."""
        self._level: dict[int, int] = {}  # of known values: the index of their block in `once`
        self._readers: dict[int, list[Equation | None]] = {}
        self._numbers = itertools.count()

    def data(self) -> int:
        """A new value that depends on the example."""
        return next(self._numbers)

    def known(self) -> int:
        """A new known value of the block at hand."""
        number = next(self._numbers)
        self._level[number] = len(self.once) - 1
        return number

    def constant(self, value: Any) -> int:
        """A new known value that is there everywhere."""
        number = next(self._numbers)
        self._level[number] = 0
        self.constants[number] = value
        return number

    def is_known(self, number: int) -> bool:
        """Whether a value does not depend on the example."""
        return number in self._level

    def inline(self, jaxpr: Any, consts: Sequence[int], inputs: Sequence[int]) -> list[int]:
        """Append the equations of a jaxpr; the numbers of its outputs."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            if is_literal(atom):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self._equation(eqn, [*map(read, eqn.invars)]), strict=True))
        return [*map(read, jaxpr.outvars)]

    def inline_closed(self, closed: Any, inputs: Sequence[int]) -> list[int]:
        """The same for a jaxpr with its constants."""
        return self.inline(closed.jaxpr, [self.constant(c) for c in closed.consts], inputs)

    def traced(
        self, fun: Callable, avals: Sequence[Any], inputs: Sequence[int], eqn: JaxprEqn
    ) -> list[int]:
        """Append the equations of a function, as part of `eqn`; the numbers of its outputs."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        closed = jax.make_jaxpr(fun)(*shapes)
        jaxpr: Any = closed.jaxpr
        eqns = [e.replace(source_info=eqn.source_info) for e in jaxpr.eqns]
        consts = [self.constant(c) for c in closed.consts]
        return self.inline(jaxpr.replace(eqns=eqns), consts, inputs)

    def append(self, equation: Equation | ControlFlow) -> None:
        """Append an equation that depends on the example."""
        self.each[-1].append(equation)

    def open(self) -> None:
        """Begin a block within the block at hand."""
        self.once.append([])
        self.each.append([])

    def close(self, outputs: Sequence[int]) -> Block:
        """End it."""
        return self.block(self.once.pop(), outputs)

    def block(self, once: Sequence[Equation], outputs: Sequence[int]) -> Block:
        """A block of the equations that depend on the example, since the last one began."""
        each = self.each.pop()
        self._read(outputs, None)
        uses = [e for e in each if isinstance(e, Equation) and e.use]
        numbers = [e.outputs[k] for e in uses for k in e.differentiable]
        here = frozenset(each)
        tapped = {n: self._tapped(n, here) for n in numbers}
        return Block(
            tuple(once), tuple(each), tuple(outputs), tapped, self.active, self.differentiated
        )

    def _read(self, numbers: Sequence[int], reader: Equation | None) -> None:
        for number in numbers:
            self._readers.setdefault(number, []).append(reader)

    def _tapped(self, number: int, each: Set[Equation | ControlFlow]) -> int:
        """The last of the sums that a value goes into and nowhere else."""
        while True:
            reader, *others = self._readers.get(number, [None])
            if others or reader is None or reader not in each:
                return number
            if reader.eqn.primitive is not primitives.add_p:
                return number
            # A summand that is broadcast has another cotangent than the sum.
            summand: Any = reader.eqn.invars[reader.inputs.index(number)].aval
            total: Any = reader.eqn.outvars[0].aval
            if summand.shape != total.shape:
                return number
            (number,) = reader.outputs

    def met(self, number: int, aval: Any) -> int:
        """A value as one that depends on the example: an active one is copied, which is a use."""
        if number not in self.active:
            return number
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        (eqn,) = jax.make_jaxpr(primitives.copy_p.bind)(shape).eqns
        copy = Equation(eqn, (number,), (self.data(),), (), use=True)
        self.append(copy)
        return copy.outputs[0]

    def _equation(self, eqn: JaxprEqn, inputs: list[int]) -> Sequence[int]:
        active = not self.active.isdisjoint(inputs)
        body = inlined_jaxpr(eqn)
        if body is not None:
            return self.inline_closed(body, inputs)
        if active and eqn.primitive in _NESTED:
            self._read(inputs, None)
            outputs = _NESTED[eqn.primitive](self, eqn, inputs)
            if outputs is not None:
                return outputs
        if all(map(self.is_known, inputs)) and not eqn.effects:
            return self._known(eqn, tuple(inputs), active)
        recorded = tuple(p for p, i in enumerate(inputs) if not self.is_known(i))
        equation = Equation(eqn, tuple(inputs), tuple(self.data() for _ in eqn.outvars), recorded)
        if active and equation.differentiable:
            equation = Equation(eqn, equation.inputs, equation.outputs, recorded, use=True)
        self.append(equation)
        self._read(inputs, equation)
        return equation.outputs

    def _known(self, eqn: JaxprEqn, inputs: tuple[int, ...], active: bool) -> Sequence[int]:
        level = max([self.outermost, *(self._level[i] for i in inputs)])
        equation = Equation(eqn, inputs, tuple(next(self._numbers) for _ in eqn.outvars))
        self._level.update(dict.fromkeys(equation.outputs, level))
        self.once[level].append(equation)
        if active and eqn.primitive is not primitives.stop_gradient_p:
            self.active.update(equation.outputs[k] for k in equation.differentiable)
        return equation.outputs


_NESTED: dict[Primitive, Callable[[Builder, JaxprEqn, list[int]], Sequence[int] | None]] = {
    primitives.scan_p: flatten_scan,
    primitives.cond_p: flatten_cond,
    primitives.remat_p: flatten_checkpoint,
}
