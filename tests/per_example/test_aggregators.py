"""`clip_per_example` against ten lines of NumPy on `vmap(grad)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.agreement import close, stacked_grads
from tools.models import TIED_SHAPES, TIED_SIZE, aggregate, tied, tied_batch, tied_params
from tools.quick import quick_jit, run

import optaxclip
from optaxclip import clip_per_example
from optaxclip.per_example import masked, materialize, per_example_grad

SIZE = TIED_SIZE


@pytest.fixture
def params():
    return tied_params()


@pytest.fixture
def batch():
    return tied_batch()


@pytest.fixture(scope="module")
def grads():
    """Of `params` and `batch`, stacked."""
    return run(functools.partial(stacked_grads, tied), tied_params(), tied_batch())


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


GROUPS = {
    "global": ("global", 20.0, lambda k: 0),
    "leaf": ("leaf", {"w": 20.0, "b": 2.0, "table": 5.0, "scale": 0.1}, lambda k: k),
    "labels": (
        lambda path, x: "matrix" if x.ndim > 1 else "other",
        {"matrix": 9.0, "other": 2.0},
        lambda k: "matrix" if len(TIED_SHAPES[k]) > 1 else "other",
    ),
}


@pytest.mark.parametrize("by", GROUPS)
def test_factored_and_stacked_equal_the_oracle(by, params, batch, grads):
    argument, max_norm, group_of = GROUPS[by]
    tx = clip_per_example(max_norm, by=argument)

    def both(params, batch, grads):
        factored = per_example_grad(tied)(params, batch)
        return aggregate(tx, factored, params), aggregate(tx, grads, params)

    (factored, state), (stacked, same) = run(both, params, batch, grads)
    close(stacked, oracle(grads, max_norm, group_of), 1e-10)
    close(factored, stacked, 1e-10)
    close(state.stats, same.stats, 1e-6)
    assert 0 < state.stats.examples.clipped_fraction <= 1, "the test would pass without clipping"
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))


MEANS = {"batch": SIZE, "sum": 1, 7.5: 7.5}


@pytest.fixture(scope="module")
def means_by_response(grads):
    def compute(grads):
        return {
            response: [
                aggregate(clip_per_example(20.0, response=response, mean=mean), grads)[0]
                for mean in MEANS
            ]
            for response in RESPONSES
        }

    return run(compute, grads)


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("mean", MEANS)
def test_responses_and_divisors(response, mean, grads, means_by_response):
    found = means_by_response[response][list(MEANS).index(mean)]
    close(found, oracle(grads, 20.0, lambda k: 0, response, MEANS[mean]), 1e-10)


def test_the_divisor_and_the_bound_may_be_traced(grads):
    def update(bound, divisor, grads):
        return aggregate(clip_per_example(bound, mean=divisor), grads)[0]

    close(run(update, 20.0, 3.0, grads), oracle(grads, 20.0, lambda k: 0, divisor=3), 1e-10)


def test_schedule_counts_steps(params, grads):
    tx = clip_per_example(lambda count: 20.0 / (1 + count))
    state, update = quick_jit(tx.init)(params), quick_jit(tx.update)
    for bound in (20.0, 10.0):
        found, state = update(grads, state)
        close(jax.device_get(found), oracle(grads, bound, lambda k: 0), 1e-10)
        assert state.stats.threshold == bound


@pytest.fixture(scope="module", params=[True, False])
def with_a_bad_example(request):
    """A function of what the second example holds; factored or not."""
    take = per_example_grad(tied) if request.param else functools.partial(stacked_grads, tied)
    tx, unsafe = clip_per_example(80.0, mean="sum"), clip_per_example(20.0, nan_safe=False)

    @quick_jit
    def compute(params, good, bad):
        good, bad = take(params, good), take(params, bad)
        spoiled, _ = aggregate(unsafe, bad, params)
        return aggregate(tx, good, params), aggregate(tx, bad, params), spoiled

    def answers(value):
        ids, x = tied_batch()
        good = np.delete(ids, 1, axis=0), np.delete(x, 1, axis=0)
        x[1] = value
        return jax.device_get(compute(tied_params(), good, (ids, x)))

    return answers


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_example_changes_nothing_but_counters(value, with_a_bad_example):
    (expected, clean), (found, state), unsafe = with_a_bad_example(value)
    close(found, expected, 1e-10)
    close(state.stats.examples[:5], clean.stats.examples[:5], 1e-6)
    assert 0 < clean.stats.examples.clipped_fraction < 1
    assert state.stats.examples.nonfinite_count == 1
    assert state.stats.nonfinite_count == 1
    assert state.stats.clip_factor == state.stats.post_clip_norm == 0
    assert np.isnan(unsafe["w"]).all()


def test_nothing_but_nan_gives_zeros(params, batch):
    def compute(params, batch):
        grads, found = per_example_grad(tied)(params, batch), {}
        for response in RESPONSES:
            tx = clip_per_example(1.0, response=response)
            first, state = aggregate(tx, grads, params)
            found[response] = first, tx.update(grads, state)[1].stats.examples
        return found

    ids, x = batch
    for response, (first, examples) in run(compute, params, (ids, x * np.nan)).items():
        assert not any(map(np.any, first.values())), response
        assert examples == (0, 0, 0, 0, -1, 2 * SIZE), response


def norms_of(grads):
    return np.sqrt(sum(np.sum(np.reshape(g, (SIZE, -1)) ** 2, 1) for g in grads.values()))


def test_statistics(params, grads):
    norms = norms_of(grads)
    tx = clip_per_example(20.0, name="mine")
    _, state = run(functools.partial(aggregate, tx), grads, params)
    stats = optaxclip.clip_stats(state)["mine"]
    seen = stats.examples
    expected = tuple(map(np.float32, (norms.mean(), np.median(norms), norms.max())))
    close(tuple(seen[:3]), expected, 1e-6)
    assert seen.clipped_fraction == np.float32(np.mean(norms > 20.0))
    assert seen.nonfinite_count == 0
    assert stats.pre_clip_norm == np.float32(norms.max())
    np.testing.assert_allclose(stats.post_clip_norm, 20.0, rtol=1e-6)
    assert (stats.count, stats.clipped_count, stats.threshold) == (1, 1, 20.0)


def test_statistics_leaf_by_leaf(params, grads):
    tx = clip_per_example(5.0, by="leaf")
    _, state = run(functools.partial(aggregate, tx), grads, params)
    groups = optaxclip.clip_stats(state)["clip_per_example"].groups
    assert groups.names == ("b", "scale", "table", "w")
    largest = [norms_of({k: grads[k]}).max() for k in groups.names]
    np.testing.assert_allclose(groups.pre_clip_norm, largest, rtol=1e-6)


def test_first_in_a_chain_inside_scan(params, batch):
    tx = optax.chain(clip_per_example(20.0), optax.adam(0.1))

    def train(params, batch):
        def step(carry, _):
            params, state = carry
            grads = per_example_grad(tied)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), ()

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    after, state = run(train, params, batch)
    assert isinstance(clip_per_example(1.0), optax.experimental.aggregating.Aggregator)
    assert optaxclip.clip_stats(state)["clip_per_example"].count == 3
    assert jax.tree.structure(after) == jax.tree.structure(params)


def test_other_leaves_and_low_precision():
    params = {"w": np.ones((2, 2), jnp.bfloat16), "n": np.arange(2), "e": np.zeros((0, 3))}

    def loss(p, x):
        return jnp.sum((x @ p["w"]) ** 2).astype(jnp.float32) * p["n"][1] + jnp.sum(p["e"])

    def step(params, x):
        grads = per_example_grad(loss)(params, x)
        updates, state = aggregate(clip_per_example(1.0), grads, params)
        return updates, state, optax.apply_updates(params, updates)

    updates, state, after = run(step, params, np.ones((3, 2), jnp.bfloat16))
    for tree in (updates, after):
        assert jax.tree.map(lambda u: (u.shape, u.dtype), tree) == jax.tree.map(
            lambda p: (p.shape, p.dtype), params
        )
    np.testing.assert_allclose(np.asarray(updates["w"], float), 0.5, rtol=1e-2)
    assert state.stats.examples.clipped_fraction == 1


def test_masked_zeroes_examples_whatever_they_hold(params, batch):
    (ids, x), keep = batch, np.array([True, False, True, True, False])

    def compute(params, x, bad):
        grads = [per_example_grad(tied)(params, (ids, values)) for values in (bad, x)]
        return materialize(masked(grads[0], jnp.asarray(keep))), materialize(grads[1])

    found, clean = run(compute, params, x, np.where(keep[:, None, None], x, np.nan))
    for part, whole in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        expected = whole.copy()
        expected[~keep] = 0
        np.testing.assert_allclose(part, expected, atol=1e-10)


@pytest.mark.parametrize("factored", [True, False])
def test_no_stack_of_factored_gradients(factored):
    """The arrays of the jaxpr show whether [B, *shape] is ever made."""
    params, x = np.ones((30, 40)), np.ones((6, 2, 30))
    fun = per_example_grad(_small_loss) if factored else jax.vmap(jax.grad(_small_loss), (None, 0))
    tx = clip_per_example(1.0)
    jaxpr = jax.make_jaxpr(lambda p, x: aggregate(tx, fun(p, x), p)[0])(params, x)
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
        ({"a": np.ones((3, 2)), "b": np.ones((2, 2))}, None, r"got shape \(2, 2\) at b and \(3,"),
        ({"a": np.ones((0, 2))}, None, r"number of examples >= 1 on the first axis, got shape"),
        (np.ones(()), None, r"got shape \(\) at the root"),
        ({}, None, "at least one leaf, got none"),
        ({"a": np.ones(2)}, {"a": np.ones(2)}, r"got \(\) at a, which is \(2,\)"),
        ({"a": np.ones((1, 2))}, {}, "the same leaves, got 1 and 0, and a in one of them alone"),
        (
            {"a": np.ones((1, 2))},
            {"a": np.ones(2), "b": {"c": np.ones(2)}},
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
def test_noise_scale_is_that_of_the_clipped_gradients(bound, params, grads):
    flat = np.concatenate([np.reshape(g, (SIZE, -1)) for g in grads.values()], 1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    expected = noise_scale(flat * np.minimum(1, bound / norms))
    assert expected > 0

    def compute(grads, params):
        return [
            aggregate(clip_per_example(bound, mean=mean), grads, params)[1].stats.examples
            for mean in ("batch", 3.0)
        ]

    for examples in run(compute, grads, params):
        np.testing.assert_allclose(examples.noise_scale, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, 2.0]] * 3, 0),
        ([[1.0, 0.0], [-1.0, 0.0]], np.finfo(np.float32).max),
        ([[1.0, 0.0]], -1),
    ],
)
def test_noise_scale_at_its_ends(rows, expected):
    tx = clip_per_example(10.0)
    _, state = run(functools.partial(aggregate, tx), np.array(rows))
    assert state.stats.examples.noise_scale == expected


def test_automatic_clipping_needs_no_bound_beside_the_learning_rate(params, batch):
    """AUTO-S with (lr, R) is that with (lr R, 1): exactly, as R is a power of two."""

    @quick_jit
    def train(learning_rate, bound, params, batch):
        tx = optax.chain(clip_per_example(bound, response="automatic"), optax.sgd(learning_rate))

        def step(carry, _):
            now, state = carry
            updates, state = tx.update(per_example_grad(tied)(now, batch), state, now)
            return (optax.apply_updates(now, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    numbers = (0.1, 4.0), (0.4, 1.0), (0.1, 1.0)
    one, same, other = (train(*given, params, batch) for given in numbers)
    for x, y in zip(*map(jax.tree.leaves, (one, same)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.any(np.asarray(one["w"]) != other["w"])


def test_nothing_but_padding_gives_zeros(params, batch):
    def compute(params, batch):
        grads = masked(per_example_grad(tied)(params, batch), jnp.zeros(SIZE, bool))
        found = {r: aggregate(clip_per_example(1.0, response=r), grads, params) for r in RESPONSES}
        return {r: (update, state.stats.examples) for r, (update, state) in found.items()}

    for response, (found, examples) in run(compute, params, batch).items():
        assert not any(map(np.any, found.values())), response
        assert examples == (0, 0, 0, 0, 0, 0), response
