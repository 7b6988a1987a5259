import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal

from optaxclip.per_example import per_example_grad, sq_norms, weighted_sum

OPS = {
    "add": lambda p, x: p + x,
    "sub": lambda p, x: x - p,
    "mul": lambda p, x: p * x,
    "div": lambda p, x: x / (3 + p),
    "max": jnp.maximum,
    "where": lambda p, x: jnp.where(x > 0, p, x),
    "pow": lambda p, x: jnp.abs(p) ** x,
    "clip": lambda p, x: lax.clamp(-jnp.abs(p), x, jnp.abs(p)),
    "concatenate": lambda p, x: jnp.concatenate([p, x], axis=-1),
}


@pytest.mark.parametrize("shape", [(3, 4), (4,), (1, 4), (3, 1), ()])
@pytest.mark.parametrize("name", OPS)
def test_broadcast_parameter(name, shape):
    def loss(p, x):
        p = jnp.broadcast_to(p, (3, 4))
        return jnp.sum(jnp.sin(OPS[name](p, x)))

    assert_equals_oracle(loss, normal(0, *shape), normal(1, 5, 3, 4))


USES = {
    "scalar": (lambda v, x: x[0] @ v, (4,)),
    "row": (lambda v, x: x[:1] @ v, (4, 3)),
    "column": (lambda v, x: x @ v, (4, 1)),
    "whole": (lambda v, x: x @ v, (4, 3)),
    "data": (lambda v, x: 5 + x[:, 1:], ()),
    "b": (lambda v, x: v, (3, 1)),
}


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide"])
def test_what_a_parameter_is_used_in_is_broadcast(name):
    """Against data, against a parameter, and against another use (a dueling head)."""
    op = getattr(jnp, name)
    pairs = ["scalar data", "row data", "column data", "row b", "column row", "whole column",
             "whole scalar"]  # fmt: skip
    keys = [(pair, kind) for pair in pairs for kind in pair.split() if kind != "data"]

    def loss(p, x):
        y = 0.0
        for pair in pairs:
            for outer in (lambda a, b: jnp.sin(op(a, b)), lambda a, b: jnp.cos(op(b, a))):
                # Anew for each: what goes into one sum alone may be tapped at that sum.
                operands = (USES[kind][0](p.get(f"{pair}: {kind}"), x) for kind in pair.split())
                y += jnp.sum(outer(*operands))
        return y

    params = {f"{p}: {kind}": normal(i, *USES[kind][1]) for i, (p, kind) in enumerate(keys)}
    assert_equals_oracle(loss, params, np.sin(np.arange(60.0).reshape(5, 3, 4)))


def test_a_bias_is_stacked_at_its_own_size():
    plan = assert_equals_oracle(
        lambda b, x: jnp.sum(jnp.sin(x + b)), normal(0, 4), normal(1, 5, 30, 4)
    )
    assert plan.rows[0].forms == ("Dense([5,4])",)


def test_scales_and_biases_hold_no_more_than_the_cotangent():
    """[B, D] each for norms and sums; of [B, T, D] just the cotangent."""

    def clipped(params, x):
        grads = per_example_grad(lambda p, x: jnp.sum(jnp.sin(x * p[0] + p[1])))(params, x)
        return weighted_sum(grads, 1 / jnp.sqrt(sq_norms(grads)))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((128,), (128,), (8, 64, 128))]
    compiled = jax.jit(clipped).lower(shapes[:2], shapes[2]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 8 * 64 * 128 * 4
