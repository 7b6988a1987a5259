"""What an aggregator did: the part of `ClipStats` that is about examples."""

import jax
import jax.numpy as jnp

from optaxclip._numerics import UNKNOWN, once_compiled
from optaxclip.measure.statistics import ClipStats, ExampleStats


def empty_example_stats() -> ExampleStats:
    """Before the first step."""
    norm, median, largest, fraction = (jnp.zeros((), jnp.float32) for _ in range(4))
    unknown = jnp.full((), -1, jnp.float32)
    return ExampleStats(norm, median, largest, fraction, unknown, jnp.zeros((), jnp.int32))


@once_compiled
def record_examples(
    stats: ClipStats,
    norms: jax.Array,
    finite: jax.Array,
    exceeded: jax.Array,
    noise_scale: jax.Array | None = None,
) -> ClipStats:
    """The norms [B], which examples are finite, and which were not within some bound."""
    before = stats.examples or empty_example_stats()
    number = jnp.sum(finite.astype(norms.dtype))
    beyond = (exceeded & finite).astype(norms.dtype)
    counted = jnp.where(finite, norms, 0.0)
    median = jnp.where(number > 0, jnp.nanmedian(jnp.where(finite, norms, jnp.nan)), 0.0)
    share = 1 / jnp.maximum(number, 1)
    room = jnp.iinfo(jnp.int32).max - before.nonfinite_count
    dropped = jnp.minimum(jnp.sum(~finite, dtype=jnp.int32), room)
    examples = ExampleStats(
        mean_norm=(jnp.sum(counted) * share).astype(jnp.float32),
        median_norm=median.astype(jnp.float32),
        max_norm=jnp.max(counted).astype(jnp.float32),
        clipped_fraction=(jnp.sum(beyond) * share).astype(jnp.float32),
        noise_scale=jnp.asarray(-1 if noise_scale is None else noise_scale, jnp.float32),
        nonfinite_count=before.nonfinite_count + dropped,
    )
    return stats._replace(examples=examples)


def noise_scale_of(sq_norms: jax.Array, counted: jax.Array, sq_norm_of_sum: jax.Array) -> jax.Array:
    """`tr(S) / |G|^2` from the squared norms [B] of vectors and that of the sum of the counted.

    The largest float where the estimate of `|G|^2` is not positive: the mean is lost in the noise.
    -1 for fewer than two vectors.
    """
    number = jnp.sum(counted).astype(sq_norms.dtype)
    n = jnp.maximum(number, 2)
    m = jnp.sum(jnp.where(counted, sq_norms, 0)) / n
    noise, signal = noise_terms(m, sq_norm_of_sum.astype(sq_norms.dtype) / n**2, n)
    return jnp.where(number < 2, -1, ratio_of(noise, signal))


def noise_terms(m: jax.Array, s: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The unbiased estimates of `tr(S)` and `|G|^2` from `m = mean |g|^2` and `s = |mean g|^2`.

    With n >= 2 vectors they are `n (m - s) / (n - 1)` and `(n s - m) / (n - 1)` (McCandlish et al.,
    arXiv 1812.06162, appendix A.1, with batches of n and of one).
    """
    return n * (m - s) / (n - 1), (n * s - m) / (n - 1)


def ratio_of(noise: jax.Array, signal: jax.Array) -> jax.Array:
    """The noise scale of two estimates: 0 of neither, the largest float without a signal."""
    noise = jnp.maximum(noise, 0)
    lost = signal <= 0
    ratio = jnp.where(lost, UNKNOWN, noise / jnp.where(lost, 1, signal))
    return jnp.where((noise == 0) & (signal == 0), 0, jnp.minimum(ratio, UNKNOWN))
