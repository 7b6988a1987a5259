"""The loss of one example as a flat list of equations, split by what each depends on.

Calls (`jit`, `remat`) are inlined; every value gets a number of its own, since one jaxpr may be
called many times. Dead code is dropped.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import ClosedJaxpr, JaxprEqn, inlined_jaxpr, is_literal, primitives


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation whose inputs and outputs are numbered values."""

    eqn: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs through which gradients flow."""
        avals: list[Any] = [v.aval for v in self.eqn.outvars]
        return tuple(k for k, a in enumerate(avals) if jnp.issubdtype(a.dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class Program:
    """`loss(params, example)`, flat."""

    constants: dict[int, Any]
    params: tuple[int, ...]
    example: tuple[int, ...]
    loss: int
    once: tuple[Equation, ...]
    """Equations that do not depend on the example: evaluated once, unbatched."""
    each: tuple[Equation, ...]
    """Equations that do: evaluated for each example."""
    active: frozenset[int]
    """Values of `once` through which gradients reach the parameters."""

    @property
    def uses(self) -> tuple[Equation, ...]:
        """The equations of `each` in which a parameter meets the example."""
        return tuple(
            e for e in self.each if e.differentiable and any(i in self.active for i in e.inputs)
        )


def trace(fun: Callable, params: Any, example: Any) -> Program:
    """The program of `fun(params, example)`. Raises if it is no scalar floating-point loss."""
    closed, out = jax.make_jaxpr(fun, return_shape=True)(params, example)
    _check_loss(out)
    flat = _Flattener()
    consts = [flat.constant(c) for c in closed.consts]
    inputs = [flat.new() for _ in closed.jaxpr.invars]
    (loss,) = flat.inline(closed.jaxpr, consts, inputs)
    count = len(jax.tree.leaves(params))
    return _split(flat, tuple(inputs[:count]), tuple(inputs[count:]), loss)


def _check_loss(out: Any) -> None:
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != ():
        shapes = [f"{x.dtype}{list(x.shape)}" for x in leaves]
        raise ValueError(
            f"fun must return the loss of one example, a scalar, got {', '.join(shapes) or out}."
            " fun(params, example) sees one example, without the batch axis: reduce its loss to"
            " a scalar, for instance with jnp.sum, and return nothing else."
        )
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise TypeError(
            f"fun must return a real floating-point loss, got dtype {leaves[0].dtype}. Convert"
            " it with .astype(jnp.float32), or return a differentiable loss."
        )


class _Flattener:
    """Numbers values and inlines calls."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.constants: dict[int, Any] = {}
        self._numbers = itertools.count()

    def new(self) -> int:
        return next(self._numbers)

    def constant(self, value: Any) -> int:
        number = self.new()
        self.constants[number] = value
        return number

    def inline(self, jaxpr: Any, consts: Sequence[int], inputs: Sequence[int]) -> list[int]:
        """Append the equations of a jaxpr; the numbers of its outputs."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return self.constant(atom.val) if is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            numbers = tuple(map(read, eqn.invars))
            body: ClosedJaxpr | None = inlined_jaxpr(eqn)
            if body is not None:
                consts = [self.constant(c) for c in body.consts]
                outputs = tuple(self.inline(body.jaxpr, consts, numbers))
            else:
                outputs = tuple(self.new() for _ in eqn.outvars)
                self.equations.append(Equation(eqn, numbers, outputs))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return list(map(read, jaxpr.outvars))


def _split(
    flat: _Flattener, params: tuple[int, ...], example: tuple[int, ...], loss: int
) -> Program:
    needed, live = {loss}, []
    for equation in reversed(flat.equations):
        if equation.eqn.effects or needed.intersection(equation.outputs):
            needed.update(equation.inputs)
            live.append(equation)
    data, active = set(example), set(params)
    once, each = [], []
    for equation in reversed(live):
        if data.intersection(equation.inputs):
            data.update(equation.outputs)
            each.append(equation)
            continue
        once.append(equation)
        stopped = equation.eqn.primitive is primitives.stop_gradient_p
        if not stopped and active.intersection(equation.inputs):
            active.update(equation.outputs[k] for k in equation.differentiable)
    return Program(
        flat.constants, params, example, loss, tuple(once), tuple(each), frozenset(active)
    )
