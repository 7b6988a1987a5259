"""Lineax and Optimistix: linear solves, least squares, root finding inside a loss.

Optimistix differentiates a solution by a rule that asks what is differentiated: where the function
closes over parameters, the loss is differentiated by `vmap(grad)` as a whole; where parameters meet
the example before, nothing is stacked.
"""

import jax.numpy as jnp
import lineax as lx
import optimistix as optx
import pytest
from tools.agreement import normal
from tools.zoo_check import check

ASKS = "custom_jvp_call, whose rule asks what is differentiated"


def parameters():
    return {"w": normal(1, 3, 3) / 4, "b": normal(2, 3)}


@pytest.mark.parametrize(
    "solver", [lx.LU(), lx.QR(), lx.CG(rtol=1e-12, atol=1e-12)], ids=["LU", "QR", "CG"]
)
def test_linear_solve(solver):
    """A ridge regression of each example, whose features are learned."""

    def loss(params, x):
        features = jnp.tanh(x @ params["w"] + params["b"])
        gram = features.T @ features + jnp.eye(3)
        operator = lx.MatrixLinearOperator(gram, lx.positive_semidefinite_tag)
        solution = lx.linear_solve(operator, features.T @ x[:, 0], solver)
        return jnp.sum(jnp.sin(solution.value))

    check(loss, parameters(), normal(0, 3, 4, 3))


def test_solve_with_parameters_alone():
    """The matrix is a parameter, the right-hand side is not."""

    def loss(params, x):
        operator = lx.MatrixLinearOperator(params["w"] + 2 * jnp.eye(3))
        return jnp.sum(jnp.sin(lx.linear_solve(operator, x + params["b"]).value))

    check(loss, parameters(), normal(0, 3, 3), {"w": "no exact factored form for linear_solve"})


def test_deep_equilibrium():
    """The fixed point of a layer."""

    def loss(params, x):
        layer = lambda y, args: jnp.tanh(params["w"] @ y + params["b"] + args)
        solver = optx.Newton(rtol=1e-12, atol=1e-12)
        solution = optx.fixed_point(layer, solver, jnp.zeros(3), args=x, max_steps=20)
        return jnp.sum(solution.value**2)

    check(loss, parameters(), normal(0, 3, 3), ASKS)


def test_root_of_features():
    """The right-hand side and the start are of the example, and so is what is solved for."""

    def loss(params, x):
        target = jnp.tanh(params["w"] @ x + params["b"])
        equation = lambda y, args: y + y**3 - args
        solver = optx.Newton(rtol=1e-12, atol=1e-12)
        return jnp.sum(optx.root_find(equation, solver, x, args=target, max_steps=30).value)

    check(loss, parameters(), normal(0, 3, 3), clipped=True)


def test_least_squares():
    """The curve fitted to each example, whose features are learned."""

    def loss(params, x):
        features = jnp.tanh(x @ params["w"] + params["b"])
        residual = lambda y, args: jnp.concatenate([args @ y - x[:, 0], y + 0.1 * y**2])
        solver = optx.GaussNewton(rtol=1e-12, atol=1e-12)
        fitted = optx.least_squares(residual, solver, jnp.zeros(3), args=features, max_steps=256)
        return jnp.sum(fitted.value**2)

    check(loss, parameters(), normal(0, 3, 4, 3))
