"""What the schedules cost, estimated from shapes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.forms.forms import Form, terms_of_norm
from optaxclip.per_example.schedules.flops import flops

Method = Literal["one_pass", "two_pass", "vmap"]

# A stacked gradient is written once and read twice: for its norm and for the sum.
_TRAVELS = 3
# Operations that take as long as moving one byte. Measured on 2 CPU cores, time over that of the
# plain gradient, one pass | vmap: MLP B=256 0.9 | 54; LM B=32 T=64 0.75 | 0.87; B=16 T=128 0.78 |
# 0.75; B=8 T=256 0.86 | 0.71; B=2 T=512 0.93 | 0.71; CNN B=64 1.25 | 1.26. With 10 the estimate
# takes the faster one in each.
_FLOPS_PER_BYTE = 10
# Batches that hold less than this are taken whole.
_WORTH_CUTTING = 2**24
# How much more than a plain backward pass one pass may hold.
_TOO_MUCH = 2


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes and operations of one batch."""

    parameter_bytes: int
    factor_bytes: int
    """Held by the forms."""
    stacked_bytes: int
    """Held by the gradients of all examples."""
    residual_bytes: int
    """Held by a plain gradient between its forward and its backward pass."""
    norm_flops: int
    """Of the norms, from the forms."""
    held_bytes: int = 0
    """Held by two passes: the forms of what cannot be measured where it is used."""

    @property
    def method(self) -> Method:
        """The schedule to take: the faster, or if that holds too much, the one that holds less.

        A plain gradient's work is common to both. What one pass adds are the norms of the forms,
        what stacking adds is moving B gradients.
        """
        held: dict[Method, int] = {"one_pass": self.factor_bytes, "vmap": self.stacked_bytes}
        moving = _TRAVELS * _FLOPS_PER_BYTE * self.stacked_bytes
        faster: Method = "vmap" if moving < self.norm_flops else "one_pass"
        return min(held, key=held.__getitem__) if held[faster] > self._most else faster

    @property
    def whole(self) -> Method:
        """The schedule for a batch that is not to be cut.

        Two passes go back twice: 1.8 times the cycles of a plain gradient, by the TPU compiler, of
        a language model. So they are taken where all else holds too much.
        """
        held = self.factor_bytes if self.method == "one_pass" else self.stacked_bytes
        return "two_pass" if held > self._most and self.held_bytes < held else self.method

    @property
    def _most(self) -> int:
        return _TOO_MUCH * (self.parameter_bytes + self.residual_bytes)

    def parts(self, times: int = 1) -> int:
        """Into how many micro-batches to cut a batch of `times` as many examples.

        In two, or more if that brings what is held down to what a plain gradient holds. Measured
        on 2 CPU cores, time (and memory) over those of the plain gradient, whole and in two: LM
        B=32 T=64 0.91 (1.05), 0.83 (0.53); CNN B=64 1.03 (1.9), 0.78 (1.0); LSTM B=64 1.43 (1.4),
        1.10 (0.8). Each part adds a sum like the parameters to a total, so that large parameters
        are not worth it.
        """
        held = times * (self.factor_bytes if self.method == "one_pass" else self.stacked_bytes)
        # Parameters are residuals too, and no more of them with more examples.
        shared = min(self.parameter_bytes, self.residual_bytes)
        plain = shared + times * (self.residual_bytes - shared)
        if held + plain < max(_WORTH_CUTTING, 8 * self.parameter_bytes):
            return 1
        return max(2, math.ceil(held / max(plain, 1)))


def costs_of(call: Call, forms: Sequence[Form], held: Sequence[Form] = ()) -> Costs:
    """Costs of a call whose per-example gradients are `forms` (shapes will do).

    Two passes hold those in `held`.
    """
    parameter_bytes = bytes_of(call.params)
    return Costs(
        parameter_bytes=parameter_bytes,
        factor_bytes=bytes_of(list(forms)),
        stacked_bytes=call.size * parameter_bytes,
        residual_bytes=bytes_of(jax.eval_shape(_pullback(call), call.params, call.batch)),
        norm_flops=_norm_flops(forms),
        held_bytes=bytes_of(list(held)),
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


def total_loss(call: Call, weights: jax.Array | float = 1.0) -> Callable[..., jax.Array]:
    """`sum_b c_b fun(params, batch_b)`, as a function of params and batch."""
    each = jax.vmap(
        lambda params, example: call.fun(params, example)[0],
        (None, 0),
        spmd_axis_name=call.spmd_axis_name,
    )
    return lambda params, batch: jnp.sum(weights * each(params, batch))


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _pullback(call: Call) -> Callable:
    """A function whose result holds what the backward pass needs."""
    total = total_loss(call)
    return lambda params, batch: jax.vjp(lambda p: total(p, batch), params)[1]
