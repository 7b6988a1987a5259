"""Conditionals with a parameter in a branch.

One whose choice depends on the example stays a conditional: `vmap` evaluates all branches and
selects, backward as well, so that what a branch makes of an example that does not take it, NaN
perhaps, reaches nothing. A select of the outputs here would send a zero back into that branch, and
zero times NaN is NaN.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import JaxprEqn
from optaxclip.per_example.engine.program import (
    Block,
    Found,
    Users,
    Values,
    evaluate_once,
    merge,
    reach,
)
from optaxclip.per_example.engine.uses import users
from optaxclip.per_example.engine.walk import Watch, body_forms, run, zero_taps
from optaxclip.per_example.forms.forms import over_examples

if TYPE_CHECKING:
    from optaxclip.per_example.engine.flatten import Builder


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """A conditional. Each branch returns records of all branches: its own, zeros for the others."""

    index: int
    of_example: bool
    """Whether the choice depends on the example; it is recorded then."""
    branches: tuple[Block, ...]
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]

    def taps(self, watch: Watch) -> Any:
        """Those of every branch."""
        return [zero_taps(branch, watch) for branch in self.branches]

    def run(self, values: Values, taps: Any, watch: Watch) -> Any:
        """The branch that is chosen."""

        def branch(k: int) -> Callable[[Any], Any]:
            def body(taps: Any) -> tuple[list[Any], Any]:
                local = dict(values)
                evaluate_once(self.branches[k], local)
                outputs, records = run(self.branches[k], local, taps[k], watch)
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
        index = values[self.index]
        outputs, records = lax.switch(index, choices, taps)
        values.update(zip(self.outputs, outputs, strict=True))
        return index if self.of_example else None, records

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
        index, records = records
        index = values[self.index] if index is None else index
        found: Found = {}
        for k, (branch, *given) in enumerate(zip(self.branches, records, cotangents, strict=True)):
            forms = body_forms(branch, values, *given)
            kept = over_examples(functools.partial(_where, index == k), forms)
            merge(found, kept.items())
        return found


def _where(taken: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros for the examples, or all, of which a branch was not taken."""
    return jnp.where(taken.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))


def flatten_cond(builder: "Builder", eqn: JaxprEqn, inputs: list[int]) -> Sequence[int] | None:
    """Append a conditional that is not known as a whole; the numbers of its outputs."""
    if all(map(builder.is_known, inputs)):
        return None
    index, *operands = inputs
    of_example = not builder.is_known(index)
    if of_example and eqn.effects:
        return None
    avals: list[Any] = [v.aval for v in eqn.outvars]
    branches = []
    for branch in eqn.params["branches"]:
        builder.open()
        outermost, builder.outermost = builder.outermost, len(builder.once) - 1
        outputs = builder.inline_body(branch, operands, eqn)
        branches.append(builder.close([*map(builder.met, outputs, avals)]))
        builder.outermost = outermost
    found = tuple(builder.data() for _ in avals)
    node = Branches(index, of_example, tuple(branches), found, tuple(avals))
    builder.append(node)
    return node.outputs
