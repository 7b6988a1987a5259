"""Programs that break what the engine assumes of an equation are still exact, and say why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from tools.agreement import assert_equals_oracle, close, normal, stacked_grads
from tools.quick import quick_jit

from optaxclip.per_example import explain, reweighted_grad

W, X, XS = normal(0, 4, 4), normal(1, 3, 4), normal(2, 3, 5, 4)
WHOLE = r"vmap\(grad\) of the whole loss, which has "


def whole(loss, params, batch, why):
    """Exact, with all gradients stacked for a reason."""
    paths = [row.path for row in explain(loss, params, batch).rows]
    plan = assert_equals_oracle(loss, params, batch, fallbacks=paths)
    assert all(why in row.fallback for row in plan.rows), str(plan)
    assert "at " in plan.rows[0].fallback


# --- rules that ask what is differentiated ---


def watching_jvp():
    @jax.custom_jvp
    def through(w, h):
        return h * 1.0

    def rule(primals, tangents):
        asked = [type(t) is SymbolicZero for t in tangents]
        if asked[1]:
            return primals[1], jnp.zeros_like(primals[1])
        return primals[1], tangents[1] * (1.0 if asked[0] else 3.0)

    through.defjvp(rule, symbolic_zeros=True)
    return through


def watching_vjp():
    @jax.custom_vjp
    def through(w, h):
        return h * 1.0

    def forward(w, h):
        return h.value, w.perturbed

    def backward(perturbed, g):
        return jnp.zeros_like(W), g * (3.0 if perturbed else 1.0)

    through.defvjp(forward, backward, symbolic_zeros=True)
    return through


WATCHING = {"jvp": watching_jvp, "vjp": watching_vjp}


@pytest.mark.parametrize("kind", WATCHING)
@pytest.mark.parametrize(
    "around",
    [
        lambda f, w, x: f(w, x @ w),
        lambda f, w, x: f(w * 2, x @ w),
        lambda f, w, x: jax.checkpoint(f)(w, x @ w),
        lambda f, w, x: jax.jit(f)(w, x @ w),
        lambda f, w, x: lax.scan(lambda h, _: (f(w, jnp.tanh(h @ w)), None), x, None, length=3)[0],
        lambda f, w, x: lax.cond(x[0] > 0, lambda h: f(w, h), lambda h: h, x @ w),
        lambda f, w, x: f(jnp.concatenate([w, w])[:4], x @ w),
    ],
    ids=["plain", "product", "checkpoint", "jit", "scan", "cond", "joined"],
)
def test_a_rule_that_asks_what_is_differentiated(kind, around):
    through = WATCHING[kind]()
    loss = lambda p, x: jnp.sum(jnp.sin(around(through, p["w"], x)) + p["b"])
    whole(loss, {"w": W, "b": normal(3, 4)}, X, "whose rule asks what is differentiated")


@pytest.mark.parametrize("kind", WATCHING)
def test_such_a_rule_is_told_the_truth_where_no_parameter_goes_in(kind):
    """Of the example it is not differentiated, of a hidden layer it is; nothing is stacked."""
    through = WATCHING[kind]()
    loss = lambda w, x: jnp.sum(jnp.sin(through(x[:, None] * x, through(x[:, None] * x, x @ w))))
    assert_equals_oracle(loss, W, X)
    flat = lambda w, x: jnp.sum(jnp.sin(through(jnp.floor(w), x @ w)))
    assert_equals_oracle(flat, W, X)


# --- references, effects, types that are no arrays ---


def test_references():
    def loss(p, x):
        cell = jax.new_ref(jnp.zeros(4))
        cell[...] += x @ p["w"]
        cell[...] *= 2
        return jnp.sum(jnp.sin(cell[...]))

    whole(loss, {"w": W}, X, "which is no array")


def test_a_reference_in_a_loop():
    def loss(w, x):
        cell = jax.new_ref(x)

        def step(i, carry):
            cell[...] = jnp.tanh(cell[...] @ w)
            return carry

        lax.fori_loop(0, 3, step, 0)
        return jnp.sum(cell[...] ** 2)

    whole(loss, W, X, "which is no array")


def test_a_print_is_no_reason(capsys):
    def loss(w, x):
        jax.debug.print("{}", x[0])
        return jnp.sum(jnp.sin(x @ w))

    assert_equals_oracle(loss, W, X)


# --- backward rules that are not linear ---


@jax.custom_vjp
def limited(w):
    return w


limited.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_vjp
def shifted(h):
    """Adds to its gradient, where there is none too."""
    return 1.0 * h


shifted.defvjp(lambda h: (h, None), lambda _, g: (g + 1.0,))


def solved(w):
    """The solution of `y = w`, by a solver whose transpose clips."""
    clipping = lambda _, g: jnp.clip(g, -0.1, 0.1)
    return lax.custom_linear_solve(lambda y: y, w, lambda _, b: b, clipping)


LOOPS = {
    "scan": lambda f, w, xs: lax.scan(
        lambda h, x: (jnp.tanh(x + h @ f(w)), None), jnp.zeros(4), xs
    )[0],
    "fori_loop": lambda f, w, xs: lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ f(w)), xs[0]),
    "map": lambda f, w, xs: lax.map(lambda x: jnp.tanh(x @ f(w)), xs),
    "checkpointed scan": lambda f, w, xs: lax.scan(
        jax.checkpoint(lambda h, x: (jnp.tanh(x + h @ f(w)), None)), xs[0], xs
    )[0],
    "scan in scan": lambda f, w, xs: lax.scan(
        lambda h, x: (
            lax.scan(lambda g, _: (jnp.tanh(g @ f(w) + x), None), h, None, length=2)[0],
            None,
        ),
        xs[0],
        xs,
    )[0],
    "cond in scan": lambda f, w, xs: lax.scan(
        lambda h, x: (lax.cond(x[0] > 0, lambda: jnp.tanh(h @ f(w)), lambda: h), None), xs[0], xs
    )[0],
    "derived": lambda f, w, xs: lax.map(lambda x: jnp.tanh(x @ (2 * f(3 * w).T)), xs),
}


@pytest.mark.parametrize("rule", [limited, solved], ids=["custom_vjp", "solver"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_rule_that_is_not_linear_stays_in_its_loop(name, rule):
    loss = lambda w, xs: jnp.sum(jnp.sin(LOOPS[name](rule, w, xs)))
    plan = explain(loss, W, XS)
    assert_equals_oracle(loss, W, XS, fallbacks=plan.fallbacks)


def test_a_carry_of_parameters_alone_meets_the_rule_once():
    """In pieces, the rule would meet the cotangent of the carry and of the step apart."""

    def loss(w, xs):
        def step(carry, x):
            v, h = carry
            v = limited(v)
            return (jnp.tanh(v @ v), jnp.tanh(h @ v + x)), None

        return jnp.sum(lax.scan(step, (w, xs[0]), xs)[0][1] ** 2)

    whole(loss, W, XS, "a rule of the user's on carries")


@pytest.mark.parametrize("method", ["one_pass", "two_pass", "vmap", "auto"])
def test_a_loss_is_scaled_only_where_all_rules_are_linear(method):
    """Twice the loss has not twice the gradient here."""
    loss = lambda w, x: jnp.sum(jnp.sin(limited(x @ w) @ w))
    weights = lambda squares: 3 / jnp.sqrt(squares)
    found = quick_jit(reweighted_grad(loss, weights, method=method))(W, X).grads
    stacked = np.asarray(stacked_grads(loss, W, X))
    norms = np.sqrt(np.sum(stacked.reshape(3, -1) ** 2, axis=1))
    close({"w": found}, {"w": np.tensordot(3 / norms, stacked, 1)}, 1e-10)


def test_a_branch_that_is_not_taken_is_not_reached():
    """Its backward pass would be given zeros: NaN times zero, or a rule that adds to zero."""

    def loss(p, x):
        root = lax.cond(x[0] > 0, lambda x: jnp.sqrt(x) * p["s"], lambda x: p["s"], x[0])
        other = lax.cond(x[1] > 0, lambda h: shifted(h), lambda h: 2 * h, x @ p["w"])
        return root + jnp.sum(jnp.sin(other))

    batch = np.abs(X) * np.array([1.0, -1.0, 1.0])[:, None]
    assert_equals_oracle(loss, {"w": W, "s": np.float64(2.0)}, batch)


# --- what a rule receives ---


def test_constants_reach_a_rule_as_arrays_of_jax():
    @jax.custom_vjp
    def own(times, y):
        return y * times[0]

    def backward(saved, g):
        times, y = saved
        return times.at[0].set(jnp.sum(g * y)), g * times[0]

    own.defvjp(lambda t, y: (y * t[0], (t, y)), backward)
    assert_equals_oracle(lambda w, x: jnp.sum(jnp.sin(own(jnp.array([2.0, 3.0]), x @ w))), W, X)
    looped = lambda w, xs: jnp.sum(lax.map(lambda x: own(jnp.array([2.0, 3.0]), x @ w), xs) ** 2)
    assert_equals_oracle(looped, W, XS)


def test_names_of_scopes_and_lines_are_the_users():
    def loss(w, x):
        with jax.named_scope("inside"):
            rows = jnp.take(w, jnp.array([1, 0, 3]), axis=0)
        return jnp.sum(jnp.where(rows > 0, rows, 0.1 * rows) @ jnp.sin(x))

    first = lambda w, x: jnp.sum(jnp.take(w, jnp.array([1, 0, 3]), axis=0) @ jnp.sin(x))
    explain(first, W, X)  # jnp.take is traced here, and its line must not be named below
    lowered = jax.jit(lambda w, x: reweighted_grad(loss, jnp.sqrt)(w, x).grads).lower(W, X)
    assert "inside" in lowered.as_text(debug_info=True)
    why = explain(lambda w, x: jnp.sum(jnp.linalg.norm(jnp.outer(x, x) @ w)), W, X)
    assert "JAX lost" not in str(why)
    norm = lambda w, x: jnp.sum(jnp.sin(x @ (w / jnp.linalg.norm(w))))
    assert "test_assumptions.py" in explain(norm, W, X).rows[0].fallback
