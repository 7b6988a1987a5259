"""The tracker of a quantile of the norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.quick import run

import optaxclip
from optaxclip import clip_per_example
from optaxclip.per_example import example_quantile

B = 100


def stream(steps, groups=1, seed=0):
    """Log-normal norms [steps, groups, B] that rise threefold half-way."""
    rng = np.random.default_rng(seed)
    level = np.where(np.arange(steps) < steps // 2, 1.0, 3.0)[:, None, None]
    return level * np.exp(0.5 * rng.standard_normal((steps, groups, B)))


def follow(threshold, norms, by="leaf"):
    """The bounds [steps, groups] and the shares of examples within them."""
    tx = clip_per_example(threshold, by=by)
    names = [f"g{i}" for i in range(norms.shape[1])]
    params = {name: np.zeros(1) for name in names}

    def step(state, n):
        _, new = tx.update({k: n[i][:, None] for i, k in enumerate(names)}, state, params)
        return new, state.threshold_state.bounds

    state, bounds = run(lambda norms: jax.lax.scan(step, tx.init(params), norms), norms)
    return state, bounds, np.mean(norms <= bounds[:, :, None], axis=2)


def oracle(norms, q, eta, start):
    c, bounds = start, []
    for n in norms:
        bounds.append(c)
        c = c * np.exp(-eta * (np.mean(n <= c) - q))
    return np.array(bounds)


@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_reaches_its_rate(q, noise):
    """In the last quarter, each level having lasted 200 steps."""
    noisy = {"noise": noise, "key": jax.random.key(0)} if noise else {}
    _, _, shares = follow(example_quantile(q, init=0.5, **noisy), stream(400))
    assert abs(shares[-100:].mean() - q) < 0.02
    assert abs(shares[100:200].mean() - q) < 0.02
    assert abs(shares[0].mean() - q) > 0.3, "the test would pass without tracking"


def test_is_the_formula_group_by_group():
    norms = stream(30, groups=2)
    norms[:, 1] *= 5
    _, bounds, _ = follow(example_quantile(0.3, step_size=0.4, init=2.0), norms)
    for i in range(2):
        np.testing.assert_allclose(bounds[:, i], oracle(norms[:, i], 0.3, 0.4, 2.0), rtol=1e-5)
    state, whole, _ = follow(example_quantile(0.3, init=2.0), norms, by="global")
    together = np.sqrt((norms**2).sum(1))
    np.testing.assert_allclose(whole[:, 0], oracle(together, 0.3, 0.2, 2.0), rtol=1e-5)
    assert optaxclip.clip_stats(state)["clip_per_example"].threshold == whole[-1, 0]


def test_examples_that_are_not_finite_do_not_count():
    norms = stream(20, groups=2)
    bad = norms.copy()
    bad[:, 0, :7] = np.nan  # in one of two groups
    _, bounds, _ = follow(example_quantile(0.5), bad)
    _, expected, _ = follow(example_quantile(0.5), norms[:, :, 7:])
    np.testing.assert_allclose(bounds, expected, rtol=1e-6)
    bad[:] = np.inf
    _, bounds, _ = follow(example_quantile(0.5), bad)
    assert np.all(bounds == np.float32(0.1))


def test_noise_is_that_of_the_count_over_the_batch_size():
    """`log(C_1 / C_0)` is `-eta (share - q)`, noise included: over seeds its moments show."""
    norms = stream(2)

    def moved(seed):
        threshold = example_quantile(
            0.5, step_size=1.0, init=1.0, noise=3.0, key=jax.random.key(seed), batch_size=50.0
        )
        tx = clip_per_example(threshold)
        state = tx.init(jnp.zeros(1))
        state = tx.update(jnp.asarray(norms[0, 0])[:, None], state)[1]
        return jnp.log(state.threshold_state.bounds[0])

    found = run(jax.vmap(moved), np.arange(2000))
    inside = np.sum(norms[0] <= 1.0) / 50
    np.testing.assert_allclose(found.mean(), -(inside - 0.5), atol=4 * 0.06 / 2000**0.5)
    np.testing.assert_allclose(found.std(), 3.0 / 50, rtol=0.08)


def test_noise_differs_from_step_to_step_and_key_to_key():
    runs = [
        follow(
            example_quantile(0.5, init=1.0, noise=9.0, key=jax.random.key(k)), np.ones((4, 1, B))
        )
        for k in (0, 0, 1)
    ]
    first, again, other = (bounds[:, 0] for _, bounds, _ in runs)
    np.testing.assert_array_equal(first, again)
    assert first[1] != other[1]
    assert len(set(np.round(np.diff(np.log(first)), 4))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantile": 1.5}, r"quantile must be in \[0, 1\], got 1.5"),
        ({"step_size": -1.0}, "step_size must be >= 0, got -1.0"),
        ({"init": 0.0}, "init must be > 0 and finite, got 0.0"),
        ({"noise": 1.0}, "noise and key go together, got noise=1.0 and key=None"),
        ({"key": "k"}, "noise and key go together, got noise=0.0 and key=k"),
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        example_quantile(**arguments)


def test_only_norms_of_examples_will_do():
    def update(tx, grads):
        return jax.eval_shape(lambda grads: tx.update(grads, tx.init(np.ones(2))), grads)

    tx = optaxclip.clip_by_global_norm(example_quantile())
    with pytest.raises(ValueError, match="needs the norms of several examples"):
        update(tx, np.ones(2))
    from optaxclip.thresholds.learned import Learned
    from optaxclip.thresholds.rules import Quantile

    tx = clip_per_example(Learned(Quantile(0.5, 0.1, 1.0), 25, None, ready=True))
    with pytest.raises(ValueError, match="needs one norm a step, got 4"):
        update(tx, np.ones((4, 2)))
