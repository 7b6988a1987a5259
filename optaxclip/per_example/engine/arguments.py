"""The arguments of a loss: which are differentiated, which hold examples, which are shared."""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import as_varying
from optaxclip._leaves import Tree
from optaxclip.per_example.engine.checks import (
    check_batch,
    check_keywords,
    check_params,
    loss_and_aux,
    warn_of_rows,
    what_fun_saw,
)

Argnums = int | Sequence[int]

_ROLES = ("argnums", "batch_argnums", "prng_argnum")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a loss is called; the arguments of `per_example_grad`."""

    argnums: Argnums | None = 0
    batch_argnums: Argnums = 1
    has_aux: bool = False
    keep_batch_dim: bool = False
    prng_argnum: int | None = None
    named_examples: bool = False
    """Whether keyword arguments hold the examples too; `keep_batch_dim` is not for them."""

    def __post_init__(self) -> None:
        taken: dict[int, str] = {}
        for name, numbers in self.named_argnums.items():
            if not numbers:
                raise ValueError(f"{name} must name an argument, got (). Pass an int.")
            for k in numbers:
                if k < 0:
                    raise ValueError(f"{name} must be >= 0, got {k}. Count from the left.")
                if k in taken:
                    raise ValueError(
                        f"the roles of arguments must not overlap, got {k} in {taken[k]} and in"
                        f" {name}. Remove it from one of the two."
                    )
                taken[k] = name

    @property
    def named_argnums(self) -> dict[str, tuple[int, ...]]:
        """The numbers of the arguments that are not simply shared."""
        given = {name: getattr(self, name) for name in _ROLES}
        return {name: _numbers(name, value) for name, value in given.items() if value is not None}

    def examples_of(self, args: Sequence[Any]) -> list[Tree]:
        """The positional arguments that hold the examples, of those that there are."""
        return [args[k] for k in self.named_argnums["batch_argnums"] if k < len(args)]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a loss, as a function of what is differentiated and of one example."""

    fun: Callable[[list[Any], list[Any]], tuple[Any, Any]]
    """`fun(params, example) -> (loss, aux)`; aux is () unless the loss has some."""
    params: list[jax.Array]
    """The arrays to differentiate with respect to."""
    batch: list[jax.Array]
    """The arrays of the batch, with the examples on the leading axis, as `jax.vmap` has them."""
    like_params: Callable[[list[Any], Callable[[Any], Any]], Tree]
    """`(gradients, zero) -> tree` like the differentiated arguments; `zero(leaf)` elsewhere."""
    spmd_axis_name: Any = None
    """Mesh axes that the examples are split over: `jax.vmap`'s argument, for sharding constraints
    in the loss."""

    @property
    def size(self) -> int:
        """How many examples there are."""
        return self.batch[0].shape[0]

    @property
    def example(self) -> list[jax.ShapeDtypeStruct]:
        """The types of one example."""
        found: list[jax.ShapeDtypeStruct] = []

        def one(example: list[Any]) -> None:
            found.extend(jax.eval_shape(lambda x: x, example))

        jax.eval_shape(jax.vmap(one), self.batch)
        return found


def call_of(fun: Callable, options: Options, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """`fun(*args, **kwargs)`, its arguments split. Raises where they do not fit."""
    roles = options.named_argnums
    names = check_positions(fun, options, len(args))
    of_params, of_batch, of_keys = (roles.get(r, ()) for r in _ROLES)
    check_params([(names[k], args[k]) for k in of_params])
    named, shared = (kwargs, {}) if options.named_examples else ({}, kwargs)
    check_keywords(named)
    size = check_batch([*((names[k], args[k]) for k in of_batch), ("", named)])
    others = {*range(len(args))} - {*of_params, *of_batch, *of_keys}
    warn_of_rows([(k, names[k], args[k]) for k in sorted(others)], of_batch, size)

    leaves, params_tree = jax.tree.flatten([args[k] for k in of_params])
    leaves = [jnp.asarray(x) for x in leaves]
    moving = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    batch, batch_tree = _flat_batch(([args[k] for k in of_batch], named))
    keys, keys_tree = jax.tree.flatten([args[k] for k in of_keys])
    keys = [jax.random.split(key, batch[0].shape[0]) for key in keys]

    def with_moving(values: list[Any], others: list[Any]) -> list[Tree]:
        full = list(others)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(params_tree, full)

    def one(params: list[Any], example: list[Any]) -> tuple[Any, Any]:
        data, key = example[: len(batch)], example[len(batch) :]
        examples, named = jax.tree.unflatten(batch_tree, data)
        if options.keep_batch_dim:
            examples = jax.vmap(lambda _: examples)(jnp.zeros(1))
        given = dict(enumerate(args))
        given.update(zip(of_params, with_moving(params, leaves), strict=True))
        given.update(zip(of_batch, examples, strict=True))
        given.update(zip(of_keys, jax.tree.unflatten(keys_tree, key), strict=True))
        try:
            result = fun(*given.values(), **shared, **named)
        except Exception as error:
            seen = {**{names[k]: given[k] for k in of_batch}, **named}
            error.add_note(what_fun_saw(seen, options.keep_batch_dim))
            raise
        return loss_and_aux(result, options.has_aux, options.keep_batch_dim)

    def like_params(gradients: list[Any], zero: Callable[[Any], Any]) -> Tree:
        zeros = [None if i in moving else zero(x) for i, x in enumerate(leaves)]
        trees = with_moving(gradients, zeros)
        return tuple(trees) if isinstance(options.argnums, Sequence) else trees[0]

    # Inside shard_map the gradient of what does not vary over a mesh axis is added up over it: of
    # parameters it would be the sum over one example of each device.
    params = as_varying([leaves[i] for i in moving], batch)
    return Call(jax.jit(one), params, as_varying(batch + keys, params), like_params)


def check_positions(fun: Callable, options: Options, count: int) -> list[str]:
    """The names of `count` positional arguments. Raises where a role is beyond them."""
    names = _argument_names(fun, count)
    for role, numbers in options.named_argnums.items():
        for k in numbers:
            if k >= count:
                raise ValueError(
                    f"{role} must name positional arguments, got {k} with {count} of them:"
                    f" {', '.join(names) or 'none'}. Pass that argument by position, or change"
                    f" {role}."
                )
    return names


def unbatched_aux(aux: Tree, options: Options) -> Tree:
    """Aux of batches of one example without that axis, which `[B, ...]` stands for already."""
    if not options.keep_batch_dim:
        return aux
    return jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 and x.shape[1] == 1 else x, aux)


def _flat_batch(batch: Tree) -> tuple[list[jax.Array], Any]:
    """Its arrays, examples first, and the structure of one example.

    What `jax.vmap` takes need not have rows for leaves: a sparse matrix knows how to be split.
    """
    structures: list[Any] = []

    def one(example: Tree) -> list[Any]:
        leaves, structure = jax.tree.flatten(example)
        structures.append(structure)
        return leaves

    leaves = jax.vmap(one)(batch)
    return [jnp.asarray(x) for x in leaves], structures[0]


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    try:
        return tuple(map(operator.index, given))
    except TypeError:
        kind = "an int" if name == "prng_argnum" else "an int or a tuple of ints"
        raise TypeError(f"{name} must be {kind}, got {value!r}. Count arguments from 0.") from None


def _argument_names(fun: Callable, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional][:count]
    return names + [f"args[{k}]" for k in range(len(names), count)]
