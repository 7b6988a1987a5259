"""The mean of squared per-example gradients, element by element."""

import dataclasses

import jax
import jax.numpy as jnp

from optaxclip._leaves import Tree
from optaxclip._numerics import accumulator
from optaxclip.per_example.forms.contractions import by_rank, ranks
from optaxclip.per_example.forms.explicit_axes import of_gradients
from optaxclip.per_example.forms.forms import Form, Gathered, Outer, over_examples
from optaxclip.per_example.forms.incoming import Incoming
from optaxclip.per_example.forms.trees import cast

# Gradients that have to be stacked are stacked for so many numbers at a time (64 MB in float32).
_AT_ONCE = 2**24


@of_gradients
def second_moment(grads: Tree) -> Tree:
    """`1/B sum_b g_b^2`, elementwise: what an Adam of per-example gradients divides by.

    For `g_b = a_b h_b^T`, one outer product per example, it is `1/B (A*A)^T (H*H)`: the cost of a
    weighted sum. Elsewhere the gradients of a few examples at a time are stacked.

    Args:
      grads: per-example gradients, factored or stacked.

    Returns:
      A tree like the parameters, in float32 at least; of leaves that are not floating, zeros.

    Raises:
      ValueError: gradients without examples, or with different numbers of them.

    Guarantees:
      Equal to `jnp.mean(jnp.square(materialize(grads)), 0)`, in memory of 64 MB or one gradient
      of the leaf besides the gradients and the result.

    Edge cases:
      NaN stays; `masked` leaves examples out (they still count in B).

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import per_example_grad, second_moment
      >>> batch = jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> grads = per_example_grad(lambda w, x: w @ x)(jnp.ones(2), batch)
      >>> print(second_moment(grads))
      [5. 2.]

    Source: arXiv 2510.00236, for per-example variants of Adam.
    """
    incoming = Incoming.of(grads)
    zeros = incoming.zeros()

    def one(form: Form, zero: jax.Array) -> jax.Array:
        if not jnp.issubdtype(form.dtype, jnp.inexact):
            return zero
        return _sum_of_squares(cast(form, accumulator(form.dtype))) / incoming.size

    return incoming.update([one(*x) for x in zip(incoming.forms, zeros, strict=True)])


def _sum_of_squares(form: Form) -> jax.Array:
    if isinstance(form, Outer) and form.left.shape[2] == 1:
        squared = dataclasses.replace(form, left=_squared(form.left), right=_squared(form.right))
        return squared.weighted_sum(jnp.ones(len(form.left)))
    if isinstance(form, Gathered):
        # One row for each distinct id of an example: the sum of the rows with that id.
        of, t = ranks(form.ids), form.ids.shape[1]
        rows = by_rank(of, form.right, t)
        ids = jax.vmap(lambda of, ids: jnp.zeros_like(ids).at[of].set(ids))(of, form.ids)
        unique = dataclasses.replace(form, ids=ids, right=_squared(rows))
        return unique.weighted_sum(jnp.ones(len(ids)))
    return _by_parts(form)


def _by_parts(form: Form) -> jax.Array:
    """From the gradients of as many examples at a time as are allowed."""
    number = len(jax.tree.leaves(form)[0])
    most = max(1, _AT_ONCE // max(1, jax.ShapeDtypeStruct(form.shape, form.dtype).size))
    size = max(k for k in range(1, min(number, most) + 1) if number % k == 0)

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = over_examples(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), form)
        return total + jnp.sum(_squared(part.materialize()), axis=0), None

    starts = jnp.arange(0, number, size)
    return jax.lax.scan(add, jnp.zeros(form.shape, form.dtype), starts)[0]


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(accumulator(x.dtype)))
