"""The gradients of one call: factored, or by `vmap(grad)` where the loss cannot be seen through."""

from typing import NamedTuple

import jax

from optaxclip._leaves import Tree
from optaxclip.per_example import rules as rules
from optaxclip.per_example.arguments import Call
from optaxclip.per_example.assumptions import UnseenError
from optaxclip.per_example.cotangents import value_and_forms
from optaxclip.per_example.flatten import trace
from optaxclip.per_example.forms import Dense, Form
from optaxclip.per_example.uses import users


class Factored(NamedTuple):
    """What comes of one call."""

    losses: jax.Array
    """[B]."""
    aux: Tree
    """[B, ...]."""
    forms: list[Form]
    """The gradients of each array of `call.params`."""
    uses: list[int]
    """In how many equations each meets the example; 0 where that was not seen."""
    linear: bool
    """Whether the gradient of a loss scaled by `c` is known to be `c` times the gradient."""


def factored(call: Call) -> Factored:
    """Follow the data; where `assumptions` do not hold, stack."""
    try:
        program, aux_tree = trace(call.fun, call.params, call.example)
    except UnseenError as error:
        return stacked(call, f"vmap(grad) of the whole loss, which has {error}")
    losses, aux, forms = value_and_forms(program, call.params, call.batch, call.spmd_axis_name)
    reached = users(program.block)
    uses = [len(reached[number]) for number in program.params]
    return Factored(losses, jax.tree.unflatten(aux_tree, aux), forms, uses, program.linear)


def stacked(call: Call, reason: str = "") -> Factored:
    """By `vmap(grad)`, with the parameters differentiated."""
    each = jax.vmap(
        jax.value_and_grad(call.fun, has_aux=True), (None, 0), spmd_axis_name=call.spmd_axis_name
    )
    (losses, aux), grads = each(call.params, call.batch)
    return Factored(losses, aux, [Dense(g, reason) for g in grads], [0] * len(grads), False)
