"""The named clippers: a few lines each over `clip_by`.

All of them take `nonfinite=` (`"propagate"` or `"zero"`), `axis_name=` (mesh axes, read
from the types by default) and `name=` (for `clip_stats`); see `clip_by` and `Norm`, whose
guarantees and edge cases hold for each.
"""

import math
from typing import Any

from optaxclip._arguments import check_bound
from optaxclip._leaves import LeafFn, Tree
from optaxclip.clipping import NonFinite, Transform, clip_by
from optaxclip.measure.norms import L2, AxisName, Norm
from optaxclip.measure.units import UnitAxes
from optaxclip.responses import Normalize, Rescale, Soften, SoftShape
from optaxclip.thresholds.given import ParamElements, ParamNorm, as_threshold


def clip_by_value(
    max_value: Any,
    *,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    stats: bool = True,
    name: str | None = None,
) -> Transform:
    """Clips every element: `clip(g, -c, c)`; of complex elements the modulus.

    Args:
      max_value: c >= 0: a number, a traced scalar, a schedule, or a tree prefix of these.
      nonfinite: `"propagate"` or `"zero"`, see below.
      axis_name: as in `Norm`, for the statistics.
      stats: False saves the pass over the gradient that measuring its largest element
        costs; then this equals `optax.clip` also in speed.
      name: for `clip_stats`, default `"clip_by_value"`.

    Returns:
      A gradient transformation. Its statistics are about the largest |element|.

    Raises:
      ValueError: max_value negative or NaN, or no prefix of the updates.

    Edge cases:
      | NaN | stays NaN, as in `optax.clip`; 0 under `"zero"` |
      | infinity | a real one c, as in `optax.clip`, a complex one NaN; 0 under `"zero"` |
      | integer, float0, None, empty leaves | pass through |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_value(1.0)
      >>> grads = {"w": jnp.array([0.5, -3.0])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [ 0.5 -1. ]
    """
    return clip_by(
        Norm("element", axis_name=axis_name),
        as_threshold(max_value, "max_value"),
        nonfinite=nonfinite,
        stats=stats,
        name=name or "clip_by_value",
    )


def clip_by_global_norm(
    max_norm: Any,
    *,
    ord: Any = L2,
    eps: Any = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Rescales the whole gradient to norm c where it is longer: `g * min(1, c / n)`.

    Args:
      max_norm: c >= 0: a number, a traced scalar or a schedule.
      ord: 2, 1, any finite p >= 1, `float("inf")` or `"rms"`. Static.
      eps: `1e-6` for PyTorch's `c / (n + eps)`.
      nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: max_norm negative, NaN or a tree; unknown ord.

    Edge cases:
      | zero gradient | stays zero |
      | NaN | makes the gradient NaN; zeros under `nonfinite="zero"` |
      | infinity | becomes NaN, and the rest 0; zeros under `nonfinite="zero"` |
      | bf16, float16 | the norm is taken in float32, and stays in range |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> print(tx.update(grads, tx.init(grads))[0])
      {'b': Array([0.8], dtype=float32), 'w': Array([0.6], dtype=float32)}

    Source: Pascanu, Mikolov, Bengio, arXiv 1211.5063, algorithm 1.
    """
    return clip_by(
        Norm("global", ord, axis_name=axis_name),
        as_threshold(max_norm, "max_norm"),
        Rescale(eps),
        nonfinite=nonfinite,
        name=name or "clip_by_global_norm",
    )


def clip_by_leaf_norm(
    max_norm: Any,
    *,
    ord: Any = L2,
    eps: Any = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Rescales each leaf to norm c where it is longer: `g_k * min(1, c_k / n_k)`.

    Args:
      max_norm: c >= 0: a number, a traced scalar, a schedule, or a tree prefix of these.
      ord, eps, nonfinite, axis_name, name: as in `clip_by_global_norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: max_norm negative, NaN or no prefix of the updates; unknown ord.

    Edge cases:
      | NaN, infinity | as in `clip_by_global_norm`, of this leaf alone |
      | layers stacked in one leaf (scan) | one block; to clip the layers one by one, |
      | | `clip_by_unit_norm(c, unit_axes=lambda path, x: tuple(range(1, x.ndim)))` |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_leaf_norm({"w": 1.0, "b": 9.0})
      >>> grads = {"w": jnp.array([2.0]), "b": jnp.array([4.0])}
      >>> print(tx.update(grads, tx.init(grads))[0])
      {'b': Array([4.], dtype=float32), 'w': Array([1.], dtype=float32)}
    """
    return clip_by(
        Norm("leaf", ord, axis_name=axis_name),
        as_threshold(max_norm, "max_norm"),
        Rescale(eps),
        nonfinite=nonfinite,
        name=name or "clip_by_leaf_norm",
    )


def clip_by_leaf_rms(
    max_rms: Any = 1.0,
    *,
    eps: Any = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Rescales each leaf to root mean square d at most: `g_k / max(1, rms(g_k) / d)`.

    Args:
      max_rms: d >= 0: a number, a traced scalar, a schedule, or a tree prefix of these.
      eps, nonfinite, axis_name, name: as in `clip_by_global_norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: max_rms negative, NaN or no prefix of the updates.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_leaf_rms(1.0)
      >>> grads = {"w": jnp.array([2.0, 2.0, -2.0])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [ 1.  1. -1.]

    Source: Shazeer and Stern (Adafactor), arXiv 1804.04235, section 6; there it is applied
    to the update, so chain it after `scale_by_...`.
    """
    return clip_by(
        Norm("leaf", "rms", axis_name=axis_name),
        as_threshold(max_rms, "max_rms"),
        Rescale(eps),
        nonfinite=nonfinite,
        name=name or "clip_by_leaf_rms",
    )


def clip_by_unit_norm(
    max_norm: Any,
    *,
    unit_axes: UnitAxes = "auto",
    ord: Any = L2,
    eps: Any = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Rescales each unit (row, filter, head) of each leaf to norm c where it is longer.

    `g_i * min(1, c / n_i)` for each unit i, with n_i its norm.

    Args:
      max_norm: c >= 0: a number, a traced scalar, a schedule, or a tree prefix of these.
      unit_axes: the axes one unit spans: `"auto"` (by rank, as Optax), an int, a tuple,
        or a function `(path, leaf) -> axes` such as `flax_unit_axes`.
      ord, eps, nonfinite, axis_name, name: as in `clip_by_global_norm`. Inside
        `jax.shard_map` a sharded leaf needs `axis_name`: types do not say which of its
        dimensions is split.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: max_norm negative, NaN or no prefix of the updates; axes a leaf lacks; a
        sharded leaf without axis_name.

    Edge cases:
      | zero units | stay zero |
      | NaN, infinity | as in `clip_by_global_norm`, of this unit alone |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_unit_norm(1.0, unit_axes=0)
      >>> grads = {"w": jnp.array([[3.0, 0.1], [4.0, 0.2]])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [[0.6 0.1]
       [0.8 0.2]]
    """
    return clip_by(
        Norm("unit", ord, unit_axes=unit_axes, axis_name=axis_name),
        as_threshold(max_norm, "max_norm"),
        Rescale(eps),
        nonfinite=nonfinite,
        name=name or "clip_by_unit_norm",
    )


def clip_by_group_norm(
    max_norms: Any,
    labels: Tree | LeafFn,
    *,
    ord: Any = L2,
    eps: Any = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Rescales each labelled group of leaves to its own norm: `g_k * min(1, c_k / n_k)`.

    Args:
      max_norms: a dict from label to bound (number, traced scalar or schedule), or one
        bound for every group. `float("inf")` leaves a group unclipped.
      labels: a tree prefix of strings, or a function `(path, leaf) -> label`, where path is
        a string such as `"encoder/dense/kernel"`.
      ord, eps, nonfinite, axis_name, name: as in `clip_by_global_norm`.

    Returns:
      A gradient transformation; `clip_stats` gives the groups by label.

    Raises:
      ValueError: a label without a bound, a bound without a leaf, a negative or NaN bound,
        labels that are no prefix of the updates.
      TypeError: a label that is no string.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_group_norm(
      ...     {"weights": 1.0, "biases": 9.0},
      ...     labels=lambda path, leaf: "biases" if path == "b" else "weights",
      ... )
      >>> grads = {"w": jnp.array([2.0]), "b": jnp.array([4.0])}
      >>> print(tx.update(grads, tx.init(grads))[0])
      {'b': Array([4.], dtype=float32), 'w': Array([1.], dtype=float32)}
    """
    return clip_by(
        Norm("group", ord, labels=labels, axis_name=axis_name),
        as_threshold(max_norms, "max_norms"),
        Rescale(eps),
        nonfinite=nonfinite,
        name=name or "clip_by_group_norm",
    )


def agc(
    clipping: Any = 0.01,
    *,
    eps: Any = 1e-3,
    unit_axes: UnitAxes = "auto",
    exclude: LeafFn | None = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Adaptive gradient clipping: each unit to a multiple of its parameters' norm.

    With unit i's gradient G_i and parameters W_i, `c_i = clipping * max(||W_i||, eps)` and
    `G_i * min(1, c_i / ||G_i||)`.

    Args:
      clipping: the largest ratio of gradient norm to parameter norm: a number >= 0, a traced
        scalar or a schedule. Larger batches want smaller values.
      eps: least parameter norm, so that units which start at zero can move.
      unit_axes: the axes one unit spans, as in `clip_by_unit_norm`. `"auto"` is Optax's
        rule, wrong for attention output projections, scanned stacks and embeddings: use
        `flax_unit_axes` or your own function for those.
      exclude: `(path, leaf) -> bool`; the paper leaves the final layer unclipped:
        `exclude=lambda path, leaf: path.startswith("head/")`.
      nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation whose `update` needs `params`. Its statistics are about the
      unit furthest beyond its bound.

    Raises:
      ValueError: clipping or eps negative or NaN; params missing or not like the updates.

    Edge cases:
      | units that start at zero, as biases do | have the bound `clipping * eps` at first: |
      | | on nearly every step some unit is clipped |
      | NaN, infinity | as in `clip_by_global_norm`, of this unit alone |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.agc(0.1)
      >>> params = {"w": jnp.array([[3.0], [4.0]])}
      >>> grads = {"w": jnp.array([[6.0], [8.0]])}
      >>> print(tx.update(grads, tx.init(params), params)[0]["w"].T)
      [[0.3 0.4]]

    Source: Brock, De, Smith, Simonyan, arXiv 2102.06171, equation 3 and section 4.1.
    """
    check_bound(clipping, "clipping")
    return clip_by(
        Norm("unit", unit_axes=unit_axes, exclude=exclude, axis_name=axis_name),
        ParamNorm(clipping, eps),
        nonfinite=nonfinite,
        name=name or "agc",
    )


def clippy(
    ratio: Any = 0.1,
    *,
    absolute: Any = 1e-7,
    exclude: LeafFn | None = None,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Scales each leaf until no element moves far relative to its parameter.

    With an update u and parameters w, each leaf is multiplied by the largest number of at most 1
    for which `|u_i| <= ratio |w_i| + absolute` holds for all its elements.

    Args:
      ratio: how far an element may move relative to its parameter: a number >= 0, a traced scalar
        or a schedule. 0.1 and 1e-7 are the defaults of keras-rs, 0.5 and 1e-2 those of the paper.
      absolute: how far one may move whatever its parameter, >= 0, in units of the parameters.
      exclude: `(path, leaf) -> bool`; true for leaves to be left as they are.
      nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation whose `update` needs `params`; it bounds updates, so chain it
      last. Statistics count in bounds: `pre_clip_norm` is the largest `|u_i| / c_i` of any element.

    Raises:
      ValueError: ratio or absolute negative or NaN; params missing or not like the updates.

    Edge cases:
      | a parameter at 0 that moves | holds its whole leaf to `absolute`: biases that start at |
      | | zero hardly move at 1e-7; raise it, or exclude them |
      | c_i = 0 | if u_i = 0 no limit to the others; otherwise the whole leaf becomes 0 |
      | NaN, infinity | as in `clip_by_leaf_norm`; a parameter that is NaN makes its leaf NaN |

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optax.sgd(1.0), optaxclip.clippy(0.1, absolute=0.0))
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> print(tx.update({"w": jnp.array([0.4, 0.4])}, tx.init(params), params)[0]["w"])
      [-0.1 -0.1]

    Source: Tang et al. (Clippy), arXiv 2302.09178; `shrink_by_references` of keras-rs, without the
    term of Adagrad's accumulator (0 there by default).
    """
    return clip_by(
        Norm("leaf", math.inf, exclude=exclude, axis_name=axis_name),
        ParamElements(ratio, absolute),
        nonfinite=nonfinite,
        name=name or "clippy",
    )


def normalize(
    norm: Any = 1.0,
    *,
    ord: Any = L2,
    eps: Any = 0.0,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    name: str | None = None,
) -> Transform:
    """Gives every gradient the same norm, short ones too: `c g / (n + eps)`.

    Args:
      norm: c >= 0, the norm that results: a number, a traced scalar or a schedule.
      eps: >= 0; keeps gradients much shorter than it short.
      ord, nonfinite, axis_name, name: as in `clip_by_global_norm`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: norm or eps negative or NaN; unknown ord.

    Edge cases:
      | zero gradient | stays zero |
      | NaN, infinity | as in `clip_by_global_norm` |

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.normalize(1.0)
      >>> grads = {"w": jnp.array([0.375, 0.5])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [0.6 0.8]

    Source: normalised gradient descent; arXiv 2410.16561 on why it withstands heavy tails.
    """
    return clip_by(
        Norm("global", ord, axis_name=axis_name),
        as_threshold(norm, "norm"),
        Normalize(eps),
        nonfinite=nonfinite,
        name=name or "normalize",
    )


def soft_clip(
    max_norm: Any,
    *,
    shape: SoftShape = "rational",
    elementwise: bool = False,
    nonfinite: NonFinite = "propagate",
    axis_name: AxisName = None,
    stats: bool = True,
    name: str | None = None,
) -> Transform:
    """Bends the gradient smoothly towards norm c, which it never passes.

    With r = n / c: `"rational"` `g / (1 + r)`; `"sqrt"` `g / sqrt(1 + r^2)`; `"tanh"`
    `g tanh(r) / r`. Elementwise, n is `|g|` of each element, as in `c tanh(g / c)`.

    Args:
      max_norm: c >= 0: a number, a traced scalar or a schedule (elementwise also a tree
        prefix of these).
      shape: `"rational"` halves a gradient of norm c, `"sqrt"` takes 29 % off, `"tanh"` 24 %.
      elementwise: bound elements instead of the global norm.
      stats: as in `clip_by_value`, for `elementwise=True`.
      nonfinite, axis_name, name: as in `clip_by` and `Norm`.

    Returns:
      A gradient transformation. `clipped_count` counts the steps with n > c.

    Raises:
      ValueError: max_norm negative or NaN; unknown shape; `stats=False` without `elementwise`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.soft_clip(5.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> print(tx.update(grads, tx.init(grads))[0]["w"])
      [1.5 2. ]

    Source: the differentiable forms of arXiv 2310.16920 and 2406.16640.
    """
    return clip_by(
        Norm("element" if elementwise else "global", axis_name=axis_name),
        as_threshold(max_norm, "max_norm"),
        Soften(shape),
        nonfinite=nonfinite,
        stats=stats,
        name=name or "soft_clip",
    )
