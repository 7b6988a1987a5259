"""How far the output moves when the input moves.

Every function here takes `fun(params, x)`, which maps a batch of inputs [B, ...] to a batch of
outputs [B, ...], each example by itself: a plain JAX function, `model.apply` of Flax Linen, or for
Flax NNX `lambda params, x: nnx.merge(graph, params)(x)`. The work is one compiled program for each
`fun` (the same object; a new lambda is compiled anew) and shape; radii and sigmas are traced.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import check_count
from optaxclip._leaves import Tree
from optaxclip.robustness.inputs import (
    Bounds,
    Fun,
    box_of,
    check_norm,
    check_outputs,
    check_radius,
    inputs_of,
    known,
    labels_of,
)
from optaxclip.robustness.searches import SensitivityStats, noisy, sensitivity, survives

Method = Literal["fgsm", "pgd"]


def input_sensitivity(
    fun: Fun,
    params: Tree,
    x: jax.Array,
    *,
    radius: Any,
    norm: float,
    samples: int,
    key: jax.Array,
    steps: int = 50,
    batch_size: int | None = None,
) -> SensitivityStats:
    """How much the output changes per unit change of the input: `‖f(x + d) - f(x)‖ / ‖d‖`.

    Of each example for `samples` random d of length `radius`, and by an ascent from each:
    `d <- J^T(f(x + d) - f(x))`, scaled to `radius`. With the norm inf each ascent raises one
    output, `d <- radius sign(grad |f_k(x + d) - f_k(x)|)`, those first that moved most.

    Args:
      fun: `fun(params, x) -> outputs [B, ...]`, each example by itself.
      params: whatever `fun` takes.
      x: the inputs, [B, ...], floating point.
      radius: the length of the change, > 0, in the units of x; a number or a traced scalar.
      norm: 2 or inf, of the change of the input and of the output. Static.
      samples, steps: directions per example, and steps of each ascent; >= 1. Static.
      key: for the directions.
      batch_size: examples at a time, for memory; None: all at once. Static.

    Returns:
      `SensitivityStats`: the largest and the mean quotient, and the largest of each example: lower
      bounds, as a steeper direction may hide. Of a linear map at most its Lipschitz constant.

    Raises:
      ValueError: radius <= 0, another norm, samples, steps or batch_size < 1, no examples, outputs
        that are not one array [B, ...].
      TypeError: inputs that are not floating point.

    Edge cases:
      | `fun` gives NaN | the result is NaN |
      | a change that is lost in rounding | NaN, such as of 1e-8 at inputs near 1 in float32 |

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> matrix, x = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.zeros((1, 2))
      >>> found = optaxclip.input_sensitivity(
      ...     lambda w, x: x @ w, matrix, x, radius=0.1, norm=2, samples=4, key=jax.random.key(0)
      ... )
      >>> print(f"{found.largest:.3f}")
      3.000
    """
    x = inputs_of(x)
    check_radius(radius, zero=False)
    check_norm(norm)
    for value, argument in (
        (samples, "samples"),
        (steps, "steps"),
        (1 if batch_size is None else batch_size, "batch_size"),
    ):
        check_count(value, argument)
    check_outputs(fun, params, x)
    static = (fun, float(norm), samples, steps, batch_size)
    return sensitivity(static, params, x, radius, key)


def adversarial_accuracy(
    fun: Fun,
    params: Tree,
    x: jax.Array,
    y: jax.Array,
    *,
    radius: Any,
    norm: float,
    method: Method = "pgd",
    steps: int = 20,
    step_size: Any = None,
    restarts: int = 1,
    key: jax.Array | None = None,
    clip_to: Bounds = None,
    batch_size: int | None = None,
) -> jax.Array:
    """The share of examples that stay right under the worst change of length `radius` found.

    FGSM goes `radius` along the sign of the loss's gradient (norm 2: along the gradient). PGD makes
    `steps` such steps of `step_size` from x, each projected to the ball and to `clip_to`; further
    restarts begin at random points of the ball. An example counts as right if it is at each point
    on the way; PGD looks at FGSM's points too.

    Args:
      fun: `fun(params, x) -> logits [B, K]`, each example by itself.
      params: whatever `fun` takes.
      x, y: the inputs, [B, ...], floating point; the labels, [B], integers in [0, K).
      radius: the length of the change, >= 0, in the units of x; a number or a traced scalar.
      norm: 2 or inf, of the change. Static.
      method: "fgsm" or "pgd". Static.
      steps, restarts: of PGD, >= 1. Static.
      step_size: of PGD, >= 0; None: 2.5 radius / steps. A number or a traced scalar.
      key: for the random starts; needed with two restarts or more.
      clip_to: `(lowest, highest)` that an input may be: numbers, or arrays that broadcast to one
        example; None: any.
      batch_size: examples at a time, for memory; None: all at once. Static.

    Returns:
      The accuracy, a float32 scalar.

    Raises:
      ValueError: an argument out of its range; shapes that do not fit; restarts without a key;
        labels or inputs out of range (unless they are traced).
      TypeError: inputs that are not floating point, labels that are not integers.

    Edge cases:
      | logits that are not finite; equal ones | a wrong answer; the first counts |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> logits = lambda w, x: jnp.stack([0 * x, w * x], axis=-1)
      >>> x, y = jnp.array([0.5, 1.5, 2.5, -3.0]), jnp.array([1, 1, 1, 0])
      >>> print(optaxclip.adversarial_accuracy(logits, 1.0, x, y, radius=1.0, norm=2))
      0.75

    Source: FGSM: Goodfellow et al., ICLR 2015; PGD: Madry et al., ICLR 2018.
    """
    x = inputs_of(x)
    check_radius(radius)
    check_norm(norm)
    if method not in get_args(Method):
        raise ValueError(f'method must be "fgsm" or "pgd", got {method!r}. Pass "pgd".')
    counts = (
        (steps, "steps"),
        (restarts, "restarts"),
        (1 if batch_size is None else batch_size, "batch_size"),
    )
    for value, argument in counts:
        check_count(value, argument)
    if step_size is not None:
        check_radius(step_size, "step_size")
    if method == "pgd" and restarts > 1 and key is None:
        raise ValueError(f"restarts need a key, got restarts={restarts}. Pass jax.random.key(0).")
    y = labels_of(fun, params, x, y)
    box = box_of(clip_to, x)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(x))
    # Two calls of one function: FGSM alone is then the same program, and its accuracy the same.
    right = survives((fun, float(norm), 1, 1, batch_size), params, x, y, radius, radius, keys, box)
    if method == "pgd":
        step_size = 2.5 * radius / steps if step_size is None else step_size
        static = (fun, float(norm), steps, restarts, batch_size)
        right &= survives(static, params, x, y, radius, step_size, keys, box)
    return jnp.mean(right, dtype=jnp.float32)


def noise_accuracy(
    fun: Fun,
    params: Tree,
    x: jax.Array,
    y: jax.Array,
    *,
    sigmas: Any,
    samples: int,
    key: jax.Array,
    clip_to: Bounds = None,
    batch_size: int | None = None,
) -> jax.Array:
    """Accuracy with Gaussian noise on the inputs, `mean_b,k [argmax f(x_b + sigma z_bk) = y_b]`.

    For each of several sigmas; z_bk is standard normal.

    Args:
      fun: `fun(params, x) -> logits [B, K]`, each example by itself.
      params: whatever `fun` takes.
      x: the inputs, [B, ...], floating point.
      y: the labels, [B], integers in [0, K).
      sigmas: the noise's standard deviations, [S], >= 0, in the units of x; may be traced.
      samples: noises per example, >= 1. Static.
      key: for the noise.
      clip_to: `(lowest, highest)` that an input may be: numbers, or arrays that broadcast to one
        example; None: any.
      batch_size: examples at a time, for memory; None: all at once. Static.

    Returns:
      The accuracies, [S], float32: means over examples and noises.

    Raises:
      ValueError, TypeError: as for `adversarial_accuracy`; a sigma that is negative or not finite.

    Guarantees:
      All sigmas see the same noise, scaled, so that the curve is smooth. A sigma of 0 gives the
      accuracy itself. The result does not depend on `batch_size`, but for rounding.

    Edge cases:
      Logits that are not finite are a wrong answer. Of equal logits the first counts.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> logits = lambda w, x: jnp.stack([0 * x, w * x], axis=-1)
      >>> x, y = jnp.full(1000, 1.0), jnp.ones(1000, int)
      >>> found = optaxclip.robustness.noise_accuracy(
      ...     logits, 1.0, x, y, sigmas=[0.0, 1.0], samples=20, key=jax.random.key(0)
      ... )
      >>> print(found.round(2))  # the normal distribution function at 1 / sigma
      [1.   0.84]
    """
    x = inputs_of(x)
    for value, argument in (
        (samples, "samples"),
        (1 if batch_size is None else batch_size, "batch_size"),
    ):
        check_count(value, argument)
    sigmas = jnp.asarray(sigmas, x.dtype)
    if sigmas.ndim != 1 or sigmas.size == 0:
        raise ValueError(f"sigmas must be [S], got shape {sigmas.shape}. Pass for example [0.1].")
    if known(sigmas) and not np.all((np.asarray(sigmas) >= 0) & np.isfinite(sigmas)):
        raise ValueError(f"sigmas must be finite and >= 0, got {sigmas}. Pass for example [0.1].")
    y = labels_of(fun, params, x, y)
    return noisy((fun, samples, batch_size), params, x, y, sigmas, key, box_of(clip_to, x))
