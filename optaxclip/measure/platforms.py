"""What platforms want done in different ways, and only here: each chooses when it compiles.

Compilers' figures are for 25 leaves of 1024x1024 in front of Adam.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import varying_axes
from optaxclip._numerics import marked, stacked

Axes = tuple[tuple[int, ...], ...]
"""For each leaf the axes to reduce, which stay with length one."""


_AT_ONCE = 32
"""How many scalars a CPU cuts from one part of a vector; see `cut`."""


def cut(vector: jax.Array) -> list[jax.Array]:
    """The scalars of a vector, each for the kernels of one leaf.

    * A GPU that sees that all leaves read one vector makes one kernel of their updates, whose
      results it then has to copy: 50 MB of temporary memory by leaf on an H100. So they stand
      behind a barrier.
    * A CPU compiles a kernel for each place in a vector that is read: 32 s for 1000 leaves by leaf,
      and 10 s where the vector comes in parts of 32. A slice of a slice is one slice to XLA, so
      that the parts are gathered.
    * A TPU does best without either: cycles 1.30x Adam by leaf, 1.40x behind a barrier.
    """
    count = len(vector)
    if count <= 1:
        return [x.reshape(()) for x in (vector,) if count]

    def plain(vector: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(lax.index_in_dim(vector, k, keepdims=False) for k in range(len(vector)))

    def behind_a_barrier(vector: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(lax.optimization_barrier(plain(vector)))

    def from_parts(vector: jax.Array) -> tuple[jax.Array, ...]:
        places = (np.arange(i, min(i + _AT_ONCE, count)) for i in range(0, count, _AT_ONCE))
        parts = (vector.at[at].get(mode="promise_in_bounds") for at in places)
        return tuple(x for part in parts for x in plain(part))

    barrier = behind_a_barrier
    return list(
        lax.platform_dependent(vector, cpu=from_parts, cuda=barrier, rocm=barrier, default=plain)
    )


_LARGE = 2**18
"""Elements of a leaf whose units a CPU sums in float32 first; see `power_sums`."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def power_sums(arrays: tuple[jax.Array, ...], axes: Axes | None, power: int, dtype: Any) -> Any:
    """`sum |x|^power`: a list of [scales, *kept], or of whole arrays one [scales, arrays].

    A sum of squares of float32 is right between 1e-19 and 1e19 alone. An accelerator takes it such
    that nothing can go wrong, in one read of the leaf and without a branch, both sides of which a
    GPU would run:

    * A TPU takes three sums at three scales. Cycles 1.33x Adam; one sum would take 1.29x.
    * A GPU takes one sum in float64, whose range holds the squares of all float32. On an H100 82
      kernels, as many as one sum in float32 takes; three sums would take 129.
    * A CPU takes one sum in float32, and in a branch, which is rare, again at three scales. In
      float64 a step of Adam with it takes 1.04 times as long (25 leaves of 1024x1024; 1.06 times
      with 300 of 256x256): XLA sums float32 by a library, float64 by loops of its own. Units are
      often all zero, so that for them it takes float64; but of large leaves in such a branch, with
      which `agc` takes 1.6x Adam instead of 2.2x (still 2.3x where half of the units are zero). Of
      small leaves the branch would save little, and takes long to compile: 32 s instead of 20 s
      (300 of 256x256).
    """
    if dtype == jnp.float64 or not arrays:
        return _at_three_scales(arrays, axes, power, dtype)
    settings: dict[str, Any] = {"axes": axes, "power": power}
    in_float64 = functools.partial(_in_float64, **settings)
    again = _units_on_a_cpu if axes else _again_where_needed
    at_scales = functools.partial(_at_three_scales, **settings, dtype=dtype)
    return lax.platform_dependent(
        arrays,
        cpu=functools.partial(again, **settings),
        cuda=in_float64,
        rocm=in_float64,
        default=at_scales,
    )


@power_sums.defjvp
def _power_sums_jvp(axes: Axes | None, power: int, dtype: Any, primals: Any, tangents: Any) -> Any:
    # The same sums, but without float64, which JAX does not transpose where it is not enabled.
    plain = functools.partial(_at_three_scales, axes=axes, power=power, dtype=dtype)
    return power_sums(*primals, axes, power, dtype), jax.jvp(plain, primals, tangents)[1]


def _at_three_scales(arrays: Sequence[jax.Array], axes: Axes | None, power: int, dtype: Any) -> Any:
    scales = scales_of(dtype)
    if axes is None:
        totals = [
            stacked([jnp.sum(_terms(x, power, dtype, scale)) for x in arrays]) for scale in scales
        ]
        return jnp.stack(totals)
    found = []
    for x, a in zip(arrays, axes, strict=True):
        terms = (_terms(x, power, dtype, scale) for scale in scales)
        found.append(jnp.stack([jnp.sum(t, axis=a, keepdims=True) for t in terms]))
    return found


def _again_where_needed(arrays: Sequence[jax.Array], axes: None, power: int) -> jax.Array:
    totals = stacked([jnp.sum(_terms(x, power, jnp.float32, None)) for x in arrays])
    lost = jnp.any(jnp.isinf(totals) | (totals < 2.0**-60))
    again = functools.partial(_at_three_scales, arrays, axes, power, jnp.dtype(jnp.float32))
    return lax.cond(lost, again, lambda: _as_they_are(totals, power))


def _units_on_a_cpu(arrays: Sequence[jax.Array], axes: Axes, power: int) -> list[jax.Array]:
    large = [x.size >= _LARGE for x in arrays]

    def part(which: bool) -> tuple[list[jax.Array], Axes]:
        chosen = [i for i, here in enumerate(large) if here is which]
        return [arrays[i] for i in chosen], tuple(axes[i] for i in chosen)

    found = {
        True: iter(_float64_where_needed(*part(True), power)),
        False: iter(_in_float64(*part(False), power)),
    }
    return [next(found[which]) for which in large]


def _float64_where_needed(arrays: Sequence[jax.Array], axes: Axes, power: int) -> list[jax.Array]:
    if not arrays:
        return []
    totals = _plain_sums(arrays, axes, power)

    def any_lost(sizes: list[jax.Array]) -> jax.Array:
        # Of up to 2^32 squares below 2^-126, which are lost, a sum of 2^-70 is still right.
        lost = [
            jnp.any(jnp.isinf(total) | ((total < 2.0**-70) & (size > 0)))
            for total, size in zip(totals, sizes, strict=True)
        ]
        return jnp.any(stacked(lost))

    # Units are often all zero. Whether they are, `sum |x|` tells, which does not vanish.
    perhaps = any_lost([jnp.ones(()) for _ in totals])
    lost = lax.cond(perhaps, lambda: any_lost(_plain_sums(arrays, axes, 1)), lambda: perhaps)
    as_they_are = [_as_they_are(total, power) for total in totals]
    return lax.cond(lost, lambda: _in_float64(arrays, axes, power), lambda: as_they_are)


def _plain_sums(arrays: Sequence[jax.Array], axes: Axes, power: int) -> list[jax.Array]:
    terms = (_terms(x, power, jnp.float32, None) for x in arrays)
    return [jnp.sum(t, axis=a, keepdims=True) for t, a in zip(terms, axes, strict=True)]


def _as_they_are(total: jax.Array, power: int) -> jax.Array:
    """A sum that is in range, and what it is at the other scales, where that is in range.

    On a mesh another device may have had to take its sums anew, and they are added scale by scale.
    """
    _, low, high = scales_of(jnp.float32)
    below = above = total
    for _ in range(power):
        # Without the minimum XLA multiplies the factors first, and their product is 0 or infinite.
        below = jnp.minimum(below * low, 2.0**64)
        above = jnp.minimum(above * high, 2.0**96)
    return jnp.stack([total, below, above])


def _in_float64(arrays: Sequence[jax.Array], axes: Axes | None, power: int) -> Any:
    scales = scales_of(jnp.float32).astype(np.float64) ** power
    with jax.enable_x64(True):
        terms = [_terms(x, power, jnp.float64, None) for x in arrays]
        if axes is None:
            return _scaled(stacked([jnp.sum(t) for t in terms]), scales)
        kept = [jnp.sum(t, axis=a, keepdims=True) for t, a in zip(terms, axes, strict=True)]
        return [_scaled(total, scales) for total in kept]


def _scaled(total: jax.Array, scales: np.ndarray) -> jax.Array:
    return jnp.stack([(total * scale).astype(jnp.float32) for scale in scales])


def largest(arrays: Sequence[jax.Array], dtype: Any, nan: bool) -> jax.Array:
    """The largest modulus of each array, as `marked`; `nan`: NaN where there is one.

    A CPU takes the plain maximum, and a sum, which tells whether there is NaN. XLA has both from a
    library, and its own loops for all else it reduces: `clip_by_value` takes 1.4x Adam, 2.3x with
    one maximum that keeps NaN, 3.8x with one of the bits as integers, in whose order NaN is largest
    (25 leaves of 1024x1024).
    """

    def by_maximum(*arrays: jax.Array) -> jax.Array:
        return stacked([jnp.max(marked(modulus(x, dtype))) for x in arrays])

    def and_sum(*arrays: jax.Array) -> jax.Array:
        found = stacked([jnp.max(modulus(x, dtype)) for x in arrays])
        if not nan:
            return marked(found)
        sums = stacked([jnp.sum(jnp.square(modulus(x, dtype))) for x in arrays])
        return jnp.where(jnp.isnan(sums), jnp.inf, marked(found))

    return lax.platform_dependent(*arrays, cpu=and_sum, default=by_maximum)


def _terms(x: jax.Array, power: int, dtype: Any, scale: Any) -> jax.Array:
    """`|x scale|^power`."""
    if power == 1:
        size = modulus(x, dtype)
        return size if scale is None else size * jnp.asarray(scale, dtype)
    if jnp.iscomplexobj(x):
        return _terms(x.real, power, dtype, scale) + _terms(x.imag, power, dtype, scale)
    wide = x.astype(dtype)
    if scale is not None and scale != 1:
        # Without the minimum XLA makes x^2 scale^2 of it, and scale^2 is infinite. The minimum is
        # beyond what is used of this scale, and the derivative, twice as much, is finite.
        size = jnp.abs(wide) * jnp.asarray(scale, dtype)
        wide = jnp.minimum(size, jnp.asarray(float(jnp.finfo(dtype).max) ** 0.75, dtype))
    return jnp.square(wide)


def modulus(x: jax.Array, dtype: Any) -> jax.Array:
    """`|x|`; of a complex number whose parts are finite it is finite."""
    if not jnp.iscomplexobj(x):
        return jnp.abs(x.astype(dtype))
    size = jnp.abs(x).astype(dtype)
    finite = jnp.isfinite(x.real) & jnp.isfinite(x.imag)
    largest = jnp.asarray(jnp.finfo(x.real.dtype).max, dtype)
    return jnp.where(finite, jnp.minimum(size, largest), size)


def scales_of(dtype: Any) -> np.ndarray:
    """1, and two powers of two that bring the square of any finite number into range."""
    low, high = (-560, 540) if dtype == jnp.float64 else (-80, 64)
    return np.asarray([1.0, 2.0**low, 2.0**high], dtype)


def in_turn(loop: Callable, written_out: Callable, *operands: jax.Array) -> jax.Array:
    """The same sum over blocks as a loop, or as a program of so many parts that wait in turn.

    A TPU's loop copies what it slices into a layout of its own: 262 MB for the logits of 4 x 1024
    tokens and 32,000 words, of 741 MB that the gradient takes (compiled for a v5e). A CPU forgets
    to wait, and holds all parts at once.
    """
    return lax.platform_dependent(*operands, tpu=written_out, default=loop)


def rounding_of_products(dtype: Any) -> Any:
    """How many times as coarse as numbers of `dtype` products of them are by default."""
    if jnp.finfo(dtype).bits > 32:
        return 1.0
    return lax.platform_dependent(
        cpu=lambda: jnp.ones((), dtype),
        cuda=lambda: jnp.full((), 2.0**13, dtype),  # TF32 has 10 bits for float32's 23
        default=lambda: jnp.full((), 2.0**16, dtype),  # bfloat16 has 7
    )


@dataclasses.dataclass(frozen=True)
class Rates:
    """What bytes cost on a platform, in floating-point operations that take as long."""

    moving: int
    """One byte read or written."""
    holding: int
    """One byte more of temporary memory in a call."""
    free: int
    """Bytes that a call may hold whatever a plain gradient holds."""
    written_out_waits: bool
    """Whether parts of a program with barriers between them share their memory."""


CPU = Rates(moving=7, holding=25, free=2**24, written_out_waits=False)
"""2 cores: 50 to 100 GFLOP/s. Temporary memory is asked of the system at each call: of a language
model (32 x 64 tokens) one pass takes 1.26x a plain gradient in one part, which holds 249 MB, and
0.77x in four; of a vision transformer stacked gradients take 1.30x and 0.86x, one pass 1.19x and
1.01x (medians of interleaved rounds). With 7 operations a byte the estimate takes the faster of one
pass and stacking, or one within 5 % of it, for 19 of 22 models of `benchmarks/per_example.py`."""
ACCELERATOR = Rates(moving=20, holding=0, free=2**29, written_out_waits=True)
"""An H100 takes 20 operations of float32 in the time of one byte, a v5e 40 at the precision of
norms. Parts cost time, by the compiler of a v5e: a language model of 16 x 256 tokens takes 1.55x,
1.63x and 1.92x the cycles of a plain gradient in one, two and four, an LSTM 1.39x and 2.05x in one
and two. So what is small next to 16 GB is free."""


def by_rates(of: Callable[[Rates], Any], run: Callable[[Any], Callable], *operands: Any) -> Any:
    """`run(of(rates))(*operands)` with the rates of the platform."""
    cpu, default = of(CPU), of(ACCELERATOR)
    # Inside shard_map both would have to vary over the same axes, of which they know nothing.
    if cpu == default or any(map(varying_axes, jax.tree.leaves(operands))):
        return run(default)(*operands)
    return lax.platform_dependent(*operands, cpu=run(cpu), default=run(default))
