"""Arrays that say how they are split: meshes with explicit axes, which `jax.make_mesh` makes.

There JAX wants to be told how the result of each reshape and of each product is split, and of a
loss that looks up tokens `vmap(grad)` itself is refused. So a call with such arrays runs on the
same mesh with automatic axes, where XLA decides, and only its results say again how they are
split: what has one entry per example as the examples are, what is shaped like an argument as that
is, and all else is whole.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optaxclip._compat import auto_mesh, explicit_sharding
from optaxclip._leaves import Tree


def on_automatic_axes(
    fun: Callable[..., Any], examples: Tree, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`fun(*args, **kwargs)`; `examples` are the arguments with examples on the leading axis."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    split = {i: s for i, x in arrays.items() if (s := explicit_sharding(x)) is not None}
    if not split:
        return fun(*args, **kwargs)

    def run(arrays: dict[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(
            structure, [arrays.get(i, x) for i, x in enumerate(leaves)]
        )
        return fun(*args, **kwargs)

    first = next(x for x in jax.tree.leaves(examples))
    along = explicit_sharding(first)
    of_examples = PartitionSpec(None if along is None else along.spec[0])
    alike = {arrays[i].shape: s.spec for i, s in split.items()}

    def spec(x: Any) -> PartitionSpec:
        if x.shape in alike:
            return alike[x.shape]
        return of_examples if x.shape[:1] == first.shape[:1] else PartitionSpec()

    shapes = {i: jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in arrays.items()}
    mesh = next(iter(split.values())).mesh
    with jax.sharding.use_abstract_mesh(auto_mesh(mesh)):
        results = jax.eval_shape(run, shapes)
    out_sharding = jax.tree.map(spec, results)
    return jax.sharding.auto_axes(run, out_sharding=out_sharding)(arrays)


def of_gradients(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of per-example gradients, its first argument."""

    @functools.wraps(fun)
    def run(grads: Tree, *args: Any, **kwargs: Any) -> Any:
        return on_automatic_axes(fun, grads, (grads, *args), kwargs)

    return run
