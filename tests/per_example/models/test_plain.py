"""Models in plain JAX: no fallback where there need be none, and equal to vmap(grad)."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal


def total(y):
    return jnp.sum(jnp.sin(y))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution_of_any_rank(rank):
    spatial = "XYZ"[:rank]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def loss(params, x):
        for w in params:
            x = jnp.tanh(
                lax.conv_general_dilated(
                    x, w, (2,) + (1,) * (rank - 1), "SAME", dimension_numbers=numbers
                )
            )
        return total(x)

    shape = (4,) * rank
    params = [normal(i, *(2,) * rank, 2, 2) for i in range(2)]
    assert_equals_oracle(loss, params, normal(3, 3, 1, *shape, 2))


def test_einsum():
    def loss(p, x):
        heads = jnp.einsum("td,dhk->htk", x, p["in"])
        mixed = jnp.einsum("htk,hkl,hsl->hts", heads, p["mix"], heads)
        return total(jnp.einsum("hts,sd,hde->te", mixed, x, p["out"]))

    params = {"in": normal(0, 4, 2, 3), "mix": normal(1, 2, 3, 3), "out": normal(2, 2, 4, 5)}
    assert_equals_oracle(loss, params, normal(3, 3, 5, 4))


def test_stopped_frozen_and_scalar_parameters():
    def loss(p, x):
        y = x @ (p["w"] * 2.0 / jnp.sqrt(4.0)) * jnp.exp(p["log_scale"])
        return total(y + lax.stop_gradient(p["w"][0]) + p["position"])

    params = {"w": normal(0, 4, 3), "log_scale": normal(1), "position": normal(2, 5, 3)}
    assert_equals_oracle(loss, params, normal(3, 3, 5, 4))


def weight_normalised(w, x):
    return x @ (w / jnp.linalg.norm(w, axis=0))


def spectrally_normalised(w, x):
    u = jnp.ones(4)
    for _ in range(2):
        v = lax.stop_gradient(w.T @ u / jnp.linalg.norm(w.T @ u))
        u = lax.stop_gradient(w @ v / jnp.linalg.norm(w @ v))
    return x @ (w / (u @ w @ v))


@jax.custom_vjp
def reversed_gradient(w, x):
    return x @ w


reversed_gradient.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (-jnp.outer(saved[1], g), saved[0] @ g),
)


def unregistered(w, x):
    return lax.cumprod(w * x[:, None])[0] + jnp.sum(lax.rem(w, 2 + x[:, None]))


FALLBACKS = [weight_normalised, spectrally_normalised, reversed_gradient, unregistered]


@pytest.mark.parametrize("layer", FALLBACKS)
def test_reported_fallbacks(layer):
    def loss(p, x):
        return total(jnp.tanh(layer(p["stacked"], jnp.tanh(x @ p["factored"]))))

    params = {"stacked": normal(0, 4, 3), "factored": normal(1, 3, 4)}
    plan = assert_equals_oracle(loss, params, normal(2, 4, 3), fallbacks=["stacked"])
    assert "test_plain.py" in plan.to_dict()["stacked"]["fallback"]
