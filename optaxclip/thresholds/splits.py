"""One bound for the whole, divided among leaves, units or labels so that together they keep it."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import check_bound
from optaxclip._leaves import Tree
from optaxclip.measure.norms import Norm
from optaxclip.thresholds.given import Context, Given, Threshold


@dataclasses.dataclass(frozen=True)
class Split:
    """`C sqrt(share)`, with shares that add up to 1."""

    whole: Given
    shares: Literal["even", "size"]

    def init(self, norm: Norm, params: Tree) -> Tree:
        if norm.by == "element" or norm.ord != 2:
            raise ValueError(
                "a split bound needs norms of order 2 of leaves, units or labels, whose squares add"
                f" up, got by={norm.by!r} and ord={norm.ord}. Pass a number for each instead."
            )
        return self.whole.init(norm, params)

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[jax.Array, Tree]:
        groups = context.groups
        whole = jnp.asarray(self.whole.bound(norms, state, context)[0])
        units = [math.prod(shape) for shape in groups.unit_shapes]
        if self.shares == "even":
            sizes = [1.0] * len(units)
        else:
            counts = [x.size for x in context.updates.arrays]
            of_groups = [sum(counts[i] for i in members) for members in groups.members]
            sizes = [size / number for size, number in zip(of_groups, units, strict=True)]
        by_norm = np.repeat(np.asarray(sizes), units)
        shares = np.sqrt(by_norm / max(by_norm.sum(), 1))
        return whole * shares.astype(whole.dtype), state


def split_evenly(max_norm: Any) -> Threshold:
    """A bound for each of K groups, `C / sqrt(K)`, so that the whole has norm <= C.

    For any clipper of leaves, units or labels, per example or not.

    Args:
      max_norm: C >= 0: a number, a traced scalar or a schedule.

    Returns:
      A `Threshold`, in the place of a bound.

    Raises:
      ValueError: C is negative or NaN; used with a norm of elements, or of another order than 2.
      TypeError: C is no number, such as a tree.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_per_example(optaxclip.thresholds.split_evenly(1.0), by="leaf")
      >>> grads = {"w": jnp.full((1, 100), 9.0), "b": jnp.full((1, 1), 9.0)}
      >>> state = tx.update(grads, tx.init({"w": jnp.zeros(100), "b": jnp.zeros(1)}))[1]
      >>> print(optaxclip.clip_stats(state)["clip_per_example"].groups.threshold.round(3))
      [0.707 0.707]

    Source: McMahan, Ramage, Talwar & Zhang, arXiv 1710.06963 (per-layer clipping).
    """
    check_bound(max_norm, "max_norm")
    return Split(Given(max_norm, "max_norm"), "even")


def split_by_size(max_norm: Any) -> Threshold:
    """A bound for each group by its size, `C sqrt(D_i / D)`, so that the whole has norm <= C.

    D_i is the number of elements of the group (of one unit, for units), D that of all.

    Args:
      max_norm: C >= 0: a number, a traced scalar or a schedule.

    Returns:
      A `Threshold`, in the place of a bound.

    Raises:
      ValueError: C is negative or NaN; used with a norm of elements, or of another order than 2.
      TypeError: C is no number, such as a tree.

    Edge cases:
      | inside `jax.shard_map` | it goes by the sizes that one device holds |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_per_example(optaxclip.thresholds.split_by_size(1.0), by="leaf")
      >>> grads = {"w": jnp.full((1, 99), 9.0), "b": jnp.full((1, 1), 9.0)}
      >>> state = tx.update(grads, tx.init({"w": jnp.zeros(99), "b": jnp.zeros(1)}))[1]
      >>> print(optaxclip.clip_stats(state)["clip_per_example"].groups.threshold)
      [0.1 0.994...]

    Source: McMahan, Ramage, Talwar & Zhang, arXiv 1710.06963 (per-layer clipping).
    """
    check_bound(max_norm, "max_norm")
    return Split(Given(max_norm, "max_norm"), "size")
