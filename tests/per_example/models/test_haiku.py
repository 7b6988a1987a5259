"""Haiku models: no fallback, and equal to vmap(grad)."""

import haiku as hk
import jax
import jax.numpy as jnp
from tools.agreement import assert_equals_oracle, normal


def test_mlp():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 8, 3])(x)))
    data = normal(0, 4, 5)
    params = jax.eval_shape(model.init, jax.random.key(0), data[0])
    params = jax.tree.map(lambda x: normal(1, *x.shape), params)
    assert_equals_oracle(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x))), params, data)
