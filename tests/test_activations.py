"""`clip_backward`: what comes back is clipped, wherever the identity stands in a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools import quick
from tools.agreement import assert_equals_oracle, close, normal, stacked_grads
from tools.oracles import assert_same_bits, f64
from tools.oracles import norm as exact
from tools.quick import quick_jit

import optaxclip
from optaxclip import clip_backward
from optaxclip.per_example import explain, reweighted_grad
from optaxclip.thresholds import LargestBut, Learned, Passed

INF = float("inf")
G = np.float32(np.random.default_rng(0).standard_normal((2, 3, 4)))


def pulled(x, gradient, *args, **options):
    """What comes back for a gradient."""
    value, pull = jax.vjp(lambda x: clip_backward(x, *args, **options), x)
    return value, pull(gradient)[0]


def clipped(g, bound, axes, ord=2, factor=lambda n, c: np.minimum(1, c / n)):
    """Part by part, in double precision."""
    g = f64(g)
    rest = [d for d in range(g.ndim) if d not in [a % g.ndim for a in axes]]
    out = g.copy()
    for index in np.ndindex(*[g.shape[d] for d in rest]):
        part = tuple(index[rest.index(d)] if d in rest else slice(None) for d in range(g.ndim))
        out[part] = g[part] * factor(exact([g[part]], ord), bound)
    return out


# --- the formula ---

CASES = [
    (None, {}), ((), {}), (-1, {}), ((1, 2), {"ord": 1}), (0, {"ord": INF}), ((0, -1), {"ord": 3}),
    (-1, {"ord": "rms"}), (-1, {"response": "drop"}), (-1, {"response": "normalize"}),
    ((0, 1, 2), {"response": "sqrt"}),
]  # fmt: skip
FACTORS = {
    "rescale": lambda n, c: np.minimum(1, c / n),
    "drop": lambda n, c: float(n <= c),
    "normalize": lambda n, c: c / n,
    "sqrt": lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2),
}


def bound(options):
    return 0.7 if options.get("ord") == "rms" else 1.5


@pytest.fixture(scope="module")
def found():
    run = lambda x, g: [pulled(x, g, bound(o), axes=axes, **o) for axes, o in CASES]
    return quick.run(run, G + 1, G)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{a}-{o}" for a, o in CASES])
def test_the_formula(case, found):
    axes, options = CASES[case]
    value, gradient = found[case]
    assert_same_bits(value, G + 1)
    spanned = (0, 1, 2) if axes is None else axes if isinstance(axes, tuple) else (axes,)
    factor = FACTORS[options.get("response", "rescale")]
    expected = clipped(G, bound(options), spanned, options.get("ord", 2), factor)
    assert np.any(np.abs(expected - G) > 1e-3), "a bound that binds nowhere shows nothing"
    np.testing.assert_allclose(gradient, expected, rtol=2e-6)


def test_the_largest_tokens_are_dropped_as_in_axlearn():
    _, gradient = quick.run(
        lambda x: pulled(x, G, LargestBut(2), axes=-1, response="drop"), np.zeros_like(G)
    )
    norms = np.linalg.norm(f64(G), axis=-1)
    kept = norms < np.sort(norms.ravel())[-2]  # of what axlearn calls threshold, the k-th largest
    assert kept.sum() == 4
    np.testing.assert_array_equal(gradient, np.where(kept[..., None], G, 0))


def test_a_tree_is_one_vector_and_other_leaves_pass():
    state = {"h": G[0], "c": G[1].astype(jnp.bfloat16), "step": np.int32(3), "none": None}

    def loss(state):
        held = clip_backward(state, 0.5)
        assert held["c"].dtype == jnp.bfloat16
        return jnp.sum(held["h"] * 3) + jnp.sum(held["c"].astype(jnp.float32)) + held["step"]

    gradient = jax.jit(jax.grad(loss, allow_int=True))(state)
    factor = 0.5 / np.sqrt(12 * 9 + 12)
    np.testing.assert_allclose(gradient["h"], 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(f64(gradient["c"]), factor, rtol=2**-8)
    assert gradient["c"].dtype == jnp.bfloat16
    assert gradient["step"].dtype == jax.dtypes.float0


def test_bounds_may_be_traced_and_infinity_never_clips():
    run = lambda c: pulled(G, G, c)[1]
    bounded, none, unbounded = quick.run(jax.vmap(run), np.float32([1.0, 0.0, np.inf]))
    assert exact([bounded]) == pytest.approx(1, rel=1e-6)
    np.testing.assert_array_equal(none, 0)
    assert_same_bits(unbounded, G)
    slope = jax.grad(lambda c: jnp.sum(clip_backward(jnp.asarray(G), c)))(jnp.float32(1))
    assert slope == 0


def test_zero_and_what_is_no_number():
    run = lambda g: pulled(g, g, 1.0, axes=-1)[1]
    g = np.float32([[0, 0], [np.nan, 1], [np.inf, 1], [3, 4]])
    found = quick.run(run, g)
    np.testing.assert_array_equal(found[0], 0)
    assert np.isnan(found[1]).all()
    assert np.isnan(found[2, 0])
    np.testing.assert_allclose(found[3], [0.6, 0.8], rtol=1e-6)


def test_second_derivatives_are_those_of_the_clipped_gradient():
    loss = lambda x: jnp.sum(clip_backward(x, 0.7) ** 3)
    by_hand = lambda x: 3 * x**2 * jnp.minimum(1, 0.7 / jnp.linalg.norm(3 * x**2))
    with jax.enable_x64(True):
        x = np.array([0.3, 0.5, -0.4])
        first, second = quick.run(lambda x: (jax.grad(loss)(x), jax.jacrev(jax.grad(loss))(x)), x)
        np.testing.assert_allclose(first, by_hand(x), rtol=1e-12)
        np.testing.assert_allclose(second, jax.jacfwd(by_hand)(x), rtol=1e-10, atol=1e-14)


# --- in programs ---

W, H, XS = normal(1, 3, 3) * 1.5, normal(2, 3), normal(3, 6, 3)


def by_hand(w, h, xs, bound):
    """Back-propagation through time of `sum h_T^2`, clipped at each state."""
    states = [h]
    for x in xs:
        states.append(np.tanh(states[-1] @ w + x))
    g, total = 2 * states[-1], np.zeros_like(w)
    for before, after in zip(states[-2::-1], states[:0:-1], strict=True):
        inner = g * (1 - after**2)
        total += np.outer(before, inner)
        g = inner @ w.T
        g *= min(1, bound / np.linalg.norm(g))
    return total


def recurrent(w, xs, bound=0.02, around=lambda f: f):
    step = around(lambda h, x: (jnp.tanh(clip_backward(h, bound) @ w + x), None))
    return jnp.sum(lax.scan(step, H, xs)[0] ** 2)


@pytest.mark.parametrize("around", ["plain", "checkpoint", "jit"])
def test_each_step_of_a_scan(around):
    wrap = {"plain": lambda f: f, "checkpoint": jax.checkpoint, "jit": jax.jit}[around]
    with jax.enable_x64(True):
        loss = lambda w, c: recurrent(w, XS, c, wrap)
        found, free = quick.run(lambda w: [jax.grad(loss)(w, c) for c in (0.02, INF)], W)
    np.testing.assert_allclose(found, by_hand(W, H, XS, 0.02), rtol=1e-10)
    assert np.abs(found / free - 1).max() > 0.1


def test_examples_of_vmap_have_norms_of_their_own():
    loss = lambda x: jnp.sum(clip_backward(x, 1.5) ** 2)
    found = quick.run(lambda x: jax.grad(lambda x: jnp.sum(jax.vmap(loss)(x)))(x), G)
    np.testing.assert_allclose(found, clipped(2 * G, 1.5, (1, 2)), rtol=2e-6)
    alike = quick.run(lambda x: jax.vmap(jax.grad(loss))(x), G)
    np.testing.assert_allclose(alike, found, rtol=1e-6)


def test_outside_jit():
    gradient = jax.grad(lambda x: jnp.sum(clip_backward(x, 1.0)))(jnp.ones(4))
    np.testing.assert_allclose(gradient, 0.5, rtol=1e-6)


# --- per example: exact, for the rule is known not to be linear ---

LOSSES = {
    "hidden": lambda w, xs: jnp.sum(jnp.sin(clip_backward(xs @ w, 0.3)) ** 2),
    "tokens": lambda w, xs: jnp.sum(jnp.sin(clip_backward(xs @ w, 0.2, axes=-1) @ w)),
    "elements": lambda w, xs: jnp.sum(jnp.sin(clip_backward(jnp.tanh(xs @ w), 0.1, axes=()) @ w)),
    "largest": lambda w, xs: jnp.sum(
        jnp.sin(clip_backward(xs @ w, LargestBut(2), axes=-1, response="drop"))
    ),
    "scan": recurrent,
    "checkpointed scan": lambda w, xs: recurrent(w, xs, around=jax.checkpoint),
    "parameter": lambda w, xs: jnp.sum(jnp.sin(xs @ clip_backward(w, 0.2))),
    "parameter in a scan": lambda w, xs: jnp.sum(
        lax.scan(lambda h, x: (jnp.tanh(h @ clip_backward(w, 0.2) + x), None), H, xs)[0]
    ),
    "vmap": lambda w, xs: jnp.sum(jax.vmap(lambda x: jnp.sin(clip_backward(x @ w, 0.1)))(xs)),
}
BATCH = normal(4, 5, 6, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_per_example_gradients_are_exact(name):
    with jax.enable_x64(True):
        plan = explain(LOSSES[name], W, BATCH)
        assert_equals_oracle(LOSSES[name], W, BATCH, fallbacks=plan.fallbacks)
        assert bool(plan.fallbacks) == name.startswith("parameter")


@pytest.mark.parametrize("method", ["one_pass", "two_pass", "vmap", "auto"])
def test_weights_of_examples_do_not_reach_the_clip(method):
    weights = lambda squares: 3 / jnp.sqrt(squares)
    with jax.enable_x64(True):
        loss = LOSSES["tokens"]
        found = quick_jit(reweighted_grad(loss, weights, method=method))(W, BATCH).grads
        stacked = np.asarray(stacked_grads(loss, W, BATCH))
        norms = np.sqrt(np.sum(stacked.reshape(5, -1) ** 2, axis=1))
        close({"w": found}, {"w": np.tensordot(3 / norms, stacked, 1)}, 1e-10)


# --- mistakes, at the call ---


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"max_norm must be >= 0, got -1", lambda x: clip_backward(x, -1)),
        (TypeError, r"max_norm must be a number or", lambda x: clip_backward(x, "1")),
        (TypeError, r"max_norm must be a number or", lambda x: clip_backward(x, lambda t: 1.0)),
        (ValueError, r"max_norm must be a scalar, got shape \(3,\)",
         lambda x: clip_backward(x, np.ones(3))),
        (ValueError, r"a backward pass has no state.*got Learned",
         lambda x: clip_backward(x, optaxclip.thresholds.mean_plus_std())),
        (ValueError, r"axes must be axes of each array, got 2 for shape \(2, 3\) at the root",
         lambda x: clip_backward(x, 1.0, axes=2)),
        (ValueError, r"got -1 for shape \(\) at b",
         lambda x: clip_backward({"a": x, "b": x[0, 0]}, 1.0, axes=-1)),
        (TypeError, r"axes must be an int, a tuple of ints or None, got 'auto'",
         lambda x: clip_backward(x, 1.0, axes="auto")),
        (ValueError, r"unknown response", lambda x: clip_backward(x, 1.0, response="clip")),
        (ValueError, r"unknown ord", lambda x: clip_backward(x, 1.0, ord=0)),
        (ValueError, r"k must be less than the number of norms, got 2 of 2",
         lambda x: clip_backward(x, LargestBut(2), axes=-1)),
        (TypeError, r"leaves must be arrays, got float", lambda x: clip_backward([x, 1.0], 1.0)),
    ],
)  # fmt: skip
def test_mistakes(error, match, call):
    with pytest.raises(error, match=match):
        call(jnp.ones((2, 3)))


def test_there_is_no_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: clip_backward(x, 1.0), (jnp.ones(2),), (jnp.ones(2),))


def test_a_bound_from_outside_is_an_argument():
    with pytest.raises(ValueError, match="must be passed at each step"):
        jax.grad(lambda x: jnp.sum(clip_backward(x, Passed())))(jnp.ones(2))
    assert isinstance(optaxclip.thresholds.mean_plus_std(), Learned)
