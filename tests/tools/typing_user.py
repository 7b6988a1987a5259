"""A user's program: test_package.py has type checkers read it. It also runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Primitive

import optaxclip
from optaxclip import per_example
from optaxclip.clipping import ClipStats
from optaxclip.per_example import Form, RuleContext
from optaxclip.testing import Behaviour, check_clipper
from optaxclip.thresholds import Threshold

Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum((params["w"] * x) ** 2)


params: Params = {"w": jnp.ones(3)}
batch: jax.Array = jnp.ones((4, 3))

clippers: list[optax.GradientTransformation] = [
    optaxclip.clip_by_global_norm(1.0),
    optaxclip.clip_by(optaxclip.Norm("leaf", ord="rms"), 1.0, "sqrt", name="soft"),
    optaxclip.clip_by_leaf_rms(1.0),
    optaxclip.clip_by_leaf_norm({"w": 1.0}),
    optaxclip.clip_by_group_norm({"a": 1.0}, {"w": "a"}),
    optaxclip.clip_by_unit_norm(1.0, unit_axes=optaxclip.flax_unit_axes),
    optaxclip.clip_by_value(optax.linear_schedule(1.0, 0.1, 100)),
    optaxclip.agc(0.01, exclude=lambda path, leaf: False),
    optaxclip.zclip(),
    optaxclip.adagc(),
    optaxclip.autoclip(95.0),
    optaxclip.spam_clip(),
    optaxclip.error_feedback(optaxclip.soft_clip(1.0)),
    optaxclip.skip_nonfinite(optax.adam(1e-3), max_consecutive=3),
    optaxclip.skip_outliers(optax.adam(1e-3)),
    optaxclip.clip_singular_values(1.0, soft=True),
]
optimizer = optax.chain(clippers[0], optax.adam(1e-3))
opt_state = optimizer.init(params)
grads = jax.grad(loss)(params, batch[0])
updates, opt_state = optimizer.update(grads, opt_state, params)
new_params = optax.apply_updates(params, updates)
optaxclip.raise_if_stuck(opt_state)

stats: dict[str, ClipStats] = optaxclip.clip_stats(opt_state)
rate: jax.Array = stats["clip_by_global_norm"].clip_factor
count: int = int(stats["clip_by_global_norm"].clipped_count)

factored = optaxclip.per_example_grad(loss)(params, batch)
value, same = optaxclip.per_example_value_and_grad(loss)(params, batch)
norms: jax.Array = optaxclip.per_example_norms(loss)(params, batch)
squares: jax.Array = per_example.sq_norms(factored)
mean = per_example.weighted_sum(factored, jnp.full(4, 0.25))
fallbacks = optaxclip.explain(loss, params, batch).fallbacks
aggregate = optaxclip.clip_per_example(optaxclip.thresholds.split_evenly(1.0), by="leaf")
aggregate.update(factored, aggregate.init(params), params)
private = optaxclip.clipped_grad(loss, l2_clip_norm=1.0)
private(params, batch)
sensitivity: float = private.sensitivity()
cross: jax.Array = optaxclip.phuber_cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int))


def rule(ctx: RuleContext, operand: Any, other: Any, **equation: Any) -> Form | None:
    return None


optaxclip.register_rule(Primitive("of_nobody"))(rule)
check: Callable[..., Behaviour] = check_clipper
version: str = optaxclip.__version__


class Double:
    def factor(self, norm: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, 2 * bound / norm)


bounds: Threshold = optaxclip.thresholds.split_by_size(1.0)
optaxclip.clip_by("leaf", bounds, Double())
