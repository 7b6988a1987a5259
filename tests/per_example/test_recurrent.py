"""Recurrent networks, scanned layers and checkpoints of the model libraries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tools.agreement import assert_equals_oracle, normal
from tools.quick import quick_jit

SEQUENCES, LABELS = normal(0, 5, 3, 4), np.array([0, 1, 2, 0, 1])


def entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def as_float64(params):
    return jax.tree.map(np.float64, params)


def test_nnx_lstm():
    def build():
        dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        return nnx.split(nnx.RNN(nnx.LSTMCell(4, 3, rngs=nnx.Rngs(0), **dtypes)), nnx.Param, ...)

    graph, params, rest = quick_jit(build)()

    def loss(params, example):
        x, label = example
        return entropy(jnp.sum(nnx.merge(graph, params, rest, copy=True)(x), axis=0), label)

    assert_equals_oracle(loss, params, (SEQUENCES, LABELS))


def test_linen_gru():
    model = nn.RNN(nn.GRUCell(3, param_dtype=jnp.float64), reverse=True, keep_order=True)
    params = as_float64(quick_jit(model.init)(jax.random.key(0), SEQUENCES[0]))

    def loss(params, example):
        x, label = example
        return entropy(jnp.sum(model.apply(params, x), axis=0), label)

    assert_equals_oracle(loss, params, (SEQUENCES, LABELS))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.silu(nn.Dense(3)(nn.LayerNorm()(x)))
        return x + nn.softplus(nn.Dense(4)(h)), None


def test_linen_scan_over_layers_with_remat():
    block = nn.remat(Block, prevent_cse=False)
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    model = stack()
    params = as_float64(quick_jit(model.init)(jax.random.key(0), SEQUENCES[0], None))

    def loss(params, example):
        x, label = example
        return entropy(jnp.sum(model.apply(params, x, None)[0], axis=0), label)

    assert_equals_oracle(loss, params, (SEQUENCES, LABELS))


def test_nnx_scan_over_layers_with_remat():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key), dtype=jnp.float64, param_dtype=jnp.float64)

    keys = jax.random.split(jax.random.key(0), 2)
    graph, params = quick_jit(lambda keys: nnx.split(create(keys)))(keys)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(layer, x):
        return nnx.relu(layer(x))

    def loss(params, example):
        x, label = example
        return entropy(jnp.sum(forward(nnx.merge(graph, params), x), axis=0), label)

    assert_equals_oracle(loss, params, (SEQUENCES, LABELS), may_vanish=True)
