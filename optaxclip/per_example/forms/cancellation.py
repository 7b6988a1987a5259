"""Squared norms made of terms that cancel.

Two things go wrong where the terms of a gradient, `sum_t a_t g_t^T`, are larger than their sum.

* `|a - b|^2` as `a.a - 2 a.b + b.b` is right to `eps` times the size of its terms: with a and b of
  length 1000 at a distance of 1, nothing is right in float32. Such a norm may be 0, and the example
  is not clipped. So whoever adds terms says how rough the total is, and where that is more than a
  thousandth of it the norm is taken anew, from the gradient itself. That is a branch, not taken in
  an ordinary batch; on a mesh it costs a reduction of one boolean.
* What is summed afterwards rounds in its own way: the sum that an example contributes to may be off
  by `eps` times the length of its terms, and that may be longer than the example's own gradient.

A norm that comes out too large clips too much, one that comes out too small breaks the bound. So
all are raised by what rounding may add.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.measure.platforms import rounding_of_products

# Rounding errors of Gram sums, in eps times the sum of absolute values. The largest of 10,000 was
# 2.2: random, of 2 to 64 rows of 16 and 256 elements, alike, centred or opposite (float32, CPU).
_ROUNDING = 4.0
# A total is kept if its rounding error is at most this part of it.
_TOLERATED = 1e-3
# Rounding errors of a gradient's elements are hardly ever aligned with it: of P elements they add
# about 1 / sqrt(P) of their length to its length.
_ALIGNED = 4.0


class Terms(NamedTuple):
    """A squared norm as the sum of terms, [B] each."""

    total: jax.Array
    rough: jax.Array
    """The sum of the absolute values of what was added up: its rounding error, but for eps."""
    size: jax.Array
    """The squared sum of the lengths of the terms of the gradient."""


def settled(
    terms: Terms, elements: int, anew: Callable[[], jax.Array], *, rounded: bool = True
) -> jax.Array:
    """A squared norm [B] of gradients of so many elements: right to 1e-3, not below the true one.

    `anew` returns the squared norms, [B], from the gradients themselves. `rounded`: sums of the
    gradients are taken at the platform's default precision.
    """
    if terms.rough is terms.total:
        return bounded(terms, elements)
    total, size = lax.stop_gradient((terms.total, terms.size))
    error = _error(terms)
    # Not where either is NaN; nor where both are infinite. Near the least float32 both products
    # underflow to 0, and rounding may have left a total below 0.
    cancels = (total * _TOLERATED < error) | (total < 0)
    kept = _raised(jnp.where(total < 0, 0, total) + error, size, elements, 1.0)

    def replaced() -> jax.Array:
        coarser = rounding_of_products(total.dtype) if rounded else 1.0
        squares = lax.stop_gradient(anew()).astype(total.dtype)
        return jnp.where(cancels, _raised(squares, size, elements, coarser), kept)

    return _instead(terms.total, lax.cond(jnp.any(cancels), replaced, lambda: kept))


def bounded(terms: Terms, elements: int) -> jax.Array:
    """The same without a branch: where terms cancel, as much too large as rounding could make it.

    That is `sqrt(4 eps rough)` at most: in float32, of terms of length 1 that cancel, 7e-4.
    """
    total, size = lax.stop_gradient((terms.total, terms.size))
    error = 0.0 if terms.rough is terms.total else _error(terms)
    return _instead(
        terms.total, _raised(jnp.where(total < 0, 0, total) + error, size, elements, 1.0)
    )


def _error(terms: Terms) -> jax.Array:
    """What rounding may have taken off a total."""
    rough = lax.stop_gradient(terms.rough)
    return _ROUNDING * jnp.finfo(rough.dtype).eps * rough


def _raised(total: jax.Array, size: jax.Array, elements: int, coarser: Any) -> jax.Array:
    """By what rounding may add to the length; `coarser` than in the dtype by a factor."""
    unit = coarser * jnp.finfo(total.dtype).eps / 4
    error = unit * jnp.sqrt(size)
    aligned = min(1.0, _ALIGNED / math.sqrt(max(elements, 1)))
    return jnp.square(jnp.sqrt(total + jnp.square(error)) + aligned * error)


@jax.custom_jvp
def _instead(total: jax.Array, found: jax.Array) -> jax.Array:
    """The second, with the derivative of the first."""
    return found


@_instead.defjvp
def _instead_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
