"""A bound learned from past norms, and what keeps it from locking in: the safeguards, once for all.

A `Rule` is a formula: what it remembers of past norms, and the bound that follows. `Learned`
makes a threshold of it, and looks after the warm-up, norms that say nothing (zero, NaN,
infinite), outliers, and the recovery from a change of level. Everything is by norm, in vectors
in the order of `Groups.names`. There is no branch and no sort: the norms that the warm-up needs
the median of are kept in order as they come.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._arguments import check_count, narrowed
from optaxclip._leaves import Tree
from optaxclip._numerics import UNKNOWN, as_float32, once_compiled
from optaxclip.measure.norms import Norm
from optaxclip.thresholds.given import Bounds, Context, Threshold

# A norm counts for at most this many times its bound, and in the warm-up this many times the
# median is the bound: steady norms stay well within, and one spike moves no statistic far.
_OUTLIER = 2.0

RelearnAfter = int | Literal["auto"] | None


class Rule(Protocol):
    """What to remember of past norms, and the bound that follows: all arrays [..., size]."""

    def init(self, size: int) -> Tree:
        """The memory before the first norm, of fixed shapes."""
        ...

    def seed(self, recent: jax.Array, ordered: jax.Array) -> Tree:
        """The memory after the norms `recent` [warmup, size], oldest first, and no others.

        `ordered` are the same, smallest first. The seed is computed on every step, and used after a
        warm-up alone.
        """
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
    """The last `warmup` norms as they came, oldest first; the largest float where none."""
    ordered: jax.Array
    """The same, smallest first."""
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
        object.__setattr__(self, "rule", narrowed(self.rule))
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
        size = norm.groups(norm.leaves(params)).size
        return LearnedState(
            recent=jnp.full((self.warmup, size), UNKNOWN, jnp.float32),
            ordered=jnp.full((self.warmup, size), UNKNOWN, jnp.float32),
            seen=jnp.full(size, self.warmup if self.ready else 0, jnp.int32),
            streak=jnp.zeros(size, jnp.int32),
            memory=self.rule.init(size),
        )

    def bound(
        self, norms: jax.Array, state: LearnedState, context: Context
    ) -> tuple[jax.Array, LearnedState]:
        groups = context.groups
        if state.seen.shape != (groups.size,):
            raise ValueError(
                f"updates must have the norms that init saw, got {groups.size} for"
                f" {state.seen.shape[0]}, of the leaves {context.updates.sketch()}. Call init with"
                " the tree the gradient is taken for, and inside shard_map with what one device"
                " holds."
            )
        if norms.ndim > 1:
            raise ValueError(
                f"a bound learned from past norms needs one norm a step, got {norms.shape[-1]},"
                " one for each example. Pass example_quantile to clip_per_example."
            )
        if not groups.size:
            return norms, state
        bounds, new_state = _learned(norms, state, threshold=self)
        return bounds.astype(norms.dtype), new_state

    def _step(self, norms: jax.Array, state: LearnedState) -> tuple[jax.Array, LearnedState]:
        # The bound is a constant to differentiation, also where the present norm counts in it.
        n = lax.stop_gradient(as_float32(norms))
        telling = (n < UNKNOWN) & (n > 0)
        n = jnp.where(telling, n, 0.0)
        learning = state.seen < self.warmup
        early = self.rule.early(n)
        if self.relearn_after is not None:
            early = jnp.minimum(early, _OUTLIER * _median(state.ordered))
        bounds = jnp.where(learning, early, self.rule.bound(state.memory, n))
        bounds = jnp.minimum(bounds, UNKNOWN)
        return bounds, self._learn(n, telling, learning, bounds, state)

    def _learn(
        self,
        n: jax.Array,
        telling: jax.Array,
        learning: jax.Array,
        bounds: jax.Array,
        state: LearnedState,
    ) -> LearnedState:
        recent = jnp.where(telling[None], push(state.recent, n), state.recent)
        ordered = jnp.where(telling[None], insert(state.ordered, state.recent[0], n), state.ordered)
        seen = jnp.where(telling & learning, state.seen + 1, state.seen)
        start = telling & learning & (seen == self.warmup)
        counted, streak = telling & ~learning, state.streak
        limited = n
        limit: Any = jnp.inf
        beyond = n > bounds
        if not self.outliers_count:
            counted &= ~beyond
        if self.relearn_after is not None:
            streak = jnp.where(telling, jnp.where(beyond, streak + 1, 0), streak)
            again = streak >= self.relearn_after
            start = start | again
            streak = jnp.where(again, 0, streak)
            limited = jnp.minimum(n, _OUTLIER * bounds)
            limit = _OUTLIER * _median(ordered)[None]
        memory = _where(counted, self.rule.update(state.memory, limited, bounds), state.memory)
        seed = self.rule.seed(jnp.minimum(recent, limit), jnp.minimum(ordered, limit))
        return LearnedState(recent, ordered, seen, streak, _where(start, seed, memory))


@once_compiled
def _learned(
    norms: jax.Array, state: LearnedState, *, threshold: Learned
) -> tuple[jax.Array, LearnedState]:
    return threshold._step(norms, state)


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The bounds of `threshold`, but at most `ceiling`."""

    threshold: Threshold
    ceiling: Any

    def init(self, norm: Norm, params: Tree) -> Tree:
        return self.threshold.init(norm, params)

    def bound(self, norms: jax.Array, state: Tree, context: Context) -> tuple[Bounds, Tree]:
        bounds, state = self.threshold.bound(norms, state, context)
        if isinstance(self.ceiling, float) and self.ceiling >= UNKNOWN:
            return bounds, state
        ceiling = jnp.asarray(
            self.ceiling(context.count) if callable(self.ceiling) else self.ceiling
        ).astype(norms.dtype)
        limited = [jnp.minimum(c, ceiling) for c in context.groups.blocks_of(bounds)]
        return limited if context.groups.has_units else limited[0], state


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


def insert(ordered: jax.Array, oldest: jax.Array, row: jax.Array) -> jax.Array:
    """Ordered columns without their oldest number and with a new one."""
    rest, place = without(ordered, oldest), jnp.arange(len(ordered))[:, None]
    new = jnp.sum(rest <= row[None], axis=0)[None]
    moved = jnp.concatenate([rest[:1], rest[:-1]])
    return jnp.where(place < new, rest, jnp.where(place == new, row[None], moved))


def without(ordered: jax.Array, number: jax.Array) -> jax.Array:
    """Ordered columns without one number of each; `UNKNOWN` takes its place, at the end."""
    before = jnp.arange(len(ordered))[:, None] < jnp.sum(ordered < number[None], axis=0)[None]
    return jnp.where(before, ordered, push(ordered, jnp.full_like(number, UNKNOWN)))


def _median(ordered: jax.Array) -> jax.Array:
    """The lower median of the known entries of each column; `UNKNOWN` where there is none."""
    at = jnp.maximum(jnp.sum(ordered < UNKNOWN, axis=0) - 1, 0) // 2
    return pick(ordered, at)


def pick(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Of each column the number at a place. By a sum: XLA fuses it, unlike a gather."""
    place = jnp.arange(len(rows), dtype=at.dtype)[:, None]
    return jnp.sum(jnp.where(place == at[None], rows, 0.0), axis=0)


def _where(pick_new: jax.Array, new: Tree, old: Tree) -> Tree:
    def select(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(pick_new.reshape((1,) * (x.ndim - 1) + pick_new.shape), x, y)

    return jax.tree.map(select, new, old)
