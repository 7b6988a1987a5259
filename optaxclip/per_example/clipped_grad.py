"""`clipped_grad`: the clipped sum as a function transformation, as jax-privacy has it."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import check_bound, check_count
from optaxclip._leaves import Tree
from optaxclip.per_example.engine.arguments import Argnums, Options, call_of, unbatched_aux
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes
from optaxclip.per_example.reweighted import check_memory, check_method
from optaxclip.per_example.schedules.clipped_sum import Clipping
from optaxclip.per_example.schedules.costs import Method
from optaxclip.per_example.schedules.microbatches import check_divides


class AuxiliaryOutput(NamedTuple):
    """What comes with the clipped sum, example by example; None where it was not asked for."""

    values: Any
    """Losses, [B]."""
    grad_norms: Any
    """Over all differentiated arguments, before clipping, [B]."""
    aux: Any
    """What the loss returns besides, [B, ...]."""


@dataclasses.dataclass(frozen=True)
class BoundedSensitivityCallable:
    """A function whose result one example moves by at most `l2_norm_bound`.

    With `has_aux` the result is a pair, and the bound holds for the gradient in it.
    """

    fun: Callable[..., Any]
    l2_norm_bound: Any
    has_aux: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself."""
        return self.fun(*args, **kwargs)

    def sensitivity(self, neighboring_relation: Any = "REPLACE_SPECIAL") -> Any:
        """How far the sum moves between neighbouring batches, in L2 norm.

        Args:
          neighboring_relation: a `dp_accounting.NeighboringRelation`, or its name:
            `"ADD_OR_REMOVE_ONE"` or `"REPLACE_SPECIAL"` (an example becomes zero) give
            `l2_norm_bound`, `"REPLACE_ONE"` twice that.

        Returns:
          The bound, of the type of `l2_norm_bound`: a number, or an array for a traced norm.

        Raises:
          ValueError: another relation.
        """
        name = getattr(neighboring_relation, "name", neighboring_relation)
        times = {"ADD_OR_REMOVE_ONE": 1, "REPLACE_SPECIAL": 1, "REPLACE_ONE": 2}
        if name not in times:
            raise ValueError(
                f"unknown neighboring_relation, got {neighboring_relation!r}. Use one of"
                f" {tuple(times)}."
            )
        return times[name] * self.l2_norm_bound


def _unchanged(grads: Tree) -> Tree:
    return grads


def clipped_grad(
    fun: Callable,
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: Any,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: Argnums = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[Tree], Tree] = _unchanged,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
    method: Method | Literal["auto"] = "auto",
    memory: float | None = None,
) -> BoundedSensitivityCallable:
    """The sum of clipped per-example gradients, `sum_b min(1, C / |g_b|) g_b`, like `jax.grad`.

    Keywords, defaults and results are those of `jax_privacy.clipping.clipped_grad` 2.0; the cost is
    about a plain gradient's. Options at length: `docs/how_to/clip_each_example.md`.

    Args:
      fun: the loss, a scalar: `fun(params, batch)`, called with each example as a batch of one.
      argnums, batch_argnums, has_aux: as in `per_example_grad`.
      l2_clip_norm: C >= 0, a number or a traced scalar, or a tree prefix of the gradient with
        such entries, each over what is below it; of one leaf also [L], a number for each slice.
      rescale_to_unit_norm: whether to divide clipped gradients by C.
      normalize_by: what the sum is divided by, > 0: the expected batch size, for example.
      keep_batch_dim: False: `fun` sees the example, or the examples of one user, without that axis.
      return_values, return_grad_norms: whether to return losses, and norms before clipping.
      pre_clipping_transform: a function of one example's gradient, before clipping; stacks them.
      microbatch_size: how many examples are handled at a time; it must divide B. None: all, or
        fewer where `method="auto"` finds that faster.
      nan_safe: whether an example with NaN or infinity counts as zero, or makes the sum NaN.
      dtype: of the sum; None: that of the parameters.
      prng_argnum, spmd_axis_name: a random key, split for the examples; as in `jax.vmap`.
      method, memory: as in `per_example.reweighted_grad`.

    Returns:
      A function of the arguments of `fun`, with `.sensitivity()` and `.l2_norm_bound`, by which no
      example moves the sum further. It returns the gradient, or
      `(gradient, AuxiliaryOutput(values, grad_norms, aux))` where these were asked for. Keyword
      arguments hold one entry an example; `is_padding_example`, [B]: those that count as zero.

    Raises:
      ValueError, TypeError: an argument out of its range; otherwise as `per_example_grad`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> loss = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> grad = optaxclip.clipped_grad(loss, l2_clip_norm=4.0, return_grad_norms=True)
      >>> clipped, aux = grad(3.0, jnp.array([0.0, 7.0, -2.0]))
      >>> print(clipped, aux.grad_norms, grad.sensitivity("REPLACE_ONE"))
      3.0 [3. 4. 5.] 8.0

    Source: jax-privacy 2.0 (Apache-2.0); Abadi et al., arXiv 1607.00133; De et al., 2204.13650.
    """
    _check(l2_clip_norm, normalize_by)
    if microbatch_size is not None:
        what = "a divisor of the number of examples, or None"
        check_count(microbatch_size, "microbatch_size", what=what)
    options = Options(
        argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum, named_examples=True
    )
    check_method(method)
    check_memory(memory, method)
    transform = None if pre_clipping_transform is _unchanged else pre_clipping_transform
    if transform is not None and method not in ("auto", "vmap"):
        raise ValueError(
            f"method must be 'vmap' with a pre_clipping_transform, got {method!r}. Pass that or"
            " 'auto': gradients that go through any function have to be stacked."
        )
    if transform is not None and memory is not None:
        raise ValueError(
            f"memory must be None with a pre_clipping_transform, got {memory}. Pass"
            " microbatch_size: gradients that go through any function have to be stacked."
        )
    clipping = Clipping(
        l2_clip_norm, rescale_to_unit_norm, transform, nan_safe, dtype, method, memory
    )
    with_aux = has_aux or return_values or return_grad_norms

    def run(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        call = call_of(fun, options, args, kwargs)
        call = dataclasses.replace(call, spmd_axis_name=spmd_axis_name)
        padding = _padding(is_padding_example, call.size)
        check_divides(microbatch_size, call.size)
        found = clipping.of_batch(call, padding, microbatch_size)
        grads = jax.tree.map(lambda x: _divided(x, normalize_by), found.sums)
        if not with_aux:
            return grads
        return grads, AuxiliaryOutput(
            values=found.values if return_values else None,
            grad_norms=found.grad_norms.astype(jnp.float32) if return_grad_norms else None,
            aux=unbatched_aux(found.aux, options) if has_aux else None,
        )

    @functools.wraps(fun)
    def grad(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        given = {"is_padding_example": is_padding_example, **kwargs}
        return on_automatic_axes(run, options.examples_of(args), args, given)

    bound = _norm_bound(l2_clip_norm, rescale_to_unit_norm) / normalize_by
    return BoundedSensitivityCallable(grad, bound, with_aux)


def clipped_value_and_grad(
    fun: Callable,
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: Any,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: Argnums = 1,
    keep_batch_dim: bool = True,
    pre_clipping_transform: Callable[[Tree], Tree] = _unchanged,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
    method: Method | Literal["auto"] = "auto",
    memory: float | None = None,
) -> BoundedSensitivityCallable:
    """The losses [B] and the sum of `clipped_grad`, in the order of `jax.value_and_grad`.

    Args:
      fun, argnums, has_aux: as in `clipped_grad`.
      l2_clip_norm, rescale_to_unit_norm, normalize_by: as there.
      batch_argnums, keep_batch_dim, pre_clipping_transform, microbatch_size: as there.
      nan_safe, dtype, prng_argnum, spmd_axis_name, method, memory: as there.

    Returns:
      A function of the arguments of `fun`, which returns `(values, gradient)`, or
      `((values, aux), gradient)` with `has_aux`. All else is as for `clipped_grad`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> loss = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> fun = optaxclip.clipped_value_and_grad(loss, l2_clip_norm=4.0)
      >>> print(*fun(3.0, jnp.array([0.0, 7.0, -2.0])))
      [ 4.5  8.  12.5] 3.0
    """
    inner = clipped_grad(
        fun, argnums, has_aux, return_values=True, l2_clip_norm=l2_clip_norm,
        rescale_to_unit_norm=rescale_to_unit_norm, normalize_by=normalize_by,
        batch_argnums=batch_argnums, keep_batch_dim=keep_batch_dim,
        pre_clipping_transform=pre_clipping_transform, microbatch_size=microbatch_size,
        nan_safe=nan_safe, dtype=dtype, prng_argnum=prng_argnum, spmd_axis_name=spmd_axis_name,
        method=method, memory=memory,
    )  # fmt: skip

    @functools.wraps(fun)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        grads, found = inner(*args, **kwargs)
        return ((found.values, found.aux) if has_aux else found.values), grads

    return BoundedSensitivityCallable(value_and_grad, inner.l2_norm_bound, True)


def _check(l2_clip_norm: Any, normalize_by: Any) -> None:
    entries = jax.tree.leaves_with_path(l2_clip_norm)
    for key_path, bound in entries or [((), l2_clip_norm)]:
        check_bound(bound, "l2_clip_norm" + jax.tree_util.keystr(key_path), schedule=False)
    if isinstance(normalize_by, numbers.Real) and not 0 < float(normalize_by) < math.inf:
        raise ValueError(
            f"normalize_by must be > 0, got {normalize_by}. Pass for example the batch size."
        )


def _padding(is_padding_example: Any, size: int) -> jax.Array | None:
    if is_padding_example is None:
        return None
    padding = jnp.asarray(is_padding_example)
    if padding.shape != (size,):
        raise ValueError(
            f"is_padding_example must have one entry per example, got shape {padding.shape} for"
            f" {size} examples. Pass an array of booleans of shape ({size},)."
        )
    return padding.astype(bool)


def _divided(x: jax.Array, by: Any) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact) or (isinstance(by, numbers.Real) and by == 1):
        return x
    return x / jnp.asarray(by, x.dtype)


def _norm_bound(l2_clip_norm: Any, to_unit_norm: bool) -> Any:
    """The root of the sum of the squared bounds, of slices too."""
    bounds: list[Any] = []
    for c in jax.tree.leaves(l2_clip_norm):
        bounds += [*map(float, c)] if isinstance(c, np.ndarray) and c.ndim == 1 else [c]
    if to_unit_norm:
        count = sum(math.prod(np.shape(c)) for c in bounds)
        return math.sqrt(count) if count != 1 else 1.0
    if len(bounds) == 1 and jnp.ndim(bounds[0]) == 0:
        (c,) = bounds
        return c if isinstance(c, numbers.Real) else jnp.maximum(c, 0.0)
    if all(isinstance(c, numbers.Real) for c in bounds):
        return math.hypot(*bounds)
    return jnp.sqrt(sum(jnp.sum(jnp.square(jnp.maximum(c, 0.0))) for c in bounds))
