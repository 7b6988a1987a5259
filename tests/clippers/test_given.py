import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick
from tools.oracles import assert_close, assert_same_bits, f64, unit_norms
from tools.oracles import norm as exact
from tools.quick import quick_jit
from tools.steps import first_steps

import optaxclip
from optaxclip.thresholds import ParamElements

INF = float("inf")

# --- the same numbers as Optax 0.2.8 ---

# Shapes are few, so that each pair is compiled once for each; what is drawn are numbers.
SHAPES = [[()], [(3,), (1, 4)], [(2, 3), (), (3, 2, 2), (2, 2, 1, 3)]]
PAIRS = {
    "clip": (optaxclip.clip_by_value, optax.clip),
    "clip_by_global_norm": (optaxclip.clip_by_global_norm, optax.clip_by_global_norm),
    "clip_by_block_rms": (optaxclip.clip_by_leaf_rms, optax.clip_by_block_rms),
    "adaptive_grad_clip": (optaxclip.agc, optax.adaptive_grad_clip),
}


@st.composite
def trees(draw):
    shapes = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scales = [10.0 ** draw(st.integers(-3, 3)), 1.0]
    return tuple(
        [np.float32(scale * rng.standard_normal(shape)) for shape in shapes] for scale in scales
    )


@pytest.fixture(scope="module")
def pairs():
    """By name, what we and Optax make of gradients, parameters and a bound."""

    def both(ours, theirs, grads, params, bound):
        txs = ours(bound), theirs(bound)
        return [tx.update(grads, tx.init(params), params)[0] for tx in txs]

    return {name: quick_jit(functools.partial(both, *pair)) for name, pair in PAIRS.items()}


@pytest.mark.parametrize("name", PAIRS)
@hypothesis.given(tree=trees(), threshold=st.floats(2.0**-10, 2.0**10, width=32))
def test_equal_to_optax(pairs, name, tree, threshold):
    assert_close(*pairs[name](*tree, np.float32(threshold)), rtol=1e-6)


# --- the formulas, in double precision ---


@pytest.fixture(scope="module")
def grads():
    rng = np.random.default_rng(5)
    shapes = {"bias": (4,), "conv": (2, 2, 3, 4), "dense": (5, 4), "scale": ()}
    return {k: np.float32(3 * rng.standard_normal(s)) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def params(grads):
    rng = np.random.default_rng(6)
    return {k: np.float32(rng.standard_normal(x.shape)) for k, x in grads.items()}


def run(tx, grads, params=None):
    return first_steps(tx, grads, params)[0]


def by_bound(make, grads, bounds):
    """The updates for each bound, `[bounds, ...]`."""
    return quick.run(jax.vmap(lambda c: make(c).update(grads, make(c).init(grads))[0]), bounds)


def scaled(tree, factors):
    return {k: f64(x) * factors[k] for k, x in tree.items()}


ORDS = [1, 2, 3, INF, "rms"]


@pytest.fixture(scope="module")
def of_each_ord(grads):
    """By ord, the updates for two bounds of the whole, and for one of each leaf."""

    def both(bounds):
        found = {}
        for ord in ORDS:
            make = functools.partial(optaxclip.clip_by_global_norm, ord=ord)
            leaf = optaxclip.clip_by_leaf_norm(4.0, ord=ord)
            found[str(ord)] = (
                jax.vmap(lambda c, make=make: make(c).update(grads, make(c).init(grads))[0])(
                    bounds
                ),
                leaf.update(grads, leaf.init(grads))[0],
            )
        return found

    return quick.run(both, np.float32([0.5, 1e3]))


@pytest.mark.parametrize("ord", ORDS)
def test_global(grads, ord, of_each_ord):
    updates, _ = of_each_ord[str(ord)]
    for i, c in enumerate([0.5, 1e3]):
        factor = min(1, c / exact(grads.values(), ord))
        expected = scaled(grads, dict.fromkeys(grads, factor))
        assert_close({k: x[i] for k, x in updates.items()}, expected)


@pytest.mark.parametrize("ord", ORDS)
def test_leaf(grads, ord, of_each_ord):
    _, updates = of_each_ord[str(ord)]
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


def shrunk(update, param, relative=0.1, absolute=1e-7):
    """The rule of Clippy, of one leaf."""
    u, limit = f64(update), relative * np.abs(f64(param)) + absolute
    scales = [c / np.abs(x) for x, c in np.broadcast(u, limit) if x != 0]
    return u * min([1.0, *scales])


def test_clippy_with_the_defaults_of_keras_and_those_of_the_paper(grads, params):
    """Steps of which one leaf is far beyond its bounds, another within, and one has a zero."""
    updates = {k: 0.02 * x for k, x in grads.items()} | {"scale": np.float32(1e-9)}
    updates["dense"] = np.float32(1e-3) * params["dense"]
    params = {**params, "conv": params["conv"].copy()}
    params["conv"][0, 0, 0, 0] = 0.0
    txs = [optaxclip.clippy(), optaxclip.clippy(0.5, absolute=1e-2)]
    (ours, state), (papers, _) = first_steps(txs, updates, params)
    assert_close(ours, {k: shrunk(x, params[k]) for k, x in updates.items()})
    assert_close(papers, {k: shrunk(x, params[k], 0.5, 1e-2) for k, x in updates.items()})
    assert_same_bits(
        {k: ours[k] for k in ("dense", "scale")}, {k: updates[k] for k in ("dense", "scale")}
    )
    assert exact([ours["conv"]]) < 1e-5 * exact([updates["conv"]])
    stats = optaxclip.clip_stats(state)["clippy"]
    largest = np.max(np.abs(f64(updates["conv"])) / (0.1 * np.abs(f64(params["conv"])) + 1e-7))
    assert stats.pre_clip_norm == pytest.approx(largest, rel=1e-6)
    assert stats.threshold == 1


def test_clippy_behind_adagrad_is_the_published_optimizer(grads, params):
    """That of keras-rs with `use_standard_accumulator_update=True`, on three steps."""
    steps = [{k: jnp.asarray((i + 1) * x) for k, x in grads.items()} for i in range(3)]
    tx = optax.chain(optax.adagrad(0.05, eps=1e-7), optaxclip.clippy())

    def run(params):
        state = tx.init(params)
        for g in steps:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found = quick.run(run, params)
    for k, w in params.items():
        w, total = f64(w), 0.1
        for g in steps:
            total = total + f64(g[k]) ** 2
            w = w - shrunk(0.05 * f64(g[k]) / np.sqrt(total + 1e-7), w)
        np.testing.assert_allclose(found[k], w, rtol=1e-6)


def test_clippy_where_a_bound_is_zero_or_an_element_is_no_number():
    w = {"a": np.float32([0, 1]), "b": np.float32([0, 1]), "c": np.float32([np.nan, 1])}
    u = {"a": np.float32([0, 0.05]), "b": np.float32([1e30, 0.05]), "c": np.float32([1, 1])}
    updates, state = first_steps(optaxclip.clippy(absolute=0.0), u, w)
    np.testing.assert_array_equal(updates["a"], u["a"])
    np.testing.assert_array_equal(updates["b"], [0, 0])
    assert np.isnan(updates["c"]).all()
    finite = {k: w[k] for k in "ab"}, {k: u[k] for k in "ab"}
    _, state = first_steps(optaxclip.clippy(absolute=0.0), finite[1], finite[0])
    assert optaxclip.clip_stats(state)["clippy"].nonfinite_count == 0
    zeroed, _ = first_steps(
        optaxclip.clippy(nonfinite="zero"), {"a": np.float32([np.inf, 1])}, {"a": w["a"]}
    )
    np.testing.assert_array_equal(zeroed["a"], [0, 0])


@pytest.mark.parametrize("by", ["global", "leaf", "unit"])
@pytest.mark.parametrize("ord", [1, 2, 3, INF, "rms"])
def test_a_norm_in_units_of_bounds_of_elements(grads, params, by, ord):
    """Any norm goes with bounds of elements: that of `g_i / c_i` is then at most 1."""
    norm = optaxclip.Norm(by, ord)
    updates = run(optaxclip.clip_by(norm, ParamElements(0.3, 0.1)), grads, params)
    ratios = {k: f64(g) / (0.3 * np.abs(f64(params[k])) + 0.1) for k, g in grads.items()}
    if by == "global":
        factors = dict.fromkeys(grads, min(1, 1 / exact(ratios.values(), ord)))
    elif by == "leaf":
        factors = {k: min(1, 1 / exact([x], ord)) for k, x in ratios.items()}
    else:
        of_unit = {k: np.minimum(1, 1 / unit_norms(x, UNITS[k], ord)) for k, x in ratios.items()}
        factors = {k: per_unit(f) for k, f in of_unit.items()}
    assert_close(updates, scaled(grads, factors), rtol=2e-6)


def test_normalize(grads):
    cases = [(ord, eps) for ord in (1, 2, INF) for eps in (0.0, 0.5)]
    txs = [optaxclip.normalize(2.0, ord=ord, eps=eps) for ord, eps in cases]
    for (ord, eps), (updates, _) in zip(cases, first_steps(txs, grads), strict=True):
        factor = 2 / (exact(grads.values(), ord) + eps)
        assert_close(updates, scaled(grads, dict.fromkeys(grads, factor)))


SOFT = {
    "rational": lambda n: 1 / (1 + n),
    "sqrt": lambda n: 1 / np.sqrt(1 + n**2),
    "tanh": lambda n: np.tanh(n) / n,
}


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("shape", SOFT)
def test_soft(grads, shape, elementwise):
    bounds = np.float32([1e-3, 1.0, 20.0, 1e6])
    make = functools.partial(optaxclip.soft_clip, shape=shape, elementwise=elementwise)
    found = by_bound(make, grads, bounds)
    for i, c in enumerate(f64(bounds)):
        if elementwise:
            factors = {k: SOFT[shape](np.abs(f64(x)) / c) for k, x in grads.items()}
        else:
            factors = dict.fromkeys(grads, SOFT[shape](exact(grads.values()) / c))
        assert_close({k: x[i] for k, x in found.items()}, scaled(grads, factors), rtol=2e-6)


def test_elementwise_tanh_is_c_tanh():
    g = np.linspace(-5, 5, 11, dtype=np.float32)
    updates = run(optaxclip.soft_clip(2.0, shape="tanh", elementwise=True), [g])
    np.testing.assert_allclose(updates[0], 2 * np.tanh(f64(g) / 2), rtol=2e-6)


def test_value_clips_the_modulus_of_complex_numbers():
    z = np.complex64([3 + 4j, 0.3 + 0.4j, 0.0])
    updates = run(optaxclip.clip_by_value(1.0), [z])
    np.testing.assert_allclose(updates[0], [0.6 + 0.8j, 0.3 + 0.4j, 0.0], rtol=1e-6)


def test_eps_is_that_of_torch(grads):
    """`max_norm / (total_norm + 1e-6)`, which shortens a gradient already at the bound."""
    g = [np.float32([3e-6, 4e-6])]
    updates = run(optaxclip.clip_by_global_norm(5e-6, eps=1e-6), g)
    np.testing.assert_allclose(updates[0], np.array([3e-6, 4e-6]) * 5 / 6, rtol=1e-6)
    factories = {
        "leaf norm": optaxclip.clip_by_leaf_norm,
        "leaf rms": optaxclip.clip_by_leaf_rms,
        "unit norm": optaxclip.clip_by_unit_norm,
    }
    found = first_steps({k: [f(1.0), f(1.0, eps=1.0)] for k, f in factories.items()}, grads)
    for name, ((plain, _), (padded, _)) in found.items():
        assert exact(padded.values()) < 0.9 * exact(plain.values()), name


def test_adam_does_not_see_the_length_of_its_gradients_but_clipping_does_bound_sgd(grads):
    tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.5))
    assert exact(run(tx, grads).values()) == pytest.approx(0.5, rel=1e-6)


# --- slopes ---


SLOPES = {
    "global": optaxclip.clip_by_global_norm(1.0),
    "l3": optaxclip.clip_by_global_norm(1.0, ord=3),
    "rms": optaxclip.clip_by_leaf_rms(0.5),
    "unit": optaxclip.clip_by_unit_norm(1.0),
    "normalize": optaxclip.normalize(1.0),
    "rational": optaxclip.soft_clip(1.0),
    "sqrt": optaxclip.soft_clip(1.0, shape="sqrt"),
    "tanh": optaxclip.soft_clip(1.0, shape="tanh"),
    "tanh-elements": optaxclip.soft_clip(1.0, shape="tanh", elementwise=True),
}


@pytest.fixture(scope="module")
def slopes():
    """By name, the derivative in a direction and that of finite differences."""
    rng = np.random.default_rng(7)
    x, v, w = rng.standard_normal((3, 3, 2))
    h = 1e-6

    def run(x, v):
        found = {}
        for name, tx in SLOPES.items():
            f = lambda x, tx=tx: jnp.sum(w * tx.update([x], tx.init([x]))[0][0])
            ahead, behind = jax.vmap(f)(jnp.stack([x + h * v, x - h * v]))
            found[name] = jnp.sum(jax.grad(f)(x) * v), (ahead - behind) / (2 * h)
        return found

    with jax.enable_x64(True):
        return quick.run(run, x, v)


@pytest.mark.parametrize("name", SLOPES)
def test_derivative_is_that_of_finite_differences(name, slopes):
    slope, difference = slopes[name]
    assert slope.dtype == np.float64
    assert slope == pytest.approx(difference, rel=1e-6)


def test_slope_of_soft_clip_with_a_bound_of_zero():
    cases = [(shape, elementwise) for shape in SOFT for elementwise in (True, False)]

    def run(x):
        def f(x, shape, elementwise):
            tx = optaxclip.soft_clip(0.0, shape=shape, elementwise=elementwise)
            return jnp.sum(tx.update(x, tx.init(x))[0])

        return {case: jax.grad(f)(x, *case) for case in cases}

    for case, slope in quick.run(run, np.float32([0.0, 3.0])).items():
        assert np.isfinite(slope).all(), case


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
    tree = {"w": np.float32([[3, 0], [4, 1]])}
    traced = optax.inject_hyperparams(factory)(1.0, **arguments)
    with pytest.raises(TypeError, match=rf"{name} must be static.*static_args=\('{name}',\)"):
        traced.update(tree, traced.init(tree))
    static = optax.inject_hyperparams(factory, static_args=name)(1.0, **arguments)
    assert_close(run(static, tree), run(factory(1.0, **arguments), tree))


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
