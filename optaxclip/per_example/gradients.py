"""The doors: per-example gradients, values and norms of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._leaves import path_name
from optaxclip.per_example import rules as rules
from optaxclip.per_example.tracing import value_and_forms
from optaxclip.per_example.trees import sq_norms

Tree = Any


def per_example_grad(fun: Callable) -> Callable[[Tree, Tree], Tree]:
    """The gradient of `fun` for each example, factored: `g_b = d fun(params, batch_b) / d params`.

    Args:
      fun: `fun(params, example)`, the loss of one example, a scalar. It sees the example
        without the batch axis.

    Returns:
      A function of `(params, batch)`, whose batch has a leading axis [B] at every leaf. It
      returns a tree like `params` whose leaves are forms, for `sq_norms`, `inner`,
      `weighted_sum` and `materialize`.

    Raises:
      ValueError: the batch is empty or its sizes differ; `fun` returns no scalar.
      TypeError: a parameter or the loss is not a real floating-point array.

    Guarantees:
      Equal to `vmap(grad(fun))` for every differentiable `fun`: where no factored form is
      known, the gradients of that leaf are stacked.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import per_example_grad, sq_norms, weighted_sum
      >>> loss = lambda w, x: (x @ w) ** 2 / 2
      >>> batch = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> grads = per_example_grad(loss)(jnp.ones(2), batch)
      >>> print(sq_norms(grads))
      [45.  1.]
      >>> print(weighted_sum(grads, jnp.array([1.0, 10.0])))
      [ 3. 16.]
    """
    both = per_example_value_and_grad(fun)
    return lambda params, batch: both(params, batch)[1]


def per_example_value_and_grad(fun: Callable) -> Callable[[Tree, Tree], tuple[jax.Array, Tree]]:
    """The losses [B] and the gradients of `per_example_grad`.

    Args, raises and guarantees are those of `per_example_grad`.
    """

    def value_and_grad(params: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        _check_params(params)
        params = jax.tree.map(jnp.asarray, params)
        _check_batch(batch)
        losses, forms = value_and_forms(fun, params, batch)
        return losses, jax.tree.unflatten(jax.tree.structure(params), forms)

    return value_and_grad


def per_example_norms(fun: Callable) -> Callable[[Tree, Tree], jax.Array]:
    """The L2 norm of each example's gradient over all parameters, [B].

    Args, raises and guarantees are those of `per_example_grad`.
    """
    grad = per_example_grad(fun)
    return lambda params, batch: jnp.sqrt(sq_norms(grad(params, batch)))


def _check_params(params: Tree) -> None:
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError("params must have at least one array, got none. Pass the parameters.")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            kind = type(leaf).__name__ if dtype is None else f"{dtype}{list(leaf.shape)}"
            raise TypeError(
                f"params must be real floating-point arrays, got {kind} at"
                f" params/{path_name(path)}. Close over what is not differentiated, or keep it in"
                " a tree of its own."
            )


def _check_batch(batch: Tree) -> None:
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError("batch must have at least one array, got none. Pass the examples.")
    first: Any = None
    for path, leaf in leaves:
        name = "/".join(filter(None, ("batch", path_name(path))))
        shape = jnp.shape(leaf)
        if not shape:
            raise ValueError(
                f"every leaf of the batch must have the examples on its first axis, got a"
                f" scalar at {name}. Close over what all examples share, or repeat it."
            )
        if first is None:
            first = (name, shape)
        if shape[0] != first[1][0]:
            raise ValueError(
                f"batch sizes must agree, got {shape} at {name} and {first[1]} at {first[0]}."
                " Give every leaf of the batch the same first axis."
            )
    if first[1][0] == 0:
        raise ValueError(
            f"the batch must not be empty, got {first[1]} at {first[0]}. Skip this step, or pass"
            " at least one example."
        )
