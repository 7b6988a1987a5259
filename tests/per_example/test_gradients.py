"""Whole models against the oracle."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from tools.agreement import assert_equals_oracle, close, normal, stacked_grads
from tools.models import mlp, mlp_batch, mlp_params
from tools.quick import quick_jit

from optaxclip.per_example import (
    materialize,
    per_example_grad,
    per_example_norms,
    sq_norms,
    weighted_sum,
)

IDS = np.array([[0, 2, 2, 5, 1], [1, 1, 1, 1, 1], [3, 0, 4, 3, 0]])


@pytest.mark.parametrize("size", [1, 6])
def test_mlp(size):
    params, batch = mlp_params(5, 8, 8, 3), mlp_batch(size)
    assert_equals_oracle(mlp, params, batch)

    @quick_jit
    def norms(params, batch):
        expected = jnp.sqrt(sq_norms(stacked_grads(mlp, params, batch)))
        return per_example_norms(mlp)(params, batch), expected

    close(*norms(params, batch), 1e-12)


def test_tied_weights_need_the_cross_terms():
    """Autoencoder `w.T @ w`: the norm of the sum, not the sum of the norms."""

    def loss(w, x):
        return jnp.sum((jnp.tanh(x @ w) @ w.T - x) ** 2)

    w, x = normal(0, 5, 4), normal(1, 6, 5)
    assert_equals_oracle(loss, w, x)
    assert_equals_oracle(loss, w, normal(1, 6, 30, 5))
    untied = per_example_grad(lambda p, x: jnp.sum((jnp.tanh(x @ p[0]) @ p[1].T - x) ** 2))
    naive = lambda w, x: sq_norms(untied((w, w), x))
    right = lambda w, x: sq_norms(per_example_grad(loss)(w, x))
    assert not np.allclose(*quick_jit(lambda w, x: (naive(w, x), right(w, x)))(w, x))


def test_one_jitted_block_called_three_times():
    @jax.jit
    def block(w, x):
        return jnp.sin(x @ w)

    def loss(w, x):
        return jnp.sum(block(w, block(w, block(w, x))))

    plan = assert_equals_oracle(loss, normal(0, 4, 4), normal(1, 6, 4))
    assert plan.rows[0].forms == ("Outer([6,1,3,4], [6,1,3,4])",)


def transformer(params, ids):
    """Pre-LN, heads by reshape and by einsum, learned positions, tied head."""

    def norm(p, x):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    x = params["embed"][ids[:-1]] + params["position"]
    h = norm(params["norm1"], x)
    q, k = (jnp.einsum("td,dhk->thk", h, params[n]) for n in ("q", "k"))
    v = (h @ params["v"].reshape(8, 8)).reshape(-1, 2, 4)
    scores = jnp.einsum("thk,shk->hts", q, k) / 2
    mask = jnp.tril(jnp.ones((4, 4), bool))
    scores = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    mixed = jnp.einsum("hts,shk->thk", scores, v)
    x = x + jnp.einsum("thk,hkd->td", mixed, params["o"])
    h = norm(params["norm2"], x)
    x = x + jax.nn.gelu(h @ params["up"] * params["gain"]) @ params["down"]
    logits = norm(params["norm3"], x) @ params["embed"].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[1:, None], axis=-1)
    return -jnp.mean(picked)


def transformer_params():
    shapes = {
        "embed": (6, 8), "position": (4, 8), "q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4),
        "o": (2, 4, 8), "up": (8, 16), "down": (16, 8), "gain": (),
    }  # fmt: skip
    params = {n: normal(i, *s) / 2 for i, (n, s) in enumerate(shapes.items())}
    for i in (1, 2, 3):
        params[f"norm{i}"] = {"scale": 1 + normal(30 + i, 8) / 4, "bias": normal(40 + i, 8)}
    return params


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_transformer_with_tied_head(wrap):
    plan = assert_equals_oracle(wrap(transformer), transformer_params(), IDS)
    assert plan.to_dict()["embed"]["norm_methods"] == ("segment sum", "instantiate")


def test_linen():
    model = nn.Sequential([nn.Dense(7), nn.relu, nn.LayerNorm(), nn.Dense(3)])
    x, y = mlp_batch()
    params = quick_jit(model.init)(jax.random.key(0), x[0])
    params = jax.tree.map(np.float64, params)
    assert_equals_oracle(lambda p, e: jnp.sum((model.apply(p, e[0]) - e[1]) ** 2), params, (x, y))


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 8, rngs=rngs, param_dtype=jnp.float64)
            self.norm = nnx.RMSNorm(8, rngs=rngs, param_dtype=jnp.float64)
            self.last = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))

    graph, params = nnx.split(Model(nnx.Rngs(0)))

    def loss(params, example):
        return jnp.sum((nnx.merge(graph, params)(example[0]) - example[1]) ** 2)

    plan = assert_equals_oracle(loss, params, mlp_batch())
    assert "first/kernel" in plan.to_dict()


def carried(w, x):
    step = lambda c, _: ((c[0] @ c[0], jnp.sin(c[1] @ c[0])), None)
    return jnp.sum(lax.scan(step, (w, x), length=3)[0][1])


@jax.custom_vjp
def doubled_gradient(w, x):
    return x @ w


doubled_gradient.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (2 * jnp.outer(saved[1], g), 3 * saved[0] @ g),
)


@jax.custom_jvp
def odd_slope(w, x):
    return x @ w


@odd_slope.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 5 * x @ dw + dx @ w


FALLBACKS = {
    "carried by a scan": carried,
    "custom_vjp": lambda w, x: jnp.sum(jnp.sin(doubled_gradient(w, x))),
    "custom_jvp": lambda w, x: jnp.sum(jnp.sin(odd_slope(w, x))),
    "no rule": lambda w, x: jnp.sum(lax.cumsum(lax.scatter_add(
        w, np.array([[0]]), x[None], lax.ScatterDimensionNumbers((1,), (0,), (0,))
    )) ** 2),
    "weight normalisation": lambda w, x: jnp.sum(
        jnp.sin(x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_are_exact_and_reported(name):
    def loss(params, x):
        return FALLBACKS[name](params["stacked"], jnp.tanh(x @ params["factored"]))

    params = {"stacked": normal(0, 4, 4), "factored": normal(1, 3, 4)}
    plan = assert_equals_oracle(loss, params, normal(2, 6, 3), fallbacks=["stacked"])
    assert "test_gradients.py" in plan.to_dict()["stacked"]["fallback"]


CHAINS = {
    "transpose": lambda w: w.transpose(2, 0, 1).reshape(4, 6).T,
    "split axis": lambda w: w.reshape(6, 2, 2).reshape(6, 4),
    "ones": lambda w: w[None].reshape(2, 1, 3, 4)[:, 0].reshape(6, 4),
    "cast": lambda w: w.astype(jnp.float64).reshape(6, 4),
    "scaling": lambda w: -(w * 3 / jnp.sqrt(2.0) / 7).reshape(6, 4),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_isometries_keep_the_factors(name, steps):
    def loss(w, x):
        return jnp.sum(jnp.sin(x @ CHAINS[name](w)))

    plan = assert_equals_oracle(loss, normal(0, 2, 3, 4), normal(1, 5, steps, 6))
    assert plan.rows[0].forms[0].startswith("Outer")


def test_uses_in_different_shapes_of_the_parameter():
    """No common rows and columns: cross terms one example at a time."""

    def loss(w, x):
        one = jnp.sin(x @ w.reshape(6, 4))
        two = jnp.cos(jnp.einsum("tab,abc->tc", x[:, :6].reshape(-1, 2, 3), w))
        return jnp.sum(one) + jnp.sum(jnp.sin(x[:, :2] @ w.reshape(2, 12))) + jnp.sum(two)

    plan = assert_equals_oracle(loss, normal(0, 2, 3, 4), normal(1, 5, 3, 6))
    assert len(plan.rows[0].forms) == 2


def test_unused_parameters_have_zero_gradients():
    params = {"used": normal(0, 4), "unused": normal(1, 3, 2)}

    @quick_jit
    def answers(params, x):
        grads = per_example_grad(lambda p, x: jnp.sin(x @ p["used"]))(params, x)
        total = weighted_sum(grads, jnp.ones(5))["unused"]
        stacked = grads["unused"].materialize()
        return grads, stacked, total, sq_norms(grads), sq_norms(grads["used"])

    grads, stacked, total, norms, of_used = answers(params, normal(2, 5, 4))
    assert jax.tree.leaves(grads["unused"])[0].size == 0
    close((stacked, total), (np.zeros((5, 3, 2)), np.zeros((3, 2))), 0)
    close(norms, of_used, 0)


def test_stopped_gradients_and_a_loss_without_the_example():
    def loss(params, x):
        return jnp.sin(x @ lax.stop_gradient(params["a"])) * 0 + jnp.sum(params["b"] ** 3)

    params, x = {"a": normal(0, 4), "b": normal(1, 3)}, normal(2, 5, 4)
    for fun in (loss, lambda p, x: jnp.sum(p["b"] ** 3)):

        @quick_jit
        def answers(params, x, fun=fun):
            grads = per_example_grad(fun)(params, x)
            return materialize(grads), stacked_grads(fun, params, x), sq_norms(grads["b"])

        found, expected, norms = answers(params, x)
        close(found, expected, 1e-12)
        assert np.min(norms) > 0


def test_random_keys_in_the_batch_and_closed_over_arrays():
    keys, scale = jax.random.split(jax.random.key(3), 5), normal(7, 4)

    def loss(w, example):
        key, x = example
        x = x * jax.random.bernoulli(key, 0.5, (4,)) * scale
        return jnp.sum(jnp.sin(x @ w))

    assert_equals_oracle(loss, normal(0, 4, 3), (keys, normal(1, 5, 4)))


def test_bfloat16_parameters_with_a_float32_loss():
    def loss(params, example):
        example = jax.tree.map(lambda x: x.astype(jnp.bfloat16), example)
        return mlp(params, example).astype(jnp.float32)

    @quick_jit
    def answers(params, batch):
        grads, oracle = per_example_grad(loss)(params, batch), stacked_grads(loss, params, batch)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), oracle)
        return (materialize(grads), sq_norms(grads)), (oracle, sq_norms(wide))

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mlp_params(5, 8, 3))
    found, expected = answers(params, mlp_batch())
    close(found, expected, 2e-2)
    assert found[1].dtype == jnp.float32


def test_float32_agrees_to_1e_5():
    @quick_jit
    def answers(params, data):
        grads, oracle = per_example_grad(mlp)(params, data), stacked_grads(mlp, params, data)
        weights = jnp.ones(32, jnp.float32)
        found = per_example_norms(mlp)(params, data), weighted_sum(grads, weights)
        return found, (jnp.sqrt(sq_norms(oracle)), weighted_sum(oracle, weights))

    found, expected = answers(*jax.tree.map(np.float32, (mlp_params(5, 64, 64, 3), mlp_batch(32))))
    close(found, expected, 1e-5)
    assert found[0].dtype == jnp.float32


def test_stacked_and_factored_leaves_mix():
    @quick_jit
    def answers(params, batch):
        grads, oracle = per_example_grad(mlp)(params, batch), stacked_grads(mlp, params, batch)
        trees, weights = ([oracle[0], grads[1]], oracle), jnp.arange(6.0)
        return [(sq_norms(t), materialize(t), weighted_sum(t, weights)) for t in trees]

    close(*answers(mlp_params(5, 8, 3), mlp_batch()), 1e-12)


def test_forms_cross_jit():
    """Out of one function, and into another or into none."""
    grads = jax.jit(per_example_grad(mlp))(mlp_params(5, 8, 3), mlp_batch())
    close(jax.jit(sq_norms)(grads), sq_norms(grads), 1e-12)
