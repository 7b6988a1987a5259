"""Functions of the singular values of matrices `[batch, m, n]`, m <= n, and of their bounds."""

import functools

import jax
import jax.numpy as jnp

# The best scaling of a Newton-Schulz step is up to sqrt(3), which makes the largest singular
# values tiny, to be blown up again with their rounding errors. With this much they stay above 0.65.
_SCALE = 1.45
_GROWTH = 2.1
"""Of the smallest ones in a step."""


def clip_by_svd(x: jax.Array, c: jax.Array, *, soft: bool) -> tuple[jax.Array, jax.Array]:
    """The clipped matrices, and their largest singular value `[batch, 1, 1]`."""
    unit = _unit(jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)))
    u, s, vt = jnp.linalg.svd(x / unit, full_matrices=False)
    s, bound = s[:, None, :], c / unit
    if soft:
        positive = bound > 0
        kept = s / jnp.hypot(1.0, s / jnp.where(positive, bound, 1.0))
        kept = jnp.where(positive, kept, jnp.where(jnp.isnan(bound), jnp.nan, 0.0))
    else:
        kept = jnp.minimum(s, bound)
    largest = s[:, :, :1]
    inside = (largest <= bound) & (not soft)
    return jnp.where(inside, x, (u * kept) @ vt * unit), largest * unit


def clip_by_products(
    x: jax.Array, c: jax.Array, *, soft: bool, steps: int
) -> tuple[jax.Array, jax.Array]:
    """The same by matrix products alone."""
    y, zero, top, norm = _estimated(x)
    bound = c / top
    if soft:
        inside = zero | jnp.isinf(c)
        clipped = _soft(y, jnp.minimum(bound, 1e4), steps)
    else:
        inside = zero | (top <= c)
        clipped = _hard(y, jnp.minimum(bound, 1.0), steps)
    clipped = jnp.where(c > 0, top * clipped, jnp.where(jnp.isnan(c), jnp.nan, 0.0 * x))
    return jnp.where(inside, x, clipped), norm


def largest_by_svd(x: jax.Array) -> jax.Array:
    """The largest singular value, `[batch, 1, 1]`."""
    unit = _unit(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True))
    return jnp.linalg.svd(x / unit, compute_uv=False)[:, None, :1] * unit


def largest_by_products(x: jax.Array) -> jax.Array:
    """The same, from below."""
    return _estimated(x)[-1]


def _estimated(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The matrix over `top`, whether it is zero, `top` >= every singular value, and the largest.

    The last from below; of a zero matrix the first is of ones.
    """
    largest = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    zero = largest == 0
    y = jnp.where(zero, 1.0, x / _unit(jax.lax.stop_gradient(largest)))
    above, below = map(jax.lax.stop_gradient, _spectral_norm(y))
    top, norm = (
        jax.lax.stop_gradient(jnp.minimum(s * _unit(largest), jnp.finfo(x.dtype).max))
        for s in (above, below)
    )
    return y / above, zero, top, jnp.where(zero, 0.0, norm)


def _hard(y: jax.Array, c: jax.Array, steps: int) -> jax.Array:
    """`Y - max(H - c, 0) O`, Y = H O, singular values up to 1.

    O need not be orthogonal below c: there the maximum is 0 whatever H is.
    """
    (o,) = _orthogonal([y], c, steps)
    excess = _symmetric(_mm(y, o.mT)) - c * jnp.eye(y.shape[1], dtype=y.dtype)[None]
    sign = excess / jnp.maximum(1 - c, c)
    least = jnp.asarray(_GROWTH ** -max(steps - 4, 0), y.dtype)
    for _ in range(steps):
        scale, least = _scaling(least)
        sign = _symmetric(_mm(sign, _step(_mm(sign, sign), scale)))
    return y - _mm(excess + _mm(excess, sign), o) / 2


def _soft(y: jax.Array, c: jax.Array, steps: int) -> jax.Array:
    """`c` times the first part of the orthogonal factor of `[Y, c I]`."""
    length = jnp.hypot(1.0, c)
    eye = jnp.broadcast_to(
        jnp.eye(y.shape[1], dtype=y.dtype)[None], (len(y), y.shape[1], y.shape[1])
    )
    first, _ = _orthogonal([y / length, c / length * eye], c / length, steps)
    return c * first


def _orthogonal(parts: list[jax.Array], least: jax.Array, steps: int) -> list[jax.Array]:
    """`(M M^T)^(-1/2) M` of the parts side by side, for singular values from `least` to 1."""
    for _ in range(steps):
        scale, least = _scaling(least)
        gram = functools.reduce(jnp.add, [_mm(part, part.mT) for part in parts])
        step = _step(gram, scale)
        parts = [_mm(step, part) for part in parts]
    return parts


def _scaling(least: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the next step, and the least singular value after it (Chen and Chow, 2014)."""
    scale = jnp.minimum(jnp.sqrt(3 / (1 + least + jnp.square(least))), _SCALE)
    grown = scale * least * (3 - jnp.square(scale * least)) / 2
    return scale, jnp.minimum(grown, 1.0)


def _step(gram: jax.Array, scale: jax.Array) -> jax.Array:
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    return scale / 2 * (3 * eye - jnp.square(scale) * gram)


def _spectral_norm(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest singular value from above, (sum s^16)^(1/16), and from below."""
    length = jnp.sqrt(jnp.sum(jnp.square(y), axis=(1, 2), keepdims=True))
    y = y / length
    fourth = _mm(gram := _mm(y, y.mT), gram)
    size = jnp.sqrt(jnp.sum(jnp.square(fourth), axis=(1, 2), keepdims=True))
    eighth = _mm(fourth / size, fourth / size)
    above = jnp.sum(jnp.square(eighth), axis=(1, 2), keepdims=True) ** (1 / 16) * size**0.25
    at = jnp.argmax(jnp.diagonal(eighth, axis1=1, axis2=2), axis=1)
    vector = jnp.take_along_axis(eighth, at[:, None, None], axis=2)
    for _ in range(4):
        vector = _mm(eighth, vector)
        vector = vector / jnp.linalg.norm(vector, axis=1, keepdims=True)
    below = jnp.linalg.norm(_mm(y.mT, vector), axis=1, keepdims=True)
    return length * above * (1 + 1e-5), length * below


def _mm(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _symmetric(x: jax.Array) -> jax.Array:
    return (x + x.mT) / 2


def _unit(largest: jax.Array) -> jax.Array:
    return jnp.where(largest > 0, largest, 1.0)
