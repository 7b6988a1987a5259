"""One training run with a traced threshold, and many of them: side by side and on all devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from optaxclip._leaves import Tree
from optaxclip.clipping import clip_stats
from optaxclip.measure.statistics import ClipStats
from optaxclip.selection.folds import Folds


class Jobs(NamedTuple):
    """The runs, one per entry; arrays of one length."""

    threshold: Any
    fold: Any
    seed: Any
    batches: Any
    """int32 [steps, batch_size]: the examples of each step."""


class Shared(NamedTuple):
    """What all runs read."""

    folds: Folds
    key: Any
    data: Tree


class Trained(NamedTuple):
    """A model at the end of a run."""

    params: Tree
    clip_rate: jax.Array
    norm: jax.Array


class Outcome(NamedTuple):
    """What is kept of a run; float32, and a boolean."""

    score: Any
    failed: Any
    """Whether score or parameters are not finite."""
    clip_rate: Any
    norm: Any
    """What the clipper measured on the last step."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What one run does; all that is static."""

    make_optimizer: Callable
    init_fn: Callable
    loss_fn: Callable
    metric_fn: Callable
    grad: Callable
    pass_key: bool
    validation_sizes: tuple[int, ...]

    def train(self, job: Jobs, shared: Shared) -> Trained:
        """The model of one job, whose fields are scalars."""
        _, key, data = shared
        # Not of the threshold: thresholds are compared on the same start and the same batches.
        key = jax.random.fold_in(jax.random.fold_in(key, job.fold), job.seed)
        init_key, loss_key = jax.random.split(key)
        params = self.init_fn(init_key)
        with _bound_is_traced():
            tx = self.make_optimizer(job.threshold)
            opt_state = tx.init(params)
        grad_fn = self.grad(self.loss_fn)

        def step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            params, opt_state, clipped = carry
            count, chosen = batch
            args = (jax.random.fold_in(loss_key, count),) if self.pass_key else ()
            grads = grad_fn(params, _rows(data, chosen), *args)
            with _bound_is_traced():
                updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state, clipped + _clipped_share(opt_state)), None

        start = (params, opt_state, jnp.zeros((), jnp.float32))
        steps = len(job.batches)
        (params, opt_state, clipped), _ = lax.scan(step, start, (jnp.arange(steps), job.batches))
        return Trained(params, *_clipping(opt_state, clipped / steps))

    def evaluate(self, trained: Trained, fold: jax.Array, shared: Shared) -> Outcome:
        """Scores it on the very examples of its fold: one branch for each number of them."""

        def on(size: int) -> Callable[[], jax.Array]:
            def score() -> jax.Array:
                indices = shared.folds.validation[fold, :size]
                found = jnp.asarray(
                    self.metric_fn(trained.params, _rows(shared.data, indices)), jnp.float32
                )
                if found.ndim:
                    raise ValueError(
                        f"metric_fn must give one number, got shape {found.shape}. Average over"
                        " the examples, for example with jnp.mean."
                    )
                return found

            return score

        kind = shared.folds.kind[fold]
        score = lax.switch(kind, [on(size) for size in self.validation_sizes])
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(trained.params) if _inexact(x)]
        failed = ~functools.reduce(jnp.logical_and, finite, jnp.isfinite(score))
        return Outcome(score, failed, trained.clip_rate, trained.norm)


@functools.lru_cache(maxsize=8)
def traceable(training: Training) -> tuple[Any, Any]:
    """`train` and `evaluate`, jitted: what a second call with the same functions finds again."""
    return jax.jit(training.train), jax.jit(training.evaluate)


@functools.lru_cache(maxsize=8)
def program(training: Training, width: int, devices: tuple[Any, ...]) -> Callable:
    """A jitted `(jobs, shared) -> outcomes` for `width` jobs a device."""

    train, evaluate = traceable(training)

    def on_one_device(jobs: Jobs, shared: Shared) -> Outcome:
        # A single run is not batched: its branches stay branches.
        if width == 1:
            trained = jax.tree.map(
                lambda x: x[None], train(jax.tree.map(lambda x: x[0], jobs), shared)
            )
        else:
            trained = jax.vmap(lambda job: train(job, shared))(jobs)
        # One at a time: a validation set is larger than a batch.
        return lax.map(lambda x: evaluate(x[0], x[1], shared), (trained, jobs.fold))

    mesh = Mesh(np.asarray(devices), ("runs",))
    # Runs have nothing to do with each other, so nothing is to be checked.
    spread = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(P("runs"), P()),
        out_specs=P("runs"),
        check_vma=False,
    )
    return jax.jit(spread)


def most_bytes(jaxpr: Any) -> int:
    """An upper bound of the memory a function takes: all it computes, loop bodies once."""
    total = 0
    for equation in jaxpr.eqns:
        for var in equation.outvars:
            aval = var.aval
            dtype = getattr(aval, "dtype", None)  # a token has none
            total += getattr(aval, "size", 0) * getattr(dtype, "itemsize", 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += most_bytes(inner)
    return total


def width_for(train_bytes: int, evaluate_bytes: int, runs: int, devices: list[Any]) -> int:
    """How many runs a device takes side by side."""
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        # On 2 CPU cores an MLP 64-256-256-10 took 86 ms a run alone and 87-91 ms under vmap of 2
        # to 8; 64-32-10 took 4.7 ms alone and 3.7 ms under vmap of 4.
        return 1
    free = (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    fit = max(1, (free - evaluate_bytes) // max(train_bytes, 1))
    return balanced(runs, int(fit), len(devices))


def balanced(runs: int, width: int, devices: int) -> int:
    """At most `width`, with as many rounds, but as full as can be."""
    rounds = -(-runs // (width * devices))
    return -(-runs // (rounds * devices))


def _rows(data: Tree, indices: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x.at[indices].get(mode="promise_in_bounds"), data)


def _clipped_share(opt_state: Tree) -> jax.Array:
    """Of an aggregator's last step the share of examples beyond their bound, otherwise 0."""
    stats = _first(opt_state)
    if stats is None or stats.examples is None:
        return jnp.zeros((), jnp.float32)
    return stats.examples.clipped_fraction


def _clipping(opt_state: Tree, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Clip rate and last norm of the first clipper; NaN where there is none that counts."""
    stats = _first(opt_state)
    if stats is None:
        unknown = jnp.full((), jnp.nan, jnp.float32)
        return unknown, unknown
    if stats.examples is not None:
        return share, stats.examples.mean_norm
    counted = stats.clipped_count >= 0
    rate = stats.clipped_count / jnp.maximum(stats.count, 1)
    return (
        jnp.where(counted, rate, jnp.nan).astype(jnp.float32),
        jnp.where(counted, stats.pre_clip_norm, jnp.nan).astype(jnp.float32),
    )


def _first(opt_state: Tree) -> ClipStats | None:
    """What the first clipper of an optimizer did."""
    return next(iter(clip_stats(opt_state).values()), None)


def hashable(fun: Callable) -> Callable:
    """`fun`, or a stand-in where it has no hash, such as a method of a dataclass of arrays."""
    try:
        hash(fun)
    except TypeError:
        return functools.partial(fun)
    return fun


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)


@contextlib.contextmanager
def _bound_is_traced() -> Iterator[None]:
    """Explains what JAX says where an optimizer takes the threshold for a Python number."""
    try:
        yield
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(
            "make_optimizer must accept a traced threshold, as all thresholds share one"
            " compilation, got an optimizer that needs its value. Pass the threshold on as it is,"
            " without float(), int(), NumPy or if, to an argument that may be an array; and"
            " validate the values before."
        ) from error
