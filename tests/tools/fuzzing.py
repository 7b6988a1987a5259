"""Whether the engine agrees with `vmap(grad)` on a random program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tools import programs
from tools.quick import quick_jit

from optaxclip.per_example import (
    clipped_value_and_grad,
    per_example_value_and_grad,
    reweighted_grad,
    sq_norms,
    weighted_sum,
)

METHODS = ("one_pass", "two_pass", "vmap")
BY_LEAF = ("one_pass", "two_pass")


def weights(squares: jax.Array) -> jax.Array:
    """Clips to norm 1; no example's weight depends on another's."""
    return jnp.minimum(1.0, 1.0 / jnp.sqrt(jnp.maximum(squares, 1e-12)))


def _refused(fun: Any, *args: Any) -> bool:
    """Whether JAX itself does not support a program."""
    try:
        jax.eval_shape(fun, *args)
    except Exception:
        return True
    return False


def disagreements(seed: int, *, schedules: bool = False) -> list[str]:
    """What differs, in words; nothing where JAX itself refuses the program or finds no number.

    `schedules`: by one of the schedules, which one by the seed; of some seeds each leaf is weighed
    by its own norm.
    """
    program = programs.program(seed)
    params, batch = programs.parameters(seed), programs.examples(seed)
    method = (*METHODS, *BY_LEAF)[seed // 2 % 5]
    by_leaf = schedules and seed // 2 % 5 >= len(METHODS)

    def expected(params: Any, batch: Any) -> Any:
        each = jax.vmap(jax.value_and_grad(program.loss), (None, 0))
        losses, grads = each(params, batch)
        squares = functools.reduce(
            jnp.add, [jnp.sum(g.reshape(len(g), -1) ** 2, 1) for g in jax.tree.leaves(grads)]
        )
        c = weights(squares)

        def of_leaf(g: jax.Array) -> jax.Array:
            alone = weights(jnp.sum(g.reshape(len(g), -1) ** 2, 1))
            return jnp.tensordot(alone if by_leaf else c, g, 1)

        return losses, squares, jax.tree.map(of_leaf, grads)

    def found(params: Any, batch: Any) -> Any:
        losses, grads = per_example_value_and_grad(program.loss)(params, batch)
        squares = sq_norms(grads)
        return losses, squares, weighted_sum(grads, weights(squares))

    def scheduled(params: Any, batch: Any) -> Any:
        if by_leaf:
            ones = jax.tree.map(lambda x: 1.0, params)
            clip = clipped_value_and_grad(
                program.loss, l2_clip_norm=ones, method=method, keep_batch_dim=False, has_aux=False
            )
            losses, grads = clip(params, batch)
            return (
                losses,
                sq_norms(per_example_value_and_grad(program.loss)(params, batch)[1]),
                grads,
            )
        got = reweighted_grad(program.loss, weights, method=method)(params, batch)
        return got.values, got.sq_norms, got.grads

    answers = quick_jit(lambda *args: (expected(*args), (scheduled if schedules else found)(*args)))
    try:
        want, got = jax.tree.map(np.asarray, answers(params, batch))
    except Exception:
        if _refused(expected, params, batch):
            return []
        raise
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(want)):
        return []
    tolerance = 1e-4 if "[cast]" in program.names else 1e-8  # a cast to float32
    different = []
    for what, x, y in zip(("losses", "squared norms"), got, want, strict=False):
        if np.any(np.abs(x - y) > tolerance * np.maximum(np.abs(y), 1e-6)):
            different.append(f"{what}: {x} for {y}")
    scale = max(np.max(np.abs(y)) for y in jax.tree.leaves(want[2]))
    for name, y in want[2].items():
        error = np.max(np.abs(got[2][name] - y))
        if error > tolerance * max(scale, 1e-6):
            different.append(f"sum of {name}: off by {error:.1e} of {scale:.1e}")
    return different
