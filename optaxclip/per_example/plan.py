"""How each parameter is handled, from shapes alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from optaxclip._leaves import path_name
from optaxclip.per_example.forms import Dense, Form, is_form, terms
from optaxclip.per_example.gradients import per_example_grad


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: the forms its gradient is the sum of, and how their norms are taken."""

    path: str
    shape: tuple[int, ...]
    forms: tuple[str, ...]
    norm_methods: tuple[str, ...]
    bytes: int
    """Held by the forms, for the whole batch."""
    stacked_bytes: int
    """What `vmap(grad)` would hold."""
    fallback: str
    """Why gradients have to be stacked; empty if they do not."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `explain` returns; print it."""

    rows: tuple[Row, ...]

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Paths of the parameters whose gradients are stacked for want of a factored form."""
        return tuple(row.path for row in self.rows if row.fallback)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows as plain data, by path."""
        return {row.path: dataclasses.asdict(row) for row in self.rows}

    def __str__(self) -> str:
        head = ("parameter", "shape", "forms", "norm", "MB", "MB stacked", "fallback")
        table = [head] + [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                " + ".join(row.forms),
                " + ".join(row.norm_methods),
                f"{row.bytes / 1e6:.3g}",
                f"{row.stacked_bytes / 1e6:.3g}",
                row.fallback or "-",
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join(lines)


def explain(fun: Callable, params: Any, batch: Any) -> Plan:
    """How `per_example_grad(fun)(params, batch)` handles each parameter. Computes nothing.

    Args:
      fun: the loss of one example, `fun(params, example)`.
      params: arrays, or `jax.ShapeDtypeStruct`s.
      batch: the same, with the examples on the leading axis.

    Returns:
      A `Plan`: one row per parameter; `.fallbacks`, `.to_dict()`.
    """
    grads = jax.eval_shape(per_example_grad(fun), params, batch)
    leaves = jax.tree.leaves_with_path(grads, is_leaf=is_form)
    return Plan(tuple(_row(path_name(path), form) for path, form in leaves))


def _row(path: str, form: Any) -> Row:
    parts: tuple[Form, ...] = terms(form)
    arrays = jax.tree.leaves(form)
    reasons = dict.fromkeys(f.reason for f in parts if isinstance(f, Dense) and f.reason)
    return Row(
        path=path,
        shape=tuple(form.shape),
        forms=tuple(f"{type(f).__name__}{_factors(f)}" for f in parts),
        norm_methods=tuple(getattr(f, "norm_method", "sum of squares") for f in parts),
        bytes=sum(x.size * x.dtype.itemsize for x in arrays),
        stacked_bytes=arrays[0].shape[0] * math.prod(form.shape) * form.dtype.itemsize,
        fallback="; ".join(reasons),
    )


def _factors(form: Form) -> str:
    shapes = (f"[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(form))
    return f"({', '.join(shapes)})"
