"""Scans in which a parameter meets the example: taps go in with xs, records come out with ys.

Carries that are known are computed by a scan of their own, and given to this one step by
step. So the known values of a body follow from what is constant, and from slices.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import JaxprEqn, primitives, scan_counts, source_line
from optaxclip.per_example.engine import lift
from optaxclip.per_example.engine.assumptions import UnseenError, is_linear
from optaxclip.per_example.engine.control.checkpoint import Checkpoint
from optaxclip.per_example.engine.partial import known_outputs, which_known
from optaxclip.per_example.engine.program import (
    STEP,
    Block,
    Equation,
    Found,
    Users,
    Values,
    evaluate_once,
    reach,
)
from optaxclip.per_example.engine.uses import users
from optaxclip.per_example.engine.walk import Watch, body_forms, run, zero_taps
from optaxclip.per_example.forms.forms import Form, add

if TYPE_CHECKING:
    from optaxclip.per_example.engine.flatten import Builder


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A loop. The outputs of `body` are the carries, then the ys; constants it knows by number."""

    body: Block
    init: tuple[int, ...]
    carries: tuple[int, ...]
    """The carries within the body."""
    xs: tuple[int, ...]
    slices: tuple[int, ...]
    """The slices of the xs within the body."""
    outputs: tuple[int, ...]
    avals: tuple[Any, ...]
    """Types of the carries."""
    length: int
    reverse: bool
    unroll: int | bool

    def taps(self, watch: Watch) -> Any:
        """Those of the body, stacked."""
        one = zero_taps(self.body, watch)
        return jax.tree.map(lambda x: jnp.zeros((self.length, *x.shape), x.dtype), one)

    def run(self, values: Values, taps: Any, watch: Watch) -> Any:
        """The loop itself."""

        def step(carry: Any, given: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            slices, taps, number = given
            local = {**values, STEP: number}
            local.update(zip((*self.carries, *self.slices), (*carry, *slices), strict=True))
            evaluate_once(self.body, local)
            outputs, records = run(self.body, local, taps, watch)
            split = len(self.carries)
            return self._typed(outputs[:split]), (outputs[split:], records)

        init = self._typed([values[i] for i in self.init])
        xs = [values[i] for i in self.xs]
        number = jnp.arange(self.length) if watch.steps else None
        carry, (ys, records) = lax.scan(
            step, init, (xs, taps, number), self.length, self.reverse, self.unroll
        )
        values.update(zip(self.outputs, (*carry, *ys), strict=True))
        return records

    def users(self) -> Users:
        """Those of the body."""
        whole = dict(zip(self.slices, self.xs, strict=True))
        return {whole.get(number, number): uses for number, uses in users(self.body).items()}

    def reach(self, wanted: set[int]) -> None:
        """From step to step, until nothing is added."""
        outputs = self.body.outputs
        links = [
            *zip(self.outputs, outputs, strict=True),
            *zip(self.carries, outputs, strict=False),
            *zip(self.carries, self.init, strict=True),
            *zip(self.slices, self.xs, strict=True),
        ]
        before = -1
        while len(wanted) > before:
            before = len(wanted)
            reach(self.body, wanted)
            for value, source in links:
                wanted.update([source] if value in wanted else [])

    def forms(self, values: Mapping[int, Any], records: Any, cotangents: Any) -> Found:
        """Those of each step, joined."""
        known = {n: values[i] for n, i in zip(self.slices, self.xs, strict=True) if i in values}

        def step(slices: Values, records: Any, cotangents: Any) -> dict[int, Form]:
            found = body_forms(self.body, {**values, **slices}, records, cotangents)
            return {number: add(forms) for number, forms in found.items()}

        forms = jax.vmap(step, (0, 1, 1), 1, axis_size=self.length)(known, records, cotangents)
        whole = dict(zip(self.slices, self.xs, strict=True))
        found: Found = {}
        for number, form in forms.items():
            if number in whole:
                lifted = lift.of_slices(form, self.length)
            else:
                lifted = lift.of_constant(form)
            found.setdefault(whole.get(number, number), []).append(lifted)
        return found

    def _typed(self, carry: Sequence[Any]) -> list[Any]:
        return [_as(x, aval.dtype) for x, aval in zip(carry, self.avals, strict=True)]


def flatten_scan(builder: "Builder", eqn: JaxprEqn, inputs: list[int]) -> Sequence[int] | None:
    """Append a scan that is not known as a whole; the numbers of its outputs."""
    if all(map(builder.is_known, inputs)):
        return None
    before = builder.snapshot()
    outputs, body = _flatten(builder, eqn, inputs)
    start, _ = scan_counts(eqn)
    heavy = _heavy(builder, body, inputs[:start]) if eqn.params["length"] > 1 else set()
    if heavy:
        builder.restore(before)
        avals: list[Any] = [v.aval for v in eqn.invars]
        pairs = enumerate(zip(inputs, avals, strict=True))
        inputs = [builder.met(i, a) if k < start and i in heavy else i for k, (i, a) in pairs]
        outputs, _ = _flatten(builder, eqn, inputs)
    return outputs


def _heavy(builder: "Builder", body: Block, constants: Sequence[int]) -> set[int]:
    """The constants of which gradients would be stacked for every step, to be added up later.

    They are copied for each example before the loop instead, so that JAX adds up their gradients
    as it goes back through it. A bias is none: it has the cotangent of the product it is added to,
    which is held in any case.
    """
    taps = _taps(body)
    held = {tap for e, own in taps.items() if e.eqn.primitive in _FACTORED for tap in own}
    known = sorted((*itertools.chain(*builder.once), *body.once), key=lambda e: e.outputs)
    heavy = set()
    for constant in builder.active.intersection(constants):
        reached = {constant}
        for equation in known:
            if not reached.isdisjoint(equation.inputs):
                reached.update(builder.active.intersection(equation.outputs))
        mine = [e for e in taps if not reached.isdisjoint(e.inputs)]
        factored = any(e.eqn.primitive in _FACTORED for e in mine)
        if not factored and any(taps[e].isdisjoint(held) for e in mine):
            heavy.add(constant)
    return heavy


def _taps(body: Block) -> dict[Equation, set[int]]:
    """The uses of a body, inside checkpoints too, and the values whose cotangents they have.

    Loops and branches within see to theirs.
    """
    found: dict[Equation, set[int]] = {}
    for item in body.each:
        if isinstance(item, Checkpoint):
            found.update(_taps(item.body))
        elif isinstance(item, Equation) and item.use:
            found[item] = {body.tapped[item.outputs[k]] for k in item.differentiable}
    return found


_FACTORED = frozenset({
    primitives.dot_general_p, primitives.conv_general_dilated_p, primitives.gather_p,
    primitives.dynamic_slice_p,
})  # fmt: skip


def _flatten(builder: "Builder", eqn: JaxprEqn, inputs: list[int]) -> tuple[Sequence[int], Block]:
    p = eqn.params
    start, count = scan_counts(eqn)
    stop = start + count
    known = _known_inputs(eqn, [*map(builder.is_known, inputs)])
    outputs_known = which_known(p["jaxpr"], known)
    ahead = _scan_known(builder, eqn, inputs, known, outputs_known)
    active = not builder.active.isdisjoint([*ahead.steps.values(), *ahead.outputs.values()])
    if active and not is_linear(eqn):  # a rule would meet parts of its cotangent, not their sum
        why = "with a rule of the user's on carries that depend on parameters alone"
        error = UnseenError(f"{eqn.primitive} {why}, at {source_line(eqn)}")
        raise error

    avals: list[Any] = [v.aval for v in eqn.invars]
    varying = [k for k in range(start, stop) if not known[k]]
    init = tuple(builder.met(inputs[k], avals[k]) for k in varying)
    xs: dict[int, int] = {}
    builder.open(xs)
    numbers = list(inputs)
    for k in range(start, len(inputs)):
        numbers[k] = builder.known() if known[k] else builder.data()
        if k >= stop:
            xs[numbers[k]] = inputs[k]
        elif known[k]:
            xs[numbers[k]] = ahead.steps[k]
    builder.active.update(n for n, whole in xs.items() if whole in builder.active)
    outputs = builder.inline_body(p["jaxpr"], numbers, eqn)
    out_avals: list[Any] = p["jaxpr"].out_avals
    left = [k - start for k in varying]
    left += [k for k in range(count, len(outputs)) if not outputs_known[k]]
    body = builder.close([builder.met(outputs[k], out_avals[k]) for k in left])
    found = {k: builder.data() for k in left}
    builder.append(
        Scan(
            body,
            init,
            tuple(numbers[k] for k in varying),
            tuple(xs.values()),
            tuple(xs),
            tuple(found.values()),
            tuple(avals[k] for k in varying),
            p["length"],
            p["reverse"],
            p["unroll"],
        )
    )
    found.update(ahead.outputs)
    return [found[k] for k in range(len(outputs))], body


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """What is known of a scan before it runs."""

    steps: dict[int, int]
    """The stacked values of known carries at each step, by position of the input."""
    outputs: dict[int, int]
    """Known outputs, by position."""


def _known_inputs(eqn: JaxprEqn, known: list[bool]) -> list[bool]:
    """Which inputs of the body are known at every step."""
    start, carries = scan_counts(eqn)
    while True:
        out = which_known(eqn.params["jaxpr"], known)
        kept = [k and out[i] for i, k in enumerate(known[start : start + carries])]
        if kept == known[start : start + carries]:
            return known
        known = [*known[:start], *kept, *known[start + carries :]]


def _scan_known(
    builder: "Builder",
    eqn: JaxprEqn,
    inputs: list[int],
    known: list[bool],
    outputs_known: list[bool],
) -> _Ahead:
    """Append the scan of the known carries, and of the ys that follow from them."""
    p = eqn.params
    start, count = scan_counts(eqn)
    stop = start + count
    carries = [k for k in range(start, stop) if known[k]]
    finals = [k - start for k in carries]
    ys = [k for k in range(count, len(outputs_known)) if outputs_known[k]]
    if not carries and not ys:
        return _Ahead({}, {})
    positions = [k for k, is_known in enumerate(known) if is_known]
    avals: list[Any] = [v.aval for v in eqn.invars]

    def scan(*operands: Any) -> Any:
        given = dict(zip(positions, operands, strict=True))
        xs = {k: x for k, x in given.items() if k >= stop}

        def step(carry: dict[int, Any], xs: dict[int, Any]) -> Any:
            local = {**given, **carry, **xs}
            outputs = known_outputs(p["jaxpr"], [local.get(k) for k in range(len(known))])
            new = {k: _as(outputs[k - start], avals[k].dtype) for k in carries}
            return new, ([carry[k] for k in carries], [outputs[k] for k in ys])

        init = {k: given[k] for k in carries}
        carry, (steps, stacked) = lax.scan(step, init, xs, p["length"], p["reverse"])
        return [*steps, *(carry[k] for k in carries), *stacked]

    types = [avals[k] for k in positions]
    found = builder.traced(scan, types, [inputs[k] for k in positions], eqn)
    steps, outputs = found[: len(carries)], found[len(carries) :]
    return _Ahead(
        dict(zip(carries, steps, strict=True)), dict(zip(finals + ys, outputs, strict=True))
    )


def _as(x: Any, dtype: Any) -> Any:
    """An array of a dtype, even if it is a Python number."""
    return x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)
