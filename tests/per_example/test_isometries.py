"""Forms that go back through code without the example, and stay factored."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from tools.agreement import assert_equals_oracle, normal

from optaxclip.per_example import per_example_norms

X = np.sin(np.arange(60.0).reshape(5, 3, 4))
IDS = np.array([[0, 1, 5, 6, 6], [2, 2, 4, 5, 0]])
LAYERS = {"a": np.zeros((4, 4)), "b": np.zeros(4), "c": np.zeros((4, 3))}


def total(y):
    return jnp.sum(jnp.sin(y))


def flat(v, x):
    a, b, c = v[:16].reshape(4, 4), v[16:20], v[20:32].reshape(4, 3)
    return total(jnp.sin(x @ a + b) @ c)


def ravelled(v, x):
    p = ravel_pytree(LAYERS)[1](v)
    return total(jnp.sin(x @ p["a"] + p["b"]) @ p["c"])


# A parameter of one shape, or several; its loss; how many forms each has.
PARTS = {
    "layers of a stack": (
        (3, 4, 4),
        lambda w, x: total(jnp.sin(jnp.sin(x @ w[0]) @ w[1]) @ w[0]),
        2,
    ),
    "layers by a constant index": (
        (3, 4, 4),
        lambda w, x: total(x @ lax.dynamic_slice(w, (7, 0, 0), (1, 4, 4))[0]),
        1,
    ),
    "unstacked": ((2, 4, 4), lambda w, x: sum(total(k * x @ p) for k, p in enumerate(w, 1)), 2),
    "overlapping": ((4, 4), lambda w, x: total(x @ w[:, :3]) + total(x @ w[:, 1:]), 2),
    "overlapping across": ((4, 4), lambda w, x: total(x[:, :3] @ w[:3]) + total(x @ w[:, 1:]), 2),
    "cut from one vector": ((32,), flat, 3),
    "ravelled": ((32,), ravelled, 3),
    "split": ((4, 6), lambda w, x: sum(total(x @ p) for p in jnp.split(w, 3, axis=1)), 3),
    "every other": ((4, 5), lambda w, x: total(x @ w[:, ::2]) + total(x @ w[:, 1::2]), 2),
    "reversed": ((4, 4), lambda w, x: total(x @ w[::-1, ::2]) + total(x @ w), 2),
    "a slice of a slice": ((9, 4), lambda w, x: total(x @ w[1:][::-1][::2]), 1),
    "biases of a stack": ((3, 4), lambda w, x: total(x + w[0]) + total(x * w[2]), 2),
    "reshaped outside the part": (
        (3, 4, 4),
        lambda w, x: total(x @ w.reshape(3, 16)[1].reshape(4, 4)),
        1,
    ),
    "rows of a part of a table": (
        (9, 2),
        lambda w, x: total(w[1:8][(9 * x[:, 0]).astype(int)]),
        None,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_parameter_stay_apart(name):
    shape, loss, forms = PARTS[name]
    plan = assert_equals_oracle(loss, normal(0, *shape), X)
    if forms is not None:
        assert len(plan.rows[0].forms) == forms
        assert all(f.startswith("Outer") for f in plan.rows[0].forms)


JOINS = {
    "columns": ([(4, 2), (4, 3)], lambda p, x: total(x @ jnp.concatenate(p, 1))),
    "rows": ([(3, 2), (1, 2)], lambda p, x: total(x @ jnp.concatenate(p, 0))),
    "stacked": (
        [(4, 2), (4, 2)],
        lambda p, x: total(jnp.einsum("tn,nkm->ktm", x, jnp.stack(p, 1))),
    ),
    "padded": ([(2, 2)], lambda p, x: total(x @ jnp.pad(p[0], ((1, 1), (0, 2))))),
    "a part, cut": ([(3, 4), (3, 4)], lambda p, x: total(x @ jnp.concatenate(p)[1:5])),
    "a pad, cut": ([(4, 4)], lambda p, x: total(x @ jnp.concatenate([p[0][1:], p[0][:1]]))),
}


@pytest.mark.parametrize("name", JOINS)
def test_parameters_joined_into_one(name):
    shapes, loss = JOINS[name]
    plan = assert_equals_oracle(loss, [normal(i, *s) for i, s in enumerate(shapes)], X)
    assert all(f.startswith("Outer") for row in plan.rows for f in row.forms)


def test_tables_joined_into_one():
    tables = [normal(0, 4, 2), normal(1, 3, 2)]
    plan = assert_equals_oracle(lambda p, ids: total(jnp.concatenate(p)[ids]), tables, IDS)
    assert all(row.forms == ("Gathered([2,5], [2,5,2])",) for row in plan.rows)


ARITHMETIC = {
    "merged LoRA": (
        {"w": (4, 3), "a": (4, 2), "b": (2, 3)},
        lambda p, x: total(x @ (p["w"] + 2 * p["a"] @ p["b"])),
    ),
    "difference": ({"a": (4, 3), "b": (4, 3)}, lambda p, x: total(x @ (p["a"] - p["b"]))),
    "symmetric": ({"w": (4, 3)}, lambda p, x: total(p["w"] @ p["w"].T @ x[0])),
    "product of more axes": (
        {"a": (4, 3), "b": (3, 2, 5)},
        lambda p, x: total(jnp.einsum("ta,ahk->htk", x, jnp.einsum("ar,rhk->ahk", p["a"], p["b"]))),
    ),
    "scaled": ({"w": (4, 3)}, lambda p, x: total(x @ (p["w"] * 2.0 / jnp.sqrt(3)))),
    "scalar": ({"w": ()}, lambda p, x: total(x * p["w"])),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_of_parameters(name):
    shapes, loss = ARITHMETIC[name]
    assert_equals_oracle(loss, {n: normal(i, *s) for i, (n, s) in enumerate(shapes.items())}, X)


OPERATIONS = {"add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "div": jnp.divide}
BROADCAST = {"scalar": (), "row": (1, 3), "column": (4, 1)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_parameter_is_broadcast_against_another(name):
    """On either side, with one operand broadcast or both."""
    op = OPERATIONS[name]
    sides = {f"{side} {shape}": s for side in "lr" for shape, s in BROADCAST.items()}
    shapes = {**{f"w {k}": (4, 3) for k in sides}, **sides, "outer r": (1, 3), "outer c": (4, 1)}

    def loss(p, x):
        y = total(x @ op(p["outer r"], p["outer c"]))
        for k in sides:
            pair = (p[k], p[f"w {k}"]) if k[0] == "l" else (p[f"w {k}"], p[k])
            y += total(x @ op(*pair))
        return y

    params = {k: 1 + normal(i, *s) ** 2 for i, (k, s) in enumerate(shapes.items())}
    exact = name in ("mul", "div")
    plan = assert_equals_oracle(loss, params, X, fallbacks=shapes if exact else ())
    if not exact:
        assert all(r.forms[0].startswith("Outer") for r in plan.rows if r.path.startswith("w "))


def test_what_a_broadcast_parameter_adds_up_is_never_stacked():
    """A scalar that is added to a matrix: the gradients of the matrix are not kept."""

    def norms(p, x):
        return per_example_norms(lambda p, x: total(x @ (p["w"] + p["s"])))(p, x)

    p, x = {"w": jnp.ones((400, 500)), "s": jnp.ones(())}, jnp.ones((800, 400))
    jaxpr = jax.make_jaxpr(norms)(p, x)
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < 800 * 400 * 500


STACKED = {
    "masked": ((4, 3), lambda w, x: total(x @ (w * (jnp.arange(12.0).reshape(4, 3) % 2)))),
    "normalised": ((4, 3), lambda w, x: total(x @ (w / jnp.linalg.norm(w)))),
    "a pad inside": (
        (2, 3),
        lambda w, x: total(x[:, 1:] @ lax.pad(w, 0.0, [(0, 0, 1), (0, 0, 0)])),
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_what_has_no_factored_form_is_stacked_and_reported(name):
    shape, loss = STACKED[name]
    assert_equals_oracle(loss, normal(0, *shape), X, fallbacks=["the root"])


# --- what parameters go through before they meet the example ---

IDENTITIES = {
    "optimization_barrier": lax.optimization_barrier,
    "checkpoint_name": lambda w: jax.ad_checkpoint.checkpoint_name(w, "w"),
    "device_put": jax.device_put,
    "reduce_precision": lambda w: lax.reduce_precision(w, 11, 52),
    "rows": lambda w: w[jnp.array([3, 1, 1, 0, 2])],
    "columns": lambda w: w[:, jnp.array([2, 0, 1])],
    "take": lambda w: jnp.take(w, jnp.arange(5) - 1, axis=0),
    "a row overwritten": lambda w: w.at[0].set(0.0),
    "columns overwritten": lambda w: w.at[:, jnp.array([0, 2])].set(1.0),
    "a vector of rows": lambda w: w * jnp.arange(1.0, 6.0)[:, None],
    "a vector of columns": lambda w: w * jnp.arange(1.0, 4.0),
    "divided by a vector": lambda w: w / jnp.arange(1.0, 4.0),
    "a row mask": lambda w: w * (jnp.arange(5) > 1)[:, None],
}


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one row", "three rows"])
@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_leave_gradients_factored(name, rows):
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ IDENTITIES[name](p["w"]) @ IDENTITIES[name](p["w"]).T) ** 2)

    plan = assert_equals_oracle(loss, {"w": normal(0, 5, 3)}, normal(1, 4, *rows, 5))
    assert "Dense" not in str(plan.rows[0].forms)


def test_embeddings_with_a_row_overwritten():
    ids = np.random.default_rng(0).integers(0, 6, (4, 5))
    loss = lambda t, ids: jnp.sum(jnp.tanh(t.at[0].set(0.0)[ids] @ t.at[0].set(0.0).T))
    plan = assert_equals_oracle(loss, normal(0, 6, 3), ids)
    assert "Dense" not in str(plan.rows[0].forms)


PENALTIES = {
    "L2": lambda p: 0.1 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p)),
    "L1": lambda p: sum(jnp.sum(jnp.abs(w)) for w in jax.tree.leaves(p)),
    "spectral": lambda p: jnp.linalg.norm(p["a"] @ p["b"]),
}


@pytest.mark.parametrize("combine", [jnp.add, jnp.multiply], ids=["added", "multiplied"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_term_of_the_parameters_alone_is_one_gradient(name, combine):
    params = {"a": normal(0, 5, 4), "b": normal(1, 4, 3), "unused": normal(2, 2)}

    def loss(p, x):
        return combine(jnp.sum(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])), PENALTIES[name](p))

    plan = assert_equals_oracle(loss, params, normal(3, 4, 5), may_vanish=name == "spectral")
    assert any("Shared" in form for row in plan.rows for form in row.forms)
    assert not any("Dense" in form for row in plan.rows for form in row.forms)


def test_parameters_that_meet_constants_first():
    """A zero initial state, learned queries: the constant is like data that all examples share."""
    params = {"w": normal(0, 6, 6), "v": normal(1, 3, 6), "q": normal(2, 2, 6)}

    def recurrent(p, x):
        h = jnp.zeros(6)
        for t in range(4):
            h = jnp.tanh(h @ p["w"] + x[t] @ p["v"])
        return jnp.sum(h**2 * p["q"][0])

    def queries(p, x):
        keys = x @ p["v"]
        return jnp.sum(jax.nn.softmax((p["q"] @ p["w"]) @ keys.T) @ keys)

    for loss in (recurrent, queries):
        assert_equals_oracle(loss, params, normal(3, 5, 4, 3))
