"""Conditionals with a parameter in a branch.

One that depends on the example becomes a select under `vmap` in any case, and is one here. Any
other stays a choice between branches.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import JaxprEqn
from optaxclip.per_example.program import Block, Found, Users, Values, evaluate_once, merge, reach
from optaxclip.per_example.uses import users
from optaxclip.per_example.walk import body_forms, run, zero_taps

if TYPE_CHECKING:
    from optaxclip.per_example.flatten import Builder


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """A known choice; each branch returns the records of all, zeros for those of the others."""

    index: int
    branches: tuple[Block, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]

    def taps(self) -> Any:
        """Those of every branch."""
        return [zero_taps(branch) for branch in self.branches]

    def run(self, values: Values, taps: Any) -> Any:
        """The branch that is chosen."""

        def branch(k: int) -> Callable[[Any], Any]:
            def body(taps: Any) -> tuple[list[Any], Any]:
                local = dict(values)
                evaluate_once(self.branches[k], local)
                outputs, records = run(self.branches[k], local, taps[k])
                typed = [jnp.asarray(x, a.dtype) for x, a in zip(outputs, self.avals, strict=True)]
                return typed, records

            return body

        bodies = [branch(k) for k in range(len(self.branches))]
        shapes = [jax.eval_shape(body, taps)[1] for body in bodies]

        def padded(k: int) -> Callable[[Any], Any]:
            def body(taps: Any) -> tuple[list[Any], Any]:
                outputs, records = bodies[k](taps)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                return outputs, [*zeros[:k], records, *zeros[k + 1 :]]

            return body

        choices = [padded(k) for k in range(len(self.branches))]
        outputs, records = lax.switch(values[self.index], choices, taps)
        values.update(zip(self.outputs, outputs, strict=True))
        return records

    def users(self) -> Users:
        """Those of every branch."""
        reached: Users = collections.defaultdict(set)
        for branch in self.branches:
            for number, uses in users(branch).items():
                reached[number] |= uses
        return reached

    def reach(self, wanted: set[int]) -> None:
        """From the outputs into every branch."""
        for branch in self.branches:
            pairs = zip(self.outputs, branch.outputs, strict=True)
            wanted.update(inner for outer, inner in pairs if outer in wanted)
            reach(branch, wanted)

    def forms(self, values: Mapping[int, Any], records: Any, cotangents: Any) -> Found:
        """Those of every branch, zeros for those not taken.

        What a branch computes of parameters need not be finite where it is not taken.
        """
        found: Found = {}
        for k, (branch, *given) in enumerate(zip(self.branches, records, cotangents, strict=True)):
            taken = values[self.index] == k
            forms = body_forms(branch, values, *given)
            kept = jax.tree.map(lambda x, t=taken: jnp.where(t, x, jnp.zeros_like(x)), forms)
            merge(found, kept.items())
        return found


def flatten_cond(builder: "Builder", eqn: JaxprEqn, inputs: list[int]) -> Sequence[int] | None:
    """Append a conditional that is not known as a whole; the numbers of its outputs."""
    if all(map(builder.is_known, inputs)):
        return None
    index, *operands = inputs
    if builder.is_known(index):
        return _choice(builder, eqn, index, operands)
    return None if eqn.effects else _select(builder, eqn, index, operands)


def _select(builder: "Builder", eqn: JaxprEqn, index: int, operands: list[int]) -> Sequence[int]:
    cases = [builder.inline_closed(branch, operands) for branch in eqn.params["branches"]]
    avals: list[Any] = [v.aval for v in eqn.outvars]
    outputs = []
    for aval, *numbers in zip(avals, *cases, strict=True):
        types = [eqn.invars[0].aval, *[aval] * len(numbers)]
        outputs += builder.traced(lax.select_n, types, [index, *numbers], eqn)
    return outputs


def _choice(builder: "Builder", eqn: JaxprEqn, index: int, operands: list[int]) -> Sequence[int]:
    avals: list[Any] = [v.aval for v in eqn.outvars]
    branches = []
    for branch in eqn.params["branches"]:
        builder.open()
        outermost, builder.outermost = builder.outermost, len(builder.once) - 1
        outputs = builder.inline_closed(branch, operands)
        branches.append(builder.close([*map(builder.met, outputs, avals)]))
        builder.outermost = outermost
    node = Branches(index, tuple(branches), tuple(builder.data() for _ in avals), tuple(avals))
    builder.append(node)
    return node.outputs
