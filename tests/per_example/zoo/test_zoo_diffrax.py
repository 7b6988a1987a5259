"""Diffrax: neural ODEs, controlled and stochastic ones, a continuous normalizing flow.

Its default adjoint is a rule that asks what is differentiated, with parameters among its inputs:
such a loss is differentiated by `vmap(grad)` as a whole.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from tools.agreement import normal
from tools.zoo_check import check, key, trainable

from optaxclip.per_example import explain

ASKS = "custom_vjp_call, whose rule asks what is differentiated"


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, size=2, out=None):
        self.mlp = eqx.nn.MLP(size, out or size, 5, 1, activation=jax.nn.softplus, key=key(0))

    def __call__(self, t, y, args):
        return self.mlp(y)


def fit(solve, data, stacked=None, field=None, **kwargs):
    """`solve(field, x)` against targets, in mean squared error."""
    params, static = trainable(field or Field())
    shape = jax.eval_shape(lambda x: solve(field or Field(), x), data[0]).shape

    def loss(params, example):
        x, target = example
        return jnp.mean((solve(eqx.combine(params, static), x) - target) ** 2)

    return check(loss, params, (data, normal(7, len(data), *shape)), stacked, **kwargs)


def test_neural_ode():
    """As in the documentation: with the default adjoint."""

    def solve(field, y0):
        saveat = dfx.SaveAt(ts=jnp.linspace(0.0, 1.0, 4))
        term = dfx.ODETerm(field)
        return dfx.diffeqsolve(term, dfx.Euler(), 0.0, 1.0, 0.25, y0, saveat=saveat).ys

    fit(solve, normal(1, 3, 2), ASKS)


def test_direct_adjoint():
    """With a controller of the step size: examples take different numbers of steps."""

    def solve(field, y0):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field), dfx.Heun(), 0.0, 1.0, 0.5, y0,
            stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-4),
            adjoint=dfx.DirectAdjoint(), max_steps=16,
        )  # fmt: skip
        return solution.ys

    fit(solve, normal(1, 3, 2))


def test_backsolve_adjoint():
    def loss(field, y0):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field), dfx.Euler(), 0.0, 1.0, 0.25, y0, adjoint=dfx.BacksolveAdjoint()
        )
        return jnp.sum(solution.ys**2)

    params, static = trainable(Field())
    plan = explain(lambda p, x: loss(eqx.combine(p, static), x), params, normal(1, 3, 2))
    for row in plan.rows:
        assert "the whole loss" in row.fallback
        assert ASKS in row.fallback


def test_continuous_normalizing_flow():
    """The log-density by the exact trace of the Jacobian, forward through the ODE."""

    def solve(field, y):
        def augmented(t, state, args):
            y, _ = state
            dy, pull = jax.vjp(lambda y: field(t, y, args), y)
            (jacobian,) = jax.vmap(pull)(jnp.eye(2))
            return dy, jnp.trace(jacobian)

        solution = dfx.diffeqsolve(
            dfx.ODETerm(augmented), dfx.Euler(), 1.0, 0.0, -0.25, (y, 0.0),
            adjoint=dfx.DirectAdjoint(), max_steps=8,
        )  # fmt: skip
        (y,), (change,) = solution.ys
        return change + jax.scipy.stats.norm.logpdf(y).sum()

    fit(solve, normal(1, 3, 2))


def test_neural_sde():
    """Each example has a Brownian path of its own."""

    class Fields(eqx.Module):
        drift: Field
        diffusion: Field

    def solve(fields, x):
        def diffusion(t, y, args):
            return jnp.diag(jnp.tanh(fields.diffusion(t, y, args)))

        own = jax.random.fold_in(key(0), x[2].astype(int))
        path = dfx.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), own)
        terms = dfx.MultiTerm(dfx.ODETerm(fields.drift), dfx.ControlTerm(diffusion, path))
        solution = dfx.diffeqsolve(
            terms, dfx.Euler(), 0.0, 1.0, 0.25, x[:2],
            adjoint=dfx.DirectAdjoint(), max_steps=8,
        )  # fmt: skip
        return solution.ys

    fit(solve, normal(1, 3, 3) * 9, field=Fields(Field(), Field()))


def test_neural_controlled_equation():
    def solve(field, xs):
        path = dfx.LinearInterpolation(jnp.arange(5.0), xs)
        control = lambda t, y, args: field(t, y, args).reshape(3, 2)
        term = dfx.ControlTerm(control, path).to_ode()
        solution = dfx.diffeqsolve(
            term, dfx.Euler(), 0.0, 4.0, 1.0, jnp.zeros(3),
            adjoint=dfx.DirectAdjoint(), max_steps=8,
        )  # fmt: skip
        return solution.ys

    fit(solve, normal(1, 3, 5, 2), field=Field(3, 6), clipped=True)
