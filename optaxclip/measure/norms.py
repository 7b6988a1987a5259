"""What a clipper measures: float32-safe, overflow-safe, shard-aware norms of a tree.

A `Norm` reads the leaves of a tree and gives norms: one for the whole tree, for each leaf,
for each unit of each leaf (row, filter, head), or for each labelled group of leaves. What
shares a norm is a slot: one leaf, or several. Slots of one shape are handled together, a
bundle at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from optaxclip._compat import explicit_sharding, varying_axes
from optaxclip._leaves import LeafFn, Leaves, Tree, place
from optaxclip.measure.mesh import Axes, axes_of, over_mesh, placed
from optaxclip.measure.reductions import Terms, accumulator, norms_of
from optaxclip.measure.units import UnitAxes, resolve

By = Literal["element", "global", "leaf", "unit", "group"]
AxisName = str | tuple[str, ...] | LeafFn | None
Bundles = tuple[jax.Array, ...]
"""One array a bundle, [slots, *unit shape], where the unit shape broadcasts to the leaf."""

L2: Any = np.int64(2)
"""The default `ord`: not an `int`, so that `optax.inject_hyperparams` leaves it static."""

# How many leaves share a branch for norms that left the range, and the kernels of `_reductions`.
# More conditionals run and compile more slowly: with bundles of 2^18 elements, so that leaves are
# updated while in cache, rms clipping of 300 x 256x256 in front of Adam took 1.30x Adam, with these
# 1.25x, and compiling it for 1000 x 1024 took 22 s against 8 s (2 CPU cores).
_BUNDLE_LEAVES = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which leaf belongs to which slot; made from shapes alone, so it is static under jit."""

    paths: tuple[str, ...]
    slots: tuple[int, ...]
    """The slot of each leaf."""
    unit_axes: tuple[tuple[int, ...], ...]
    """The axes to reduce, of each leaf."""
    unit_shapes: tuple[tuple[int, ...], ...]
    """The shape of each slot's norms."""
    bundles: tuple[tuple[int, ...], ...]
    """The slots of each bundle."""
    labels: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """How many norms there are: slots, or units."""
        return sum(map(math.prod, self.unit_shapes))

    @property
    def names(self) -> tuple[str, ...]:
        """One name a norm: the label, the leaf's path, or `path[index of the unit]`."""
        if self.labels is not None:
            return self.labels
        return tuple(
            f"{path}[{','.join(map(str, index))}]" if shape else path
            for path, shape in zip(self.paths, self.unit_shapes, strict=True)
            for index in np.ndindex(*shape)
        )

    @property
    def members(self) -> list[list[int]]:
        """The leaves of each slot."""
        members: list[list[int]] = [[] for _ in self.unit_shapes]
        for leaf, slot in enumerate(self.slots):
            members[slot].append(leaf)
        return members

    def bundle(self, by_slot: Sequence[jax.Array]) -> Bundles:
        """Arrays slot by slot -> bundles; a scalar becomes one that broadcasts to its units."""

        def full(slot: int) -> jax.Array:
            x = by_slot[slot]
            return x if x.ndim else x.reshape((1,) * len(self.unit_shapes[slot]))

        return tuple(jnp.stack([full(slot) for slot in slots]) for slots in self.bundles)

    def by_slot(self, bundles: Bundles) -> list[jax.Array]:
        """Bundles -> arrays slot by slot. A bundle without axes holds for all of its slots."""
        found: dict[int, jax.Array] = {}
        for array, slots in zip(bundles, self.bundles, strict=True):
            for k, slot in enumerate(slots):
                found[slot] = lax.index_in_dim(array, k, keepdims=False) if array.ndim else array
        return [found[slot] for slot in range(len(found))]

    def vector(self, bundles: Bundles) -> jax.Array:
        """Bundles -> one float32 vector [size], in the order of `names` on every machine."""
        order = np.argsort(self._bundled)
        return flat(bundles)[order] if bundles else jnp.zeros(0, jnp.float32)

    def from_vector(self, vector: jax.Array, dtype: Any) -> Bundles:
        """A vector [size], in the order of `names` -> bundles."""
        shapes = [(len(slots), *self.unit_shapes[slots[0]]) for slots in self.bundles if slots]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        # A bundle is a gather of its own. Were they slices of one, XLA would slice anew for each
        # leaf: the bounds of 256 leaves compiled for 5.0 s instead of 1.9 s.
        return tuple(
            vector[at].astype(dtype).reshape(shape)
            for at, shape in zip(np.split(self._bundled, ends), shapes, strict=bool(shapes))
        )

    @property
    def _bundled(self) -> np.ndarray:
        """Where in the order of `names` each norm of the bundles, laid end to end, comes from."""
        ends = np.cumsum([0, *map(math.prod, self.unit_shapes)])
        units = [np.arange(ends[slot], ends[slot + 1]) for b in self.bundles for slot in b]
        return np.concatenate([np.zeros(0, int), *units])


def flat(bundles: Bundles) -> jax.Array:
    """All bundles in one float32 vector; what is finite stays finite."""
    vectors = [x.reshape(-1) for x in bundles]
    vector = vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors)
    vector = lax.optimization_barrier(vector)
    if vector.dtype == jnp.float32:
        return vector
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(jnp.isfinite(vector), jnp.minimum(vector, largest), vector).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm a clipper bounds, and what it is taken over.

    `ord` 2: `sqrt(sum |g|^2)`; 1: `sum |g|`; finite p >= 1: `(sum |g|^p)^(1/p)`; `inf`:
    `max |g|`; `"rms"`: `sqrt(mean |g|^2)`. Complex elements count with their modulus.

    Args:
      by: `"global"` one norm for the tree; `"leaf"` one a leaf; `"unit"` one a unit of a
        leaf; `"group"` one a label; `"element"` each element on its own.
      ord: 1, 2, any finite p >= 1, `inf` or `"rms"`. Static.
      unit_axes: for `"unit"`, the axes a unit spans, so that 0 makes each column of an
        `(in, out)` kernel a unit: an int, a tuple, a function `(path, leaf) -> axes`, or
        `"auto"`, Optax's rule by rank: vectors (also with axes of length one) whole, rank
        2 and 3 over axis 0, rank 4 and 5 over all axes but the last.
      labels: for `"group"`, the label of each leaf: a tree prefix of strings, or a
        function `(path, leaf) -> label`.
      exclude: `(path, leaf) -> bool`; true for leaves to be neither measured nor changed.
        Paths are strings such as `"block/dense/kernel"`.
      axis_name: mesh axes to reduce over. `None`: read from each leaf's type, which is
        right under `jit` and inside `jax.shard_map` with `check_vma` on. Under `pmap` or
        with `check_vma` off: a name, a tuple of names, or a function `(path, leaf) ->
        names`, for leaves that are shards (a `pmean`ed gradient is whole: name no axis
        for it). `()`: never reduce; of a function None too.

    Raises:
      ValueError: unknown `by` or `ord`; labels missing, or labels or unit axes for another `by`.

    Guarantees:
      Terms are added in float32, in float64 if a leaf is float64, whatever the leaf dtype.
      A norm is finite exactly when each of its elements is: sums that overflow or
      underflow are taken again, scaled, and a norm past the largest float is that float.
      Ordinary values are read once. The derivative at zero is finite.

    Edge cases:
      Integer, boolean, float0, None, MaskedNode and empty leaves are not counted; a tree
      without floating-point leaves has global norm 0. A unit whose every element is below
      1e-19 may measure 0. By `"element"` the largest modulus is measured, whatever `ord` is.
      Orders besides 1, 2, `inf` and `"rms"` read the leaves twice, and take two collectives on a
      mesh. Leaves that vary over a mesh axis are taken for shards: a data-parallel gradient that
      was not reduced yet counts as one long gradient. Reduce it first.
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

    def layout(self, leaves: Leaves) -> Layout:
        """The slots of the leaves. Raises when labels or unit axes do not fit them."""
        paths = tuple(leaves.paths)
        every_axis = tuple(tuple(range(x.ndim)) for x in leaves.arrays)
        if self.by == "global":
            return Layout(paths, (0,) * len(paths), every_axis, ((),), ((0,),), ("global",))
        if self.by == "group":
            found = self._labels_of(leaves)
            labels = tuple(sorted(set(found)))
            slots = tuple(map(labels.index, found))
            alone = tuple((slot,) for slot in range(len(labels)))
            return Layout(paths, slots, every_axis, ((),) * len(labels), alone, labels)
        slots = tuple(range(len(paths)))
        if self.by != "unit":
            bundles = _bundles(leaves.arrays, every_axis)
            return Layout(paths, slots, every_axis, ((),) * len(paths), bundles)
        axes = tuple(leaves.map(functools.partial(resolve, self.unit_axes)))
        shapes = tuple(
            tuple(1 if i in a else d for i, d in enumerate(x.shape)) if len(a) < x.ndim else ()
            for a, x in zip(axes, leaves.arrays, strict=True)
        )
        return Layout(paths, slots, axes, shapes, _bundles(leaves.arrays, axes))

    def measure(self, leaves: Leaves, layout: Layout, *, nan: bool = True) -> Bundles:
        """The norms, in float32 (float64 if a leaf of the tree is float64).

        For `by="element"` the largest modulus of each leaf, infinite with `nan=False` where it
        is NaN: leaves that are computed on the spot are then not stored.
        """
        found = [explicit_sharding(x) for x in leaves.arrays]
        meshes = [sharding.mesh for sharding in found if sharding is not None]
        if not meshes:
            return self._measure(leaves, layout, None, nan)
        specs = [P() if sharding is None else sharding.spec for sharding in found]

        # The types say which device holds what, so that one collective does where XLA, left to
        # itself, makes one a dimension that is split, and several more for units.
        def shards(arrays: list[jax.Array]) -> Bundles:
            return self._measure(dataclasses.replace(leaves, arrays=arrays), layout, specs, nan)

        return jax.shard_map(
            shards,
            mesh=meshes[0],
            in_specs=(specs,),
            out_specs=P(),
            axis_names=set(meshes[0].explicit_axes),
        )(leaves.arrays)

    def _measure(
        self, leaves: Leaves, layout: Layout, specs: Sequence[P] | None, nan: bool
    ) -> Bundles:
        """`measure`, of what a device holds; `specs` say of which part of each leaf, if known."""
        dtype = jnp.result_type(jnp.float32, *{accumulator(x.dtype) for x in leaves.arrays})
        order = math.inf if self.by == "element" else self.ord
        mesh = leaves.map(self._mesh_axes) if specs is None else list(map(axes_of, specs))
        members = layout.members
        if members == [[]]:  # the global norm of nothing
            return (jnp.zeros(1, dtype),)

        def norms(slots: Sequence[int], axes: Axes) -> jax.Array:
            """Of the leaves of some slots of one shape that are split over these axes."""
            here = [[i for i in members[slot] if mesh[i] == axes] for slot in slots]
            first = here[0][0]
            shape = layout.unit_shapes[slots[0]]
            if specs is not None and shape:
                kept = layout.unit_axes[first]
                shape = tuple(
                    1 if i in kept else d for i, d in enumerate(leaves.arrays[first].shape)
                )
            count = _elements(leaves, mesh, members[slots[0]])
            count //= math.prod(layout.unit_shapes[slots[0]])
            terms = [
                [Terms(leaves.arrays[i], layout.unit_axes[i], shape) for i in leaf] for leaf in here
            ]
            return norms_of(terms, order, count, dtype, nan)

        if not any(mesh):
            return tuple(norms(slots, ()) for slots in layout.bundles)
        parts: dict[Axes, dict[int, jax.Array]] = {}
        for bundle in layout.bundles:
            for axes in sorted({mesh[i] for slot in bundle for i in members[slot]}):
                slots = [slot for slot in bundle if any(mesh[i] == axes for i in members[slot])]
                for slot, found in zip(slots, norms(slots, axes), strict=True):
                    if specs is not None and found.ndim:
                        (leaf,) = members[slot]
                        found = placed(found, layout.unit_shapes[slot], specs[leaf])
                    parts.setdefault(axes, {})[slot] = found
        return layout.bundle(over_mesh(parts, order, layout.unit_shapes, dtype))

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


def _bundles(
    leaves: Sequence[jax.Array], unit_axes: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """Leaves of one shape, some at a time; on a mesh units stay apart, as they may be sharded."""
    bundles: list[list[int]] = []
    latest: dict[Any, list[int]] = {}
    for i, (x, axes) in enumerate(zip(leaves, unit_axes, strict=True)):
        apart = len(axes) < x.ndim and jax.device_count() > 1
        bundle = latest.get((x.shape, axes))
        if bundle is None or len(bundle) >= _BUNDLE_LEAVES or apart:
            bundle = latest[x.shape, axes] = []
            bundles.append(bundle)
        bundle.append(i)
    return tuple(map(tuple, bundles))


def _elements(leaves: Leaves, mesh: list[Axes], members: list[int]) -> int:
    """How many elements the members have on the whole mesh."""
    return sum(
        leaves.arrays[i].size * math.prod(lax.axis_size(axis) for axis in mesh[i]) for i in members
    )


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
