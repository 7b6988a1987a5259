"""Which parameters can be measured where they meet the example, so that nothing need be held.

A *spot* is a value at which uses of parameters come together: the cotangent that arrives there is
all that their gradients need besides what the uses recorded. If every use of a parameter comes
together at one spot, its squared norm is known there, whatever happens elsewhere. The *home* of a
spot is the block with the equations that lead from what the block is given to the uses: the
program, or the body of a scan. A parameter of which a scan takes one slice after the other has a
spot in each step, and its squared norm is their sum, as long as what lies between the parameter and
the slices keeps norms.

All others are *held*: tied tables, whose uses have cross terms; constants of a loop, which are used
in each of its steps; whatever is used in a branch.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import Any

import jax.numpy as jnp

from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._compat import stack_p
from optaxclip.per_example.engine.control.branches import Branches
from optaxclip.per_example.engine.control.checkpoint import Checkpoint
from optaxclip.per_example.engine.control.scan import Scan
from optaxclip.per_example.engine.program import Block, Equation, Program
from optaxclip.per_example.engine.uses import users

_KEEP_ROWS = frozenset({
    P.copy_p, P.name_p, P.sharding_constraint_p, P.device_put_p, P.neg_p, P.convert_element_type_p,
})  # fmt: skip
# The cotangent of the input is that of the output with its elements in other places.
_KEEP_NORMS = _KEEP_ROWS | {
    P.squeeze_p, P.transpose_p, P.rev_p, P.concatenate_p, P.slice_p, stack_p,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Spot:
    """Where a parameter is measured."""

    home: Block
    number: int
    """The value that stands for it at home: itself, or its slice."""
    tapped: int
    """The value whose cotangent is seen."""
    uses: frozenset[Equation]
    whole: bool
    """Whether it is seen at once, and not slice by slice."""
    by_rows: bool
    """Whether step `l` of one scan sees its row `l`: it was neither turned nor joined before."""


@dataclasses.dataclass(frozen=True)
class _End:
    """What an active value of a block leads to: a spot, a slice in a scan, or neither."""

    tapped: int | None = None
    scan: Scan | None = None
    slice: int | None = None


def find_spots(program: Program) -> dict[int, Spot]:
    """The spots of parameters, by their position; those that must be held have none."""
    plans: dict[Block, _Plan] = {}
    found = {}
    for k, number in enumerate(program.params):
        spot = _spot(program.block, number, (), plans)
        if spot is not None:
            found[k] = spot
    return together(program, found)


def together(program: Program, spots: Mapping[int, Spot]) -> dict[int, Spot]:
    """Without those that share a use with a parameter that has no spot."""
    reached = users(program.block)
    left = dict(spots)
    while True:
        held: set[Equation] = set()
        for k, number in enumerate(program.params):
            if k not in left:
                held |= reached[number]
        kept = {k: spot for k, spot in left.items() if held.isdisjoint(spot.uses)}
        if len(kept) == len(left):
            return kept
        left = kept


def chooses(block: Block) -> bool:
    """Whether a branch depends on the example."""
    for item in block.each:
        if isinstance(item, Branches):
            if item.of_example or any(map(chooses, item.branches)):
                return True
        elif isinstance(item, Scan | Checkpoint) and chooses(item.body):
            return True
    return False


def chain(home: Block, uses: Iterable[Equation]) -> tuple[Equation, ...]:
    """The equations of a block that lead to uses, and those that made what they take in."""
    made = {n: e for e in home.once for n in e.outputs}
    active: set[Equation] = set()
    waiting = [n for use in uses for n in use.inputs if n in home.active]
    while waiting:
        equation = made.get(waiting.pop())
        if equation is not None and equation not in active:
            active.add(equation)
            waiting += [n for n in equation.inputs if n in home.active]
    makers = {made[n] for e in active for n in e.inputs if n in made}
    return tuple(e for e in home.once if e in active or e in makers)


class _Plan:
    """Where the active values of a block lead, found once."""

    def __init__(self, block: Block) -> None:
        ends: dict[int, set[_End]] = collections.defaultdict(set)
        _direct(block, ends)
        for equation in reversed(block.once):
            reached = set().union(*(ends[n] for n in equation.outputs if n in ends))
            for n in block.active & set(equation.inputs):
                ends[n] |= reached
        self.ends: Mapping[int, Set[_End]] = dict(ends)
        self.users = users(block)


def _spot(
    block: Block, number: int, scans: tuple[bool, ...], plans: dict[Block, _Plan]
) -> Spot | None:
    """`scans`: of those around, whether each takes the value row by row."""
    if block not in plans:
        plans[block] = _Plan(block)
    plan = plans[block]
    found = plan.ends.get(number, frozenset())
    if len(found) != 1:
        return None
    (end,) = found
    if end.tapped is not None:
        uses = frozenset(plan.users[number])
        return Spot(block, number, end.tapped, uses, not scans, scans == (True,))
    if end.scan is None or end.slice is None:
        return None
    way = _way(block, number, end.scan)
    if way is None:
        return None
    by_rows = all(equation.eqn.primitive in _KEEP_ROWS for equation in way)
    return _spot(end.scan.body, end.slice, (*scans, by_rows), plans)


def _direct(block: Block, ends: dict[int, set[_End]]) -> None:
    """Of the uses in a block, in its checkpoints, and of its loops and branches."""
    for item in block.each:
        if isinstance(item, Checkpoint):
            _direct(item.body, ends)
        elif isinstance(item, Scan):
            whole = dict(zip(item.slices, item.xs, strict=True))
            for n in users(item.body):
                if n in whole:
                    ends[whole[n]].add(_End(scan=item, slice=n))
                else:
                    ends[n].add(_End())
        elif isinstance(item, Branches):
            for n in item.users():
                ends[n].add(_End())
        elif isinstance(item, Equation) and block.is_use(item):
            seen = [item.outputs[k] for k in item.differentiable]
            for n in block.active & set(item.inputs):
                ends[n].add(_End(block.tapped[seen[0]]) if len(seen) == 1 else _End())


def _way(block: Block, number: int, scan: Scan) -> list[Equation] | None:
    """From a value to the slices of a scan, if it goes nowhere else, and no norm is changed."""
    way: list[Equation] = []
    while True:
        readers = [e for e in block.once if number in e.inputs and block.active & set(e.outputs)]
        given = scan.xs.count(number)
        if given or not readers:
            return way if given == 1 and not readers else None
        (equation, *others) = readers
        if others or equation.inputs.count(number) > 1 or not _is_kept(equation):
            return None
        way.append(equation)
        (number,) = equation.outputs


def _is_kept(equation: Equation) -> bool:
    eqn = equation.eqn
    before: Any = eqn.invars[0].aval
    after: Any = eqn.outvars[0].aval
    if len(equation.outputs) != 1:
        return False
    if eqn.primitive is P.reshape_p:
        return eqn.params["dimensions"] is None
    if eqn.primitive is P.broadcast_in_dim_p:
        return before.size == after.size
    if eqn.primitive is P.convert_element_type_p:
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (before, after))
    return eqn.primitive in _KEEP_NORMS
