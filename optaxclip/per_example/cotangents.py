"""Follow the data: the cotangent of every use of a parameter, by one vmapped backward pass.

One `jax.vjp` with respect to the taps gives every cotangent. That backward pass computes no
weight gradient; a rule makes a form of operands and cotangent at each use.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._compat import as_varying
from optaxclip.per_example.forms import Form, add, zero_like
from optaxclip.per_example.program import Program, Values, evaluate_once
from optaxclip.per_example.walk import Records, Taps, find_forms, run, zero_taps


def value_and_forms(
    program: Program, params: list[Any], batch: list[Any], spmd_axis_name: Any = None
) -> tuple[jax.Array, list[jax.Array], list[Form]]:
    """Per example the loss, [B], the leaves of aux, [B, ...], and the gradient of each parameter.

    `params` and `batch` are the leaves that the program takes, `spmd_axis_name` is `jax.vmap`'s.
    """
    values = dict(program.constants)
    values.update(zip(program.params, params, strict=True))
    evaluate_once(program.block, values)

    (losses, *aux), records, cotangents = _cotangents(program, values, batch, spmd_axis_name)
    found = find_forms(program.block, values, records, cotangents)
    forms = [
        add(found[number]) if number in found else zero_like(parameter, losses.size)
        for number, parameter in zip(program.params, params, strict=True)
    ]
    return losses, aux, forms


def _cotangents(
    program: Program, values: Values, batch: list[Any], spmd_axis_name: Any
) -> tuple[list[jax.Array], Records, Taps]:
    """The outputs, the records and the cotangents of the taps, batched."""
    leaves, structure = jax.tree.flatten(zero_taps(program.block))
    taps = jax.tree.unflatten(structure, as_varying(leaves, like=batch))

    def one(example: list[Any]) -> tuple[list[Any], Records, Taps]:
        def loss_of(taps: Taps) -> tuple[Any, Any]:
            local = {**values, **dict(zip(program.example, example, strict=True))}
            (loss, *aux), records = run(program.block, local, taps)
            return loss, (aux, records)

        loss, pull, (aux, records) = jax.vjp(loss_of, taps, has_aux=True)
        return [loss, *aux], records, pull(jnp.ones_like(loss))[0]

    return jax.vmap(one, spmd_axis_name=spmd_axis_name)(batch)
