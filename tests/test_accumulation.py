"""The rows of docs/accumulation.md, with numbers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.quick import quick_jit

import optaxclip
from optaxclip.per_example import per_example_grad

C, K, SIZE = 1.0, 3, 4


def loss(w, x):
    return jnp.dot(w, x) ** 2 / 2


@pytest.fixture(scope="module")
def parts():
    """[parts, examples, features]; the second part has an outlier."""
    x = np.random.default_rng(0).normal(size=(K, SIZE, 5)).astype(np.float32)
    x[1, 0] *= 20
    return x


@pytest.fixture(scope="module")
def w():
    return np.arange(1, 6, dtype=np.float32)


@pytest.fixture(scope="module")
def examples(parts, w):
    """The gradient of every example in float64: [parts, examples, features]."""
    x, w = np.float64(parts), np.float64(w)
    return (x @ w)[..., None] * x


def clip(g, axis=-1):
    """The oracle's clipper."""
    return g * np.minimum(1, C / np.linalg.norm(g, axis=axis, keepdims=True))


def accumulate(tx, grads, w):
    """The last update, of SGD at rate 1 so that it is minus what the optimizer saw; the state."""
    state = tx.init(w)
    step = quick_jit(tx.update)
    for g in grads:
        updates, state = step(g, state, w)
    return -np.asarray(updates), state


def steps(state):
    (stats,) = optaxclip.clip_stats(state).values()
    return int(stats.count)


def multi(tx):
    return optax.MultiSteps(tx, K).gradient_transformation()


def means(examples):
    return np.float32(examples.mean(axis=1))


def test_inside_the_mean_of_the_parts_is_clipped(examples, w):
    tx = multi(optax.chain(optaxclip.clip_by_global_norm(C), optax.sgd(1.0)))
    seen, state = accumulate(tx, means(examples), w)
    np.testing.assert_allclose(seen, clip(examples.mean(axis=(0, 1))), rtol=1e-5)
    assert steps(state) == 1


def test_in_front_each_part_is_clipped(examples, w):
    tx = optax.chain(optaxclip.clip_by_global_norm(C), multi(optax.sgd(1.0)))
    seen, state = accumulate(tx, means(examples), w)
    np.testing.assert_allclose(seen, clip(examples.mean(axis=1)).mean(axis=0), rtol=1e-5)
    assert steps(state) == K
    assert not np.allclose(seen, clip(examples.mean(axis=(0, 1))), rtol=0.05)


def test_per_example_in_front_is_that_of_one_large_batch(parts, examples, w):
    tx = optax.chain(optaxclip.clip_per_example(C), multi(optax.sgd(1.0)))
    grad = quick_jit(per_example_grad(loss))
    grads = [grad(w, part) for part in parts]
    seen, state = accumulate(tx, grads, w)
    np.testing.assert_allclose(seen, clip(examples).mean(axis=(0, 1)), rtol=1e-5)
    assert steps(state) == K


@pytest.mark.parametrize("size", [1, SIZE, None])
def test_micro_batches_do_not_change_the_sum(parts, examples, w, size):
    whole = parts.reshape(K * SIZE, -1)
    grad = optaxclip.clipped_grad(loss, l2_clip_norm=C, keep_batch_dim=False, microbatch_size=size)
    np.testing.assert_allclose(
        quick_jit(grad)(w, whole), clip(examples).sum(axis=(0, 1)), rtol=1e-5
    )


@pytest.mark.parametrize("outside", [True, False])
def test_a_part_with_nan(examples, w, outside):
    optimizer = optax.chain(optaxclip.clip_by_global_norm(C), optax.sgd(1.0))
    guard = optaxclip.skip_nonfinite
    tx = guard(multi(optimizer)) if outside else multi(guard(optimizer))
    good = means(examples)
    bad = good.copy()
    bad[1] = np.nan
    if outside:  # K others make the step
        seen, state = accumulate(tx, [*bad, good[1]], w)
        np.testing.assert_allclose(seen, clip(examples.mean(axis=(0, 1))), rtol=1e-5)
        assert steps(state) == 1
    else:
        seen, state = accumulate(tx, bad, w)
        np.testing.assert_array_equal(seen, 0)
        assert steps(state) == 0
        assert int(optax.tree.get(state, "skipped_count")) == 1
