"""The programs that `compiled.py` compiles: steps of Adam behind a clipper, on a chip or a mesh,
and gradients whose examples are clipped.

Run by `compiled.py`, in the virtual environment that has the compiler: takes cases as JSON from
stdin, and prints a line of JSON with the versions, then one for each case.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import _compilers
import _models
import jax
import jax.numpy as jnp
import optax
from _compiled_grid import ALONE, MESHES, MODELS, PLAIN, TREES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip.per_example import reweighted_grad

OPTAX: dict[str, Callable[[], Any]] = {
    "clip": lambda: optax.clip(0.5),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.5),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}
OURS: dict[str, Callable[..., Any]] = {
    "value": lambda: optaxclip.clip_by_value(0.5),
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "leaf": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "rms": lambda: optaxclip.clip_by_leaf_rms(0.5),
    "unit": lambda **on: optaxclip.clip_by_unit_norm(1.0, **on),
    "agc": lambda **on: optaxclip.agc(0.01, **on),
    "clippy": optaxclip.clippy,
    "soft": lambda: optaxclip.soft_clip(1.0),
    "zclip": optaxclip.zclip,
    "adagc": optaxclip.adagc,
    "history": optaxclip.clip_by_history,
    "quantile": optaxclip.clip_by_quantile,
    "autoclip": optaxclip.autoclip,
    "stabilizer": optaxclip.gradient_stabilizer,
    "adaclip": optaxclip.adaclip,
    "spam": optaxclip.spam_clip,
}
UNITS = ("unit", "agc")  # which ask for `axis_name=` inside `jax.shard_map`
_BLOCK = {
    "in": ((1024, 1024), P("data", "model")),
    "out": ((1024, 1024), P("model", "data")),
    "up": ((1024, 4096), P("data")),
    "down": ((4096, 1024), P(None, "model")),
    "bias": ((4096,), P("model")),
    "scale": ((1024,), P()),
}
UNEVEN = "uneven"
# On a mesh: split along two axes, along one, along both at once; whole; and one whose gradient is
# split, under jit, into shards of different sizes. Neither 4 nor 16 divides it.
SPLIT = {f"{i}/{name}": leaf for i in range(3) for name, leaf in _BLOCK.items()} | {
    "embed": ((32_768, 1024), P(("data", "model"))),
    UNEVEN: ((1002, 999), P()),
}


def transform(name: str, layout: str = "jit") -> Any:
    """Adam behind a clipper, by "adam", "optax NAME" or "optaxclip NAME"."""
    system, _, clipper = name.partition(" ")
    if not clipper:
        return optax.adam(1e-3)
    if system == "optax":
        return optax.chain(OPTAX[clipper](), optax.adam(1e-3))
    split = layout == "shard_map" and clipper in UNITS
    ours = OURS[clipper](**{"axis_name": _compilers.AXES} if split else {})
    return optax.chain(ours, optax.adam(1e-3))


def on_a_chip(kind: str, tree: str, name: str) -> dict[str, Any]:
    """The cost of a step on one device."""
    shapes, dtype = TREES[tree]
    everywhere = NamedSharding(_compilers.mesh(kind, (1, 1)), P())
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    grads = {k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()}
    tx = transform(name)
    args = (grads, jax.eval_shape(tx.init, params), params)
    return _compilers.cost(_step(tx), *args, in_shardings=everywhere, donate_argnums=(1, 2))


def on_a_mesh(kind: str, mesh: str, layout: str, name: str) -> dict[str, Any]:
    """The cost of a step on the leaves of `SPLIT`."""
    explicit = layout == "explicit"
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    devices = _compilers.mesh(kind, MESHES[mesh], axis_type)
    tx = transform(name, layout)
    shapes = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, (s, _) in SPLIT.items()}
    state = jax.eval_shape(tx.init, shapes)
    specs = {k: spec for k, (_, spec) in SPLIT.items()}
    state_specs = jax.tree_util.tree_map_with_path(_spec, state)
    step = _step(tx)
    if layout == "jit":
        step = _unevenly(step, NamedSharding(devices, P("data", "model")))
    if layout == "shard_map":
        ins = (specs, state_specs, specs)
        step = jax.shard_map(step, mesh=devices, in_specs=ins, out_specs=(specs, state_specs))
    args = _placed(devices, (shapes, state, shapes), (specs, state_specs, specs))
    with jax.set_mesh(devices) if explicit else contextlib.nullcontext():
        return _compilers.cost(step, *args, donate_argnums=(1, 2))


def of_a_model(kind: str, model: str, system: str) -> dict[str, Any]:
    """The cost of a gradient, plain or with the examples clipped, on one device."""
    name, args = MODELS[model]
    work = getattr(_models, name)(*args)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (work.params, work.batch)
    )

    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(work.loss, (None, 0))(p, batch)))(params)

    def clipped(params: Any, batch: Any) -> Any:
        size = "auto" if system == "auto" else None
        found = reweighted_grad(work.loss, _bounded, method=system, microbatch_size=size)
        return found(params, batch).grads

    everywhere = NamedSharding(_compilers.mesh(kind, (1, 1)), P())
    fun = plain if system == PLAIN else clipped
    return _compilers.cost(fun, *shapes, in_shardings=everywhere)


def _bounded(sq_norms: jax.Array) -> jax.Array:
    return jnp.minimum(1, jax.lax.rsqrt(sq_norms))


def _step(tx: Any) -> Callable:
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _unevenly(step: Callable, sharding: NamedSharding) -> Callable:
    """With one gradient split as a backward pass may leave it, which no argument can be."""

    def split(grads: Any, state: Any, params: Any) -> Any:
        uneven = jax.lax.with_sharding_constraint(2 * grads[UNEVEN], sharding)
        return step(grads | {UNEVEN: uneven}, state, params)

    return split


def _spec(path: Any, x: Any) -> P:
    """What mirrors a parameter is split as it is, and the rest is whole."""
    shape, spec = SPLIT.get(getattr(path[-1], "key", ""), (None, None))
    return spec if shape == x.shape else P()


def _placed(mesh: Any, shapes: Any, specs: Any) -> Any:
    def place(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes, specs)


def main() -> None:
    """Compiles the cases of stdin one after another; what fails is said, and the rest goes on."""
    cases = json.load(sys.stdin)
    print(json.dumps(_compilers.versions()), flush=True)
    with contextlib.suppress(Exception):  # the first program is slower than others
        on_a_chip(cases[0]["kind"], next(iter(TREES)), ALONE)
    for case in cases:
        try:
            compiles = of_a_model if "model" in case else on_a_mesh if "mesh" in case else on_a_chip
            found = compiles(**case)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    main()
