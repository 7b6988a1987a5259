"""Every way in which leaves share a kernel, by their sizes, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.oracles import norm as exact

from optaxclip import Norm, _reductions

INF = float("inf")
# Nine of one size: one more than share a reduction. The one of 8 rows is cut into parts.
SHAPES = [(70, 60)] * 9 + [(8, 70_000)] + [(5, 6)] * 20 + [(3, 400_000)]


@pytest.fixture(scope="module")
def leaves():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in SHAPES]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def measure(leaves, by, ord=2):
    norm = Norm(by, ord)
    counted = norm.leaves(leaves)
    layout = norm.layout(counted)
    return layout.vector(norm.measure(counted, layout))


def test_largest_keeps_nan():
    """`jnp.max` loses it here on CPU (JAX 0.10)."""
    x = jnp.ones((300, 200)).at[7, 11].set(jnp.nan)
    assert jnp.isnan(jax.jit(_reductions.largest)(x))
    assert _reductions.largest(x.at[7, 11].set(3.0)) == 3.0


def test_sizes_cover_every_way():
    sizes = sorted({int(np.prod(shape)) for shape in SHAPES})
    limits = (_reductions._SMALL, _reductions._MEDIUM, _reductions._LARGE)
    assert np.searchsorted(limits, sizes).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("factor", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("ord", [1, 2, "rms", INF])
def test_norms(leaves, ord, factor):
    leaves = [x * factor for x in leaves]
    each = [exact([x], ord) for x in leaves]
    np.testing.assert_allclose(
        jax.jit(measure, static_argnums=(1, 2))(leaves, "leaf", ord), each, rtol=1e-6
    )
    np.testing.assert_allclose(measure(leaves, "global", ord), [exact(leaves, ord)], rtol=1e-6)


def test_largest_elements(leaves):
    expected = [exact([x], INF) for x in leaves]
    np.testing.assert_array_equal(measure(leaves, "element"), np.asarray(expected, np.float32))


@pytest.mark.parametrize("bad", [0, 7, 8, 9, 10, 29, 30])
def test_a_bad_leaf_leaves_the_others_alone(leaves, bad):
    spoilt = list(leaves)
    spoilt[bad] = spoilt[bad].at[-1, -1].set(jnp.nan)
    for by in ("leaf", "element"):
        found = np.asarray(measure(spoilt, by))
        assert np.flatnonzero(np.isnan(found)).tolist() == [bad]
        np.testing.assert_allclose(np.delete(found, bad), np.delete(measure(leaves, by), bad))


@pytest.mark.parametrize("ord", [2, INF])
@pytest.mark.parametrize("by", ["global", "leaf"])
def test_derivative(leaves, by, ord):
    """Of a sum of norms: g / n, or the sign at the largest element."""
    found = jax.grad(lambda xs: jnp.sum(measure(xs, by, ord)))(leaves)
    whole = exact(leaves, ord)
    for x, g in zip(leaves, found, strict=True):
        x = np.asarray(x, np.float64)
        norm = exact([x], ord) if by == "leaf" else whole
        expected = x / norm if ord == 2 else np.where(np.abs(x) == np.float32(norm), np.sign(x), 0)
        np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-9)
