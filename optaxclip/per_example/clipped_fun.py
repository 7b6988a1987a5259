"""`clipped_fun`: the clipped sum of what any function makes of each example."""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree, leaves_with_path, path_name, place
from optaxclip.per_example.clipped_grad import BoundedSensitivityCallable, clipped_grad
from optaxclip.per_example.engine.arguments import Options, call_of, check_positions
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes


def clipped_fun(
    fun: Callable,
    has_aux: bool = False,
    *,
    batch_argnums: int | Sequence[int] = 0,
    keep_batch_dim: bool = True,
    l2_clip_norm: Any = 1.0,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    return_norms: bool = False,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
    spmd_axis_name: Any = None,
    grid_scale: int | None = None,
) -> BoundedSensitivityCallable:
    """The sum of clipped values, `sum_b min(1, C / |v_b|) v_b` with `v_b = fun(example b)`.

    For what is no gradient: statistics of examples, the update that a user's examples make. All
    values of a micro-batch are held at once; for gradients `clipped_grad` need not.

    Args:
      fun: returns a tree of floating-point arrays; with `has_aux` a pair, that tree and aux.
      has_aux, batch_argnums, keep_batch_dim, prng_argnum: as in `clipped_grad`.
      l2_clip_norm, rescale_to_unit_norm, normalize_by: as there; C bounds the norm of the tree.
      return_norms: whether to return norms before clipping, [B] float32, of the whole tree.
      microbatch_size, nan_safe, dtype, spmd_axis_name: as there.
      grid_scale: G, an int: the sum is in int64, in units of `C / G`. Values are clipped to
        `G - sqrt(d) / 2` of them, for d elements, and rounded, so that G bounds their norm.

    Returns:
      A function of the arguments of `fun`, with `.sensitivity()` and `.l2_norm_bound` (on the grid
      G). It returns `value`, `(value, aux)`, `(value, norms)` or `(value, (aux, norms))`. Keyword
      arguments and `is_padding_example` as for `clipped_grad`.

    Raises:
      ValueError, TypeError: as `clipped_grad`; values that are not real floats; on the grid, when
        it is made, without 64 bits or with an option that does not go with it.

    | case | its share of the sum |
    | --- | --- |
    | NaN or infinity in a value | 0, as a whole; with `nan_safe=False` NaN |
    | padding, or C = 0 | 0; C = 0 on the grid raises |
    | halfway between two points of the grid | rounded to the even one |

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.per_example import clipped_fun
      >>> mean = clipped_fun(jnp.mean, l2_clip_norm=1.0)
      >>> print(mean(jnp.array([0.5, -3.0, 1.0, 7.0])), mean.sensitivity("REPLACE_ONE"))
      1.5 2.0

    Source: jax-privacy 2.0 (Apache-2.0). The grid is that of later versions.
    """
    roles = Options(None, batch_argnums, has_aux, keep_batch_dim, prng_argnum)
    grid = None
    if grid_scale is not None:
        others = {
            "rescale_to_unit_norm": rescale_to_unit_norm,
            "normalize_by": normalize_by != 1,
            "dtype": dtype is not None,
            "nan_safe": not nan_safe,
        }
        grid = _Grid.of(grid_scale, l2_clip_norm, [name for name, given in others.items() if given])
    options: dict[str, Any] = {
        "batch_argnums": batch_argnums, "keep_batch_dim": keep_batch_dim, "nan_safe": nan_safe,
        "prng_argnum": prng_argnum, "spmd_axis_name": spmd_axis_name,
        "l2_clip_norm": math.inf if grid else l2_clip_norm, "normalize_by": normalize_by,
        "rescale_to_unit_norm": rescale_to_unit_norm, "microbatch_size": microbatch_size,
        "dtype": dtype, "return_grad_norms": return_norms and not grid, "method": "vmap",
    }  # fmt: skip

    def valued(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tree, tuple[Any, Any]]:
        """The value; and besides it aux and, on the grid, the norm before."""
        value, aux = _value_and_aux(fun(*args, **kwargs), has_aux)
        value, norm = grid.rounded(value) if grid else (value, ())
        return value, (aux, norm)

    @functools.wraps(fun)
    def probe(*args: Any, **kwargs: Any) -> Any:
        return args[-1], valued(args[:-1], kwargs)[0]

    @functools.wraps(fun)
    def linear(*args: Any, **kwargs: Any) -> Any:
        """`<p, v>`, whose gradient in p is v."""
        # Without it JAX would linearize fun, which fails where that writes to a reference.
        value, aux = jax.lax.stop_gradient(valued(args[:-1], kwargs))
        products = jax.tree.map(lambda p, v: jnp.sum(p * v).astype(jnp.float32), args[-1], value)
        return sum(jax.tree.leaves(products)), aux

    def run(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        check_positions(fun, roles, len(args))
        last = len(args)  # p comes after the arguments of fun
        seen = Options(last, batch_argnums, True, keep_batch_dim, prng_argnum, named_examples=True)
        call = call_of(probe, seen, (*args, jnp.zeros((), jnp.float32)), kwargs)
        _, types = jax.eval_shape(call.fun, call.params, call.example)
        p = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
        summed = clipped_grad(linear, last, True, **options)
        value, found = summed(*args, p, is_padding_example=is_padding_example, **kwargs)
        aux, norms = found.aux
        if grid:
            value = jax.tree.map(lambda x: x.astype(jnp.int64), value)
        else:
            norms = found.grad_norms
        asked = [x for x, wanted in ((aux, has_aux), (norms, return_norms)) if wanted]
        return (value, asked[0] if len(asked) == 1 else tuple(asked)) if asked else value

    @functools.wraps(fun)
    def clipped(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        given = {"is_padding_example": is_padding_example, **kwargs}
        return on_automatic_axes(run, roles.examples_of(args), args, given)

    after = 1 + max(max(numbers) for numbers in roles.named_argnums.values())
    checked = clipped_grad(linear, after, True, **options)
    bound = float(grid.scale) if grid else checked.l2_norm_bound
    return BoundedSensitivityCallable(clipped, bound, has_aux or return_norms)


class _Grid(NamedTuple):
    """Integers whose vector has at most the norm `scale`, each `unit` in size."""

    scale: int
    unit: float

    @classmethod
    def of(cls, scale: Any, max_norm: Any, others: list[str]) -> "_Grid":
        """Checked; `others`: what was given and does not go with it."""
        check_count(scale, "grid_scale")
        _check_64_bits()
        number = isinstance(max_norm, numbers.Real) and not isinstance(max_norm, bool)
        if not number or not 0 < float(max_norm) < math.inf:
            raise ValueError(
                f"with grid_scale l2_clip_norm must be one number > 0 and finite, got {max_norm!r}."
                " Pass for example 1.0."
            )
        if others:
            raise ValueError(
                f"grid_scale={scale} must stand alone, got {', '.join(others)} too. Leave"
                " that out: the sum is in integers of l2_clip_norm / grid_scale."
            )
        return cls(int(scale), float(max_norm) / int(scale))

    def rounded(self, value: Tree) -> tuple[Tree, jax.Array]:
        """Floats that are whole, and the norm before."""
        _check_64_bits()
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), value)
        size = sum(x.size for x in jax.tree.leaves(wide))
        most = self.scale - math.sqrt(size) / 2  # rounding moves each element by 1/2 at most
        if most <= 0:
            raise ValueError(
                f"grid_scale must be above half the root of the number of elements,"
                f" {math.sqrt(size) / 2:.1f} of {size}, got {self.scale}. Pass a larger one."
            )
        most *= 1 - (size + 8) * jnp.finfo(jnp.float64).eps  # and the norm is rounded itself
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(wide)))
        factor = jnp.minimum(1.0, most * self.unit / jnp.where(norm == 0, 1.0, norm)) / self.unit
        return jax.tree.map(lambda x: jnp.round(x * factor), wide), norm.astype(jnp.float32)


def _check_64_bits() -> None:
    if jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        raise ValueError(
            "grid_scale needs integers of 64 bits, got jax_enable_x64=False. Call"
            ' jax.config.update("jax_enable_x64", True) at the start.'
        )


def _value_and_aux(result: Any, has_aux: bool) -> tuple[Tree, Any]:
    aux: Any = ()
    if has_aux:
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True fun must return (value, aux), got {type(result).__name__}."
                " Return a pair, or pass has_aux=False."
            )
        result, aux = result
    value = jax.tree.map(jnp.asarray, result)
    found = leaves_with_path(value)
    if not found:
        raise ValueError("fun must return at least one array, got none. Return what is summed.")
    for path, x in found:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"fun must return real floating-point values, got {x.dtype} at"
                f" {place(path_name(path))}. Convert it with .astype(jnp.float32)."
            )
    return value, aux
