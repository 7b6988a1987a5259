import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip.responses import AlmostNormalize, Drop, Normalize, Rescale, Soften, as_response

NORMS = [0.0, 1e-30, 1e-6, 0.3, 1.0, 1.0000001, 7.0, 1e6, 1e30]
BOUNDS = [1e-3, 1.0, 50.0]
FORMULAS = {
    "rescale": (Rescale(), lambda n, c: min(1.0, c / n)),
    "rescale-eps": (Rescale(1e-6), lambda n, c: min(1.0, c / (n + 1e-6))),
    "rational": (Soften("rational"), lambda n, c: 1 / (1 + n / c)),
    "sqrt": (Soften("sqrt"), lambda n, c: 1 / np.hypot(1, n / c)),
    "tanh": (Soften("tanh"), lambda n, c: np.tanh(n / c) / (n / c)),
    "normalize": (Normalize(), lambda n, c: c / n),
    "normalize-psac": (AlmostNormalize(0.1), lambda n, c: c / (n + 0.1 / (n + 0.1))),
    "normalize-eps": (Normalize(1e-3), lambda n, c: c / (n + 1e-3)),
    "drop": (Drop(), lambda n, c: float(n <= c)),
}
every = pytest.mark.parametrize("name", FORMULAS)


@every
@pytest.mark.parametrize("bound", BOUNDS)
def test_factor_is_the_formula(name, bound):
    response, formula = FORMULAS[name]
    norms = np.float32([n for n in NORMS if n > 0])
    factors = response.factor(jnp.asarray(norms), jnp.float32(bound))
    expected = np.array([formula(float(n), float(np.float32(bound))) for n in norms])
    assert factors.dtype == jnp.float32
    in_range = (expected > 1.2e-38) & (expected < 3.4e38)
    np.testing.assert_allclose(factors[in_range], expected[in_range], rtol=3e-6)


@every
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bound", [0.0, *BOUNDS, np.inf])
def test_factor_and_slope_are_finite(name, norm, bound):
    response, _ = FORMULAS[name]
    if "normalize" in name and (bound == np.inf or 0 < norm < 1e-20):
        pytest.skip("c / n is out of range by definition")
    value, slope = jax.value_and_grad(response.factor)(jnp.float32(norm), jnp.float32(bound))
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert value >= 0


@every
def test_a_bound_of_zero_removes_the_gradient(name):
    response, _ = FORMULAS[name]
    assert response.factor(jnp.float32(3.0), jnp.float32(0.0)) == 0


@every
def test_an_infinite_bound_changes_nothing(name):
    response, _ = FORMULAS[name]
    if "normalize" in name:
        pytest.skip("has no meaning")
    assert response.factor(jnp.float32(3.0), jnp.float32(np.inf)) == 1


@every
def test_nan_stays(name):
    response, _ = FORMULAS[name]
    one, nan = jnp.float32(1), jnp.float32(np.nan)
    assert np.isnan(response.factor(nan, one))
    assert np.isnan(response.factor(one, nan))


@every
def test_result_never_passes_the_bound(name):
    response, _ = FORMULAS[name]
    norms = np.float32(np.logspace(-6, 30, 400))
    for bound in np.float32(BOUNDS):
        factors = np.asarray(response.factor(jnp.asarray(norms), bound), np.float64)
        assert (norms.astype(np.float64) * factors <= float(bound) * (1 + 1e-6)).all()


def test_inside_the_bound_the_factor_is_exactly_one():
    for response in (Rescale(), Drop()):
        assert response.factor(jnp.float32(0.1), jnp.float32(0.1)) == 1.0
        assert response.factor(jnp.float32(0.0), jnp.float32(1e-3)) == 1.0


def test_torch_parity():
    """`clip_grad_norm_`: `clip_coef = max_norm / (total_norm + 1e-6)`, clamped to 1."""
    norm, bound = np.float32(1e-6), np.float32(1.5e-6)
    assert Rescale(1e-6).factor(jnp.asarray(norm), jnp.asarray(bound)) == pytest.approx(0.75)
    assert Rescale().factor(jnp.asarray(norm), jnp.asarray(bound)) == 1.0


@pytest.mark.parametrize("value", ["clip", "", None, 3, lambda n, c: n])
def test_unknown_response(value):
    with pytest.raises(ValueError, match=r"unknown response, got .*Use one of .*'rescale'"):
        as_response(value)


def test_a_class_instead_of_an_object():
    with pytest.raises((ValueError, TypeError), match=r"response"):
        as_response(Drop)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown shape, got 'cubic'\. Use one of \('rational'"):
        Soften("cubic")
    for response in (Rescale, Normalize):
        with pytest.raises(ValueError, match=r"eps must be >= 0, got -1"):
            response(-1.0)
        with pytest.raises(ValueError, match=r"eps must be >= 0, got nan"):
            response(float("nan"))
        with pytest.raises(TypeError, match=r"eps must be a number"):
            response("small")
        with pytest.raises(TypeError, match=r"eps must be a number"):
            response(lambda count: 1e-6)  # eps is no schedule


def test_named_responses_and_custom_ones():
    class Half:
        def factor(self, norm, bound):
            return jnp.full_like(norm, 0.5)

    half = Half()
    assert as_response(half) is half
    assert as_response("sqrt") == Soften("sqrt")
