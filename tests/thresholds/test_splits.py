"""Bounds for parts that keep a bound for the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.oracles import norm

import optaxclip
from optaxclip.thresholds import split_by_size, split_evenly

GRADS = {
    "a": np.full(3, 9.0, np.float32),
    "b": {"c": np.full((2, 4), 9.0, np.float32), "d": np.full((), 9.0, np.float32)},
}
SIZES = np.array([3, 8, 1])
SHARES = {split_evenly: np.full(3, 1 / 3), split_by_size: SIZES / 12}


def step(tx, grads=GRADS):
    """Clipped leaves, and the statistics of their groups."""
    updates, state = jax.jit(lambda g: tx.update(g, tx.init(GRADS)))(grads)
    (stats,) = optaxclip.clip_stats(state).values()
    return [updates["a"], updates["b"]["c"], updates["b"]["d"]], stats.groups


@pytest.mark.parametrize("split", SHARES)
@pytest.mark.parametrize("bound", [2.0, np.array(2.0), optax.constant_schedule(2.0)])
def test_leaves(split, bound):
    bound = jnp.asarray(bound) if isinstance(bound, np.ndarray) else bound
    leaves, groups = step(optaxclip.clip_by_leaf_norm(split(bound)))
    np.testing.assert_allclose(groups.threshold, 2 * np.sqrt(SHARES[split]), rtol=1e-6)
    np.testing.assert_allclose([norm([x]) for x in leaves], groups.threshold, rtol=1e-6)
    np.testing.assert_allclose(norm(leaves), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("split", "shares"), [(split_evenly, (1 / 2, 1 / 2)), (split_by_size, (9 / 12, 3 / 12))]
)
def test_labels_per_example(split, shares):
    tx = optaxclip.clip_per_example(
        split(2.0), by=lambda path, leaf: "ends" if path != "a" else "front"
    )
    two_examples = {
        "a": np.full((2, 3), 9.0, np.float32),
        "b": {"c": np.full((2, 2, 4), 9.0, np.float32), "d": np.full(2, 9.0, np.float32)},
    }
    leaves, groups = step(tx, two_examples)
    assert groups.names == ("ends", "front")
    np.testing.assert_allclose(groups.threshold, 2 * np.sqrt(shares), rtol=1e-6)
    np.testing.assert_allclose(norm(leaves), 2.0, rtol=1e-6)


@pytest.mark.parametrize("split", SHARES)
def test_units_keep_the_whole(split):
    leaves, _ = step(optaxclip.clip_by_unit_norm(split(2.0)))
    np.testing.assert_allclose(norm(leaves), 2.0, rtol=1e-6)


@pytest.mark.parametrize("split", SHARES)
def test_bounds_are_checked(split):
    with pytest.raises(ValueError, match=r"max_norm must be >= 0, got -1\.0"):
        split(-1.0)
    with pytest.raises(TypeError, match="max_norm"):
        split("big")
    with pytest.raises(TypeError, match=r"max_norm must be a number.*got \{'w': 1\.0, 'b': 2\.0\}"):
        split({"w": 1.0, "b": 2.0})


@pytest.mark.parametrize("split", SHARES)
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (optaxclip.clip_by_value, r"by='element'"),
        (lambda c: optaxclip.clip_by_leaf_norm(c, ord=1), r"ord=1"),
        (optaxclip.clip_by_leaf_rms, r"ord=rms"),
    ],
)
def test_norms_that_do_not_add_up(split, make, got):
    with pytest.raises(ValueError, match=rf"needs norms of order 2.*got .*{got}.*Pass"):
        make(split(2.0)).init(GRADS)
