"""Which arguments of a loss are differentiated, which hold examples, which are shared."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools.agreement import close, normal, stacked_grads
from tools.quick import quick_jit, run

from optaxclip.per_example import (
    explain,
    materialize,
    per_example_grad,
    per_example_norms,
    per_example_value_and_grad,
    sq_norms,
    weighted_sum,
)

W, V, X, Y = normal(0, 4, 3), normal(1, 3), normal(2, 6, 4), normal(3, 6)


def two_trees(w, x, v, y, scale, *, shift=0.0):
    return (jnp.tanh(scale * (x @ w["w"])) @ v - y + shift) ** 2


TREES = ({"w": W}, X, V, Y, 0.5)


@pytest.mark.parametrize("argnums", [0, 2, (0,), (2, 0), [0, 2]])
def test_argnums_batch_argnums_and_shared_arguments(argnums):
    numbers = tuple(argnums) if isinstance(argnums, list) else argnums

    def both(*args):
        shared = {"shift": jnp.array(0.3)}
        found = per_example_value_and_grad(two_trees, argnums, batch_argnums=(1, 3))
        losses, grads = found(*args, **shared)
        one = lambda *a: jax.value_and_grad(two_trees, numbers)(*a, **shared)
        return (losses, materialize(grads)), jax.vmap(one, (None, 0, None, 0, None))(*args)

    close(*run(both, *TREES), 1e-12)


def test_one_plan_and_one_norm_over_all_arguments():
    options = {"argnums": (0, 2), "batch_argnums": (1, 3)}

    def both(*args):
        grads = per_example_grad(two_trees, **options)(*args, shift=1.0)
        return per_example_norms(two_trees, **options)(*args, shift=1.0), jnp.sqrt(sq_norms(grads))

    close(*run(both, *TREES), 1e-12)
    plan = explain(two_trees, *TREES, shift=1.0, **options)
    assert [row.path for row in plan.rows] == ["0/w", "1"]


def with_aux(w, x):
    y = x @ w
    return jnp.sum(y**2), {"y": y, "top": jnp.argmax(y), "shared": jnp.sum(w), "n": 3}


def test_aux_has_a_leading_axis_of_examples():
    def compute(w, x):
        grads, aux = per_example_grad(with_aux, has_aux=True)(w, x)
        (losses, again), _ = per_example_value_and_grad(with_aux, has_aux=True)(w, x)
        norms, _ = per_example_norms(with_aux, has_aux=True)(w, x)
        oracle = jax.vmap(jax.grad(with_aux, has_aux=True), (None, 0))(w, x)
        return (materialize(grads), aux), (losses, norms, again), oracle

    (grads, aux), (losses, norms, again), (expected, expected_aux) = run(compute, W, X)
    close((grads, aux), (expected, expected_aux), 1e-12)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), aux) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected_aux
    )
    close(losses, np.sum(aux["y"] ** 2, 1), 1e-12)
    close((norms, again["top"]), (np.linalg.norm(expected, axis=(1, 2)), aux["top"]), 1e-12)


def test_aux_adds_no_uses():
    def fun(w, x):
        return jnp.sum(x @ w), jnp.sum(jnp.sin(x) @ w)

    (row,) = explain(fun, W, X, has_aux=True).rows
    assert row.forms == ("Outer([6,1,1,4], [6,1,1,3])",)


def test_batches_of_one_example():
    def batch_loss(w, batch):
        x, y = batch
        logits = x @ w
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(loss), {"logits": logits, "count": x.shape[0]}

    def compute(w, x, labels):
        grad = per_example_grad(batch_loss, has_aux=True, keep_batch_dim=True)
        grads, aux = grad(w, (x, labels))
        one = jax.grad(lambda w, i: batch_loss(w, (x[i], labels[i]))[0])
        return materialize(grads), aux, jnp.stack([one(w, np.s_[i : i + 1]) for i in range(6)])

    grads, aux, expected = run(compute, W, X, np.arange(6) % 3)
    close(grads, expected, 1e-12)
    close(aux["logits"], X @ W, 1e-12)  # not [6, 1, 3]
    assert aux["count"].tolist() == [1] * 6


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_each_example_gets_its_own_key(make_key):
    def loss(w, x, key):
        return jnp.sum(x * jax.random.bernoulli(key, 0.5, x.shape) @ w), key

    def compute(w, x):
        key, found = make_key(0), []
        keys = jax.random.split(key, 6)
        for keep in (False, True):
            options = {"prng_argnum": 2, "has_aux": True, "keep_batch_dim": keep}
            grads, used = per_example_grad(loss, **options)(w, x, key)
            given = x[:, None] if keep else x
            expected, _ = jax.vmap(jax.grad(loss, has_aux=True), (None, 0, 0))(w, given, keys)
            found.append((jnp.all(used == keys), materialize(grads), expected))
        return found

    for same_keys, grads, expected in run(compute, W, X):
        assert same_keys
        close(grads, expected, 1e-12)


def test_leaves_that_do_not_move_have_zero_gradients():
    params = {
        "w": W,
        "steps": np.arange(3),
        "mask": np.array([True, False, True]),
        "unused": np.ones((2, 0)),
        "none": None,
        "number": 2.0,
    }

    def loss(p, x):
        return jnp.sum(jnp.where(p["mask"], x @ p["w"], 0.0) * p["steps"]) ** 2 * p["number"]

    def compute(params, x):
        grads, moving = per_example_grad(loss)(params, x), {k: params[k] for k in ("w", "number")}
        expected = stacked_grads(lambda p, x: loss({**params, **p}, x), moving, x)
        stacked = {k: materialize(grads)[k] for k in moving}
        total = weighted_sum(grads, jnp.ones(6))
        updated = optax.apply_updates(params, total)
        return (stacked, sq_norms(grads)), (expected, sq_norms(expected)), total, updated

    found, expected, total, updated = run(compute, params, X)
    close(found, expected, 1e-12)
    assert not total["mask"].any()
    assert updated["steps"].tolist() == [0, 1, 2]
    assert updated["mask"].tolist() == [True, False, True]
    assert [updated["unused"].shape, updated["none"]] == [(2, 0), None]


def test_keys_among_the_parameters():
    """As `jax.grad` with `allow_int` has it."""
    params = {"w": W, "key": jax.random.key(0)}

    def loss(p, x):
        return jnp.sum(x * jax.random.normal(p["key"], (4,)) @ p["w"])

    @quick_jit
    def both(params):
        total = weighted_sum(per_example_grad(loss)(params, X), jnp.ones(6))
        return total, jax.grad(lambda p: sum(loss(p, x) for x in X), allow_int=True)(params)

    total, alone = both(params)
    assert total["key"].dtype == jax.dtypes.float0
    assert jax.tree.structure(total) == jax.tree.structure(alone)
    close(total["w"], alone["w"], 1e-12)


def test_trees_of_frameworks_are_parameters():
    graph, state = quick_jit(lambda: nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0))))()

    def nnx_loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    make = eqx.filter_jit(lambda key: eqx.nn.MLP(4, 3, 5, 1, key=key))
    moving, static = eqx.partition(make(jax.random.key(0)), eqx.is_array)

    def eqx_loss(moving, x):
        return jnp.sum(eqx.combine(moving, static)(x) ** 2)

    linen = nn.Dense(3)
    variables = quick_jit(linen.init)(jax.random.key(0), X[0])

    def linen_loss(variables, x):
        return jnp.sum(linen.apply(variables, x) ** 2)

    for loss, params in [(nnx_loss, state), (eqx_loss, moving), (linen_loss, variables)]:

        def compute(params, x, loss=loss):
            grads = per_example_grad(loss, strict=True)(params, x)
            total = weighted_sum(grads, jnp.ones(6))
            stacked = materialize(grads), stacked_grads(loss, params, x)
            return stacked, total, optax.apply_updates(params, total)

        stacked, total, updated = run(compute, params, X)
        close(*stacked, 1e-5)
        assert jax.tree.structure(total) == jax.tree.structure(params)
        assert jax.tree.structure(updated) == jax.tree.structure(params)


def test_argument_numbers_are_checked_when_the_function_is_made():
    def make(**options):
        return per_example_grad(two_trees, **options)

    with pytest.raises(ValueError, match="must not overlap, got 1 in argnums and in batch_argnums"):
        make(argnums=(0, 1))
    with pytest.raises(ValueError, match="got 2 in batch_argnums and in prng_argnum"):
        make(batch_argnums=(1, 2), prng_argnum=2)
    with pytest.raises(ValueError, match="got 0 in argnums and in argnums"):
        make(argnums=(0, 0))
    with pytest.raises(ValueError, match="argnums must be >= 0, got -1"):
        make(argnums=-1)
    with pytest.raises(ValueError, match=r"batch_argnums must name an argument, got \(\)"):
        make(batch_argnums=())
    with pytest.raises(TypeError, match="argnums must be an int or a tuple of ints, got 'w'"):
        make(argnums="w")
    with pytest.raises(TypeError, match=r"prng_argnum must be an int, got 1\.5"):
        make(prng_argnum=1.5)


def test_argument_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"batch_argnums must .* got 5 with 2 of them: w, x. Pass"):
        per_example_grad(two_trees, batch_argnums=(1, 5))({"w": W}, X)
    with pytest.raises(ValueError, match=r"got 1 with 1 of them: args\[0\]"):
        per_example_grad(lambda *args: 0.0)(W)
