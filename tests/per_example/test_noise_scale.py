"""`watch_noise_scale` against its formulas in float64, and against what it estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick

import optaxclip
from optaxclip.per_example import per_example_grad

B, STEPS = 8, 5
PARAMS = {"b": np.zeros(3, np.float32), "w": np.zeros((4, 3), np.float32)}


def stacked(seed, size=B):
    """Gradients of a few examples, noisier in one leaf than in the other."""
    rng = np.random.default_rng(seed)
    scales = {"b": 3.0, "w": 0.7}
    return {
        k: np.float32(0.5 + scales[k] * rng.standard_normal((size, *x.shape)))
        for k, x in PARAMS.items()
    }


def estimates(grads):
    """`tr(S)`, a variance by its definition, and `|G|^2`, what is left of the mean's square."""
    g = np.float64(grads).reshape(len(grads), -1)
    variance = np.sum(np.var(g, axis=0, ddof=1))
    return np.array([variance, np.sum(g.mean(0) ** 2) - variance / len(g)])


def averaged(terms, decay):
    """Of rows of terms, with the weights of a moving average that add up to one."""
    weights = (1 - decay) * decay ** np.arange(len(terms))[::-1]
    return weights @ np.array(terms) / weights.sum()


def scanned(tx, grads, **extra):
    """The last state after a row of steps."""

    def run(grads, extra):
        def step(state, row):
            updates, state = tx.update(row[0], state, PARAMS, **row[1])
            return state, jax.tree.map(lambda x: jnp.sum(x), updates)

        return jax.lax.scan(step, tx.init(PARAMS), (grads, extra))[0]

    return quick.run(run, grads, extra)


def steps_of(seeds):
    return jax.tree.map(lambda *x: np.stack(x), *[stacked(s) for s in seeds])


def test_moving_averages_of_numerator_and_denominator_apart():
    grads = steps_of(range(STEPS))
    state = scanned(optaxclip.watch_noise_scale(0.8), grads)
    by_leaf = {k: averaged([estimates(x) for x in grads[k]], 0.8) for k in ("b", "w")}
    for k, (noise, signal) in by_leaf.items():
        np.testing.assert_allclose(state.by_leaf[k], noise / signal, rtol=1e-5, err_msg=k)
    noise, signal = sum(by_leaf.values())
    found = optaxclip.clip_scalars(state)
    assert found == {
        "noise/noise_scale": pytest.approx(noise / signal, rel=1e-5),
        "noise/noise": pytest.approx(noise, rel=1e-5),
        "noise/signal": pytest.approx(signal, rel=1e-5),
        "noise/noise_scale/b": pytest.approx(by_leaf["b"][0] / by_leaf["b"][1], rel=1e-5),
        "noise/noise_scale/w": pytest.approx(by_leaf["w"][0] / by_leaf["w"][1], rel=1e-5),
    }


def test_norms_alone_tell_the_same():
    grads = steps_of(range(STEPS))
    means = jax.tree.map(lambda x: x.mean(1), grads)
    norms = np.sqrt(
        sum(np.sum(np.float64(x) ** 2, tuple(range(2, x.ndim))) for x in grads.values())
    )
    make = functools.partial(optaxclip.watch_noise_scale, 0.8, by="global", name="gns")
    of_norms = scanned(make(), means, example_norms=np.float32(norms))
    of_examples = scanned(make(), grads)
    noise, signal = averaged(
        [
            estimates(np.concatenate([x[t].reshape(B, -1) for x in grads.values()], 1))
            for t in range(STEPS)
        ],
        0.8,
    )
    for state in (of_norms, of_examples):
        np.testing.assert_allclose(state.noise_scale, noise / signal, rtol=1e-4)
        assert set(optaxclip.clip_scalars(state)) == {"gns/noise_scale", "gns/noise", "gns/signal"}


def test_the_ratio_of_means_finds_the_truth_which_the_mean_of_ratios_misses():
    """Batches of 4, where the noise of one is 20 times the gradient."""
    rng = np.random.default_rng(0)
    truth = np.full(20, 0.2)  # |G|^2 = 0.8
    noise = np.sqrt(16 / 20)  # tr(S) = 16
    grads = np.float32(truth + noise * rng.standard_normal((4000, 4, 20)))

    def run(grads):
        tx, clip = optaxclip.watch_noise_scale(0.9995), optaxclip.clip_per_example(np.inf)
        both = optax.chain(tx, clip)

        def step(state, g):
            _, state = both.update(g, state, jnp.zeros(20))
            return state, optaxclip.clip_stats(state)["clip_per_example"].examples.noise_scale

        state, ratios = jax.lax.scan(step, both.init(jnp.zeros(20)), grads)
        return state[0], ratios

    state, ratios = quick.run(run, grads)
    np.testing.assert_allclose(state.noise_scale, 20, rtol=0.1)
    ratios = np.minimum(ratios, 1e6)
    assert not 10 < np.mean(ratios) < 40
    assert np.mean(ratios == 1e6) > 0.2  # lost in the noise


def test_factored_gradients_masked_leaves_and_what_is_left_out():
    rng = np.random.default_rng(0)
    params = {"w": np.float32(rng.standard_normal((3, 2))), "scale": np.ones(3, np.float32)}
    x = np.float32(rng.standard_normal((B, 5, 3)))
    loss = lambda p, x: jnp.sum(jnp.tanh(x * p["scale"] @ p["w"]) ** 2)
    tx = optaxclip.watch_noise_scale(exclude=lambda path, leaf: path != "scale")

    def run(params, x):
        grads = per_example_grad(loss)(params, x)
        updates, state = tx.update(grads, tx.init(params), params)
        assert updates is grads
        return state, jax.vmap(jax.grad(loss), (None, 0))(params, x)

    state, grads = quick.run(run, params, x)
    noise, signal = estimates(grads["scale"])
    assert list(state.by_leaf) == ["scale"]
    np.testing.assert_allclose(state.noise_scale, noise / signal, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_is_left_out(bad):
    grads = stacked(0)
    without = {k: x[1:] for k, x in grads.items()}
    grads["w"][0, 0, 0] = bad
    tx = optaxclip.watch_noise_scale()

    def run(grads, without):
        return [tx.update(g, tx.init(PARAMS), PARAMS)[1] for g in (grads, without)]

    found, expected = quick.run(run, grads, without)
    for k in PARAMS:
        np.testing.assert_allclose(found.by_leaf[k], expected.by_leaf[k], rtol=1e-5)


def test_a_step_that_tells_nothing_leaves_the_state():
    tx = optaxclip.watch_noise_scale()
    nothing = jax.tree.map(lambda x: np.where(np.arange(B) > 0, np.nan, x.T).T, stacked(1))
    of_norms = optaxclip.watch_noise_scale(by="global")

    def run(grads, nothing):
        before = tx.update(grads, tx.init(PARAMS), PARAMS)[1]
        norms = jnp.asarray([1.0, jnp.nan])
        mean = jax.tree.map(lambda x: x[0], grads)
        fresh = of_norms.init(PARAMS)
        after = of_norms.update(mean, fresh, PARAMS, example_norms=norms)[1]
        return before, tx.update(nothing, before, PARAMS)[1], fresh, after

    before, after, fresh, still = quick.run(run, stacked(0), nothing)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    jax.tree.map(np.testing.assert_array_equal, fresh, still)
    assert fresh.noise_scale == still.noise_scale == fresh.by_leaf["global"] == -1


def test_bfloat16_is_added_in_float32():
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), stacked(0, 64))
    tx = optaxclip.watch_noise_scale()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    state = quick.run(lambda g: tx.update(g, tx.init(params), params)[1], grads)
    for k in PARAMS:
        noise, signal = estimates(np.asarray(grads[k], np.float64))
        np.testing.assert_allclose(state.by_leaf[k], noise / signal, rtol=1e-4)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state))


def test_complex_gradients_count_with_their_modulus_by_norms_alone():
    rng = np.random.default_rng(0)
    z = np.complex64(1 + rng.standard_normal((B, 4)) + 1j * rng.standard_normal((B, 4)))
    params, norms = np.zeros(4, np.complex64), np.linalg.norm(z, axis=1)
    tx = optaxclip.watch_noise_scale(by="global")
    _, state = tx.update(z.mean(0), tx.init(params), params, example_norms=norms)
    noise, signal = estimates(np.stack([z.real, z.imag], -1))
    np.testing.assert_allclose(state.noise_scale, noise / signal, rtol=1e-4)
    with pytest.raises(ValueError, match=r"must be real, got complex ones\. Pass their mean and"):
        tx.update(z, tx.init(params), params)


def test_extremes():
    """No noise is 0; noise without a gradient the largest float; both nothing 0; one leaf alone."""
    tx = optaxclip.watch_noise_scale()
    cases = {
        "none": (np.ones((2, 2)), 0),
        "all": (np.array([[1.0, 0.0], [-1.0, 0.0]]), np.finfo(np.float32).max),
        "zero": (np.zeros((2, 2)), 0),
    }
    for name, (grads, expected) in cases.items():
        _, state = tx.update(np.float32(grads), tx.init(jnp.zeros(2)), jnp.zeros(2))
        assert state.noise_scale == expected, name


def test_norms_that_cannot_be_of_this_mean_show():
    """A sum for a mean is longer than any example."""
    tx = optaxclip.watch_noise_scale(by="global")
    grads = np.float32(np.random.default_rng(0).standard_normal((B, 3)) + 2)
    norms = np.linalg.norm(grads, axis=1)
    params = jnp.zeros(3)
    _, good = tx.update(grads.mean(0), tx.init(params), params, example_norms=norms)
    _, bad = tx.update(grads.sum(0), tx.init(params), params, example_norms=norms)
    assert good.noise_scale > 0
    assert np.isnan(bad.noise_scale)


def test_errors():
    tx, whole = optaxclip.watch_noise_scale(), optaxclip.watch_noise_scale(by="global")
    grads = stacked(0)
    mean = jax.tree.map(lambda x: x.mean(0), grads)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs params, which tell .*got None\. Call tx\.update"):
        tx.update(grads, state)
    with pytest.raises(ValueError, match=r"one number of examples"):
        tx.update(mean, state, PARAMS)
    with pytest.raises(ValueError, match=r"needs two examples, got one"):
        tx.update(stacked(0, 1), state, PARAMS)
    with pytest.raises(ValueError, match=r"got them for by='leaf'\. Pass by='global'"):
        tx.update(mean, state, PARAMS, example_norms=np.ones(B))
    with pytest.raises(ValueError, match=r"one real number an example, got float32\[8, 1\]\. Pass"):
        whole.update(mean, whole.init(PARAMS), PARAMS, example_norms=np.ones((B, 1), np.float32))
    with pytest.raises(ValueError, match=r"needs two examples, got one"):
        whole.update(mean, whole.init(PARAMS), PARAMS, example_norms=np.ones(1, np.float32))
    with pytest.raises(ValueError, match=r"shaped like its parameter"):
        whole.update(grads, whole.init(PARAMS), PARAMS, example_norms=np.ones(B, np.float32))
    with pytest.raises(ValueError, match=r"unknown by, got 'unit'"):
        optaxclip.watch_noise_scale(by="unit")
    with pytest.raises(ValueError, match=r"exclude that is true for every leaf\. Leave some in"):
        optaxclip.watch_noise_scale(exclude=lambda path, leaf: True).init(PARAMS)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        optaxclip.watch_noise_scale(1)
    with pytest.raises(ValueError, match=r"init saw, got 2 for 1, and b differs\. Call"):
        tx.update(grads, tx.init({"w": PARAMS["w"]}), PARAMS)


def test_types_stay_and_a_tree_without_leaves_is_fine():
    with jax.enable_x64(True):
        tx = optaxclip.watch_noise_scale(np.float64(0.9))
        params = {k: np.float64(x) for k, x in PARAMS.items()}
        grads = {k: np.float64(x) for k, x in stacked(0).items()}
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, grads, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    state = tx.init({})
    assert tx.update({}, state, {}) == ({}, state)
    assert optaxclip.clip_scalars(state) == {}
    assert state.noise_scale == -1
