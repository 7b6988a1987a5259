"""Sums, norms and products over trees of per-example gradients.

A leaf is a form or an array of stacked gradients, [B, *shape]; a tree may mix the two.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._leaves import Tree
from optaxclip._numerics import added
from optaxclip.per_example.forms.explicit_axes import of_gradients
from optaxclip.per_example.forms.forms import Dense, Form, Shared, Sum, is_form, over_examples
from optaxclip.per_example.forms.incoming import examples_of
from optaxclip.per_example.forms.safe_norms import norms_of


@of_gradients
def sq_norms(grads: Tree) -> jax.Array:
    """`|g_b|^2` over the whole tree, [B].

    Args:
      grads: per-example gradients, factored or stacked: what `per_example_grad(fun)` or
        `vmap(grad)` returns.

    Returns:
      One number per example, in float32 (float64 for 64-bit leaves).

    Raises:
      ValueError: a tree without leaves, or whose leaves differ in B.

    Edge cases:
      In float32 it is infinite for norms beyond 1e19; see `norms`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import sq_norms
      >>> print(sq_norms({"w": jnp.array([[3.0, 4.0], [1.0, 0.0]]), "b": jnp.array([0.0, 2.0])}))
      [25.  5.]
    """
    examples_of(grads)
    return added([form.sq_norm() for form in _forms(grads)])


@of_gradients
def norms(grads: Tree) -> jax.Array:
    """`|g_b|` over the whole tree, [B], also where its square is out of range.

    Costs memory and compile time; `sqrt(sq_norms(grads))` is right between 1e-19 and 1e19.

    Args:
      grads: per-example gradients, factored or stacked.

    Returns:
      One number per example, in float32 (float64 for 64-bit leaves).

    Raises:
      ValueError: a tree without leaves, or whose leaves differ in B.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import norms
      >>> print((norms(jnp.array([[3e25, 4e25], [0.0, 1e25]])) / 1e25).round(3))
      [5. 1.]
    """
    examples_of(grads)
    return norms_of(_forms(grads))


@of_gradients
def inner(grads: Tree, other: Tree) -> jax.Array:
    """`<g_b, h_b>` over the whole tree, [B].

    Args:
      grads: per-example gradients, factored or stacked.
      other: the like of the same parameters, for as many examples.

    Returns:
      One number per example, in float32 (float64 for 64-bit leaves).

    Raises:
      ValueError: trees of different structure or numbers of examples, or without leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import inner
      >>> print(inner(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 1.0], [0.0, 2.0]])))
      [3. 8.]
    """
    ours: Any = jax.tree.structure(grads, is_leaf=is_form)
    theirs: Any = jax.tree.structure(other, is_leaf=is_form)
    if ours != theirs:
        raise ValueError(
            f"grads and other must have one structure, got {ours} and {theirs}. Take both"
            " with respect to the same parameters."
        )
    sizes = examples_of(grads), examples_of(other)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"grads and other must have one number of examples, got {sizes[0]} and {sizes[1]}. Take"
            " both of one batch."
        )
    pairs = zip(_forms(grads), _forms(other), strict=True)
    return added([x.inner(y) for x, y in pairs])


@of_gradients
def weighted_sum(grads: Tree, weights: jax.Array) -> Tree:
    """`sum_b c_b g_b`: a tree like the parameters, without storing the gradients.

    Args:
      grads: per-example gradients, factored or stacked.
      weights: c, [B].

    Returns:
      A tree like the parameters, of their dtypes.

    Raises:
      ValueError: weights that are not [B]; a tree without leaves, or whose leaves differ in B.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import weighted_sum
      >>> print(weighted_sum(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 0.5])))
      [2.5 4. ]
    """
    weights, size = jnp.asarray(weights), examples_of(grads)
    if weights.shape != (size,):
        raise ValueError(
            f"weights must have one entry per example, got shape {weights.shape} for {size}"
            f" examples. Pass an array of shape ({size},)."
        )
    return _map(lambda form: form.weighted_sum(weights), grads)


@of_gradients
def materialize(grads: Tree) -> Tree:
    """The gradients stacked, [B, *shape] at each leaf: what `vmap(grad)` returns.

    Args:
      grads: per-example gradients, factored or stacked.

    Returns:
      A tree like the parameters, of arrays; it takes B times their memory.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import materialize, per_example_grad
      >>> loss = lambda w, x: (x @ w) ** 2 / 2
      >>> grads = per_example_grad(loss)(jnp.ones(2), jnp.array([[1.0, 2.0], [0.0, 1.0]]))
      >>> print(materialize(grads))
      [[3. 6.]
       [0. 1.]]
    """
    return _map(lambda form: form.materialize(), grads)


@of_gradients
def masked(grads: Tree, keep: jax.Array) -> Tree:
    """The gradients with zero for the examples where `keep`, [B], is false, NaN or not.

    Factors are masked, not gradients, so nothing is stacked. Masked ids become 0, which is a valid
    row.

    Args:
      grads: per-example gradients, factored or stacked.
      keep: [B] of booleans.

    Returns:
      A tree like `grads`, of the same forms.

    Raises:
      ValueError: a mask that is not [B]; a tree without leaves, or whose leaves differ in B.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import masked
      >>> print(masked(jnp.array([[1.0, 2.0], [jnp.nan, 4.0]]), jnp.array([True, False])))
      [[1. 2.]
       [0. 0.]]
    """
    keep, size = jnp.asarray(keep), examples_of(grads)
    if keep.shape != (size,):
        raise ValueError(
            f"keep must have one entry per example, got shape {keep.shape} for {size} examples."
            f" Pass an array of booleans of shape ({size},)."
        )

    def mask(x: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x))

    return over_examples(mask, grads)


def cast(form: Form, dtype: Any) -> Form:
    """The gradient as that of a parameter of another dtype; it is summed in that dtype then."""
    if form.dtype == dtype:
        return form
    if isinstance(form, Sum):
        return Sum(tuple(cast(x, dtype) for x in form.terms))
    if isinstance(form, Dense):
        return Dense(form.stacked.astype(dtype), form.reason)
    if isinstance(form, Shared):
        return Shared(form.scales, form.gradient.astype(dtype))
    factored: Any = form
    return dataclasses.replace(factored, layout=factored.layout.cast(dtype))


def _form(leaf: Any) -> Form:
    return leaf if is_form(leaf) else Dense(jnp.asarray(leaf))


def _map(fun: Any, grads: Tree) -> Tree:
    return jax.tree.map(lambda leaf: fun(_form(leaf)), grads, is_leaf=is_form)


def _forms(grads: Tree) -> list[Form]:
    return [_form(leaf) for leaf in jax.tree.leaves(grads, is_leaf=is_form)]
