"""Leaves small and large against NumPy: in range, beyond it, below it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.oracles import norm as exact

from optaxclip import Norm
from optaxclip._numerics import maximum_of

INF = float("inf")
ORDS = (1, 2, "rms", INF)
SHAPES = [(70, 60)] * 9 + [(8, 70_000)] + [(5, 6)] * 20 + [(3, 400_000)]


@pytest.fixture(scope="module")
def leaves():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def measure(leaves, by, ord=2):
    norm = Norm(by, ord)
    counted = norm.leaves(leaves)
    groups = norm.groups(counted)
    return groups.vector(norm.measure(counted, groups))


@jax.jit
def norms_of(leaves):
    return {(by, str(ord)): measure(leaves, by, ord) for by in ("leaf", "global") for ord in ORDS}


@jax.jit
def norms_and_elements_of(leaves):
    return {by: measure(leaves, by) for by in ("leaf", "element")}


def test_largest_keeps_nan():
    """`jnp.max` loses it here on CPU (JAX 0.10)."""
    largest = jax.jit(maximum_of)
    x = np.ones((300, 200), np.float32)
    x[7, 11] = np.nan
    assert np.isnan(largest(x))
    x[7, 11] = 3.0
    assert largest(x) == 3.0


@pytest.mark.parametrize("factor", [1.0, 1e25, 1e-25])
def test_norms(leaves, factor):
    leaves = [x * np.float32(factor) for x in leaves]
    found = norms_of(leaves)
    for ord in ORDS:
        each = [exact([x], ord) for x in leaves]
        np.testing.assert_allclose(found["leaf", str(ord)], each, rtol=1e-6, err_msg=str(ord))
        whole = [exact(leaves, ord)]
        np.testing.assert_allclose(found["global", str(ord)], whole, rtol=1e-6, err_msg=str(ord))


def test_largest_elements(leaves):
    expected = np.float32([exact([x], INF) for x in leaves])
    np.testing.assert_array_equal(norms_and_elements_of(leaves)["element"], expected)


def test_a_bad_leaf_leaves_the_others_alone(leaves):
    expected = norms_and_elements_of(leaves)
    for bad in [0, 7, 8, 9, 10, 29, 30]:
        spoilt = list(leaves)
        spoilt[bad] = spoilt[bad].copy()
        spoilt[bad][-1, -1] = np.nan
        for by, found in norms_and_elements_of(spoilt).items():
            found, at = np.asarray(found), f"leaf {bad}, by {by}"
            assert np.flatnonzero(np.isnan(found)).tolist() == [bad], at
            others = np.delete(expected[by], bad)
            np.testing.assert_allclose(np.delete(found, bad), others, err_msg=at)


@pytest.mark.parametrize("ord", [2, INF])
def test_derivative(leaves, ord):
    """Of a sum of norms: g / n, or the sign at the largest element."""

    @jax.jit
    def gradients(leaves):
        def of_sum(by):
            return jax.grad(lambda xs: jnp.sum(measure(xs, by, ord)))(leaves)

        return {by: of_sum(by) for by in ("global", "leaf")}

    whole = exact(leaves, ord)
    for by, found in gradients(leaves).items():
        for x, g in zip(leaves, found, strict=True):
            x = np.asarray(x, np.float64)
            norm = exact([x], ord) if by == "leaf" else whole
            at_largest = np.abs(x) == np.float32(norm)
            expected = x / norm if ord == 2 else np.where(at_largest, np.sign(x), 0)
            np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-9, err_msg=by)
