"""What the engine assumes of an equation, and what becomes of a loss that breaks it.

The engine evaluates the loss with parameters that nobody differentiates, and gets gradients from
the cotangents of the values that they meet. That is the gradient of the loss if each equation

1. computes its outputs from its inputs alone. One that reads or writes a reference, or that has
   another effect and outputs, does not: what is written is no output, and no cotangent reaches it.
2. has inputs and outputs that are arrays;
3. cannot tell which of its inputs are differentiated. A rule with `symbolic_zeros=True` can: it is
   called with `SymbolicZero` for a tangent, or with `perturbed` for an input.

A loss with an equation that breaks one of the three is differentiated by `vmap(grad)` as a whole;
`explain` says why. The third is checked of equations with a parameter among their inputs: any other
rule is told what `vmap(grad)` tells it.

4. Backward rules are linear in the cotangent. A user's (`custom_vjp`, `linear_call`, a solver of
   one's own) need not be: some clip the cotangent. So an equation with such a rule stays in its
   loop, where the rule meets the cotangent of each step and not their sum, and no loss that has one
   is scaled to weigh its gradients.
"""

from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import (
    JaxprEqn,
    collective_axes,
    is_own,
    jaxprs_of,
    primitives,
    source_line,
)

# Their derivatives are zero whatever comes in: nothing is differentiated beyond them.
_FLAT = frozenset({
    primitives.stop_gradient_p, primitives.floor_p, primitives.ceil_p, primitives.round_p,
    primitives.sign_p, primitives.nextafter_p, primitives.bitcast_convert_type_p,
})  # fmt: skip
# A rule of the user's stands behind each; that of `custom_jvp` is transposed by JAX, which fails
# unless it is linear.
_OF_USERS = frozenset({primitives.custom_vjp_call_p, primitives.linear_solve_p})


class UnseenError(Exception):
    """The loss cannot be seen through; the message says why."""


def is_flat(eqn: JaxprEqn) -> bool:
    """Whether the derivative is zero."""
    return eqn.primitive in _FLAT


def unseen(eqn: JaxprEqn, active: bool) -> UnseenError | None:
    """Why an equation breaks one of the first three, if it does; `active`: it has a parameter."""
    avals: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    odd = [a for a in avals if not isinstance(a, jax.core.ShapedArray)]
    name, line = eqn.primitive, source_line(eqn)
    if odd:
        return UnseenError(f"{name} of {type(odd[0]).__name__}, which is no array, at {line}")
    if eqn.effects and eqn.outvars:
        return UnseenError(f"{name}, which has an effect, at {line}")
    if active and _has(eqn, _asks):
        return UnseenError(f"{name}, whose rule asks what is differentiated, at {line}")
    return None


def is_linear(eqn: JaxprEqn) -> bool:
    """Whether its backward rule is known to be linear: all rules involved are JAX's own."""
    return not _has(eqn, _is_of_a_user)


def is_differentiable(aval: Any) -> bool:
    """Whether gradients flow through values of a type."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def check_own(jaxpr: Any, axes: Set[str]) -> None:
    """Raises inside `jax.shard_map` if the loss communicates over one of these mesh axes.

    Examples, or parameters, are split along them. Examples that are mixed have no gradients of
    their own, and of a split weight a device sees the gradient of its part, whose norm is too
    small. `vmap(grad)` would be as wrong.
    """
    for eqn in jaxpr.eqns if axes else ():
        if found := collective_axes(eqn) & axes:
            raise ValueError(
                "the loss of one example must be taken on one device inside jax.shard_map, got"
                f" {eqn.primitive} over {', '.join(sorted(found))} at {source_line(eqn)}, where"
                " examples or parameters are split. Split parameters under jax.jit instead, by"
                " their shardings and jax.lax.with_sharding_constraint: norms are whole there."
            )
        for body in jaxprs_of(eqn):
            check_own(getattr(body, "jaxpr", body), axes)


def _asks(eqn: JaxprEqn) -> bool:
    return bool(eqn.params.get("symbolic_zeros", False))


def _is_of_a_user(eqn: JaxprEqn) -> bool:
    return eqn.primitive in _OF_USERS or not is_own(eqn.primitive)


def _has(eqn: JaxprEqn, condition: Any) -> bool:
    """Whether it, or an equation within it, meets a condition."""
    return condition(eqn) or any(
        _has(inner, condition) for body in jaxprs_of(eqn) for inner in body.eqns
    )
