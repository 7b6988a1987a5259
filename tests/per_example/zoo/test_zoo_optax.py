"""Optax: losses with dynamic programs and projections in them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from tools.agreement import normal
from tools.zoo_check import check


def parameters(classes):
    return {"w": normal(1, 3, classes), "b": normal(2, classes)}


def test_ctc():
    """Labels of different lengths; a loop over the frames."""
    labels = jnp.array([[1, 2, 2], [3, 1, 0], [2, 0, 0]])
    label_padding = jnp.array([[0.0, 0, 0], [0, 0, 1], [0, 1, 1]])
    frame_padding = jnp.zeros((3, 6)).at[1, 5].set(1.0)

    def loss(params, example):
        x, frame_padding, labels, label_padding = example
        logits = x @ params["w"] + params["b"]
        each = optax.ctc_loss(logits[None], frame_padding[None], labels[None], label_padding[None])
        return each[0]

    check(
        loss,
        parameters(4),
        (normal(0, 3, 6, 3), frame_padding, labels, label_padding),
        clipped=True,
    )


LOSSES = {
    "focal": lambda y, t: optax.losses.sigmoid_focal_loss(y, jax.nn.one_hot(t, 4)).sum(),
    "sparsemax": lambda y, t: optax.losses.multiclass_sparsemax_loss(y[None], t[None])[0],
    "poly": lambda y, t: optax.losses.poly_loss_cross_entropy(y, jax.nn.one_hot(t, 4)),
    "ranking": lambda y, t: optax.losses.ranking_softmax_loss(y, jax.nn.one_hot(t, 4)),
    "huber": lambda y, t: optax.losses.huber_loss(y, jax.nn.one_hot(t, 4)).sum(),
    "simplex": lambda y, t: optax.projections.projection_simplex(y)[t],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    def loss(params, example):
        x, target = example
        return LOSSES[name](jnp.tanh(x @ params["w"] + params["b"]), target)

    data = normal(0, 3, 3), jnp.array([0, 3, 1])
    check(loss, parameters(4), data)


def test_triplets():
    def loss(params, example):
        anchor, positive, negative = (jnp.tanh(x @ params["w"] + params["b"]) for x in example)
        return optax.losses.triplet_margin_loss(anchor, positive, negative)

    check(loss, parameters(4), tuple(normal(i, 3, 3) for i in range(3)))


def test_perturbed_argmax():
    """A linear program smoothed by noise, whose gradient is a rule of its own."""
    argmax = lambda y: jax.nn.one_hot(jnp.argmax(y), 4)
    smooth = optax.perturbations.make_perturbed_fun(argmax, num_samples=5, sigma=0.5)

    def loss(params, example):
        x, target = example
        return jnp.sum((smooth(jax.random.key(0), x @ params["w"] + params["b"]) - target) ** 2)

    check(loss, parameters(4), (normal(0, 3, 3), jax.nn.one_hot(jnp.array([0, 3, 1]), 4)))


def test_unrolled_training():
    """The loss after steps of an optimizer that starts from the parameters: meta-learning."""
    inner = optax.adam(0.1)

    def loss(params, example):
        x, y = example

        def fit(params, x, y):
            return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)

        state = inner.init(params)
        for _ in range(2):
            updates, state = inner.update(jax.grad(fit)(params, x[:3], y[:3]), state)
            params = optax.apply_updates(params, updates)
        return fit(params, x[3:], y[3:])

    check(loss, parameters(2), (normal(0, 3, 5, 3), normal(1, 3, 5, 2)))
