"""What may hold the examples, what may hold the parameters, and where gradients may go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from tools.agreement import normal
from tools.quick import run

import optaxclip
from optaxclip.per_example import clipped_grad, explain, per_example_grad, per_example_norms

P = {"w": normal(0, 6, 2), "b": normal(1, 2)}


def loss(p, x):
    return jnp.sum((x @ p["w"] + p["b"]) ** 2)


def rows():
    return np.where(normal(2, 12, 1, 6) > 0.5, normal(3, 12, 1, 6), 0.0)


SPARSE = {
    "BCOO": lambda x: sparse.BCOO.fromdense(x, n_batch=1),
    "BCSR": lambda x: sparse.BCSR.fromdense(x, n_batch=1),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_a_batch_of_sparse_rows(kind):
    batch, dense = SPARSE[kind](jnp.asarray(rows())), rows()
    expected = run(per_example_norms(loss), P, dense)
    np.testing.assert_allclose(per_example_norms(loss)(P, batch), expected, rtol=1e-10)
    grad = clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)
    for ours, theirs in zip(
        jax.tree.leaves(grad(P, batch)), jax.tree.leaves(grad(P, dense)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)
    assert explain(loss, P, batch).rows[1].uses == 1  # seen through, not given up


def test_a_sparse_matrix_without_a_batch_axis():
    with pytest.raises(ValueError, match=r"n_batch=0|Batch axis sizes must agree"):
        per_example_norms(loss)(P, sparse.BCOO.fromdense(jnp.asarray(rows()[:, 0])))


# --- frozen parts ---

BODY = {"body": normal(4, 6, 4), "head": normal(5, 4, 2)}


def deep(p, x):
    return jnp.sum((jnp.tanh(x @ p["body"]) @ p["head"]) ** 2)


def trained():
    return optax.chain(optaxclip.clip_per_example(1.0), optax.sgd(1.0))


WRAPPERS = {
    "partition": lambda: optax.partition(
        {"train": trained(), "freeze": optax.set_to_zero()}, {"body": "freeze", "head": "train"}
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"train": trained(), "freeze": optax.set_to_zero()}, {"body": "freeze", "head": "train"}
    ),
    "masked": lambda: optax.masked(trained(), {"body": False, "head": True}),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_frozen_part_is_not_handed_gradients_of_examples(name, stacked):
    tx, batch = WRAPPERS[name](), normal(6, 5, 6)
    if stacked:
        grads = jax.vmap(jax.grad(deep), (None, 0))(BODY, batch)
    else:
        grads = per_example_grad(deep)(BODY, batch)
    message = (
        r"as a whole, got body set aside by optax.masked.*Differentiate the trained part alone"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(BODY), BODY)


def test_the_trained_part_alone_and_clipping_in_front():
    batch, frozen = normal(6, 5, 6), {"body": BODY["body"]}
    head = {"head": BODY["head"]}
    tx = trained()
    grads = per_example_grad(lambda p, x: deep({**frozen, **p}, x))(head, batch)
    alone, _ = tx.update(grads, tx.init(head), head)
    assert jax.tree.map(jnp.shape, alone) == {"head": (4, 2)}
    parts = {"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}
    rest = optax.partition(parts, {"body": "freeze", "head": "train"})
    tx = optax.chain(optaxclip.clip_per_example(1.0), rest)
    updates, _ = tx.update(per_example_grad(deep)(BODY, batch), tx.init(BODY), BODY)
    np.testing.assert_array_equal(updates["body"], np.zeros((6, 4)))
    assert np.any(updates["head"])


def test_a_module_given_whole():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(6, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"parameters must be arrays, got .*eqx\.partition\(model"):
        per_example_norms(lambda m, x: jnp.sum(m(x)))(model, normal(7, 3, 6))
