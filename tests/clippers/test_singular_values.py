"""Clipping singular values against the exact decomposition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.exploring import examples

import optaxclip
from optaxclip import clip_singular_values
from optaxclip.thresholds.elements import SecondMoments
from optaxclip.thresholds.rules import WindowMoments

FORMS = {
    f"{method}-{'soft' if soft else 'hard'}": {"method": method, "soft": soft}
    for method in ("newton_schulz", "svd")
    for soft in (False, True)
}
every_form = pytest.mark.parametrize("form", FORMS)
every_method = pytest.mark.parametrize("method", ["newton_schulz", "svd"])
# Compiling sixteen unrolled steps takes a second, a decomposition a tenth of it.
SHAPES = {"newton_schulz": [(16, 5), (40, 40), (2, 30)]}
SHAPES["svd"] = [*SHAPES["newton_schulz"], (4, 4), (3, 7)]


def matrix(shape, condition, seed, scale=1.0):
    """Random singular vectors; singular values from 1 to 1 / condition, evenly in their log."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in shape)
    return np.float32(scale * (u * np.geomspace(1, 1 / condition, k)) @ v.T)


def exact(x, c, soft=False):
    wide = np.result_type(x.dtype, np.float64)
    u, s, vt = np.linalg.svd(x.astype(wide), full_matrices=False)
    s = s / np.sqrt(1 + (s / np.float64(c)) ** 2) if soft else np.minimum(s, np.float64(c))
    return (u * s[..., None, :]) @ vt


def clipped(x, c, **options):
    """The clipped leaf and the statistics."""
    tx = clip_singular_values(c, **options)
    updates, state = tx.update(x, tx.init(x))
    return updates, optaxclip.clip_stats(state)["clip_singular_values"]


programs = {form: jax.jit(functools.partial(clipped, **FORMS[form])) for form in FORMS}


def clip(form, x, c):
    """The same by a program for each form and shape, which several tests share."""
    return programs[form](x, np.float32(c))


def promised(form, shape, largest=1.0, dtype=np.float32):
    """How far off a result may be in spectral norm, for bounds down to 1e-3 of the largest.

    Rounding: products and reflections add some m + n errors of eps or less, independent and hence
    like the steps of a random walk: sqrt(m + n). How many such there are gives the factor: the
    iterations correct what they have rounded before, a decomposition does not. Searches found up to
    1.5 and 2.8 (many close singular values in 2x2 to 16x16), and 1.0 for 2x200000.

    The sign of H - c of the hard bound has not converged where a singular value is at a distance d
    of c. Its 16 steps, taken on a scalar, leave at most 2.76e-6 = max d (1 - sign) / 2, in units of
    the estimate of the largest singular value, (sum s^16)^(1/16) <= k^(1/16) s_max.
    """
    factor = {"newton_schulz": 2, "svd": 4}[FORMS[form]["method"]]
    rounding = factor * sum(shape) ** 0.5 * np.finfo(dtype).eps
    unconverged = 2.8e-6 * min(shape) ** (1 / 16) if form == "newton_schulz-hard" else 0
    return (rounding + unconverged) * largest


def check(form, x, c, largest=1.0):
    found, _ = clip(form, x, c)
    error = np.linalg.norm(np.float64(found) - exact(x, c, FORMS[form]["soft"]), 2)
    assert error <= promised(form, x.shape, largest), (form, x.shape, c)


@every_form
@examples(25)
@given(
    data=st.data(),
    log_condition=st.floats(0, 4),
    log_bound=st.floats(-3, 0.5),
    log_scale=st.floats(-30, 30),
    seed=st.integers(0, 1000),
)
def test_matches_the_svd(form, data, log_condition, log_bound, log_scale, seed):
    shape = data.draw(st.sampled_from(SHAPES[FORMS[form]["method"]]))
    scale = 10**log_scale
    x = matrix(shape, 10**log_condition, seed, scale)
    check(form, x, np.float32(scale * 10**log_bound), scale)


@every_form
def test_the_worst_spectra(form):
    """Singular values close to the bound, on either side, and many at the largest."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    gaps = np.geomspace(1e-7, 1e-2, 39)
    for c in np.float32([0.5, 0.02, 1e-3]):
        spectra = {
            "above": np.append(1.0, c + gaps),
            "below": np.append(1.0, c * (1 - gaps)),
            "half": np.append(np.ones(20), np.geomspace(1, 1e-4, 20)),
            "all but one": np.append(np.ones(39), c + 1.5e-5),
        }
        for s in spectra.values():
            x = np.float32((u * s) @ v.T)
            check(form, x, c)


@every_form
def test_in_float64_the_promise_is_in_its_eps(form):
    """Of a matrix of signs and powers of two, exact as given."""
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    s, c = np.array([4.0, 2.0, 1.0, 0.25]), 1.5
    x, kept = (signs * s) @ signs[::-1], np.minimum(s, c)
    if FORMS[form]["soft"]:
        kept = s / np.hypot(1, s / c)
    with jax.enable_x64(True):
        found, _ = jax.jit(functools.partial(clipped, **FORMS[form]))(x, c)
    assert found.dtype == np.float64
    error = np.linalg.norm(np.asarray(found) - (signs * kept) @ signs[::-1], 2)
    assert error <= promised(form, x.shape, 4.0, np.float64)


def test_bfloat16_and_complex():
    x = matrix((6, 8), 30.0, 0)
    z = (x + 1j * matrix((6, 8), 10.0, 1)).astype(np.complex64)

    @jax.jit
    def run(x, z):
        return clipped(x.astype(jnp.bfloat16), 0.3)[0], clipped(z, 0.3)[0]

    found, of_complex = run(x, z)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), exact(x, 0.3), atol=0.02)
    np.testing.assert_allclose(of_complex, exact(z, 0.3), atol=1e-5)


def test_equal_singular_values_and_those_on_the_bound():
    form = "newton_schulz-hard"
    x = matrix((40, 40), 1.0, 0)
    found, _ = clip(form, x, np.float32(0.25))
    assert np.linalg.norm(found - 0.25 * np.float64(x), 2) <= promised(form, x.shape)
    x = matrix((40, 40), 100.0, 1)
    on_the_bound = np.float32(np.linalg.svd(x, compute_uv=False)[20])
    check(form, x, on_the_bound)


@every_method
def test_stacks_of_matrices_and_heads_are_clipped_one_by_one(method):
    """Whether the others in the stack are finite or not."""
    scales = (0.1, 1.0, 7.0, 1.0, 1.0)
    stack = np.stack([matrix((5, 6), 10.0, i, scale) for i, scale in enumerate(scales)])
    expected = np.stack([exact(x, 0.5) for x in stack])
    finite, whole = np.s_[:3], stack[:3]
    stack[3, 1, 2], stack[4, 1, 2] = np.nan, np.inf

    @jax.jit
    def run(stack, whole):
        return (
            clipped(stack, 0.5, method=method),
            # (d, heads, head_dim)
            clipped(
                stack.transpose(1, 0, 2), 0.5, method=method, unit_axes=(0, 2), nonfinite="zero"
            ),
            # (heads, head_dim) -> d
            clipped(whole, 0.5, method=method, unit_axes=(0, 1, 2)),
        )

    (found, stats), (of_heads, _), (of_whole, _) = jax.device_get(run(stack, whole))
    np.testing.assert_allclose(found[finite], expected[finite], atol=1e-5)
    np.testing.assert_array_equal(found[0], stack[0])
    np.testing.assert_allclose(stats.groups.pre_clip_norm[finite], [0.1, 1, 7], rtol=1e-2)
    np.testing.assert_allclose(stats.groups.clipped_count[finite], [0, 1, 1])
    assert np.isnan(found[3:]).all()
    assert stats.nonfinite_count == 1
    of_heads = np.moveaxis(of_heads, 1, 0)
    np.testing.assert_allclose(of_heads[finite], expected[finite], atol=1e-5)
    np.testing.assert_array_equal(of_heads[3:], np.zeros((2, 5, 6)))
    expected = exact(whole.reshape(15, 6), 0.5)
    np.testing.assert_allclose(of_whole.reshape(15, 6), expected, atol=2e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_vectors_are_scaled_and_agree_with_matrices(soft):
    rng = np.random.default_rng(0)
    leaves = [np.float32(rng.standard_normal(shape)) for shape in [(), (6,), (1, 6), (6, 1)]]
    norms = [np.float32(np.linalg.norm(x)) for x in leaves]
    shares = np.float32([0.5, 1, 2])

    @jax.jit
    def run(leaves, norms):
        """Each leaf with each bound; and what is no stack also as a matrix of one column."""
        one = lambda x, c: clipped(x, c, soft=soft)[0]
        scaled = [
            jax.vmap(one, (None, 0))(x, n * shares) for x, n in zip(leaves, norms, strict=True)
        ]
        return scaled, [
            one(x[..., None], n / 2)[..., 0] for x, n in zip(leaves[:3], norms[:3], strict=True)
        ]

    scaled, as_matrices = run(leaves, norms)
    factors = 1 / np.sqrt(1 + shares**-2.0) if soft else np.minimum(1, shares)
    for x, found in zip(leaves, scaled, strict=True):
        for factor, y in zip(factors, found, strict=True):
            np.testing.assert_allclose(y, factor * x, rtol=1e-6, err_msg=f"{x.shape}, {factor}")
    for y, found in zip(as_matrices, scaled[:3], strict=True):
        np.testing.assert_allclose(y, found[0], rtol=1e-5)


def test_stacked_vectors():
    x = np.float32([[3, 4], [0.3, 0.4]])
    found, _ = jax.jit(lambda x: clipped(x, 1.0, unit_axes=1))(x)
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)


@every_method
def test_what_lies_inside_is_left_alone_and_a_bound_of_zero_gives_zeros(method):
    x = matrix((16, 5), 3.0, 0)
    np.testing.assert_array_equal(clip(f"{method}-hard", x, 3.0)[0], x)
    for form in (f"{method}-hard", f"{method}-soft"):
        np.testing.assert_array_equal(clip(form, x, 0.0)[0], 0 * x)
        zeros, stats = clip(form, 0 * x, 1.0)
        np.testing.assert_array_equal(zeros, 0 * x)
        assert stats.pre_clip_norm == 0
        np.testing.assert_allclose(clip(form, x, np.inf)[0], x, atol=1e-6)


@every_method
def test_statistics_are_of_the_largest_singular_value(method):
    x = matrix((16, 5), 5.0, 0, 8.0)
    _, stats = clip(f"{method}-hard", x, 2.0)
    found = [float(f) for f in (stats.pre_clip_norm, stats.post_clip_norm, stats.clip_factor)]
    np.testing.assert_allclose(found, [8, 2, 0.25], rtol=0.02)
    assert (stats.threshold, int(stats.clipped_count)) == (2, 1)


def test_the_derivative_is_that_of_the_function():
    x, direction = matrix((4, 6), 8.0, 0), matrix((4, 6), 8.0, 1)

    @jax.jit
    def slopes(x, direction):
        return [
            jax.jvp(lambda x, soft=soft: clipped(x, 0.4, soft=soft)[0], (x,), (direction,))[1]
            for soft in (False, True)
        ]

    for soft, slope in zip((False, True), slopes(x, direction), strict=True):
        h = 1e-6
        ahead, back = (exact(np.float64(x) + d * np.float64(direction), 0.4, soft) for d in (h, -h))
        np.testing.assert_allclose(slope, (ahead - back) / (2 * h), atol=1e-3)


@every_form
def test_a_nan_bound_that_is_traced_shows(form):
    x = matrix((40, 40), 2.0, 0)
    assert np.isnan(clip(form, x, np.nan)[0]).all()


LEARNED = optaxclip.thresholds.Learned(WindowMoments(2.0, 6, True), 3, None)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_a_learned_bound_follows_the_largest_singular_values(method):
    """Of two matrices, one of them complex and one tall, and of a vector, with a spike."""
    rng = np.random.default_rng(0)
    levels = np.exp(0.1 * rng.standard_normal((12, 3)))
    levels[8] *= 20
    x = [matrix((6, 5), 8.0, 0), matrix((4, 7), 3.0, 1), np.float32([0.6, 0.8])]
    x[1] = (x[1] + 1j * matrix((4, 7), 3.0, 2)).astype(np.complex64)
    x[1] /= np.linalg.norm(x[1], 2)
    tx = clip_singular_values(LEARNED, method=method)

    @jax.jit
    def run(rows):
        def step(state, row):
            updates, state = tx.update([level * x for level, x in zip(row, x, strict=True)], state)
            stats = optaxclip.clip_stats(state)["clip_singular_values"]
            return state, (updates, stats.groups.threshold)

        return jax.lax.scan(step, tx.init(x), rows)[1]

    updates, bounds = jax.device_get(run(np.float32(levels)))
    # By products the largest singular value is estimated, from below, by one share of each matrix.
    share = 1e-5 if method == "svd" else 0.05
    for t in range(3, 12):
        past = levels[max(0, t - 6) : t]
        std = np.maximum(past.std(0), 0.01 * past.mean(0))
        expected = past.mean(0) + 2 * std
        assert (bounds[t] <= expected * (1 + 1e-5)).all()
        assert (bounds[t] >= expected * (1 - share)).all()
        for i, y in enumerate(updates):
            m = np.complex128(levels[t, i] * x[i])
            if m.ndim == 1:
                clip = m * min(1, bounds[t, i] / np.linalg.norm(m))
            else:
                clip = exact(m, bounds[t, i])
            np.testing.assert_allclose(y[t], clip, atol=2e-5 * levels[t, i], err_msg=f"{t}, {i}")


def test_other_thresholds_of_singular_values():
    """Where the bound is passed, split, or at most a number, the clipper is that of the number."""
    x = [matrix((6, 5), 8.0, 0, 3.0), matrix((4, 7), 3.0, 1, 5.0)]
    same = {
        "passed": (optaxclip.thresholds.Passed("c"), {"c": np.float32(0.5)}),
        "split": (optaxclip.thresholds.split_evenly(0.5 * 2**0.5), {}),
    }
    expected = [exact(y, 0.5) for y in x]
    for name, (threshold, extra) in same.items():
        tx = clip_singular_values(threshold, method="svd")
        found, _ = tx.update(x, tx.init(x), **extra)
        for y, z in zip(found, expected, strict=True):
            np.testing.assert_allclose(y, z, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tau", [0.3, 1e-3])
def test_mucon_is_a_chain(tau):
    """Of momentum; far below all singular values it is Muon, times tau."""
    grads = np.stack([matrix((6, 5), 8.0, seed) for seed in range(4)])
    tx = optax.chain(
        optax.trace(0.9, nesterov=True), optax.scale(1 - 0.9), clip_singular_values(tau)
    )

    @jax.jit
    def run(grads):
        step = lambda state, g: tx.update(g, state)[::-1]
        return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

    found, momentum = run(grads), np.zeros((6, 5))
    for g, y in zip(np.float64(grads), found, strict=True):
        momentum = 0.9 * momentum + 0.1 * g
        nesterov = 0.9 * momentum + 0.1 * g
        np.testing.assert_allclose(y, exact(nesterov, tau), atol=2e-6)
    if tau == 1e-3:
        u, s, vt = np.linalg.svd(nesterov, full_matrices=False)
        assert s.min() > tau
        np.testing.assert_allclose(found[-1] / tau, u @ vt, atol=2e-3)


def test_errors():
    with pytest.raises(TypeError, match=r"max_value must be a number, a schedule .*got 'big'"):
        clip_singular_values("big")
    with pytest.raises(TypeError, match=r"bound of singular values, got ParamNorm.* or use agc"):
        clip_singular_values(optaxclip.thresholds.ParamNorm(0.1))
    with pytest.raises(ValueError, match=r"element norm, got singular values\. Pass one bound a"):
        clipped(np.ones((2, 2), np.float32), SecondMoments(1.0, 0.9, 1))
    with pytest.raises(ValueError, match=r"unknown method, got 'qr'\. Use one of"):
        clip_singular_values(1.0, method="qr")
    with pytest.raises(ValueError, match=r"max_value must be >= 0, got -1"):
        clip_singular_values(-1.0)
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0"):
        clip_singular_values(1.0, steps=0)
    with pytest.raises(ValueError, match=r"unit_axes must be axes of the leaf, got 3"):
        clipped(np.ones((2, 2)), 1.0, unit_axes=3)
