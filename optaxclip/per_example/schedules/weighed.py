"""Weighted sums of per-example gradients, `sum_b c_b g_b`, by one schedule or another.

The weights of a group of parameters depend on the squared norms of its gradients.

* `one_pass`: gradients are measured and weighed where the parameter is used, as far as the weights
  follow from what is seen there (`Seen.alone`); all others are held as forms.
* `two_pass`: norms come out of a backward pass that sums nothing; a second one, from the same
  forward pass if all parameters are weighed alike, sums.
* `vmap`: gradients are stacked.

Examples that are left out, because their gradient is not finite, are masked where gradients are
held. Where they are not there is nothing to mask, and zero times NaN is NaN: if there is such an
example, a branch, which a run without NaN never takes, sums again with another example in its
place, of weight zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optaxclip._leaves import Tree
from optaxclip._numerics import accumulator, added, wider
from optaxclip.per_example.engine.arguments import Call
from optaxclip.per_example.engine.assumptions import UnseenError
from optaxclip.per_example.forms.contractions import einsum
from optaxclip.per_example.forms.forms import Form
from optaxclip.per_example.forms.trees import cast, masked
from optaxclip.per_example.schedules.costs import Method, total_loss
from optaxclip.per_example.schedules.factored import Factored, Seen, reason_of, stacked
from optaxclip.per_example.schedules.microbatches import accumulated

Arrays = dict[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class Weighing:
    """Which parameters are weighed together, and how."""

    groups: Sequence[int]
    """The group of each parameter."""
    weights: Callable[..., jax.Array]
    """`(group, squared norms [B]) -> [B]`; of a group with rows also `(group, [B], row)`."""
    padding: jax.Array | None = None
    """Examples that count as zero, [B]."""
    nan_safe: bool = False
    """Whether examples with a gradient that is not finite count as zero."""
    dtype: Any = None
    """Of the sums, if wider than the parameters'."""
    rows: frozenset[int] = frozenset()
    """Groups of one parameter each of which every slice along the first axis has its own norm."""

    def of(self, group: int, squares: jax.Array, row: Any = None) -> jax.Array:
        """Weights; zero for examples that do not count."""
        found = self.weights(group, squares, *(() if row is None else (row,)))
        found = lax.stop_gradient(found)
        if self.nan_safe:
            found = jnp.where(jnp.isfinite(squares), found, 0)
        return found if self.padding is None else jnp.where(_along(self.padding, found), 0, found)

    def keep(self, squares: Arrays) -> jax.Array | None:
        """Which examples count, [B]; None: all do, whatever they hold."""
        keep = None if self.padding is None else ~self.padding
        for x in squares.values() if self.nan_safe else ():
            finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
            keep = finite if keep is None else keep & finite
        return keep

    def wide(self, dtype: Any) -> Any:
        """What sums of gradients of a dtype are taken in."""
        wide = accumulator(dtype)
        return wide if self.dtype is None else wider(wide, self.dtype)


class Weighed(NamedTuple):
    """What comes of one batch."""

    sums: list[jax.Array]
    """Of each parameter, in a dtype that is wide enough to go on adding."""
    losses: jax.Array
    """[B]."""
    aux: Tree
    """[B, ...]."""
    squares: Arrays
    """Squared norms by group: [B], of groups with rows perhaps [B, rows]."""


def weighed(call: Call, seen: Seen | UnseenError, method: Method, how: Weighing) -> Weighed:
    """The sums, by a schedule; where the loss cannot be seen through, from stacked gradients."""
    if not isinstance(seen, Seen):
        return from_forms(stacked(call, reason_of(seen)), how)
    if method == "vmap":
        return from_forms(stacked(call), how)
    if method == "two_pass" and not how.rows:
        return _two_passes(call, seen, how)
    spots = seen.alone(how.groups, _wide(call, how), how.rows)
    if not spots.spots:
        return from_forms(seen.factored(call), how)

    def run(call: Call, how: Weighing) -> Weighed:
        found = seen.measured(call, spots, how.of)
        squares, sums = _of_forms(found.forms, how)
        sums = {**found.sums, **sums}
        return Weighed(_listed(sums, how), found.losses, found.aux, {**found.squares, **squares})

    return _without_nan(run(call, how), lambda call, squares, how: run(call, how).sums, call, how)


def from_forms(found: Factored, how: Weighing) -> Weighed:
    """From gradients that are all there."""
    squares, sums = _of_forms(dict(enumerate(found.forms)), how)
    return Weighed(_listed(sums, how), found.losses, found.aux, squares)


def _two_passes(call: Call, seen: Seen, how: Weighing) -> Weighed:
    if len(set(how.groups)) == 1 and seen.linear and not seen.chooses:
        return _two_passes_back(call, seen, how)
    spots = seen.spots(how.groups)
    found = seen.measured(call, spots)
    squares = _squares(found.forms, how, found.squares)
    of_wide = {k: spot for k, spot in spots.spots.items() if k in _wide(call, how)}
    wide = seen.together(dataclasses.replace(spots, spots=of_wide))

    def sums_of(call: Call, squares: Arrays, how: Weighing) -> list[jax.Array]:
        weights = {group: how.of(group, x) for group, x in squares.items()}
        again = seen.measured(call, wide, lambda group, x, row: weights[group], norms=False)
        held = {k: _sum(form, weights[how.groups[k]], how) for k, form in again.forms.items()}
        return _listed({**again.sums, **held}, how)

    result = Weighed(sums_of(call, squares, how), found.losses, found.aux, squares)
    return _without_nan(result, sums_of, call, how)


def _two_passes_back(call: Call, seen: Seen, how: Weighing) -> Weighed:
    """From one pass forward: the sums are the gradient of the loss reweighted."""
    squares: Arrays = {}

    def weights(found: Arrays, forms: dict[int, Form]) -> jax.Array:
        squares.update(_squares(forms, how, found))
        ((group, total),) = squares.items()
        return how.of(group, total)

    losses, aux, sums = seen.norms_then_sum(call, seen.spots(how.groups), weights)

    def sums_of(call: Call, squares: Arrays, how: Weighing) -> list[jax.Array]:
        ((group, total),) = squares.items()
        sums = jax.grad(total_loss(call, how.of(group, total)))(call.params, call.batch)
        return _listed(dict(enumerate(sums)), how)

    result = Weighed(_listed(dict(enumerate(sums)), how), losses, aux, squares)
    return _without_nan(result, sums_of, call, how)


def _without_nan(
    found: Weighed,
    sums_of: Callable[[Call, Arrays, Weighing], list[jax.Array]],
    call: Call,
    how: Weighing,
) -> Weighed:
    """What was found, with sums taken again if an example spoilt them that should be left out."""
    keep = how.keep(found.squares)
    if keep is None:
        return found
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in found.squares.values()])

    def part(given: tuple[list[jax.Array], jax.Array, Arrays]) -> tuple[list[jax.Array], Tree]:
        batch, dropped, squares = given
        some = dataclasses.replace(call, batch=batch)
        return sums_of(some, squares, dataclasses.replace(how, padding=dropped)), ()

    def again() -> list[jax.Array]:
        places = jnp.where(keep, jnp.arange(call.size), jnp.argmax(keep))
        swapped = [x[places] for x in call.batch]
        # A part at a time: the room of a branch is set aside also where it is not taken.
        size = next(call.size // n for n in (4, 2, 1) if call.size % n == 0)
        sums, _ = accumulated(jax.jit(part), (swapped, ~keep, found.squares), size, rare=True)
        return [jnp.where(jnp.any(keep), x, 0) for x in sums]

    return found._replace(sums=lax.cond(jnp.all(finite), lambda: found.sums, again))


def _of_forms(forms: dict[int, Form], how: Weighing) -> tuple[Arrays, Arrays]:
    """Squared norms by group and sums by position."""
    squares = _squares(forms, how, {})
    keep = how.keep(squares)
    weights = {group: how.of(group, x) for group, x in squares.items()}
    if keep is not None:
        forms = {k: masked(form, keep) for k, form in forms.items()}
        weights = {group: jnp.where(_along(keep, c), c, 0) for group, c in weights.items()}
    return squares, {k: _sum(form, weights[how.groups[k]], how) for k, form in forms.items()}


def _squares(forms: dict[int, Form], how: Weighing, seen: Arrays) -> Arrays:
    """Squared norms by group, with what was seen of them on the spot."""
    squares = dict(seen)
    for k, form in forms.items():
        group = how.groups[k]
        if group in how.rows:
            stacked = form.materialize()
            flat = stacked.reshape(*stacked.shape[:2], -1)
            squares[group] = einsum("bln,bln->bl", flat, flat)
        else:
            square = form.sq_norm()
            squares[group] = added([squares[group], square]) if group in squares else square
    return squares


def _sum(form: Form, weights: jax.Array, how: Weighing) -> jax.Array:
    dtype = how.wide(form.dtype)
    if weights.ndim == 1:
        return cast(form, dtype).weighted_sum(weights)
    flat = form.materialize().reshape(*weights.shape, -1)
    return einsum("bl,bln->ln", weights, flat).reshape(form.shape).astype(dtype)


def _wide(call: Call, how: Weighing) -> set[int]:
    """The parameters of which a sum in their own dtype is wide enough, as AD makes no other."""
    return {k for k, p in enumerate(call.params) if how.wide(p.dtype) == p.dtype}


def _listed(sums: Arrays, how: Weighing) -> list[jax.Array]:
    return [sums[k].astype(how.wide(sums[k].dtype)) for k in range(len(sums))]


def _along(of_examples: jax.Array, x: jax.Array) -> jax.Array:
    """[B] as [B, 1] if `x` has rows."""
    return of_examples.reshape(-1, *(1,) * (x.ndim - 1))
