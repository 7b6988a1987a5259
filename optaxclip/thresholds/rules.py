"""The formulas by which a bound follows from past norms: one `Rule` (see `learned`) each.

`robust` says that the safeguards of `Learned` are on. Without them a rule is exactly as
published: the present norm counts in `Percentile` and `MovingMean`, the least spread in
`WindowMoments` and `ZScore` is absolute, and `Ratio` starts from the smallest norm.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._numerics import UNKNOWN
from optaxclip.thresholds.learned import insert, pick, push, without

Mode = Literal["zscore", "mean", "percentile"]


class Window(NamedTuple):
    """The last norms, `UNKNOWN` where there is none yet; arrays [window, size]."""

    history: jax.Array
    """Oldest first."""
    ordered: jax.Array
    """Smallest first. Kept in order: sorting 300 windows of 1024 takes 50 ms on 2 CPU cores."""


@dataclasses.dataclass(frozen=True)
class Percentile:
    """A multiple of the p-th percentile of the window, interpolated linearly as NumPy does."""

    percentile: Any
    window: int
    robust: bool
    factor: Any = 1.0

    def init(self, size: int) -> Window:
        empty = jnp.full((self.window, size), UNKNOWN, jnp.float32)
        return Window(empty, empty + 0.0)  # two buffers, which may both be donated

    def seed(self, recent: jax.Array, ordered: jax.Array) -> Window:
        for oldest in recent[: max(len(recent) - self.window, 0)]:
            ordered = without(ordered, oldest)[:-1]
        missing = jnp.full((self.window - len(ordered), recent.shape[1]), UNKNOWN, jnp.float32)
        return Window(_last(recent, self.window), jnp.concatenate([ordered, missing]))

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: Window, norms: jax.Array) -> jax.Array:
        # The paper's window holds the present norm, which pulls high percentiles to a spike.
        rows = memory.ordered if self.robust else self._insert(memory, norms)
        filled = jnp.sum(rows < UNKNOWN, axis=0)
        last = jnp.maximum(filled - 1, 0).astype(jnp.float32)
        # A traced percentile beyond the ends counts as the end: past it there is no norm to read.
        at = jnp.clip(jnp.asarray(self.percentile, jnp.float32) / 100 * last, 0.0, last)
        low = jnp.floor(at)
        places = low.astype(jnp.int32), jnp.minimum(low + 1, last).astype(jnp.int32)
        below, above = (pick(rows, at) for at in places)
        known = filled > 0
        step = jnp.where(known, above, 0.0) - jnp.where(known, below, 0.0)
        return jnp.where(known, self.factor * (below + (at - low) * step), jnp.inf)

    def update(self, memory: Window, norms: jax.Array, bounds: jax.Array) -> Window:
        del bounds
        return Window(push(memory.history, norms), self._insert(memory, norms))

    def _insert(self, memory: Window, norms: jax.Array) -> jax.Array:
        return insert(memory.ordered, memory.history[0], norms)


@dataclasses.dataclass(frozen=True)
class WindowMoments:
    """`mean + k max(std, floor)` of the window."""

    num_stds: Any
    window: int
    robust: bool

    def init(self, size: int) -> jax.Array:
        return jnp.full((self.window, size), UNKNOWN, jnp.float32)

    def seed(self, recent: jax.Array, ordered: jax.Array) -> jax.Array:
        del ordered
        return _last(recent, self.window)

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: jax.Array, norms: jax.Array) -> jax.Array:
        del norms
        mean, std = _moments(memory)
        return mean + self.num_stds * jnp.maximum(std, _floor(mean, self.robust))

    def update(self, memory: jax.Array, norms: jax.Array, bounds: jax.Array) -> jax.Array:
        del bounds
        return push(memory, norms)


class MeanAndStd(NamedTuple):
    """Moving averages; arrays [size]."""

    mean: jax.Array
    std: jax.Array


@dataclasses.dataclass(frozen=True)
class ZScore:
    """Beyond z = k, for z = (n - mu) / sigma: `mu + sigma k^2 / z`, `mu` or `mu + k sigma`."""

    z_threshold: Any
    decay: Any
    mode: Mode
    robust: bool

    def init(self, size: int) -> MeanAndStd:
        return MeanAndStd(jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32))

    def seed(self, recent: jax.Array, ordered: jax.Array) -> MeanAndStd:
        del ordered
        return MeanAndStd(*_moments(recent))

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: MeanAndStd, norms: jax.Array) -> jax.Array:
        mean, std = memory
        if self.robust:
            std = spread = jnp.maximum(std, _floor(mean, self.robust))
        else:
            spread = std + 1e-6
        limit = mean + self.z_threshold * std
        if self.mode == "percentile":
            return limit
        z = (norms - mean) / spread
        beyond = z > self.z_threshold
        eta = jnp.where(beyond, z, 1.0) / self.z_threshold
        answer = mean + self.z_threshold * std / eta if self.mode == "zscore" else mean
        # Within the limit any bound will do that the norm does not exceed.
        return jnp.where(beyond, answer, jnp.maximum(limit, norms))

    def update(self, memory: MeanAndStd, norms: jax.Array, bounds: jax.Array) -> MeanAndStd:
        clipped = jnp.minimum(norms, bounds)
        mean = self.decay * memory.mean + (1 - self.decay) * clipped
        old, new = jnp.sqrt(self.decay), jnp.sqrt(1 - self.decay)
        return MeanAndStd(mean, jnp.hypot(old * memory.std, new * (clipped - mean)))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """`ratio gamma`, with gamma the moving average of the clipped norm."""

    ratio: Any
    decay: Any
    max_norm: Any
    robust: bool

    def init(self, size: int) -> jax.Array:
        return jnp.zeros(size, jnp.float32)

    def seed(self, recent: jax.Array, ordered: jax.Array) -> jax.Array:
        del ordered
        if self.robust:
            return jnp.mean(recent, axis=0)

        def clipped(norms: jax.Array) -> jax.Array:
            # A leaf without a norm yet added nothing to the length of the whole.
            return jnp.minimum(norms, self.early(jnp.where(norms < UNKNOWN, norms, 0.0)))

        return jnp.min(jax.vmap(clipped)(recent), axis=0)

    def early(self, norms: jax.Array) -> jax.Array:
        """All norms scaled alike, so that together they are at most `max_norm`."""
        largest = jnp.maximum(jnp.max(norms), jnp.finfo(norms.dtype).tiny)
        shares = norms / largest
        length = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(shares))), 1.0)  # 0 without a gradient
        beyond = largest * length > self.max_norm
        return jnp.where(beyond, shares / length * self.max_norm, jnp.inf)

    def bound(self, memory: jax.Array, norms: jax.Array) -> jax.Array:
        del norms
        return self.ratio * memory

    def update(self, memory: jax.Array, norms: jax.Array, bounds: jax.Array) -> jax.Array:
        return self.decay * memory + (1 - self.decay) * jnp.minimum(norms, bounds)


class Mean(NamedTuple):
    """A moving average and the weight it has gathered; arrays [size]."""

    sum: jax.Array
    weight: jax.Array


@dataclasses.dataclass(frozen=True)
class MovingMean:
    """The moving average of the norms, corrected for its start from zero."""

    decay: Any
    robust: bool

    def init(self, size: int) -> Mean:
        return Mean(jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32))

    def seed(self, recent: jax.Array, ordered: jax.Array) -> Mean:
        del ordered
        return Mean(jnp.mean(recent, axis=0), jnp.ones(recent.shape[1], jnp.float32))

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: Mean, norms: jax.Array) -> jax.Array:
        # The paper's average holds the present norm.
        total, weight = memory if self.robust else self.update(memory, norms, norms)
        known = weight > 0
        return jnp.where(known, total / jnp.where(known, weight, 1.0), jnp.inf)

    def update(self, memory: Mean, norms: jax.Array, bounds: jax.Array) -> Mean:
        del bounds
        rest = 1 - self.decay
        return Mean(self.decay * memory.sum + rest * norms, self.decay * memory.weight + rest)


@dataclasses.dataclass(frozen=True)
class RootMeanSquare:
    """`sqrt(theta)` times the root of the moving average of the squared norms."""

    theta: Any
    decay: Any

    def init(self, size: int) -> jax.Array:
        return jnp.zeros(size, jnp.float32)

    def seed(self, recent: jax.Array, ordered: jax.Array) -> jax.Array:
        del ordered
        unit = jnp.maximum(jnp.max(recent, axis=0), jnp.finfo(recent.dtype).tiny)
        return unit * jnp.sqrt(jnp.mean(jnp.square(recent / unit[None]), axis=0))

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: jax.Array, norms: jax.Array) -> jax.Array:
        del norms
        return jnp.sqrt(jnp.asarray(self.theta, jnp.float32)) * memory

    def update(self, memory: jax.Array, norms: jax.Array, bounds: jax.Array) -> jax.Array:
        del bounds
        old, new = jnp.sqrt(self.decay), jnp.sqrt(1 - self.decay)
        return jnp.hypot(old * memory, new * norms)  # squares stay in range


class Moments(NamedTuple):
    """Moving averages and the weights they have gathered; arrays [size]."""

    mean: jax.Array
    weight: jax.Array
    root: jax.Array
    """Of the moving average of the squares."""
    sq_weight: jax.Array


@dataclasses.dataclass(frozen=True)
class MeanOverRoot:
    """`m / (sqrt(v) + eps)`: m and v the moving averages of the norms and of their squares.

    Both hold the present norm, and are corrected for their start from zero. A norm counts for at
    most `outlier` times the mean of those before it.
    """

    decay: Any
    sq_decay: Any
    eps: Any
    outlier: Any

    def init(self, size: int) -> Moments:
        return Moments(*(jnp.zeros(size, jnp.float32) for _ in range(4)))

    def seed(self, recent: jax.Array, ordered: jax.Array) -> Moments:
        one = jnp.ones(recent.shape[1], jnp.float32)
        root = RootMeanSquare(1.0, self.sq_decay).seed(recent, ordered)
        return Moments(jnp.mean(recent, axis=0), one, root, one)

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: Moments, norms: jax.Array) -> jax.Array:
        mean, weight, root, sq_weight = self.update(memory, norms, norms)
        known = root > 0
        root = jnp.where(known, root, 1.0) / jnp.sqrt(sq_weight)
        return jnp.where(known, mean / weight / (root + jnp.asarray(self.eps, root.dtype)), 0.0)

    def update(self, memory: Moments, norms: jax.Array, bounds: jax.Array) -> Moments:
        del bounds
        known = memory.weight > 0
        before = memory.mean / jnp.where(known, memory.weight, 1.0)
        if not (isinstance(self.outlier, float) and self.outlier >= UNKNOWN):
            limit = jnp.asarray(self.outlier, norms.dtype) * before
            norms = jnp.where(known, jnp.minimum(norms, limit), norms)
        old, new = jnp.sqrt(self.sq_decay), jnp.sqrt(1 - self.sq_decay)
        return Moments(
            self.decay * memory.mean + (1 - self.decay) * norms,
            self.decay * memory.weight + (1 - self.decay),
            jnp.hypot(old * memory.root, new * norms),  # squares stay in range
            self.sq_decay * memory.sq_weight + (1 - self.sq_decay),
        )


@dataclasses.dataclass(frozen=True)
class Quantile:
    """`C <- C exp(-eta (1[n <= C] - q))`: one number that finds the q-th quantile."""

    quantile: Any
    step_size: Any
    start: Any

    def init(self, size: int) -> jax.Array:
        start = 1.0 if self.start is None else self.start
        return jnp.broadcast_to(jnp.asarray(start, jnp.float32), (size,)) + 0.0

    def seed(self, recent: jax.Array, ordered: jax.Array) -> jax.Array:
        del recent
        at = jnp.asarray(self.quantile, jnp.float32) * (len(ordered) - 1)
        low = jnp.floor(at)
        places = (
            jnp.broadcast_to(x.astype(jnp.int32), ordered.shape[1:]) for x in (low, jnp.ceil(at))
        )
        below, above = (pick(ordered, place) for place in places)
        known = above < UNKNOWN
        return jnp.where(known, below + (at - low) * (jnp.where(known, above, 0.0) - below), above)

    def early(self, norms: jax.Array) -> jax.Array:
        return jnp.full_like(norms, jnp.inf)

    def bound(self, memory: jax.Array, norms: jax.Array) -> jax.Array:
        del norms
        return memory

    def update(self, memory: jax.Array, norms: jax.Array, bounds: jax.Array) -> jax.Array:
        del bounds
        inside = (norms <= memory).astype(memory.dtype)
        return memory * jnp.exp(-self.step_size * (inside - self.quantile))


def _moments(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the known entries of each column."""
    known = rows < UNKNOWN
    count = jnp.maximum(jnp.sum(known, axis=0), 1).astype(rows.dtype)
    mean = jnp.sum(jnp.where(known, rows, 0.0), axis=0) / count
    unit = jnp.maximum(mean, jnp.finfo(rows.dtype).tiny)  # squares stay in range
    deviation = jnp.where(known, jnp.where(known, rows, 0.0) / unit[None] - 1.0, 0.0)
    return mean, unit * jnp.sqrt(jnp.sum(jnp.square(deviation), axis=0) / count)


def _floor(mean: jax.Array, robust: bool) -> Any:
    """The least spread: 1e-6 as published; if robust relative, for norms have any unit."""
    return jnp.maximum(0.01 * mean, jnp.finfo(mean.dtype).tiny) if robust else 1e-6


def _last(rows: jax.Array, window: int) -> jax.Array:
    """The last rows of a window, filled up in front with `UNKNOWN`."""
    missing = jnp.full((max(window - len(rows), 0), rows.shape[1]), UNKNOWN, jnp.float32)
    return jnp.concatenate([missing, rows[-window:]])
