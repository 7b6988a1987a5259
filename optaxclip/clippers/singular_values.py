"""Clipping the singular values of matrices."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip._arguments import check_count
from optaxclip._compat import explicit_sharding, varying_axes
from optaxclip._leaves import Tree, place
from optaxclip._numerics import accumulator, once_compiled
from optaxclip.clippers import polar
from optaxclip.clipping import ClipState, NonFinite, Transform, answered, check_state, scale_leaf
from optaxclip.measure.norms import Norm
from optaxclip.measure.reductions import Sums
from optaxclip.measure.statistics import check_same_groups, empty_stats, record
from optaxclip.measure.units import UnitAxes, resolve
from optaxclip.responses import Rescale, Response, Soften
from optaxclip.thresholds.given import (
    Context,
    ElementBounds,
    Given,
    ParamNorm,
    Passed,
    as_threshold,
    non_negative,
)

Method = Literal["newton_schulz", "svd"]


def clip_singular_values(
    max_value: Any,
    *,
    soft: bool = False,
    method: Method = "newton_schulz",
    steps: int = 16,
    unit_axes: UnitAxes = "auto",
    nonfinite: NonFinite = "propagate",
    name: str | None = None,
) -> Transform:
    """Clips the singular values of every matrix: `U diag(min(s, c)) V^T`.

    With `soft=True`, `(I + X X^T / c^2)^(-1/2) X`, which makes of each s `s / sqrt(1 + (s/c)^2)`.
    Vectors and scalars, whose one singular value is their norm, are scaled alike.

    Args:
      max_value: c >= 0: a number, a traced scalar, a schedule, or a tree prefix of these; or a
        `Threshold` of the largest singular values, such as `thresholds.mean_plus_std(3.0)`.
      soft: see above. The soft bound costs and errs less. Static.
      method: `"newton_schulz"`, matrix products alone; `"svd"`, an exact decomposition, slow on
        accelerators, whose derivative is not finite where singular values coincide.
      steps: of Newton-Schulz, >= 1. More help only the hard bound, near c. Static.
      unit_axes: the axes one matrix spans, all others being batched: `"auto"`, the last two, an
        int, a tuple or a function `(path, leaf) -> axes`. The last of the axes makes the columns,
        those before it together the rows; one axis makes vectors.
      nonfinite, name: as in `clip_by`.

    Returns:
      A gradient transformation. In its statistics a group is one matrix, its norm the largest
      singular value (by Newton-Schulz within 5 %), the factor what becomes of that one.

    Raises:
      ValueError: max_value negative or NaN, or no prefix of the updates; unknown method; axes a
        leaf lacks; a leaf that is sharded inside `jax.shard_map`.
      TypeError: max_value is neither a number nor a threshold of singular values.

    Edge cases:
      | NaN, infinity | make the whole matrix NaN; zeros under `nonfinite="zero"` |
      | inside the bound, hard; c = 0 | bit for bit what came in, if well inside; zeros |
      | stacked vectors, such as scanned biases | look like a matrix: name their `unit_axes` |
      | how exact, how slow | see `docs/concepts/precision.md` |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_singular_values(1.0)
      >>> grads = jnp.array([[0.0, 5.0], [0.5, 0.0]])
      >>> print(tx.update(grads, tx.init(grads))[0].round(4).tolist())
      [[0.0, 1.0], [0.5, 0.0]]

    Source: arXiv 2605.11838 (hard), 2603.14315 (soft); the iteration: Chen and Chow, 2014.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method, got {method!r}. Use one of {get_args(Method)}.")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"unknown nonfinite, got {nonfinite!r}. Use one of {get_args(NonFinite)}.")
    check_count(steps, "steps")
    limit = as_threshold(max_value, "max_value")
    if isinstance(limit, ParamNorm):
        raise TypeError(
            f"max_value must be a bound of singular values, got {limit!r}, which measures lengths."
            " Pass a number, or use agc."
        )
    # These need the layout alone, and no norm beforehand.
    given = isinstance(limit, Given | Passed)
    answer: Response = Soften("sqrt") if soft else Rescale()
    norm = Norm("unit", unit_axes=functools.partial(_matrix_axes, unit_axes), axis_name=())
    clip = _Clip(soft, method, steps, answer)

    def init_fn(params: Tree) -> ClipState:
        groups = norm.groups(norm.leaves(params))
        stats = empty_stats(norm, groups)
        return ClipState(name or "clip_singular_values", stats, limit.init(norm, params))

    def update_fn(
        updates: Tree, state: ClipState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ClipState]:
        check_state(state)
        leaves = norm.leaves(updates)
        leaves.map(_check_whole)
        groups = norm.groups(leaves)
        check_same_groups(state.stats, groups)
        context = Context(state.stats.count, norm, groups, leaves, params, extra_args)
        vector = jnp.zeros(groups.size)
        norms: list[jax.Array] = []
        if not given:
            for x, axes in zip(leaves.arrays, groups.unit_axes, strict=True):
                n = _largest(x, clip=clip, axes=axes)
                norms.append(n.reshape(groups.unit_shapes[len(norms)]).astype(jnp.float32))
            vector = groups.vector(groups.blocks(norms))
        found, threshold_state = limit.bound(vector, state.threshold_state, context)
        if isinstance(found, ElementBounds):
            raise ValueError(
                "bounds of elements go with an element norm, got singular values. Pass one bound a"
                " matrix."
            )
        bounds = non_negative(groups.blocks_of(found))

        clipped: list[jax.Array] = []
        norms = []
        by_leaf = zip(leaves.arrays, groups.unit_axes, groups.by_leaf(bounds), strict=True)
        for x, axes, bound in by_leaf:
            y, n = _clipped(x, bound, clip=clip, axes=axes)
            if nonfinite == "zero":
                y = jnp.where(jnp.isfinite(n), y, jnp.zeros_like(y))
            clipped.append(y.astype(x.dtype))
            norms.append(n.reshape(groups.unit_shapes[len(norms)]).astype(jnp.float32))

        def after(norm: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
            return answered(norm, bound, response=answer, nonfinite=nonfinite, elements=False)

        stats = record(state.stats, groups, groups.blocks(norms), bounds, after)
        return leaves.replace(clipped), ClipState(state.name, stats, threshold_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Clip:
    """What happens to one leaf."""

    soft: bool
    method: Method
    steps: int
    response: Response

    def leaf(self, x: jax.Array, axes: tuple[int, ...], bound: jax.Array) -> Any:
        """The clipped leaf, and the norms of its units with axes of length one."""
        if (sharding := explicit_sharding(x)) is None:
            return self._leaf(x, axes, bound)
        # Where the type says how it is split, products would have to say it too: XLA knows better.
        return jax.sharding.auto_axes(
            lambda x, bound: self._leaf(x, axes, bound),
            axes=sharding.mesh.explicit_axes,
            out_sharding=(sharding, NamedSharding(sharding.mesh, P())),
        )(x, bound)

    def largest(self, x: jax.Array, axes: tuple[int, ...]) -> Any:
        """Those norms alone."""
        if (sharding := explicit_sharding(x)) is None:
            return self._largest(x, axes)
        return jax.sharding.auto_axes(
            lambda x: self._largest(x, axes),
            axes=sharding.mesh.explicit_axes,
            out_sharding=NamedSharding(sharding.mesh, P()),
        )(x)

    def _leaf(self, x: jax.Array, axes: tuple[int, ...], bound: jax.Array) -> Any:
        dtype = accumulator(x.dtype)
        c = jnp.broadcast_to(bound.astype(dtype), _kept(x.shape, axes))
        if _is_vector(x, axes):
            n = _length(x, axes, dtype)
            return scale_leaf(x, n, self.response.factor(n, c), "propagate"), n
        matrices, order = _stacked(x, axes)
        y, n = self._matrices(matrices, c.reshape(-1, 1, 1))
        back = [order.index(a) for a in range(x.ndim)]
        return y.reshape([x.shape[a] for a in order]).transpose(back), n.reshape(c.shape)

    def _largest(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        dtype = accumulator(x.dtype)
        if _is_vector(x, axes):
            return _length(x, axes, dtype)
        matrices, _ = _stacked(x, axes)
        wide = _as_real(matrices).astype(dtype)
        if wide.shape[1] > wide.shape[2]:
            wide = wide.mT
        largest = polar.largest_by_svd if self.method == "svd" else polar.largest_by_products
        return largest(wide).reshape(_kept(x.shape, axes))

    def _matrices(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of `[batch, rows, columns]`, with bounds and norms `[batch, 1, 1]`."""
        if jnp.iscomplexobj(x):
            y, n = self._matrices(_as_real(x), c)
            rows, columns = x.shape[1:]
            return jax.lax.complex(y[:, :rows, :columns], y[:, rows:, :columns]), n
        if x.shape[1] > x.shape[2]:
            y, n = self._matrices(x.mT, c)
            return y.mT, n
        wide = x.astype(c.dtype)
        if self.method == "svd":
            y, n = polar.clip_by_svd(wide, c, soft=self.soft)
        else:
            y, n = polar.clip_by_products(wide, c, soft=self.soft, steps=self.steps)
        return y, n


@once_compiled
def _clipped(x: jax.Array, bound: jax.Array, *, clip: _Clip, axes: tuple[int, ...]) -> Any:
    return clip.leaf(x, axes, bound)


@once_compiled
def _largest(x: jax.Array, *, clip: _Clip, axes: tuple[int, ...]) -> Any:
    return clip.largest(jax.lax.stop_gradient(x), axes)


def _is_vector(x: jax.Array, axes: tuple[int, ...]) -> bool:
    return sum(x.shape[a] > 1 for a in axes) <= 1


def _stacked(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, list[int]]:
    """`[batch, rows, columns]`, and the order of axes before they were joined."""
    order = [*(a for a in range(x.ndim) if a not in axes), *axes]
    rows = math.prod(x.shape[a] for a in axes[:-1])
    return x.transpose(order).reshape(-1, rows, x.shape[axes[-1]]), order


def _as_real(x: jax.Array) -> jax.Array:
    """Complex matrices as real ones, whose singular values are the same, twice."""
    if not jnp.iscomplexobj(x):
        return x
    return jnp.block([[x.real, -x.imag], [x.imag, x.real]])


def _length(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The Euclidean norm, with axes of length one."""
    (sums,) = Sums(2).of([x], (axes,), dtype)
    return Sums(2).norm(sums, 1)


def _matrix_axes(unit_axes: UnitAxes, path: str, x: Any) -> tuple[int, ...]:
    if isinstance(unit_axes, str) and unit_axes == "auto":
        return tuple(range(max(x.ndim - 2, 0), x.ndim))
    return resolve(unit_axes, path, x)


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if a in axes else d for a, d in enumerate(shape))


def _check_whole(path: str, x: jax.Array) -> None:
    if varying := varying_axes(x):
        raise ValueError(
            f"singular values need whole matrices, got {place(path)} of local shape {x.shape},"
            f" sharded over {varying}. Clip outside jax.shard_map, under jit."
        )
