"""What happens to a gradient of norm n with bound c: rescale, soften, normalise, drop.

A response is a factor for the gradient, a function of n and c. It is computed once a group
and multiplied in: a division or a select over the leaves costs 2.3-3.3x Adam on CPU.
"""

import dataclasses
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_bound
from optaxclip._numerics import UNKNOWN

SoftShape = Literal["rational", "sqrt", "tanh"]


@runtime_checkable
class Response(Protocol):
    """How a gradient answers to its bound."""

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        """What to multiply by. NaN where either is NaN; 0 removes the gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class Rescale:
    """`min(1, c / (n + eps))`: onto the bound, exactly 1 inside it.

    `eps=1e-6` is PyTorch's rule; `None` divides by n itself.
    """

    eps: Any = None

    def __post_init__(self) -> None:
        if self.eps is not None:
            check_bound(self.eps, "eps", schedule=False)

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        if self.eps is not None:
            norm = norm + jnp.asarray(self.eps).astype(norm.dtype)
        # c / max(n, c) is exactly 1 inside the bound, and cheaper to compile than a select. What
        # depends on the bound alone is computed once for all leaves.
        info = jnp.finfo(norm.dtype)
        none, unbounded = bound < info.tiny, bound >= UNKNOWN
        bound = jnp.minimum(bound, info.max)
        norm = jnp.where(unbounded, jnp.minimum(norm, info.max), norm)
        return jnp.where(none, 0.0, bound) / jnp.maximum(norm, jnp.where(none, 1.0, bound))


@dataclasses.dataclass(frozen=True)
class Soften:
    """A smooth bound: the result approaches norm c but never passes it.

    With r = n / c: `"rational"` 1 / (1 + r); `"sqrt"` 1 / sqrt(1 + r^2); `"tanh"`
    tanh(r) / r.
    """

    shape: SoftShape = "rational"

    def __post_init__(self) -> None:
        if self.shape not in get_args(SoftShape):
            raise ValueError(
                f"unknown shape, got {self.shape!r}. Use one of {get_args(SoftShape)}."
            )

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        none = bound < jnp.finfo(norm.dtype).tiny
        ratio = norm / jnp.where(none, 1.0, bound)
        return jnp.where(none, 0.0, self._of_ratio(ratio))

    def _of_ratio(self, ratio: jax.Array) -> jax.Array:
        if self.shape == "rational":
            return 1 / (1 + ratio)
        if self.shape == "sqrt":
            big = ratio > 1
            # hypot(1, r) without overflow, with a finite derivative at 0
            inside = jnp.sqrt(1 + jnp.square(jnp.where(big, 0.0, ratio)))
            inverse = 1 / jnp.where(big, ratio, 1.0)
            return jnp.where(big, inverse / jnp.sqrt(1 + jnp.square(inverse)), 1 / inside)
        small = ratio < 1e-3  # tanh(r) / r = 1 - r^2 / 3 to float32 there
        safe = jnp.where(small, 1.0, ratio)
        return jnp.where(
            small, 1 - jnp.square(jnp.where(small, ratio, 0.0)) / 3, jnp.tanh(safe) / safe
        )


@dataclasses.dataclass(frozen=True)
class Normalize:
    """`c / (n + eps)`: onto the bound from both sides. A zero gradient stays zero."""

    eps: Any = 0.0

    def __post_init__(self) -> None:
        check_bound(self.eps, "eps", schedule=False)

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        padded = norm + jnp.asarray(self.eps).astype(norm.dtype)
        zero = padded == 0
        factor = jnp.where(zero, 1.0, bound / jnp.where(zero, 1.0, padded))
        return jnp.minimum(factor, jnp.finfo(norm.dtype).max)


@dataclasses.dataclass(frozen=True)
class AlmostNormalize:
    """`c / (n + r / (n + r))`: nearly onto the bound, but short gradients stay short.

    With r = 0.1 (`"psac"`) a gradient of norm 0.01 comes out with norm 0.01 c, where `Normalize`
    with eps=0.01 makes it 0.5 c. Source: Xia et al. (DP-PSAC), arXiv 2212.00328.
    """

    r: Any = 0.1

    def __post_init__(self) -> None:
        check_bound(self.r, "r", schedule=False)

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        r = jnp.asarray(self.r).astype(norm.dtype)
        shifted = norm + r
        damping = jnp.where(shifted == 0, 0.0, r / jnp.where(shifted == 0, 1.0, shifted))
        return Normalize().factor(norm + damping, bound)


@dataclasses.dataclass(frozen=True)
class ShrinkAlike:
    """`c / max |g|` for the elements of a leaf beyond c, so that only the largest lands on c.

    Of other groups than elements, which are scaled whole, the same as `Rescale`.
    """

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        return Rescale().factor(norm, bound)

    def of_elements(self, modulus: jax.Array, largest: jax.Array, bound: jax.Array) -> jax.Array:
        inside = modulus <= bound
        return jnp.where(inside, jnp.ones_like(modulus), self.factor(largest, bound))


@dataclasses.dataclass(frozen=True)
class Drop:
    """1 inside the bound, 0 beyond it."""

    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        kept = jnp.where(norm <= bound, jnp.ones_like(norm), 0.0)
        return jnp.where(jnp.isnan(norm) | jnp.isnan(bound), jnp.nan, kept)


_NAMED: dict[str, Response] = {
    "rescale": Rescale(),
    "rational": Soften("rational"),
    "sqrt": Soften("sqrt"),
    "tanh": Soften("tanh"),
    "normalize": Normalize(),
    "automatic": Normalize(1e-2),
    "psac": AlmostNormalize(0.1),
    "drop": Drop(),
}


def as_response(value: Any) -> Response:
    """A response by its name, or `value` if it is one already."""
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    if isinstance(value, Response) and not isinstance(value, type):
        return value
    raise ValueError(
        f"unknown response, got {value!r}. Use one of {sorted(_NAMED)}, or an object with a"
        " method factor(norm, bound)."
    )
