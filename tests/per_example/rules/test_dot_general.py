import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from tools.agreement import assert_equals_oracle, normal
from tools.exploring import examples
from tools.quick import run

from optaxclip.per_example import per_example_grad, sq_norms, weighted_sum


@st.composite
def products(draw):
    """Shapes and dimension numbers of a product, every axis in any position."""
    counts = [draw(st.integers(0, 2)) for _ in range(4)]
    batch, contract, free_lhs, free_rhs = (
        [draw(st.integers(1, 4)) for _ in range(n)] for n in counts
    )

    def side(free):
        sizes = batch + contract + free
        order = draw(st.permutations(range(len(sizes))))
        at = {axis: place for place, axis in enumerate(order)}
        numbers = range(len(sizes))
        return (
            tuple(sizes[a] for a in order),
            tuple(at[a] for a in numbers if len(batch) <= a < len(batch) + len(contract)),
            tuple(at[a] for a in numbers if a < len(batch)),
        )

    lhs, contract_lhs, batch_lhs = side(free_lhs)
    rhs, contract_rhs, batch_rhs = side(free_rhs)
    return lhs, rhs, ((contract_lhs, contract_rhs), (batch_lhs, batch_rhs))


@examples(12)
@given(products(), st.booleans())
def test_every_dimension_number_and_both_sides(product, weight_is_lhs):
    lhs, rhs, numbers = product
    if not weight_is_lhs:
        weight, data = normal(0, *rhs), normal(1, 3, *lhs)
    else:
        weight, data = normal(0, *lhs), normal(1, 3, *rhs)

    def loss(w, x):
        sides = (w, x) if weight_is_lhs else (x, w)
        return jnp.sum(jnp.sin(lax.dot_general(*sides, numbers)))

    assert_equals_oracle(loss, weight, data)


@pytest.mark.parametrize(
    ("shape", "method"),
    [((9,), "rank one"), ((3, 9), "gram"), ((20, 9), "instantiate")],
)
def test_norm_method_is_the_cheapest(shape, method):
    *t, i = shape
    plan = assert_equals_oracle(
        lambda w, x: jnp.sum(jnp.tanh(x @ w)), normal(0, i, 7), normal(1, 4, *t, i)
    )
    assert plan.rows[0].norm_methods == (method,)


def test_16_bit_operands_are_added_in_float32():
    """2000 equal terms: adding them in bfloat16 stops at 256."""

    def compute(w, x):
        grads = per_example_grad(lambda w, x: jnp.sum(x @ w, dtype=jnp.float32))(w, x)
        return sq_norms(grads), weighted_sum(grads, jnp.ones(2, jnp.float32))

    norms, total = run(compute, np.ones((1, 1), jnp.bfloat16), np.ones((2, 2000, 1), jnp.bfloat16))
    np.testing.assert_allclose(norms, 2000.0**2)
    assert total.dtype == jnp.bfloat16
    np.testing.assert_allclose(total.astype(np.float32), 4000.0, rtol=2**-8)
