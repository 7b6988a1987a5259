"""Sums, norms and products over trees of per-example gradients.

A leaf is a form or an array of stacked gradients, [B, *shape]; a tree may mix the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip.per_example.forms import Dense, Form, is_form

Tree = Any


def sq_norms(grads: Tree) -> jax.Array:
    """`|g_b|^2` over the whole tree, [B], in float32 (float64 for 64-bit leaves)."""
    return _total([form.sq_norm() for form in _forms(grads)])


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


def _form(leaf: Any) -> Form:
    return leaf if is_form(leaf) else Dense(jnp.asarray(leaf))


def _map(fun: Any, grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: fun(_form(leaf)), grads, is_leaf=is_form)


def _forms(grads: Tree) -> list[Form]:
    return [_form(leaf) for leaf in jax.tree.leaves(grads, is_leaf=is_form)]


def _total(parts: list[jax.Array]) -> jax.Array:
    if not parts:
        raise ValueError("grads must have at least one leaf, got none. Pass parameters.")
    return functools.reduce(jnp.add, parts)
