"""The data and the four small models of `robustness_study.py`, all in Flax NNX."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set; an example is a sequence of `shape[0]` tokens with `shape[1]` features."""

    title: str
    load: Callable[[], Any]
    shape: tuple[int, int]
    classes: int
    radius: float
    """Of attacks, in the units of the inputs."""


DATA = {
    # The rows of an image; pixels from 0 to 1.
    "digits": Data("digits", functools.cache(load_digits), (8, 8), 10, 0.1),
    # Ten measurements, each with mean, standard error and worst value; standardised.
    "cancer": Data("breast cancer", functools.cache(load_breast_cancer), (10, 3), 2, 0.3),
}


def split(data: str, seed: int) -> tuple[np.ndarray, ...]:
    """`x, y, x_test, y_test` with a quarter held out, as [B, tokens, features]."""
    source, (tokens, features) = DATA[data].load(), DATA[data].shape
    x, x_test, y, y_test = train_test_split(
        source.data, source.target, test_size=0.25, random_state=seed, stratify=source.target
    )
    if data == "digits":
        x, x_test = ((a / 16).reshape(-1, tokens, features) for a in (x, x_test))
    else:
        scaler = StandardScaler().fit(x)
        x, x_test = (
            scaler.transform(a).reshape(-1, features, tokens).swapaxes(1, 2) for a in (x, x_test)
        )
    return np.float32(x), np.int32(y), np.float32(x_test), np.int32(y_test)


class MLP(nnx.Module):
    """Two hidden layers."""

    def __init__(self, data: Data, rngs: nnx.Rngs):
        self.inner = nnx.Linear(data.shape[0] * data.shape[1], 2 * WIDTH, rngs=rngs)
        self.outer = nnx.Linear(2 * WIDTH, 2 * WIDTH, rngs=rngs)
        self.head = nnx.Linear(2 * WIDTH, data.classes, rngs=rngs)

    def features(self, x):
        """What the head sees."""
        return nnx.relu(self.outer(nnx.relu(self.inner(x.reshape(len(x), -1)))))


class CNN(nnx.Module):
    """Two convolutions: over images for digits, along the measurements for breast cancer."""

    def __init__(self, data: Data, rngs: nnx.Rngs):
        self.image = data.shape[0] == data.shape[1]
        kernel, channels = ((3, 3), 1) if self.image else ((3,), data.shape[1])
        self.conv1 = nnx.Conv(channels, 8, kernel, strides=2 if self.image else 1, rngs=rngs)
        self.conv2 = nnx.Conv(8, WIDTH, kernel, padding="VALID", rngs=rngs)
        size = (data.shape[0] // 2 - 2) ** 2 if self.image else data.shape[0] - 2
        self.head = nnx.Linear(size * WIDTH, data.classes, rngs=rngs)

    def features(self, x):
        """What the head sees."""
        x = self.conv2(nnx.relu(self.conv1(x[..., None] if self.image else x)))
        return nnx.relu(x).reshape(len(x), -1)


class LSTM(nnx.Module):
    """One layer over the tokens; its last output counts."""

    def __init__(self, data: Data, rngs: nnx.Rngs):
        self.cell = nnx.OptimizedLSTMCell(data.shape[1], WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, data.classes, rngs=rngs)

    def features(self, x):
        """What the head sees."""
        zeros = jnp.zeros((len(x), WIDTH))

        def step(carry, token):
            return self.cell(carry, token)[0], None

        return jax.lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[0][1]


class Transformer(nnx.Module):
    """One block over the tokens, whose mean counts."""

    def __init__(self, data: Data, rngs: nnx.Rngs):
        self.embed = nnx.Linear(data.shape[1], WIDTH, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (data.shape[0], WIDTH)))
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.inner = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.outer = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, data.classes, rngs=rngs)

    def features(self, x):
        """What the head sees."""
        x = self.embed(x) + self.places[...]
        x = x + self.attention(self.norm1(x))
        x = x + self.outer(nnx.gelu(self.inner(self.norm2(x))))
        return jnp.mean(x, axis=1)


MODELS = {"MLP": MLP, "CNN": CNN, "LSTM": LSTM, "transformer": Transformer}


def build(model: str, data: str, key: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its parameters, and these."""
    return nnx.split(MODELS[model](DATA[data], nnx.Rngs(key)))


def logits(graph: nnx.GraphDef, params: Any, x: jax.Array, kept: Any = 1.0) -> jax.Array:
    """Of a batch; `kept` multiplies what the head sees, for dropout."""
    model = nnx.merge(graph, params)
    return model.head(model.features(x) * kept)
