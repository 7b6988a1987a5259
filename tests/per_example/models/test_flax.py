"""Flax models, Linen and NNX: no fallback, and equal to vmap(grad)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tools.agreement import assert_equals_oracle, normal
from tools.quick import quick_jit

X, IMAGES = (4, 6, 8), (3, 6, 6, 4)  # tokens and images
IDS = np.array([[0, 2, 2, 5, 1], [1, 1, 1, 1, 1], [3, 0, 4, 3, 0]])


def total(y):
    return jnp.sum(jnp.sin(y))


def check_linen(model, data, **kwargs):
    variables = jax.eval_shape(model.init, jax.random.key(0), data[0])
    leaves, tree = jax.tree.flatten(variables.pop("params"))
    params = jax.tree.unflatten(tree, [normal(i, *x.shape) / 2 for i, x in enumerate(leaves)])
    state = jax.tree.map(lambda x: normal(9, *x.shape), variables)
    loss = lambda p, x: total(model.apply({"params": p, **state}, x))
    return assert_equals_oracle(loss, params, data, **kwargs)


def check_nnx(build, data, **kwargs):
    graph, params, rest = quick_jit(lambda: nnx.split(build(nnx.Rngs(0)), nnx.Param, ...))()
    leaves, tree = jax.tree.flatten(params)
    params = jax.tree.unflatten(tree, [normal(i, *x.shape) / 2 for i, x in enumerate(leaves)])
    loss = lambda p, x: total(nnx.merge(graph, p, rest)(x))
    return assert_equals_oracle(loss, params, data, **kwargs)


class LinenConvs(nn.Module):
    """Strided, grouped, dilated, depthwise and transposed."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 3), strides=2, feature_group_count=2)(x))
        x = jnp.tanh(nn.Conv(4, (2, 2), kernel_dilation=2, padding="SAME")(x))
        x = nn.GroupNorm(2)(nn.Conv(8, (2, 2), feature_group_count=4)(x))
        x = nn.ConvTranspose(2, (2, 2), strides=(2, 2))(x)
        return nn.ConvTranspose(3, (2, 2), transpose_kernel=True)(x)


class NnxConvs(nnx.Module):
    def __init__(self, rngs):
        conv = lambda *args, **kwargs: nnx.Conv(*args, rngs=rngs, **kwargs)
        self.first = conv(4, 4, (3, 3), strides=2, feature_group_count=2)
        self.second = conv(4, 4, (2, 2), kernel_dilation=2, padding="SAME")
        self.third = conv(4, 8, (2, 2), feature_group_count=4)
        self.norm = nnx.GroupNorm(8, 2, rngs=rngs)
        self.last = nnx.ConvTranspose(8, 2, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.second(jnp.tanh(self.first(x))))
        return self.last(self.norm(self.third(x)))


class LinenTransformer(nn.Module):
    """Pre-LN, learned positions, head tied to the embedding."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(6, 8)
        x = embed(ids) + self.param("position", nn.initializers.ones, (5, 8))
        mask = nn.make_causal_mask(ids)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))
        return nn.log_softmax(embed.attend(nn.LayerNorm()(x)))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs, tied):
        self.embed = nnx.Embed(6, 8, dtype=jnp.float64, rngs=rngs)
        self.position = nnx.Param(jnp.ones((5, 8)))
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.feed = nnx.Linear(8, 8, rngs=rngs)
        self.head = None if tied else nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.position[...]
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(ids))
        x = x + self.feed(jax.nn.silu(self.norms[1](x)))
        return jax.nn.log_softmax(self.embed.attend(x) if self.head is None else self.head(x))


class Shared(nn.Module):
    """ALBERT: one block, three times."""

    @nn.compact
    def __call__(self, x):
        block = nn.Sequential([nn.LayerNorm(), nn.Dense(8), nn.tanh, nn.DenseGeneral((2, 4))])
        for _ in range(3):
            x = x + block(x).reshape(x.shape)
        return nn.DenseGeneral(3, axis=(-2, -1))(x.reshape(6, 2, 4))


def test_linen_mlp():
    check_linen(nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(3)]), normal(0, 4, 5))


def test_nnx_mlp_with_lora():
    def build(rngs):
        layers = [
            nnx.LoRALinear(5, 7, lora_rank=2, rngs=rngs),
            nnx.tanh,
            nnx.Linear(7, 3, rngs=rngs),
        ]
        return nnx.Sequential(*layers)

    check_nnx(build, normal(0, 4, 5))


def test_nnx_lora_alone():
    def build():
        base = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        lora = nnx.LoRA(5, 2, 3, base_module=base, rngs=nnx.Rngs(0))
        return nnx.split(lora, nnx.LoRAParam, ...)

    graph, lora, rest = quick_jit(build)()
    lora = jax.tree.map(lambda x: normal(0, *x.shape), lora)
    assert_equals_oracle(lambda p, x: total(nnx.merge(graph, p, rest)(x)), lora, normal(0, 4, 5))


@pytest.mark.parametrize("check", [check_linen, check_nnx])
def test_convolutions(check):
    check(LinenConvs() if check is check_linen else NnxConvs, normal(0, *IMAGES))


def test_linen_transformer_with_tied_head():
    plan = check_linen(LinenTransformer(), IDS)
    assert plan.to_dict()["Embed_0/embedding"]["forms"][0].startswith("Gathered")


@pytest.mark.parametrize("tied", [True, False])
def test_nnx_transformer(tied):
    check_nnx(lambda rngs: NnxTransformer(rngs, tied), IDS)


def test_a_shared_block_has_one_form_for_all_its_calls():
    plan = check_linen(Shared(), normal(0, *X))
    assert plan.to_dict()["Dense_0/kernel"]["forms"] == ("Outer([4,1,18,8], [4,1,18,8])",)


def test_normalised_weights_fall_back():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.WeightNorm(nn.Dense(4))(x))
            x = jnp.tanh(nn.SpectralNorm(nn.Dense(4))(x, update_stats=False))
            return nn.Dense(3)(x)

    scale = "WeightNorm_0/Dense_0/kernel/scale"
    stacked = ["Dense_0/kernel", "Dense_1/kernel", scale]
    plan = check_linen(Model(), normal(0, 4, 5), fallbacks=stacked)
    assert "flax" in plan.to_dict()["Dense_1/kernel"]["fallback"]
