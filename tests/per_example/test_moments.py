"""`second_moment` against the mean of squares of `vmap(grad)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal, stacked_grads
from tools.quick import run

from optaxclip.per_example import Gathered, Outer, Sum, per_example_grad, second_moment

B = 6


def mlp(p, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) * p["s"])


def over_time(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2)


def lookup(p, ids):
    return jnp.sum(jnp.tanh(p["table"][ids]) ** 2 * jnp.arange(1.0, 5.0)[:, None])


def tied(p, ids):
    h = jnp.tanh(p["table"][ids])
    return jnp.sum(jnp.sin(h @ p["table"].T))


def sliced(p, x):
    return jnp.sum(jnp.sin(x @ p["w"][:, :2])) + jnp.sum(jnp.cos(x[:1] * p["w"][0, 2]))


def conv(p, x):
    kernel = p["w"].reshape(3, 1, 2)
    y = jax.lax.conv_general_dilated(
        x[None, :, None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(jnp.sin(y))


IDS = np.random.default_rng(0).integers(0, 3, (B, 4))  # with repeats
CASES = {
    "one row an example": (mlp, {"w": (4, 3), "b": (3,), "v": (3, 2), "s": ()}, (B, 4)),
    "many rows": (over_time, {"w": (4, 3), "b": (3,)}, (B, 5, 4)),
    "table": (lookup, {"table": (5, 3)}, IDS),
    "tied table": (tied, {"table": (5, 3)}, IDS),
    "slices": (sliced, {"w": (4, 3)}, (B, 4)),
    "convolution": (conv, {"w": (6,)}, (B, 7)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [2**24, 20])
def test_equals_the_mean_of_squares(name, at_once, monkeypatch):
    monkeypatch.setattr("optaxclip.per_example.aggregators.moments._AT_ONCE", at_once)
    fun, shapes, batch = CASES[name]
    params = {k: normal(i, *shape) for i, (k, shape) in enumerate(shapes.items())}
    batch = normal(9, *batch) if isinstance(batch, tuple) else batch

    def moments(params, batch):
        factored, stacked = per_example_grad(fun)(params, batch), stacked_grads(fun, params, batch)
        return stacked, second_moment(factored), second_moment(stacked)

    stacked, *found = run(moments, params, batch)
    expected = jax.tree.map(lambda g: np.mean(g * g, 0), stacked)
    for moment in found:
        close(moment, expected, 1e-10)


def test_the_cases_cover_the_forms():
    def kinds(name):
        fun, shapes, batch = CASES[name]
        params = {k: np.ones(s) for k, s in shapes.items()}
        batch = np.ones(batch) if isinstance(batch, tuple) else batch
        grads = jax.eval_shape(per_example_grad(fun), params, batch)
        return {k: type(g) for k, g in grads.items()}

    assert kinds("one row an example")["w"] is kinds("many rows")["w"] is Outer
    assert kinds("table")["table"] is Gathered
    assert kinds("tied table")["table"] is Sum


@pytest.mark.parametrize(("name", "stacks"), [("one", False), ("many", True)])
def test_memory_is_bounded(name, stacks):
    w, x = np.ones((30, 40)), np.ones((64, 30) if name == "one" else (64, 3, 30))
    grads = jax.eval_shape(per_example_grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), w, x)
    jaxpr = jax.make_jaxpr(second_moment)(grads)
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < 64 * 30 * 40


def test_a_parameter_that_is_not_used_has_zeros():
    params = {"w": np.ones((4, 3)), "b": np.ones(3), "frozen": np.ones((2, 2))}
    fun = lambda p, x: over_time(p, x * jax.lax.stop_gradient(p["frozen"][0, 0]))

    def moments(params, x, y):
        grads = per_example_grad(fun)(params, x)
        unused = per_example_grad(lambda p, x: jnp.sum(x * p["b"]))(params, y)
        return second_moment({**grads, "empty": jnp.zeros((B, 0, 2))}), second_moment(unused)

    found, unused = run(moments, params, normal(0, B, 5, 4), normal(0, B, 3))
    np.testing.assert_array_equal(found["frozen"], np.zeros((2, 2)), strict=True)
    assert found["empty"].shape == (0, 2)
    np.testing.assert_array_equal(unused["w"], np.zeros((4, 3)), strict=True)


def test_low_precision_is_squared_in_float32_and_integers_are_zero():
    """Outside jit, where all else here is inside."""
    grads = {"w": jnp.full((3, 2), 300.0, jnp.float16), "n": jnp.zeros((3, 2), jnp.int32)}
    found = second_moment(grads)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], 90_000.0)
    np.testing.assert_array_equal(found["n"], 0)
