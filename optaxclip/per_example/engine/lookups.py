"""Parts of a parameter that a loop picks by numbers of its own: `W[i]`, `W[n - i]`, `W[ids[i]]`.

The numbers of all steps are constants of the program. So the parts are taken out of the loop, all
at once, and given to it step by step, as if the user had scanned over them: what belongs to them
stays factored, where a gradient of the whole of W would be stacked for each step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import JaxprEqn, primitives


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Numbers along one axis of a parameter, of which a part is taken; all other axes are whole."""

    axis: int
    length: int
    """Of the part."""
    index: int
    """The position of the input with the number."""
    column: int | None
    """Where in that input, if it holds several numbers."""
    squeezed: bool
    """Whether the part lacks the axis."""
    clamped: bool
    """Whether numbers out of bounds are moved inside, as those of `dynamic_slice`."""


def lookup(eqn: JaxprEqn) -> Lookup | None:
    """What an equation looks up, if it is of this kind."""
    table: Any = eqn.invars[0].aval
    if eqn.primitive is primitives.dynamic_slice_p:
        sizes = eqn.params["slice_sizes"]
        partial = [a for a, d in enumerate(table.shape) if sizes[a] != d]
        if len(partial) != 1:
            return None
        return Lookup(partial[0], sizes[partial[0]], 1 + partial[0], None, False, True)
    if eqn.primitive is not primitives.gather_p:
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    ids: Any = eqn.invars[1].aval
    partial = [a for a, d in enumerate(table.shape) if sizes[a] != d]
    if ids.ndim != 1 or numbers.operand_batching_dims or len(partial) != 1:
        return None
    (axis,) = partial
    if axis not in numbers.start_index_map or numbers.collapsed_slice_dims not in ((), (axis,)):
        return None
    if len(numbers.start_index_map) != 1:
        return None
    squeezed = numbers.collapsed_slice_dims == (axis,)
    clip = lax.GatherScatterMode.from_any(eqn.params["mode"]) == lax.GatherScatterMode.CLIP
    return Lookup(axis, sizes[axis], 1, 0, squeezed, clip)


def parts(found: Lookup, numbers: np.ndarray, size: int) -> Callable[[Any], Any] | None:
    """`table -> [steps, *part]`: the parts that begin at these numbers along an axis of `size`.

    None where a number is out of bounds and its part is filled with something else.
    """
    most = size - found.length
    inside = np.clip(numbers, 0, most)
    if not found.clamped and not np.array_equal(inside, numbers):
        return None
    rows = (inside[:, None] + np.arange(found.length)).ravel()
    steps = np.diff(rows)
    even = len(rows) == 1 or (steps[0] != 0 and bool(np.all(steps == steps[0])))
    step = int(steps[0]) if len(rows) > 1 else 1

    def run(table: Any) -> Any:
        if even and step > 0:
            taken = lax.slice_in_dim(table, int(rows[0]), int(rows[-1]) + 1, step, found.axis)
        elif even:
            taken = lax.slice_in_dim(table, int(rows[-1]), int(rows[0]) + 1, -step, found.axis)
            taken = lax.rev(taken, (found.axis,))
        else:
            taken = _rows(table, rows, found.axis)
        first = jnp.moveaxis(taken, found.axis, 0)
        split = first.reshape(len(numbers), found.length, *first.shape[1:])
        if found.squeezed:
            return split[:, 0]
        return jnp.moveaxis(split, 1, 1 + found.axis)

    return run


def _rows(table: Any, rows: np.ndarray, axis: int) -> Any:
    """`jnp.take` with numbers that stay constants of the program."""
    others = tuple(a for a in range(table.ndim) if a != axis)
    numbers = lax.GatherDimensionNumbers(others, (axis,), (axis,))
    sizes = tuple(1 if a == axis else d for a, d in enumerate(table.shape))
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, rows[:, None].astype(np.int32), numbers, sizes, mode=mode)


def split_starts(eqn: JaxprEqn) -> Callable[..., Any] | None:
    """A `dynamic_slice` along several axes as one after the other; None if it is along one."""
    if eqn.primitive is not primitives.dynamic_slice_p:
        return None
    sizes, table = eqn.params["slice_sizes"], eqn.invars[0].aval
    shape: Any = getattr(table, "shape", ())
    partial = [a for a, d in enumerate(shape) if sizes[a] != d]
    if len(partial) < 2 or math.prod(shape) == 0:
        return None

    def run(table: Any, *starts: Any) -> Any:
        for a in partial:
            table = lax.dynamic_slice_in_dim(table, starts[a], sizes[a], a)
        return table

    return run


def evaluated(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)` of constants, now."""
    with jax.ensure_compile_time_eval():
        return fun(*args)
