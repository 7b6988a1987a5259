"""What a clipper measures: float32-safe, overflow-safe, shard-aware norms of a tree.

A `Norm` reads a tree of arrays and gives one vector of norms, `[groups]`: one entry for
the whole tree, for each leaf, for each unit of each leaf (row, filter, head) or for each
labelled group of leaves. A `Layout` is the static map between groups and leaves.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import varying_axes
from optaxclip._leaves import LeafFn, Leaves, Tree

By = Literal["element", "global", "leaf", "unit", "group"]
AxisName = str | tuple[str, ...] | LeafFn | None
UnitAxes = Literal["auto"] | int | tuple[int, ...] | LeafFn

L2: Any = np.int64(2)
"""The default `ord`: no `int`, so that `optax.inject_hyperparams` leaves it static."""

# Same-shaped leaves of at most this many elements are added before they are reduced, this
# many at a time: a norm over 1000 x 1024 in front of Adam then makes the step 1.13x Adam
# and compiles in 6 s, against 1.44x and 9.4 s with one reduction a leaf (2 CPU cores).
_SMALL_LEAF = 16_384
_LEAVES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the groups of a tree lie; made from shapes alone, so it is static under jit.

    Leaf `i` owns `math.prod(unit_shapes[i])` consecutive groups from `starts[i]` on;
    with `labels`, several leaves may own the same one.
    """

    paths: tuple[str, ...]
    starts: tuple[int, ...]
    unit_shapes: tuple[tuple[int, ...], ...]
    unit_axes: tuple[tuple[int, ...], ...]
    size: int
    labels: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """One name a group: its label, its leaf's path, or `path[index of the unit]`."""
        if self.labels is not None:
            return self.labels
        return tuple(
            f"{path}[{','.join(map(str, index))}]" if shape else path
            for path, shape in zip(self.paths, self.unit_shapes, strict=True)
            for index in np.ndindex(*shape)
        )

    def spread(self, values: jax.Array) -> list[jax.Array]:
        """`[groups]` -> one array a leaf, broadcasting against it."""
        return [
            values[start : start + math.prod(shape)].reshape(shape)
            for start, shape in zip(self.starts, self.unit_shapes, strict=True)
        ]

    def gather(self, per_leaf: list) -> jax.Array:
        """One scalar a leaf -> float32 `[groups]`. For layouts without labels."""
        return jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(x, jnp.float32), (math.prod(shape),))
                for x, shape in zip(per_leaf, self.unit_shapes, strict=True)
            ]
        )


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
        for it). `()`: never reduce.

    Raises:
      ValueError: unknown `by` or `ord`, labels missing.

    Guarantees:
      Terms are added in float32, in float64 if a leaf is float64, whatever the leaf dtype.
      A norm is finite exactly when each of its elements is: sums that overflow or
      underflow are taken again, scaled, and a norm past the largest float is that float.
      Ordinary values are read once. The derivative at zero is finite.

    Edge cases:
      Integer, boolean, float0, None, MaskedNode and empty leaves are not counted; a tree
      without floating-point leaves has global norm 0. A unit whose every element is below
      1e-19 may measure 0. Orders besides 1, 2, `inf` and `"rms"` read the leaves twice.
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
        _check_ord(self.ord)

    def leaves(self, tree: Tree) -> Leaves:
        """The leaves that count."""
        return Leaves.of(tree, self.exclude)

    def layout(self, leaves: Leaves) -> Layout:
        """The groups of the leaves. Raises when labels or unit axes do not fit them."""
        arrays = leaves.arrays
        whole = Layout(
            paths=tuple(leaves.paths),
            starts=(0,) * len(arrays),
            unit_shapes=((),) * len(arrays),
            unit_axes=tuple(tuple(range(x.ndim)) for x in arrays),
            size=1,
            labels=("global",),
        )
        if self.by == "global":
            return whole
        if self.by == "group":
            found = self._labels_of(leaves)
            labels = tuple(sorted(set(found)))
            starts = tuple(labels.index(label) for label in found)
            return dataclasses.replace(whole, labels=labels, starts=starts, size=len(labels))
        axes, shapes = whole.unit_axes, whole.unit_shapes
        if self.by == "unit":
            axes = tuple(leaves.map(lambda path, x: _unit_axes(self.unit_axes, path, x)))
            shapes = tuple(
                tuple(1 if i in a else d for i, d in enumerate(x.shape)) if len(a) < x.ndim else ()
                for a, x in zip(axes, arrays, strict=True)
            )
        ends = tuple(itertools.accumulate(map(math.prod, shapes), initial=0))
        return Layout(whole.paths, ends[:-1], shapes, axes, size=ends[-1])

    def measure(self, leaves: Leaves, layout: Layout | None = None) -> jax.Array:
        """The norms, `[groups]`, float32 (float64 if a leaf is float64).

        For `by="element"` the largest modulus of each leaf.
        """
        layout = self.layout(leaves) if layout is None else layout
        if not leaves.arrays:
            return jnp.zeros(layout.size, jnp.float32)
        reduction = _Reduction(leaves.arrays, leaves.map(self._mesh_axes), layout)
        order = math.inf if self.by == "element" else self.ord
        if order == math.inf:
            return reduction.max()
        if order == 1:
            return _rescaled(reduction, jnp.abs, lambda s: s)
        if order == 2:
            return _rescaled(reduction, _abs_sq, _sqrt)
        if order == "rms":
            counts = reduction.counts()
            return _rescaled(reduction, _abs_sq, lambda s: _sqrt(s / counts))
        return _p_norm(reduction, float(order))

    def _labels_of(self, leaves: Leaves) -> list[str]:
        if callable(self.labels):
            found = leaves.map(self.labels)
        else:
            found = leaves.from_prefix(self.labels, "labels")
        for path, label in zip(leaves.paths, found, strict=True):
            if not isinstance(label, str):
                raise TypeError(
                    f"labels must be strings, got {label!r} at {path}. Give every"
                    " floating-point leaf a label."
                )
        return found

    def _mesh_axes(self, path: str, x: jax.Array) -> tuple[str, ...]:
        varying = varying_axes(x)
        if self.axis_name is None:
            if varying and self.by == "unit":
                raise ValueError(
                    f"units of a sharded leaf cannot be told apart, got {path} of local shape"
                    f" {x.shape}, sharded over {varying}. Pass axis_name=() if each unit is"
                    " whole on one device, or as axis_name the mesh axes a unit is split over"
                    " (also as a function of path and leaf)."
                )
            return varying
        names = self.axis_name(path, x) if callable(self.axis_name) else self.axis_name
        axes = (names,) if isinstance(names, str) else tuple(names)
        # Where types tell, a leaf that does not vary over an axis is whole on it.
        return tuple(a for a in axes if a in varying) if varying else axes


class _Reduction:
    """Sums and maxima over each group, across the mesh too: the only passes over the data."""

    def __init__(self, arrays: list[jax.Array], mesh: list[tuple[str, ...]], layout: Layout):
        self.arrays, self.mesh, self.layout = arrays, mesh, layout
        wide = any(accumulator(x.dtype) == jnp.float64 for x in arrays)
        self.dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)

    def sum(
        self, term: Callable[[jax.Array], jax.Array], scale: jax.Array | None = None
    ) -> jax.Array:
        """`sum term(x * scale)` over each group; `scale` is `[groups]`."""
        terms = [_widen(x, self.dtype) for x in self.arrays]
        if scale is not None:
            terms = [x * s for x, s in zip(terms, self.layout.spread(scale), strict=True)]
        terms = [term(x) for x in terms]
        parts = []
        for first, *others in self._summed_together():
            added = sum((terms[i] for i in others), start=terms[first])
            parts.append((first, jnp.sum(added, axis=self.layout.unit_axes[first])))
        return self._over_groups(parts, jnp.sum, jnp.add, lax.psum)

    def max(self) -> jax.Array:
        """`max |x|` over each group; NaN wins."""
        parts = [
            (i, jnp.max(jnp.abs(x), axis=axes).astype(self.dtype))
            for i, (x, axes) in enumerate(zip(self.arrays, self.layout.unit_axes, strict=True))
        ]
        return self._over_groups(parts, jnp.max, jnp.maximum, lax.pmax)

    def counts(self) -> np.ndarray:
        """Elements of each group on the whole mesh."""
        counts = np.zeros(self.layout.size, self.dtype)
        for x, mesh, start, shape in zip(
            self.arrays, self.mesh, self.layout.starts, self.layout.unit_shapes, strict=True
        ):
            units = math.prod(shape)
            devices = math.prod(lax.axis_size(axis) for axis in mesh)
            counts[start : start + units] += x.size // units * devices
        return counts

    def _summed_together(self) -> list[list[int]]:
        """Leaves to add elementwise and reduce once: small, of one shape, in one group.

        With one device only. On a mesh, leaves of one shape may be sharded in different
        ways, and adding them would move them between devices.
        """
        if self.layout.labels is None or jax.device_count() > 1:
            return [[i] for i in range(len(self.arrays))]
        alike: dict[Any, list[int]] = {}
        for i, x in enumerate(self.arrays):
            key = (x.shape, self.layout.starts[i]) if x.size <= _SMALL_LEAF else i
            alike.setdefault(key, []).append(i)
        return [
            members[k : k + _LEAVES_AT_ONCE]
            for members in alike.values()
            for k in range(0, len(members), _LEAVES_AT_ONCE)
        ]

    def _over_groups(self, parts: list[tuple[int, jax.Array]], fold, join, over_mesh) -> jax.Array:
        """One value a leaf -> `[groups]`, with one collective for each set of mesh axes."""
        of_mesh: dict[tuple[str, ...], list[tuple[int, jax.Array]]] = {}
        for i, part in parts:
            of_mesh.setdefault(self.mesh[i], []).append((i, part))
        vectors = []
        for axes, members in of_mesh.items():
            vector = self._by_group(members, fold)
            vectors.append(over_mesh(vector, axes) if axes else vector)
        total = vectors[0]
        for vector in vectors[1:]:
            total = join(total, vector)
        return total

    def _by_group(self, parts: list[tuple[int, jax.Array]], fold) -> jax.Array:
        of_group: dict[int, list[jax.Array]] = {}
        for i, part in parts:
            of_group.setdefault(self.layout.starts[i], []).append(part.reshape(-1))
        pieces, at = [], 0
        for start, members in sorted(of_group.items()):
            if start > at:  # groups without a leaf on these mesh axes
                pieces.append(jnp.zeros(start - at, self.dtype))
            pieces.append(members[0] if len(members) == 1 else fold(jnp.stack(members), axis=0))
            at = start + pieces[-1].size
        if at < self.layout.size:
            pieces.append(jnp.zeros(self.layout.size - at, self.dtype))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _rescaled(reduction: _Reduction, term: Callable, root: Callable) -> jax.Array:
    """`root(sum term(x))`, taken again with a power-of-two scale where the sum left its range."""
    double = reduction.dtype == jnp.float64
    # With these, the square of any finite number, scaled, is in range again.
    up, tiny = (2.0**560, 2.0**-420) if double else (2.0**80, 2.0**-60)
    largest = jnp.finfo(reduction.dtype).max
    total = reduction.sum(term)
    low, high = total < tiny, jnp.isinf(total)
    # Units are often all zero (rows of an embedding), so zeros cost a second pass elsewhere only.
    suspect = low & (total > 0) if any(reduction.layout.unit_shapes) else low

    def again(total: jax.Array) -> jax.Array:
        scale = jnp.where(high, 1 / up, jnp.where(low, up, 1.0)).astype(reduction.dtype)
        norm = root(reduction.sum(term, lax.stop_gradient(scale)))
        return jnp.where(jnp.isfinite(norm), jnp.minimum(norm / scale, largest), norm)

    return lax.cond(jnp.any(suspect | high), again, root, total)


def _p_norm(reduction: _Reduction, p: float) -> jax.Array:
    largest = lax.stop_gradient(reduction.max())
    usable = jnp.isfinite(largest) & (largest > 0)
    scale = 1 / jnp.where(usable, jnp.clip(largest, 2.0**-126, 2.0**126), 1.0)
    total = reduction.sum(lambda x: jnp.abs(x) ** p, scale)
    norm = jnp.where(usable, total, 1.0) ** (1 / p) / scale
    return jnp.where(usable, jnp.minimum(norm, jnp.finfo(reduction.dtype).max), largest)


def _abs_sq(x: jax.Array) -> jax.Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _sqrt(x: jax.Array) -> jax.Array:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), x)  # finite slope at 0


def accumulator(dtype: Any) -> Any:
    """The real dtype in which numbers of `dtype` are added: float32, or float64 for 64 bits."""
    return jnp.dtype(jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32)


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
    if jnp.iscomplexobj(x):
        return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    return x.astype(dtype)


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


def _unit_axes(unit_axes: Any, path: str, x: jax.Array) -> tuple[int, ...]:
    """The axes that units of `x` span, as non-negative integers."""
    if callable(unit_axes):
        unit_axes = unit_axes(path, x)
    if isinstance(unit_axes, str) and unit_axes == "auto":
        return _auto_unit_axes(path, x)
    axes = (unit_axes,) if isinstance(unit_axes, int) else tuple(unit_axes)
    if not all(isinstance(a, int) and -x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"unit_axes must be axes of the leaf, got {unit_axes!r} for shape {x.shape} at"
            f" {path}. Use a function (path, leaf) -> axes where ranks differ."
        )
    return tuple(sorted({a % x.ndim for a in axes}))


def _auto_unit_axes(path: str, x: jax.Array) -> tuple[int, ...]:
    if sum(d != 1 for d in x.shape) <= 1:
        return tuple(range(x.ndim))
    if x.ndim in (2, 3):
        return (0,)
    if x.ndim in (4, 5):
        return tuple(range(x.ndim - 1))
    raise ValueError(
        f"unit_axes='auto' knows ranks up to 5, got shape {x.shape} at {path}. Pass a function"
        " (path, leaf) -> axes."
    )
