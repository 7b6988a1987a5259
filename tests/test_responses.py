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


def factors(response, norms, bounds):
    """One a pair, in float32."""
    return np.asarray(jax.jit(response.factor)(np.float32(norms), np.float32(bounds)))


@every
def test_factor_is_the_formula(name):
    response, formula = FORMULAS[name]
    norms, bounds = np.meshgrid(np.float32([n for n in NORMS if n > 0]), np.float32(BOUNDS))
    found = factors(response, norms, bounds)
    expected = np.vectorize(formula)(norms.astype(float), bounds.astype(float))
    assert found.dtype == np.float32
    in_range = (expected > 1.2e-38) & (expected < 3.4e38)
    np.testing.assert_allclose(found[in_range], expected[in_range], rtol=3e-6)


@every
def test_factor_and_slope_are_finite(name):
    response, _ = FORMULAS[name]
    norms, bounds = map(np.ravel, np.meshgrid(np.float32(NORMS), np.float32([0, *BOUNDS, np.inf])))
    if "normalize" in name:  # c / n is out of range by definition
        defined = (bounds < np.inf) & ((norms == 0) | (norms >= 1e-20))
        norms, bounds = norms[defined], bounds[defined]
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(response.factor)))(norms, bounds)
    value, slope = np.asarray(value), np.asarray(slope)
    wrong = ~np.isfinite(value) | ~np.isfinite(slope) | (value < 0)
    assert not wrong.any(), np.stack([norms, bounds, value, slope], axis=1)[wrong]


@every
def test_a_bound_of_zero_removes_the_gradient(name):
    assert factors(FORMULAS[name][0], 3.0, 0.0) == 0


@pytest.mark.parametrize("name", [name for name in FORMULAS if "normalize" not in name])
def test_an_infinite_bound_changes_nothing(name):
    assert factors(FORMULAS[name][0], 3.0, np.inf) == 1


@every
def test_nan_stays(name):
    assert np.isnan(factors(FORMULAS[name][0], [np.nan, 1.0], [1.0, np.nan])).all()


@every
def test_result_never_passes_the_bound(name):
    norms, bounds = np.meshgrid(np.float32(np.logspace(-6, 30, 400)), np.float32(BOUNDS))
    found = factors(FORMULAS[name][0], norms, bounds).astype(float)
    assert (norms.astype(float) * found <= bounds.astype(float) * (1 + 1e-6)).all()


@pytest.mark.parametrize("response", [Rescale(), Drop()], ids=["rescale", "drop"])
def test_inside_the_bound_the_factor_is_exactly_one(response):
    assert factors(response, [0.1, 0.0], [0.1, 1e-3]).tolist() == [1.0, 1.0]
    assert response.factor(jnp.float32(0.1), jnp.float32(0.1)) == 1.0  # outside jit too


def test_torch_parity():
    """`clip_grad_norm_`: `clip_coef = max_norm / (total_norm + 1e-6)`, clamped to 1."""
    assert factors(Rescale(1e-6), 1e-6, 1.5e-6) == pytest.approx(0.75)
    assert factors(Rescale(), 1e-6, 1.5e-6) == 1.0


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
