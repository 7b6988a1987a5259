"""Clipped singular values by `jax.lax.linalg.qdwh`, to measure beside the library's iterations.

QDWH gives the polar decomposition, `X^T = U H`, in at most six steps with a QR or a Cholesky
decomposition each. The formulas are those of `optaxclip.clippers.polar`.
"""

import jax
import jax.numpy as jnp
from jax.lax.linalg import qdwh

_HIGHEST = jax.lax.Precision.HIGHEST


def hard(x: jax.Array, c: jax.Array) -> jax.Array:
    """`U min(s, c) V^T` of a matrix with at least as many columns as rows."""
    u, h, *_ = qdwh(x.T)
    excess = h - c * jnp.eye(len(h), dtype=h.dtype)
    _, size, *_ = qdwh((excess + excess.T) / 2)
    return x - jnp.matmul(excess + size, u.T, precision=_HIGHEST) / 2


def soft(x: jax.Array, c: jax.Array) -> jax.Array:
    """`(I + X X^T / c^2)^(-1/2) X` of such a matrix."""
    u, *_ = qdwh(jnp.concatenate([x.T / c, jnp.eye(len(x), dtype=x.dtype)]))
    return c * u[: x.shape[1]].T
