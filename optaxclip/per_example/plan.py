"""How each parameter is handled and what it costs, from shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from optaxclip._leaves import leaves_with_path, path_name, place
from optaxclip.measure.platforms import ACCELERATOR, CPU, Rates
from optaxclip.per_example.engine.arguments import Argnums, Options, call_of
from optaxclip.per_example.fallbacks import reason
from optaxclip.per_example.forms.forms import Form, is_form, terms, zero_like
from optaxclip.per_example.schedules.choice import Chooser, chooser
from optaxclip.per_example.schedules.costs import (
    Costs,
    Method,
    bytes_of,
    norm_flops,
    plain_flops,
    sum_flops,
)
from optaxclip.per_example.schedules.factored import factored, see
from optaxclip.per_example.table import amount, note, table

_ARTICLES = {"cpu": "a CPU", "accelerator": "an accelerator"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: the forms its gradient is the sum of, and what they cost."""

    path: str
    shape: tuple[int, ...]
    uses: int
    """Equations in which the parameter meets the example."""
    forms: tuple[str, ...]
    """With the shapes of their factors."""
    norm_methods: tuple[str, ...]
    norm_flops: int
    sum_flops: int
    """Of a weighted sum: a plain gradient's work for this parameter."""
    bytes: int
    """Held by the forms, for the whole batch."""
    stacked_bytes: int
    """What `vmap(grad)` would hold."""
    fallback: str
    """Why gradients have to be stacked; empty if they do not."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One way to the clipped sum of the whole gradient, and what it is estimated to cost."""

    method: Method
    parts: int
    """In how many the batch is taken."""
    bytes: int
    """Held at once."""
    work: float
    """In multiples of a plain gradient's operations; bytes moved count as operations, too."""


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What `explain` returns; it shows as a table."""

    rows: tuple[Row, ...]
    costs: Costs
    plain_flops: int
    """Of the gradient of the summed loss."""
    schedules: dict[str, tuple[Schedule, ...]]
    """By platform, "cpu" or "accelerator", what `clipped_grad` may take: first what it takes."""

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Paths of the parameters whose gradients are stacked for want of a factored form.

        That of a single array is "the root".
        """
        return tuple(row.path for row in self.rows if row.fallback)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows as plain data, by path."""
        return {row.path: dataclasses.asdict(row) for row in self.rows}

    def __repr__(self) -> str:
        head = ("parameter", "shape", "uses", "form", "norm by", "norm", "sum", "held")
        lines = table([head, *map(_cells, self.rows)])
        printed = [lines[0]]
        for row, line in zip(self.rows, lines[1:], strict=True):
            printed.append(line)
            printed += [note(f"stacked: {why}") for why in row.fallback.split("; ") if why]
        return "\n".join([*printed, "", *self._totals()])

    def _totals(self) -> list[str]:
        costs = self.costs
        share = costs.norm_flops / max(self.plain_flops, 1)
        return [
            f"Held by the forms: {amount(costs.factor_bytes, 'B')}; stacked it would be"
            f" {amount(costs.stacked_bytes, 'B')}.",
            "Of the aggregators only coordinate_median and coordinate_trimmed_mean stack them.",
            f"A plain gradient: parameters {amount(costs.parameter_bytes, 'B')}, residuals"
            f" {amount(costs.residual_bytes, 'B')}, {amount(self.plain_flops, 'FLOP')}.",
            f"The norms add {amount(costs.norm_flops, 'FLOP')} ({share:.1%}).",
            "",
            *self._ranked(),
        ]

    def _ranked(self) -> list[str]:
        """What clipped_grad takes, and the runners-up."""
        lines = [("clipped_grad", "takes", "in parts", "held", "held / plain", "work / plain")]
        for platform, ranked in self.schedules.items():
            for nth, found in enumerate(ranked):
                lines.append(
                    (
                        "" if nth else f"on {_ARTICLES[platform]}",
                        f"{'then ' if nth else ''}{found.method}",
                        str(found.parts),
                        amount(found.bytes, "B"),
                        f"{found.bytes / max(self.costs.plain_bytes, 1):.2f}x",
                        f"{found.work:.2f}x",
                    )
                )
        held = amount(self.costs.factor_bytes, "B")
        best = {(ranked[0].method, ranked[0].parts) for ranked in self.schedules.values()}
        if best == {("one_pass", 1)}:
            return table(lines)
        of_forms = f"per_example_grad takes one pass over the whole batch, and holds {held}: where"
        of_forms += " that is much more than above, clipped_grad is better."
        return [*table(lines), of_forms]


def explain(
    fun: Callable,
    params: Any,
    batch: Any,
    *args: Any,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    **kwargs: Any,
) -> Plan:
    """How `per_example_grad(fun)(params, batch)` handles each parameter. Computes nothing.

    Args:
      fun: the loss of one example, `fun(params, example)`.
      params: arrays, or `jax.ShapeDtypeStruct`s; in general the first argument of `fun`.
      batch: the same, with the examples on the leading axis; in general the second argument.
      *args: further arguments of `fun`.
      argnums: as for `per_example_grad`, and so are the other options.
      batch_argnums: which arguments hold the examples.
      has_aux: whether `fun` returns `(loss, aux)`.
      keep_batch_dim: whether `fun` sees an example as a batch of one.
      prng_argnum: the argument that is a random key.
      **kwargs: keyword arguments of `fun`.

    Returns:
      A `Plan`: one row per parameter; `.fallbacks`, `.to_dict()`, `.schedules`. It shows as a
      table with the uses of each parameter, its form, the way to its norm, the operations of the
      norm and of a weighted sum, and the bytes held; then which schedule `clipped_grad` takes on
      which platform, and the runners-up, by estimates.

    Raises:
      ValueError, TypeError: as `per_example_grad` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import explain
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))
      >>> params = {"w": jnp.ones((512, 256)), "b": jnp.ones(256)}
      >>> print(explain(loss, params, jnp.ones((64, 512))))
      parameter  shape    uses  form   norm by         norm         sum          held
      b          256         1  Dense  sum of squares  32.8 kFLOP   32.8 kFLOP   65.5 kB
      w          512x256     1  Outer  rank one        98.4 kFLOP   16.8 MFLOP   197 kB
      ...
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)
    leaves, structure = jax.tree.flatten(((params, batch, *args), kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}
    # Without how they are split: nothing is computed.
    arrays = {i: jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in arrays.items()}
    plans: list[Plan] = []

    def plan(arrays: dict[int, Any]) -> None:
        full = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, full)
        plans.append(_plan(fun, options, args, kwargs))

    jax.eval_shape(plan, arrays)
    return plans[0]


def _plan(fun: Callable, options: Options, args: Any, kwargs: Any) -> Plan:
    call = call_of(fun, options, args, kwargs)
    seen = see(call)
    found = factored(call, seen)
    grads = call.like_params(found.forms, lambda leaf: zero_like(leaf, call.size))
    uses = jax.tree.leaves(call.like_params(found.uses, lambda leaf: 0))
    leaves = leaves_with_path(grads, is_leaf=is_form)
    rows = [
        _row(place(path_name(path)), form, count, call.size)
        for (path, form), count in zip(leaves, uses, strict=True)
    ]
    choosing = chooser(call, seen, [0] * len(call.params), "auto", "auto")
    assert choosing.costs is not None
    flops = plain_flops(call)
    schedules = {
        "cpu": _schedules(choosing, choosing.costs, CPU, flops),
        "accelerator": _schedules(choosing, choosing.costs, ACCELERATOR, flops),
    }
    return Plan(tuple(rows), choosing.costs, flops, schedules)


def _schedules(
    chooser: Chooser, costs: Costs, rates: Rates, plain_flops: int
) -> tuple[Schedule, ...]:
    """Those that may be taken, the best first; of a method the best number of parts alone."""
    best: dict[Method, Schedule] = {}
    for choice in chooser.ranked(rates):
        method, parts = choice.method, chooser.parts(choice)
        held, work = (f(method, parts, rates) for f in (costs.memory, costs.work))
        found = Schedule(method, parts, held, 1 + work / max(plain_flops, 1))
        best.setdefault(method, found)
    return tuple(best.values())


def _row(path: str, form: Form, uses: int, examples: int) -> Row:
    parts = terms(form)
    size, itemsize = jax.ShapeDtypeStruct(form.shape, form.dtype).size, form.dtype.itemsize
    return Row(
        path=path,
        shape=tuple(form.shape),
        uses=uses,
        forms=tuple(f"{type(f).__name__}{_factors(f)}" for f in parts),
        norm_methods=tuple(getattr(f, "norm_method", "sum of squares") for f in parts),
        norm_flops=norm_flops(form),
        sum_flops=sum_flops(form, examples),
        bytes=bytes_of(form),
        stacked_bytes=examples * size * itemsize,
        fallback=reason(form),
    )


def _factors(form: Form) -> str:
    shapes = (f"[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(form))
    return f"({', '.join(shapes)})"


def _cells(row: Row) -> tuple[str, ...]:
    used = row.uses > 0 or bool(row.fallback)
    return (
        row.path,
        "x".join(map(str, row.shape)) or "scalar",
        str(row.uses),
        _listed(form.partition("(")[0] for form in row.forms) if used else "-",
        _listed(row.norm_methods) if used else "-",
        amount(row.norm_flops, "FLOP"),
        amount(row.sum_flops, "FLOP"),
        amount(row.bytes, "B"),
    )


def _listed(words: Any) -> str:
    return "+".join(dict.fromkeys(words))
