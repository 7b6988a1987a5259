"""Per-example gradients in use: compiled training loops with donated parameters, library losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal, stacked_grads
from tools.quick import quick_jit, run

from optaxclip import clip_per_example
from optaxclip.per_example import per_example_grad, reweighted_grad, sq_norms, weighted_sum

X, Y = normal(0, 6, 4), np.array([0, 1, 2, 0, 1, 2])
PARAMS = {"w": normal(1, 4, 3), "b": normal(2, 3)}


def loss(params, example):
    x, label = example
    logits = x @ params["w"] + params["b"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)


def weights(squares):
    return jnp.minimum(1.0, 0.5 / jnp.sqrt(squares))


def oracle_step(params, batch):
    grads = stacked_grads(loss, params, batch)
    squares = sum(jnp.sum(g**2, axis=range(1, g.ndim)) for g in jax.tree.leaves(grads))
    return jax.tree.map(lambda p, g: p - 0.1 * jnp.tensordot(weights(squares), g, 1), params, grads)


def factored_step(params, batch):
    grads = per_example_grad(loss)(params, batch)
    update = weighted_sum(grads, weights(sq_norms(grads)))
    return jax.tree.map(lambda p, u: p - 0.1 * u, params, update)


def reweighted_step(params, batch):
    update = reweighted_grad(loss, weights)(params, batch).grads
    return jax.tree.map(lambda p, u: p - 0.1 * u, params, update)


@pytest.mark.parametrize("step", [factored_step, reweighted_step])
def test_a_scanned_training_loop_with_donated_parameters(step):
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1], np.roll(x, 2, axis=0)]), (X, Y))

    def train(step, params):
        return lax.scan(lambda p, batch: (step(p, batch), None), params, batches)[0]

    expected = quick_jit(train, static_argnums=0)(oracle_step, PARAMS)
    donated = jax.device_put(PARAMS, may_alias=False)
    found = quick_jit(train, static_argnums=0, donate_argnums=1)(step, donated)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(
    "last",
    [
        lambda z, y: jnp.sum(jax.nn.softplus(z)),
        lambda z, y: jax.nn.logsumexp(z) - z[y],
        lambda z, y: jnp.sum(optax.losses.huber_loss(jax.nn.silu(z))),
        lambda z, y: optax.losses.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 3)).sum(),
        lambda z, y: jnp.sum(jax.nn.relu6(z) ** 2),
    ],
    ids=["softplus", "logsumexp", "huber", "sigmoid", "relu6"],
)
def test_functions_with_derivative_rules_of_their_own_are_no_fallback(last):
    """Also of a parameter alone: `softplus(b)` is known before the example is."""

    def fun(params, example):
        x, label = example
        return last(x @ params["w"] * jax.nn.softplus(params["b"]), label)

    assert_equals_oracle(fun, PARAMS, (X, Y), fallbacks=())


@pytest.mark.parametrize("k", [2, 3])
def test_accumulating_clipped_micro_batches_equals_one_step_of_the_whole(k):
    """The README's recipe: the aggregator in front of the accumulation."""

    def tx(every):
        adam = optax.MultiSteps(optax.adam(0.1), every).gradient_transformation()
        return optax.chain(clip_per_example(0.5), adam)

    def train(tx, params, batches):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(per_example_grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), batches)[0][0]

    def both(params, whole, parts):
        return train(tx(k), params, parts), train(tx(1), params, whole)

    whole = X[None], Y[None]
    parts = tuple(np.stack([x[i::k] for i in range(k)]) for x in (X, Y))
    found, expected = run(both, jax.tree.map(jnp.asarray, PARAMS), whole, parts)
    for a, b, start in zip(*map(jax.tree.leaves, (found, expected, PARAMS)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
        assert np.any(b != start)
