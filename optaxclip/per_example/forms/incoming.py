"""Per-example gradients as an aggregator receives them: factored or stacked, checked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optaxclip._leaves import Tree, leaves_with_path, path_name, place
from optaxclip._numerics import accumulator, added
from optaxclip.per_example.forms.forms import Dense, Form, is_form, zero_like


@dataclasses.dataclass(frozen=True)
class Incoming:
    """The gradients of `size` examples."""

    forms: list[Form]
    """One per leaf; those of integers and keys are zeros of their dtype."""
    like: Tree
    """Shapes and dtypes of one gradient: a tree like the parameters."""
    size: int

    @classmethod
    def of(cls, grads: Tree, params: Tree | None = None) -> "Incoming":
        """Raises where leaves differ in their number of examples, or are not shaped like params."""
        _check_whole(grads)
        size = examples_of(grads)
        leaves, structure = jax.tree.flatten(grads, is_leaf=is_form)
        forms: list[Form] = [x if is_form(x) else Dense(x) for x in leaves]
        shapes = [jax.ShapeDtypeStruct(form.shape, form.dtype) for form in forms]
        like = jax.tree.unflatten(structure, shapes)
        if params is not None:
            check_like_params(like, params)
        return cls(forms, like, size)

    def zeros(self) -> list[jax.Array]:
        """A zero update for each leaf: what a leaf that no norm counts gets."""
        nothing = jnp.zeros(self.size)
        return [zero_like(form, self.size).weighted_sum(nothing) for form in self.forms]

    def update(self, sums: list[jax.Array]) -> Tree:
        """One array per leaf -> a tree like the parameters."""
        return jax.tree.unflatten(jax.tree.structure(self.like), sums)


def _check_whole(grads: Tree) -> None:
    """Raises inside `optax.masked` or `optax.partition`: what they set aside stays per example."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    for path, leaf in leaves_with_path(grads, is_leaf=lambda x: is_form(x) or is_masked(x)):
        if is_masked(leaf):
            raise ValueError(
                "per-example gradients must be aggregated as a whole, got"
                f" {place(path_name(path))} set aside by optax.masked or optax.partition: it would"
                " stay a gradient for each example, which no optimizer can apply. Differentiate"
                " the trained part alone, per_example_grad(lambda trained, x: loss({**frozen,"
                " **trained}, x)), or put clip_per_example in front of optax.masked or partition."
            )


def examples_of(grads: Tree) -> int:
    """How many there are. Raises where leaves differ in it, or where there is none."""
    found = [
        (place(path_name(path)), jnp.shape(jax.tree.leaves(leaf)[0]))
        for path, leaf in leaves_with_path(grads, is_leaf=is_form)
    ]
    if not found:
        raise ValueError("gradients must have at least one leaf, got none. Pass parameters.")
    first_name, first = found[0]
    for name, shape in found:
        if not shape or shape[0] == 0 or shape[0] != first[0]:
            raise ValueError(
                "gradients must have one number of examples >= 1 on the first axis, got shape"
                f" {shape} at {name} and {first} at {first_name}. Pass what per_example_grad or"
                " vmap(grad) returns."
            )
    return first[0]


def total(parts: list[jax.Array], size: int) -> jax.Array:
    """Their sum, [B]; of no leaves, zeros."""
    return added(parts) if parts else jnp.zeros(size, jnp.float32)


def sq_norm(arrays: list[jax.Array]) -> jax.Array:
    """`|u|^2` of an update."""
    wide = [x.astype(accumulator(x.dtype)).reshape(-1) for x in arrays]
    return added([jnp.zeros((), jnp.float32), *(jnp.vdot(x, x) for x in wide)])


def check_like_params(like: Tree, params: Tree) -> None:
    """Raises where one gradient is not shaped like the parameters."""
    found, expected = (
        [(place(path_name(path)), jnp.shape(x)) for path, x in leaves_with_path(tree)]
        for tree in (like, params)
    )
    if len(found) != len(expected):
        ours, theirs = ([name for name, _ in leaves] for leaves in (found, expected))
        alone = (name for name in (*ours, *theirs) if name not in ours or name not in theirs)
        raise ValueError(
            f"gradients and params must have the same leaves, got {len(found)} and"
            f" {len(expected)}, and {next(alone, 'a repeated path')} in one of them alone. Pass the"
            " parameters the gradient was taken for."
        )
    for (name, shape), (_, wanted) in zip(found, expected, strict=True):
        if shape != wanted:
            raise ValueError(
                f"one example's gradient must be shaped like its parameter, got {shape} at"
                f" {name}, which is {wanted}. Pass per-example gradients, [B, *shape] or factored."
            )
