"""The robust aggregators against their definitions in NumPy on `vmap(grad)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal, stacked_grads
from tools.models import TIED_SIZE, aggregate, tied, tied_batch, tied_params
from tools.quick import run

import optaxclip
from optaxclip import explain
from optaxclip.per_example import (
    centered_clip,
    coordinate_median,
    coordinate_trimmed_mean,
    geometric_median,
    per_example_grad,
    trim_by_norm,
)

SIZE = TIED_SIZE


@pytest.fixture
def params():
    return tied_params()


@pytest.fixture(scope="module")
def grads():
    """Stacked, of the parameters and the batch of `answers`."""
    return run(functools.partial(stacked_grads, tied), tied_params(), tied_batch(0.5))


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
FACTORED = ("trim", "centered, 3 times", "geometric")


def flattened(grads):
    return np.concatenate([np.reshape(g, (len(g), -1)) for g in jax.tree.leaves(grads)], axis=1)


def same_numbers(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def flat_update(updates):
    return np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)])


@pytest.fixture(scope="module", params=RULES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def answers(name, grads):
    """Of one rule, from one program: updates and states, of good gradients and of bad ones."""
    tx, _ = RULES[name]
    good = [0, 2, 3, 4]

    def compute(params, ids, xs, grads):
        factored = lambda ids, x: aggregate(tx, per_example_grad(tied)(params, (ids, x)), params)
        stacked = aggregate(tx, grads, params)
        nothing = jax.tree.map(lambda g: g * jnp.nan, grads)
        return {
            "stacked": stacked,
            "stacked, then nothing but nan": tx.update(nothing, stacked[1]),
            "without the second": factored(ids[jnp.array(good)], xs[0, jnp.array(good)]),
        }, jax.lax.map(lambda x: factored(ids, x), xs)  # a loop: one at a time

    ids, x = tied_batch(0.5)
    xs = np.stack([x] * 3)
    xs[1, 1], xs[2, 1] = np.nan, np.inf
    found, factored = run(compute, tied_params(), ids, xs, grads)
    for i, kind in enumerate(("factored", "the second nan", "the second inf")):
        found[kind] = jax.tree.map(lambda a, i=i: a[i], factored)
    return found


def test_factored_and_stacked_equal_the_definition(name, answers, params, grads):
    (stacked, state), (factored, same) = answers["stacked"], answers["factored"]
    expected = RULES[name][1](flattened(grads))
    np.testing.assert_allclose(flat_update(stacked), expected, rtol=1e-8, atol=1e-8)
    close(factored, stacked, 1e-8)
    same_numbers(state.stats, same.stats)
    start = jax.eval_shape(RULES[name][0].init, params)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start)


def test_an_even_number_of_examples_and_four_of_them(grads):
    four = jax.tree.map(lambda g: g[:4], grads)
    found = run(lambda grads: {k: aggregate(tx, grads)[0] for k, (tx, _) in RULES.items()}, four)
    for name, (_, definition) in RULES.items():
        expected = definition(flattened(four))
        np.testing.assert_allclose(
            flat_update(found[name]), expected, rtol=1e-8, atol=1e-8, err_msg=name
        )


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_example_changes_nothing_but_counters(value, answers):
    expected, clean = answers["without the second"]
    found, state = answers[f"the second {value}"]
    close(found, expected, 1e-10)
    close(state.stats.examples[:5], clean.stats.examples[:5], 1e-6)
    close(state.threshold_state, clean.threshold_state, 1e-10)
    assert state.stats.examples.nonfinite_count == state.stats.nonfinite_count == 1
    assert clean.stats.nonfinite_count == 0


def test_nothing_but_nan_gives_zeros(answers):
    (_, state), (found, after) = answers["stacked"], answers["stacked, then nothing but nan"]
    assert not any(map(np.any, jax.tree.leaves(found)))
    close(after.threshold_state, state.threshold_state, 1e-12)
    assert after.stats.examples == (0, 0, 0, 0, -1, SIZE)


def test_centered_clip_remembers_the_last_update_and_counts_steps(params, grads):
    flat = flattened(grads)
    tx = centered_clip(lambda count: 30.0 / (1 + count), iterations=2)

    def two_steps(params, grads):
        first, state = aggregate(tx, grads, params)
        return first, *tx.update(grads, state, params)

    first, second, state = run(two_steps, params, grads)
    v = centered(flat, 30.0, 2)
    np.testing.assert_allclose(flat_update(first), v, rtol=1e-8)
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
    w, x = np.ones((30, 40)), np.ones((6, 2, 30))
    grad = per_example_grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    jaxpr = jax.make_jaxpr(lambda w, x: aggregate(tx, grad(w, x), w)[0])(w, x)
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < 6 * 30 * 40


def test_what_materialises_is_said():
    plan = explain(lambda w, x: jnp.sum(x @ w), np.ones((3, 4)), np.ones((2, 3)))
    assert "coordinate_median" in str(plan)
    for fun in (coordinate_median, coordinate_trimmed_mean):
        assert "Stacks the gradients of" in fun.__doc__


def test_statistics(params, grads):
    norms = np.sort(np.linalg.norm(flattened(grads), axis=1))
    rules = trim_by_norm(0.4, name="mine"), geometric_median(), optaxclip.clip_per_example(np.inf)
    trim, median, plain = run(lambda *a: [aggregate(tx, *a)[1] for tx in rules], grads, params)
    stats = optaxclip.clip_stats(trim)["mine"]
    assert (stats.clip_factor, stats.post_clip_norm, stats.clipped_count) == (0, 0, 1)
    np.testing.assert_allclose((stats.threshold, stats.pre_clip_norm), norms[[2, 4]], rtol=1e-6)
    assert stats.examples.clipped_fraction == np.float32(0.4)
    same_numbers(median.stats.examples, plain.stats.examples)
    assert (median.stats.clip_factor, median.stats.clipped_count) == (1, 0)


def test_far_outliers_do_not_move_the_medians():
    grads = np.concatenate([1 + 0.1 * normal(0, 7, 3), np.full((3, 3), 1e6)])
    rules = geometric_median(iterations=60), coordinate_median(), trim_by_norm(0.3)
    for found in run(lambda grads: [aggregate(tx, grads)[0] for tx in rules], grads):
        np.testing.assert_allclose(found, 1, atol=0.25)


EQUAL = np.float32([3.0, -4.0])


def median_of_equals(eps):
    return aggregate(geometric_median(eps=eps), jnp.tile(EQUAL, (8, 1)))[0]


@pytest.mark.parametrize("eps", [0.0, 1e-38, 1e-6, 1e38, np.inf])
def test_the_geometric_median_of_equal_gradients_is_theirs(eps):
    """Eight times 1e38 overflows."""
    # Traced, so that it is not refused; jitted, XLA may simplify.
    np.testing.assert_allclose(jax.jit(median_of_equals)(np.float32(eps)), EQUAL, rtol=1e-6)
    if 0 < eps < np.inf:
        np.testing.assert_allclose(median_of_equals(eps), EQUAL, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_share_left_out_is_a_floor(dtype):
    """Of every fraction k / 100 exactly k, though some products round to less; and one is kept."""
    grads = np.arange(1.0, 101.0)[:, None]
    rules = {"trim": trim_by_norm, "mean": coordinate_trimmed_mean}

    def means(fractions, grads):
        mean = lambda x: {k: aggregate(make(x), grads)[0][0] for k, make in rules.items()}
        return jax.lax.map(mean, fractions)

    found = run(means, (np.arange(101) / 100).astype(dtype), grads)
    kept = [np.mean(np.arange(1, 101 - min(k, 99))) for k in range(101)]
    np.testing.assert_allclose(found["trim"], kept, rtol=1e-6)
    np.testing.assert_allclose(found["mean"], 50.5, rtol=1e-6)


@pytest.mark.parametrize(("fraction", "number"), [(0.4996, 2), (0.4996, 1), (0.0, 1)])
def test_a_trimmed_mean_never_cuts_all(fraction, number):
    tx = coordinate_trimmed_mean(fraction)
    found, _ = run(functools.partial(aggregate, tx), 2.0 + np.arange(number)[:, None])
    assert found[0] == 2.0 + (number - 1) / 2


def test_trim_by_norm_never_drops_the_only_example():
    found, _ = run(functools.partial(aggregate, trim_by_norm(0.9995)), np.full((1, 1), 2.0))
    assert found[0] == 2.0


def test_low_precision_leaves_keep_their_dtype():
    params = {"w": np.ones((2, 2), jnp.bfloat16), "n": np.arange(2)}
    grads = {"w": np.ones((3, 2, 2), jnp.bfloat16), "n": np.zeros((3, 2), np.int32)}
    found = run(lambda *a: {k: aggregate(tx, *a)[0] for k, (tx, _) in RULES.items()}, grads, params)
    for name, updates in found.items():
        np.testing.assert_allclose(np.asarray(updates["w"], float), 1, rtol=1e-2, err_msg=name)
        assert (updates["w"].dtype, updates["n"].dtype) == (jnp.bfloat16, jnp.int32), name


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
