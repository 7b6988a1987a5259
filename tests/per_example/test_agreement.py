"""`check_per_example` passes what agrees, and names what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import rem_p
from tools.agreement import normal

from optaxclip.per_example import Dense, register_rule
from optaxclip.per_example.engine import registry
from optaxclip.testing import check_per_example

PARAMS = {"w": normal(0, 3, 2), "b": np.zeros(2), "step": 3}


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2)


def test_agreement():
    check_per_example(loss, PARAMS, normal(1, 8, 3))
    with_aux = lambda x, p, f: (f(loss(p, x)), x)
    check_per_example(
        with_aux, normal(1, 8, 3), PARAMS, jnp.sin, argnums=1, batch_argnums=0, has_aux=True
    )
    noisy = lambda p, x, key: loss(p, x[0] + jax.random.normal(key, (3,)))
    check_per_example(
        noisy, PARAMS, normal(1, 8, 3), jax.random.key(0), keep_batch_dim=True, prng_argnum=2
    )
    bad = normal(1, 8, 3)
    bad[1, 0] = np.nan
    check_per_example(loss, PARAMS, bad)


@pytest.mark.parametrize("factor", [2.0, jnp.nan], ids=["too large", "not finite"])
def test_a_wrong_rule_is_found(factor, monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register_rule(rem_p)(lambda ctx, *operands, **params: Dense(factor * ctx.cotangent))
    wrong = lambda p, x: jnp.sum(lax.rem(p["w"], 2.0 + x[:, None] * jnp.ones((3, 2)))) + p["b"][0]
    message = (
        r"must agree with vmap\(grad\), got a difference of .* (the gradient of w|the norm) of"
    )
    with pytest.raises(AssertionError, match=message):
        check_per_example(wrong, PARAMS, np.abs(normal(1, 8, 3)))
