"""From a function to a `Program`: inline calls, split by dependence, nest control flow.

A known equation goes to the outermost block that has its inputs, out of the loops and
checkpoints around it: what a body computes from its constants alone is evaluated, and pulled
back through, once. One whose backward rule may not be linear stays where it is.
"""

import itertools
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np

from optaxclip._compat import (
    JaxprEqn,
    Primitive,
    bind,
    inlined_jaxpr,
    is_literal,
    live_jaxpr,
    primitives,
    varying_axes,
    within,
)
from optaxclip.per_example.engine.assumptions import (
    check_own,
    is_flat,
    is_linear,
    unseen,
)
from optaxclip.per_example.engine.control.branches import flatten_cond
from optaxclip.per_example.engine.control.checkpoint import flatten_checkpoint
from optaxclip.per_example.engine.control.scan import flatten_scan
from optaxclip.per_example.engine.lookups import evaluated, lookup, parts, split_starts
from optaxclip.per_example.engine.program import Block, ControlFlow, Equation, Program, reach


def trace(fun: Callable, params: list[Any], example: list[Any]) -> tuple[Program, Any]:
    """The program of `fun(params, example) -> (loss, aux)`; the structure of `aux`.

    Raises `UnseenError` where `assumptions` do not hold, and ValueError for a loss that mixes what
    devices have.
    """
    closed, (_, aux) = jax.make_jaxpr(fun, return_shape=True)(params, example)
    check_own(closed.jaxpr, {axis for x in params for axis in varying_axes(x)})
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
    program = Program(
        builder.constants, tuple(inputs[:count]), tuple(inputs[count:]), block, builder.linear
    )
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
        self.linear = True
        """Whether all backward rules so far are JAX's own."""
        self.outermost = 0
        """The outermost block that known equations may go to."""
        self.steps: list[dict[int, int] | None] = [None]
        """For each block in `once` that is the body of a scan: the stacked values of which its
        steps are given slices, by the values within."""
        self._made: dict[int, Equation] = {}
        self._concrete: dict[int, Any] = {}
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

    def inline(
        self,
        jaxpr: Any,
        consts: Sequence[int],
        inputs: Sequence[int],
        place: Callable[[JaxprEqn], JaxprEqn] = lambda eqn: eqn,
    ) -> list[int]:
        """Append the equations of a jaxpr; the numbers of its outputs.

        `place` says of an equation where in the user's program it stands.
        """
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            if is_literal(atom):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return env[atom]

        for eqn in jaxpr.eqns:
            found = self._equation(place(eqn), [*map(read, eqn.invars)])
            env.update(zip(eqn.outvars, found, strict=True))
        return [*map(read, jaxpr.outvars)]

    def inline_body(self, closed: Any, inputs: Sequence[int], call: JaxprEqn) -> list[int]:
        """The same for a jaxpr with its constants, the body of a call."""
        consts = [self.constant(c) for c in closed.consts]
        return self.inline(closed.jaxpr, consts, inputs, lambda eqn: within(eqn, call, closed))

    def traced(
        self, fun: Callable, avals: Sequence[Any], inputs: Sequence[int], eqn: JaxprEqn
    ) -> list[int]:
        """Append the equations of a function, as part of `eqn`; the numbers of its outputs."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        closed = jax.make_jaxpr(fun)(*shapes)
        consts = [self.constant(c) for c in closed.consts]
        here = eqn.source_info
        live = live_jaxpr(closed.jaxpr)  # else what is not needed would depend on parameters
        return self.inline(live, consts, inputs, lambda e: e.replace(source_info=here))

    def append(self, equation: Equation | ControlFlow) -> None:
        """Append an equation that depends on the example."""
        self.each[-1].append(equation)

    def open(self, steps: dict[int, int] | None = None) -> None:
        """Begin a block within the block at hand; `steps` as in `self.steps`, of a scan's body."""
        self.once.append([])
        self.each.append([])
        self.steps.append(steps)

    def close(self, outputs: Sequence[int]) -> Block:
        """End it."""
        self.steps.pop()
        return self.block(self.once.pop(), outputs)

    def snapshot(self) -> Any:
        """What `restore` needs to forget all that is appended from now on."""
        lengths = [[len(x) for x in lists] for lists in (self.once, self.each)]
        steps = [None if x is None else dict(x) for x in self.steps]
        return lengths, steps, {n: list(found) for n, found in self._readers.items()}

    def restore(self, snapshot: Any) -> None:
        """Forget what was appended since; the blocks around are the same ones."""
        (once, each), steps, self._readers = snapshot
        for known, length in zip(self.once, once, strict=True):
            del known[length:]
        for others, length in zip(self.each, each, strict=True):
            del others[length:]
        for now, before in zip(self.steps, steps, strict=True):
            if now is not None:
                now.clear()
                now.update(before)

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
        """The value, for what is done by example; an active one is copied, which is a use."""
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
            return self.inline_body(body, inputs, eqn)
        if active and eqn.primitive in _NESTED:
            self._read(inputs, None)
            outputs = _NESTED[eqn.primitive](self, eqn, inputs)
            if outputs is not None:
                return outputs
        if (why := unseen(eqn, active)) is not None:
            raise why
        self.linear = self.linear and is_linear(eqn)
        if all(map(self.is_known, inputs)) and not eqn.effects:
            return self._known(eqn, tuple(inputs), active)
        recorded = tuple(p for p, i in enumerate(inputs) if not self.is_known(i))
        equation = Equation(eqn, tuple(inputs), tuple(self.data() for _ in eqn.outvars), recorded)
        if active and equation.differentiable and not is_flat(eqn):
            equation = Equation(eqn, equation.inputs, equation.outputs, recorded, use=True)
        self.append(equation)
        self._read(inputs, equation)
        return equation.outputs

    def _known(self, eqn: JaxprEqn, inputs: tuple[int, ...], active: bool) -> Sequence[int]:
        level = max([self.outermost, *(self._level[i] for i in inputs)])
        if active and not is_linear(eqn):  # it must meet the cotangent of each turn of its loop
            level = len(self.once) - 1
        elif active and (found := self._looked_up(eqn, inputs, level)) is not None:
            return found
        equation = Equation(eqn, inputs, tuple(next(self._numbers) for _ in eqn.outvars))
        if not active and not eqn.effects:
            self._made.update(dict.fromkeys(equation.outputs, equation))
        self._level.update(dict.fromkeys(equation.outputs, level))
        self.once[level].append(equation)
        if active and not is_flat(eqn):
            self.active.update(equation.outputs[k] for k in equation.differentiable)
        return equation.outputs

    def _looked_up(
        self, eqn: JaxprEqn, inputs: tuple[int, ...], level: int
    ) -> Sequence[int] | None:
        """A part of a parameter that a scan picks by numbers known beforehand; else None.

        All parts are then taken ahead of the scan, and given to its steps.
        """
        steps, table = self.steps[level], inputs[0] if inputs else -1
        if steps is None or self._level[table] >= level or self.outermost >= level:
            return None
        if table not in self.active or not self.active.isdisjoint(inputs[1:]):
            return None
        one_by_one = split_starts(eqn)
        if one_by_one is not None:
            return self.traced(one_by_one, [v.aval for v in eqn.invars], inputs, eqn)
        found = lookup(eqn)
        if found is None:
            return None
        numbers = self._of_steps(inputs[found.index], steps)
        if numbers is None:
            return None
        if found.column is not None:
            numbers = numbers[:, found.column]
        aval: Any = eqn.invars[0].aval
        take = parts(found, numbers, aval.shape[found.axis])
        if take is None:
            return None
        (stacked,) = self.traced(take, [aval], [table], eqn)
        number = next(self._numbers)
        self._level[number] = level
        steps[number] = stacked
        self.active.add(number)
        return [number]

    def _of_steps(self, number: int, steps: dict[int, int]) -> np.ndarray | None:
        """The constants that a value within a scan has in each step, [steps, ...]."""
        given: dict[int, Any] = {}
        chain: list[Equation] = []
        waiting, seen = [number], set()
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in steps:
                value = self._constant_of(steps[at])
                if value is None:
                    return None
                given[at] = value
            elif (value := self._constant_of(at)) is None:
                if at not in self._made:
                    return None
                chain.append(self._made[at])
                waiting += self._made[at].inputs
        if not given:
            return None
        # Numbers are given to values in the order of the program.
        chain = sorted(set(chain), key=lambda e: e.outputs)

        def step(given: dict[int, Any]) -> Any:
            values = {**{at: self._constant_of(at) for at in seen - given.keys()}, **given}
            for equation in chain:
                equation.evaluate(values)
            return values[number]

        return np.asarray(evaluated(jax.vmap(step), given))

    def _constant_of(self, number: int) -> Any:
        """The value of a known number that follows from constants alone; None of any other."""
        if number in self.constants:
            value = self.constants[number]
            return None if isinstance(value, jax.core.Tracer) else value
        if number in self._concrete:
            return self._concrete[number]
        equation = self._made.get(number)
        if equation is None:
            return None
        inputs = [self._constant_of(i) for i in equation.inputs]
        avals: list[Any] = [v.aval for v in equation.eqn.outvars]
        if any(x is None for x in inputs) or any(a.size > _MOST_CONSTANT for a in avals):
            return None
        outputs = evaluated(bind, equation.eqn, *inputs)
        self._concrete.update(zip(equation.outputs, outputs, strict=True))
        return self._concrete[number]


# Constants with more elements are not evaluated while the loss is traced.
_MOST_CONSTANT = 2**20

_NESTED: dict[Primitive, Callable[[Builder, JaxprEqn, list[int]], Sequence[int] | None]] = {
    primitives.scan_p: flatten_scan,
    primitives.cond_p: flatten_cond,
    primitives.remat_p: flatten_checkpoint,
}
