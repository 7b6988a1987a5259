"""Which leaves of a tree count, where they are, and how a prefix of the tree reaches them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
LeafFn = Callable[[str, jax.Array], Any]
"""`(path, leaf) -> anything`; the path is a string such as `"block/dense/kernel"`."""


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
        for i, (key_path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
            path = path_name(key_path)
            if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
                raise TypeError(
                    f"leaves must be arrays, got {type(leaf).__name__} {leaf!r} at"
                    f" {path or 'the root'}. Convert it with jnp.asarray, or differentiate"
                    " with respect to array leaves only."
                )
            counted = jnp.issubdtype(leaf.dtype, jnp.inexact) and math.prod(leaf.shape) > 0
            if counted and not (exclude is not None and exclude(path, leaf)):
                abstract = isinstance(leaf, jax.ShapeDtypeStruct)
                arrays.append(leaf if abstract else jnp.asarray(leaf))
                paths.append(path)
                positions.append(i)
        return cls(arrays, paths, positions, tree)

    def replace(self, arrays: Sequence[Any]) -> Tree:
        """The tree with its counted leaves replaced by `arrays`."""
        leaves, treedef = jax.tree.flatten(self.tree)
        for i, array in zip(self.positions, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(treedef, leaves)

    def alone(self, arrays: Sequence[Any]) -> Tree:
        """The tree with its counted leaves replaced by `arrays`, and None for all others."""
        leaves: list[Any] = [None] * len(jax.tree.leaves(self.tree))
        for i, array in zip(self.positions, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def check_like(self, arrays: Sequence[Any]) -> Sequence[Any]:
        """`arrays`, a state's. Raises unless they have the shapes of the counted leaves."""
        if [x.shape for x in arrays] != [x.shape for x in self.arrays]:
            raise ValueError(
                f"updates must have the leaves that init saw, got {len(self.arrays)} for"
                f" {len(arrays)}, or other shapes. Call init with the tree the gradient is taken"
                " for, and inside shard_map with what one device holds."
            )
        return arrays

    def map(self, fun: LeafFn) -> list:
        """`fun(path, leaf)` for each counted leaf."""
        return [fun(path, x) for path, x in zip(self.paths, self.arrays, strict=True)]

    def from_prefix(self, prefix: Tree, argument: str) -> list:
        """The entry of the tree prefix `prefix` that covers each counted leaf."""
        try:
            entries = jax.tree.leaves(jax.tree.broadcast(prefix, self.tree))
        except ValueError as error:
            detail = str(error).replace("broadcast_prefix prefix_tree", argument)
            raise ValueError(
                f"{argument} must be a tree prefix of the updates, got a mismatch: {detail}\n"
                f"Give {argument} the structure of the parameters, cut off at any node."
            ) from None
        return [entries[i] for i in self.positions]


def path_name(key_path: tuple) -> str:
    """`"block/dense/kernel"`; the same for a Flax NNX variable and for the array it holds."""
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")
