"""Sums over the factors of per-example gradients: in float32, in bounded memory.

Norms and inner products are taken at the highest precision of the platform, whatever the default:
the bound of an example's influence rests on them, and products of float32 in bfloat16 (TPU) or TF32
(GPU) are right to 1e-3 only.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optaxclip._compat import explicit_sharding
from optaxclip._numerics import accumulator, wider
from optaxclip.measure.platforms import in_turn

# A sum whose intermediate is larger is taken block by block.
_BLOCK_BYTES = 2**26
# More blocks than this are a loop.
_MOST_WRITTEN_OUT = 16


def einsum(spec: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST) -> jax.Array:
    """`einsum` that adds in float32, or in float64 where an operand has 64 bits."""
    dtype = wider(*(accumulator(x.dtype) for x in operands))
    if len({x.dtype for x in operands}) > 1:
        operands = tuple(x.astype(dtype) for x in operands)
    sharding = _sharding_of_result(spec, operands)
    return jnp.einsum(
        spec, *operands, precision=precision, preferred_element_type=dtype, out_sharding=sharding
    )


def _sharding_of_result(spec: str, operands: Sequence[jax.Array]) -> NamedSharding | None:
    """On explicit axes: what is kept stays split as it is, what is summed over is summed."""
    found = [explicit_sharding(x) for x in operands]
    known = [s for s in found if s is not None]
    if not known:
        return None
    names, _, kept = spec.partition("->")
    axes: dict[str, Any] = {}
    for letters, sharding in zip(names.split(","), found, strict=True):
        entries = () if sharding is None else sharding.spec
        for letter, entry in zip(letters, entries, strict=False):
            if entry is not None:
                axes.setdefault(letter, entry)
    taken: set[Any] = set()
    split: list[Any] = []
    for letter in kept:
        entry = axes.get(letter)
        own = set(entry) if isinstance(entry, tuple) else {entry} - {None}
        split.append(None if own & taken else entry)
        taken |= own
    return NamedSharding(known[0].mesh, PartitionSpec(*split))


def by_blocks(
    fun: Callable[..., jax.Array],
    axis: int,
    size: int,
    *factors: jax.Array,
    least: int = _BLOCK_BYTES,
) -> jax.Array:
    """`fun(*factors)`, a sum over an axis of the factors, from one block of the axis at a time.

    `size` is how many numbers `fun` would hold for the whole axis. Blocks are as long as
    64 MB (or `least` bytes) or an eighth of the factors allow, and the axis is not that of the
    examples, which may be sharded.
    """
    length, itemsize = factors[0].shape[axis], accumulator(factors[0].dtype).itemsize
    in_factors = sum(x.size for x in factors)
    limit = max(least, in_factors * itemsize // 8)
    if size * itemsize <= limit or length == 1:
        return fun(*factors)
    # A block of the factors is copied, too.
    count = min(length, math.ceil((size + in_factors) * itemsize / limit))
    step = _step(length, length // count)

    def loop(*factors: jax.Array) -> jax.Array:
        def block(start: Any) -> jax.Array:
            return fun(*(lax.dynamic_slice_in_dim(x, start, step, axis) for x in factors))

        total = jnp.sum(lax.map(block, step * jnp.arange(length // step)), axis=0)
        full = length - length % step
        if full < length:
            rest = (lax.slice_in_dim(x, full, length, axis=axis) for x in factors)
            total = total + fun(*rest)
        return total

    if length > _MOST_WRITTEN_OUT * step:
        return loop(*factors)
    return in_turn(loop, functools.partial(_one_by_one, fun, axis, step), *factors)


def _one_by_one(
    fun: Callable[..., jax.Array], axis: int, step: int, *factors: jax.Array
) -> jax.Array:
    """The same as a program of so many parts.

    Each part waits for the one before it, or their intermediates would be there at once.
    """
    total: Any = None
    for start in range(0, factors[0].shape[axis], step):
        stop = min(start + step, factors[0].shape[axis])
        part = fun(*(lax.slice_in_dim(x, start, stop, axis=axis) for x in factors))
        total = part if total is None else total + part
        total, factors = lax.optimization_barrier((total, factors))
    return total


def _step(length: int, most: int) -> int:
    """How long blocks are: a divisor of the length if there is a long one.

    What is left over would be compiled a second time.
    """
    found = next(step for step in range(most, 0, -1) if length % step == 0)
    return found if 2 * found >= most else most


def by_examples(fun: Callable[..., jax.Array], size: int, *factors: Any) -> jax.Array:
    """`fun(*factors)`, [B, ...], from as many examples at a time as 64 MB hold.

    `size` is how many numbers `fun` holds for one example.
    """
    arrays = jax.tree.leaves(factors)
    count, bytes_each = arrays[0].shape[0], size * accumulator(arrays[0].dtype).itemsize
    if count * bytes_each <= _BLOCK_BYTES:
        return fun(*factors)

    def one(factors: Any) -> jax.Array:
        return fun(*jax.tree.map(lambda x: x[None], factors))[0]

    return lax.map(one, factors, batch_size=max(1, _BLOCK_BYTES // bytes_each))


def gram(left: jax.Array, right: jax.Array, left2: jax.Array, right2: jax.Array) -> jax.Array:
    """`sum_ts <left_t, left2_s> <right_t, right2_s>`, for factors [B, K, T, ...]: [B]."""
    return gram_and_size(left, right, left2, right2)[0]


def gram_and_size(
    left: jax.Array, right: jax.Array, left2: jax.Array, right2: jax.Array
) -> jax.Array:
    """The terms of `gram` added up, and their absolute values: [2, B]."""

    def some(left: jax.Array, right: jax.Array) -> jax.Array:
        lefts = einsum("bkti,bksi->bkts", left, left2)
        rights = einsum("bkto,bkso->bkts", right, right2)
        products = lefts * rights
        return jnp.stack([jnp.sum(x, axis=(1, 2, 3)) for x in (products, jnp.abs(products))])

    b, k, t, _ = left.shape
    return by_blocks(some, 2, 2 * b * k * t * left2.shape[2], left, right)


def weigh(factor: jax.Array, weights: jax.Array, narrow: Any = None) -> jax.Array:
    """`weights[b] * factor[b]`, in the accumulator's dtype, or in the dtype `narrow`."""
    dtype = wider(accumulator(factor.dtype), accumulator(weights.dtype))
    column = weights.astype(dtype).reshape(-1, *(1,) * (factor.ndim - 1))
    wide = factor.astype(dtype) * column
    return wide if narrow is None else toward_zero(wide, narrow)


def toward_zero(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in another dtype, rounded toward zero.

    To the nearest, a weighted gradient could come out longer than its bound, by 0.4 % in bfloat16.
    """
    near = x.astype(dtype)
    if wider(x.dtype, dtype) == dtype:
        return near
    beyond = jnp.abs(near.astype(x.dtype)) > jnp.abs(x)
    return jnp.where(beyond, jnp.nextafter(near, jnp.zeros_like(near)), near)


def ranks(ids: jax.Array) -> jax.Array:
    """Number the distinct ids of each example 0, 1, ...: [B, T] -> [B, T], without T x T."""

    def one(ids: jax.Array) -> jax.Array:
        ids = ids.astype(jnp.int32)
        order = jnp.argsort(ids)
        ordered = ids[order]
        steps = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
        return jnp.zeros_like(ids).at[order].set(jnp.cumsum(steps, dtype=ids.dtype))

    return jax.vmap(one)(ids) if ids.size else ids


def by_rank(ranks: jax.Array, rows: jax.Array, number: int) -> jax.Array:
    """Add the rows of one rank: [B, T, O] -> [B, number, O]."""
    wide = rows.astype(accumulator(rows.dtype))
    return jax.vmap(lambda r, x: jax.ops.segment_sum(x, r, num_segments=number))(ranks, wide)
