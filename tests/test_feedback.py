"""Error feedback: what was cut off comes back, and what is not finite does not stay."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip
from optaxclip import error_feedback


def run(tx, steps):
    state, out = tx.init({"w": jnp.asarray(steps[0])}), []
    for g in steps:
        updates, state = tx.update({"w": jnp.asarray(g)}, state)
        out.append(np.asarray(updates["w"]))
    return np.array(out), state


def test_u_clip():
    steps = np.float32(np.random.default_rng(0).standard_normal((12, 3)))
    carry, expected = np.zeros(3), []
    for g in np.float64(steps):
        h = g + carry
        expected.append(h * min(1, 0.8 / np.linalg.norm(h)))
        carry = h - expected[-1]
    found, state = run(error_feedback(optaxclip.clip_by_global_norm(0.8)), steps)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(state.carry["w"], carry, rtol=1e-5, atol=1e-6)
    assert int(optaxclip.clip_stats(state)["clip_by_global_norm"].count) == 12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_lost(dtype):
    steps = np.random.default_rng(1).standard_normal((40, 5)) * 0.01
    steps = [jnp.asarray(g, dtype) for g in steps]
    found, state = run(error_feedback(optaxclip.clip_by_value(0.01)), steps)
    assert found.dtype == dtype
    total = np.sum([np.float64(g) for g in steps], axis=0)
    np.testing.assert_allclose(np.float64(found).sum(0) + state.carry["w"], total, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_a_bad_step_spoils_no_later_one(bad, nonfinite):
    steps = np.ones((4, 2), np.float32)
    steps[1, 0] = bad
    clipper = optaxclip.clip_by_global_norm(1.0, nonfinite=nonfinite)
    found, state = run(error_feedback(clipper), steps)
    assert np.isfinite(found[2:]).all()
    assert np.isfinite(state.carry["w"]).all()
    first = run(error_feedback(clipper), steps[:1])[1].carry["w"]
    after = run(error_feedback(clipper), steps[:2])[1].carry["w"]
    assert after[0] == first[0]


def test_a_state_of_another_tree():
    tx = error_feedback(optax.identity())
    with pytest.raises(ValueError, match=r"saw, got 0 \(3,\) in init and 0 \(2,\) in the updates"):
        tx.update([jnp.ones(2)], tx.init([jnp.ones(3)]))
