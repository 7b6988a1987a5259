"""tinygp: the marginal likelihood of the series of each example."""

import jax.numpy as jnp
from tinygp import GaussianProcess, kernels
from tools.agreement import normal
from tools.zoo_check import check


def times(examples=3, length=5):
    return jnp.sort(jnp.cumsum(jnp.abs(normal(0, examples, length)) + 0.1, axis=1))


def test_deep_kernel():
    """A network before the kernel."""

    def loss(params, example):
        x, y = example
        features = jnp.tanh(x[:, None] @ params["w"] + params["b"])
        kernel = jnp.exp(params["amplitude"]) * kernels.Matern32(jnp.exp(params["scale"]))
        return -GaussianProcess(kernel, features, diag=0.1).log_probability(y)

    params = {"w": normal(1, 1, 3), "b": normal(2, 3), "amplitude": normal(3), "scale": normal(4)}
    check(loss, params, (times(), normal(5, 3, 5)), clipped=True)


def test_quasiseparable():
    """In linear time, by a scan."""

    def loss(params, example):
        x, y = example
        kernel = kernels.quasisep.SHO(*jnp.exp(params["sho"]))
        gp = GaussianProcess(kernel, x, diag=jnp.exp(params["noise"]), mean=params["mean"])
        return -gp.log_probability(y)

    params = {"sho": normal(1, 3), "noise": normal(3), "mean": normal(4)}
    stacked = {"sho": "exp of the parameter"}
    check(loss, params, (times(), normal(5, 3, 5)), stacked)
