"""The gradients of one call: factored, or by `vmap(grad)` where the loss cannot be seen through."""

import dataclasses
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import jax

from optaxclip._leaves import Tree
from optaxclip.per_example.engine import rules as rules
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.engine.assumptions import UnseenError
from optaxclip.per_example.engine.backward import Measured, Spots, Weigh, measured, norms_then_sum
from optaxclip.per_example.engine.flatten import trace
from optaxclip.per_example.engine.program import Program
from optaxclip.per_example.engine.spots import Spot, chooses, find_spots, together
from optaxclip.per_example.engine.uses import users
from optaxclip.per_example.forms.forms import Dense, Form


class Factored(NamedTuple):
    """What comes of one call."""

    losses: jax.Array
    """[B]."""
    aux: Tree
    """[B, ...]."""
    forms: list[Form]
    """The gradients of each array of `call.params`."""
    uses: list[int]
    """In how many equations each meets the example; 0 where that was not seen."""


class Seen(NamedTuple):
    """The loss of a call, seen through."""

    program: Program
    aux: Tree
    """The structure of aux."""

    @property
    def linear(self) -> bool:
        """Whether the gradient of a loss scaled by `c` is known to be `c` times the gradient."""
        return self.program.linear

    @property
    def chooses(self) -> bool:
        """Whether a branch depends on the example: a batch of losses would run all branches."""
        return chooses(self.program.block)

    def factored(self, call: Call) -> Factored:
        """All gradients, held as forms."""
        found = self.measured(call, Spots({}, [0] * len(call.params)))
        reached = users(self.program.block)
        uses = [len(reached[number]) for number in self.program.params]
        return Factored(found.losses, found.aux, [found.forms[k] for k in range(len(uses))], uses)

    def measured(
        self, call: Call, spots: Spots, weigh: Weigh | None = None, *, norms: bool = True
    ) -> Measured:
        """One backward pass that measures on the spot where it can."""
        found = measured(
            self.program, call.params, call.batch, spots, weigh, norms=norms,
            spmd_axis_name=call.spmd_axis_name,
        )  # fmt: skip
        return found._replace(aux=jax.tree.unflatten(self.aux, found.aux))

    def norms_then_sum(
        self, call: Call, spots: Spots, weights: Callable[..., jax.Array]
    ) -> tuple[jax.Array, Tree, list[jax.Array]]:
        """Losses, aux and the gradient of the loss reweighted by what its norms say."""
        losses, aux, sums = norms_then_sum(
            self.program, call.params, call.batch, spots, weights,
            spmd_axis_name=call.spmd_axis_name,
        )  # fmt: skip
        return losses, jax.tree.unflatten(self.aux, aux), sums

    def spots(self, groups: Sequence[int]) -> Spots:
        """Of all parameters that can be measured where they are used."""
        found = find_spots(self.program)
        # What stands for several parameters, joined before a scan, is measured as one.
        alike: dict[int, set[int]] = {}
        for k, spot in found.items():
            alike.setdefault(spot.number, set()).add(groups[k])
        found = {k: spot for k, spot in found.items() if len(alike[spot.number]) == 1}
        return self.together(Spots(found, groups))

    def together(self, spots: Spots) -> Spots:
        """Without those that share a use with a parameter that has no spot."""
        return dataclasses.replace(spots, spots=together(self.program, spots.spots))

    def alone(self, groups: Sequence[int], wide: Set[int], rows: Set[int] = frozenset()) -> Spots:
        """Of those whose group is measured at one spot as a whole, so that its weights follow.

        None but those in `wide` come into question. Of a group in `rows` each row of its parameter
        has weights of its own.
        """
        members: dict[int, list[int]] = {}
        for k, group in enumerate(groups):
            members.setdefault(group, []).append(k)
        found = {k: spot for k, spot in self.spots(groups).spots.items() if k in wide}
        while True:
            kept: dict[int, Spot] = {}
            for group, of_group in members.items():
                seen = [found[k] for k in of_group if k in found]
                if len(seen) < len(of_group) or len({spot.tapped for spot in seen}) > 1:
                    continue
                if all(spot.by_rows if group in rows else spot.whole for spot in seen):
                    kept.update(zip(of_group, seen, strict=True))
            spots = self.together(Spots(kept, groups, rows))
            if len(spots.spots) == len(found):
                return spots
            found = dict(spots.spots)  # without some, groups of others are no longer whole


def see(call: Call) -> Seen | UnseenError:
    """The loss as a program; where `assumptions` do not hold, why."""
    try:
        return Seen(*trace(call.fun, call.params, call.example))
    except UnseenError as error:
        return error


def factored(call: Call, seen: Seen | UnseenError) -> Factored:
    """Follow the data; where `assumptions` do not hold, stack."""
    return seen.factored(call) if isinstance(seen, Seen) else stacked(call, reason_of(seen))


def reason_of(error: UnseenError) -> str:
    """Why the whole loss is stacked."""
    return f"vmap(grad) of the whole loss, which has {error}"


def stacked(call: Call, reason: str = "") -> Factored:
    """By `vmap(grad)`, with the parameters differentiated."""
    each = jax.vmap(
        jax.value_and_grad(call.fun, has_aux=True), (None, 0), spmd_axis_name=call.spmd_axis_name
    )
    (losses, aux), grads = each(call.params, call.batch)
    return Factored(losses, aux, [Dense(g, reason) for g in grads], [0] * len(grads))
