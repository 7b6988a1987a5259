"""Trees of per-example gradients are checked before anything is summed."""

import jax.numpy as jnp
import pytest
from tools.agreement import assert_equals_oracle, normal

from optaxclip.per_example import inner, masked, norms, per_example_grad, sq_norms, weighted_sum

KINDS = ("factored", "stacked")


def grads(kind):
    if kind == "stacked":
        return {"a": jnp.ones((8, 2)), "b": jnp.ones((8, 3))}
    return per_example_grad(lambda w, x: jnp.sum(x @ w))(jnp.ones((3, 2)), jnp.ones((8, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (1,), (8, 1)])
def test_one_entry_per_example(kind, shape):
    got = rf"must have one entry per example, got shape \({', '.join(map(str, shape))},?\) for 8"
    with pytest.raises(ValueError, match=f"weights {got} examples. Pass an array of shape"):
        weighted_sum(grads(kind), jnp.ones(shape))
    with pytest.raises(ValueError, match=f"keep {got} examples. Pass an array of booleans"):
        masked(grads(kind), jnp.ones(shape, bool))


@pytest.mark.parametrize(
    "fun",
    [sq_norms, norms, lambda g: inner(g, g), lambda g: weighted_sum(g, jnp.ones(8)),
     lambda g: masked(g, jnp.ones(8, bool))],
)  # fmt: skip
def test_one_number_of_examples(fun):
    """One row would broadcast."""
    with pytest.raises(ValueError, match=r"got shape \(1, 3\) at b and \(8, 2\) at a"):
        fun({"a": jnp.ones((8, 2)), "b": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="at least one leaf, got none"):
        fun({})


def test_products_are_of_one_batch():
    with pytest.raises(ValueError, match="must have one number of examples, got 8 and 1"):
        inner(jnp.ones((8, 2)), jnp.ones((1, 2)))


def test_product_with_a_penalty_of_the_parameter():
    """What all examples share, on both sides, beside what each has of its own."""

    def loss(b, x):
        return jnp.sum(jnp.sin(x + b)) + jnp.sum(b**2)

    assert_equals_oracle(loss, normal(0, 3), normal(1, 4, 3))
