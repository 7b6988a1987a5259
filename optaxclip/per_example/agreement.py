"""Whether the engine and `vmap(grad)` agree on a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Tree, leaves_with_path, path_name, place
from optaxclip._numerics import root
from optaxclip.per_example.engine.arguments import Argnums, Call, Options, call_of
from optaxclip.per_example.forms.explicit_axes import on_automatic_axes
from optaxclip.per_example.forms.forms import zero_like
from optaxclip.per_example.forms.trees import materialize, sq_norms, weighted_sum
from optaxclip.per_example.schedules.factored import factored, see, stacked


def check_per_example(
    fun: Callable,
    *args: Any,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    prng_argnum: int | None = None,
    examples: int = 4,
    rtol: float = 1e-3,
) -> None:
    """Hold the per-example gradients of your loss to `vmap(grad)`, on a few of your examples.

    Compared are losses, norms, the gradients themselves and the sum of clipped ones. To run once,
    before per-example gradients are relied on for privacy.

    Args:
      fun: the loss of one example, `fun(params, example)`.
      *args: its arguments: parameters, then a batch with the examples on the leading axis.
      argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum: as for `per_example_grad`.
      examples: of how many to compare the gradients; the first ones of the batch. Those are
        stacked, so that memory for so many gradients is needed.
      rtol: how much may differ, relative to the norm of the example's gradient.

    Raises:
      AssertionError: they differ; the text names the first leaf that does, and by how much.
      ValueError, TypeError: as `per_example_grad` does.

    Edge cases:
      Rounding is no difference: where `vmap(grad)` in the same dtype is itself off by more than
      `rtol`, because the uses of a weight cancel, the two may differ. Compare in float64 then
      (`jax.enable_x64`). An example whose gradient is not finite is compared by that alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from optaxclip.testing import check_per_example
      >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
      >>> check_per_example(loss, {"w": jnp.ones((3, 2))}, jnp.ones((8, 3)))
    """
    options = Options(argnums, batch_argnums, has_aux, keep_batch_dim, prng_argnum)

    def both(*args: Any) -> tuple[Any, Any]:
        call = call_of(fun, options, args, {})
        few = [x[:examples] for x in call.batch]
        call = Call(call.fun, call.params, few, call.like_params)
        answers = []
        for found in (factored(call, see(call)), stacked(call)):
            grads = call.like_params(found.forms, lambda leaf: zero_like(leaf, call.size))
            norms = root(sq_norms(grads))
            clipped = weighted_sum(grads, 1 / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
            answers.append((found.losses, norms, materialize(grads), clipped))
        return answers[0], answers[1]

    run = jax.jit(both, static_argnums=_static(args))
    ours, theirs = on_automatic_axes(run, options.examples_of(args), args, {})
    _compare(jax.device_get(ours), jax.device_get(theirs), rtol)


def _static(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Arguments that are no arrays, such as a function that the loss calls."""
    return tuple(k for k, arg in enumerate(args) if not all(map(_is_array, jax.tree.leaves(arg))))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, int | float | complex) or hasattr(leaf, "dtype")


def _compare(ours: Any, theirs: Any, rtol: float) -> None:
    finite = np.isfinite(theirs[1])
    scale = np.where(finite, theirs[1], 0)
    if not np.array_equal(np.isfinite(ours[1]), finite):
        k = int(np.argmax(np.isfinite(ours[1]) != finite))
        _refuse(f"the norm of example {k}", float("inf"), rtol)
    _same("the loss", ours[0], theirs[0], rtol * np.maximum(np.abs(theirs[0]), scale), finite)
    for what, k in (("the gradient", 2), ("the norm", 1)):
        for (path, x), y in zip(leaves_with_path(ours[k]), jax.tree.leaves(theirs[k]), strict=True):
            if jnp.issubdtype(y.dtype, jnp.inexact):
                of = f"{what} of {place(path_name(path))}" if k == 2 else what
                _same(of, x, y, rtol * scale, finite)
    if finite.all():
        _compare_sums(ours[3], theirs[3], rtol * len(finite))


def _compare_sums(ours: Tree, theirs: Tree, most: float) -> None:
    for (path, x), y in zip(leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)), initial=0)
        if error > most:
            _refuse(f"the clipped sum of {place(path_name(path))}", error, most)


def _same(what: str, x: Any, y: Any, most: Any, finite: Any) -> None:
    """Raises where an example's entries differ by more than `most`, [B]."""
    x, y = (np.asarray(a, float).reshape(len(finite), -1) for a in (x, y))
    error = np.where(finite, np.max(np.abs(x - y), axis=1, initial=0), 0)
    if np.any(beyond := error > most):
        k = int(np.argmax(beyond))
        limit = float(np.broadcast_to(most, error.shape)[k])
        _refuse(f"{what} of example {k}", float(error[k]), limit)


def _refuse(what: str, error: float, most: float) -> None:
    raise AssertionError(
        f"per-example gradients must agree with vmap(grad), got a difference of {error:.1e} in"
        f" {what}, where rounding explains {most:.1e}. Pass method='vmap' to clipped_grad or"
        " reweighted_grad, and report the loss: explain(loss, params, batch) says how it was seen."
    )
