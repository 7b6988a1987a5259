"""Norms and contributions in float32 where the uses of a weight cancel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools.agreement import normal
from tools.quick import run

from optaxclip.per_example import clipped_grad, per_example_norms, sq_norms
from optaxclip.per_example.forms.forms import Outer
from optaxclip.per_example.forms.layout import Layout

B = 6


@pytest.fixture(autouse=True)
def _single():
    with jax.enable_x64(False):
        yield


def near(x, distance, seed):
    return x + distance * normal(seed, *x.shape)


LONG, SIGNS = 1000 * normal(0, B, 32), np.where(np.arange(8) % 2 == 0, 1.0, -1.0)
TABLE = {"e": normal(8, 12, 8)}


def tied(p, example):
    ids, c = example
    return 1e3 * (jnp.sum(p["e"][ids[0]] * c) - (p["e"] @ (c * 1.0001))[ids[0]])


def recurrence(p, xs):
    ys = lax.scan(lambda h, x: (h, x @ p["w"]), 0.0, xs)[1]
    return jnp.sum(ys * SIGNS[:, None] * jnp.arange(1.0, 9.0))


# name: (loss, parameters, batch)
CASES = {
    "two calls": (
        lambda p, e: (e[0] @ p["w"]) @ e[2] - (e[1] @ p["w"]) @ e[2],
        {"w": normal(1, 32, 16) / 6},
        (LONG, near(LONG, 0.3, 2), normal(3, B, 16)),
    ),
    "rows with opposite signs": (
        lambda p, e: jnp.sum(jnp.array([[1.0], [-1.0]]) * jnp.sin(e * 1e-3) @ p["w"]),
        {"w": normal(4, 32, 32)},
        np.stack([LONG, near(LONG, 0.1, 5)], 1),
    ),
    "finite differences": (
        lambda p, x: jnp.sum((jnp.tanh((x + 1e-3) @ p["w"]) - jnp.tanh(x @ p["w"])) / 1e-3),
        {"w": normal(6, 32, 32) / 6},
        normal(7, B, 32),
    ),
    "a tied table": (tied, TABLE, (np.arange(2 * B).reshape(B, 2) % 12, normal(9, B, 8))),
    "opposite steps": (
        recurrence,
        {"w": normal(10, 8, 8)},
        near(100 * np.repeat(normal(11, B, 1, 8), 8, axis=1), 0.01, 12),
    ),
}


def single(tree):
    return jax.tree.map(
        lambda x: np.asarray(x, np.float32 if x.dtype.kind == "f" else x.dtype), tree
    )


def true_norms(loss, params, batch, dtype):
    with jax.enable_x64(dtype == np.float64):
        cast = lambda x: np.asarray(x, dtype if x.dtype.kind == "f" else x.dtype)
        params, batch = jax.tree.map(cast, (params, batch))
        grads = run(jax.vmap(jax.grad(loss), (None, 0)), params, batch)
    flat = [np.float64(g).reshape(B, -1) for g in jax.tree.leaves(grads)]
    return np.linalg.norm(np.concatenate(flat, 1), axis=1)


@pytest.mark.parametrize("name", CASES)
def test_norms_are_right_where_those_of_vmap_are(name):
    loss, params, batch = CASES[name]
    params, batch = single((params, batch))
    exact = true_norms(loss, params, batch, np.float64)
    theirs = true_norms(loss, params, batch, np.float32)
    np.testing.assert_allclose(theirs, exact, rtol=1e-3)  # or the case shows nothing
    ours = run(per_example_norms(loss), params, batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_no_example_contributes_more_than_its_sensitivity(name, method):
    loss, params, batch = CASES[name]
    params, batch = single((params, batch))
    grad = clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False, method=method)
    alone = jax.tree.map(lambda x: x[:, None], batch)
    found = run(lambda p, b: lax.map(lambda e: grad(p, e), b), params, alone)
    flat = [np.float64(g).reshape(B, -1) for g in jax.tree.leaves(found)]
    lengths = np.linalg.norm(np.concatenate(flat, 1), axis=1)
    assert np.all(lengths <= (1 + 1e-5) * grad.sensitivity())


@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_a_norm_is_never_below_the_true_one_but_for_eps(length):
    """Gram sums and instantiated gradients, of terms that cancel more and less."""
    for k, distance in enumerate((1.0, 1e-2, 1e-4, 0.0)):
        base = normal(k, B, 1, 1, 24)
        left = base + distance * normal(20 + k, B, 1, length, 24)
        right = normal(30 + k, B, 1, length, 20)
        right = right - right.mean(axis=2, keepdims=True) * (length > 1)
        left, right = np.float32(left), np.float32(right)
        form = Outer(left, right, Layout((24, 20), np.dtype("float32"), ((), (0,), (1,))))
        exact = np.einsum("bkti,bkto->bio", np.float64(left), np.float64(right))
        exact = np.linalg.norm(exact.reshape(B, -1), axis=1)
        size = np.sum(np.linalg.norm(left, axis=3) * np.linalg.norm(right, axis=3), axis=(1, 2))
        found = np.sqrt(np.float64(run(lambda f: f.sq_norm(), form)))
        assert np.all(found >= exact * (1 - 1e-6) - 1e-7 * size)
        assert np.all(found <= exact * (1 + 1e-3) + 1e-6 * size)


@pytest.mark.parametrize("scale", [1e-20, 2e-19, 1e-18, 1e-17])
def test_terms_that_cancel_near_the_least_float_are_not_nan(scale):
    """Rounding leaves totals below 0, and what tells of it underflows: they were NaN."""
    length, many = 5, 100
    left = np.repeat(normal(0, many, 1, 1, 24), length, axis=2)
    right = normal(1, many, 1, length, 20)
    right = scale * (right - right.mean(axis=2, keepdims=True))
    form = Outer(
        np.float32(left),
        np.float32(right),
        Layout((24, 20), np.dtype("float32"), ((), (0,), (1,))),
    )
    assert form.norm_method == "gram"
    size = np.sum(np.linalg.norm(left, axis=3) * np.linalg.norm(right, axis=3), axis=(1, 2))
    found = np.sqrt(np.float64(run(lambda f: f.sq_norm(), form)))
    assert np.all(found <= 1e-3 * size + 1e-17)  # false of NaN; squares below 1e-38 are lost


def test_products_of_norms_are_taken_at_the_highest_precision():
    """Whatever the default is, and those of sums as the user asked for them."""

    def products(precision):
        loss = lambda w, x: jnp.sum(jnp.tanh(jnp.dot(x, w, precision=precision)))
        w, x = np.ones((9, 7), np.float32), np.ones((4, 3, 9), np.float32)
        with jax.default_matmul_precision("bfloat16"):
            norms = jax.make_jaxpr(per_example_norms(loss))(w, x)
            clipped = clipped_grad(loss, l2_clip_norm=1.0, method="one_pass", keep_batch_dim=False)
            sums = jax.make_jaxpr(clipped)(w, x)
        return norms, sums

    norms, _ = products("highest")
    assert "Precision.DEFAULT" not in str(norms)
    _, sums = products("default")
    assert "Precision.HIGHEST" in str(sums)
    assert "Precision.DEFAULT" in str(sums)


def test_the_derivative_of_a_norm_is_that_of_the_norm():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    w, x = np.float32(normal(0, 9, 7)), np.float32(normal(1, 3, 4, 9))
    ours = run(jax.grad(lambda w: jnp.sum(per_example_norms(loss)(w, x))), w)

    def by_hand(w):
        grads = jax.vmap(jax.grad(loss), (None, 0))(w, x)
        return jnp.sum(jnp.sqrt(jnp.sum(grads**2, axis=(1, 2))))

    np.testing.assert_allclose(ours, run(jax.grad(by_hand), w), rtol=1e-4, atol=1e-5)


def test_zero_gradients_have_norm_zero():
    grads = Outer(
        np.zeros((2, 1, 3, 4), np.float32),
        np.zeros((2, 1, 3, 5), np.float32),
        Layout((4, 5), np.dtype("float32"), ((), (0,), (1,))),
    )
    np.testing.assert_array_equal(run(sq_norms, [grads]), np.zeros(2))
