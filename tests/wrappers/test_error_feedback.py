"""Error feedback: what was cut off comes back, and what is not finite does not stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick

import optaxclip
from optaxclip import clip_stats, error_feedback


def run(tx, steps):
    """The updates and carries of a stream `[steps, elements]`, and the last state. In jit."""

    def step(state, g):
        updates, state = tx.update({"w": g}, state)
        return state, (updates["w"], state.carry["w"])

    state, (updates, carries) = jax.lax.scan(step, tx.init({"w": steps[0]}), steps)
    return updates, carries, state


def test_u_clip():
    steps = np.float32(np.random.default_rng(0).standard_normal((12, 3)))
    carry, expected = np.zeros(3), []
    for g in np.float64(steps):
        h = g + carry
        expected.append(h * min(1, 0.8 / np.linalg.norm(h)))
        carry = h - expected[-1]
    tx = error_feedback(optaxclip.clip_by_global_norm(0.8))
    found, carries, state = quick.run(functools.partial(run, tx), steps)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(carries[-1], carry, rtol=1e-5, atol=1e-6)
    assert int(clip_stats(state)["clip_by_global_norm"].count) == 12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_lost(dtype):
    steps = np.asarray(np.random.default_rng(1).standard_normal((40, 5)) * 0.01, dtype)
    tx = error_feedback(optaxclip.clip_by_value(0.01))
    found, carries, _ = quick.run(functools.partial(run, tx), steps)
    assert found.dtype == dtype
    total = np.sum(np.float64(steps), axis=0)
    np.testing.assert_allclose(np.float64(found).sum(0) + carries[-1], total, atol=1e-6)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_a_bad_step_spoils_no_later_one(nonfinite):
    streams = np.ones((2, 4, 2), np.float32)
    streams[:, 1, 0] = np.nan, np.inf
    tx = error_feedback(optaxclip.clip_by_global_norm(1.0, nonfinite=nonfinite))
    found, carries, _ = quick.run(jax.vmap(functools.partial(run, tx)), streams)
    assert np.isfinite(found[:, 2:]).all()
    assert np.isfinite(carries[:, -1]).all()
    np.testing.assert_array_equal(carries[:, 1, 0], carries[:, 0, 0])


def test_a_state_of_another_tree():
    tx = error_feedback(optax.identity())
    with pytest.raises(ValueError, match=r"saw, got 0 \(3,\) in init and 0 \(2,\) in the updates"):
        tx.update([np.ones(2, np.float32)], tx.init([np.ones(3, np.float32)]))
