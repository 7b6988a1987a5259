"""The loss of one example as nested blocks of equations, split by what each depends on.

A value is *known* if it does not depend on the example; it is *active* if it is known and
gradients reach the parameters through it. Values are numbered, one number each throughout the
program; a body refers to values of the blocks around it by their numbers.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any, Protocol

from jax import lax

from optaxclip._compat import JaxprEqn, bind
from optaxclip.per_example.engine.assumptions import is_differentiable, is_flat
from optaxclip.per_example.forms.forms import Form

Values = dict[int, Any]
STEP = -1
"""Within the body of a scan, the number of its step."""
Found = dict[int, list[Form]]


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation whose inputs and outputs are numbered values."""

    eqn: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recorded: tuple[int, ...] = ()
    """Positions of the inputs that depend on the example."""
    use: bool = False
    """Whether an active value meets the example here in a differentiable operation."""

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs through which gradients flow."""
        avals: list[Any] = [v.aval for v in self.eqn.outvars]
        return tuple(k for k, a in enumerate(avals) if is_differentiable(a))

    def evaluate(self, values: Values, stopped: Collection[int] = ()) -> tuple[Any, ...]:
        """Add the outputs to `values`; the operands, of which some pass no gradient on."""
        operands = tuple(
            lax.stop_gradient(values[i]) if i in stopped else values[i] for i in self.inputs
        )
        values.update(zip(self.outputs, bind(self.eqn, *operands), strict=True))
        return operands


Users = dict[int, set[Equation]]


class ControlFlow(Protocol):
    """An equation with bodies in which active values meet the example."""

    def taps(self, watch: Any) -> Any:
        """Zeros to be added to the outputs of the uses within that are not watched."""
        ...

    def run(self, values: Values, taps: Any, watch: Any) -> Any:
        """Add the outputs to `values`; the records of the uses within that are not watched."""
        ...

    def users(self) -> Users:
        """The uses within that each active value of the blocks around reaches."""
        ...

    def reach(self, wanted: set[int]) -> None:
        """Add the values through which gradients of wanted outputs flow."""
        ...

    def forms(self, values: Mapping[int, Any], records: Any, cotangents: Any) -> Found:
        """The forms of the active values of the blocks around, from the cotangents of taps."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Equations that run together: the program itself, or a body."""

    once: tuple[Equation, ...]
    """Those that do not depend on the example: evaluated once a run, unbatched."""
    each: "tuple[Equation | ControlFlow, ...]"
    """Those that do: evaluated for each example."""
    outputs: tuple[int, ...]
    tapped: Mapping[int, int]
    """The differentiable outputs of uses, each with a value of the same cotangent: its own, or
    that of a sum it goes into and nowhere else. So `x @ v + h @ w + b` has one cotangent."""
    active: Set[int]
    """The active values of the whole program."""
    differentiated: Set[int]
    """The values of the whole program through which gradients of the loss flow."""

    def is_use(self, equation: Equation) -> bool:
        """Whether an active value meets the example there, on its way to the loss."""
        return equation.use and not self.differentiated.isdisjoint(equation.outputs)


@dataclasses.dataclass(frozen=True)
class Program:
    """`loss(params, example)`; the outputs of its block are the loss, then what comes with it."""

    constants: Mapping[int, Any]
    params: tuple[int, ...]
    example: tuple[int, ...]
    block: Block
    linear: bool
    """Whether all backward rules are JAX's own, so that the gradient of a loss scaled by `c` is `c`
    times the gradient."""


def evaluate_once(block: Block, values: Values) -> None:
    """Add the known values of a block."""
    for equation in block.once:
        equation.evaluate(values)


def reach(block: Block, wanted: set[int]) -> None:
    """Add the values of a block through which gradients of wanted ones flow."""
    for equation in reversed(block.each):
        if not isinstance(equation, Equation):
            equation.reach(wanted)
        elif not is_flat(equation.eqn):
            flows = (equation.outputs[k] in wanted for k in equation.differentiable)
            wanted.update(equation.inputs if any(flows) else ())


def merge(found: Found, more: Iterable[tuple[int, list[Form]]]) -> None:
    """Append forms, number by number, in place."""
    for number, forms in more:
        found.setdefault(number, []).extend(forms)
