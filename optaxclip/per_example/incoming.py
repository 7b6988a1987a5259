"""Per-example gradients as an aggregator receives them: factored or stacked, checked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._leaves import path_name
from optaxclip._reductions import accumulator
from optaxclip.per_example.forms import Dense, Form, is_form, zero_like

Tree = Any


@dataclasses.dataclass(frozen=True)
class Incoming:
    """The gradients of `size` examples."""

    forms: list[Form]
    """One a leaf; those of integers and keys are zeros of their dtype."""
    like: Tree
    """Shapes and dtypes of one gradient: a tree like the parameters."""
    size: int

    @classmethod
    def of(cls, grads: Tree, params: Tree | None = None) -> "Incoming":
        """Raises where leaves differ in their number of examples, or are not shaped like params."""
        with_paths, structure = jax.tree.flatten_with_path(grads, is_leaf=is_form)
        names = [path_name(path) or "the root" for path, _ in with_paths]
        stacks = [jax.tree.leaves(leaf)[0] for _, leaf in with_paths]
        for name, leaf in zip(names, stacks, strict=True):
            if not jnp.shape(leaf) or leaf.shape[0] == 0 or leaf.shape[0] != stacks[0].shape[0]:
                raise ValueError(
                    "gradients must have one number of examples >= 1 on the first axis, got shape"
                    f" {jnp.shape(leaf)} at {name} and {jnp.shape(stacks[0])} at {names[0]}. Pass"
                    " what per_example_grad or vmap(grad) returns."
                )
        if not stacks:
            raise ValueError("gradients must have at least one leaf, got none. Pass parameters.")
        forms: list[Form] = [x if is_form(x) else Dense(x) for _, x in with_paths]
        shapes = [jax.ShapeDtypeStruct(form.shape, form.dtype) for form in forms]
        if params is not None:
            _check_like_params(names, shapes, params)
        return cls(forms, jax.tree.unflatten(structure, shapes), stacks[0].shape[0])

    def zeros(self) -> list[jax.Array]:
        """A zero update for each leaf: what a leaf that no norm counts gets."""
        nothing = jnp.zeros(self.size)
        return [zero_like(form, self.size).weighted_sum(nothing) for form in self.forms]

    def update(self, sums: list[jax.Array]) -> Tree:
        """One array a leaf -> a tree like the parameters."""
        return jax.tree.unflatten(jax.tree.structure(self.like), sums)


def total(parts: list[jax.Array], size: int) -> jax.Array:
    """Their sum, [B]; of no leaves, zeros."""
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(size, jnp.float32)


def sq_norm(arrays: list[jax.Array]) -> jax.Array:
    """`|u|^2` of an update."""
    wide = [x.astype(accumulator(x.dtype)).reshape(-1) for x in arrays]
    return functools.reduce(jnp.add, [jnp.vdot(x, x) for x in wide], jnp.zeros((), jnp.float32))


def _check_like_params(names: list[str], shapes: list[Any], params: Tree) -> None:
    expected = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if len(expected) != len(shapes):
        raise ValueError(
            f"gradients and params must have the same leaves, got {len(shapes)} and"
            f" {len(expected)}. Pass the parameters the gradient was taken for."
        )
    for name, x, shape in zip(names, shapes, expected, strict=True):
        if x.shape != shape:
            raise ValueError(
                f"one example's gradient must be shaped like its parameter, got {x.shape} at"
                f" {name}, which is {shape}. Pass per-example gradients, [B, *shape] or factored."
            )
