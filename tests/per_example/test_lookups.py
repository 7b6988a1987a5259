"""Parts of a parameter that a loop picks by its counter stay factored, in every spelling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal

W, X = normal(0, 6, 4, 4) / 2, normal(1, 3, 4)
ORDER = np.array([3, 1, 0, 5, 4, 2])
act = jnp.tanh

BODIES = {
    "W[i]": lambda w, i, h: act(h @ w[i]),
    "W[5 - i]": lambda w, i, h: act(h @ w[5 - i]),
    "W[-1 - i]": lambda w, i, h: act(h @ w[-1 - i]),
    "W[i // 2]": lambda w, i, h: act(h @ w[i // 2]),
    "W[i % 3]": lambda w, i, h: act(h @ w[i % 3]),
    "W[order[i]]": lambda w, i, h: act(h @ w[jnp.asarray(ORDER)[i]]),
    "take": lambda w, i, h: act(h @ jnp.take(w, i, axis=0)),
    "take, clip": lambda w, i, h: act(h @ jnp.take(w, i + 2, axis=0, mode="clip")),
    "at.get": lambda w, i, h: act(h @ w.at[i].get()),
    "dynamic_index_in_dim": lambda w, i, h: act(h @ lax.dynamic_index_in_dim(w, i, 0, False)),
    "dynamic_slice": lambda w, i, h: act(h @ lax.dynamic_slice(w, (i, 0, 0), (1, 4, 4))[0]),
    "two uses": lambda w, i, h: act(act(h @ w[i]) @ w[0].T),
    "checkpoint": jax.checkpoint(lambda w, i, h: act(h @ w[i])),
    "a row": lambda w, i, h: act(h * w[i, 0]),
    "a transpose": lambda w, i, h: act(h @ w[i].T),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_layer_picked_by_a_counter(name):
    def loss(w, x):
        return jnp.sum(lax.fori_loop(0, 6, lambda i, h: BODIES[name](w, i, h), x) ** 2)

    plan = assert_equals_oracle(loss, W, X)
    # Of the size of W and not of W for each step.
    assert plan.rows[0].bytes <= 2 * plan.rows[0].stacked_bytes


OTHERS = {
    "scan over a range": lambda w, x: lax.scan(
        lambda h, i: (act(h @ w[i]), None), x, jnp.arange(6)
    )[0],
    "reversed scan": lambda w, x: lax.scan(
        lambda h, i: (act(h @ w[i]), None), x, jnp.arange(6), reverse=True
    )[0],
    "some of them": lambda w, x: lax.fori_loop(1, 4, lambda i, h: act(h @ w[i]), x),
    "pairs": lambda w, x: lax.fori_loop(
        0, 3, lambda i, h: act(act(h @ w[2 * i]) @ w[2 * i + 1]), x
    ),
    "along axis 1": lambda w, x: lax.fori_loop(0, 4, lambda i, h: act(w[:, i] @ h)[:4], x),
    "two counters": lambda w, x: lax.fori_loop(
        0,
        2,
        lambda i, h: lax.fori_loop(0, 3, lambda j, h: act(h @ w.reshape(2, 3, 4, 4)[i, j]), h),
        x,
    ),
    "one counter made of two": lambda w, x: lax.fori_loop(
        0, 2, lambda i, h: lax.fori_loop(0, 3, lambda j, h: act(h @ w[3 * i + j]), h), x
    ),
    "in a branch": lambda w, x: lax.fori_loop(
        0, 6, lambda i, h: lax.cond(i > 2, lambda h: act(h @ w[i]), lambda h: h, h), x
    ),
    "switch": lambda w, x: lax.fori_loop(
        0, 6, lambda i, h: lax.switch(i, [lambda h, k=k: act(h @ w[k]) for k in range(6)], h), x
    ),
    "beyond the end, filled": lambda w, x: lax.fori_loop(
        0, 8, lambda i, h: act(h @ jnp.take(w, i, axis=0, mode="fill", fill_value=0.5)), x
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_loops(name):
    assert_equals_oracle(lambda w, x: jnp.sum(OTHERS[name](w, x) ** 2), W, X)


def test_layers_of_several_leaves():
    params = {"w": W, "b": normal(2, 6, 4)}

    def loss(p, x):
        def layer(i, h):
            q = jax.tree.map(lambda leaf: leaf[i], p)
            return act(h @ q["w"] + q["b"])

        return jnp.sum(lax.fori_loop(0, 6, layer, x) ** 2)

    assert_equals_oracle(loss, params, X)


def test_numbers_that_are_an_argument():
    """They are no constants of the program: exact all the same."""
    batch = (X, np.array([[0, 5, 2], [1, 1, 1], [4, 3, 0]]))
    assert_equals_oracle(
        lambda w, e: jnp.sum(lax.scan(lambda h, i: (act(h @ w[i]), None), e[0], e[1])[0]), W, batch
    )


def test_what_is_summed_over_a_scan_is_summed_as_it_goes():
    """No step's gradient of the table is kept: the copy before the loop is one use."""

    def loss(p, em):
        def step(a, e):
            return jax.nn.logsumexp(a[:, None] + p["t"], 0) + e, None

        return jax.nn.logsumexp(lax.scan(step, em[0], em[1:])[0])

    plan = assert_equals_oracle(loss, {"t": normal(3, 7, 7)}, normal(4, 3, 9, 7))
    assert plan.rows[0].bytes == plan.rows[0].stacked_bytes
