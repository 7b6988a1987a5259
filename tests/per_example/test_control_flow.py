"""Loops, branches and checkpoints with parameters in them, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal

from optaxclip.per_example import per_example_grad, weighted_sum

W, V, BIAS = normal(0, 4, 4) / 2, normal(1, 4, 4) / 2, normal(2, 4)
STACK = normal(3, 3, 4, 4) / 2
X, SEQUENCES = normal(9, 5, 4), normal(8, 5, 3, 4)


def rnn(p, xs, **options):
    def step(h, x):
        h = jnp.tanh(h @ p["w"].T + x @ p["v"].astype(jnp.float64) * 2 + p["b"])
        return h, h

    h, ys = lax.scan(step, p.get("h", jnp.zeros(4)), xs, **options)
    return jnp.sum(ys**2) + jnp.sum(h)


@pytest.mark.parametrize("options", [{}, {"reverse": True, "unroll": 2}])
def test_recurrent_weights_join_the_steps_along_t(options):
    def loss(p, xs):
        return rnn(p, xs, **options)

    plan = assert_equals_oracle(loss, {"w": W, "v": V, "b": BIAS, "h": BIAS}, SEQUENCES)
    rows = plan.to_dict()
    assert rows["w"]["forms"] == rows["v"]["forms"] == ("Outer([5,1,3,4], [5,1,3,4])",)


def layer(h, p):
    w = (p["w"].T.reshape(2, 2, 4) * 2).reshape(4, 4)
    return jnp.tanh(h @ w + p["b"]), None


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_layers_stacked_for_a_scan_are_blocks(wrap):
    def loss(p, x):
        return jnp.sum(lax.scan(wrap(layer), x, p)[0] ** 2)

    plan = assert_equals_oracle(loss, {"w": STACK, "b": normal(4, 3, 4)}, SEQUENCES)
    assert plan.to_dict()["w"]["forms"] == ("Outer([5,3,3,4], [5,3,3,4])",)


def test_tables_as_slices_and_as_constants():
    def loss(p, ids):
        def step(h, layer):
            return jnp.tanh(h @ layer["w"] + layer["table"][ids] @ p["shared"].T[:, ids]), None

        return jnp.sum(lax.scan(step, jnp.zeros((3, 3)), p["layers"])[0])

    layers = {"w": normal(0, 2, 3, 3), "table": normal(1, 2, 5, 3)}
    ids = np.array([[0, 1, 1], [2, 3, 0], [1, 1, 1]])
    plan = assert_equals_oracle(loss, {"layers": layers, "shared": normal(2, 5, 3)}, ids)
    rows = plan.to_dict()
    assert rows["layers/table"]["forms"] == ("Gathered([3,6], [3,6,3])",)
    assert rows["shared"]["forms"] == ("Gathered([3,6], [3,6,3])",)


def test_one_block_in_a_loop_and_outside():
    def loss(p, x):
        x = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + p["b"]) * (i + 1), x)
        return jnp.sum(jnp.sin(x @ p["w"]))

    plan = assert_equals_oracle(loss, {"w": W, "b": BIAS}, X)
    assert plan.to_dict()["w"]["forms"] == ("Outer([5,1,4,4], [5,1,4,4])",)


def test_a_carried_parameter_is_stacked_and_no_other():
    def loss(p, x):
        def step(carry, _):
            w, h = carry
            return (w @ w, jnp.tanh(h @ w + p["b"])), w

        (_, h), ws = lax.scan(step, (p["w"], x), length=3)
        return jnp.sum(h**2) + jnp.sum(ws[1] @ x)

    assert_equals_oracle(loss, {"w": W, "b": BIAS}, X, fallbacks=["w"])


def test_a_parameter_carried_unchanged_or_set_at_each_step():
    def loss(p, xs):
        def step(carry, x):
            w, h, _ = carry
            return (w, jnp.tanh(h @ w + x), p["b"]), jnp.sum(h * x)

        (w, h, b), ys = lax.scan(step, (p["w"], p["b"], jnp.zeros(4)), xs)
        return jnp.sum(h @ w) + jnp.sum(ys) + jnp.sum(b * h)

    assert_equals_oracle(loss, {"w": W, "b": BIAS}, SEQUENCES)


def test_known_values_leave_a_scan():
    def loss(p, x):
        h, ys = lax.scan(lambda h, w: (jnp.tanh(h @ w), jnp.sum(w**2)), x, p)
        return jnp.sum(h) * jnp.sum(ys)

    assert_equals_oracle(loss, STACK, X)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_nested_scans(wrap):
    def loss(p, xs):
        @wrap
        def outer(h, layer):
            def inner(g, x):
                return jnp.tanh(g @ layer["w"] + x @ p["v"] + p["b"] + layer["b"]), g

            h, ys = lax.scan(inner, h, xs)
            return h, jnp.sum(ys)

        h, ys = lax.scan(outer, jnp.zeros(4), p["layers"])
        return jnp.sum(h**2) + jnp.sum(ys**2)

    layers = {"w": STACK[:2], "b": normal(4, 2, 4)}
    assert_equals_oracle(loss, {"layers": layers, "v": V, "b": BIAS}, SEQUENCES)


@pytest.mark.parametrize("length", [0, 1])
def test_short_scans(length):
    def loss(p, x):
        h, _ = lax.scan(lambda h, w: (h @ w @ p["w"], None), x, p["stack"])
        return jnp.sum(h @ p["w"] + x)

    params = {"w": W, "stack": STACK[:length]}
    assert_equals_oracle(loss, params, X, may_vanish=length == 0)


def test_a_checkpoint_of_a_scan_and_of_known_values():
    policy = jax.checkpoint_policies.dots_saveable

    def loss(p, xs):
        h = jax.checkpoint(rnn)({**p, "w": p["w"].T}, xs)
        w, h = jax.checkpoint(lambda p: (p["v"].T, h * xs[0] @ p["v"]), policy=policy)(p)
        return jnp.sum(h @ w)

    assert_equals_oracle(loss, {"w": W, "v": V, "b": BIAS}, SEQUENCES)


def blocks(wrap):
    """The temporary memory of clipping a deep network whose blocks have wide activations."""

    def block(x, w):
        up, down = w
        return x + jnp.sin(jnp.cos(jnp.tanh(jnp.sin(jnp.exp(jnp.tanh(x @ up)))))) @ down

    def loss(p, x):
        for w in p:
            x = wrap(block)(x, w)
        return jnp.sum(x**2)

    def clipped(p, x):
        return weighted_sum(per_example_grad(loss)(p, x), jnp.ones(8))

    params = [(jnp.ones((8, 2048)), jnp.ones((2048, 8)))] * 4
    compiled = jax.jit(clipped).lower(params, jnp.ones((8, 16, 8))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_checkpoint_saves_memory():
    assert blocks(jax.checkpoint) < 0.8 * blocks(lambda f: f)


def test_a_branch_chosen_by_the_example():
    def loss(p, x):
        y = lax.cond(x[0] > 0, lambda: jnp.sin(x @ p["w"].T), lambda: jnp.cos(p["v"] @ x))
        z = lax.switch(jnp.argmin(x[:3]), [lambda: y @ p["w"], lambda: y, lambda: p["b"]])
        return jnp.sum(z**2)

    assert_equals_oracle(loss, {"w": W, "v": V, "b": BIAS}, X)


def test_a_known_branch_is_a_choice_and_the_other_may_be_infinite():
    def loss(p, x):
        zero = lax.stop_gradient(p["b"][0]) * 0

        def fine():
            return jnp.sin(x @ p["w"].T) + p["b"]

        def infinite():
            return jnp.sin(x @ (p["v"] / zero))

        one = lax.cond(zero == 0, fine, infinite)
        two = lax.cond(zero == 1, infinite, lambda: p["b"])
        return jnp.sum(one * two)

    assert_equals_oracle(loss, {"w": W, "v": V, "b": BIAS}, X, may_vanish=True)


def test_branches_by_the_number_of_the_layer():
    def loss(p, x):
        def step(carry, w):
            h, i = carry
            even, odd = (lambda h: jnp.tanh(h @ w)), (lambda h: jnp.sin(h @ w.T + p["b"]))
            return (lax.cond(i % 2 == 0, even, odd, h), i + 1), None

        return jnp.sum(lax.scan(step, (x, 0), p["stack"])[0][0])

    assert_equals_oracle(loss, {"stack": STACK, "b": BIAS}, X)


def test_einsum_while_and_cond():
    def loss(p, x):
        steps = lax.while_loop(lambda n: (n < 9) & (jnp.sum(x) * n < 3), lambda n: n + 1, 0)
        scale = lax.while_loop(lambda h: jnp.sum(h) < 3, lambda h: h + 1 + jnp.abs(x), x)
        h = jnp.einsum("i,ij->j", x, p["w"]) * steps + lax.stop_gradient(scale) @ p["w"]
        return jnp.sum(lax.cond(steps > 3, lambda: jnp.sin(h @ p["v"]), lambda: h) ** 2)

    assert_equals_oracle(loss, {"w": W, "v": V}, X)


def test_stopped_gradients_leave_no_trace():
    """A while loop has no reverse derivative: this works because none is asked for."""

    def loss(p, x):
        def target(h):
            return lax.while_loop(lambda h: jnp.sum(h) < 3, lambda h: h + 1 + x @ p["w"] ** 2, h)

        def step(h, _):
            return jnp.tanh(h @ p["v"]), lax.stop_gradient(target(h) @ p["v"])

        h, targets = lax.scan(step, x, length=2)
        return jnp.sum((h - targets[0]) ** 2)

    plan = assert_equals_oracle(loss, {"w": W, "v": V}, X, may_vanish=True)
    assert plan.to_dict()["w"]["bytes"] == 0
    assert plan.to_dict()["v"]["forms"] == ("Outer([5,1,2,4], [5,1,2,4])",)


def test_effects_stay_where_they_are():
    seen = []

    def loss(p, x):
        def step(h, w):
            jax.debug.callback(lambda n: seen.append(float(n)), jnp.sum(w))
            return jnp.tanh(h @ w), None

        return jnp.sum(lax.scan(step, x, p)[0])

    assert_equals_oracle(loss, STACK, X)
    jax.effects_barrier()
    assert {round(n, 6) for n in seen} == {round(float(np.sum(w)), 6) for w in STACK}
