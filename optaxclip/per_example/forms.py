"""Per-example gradients of one parameter as data: factored, so that B x P is never stored.

Each form is a pytree and knows its squared norms, inner products and weighted sums over the
examples. Numbers of 16 bits are added in float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip.norms import accumulator
from optaxclip.per_example.layout import Layout


class Form(Protocol):
    """Per-example gradients of one parameter, for B examples."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def sq_norm(self) -> jax.Array:
        """`|g_b|^2`, shape [B]."""
        ...

    def inner(self, other: "Form") -> jax.Array:
        """`<g_b, h_b>`, shape [B]."""
        ...

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        """`sum_b c_b g_b`, shaped and typed like the parameter."""
        ...

    def materialize(self) -> jax.Array:
        """The gradients stacked, [B, *shape]."""
        ...


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """`einsum` that adds in float32, or in float64 where an operand has 64 bits."""
    dtype = functools.reduce(jnp.promote_types, (accumulator(x.dtype) for x in operands))
    if len({x.dtype for x in operands}) > 1:
        operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(spec, *operands, preferred_element_type=dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["stacked"], meta_fields=["reason"]
)
@dataclasses.dataclass(frozen=True)
class Dense:
    """The gradients themselves, [B, *shape].

    `reason` says why no factored form was found; it is empty where stacking is cheapest.
    """

    stacked: jax.Array
    reason: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked.shape[1:]

    @property
    def dtype(self) -> Any:
        return self.stacked.dtype

    def sq_norm(self) -> jax.Array:
        return self.inner(self)

    def inner(self, other: Form) -> jax.Array:
        if not isinstance(other, Dense):
            return other.inner(self)
        flat = (x.stacked.reshape(x.stacked.shape[0], -1) for x in (self, other))
        return _einsum("bn,bn->b", *flat)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        flat = self.stacked.reshape(self.stacked.shape[0], -1)
        return _einsum("b,bn->n", weights, flat).reshape(self.shape).astype(self.dtype)

    def materialize(self) -> jax.Array:
        return self.stacked


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """`g_b = sum_t left_bt right_bt^T`, with left [B, K, T, I] and right [B, K, T, O]."""

    left: jax.Array
    right: jax.Array
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> Any:
        return self.layout.dtype

    @property
    def norm_method(self) -> str:
        """The cheapest way to the norm, by operations: rank one, Gram or instantiate.

        Each allocates at most as much as the factors: T^2 < T I O / (I + O) < T I, and
        I O <= T (I + O).
        """
        t, i, o = self.left.shape[2], self.left.shape[3], self.right.shape[3]
        if t == 1:
            return "rank one"
        return "gram" if t * t * (i + o) < t * i * o else "instantiate"

    def sq_norm(self) -> jax.Array:
        if self.norm_method == "rank one":
            left, right = (_einsum("bkti,bkti->bk", x, x) for x in (self.left, self.right))
            return jnp.sum(left * right, axis=1)
        if self.norm_method == "gram":
            # Rounding may take the norm of gradients that cancel below zero.
            return jnp.maximum(self._gram(self), 0)
        blocks = self._blocks()
        return _einsum("bkio,bkio->b", blocks, blocks)

    def inner(self, other: Form) -> jax.Array:
        if isinstance(other, Gathered | Sum):
            return other.inner(self)
        if isinstance(other, Outer):
            other = other._aligned(self.layout)
            if other.layout != self.layout:
                return _one_by_one(self, other)
            t, s = self.left.shape[2], other.left.shape[2]
            i, o = self.left.shape[3], self.right.shape[3]
            if t * s * (i + o) < (t + s) * i * o:
                return self._gram(other)
            return _einsum("bkio,bkio->b", self._blocks(), other._blocks())
        theirs = self.layout.from_parameter(other.materialize())
        product = _einsum("bkti,bkio->bkto", self.left, theirs)
        return _einsum("bkto,bkto->b", product, self.right)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        left, right = self.left, self.right
        # Weigh the smaller factor.
        if left.size < right.size:
            left = _weigh(left, weights)
        else:
            right = _weigh(right, weights)
        k, i, o = self.layout.sizes
        if k == 1:  # an ordinary matrix product is faster than a batch of one
            left, right = left.reshape(-1, i), right.reshape(-1, o)
            return self.layout.to_parameter(_einsum("ni,no->io", left, right)[None])
        return self.layout.to_parameter(_einsum("bkti,bkto->kio", left, right))

    def materialize(self) -> jax.Array:
        return self.layout.to_parameter(self._blocks())

    def _blocks(self) -> jax.Array:
        return _einsum("bkti,bkto->bkio", self.left, self.right)

    def _gram(self, other: "Outer") -> jax.Array:
        left = _einsum("bkti,bksi->bkts", self.left, other.left)
        right = _einsum("bkto,bkso->bkts", self.right, other.right)
        return jnp.sum(left * right, axis=(1, 2, 3))

    def _aligned(self, layout: Layout) -> "Outer":
        """With rows and columns exchanged, if that brings it into `layout`."""
        if self.layout != layout and self.layout.swapped() == layout:
            return Outer(self.right, self.left, layout)
        return self


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "right"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True)
class Gathered:
    """Row `ids[b, t]` of a table receives `right[b, t]`: ids [B, T], right [B, T, O].

    Ids are in range; K is 1.
    """

    ids: jax.Array
    right: jax.Array
    layout: Layout

    norm_method = "segment sum"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> Any:
        return self.layout.dtype

    def sq_norm(self) -> jax.Array:
        rows = _by_rank(_ranks(self.ids), self.right, self.ids.shape[1])
        return _einsum("bto,bto->b", rows, rows)

    def inner(self, other: Form) -> jax.Array:
        if isinstance(other, Sum):
            return other.inner(self)
        if isinstance(other, Gathered):
            if other.layout != self.layout:
                return _one_by_one(self, other)
            t = self.ids.shape[1]
            ranks = _ranks(jnp.concatenate([self.ids, other.ids], axis=1))
            n = ranks.shape[1]
            ours = _by_rank(ranks[:, :t], self.right, n)
            theirs = _by_rank(ranks[:, t:], other.right, n)
            return _einsum("bto,bto->b", ours, theirs)
        if isinstance(other, Outer):
            other = other._aligned(self.layout)
            if other.layout != self.layout:
                return _one_by_one(self, other)
            # <g_b, h_b> = sum_s right_s . h_b[ids_s], with h_b[v] = sum_t left_t[v] right_t.
            left = jnp.take_along_axis(other.left[:, 0], self.ids[:, None, :], axis=2)
            gram = _einsum("bto,bso->bts", other.right[:, 0], self.right)
            return _einsum("bts,bts->b", left, gram)
        theirs = self.layout.from_parameter(other.materialize())[:, 0]
        rows = jnp.take_along_axis(theirs, self.ids[:, :, None], axis=1)
        return _einsum("bto,bto->b", rows, self.right)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        _, rows, o = self.layout.sizes
        right = _weigh(self.right, weights).reshape(-1, o)
        table = jnp.zeros((rows, o), right.dtype).at[self.ids.reshape(-1)].add(right)
        return self.layout.to_parameter(table[None])

    def materialize(self) -> jax.Array:
        _, rows, o = self.layout.sizes
        right = self.right.astype(accumulator(self.right.dtype))

        def one(ids: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.zeros((1, rows, o), right.dtype).at[0, ids].add(right)

        return self.layout.to_parameter(jax.vmap(one)(self.ids, right))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of several forms: a parameter with several uses. Build it with `add`."""

    terms: tuple[Form, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def dtype(self) -> Any:
        return self.terms[0].dtype

    def sq_norm(self) -> jax.Array:
        total = functools.reduce(jnp.add, (x.sq_norm() for x in self.terms))
        for i, x in enumerate(self.terms):
            for y in self.terms[:i]:
                total = total + 2 * x.inner(y)
        return jnp.maximum(total, 0)

    def inner(self, other: Form) -> jax.Array:
        return functools.reduce(jnp.add, (x.inner(other) for x in self.terms))

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, (x.weighted_sum(weights) for x in self.terms))

    def materialize(self) -> jax.Array:
        return functools.reduce(jnp.add, (x.materialize() for x in self.terms))


def add(forms: Sequence[Form]) -> Form:
    """The sum of forms of one parameter.

    Factors of one layout are joined along T and dense forms are added, so that a `Sum`
    has few terms however often the parameter is used.
    """
    alike: dict[Any, list[Any]] = {}
    for form in _flat(forms):
        if isinstance(form, Outer):
            known = [k for k in alike if isinstance(k, tuple) and k[0] is Outer]
            form = next((f for _, lay in known if (f := form._aligned(lay)).layout == lay), form)
        key = Dense if isinstance(form, Dense) else (type(form), getattr(form, "layout", id(form)))
        alike.setdefault(key, []).append(form)
    joined = tuple(_join(group) for group in alike.values())
    return joined[0] if len(joined) == 1 else Sum(joined)


def scale(form: Form, factor: jax.Array | float) -> Form:
    """`factor * g_b`, for a scalar factor."""
    if isinstance(form, Dense):
        return Dense(form.stacked * jnp.asarray(factor, form.dtype), form.reason)
    if isinstance(form, Outer | Gathered):
        right = form.right * jnp.asarray(factor, form.right.dtype)
        return dataclasses.replace(form, right=right)
    if isinstance(form, Sum):
        return Sum(tuple(scale(x, factor) for x in form.terms))
    raise TypeError(f"cannot scale a form, got {type(form).__name__}.")


def is_form(leaf: Any) -> bool:
    """Whether a leaf is a form; otherwise it is an array."""
    return isinstance(leaf, Dense | Outer | Gathered | Sum)


def terms(form: Form) -> tuple[Form, ...]:
    """The forms that a form is the sum of."""
    return form.terms if isinstance(form, Sum) else (form,)


def _flat(forms: Sequence[Form]) -> list[Form]:
    return [x for form in forms for x in terms(form)]


def _join(group: list[Any]) -> Form:
    first = group[0]
    if len(group) == 1:
        return first
    if isinstance(first, Dense):
        reasons = dict.fromkeys(x.reason for x in group if x.reason)
        stacked = functools.reduce(jnp.add, (x.stacked for x in group))
        return Dense(stacked, "; ".join(reasons))
    if isinstance(first, Outer):
        left = jnp.concatenate([x.left for x in group], axis=2)
        right = jnp.concatenate([x.right for x in group], axis=2)
        return Outer(left, right, first.layout)
    if isinstance(first, Gathered):
        ids = jnp.concatenate([x.ids for x in group], axis=1)
        right = jnp.concatenate([x.right for x in group], axis=1)
        return Gathered(ids, right, first.layout)
    return Sum(tuple(group))


def _weigh(factor: jax.Array, weights: jax.Array) -> jax.Array:
    """`weights[b] * factor[b]`, in the accumulator's dtype."""
    dtype = jnp.promote_types(accumulator(factor.dtype), accumulator(weights.dtype))
    column = weights.astype(dtype).reshape(-1, *(1,) * (factor.ndim - 1))
    return factor.astype(dtype) * column


def _ranks(ids: jax.Array) -> jax.Array:
    """Number the distinct ids of each example 0, 1, ...: [B, T] -> [B, T], without T x T."""

    def one(ids: jax.Array) -> jax.Array:
        ids = ids.astype(jnp.int32)
        order = jnp.argsort(ids)
        ordered = ids[order]
        steps = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        return jnp.zeros_like(ids).at[order].set(jnp.cumsum(steps, dtype=ids.dtype))

    return jax.vmap(one)(ids) if ids.size else ids


def _by_rank(ranks: jax.Array, right: jax.Array, number: int) -> jax.Array:
    """Add the rows of one rank: [B, T, O] -> [B, number, O]."""
    wide = right.astype(accumulator(right.dtype))
    return jax.vmap(lambda r, x: jax.ops.segment_sum(x, r, num_segments=number))(ranks, wide)


def _one_by_one(x: "Outer | Gathered", y: "Outer | Gathered") -> jax.Array:
    """Inner products of forms whose layouts differ: one example's gradients at a time."""

    def one(pair: tuple[Any, Any]) -> jax.Array:
        x, y = jax.tree.map(lambda leaf: leaf[None], pair)
        return Dense(x.materialize()).inner(Dense(y.materialize()))[0]

    def wide(form: Any) -> Any:
        layout = form.layout.cast(accumulator(form.right.dtype))
        return dataclasses.replace(form, layout=layout)

    return lax.map(one, (wide(x), wide(y)))
