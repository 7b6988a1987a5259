"""Models of the per-example benchmark as other packages' documentation has them, a few times larger
than there is patience for in tests: `loss(params, example)` and a batch."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from _models import Workload, cnn, lm, lstm


def unet(batch: int) -> Workload:
    """Down and up again in two steps, group norm, as for denoising 28 x 28 images."""
    return _regression(_UNet(32), jax.random.normal(jax.random.key(1), (batch, 1, 28, 28)))


def mixer(batch: int) -> Workload:
    """Equinox's score network: patches, four mixer blocks, and back by a transposed convolution."""
    return _regression(_Mixer(64, 512), jax.random.normal(jax.random.key(1), (batch, 1, 28, 28)))


def autoencoder(batch: int) -> Workload:
    """Two convolutions of stride 2 and two transposed ones."""
    keys = jax.random.split(jax.random.key(0), 4)
    model = eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 32, 3, 2, 1, key=keys[0]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(32, 64, 3, 2, 1, key=keys[1]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.ConvTranspose2d(64, 32, 4, 2, padding=1, key=keys[2]), eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.ConvTranspose2d(32, 3, 4, 2, padding=1, key=keys[3]),
    ])  # fmt: skip
    return _regression(model, jax.random.normal(jax.random.key(1), (batch, 3, 32, 32)))


def deep_cnn(batch: int, layers: int = 6, width: int = 64) -> Workload:
    """Layers of one width on 16 x 16 maps."""
    keys = jax.random.split(jax.random.key(0), layers + 1)
    convs = [
        eqx.nn.Conv2d(3 if k == 0 else width, width, 3, padding=1, key=keys[k])
        for k in range(layers)
    ]
    parts = [x for conv in convs for x in (conv, eqx.nn.Lambda(jax.nn.relu))]
    pool = eqx.nn.Lambda(lambda x: jnp.mean(x, axis=(1, 2)))
    model = eqx.nn.Sequential([*parts, pool, eqx.nn.Linear(width, 10, key=keys[-1])])
    return _classification(model, jax.random.normal(jax.random.key(1), (batch, 3, 16, 16)))


def pooled_cnn(batch: int, channels: tuple[int, ...] = (24, 48, 96)) -> Workload:
    """Convolutions with max pooling, 32 x 32."""
    keys = jax.random.split(jax.random.key(0), len(channels) + 1)
    parts: list[Any] = []
    for key, i, o in zip(keys, (3, *channels), channels, strict=False):
        parts += [eqx.nn.Conv2d(i, o, 3, padding=1, key=key), eqx.nn.Lambda(jax.nn.relu)]
        parts.append(eqx.nn.MaxPool2d(2, 2))
    flat = channels[-1] * (32 // 2 ** len(channels)) ** 2
    parts += [eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(flat, 10, key=keys[-1])]
    model = eqx.nn.Sequential(parts)
    return _classification(model, jax.random.normal(jax.random.key(1), (batch, 3, 32, 32)))


def gru(batch: int, time: int, width: int = 64) -> Workload:
    """A GRU cell in a scan, the last state classified."""
    one, two = jax.random.split(jax.random.key(0))
    model = _Recurrent(
        eqx.nn.GRUCell(width, width, key=one), eqx.nn.Linear(width, 10, key=two)
    )  # fmt: skip
    return _classification(model, jax.random.normal(jax.random.key(1), (batch, time, width)))


def neural_ode(batch: int, width: int = 64) -> Workload:
    """A vector field of two layers, by 32 Heun steps that are differentiated one by one."""
    field = eqx.nn.MLP(4, 4, width, 2, activation=jax.nn.softplus, key=jax.random.key(0))

    def solve(field: Any, y0: jax.Array) -> jax.Array:
        term = dfx.ODETerm(lambda t, y, args: field(y))
        return dfx.diffeqsolve(
            term, dfx.Heun(), 0.0, 1.0, 1 / 32, y0,
            adjoint=dfx.DirectAdjoint(), max_steps=32,
        ).ys  # fmt: skip

    params, static = eqx.partition(field, eqx.is_inexact_array)

    def loss(params: Any, y0: jax.Array) -> jax.Array:
        return jnp.mean((solve(eqx.combine(params, static), y0) - jnp.roll(y0, 1)) ** 2)

    return Workload(loss, params, jax.random.normal(jax.random.key(1), (batch, 4)))


def vit(batch: int, d: int = 128, layers: int = 4) -> Workload:
    """A vision transformer on 32 x 32 x 3 in patches of 4."""
    model = _ViT(d, layers)
    return _classification(model, jax.random.normal(jax.random.key(1), (batch, 3, 32, 32)))


def ctc(batch: int, frames: int = 3200, d: int = 96) -> Workload:
    """Raw sound through strided convolutions and two transformer layers, with a CTC loss."""
    model = _Sound(d)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    labels = jax.random.randint(jax.random.key(2), (batch, 12), 1, 32)

    def loss(params: Any, example: Any) -> jax.Array:
        sound, labels = example
        logits = eqx.combine(params, static)(sound)
        none = jnp.zeros((1, len(logits)))
        return optax.ctc_loss(logits[None], none, labels[None], jnp.zeros((1, len(labels))))[0]

    return Workload(
        loss, params, (jax.random.normal(jax.random.key(1), (batch, 1, frames)), labels)
    )


MODELS: dict[str, Callable[[], Workload]] = {
    "U-Net B=16": lambda: unet(16),
    "mixer B=32": lambda: mixer(32),
    "autoencoder B=32": lambda: autoencoder(32),
    "six convolutions B=32": lambda: deep_cnn(32),
    "CNN, max pooling B=48": lambda: pooled_cnn(48),
    "CNN, four layers B=16": lambda: cnn(16, (32, 64, 128, 128)),
    "ViT B=32": lambda: vit(32),
    "CTC B=8": lambda: ctc(8),
    "LM B=4 T=384": lambda: lm(4, 384),
    "GRU B=64 T=64": lambda: gru(64, 64),
    "LSTM B=48 T=50": lambda: lstm(48, 50, 160),
    "neural ODE B=64": lambda: neural_ode(64),
}


def _regression(model: Any, batch: jax.Array) -> Workload:
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((eqx.combine(params, static)(x) - x) ** 2)

    return Workload(loss, params, batch)


def _classification(model: Any, batch: jax.Array) -> Workload:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    labels = jax.random.randint(jax.random.key(2), (len(batch),), 0, 10)

    def loss(params: Any, example: Any) -> jax.Array:
        x, label = example
        return optax.softmax_cross_entropy_with_integer_labels(
            eqx.combine(params, static)(x), label
        )

    return Workload(loss, params, (batch, labels))


class _Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, xs: jax.Array) -> jax.Array:
        start = jnp.zeros(self.cell.hidden_size)
        state, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
        return self.head(state)


class _MixerBlock(eqx.Module):
    patches: eqx.nn.MLP
    hidden: eqx.nn.MLP
    norm_1: eqx.nn.LayerNorm
    norm_2: eqx.nn.LayerNorm

    def __init__(self, patches: int, hidden: int, width: int, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.patches = eqx.nn.MLP(patches, patches, width, 1, key=one)
        self.hidden = eqx.nn.MLP(hidden, hidden, width, 1, key=two)
        self.norm_1 = eqx.nn.LayerNorm((hidden, patches))
        self.norm_2 = eqx.nn.LayerNorm((patches, hidden))

    def __call__(self, y: jax.Array) -> jax.Array:
        y = (y + jax.vmap(self.patches)(self.norm_1(y))).T
        return (y + jax.vmap(self.hidden)(self.norm_2(y))).T


class _Mixer(eqx.Module):
    first: eqx.nn.Conv2d
    blocks: list[_MixerBlock]
    norm: eqx.nn.LayerNorm
    last: eqx.nn.ConvTranspose2d

    def __init__(self, hidden: int, width: int) -> None:
        keys = jax.random.split(jax.random.key(0), 6)
        self.first = eqx.nn.Conv2d(1, hidden, 4, 4, key=keys[0])
        self.last = eqx.nn.ConvTranspose2d(hidden, 1, 4, 4, key=keys[1])
        self.blocks = [_MixerBlock(49, hidden, width, key) for key in keys[2:]]
        self.norm = eqx.nn.LayerNorm((hidden, 49))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.first(x)
        shape = y.shape
        y = y.reshape(len(y), -1)
        for block in self.blocks:
            y = block(y)
        return self.last(self.norm(y).reshape(shape))


class _UNet(eqx.Module):
    first: eqx.nn.Conv2d
    down: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.GroupNorm]
    up: list[eqx.nn.ConvTranspose2d]
    after: list[eqx.nn.Conv2d]
    last: eqx.nn.Conv2d

    def __init__(self, c: int) -> None:
        keys = jax.random.split(jax.random.key(0), 8)
        self.first = eqx.nn.Conv2d(1, c, 3, padding=1, key=keys[0])
        self.down = [
            eqx.nn.Conv2d(c, 2 * c, 3, 2, 1, key=keys[1]),
            eqx.nn.Conv2d(2 * c, 2 * c, 3, 2, 1, key=keys[2]),
        ]
        self.norms = [eqx.nn.GroupNorm(8, 2 * c) for _ in self.down]
        self.up = [
            eqx.nn.ConvTranspose2d(2 * c, 2 * c, 4, 2, padding=1, key=keys[3]),
            eqx.nn.ConvTranspose2d(2 * c, c, 4, 2, padding=1, key=keys[4]),
        ]
        self.after = [
            eqx.nn.Conv2d(4 * c, 2 * c, 3, padding=1, key=keys[5]),
            eqx.nn.Conv2d(2 * c, c, 3, padding=1, key=keys[6]),
        ]
        self.last = eqx.nn.Conv2d(c, 1, 3, padding=1, key=keys[7])

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = [jax.nn.silu(self.first(x))]
        for conv, norm in zip(self.down, self.norms, strict=True):
            kept.append(jax.nn.silu(norm(conv(kept[-1]))))
        y = kept.pop()
        for up, after in zip(self.up, self.after, strict=True):
            y = jax.nn.silu(after(jnp.concatenate([up(y), kept.pop()])))
        return self.last(y)


class _Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm_1: eqx.nn.LayerNorm
    norm_2: eqx.nn.LayerNorm
    feed: eqx.nn.MLP

    def __init__(self, d: int, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, d, key=one)
        self.feed = eqx.nn.MLP(d, d, 4 * d, 1, activation=jax.nn.gelu, key=two)
        self.norm_1, self.norm_2 = eqx.nn.LayerNorm(d), eqx.nn.LayerNorm(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.vmap(self.norm_1)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.feed)(jax.vmap(self.norm_2)(x))


class _ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    position: jax.Array
    blocks: list[_Block]
    head: eqx.nn.Linear

    def __init__(self, d: int, layers: int) -> None:
        keys = jax.random.split(jax.random.key(0), layers + 3)
        self.patches = eqx.nn.Conv2d(3, d, 4, 4, key=keys[0])
        self.position = 0.02 * jax.random.normal(keys[1], (64, d))
        self.head = eqx.nn.Linear(d, 10, key=keys[2])
        self.blocks = [_Block(d, key) for key in keys[3:]]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = x.reshape(len(x), -1).T + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=0))


class _Sound(eqx.Module):
    convs: list[eqx.nn.Conv1d]
    blocks: list[_Block]
    head: eqx.nn.Linear

    def __init__(self, d: int) -> None:
        keys = jax.random.split(jax.random.key(0), 6)
        shapes = zip((1, d, d), (10, 8, 4), (5, 4, 2), strict=True)
        self.convs = [
            eqx.nn.Conv1d(i, d, width, stride, key=key)
            for (i, width, stride), key in zip(shapes, keys, strict=False)
        ]
        self.blocks = [_Block(d, key) for key in keys[3:5]]
        self.head = eqx.nn.Linear(d, 32, key=keys[5])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = jax.nn.gelu(conv(x))
        x = x.T
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)
