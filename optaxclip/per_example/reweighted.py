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
from optaxclip._leaves import LeafFn, Tree
from optaxclip._numerics import alike
from optaxclip.measure.norms import Norm
from optaxclip.per_example.aggregators.clip import norm_by
from optaxclip.per_example.engine.arguments import Argnums, Call, Options, call_of, unbatched_aux
from optaxclip.per_example.fallbacks import refuse_fallbacks
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes
from optaxclip.per_example.forms.forms import zero_like
from optaxclip.per_example.schedules.choice import chooser, in_parts
from optaxclip.per_example.schedules.costs import Method
from optaxclip.per_example.schedules.factored import factored, see
from optaxclip.per_example.schedules.microbatches import check_divides
from optaxclip.per_example.schedules.weighed import Weighing, weighed

# An int below is meant as a multiple.
_LEAST_BYTES = 2**16

Weights = Callable[[jax.Array], jax.Array]


class Reweighted(NamedTuple):
    """What a function made by `reweighted_grad` returns."""

    grads: Tree
    """`sum_b c_b g_b`, like the differentiated arguments."""
    values: jax.Array
    """Losses, [B]."""
    sq_norms: jax.Array
    """`|g_b|^2`, [B]; by leaf or label [B, groups], in the order of paths, or of labels."""
    weights: jax.Array
    """`c_b`, like `sq_norms`."""
    aux: Tree
    """[B, ...]; () without `has_aux`."""


def reweighted_grad(
    fun: Callable,
    weights: Weights,
    argnums: Argnums = 0,
    *,
    by: Literal["global", "leaf"] | Tree | LeafFn = "global",
    method: Method | Literal["auto"] = "auto",
    microbatch_size: int | Literal["auto"] | None = None,
    memory: float | None = None,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    strict: bool = False,
) -> Callable[..., Reweighted]:
    """`sum_b c_b g_b` with weights that depend on the norms, `c = weights(|g|^2)`.

    Args:
      fun, argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum, strict: as in
        `per_example_grad`.
      weights: squared norms [B] -> weights [B]. No gradient flows through it.
      by: what one norm is taken over: `"global"`, an example's whole gradient; `"leaf"`; or labels,
        as in `clip_per_example`. `weights` is called for each.
      method: `"one_pass"`: factored gradients are held until the norms are known. `"two_pass"`:
        norms from a pass back that holds next to nothing, then the gradient of `sum_b c_b loss_b`;
        one pass where a `custom_vjp` in the loss may not be linear. `"vmap"`: the gradients of all
        examples, stacked. `"auto"`: the fastest that fits, estimated from shapes; see `explain`.
      microbatch_size: how many examples are handled at a time, and `weights` sees: a divisor of B.
        None: all. `"auto"`: as many as are fastest and fit, with `method="auto"`; else all.
      memory: what fits: a float: as many times what a plain gradient holds between its passes; an
        int: bytes. None: 1.1 times where the batch may be cut at little cost in time, else 2, and
        two passes only where nothing else fits. Unless it is bytes, 512 MB on an accelerator,
        16 MB on a CPU and twice the parameters always fit. If nothing does, what holds least.

    Returns:
      A function of the arguments of `fun`, which returns a `Reweighted`. All methods agree to
      rounding; where terms of a norm cancel, `"two_pass"`, and `"one_pass"` by leaf or label, may
      have an upper bound of it.

    Raises:
      ValueError, TypeError: an argument out of its range; otherwise as `per_example_grad`.

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
    norm = norm_by(by)
    check_method(method)
    check_memory(memory, method)
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

        of_param, count = _groups(call, norm)
        how = Weighing(of_param, checked)
        check_divides(None if microbatch_size == "auto" else microbatch_size, call.size)
        choosing = chooser(call, seen, how.groups, method, microbatch_size, memory)

        def joined(by_group: list[jax.Array]) -> jax.Array:
            return by_group[0] if by == "global" else jnp.stack(alike(by_group), axis=1)

        def part(method: Method, batch: list[Any]) -> tuple[list[Any], Any]:
            some = dataclasses.replace(call, batch=batch)
            found = weighed(some, seen, method, how)
            none = jnp.zeros(some.size)
            squares = [found.squares.get(group, none) for group in range(count)]
            c = [how.of(group, x) for group, x in enumerate(squares)]
            return found.sums, (found.losses, joined(squares), joined(c), found.aux)

        sums, (losses, squares, c, aux) = in_parts(part, call.batch, choosing)
        sums = [x.astype(p.dtype) for x, p in zip(sums, call.params, strict=True)]
        total = call.like_params(sums, lambda leaf: zero_like(leaf, 1).weighted_sum(jnp.zeros(1)))
        return Reweighted(total, losses, squares, c, unbatched_aux(aux, options))

    @functools.wraps(fun)
    def reweighted(*args: Any, **kwargs: Any) -> Reweighted:
        return on_automatic_axes(run, options.examples_of(args), args, kwargs)

    return reweighted


def _groups(call: Call, norm: Norm) -> tuple[list[int], int]:
    """The group of each parameter, and how many groups there are."""
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.params]
    like = call.like_params(types, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    numbers = jax.tree.leaves(call.like_params([*range(len(types))], lambda leaf: -1))
    leaves = norm.leaves(like)
    groups = norm.groups(leaves)
    of_param = [0] * len(types)  # that of an empty one, whose norm is zero, does not matter
    for position, group in zip(leaves.positions, groups.of_leaf, strict=True):
        of_param[numbers[position]] = group
    return of_param, max(1, groups.size)


def check_method(method: Any) -> None:
    """Raises unless `method` is one of the schedules, or "auto"."""
    known = ("auto", *get_args(Method))
    if method not in known:
        raise ValueError(f"unknown method, got {method!r}. Use one of {known}.")


def check_memory(memory: Any, method: Any) -> None:
    """Raises unless `memory` is a multiple or a number of bytes that "auto" can go by."""
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, int | float):
        raise TypeError(
            "memory must be a float, a multiple of what a plain gradient holds, or an int, bytes,"
            f" got {memory!r}. Pass for example 1.5, or 2**30."
        )
    if isinstance(memory, int) and memory < _LEAST_BYTES:
        raise ValueError(
            f"memory must be at least {_LEAST_BYTES} bytes if it is an int, got {memory}. Pass"
            f" {memory}.0 for {memory} times what a plain gradient holds."
        )
    if not memory > 0:
        raise ValueError(f"memory must be > 0, got {memory}. Pass for example 1.5.")
    if method != "auto":
        raise ValueError(
            f"memory must be None with method={method!r}, got {memory}. It says which schedule"
            ' method="auto" takes; pass microbatch_size to have another hold less.'
        )


def _check_weights(weights: Any, size: int) -> None:
    if jnp.shape(weights) != (size,):
        raise ValueError(
            f"weights must return one number per example, got shape {jnp.shape(weights)} for"
            f" squared norms of shape {(size,)}. Return an array of that shape."
        )
