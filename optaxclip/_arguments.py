"""What the numbers among a clipper's arguments may be, checked when it is made.

What is traced has no value yet, and is taken as it is.
"""

import dataclasses
import math
import numbers
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

_Part = TypeVar("_Part")


def narrowed(part: _Part) -> _Part:
    """A dataclass whose numbers widen no float32: NumPy's become Python's, arrays of 64 bits 32."""

    def one(x: Any) -> Any:
        if isinstance(x, np.generic | np.ndarray) and x.ndim == 0:
            return x.item()
        wide = isinstance(x, jax.Array) and x.dtype == jnp.float64
        return x.astype(jnp.float32) if wide else x

    if not dataclasses.is_dataclass(part):
        return part
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    decay = fields.get("decay")
    if isinstance(decay, jax.Array) and decay.dtype.itemsize < 4:
        raise TypeError(
            f"decay must be of 32 bits, for 0.999 is 1 in fewer, got {decay.dtype}. With"
            " optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    changed = {name: one(x) for name, x in fields.items() if one(x) is not x}
    return dataclasses.replace(part, **changed) if changed else part  # type: ignore[type-var]


def check_bound(value: Any, argument: str, *, schedule: bool = True) -> None:
    """Raises unless `value` may be a bound: a number >= 0, an array, or a schedule."""
    is_schedule = schedule and callable(value) and not isinstance(value, type)
    if is_schedule or isinstance(value, jax.Array):
        return
    if isinstance(value, np.ndarray):
        if value.ndim:  # refused where the bound is used, by a message about trees
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{argument} must be a number{', a schedule' if schedule else ''} or a scalar array,"
            f" got {value!r}. Pass for example 1.0{' or optax.linear_schedule' * schedule}."
        )
    number = float(value)
    if math.isnan(number) or number < 0:
        raise ValueError(
            f"{argument} must be >= 0, got {value!r}. Pass 0 or more; float('inf') never clips."
        )


def check_positive(value: Any, argument: str) -> None:
    """Raises unless a number is > 0 and finite."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return check_bound(value, argument, schedule=False)
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{argument} must be > 0 and finite, got {value}. Pass for example 0.1.")
    return None


def check_at_least(value: Any, argument: str, least: int) -> None:
    """Raises unless a number is >= `least`."""
    check_bound(value, argument, schedule=False)
    if isinstance(value, numbers.Real) and value < least:
        raise ValueError(f"{argument} must be >= {least}, got {value}. Pass {least} or more.")


def check_between(
    value: Any,
    argument: str,
    low: float,
    high: float,
    *,
    last: bool = True,
    example: float | None = None,
) -> None:
    """Raises unless a number lies from `low` to `high`, which itself is allowed if `last`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return check_bound(value, argument, schedule=False)
    if not low <= float(value) <= high or (value == high and not last):
        interval = f"[{low:g}, {high:g}{']' if last else ')'}"
        example = (low + 9 * high) / 10 if example is None else example
        raise ValueError(
            f"{argument} must be in {interval}, got {value}. Pass for example {example:g}."
        )
    return None


def check_count(value: Any, argument: str, *, least: int = 1, what: str = "for example 25") -> None:
    """Raises unless `value` is a whole number >= `least`, known when the clipper is made."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{argument} must be static, got {value}. With optax.inject_hyperparams, pass"
            f" static_args=('{argument}',)."
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument} must be a whole number, got {value!r}. Pass {what}.")
    if value < least:
        raise ValueError(f"{argument} must be >= {least}, got {value}. Pass {least} or more.")


def check_transform(value: Any, argument: str) -> None:
    """Raises unless a value is a gradient transformation."""
    if not callable(getattr(value, "init", None)) or not callable(getattr(value, "update", None)):
        raise TypeError(
            f"{argument} must be a gradient transformation, got {value!r}. Pass an optimizer, such"
            " as optax.adam(1e-3), or a clipper."
        )


def check_opt_state(value: Any) -> None:
    """Raises for an optimizer in the place of its state."""
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(
            "the state of an optimizer is needed, got the optimizer itself. Pass what its init or"
            " update returned."
        )
