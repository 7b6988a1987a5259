"""The compiled searches behind `measures`: over directions, points and noises."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._leaves import Tree
from optaxclip._numerics import maximum_of
from optaxclip.robustness.inputs import Bounds
from optaxclip.robustness.perturbations import (
    directions,
    flat,
    in_ball,
    in_batches,
    is_right,
    larger,
    lengths,
    normal,
    steepest,
)


class SensitivityStats(NamedTuple):
    """What `input_sensitivity` found; float64 where the outputs are, else float32."""

    largest: jax.Array
    """Over all examples and directions, ascended ones included."""
    mean: jax.Array
    """Over all examples and random directions."""
    by_example: jax.Array
    """The largest of each example, [B]."""


@functools.partial(jax.jit, static_argnums=0)
def sensitivity(
    static: tuple, params: Tree, x: jax.Array, radius: Any, key: jax.Array
) -> SensitivityStats:
    """`input_sensitivity` in one program."""
    fun, norm, samples, steps, batch_size = static

    def of_batch(x: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        base, tries = flat(fun(params, x)), jnp.arange(samples)

        def change(direction: jax.Array) -> tuple[jax.Array, jax.Array, Callable]:
            """Of the outputs, the quotients, and how the outputs' cotangents come back."""
            moved = x + (radius * direction).astype(x.dtype)
            outputs, pull = jax.vjp(lambda x: flat(fun(params, x)), moved)
            # By what was moved and not by the radius: x + d rounds.
            quotient = lengths(outputs - base, norm) / lengths(flat(moved - x), norm)
            return outputs - base, quotient.astype(base.dtype), pull

        def at_random(carry: Any, number: jax.Array) -> tuple[Any, None]:
            total, reach = carry
            outputs, quotient, _ = change(directions(keys, number, x, norm))
            return (total + quotient, jnp.maximum(reach, jnp.abs(outputs))), None

        def ascent(carry: jax.Array, start: Any) -> tuple[jax.Array, None]:
            number, target = start

            def step(state: tuple, _: None) -> tuple[tuple, None]:
                direction, best = state
                outputs, quotient, pull = change(direction)
                best = larger(best, quotient)
                if norm == 2:
                    weights = outputs
                else:
                    signs = jnp.where(outputs < 0, -1, 1).astype(outputs.dtype)
                    weights = signs * jax.nn.one_hot(target, base.shape[1], dtype=outputs.dtype)
                (slope,) = pull(weights)
                return (steepest(slope, norm, direction), best), None

            start = (directions(keys, number, x, norm), carry)
            (direction, best), _ = jax.lax.scan(step, start, length=steps)
            return larger(best, change(direction)[1]), None

        zeros = jnp.zeros(len(x), base.dtype)
        (total, reach), _ = jax.lax.scan(at_random, (zeros, jnp.zeros_like(base)), tries)
        order = jnp.argsort(-reach, axis=1)[:, tries % base.shape[1]].T  # [samples, B]
        best, _ = jax.lax.scan(ascent, zeros, (tries, order))
        return best, total / samples

    keys = jax.random.split(key, len(x))
    best, mean = in_batches(of_batch, batch_size, x, keys)
    return SensitivityStats(maximum_of(best), jnp.mean(mean), best)


@functools.partial(jax.jit, static_argnums=0)
def survives(
    static: tuple,
    params: Tree,
    x: jax.Array,
    y: jax.Array,
    radius: Any,
    step_size: Any,
    keys: jax.Array,
    box: Bounds,
) -> jax.Array:
    """Whether each example is right at every point of every restart, [B]; the first starts at x."""
    fun, norm, steps, restarts, batch_size = static

    def inside(point: jax.Array, x: jax.Array) -> jax.Array:
        change = point - x
        if norm == 2:
            length = lengths(flat(change), norm)
            factor = jnp.where(length > radius, radius / length, 1).astype(x.dtype)
            change *= factor.reshape(-1, *[1] * (x.ndim - 1))
        else:
            change = jnp.clip(change, -radius, radius).astype(x.dtype)
        return x + change if box is None else jnp.clip(x + change, *box)

    def surplus(point: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = fun(params, point)
        label = jax.nn.one_hot(y, logits.shape[1], dtype=bool)
        others = jax.nn.logsumexp(jnp.where(label, -jnp.inf, logits), axis=1)
        return jnp.sum(others - jnp.sum(jnp.where(label, logits, 0), axis=1)), logits

    def of_batch(x: jax.Array, y: jax.Array, keys: jax.Array) -> jax.Array:
        def restart(right: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            random = in_ball(keys, number, x, norm)
            start = inside(x + (radius * random).astype(x.dtype), x)

            def step(carry: tuple, _: None) -> tuple[tuple, None]:
                point, right = carry
                slope, logits = jax.grad(surplus, has_aux=True)(point, y)
                right &= is_right(logits, y)
                along = steepest(slope, norm, jnp.zeros_like(slope))
                return (inside(point + (step_size * along).astype(x.dtype), x), right), None

            first = (jnp.where(number == 0, x, start), right)
            (point, right), _ = jax.lax.scan(step, first, length=steps)
            return right & is_right(fun(params, point), y), None

        return jax.lax.scan(restart, jnp.ones(len(x), bool), jnp.arange(restarts))[0]

    return in_batches(of_batch, batch_size, x, y, keys)


@functools.partial(jax.jit, static_argnums=0)
def noisy(
    static: tuple,
    params: Tree,
    x: jax.Array,
    y: jax.Array,
    sigmas: jax.Array,
    key: jax.Array,
    box: Bounds,
) -> jax.Array:
    """`noise_accuracy` in one program: [sigmas]."""
    fun, samples, batch_size = static

    def of_batch(x: jax.Array, y: jax.Array, keys: jax.Array) -> jax.Array:
        def sample(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            noise = normal(keys, number, x)

            def accuracy(sigma: jax.Array) -> jax.Array:
                noisy = x + sigma * noise
                return is_right(fun(params, noisy if box is None else jnp.clip(noisy, *box)), y)

            return total + jax.lax.map(accuracy, sigmas), None

        zeros = jnp.zeros((len(sigmas), len(x)), jnp.float32)
        return (jax.lax.scan(sample, zeros, jnp.arange(samples))[0] / samples).T

    keys = jax.random.split(key, len(x))
    return jnp.mean(in_batches(of_batch, batch_size, x, y, keys), axis=0)
