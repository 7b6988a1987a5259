"""Norms in float32 whose squares are out of range, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import normal, stacked_grads
from tools.quick import quick_jit, run

from optaxclip.per_example import norms, per_example_grad, per_example_norms, sq_norms

SIZES = np.array([1e-12, 1e-15, 1.0, 1e12, 1e15, 0.0])


def rank_one(p, x):
    return jnp.sum((x @ p["w"]) ** 2)


def tied(p, x):
    """Gram, with cross terms in another layout."""
    h = x[None] * jnp.array([[1.0], [0.5], [-1.0]], x.dtype)
    return jnp.sum(((h @ p["w"]) @ p["w"].reshape(6, 4)) ** 2)


def embedded(p, x):
    ids = jnp.array([0, 2, 2])
    return jnp.sum((p["w"][ids, :4] * x) ** 2)


def stacked(p, x):
    return jnp.sum((p["b"] + x) ** 3 * x)


def safe(fun):
    return lambda params, x: norms(per_example_grad(fun)(params, x))


LOSSES = {f.__name__: f for f in (rank_one, tied, embedded, stacked)}


def data():
    params = {"w": normal(0, 4, 6) / 2, "b": 0 * normal(1, 4)}
    x = normal(2, 6, 4) * SIZES[:, None]
    return params, x


@pytest.mark.parametrize("name", LOSSES)
def test_against_float64(name):
    fun, (params, x) = LOSSES[name], data()
    if name == "stacked":
        x = np.sign(x) * np.abs(x) ** 0.5  # the cube of the largest is no float32 otherwise
    narrow = jax.tree.map(np.float32, (params, x))

    def compute(narrow, wide):
        plain = jnp.sqrt(sq_norms(per_example_grad(fun)(*narrow)))
        return safe(fun)(*narrow), plain, jnp.sqrt(sq_norms(stacked_grads(fun, *wide)))

    found, plain, expected = run(compute, narrow, jax.tree.map(np.float64, narrow))
    assert (found.dtype, expected.dtype) == (np.float32, np.float64)
    assert found[-1] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(plain, expected, rtol=1e-5, atol=0), "the test would pass without"


def test_64_bit_norms_have_their_own_range():
    def compute(params, x):
        expected = jnp.sqrt(sq_norms(stacked_grads(rank_one, params, x)))
        return safe(rank_one)(params, x * 1e100), expected

    found, expected = run(compute, *data())
    np.testing.assert_allclose(found, expected * 1e200, rtol=1e-12)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_example_that_is_not_finite_spoils_no_other(bad):
    params, x = jax.tree.map(np.float32, data())
    fun = quick_jit(safe(rank_one))
    good = np.asarray(fun(params, x))
    x[2, 0] = bad
    found = np.asarray(fun(params, x))
    assert not np.isfinite(found[2])
    keep = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(found[keep], good[keep])


def test_stacked_and_factored_leaves_mix():
    def compute(params, x):
        grads = per_example_grad(rank_one)(params, x)
        mixed = {"w": grads["w"].materialize(), "b": grads["b"]}
        return norms(mixed), norms(grads)

    np.testing.assert_allclose(*run(compute, *jax.tree.map(np.float32, data())), rtol=1e-5)


def test_the_gradient_of_the_norms_is_finite_at_zero():
    for door in (safe, per_example_norms):
        slope = run(jax.grad(lambda p, x, door=door: jnp.sum(door(rank_one)(p, x))), *data())
        assert np.isfinite(slope["w"]).all()
