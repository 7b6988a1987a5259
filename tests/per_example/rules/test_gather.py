import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal

from optaxclip.per_example import Gathered, per_example_grad

IDS = np.array([[0, 2, 2, 5], [1, 1, 1, 1], [3, 0, 4, 3]])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_along_any_axis_with_repeated_ids(axis):
    shape = [3, 4, 2]
    shape[axis] = 6
    plan = assert_equals_oracle(
        lambda t, ids: jnp.sum(jnp.sin(jnp.take(t, ids, axis=axis))), normal(0, *shape), IDS
    )
    assert plan.rows[0].norm_methods == ("segment sum",)


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap", None])
def test_out_of_bounds_ids(mode):
    ids = np.array([[0, 9, 9], [-1, 2, -20], [3, 5, 6]])

    def loss(t, ids):
        rows = jnp.take(t, ids, axis=0, mode=mode, fill_value=0.5)
        return jnp.sum(jnp.sin(rows) * jnp.arange(1.0, 4.0)[:, None])

    assert_equals_oracle(loss, normal(0, 6, 2), ids)


@pytest.mark.parametrize("where", [(0,), (slice(None), 0)])
def test_one_row_by_a_traced_index(where):
    def loss(t, ids):
        return jnp.sum(jnp.sin(t[(*where[:-1], ids[0])]) * ids[1])

    ids = np.array([[0, 1], [-1, 2], [9, 3]])
    assert_equals_oracle(loss, normal(0, 6, 5), ids)


def test_two_dimensional_ids_and_uint8():
    ids = IDS.reshape(3, 2, 2).astype(np.uint8)
    assert_equals_oracle(lambda t, ids: jnp.sum(jnp.sin(t[ids])), normal(0, 6, 2), ids)


def test_a_table_is_never_stacked():
    ids = np.arange(64).reshape(2, 32)
    grad = per_example_grad(lambda t, ids: jnp.sum(jnp.sin(t[ids])))
    grads = jax.eval_shape(grad, normal(0, 100, 3), ids)
    assert isinstance(grads, Gathered)
    assert grads.right.shape == (2, 32, 3)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_elements_by_two_indices(mode):
    def loss(t, ids):
        found = t.at[ids[:2], :, ids[2:]].get(mode=mode, fill_value=0.5)
        return jnp.sum(jnp.sin(found) * jnp.arange(1.0, 3.0)[:, None])

    plan = assert_equals_oracle(loss, normal(0, 5, 2, 4), IDS)
    assert plan.rows[0].forms == ("Gathered([3,2], [3,2,2])",)


def test_one_row_at_a_time_under_vmap():
    def loss(t, ids):
        return jnp.sum(jnp.sin(jax.vmap(lambda i: t[i])(ids)))

    assert_equals_oracle(loss, normal(0, 6, 2), IDS)


def test_a_window_of_rows_falls_back():
    def loss(t, ids):
        return jnp.sum(jnp.sin(lax.dynamic_slice(t, (ids[0], 0 * ids[0]), (2, 3))))

    assert_equals_oracle(loss, normal(0, 6, 3), IDS, fallbacks=["the root"])
