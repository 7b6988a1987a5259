"""A batch a part at a time: what a sum over examples holds is then what one part holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._compat import as_varying
from optaxclip._compat import primitives as P  # noqa: N812
from optaxclip._leaves import Tree
from optaxclip.per_example.schedules.flops import flops_of

# More parts than this are a loop, whatever they hold.
MOST_WRITTEN_OUT = 8
# A model with less than this share of its operations in convolutions may stand in a loop: the
# patches of a vision transformer are 0.7 %.
_SMALL_SHARE = 0.05


def accumulated(
    fun: Callable[[Tree], tuple[Tree, Tree]], inputs: Tree, size: int, *, rare: bool = False
) -> tuple[Tree, Tree]:
    """`fun(inputs) -> (sums, each)`, from `size` examples at a time.

    Inputs and `each` have the examples on the first axis; `sums` are added up. `fun` is traced
    twice, unless it is jitted. Parts with convolutions are written out, one after the other: XLA
    runs convolutions on a CPU without its library where they stand in a loop, and six layers of 64
    channels took 44 times a plain gradient in two parts, 1.6 times written out. There a CPU holds
    all parts together, for its scheduler looks through the barrier between them. What is `rare` is
    a loop all the same: it is to hold little, and to compile quickly.
    """
    parts = jax.tree.map(lambda x: _split(x, size), inputs)
    first = jax.tree.map(lambda x: x[0], parts)
    jaxpr, (sums, _) = jax.make_jaxpr(fun, return_shape=True)(first)
    count = jax.tree.leaves(parts)[0].shape[0]
    if not rare and are_written_out(convolves(jaxpr), count):
        leaves, structure = jax.tree.flatten(parts)
        each = (jax.tree.unflatten(structure, [x[k] for x in leaves]) for k in range(count))
        return _written_out(fun, list(each))

    def step(total: Tree, part: Tree) -> tuple[Tree, Tree]:
        sums, each = fun(part)
        return jax.tree.map(jnp.add, total, sums), each

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    leaves, structure = jax.tree.flatten(zeros)
    zeros = jax.tree.unflatten(structure, as_varying(leaves, like=jax.tree.leaves(parts)))
    total, each = lax.scan(step, zeros, parts)
    return total, jax.tree.map(_join, each)


def _written_out(fun: Callable[[Tree], tuple[Tree, Tree]], parts: list[Tree]) -> tuple[Tree, Tree]:
    total, each = fun(parts[0])
    found = [each]
    for part in parts[1:]:
        # No part before the last one is done, so that they can have the same place in memory.
        part, total = lax.optimization_barrier((part, total))
        sums, each = fun(part)
        total = jax.tree.map(jnp.add, total, sums)
        found.append(each)
    return total, jax.tree.map(lambda *x: _join(jnp.stack(x)), *found)


def check_divides(size: Any, examples: int) -> None:
    """Raises unless `size` divides the number of examples."""
    if size is not None and examples % size:
        raise ValueError(
            f"microbatch_size must divide the number of examples, got {size} for {examples}. Pass a"
            f" divisor of {examples}, or None."
        )


def are_written_out(convolves: bool, parts: int) -> bool:
    """Whether parts stand one after the other, not in a loop."""
    return convolves and 1 < parts <= MOST_WRITTEN_OUT


def convolves(jaxpr: Any) -> bool:
    """Whether convolutions are more than a small part of what it computes."""
    return flops_of(jaxpr, P.conv_general_dilated_p) > _SMALL_SHARE * flops_of(jaxpr)


def _split(x: jax.Array, size: int) -> jax.Array:
    """`[B, ...]` -> `[n, size, ...]`, every n-th together, so that a sharded batch stays put."""
    return x.reshape(size, x.shape[0] // size, *x.shape[1:]).swapaxes(0, 1)


def _join(parts: jax.Array) -> jax.Array:
    """Back from `_split`."""
    return parts.swapaxes(0, 1).reshape(parts.shape[0] * parts.shape[1], *parts.shape[2:])
