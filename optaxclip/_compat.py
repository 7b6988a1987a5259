"""The only file that touches names that differ between JAX releases."""

from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import JaxprEqn as JaxprEqn
from jax.extend.core import Literal as Literal
from jax.extend.core import Primitive as Primitive
from jax.extend.core import primitives as primitives

# Remat is inlined too: its values and derivatives are those of its body.
_CALLS = (primitives.jit_p, primitives.closed_call_p, primitives.call_p, primitives.remat_p)


def varying_axes(x: Any) -> tuple[str, ...]:
    """Mesh axes over which `x` varies inside `jax.shard_map`, sorted; `()` elsewhere.

    The type of an array carries them while `check_vma` is on: as `typeof(x).vma`
    up to JAX 0.10, as `typeof(x).mat.varying` from 0.11.
    """
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return tuple(sorted(axes or ()))


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant written into the jaxpr."""
    return isinstance(atom, Literal)


def inlined_jaxpr(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The body of a call that may be inlined without changing values or derivatives."""
    if equation.primitive not in _CALLS:
        return None
    body = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def bind(equation: JaxprEqn, *inputs: Any) -> tuple[Any, ...]:
    """Evaluate an equation; always a tuple of outputs."""
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        outputs = equation.primitive.bind(*inputs, **params)
    return tuple(outputs) if equation.primitive.multiple_results else (outputs,)


def source_line(equation: JaxprEqn) -> str:
    """The user's `file:line (function)` that made an equation."""
    return str(source_info_util.summarize(equation.source_info))
