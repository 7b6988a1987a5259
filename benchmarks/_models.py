"""Models of the per-example benchmark, in plain JAX: `loss(params, example)` and a batch."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss of one example, its parameters, and a batch with the examples on the first axis."""

    loss: Callable[[Tree, Tree], jax.Array]
    params: Tree
    batch: Tree


def mlp(batch: int, width: int = 1024, layers: int = 3) -> Workload:
    """784 inputs, hidden layers of one width, 10 classes."""
    draw = _Draw()
    widths = [784] + [width] * layers + [10]
    params = [draw.dense(i, o) for i, o in itertools.pairwise(widths)]

    def loss(params: Tree, example: Tree) -> jax.Array:
        x, label = example
        for layer in params[:-1]:
            x = jax.nn.relu(_dense(layer, x))
        return _cross_entropy(_dense(params[-1], x), label)

    return Workload(loss, params, (draw.normal(batch, 784), draw.ids(10, batch)))


def lm(
    batch: int, time: int, *, tied: bool = False, scanned: bool = False, d: int = 256,
    layers: int = 4, vocabulary: int = 1000, heads: int = 4,
) -> Workload:  # fmt: skip
    """A pre-LN transformer language model; `scanned`: one scan over its layers, with remat."""
    draw = _Draw()
    blocks = [
        {
            "norm_1": jnp.ones(d),
            "qkv": draw.dense(d, 3 * d),
            "out": draw.dense(d, d),
            "norm_2": jnp.ones(d),
            "up": draw.dense(d, 4 * d),
            "down": draw.dense(4 * d, d),
        }
        for _ in range(layers)
    ]
    params = {
        "embed": 0.02 * draw.normal(vocabulary, d),
        "position": 0.02 * draw.normal(time, d),
        "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks) if scanned else blocks,
        "norm": jnp.ones(d),
    }
    if not tied:
        params["head"] = draw.normal(d, vocabulary) / d**0.5

    def block(p: Tree, x: jax.Array) -> jax.Array:
        qkv = _dense(p["qkv"], _normed(p["norm_1"], x)).reshape(time, 3, heads, d // heads)
        mixed = jax.nn.dot_product_attention(*(qkv[:, i] for i in range(3)), is_causal=True)
        x = x + _dense(p["out"], mixed.reshape(time, d))
        return x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], _normed(p["norm_2"], x))))

    def loss(params: Tree, ids: jax.Array) -> jax.Array:
        x = params["embed"][ids[:-1]] + params["position"]
        if scanned:
            step = jax.checkpoint(lambda x, p: (block(p, x), None))
            x, _ = jax.lax.scan(step, x, params["blocks"])
        else:
            for p in params["blocks"]:
                x = block(p, x)
        head = params["embed"].T if tied else params["head"]
        return jnp.mean(_cross_entropy(_normed(params["norm"], x) @ head, ids[1:]))

    return Workload(loss, params, draw.ids(vocabulary, batch, time + 1))


def cnn(batch: int, channels: tuple[int, ...] = (32, 64, 64)) -> Workload:
    """3 x 3 convolutions on 32 x 32 x 3, the later ones with stride 2; mean pooling."""
    draw = _Draw()
    sizes = zip((3, *channels), channels, strict=False)
    params = {
        "conv": [draw.normal(3, 3, i, o) / (9 * i) ** 0.5 for i, o in sizes],
        "bias": [jnp.zeros(o) for o in channels],
        "head": draw.dense(channels[-1], 10),
    }

    def loss(params: Tree, example: Tree) -> jax.Array:
        x, label = example
        for k, (kernel, bias) in enumerate(zip(params["conv"], params["bias"], strict=True)):
            stride = (1, 1) if k == 0 else (2, 2)
            x = jax.lax.conv_general_dilated(
                x[None], kernel, stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[0]
            x = jax.nn.relu(x + bias)
        return _cross_entropy(_dense(params["head"], jnp.mean(x, axis=(0, 1))), label)

    return Workload(loss, params, (draw.normal(batch, 32, 32, 3), draw.ids(10, batch)))


def lstm(batch: int, time: int, width: int = 128) -> Workload:
    """One LSTM layer over a sequence of vectors; the last state is classified."""
    draw = _Draw()
    params = {
        "input": draw.dense(width, 4 * width),
        "hidden": draw.normal(width, 4 * width) / width**0.5,
        "head": draw.dense(width, 10),
    }

    def loss(params: Tree, example: Tree) -> jax.Array:
        xs, label = example

        def step(carry: Tree, x: jax.Array) -> tuple[Tree, None]:
            hidden, cell = carry
            gates = _dense(params["input"], x) + hidden @ params["hidden"]
            i, f, g, o = jnp.split(gates, 4)
            cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(cell), cell), None

        (hidden, _), _ = jax.lax.scan(step, (jnp.zeros(width), jnp.zeros(width)), xs)
        return _cross_entropy(_dense(params["head"], hidden), label)

    return Workload(loss, params, (draw.normal(batch, time, width), draw.ids(10, batch)))


class _Draw:
    """Random arrays, a new key for each."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def _next(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key

    def normal(self, *shape: int) -> jax.Array:
        return jax.random.normal(self._next(), shape)

    def ids(self, number: int, *shape: int) -> jax.Array:
        return jax.random.randint(self._next(), shape, 0, number)

    def dense(self, i: int, o: int) -> Tree:
        return {"kernel": self.normal(i, o) / i**0.5, "bias": jnp.zeros(o)}


def _dense(p: Tree, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _normed(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
