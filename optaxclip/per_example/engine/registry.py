"""Rules: the per-example gradient of a parameter at one equation, as a form."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optaxclip._compat import JaxprEqn, Primitive, bind, source_line
from optaxclip.per_example.forms.forms import Form


@dataclasses.dataclass(frozen=True)
class RuleContext:
    """An equation in which a parameter meets the examples, and what came back through it."""

    equation: JaxprEqn
    position: int
    """Which operand is the parameter."""
    batched: tuple[bool, ...]
    """Which operands carry the examples, on a leading axis."""
    operands: tuple[Any, ...]
    cotangents: tuple[Any, ...]
    """dL/d(output) of each floating-point output, [B, *shape]."""

    @property
    def cotangent(self) -> Any:
        """dL/d(output) of an equation with one output."""
        return self.cotangents[0]

    @property
    def parameter(self) -> Any:
        """The parameter's value."""
        return self.operands[self.position]

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return self.cotangents[0].shape[0]

    @property
    def source(self) -> str:
        """The user's source line."""
        return source_line(self.equation)

    def vjp(self) -> jax.Array:
        """The stacked gradients, [B, *shape]: exact for any equation."""
        return stacked_vjp(
            self.equation, (self.position,), self.batched, self.operands, self.cotangents
        )[0]


class UseRule(Protocol):
    """`rule(ctx, *operands, **equation_params)`: a form, or None where it does not apply."""

    def __call__(self, ctx: RuleContext, *operands: Any, **params: Any) -> Form | None: ...


_RULES: dict[Primitive, UseRule] = {}


def register_rule(*registered: Primitive) -> Callable[[UseRule], UseRule]:
    """Decorate the rule for one or several primitives.

    The rule is called as `rule(ctx, *operands, **equation_params)`, once for each operand that
    is a parameter (`ctx.position`), and returns the per-example gradients of that operand as a
    form, or None where it does not apply: they are then stacked by a VJP, which is exact.

    Args:
      registered: primitives, as in `jax.extend.core.primitives`, or your own. A rule that was
        registered before is replaced.

    Returns:
      A decorator, which returns the rule as it is. Rules are kept for the process.

    Raises:
      TypeError: something else than primitives, or none. Where a rule is applied: what it returned
        is no form shaped like the parameter.

    Edge cases:
      | operands that carry the examples (`ctx.batched`), cotangents | have them on a leading axis |
      | parameters | have no such axis; rules see real floating-point ones alone |

    Example:
      `lax.rem`, the remainder of a division, has no rule: its gradients are stacked. Where the
      parameter is divided, its slope is one, and the cotangent is the gradient.

      >>> import jax.numpy as jnp
      >>> from jax import lax
      >>> from jax.extend.core.primitives import rem_p
      >>> from optaxclip.per_example import Dense, explain, register_rule
      >>> loss = lambda w, x: jnp.sum(lax.rem(w, x))
      >>> w, batch = jnp.array([5.0, 7.0]), jnp.array([[2.0, 3.0], [4.0, 5.0]])
      >>> @register_rule(rem_p)
      ... def rem(ctx, dividend, divisor, **params):
      ...     '''dL/dw_b = g_b.   Cost: none.'''
      ...     return Dense(ctx.cotangent) if ctx.position == 0 else None
      >>> len(explain(loss, w, batch).fallbacks)
      0
    """
    if not registered or not all(isinstance(p, Primitive) for p in registered):
        raise TypeError(
            "register_rule must be given primitives, got"
            f" {', '.join(map(repr, registered)) or 'none'}. Write @register_rule(primitive) above"
            " the rule."
        )

    def register(rule: UseRule) -> UseRule:
        _RULES.update(dict.fromkeys(registered, rule))
        return rule

    return register


def rule_of(primitive: Primitive) -> UseRule | None:
    """The rule registered for a primitive."""
    return _RULES.get(primitive)


def stacked_vjp(
    equation: JaxprEqn,
    positions: tuple[int, ...],
    batched: tuple[bool, ...],
    operands: tuple[Any, ...],
    cotangents: tuple[Any, ...],
) -> tuple[jax.Array, ...]:
    """Per-example VJPs of one equation with respect to unbatched operands, [B, *shape] each.

    `cotangents` are those of the floating-point outputs.
    """

    def one(operands: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        def run(*chosen: Any) -> tuple[Any, ...]:
            full = list(operands)
            for position, value in zip(positions, chosen, strict=True):
                full[position] = value
            outputs = bind(equation, *full)
            return tuple(x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact))

        _, pull = jax.vjp(run, *(operands[p] for p in positions))
        return pull(cotangents)

    axes = tuple(0 if b else None for b in batched)
    return jax.vmap(one, in_axes=(axes, 0))(operands, cotangents)
