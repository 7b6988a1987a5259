"""The gradient noise scale over time: moving averages of its numerator and denominator apart."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optaxclip._arguments import check_between, narrowed
from optaxclip._compat import varying_axes
from optaxclip._leaves import LeafFn, Tree, named_node
from optaxclip._numerics import accumulator, as_float32
from optaxclip.measure.norms import Norm
from optaxclip.per_example.aggregators.statistics import noise_terms, ratio_of
from optaxclip.per_example.forms.explicit_axes import of_gradients
from optaxclip.per_example.forms.incoming import Incoming, check_like_params, total
from optaxclip.per_example.forms.trees import cast, masked

# The mean gradient is no longer than the root mean square of the examples' norms; rounded to
# bfloat16, no longer than so many times that.
_LONGEST = 1.02


@named_node
class NoiseTerms(NamedTuple):
    """Moving averages of the two estimates, started from zero; arrays [names], float32."""

    names: tuple[str, ...]
    noise: jax.Array
    """Of `tr(S)`, the variance of one example's gradient."""
    signal: jax.Array
    """Of `|G|^2`, G the gradient of all data; an estimate may be negative."""


@named_node
class NoiseState(NamedTuple):
    """State of `watch_noise_scale`."""

    name: str
    weight: jax.Array
    """What the moving average of ones would be; 0 before anything is known, float32."""
    terms: Any
    """`NoiseTerms`; of a tree without leaves one number."""

    @property
    def by_leaf(self) -> dict[str, jax.Array]:
        """The noise scale of each leaf, in examples, as in `noise_scale`; or of `"global"`."""
        if not isinstance(self.terms, NoiseTerms):
            return {}
        weight, noise, signal = jax.tree.leaves(self)  # Flax NNX wraps each array in a node
        ratios = jnp.where(weight > 0, ratio_of(noise, signal), -1)
        return {name: ratios[i] for i, name in enumerate(self.terms.names)}

    @property
    def whole(self) -> dict[str, jax.Array]:
        """`noise_scale`, and what it is the ratio of: `noise` and `signal`."""
        if not isinstance(self.terms, NoiseTerms):
            return {}
        weight, noise, signal = jax.tree.leaves(self)
        known = weight > 0
        noise, signal = (jnp.sum(x) / jnp.where(known, weight, 1) for x in (noise, signal))
        ratio = jnp.where(known, ratio_of(noise, signal), -1)
        return {"noise_scale": ratio, "noise": noise, "signal": signal}

    @property
    def noise_scale(self) -> jax.Array:
        """`tr(S) / |G|^2` of all that is measured, in examples.

        -1 before the first step, the largest float where no gradient shows through the noise.
        """
        return self.whole.get("noise_scale", jnp.full((), -1, jnp.float32))


def watch_noise_scale(
    decay: Any = 0.99,
    *,
    by: Literal["leaf", "global"] = "leaf",
    exclude: LeafFn | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Measures the gradient noise scale `tr(S) / |G|^2` and changes nothing: a batch size to try.

    With n examples, `m = mean |g_b|^2` and `s = |mean g_b|^2`, numerator and denominator are the
    moving averages of `n (m - s) / (n - 1)` and `(n s - m) / (n - 1)`. Of the whole they are sums
    over the leaves.

    Args:
      decay: of the moving averages, in [0, 1).
      by: `"leaf"`, for each leaf and the whole; `"global"`, for the whole alone.
      exclude: `(path, leaf) -> bool`, true for what is not measured. In a transformer the leaves of
        normalisation layers will do, and cost next to nothing.
      name: how `clip_scalars` calls it; None: `"noise"`.

    Returns:
      A gradient transformation with a `NoiseState`. It goes in front of `clip_per_example` and the
      like, or of any optimizer if `update` is given `example_norms`, [B]: of the leaves measured,
      the norm of each example's gradient, where updates are the mean over these examples.

    Raises:
      ValueError: params missing; a single example; updates that are shaped like neither;
        `example_norms` with `by="leaf"`; inside `jax.shard_map`, a mean of one device's examples.

    Edge cases:
      | NaN, infinity in an example | it is left out; with `example_norms` the step is |
      | `example_norms` too small for such a mean | NaN: updates are a sum, or of other examples |
      | gradients clipped before | the noise scale of the clipped ones |
      | around `optax.MultiSteps` | of each micro-batch; with `example_norms` never inside it |
      | per-example gradients inside `jax.shard_map` | estimates of each device are averaged |

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.watch_noise_scale(by="global"), optax.sgd(0.1))
      >>> params, grads = jnp.zeros(2), jnp.array([2.0, 1.0])  # the mean of [3, 0] and [1, 2]
      >>> norms = jnp.array([3.0, 5.0**0.5])
      >>> _, state = tx.update(grads, tx.init(params), params, example_norms=norms)
      >>> print(round(optaxclip.clip_scalars(state)["noise/noise_scale"], 3))
      1.333

    Source: arXiv 1812.06162, appendix A.1; normalisation layers: arXiv 2411.00999.
    """
    check_between(decay, "decay", 0, 1, last=False)
    average = narrowed(_Average(decay))
    if by not in ("leaf", "global"):
        raise ValueError(f"unknown by, got {by!r}. Use 'leaf' or 'global'.")
    norm = Norm("leaf", exclude=exclude)

    def init_fn(params: Tree) -> NoiseState:
        names = tuple(norm.leaves(params).paths)
        if not names and Norm().leaves(params).paths:
            raise ValueError(
                "something must be measured, got an exclude that is true for every leaf. Leave"
                " some in."
            )
        zero = jnp.zeros((), jnp.float32)
        if not names:
            return NoiseState(name or "noise", zero, zero + 0.0)
        names = names if by == "leaf" else ("global",)
        terms = NoiseTerms(names, *(jnp.zeros(len(names), jnp.float32) for _ in range(2)))
        return NoiseState(name or "noise", zero, terms)

    def update_fn(
        updates: Tree, state: NoiseState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, NoiseState]:
        if params is None:
            raise ValueError(
                "the noise scale needs params, which tell the gradients of examples from their"
                " mean, got None. Call tx.update(grads, state, params)."
            )
        if not isinstance(state.terms, NoiseTerms):
            return updates, state
        now = tuple(norm.leaves(params).paths)
        if by == "leaf" and now != state.terms.names:
            then = state.terms.names
            differing = (k for k in (*now, *then) if k not in now or k not in then)
            raise ValueError(
                f"params must have the leaves that init saw, got {len(now)} for {len(then)}, and"
                f" {next(differing, 'their order')} differs. Call init with the tree the gradient"
                " is taken for."
            )
        example_norms = extra_args.get("example_norms")
        if example_norms is None:
            terms, known = _of_examples(updates, params, norm)
        elif by == "leaf":
            raise ValueError(
                "example_norms are of all leaves together, got them for by='leaf'. Pass"
                " by='global', or per-example gradients."
            )
        else:
            terms, known = _of_norms(jnp.asarray(example_norms), updates, params, norm)
        noise, signal = terms[0]
        if by == "global":
            noise, signal = (jnp.sum(x, keepdims=True) for x in (noise, signal))
        before = state.weight, state.terms.noise, state.terms.signal
        weight, noise, signal = map(average.moved, before, (1.0, noise, signal), (known,) * 3)
        return updates, NoiseState(state.name, weight, NoiseTerms(state.terms.names, noise, signal))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Average:
    decay: Any

    def moved(self, before: jax.Array, now: Any, known: jax.Array) -> jax.Array:
        return jnp.where(known, self.decay * before + (1 - self.decay) * now, before)


@of_gradients
def _of_examples(grads: Tree, params: Tree, norm: Norm) -> tuple[jax.Array, jax.Array]:
    """The two terms of each leaf, [1, 2, leaves], and whether there were examples enough.

    The first axis is there so that a mesh does not take them for numbers of the examples.
    """
    incoming = Incoming.of(grads, params)
    _check_several(incoming.size)
    positions = norm.leaves(incoming.like).positions
    forms = [incoming.forms[i] for i in positions]
    if any(jnp.issubdtype(form.dtype, jnp.complexfloating) for form in forms):
        raise ValueError(
            "per-example gradients must be real, got complex ones. Pass their mean and"
            " example_norms, with by='global'."
        )
    forms = [cast(form, accumulator(form.dtype)) for form in forms]
    squares = [form.sq_norm() for form in forms]
    finite = jnp.isfinite(total(squares, incoming.size))
    number = jnp.sum(finite, dtype=jnp.float32)
    n = jnp.maximum(number, 2)
    share = finite / n
    m = [jnp.sum(jnp.where(finite, as_float32(x), 0)) / n for x in squares]
    means = [masked(form, finite).weighted_sum(share.astype(form.dtype)) for form in forms]
    s = [_sq_length(mean) for mean in means]
    noise, signal = noise_terms(jnp.stack(m), jnp.stack(s), n)
    known = (number >= 2) & jnp.all(jnp.isfinite(noise) & jnp.isfinite(signal))
    if axes := varying_axes(noise):
        devices = lax.psum(known.astype(jnp.float32), axes)
        noise, signal = (
            lax.psum(jnp.where(known, x, 0.0), axes) / jnp.maximum(devices, 1)
            for x in (noise, signal)
        )
        known = devices > 0
    return jnp.stack([noise, signal])[None], known


@of_gradients
def _of_norms(
    norms: jax.Array, mean: Tree, params: Tree, norm: Norm
) -> tuple[jax.Array, jax.Array]:
    """The same of the whole, [1, 2, 1]."""
    check_like_params(mean, params)
    if norms.ndim != 1 or not jnp.issubdtype(norms.dtype, jnp.floating):
        raise ValueError(
            "example_norms must be one real number an example, got"
            f" {norms.dtype}{list(norms.shape)}. Pass what per_example_norms returns."
        )
    leaves = norm.leaves(mean)
    if parts := {axis for x in leaves.arrays for axis in varying_axes(x)}:
        raise ValueError(
            "the mean gradient must be that of all examples, got one that varies over"
            f" {tuple(sorted(parts))}. Reduce it first: jax.lax.pmean(grads, axes)."
        )
    squares, number = jnp.sum(jnp.square(as_float32(norms))), jnp.float32(len(norms))
    if axes := varying_axes(norms):
        squares = lax.psum(squares, axes)
        for axis in axes:
            number = number * lax.axis_size(axis)
    else:
        _check_several(len(norms))
    n = jnp.maximum(number, 2)
    m, s = squares / n, sum(map(_sq_length, leaves.arrays), jnp.zeros((), jnp.float32))
    noise, signal = noise_terms(m, s, n)
    known = (number >= 2) & jnp.isfinite(noise) & jnp.isfinite(signal)
    noise = jnp.where(s > _LONGEST * m, jnp.nan, noise)
    return jnp.stack([noise, signal])[None, :, None], known


def _sq_length(x: jax.Array) -> jax.Array:
    """No product, whose precision would be the default."""
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    squares = [jnp.sum(jnp.square(p.astype(accumulator(p.dtype)))) for p in parts]
    return as_float32(sum(squares[1:], squares[0]))


def _check_several(size: int) -> None:
    if size < 2:
        raise ValueError(
            "the noise scale needs two examples, got one, whose gradient may be all noise. Pass"
            " more."
        )
