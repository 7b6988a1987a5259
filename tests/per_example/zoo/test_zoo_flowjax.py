"""FlowJAX: the log-density of an example under a normalizing flow."""

import equinox as eqx
import jax.numpy as jnp
import paramax
from flowjax import bijections, flows
from flowjax.distributions import Normal
from tools.agreement import normal
from tools.zoo_check import check, key


def base():
    return Normal(jnp.zeros(3))


def fit(flow, stacked=None, **kwargs):
    """As `flowjax.train.fit_to_data` does."""
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable)
    )

    def loss(params, x):
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    return check(loss, params, normal(1, 3, 3), stacked, **kwargs)


def test_coupling():
    flow = flows.coupling_flow(key(0), base_dist=base(), flow_layers=2, nn_width=5, nn_depth=1)
    fit(flow, clipped=True)


def test_masked_autoregressive_splines():
    """A masked weight is stacked."""
    flow = flows.masked_autoregressive_flow(
        key(0),
        base_dist=base(),
        transformer=bijections.RationalQuadraticSpline(knots=4, interval=3),
        flow_layers=2,
        nn_width=5,
        nn_depth=1,
    )
    fit(flow, {"/weight/args/1": "select_n of the parameter"})


def test_planar():
    fit(
        flows.planar_flow(key(0), base_dist=base(), flow_layers=2, invert=False, negative_slope=0.1)
    )


def test_block_neural_autoregressive():
    """Masked, and of unit rows."""
    flow = flows.block_neural_autoregressive_flow(
        key(0), base_dist=base(), nn_block_dim=3, flow_layers=1
    )
    stacked = {
        "weight/weight/args/0": "reduce_sum of the parameter",
        "weight/scale/args/0": "div of the parameter",
    }
    fit(flow, stacked)


def test_triangular_splines():
    """Knots are looked up one by one, of widths that add up."""
    flow = flows.triangular_spline_flow(key(0), base_dist=base(), flow_layers=1, knots=4)
    stacked = {
        "x_pos/arr": "no exact factored form for gather",
        "y_pos/arr": "reduce_sum of the parameter",
        "derivatives/args/0": "no exact factored form for gather",
        "triangular/weight/args/0": "cond of the parameter",
        "triangular/scale/args/0": "div of the parameter",
    }
    fit(flow, stacked)
