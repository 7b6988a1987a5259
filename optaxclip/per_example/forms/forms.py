"""Per-example gradients of one parameter as data: factored, so that B x P is never stored.

Each form is a pytree and knows its squared norms, inner products and weighted sums over the
examples. Numbers of 16 bits are added in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._numerics import accumulator
from optaxclip.per_example.forms.cancellation import Terms, bounded, settled
from optaxclip.per_example.forms.contractions import (
    by_blocks,
    by_examples,
    by_rank,
    einsum,
    gram,
    gram_and_size,
    ranks,
    weigh,
)
from optaxclip.per_example.forms.layout import Layout

# Of a block where a norm is taken anew because its terms cancel: XLA sets the memory of that branch
# aside although an ordinary batch does not take it.
_RARE_BYTES = 2**20


# Gradients are kept for the sum in place of their factors if they take at most so many times the
# memory.
_MOST_INSTANTIATED = 1.25


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
        return einsum("bn,bn->b", *flat)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        flat = self.stacked.reshape(self.stacked.shape[0], -1)
        return einsum("b,bn->n", weights, flat).reshape(self.shape).astype(self.dtype)

    def materialize(self) -> jax.Array:
        return self.stacked


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right"],
    meta_fields=["layout", "precision"],
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """`g_b = sum_t left_bt right_bt^T`, with left [B, K, T, I] and right [B, K, T, O]."""

    left: jax.Array
    right: jax.Array
    layout: Layout
    precision: Any = None
    """Of the product whose gradient it is, as the user asked for it: that of weighted sums."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> Any:
        return self.layout.dtype

    @property
    def norm_method(self) -> str:
        """The cheapest way to the norm, by operations: rank one, Gram or instantiate."""
        if self.left.shape[2] <= 1:
            return "rank one"
        return "gram" if self._gram_is_cheaper(self) else "instantiate"

    def _gram_is_cheaper(self, other: "Outer") -> bool:
        t, s = self.left.shape[2], other.left.shape[2]
        _, i, o = self.layout.sizes
        # With s = 0 for one and the same: its gradient is instantiated once.
        return t * s * (i + o) < (t + (0 if other is self else s)) * i * o

    def sq_norm(self) -> jax.Array:
        return measured(self)

    def terms(self) -> Terms:
        """`|g_b|^2` and what it was added up from."""
        left, right = (einsum("bkti,bkti->bkt", x, x) for x in (self.left, self.right))
        if self.norm_method == "rank one":
            total = jnp.sum(left * right, axis=(1, 2))
            return Terms(total, total, total)
        lengths = jnp.sum(jnp.sqrt(left) * jnp.sqrt(right), axis=2)
        size = jnp.sum(jnp.square(lengths), axis=1)
        if self.norm_method == "instantiate":
            total = self._dot(self)
            return Terms(total, total, size)
        total, rough = gram_and_size(self.left, self.right, self.left, self.right)
        return Terms(total, rough, size)

    def inner(self, other: Form) -> jax.Array:
        if isinstance(other, Gathered | Shared | Sum):
            return other.inner(self)
        if isinstance(other, Outer):
            other = other._aligned(self.layout)
            same = other.layout == self.layout
            return self._dot(other) if same else _across(self, other)
        theirs = self.layout.from_parameter(other.materialize())
        product = einsum("bkti,bkio->bkto", self.left, theirs)
        return einsum("bkto,bkto->b", product, self.right)

    def _dot(self, other: "Outer") -> jax.Array:
        if self._gram_is_cheaper(other):
            return gram(self.left, self.right, other.left, other.right)

        def columns(right: jax.Array, right2: jax.Array) -> jax.Array:
            ours = einsum("bkti,bkto->bkio", self.left, right)
            if other is self:
                return einsum("bkio,bkio->b", ours, ours)
            return einsum("bkio,bkio->b", ours, einsum("bkti,bkto->bkio", other.left, right2))

        size = self.left.shape[0] * math.prod(self.layout.sizes) * (1 if other is self else 2)
        return by_blocks(columns, 3, size, self.right, other.right)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.layout.to_parameter(self._weighted(weights))

    def _weighted(self, weights: jax.Array) -> jax.Array:
        """The weighted sum as [K, I, O]."""
        left, right = self.left, self.right
        # Weigh the smaller factor; by default bfloat16 stays that, or the other one would be copied
        # in 32 bits: 0.5 GB on a chip for the logits of 4 x 1024 tokens and 32,000 words. Weighted
        # numbers may leave the range of float16.
        both = left.dtype == right.dtype == jnp.bfloat16
        narrow = jnp.bfloat16 if both and self.precision is None else None
        if left.size < right.size:
            left = weigh(left, weights, narrow)
        else:
            right = weigh(right, weights, narrow)
        k, i, o = self.layout.sizes
        if k == 1:  # an ordinary matrix product is faster than a batch of one
            rows = left.shape[0] * left.shape[2]
            flat = left.reshape(rows, i), right.reshape(rows, o)
            return einsum("ni,no->io", *flat, precision=self.precision)[None]
        return einsum("bkti,bkto->kio", left, right, precision=self.precision)

    def materialize(self) -> jax.Array:
        return self.layout.to_parameter(einsum("bkti,bkto->bkio", self.left, self.right))

    def _aligned(self, layout: Layout) -> "Outer":
        """With rows and columns exchanged, if that brings it into `layout`."""
        if self.layout != layout and self.layout.swapped() == layout:
            return Outer(self.right, self.left, layout, self.precision)
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
        return measured(self)

    def terms(self) -> Terms:
        """`|g_b|^2` and what it was added up from."""
        of, t = ranks(self.ids), self.ids.shape[1]

        def columns(right: jax.Array) -> jax.Array:
            rows = by_rank(of, right, t)
            return einsum("bto,bto->b", rows, rows)

        total = by_blocks(columns, 2, self.right.size, self.right)
        if t <= 1:
            return Terms(total, total, total)
        lengths = jnp.sum(jnp.sqrt(einsum("bto,bto->bt", self.right, self.right)), axis=1)
        return Terms(total, total, jnp.square(lengths))

    def inner(self, other: Form) -> jax.Array:
        if isinstance(other, Shared | Sum):
            return other.inner(self)
        if isinstance(other, Gathered):
            return self._dot(other) if other.layout == self.layout else _across(self, other)
        if isinstance(other, Outer):
            other = other._aligned(self.layout)
            return self._dot_outer(other) if other.layout == self.layout else _across(self, other)
        theirs = self.layout.from_parameter(other.materialize())[:, 0]
        rows = jnp.take_along_axis(theirs, self.ids[:, :, None], axis=1)
        return einsum("bto,bto->b", rows, self.right)

    def _dot(self, other: "Gathered") -> jax.Array:
        t = self.ids.shape[1]
        of = ranks(jnp.concatenate([self.ids, other.ids], axis=1))
        n = of.shape[1]

        def columns(right: jax.Array, right2: jax.Array) -> jax.Array:
            ours, theirs = by_rank(of[:, :t], right, n), by_rank(of[:, t:], right2, n)
            return einsum("bto,bto->b", ours, theirs)

        size = 2 * (self.right.size + other.right.size)
        return by_blocks(columns, 2, size, self.right, other.right)

    def _dot_outer(self, other: Outer) -> jax.Array:
        """`sum_s <right_s, h_b[ids_s]>` with the rows `h_b[v] = sum_t left_t[v] right_t`.

        With S ids and V rows either the products of S and T, or the rows: S T O or T V O
        operations.
        """
        left, right = other.left[:, 0], other.right[:, 0]
        (b, s), t, (_, v, o) = self.ids.shape, left.shape[1], self.layout.sizes

        def products(ids: jax.Array, ours: jax.Array) -> jax.Array:
            picked = jnp.take_along_axis(left, ids[:, None, :], axis=2)
            return einsum("bts,bts->b", picked, einsum("bto,bso->bts", right, ours))

        def columns(ours: jax.Array, theirs: jax.Array) -> jax.Array:
            table = einsum("btv,bto->bvo", left, theirs)
            rows = jnp.take_along_axis(table, self.ids[:, :, None], axis=1)
            return einsum("bso,bso->b", rows, ours)

        if s <= v:
            return by_blocks(products, 1, 2 * b * s * t, self.ids, self.right)
        return by_blocks(columns, 2, b * (v + s) * o, self.right, right)

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return self.layout.to_parameter(self._weighted(weights))

    def _weighted(self, weights: jax.Array) -> jax.Array:
        """The weighted sum as [1, I, O]."""
        _, rows, o = self.layout.sizes
        right = weigh(self.right, weights).reshape(self.ids.size, o)
        return jnp.zeros((1, rows, o), right.dtype).at[0, self.ids.reshape(-1)].add(right)

    def materialize(self) -> jax.Array:
        _, rows, o = self.layout.sizes
        right = self.right.astype(accumulator(self.right.dtype))

        def one(ids: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.zeros((1, rows, o), right.dtype).at[0, ids].add(right)

        return self.layout.to_parameter(jax.vmap(one)(self.ids, right))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["scales", "gradient"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Shared:
    """`g_b = c_b g`, with c [B] and g [1, *shape]: of a term of the parameters alone."""

    scales: jax.Array
    gradient: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.gradient.shape[1:]

    @property
    def dtype(self) -> Any:
        return self.gradient.dtype

    def sq_norm(self) -> jax.Array:
        return jnp.square(self.scales) * _dot(self.gradient, self.gradient)

    def inner(self, other: "Form") -> jax.Array:
        if isinstance(other, Shared):
            return self.scales * other.scales * _dot(self.gradient, other.gradient)
        return self.scales * _along(other, self.gradient[0])

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        return (jnp.sum(weigh(self.scales, weights)) * self.gradient[0]).astype(self.dtype)

    def materialize(self) -> jax.Array:
        scales = self.scales.reshape(-1, *(1,) * len(self.shape))
        return (scales * self.gradient).astype(self.dtype)


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
        return measured(self)

    def sum_of_terms(self) -> Terms:
        """`|g_b|^2` and what it was added up from."""
        found = [terms_of_norm(x) for x in self.terms]
        total, rough, size = (functools.reduce(jnp.add, some) for some in zip(*found, strict=True))
        if all(x.rough is x.total for x in found):
            rough = total
        for i, x in enumerate(self.terms):
            for j, y in enumerate(self.terms[:i]):
                if not _apart(x, y):
                    total = total + 2 * x.inner(y)
                    rough = rough + 2 * jnp.sqrt(found[i].rough) * jnp.sqrt(found[j].rough)
                    size = size + 2 * jnp.sqrt(found[i].size) * jnp.sqrt(found[j].size)
        return Terms(total, rough, size)

    def inner(self, other: Form) -> jax.Array:
        return functools.reduce(jnp.add, (x.inner(other) for x in self.terms))

    def weighted_sum(self, weights: jax.Array) -> jax.Array:
        parts: list[Any] = [x for x in self.terms if _is_part(x)]
        whole = [x.weighted_sum(weights) for x in self.terms if not _is_part(x)]
        total = functools.reduce(jnp.add, whole) if whole else jnp.zeros(self.shape, self.dtype)
        for x in parts:
            total = x.layout.add_part(total, x._weighted(weights))
        return total

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
    if isinstance(form, Sum):
        return Sum(tuple(scale(x, factor) for x in form.terms))
    if isinstance(form, Shared):
        return Shared(form.scales * jnp.asarray(factor, form.scales.dtype), form.gradient)
    factored: Any = form
    right = factored.right * jnp.asarray(factor, factored.right.dtype)
    return dataclasses.replace(factored, right=right)


def instantiated(form: Form) -> Form:
    """The gradients themselves, where the norm needs them anyway and they are no larger."""
    if not isinstance(form, Outer) or form.norm_method != "instantiate":
        return form
    wide: Any = _wide(form)
    held = sum(x.size * x.dtype.itemsize for x in (form.left, form.right))
    size = form.left.shape[0] * math.prod(form.shape) * jnp.dtype(wide.dtype).itemsize
    return Dense(wide.materialize()) if size <= _MOST_INSTANTIATED * held else form


def zero_like(parameter: Any, count: int) -> Form:
    """The zero gradient of a parameter, for `count` examples: no terms.

    Its sum has the parameter's dtype, so that it can be added to integers and booleans too; of
    keys and float0, to which nothing can be added, it is float0.
    """
    shape, dtype = tuple(parameter.shape), parameter.dtype
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not (floating or jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
        dtype = jax.dtypes.float0
    layout = Layout(shape, dtype, ((), tuple(range(len(shape))), ()))
    wide = accumulator(dtype) if floating else jnp.float32
    left = jnp.zeros((count, 1, 0, math.prod(shape)), wide)
    return Outer(left, jnp.zeros((count, 1, 0, 1), wide), layout)


def is_form(leaf: Any) -> bool:
    """Whether a leaf is a form; otherwise it is an array."""
    return isinstance(leaf, Dense | Outer | Gathered | Shared | Sum)


def terms(form: Form) -> tuple[Form, ...]:
    """The forms that a form is the sum of."""
    return form.terms if isinstance(form, Sum) else (form,)


def over_examples(fun: Callable[[jax.Array], jax.Array], grads: Any) -> Any:
    """`fun` of each array of a tree of forms that has the examples on its first axis."""

    def one(x: Any) -> Any:
        return Shared(fun(x.scales), x.gradient) if isinstance(x, Shared) else fun(x)

    return jax.tree.map(one, grads, is_leaf=lambda x: isinstance(x, Shared))


def _dot(one: jax.Array, other: jax.Array) -> jax.Array:
    return einsum("n,n->", one.reshape(-1), other.reshape(-1))


def _along(form: Any, gradient: jax.Array) -> jax.Array:
    """`<g_b, h>` for one h, [*shape]: [B]."""
    if isinstance(form, Sum):
        return functools.reduce(jnp.add, (_along(x, gradient) for x in form.terms))
    if isinstance(form, Shared):
        return form.scales * _dot(form.gradient, gradient)
    if isinstance(form, Dense):
        stacked = form.stacked.reshape(form.stacked.shape[0], -1)
        return einsum("bn,n->b", stacked, gradient.reshape(-1))
    blocks = form.layout.from_parameter(gradient)
    if isinstance(form, Outer):
        return einsum("bkto,bkto->b", einsum("bkti,kio->bkto", form.left, blocks), form.right)
    return einsum("bto,bto->b", blocks[0][form.ids], form.right)


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
        precision = functools.reduce(_finer, (x.precision for x in group))
        return Outer(left, right, first.layout, precision)
    if isinstance(first, Gathered):
        ids = jnp.concatenate([x.ids for x in group], axis=1)
        right = jnp.concatenate([x.right for x in group], axis=1)
        return Gathered(ids, right, first.layout)
    return Sum(tuple(group))


def measured(form: "Outer | Gathered | Sum") -> jax.Array:
    """`|g_b|^2`, also where the terms cancel that it is added up from."""
    found = terms_of_norm(form)
    if found.size is found.total:
        return found.total
    precisions = {getattr(x, "precision", None) for x in terms(form)}
    rounded = precisions != {(lax.Precision.HIGHEST,) * 2}
    return settled(found, math.prod(form.shape), lambda: _anew(form), rounded=rounded)


def at_most(form: Form) -> jax.Array:
    """`|g_b|^2`, or where the terms cancel that it is added up from, no less than that."""
    found = terms_of_norm(form)
    if found.size is found.total:
        return found.total
    return bounded(found, math.prod(form.shape))


def _anew(form: Any) -> jax.Array:
    """`|g_b|^2` from the gradients themselves, in bounded memory."""
    layouts = [x.layout for x in terms(form) if isinstance(x, Outer | Gathered)]
    if not layouts:  # as large as what is stacked already
        stacked = form.materialize().reshape(-1, math.prod(form.shape))
        return einsum("bn,bn->b", stacked, stacked)
    parts = [x._aligned(layouts[0]) if isinstance(x, Outer) else x for x in terms(form)]
    if any(isinstance(x, Outer | Gathered) and x.layout != layouts[0] for x in parts):
        return _anew_by_examples(form)
    layout = layouts[0]
    k, i, o = layout.sizes
    wide = accumulator(layout.dtype)
    columns = [_columns_of(x, layout) for x in parts]

    def some(*rights: jax.Array) -> jax.Array:
        whole = functools.reduce(
            jnp.add,
            (of(right).astype(wide) for (of, _), right in zip(columns, rights, strict=True)),
        )
        return einsum("bkio,bkio->b", whole, whole)

    rights = [right for _, right in columns]
    # In small blocks: XLA sets the room of a branch aside also where it is not taken.
    size = max(x.shape[0] for x in rights) * k * i * o
    return by_blocks(some, 3, size, *rights, least=_RARE_BYTES)


def _columns_of(form: Any, layout: Layout) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """What has columns on its last axis, and how some of them become columns of the gradient."""
    if isinstance(form, Outer):
        return (lambda right: einsum("bkti,bkto->bkio", form.left, right)), form.right
    if isinstance(form, Gathered):
        _, rows, _ = layout.sizes

        def put(right: jax.Array) -> jax.Array:
            return by_rank(form.ids, right[:, 0], rows)[:, None]

        return put, form.right[:, None]
    stacked = form.gradient if isinstance(form, Shared) else form.stacked
    blocks = layout.from_parameter(stacked)
    if isinstance(form, Shared):
        return (lambda x: form.scales.reshape(-1, 1, 1, 1) * x), blocks
    return (lambda x: x), blocks


def _anew_by_examples(form: Any) -> jax.Array:
    """The same for uses that see the parameter in different ways: from an example at a time."""

    def one(b: jax.Array) -> jax.Array:
        alone = over_examples(lambda x: lax.dynamic_slice_in_dim(x, b, 1), form)
        whole = functools.reduce(jnp.add, [_wide(x).materialize() for x in terms(alone)])
        return einsum("n,n->", whole.reshape(-1), whole.reshape(-1))

    return lax.map(one, jnp.arange(jax.tree.leaves(form)[0].shape[0]))


def terms_of_norm(form: Any) -> Terms:
    """`|g_b|^2` of a form and what it is added up from: what a norm costs in an ordinary batch."""
    if isinstance(form, Sum):
        return form.sum_of_terms()
    if isinstance(form, Dense | Shared):
        total = form.sq_norm()
        return Terms(total, total, total)
    return form.terms()


def _wide(form: Any) -> Form:
    """With the gradient in float32 at least."""
    if isinstance(form, Dense):
        return Dense(form.stacked.astype(accumulator(form.dtype)))
    if isinstance(form, Shared):
        return Shared(form.scales, form.gradient.astype(accumulator(form.dtype)))
    return dataclasses.replace(form, layout=form.layout.cast(accumulator(form.dtype)))


def _finer(one: Any, other: Any) -> Any:
    """Of two precisions the one that rounds less; None is the default."""
    if one is None or other is None or one == other:
        return other if one is None else one

    def rank(precision: Any) -> int:
        pair = precision if isinstance(precision, tuple) else (precision, precision)
        return min(int(getattr(p, "value", 0)) for p in pair)

    return max(one, other, key=rank)


def _is_part(form: Any) -> bool:
    return isinstance(form, Outer | Gathered) and form.layout.part is not None


def _apart(x: Any, y: Any) -> bool:
    """Whether two forms stand for disjoint parts of the parameter."""
    return _is_part(x) and _is_part(y) and x.layout.apart(y.layout)


def _across(x: Outer | Gathered, y: Outer | Gathered) -> jax.Array:
    """Inner products of forms whose layouts differ: one is stacked, a few examples at a time."""
    if x.layout.apart(y.layout):
        return jnp.zeros(x.right.shape[0], accumulator(x.right.dtype))

    def stack(form: Any) -> Dense:
        layout = form.layout.cast(accumulator(form.right.dtype))
        return Dense(dataclasses.replace(form, layout=layout).materialize())

    return by_examples(lambda x, y: x.inner(stack(y)), math.prod(x.shape), x, y)
