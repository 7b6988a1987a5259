"""What a loss and its arguments must be: errors that name argument, shape and remedy."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Tree, leaves_with_path, path_name


def check_params(arguments: list[tuple[str, Tree]]) -> None:
    """Each differentiated argument has a real floating-point array, and nothing complex."""
    for name, tree in arguments:
        leaves = leaves_with_path(tree)
        if not leaves:
            raise ValueError(
                f"a differentiated argument must have at least one array, got none in {name}."
                " Pass the parameters there, or change argnums."
            )
        kinds = [_kind(leaf) for _, leaf in leaves]
        places = [f"{_described(leaf)} at {_at(name, path)}" for path, leaf in leaves]
        for kind, place in zip(kinds, places, strict=True):
            if kind is None:
                raise TypeError(
                    f"parameters must be arrays, got {place}. Keep everything else in an"
                    " argument of its own, or close over it: eqx.partition(model,"
                    " eqx.is_inexact_array) does so for an Equinox module."
                )
            if jnp.issubdtype(kind, jnp.complexfloating):
                raise TypeError(
                    f"parameters must be real, got {place}. Pass the real and the imaginary"
                    " part as two arrays."
                )
        if not any(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            raise TypeError(
                "a differentiated argument must have a floating-point array, got"
                f" {', '.join(places)}. Convert one with .astype(jnp.float32), or change"
                " argnums."
            )


def check_batch(arguments: list[tuple[str, Tree]]) -> int:
    """How many examples there are: all leaves have them on the leading axis, and one at least."""
    leaves = [
        (_at(name, path), jnp.shape(leaf))
        for name, tree in arguments
        for path, leaf in leaves_with_path(tree, is_leaf=_has_shape)
    ]
    if not leaves:
        names = ", ".join(name for name, _ in arguments)
        raise ValueError(
            f"the batch must have at least one array, got none in {names}. Pass the examples"
            " there, or change batch_argnums."
        )
    first_name, first = leaves[0]
    for name, shape in leaves:
        if not shape:
            raise ValueError(
                f"every leaf of the batch must have the examples on its first axis, got a"
                f" scalar at {name}. Repeat it, or pass what all examples share as an argument"
                " that is not in batch_argnums."
            )
        if shape[0] != first[0]:
            raise ValueError(
                f"Batch axis sizes must agree, got {shape} at {name} and {first} at {first_name}."
                " Give every leaf of the batch the same first axis."
            )
    if first[0] == 0:
        raise ValueError(
            f"the batch must not be empty, got {first} at {first_name}. Skip this step, or pass"
            " at least one example."
        )
    return first[0]


def warn_of_rows(shared: list[tuple[int, str, Tree]], batch: tuple[int, ...], size: int) -> None:
    """Warns of an argument that all examples share, though it has as many rows as there are."""
    for number, name, tree in shared:
        leaves = leaves_with_path(tree, is_leaf=_has_shape)
        shapes = [jnp.shape(x) for _, x in leaves if _has_shape(x) and not _is_raw_key(x)]
        if size > 1 and shapes and all(shape[:1] == (size,) for shape in shapes):
            numbers = (*batch, number)
            warnings.warn(
                f"{name} {shapes[0]} is the same for every example, and has as many rows as there"
                f" are examples, {size}. If these are the examples', pass batch_argnums={numbers};"
                " if it is meant, bind the argument first, with functools.partial or in a closure.",
                stacklevel=5,
            )


def _is_raw_key(x: Any) -> bool:
    return getattr(x, "dtype", None) == np.uint32 and jnp.shape(x)[-1:] in ((2,), (4,))


def loss_and_aux(result: Any, has_aux: bool, keep_batch_dim: bool) -> tuple[Any, Any]:
    """The result of the loss as `(loss, aux)`, checked."""
    aux: Any = ()
    if has_aux:
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True fun must return (loss, aux), got {_described(result)}. Return"
                " a pair, or pass has_aux=False."
            )
        result, aux = result
    leaves = jax.tree.leaves(result)
    if len(leaves) != 1 or leaves[0] is not result or jnp.shape(result) != ():
        saw = "a batch of one example, with its batch axis" if keep_batch_dim else (
            "one example, without the batch axis"
        )  # fmt: skip
        raise ValueError(
            f"fun must return the loss of one example, a scalar, got {_described(result)}. It saw"
            f" {saw} (keep_batch_dim={keep_batch_dim}): change that if it expects"
            " otherwise, reduce the loss with jnp.sum or jnp.mean, or pass has_aux=True if it"
            " returns (loss, aux)."
        )
    dtype = jnp.result_type(result)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"fun must return a real floating-point loss, got dtype {dtype}. Convert it with"
            " .astype(jnp.float32), or return a differentiable loss."
        )
    return result, aux


def check_keywords(named: dict[str, Tree]) -> None:
    """All leaves may have the examples on the leading axis: none is a scalar."""
    for path, leaf in leaves_with_path(named):
        if not np.shape(leaf):
            name = path_name(path)
            raise ValueError(
                f"keyword arguments must hold one entry per example, got a scalar at {name}. Bind"
                f" it first: functools.partial(fun, {name.split('/')[0]}=...), or pass it by"
                " position."
            )


def what_fun_saw(arguments: dict[str, Tree], keep_batch_dim: bool) -> str:
    """A note for errors that `fun` raises."""
    leaves = leaves_with_path(arguments)
    shapes = [f"{_described(leaf)} at {path_name(path)}" for path, leaf in leaves]
    return (
        f"fun was called with one example: {', '.join(shapes)}. If it expects"
        f" {'no batch' if keep_batch_dim else 'a batch'} axis there, pass"
        f" keep_batch_dim={not keep_batch_dim}."
    )


def _has_shape(x: Any) -> bool:
    """An array, or a container with a shape of its own, such as a sparse matrix."""
    return isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")


def _kind(leaf: Any) -> Any:
    """The dtype of an array or a Python number, None of anything else."""
    return (
        jnp.result_type(leaf)
        if isinstance(leaf, int | float | complex)
        else getattr(leaf, "dtype", None)
    )


def _at(name: str, path: tuple) -> str:
    return "/".join(filter(None, (name, path_name(path))))


def _described(tree: Tree) -> str:
    leaves = jax.tree.leaves(tree)
    shapes = [
        f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__ for x in leaves
    ]
    return ", ".join(shapes) or repr(tree)
