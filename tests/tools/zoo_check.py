"""What a program that others wrote has to show: it is exact, and stacks what is said to be stacked.

The programs are those of the packages' documentation, at small sizes.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from tools.agreement import assert_equals_oracle, close, normal
from tools.quick import quick_jit

from optaxclip._leaves import leaves_with_path, path_name
from optaxclip.per_example import clipped_grad, materialize, per_example_grad


def check(loss, params, batch, stacked=None, *, clipped=False, **kwargs):
    """`loss(params, example)` equals the oracle. Returns the plan.

    `stacked` has a part of the reason for each parameter whose gradient is stacked, by the end of
    its path; a string is the reason why the loss is differentiated as a whole. `clipped`: whether
    to clip too, in two passes, which differentiate the loss once more, scaled; sums with weights
    are asserted anyway.
    """
    loss = jax.jit(loss)  # traced once
    whole = isinstance(stacked, str)
    stacked = {"": stacked} if whole else (stacked or {})
    paths = [path_name(path) for path, _ in leaves_with_path(params)]
    whys = {p: why for p in paths for end, why in stacked.items() if p.endswith(end)}
    assert all(any(p.endswith(end) for p in paths) for end in stacked)
    plan = assert_equals_oracle(loss, params, batch, fallbacks=whys, **kwargs)
    for row in plan.rows:
        assert whys.get(row.path, "") in row.fallback, f"{row.path}: {row.fallback}"
        assert whole == ("the whole loss" in row.fallback), row.fallback
    if clipped:
        _check_clipped(loss, params, batch, kwargs.get("tol", 1e-10))
    return plan


def _check_clipped(loss, params, batch, tol):
    """Against the materialized gradients, which equal the oracle's."""

    @quick_jit
    def both(params, batch):
        grads = materialize(per_example_grad(loss)(params, batch))
        flat = [g.reshape(len(g), -1) for g in jax.tree.leaves(grads)]
        norms = jnp.linalg.norm(jnp.concatenate(flat, axis=1), axis=1)
        bound = 0.8 * jnp.max(norms)
        weights = jnp.minimum(1, bound / norms)
        whole = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)
        clip = clipped_grad(loss, l2_clip_norm=bound, keep_batch_dim=False, method="two_pass")

        def alone(g):
            n = jnp.linalg.norm(g.reshape(len(g), -1), axis=1)
            n = jnp.where(n == 0, 1, n)
            return jnp.tensordot(jnp.minimum(1, 0.1 * bound / n), g, 1)

        bounds = jax.tree.map(lambda x: 0.1 * bound, params)
        options = {"l2_clip_norm": bounds, "keep_batch_dim": False}
        by_leaf = [clipped_grad(loss, method=m, **options) for m in ("one_pass", "two_pass")]
        found = clip(params, batch), [fun(params, batch) for fun in by_leaf]
        return found, (whole, [jax.tree.map(alone, grads)] * 2)

    close(*both(params, batch), tol)


def trainable(model, random=False):
    """The parameters of an Equinox model, and what is left; `random`: other ones, none zero."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return (randomized(params) if random else params), static


def randomized(params):
    """Random numbers in place of initial values, which may be zero or equal."""
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [normal(i, *x.shape) / 2 for i, x in enumerate(leaves)])


def key(seed):
    """Made where it is needed: nothing is computed when a test is imported."""
    return jax.random.key(seed)
