"""Which outputs of a jaxpr are known when only some inputs are, and what they are."""

from collections.abc import Callable, Sequence
from typing import Any

from optaxclip._compat import JaxprEqn, bind, inlined_jaxpr, is_literal, remat_jaxpr


def known_outputs(
    closed: Any, inputs: Sequence[Any], evaluate: Callable[..., Sequence[Any]] = bind
) -> list[Any]:
    """The outputs of a closed jaxpr; None for an input or output that is not known.

    Calls are followed into; any other equation, such as a loop, is known as a whole or not at
    all. An equation with effects is not.
    """
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [*map(read, eqn.invars)]
        body = inlined_jaxpr(eqn) or remat_jaxpr(eqn)
        outputs: Sequence[Any]
        if body is not None:
            outputs = known_outputs(body, operands, evaluate)
        elif eqn.effects or any(x is None for x in operands):
            outputs = [None] * len(eqn.outvars)
        else:
            outputs = evaluate(eqn, *operands)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [*map(read, jaxpr.outvars)]


def which_known(closed: Any, known: Sequence[bool]) -> list[bool]:
    """Whether each output is known, for inputs of which some are."""

    def evaluate(eqn: JaxprEqn, *operands: Any) -> list[bool]:
        return [True] * len(eqn.outvars)

    found = known_outputs(closed, [True if k else None for k in known], evaluate)
    return [x is not None for x in found]
