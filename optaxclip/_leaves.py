"""Which leaves of a tree count, where they are, and how a prefix of the tree reaches them."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

Tree = Any
LeafFn = Callable[[str, jax.Array], Any]
"""`(path, leaf) -> anything`; the path is a string such as `"block/dense/kernel"`."""

_SHOWN = 3
_AnyTuple = TypeVar("_AnyTuple", bound=tuple)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The non-empty floating-point and complex arrays of a tree.

    Everything else (integers, booleans, float0, keys, None, MaskedNode, empty arrays) is
    put back untouched by `replace`.
    """

    arrays: list[jax.Array]
    paths: list[str]
    positions: list[int]
    tree: Tree

    @classmethod
    def of(cls, tree: Tree, exclude: LeafFn | None = None) -> "Leaves":
        """Raises `TypeError` for a leaf that is no array."""
        arrays, paths, positions = [], [], []
        for i, (key_path, leaf) in enumerate(leaves_with_path(tree, is_leaf=_is_factored)):
            path = path_name(key_path)
            if _is_factored(leaf):
                raise TypeError(
                    f"gradients of a batch are needed, got per-example gradients at {place(path)}"
                    f" ({type(leaf).__name__}). Put clip_per_example, or another aggregator of"
                    " optaxclip.per_example, first in optax.chain; a guard around it may look at"
                    " what comes out, of=('update',)."
                )
            if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
                raise TypeError(
                    f"leaves must be arrays, got {type(leaf).__name__} {leaf!r} at {place(path)}."
                    " Convert it with jnp.asarray, or differentiate with respect to array leaves"
                    " only."
                )
            counted = jnp.issubdtype(leaf.dtype, jnp.inexact) and math.prod(leaf.shape) > 0
            if counted and not (exclude is not None and exclude(path, leaf)):
                # Outside jit `asarray` of what is an array already would take a seventh of a step.
                ready = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
                arrays.append(leaf if ready else jnp.asarray(leaf))
                paths.append(path)
                positions.append(i)
        return cls(arrays, paths, positions, tree)

    def replace(self, arrays: Sequence[Any]) -> Tree:
        """The tree with its counted leaves replaced by `arrays`."""
        leaves, treedef = jax.tree.flatten(self.tree)
        for i, array in zip(self.positions, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(treedef, leaves)

    def among(self, paths: Sequence[str]) -> "Leaves":
        """Those of these paths."""
        kept = [i for i, path in enumerate(self.paths) if path in set(paths)]
        return Leaves(
            [self.arrays[i] for i in kept],
            [self.paths[i] for i in kept],
            [self.positions[i] for i in kept],
            self.tree,
        )

    def alone(self, arrays: Sequence[Any]) -> Tree:
        """The tree with its counted leaves replaced by `arrays`, and None for all others."""
        leaves: list[Any] = [None] * len(jax.tree.leaves(self.tree))
        for i, array in zip(self.positions, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def check_like(self, state: Tree) -> list[jax.Array]:
        """The arrays of a state. Raises unless they have the shapes of the counted leaves."""
        arrays = jax.tree.leaves(state)
        if [x.shape for x in arrays] != [x.shape for x in self.arrays]:
            saw = [(path_name(key_path), x) for key_path, x in leaves_with_path(state)]
            raise ValueError(
                "updates must have the leaves that init saw, got"
                f" {first_difference(saw, self.named, ('in init', 'in the updates'))}. Call init"
                " with the tree the gradient is taken for, and inside shard_map with what one"
                " device holds."
            )
        return arrays

    def sketch(self) -> str:
        """The counted leaves for the text of an error, but of many only the first."""
        shown = [f"{place(path)} {x.shape}" for path, x in self.named[:_SHOWN]]
        more = len(self.arrays) - _SHOWN
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    @property
    def complete(self) -> bool:
        """Whether nothing was set aside by `optax.masked` or `optax.partition`."""
        nodes = jax.tree.leaves(self.tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        return not any(isinstance(x, optax.MaskedNode) for x in nodes)

    @property
    def named(self) -> list[tuple[str, jax.Array]]:
        """Path and array of each counted leaf."""
        return list(zip(self.paths, self.arrays, strict=True))

    def map(self, fun: LeafFn) -> list:
        """`fun(path, leaf)` for each counted leaf."""
        return [fun(path, x) for path, x in zip(self.paths, self.arrays, strict=True)]

    def from_prefix(self, prefix: Tree, argument: str) -> list:
        """The entry of the tree prefix `prefix` that covers each counted leaf."""
        try:
            entries = jax.tree.leaves(
                jax.tree.broadcast(_without_masked(prefix, self.tree), self.tree)
            )
        except ValueError as error:
            detail = str(error).replace("broadcast_prefix prefix_tree", argument)
            raise ValueError(
                f"{argument} must be a tree prefix of the updates, got a mismatch: {detail}\n"
                f"Give {argument} the structure of the parameters, cut off at any node."
            ) from None
        return [entries[i] for i in self.positions]


def _is_factored(x: Any) -> bool:
    """Whether it is a form of `per_example`: its arrays are factors, of which no norm is one."""
    return callable(getattr(type(x), "weighted_sum", None))


def _without_masked(prefix: Tree, tree: Tree) -> Tree:
    """The prefix without what `optax.masked` or `optax.partition` have set aside in the tree."""
    if isinstance(tree, optax.MaskedNode):
        return tree
    (entries, kind), (nodes, own) = map(_one_level, (prefix, tree))
    if kind != own or jax.tree_util.treedef_is_leaf(kind):
        return prefix
    return jax.tree.unflatten(kind, map(_without_masked, entries, nodes))


def _one_level(node: Tree) -> tuple[list, Any]:
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def first_difference(
    some: list[tuple[str, Any]], others: list[tuple[str, Any]], where: tuple[str, str]
) -> str:
    """Where two lists of paths and arrays part: `"w (2,) in init and w (3,) in the updates"`."""
    for (p, x), (q, y) in zip(some, others, strict=False):
        if p != q or x.shape != y.shape:
            return f"{place(p)} {x.shape} {where[0]} and {place(q)} {y.shape} {where[1]}"
    return f"{len(some)} leaves {where[0]} and {len(others)} {where[1]}"


def place(path: str) -> str:
    """A path in the text of an error; that of a tree which is one array is empty."""
    return path or "the root"


def path_name(key_path: tuple) -> str:
    """`"block/dense/kernel"`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


_VALUE = jax.tree_util.GetAttrKey("value")


def leaves_with_path(
    tree: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[tuple, Any]]:
    """As `jax.tree.leaves_with_path`, but what Flax wraps around an array adds no key.

    So a leaf has one name in a module of Flax NNX, in its state and in the dict of its arrays.
    """
    found = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    boxes = _boxes()
    if not boxes or not any(_VALUE in key_path for key_path, _ in found):
        return found

    def is_box(x: Any) -> bool:
        return isinstance(x, boxes) and not (is_leaf is not None and is_leaf(x))

    unboxed: list[tuple[tuple, Any]] = []
    outer = jax.tree.leaves_with_path(
        tree, is_leaf=lambda x: is_box(x) or (is_leaf is not None and is_leaf(x))
    )
    for key_path, node in outer:
        if not is_box(node):
            unboxed.append((key_path, node))
            continue
        children = jax.tree.leaves_with_path(node, is_leaf=lambda x, box=node: x is not box)
        for (key,), child in children:
            own = () if key == _VALUE else (key,)
            inner = leaves_with_path(child, is_leaf)
            unboxed += [((*key_path, *own, *rest), x) for rest, x in inner]
    return unboxed


def _boxes() -> tuple[type, ...]:
    """NNX's variables and Linen's boxes: known by type, where Flax was imported at all."""
    known = ("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata")
    found = (getattr(sys.modules.get(module), name, None) for module, name in known)
    return tuple(x for x in found if isinstance(x, type))


def named_node(cls: type[_AnyTuple]) -> type[_AnyTuple]:
    """Makes of a NamedTuple a node whose first field is no leaf but a name.

    A tuple, so that `flax.serialization` knows it; with keys, so that its arrays are called in a
    checkpoint as 0.1.0 called them.
    """
    _, *fields = cls._fields  # type: ignore[attr-defined]
    keys = list(map(jax.tree_util.GetAttrKey, fields))
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda node: (list(zip(keys, node[1:], strict=True)), node[0]),
        lambda name, children: cls(name, *children),
        lambda node: (node[1:], node[0]),
    )
    return cls
