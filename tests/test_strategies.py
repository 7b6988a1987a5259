import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.oracles import assert_close, f64, unit_norms
from tools.oracles import norm as exact

import optaxclip

INF = float("inf")

# --- the same numbers as Optax 0.2.8 ---

SHAPES = [(), (3,), (1, 4), (2, 3), (3, 2, 2), (2, 2, 1, 3)]


@st.composite
def trees(draw):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    leaves = [jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for s in shapes]
    return {"layer": leaves[:1], "rest": leaves[1:]}


thresholds = st.floats(2.0**-10, 2.0**10, width=32)
PAIRS = {
    "clip": (optaxclip.clip_by_value, optax.clip),
    "clip_by_global_norm": (optaxclip.clip_by_global_norm, optax.clip_by_global_norm),
    "clip_by_block_rms": (optaxclip.clip_by_leaf_rms, optax.clip_by_block_rms),
    "adaptive_grad_clip": (optaxclip.agc, optax.adaptive_grad_clip),
}


@pytest.mark.parametrize("name", PAIRS)
@hypothesis.given(grads=trees(), threshold=thresholds, seed=st.integers(0, 99))
def test_equal_to_optax(name, grads, threshold, seed):
    ours, theirs = PAIRS[name]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda g: jnp.asarray(rng.standard_normal(g.shape), jnp.float32), grads)
    results = []
    for tx in (ours(threshold), theirs(threshold)):
        results.append(tx.update(grads, tx.init(params), params)[0])
    assert_close(*results, rtol=1e-6)


# --- the formulas, in double precision ---


@pytest.fixture(scope="module")
def grads():
    rng = np.random.default_rng(5)
    shapes = {"bias": (4,), "conv": (2, 2, 3, 4), "dense": (5, 4), "scale": ()}
    return {k: jnp.asarray(3 * rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def params(grads):
    rng = np.random.default_rng(6)
    return {k: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for k, x in grads.items()}


def run(tx, grads, params=None):
    return jax.jit(tx.update)(grads, tx.init(grads), params)[0]


def scaled(tree, factors):
    return {k: f64(x) * factors[k] for k, x in tree.items()}


@pytest.mark.parametrize("c", [0.5, 1e3])
@pytest.mark.parametrize("ord", [1, 2, 3, INF, "rms"])
def test_global(grads, ord, c):
    updates = run(optaxclip.clip_by_global_norm(c, ord=ord), grads)
    factor = min(1, c / exact(grads.values(), ord))
    assert_close(updates, scaled(grads, dict.fromkeys(grads, factor)))


@pytest.mark.parametrize("ord", [1, 2, 3, INF, "rms"])
def test_leaf(grads, ord):
    updates = run(optaxclip.clip_by_leaf_norm(4.0, ord=ord), grads)
    assert_close(updates, scaled(grads, {k: min(1, 4 / exact([x], ord)) for k, x in grads.items()}))


def test_leaf_rms(grads):
    updates = run(optaxclip.clip_by_leaf_rms(2.5), grads)
    rms = {k: np.sqrt(np.mean(f64(x) ** 2)) for k, x in grads.items()}
    assert_close(updates, {k: f64(x) / max(1, rms[k] / 2.5) for k, x in grads.items()})


UNITS = {"bias": (0,), "conv": (0, 1, 2), "dense": (0,), "scale": ()}


def per_unit(factors):
    """One factor a unit, of a shape that broadcasts against a leaf with units last."""
    return factors if len(factors) > 1 else factors[0]


def test_unit(grads):
    updates = run(optaxclip.clip_by_unit_norm(6.0), grads)
    factors = {k: np.minimum(1, 6 / unit_norms(x, UNITS[k])) for k, x in grads.items()}
    assert_close(updates, scaled(grads, {k: per_unit(f) for k, f in factors.items()}))


def test_unit_axes_by_path(grads):
    def axes(path, x):
        return (1,) if path == "dense" else tuple(range(x.ndim))

    updates = run(optaxclip.clip_by_unit_norm(6.0, unit_axes=axes), grads)
    factors = {k: min(1, 6 / exact([x])) for k, x in grads.items()}
    factors["dense"] = np.minimum(1, 6 / unit_norms(grads["dense"], (1,)))[:, None]
    assert_close(updates, scaled(grads, factors))


def test_group(grads):
    labels = {"bias": "small", "conv": "large", "dense": "large", "scale": "small"}
    updates = run(optaxclip.clip_by_group_norm({"small": 1.0, "large": 2.0}, labels), grads)
    small, large = (1.0, ["bias", "scale"]), (2.0, ["conv", "dense"])
    factors = {k: min(1, c / exact([grads[m] for m in ks])) for c, ks in (small, large) for k in ks}
    assert_close(updates, scaled(grads, factors))


def test_agc(grads, params):
    updates = run(
        optaxclip.agc(0.9, eps=0.8, exclude=lambda path, x: path == "conv"), grads, params
    )
    expected = {}
    for k, g in grads.items():
        limit = 0.9 * np.maximum(unit_norms(params[k], UNITS[k]), 0.8)
        factor = np.minimum(1, limit / unit_norms(g, UNITS[k]))
        expected[k] = f64(g) * per_unit(factor)
    expected["conv"] = f64(grads["conv"])
    assert_close(updates, expected)


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("ord", [1, 2, INF])
def test_normalize(grads, ord, eps):
    updates = run(optaxclip.normalize(2.0, ord=ord, eps=eps), grads)
    assert_close(
        updates, scaled(grads, dict.fromkeys(grads, 2 / (exact(grads.values(), ord) + eps)))
    )


SOFT = {
    "rational": lambda n: 1 / (1 + n),
    "sqrt": lambda n: 1 / np.sqrt(1 + n**2),
    "tanh": lambda n: np.tanh(n) / n,
}


@pytest.mark.parametrize("shape", SOFT)
@pytest.mark.parametrize("c", [1e-3, 1.0, 20.0, 1e6])
def test_soft(grads, shape, c):
    updates = run(optaxclip.soft_clip(c, shape=shape), grads)
    factor = SOFT[shape](exact(grads.values()) / c)
    assert_close(updates, scaled(grads, dict.fromkeys(grads, factor)), rtol=2e-6)
    updates = run(optaxclip.soft_clip(c, shape=shape, elementwise=True), grads)
    factors = {k: SOFT[shape](np.abs(f64(x)) / c) for k, x in grads.items()}
    assert_close(updates, scaled(grads, factors), rtol=2e-6)


def test_elementwise_tanh_is_c_tanh():
    g = jnp.linspace(-5, 5, 11)
    updates = run(optaxclip.soft_clip(2.0, shape="tanh", elementwise=True), [g])
    np.testing.assert_allclose(updates[0], 2 * np.tanh(np.asarray(g, np.float64) / 2), rtol=2e-6)


def test_value_clips_the_modulus_of_complex_numbers():
    z = jnp.array([3 + 4j, 0.3 + 0.4j, 0.0])
    updates = run(optaxclip.clip_by_value(1.0), [z])
    np.testing.assert_allclose(updates[0], [0.6 + 0.8j, 0.3 + 0.4j, 0.0], rtol=1e-6)


def test_eps_is_that_of_torch(grads):
    """`max_norm / (total_norm + 1e-6)`, which shortens a gradient already at the bound."""
    g = [jnp.array([3e-6, 4e-6])]
    updates = run(optaxclip.clip_by_global_norm(5e-6, eps=1e-6), g)
    np.testing.assert_allclose(updates[0], np.array([3e-6, 4e-6]) * 5 / 6, rtol=1e-6)
    for make in (
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_leaf_rms,
        optaxclip.clip_by_unit_norm,
    ):
        plain, padded = run(make(1.0), grads), run(make(1.0, eps=1.0), grads)
        assert exact(padded.values()) < 0.9 * exact(plain.values())


def test_adam_does_not_see_the_length_of_its_gradients_but_clipping_does_bound_sgd(grads):
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.5))
    assert exact(run(tx, grads).values()) == pytest.approx(0.5, rel=1e-6)


# --- slopes ---


@pytest.mark.parametrize(
    "tx",
    {
        "global": optaxclip.clip_by_global_norm(1.0),
        "l3": optaxclip.clip_by_global_norm(1.0, ord=3),
        "rms": optaxclip.clip_by_leaf_rms(0.5),
        "unit": optaxclip.clip_by_unit_norm(1.0),
        "normalize": optaxclip.normalize(1.0),
        "rational": optaxclip.soft_clip(1.0),
        "sqrt": optaxclip.soft_clip(1.0, shape="sqrt"),
        "tanh": optaxclip.soft_clip(1.0, shape="tanh"),
        "tanh-elements": optaxclip.soft_clip(1.0, shape="tanh", elementwise=True),
    }.items(),
    ids=lambda item: item[0],
)
def test_derivative_is_that_of_finite_differences(tx):
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        x, v, w = (jnp.asarray(rng.standard_normal((3, 2))) for _ in range(3))
        state = tx[1].init([x])
        f = jax.jit(lambda x: jnp.sum(w * tx[1].update([x], state)[0][0]))
        h = 1e-6
        slope = (f(x + h * v) - f(x - h * v)) / (2 * h)
        assert float(jnp.sum(jax.grad(f)(x) * v)) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("shape", ["rational", "sqrt", "tanh"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_slope_of_soft_clip_with_a_bound_of_zero(shape, elementwise):
    def f(x):
        tx = optaxclip.soft_clip(0.0, shape=shape, elementwise=elementwise)
        return jnp.sum(tx.update(x, tx.init(x))[0])

    assert jnp.isfinite(jax.grad(f)(jnp.array([0.0, 3.0]))).all()


# --- mistakes ---


def test_unknown_arguments():
    for make in (
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_unit_norm,
        optaxclip.normalize,
        lambda c, ord: optaxclip.clip_by_group_norm(c, "all", ord=ord),
    ):
        with pytest.raises(ValueError, match=r"unknown ord, got 'l2'\. Use 1, 2"):
            make(1.0, ord="l2")
    with pytest.raises(ValueError, match=r"unknown shape, got 'cubic'\. Use one of \('rational'"):
        optaxclip.soft_clip(1.0, shape="cubic")


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (optaxclip.clip_by_global_norm, {"ord": 3}),
        (optaxclip.clip_by_leaf_norm, {"ord": INF}),
        (optaxclip.clip_by_unit_norm, {"unit_axes": 0}),
    ],
    ids=["ord", "ord inf", "unit_axes"],
)
def test_inject_hyperparams_must_leave_static_what_is_static(factory, arguments):
    (name,) = arguments
    tree = {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
    traced = optax.inject_hyperparams(factory)(1.0, **arguments)
    with pytest.raises(TypeError, match=rf"{name} must be static.*static_args=\('{name}',\)"):
        traced.update(tree, traced.init(tree))
    static = optax.inject_hyperparams(factory, static_args=name)(1.0, **arguments)
    assert_close(static.update(tree, static.init(tree))[0], run(factory(1.0, **arguments), tree))


def test_only_the_threshold_is_positional():
    for make in (
        optaxclip.clip_by_value,
        optaxclip.clip_by_global_norm,
        optaxclip.clip_by_leaf_norm,
        optaxclip.clip_by_leaf_rms,
        optaxclip.clip_by_unit_norm,
        optaxclip.agc,
        optaxclip.normalize,
        optaxclip.soft_clip,
    ):
        with pytest.raises(TypeError, match="positional"):
            make(1.0, 2)
