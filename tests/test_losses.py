"""PHuber: its formula, and the two exact checks of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import phuber_cross_entropy


def oracle(logits, label, tau):
    p = np.exp(logits - logits.max())
    p = (p / p.sum())[label]
    return -np.log(p) if p > 1 / tau else -tau * p + np.log(tau) + 1


@pytest.mark.parametrize("tau", [1.5, 2.0, 10.0])
def test_equals_the_formula(tau):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    expected = np.array([oracle(x, y, tau) for x, y in zip(logits, labels, strict=True)])
    found = jax.jit(phuber_cross_entropy)(logits, labels, tau)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    reshaped = phuber_cross_entropy(logits.reshape(5, 10, 4), labels.reshape(5, 10), tau)
    np.testing.assert_allclose(reshaped, expected.reshape(5, 10), rtol=2e-5)


def test_value_and_slope_are_continuous_and_the_slope_is_bounded():
    z = np.linspace(-8, 8, 20_001, dtype=np.float32)
    loss = lambda z: phuber_cross_entropy(jnp.stack([z, 0.0 * z]), jnp.array(0), 3.0)
    value, slope = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(loss)))(z))
    assert np.max(np.abs(np.diff(value))) < 1e-3
    assert np.max(np.abs(np.diff(slope))) < 1e-3
    p = 1 / (1 + np.exp(-z.astype(float)))
    by_p = np.abs(slope / (p * (1 - p)))[(p > 1e-3) & (p < 0.999)]
    assert 2.999 < np.max(by_p) < 3.001


def test_extreme_logits_have_finite_values_and_slopes():
    logits = np.float32([[0.0, 1e30], [0.0, -1e30], [-np.inf, 0.0]])
    value_and_slope = jax.jit(jax.vmap(jax.value_and_grad(phuber_cross_entropy)))
    value, slope = value_and_slope(logits, np.zeros(3, np.int32))
    np.testing.assert_allclose(value, [np.log(2) + 1, 0, np.log(2) + 1], atol=1e-6)
    assert np.all(np.isfinite(slope))


def test_an_infinite_tau_is_cross_entropy():
    logits = np.float32([[0.0, 50.0], [3.0, 1.0], [-np.inf, 0.0]])
    labels = np.array([0, 1, 1])

    def ours(logits, tau):
        return jnp.sum(phuber_cross_entropy(logits, labels, tau))

    def cross_entropy(logits):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit
    def values_and_slopes(logits, traced):
        found = [jax.value_and_grad(ours)(logits, tau) for tau in (np.inf, traced)]
        return found, jax.value_and_grad(cross_entropy)(logits)

    found, expected = values_and_slopes(logits, np.inf)
    for value, slope in found:
        np.testing.assert_allclose(value, expected[0])
        np.testing.assert_allclose(slope, expected[1], atol=1e-7)


def test_labels_out_of_range_are_as_the_docstring_says():
    logits = np.float32([[1.0, 2.0, 3.0]] * 3)
    above, below, last = jax.jit(phuber_cross_entropy)(logits, np.array([3, -1, 2]))
    assert np.isnan(above)
    assert below == last


def huberised(margin, tau):
    """The logistic loss with its slope bounded by tau: linear beyond."""
    corner = jnp.log((1 - tau) / tau)
    linear = jnp.log1p(jnp.exp(-corner)) + tau * (corner - margin)
    return jnp.where(margin > corner, jax.nn.softplus(-margin), linear)


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.6])
def test_clipping_logistic_gradients_is_the_gradient_of_the_huberised_loss(tau):
    """For a linear model and inputs of norm 1."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 5))
    x = np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
    y, w = np.float32(rng.choice([-1.0, 1.0], 40)), np.float32(2 * rng.standard_normal(5))
    logistic = lambda w, e: jax.nn.softplus(-e[1] * (e[0] @ w))
    tx = optaxclip.clip_per_example(tau)

    @jax.jit
    def both(w):
        grads = optaxclip.per_example_grad(logistic)(w, (x, y))
        expected = jax.grad(lambda w: jnp.mean(huberised(y * (x @ w), tau)))(w)
        return tx.update(grads, tx.init(w)), expected

    (clipped, state), expected = both(w)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-7)
    assert 0 < state.stats.examples.clipped_fraction < 1


def long_servedio(rng, number, noise):
    """Six Gaussians of variance 1e-4; half of the points lie where noise turns a convex loss."""
    gamma = 1 / 24
    means = np.array([[1, 0], [gamma, 5 * gamma], [gamma, -gamma]])
    which = rng.choice(3, size=number, p=[0.25, 0.25, 0.5])
    label = rng.choice([-1.0, 1.0], size=number)
    x = label[:, None] * means[which] + 0.01 * rng.standard_normal((number, 2))
    flipped = np.where(rng.random(number) < noise, -1, 1)
    return x.astype(np.float32), (flipped * label).astype(np.float32), label


def accuracy(loss, trials=60, steps=500):
    """Of linear models fitted to noisy samples, on clean ones: mean over trials, in percent."""
    rng = np.random.default_rng(0)
    train = [long_servedio(rng, 1000, 0.2) for _ in range(trials)]
    test = [long_servedio(rng, 500, 0.0) for _ in range(trials)]
    tx = optax.adam(optax.cosine_decay_schedule(0.5, steps))

    def fit(x, y):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(lambda w: loss(y * (x @ w)).mean())(w), state)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.zeros(2)
        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]

    w = jax.jit(jax.vmap(fit))(*(np.stack([t[i] for t in train]) for i in (0, 1)))
    right = [np.sign(x @ v) == label for (x, _, label), v in zip(test, np.asarray(w), strict=True)]
    return 100 * np.mean(right)


def phuber(margin):
    logits = jnp.stack([margin, jnp.zeros_like(margin)], axis=-1)
    return phuber_cross_entropy(logits, jnp.zeros(margin.shape, jnp.int32), 2.0)


def test_long_servedio():
    """Published: logistic 52.8 %, Huberised 50.5 %, PHuber 100 %; a standard error is 0.8 %."""
    assert accuracy(lambda m: jax.nn.softplus(-m)) == pytest.approx(52.8, abs=2.5)
    assert accuracy(lambda m: huberised(m, 0.25)) == pytest.approx(50.5, abs=2.5)
    assert accuracy(phuber) > 99.9


@pytest.mark.parametrize(
    ("logits", "labels", "tau", "error", "message"),
    [
        (np.ones((2, 3)), np.ones(2, int), 1.0, ValueError, "tau must be > 1, got 1.0"),
        (np.ones((2, 3)), np.ones(3, int), 2.0, ValueError, r"got shapes \(2, 3\) and \(3,\)"),
        (np.ones(()), np.ones((), int), 2.0, ValueError, r"got shapes \(\) and \(\)"),
        (np.ones((2, 3)), np.ones(2), 2.0, TypeError, "labels must be integers, got dtype"),
    ],
)
def test_arguments_are_checked(logits, labels, tau, error, message):
    with pytest.raises(error, match=message):
        phuber_cross_entropy(logits, labels, tau)
