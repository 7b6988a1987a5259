"""A batch a part at a time: what a sum over examples holds is then what one part holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import as_varying
from optaxclip._leaves import Tree


def accumulated(
    fun: Callable[[Tree], tuple[Tree, Tree]], inputs: Tree, size: int
) -> tuple[Tree, Tree]:
    """`fun(inputs) -> (sums, each)`, from `size` examples at a time.

    Inputs and `each` have the examples on the first axis; `sums` are added up. `fun` is traced
    twice, unless it is jitted.
    """
    parts = jax.tree.map(lambda x: _split(x, size), inputs)
    sums, _ = jax.eval_shape(fun, jax.tree.map(lambda x: x[0], parts))

    def step(total: Tree, part: Tree) -> tuple[Tree, Tree]:
        sums, each = fun(part)
        return jax.tree.map(jnp.add, total, sums), each

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    leaves, structure = jax.tree.flatten(zeros)
    zeros = jax.tree.unflatten(structure, as_varying(leaves, like=jax.tree.leaves(parts)))
    total, each = jax.lax.scan(step, zeros, parts)
    return total, jax.tree.map(_join, each)


def check_divides(size: Any, examples: int) -> None:
    """Raises unless `size` divides the number of examples."""
    if size is not None and examples % size:
        raise ValueError(
            f"microbatch_size must divide the number of examples, got {size} for {examples}. Pass a"
            f" divisor of {examples}, or None."
        )


def _split(x: jax.Array, size: int) -> jax.Array:
    """`[B, ...]` -> `[n, size, ...]`, every n-th together, so that a sharded batch stays put."""
    return x.reshape(size, x.shape[0] // size, *x.shape[1:]).swapaxes(0, 1)


def _join(parts: jax.Array) -> jax.Array:
    """Back from `_split`."""
    return parts.swapaxes(0, 1).reshape(parts.shape[0] * parts.shape[1], *parts.shape[2:])
