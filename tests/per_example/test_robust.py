"""The robust aggregators against their definitions in NumPy on `vmap(grad)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_aggregators import PARAMS, SIZE, aggregate, loss
from tools.agreement import close, normal, stacked_grads

import optaxclip
from optaxclip import (
    centered_clip,
    coordinate_median,
    coordinate_trimmed_mean,
    explain,
    geometric_median,
    trim_by_norm,
)
from optaxclip.per_example import per_example_grad


@pytest.fixture
def params():
    return {k: normal(i, *shape) for i, (k, shape) in enumerate(PARAMS.items())}


@pytest.fixture
def batch():
    ids = jnp.asarray(np.random.default_rng(7).integers(0, 6, (SIZE, 2)))
    return ids, normal(8, SIZE, 2, 3) * jnp.arange(1, SIZE + 1)[:, None, None] ** 0.5


def trimmed(flat, fraction):
    order = np.argsort(np.linalg.norm(flat, axis=1), kind="stable")
    return flat[order[: len(flat) - int(fraction * len(flat))]].mean(0)


def centered(flat, bound, iterations, v=0.0):
    for _ in range(iterations):
        gaps = flat - v
        lengths = np.linalg.norm(gaps, axis=1, keepdims=True)
        v = v + (gaps * np.minimum(1, bound / lengths)).mean(0)
    return v


def weiszfeld(flat, iterations, eps=1e-6):
    z = flat.mean(0)
    for _ in range(iterations):
        w = 1 / np.maximum(np.linalg.norm(flat - z, axis=1), eps)
        z = (w[:, None] * flat).sum(0) / w.sum()
    return z


def trimmed_mean(flat, fraction):
    k = int(fraction * len(flat))
    return np.sort(flat, axis=0)[k : len(flat) - k].mean(0)


RULES = {
    "trim": (trim_by_norm(0.4), lambda flat: trimmed(flat, 0.4)),
    "trim nothing": (trim_by_norm(0.1), lambda flat: flat.mean(0)),
    "centered": (centered_clip(30.0), lambda flat: centered(flat, 30.0, 1)),
    "centered, 3 times": (centered_clip(30.0, iterations=3), lambda flat: centered(flat, 30.0, 3)),
    "geometric": (geometric_median(), lambda flat: weiszfeld(flat, 4)),
    "geometric, blunt": (
        geometric_median(iterations=2, eps=20.0),
        lambda flat: weiszfeld(flat, 2, 20.0),
    ),
    "median": (coordinate_median(), lambda flat: np.median(flat, axis=0)),
    "trimmed mean": (coordinate_trimmed_mean(0.25), lambda flat: trimmed_mean(flat, 0.25)),
}
each = pytest.mark.parametrize("name", RULES)
FACTORED = ("trim", "centered, 3 times", "geometric")


def flattened(grads):
    return np.concatenate([np.reshape(g, (len(g), -1)) for g in jax.tree.leaves(grads)], axis=1)


def same_numbers(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def flat_update(updates):
    return np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)])


@each
def test_factored_and_stacked_equal_the_definition(name, params, batch):
    tx, definition = RULES[name]
    grads = stacked_grads(loss, params, batch)
    stacked, state = aggregate(tx, grads, params)
    expected = definition(flattened(grads))
    np.testing.assert_allclose(flat_update(stacked), expected, rtol=1e-8, atol=1e-8)
    factored, same = aggregate(tx, per_example_grad(loss)(params, batch), params)
    close(factored, stacked, 1e-8)
    same_numbers(state.stats, same.stats)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))


def test_an_even_number_of_examples_and_four_of_them(params, batch):
    grads = jax.tree.map(lambda g: g[:4], stacked_grads(loss, params, batch))
    for tx, definition in RULES.values():
        found, _ = tx.update(grads, tx.init(params))
        expected = definition(flattened(grads))
        np.testing.assert_allclose(flat_update(found), expected, rtol=1e-8, atol=1e-8)


@each
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_example_changes_nothing_but_counters(name, value, params, batch):
    tx, _ = RULES[name]
    ids, x = batch
    good = np.array([0, 2, 3, 4])
    expected, clean = aggregate(tx, per_example_grad(loss)(params, (ids[good], x[good])), params)
    found, state = aggregate(tx, per_example_grad(loss)(params, (ids, x.at[1].set(value))), params)
    close(found, expected, 1e-10)
    close(state.stats.examples[:5], clean.stats.examples[:5], 1e-6)
    close(state.threshold_state, clean.threshold_state, 1e-10)
    assert state.stats.examples.nonfinite_count == state.stats.nonfinite_count == 1
    assert clean.stats.nonfinite_count == 0


@each
def test_nothing_but_nan_gives_zeros(name, params, batch):
    tx, _ = RULES[name]
    grads = stacked_grads(loss, params, batch)
    _, state = tx.update(grads, tx.init(params))
    found, after = tx.update(jax.tree.map(lambda g: g * jnp.nan, grads), state)
    assert not any(map(np.any, jax.tree.leaves(found)))
    close(after.threshold_state, state.threshold_state, 1e-12)
    assert after.stats.examples == (0, 0, 0, 0, after.stats.examples.noise_scale, SIZE)
    assert after.stats.examples.noise_scale == -1


def test_centered_clip_remembers_the_last_update_and_counts_steps(params, batch):
    grads = stacked_grads(loss, params, batch)
    flat = flattened(grads)
    tx = centered_clip(lambda count: 30.0 / (1 + count), iterations=2)
    first, state = tx.update(grads, tx.init(params), params)
    v = centered(flat, 30.0, 2)
    np.testing.assert_allclose(flat_update(first), v, rtol=1e-8)
    second, state = tx.update(grads, state, params)
    np.testing.assert_allclose(flat_update(second), centered(flat, 15.0, 2, v), rtol=1e-8)
    assert state.stats.threshold == 15.0


def test_centered_clip_is_for_the_tree_of_init():
    tx = centered_clip(1.0)
    state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(3)})
    for grads in ({"a": jnp.ones((4, 2))}, {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}):
        with pytest.raises(ValueError, match="updates must have the leaves that init saw"):
            tx.update(grads, state)


@pytest.mark.parametrize("name", FACTORED)
def test_factored_leaves_stay_factored(name):
    """The arrays of the jaxpr show whether [B, *shape] is ever made."""
    tx = RULES[name][0]
    w, x = jnp.ones((30, 40)), jnp.ones((6, 2, 30))
    state = tx.init(w)
    grad = per_example_grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    jaxpr = jax.make_jaxpr(lambda w, x: tx.update(grad(w, x), state)[0])(w, x)
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < 6 * 30 * 40


def test_what_materialises_is_said():
    plan = explain(lambda w, x: jnp.sum(x @ w), jnp.ones((3, 4)), jnp.ones((2, 3)))
    assert "coordinate_median" in str(plan)
    for fun in (coordinate_median, coordinate_trimmed_mean):
        assert "Stacks the gradients of" in fun.__doc__


def test_statistics(params, batch):
    grads = stacked_grads(loss, params, batch)
    norms = np.sort(np.linalg.norm(flattened(grads), axis=1))
    _, state = aggregate(trim_by_norm(0.4, name="mine"), grads, params)
    stats = optaxclip.clip_stats(state)["mine"]
    assert (stats.clip_factor, stats.post_clip_norm, stats.clipped_count) == (0, 0, 1)
    np.testing.assert_allclose((stats.threshold, stats.pre_clip_norm), norms[[2, 4]], rtol=1e-6)
    assert stats.examples.clipped_fraction == np.float32(0.4)
    _, state = aggregate(geometric_median(), grads, params)
    plain = optaxclip.clip_per_example(np.inf)
    expected = aggregate(plain, grads, params)[1].stats.examples
    same_numbers(state.stats.examples, expected)
    assert (state.stats.clip_factor, state.stats.clipped_count) == (1, 0)


def test_far_outliers_do_not_move_the_medians():
    grads = jnp.concatenate([1 + 0.1 * normal(0, 7, 3), jnp.full((3, 3), 1e6)])
    for tx in (geometric_median(iterations=60), coordinate_median(), trim_by_norm(0.3)):
        found, _ = jax.jit(tx.update)(grads, tx.init(jnp.zeros(3)))
        np.testing.assert_allclose(found, 1, atol=0.25)


@pytest.mark.parametrize("eps", [0.0, 1e-38, 1e-6, 1e38, np.inf])
def test_the_geometric_median_of_equal_gradients_is_theirs(eps):
    """Eight times 1e38 overflows."""
    grads = jnp.tile(jnp.array([3.0, -4.0], jnp.float32), (8, 1))

    def median(eps):
        tx = geometric_median(eps=eps)
        return tx.update(grads, tx.init(jnp.zeros(2, jnp.float32)))[0]

    # Traced, so that it is not refused; jitted, XLA may simplify.
    np.testing.assert_allclose(jax.jit(median)(jnp.float32(eps)), grads[0], rtol=1e-6)
    if 0 < eps < np.inf:
        np.testing.assert_allclose(median(eps), grads[0], rtol=1e-6)


def test_the_share_left_out_is_a_floor():
    """Of every fraction k / 100 exactly k, though some products round to less; and one is kept."""
    grads = jnp.arange(1.0, 101.0)[:, None]
    tx = {"trim": trim_by_norm, "mean": coordinate_trimmed_mean}

    @jax.jit
    def mean(fraction):
        found = {k: make(fraction) for k, make in tx.items()}
        return {k: x.update(grads, x.init(jnp.zeros(1)))[0][0] for k, x in found.items()}

    for dtype in (jnp.float32, jnp.float64):
        for k in range(100):
            found = mean(jnp.asarray(k / 100, dtype))
            np.testing.assert_allclose(found["trim"], np.mean(np.arange(1, 101 - k)), rtol=1e-6)
            np.testing.assert_allclose(found["mean"], 50.5, rtol=1e-6)
    assert mean(1.0) == {"trim": 1.0, "mean": 50.5}


@pytest.mark.parametrize(("fraction", "number"), [(0.4996, 2), (0.4996, 1), (0.0, 1)])
def test_a_trimmed_mean_never_cuts_all(fraction, number):
    tx = coordinate_trimmed_mean(fraction)
    found, _ = tx.update(2.0 + jnp.arange(number)[:, None], tx.init(jnp.zeros(1)))
    assert found[0] == 2.0 + (number - 1) / 2


def test_trim_by_norm_never_drops_the_only_example():
    tx = trim_by_norm(0.9995)
    assert tx.update(jnp.full((1, 1), 2.0), tx.init(jnp.zeros(1)))[0][0] == 2.0


def test_low_precision_leaves_keep_their_dtype():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "n": jnp.arange(2)}
    grads = {"w": jnp.ones((3, 2, 2), jnp.bfloat16), "n": jnp.zeros((3, 2), jnp.int32)}
    for tx, _ in RULES.values():
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(np.asarray(updates["w"], float), 1, rtol=1e-2)
        assert (updates["w"].dtype, updates["n"].dtype) == (jnp.bfloat16, jnp.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trim_by_norm(1.0), r"fraction must be in \[0, 1\), got 1.0"),
        (lambda: trim_by_norm(-0.1), r"fraction must be in \[0, 1\), got -0.1"),
        (lambda: coordinate_trimmed_mean(0.5), r"fraction must be in \[0, 0.5\), got 0.5"),
        (lambda: centered_clip(-1.0), "max_norm must be >= 0, got -1.0"),
        (lambda: centered_clip(1.0, iterations=0), "iterations must be >= 1, got 0"),
        (lambda: geometric_median(iterations=0), "iterations must be >= 1, got 0"),
        (lambda: geometric_median(eps=-1.0), "eps must be > 0 and finite, got -1.0"),
        (lambda: geometric_median(eps=0.0), "eps must be > 0 and finite, got 0.0"),
        (lambda: geometric_median(eps=jnp.inf), "eps must be > 0 and finite, got inf"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
