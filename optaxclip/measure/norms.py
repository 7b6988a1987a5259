"""What a clipper measures: float32-safe, overflow-safe, shard-aware norms of a tree."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from optaxclip._compat import explicit_sharding, varying_axes
from optaxclip._leaves import LeafFn, Leaves, Tree, place
from optaxclip._numerics import accumulator, once_compiled
from optaxclip.measure.groups import Blocks, Groups
from optaxclip.measure.mesh import Axes, axes_of, over_mesh, part_of, placed
from optaxclip.measure.reductions import Kind, Largest, Powers, Sums, unit_of
from optaxclip.measure.units import UnitAxes, by_layer, resolve

By = Literal["element", "global", "leaf", "unit", "group"]
AxisName = str | tuple[str, ...] | LeafFn | None

L2: Any = np.int64(2)
"""The default `ord`: not an `int`, so that `optax.inject_hyperparams` leaves it static."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm a clipper bounds, and what it is taken over.

    `ord` 2: `sqrt(sum |g|^2)`; 1: `sum |g|`; finite p >= 1: `(sum |g|^p)^(1/p)`; `inf`:
    `max |g|`; `"rms"`: `sqrt(mean |g|^2)`. Complex elements count with their modulus.

    Args:
      by: `"global"` one norm for the tree; `"leaf"` one per leaf; `"unit"` one per unit of a
        leaf; `"group"` one per label; `"element"` each element on its own.
      ord: 1, 2, any finite p >= 1, `inf` or `"rms"`. Static. A finite p other than 1 and 2 reads
        the leaves twice, and takes two collectives on a mesh.
      unit_axes: for `"unit"`, the axes a unit spans (0 makes each column of an `(in, out)` kernel
        a unit): an int, a tuple, a function `(path, leaf) -> axes`, or `"auto"`, Optax's rule by
        rank: vectors (also with axes of length one) whole, rank 2 and 3 over axis 0, rank 4 and 5
        over all axes but the last; of Equinox's own layers the rows, (out, in).
      labels: for `"group"`, the label of each leaf: a tree prefix of strings, or a
        function `(path, leaf) -> label`.
      exclude: `(path, leaf) -> bool`; true for leaves to be neither measured nor changed.
        Paths are strings such as `"block/dense/kernel"`.
      axis_name: mesh axes to reduce over. `None`: read from each leaf's type, which is
        right under `jit` and inside `jax.shard_map` with `check_vma` on. Under `pmap` or
        with `check_vma` off: a name, a tuple of names, or a function `(path, leaf) ->
        names`, for leaves that are shards (a `pmean`ed gradient is whole: name no axis
        for it). `()`, or None from a function: never reduce.

    Raises:
      ValueError: unknown `by` or `ord`; labels missing, or labels or unit axes for another `by`.

    Edge cases:
      | zero gradient | 0, with a finite derivative |
      | NaN, infinity | a norm is finite exactly when each of its elements is |
      | squares out of range | sums neither overflow nor vanish; at most the largest float |
      | bf16, float16 | added in float32, in float64 if a leaf is float64 |
      | integer, boolean, float0, None, `MaskedNode`, empty leaves | not counted |
      | a tree without leaves that count | a global norm of 0 |
      | `by="element"` | the largest modulus of each leaf is measured, whatever `ord` is |
      | not reduced over a mesh axis | taken for shards of one long gradient: reduce it first |
    """

    by: By = "global"
    ord: Any = L2
    unit_axes: UnitAxes = "auto"
    labels: Tree | LeafFn = None
    exclude: LeafFn | None = None
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"unknown norm, got {self.by!r}. Use one of {get_args(By)}.")
        if self.by == "group" and self.labels is None:
            raise ValueError(
                "a group norm needs labels, got None. Pass a tree prefix of strings, or a"
                " function (path, leaf) -> label."
            )
        if self.labels is not None and self.by != "group":
            raise ValueError(
                f"labels go with by='group', got {self.labels!r} for by={self.by!r}. Pass"
                " by='group', or leave them out."
            )
        default = isinstance(self.unit_axes, str) and self.unit_axes == "auto"
        if not default and self.by != "unit":
            raise ValueError(
                f"unit_axes go with by='unit', got {self.unit_axes!r} for by={self.by!r}. Pass"
                " by='unit', or leave them out."
            )
        _check_ord(self.ord)

    def leaves(self, tree: Tree) -> Leaves:
        """The leaves that count."""
        return Leaves.of(tree, self.exclude)

    def groups(self, leaves: Leaves) -> Groups:
        """Which leaf belongs to which norm. Raises when labels or unit axes do not fit them."""
        paths = tuple(leaves.paths)
        every_axis = tuple(tuple(range(x.ndim)) for x in leaves.arrays)
        if self.by == "global":
            return Groups(paths, (0,) * len(paths), every_axis, ((),), ("global",))
        if self.by == "group":
            found = self._labels_of(leaves)
            labels = tuple(sorted(set(found)))
            of_leaf = tuple(map(labels.index, found))
            return Groups(paths, of_leaf, every_axis, ((),) * len(labels), labels)
        of_leaf = tuple(range(len(paths)))
        if self.by != "unit":
            return Groups(paths, of_leaf, every_axis, ((),) * len(paths))
        auto = isinstance(self.unit_axes, str) and self.unit_axes == "auto"
        unit_axes = by_layer(leaves.tree) if auto else self.unit_axes
        axes = tuple(leaves.map(functools.partial(resolve, unit_axes)))
        shapes = tuple(
            _kept(x, a) if len(a) < x.ndim else () for a, x in zip(axes, leaves.arrays, strict=True)
        )
        return Groups(paths, of_leaf, axes, shapes)

    def measure(self, leaves: Leaves, groups: Groups, *, nan: bool = True) -> Blocks:
        """The norms, in float32 (float64 if a leaf of the tree is float64).

        For `by="element"` the largest modulus of each leaf; with `nan` False NaN may be lost there.
        """
        order = math.inf if self.by == "element" else self.ord
        found = [explicit_sharding(x) for x in leaves.arrays]
        meshes = [sharding.mesh for sharding in found if sharding is not None]
        if meshes:
            specs = tuple(P() if sharding is None else sharding.spec for sharding in found)
            axes = tuple(map(axes_of, specs))
            # The types say which device holds what, so that one collective does where XLA, left to
            # itself, makes one a dimension that is split, and several more for units.
            settings: dict[str, Any] = {
                "order": order, "groups": groups, "axes": axes, "specs": specs, "nan": nan
            }  # fmt: skip
            return jax.shard_map(
                lambda arrays: _measured(arrays, **settings),
                mesh=meshes[0],
                in_specs=(list(specs),),
                out_specs=P(),
                axis_names=set(meshes[0].explicit_axes),
            )(leaves.arrays)
        axes = tuple(leaves.map(self._mesh_axes))
        return _measured(leaves.arrays, order=order, groups=groups, axes=axes, specs=None, nan=nan)

    def _labels_of(self, leaves: Leaves) -> list[str]:
        if callable(self.labels):
            found = leaves.map(self.labels)
        else:
            found = leaves.from_prefix(self.labels, "labels")
        for path, label in zip(leaves.paths, found, strict=True):
            if not isinstance(label, str):
                raise TypeError(
                    f"labels must be strings, got {label!r} at {place(path)}. Give every"
                    " floating-point leaf a label."
                )
        return found

    def _mesh_axes(self, path: str, x: jax.Array) -> Axes:
        varying = varying_axes(x)
        if self.axis_name is None:
            if varying and self.by == "unit":
                raise ValueError(
                    f"units of a sharded leaf cannot be told apart, got {place(path)} of local"
                    f" shape {x.shape}, sharded over {varying}. Pass axis_name=() if each unit is"
                    " whole on one device, or as axis_name the mesh axes a unit is split over"
                    " (also as a function of path and leaf)."
                )
            return varying
        names = self.axis_name(path, x) if callable(self.axis_name) else self.axis_name
        axes = (names,) if isinstance(names, str) else tuple(names or ())
        # Where types tell, a leaf that does not vary over an axis is whole on it.
        return tuple(a for a in axes if a in varying) if varying else axes


@once_compiled
def _measured(
    arrays: list[jax.Array],
    *,
    order: Any,
    groups: Groups,
    axes: tuple[Axes, ...],
    specs: tuple[P, ...] | None,
    nan: bool,
) -> Blocks:
    """Norms of leaves that are split over these mesh axes; `specs` say how, if known."""
    dtypes = {accumulator(x.dtype) for x in arrays}
    dtype = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
    if not arrays:
        return [jnp.zeros(len(groups.unit_shapes), dtype)]
    totals = functools.partial(_totals, arrays, groups, axes, specs, dtype)
    if order == math.inf:
        return [Largest().norm(x, 1) for x in totals(Largest(nan))]
    sizes = [
        x.size * math.prod(lax.axis_size(axis) for axis in a)
        for x, a in zip(arrays, axes, strict=True)
    ]
    counts: list[Any] = [np.asarray([sum(sizes[i] for i in m) for m in groups.members])]
    if groups.has_units:
        counts = [n // math.prod(s) for n, s in zip(*counts, groups.unit_shapes, strict=True)]
    if order in (1, 2, "rms"):
        kind = Sums(order)
        return [kind.norm(x, n) for x, n in zip(totals(kind), counts, strict=True)]
    units = [unit_of(Largest().norm(x, 1)) for x in totals(Largest())]
    by_leaf = groups.by_leaf(units)
    if specs is not None:
        by_leaf = list(map(part_of, by_leaf, map(_kept, arrays, groups.unit_axes), specs))
    powers = Powers(order, tuple(by_leaf))
    norms = [powers.norm(x, n) for x, n in zip(totals(powers), counts, strict=True)]
    # A norm past the largest float is that float.
    longest = [jnp.where(jnp.isfinite(n), jnp.finfo(dtype).max, n) for n in norms]
    return list(map(jnp.minimum, map(jnp.multiply, norms, units), longest))


def _kept(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in axes else d for i, d in enumerate(x.shape))


def _totals(
    arrays: list[jax.Array],
    groups: Groups,
    axes: tuple[Axes, ...],
    specs: tuple[P, ...] | None,
    dtype: Any,
    kind: Kind,
) -> Blocks:
    """What the norms are made of, of the whole mesh: blocks with the scales in front."""
    parts: dict[Axes, jax.Array] = {}
    if not groups.has_units:
        by_leaf = kind.whole(arrays, dtype)
        member = np.arange(len(groups.unit_shapes))[:, None] == np.asarray(groups.of_leaf)
        for own in dict.fromkeys(axes):
            here = member & np.asarray([a == own for a in axes])
            parts[own] = (
                by_leaf
                if np.array_equal(here, np.eye(len(axes)))
                else kind.reduce(jnp.where(here[None], by_leaf[:, None], 0.0), axis=2)
            )
        return [over_mesh(parts, kind)]
    found = kind.of(arrays, groups.unit_axes, dtype)
    if not any(axes):
        return [x.reshape(len(x), *s) for x, s in zip(found, groups.unit_shapes, strict=True)]
    for own in dict.fromkeys(axes):
        flat = []
        for i, (x, shape) in enumerate(zip(found, groups.unit_shapes, strict=True)):
            if axes[i] != own:
                x = jnp.zeros((len(x), math.prod(shape)), x.dtype)
            elif specs is not None and shape:
                x = placed(x, (len(x), *shape), P(None, *specs[i]))
            flat.append(x.reshape(len(x), -1))
        parts[own] = jnp.concatenate(flat, axis=1)
    whole = over_mesh(parts, kind)
    ends = np.cumsum([math.prod(shape) for shape in groups.unit_shapes])[:-1]
    pieces = jnp.split(whole, ends, axis=1)
    return [x.reshape(len(x), *s) for x, s in zip(pieces, groups.unit_shapes, strict=True)]


def _check_ord(ord: Any) -> None:
    if isinstance(ord, jax.Array):
        raise TypeError(
            f"ord must be static, got {ord}. With optax.inject_hyperparams, pass"
            " static_args=('ord',)."
        )
    known = ord == "rms" or (isinstance(ord, int | float | np.number) and ord >= 1)
    if isinstance(ord, bool) or not known:
        raise ValueError(
            f"unknown ord, got {ord!r}. Use 1, 2, a finite p >= 1, float('inf') or 'rms'."
        )
