"""A bound learned from past norms, and what keeps it from locking in: the safeguards, once for all.

A `Rule` is a formula: what it remembers of past norms, and the bound that follows. `Learned`
makes a threshold of it, and looks after the warm-up, norms that say nothing (zero, NaN,
infinite), outliers, and the recovery from a change of level. Everything is by norm, in vectors
in the order of `Layout.names`: what a machine handles together is not in the state.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip.measure.norms import Bundles, Norm
from optaxclip.thresholds.given import Context, Threshold

# A norm counts for at most this many times its bound, and in the warm-up this many times the
# median is the bound: steady norms stay well within, and one spike moves no statistic far.
_OUTLIER = 2.0

RelearnAfter = int | Literal["auto"] | None


class Rule(Protocol):
    """What to remember of past norms, and the bound that follows: all arrays [..., size]."""

    def init(self, size: int) -> Tree:
        """The memory before the first norm, of fixed shapes."""
        ...

    def seed(self, recent: jax.Array) -> Tree:
        """The memory after the norms `recent` [warmup, size], oldest first, and no others."""
        ...

    def early(self, norms: jax.Array) -> jax.Array:
        """The bound during the warm-up."""
        ...

    def bound(self, memory: Tree, norms: jax.Array) -> jax.Array:
        """The bound for `norms`, the present ones."""
        ...

    def update(self, memory: Tree, norms: jax.Array, bounds: jax.Array) -> Tree:
        """The memory after the present norms, which had these bounds."""
        ...


class LearnedState(NamedTuple):
    """What is known about each norm; arrays whose last axis is `size`."""

    recent: jax.Array
    """The last `warmup` norms as they came, oldest first; inf where there was none."""
    seen: jax.Array
    """How many norms have counted, up to `warmup`, int32."""
    streak: jax.Array
    """Steps in a row that exceeded the bound, int32."""
    memory: Tree
    """The rule's."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """The threshold of a rule.

    Norms that are zero, NaN or infinite are never learned from. With `relearn_after` set:

    * the warm-up bounds each norm by twice the median of the norms before it, and the rule
      starts from the first `warmup` norms, each limited to twice their median;
    * later a norm counts for at most twice its bound;
    * after `relearn_after` steps in a row beyond the bound, the rule starts anew from the last
      `warmup` norms, as after a warm-up.

    With `relearn_after=None` none of this happens: the rule as published.

    Args:
      rule: the formula.
      warmup: how many norms the rule starts from, >= 1.
      relearn_after: >= warmup, or None.
      outliers_count: False keeps norms beyond the bound out of the memory altogether.
      ready: whether the rule has a bound from its first step on, so that it needs no warm-up.
    """

    rule: Rule
    warmup: int
    relearn_after: int | None
    outliers_count: bool = True
    ready: bool = False

    def __post_init__(self) -> None:
        check_count(self.warmup, "warmup")
        if self.relearn_after is None:
            return
        check_count(self.relearn_after, "relearn_after")
        if self.relearn_after < self.warmup:
            raise ValueError(
                f"relearn_after must be >= {self.warmup}, the number of norms it learns from, got"
                f" {self.relearn_after}. Pass more, a shorter warm-up (warmup=, or window= where"
                " half of it is one), or None for the published rule."
            )

    def init(self, norm: Norm, params: Tree) -> LearnedState:
        size = norm.layout(norm.leaves(params)).size
        return LearnedState(
            recent=jnp.full((self.warmup, size), jnp.inf, jnp.float32),
            seen=jnp.full(size, self.warmup if self.ready else 0, jnp.int32),
            streak=jnp.zeros(size, jnp.int32),
            memory=self.rule.init(size),
        )

    def bound(
        self, norms: Bundles, state: LearnedState, context: Context
    ) -> tuple[Bundles, LearnedState]:
        layout = context.layout
        if state.seen.shape != (layout.size,):
            raise ValueError(
                f"updates must have the norms that init saw, got {layout.size} for"
                f" {state.seen.shape[0]}, of the leaves {context.updates.sketch()}. Call init with"
                " the tree the gradient is taken for, and inside shard_map with what one device"
                " holds."
            )
        if not norms:
            return norms, state
        if sum(n.size for n in norms) != layout.size:
            raise ValueError(
                f"a bound learned from past norms needs one norm a step, got {norms[0].shape[-1]},"
                " one for each example. Pass example_quantile to clip_per_example."
            )
        # The bound is a constant to differentiation, also where the present norm counts in it.
        n = jax.lax.stop_gradient(layout.vector(norms))
        telling = jnp.isfinite(n) & (n > 0)
        n = jnp.where(telling, n, 0.0)
        learning = state.seen < self.warmup
        bounds = jnp.where(
            learning, self._early(n, state, learning), self.rule.bound(state.memory, n)
        )
        new_state = self._learn(n, telling, learning, bounds, state)
        return layout.from_vector(bounds, norms[0].dtype), new_state

    def _early(self, n: jax.Array, state: LearnedState, learning: jax.Array) -> jax.Array:
        early = self.rule.early(n)
        if self.relearn_after is None:
            return early

        def guarded() -> jax.Array:
            return jnp.minimum(early, _OUTLIER * _median(state.recent))

        # Sorting is for the warm-up alone.
        return jax.lax.cond(jnp.any(learning), guarded, lambda: early)

    def _learn(
        self,
        n: jax.Array,
        telling: jax.Array,
        learning: jax.Array,
        bounds: jax.Array,
        state: LearnedState,
    ) -> LearnedState:
        recent = jnp.where(telling, push(state.recent, n), state.recent)
        seen = jnp.where(telling & learning, state.seen + 1, state.seen)
        start = telling & learning & (seen == self.warmup)
        counted, streak = telling & ~learning, state.streak
        limited = n
        beyond = n > bounds
        if not self.outliers_count:
            counted &= ~beyond
        if self.relearn_after is not None:
            streak = jnp.where(telling, jnp.where(beyond, streak + 1, 0), streak)
            again = streak >= self.relearn_after
            start = start | again
            streak = jnp.where(again, 0, streak)
            limited = jnp.minimum(n, _OUTLIER * bounds)
        memory = _where(counted, self.rule.update(state.memory, limited, bounds), state.memory)

        def seeded() -> Tree:
            limit = jnp.inf if self.relearn_after is None else _OUTLIER * _median(recent)
            return _where(start, self.rule.seed(jnp.minimum(recent, limit)), memory)

        memory = jax.lax.cond(jnp.any(start), seeded, lambda: memory)
        return LearnedState(recent, seen, streak, memory)


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The bounds of `threshold`, but at most `ceiling`."""

    threshold: Threshold
    ceiling: Any

    def init(self, norm: Norm, params: Tree) -> Tree:
        return self.threshold.init(norm, params)

    def bound(self, norms: Bundles, state: Tree, context: Context) -> tuple[Bundles, Tree]:
        bounds, state = self.threshold.bound(norms, state, context)
        ceiling = self.ceiling(context.count) if callable(self.ceiling) else self.ceiling
        return tuple(jnp.minimum(c, jnp.asarray(ceiling).astype(c.dtype)) for c in bounds), state


def relearn_after_of(value: RelearnAfter, usual: int, warmup: Any) -> int | None:
    """The number that `relearn_after` stands for: "auto" is `usual`, or a longer warm-up's."""
    check_count(warmup, "warmup")
    if not isinstance(value, str):
        return value
    if value != "auto":
        raise ValueError(
            f'relearn_after must be "auto", a whole number or None, got {value!r}. Pass for example'
            f" {max(usual, warmup)}."
        )
    return max(usual, warmup)


def push(rows: jax.Array, row: jax.Array) -> jax.Array:
    """The rows without the first, and the new one after the last."""
    return jnp.concatenate([rows[1:], row[None]])


def _median(rows: jax.Array) -> jax.Array:
    """The lower median of the finite entries of each column; inf where there is none."""
    at = jnp.maximum(jnp.sum(jnp.isfinite(rows), axis=0) - 1, 0) // 2
    return jnp.take_along_axis(jnp.sort(rows, axis=0), at[None], axis=0)[0]


def _where(pick_new: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.where(pick_new, x, y), new, old)
