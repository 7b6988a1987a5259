import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import quick
from tools.oracles import assert_same_bits
from tools.quick import quick_jit
from tools.steps import first_steps, jitted, through

import optaxclip
from optaxclip import clip_stats, raise_if_stuck, skip_nonfinite

BFLOAT16 = np.dtype(jnp.bfloat16)
PARAMS = {"b": np.array([0.5], BFLOAT16), "w": np.float32([1.0, -2.0, 3.0])}
ONE = np.ones(1, np.float32)


def grads(value=1.0):
    return {"b": np.array([0.25], BFLOAT16), "w": np.float32([1.0, value, -1.0])}


def optimizer():
    """Everything that must not move: moments, a schedule, decay, statistics, noise."""
    return optax.chain(
        optaxclip.clip_by_leaf_norm(1.0, name="before"),
        optax.adamw(optax.linear_schedule(1e-1, 1e-2, 5), weight_decay=0.1),
        optax.add_noise(0.1, 0.5, jax.random.key(0)),
        optaxclip.clip_by_global_norm(0.5),
    )


def counters(state):
    return int(state.skipped_count), int(state.consecutive_count), bool(state.stuck)


def raw(tree):
    """Random keys as plain numbers."""

    def numbers(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(numbers, tree)


BAD = [np.nan, np.inf, -np.inf]


@pytest.fixture(scope="module")
def inner():
    return jitted(optimizer())


@pytest.fixture(scope="module")
def guarded():
    return jitted(skip_nonfinite(optimizer()))


def assert_leaves_no_trace(tx, bad):
    _, state = tx.update(grads(), tx.init(PARAMS), PARAMS)
    updates, after = tx.update(grads(bad), state, PARAMS)
    assert_same_bits(raw(after.inner_state), raw(state.inner_state))
    assert_same_bits(optax.apply_updates(PARAMS, updates), PARAMS)
    assert counters(after) == (1, 1, False)
    return after


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_skipped_step_leaves_no_trace(bad, guarded):
    after = assert_leaves_no_trace(guarded, bad)
    assert clip_stats(after)["clip_by_global_norm"].nonfinite_count == 0


def test_a_step_skipped_outside_jit_leaves_no_trace():
    inner = optax.chain(optaxclip.clip_by_value(0.5), optax.sgd(0.1, momentum=0.9))
    for bad in BAD:
        assert_leaves_no_trace(skip_nonfinite(inner), bad)


def test_other_steps_are_those_of_the_inner_optimizer(inner, guarded):
    inner_state, state = inner.init(PARAMS), guarded.init(PARAMS)
    for value in (1.0, np.nan, 3e38, np.inf, -0.0):
        updates, state = guarded.update(grads(value), state, PARAMS)
        if np.isfinite(value):
            expected, inner_state = inner.update(grads(value), inner_state, PARAMS)
            for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(
                    np.asarray(a, float), np.asarray(b, float), rtol=1e-6, err_msg=str(value)
                )
        else:
            assert not any(map(np.any, jax.tree.leaves(updates))), value
    assert counters(state) == (2, 0, False)


def test_a_finite_gradient_whose_norm_overflows_is_no_bad_step():
    tx = skip_nonfinite(optax.identity())
    gradients = [np.full(8, 3e38, np.float32), np.full(8, 6e4, np.float16),
                 np.complex64([3e38 + 3e38j])]  # fmt: skip
    run = lambda gradients: [tx.update([g], tx.init([g])) for g in gradients]
    for g, (updates, state) in zip(gradients, quick.run(run, gradients), strict=True):
        assert_same_bits(updates, [g])
        assert counters(state) == (0, 0, False)


def test_counters_in_scan():
    values = np.float32([1, np.nan, np.nan, 1, np.inf, 1, np.nan, np.nan, np.nan, 1])
    tx = skip_nonfinite(optimizer(), max_consecutive=3)

    def body(state, value):
        g = {"b": jnp.ones(1, jnp.bfloat16), "w": jnp.stack([value, value, value])}
        _, state = tx.update(g, state, PARAMS)
        return state, (state.skipped_count, state.consecutive_count, state.stuck)

    run = quick_jit(lambda values: jax.lax.scan(body, tx.init(PARAMS), values))
    state, history = run(values)
    skipped, consecutive, stuck = (np.asarray(h).tolist() for h in history)
    assert skipped == [0, 1, 2, 2, 3, 3, 4, 5, 6, 6]
    assert consecutive == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    assert stuck == [False] * 8 + [True] * 2  # it stays, so that a late look sees it
    with pytest.raises(
        FloatingPointError, match=r"got 6 steps skipped in all, 0 in a row up.*Look"
    ):
        raise_if_stuck(state)


def test_stuck_wherever_the_guard_is():
    bad, params = [np.float32(np.nan)], [np.float32(1.0)]
    tx = jitted(
        optax.chain(
            optax.identity(), skip_nonfinite(skip_nonfinite(optax.sgd(1.0), max_consecutive=2))
        )
    )
    state = tx.init(params)
    # The outer guard keeps the inner one from ever seeing a bad step.
    for _ in range(3):
        _, state = tx.update(bad, state, params)
        raise_if_stuck(state)
    tx = jitted(optax.named_chain(("guard", skip_nonfinite(optax.sgd(1.0), max_consecutive=2))))
    _, state = tx.update(bad, tx.init(params), params)
    raise_if_stuck(state)
    _, state = tx.update(bad, state, params)
    with pytest.raises(FloatingPointError, match=r"row because .* was not finite, got 2 steps"):
        raise_if_stuck({"optimizer": state})


def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = skip_nonfinite(optax.adam(0.1), max_consecutive=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x)))(model))

    bad = np.float32([[1, np.nan]])
    step(model, optimizer, bad)
    assert_same_bits(nnx.state(model, nnx.Param), before)
    raise_if_stuck(optimizer.opt_state)
    step(model, optimizer, bad)
    with pytest.raises(FloatingPointError, match=r"got 2 steps skipped in all, 2 in a row"):
        raise_if_stuck(optimizer.opt_state)


def test_nothing_to_raise():
    raise_if_stuck(optax.adam(1e-3).init(PARAMS))
    state = skip_nonfinite(optax.sgd(1.0)).init(PARAMS)
    raise_if_stuck(state)


@pytest.mark.parametrize("bad", [1.0, np.nan], ids=["good", "bad"])
def test_leaves_that_are_no_gradients(bad):
    odd = {
        "empty": np.zeros(0, np.float32),
        "float0": np.zeros(2, jax.dtypes.float0),
        "ids": np.int32([5, 6]),
        "masked": optax.MaskedNode(),
        "none": None,
        "w": np.float32([bad]),
    }
    tx = skip_nonfinite(optax.identity())
    updates, state = tx.update(odd, tx.init(odd))
    assert jax.tree.structure(updates) == jax.tree.structure(odd)
    assert updates["float0"].dtype == jax.dtypes.float0
    assert updates["ids"].dtype == np.int32
    assert updates["w"].tolist() == ([1.0] if bad == 1.0 else [0.0])
    assert updates["ids"].tolist() == ([5, 6] if bad == 1.0 else [0, 0])
    assert counters(state)[0] == (bad != 1.0)


def test_a_tree_without_gradients_is_never_skipped():
    _, state = first_steps(skip_nonfinite(optax.identity()), {"n": np.int32([1])})
    assert counters(state) == (0, 0, False)


AROUND = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-3, mu_dtype=jnp.bfloat16),
    "adafactor": lambda: optax.adafactor(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "multi-steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(1e-3, 9)),
    "apply-if-finite": lambda: optax.apply_if_finite(optax.adam(1e-3), 2),
    "partition": lambda: optax.partition(
        {"x": optax.adam(1e-3), "y": optax.set_to_zero()}, {"w": "x", "m": "y"}
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_around_any_optimizer(name):
    params = {"m": np.ones((4, 4), np.float32), "w": np.ones(4, np.float32)}
    tx = skip_nonfinite(AROUND[name]())
    update = quick_jit(tx.update)
    state = quick_jit(tx.init)(params)
    for _ in range(2):
        _, state = update(params, state, params)
    bad = {**params, "w": np.float32([1.0, 2.0, np.nan, 3.0])}
    updates, after = update(bad, state, params)
    assert_same_bits(after.inner_state, state.inner_state)
    assert not any(map(np.any, jax.tree.leaves(updates)))


def test_inside_multi_steps_it_skips_the_mean_outside_the_micro_batch():
    txs = {
        "inside": optax.MultiSteps(skip_nonfinite(optax.sgd(1.0)), 2),
        "outside": skip_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()),
    }
    params, steps = [0 * ONE], [np.float32([[1], [np.nan], [1]])]
    run = lambda steps: {k: through(tx, tx.init(params), steps, params)[0] for k, tx in txs.items()}
    results = {name: updates[0].ravel().tolist() for name, updates in quick.run(run, steps).items()}
    assert results == {"inside": [0.0, 0.0, 0.0], "outside": [0.0, 0.0, -1.0]}


def test_extra_args_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, loss):
        return jax.tree.map(lambda u: u * loss, updates), state

    tx = skip_nonfinite(optax.GradientTransformationExtraArgs(lambda p: (), update))
    updates, _ = tx.update([ONE], tx.init([ONE]), loss=3.0)
    assert updates[0].tolist() == [3.0]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"max_consecutive must be >= 1, got 0\. Pass 1 or more"),
        (-1, ValueError, r"max_consecutive must be >= 1, got -1"),
        (1.5, TypeError, r"max_consecutive must be a whole number, got 1\.5"),
        (True, TypeError, r"max_consecutive must be a whole number, got True"),
        (lambda: jnp.array(2), TypeError, r"max_consecutive must be static, got 2"),
    ],
)
def test_max_consecutive_out_of_range(value, error, message):
    value = value() if callable(value) else value
    with pytest.raises(error, match=message):
        skip_nonfinite(optax.sgd(0.1), max_consecutive=value)


def test_a_leaf_that_is_no_array():
    tx = skip_nonfinite(optax.identity())
    with pytest.raises(TypeError, match=r"leaves must be arrays, got float 1\.0 at w"):
        tx.update({"w": 1.0}, tx.init({"w": ONE}))
