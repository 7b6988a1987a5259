"""Equinox models: no fallback, and equal to vmap(grad)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tools.agreement import assert_equals_oracle, normal


def key():
    return jax.random.key(0)


def check(build, data):
    model = eqx.filter_eval_shape(build)
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    leaves, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, [normal(i, *x.shape) for i, x in enumerate(leaves)])
    loss = lambda p, x: jnp.sum(jnp.sin(eqx.combine(p, static)(x)))
    return assert_equals_oracle(loss, params, data)


def test_mlp():
    check(lambda: eqx.nn.MLP(5, 3, 8, 2, key=key()), normal(0, 4, 5))


def test_convolutions_and_norms():
    layers = lambda: [
        eqx.nn.Conv2d(4, 4, 3, stride=2, groups=2, key=key()),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.ConvTranspose2d(4, 2, 2, key=key()),
        eqx.nn.Lambda(lambda x: x.reshape(-1)),
        eqx.nn.Linear(18, 3, key=key()),
        eqx.nn.LayerNorm(3),
    ]
    check(lambda: eqx.nn.Sequential(layers()), normal(0, 3, 4, 6, 6))


def test_tokens():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            return self.attention(x, x, x)

    def build():
        return Model(eqx.nn.Embedding(6, 8, key=key()), eqx.nn.MultiheadAttention(2, 8, key=key()))

    check(build, np.array([[0, 2, 2, 5], [1, 1, 1, 1], [3, 0, 4, 3]]))
