"""Which schedule to take, and in how many parts: the fastest of those that fit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from optaxclip._leaves import Tree
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.engine.assumptions import UnseenError
from optaxclip.per_example.schedules.costs import Costs, Method, costs_of
from optaxclip.per_example.schedules.factored import Seen, factored
from optaxclip.per_example.schedules.microbatches import accumulated


@dataclasses.dataclass(frozen=True)
class Choice:
    """A schedule, of so many examples at a time; None: of all."""

    method: Method
    size: int | None


def choose(
    call: Call,
    seen: Seen | UnseenError,
    groups: Sequence[int],
    method: Method | Literal["auto"],
    size: int | Literal["auto"] | None,
) -> Choice:
    """What was asked for, and the best of the rest."""
    if method != "auto":
        if method == "two_pass" and not _goes_back_twice(seen):
            method = "one_pass"
        return Choice(method, None if size == "auto" else size)
    costs = estimated(call, seen, groups)
    cut = best_size(call.size, costs) if size == "auto" else size
    if cut is not None or not _goes_back_twice(seen):
        return Choice(costs.method, cut)
    return Choice(costs.whole, None)


def estimated(call: Call, seen: Seen | UnseenError, groups: Sequence[int]) -> Costs:
    """What the schedules cost for a call, from shapes alone."""
    forms = jax.eval_shape(lambda: factored(call, seen).forms)
    if not isinstance(seen, Seen):
        return costs_of(call, forms, forms)
    spots = seen.spots(groups).spots
    return costs_of(call, forms, [form for k, form in enumerate(forms) if k not in spots])


def _goes_back_twice(seen: Seen | UnseenError) -> bool:
    return isinstance(seen, Seen) and seen.linear


def best_size(examples: int, costs: Costs) -> int | None:
    """As many examples at a time as `Costs.parts` asks for, or a few less; None for all."""
    parts = costs.parts()
    sizes = [d for d in range(1, examples + 1) if examples % d == 0 and d * parts <= examples]
    if parts == 1 or not sizes or 4 * sizes[-1] * parts < examples:
        return None
    return sizes[-1]


def in_parts(
    part: Callable[[Tree], tuple[Tree, Tree]], inputs: Tree, examples: int, choice: Choice
) -> tuple[Tree, Tree]:
    """`part(inputs) -> (sums, each)`, from as many examples at a time as was chosen."""
    if choice.size is None or choice.size == examples:
        return part(inputs)
    return accumulated(jax.jit(part), inputs, choice.size)  # traced once
