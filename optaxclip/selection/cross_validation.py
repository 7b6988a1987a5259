"""`cross_validate`: a threshold that is chosen on the data."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip.selection.folds import check_data, split
from optaxclip.selection.folds import tables as tables_of
from optaxclip.selection.results import CrossValidation
from optaxclip.selection.runs import Shared, Training, hashable
from optaxclip.selection.search import Search, run_all

Mode = Literal["max", "min"]


def cross_validate(
    make_optimizer: Callable[[jax.Array], Any],
    thresholds: Any,
    *,
    init_fn: Callable[[jax.Array], Tree],
    loss_fn: Callable[..., jax.Array],
    metric_fn: Callable[[Tree, Tree], jax.Array],
    data: Tree,
    folds: int | float | Sequence = 5,
    steps: int,
    batch_size: int,
    key: jax.Array,
    seeds: int = 1,
    mode: Mode = "max",
    grad: Callable[[Callable], Callable] = jax.grad,
    pass_key: bool = False,
    runs_at_once: int | None = None,
    progress: bool = True,
    resume_dir: Any = None,
) -> CrossValidation:
    """Trains with every threshold on every fold, and scores on the examples left out.

    All runs share one compilation: the threshold is traced. More: `docs/choosing_a_threshold.md`.

    Args:
      make_optimizer: `threshold -> optimizer`; the threshold is a traced scalar.
      thresholds: the candidates: > 0, increasing; the last may be `inf`.
      init_fn: `key -> params`.
      loss_fn: `(params, batch) -> scalar`, the mean over the rows of `data` that were drawn.
      metric_fn: `(params, examples) -> scalar`, on all examples of a fold at once.
      data: a tree of arrays with one row per example, two rows at least.
      folds: k >= 2 folds of a random order; a share to hold out once; or (train, validation) pairs
        of indices, such as `list(StratifiedKFold(5).split(x, y))`.
      steps, batch_size: of each run, and examples a step.
      key: for the folds, the start, the batches and `pass_key`, the same for all thresholds.
      seeds: runs of each threshold and fold.
      mode: whether the highest or the lowest score is best.
      grad: makes a gradient function of `loss_fn`, such as `per_example_grad`.
      pass_key: whether `loss_fn` takes a key as third argument, for dropout.
      runs_at_once: how many runs a device trains side by side; by default by memory, on CPU 1.
      progress, resume_dir: a line on stderr; where finished runs are kept, not to be run again.

    Returns:
      A `CrossValidation`: `best`, `one_standard_error` (the strictest threshold within one),
      `mean`, `scores` and more. It prints as a table. A run that fails has an infinite score.

    Raises:
      ValueError, TypeError: before any training, an argument out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optaxclip
      >>> x = jnp.linspace(-1.0, 1.0, 20)
      >>> loss = lambda w, batch: jnp.mean((w * batch[0] - batch[1]) ** 2)
      >>> found = optaxclip.cross_validate(
      ...     lambda c: optax.chain(optaxclip.clip_by_global_norm(c), optax.sgd(0.1)), [0.01, 1.0],
      ...     init_fn=lambda key: jnp.zeros(()), loss_fn=loss, metric_fn=loss, data=(x, 3.0 * x),
      ...     steps=100, batch_size=8, key=jax.random.key(0), mode="min", progress=False,
      ... )
      >>> print(found.best, found.mean.round(2))
      1.0 [3.1 0. ]
    """
    given, candidates = _check_thresholds(thresholds)
    for value, name in ((steps, "steps"), (batch_size, "batch_size"), (seeds, "seeds")):
        check_count(value, name)
    if runs_at_once is not None:
        check_count(runs_at_once, "runs_at_once")
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode, got {mode!r}. Use one of {get_args(Mode)}.")
    data, number = check_data(data)
    key = _check_key(key)
    entropy = np.asarray(jax.random.key_data(key)).ravel()
    pairs = split(folds, number, entropy)
    smallest = min(len(train) for train, _ in pairs)
    if batch_size > smallest:
        raise ValueError(
            f"batch_size must be at most the smallest training set, got {batch_size} for"
            f" {smallest}. Pass {smallest} or less."
        )
    tables, sizes = tables_of(pairs)
    training = Training(
        make_optimizer=hashable(make_optimizer),
        init_fn=hashable(init_fn),
        loss_fn=hashable(loss_fn),
        metric_fn=hashable(metric_fn),
        grad=hashable(grad),
        pass_key=pass_key,
        validation_sizes=sizes,
    )
    search = Search(candidates, pairs, seeds, steps, batch_size, entropy)
    shared = Shared(tables, key, data)
    outcomes = run_all(search, training, shared, runs_at_once, progress, resume_dir)

    score, failed, rate, norm = (np.moveaxis(field, 2, 0) for field in outcomes)
    worst = -np.inf if mode == "max" else np.inf
    scores = np.where(failed, worst, score.astype(float))
    return CrossValidation(given, scores, failed, rate, norm, mode)


def _check_key(key: Any) -> jax.Array:
    """A typed key."""
    if not isinstance(key, jax.Array):
        raise TypeError(f"key must be a JAX key, got {key!r}. Pass for example jax.random.key(0).")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.wrap_key_data(key)


def _check_thresholds(thresholds: Any) -> tuple[np.ndarray, np.ndarray]:
    """As they were given, and as they are traced."""
    found = np.asarray(thresholds, jnp.result_type(float))
    if found.ndim != 1 or not found.size:
        raise ValueError(
            f"thresholds must be a list of numbers, got {thresholds!r}. Pass for example"
            " np.geomspace(0.1, 10, 16)."
        )
    if not found[0] > 0:
        raise ValueError(f"thresholds must be > 0, got {found[0]}. Leave it out.")
    falling = np.flatnonzero(~(np.diff(found) > 0))
    if falling.size:
        at = falling[0]
        raise ValueError(
            f"thresholds must increase, in {found.dtype}, got {found[at]} before {found[at + 1]}."
            " Sort them, and leave repeated ones out."
        )
    return np.asarray(thresholds, float), found
