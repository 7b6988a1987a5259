"""Per-example gradients, values and norms of a loss."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from optaxclip._leaves import Tree
from optaxclip._numerics import root
from optaxclip.per_example.engine import rules as rules
from optaxclip.per_example.engine.arguments import Argnums, Call, Options, call_of, unbatched_aux
from optaxclip.per_example.fallbacks import refuse_fallbacks
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes
from optaxclip.per_example.forms.forms import Form, zero_like
from optaxclip.per_example.forms.trees import sq_norms
from optaxclip.per_example.schedules.factored import factored, see


def per_example_grad(
    fun: Callable,
    argnums: Argnums = 0,
    *,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """The gradient of `fun` for each example, factored: `g_b = d fun(params, batch_b) / d params`.

    Args:
      fun: the loss of one example, a scalar: `fun(params, example)`, or with more arguments.
        It sees the example without the batch axis.
      argnums: which arguments to differentiate; trees of arrays. With a tuple, the gradients
        are a tuple too.
      batch_argnums: which arguments hold the examples, on a leading axis [B] at every leaf.
        All others, and keyword arguments, are the same for all examples.
      has_aux: whether `fun` returns `(loss, aux)`; aux is any tree of arrays.
      keep_batch_dim: whether `fun` sees an example as a batch of one, [1, ...], for losses
        that expect a batch. Aux of shape [1, ...] loses that axis.
      prng_argnum: the argument that is a random key; each example gets a key split from it.
      strict: whether to raise where no factored form is known, so that gradients must be stacked.

    Returns:
      A function of the arguments of `fun`. It returns a tree like `params` whose leaves are
      forms, for `sq_norms`, `inner`, `weighted_sum` and `materialize`; with `has_aux`
      `(gradients, aux)`, aux with a leading [B]. They are equal to those of `vmap(grad(fun))`.

    Raises:
      ValueError: argument numbers out of range or with two roles; an empty batch, or of several
        sizes; an argument without arrays; `fun` returns no scalar; a stacked leaf under `strict`.
      TypeError: a differentiated argument or the loss has no real floating-point array.

    Edge cases:
      | no factored form known | the gradients of that leaf are stacked, [B, *shape]: as exact |
      | integer, boolean leaves | zeros of their dtype, which `optax.apply_updates` leaves alone |
      | random keys, None | float0; no leaf |
      | unused parameters | zero |

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import per_example_grad, sq_norms, weighted_sum
      >>> batch = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> grads = per_example_grad(lambda w, x: (x @ w) ** 2 / 2)(jnp.ones(2), batch)
      >>> print(sq_norms(grads), weighted_sum(grads, jnp.array([1.0, 10.0])))
      [45.  1.] [ 3. 16.]
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)

    @functools.wraps(fun)
    def grad(*args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            _, aux, grads = evaluate(call_of(fun, options, args, kwargs), options, strict)
            return (grads, aux) if has_aux else grads

        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return grad


def per_example_value_and_grad(
    fun: Callable,
    argnums: Argnums = 0,
    *,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """The losses [B] and the gradients of `per_example_grad`.

    Args:
      fun, argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum, strict: as in
        `per_example_grad`.

    Returns:
      A function of the arguments of `fun`, which returns `(losses, gradients)`, or
      `((losses, aux), gradients)` with `has_aux`. All else is as for `per_example_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import per_example_value_and_grad, sq_norms
      >>> loss = lambda w, x: (x @ w) ** 2 / 2
      >>> batch = jnp.array([[1.0, 2.0], [0.0, 1.0]])
      >>> losses, grads = per_example_value_and_grad(loss)(jnp.ones(2), batch)
      >>> print(losses, sq_norms(grads))
      [4.5 0.5] [45.  1.]
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)

    @functools.wraps(fun)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            losses, aux, grads = evaluate(call_of(fun, options, args, kwargs), options, strict)
            return ((losses, aux), grads) if has_aux else (losses, grads)

        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return value_and_grad


def per_example_norms(
    fun: Callable,
    argnums: Argnums = 0,
    *,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """The L2 norm of each example's gradient over all differentiated arguments, [B].

    Args:
      fun, argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum, strict: as in
        `per_example_grad`.

    Returns:
      A function of the arguments of `fun`, which returns the norms, or `(norms, aux)` with
      `has_aux`. All else is as for `per_example_grad`.

    Edge cases:
      In float32, norms beyond 1e19 come out infinite and norms below 1e-19 zero, as their squares
      do; `norms(per_example_grad(fun)(...))` has them right, at a price. The derivative at zero
      is zero.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> loss = lambda w, x: jnp.sum(x * w)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
      >>> print(optaxclip.per_example_norms(loss)(jnp.ones(2), batch))
      [5. 1.]
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)

    @functools.wraps(fun)
    def norms(*args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            _, aux, grads = evaluate(call_of(fun, options, args, kwargs), options, strict)
            found = root(sq_norms(grads))
            return (found, aux) if has_aux else found

        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return norms


def evaluate(call: Call, options: Options, strict: bool = False) -> tuple[jax.Array, Tree, Tree]:
    """Losses [B], aux [B, ...] and gradients of a call."""

    def grads_of(forms: list[Form]) -> Tree:
        return call.like_params(forms, lambda leaf: zero_like(leaf, call.size))

    seen = see(call)
    if strict:  # by shapes alone, before anything is stacked
        refuse_fallbacks(jax.eval_shape(lambda: grads_of(factored(call, seen).forms)))
    found = factored(call, seen)
    return found.losses, unbatched_aux(found.aux, options), grads_of(found.forms)
