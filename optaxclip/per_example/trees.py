"""Sums, norms and products over trees of per-example gradients.

A leaf is a form or an array of stacked gradients, [B, *shape]; a tree may mix the two.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.per_example.forms import Dense, Form, Sum, is_form
from optaxclip.per_example.safe_norms import norms_of

Tree = Any


def sq_norms(grads: Tree) -> jax.Array:
    """`|g_b|^2` over the whole tree, [B], in float32 (float64 for 64-bit leaves)."""
    return _total([form.sq_norm() for form in _forms(grads)])


def norms(grads: Tree) -> jax.Array:
    """`|g_b|` over the whole tree, [B], also where its square is out of range.

    Costs memory and compile time; `sqrt(sq_norms(grads))` is right between 1e-19 and 1e19.
    """
    forms = _forms(grads)
    _check_leaves(forms)
    return norms_of(forms)


def inner(grads: Tree, other: Tree) -> jax.Array:
    """`<g_b, h_b>` over the whole tree, [B]. Both have one structure."""
    ours: Any = jax.tree.structure(grads, is_leaf=is_form)
    theirs: Any = jax.tree.structure(other, is_leaf=is_form)
    if ours != theirs:
        raise ValueError(
            f"grads and other must have one structure, got {ours} and {theirs}. Take both"
            " with respect to the same parameters."
        )
    pairs = zip(_forms(grads), _forms(other), strict=True)
    return _total([x.inner(y) for x, y in pairs])


def weighted_sum(grads: Tree, weights: jax.Array) -> Tree:
    """`sum_b c_b g_b`: a tree like the parameters, without storing the gradients."""
    weights = jnp.asarray(weights)
    if weights.ndim != 1:
        raise ValueError(
            f"weights must have one entry per example, got shape {weights.shape}. Pass an"
            " array of shape [B]."
        )
    return _map(lambda form: form.weighted_sum(weights), grads)


def materialize(grads: Tree) -> Tree:
    """The gradients stacked, [B, *shape] at each leaf: what `vmap(grad)` returns."""
    return _map(lambda form: form.materialize(), grads)


def masked(grads: Tree, keep: jax.Array) -> Tree:
    """The gradients with zero for the examples where `keep`, [B], is false, NaN or not.

    Every array of a form has the examples on its first axis, and one whose factors (and ids,
    which stay in range) are zero is zero.
    """

    def mask(x: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return jax.tree.map(mask, grads)


def cast(form: Form, dtype: Any) -> Form:
    """The gradient as that of a parameter of another dtype; it is summed in that dtype then."""
    if form.dtype == dtype:
        return form
    if isinstance(form, Sum):
        return Sum(tuple(cast(x, dtype) for x in form.terms))
    if isinstance(form, Dense):
        return Dense(form.stacked.astype(dtype), form.reason)
    factored: Any = form
    return dataclasses.replace(factored, layout=factored.layout.cast(dtype))


def _form(leaf: Any) -> Form:
    return leaf if is_form(leaf) else Dense(jnp.asarray(leaf))


def _map(fun: Any, grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: fun(_form(leaf)), grads, is_leaf=is_form)


def _forms(grads: Tree) -> list[Form]:
    return [_form(leaf) for leaf in jax.tree.leaves(grads, is_leaf=is_form)]


def _total(parts: list[jax.Array]) -> jax.Array:
    _check_leaves(parts)
    return functools.reduce(jnp.add, parts)


def _check_leaves(leaves: list[Any]) -> None:
    if not leaves:
        raise ValueError("grads must have at least one leaf, got none. Pass parameters.")
