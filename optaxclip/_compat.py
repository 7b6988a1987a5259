"""The only file that touches names that differ between JAX releases."""

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params
from jax.extend.core import primitives as primitives
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AxisType, NamedSharding

# Not among the names of jax.extend; None where a release makes do without the primitive.
optimization_barrier_p: Primitive | None = getattr(lax, "optimization_barrier_p", None)
split_p: Primitive | None = getattr(lax, "split_p", None)
stack_p: Primitive | None = getattr(lax, "stack_p", None)
unstack_p: Primitive | None = getattr(lax, "unstack_p", None)

# Primitives that call a function of the user's.
_CALL_RULES = (
    primitives.custom_jvp_call_p,
    primitives.custom_vjp_call_p,
    primitives.linear_solve_p,
)
# Of JAX, in no public module.
_UNNAMED = frozenset({
    "pvary", "pcast", "psum_invariant", "mesh_cast", "reshard", "shard_map", "random_wrap",
    "random_unwrap", "layout_constraint",
})  # fmt: skip
# As JAX names them; those that only say how a value varies are none.
_COLLECTIVES = frozenset({
    "psum", "psum_invariant", "pmax", "pmin", "ppermute", "pgather", "all_gather",
    "all_gather_invariant", "all_gather_reduced", "all_to_all", "ragged_all_to_all",
    "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter", "pbroadcast",
})  # fmt: skip
_JAX = str(pathlib.Path(jax.__file__).parent)
_CALLS = (primitives.jit_p, primitives.closed_call_p, primitives.call_p)


def varying_axes(x: Any) -> tuple[str, ...]:
    """Mesh axes over which `x` varies inside `jax.shard_map`, sorted; `()` elsewhere.

    The type of an array carries them while `check_vma` is on: as `typeof(x).vma`
    up to JAX 0.10, as `typeof(x).mat.varying` from 0.11.
    """
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return tuple(sorted(axes or ()))


def as_varying(arrays: Sequence[Any], like: Sequence[Any] = ()) -> list[Any]:
    """Arrays that vary over the mesh axes that any of them, or of `like`, varies over."""
    axes = {axis for x in (*arrays, *like) for axis in varying_axes(x)}
    if not axes:
        return list(arrays)
    missing = [tuple(sorted(axes - set(varying_axes(x)))) for x in arrays]
    return [
        lax.pcast(x, some, to="varying") if some else x
        for x, some in zip(arrays, missing, strict=True)
    ]


def explicit_sharding(x: Any) -> NamedSharding | None:
    """How the type of `x` says that it is split over a mesh; None if it is whole or does not say.

    Types say it on meshes whose axes are `AxisType.Explicit`.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or all(entry is None for entry in sharding.spec):
        return None
    return sharding


def auto_mesh(mesh: Any) -> jax.sharding.AbstractMesh:
    """A mesh with automatic axes instead of explicit ones."""
    abstract = getattr(mesh, "abstract_mesh", mesh)
    types = [AxisType.Auto if t == AxisType.Explicit else t for t in abstract.axis_types]
    return abstract.update(axis_types=tuple(types))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant written into the jaxpr."""
    return isinstance(atom, Literal)


def inlined_jaxpr(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The body of a call that may be inlined without changing values or derivatives."""
    return _body(equation) if equation.primitive in _CALLS else None


def remat_jaxpr(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The body of `jax.checkpoint`."""
    return _body(equation) if equation.primitive is primitives.remat_p else None


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carries.

    Parameters of their own up to JAX 0.10; from 0.11 the inputs are given in three groups.
    """
    params = equation.params
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = params["ft_in"].unpack()
    return len(consts), len(carries)


def collective_axes(equation: JaxprEqn) -> frozenset[str]:
    """The names of the mesh axes over which an equation itself exchanges or adds up values."""
    if equation.primitive.name not in _COLLECTIVES:
        return frozenset()
    found = equation.params.get("axes", equation.params.get("axis_name", ()))
    names = found if isinstance(found, tuple | frozenset | set | list) else (found,)
    return frozenset(name for name in names if isinstance(name, str))


def live_jaxpr(jaxpr: Any) -> Any:
    """Without what no output needs, in loops and branches too."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def evaluated_jaxpr(jaxpr: Any, constants: Sequence[Any], *args: Any) -> list[Any]:
    """The outputs of a jaxpr for given values of its constants."""
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, list(constants)))(*args)


def _body(equation: JaxprEqn) -> ClosedJaxpr:
    body = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def jaxprs_of(equation: JaxprEqn) -> Iterable[Any]:
    """The jaxprs among the parameters of an equation: its bodies and branches."""
    return jaxprs_in_params(equation.params)


@functools.cache
def _public_primitives() -> frozenset[Primitive]:
    named = [*vars(primitives).values(), *vars(lax).values()]
    return frozenset(x for x in named if isinstance(x, Primitive))


def is_own(primitive: Primitive) -> bool:
    """Whether a primitive is one of JAX's: those that it names in public, and a few by name."""
    return primitive in _public_primitives() or primitive.name in _UNNAMED


def bind(equation: JaxprEqn, *inputs: Any) -> tuple[Any, ...]:
    """Evaluate an equation, under the names that the user gave it; always a tuple of outputs."""
    inputs = tuple(as_varying(inputs))  # inside shard_map primitives themselves do not do that
    if equation.primitive in _CALL_RULES or not is_own(equation.primitive):
        # A constant of a jaxpr is a NumPy array, which lacks what a rule may use (`x.at`).
        inputs = tuple(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs)
    params = equation.primitive.get_bind_params(equation.params)
    source = equation.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=names), equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **params)
    return tuple(outputs) if equation.primitive.multiple_results else (outputs,)


def source_line(equation: JaxprEqn) -> str:
    """The user's `file:line (function)` that made an equation."""
    return str(source_info_util.summarize(equation.source_info)) or "a line that JAX lost"


def within(equation: JaxprEqn, call: JaxprEqn, body: ClosedJaxpr) -> JaxprEqn:
    """An equation of the body of a call, with the names around the call in front of its own.

    It says that it was made where the call was if its own line is lost, or if the function is one
    of JAX's such as `jnp.take`: JAX traces those once for each type of arguments, and their
    equations name the line that called them first.
    """
    source = equation.source_info
    names = call.source_info.name_stack + source.name_stack
    info = getattr(body.jaxpr, "debug_info", None)
    path = str(getattr(info, "func_src_info", "")).rpartition(" at ")[2]
    if path.startswith(_JAX) or not source_info_util.summarize(source):
        source = source.replace(traceback=call.source_info.traceback)
    return equation.replace(source_info=source.replace(name_stack=names))
