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
from optaxclip._numerics import accumulator
from optaxclip.per_example.arguments import Argnums, Call, Options, call_of, unbatched_aux
from optaxclip.per_example.costs import Costs, Method, costs_of, total_loss
from optaxclip.per_example.explicit_axes import on_automatic_axes
from optaxclip.per_example.factored import Factored, factored, stacked
from optaxclip.per_example.fallbacks import refuse_fallbacks
from optaxclip.per_example.forms import zero_like
from optaxclip.per_example.microbatches import accumulated, check_divides
from optaxclip.per_example.trees import cast, sq_norms, weighted_sum

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
        `"two_pass"`: norms from factored gradients, then the gradient of `sum_b c_b loss_b`:
        a second forward and backward pass; one pass where a `custom_vjp` in the loss may not be
        linear, as the loss cannot be scaled then. `"vmap"`: the gradients of all examples, stacked.
        `"auto"`: one pass or stacked, by bytes and operations estimated from shapes.
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
      All methods give the same numbers to rounding. Under `jit`, what a method does not need
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

        seen: list[Costs] = []

        def part(batch: list[Any]) -> tuple[list[Any], Any]:
            some = dataclasses.replace(call, batch=batch)
            chosen, (losses, aux, forms, *_) = scheduled(some, method, seen)
            if strict and chosen != "vmap":
                refuse_fallbacks(call.like_params(forms, lambda leaf: zero_like(leaf, some.size)))
            squares = sq_norms(forms)
            c = jax.lax.stop_gradient(weights(squares))
            _check_weights(c, some.size)
            if chosen == "two_pass":
                return _second_sums(some, c), (losses, squares, c, aux)
            wide = [cast(form, accumulator(form.dtype)) for form in forms]
            return weighted_sum(wide, c), (losses, squares, c, aux)

        once = jax.jit(part)  # traced once a size
        size: Any = microbatch_size
        if size == "auto":
            size = best_microbatch_size(call, once, seen) if method == "auto" else None
        check_divides(size, call.size)
        run = part if size is None else functools.partial(accumulated, once, size=size)
        sums, (losses, squares, c, aux) = run(call.batch)
        sums = [x.astype(p.dtype) for x, p in zip(sums, call.params, strict=True)]
        total = call.like_params(sums, lambda leaf: zero_like(leaf, call.size).weighted_sum(c))
        return Reweighted(total, losses, squares, c, unbatched_aux(aux, options))

    @functools.wraps(fun)
    def reweighted(*args: Any, **kwargs: Any) -> Reweighted:
        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return reweighted


def best_microbatch_size(call: Call, part: Callable, seen: list[Costs]) -> int | None:
    """As many examples at a time as `Costs.parts` asks for, or a few less; None for all.

    `part` takes a batch and appends to `seen` what it costs. It is tried on half of the batch,
    the usual answer, so that it need not be traced again.
    """
    half = call.size // 2 if call.size % 2 == 0 else call.size
    jax.eval_shape(part, [x[:half] for x in call.batch])
    parts = seen[-1].parts(call.size // half)
    sizes = [d for d in range(1, call.size + 1) if call.size % d == 0 and d * parts <= call.size]
    if parts == 1 or not sizes or 4 * sizes[-1] * parts < call.size:
        return None
    return sizes[-1]


def check_method(method: Any) -> None:
    """Raises unless `method` is one of the schedules, or "auto"."""
    known = ("auto", *get_args(Method))
    if method not in known:
        raise ValueError(f"unknown method, got {method!r}. Use one of {known}.")


def scheduled(
    call: Call, method: Method | Literal["auto"], seen: list[Costs]
) -> tuple[Method, Factored]:
    """The schedule to take and the gradients it works on.

    What "auto" finds that it costs is appended to `seen`. A loss with a backward rule that may not
    be linear is not scaled: one pass takes the place of two.
    """
    if method == "vmap":
        return "vmap", stacked(call)
    found = factored(call)
    if method == "auto":
        seen.append(costs_of(call, found.forms))
        method = seen[-1].method
    elif not found.linear:
        method = "one_pass"
    return method, stacked(call) if method == "vmap" else found


def second_pass(call: Call, weights: jax.Array) -> Tree:
    """The gradient of the reweighted loss."""
    sums = _second_sums(call, weights)
    return call.like_params(sums, lambda leaf: zero_like(leaf, call.size).weighted_sum(weights))


def _second_sums(call: Call, weights: jax.Array) -> list[jax.Array]:
    return jax.grad(total_loss(call, weights))(call.params, call.batch)


def _check_weights(weights: Any, size: int) -> None:
    if jnp.shape(weights) != (size,):
        raise ValueError(
            f"weights must return one number per example, got shape {jnp.shape(weights)} for"
            f" squared norms of shape {(size,)}. Return an array of that shape."
        )
