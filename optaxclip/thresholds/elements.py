"""Bounds element by element, from moving averages the size of the parameters."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip._numerics import UNKNOWN, once_compiled
from optaxclip.measure.groups import Groups
from optaxclip.measure.norms import Norm
from optaxclip.thresholds.given import Context, ElementBounds
from optaxclip.thresholds.learned import Learned, LearnedState
from optaxclip.thresholds.rules import RootMeanSquare

# An element's bound is at least this part of that of its leaf's largest element.
_LEAST = 1e-6
# The root of a share rises by at most this factor a step. The bound holds the present step: without
# this, one of a thousandth of the leaf's largest could spike to 50 times its size at a decay of
# 0.999.
_RISE = 1.1


class SharesState(NamedTuple):
    """State of `Shares`."""

    level: LearnedState
    """Of the largest element of each leaf."""
    shares: Tree
    """The root of each element's share, in an array of the shape of each leaf, float32."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """`sqrt(theta) L s`: the root of theta, the level of the leaf, and the share of the element.

    The level L is the root of the moving average of `n^2`, n the leaf's largest element, with the
    safeguards of `Learned`; s is the root of the moving average of `(g / n)^2`, which starts from
    1. A step that is wrong for a whole leaf leaves `g / n` as it is: the safeguards need numbers by
    leaf alone, and no second array like the parameters. A spike of one element raises its s, and
    so its bound, by at most a tenth a step.
    """

    theta: Any
    decay: Any
    warmup: int
    relearn_after: int

    def __post_init__(self) -> None:
        _ = self.level  # raises for arguments out of range

    @property
    def level(self) -> Learned:
        """Of each leaf: what its largest element is bounded by."""
        return Learned(RootMeanSquare(self.theta, self.decay), self.warmup, self.relearn_after)

    def init(self, norm: Norm, params: Tree) -> SharesState:
        return SharesState(self.level.init(norm, params), _filled(norm, params, 1.0))

    def bound(
        self, norms: jax.Array, state: SharesState, context: Context
    ) -> tuple[ElementBounds, SharesState]:
        updates, groups = context.updates, context.groups
        shares = updates.check_like(state.shares)
        (norms,) = context.norm.measure(updates, groups)  # the same, unless stats=False
        levels, level = self.level.bound(norms, state.level, context)
        # In the warm-up of a leaf its steps count alike, and the 1 it starts from as one more.
        seen = state.level.seen
        rates = jnp.where(seen < self.warmup, 1 / (seen + 2), 1 - self.decay)
        new_shares = _shared(updates.arrays, shares, _inverse(norms), rates, groups=groups)
        bounds = ElementBounds(
            jax.lax.stop_gradient(new_shares), jax.lax.stop_gradient(groups.by_leaf([levels]))
        )
        return bounds, SharesState(level, updates.alone(new_shares))


@once_compiled
def _shared(
    arrays: list[jax.Array],
    shares: list[jax.Array],
    scales: jax.Array,
    rates: jax.Array,
    *,
    groups: Groups,
) -> list[jax.Array]:
    """The shares after this step."""
    by_leaf = zip(*(groups.by_leaf([x]) for x in (scales, rates)), strict=True)
    new_shares = []
    for x, share, (scale, rate) in zip(arrays, shares, by_leaf, strict=True):
        part = _square(x, scale)
        new = jnp.sqrt(jnp.square(share) + rate * (part.astype(share.dtype) - jnp.square(share)))
        # The present step counts, with little weight: were the bounds made from the old shares,
        # XLA would copy those before it writes the new ones (2.7x Adam against 1.8x). Rarely used
        # elements (rows of an embedding) keep the share they have when used. NaN is not > 0, and
        # what is infinite has scale 0.
        new = jnp.clip(new, _LEAST, _RISE * share)
        new_shares.append(jnp.where(part > 0, new, share))
    return new_shares


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """`sqrt(theta v)` of each element, v the moving average of its clipped square: as published.

    No element is bounded for `warmup` steps, nor while its v is 0.
    """

    theta: Any
    decay: Any
    warmup: int

    def __post_init__(self) -> None:
        check_count(self.warmup, "warmup")

    def init(self, norm: Norm, params: Tree) -> Tree:
        return _filled(norm, params, 0.0)

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[ElementBounds, Tree]:
        del norms
        updates, theta = context.updates, jnp.asarray(self.theta, jnp.float32)
        before = updates.check_like(state)
        bounds, moments = [], []
        for x, v in zip(updates.arrays, before, strict=True):
            known = (context.count >= self.warmup) & (v > 0)
            bound = jnp.where(known, jnp.sqrt(theta * v), UNKNOWN)
            clipped = jnp.minimum(jax.lax.stop_gradient(jnp.abs(x)).astype(v.dtype), bound)
            new = self.decay * v + (1 - self.decay) * jnp.square(clipped)
            moments.append(jnp.where(jnp.isfinite(x), new, v))
            bounds.append(bound)
        return ElementBounds(bounds), updates.alone(moments)


def _inverse(n: jax.Array) -> jax.Array:
    """`1 / n`, and 0 for what says nothing: zero, infinite and NaN."""
    known = n >= jnp.finfo(n.dtype).tiny
    return jnp.where(known, 1 / jnp.where(known, n, 1.0), 0.0)


def _square(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`|x * scale|^2`. Not by way of `|x|`, which XLA would store, for it is measured too."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real * scale) + jnp.square(x.imag * scale)
    return jnp.square(x.astype(scale.dtype) * scale)


def _filled(norm: Norm, params: Tree, value: float) -> Tree:
    leaves = norm.leaves(params)
    # Split over a mesh as the parameters are.
    return leaves.alone([jnp.full_like(x, value, jnp.float32) for x in leaves.arrays])
