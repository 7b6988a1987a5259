"""Errors name argument, shape and remedy."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import normal

from optaxclip.per_example import per_example_grad

X = np.ones((4, 3))
P = np.ones(3)


def scalar(params, batch):
    return jnp.sum(batch * params)


LOSSES = {
    "a vector": (lambda p, x: x * p, ValueError, r"scalar, got float\d+\[3\]. It saw one example"),
    "two values": (lambda p, x: (p.sum(), 1.0), ValueError, r"float, or .*has_aux|has_aux=True"),
    "nothing": (lambda p, x: None, ValueError, "a scalar, got None"),
    "an index": (lambda p, x: jnp.argmax(x * p), TypeError, "loss, got dtype int.*astype"),
    "complex": (lambda p, x: jnp.sum(x * p) * 1j, TypeError, "loss, got dtype complex"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    fun, error, message = LOSSES[name]
    with pytest.raises(error, match=message):
        per_example_grad(fun)(P, X)


def test_losses_of_a_batch_of_one():
    with pytest.raises(ValueError, match=r"float\d+\[1\]. It saw a batch of one.*jnp.mean"):
        per_example_grad(lambda p, x: x @ p, keep_batch_dim=True)(P, X)


def test_aux():
    with pytest.raises(TypeError, match=r"must return \(loss, aux\), got float\d+\[\]. Return"):
        per_example_grad(scalar, has_aux=True)(P, X)


def expects_a_batch(params, batch):
    x, y = batch["x"], batch["y"]
    return jnp.mean((jnp.einsum("bi,i->b", x, params) - y) ** 2)


def test_errors_inside_the_loss_tell_what_it_saw():
    batch = {"x": X, "y": np.ones(4)}
    with pytest.raises(ValueError, match=r"einsum|Einstein") as caught:
        per_example_grad(expects_a_batch)(P, batch)
    note = caught.value.__notes__[0]
    assert re.search(r"float\d+\[3\] at batch/x, float\d+\[\] at batch/y", note)
    assert "expects a batch axis there, pass keep_batch_dim=True" in note
    per_example_grad(expects_a_batch, keep_batch_dim=True)(P, batch)


def test_errors_inside_the_loss_of_a_batch_of_one():
    with pytest.raises(TypeError) as caught:
        per_example_grad(lambda p, x: jnp.dot(normal(0, 3, 2), x * p)[0], keep_batch_dim=True)(P, X)
    assert "expects no batch axis there, pass keep_batch_dim=False" in caught.value.__notes__[0]


BATCHES = {
    "sizes": ((X, np.ones(5)), r"sizes must agree, got \(5,\) at batch/1 and \(4, 3\) at batch/0"),
    "empty": ({"x": X[:0]}, r"empty, got \(0, 3\) at batch/x. Skip"),
    "scalar": ({"x": 1.0}, "a scalar at batch/x. Repeat it"),
    "no arrays": ({}, "at least one array, got none in batch"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    batch, message = BATCHES[name]
    with pytest.raises(ValueError, match=message):
        per_example_grad(scalar)(P, batch)


def test_sizes_of_two_arguments():
    with pytest.raises(ValueError, match=r"got \(2,\) at y and \(4, 3\) at x. Give"):
        per_example_grad(lambda p, x, y: 0.0, batch_argnums=(1, 2))(P, X, np.ones(2))


PARAMS = {
    "no arrays": ({}, ValueError, "at least one array, got none in params. Pass"),
    "integers": ({"n": np.arange(3)}, TypeError, r"got int\d+\[3\] at params/n. Convert"),
    "an integer": (3, TypeError, "floating-point array, got int at params. Convert"),
    "complex": (
        {"a": P, "z": X.astype(complex)}, TypeError, r"complex\d+\[4, 3\] at params/z. Pass the"
    ),
    "a string": ({"a": P, "name": "x"}, TypeError, "arrays, got str at params/name. Keep"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_params(name):
    params, error, message = PARAMS[name]
    with pytest.raises(error, match=message):
        per_example_grad(scalar)(params, X)


def squared(params, x, y):
    return jnp.sum((x @ params - y) ** 2)


@pytest.mark.parametrize("y", [np.ones(4), {"a": np.ones((4, 2)), "b": np.ones(4)}])
def test_rows_that_all_examples_share_are_warned_of(y):
    loss = lambda p, x, y: squared(p, x, y["b"] if isinstance(y, dict) else y)
    with pytest.warns(UserWarning, match=r"y \(4,.*pass batch_argnums=\(1, 2\)"):
        per_example_grad(loss)(P, X, y)


@pytest.mark.parametrize(
    "shared",
    [1.0, np.ones(3), np.ones((1, 4)), {"a": np.ones(4), "b": np.ones(2)},
     np.zeros((4, 2), np.uint32), "sum"],
    ids=["number", "other rows", "one row", "one of two", "keys", "word"],
)  # fmt: skip
def test_what_does_not_look_like_the_examples_is_shared_without_a_word(shared):
    per_example_grad(lambda p, x, shared: scalar(p, x))(P, X, shared)


def test_rows_that_are_bound_first_are_meant():
    per_example_grad(lambda p, x: squared(p, x, np.ones(4)))(P, X)
