"""`clip_per_example` against ten lines of NumPy on `vmap(grad)`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.agreement import close, normal, stacked_grads

import optaxclip
from optaxclip import clip_per_example
from optaxclip.per_example import masked, materialize, per_example_grad, sq_norms

SIZE = 5


def loss(params, example):
    """A matrix product over time, a bias, a table that is looked up, and tied weights."""
    ids, x = example
    h = jnp.tanh(x @ params["w"] + params["b"]) + params["table"][ids]
    return jnp.sum((h @ params["w"].T) ** 2) * params["scale"]


PARAMS = {"w": (3, 4), "b": (4,), "table": (6, 4), "scale": ()}


@pytest.fixture
def params():
    return {k: normal(i, *shape) for i, (k, shape) in enumerate(PARAMS.items())}


@pytest.fixture
def batch():
    ids = jnp.asarray(np.random.default_rng(7).integers(0, 6, (SIZE, 2)))
    return ids, normal(8, SIZE, 2, 3) * jnp.arange(1, SIZE + 1)[:, None, None]


RESPONSES = {
    "rescale": lambda n, c: np.minimum(1, c / n),
    "automatic": lambda n, c: c / (n + 0.01),
    "psac": lambda n, c: c / (n + 0.1 / (n + 0.1)),
    "normalize": lambda n, c: c / n,
    "drop": lambda n, c: 1.0 * (n <= c),
}


def oracle(grads, max_norm, group_of, response="rescale", divisor=SIZE):
    """`1/divisor sum_b factor(n_b, c) g_b`, by groups of leaves; NaN examples left out."""
    grads = {k: np.asarray(g) for k, g in grads.items()}
    finite = np.all([np.isfinite(g).reshape(len(g), -1).all(1) for g in grads.values()], axis=0)
    total = {}
    for k, g in grads.items():
        mates = [x for j, x in grads.items() if group_of(j) == group_of(k)]
        n = np.sqrt(sum((x.reshape(len(x), -1) ** 2).sum(1) for x in mates))
        c = max_norm[group_of(k)] if isinstance(max_norm, dict) else max_norm
        weights = RESPONSES[response](n[finite], c) / divisor
        total[k] = np.tensordot(weights, g[finite], 1)
    return total


def aggregate(tx, grads, params):
    return jax.jit(tx.update)(grads, tx.init(params), params)


GROUPS = {
    "global": ("global", 20.0, lambda k: 0),
    "leaf": ("leaf", {"w": 20.0, "b": 2.0, "table": 5.0, "scale": 0.1}, lambda k: k),
    "labels": (
        lambda path, x: "matrix" if x.ndim > 1 else "other",
        {"matrix": 9.0, "other": 2.0},
        lambda k: "matrix" if len(PARAMS[k]) > 1 else "other",
    ),
}


@pytest.mark.parametrize("by", GROUPS)
def test_factored_and_stacked_equal_the_oracle(by, params, batch):
    argument, max_norm, group_of = GROUPS[by]
    grads = stacked_grads(loss, params, batch)
    tx = clip_per_example(max_norm, by=argument)
    expected = oracle(grads, max_norm, group_of)
    factored, state = aggregate(tx, per_example_grad(loss)(params, batch), params)
    stacked, same = aggregate(tx, grads, params)
    close(jax.tree.map(np.asarray, stacked), expected, 1e-10)
    close(factored, stacked, 1e-10)
    close(state.stats, same.stats, 1e-6)
    assert 0 < state.stats.examples.clipped_fraction <= 1, "the test would pass without clipping"
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize(("mean", "divisor"), [("batch", SIZE), ("sum", 1), (7.5, 7.5)])
def test_responses_and_divisors(response, mean, divisor, params, batch):
    grads = stacked_grads(loss, params, batch)
    found, _ = clip_per_example(20.0, response=response, mean=mean).update(
        grads, clip_per_example(20.0).init(params)
    )
    expected = oracle(grads, 20.0, lambda k: 0, response, divisor)
    close(jax.tree.map(np.asarray, found), expected, 1e-10)


def test_the_divisor_and_the_bound_may_be_traced(params, batch):
    grads = stacked_grads(loss, params, batch)
    state = clip_per_example(1.0).init(params)

    @jax.jit
    def update(bound, divisor):
        return clip_per_example(bound, mean=divisor).update(grads, state)[0]

    found = update(jnp.asarray(20.0), jnp.asarray(3.0))
    close(jax.tree.map(np.asarray, found), oracle(grads, 20.0, lambda k: 0, divisor=3), 1e-10)


def test_schedule_counts_steps(params, batch):
    grads = stacked_grads(loss, params, batch)
    tx = clip_per_example(lambda count: 20.0 / (1 + count))
    state = tx.init(params)
    for bound in (20.0, 10.0):
        found, state = tx.update(grads, state)
        close(jax.tree.map(np.asarray, found), oracle(grads, bound, lambda k: 0), 1e-10)
        assert state.stats.threshold == bound


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("factored", [True, False])
def test_a_bad_example_changes_nothing_but_counters(factored, value, params, batch):
    ids, x = batch
    bad = (ids, x.at[1].set(value))
    good = np.array([0, 2, 3, 4])
    take = per_example_grad(loss) if factored else lambda *args: stacked_grads(loss, *args)
    tx = clip_per_example(80.0, mean="sum")
    expected, clean = aggregate(tx, take(params, (ids[good], x[good])), params)
    found, state = aggregate(tx, take(params, bad), params)
    close(found, expected, 1e-10)
    close(state.stats.examples[:5], clean.stats.examples[:5], 1e-6)
    assert 0 < clean.stats.examples.clipped_fraction < 1
    assert state.stats.examples.nonfinite_count == 1
    assert state.stats.nonfinite_count == 1
    assert state.stats.clip_factor == state.stats.post_clip_norm == 0
    unsafe, _ = aggregate(clip_per_example(20.0, nan_safe=False), take(params, bad), params)
    assert np.isnan(unsafe["w"]).all()


@pytest.mark.parametrize("response", RESPONSES)
def test_nothing_but_nan_gives_zeros(response, params, batch):
    ids, x = batch
    grads = per_example_grad(loss)(params, (ids, x * jnp.nan))
    tx = clip_per_example(1.0, response=response)
    found, state = aggregate(tx, grads, params)
    for leaf in jax.tree.leaves(found):
        assert not np.any(leaf)
    _, state = tx.update(grads, state)
    assert state.stats.examples == (0, 0, 0, 0, -1, 2 * SIZE)


def test_statistics(params, batch):
    grads = stacked_grads(loss, params, batch)
    norms = np.sqrt(sq_norms(grads))
    _, state = aggregate(clip_per_example(20.0, name="mine"), grads, params)
    stats = optaxclip.clip_stats(state)["mine"]
    seen = stats.examples
    close(
        tuple(map(np.float32, (norms.mean(), np.median(norms), norms.max()))),
        tuple(map(np.asarray, seen[:3])),
        1e-6,
    )
    assert seen.clipped_fraction == np.float32(np.mean(norms > 20.0))
    assert seen.nonfinite_count == 0
    assert stats.pre_clip_norm == np.float32(norms.max())
    np.testing.assert_allclose(stats.post_clip_norm, 20.0, rtol=1e-6)
    assert (stats.count, stats.clipped_count, stats.threshold) == (1, 1, 20.0)


def test_statistics_leaf_by_leaf(params, batch):
    grads = stacked_grads(loss, params, batch)
    _, state = aggregate(clip_per_example(5.0, by="leaf"), grads, params)
    groups = optaxclip.clip_stats(state)["clip_per_example"].groups
    assert groups.names == ("b", "scale", "table", "w")
    largest = [np.sqrt(sq_norms([grads[k]])).max() for k in groups.names]
    np.testing.assert_allclose(groups.pre_clip_norm, largest, rtol=1e-6)


def test_first_in_a_chain_inside_scan(params, batch):
    tx = optax.chain(clip_per_example(20.0), optax.adam(0.1))

    def step(carry, _):
        params, state = carry
        grads = per_example_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), ()

    (after, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
    assert isinstance(clip_per_example(1.0), optax.experimental.aggregating.Aggregator)
    assert optaxclip.clip_stats(state)["clip_per_example"].count == 3
    assert jax.tree.structure(after) == jax.tree.structure(params)


def test_other_leaves_and_low_precision():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "n": jnp.arange(2), "e": jnp.zeros((0, 3))}

    def loss(p, x):
        return jnp.sum((x @ p["w"]) ** 2).astype(jnp.float32) * p["n"][1] + jnp.sum(p["e"])

    grads = per_example_grad(loss)(params, jnp.ones((3, 2), jnp.bfloat16))
    tx = clip_per_example(1.0)
    updates, state = aggregate(tx, grads, params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    np.testing.assert_allclose(np.asarray(updates["w"], float), 0.5, rtol=1e-2)
    optax.apply_updates(params, updates)
    assert state.stats.examples.clipped_fraction == 1


def test_masked_zeroes_examples_whatever_they_hold(params, batch):
    ids, x = batch
    keep = jnp.array([True, False, True, True, False])
    grads = per_example_grad(loss)(params, (ids, jnp.where(keep[:, None, None], x, jnp.nan)))
    clean = materialize(per_example_grad(loss)(params, batch))
    for found, all_of_them in zip(
        jax.tree.leaves(materialize(masked(grads, keep))), jax.tree.leaves(clean), strict=True
    ):
        expected = np.asarray(all_of_them).copy()
        expected[~np.asarray(keep)] = 0
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("factored", [True, False])
def test_no_stack_of_factored_gradients(factored):
    """The arrays of the jaxpr show whether [B, *shape] is ever made."""
    params, x = jnp.ones((30, 40)), jnp.ones((6, 2, 30))
    fun = per_example_grad(_small_loss) if factored else jax.vmap(jax.grad(_small_loss), (None, 0))
    tx = clip_per_example(1.0)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(lambda p, x: tx.update(fun(p, x), state)[0])(params, x)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert (max(sizes) >= 6 * 30 * 40) == (not factored)


def _small_loss(w, x):
    return jnp.sum((x @ w) ** 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": -1.0}, "max_norm must be >= 0, got -1.0"),
        ({"by": "layer"}, "unknown by, got 'layer'. Use 'global', 'leaf', or labels"),
        ({"response": "soft"}, "unknown response, got 'soft'"),
        ({"mean": "median"}, "unknown mean, got 'median'"),
        ({"mean": 0}, "unknown mean, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_per_example(**{"max_norm": 1.0, **arguments})


@pytest.mark.parametrize(
    ("grads", "params", "message"),
    [
        ({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}, None, r"got shape \(2, 2\) at b and \(3,"),
        ({"a": jnp.ones((0, 2))}, None, r"number of examples >= 1 on the first axis, got shape"),
        (jnp.ones(()), None, r"got shape \(\) at the root"),
        ({}, None, "at least one leaf, got none"),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2)}, r"got \(\) at a, which is \(2,\)"),
        ({"a": jnp.ones((1, 2))}, {}, "the same leaves, got 1 and 0, and a in one of them alone"),
        (
            {"a": jnp.ones((1, 2))},
            {"a": jnp.ones(2), "b": {"c": jnp.ones(2)}},
            "got 1 and 2, and b/c in one of them alone",
        ),
    ],
)
def test_gradients_are_checked(grads, params, message):
    tx = clip_per_example(1.0)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(grads), params)


def noise_scale(vectors):
    """`tr(S) / |G|^2`, from the covariance itself."""
    n, mean = len(vectors), vectors.mean(0)
    trace = np.trace(np.atleast_2d(np.cov(vectors.T)))
    return trace / (mean @ mean - trace / n)


@pytest.mark.parametrize("bound", [np.inf, 60.0])
def test_noise_scale_is_that_of_the_clipped_gradients(bound, params, batch):
    grads = stacked_grads(loss, params, batch)
    flat = np.concatenate([np.reshape(g, (SIZE, -1)) for g in jax.tree.leaves(grads)], 1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    for mean in ("batch", 3.0):
        _, state = aggregate(clip_per_example(bound, mean=mean), grads, params)
        expected = noise_scale(flat * np.minimum(1, bound / norms))
        np.testing.assert_allclose(state.stats.examples.noise_scale, expected, rtol=1e-5)
        assert expected > 0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([[1.0, 2.0]] * 3, 0), ([[1.0, 0.0], [-1.0, 0.0]], np.inf), ([[1.0, 0.0]], -1)],
)
def test_noise_scale_at_its_ends(rows, expected):
    tx = clip_per_example(10.0)
    _, state = tx.update(jnp.array(rows), tx.init(jnp.zeros(2)))
    assert state.stats.examples.noise_scale == expected


def test_automatic_clipping_needs_no_bound_beside_the_learning_rate(params, batch):
    """AUTO-S with (lr, R) is that with (lr R, 1): exactly, as R is a power of two."""

    def train(learning_rate, bound):
        tx = optax.chain(clip_per_example(bound, response="automatic"), optax.sgd(learning_rate))
        now, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(per_example_grad(loss)(now, batch), state, now)
            now = optax.apply_updates(now, updates)
        return now

    for x, y in zip(*map(jax.tree.leaves, (train(0.1, 4.0), train(0.4, 1.0))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.any(train(0.1, 4.0)["w"] != train(0.1, 1.0)["w"])


def test_nothing_but_padding_gives_zeros(params, batch):
    grads = masked(per_example_grad(loss)(params, batch), jnp.zeros(SIZE, bool))
    for response in RESPONSES:
        found, state = aggregate(clip_per_example(1.0, response=response), grads, params)
        assert not any(map(np.any, jax.tree.leaves(found)))
        assert state.stats.examples == (0, 0, 0, 0, 0, 0)
