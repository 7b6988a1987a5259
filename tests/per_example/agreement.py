"""Agreement with `vmap(grad)`: gradients, norms, inner products and weighted sums."""

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip.per_example import (
    explain,
    inner,
    materialize,
    per_example_norms,
    per_example_value_and_grad,
    sq_norms,
    weighted_sum,
)
from optaxclip.per_example._reference import stacked_grads


def assert_equals_oracle(fun, params, batch, *, fallbacks=(), tol=1e-10):
    """Every answer equals the oracle's, under jit too, and just `fallbacks` are stacked."""
    plan = explain(fun, params, batch)
    assert set(plan.fallbacks) == set(fallbacks), str(plan)
    oracle = stacked_grads(fun, params, batch)
    size = len(jax.tree.leaves(batch)[0])
    weights = jnp.cos(jnp.arange(size) + 1.0)
    per_leaf = jax.tree.leaves(jax.tree.map(lambda g: jnp.sum(g**2, axis=range(1, g.ndim)), oracle))
    norms_sq = sum(per_leaf)
    assert all(jnp.any(x > 0) for x in per_leaf), "the test would pass on zero gradients"

    losses, grads = jax.jit(per_example_value_and_grad(fun))(params, batch)
    close(losses, jax.vmap(fun, (None, 0))(params, batch), tol)
    close(materialize(grads), oracle, tol)
    close(sq_norms(grads), norms_sq, tol)
    close(inner(grads, grads), norms_sq, tol)
    close(inner(grads, oracle), norms_sq, tol)
    # A tree of other gradients: each example's inner product with that of its neighbour.
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), batch)
    others = per_example_value_and_grad(fun)(params, rolled)[1]
    expected = inner(oracle, jax.tree.map(lambda g: jnp.roll(g, 1, axis=0), oracle))
    close(inner(grads, others), expected, tol)
    expected = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), oracle)
    close(weighted_sum(grads, weights), expected, tol)
    close(per_example_norms(fun)(params, batch), jnp.sqrt(norms_sq), tol)
    found = jax.tree.leaves(jax.tree.map(leaf_norms, grads, is_leaf=is_leaf))
    close(found, per_leaf, tol)
    return plan


def is_leaf(x):
    return hasattr(x, "sq_norm")


def leaf_norms(form):
    return form.sq_norm()


def close(found, expected, tol):
    """Equal up to `tol` times the largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        scale = max(float(jnp.max(jnp.abs(y), initial=0)), 1e-30)
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, rtol=0, atol=tol)


def normal(seed, *shape):
    """Fixed random numbers of a shape."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)
