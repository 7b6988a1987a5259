"""Squared norms as gradients of dummy inputs, so that nothing need be held.

At each spot (see `spots`) the value passes through an identity with a backward rule of its own. The
rule is given the cotangent and the operands that the uses recorded, makes forms by the rules of the
registry, and returns their squared norms, [B], as the cotangent of a *tag*: an input of zero, one
number per example and group. JAX's scan and checkpoint add up the cotangents of the tags, so that
the pass takes the memory of a plain gradient, and computes no gradient of a parameter. Where the
weights of the examples follow from that norm alone, or are known, the rule also returns the
weighted sum of the parameter.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import as_varying, evaluated_jaxpr
from optaxclip._numerics import accumulator, wider
from optaxclip.per_example.engine.program import (
    STEP,
    Block,
    Equation,
    Found,
    Program,
    Values,
    evaluate_once,
    merge,
)
from optaxclip.per_example.engine.pullback import pull_back
from optaxclip.per_example.engine.spots import Spot, chain
from optaxclip.per_example.engine.walk import Record, find_forms, forms_of_use, run, zero_taps
from optaxclip.per_example.forms.contractions import toward_zero
from optaxclip.per_example.forms.forms import Form, add, at_most, instantiated, zero_like
from optaxclip.per_example.forms.trees import cast

Weigh = Callable[[int, jax.Array, Any], jax.Array]
"""`(group, squared norms [B], row) -> weights [B]`.

The row is None but of groups in `Spots.rows`: then it is the step of the scan."""


@dataclasses.dataclass(frozen=True)
class _Weights:
    """`weigh` of each group as a jaxpr, whose constants are given to the backward rules.

    A rule runs inside loops, when they are batched; what `weigh` closes over is no value there.
    """

    jaxprs: dict[int, Any]
    constants: dict[int, list[Any]]

    @classmethod
    def of(cls, weigh: Weigh, spots: "Spots", squares: jax.Array) -> "_Weights":
        found = {}
        for group in spots.seen:
            by_row = group in spots.rows

            def weights(x: Any, row: Any, group: int = group, by_row: bool = by_row) -> jax.Array:
                return weigh(group, x, row if by_row else None)

            found[group] = jax.make_jaxpr(weights)(squares, jnp.int32(0))
        return cls(
            {group: closed.jaxpr for group, closed in found.items()},
            {group: closed.consts for group, closed in found.items()},
        )

    def __call__(self, group: int, constants: list[Any], squares: jax.Array, row: Any) -> jax.Array:
        row = jnp.int32(0) if row is None else row.astype(jnp.int32)
        (weights,) = evaluated_jaxpr(self.jaxprs[group], constants, squares, row)
        return lax.stop_gradient(weights)


@dataclasses.dataclass(frozen=True)
class Spots:
    """The parameters that are measured on the spot, and in which groups."""

    spots: Mapping[int, Spot]
    """By position."""
    groups: Sequence[int]
    """The group of each parameter."""
    rows: Set[int] = frozenset()
    """Groups of which each slice that a scan takes is weighed by itself."""

    @property
    def uses(self) -> frozenset[Equation]:
        """All that is watched."""
        return frozenset().union(*(spot.uses for spot in self.spots.values()))

    @property
    def seen(self) -> list[int]:
        """The groups with a parameter among them."""
        return sorted({self.groups[k] for k in self.spots})

    def at(self, tapped: int) -> tuple[Block, dict[int, int]]:
        """The home of a spot, and the group of each value there that stands for parameters."""
        mine = {k: spot for k, spot in self.spots.items() if spot.tapped == tapped}
        home = next(spot.home for spot in mine.values())
        return home, {spot.number: self.groups[k] for k, spot in mine.items()}


class Measured(NamedTuple):
    """What comes of one backward pass."""

    losses: jax.Array
    aux: list[jax.Array]
    squares: dict[int, jax.Array]
    """Squared norms of the groups, [B]: what was seen of them on the spot."""
    sums: dict[int, jax.Array]
    """Weighted sums by position, of the parameters with a spot."""
    forms: dict[int, Form]
    """The gradients of the others."""


def measured(
    program: Program,
    params: list[Any],
    batch: list[Any],
    spots: Spots,
    weigh: Weigh | None = None,
    *,
    norms: bool = True,
    spmd_axis_name: Any = None,
) -> Measured:
    """One pass forward and backward. `weigh`: sums are wanted; `norms`: squared norms are."""
    size = batch[0].shape[0]
    known = dict(program.constants)
    held = dict(zip(program.params, params, strict=True))
    values = {**known, **held}
    evaluate_once(program.block, values)
    tags = {g: jnp.zeros((), _wide(params, spots)) for g in spots.seen}
    linked, weights = {}, None
    if weigh is not None:
        linked = {k: params[k] for k in spots.spots}
        (squares,) = as_varying([jnp.zeros(size, _wide(params, spots))], like=batch)
        weights = _Weights.of(weigh, spots, squares)
    nothing = _Watch(program, spots, size, {}, weights, norms)
    start = (zero_taps(program.block, nothing), tags)
    leaves, structure = jax.tree.flatten(start)
    start = jax.tree.unflatten(structure, as_varying(leaves, like=batch))

    def one(example: list[Any]) -> Any:
        def loss_of(start: Any, linked: dict[int, Any]) -> tuple[Any, Any]:
            taps, tags = start
            local = dict(values)
            if linked:
                local = {**known, **held}
                local.update({program.params[k]: x for k, x in linked.items()})
                evaluate_once(program.block, local)
            local.update(zip(program.example, example, strict=True))
            watch = _Watch(program, spots, size, tags, weights, norms)
            (loss, *aux), records = run(program.block, local, taps, watch)
            return loss, (aux, records)

        loss, pull, (aux, records) = jax.vjp(loss_of, start, linked, has_aux=True)
        (taps, squares), sums = pull(jnp.ones_like(loss))
        return [[loss, *aux], records, taps, squares], sums

    each = jax.vmap(one, out_axes=(0, None), spmd_axis_name=spmd_axis_name)
    ((losses, *aux), records, taps, squares), sums = each(batch)
    found = find_forms(program.block, values, records, taps)
    forms = _of_held(found, program, params, spots, size)
    return Measured(losses, aux, squares, sums, forms)


def norms_then_sum(
    program: Program,
    params: list[Any],
    batch: list[Any],
    spots: Spots,
    weights: Callable[[dict[int, jax.Array], dict[int, Form]], jax.Array],
    *,
    spmd_axis_name: Any = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """One pass forward and two back: losses, aux, and the gradient of `sum_b c_b loss_b`.

    What the first pass back finds, `weights(squares by group, forms of those that are held)`, the
    second one starts from. JAX's own rules sum, so a weight of zero hides no NaN.
    """
    size = batch[0].shape[0]
    values = {**program.constants, **dict(zip(program.params, params, strict=True))}
    evaluate_once(program.block, values)
    tags = {g: jnp.zeros(size, _wide(params, spots)) for g in spots.seen}
    taps = zero_taps(program.block, _Watch(program, spots, size, {}, None, True))
    taps = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), taps)
    leaves, structure = jax.tree.flatten((taps, tags))
    taps, tags = jax.tree.unflatten(structure, as_varying(leaves, like=batch))

    def losses_of(params: list[Any], taps: Any, tags: Any) -> tuple[Any, Any]:
        known = {**program.constants, **dict(zip(program.params, params, strict=True))}
        evaluate_once(program.block, known)

        def one(example: list[Any], taps: Any, tags: Any) -> Any:
            local = {**known, **dict(zip(program.example, example, strict=True))}
            watch = _Watch(program, spots, size, tags, None, True)
            (loss, *aux), records = run(program.block, local, taps, watch)
            return loss, aux, records

        loss, aux, records = jax.vmap(one, spmd_axis_name=spmd_axis_name)(batch, taps, tags)
        return loss, (aux, records)

    losses, pull, (aux, records) = jax.vjp(losses_of, params, taps, tags, has_aux=True)
    _, taps, squares = pull(jnp.ones_like(losses))
    found = find_forms(program.block, values, records, taps)
    forms = _of_held(found, program, params, spots, size)
    c = lax.stop_gradient(weights(squares, forms))
    return losses, aux, pull(toward_zero(c, losses.dtype))[0]


def _of_held(
    found: Found, program: Program, params: list[Any], spots: Spots, size: int
) -> dict[int, Form]:
    """The gradients of the parameters without a spot, by position."""
    held = [(k, n) for k, n in enumerate(program.params) if k not in spots.spots]
    return {k: add(found[n]) if n in found else zero_like(params[k], size) for k, n in held}


def _wide(params: list[Any], spots: Spots) -> Any:
    """The dtype of squared norms."""
    return wider(jnp.float32, *(accumulator(params[k].dtype) for k in spots.spots))


@dataclasses.dataclass(frozen=True)
class _Watch:
    """What the walk forward asks at each use."""

    program: Program
    spots: Spots
    size: int
    tags: dict[int, Any]
    weights: _Weights | None
    norms: bool

    @functools.cached_property
    def uses(self) -> Set[Equation]:
        return self.spots.uses

    @property
    def links(self) -> bool:
        return self.weights is not None

    @property
    def steps(self) -> bool:
        return self.links and bool(self.spots.rows)

    def watched(
        self, block: Block, number: int, uses: Sequence[tuple[Equation, Record]], values: Values
    ) -> Any:
        """The value, through an identity whose backward rule measures."""
        home, groups = self.spots.at(number)
        equations = [use for use, _ in uses]
        home = dataclasses.replace(home, once=chain(home, equations))
        wanted = {n for e in home.once for n in e.inputs}
        wanted |= {n for e in equations for p, n in enumerate(e.inputs) if p not in e.recorded}
        constants = {n: values[n] for n in wanted if n in self.program.constants}
        known = {n: values[n] for n in wanted if n not in constants}
        if self.steps and STEP in values:
            known[STEP] = values[STEP]
        of_weights = {g: self.weights.constants[g] for g in groups.values()} if self.weights else {}
        given = lax.stop_gradient(([record for _, record in uses], (known, of_weights)))
        sums = {n: values[n] for n in groups} if self.links else {}
        tags = {g: self.tags[g] for g in groups.values()}
        types = {n: jax.ShapeDtypeStruct(jnp.shape(values[n]), values[n].dtype) for n in groups}
        # The rule outlives this trace: it holds no tracer of it, so neither `self` nor `tags`.
        weights, norms, size = self.weights, self.norms, self.size
        wide = {g: x.dtype for g, x in tags.items()}

        def found(cotangent: Any, records: list[Record], given: Any) -> tuple[Any, Any]:
            """Of the whole batch: squared norms by group, weighted sums by number."""
            known, of_weights = given
            local = {**constants, **known}
            arrived: Found = {}
            for use, record in zip(equations, records, strict=True):
                of_use = forms_of_use(use, local, record, [cotangent], block)
                merge(arrived, ((n, [form]) for n, form in of_use))
            pull_back(home, local, arrived)
            nothing = {n: zero_like(types[n], size) for n in groups}
            forms = {n: add(arrived[n]) if n in arrived else nothing[n] for n in groups}
            if weights is not None and norms:
                forms = {n: instantiated(form) for n, form in forms.items()}
            squares = {g: jnp.zeros(size, dtype) for g, dtype in wide.items()}
            for n, g in groups.items() if norms else ():
                squares[g] += at_most(forms[n]).astype(squares[g].dtype)
            totals: dict[int, jax.Array] = {}
            if weights is not None:
                for n, g in groups.items():
                    c = weights(g, of_weights[g], squares[g], local.get(STEP))
                    wide_enough = cast(forms[n], accumulator(forms[n].dtype))
                    totals[n] = wide_enough.weighted_sum(c)
            return squares, {n: x.astype(types[n].dtype) for n, x in totals.items()}

        return _identity(found, size, tags, sums)(values[number], tags, sums, given)


def _identity(found: Callable, size: int, tags: dict[int, Any], sums: dict[int, Any]) -> Callable:
    """`(x, tags, sums, given) -> x`, whose backward rule is `found(cotangent, *given)`."""

    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tags, sums))
    are_batched = dict.fromkeys(tags, True), dict.fromkeys(sums, False)

    @jax.custom_batching.custom_vmap
    def measure(cotangent: Any, records: Any, known: Any, tags: Any) -> tuple[Any, Any]:
        # Never run, as the tags differ from example to example: this says what types come out.
        return cotangent, *jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), types)

    @measure.def_vmap
    def batched(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        assert axis_size == size
        known = jax.tree.map(
            lambda x, is_batched: x[0] if is_batched else x, args[2], in_batched[2]
        )

        def whole(x: Any, is_batched: bool) -> Any:
            return x if is_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

        cotangent, records = jax.tree.map(whole, args[:2], tuple(in_batched[:2]))
        squares, totals = found(cotangent, records, known)
        # Measured before the cotangent goes on, or all that it was made of stays in memory.
        out = lax.optimization_barrier((cotangent, squares, totals))
        return out, (True, *are_batched)

    @jax.custom_vjp
    def identity(x: Any, tags: Any, sums: Any, given: Any) -> Any:
        return x

    def forward(x: Any, tags: Any, sums: Any, given: Any) -> tuple[Any, Any]:
        return x, (tags, given)

    def backward(kept: Any, cotangent: Any) -> tuple[Any, ...]:
        tags, given = kept
        return *measure(cotangent, *given, tags), None

    identity.defvjp(forward, backward)
    return identity
