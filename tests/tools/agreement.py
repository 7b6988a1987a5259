"""Agreement with `vmap(grad)`: gradients, norms, inner products and weighted sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tools.quick import quick_jit

from optaxclip.per_example import (
    explain,
    inner,
    materialize,
    per_example_value_and_grad,
    sq_norms,
    weighted_sum,
)


def stacked_grads(fun, params, batch):
    """The oracle, obviously right: per-example gradients, [B, *shape] at each leaf."""
    return jax.vmap(jax.grad(fun), in_axes=(None, 0))(params, batch)


def assert_equals_oracle(fun, params, batch, *, fallbacks=(), tol=1e-10, may_vanish=False):
    """Every answer equals the oracle's, and just `fallbacks` are stacked. Returns the plan."""
    plan = explain(fun, params, batch)
    assert set(plan.fallbacks) == set(fallbacks), str(plan)
    found, expected = quick_jit(functools.partial(_answers, fun))(params, batch)
    for norms in expected["norms of leaves"]:
        assert may_vanish or np.any(np.asarray(norms) > 0), "the test would pass on zero gradients"
    close(found, expected, tol)
    return plan


def _answers(fun, params, batch):
    """What the factored gradients answer, and what the stacked ones do."""
    losses, grads = per_example_value_and_grad(fun)(params, batch)
    stacked, weights = stacked_grads(fun, params, batch), _weights(batch)
    others = jax.tree.map(_rolled, grads)  # forms hold the examples on leading axes
    found = {
        "loss": losses,
        "gradient": materialize(grads),
        "squared norms": sq_norms(grads),
        "norms of leaves": [f.sq_norm() for f in jax.tree.leaves(grads, is_leaf=_is_form)],
        "inner": inner(grads, others),
        "inner with stacked": inner(grads, stacked),
        "weighted sum": weighted_sum(grads, weights),
    }
    norms = _dots(stacked, stacked)
    expected = {
        "loss": jax.vmap(fun, (None, 0))(params, batch),
        "gradient": stacked,
        "squared norms": sum(norms),
        "norms of leaves": norms,
        "inner": sum(_dots(stacked, jax.tree.map(_rolled, stacked))),
        "inner with stacked": sum(norms),
        "weighted sum": jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), stacked),
    }
    return found, expected


def _rolled(x):
    return jnp.roll(x, 1, axis=0)


def _weights(batch):
    return jnp.cos(jnp.arange(len(jax.tree.leaves(batch)[0])) + 1.0)


def _is_form(x):
    return hasattr(x, "sq_norm")


def _dots(x, y):
    """Inner products of stacked gradients, leaf by leaf."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=range(1, a.ndim)), x, y)
    return jax.tree.leaves(products)


def close(found, expected, tol):
    """Equal up to `tol` times the largest element, leaf by leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        x, y = np.asarray(x, float), np.asarray(y, float)
        scale = max(np.max(np.abs(y), initial=0), 1e-30)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tol, err_msg=name)


def normal(seed, *shape):
    """Fixed random numbers of a shape, in NumPy: nothing is computed when a file is imported."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))
