"""Weighted sums of per-example gradients, by the schedule that suits the shapes.

The weights may depend on the norms: clipping is `c_b = min(1, max_norm / |g_b|)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip.per_example.engine.arguments import Argnums, Options, call_of, unbatched_aux
from optaxclip.per_example.fallbacks import refuse_fallbacks
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes
from optaxclip.per_example.forms.forms import zero_like
from optaxclip.per_example.schedules.choice import choose, in_parts
from optaxclip.per_example.schedules.costs import Method
from optaxclip.per_example.schedules.factored import factored, see
from optaxclip.per_example.schedules.microbatches import check_divides
from optaxclip.per_example.schedules.weighed import Weighing, weighed

Weights = Callable[[jax.Array], jax.Array]


class Reweighted(NamedTuple):
    """What a function made by `reweighted_grad` returns."""

    grads: Tree
    """`sum_b c_b g_b`, like the differentiated arguments."""
    values: jax.Array
    """Losses, [B]."""
    sq_norms: jax.Array
    """`|g_b|^2`, [B]."""
    weights: jax.Array
    """`c_b`, [B]."""
    aux: Tree
    """[B, ...]; () without `has_aux`."""


def reweighted_grad(
    fun: Callable,
    weights: Weights,
    argnums: Argnums = 0,
    *,
    method: Method | Literal["auto"] = "auto",
    microbatch_size: int | Literal["auto"] | None = None,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    strict: bool = False,
) -> Callable[..., Reweighted]:
    """`sum_b c_b g_b` with weights that depend on the norms, `c = weights(|g|^2)`.

    Args:
      fun: the loss of one example, as for `per_example_grad`.
      weights: squared norms [B] -> weights [B]. No gradient flows through it.
      argnums: as for `per_example_grad`, and so are the options below.
      method: `"one_pass"`: norms and sum from factored gradients, which are held in between.
        `"two_pass"`: one pass forward, then norms from a pass back that holds nothing but what
        parameters with several uses need, then the gradient of `sum_b c_b loss_b`; one pass where
        a `custom_vjp` in the loss may not be linear, as the loss cannot be scaled then. `"vmap"`:
        the gradients of all examples, stacked. `"auto"`: by bytes and operations estimated from
        shapes; two passes where the batch is not to be cut and all else holds too much.
      microbatch_size: how many examples to take at a time, in a `lax.scan`: a divisor of B. What
        is held is then that of so many examples, and `weights` sees so many at a time. `"auto"`:
        half of them, or fewer where that would hold more than a plain gradient, as under
        `jax.checkpoint`; all if the batch is small next to the parameters, or with another
        `method` than `"auto"`. None: all.
      batch_argnums: which arguments hold the examples.
      has_aux: whether `fun` returns `(loss, aux)`.
      keep_batch_dim: whether `fun` sees an example as a batch of one.
      prng_argnum: the argument that is a random key.
      strict: whether to raise where no factored form is known for a leaf, so that its gradients
        must be stacked.

    Returns:
      A function of the arguments of `fun`, which returns a `Reweighted`.

    Raises:
      ValueError: unknown method; weights that are not [B]; a micro-batch size that is < 1 or does
        not divide B; otherwise as `per_example_grad`.
      TypeError: a micro-batch size that is no whole number; otherwise as `per_example_grad`.

    Guarantees:
      All methods give the same numbers to rounding; where the terms of a norm cancel, `"two_pass"`
      gives an upper bound of it. Under `jit`, what a method does not need
      is not computed.

    Edge cases:
      A weight of zero does not hide a gradient that is infinite or NaN. Inside `jax.shard_map` a
      device sums over its own examples: `jax.lax.psum` the result over the axes of the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import reweighted_grad
      >>> loss = lambda w, x: (x @ w) ** 2 / 2
      >>> to_unit_norm = lambda sq_norms: 1 / jnp.sqrt(sq_norms)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> print(reweighted_grad(loss, to_unit_norm)(jnp.ones(2), batch).grads)
      [0.6 1.8]
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)
    check_method(method)
    if microbatch_size is not None and microbatch_size != "auto":
        check_count(microbatch_size, "microbatch_size")

    def run(*args: Any, **kwargs: Any) -> Reweighted:
        call = call_of(fun, options, args, kwargs)
        seen = see(call)
        if strict and method != "vmap":
            forms = jax.eval_shape(lambda: factored(call, seen).forms)
            refuse_fallbacks(call.like_params(forms, lambda leaf: zero_like(leaf, call.size)))

        def checked(group: int, squares: jax.Array) -> jax.Array:
            found = weights(squares)
            _check_weights(found, squares.size)
            return found

        how = Weighing([0] * len(call.params), checked)
        check_divides(None if microbatch_size == "auto" else microbatch_size, call.size)
        chosen = choose(call, seen, how.groups, method, microbatch_size)

        def part(batch: list[Any]) -> tuple[list[Any], Any]:
            some = dataclasses.replace(call, batch=batch)
            found = weighed(some, seen, chosen.method, how)
            none = jnp.zeros(some.size)
            squares = found.squares.get(0, none)
            return found.sums, (found.losses, squares, how.of(0, squares), found.aux)

        sums, (losses, squares, c, aux) = in_parts(part, call.batch, call.size, chosen)
        sums = [x.astype(p.dtype) for x, p in zip(sums, call.params, strict=True)]
        total = call.like_params(sums, lambda leaf: zero_like(leaf, call.size).weighted_sum(c))
        return Reweighted(total, losses, squares, c, unbatched_aux(aux, options))

    @functools.wraps(fun)
    def reweighted(*args: Any, **kwargs: Any) -> Reweighted:
        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return reweighted


def check_method(method: Any) -> None:
    """Raises unless `method` is one of the schedules, or "auto"."""
    known = ("auto", *get_args(Method))
    if method not in known:
        raise ValueError(f"unknown method, got {method!r}. Use one of {known}.")


def _check_weights(weights: Any, size: int) -> None:
    if jnp.shape(weights) != (size,):
        raise ValueError(
            f"weights must return one number per example, got shape {jnp.shape(weights)} for"
            f" squared norms of shape {(size,)}. Return an array of that shape."
        )
