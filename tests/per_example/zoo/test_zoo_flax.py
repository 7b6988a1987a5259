"""Flax examples: Linen's VAE, an encoder-decoder and a recurrent one; NNX with lifted loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tools.agreement import normal
from tools.zoo_check import check, key, randomized


class VAE(nn.Module):
    """As in the example of the package."""

    def setup(self):
        self.encoder = [nn.Dense(5), nn.Dense(2), nn.Dense(2)]
        self.decoder = [nn.Dense(5), nn.Dense(6)]

    def __call__(self, x, key):
        first, mean, logvar = self.encoder
        h = nn.relu(first(x))
        mean, logvar = mean(h), logvar(h)
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        first, last = self.decoder
        return last(nn.relu(first(z))), mean, logvar


def test_variational_autoencoder():
    """Each example with noise of its own."""
    model, data = VAE(), jax.nn.sigmoid(normal(0, 3, 6))
    params = randomized(model.init(key(0), data[0], key(0)))

    def loss(params, example):
        x, seed = example
        logits, mean, logvar = model.apply(params, x, jax.random.fold_in(key(0), seed))
        cross = optax.sigmoid_binary_cross_entropy(logits, x).sum()
        return cross - 0.5 * jnp.sum(1 + logvar - mean**2 - jnp.exp(logvar))

    check(loss, params, (data, jnp.arange(3)))


class Seq2Seq(nn.Module):
    """An LSTM reads, another writes, with teacher forcing."""

    @nn.compact
    def __call__(self, question, answer):
        embed = nn.Embed(5, 4)
        carry, _ = nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=float), return_carry=True)(
            embed(question)
        )
        outputs = nn.RNN(nn.LSTMCell(4, param_dtype=float))(embed(answer[:-1]), initial_carry=carry)
        return nn.Dense(5)(outputs)


def test_sequence_to_sequence():
    model = Seq2Seq()
    question = jnp.array([[0, 2, 2, 4], [1, 1, 1, 1], [3, 0, 4, 3]])
    answer = jnp.array([[2, 2, 0], [1, 4, 1], [0, 4, 3]])
    params = randomized(model.init(key(0), question[0], answer[0]))

    def loss(params, example):
        logits = model.apply(params, *example)
        targets = example[1][1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    check(loss, params, (question, answer))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


class Deep(nnx.Module):
    """Layers made by `nnx.vmap`, applied by `nnx.scan`, recomputed on the way back."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)


def test_scanned_layers():
    graph, params, rest = nnx.split(Deep(nnx.Rngs(0)), nnx.Param, ...)
    loss = lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p, rest)(x)))
    check(loss, randomized(params), normal(0, 3, 5, 4), clipped=True)


def test_normalized_weights():
    """Spectral and weight norm, of what depends on the weights themselves: they are stacked."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=False)
            return nn.WeightNorm(nn.Dense(2))(jnp.tanh(x))

    model, data = Model(), normal(0, 3, 5)
    variables = model.init(key(0), data[0])
    params, rest = randomized(variables.pop("params")), variables
    loss = lambda p, x: jnp.sum(jnp.sin(model.apply({"params": p, **rest}, x)))
    stacked = {
        "Dense_0/kernel": "div of the parameter",
        "Dense_1/kernel": "reduce_sum of the parameter",
        "Dense_1/kernel/scale": "mul of the parameter",
    }
    check(loss, params, data, stacked)
