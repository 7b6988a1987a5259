"""Which axes of a parameter one unit (row, filter, head) spans: by rank, or by libraries' names."""

import operator
import sys
from collections.abc import Collection
from typing import Any, Literal

import jax

from optaxclip._leaves import LeafFn, Tree, leaves_with_path, path_name, place

UnitAxes = Literal["auto"] | int | tuple[int, ...] | LeafFn


def resolve(unit_axes: UnitAxes, path: str, x: Any) -> tuple[int, ...]:
    """The axes that units of `x` span, non-negative and sorted."""
    given: Any = unit_axes(path, x) if callable(unit_axes) else unit_axes
    if isinstance(given, str) and given == "auto":
        return by_rank(path, x)
    if isinstance(given, jax.Array):
        raise TypeError(
            f"unit_axes must be static, got {given}. With optax.inject_hyperparams, pass"
            " static_args=('unit_axes',)."
        )
    try:
        axes = tuple(map(operator.index, given if isinstance(given, tuple | list) else (given,)))
    except TypeError:
        axes = (x.ndim,)
    if not all(-x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"unit_axes must be axes of the leaf, got {given!r} for shape {x.shape} at"
            f" {place(path)}. Use 'auto', an int, a tuple, or a function (path, leaf) -> axes."
        )
    return tuple(sorted({a % x.ndim for a in axes}))


# The rank of what one layer of Equinox holds, by the name of its type and of the parameter.
_EQUINOX = {
    "Linear": {"weight": 2, "bias": 1},
    "Embedding": {"weight": 2},
    "GRUCell": {"weight_ih": 2, "weight_hh": 2, "bias": 1, "bias_n": 1},
    "LSTMCell": {"weight_ih": 2, "weight_hh": 2, "bias": 1},
    **{
        f"{kind}{n}d": {"weight": n + 2, "bias": n + 1}
        for kind in ("Conv", "ConvTranspose")
        for n in (1, 2, 3)
    },
}


def by_layer(tree: Tree) -> LeafFn:
    """The rule by rank, but of Equinox's layers, which are known by type, each row is a unit.

    Layers may be stacked along axes in front.
    """
    layers = getattr(sys.modules.get("equinox"), "nn", None)
    kinds = {getattr(layers, name): own for name, own in _EQUINOX.items()} if layers else {}
    found = leaves_with_path(tree, lambda x: isinstance(x, tuple(kinds))) if kinds else []
    ranks = {
        path_name((*key_path, jax.tree_util.GetAttrKey(name))): (rank, name)
        for key_path, node in found
        for kind, own in kinds.items()
        if isinstance(node, kind)
        for name, rank in own.items()
    }

    def axes(path: str, x: Any) -> tuple[int, ...]:
        if path not in ranks:
            return by_rank(path, x)
        rank, name = ranks[path]
        of_one = tuple(range(x.ndim - rank, x.ndim))
        return of_one[1:] if name.startswith("weight") else of_one

    return axes


def by_rank(path: str, x: Any) -> tuple[int, ...]:
    """Optax's rule: vectors whole, rank 2 and 3 over axis 0, 4 and 5 over all but the last."""
    if sum(d != 1 for d in x.shape) <= 1:
        return tuple(range(x.ndim))
    if x.ndim in (2, 3):
        return (0,)
    if x.ndim in (4, 5):
        return tuple(range(x.ndim - 1))
    raise ValueError(
        f"unit_axes='auto' knows ranks up to 5, got shape {x.shape} at {place(path)}. Pass a"
        " function (path, leaf) -> axes, such as optaxclip.flax_unit_axes."
    )


def flax_unit_axes(path: str, leaf: jax.Array, *, scanned: Collection[str] = ()) -> tuple[int, ...]:
    """The axes one unit spans, for parameters named as Flax (Linen and NNX) names them.

    | parameter | shape | a unit is | axes |
    | --- | --- | --- | --- |
    | Dense, Linear kernel | (in, out) | one output | 0 |
    | attention query, key, value kernel | (d, heads, head_dim) | one output of one head | 0 |
    | attention out kernel | (heads, head_dim, d) | one output | 0, 1 |
    | DenseGeneral, LinearGeneral kernel | (in, ..., out) | one output | 0 |
    | Conv, ConvTranspose kernel | (*window, in, out) | one filter | all but the last |
    | Embed embedding | (vocabulary, d) | one row | -1 |
    | bias, scale and any other vector | (d,) or (heads, head_dim) | the whole | all |

    A kernel of rank 3 is taken for a convolution if the name of its module contains "conv",
    else for a general dense layer; of rank 4 and more, for a convolution unless the module's
    name contains "dense", "linear" or is that of an attention projection.

    Args:
      path: the leaf's path, such as `"block/attention/out/kernel"`.
      leaf: the parameter.
      scanned: names in the path below which parameters are stacked over layers along axis 0
        (`nnx.scan`, `nn.scan` with a name); each layer then has its own units. Names that
        begin with "Scan", as `nn.scan` gives by default, are known. Bind it with
        `functools.partial(flax_unit_axes, scanned=("layers",))`.

    Returns:
      The axes, for `unit_axes=` of `agc` and `clip_by_unit_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.flax_unit_axes("attention/out/kernel", jnp.zeros((4, 8, 32)))
      (0, 1)
    """
    names = path.split("/")
    stacked = any(n.startswith("Scan") or n in scanned for n in names)
    axes = tuple(range(int(stacked), leaf.ndim))
    name, module = names[-1], (names[-2] if len(names) > 1 else "").lower()
    if name == "embedding":
        return axes[-1:]
    if name != "kernel" or len(axes) < 2:
        return axes
    if module == "out" and len(axes) == 3:
        return axes[:-1]
    dense = module in ("query", "key", "value") or "dense" in module or "linear" in module
    if len(axes) == 2 or dense or (len(axes) == 3 and "conv" not in module):
        return axes[:1]
    return axes[:-1]


def equinox_unit_axes(
    path: str, leaf: jax.Array, *, scanned: Collection[str] = ()
) -> tuple[int, ...]:
    """The axes one unit spans, for weights stored (out, in, ...): Equinox, and ports of PyTorch.

    | parameter | shape | a unit is | axes |
    | --- | --- | --- | --- |
    | Linear weight | (out, in) | one output | 1 |
    | Conv, ConvTranspose weight | (out, in, *window) | one filter | all but 0 |
    | GRUCell, LSTMCell weight_ih, weight_hh | (gates x hidden, in) | one row | 1 |
    | Embedding weight | (vocabulary, d) | one row | 1 |
    | weight below a name with "norm", bias, and any other | (d,) or (out, 1, 1) | the whole | all |

    `"auto"` knows Equinox's own layers by type. Of any others it guesses by rank what Flax stores,
    (in, out), and makes each column a unit.

    Args:
      path: the leaf's path, such as `"layers/0/weight"`.
      leaf: the parameter.
      scanned: names in the path below which parameters are stacked along axis 0, as
        `eqx.filter_vmap` makes them of a list of layers; each layer then has its own units.

    Returns:
      The axes, for `unit_axes=` of `agc` and `clip_by_unit_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.equinox_unit_axes("layers/0/weight", jnp.zeros((32, 8)))
      (1,)
    """
    *modules, name = path.split("/")
    axes = tuple(range(int(any(n in scanned for n in modules)), leaf.ndim))
    of_norm = any("norm" in n.lower() for n in modules[-1:])
    return axes[1:] if name.startswith("weight") and len(axes) > 1 and not of_norm else axes


def haiku_unit_axes(
    path: str, leaf: jax.Array, *, scanned: Collection[str] = ()
) -> tuple[int, ...]:
    """The axes one unit spans, for parameters named as Haiku and Keras name them.

    As `flax_unit_axes`, with `w`, `w_i`, `w_h`, `recurrent_kernel` and the like for `kernel`, and
    `embeddings` for `embedding`. Transposed convolutions are stored (*window, out, in) there.

    Args:
      path: the leaf's path, such as `"mlp/linear/w"`.
      leaf: the parameter.
      scanned: as for `flax_unit_axes`: `hk.layer_stack` stacks layers along axis 0.

    Returns:
      The axes, for `unit_axes=` of `agc` and `clip_by_unit_norm`.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.haiku_unit_axes("conv2_d_transpose/w", jnp.zeros((3, 3, 8, 4)))
      (0, 1, 3)
    """
    *modules, name = path.split("/")
    first = int(any(n in scanned for n in modules))
    is_kernel = name == "w" or name.startswith("w_") or name.endswith("kernel")
    module = modules[-1].lower() if modules else ""
    if is_kernel and "transpose" in module and leaf.ndim - first > 2:
        return tuple(a for a in range(first, leaf.ndim) if a != leaf.ndim - 2)
    known = "kernel" if is_kernel else name.replace("embeddings", "embedding")
    out = ["out"] if module == "attention_output" else modules[-1:]
    return flax_unit_axes("/".join([*modules[:-1], *out, known]), leaf, scanned=scanned)
