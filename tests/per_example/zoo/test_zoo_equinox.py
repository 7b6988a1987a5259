"""Equinox: its layers, and its own loops and errors inside a loss."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import normal
from tools.zoo_check import check, key, trainable

IDS = np.array([[0, 2, 2, 5, 1], [1, 1, 1, 1, 1], [3, 0, 4, 3, 0]])
ASKS = "custom_vjp_call, whose rule asks what is differentiated"


def total(model, data, stacked=None, **kwargs):
    params, static = trainable(model, random=True)
    loss = lambda p, x: jnp.sum(jnp.sin(eqx.combine(p, static)(x)))
    return check(loss, params, data, stacked, **kwargs)


class RNN(eqx.Module):
    """As in the example of the documentation: the last state of a scan, classified."""

    cell: eqx.Module
    linear: eqx.nn.Linear

    def __call__(self, xs):
        start = jnp.zeros(self.cell.hidden_size)
        if isinstance(self.cell, eqx.nn.LSTMCell):
            start = (start, start)
        state, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
        return self.linear(jax.tree.leaves(state)[0])


@pytest.mark.parametrize("kind", [eqx.nn.GRUCell, eqx.nn.LSTMCell])
def test_recurrent(kind):
    model = RNN(kind(2, 4, key=key(0)), eqx.nn.Linear(4, 1, key=key(1)))
    total(model, normal(0, 3, 6, 2))


class MixerBlock(eqx.Module):
    patch_mixer: eqx.nn.MLP
    hidden_mixer: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, patches, hidden, *, key):
        one, two = jax.random.split(key)
        self.patch_mixer = eqx.nn.MLP(patches, patches, 5, depth=1, key=one)
        self.hidden_mixer = eqx.nn.MLP(hidden, hidden, 7, depth=1, key=two)
        self.norm1 = eqx.nn.LayerNorm((hidden, patches))
        self.norm2 = eqx.nn.LayerNorm((patches, hidden))

    def __call__(self, y):
        y = y + jax.vmap(self.patch_mixer)(self.norm1(y))
        y = y.T
        y = y + jax.vmap(self.hidden_mixer)(self.norm2(y))
        return y.T


class Mixer(eqx.Module):
    conv_in: eqx.nn.Conv2d
    conv_out: eqx.nn.ConvTranspose2d
    blocks: list[MixerBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.conv_in = eqx.nn.Conv2d(2, 6, 2, stride=2, key=key(0))
        self.conv_out = eqx.nn.ConvTranspose2d(6, 1, 2, stride=2, key=key(1))
        self.blocks = [MixerBlock(4, 6, key=key(2))]
        self.norm = eqx.nn.LayerNorm((6, 4))

    def __call__(self, y, t=0.3):
        _, height, width = y.shape
        y = jnp.concatenate([y, jnp.full((1, height, width), t)])
        y = self.conv_in(y)
        shape = y.shape
        y = y.reshape(len(y), -1)
        for block in self.blocks:
            y = block(y)
        return self.conv_out(self.norm(y).reshape(shape))


def test_mixer():
    """The score network of the documentation's diffusion model."""
    total(Mixer(), normal(0, 3, 1, 4, 4))


class UNet(eqx.Module):
    """Down, across, and up beside what was kept on the way down."""

    first: eqx.nn.Conv2d
    down: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    pool: eqx.nn.MaxPool2d
    up: eqx.nn.ConvTranspose2d
    last: eqx.nn.Conv2d

    def __init__(self):
        self.first = eqx.nn.Conv2d(1, 4, 3, padding=1, key=key(0))
        self.down = eqx.nn.Conv2d(4, 4, 3, padding="SAME", padding_mode="REFLECT", key=key(1))
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.up = eqx.nn.ConvTranspose2d(4, 4, 2, stride=2, key=key(2))
        self.last = eqx.nn.Conv2d(8, 1, 3, padding=1, key=key(3))

    def __call__(self, x):
        kept = jax.nn.silu(self.first(x))
        y = jax.nn.silu(self.norm(self.down(self.pool(kept))))
        return self.last(jnp.concatenate([self.up(y), kept]))


def test_unet():
    total(UNet(), normal(0, 3, 1, 6, 6))


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    rope: eqx.nn.RotaryPositionalEmbedding
    norm: eqx.nn.RMSNorm
    feed: eqx.nn.MLP

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=one)
        self.rope = eqx.nn.RotaryPositionalEmbedding(4)
        self.norm = eqx.nn.RMSNorm(8)
        self.feed = eqx.nn.MLP(8, 8, 12, 1, activation=jax.nn.gelu, key=two)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        heads = lambda q, k, v: (jax.vmap(self.rope, 1, 1)(q), jax.vmap(self.rope, 1, 1)(k), v)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=mask, process_heads=heads)
        return x + jax.vmap(self.feed)(jax.vmap(self.norm)(x))


class Transformer(eqx.Module):
    """Rotary, causal, its layers one after the other in a scan over stacked parameters."""

    embed: eqx.nn.Embedding
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self):
        self.embed = eqx.nn.Embedding(6, 8, key=key(0))
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(key(2)))
        self.head = eqx.nn.Linear(8, 6, key=key(1))

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        layers, static = eqx.partition(self.blocks, eqx.is_array)
        step = eqx.filter_checkpoint(lambda x, layer: (eqx.combine(layer, static)(x), None))
        x, _ = jax.lax.scan(step, x, layers)
        return jax.nn.log_softmax(jax.vmap(self.head)(x))[:-1][jnp.arange(len(ids) - 1), ids[1:]]


def test_transformer_in_a_scan():
    total(Transformer(), IDS)


class Checked(eqx.Module):
    """A layer that refuses what it cannot take, as the documentation does."""

    layer: eqx.nn.Linear

    def __call__(self, x, *, key=None):
        x = eqx.error_if(x, jnp.any(jnp.isnan(x)), "not a number")
        return jnp.tanh(self.layer(x))


def test_error_in_a_layer():
    """Its rule asks, but is given nothing but the values of an example."""
    model = eqx.nn.Sequential([Checked(eqx.nn.Linear(4, 4, key=key(k))) for k in range(2)])
    total(model, normal(0, 3, 4))


class Loop(eqx.Module):
    """As many steps as the state takes."""

    cell: eqx.nn.Linear
    kind: str

    def __call__(self, x):
        step = lambda carry: (carry[0] + 1, jnp.tanh(self.cell(carry[1])))
        goes_on = lambda carry: carry[0] < 3
        kwargs = {"checkpoints": 2} if self.kind == "checkpointed" else {}
        return eqxi.while_loop(goes_on, step, (0, x), max_steps=4, kind=self.kind, **kwargs)[1]


@pytest.mark.parametrize(
    ("kind", "stacked"),
    [("checkpointed", ASKS), ("bounded", None)],
    ids=["checkpointed", "bounded"],
)
def test_own_loops(kind, stacked):
    total(Loop(eqx.nn.Linear(4, 4, key=key(0)), kind), normal(0, 3, 4), stacked, clipped=True)


def test_own_scan():
    """Its scan with checkpoints is built on that loop."""

    class Model(eqx.Module):
        cell: eqx.nn.GRUCell

        def __call__(self, xs):
            step = lambda h, x: (self.cell(x, h), None)
            start = jnp.zeros(3)
            return eqxi.scan(step, start, xs, kind="checkpointed", checkpoints=2)[0]

    total(Model(eqx.nn.GRUCell(2, 3, key=key(0))), normal(0, 3, 4, 2), ASKS)


def test_weight_norm():
    """A weight divided by its own norm is stacked, for the norm depends on it."""
    model = eqx.nn.Sequential([
        eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=key(0))),
        eqx.nn.Lambda(jnp.tanh),
        eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=key(1))),
    ])  # fmt: skip
    direction = {f"layers/{k}/layer/weight": "reduce_sum of the parameter" for k in (0, 2)}
    scale = {f"layers/{k}/g": "div of the parameter" for k in (0, 2)}
    total(model, normal(0, 3, 4), {**direction, **scale})


def test_dropout_with_a_key_of_each_example():
    model = eqx.nn.MLP(4, 2, 6, 1, key=key(0))
    drop = eqx.nn.Dropout(0.5)
    params, static = trainable(model, random=True)

    def loss(params, example):
        x, seed = example
        x = drop(x, key=jax.random.fold_in(key(5), seed))
        return jnp.sum(eqx.combine(params, static)(x) ** 2)

    check(loss, params, (normal(0, 3, 4), jnp.arange(3)))
