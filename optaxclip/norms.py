"""What a clipper measures: float32-safe, overflow-safe, shard-aware norms of a tree.

A `Norm` reads the leaves of a tree and gives norms: one for the whole tree, for each leaf,
for each unit of each leaf (row, filter, head), or for each labelled group of leaves. They
come slot by slot: a slot is one leaf, or all the leaves that share a norm. Slots do not
depend on one another, so that XLA can measure a leaf and update it while it is in cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._compat import varying_axes
from optaxclip._leaves import LeafFn, Leaves, Tree
from optaxclip.unit_axes import UnitAxes, resolve

By = Literal["element", "global", "leaf", "unit", "group"]
AxisName = str | tuple[str, ...] | LeafFn | None
Slots = tuple[jax.Array, ...]
"""One array a slot: a scalar, or one entry a unit, of a shape that broadcasts to the leaf."""

L2: Any = np.int64(2)
"""The default `ord`: no `int`, so that `optax.inject_hyperparams` leaves it static."""

# Up to this many elements are small: such a slot is measured in two passes over the cache, which
# compile faster than a `cond` for the rare scales. Small leaves of one shape in one slot are
# added before they are reduced, this many at a time: a global norm over 1000 x 1024 in front of
# Adam is then 1.13x Adam and compiles in 6 s, against 1.44x and 9.4 s (2 CPU cores).
_SMALL = 16_384
_LEAVES_AT_ONCE = 16


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
      Ordinary values of large leaves are read once. The derivative at zero is finite.

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
        """The slots of the leaves. Raises when labels or unit axes do not fit them."""
        paths = tuple(leaves.paths)
        every_axis = tuple(tuple(range(x.ndim)) for x in leaves.arrays)
        if self.by == "global":
            return Layout(paths, (0,) * len(paths), every_axis, ((),), ("global",))
        if self.by == "group":
            found = self._labels_of(leaves)
            labels = tuple(sorted(set(found)))
            slots = tuple(map(labels.index, found))
            return Layout(paths, slots, every_axis, ((),) * len(labels), labels)
        slots = tuple(range(len(paths)))
        if self.by != "unit":
            return Layout(paths, slots, every_axis, ((),) * len(paths))
        axes = tuple(leaves.map(functools.partial(resolve, self.unit_axes)))
        shapes = tuple(
            tuple(1 if i in a else d for i, d in enumerate(x.shape)) if len(a) < x.ndim else ()
            for a, x in zip(axes, leaves.arrays, strict=True)
        )
        return Layout(paths, slots, axes, shapes)

    def measure(self, leaves: Leaves, layout: Layout) -> Slots:
        """The norms, slot by slot, in float32 (float64 if a leaf of the tree is float64).

        For `by="element"` the largest modulus of each leaf.
        """
        dtype = jnp.result_type(jnp.float32, *{accumulator(x.dtype) for x in leaves.arrays})
        order = math.inf if self.by == "element" else self.ord
        mesh = leaves.map(self._mesh_axes)
        parts: dict[tuple[str, ...], dict[int, jax.Array]] = {}
        for slot, members in enumerate(layout.members):
            shape = layout.unit_shapes[slot]
            count = _elements(leaves, mesh, members) // math.prod(shape)
            for axes in sorted({mesh[i] for i in members}):
                terms = [
                    _Terms(leaves.arrays[i], layout.unit_axes[i], shape)
                    for i in members
                    if mesh[i] == axes
                ]
                parts.setdefault(axes, {})[slot] = _norm(terms, order, count, dtype)
        nothing = jnp.zeros((), dtype)
        if any(parts):
            return _over_mesh(parts, order, layout, dtype)
        local = parts.get((), {})
        return tuple(local.get(slot, nothing) for slot in range(len(layout.unit_shapes)))

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


@dataclasses.dataclass(frozen=True)
class _Terms:
    """A leaf to be reduced over `axes` to `shape`."""

    x: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def wide(self, dtype: Any) -> jax.Array:
        if jnp.iscomplexobj(self.x):
            return self.x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
        return self.x.astype(dtype)


def _norm(leaves: list[_Terms], order: Any, count: int, dtype: Any) -> jax.Array:
    """The norm of some leaves on this device; for "rms" their share of it, over `count`."""
    if order == math.inf and not any(jnp.iscomplexobj(t.x) for t in leaves):
        return _largest(leaves, dtype, jnp.abs)

    def scaled() -> jax.Array:
        """By way of x / max |x|, whose powers neither overflow nor vanish."""
        info = jnp.finfo(dtype)
        largest = lax.stop_gradient(_largest(leaves, dtype, _larger_part))
        unit = jnp.clip(largest, info.tiny, 1 / info.tiny)
        if order == math.inf:
            norm = _largest(leaves, dtype, lambda x: jnp.abs(times(x, 1 / unit)))
        else:
            norm = root(_sum(leaves, term, dtype, 1 / unit))
        return jnp.minimum(norm * unit, jnp.maximum(largest, info.max))

    if order == math.inf:
        return scaled()
    term, root = _power(order, count)
    small = sum(t.x.size for t in leaves) <= _SMALL
    if small or order not in (1, 2, "rms"):
        return scaled()
    total = _sum(leaves, term, dtype)
    # Units are often all zero (rows of an embedding): zeros cost a second pass elsewhere only.
    suspect = _vanishing(total) & (total > 0) if leaves[0].shape else _vanishing(total)
    return lax.cond(jnp.any(suspect | jnp.isinf(total)), scaled, lambda: root(total))


def _power(order: Any, count: int) -> tuple[Callable, Callable]:
    """The terms of a norm's sum, and the norm as a function of that sum."""
    if order == 1:
        return jnp.abs, lambda total: total
    if order == 2:
        return _abs_sq, _sqrt
    if order == "rms":
        return _abs_sq, lambda total: _sqrt(total / count)
    p = float(order)

    def root(total: jax.Array) -> jax.Array:
        positive = total > 0
        return jnp.where(positive, jnp.where(positive, total, 1.0) ** (1 / p), total)

    return lambda x: jnp.abs(x) ** p, root


def _vanishing(total: jax.Array) -> jax.Array:
    """Whether terms of a sum of squares may have underflowed."""
    return total < (2.0**-420 if total.dtype == jnp.float64 else 2.0**-60)


def _sum(
    leaves: list[_Terms], term: Callable, dtype: Any, scale: jax.Array | None = None
) -> jax.Array:
    """`sum term(x * scale)` over the leaves, reduced to their shape."""

    def wide_term(t: _Terms) -> jax.Array:
        return term(t.wide(dtype) if scale is None else times(t.wide(dtype), scale))

    return _fold(leaves, wide_term, jnp.add, jnp.sum, dtype)


def _largest(leaves: list[_Terms], dtype: Any, size: Callable) -> jax.Array:
    """`max size(x)` over the leaves, reduced to their shape; NaN wins."""
    return _fold(leaves, lambda t: size(t.x), jnp.maximum, jnp.max, dtype)


def _fold(
    leaves: list[_Terms], value: Callable, join: Callable, reduce: Callable, dtype: Any
) -> jax.Array:
    """`value` of each leaf, reduced and joined."""
    parts = []
    for together in _joined_first(leaves):
        first = together[0]
        joined = functools.reduce(join, map(value, together))
        part = reduce(joined, axis=first.axes).reshape(first.shape)
        parts.append(part.astype(dtype))
    return parts[0] if len(parts) == 1 else reduce(jnp.stack(parts), axis=0)


def _joined_first(leaves: list[_Terms]) -> list[list[_Terms]]:
    """Leaves to join elementwise and reduce once: small and of one shape.

    With one device only. On a mesh, leaves of one shape may be sharded in different ways,
    and joining them would move them between devices.
    """
    if jax.device_count() > 1:
        return [[t] for t in leaves]
    alike: dict[Any, list[_Terms]] = {}
    for i, t in enumerate(leaves):
        key = (t.x.shape, t.x.dtype) if t.x.size <= _SMALL else i
        alike.setdefault(key, []).append(t)
    return [
        members[k : k + _LEAVES_AT_ONCE]
        for members in alike.values()
        for k in range(0, len(members), _LEAVES_AT_ONCE)
    ]


def _over_mesh(
    parts: dict[tuple[str, ...], dict[int, jax.Array]], order: Any, layout: Layout, dtype: Any
) -> Slots:
    """Norms of the parts that devices hold -> norms of the whole: one collective a mesh axis set.

    Each part is in range already; only scalars travel.
    """
    shapes = layout.unit_shapes
    vectors = {
        axes: jnp.concatenate(
            [
                part[slot].reshape(-1) if slot in part else jnp.zeros(math.prod(shape), dtype)
                for slot, shape in enumerate(shapes)
            ]
        )
        for axes, part in parts.items()
    }

    def all_reduce(pack: Callable, collective: Callable, join: Callable) -> jax.Array:
        packed = [collective(pack(v), axes) if axes else pack(v) for axes, v in vectors.items()]
        return functools.reduce(join, packed)

    def largest() -> jax.Array:
        return all_reduce(lambda v: v, lax.pmax, jnp.maximum)

    if order == math.inf:
        norms = largest()
    elif order in (1, 2, "rms"):
        term, root = _power(1 if order == 1 else 2, 1)
        scales = _scales(dtype)
        # Norms are >= 0. Without `maximum`, XLA makes v^2 scale^2 of it, which is inf * 0.
        sums = all_reduce(lambda v: term(jnp.maximum(v * scales[:, None], 0.0)), lax.psum, jnp.add)
        norms = _best(sums, scales, root)
    else:
        term, root = _power(order, 1)
        unit = largest()
        unit = lax.stop_gradient(jnp.where((unit > 0) & (unit < jnp.inf), unit, 1.0))
        norms = unit * root(all_reduce(lambda v: term(v / unit), lax.psum, jnp.add))
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    pieces = jnp.split(norms, ends)
    return tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))


def _scales(dtype: Any) -> np.ndarray:
    """1, and two powers of two that bring the square of any finite number into range."""
    low, high = (-560, 540) if dtype == jnp.float64 else (-80, 64)
    return np.asarray([1.0, 2.0**low, 2.0**high], dtype)


def _best(sums: jax.Array, scales: np.ndarray, root: Callable) -> jax.Array:
    """The norm from its sums at three scales: the unscaled one unless that left its range."""
    small, big = _vanishing(sums[0]), jnp.isinf(sums[0])
    total = jnp.where(small, sums[2], jnp.where(big, sums[1], sums[0]))
    norm = root(total)
    scaled = norm / jnp.where(small, scales[2], jnp.where(big, scales[1], scales[0]))
    largest = jnp.finfo(norm.dtype).max
    return jnp.where(jnp.isfinite(norm), jnp.minimum(scaled, largest), norm)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x * factor` for a real factor; complex x part by part, without promotion."""
    if jnp.iscomplexobj(x):
        factor = factor.astype(x.real.dtype)
        return lax.complex(x.real * factor, x.imag * factor)
    return x * factor.astype(x.dtype)


def _larger_part(x: jax.Array) -> jax.Array:
    """`|x|`, or of complex numbers the larger part, which unlike the modulus cannot overflow."""
    return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)


def _abs_sq(x: jax.Array) -> jax.Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _sqrt(x: jax.Array) -> jax.Array:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), x)  # finite slope at 0


def accumulator(dtype: Any) -> Any:
    """The real dtype in which numbers of `dtype` are added: float32, or float64 for 64 bits."""
    return jnp.dtype(jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32)


def _elements(leaves: Leaves, mesh: list[tuple[str, ...]], members: list[int]) -> int:
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
