"""What the schedules cost, estimated from shapes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optaxclip.measure.platforms import Rates
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.forms.contractions import toward_zero
from optaxclip.per_example.forms.forms import Form, terms_of_norm
from optaxclip.per_example.schedules.flops import flops, flops_of
from optaxclip.per_example.schedules.microbatches import are_written_out, convolves

Method = Literal["one_pass", "two_pass", "vmap"]

# A stacked gradient is written once and read twice: for its norm and for the sum. So is a total of
# micro-batches: read and written, with the sum of a part.
_TRAVELS = 3
# The pass back takes twice the operations of the pass forward; two passes go back once more, but
# take no weight gradients the first time.
_OF_FORWARD = 3
_SECOND_BACK = 2
# Parts of one example take longer than parts of two. Language models of 4 x 512 tokens: stacked,
# 0.94x a plain gradient and 0.85x on a CPU.
_ALONE = 0.1
# Stacked gradients of kernels are convolutions in groups, one an example. CNNs take, stacked and in
# one pass, 8.5x and 3.7x a plain gradient (v5e) or 2.5x and 2.0x (H100, bytes) by the compilers,
# and 1.1x to 2.8x and 0.3x to 1.3x on a CPU.
_IN_GROUPS = 1


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes and operations of one batch."""

    examples: int
    parameter_bytes: int
    factor_bytes: int
    """Of the forms of all gradients, as `per_example_grad` returns them."""
    stacked_bytes: int
    """Held by the gradients of all examples."""
    residual_bytes: int
    """Held by a plain gradient between its forward and its backward pass."""
    norm_flops: int
    """Of the norms, from the forms."""
    held_by_one: int = 0
    """By one pass: the forms of what cannot be weighed where it is used."""
    held_by_two: int = 0
    """By two passes: the forms of what cannot be measured where it is used."""
    forward_flops: int = 0
    convolves: bool = False
    """Whether few micro-batches are written out, not looped over."""

    @property
    def plain_flops(self) -> int:
        """Of a plain gradient, about."""
        return _OF_FORWARD * self.forward_flops

    @property
    def plain_bytes(self) -> int:
        """Held by a plain gradient."""
        return max(self.parameter_bytes, self.residual_bytes)

    def memory(self, method: Method, parts: int, rates: Rates) -> int:
        """Held by a schedule that takes the batch in so many parts."""
        if not rates.written_out_waits and are_written_out(self.convolves, parts):
            return self._at_once(method, 1) + self.parameter_bytes
        return self._at_once(method, parts)

    def _at_once(self, method: Method, parts: int) -> int:
        """What one of so many parts holds, with the total."""
        held = {"one_pass": self.held_by_one, "vmap": self.stacked_bytes}
        # Parameters are residuals too, and no fewer of them with fewer examples.
        shared = min(self.parameter_bytes, self.residual_bytes)
        of_examples = self.residual_bytes - shared + held.get(method, self.held_by_two)
        total = self.parameter_bytes if parts > 1 else 0
        return shared + total + of_examples // parts

    def work(self, method: Method, parts: int, rates: Rates) -> int:
        """Operations, and bytes as so many operations, beyond those of a plain gradient."""
        moved = self.stacked_bytes if method == "vmap" else 0
        moved += parts * self.parameter_bytes if parts > 1 else 0
        held = max(0, self._at_once(method, parts) - rates.free)  # also where all is kept
        found = rates.moving * _TRAVELS * moved + rates.holding * held
        if parts == self.examples > 1:
            found += int(_ALONE * self.plain_flops)
        if method == "two_pass":
            found += _SECOND_BACK * self.forward_flops
        if method == "vmap" and self.convolves:
            found += _IN_GROUPS * self.forward_flops
        return found + (0 if method == "vmap" else self.norm_flops)

    def fits(self, method: Method, parts: int, rates: Rates, memory: float) -> bool:
        """Whether it holds at most `memory` times what a plain gradient holds, or next to nothing.

        An `int` is bytes.
        """
        held = self.memory(method, parts, rates)
        if isinstance(memory, int):
            return held <= memory
        return held <= max(memory * self.plain_bytes, rates.free, 2 * self.parameter_bytes)


def costs_of(
    call: Call, forms: Sequence[Form], held_by_one: Sequence[Form], held_by_two: Sequence[Form]
) -> Costs:
    """Costs of a call whose per-example gradients are `forms` (shapes will do)."""
    parameter_bytes = bytes_of(call.params)
    forward, residuals = jax.make_jaxpr(_pullback(call), return_shape=True)(call.params, call.batch)
    return Costs(
        examples=call.size,
        parameter_bytes=parameter_bytes,
        factor_bytes=bytes_of(list(forms)),
        stacked_bytes=call.size * parameter_bytes,
        residual_bytes=bytes_of(residuals),
        norm_flops=_norm_flops(forms),
        held_by_one=bytes_of(list(held_by_one)),
        held_by_two=bytes_of(list(held_by_two)),
        forward_flops=flops_of(forward),
        convolves=convolves(forward),
    )


def _norm_flops(forms: Sequence[Form]) -> int:
    """Of all forms; those of one shape are counted once, as models repeat their layers."""
    alike: dict[Any, list[Form]] = {}
    for form in forms:
        leaves, structure = jax.tree.flatten(form)
        types = tuple((x.shape, x.dtype) for x in leaves)
        alike.setdefault((structure, types), []).append(form)
    return sum(len(group) * norm_flops(group[0]) for group in alike.values())


def norm_flops(form: Form) -> int:
    """Operations of the norms of a form, where no terms cancel."""
    return flops(lambda form: terms_of_norm(form), form)


def sum_flops(form: Form, examples: int) -> int:
    """Operations of a weighted sum of a form."""
    return flops(lambda form, c: form.weighted_sum(c), form, jnp.zeros(examples, jnp.float32))


def plain_flops(call: Call) -> int:
    """Operations of the gradient of the summed loss."""
    return flops(jax.grad(total_loss(call)), call.params, call.batch)


def total_loss(call: Call, weights: jax.Array | None = None) -> Callable[..., jax.Array]:
    """`sum_b c_b fun(params, batch_b)`, as a function of params and batch; unweighed if None."""
    each = jax.vmap(
        lambda params, example: call.fun(params, example)[0],
        (None, 0),
        spmd_axis_name=call.spmd_axis_name,
    )

    def total(params: Any, batch: Any) -> jax.Array:
        losses = each(params, batch)
        return jnp.sum(losses if weights is None else toward_zero(weights, losses.dtype) * losses)

    return total


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _pullback(call: Call) -> Callable:
    """A function whose result holds what the backward pass needs."""
    total = total_loss(call)
    return lambda params, batch: jax.vjp(lambda p: total(p, batch), params)[1]
