"""A small byte-level transformer in Flax NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

WIDTH, LAYERS, HEADS, CONTEXT = 64, 2, 4, 64


class Block(nnx.Module):
    """Attention and a feed-forward layer, each added to its input."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.inner = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.outer = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.outer(nnx.gelu(self.inner(self.norm2(x))))


class Transformer(nnx.Module):
    """Predicts each next byte."""

    def __init__(self, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, WIDTH, rngs=rngs)
        self.places = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, text):
        x = self.bytes(text) + self.places(jnp.arange(text.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: Transformer, text: jax.Array) -> jax.Array:
    """Mean cross-entropy a byte, in nats."""
    text = text.astype(jnp.int32)
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()
