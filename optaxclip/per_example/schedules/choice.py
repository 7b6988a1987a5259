"""Which schedule to take, and in how many parts: the fastest of those that fit, by platform."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from optaxclip._leaves import Tree
from optaxclip.measure.platforms import Rates, by_rates
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.engine.assumptions import UnseenError
from optaxclip.per_example.schedules.costs import Costs, Method, costs_of
from optaxclip.per_example.schedules.factored import Seen, factored
from optaxclip.per_example.schedules.microbatches import MOST_WRITTEN_OUT, accumulated

Part = Callable[[Method, Tree], tuple[Tree, Tree]]

# What may be held, in multiples of a plain gradient's memory: `_CUT`, or `_WHOLE` where cutting the
# batch would cost more than `_WORTH` of a plain gradient's time. An MLP of 10M parameters takes
# 1.13x whole and 2.29x in 64 parts, which hold a third less.
_CUT, _WHOLE, _WORTH = 1.1, 2.0, 0.15
_PARTS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A schedule, of so many examples at a time; None: of all."""

    method: Method
    size: int | None


@dataclasses.dataclass(frozen=True)
class Chooser:
    """What was asked for, or the fastest of the rest that fits."""

    examples: int
    method: Method | Literal["auto"]
    size: int | Literal["auto"] | None
    memory: float | None = None
    """What fits: as many times what a plain gradient holds; an `int`: bytes."""
    costs: Costs | None = None
    """None: nothing is to be chosen."""
    twice: bool = True
    """Whether two passes can be taken."""

    def choose(self, rates: Rates) -> Choice:
        """For a platform."""
        if self.costs is None or self.method != "auto":
            method: Method = "one_pass" if self.method == "auto" else self.method
            if method == "two_pass" and not self.twice:
                method = "one_pass"
            return Choice(method, None if self.size == "auto" else self.size)
        return self.ranked(rates)[0]

    def ranked(self, rates: Rates) -> list[Choice]:
        """All schedules, the best first: those that fit, by time, then by memory."""
        assert self.costs is not None
        costs, sizes = self.costs, self._sizes()
        methods: list[Method] = ["one_pass", "vmap"]
        if self.twice:
            methods.append("two_pass")
        choices = [Choice(method, size) for method in methods for size in sizes]

        def work(choice: Choice) -> int:
            return costs.work(choice.method, self.parts(choice), rates)

        def fits(choice: Choice, memory: float) -> bool:
            return costs.fits(choice.method, self.parts(choice), rates, memory)

        once = [c for c in choices if c.method != "two_pass" and fits(c, _WHOLE)]
        worth = min(map(work, once), default=0) + _WORTH * costs.plain_flops

        def key(choice: Choice) -> tuple[int, float]:
            if self.memory is not None:
                if fits(choice, self.memory):
                    return 0, work(choice)
            elif choice in once:
                return 0 if fits(choice, _CUT) and work(choice) <= worth else 1, work(choice)
            elif fits(choice, _WHOLE):
                return 2, work(choice)
            return 3, costs.memory(choice.method, self.parts(choice), rates)

        return sorted(choices, key=key)

    def parts(self, choice: Choice) -> int:
        """In how many parts a choice takes the batch."""
        return 1 if choice.size is None else self.examples // choice.size

    def _sizes(self) -> list[int | None]:
        if self.size != "auto":
            return [self.size]
        assert self.costs is not None
        sizes = dict.fromkeys(best_size(self.examples, parts) for parts in _PARTS)
        if not self.costs.convolves:
            return list(sizes)
        # More parts would be a loop, in which convolutions are slow on a CPU.
        return [n for n in sizes if n is None or self.examples // n <= MOST_WRITTEN_OUT]


def chooser(
    call: Call,
    seen: Seen | UnseenError,
    groups: Sequence[int],
    method: Method | Literal["auto"],
    size: int | Literal["auto"] | None,
    memory: float | None = None,
) -> Chooser:
    """With the costs of a call, if there is anything to choose."""
    twice = isinstance(seen, Seen) and seen.linear
    costs = estimated(call, seen, groups) if method == "auto" else None
    return Chooser(call.size, method, size, memory, costs, twice)


def estimated(call: Call, seen: Seen | UnseenError, groups: Sequence[int]) -> Costs:
    """What the schedules cost for a call, from shapes alone."""
    forms = jax.eval_shape(lambda: factored(call, seen).forms)
    if not isinstance(seen, Seen):
        return costs_of(call, forms, forms, forms)
    weighed = seen.alone(groups, set(range(len(groups)))).spots
    measured = seen.spots(groups).spots
    return costs_of(
        call,
        forms,
        [form for k, form in enumerate(forms) if k not in weighed],
        [form for k, form in enumerate(forms) if k not in measured],
    )


def best_size(examples: int, parts: int) -> int | None:
    """As many examples at a time as make so many parts, or up to four times as many; None: all."""
    if parts == 1:
        return None
    fitting = (n for n in range(parts, min(4 * parts, examples) + 1) if examples % n == 0)
    number = next(fitting, None)
    return None if number is None else examples // number


def in_parts(
    whole: Part, inputs: Tree, chooser: Chooser, part: Part | None = None
) -> tuple[Tree, Tree]:
    """`whole(method, inputs) -> (sums, each)`, or so from as many examples at a time as is best.

    `part` is then what takes them.
    """

    def run(choice: Choice) -> Callable[[Tree], tuple[Tree, Tree]]:
        size = choice.size
        if size is None or size == chooser.examples:
            return functools.partial(whole, choice.method)
        run = jax.jit(functools.partial(part or whole, choice.method))  # traced once
        return lambda inputs: accumulated(run, inputs, size)

    return by_rates(chooser.choose, run, inputs)
