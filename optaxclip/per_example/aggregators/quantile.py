"""A bound that follows a quantile of the norms of the examples."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_between, check_bound, check_positive
from optaxclip._leaves import Tree
from optaxclip.measure.norms import Norm
from optaxclip.thresholds.given import Context, Threshold


class QuantileState(NamedTuple):
    """State of `ExampleQuantile`."""

    bounds: jax.Array
    """One per group, float32."""
    key: Any
    """For the noise; () without."""


@dataclasses.dataclass(frozen=True)
class ExampleQuantile:
    """The threshold of `example_quantile`."""

    quantile: Any
    step_size: Any
    start: Any
    noise: Any
    key: Any
    batch_size: Any

    def init(self, norm: Norm, params: Tree) -> QuantileState:
        groups = norm.groups(norm.leaves(params))
        start = jnp.full(groups.size, self.start, jnp.float32)
        return QuantileState(start, () if self.key is None else self.key)

    def bound(
        self, norms: jax.Array, state: QuantileState, context: Context
    ) -> tuple[jax.Array, QuantileState]:
        bounds, key = state.bounds, state.key
        if norms.ndim != 2:
            raise ValueError(
                "example_quantile needs the norms of several examples, got one norm a step. Pass it"
                " to clip_per_example; for one norm a step use clip_by_quantile."
            )
        n = jax.lax.stop_gradient(norms).astype(jnp.float32)  # [groups, B]
        inside = jnp.sum(n <= bounds[:, None], axis=1, dtype=jnp.float32)
        number = jnp.sum(jnp.isfinite(n), axis=1, dtype=jnp.float32)
        known = number > 0
        if self.batch_size is not None:
            number = jnp.asarray(self.batch_size, jnp.float32)
            known = jnp.ones_like(known)
        if self.key is not None:
            key, now = jax.random.split(key)
            inside += self.noise * jax.random.normal(now, inside.shape, jnp.float32)
        share = inside / jnp.maximum(number, 1)
        step = jnp.exp(-self.step_size * (share - self.quantile))  # eq. 2
        new = jnp.where(known, bounds * step, bounds)
        return bounds.astype(norms.dtype), QuantileState(new, key)


def example_quantile(
    quantile: Any = 0.5,
    *,
    step_size: Any = 0.2,
    init: Any = 0.1,
    noise: Any = 0.0,
    key: jax.Array | None = None,
    batch_size: Any = None,
) -> Threshold:
    """A bound below which a given share of the examples has its norm.

    After each step `C *= exp(-eta (share(n_b <= C) - q))`; for several groups each has its own.

    Args:
      quantile: q in [0, 1]: the share of examples to leave alone.
      step_size: eta >= 0. A larger one follows sooner and wavers more.
      init: the first C, > 0: of several groups, of each.
      noise: the standard deviation of the Gaussian noise added to the number of examples within
        C, for privacy, which your accountant has to count.
      key: a random key, for the noise.
      batch_size: what that number is divided by, such as the expected batch size under Poisson
        sampling. None: the examples that are finite.

    Returns:
      A `Threshold`, for `clip_per_example`.

    Raises:
      ValueError: an argument out of range; noise without a key, or a key without noise; used by
        a clipper that has one norm a step.

    Edge cases:
      Examples that are not finite do not count (with `batch_size`: as beyond C); a step of nothing
      else leaves C as it was. From below, C takes `log(n / init) / (eta q)` steps to norms of n, so
      start it at a norm you expect. Examples of which `masked` made zeros count as within C.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_per_example(optaxclip.per_example.example_quantile(0.5, init=1.0))
      >>> state, update = tx.init(jnp.zeros(1)), jax.jit(tx.update)
      >>> for _ in range(50):
      ...     updates, state = update(jnp.array([[1.0], [2.0], [4.0], [90.0]]), state)
      >>> print(f"{optaxclip.clip_stats(state)['clip_per_example'].threshold:.2f}")
      2.01

    Source: Andrew, Thakkar, McMahan & Ramaswamy, arXiv 1905.03871, algorithm 1; eta 0.2, C 0.1 and
    q 0.5 are theirs.
    """
    check_between(quantile, "quantile", 0, 1)
    for argument, value in (("step_size", step_size), ("noise", noise)):
        check_bound(value, argument, schedule=False)
    check_positive(init, "init")
    if batch_size is not None and not isinstance(batch_size, jax.Array) and not batch_size > 0:
        raise ValueError(f"batch_size must be > 0, got {batch_size}. Pass what is expected.")
    noisy = isinstance(noise, jax.Array) or noise > 0
    if noisy != (key is not None):
        raise ValueError(
            f"noise and key go together, got noise={noise} and key={key}. Pass both, or neither."
        )
    return ExampleQuantile(quantile, step_size, init, noise, key, batch_size)
