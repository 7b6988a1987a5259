"""Clipping singular values against the exact decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.exploring import examples

import optaxclip
from optaxclip import clip_singular_values

SHAPES = [(4, 4), (3, 7), (16, 5), (40, 40), (2, 30)]


def matrix(shape, condition, seed, scale=1.0):
    """Random singular vectors; singular values from 1 to 1 / condition, evenly in their log."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in shape)
    return np.float32(scale * (u * np.geomspace(1, 1 / condition, k)) @ v.T)


def exact(x, c, soft=False):
    u, s, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    s = s / np.sqrt(1 + (s / c) ** 2) if soft else np.minimum(s, c)
    return (u * s[..., None, :]) @ vt


def clip(x, c, **options):
    tx = clip_singular_values(c, **options)
    grads = {"w": jnp.asarray(x)}
    updates, state = tx.update(grads, tx.init(grads))
    return np.asarray(updates["w"]), optaxclip.clip_stats(state)["clip_singular_values"]


def _traced(soft, method):
    def run(x, c):
        tx = clip_singular_values(c, soft=soft, method=method)
        return tx.update(x, tx.init(x))[0]

    return jax.jit(run)


clip_traced = {
    (soft, method): _traced(soft, method)
    for soft in (False, True)
    for method in ("newton_schulz", "svd")
}


def promised(soft, largest):
    """How far off a result may be in spectral norm, for bounds down to 1e-3 of the largest."""
    return (1e-6 if soft else 5e-6) * largest


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
@examples(25)
@given(
    shape=st.sampled_from(SHAPES),
    log_condition=st.floats(0, 4),
    log_bound=st.floats(-3, 0.5),
    log_scale=st.floats(-30, 30),
    seed=st.integers(0, 1000),
)
def test_matches_the_svd(method, soft, shape, log_condition, log_bound, log_scale, seed):
    scale = 10**log_scale
    x = matrix(shape, 10**log_condition, seed, scale)
    c = np.float32(scale * 10**log_bound)
    found = clip_traced[soft, method](jnp.asarray(x), c)
    error = np.linalg.norm(np.float64(found) - exact(x, np.float64(c), soft), 2)
    assert error <= promised(soft, scale)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("c", [0.5, 0.02, 1e-3])
def test_the_worst_spectra(c, soft):
    """Singular values close to the bound, on either side, and many at the largest."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    gaps = np.geomspace(1e-7, 1e-2, 39)
    spectra = {
        "above": np.append(1.0, c + gaps),
        "below": np.append(1.0, c * (1 - gaps)),
        "half": np.append(np.ones(20), np.geomspace(1, 1e-4, 20)),
    }
    for name, s in spectra.items():
        x = np.float32((u * s) @ v.T)
        found = np.float64(clip_traced[soft, "newton_schulz"](jnp.asarray(x), np.float32(c)))
        error = np.linalg.norm(found - exact(x, np.float64(np.float32(c)), soft), 2)
        assert error <= promised(soft, 1.0), name


def test_equal_singular_values_and_those_on_the_bound():
    x = matrix((8, 8), 1.0, 0)
    np.testing.assert_allclose(clip(x, 0.25)[0], 0.25 * x, atol=2e-6)
    u, s, vt = np.linalg.svd(matrix((8, 8), 100.0, 1))
    np.testing.assert_allclose(
        clip((u * s) @ vt, s[3])[0], (u * np.minimum(s, s[3])) @ vt, atol=2e-6
    )


def test_stacks_of_matrices_and_heads_are_clipped_one_by_one():
    stack = np.stack([matrix((5, 6), 10.0, i, scale) for i, scale in enumerate((0.1, 1.0, 7.0))])
    expected = np.stack([exact(x, 0.5) for x in stack])
    found, stats = clip(stack, 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found[0], stack[0])
    np.testing.assert_allclose(stats.groups.pre_clip_norm, [0.1, 1, 7], rtol=1e-2)
    np.testing.assert_allclose(stats.groups.clipped_count, [0, 1, 1])
    heads = np.moveaxis(stack, 0, 1)  # (d, heads, head_dim)
    found, _ = clip(heads, 0.5, unit_axes=(0, 2))
    np.testing.assert_allclose(np.moveaxis(found, 1, 0), expected, atol=1e-5)
    whole, _ = clip(stack, 0.5, unit_axes=(0, 1, 2))  # (heads, head_dim) -> d
    np.testing.assert_allclose(whole.reshape(15, 6), exact(stack.reshape(15, 6), 0.5), atol=2e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (6, 1)])
def test_vectors_are_scaled_and_agree_with_matrices(shape, soft):
    x = np.float32(np.random.default_rng(0).standard_normal(shape))
    n = np.linalg.norm(x)
    for c in (0.5 * n, n, 2 * n):
        factor = 1 / np.sqrt(1 + (n / c) ** 2) if soft else min(1, c / n)
        np.testing.assert_allclose(clip(x, c, soft=soft)[0], factor * x, rtol=1e-6)
    if shape != (6, 1):  # else a stack
        as_matrix = clip(x[..., None], n / 2, soft=soft)[0][..., 0]
        np.testing.assert_allclose(as_matrix, clip(x, n / 2, soft=soft)[0], rtol=1e-5)


def test_stacked_vectors():
    x = np.float32([[3, 4], [0.3, 0.4]])
    np.testing.assert_allclose(clip(x, 1.0, unit_axes=1)[0], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_what_lies_inside_is_left_alone_and_a_bound_of_zero_gives_zeros(method):
    x = matrix((5, 4), 3.0, 0)
    np.testing.assert_array_equal(clip(x, 3.0, method=method)[0], x)
    for soft in (False, True):
        np.testing.assert_array_equal(clip(x, 0.0, method=method, soft=soft)[0], 0 * x)
        zeros, stats = clip(0 * x, 1.0, method=method, soft=soft)
        np.testing.assert_array_equal(zeros, 0 * x)
        assert stats.pre_clip_norm == 0
        np.testing.assert_allclose(clip(x, np.inf, method=method, soft=soft)[0], x, atol=1e-6)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_statistics_are_of_the_largest_singular_value(method):
    x = matrix((12, 9), 5.0, 0, 8.0)
    _, stats = clip(x, 2.0, method=method)
    found = [float(f) for f in (stats.pre_clip_norm, stats.post_clip_norm, stats.clip_factor)]
    np.testing.assert_allclose(found, [8, 2, 0.25], rtol=0.02)
    assert (stats.threshold, int(stats.clipped_count)) == (2, 1)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite(method, bad):
    x = np.stack([matrix((3, 4), 2.0, i) for i in range(2)])
    x[0, 1, 2] = bad
    found, stats = clip(x, 0.5, method=method)
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], exact(x[1], 0.5), atol=1e-5)
    assert int(stats.nonfinite_count) == 1
    found, _ = clip(x, 0.5, method=method, nonfinite="zero")
    np.testing.assert_array_equal(found[0], 0 * x[1])


def test_bfloat16_and_complex():
    x = matrix((6, 8), 30.0, 0)
    found, _ = clip(jnp.asarray(x, jnp.bfloat16), 0.3)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), exact(x, 0.3), atol=0.02)
    z = (x + 1j * matrix((6, 8), 10.0, 1)).astype(np.complex64)
    u, s, vh = np.linalg.svd(z.astype(np.complex128), full_matrices=False)
    np.testing.assert_allclose(clip(z, 0.3)[0], (u * np.minimum(s, 0.3)) @ vh, atol=1e-5)


def test_the_derivative_is_that_of_the_function():
    x = jnp.asarray(matrix((4, 6), 8.0, 0), jnp.float32)
    direction = jnp.asarray(matrix((4, 6), 8.0, 1))
    for soft in (False, True):
        _, slope = jax.jvp(
            lambda x, soft=soft: clip_traced[soft, "newton_schulz"](x, 0.4), (x,), (direction,)
        )
        h = 1e-6
        ahead, back = (exact(np.float64(x) + d * np.float64(direction), 0.4, soft) for d in (h, -h))
        np.testing.assert_allclose(slope, (ahead - back) / (2 * h), atol=1e-3)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_nan_bound_that_is_traced_shows(method, soft):
    x = matrix((3, 4), 2.0, 0)
    assert np.isnan(clip_traced[soft, method](jnp.asarray(x), jnp.nan)).all()


def test_errors():
    with pytest.raises(TypeError, match=r"max_value must be a number, a schedule .*got Split"):
        clip_singular_values(optaxclip.split_evenly(1.0))
    with pytest.raises(ValueError, match=r"unknown method, got 'qr'\. Use one of"):
        clip_singular_values(1.0, method="qr")
    with pytest.raises(ValueError, match=r"max_value must be >= 0, got -1"):
        clip_singular_values(-1.0)
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0"):
        clip_singular_values(1.0, steps=0)
    with pytest.raises(ValueError, match=r"unit_axes must be axes of the leaf, got 3"):
        clip(np.ones((2, 2)), 1.0, unit_axes=3)
