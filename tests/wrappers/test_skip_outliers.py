import numpy as np
import optax
import pytest
from tools.oracles import assert_same_bits
from tools.steps import factors, first_steps, jitted

import optaxclip
from optaxclip import Norm, clip_stats, raise_if_stuck, skip_nonfinite, skip_outliers
from optaxclip.thresholds import mean_plus_std, multiple_of_quantile

PARAMS = {"w": np.float32([1.0, -2.0])}
SGD = optax.sgd(1.0)


def grads(norm):
    return {"w": np.float32([0.6, 0.8]) * np.float32(norm)}


def optimizer():
    """Everything that must not move: moments, a schedule, decay, statistics."""
    return optax.chain(
        optaxclip.clip_by_global_norm(0.5),
        optax.adamw(optax.linear_schedule(1e-1, 1e-2, 5), weight_decay=0.1),
    )


RULES = {
    "fixed": 3.0,
    "window": mean_plus_std(window=4),
    "quantile": multiple_of_quantile(window=4),
}


@pytest.fixture(scope="module")
def guarded():
    """By rule, a guard around an optimizer."""
    return {rule: jitted(skip_outliers(optimizer(), bound)) for rule, bound in RULES.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [100.0, np.nan, np.inf])
def test_a_skipped_step_leaves_no_trace(rule, bad, guarded):
    tx = guarded[rule]
    state = tx.init(PARAMS)
    for norm in (1.0, 1.1, 0.9):
        _, state = tx.update(grads(norm), state, PARAMS)
    updates, after = tx.update(grads(bad), state, PARAMS)
    assert_same_bits(after.inner_state, state.inner_state)
    assert_same_bits(optax.apply_updates(PARAMS, updates), PARAMS)
    assert (int(after.skipped_count), int(after.consecutive_count)) == (1, 1)
    learned = (getattr(x.threshold_state, "memory", ()) for x in (after, state))
    assert_same_bits(*learned)
    assert clip_stats(after)["clip_by_global_norm"].count == 3
    assert int(after.seen_count) == 4
    _, after = tx.update(grads(1.0), after, PARAMS)
    assert (int(after.skipped_count), int(after.consecutive_count)) == (1, 0)
    assert after.norm == pytest.approx(1.0)
    assert 1 < after.threshold < 4


def test_an_infinite_gradient_is_skipped_while_there_is_no_bound():
    published = mean_plus_std(relearn_after=None)
    _, state = first_steps(skip_outliers(optax.sgd(1.0), published), grads(np.inf))
    assert state.threshold == pytest.approx(np.finfo(np.float32).max)
    assert int(state.skipped_count) == 1


def window_rule(n, k, window):
    kept, out = [], []
    for x in n:
        past = np.array(kept[-window:])
        known = len(past) >= window // 2
        usual = not known or x <= past.mean() + k * max(past.std(), 1e-6)
        out.append(float(usual))
        kept += [x] if usual else []
    return np.array(out)


def test_the_window_rule_is_that_of_its_formula():
    rng = np.random.default_rng(1)
    n = 0.1 * np.exp(0.3 * rng.standard_normal(80))
    n[[30, 31, 60]] *= 4
    tx = skip_outliers(optax.identity(), mean_plus_std(2.0, window=16, relearn_after=None))
    expected = window_rule(n, 2.0, 16)
    assert 3 <= np.sum(expected == 0) < 20
    found = factors(tx, np.stack([n, 1e-9 * n], 1))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


def test_a_level_that_has_changed_is_learned_after_so_many_steps():
    n = np.full(60, 0.1)
    n[20:] = 1.0
    tx = skip_outliers(optax.identity(), mean_plus_std(window=8, relearn_after=10))
    found = factors(tx, np.stack([n, 1e-9 * n], 1))[:, 0]
    np.testing.assert_allclose(found, [1.0] * 20 + [0.0] * 10 + [1.0] * 30, rtol=1e-6)


def test_stuck():
    tx = jitted(skip_outliers(optax.sgd(1.0), 1.0, max_consecutive=2))
    state = tx.init(PARAMS)
    for _ in range(2):
        raise_if_stuck(state)
        _, state = tx.update(grads(5.0), state)
    with pytest.raises(FloatingPointError, match=r"was an outlier or not finite, got 2 steps"):
        raise_if_stuck({"optimizer": state})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mean_plus_std(-1), r"num_stds must be >= 0, got -1"),
        (
            lambda: multiple_of_quantile(99),
            r"quantile must be in \[0, 1\], got 99\. Pass for example 0\.9",
        ),
        (
            lambda: multiple_of_quantile(factor=0.5),
            r"factor must be >= 1, got 0\.5\. Pass 1 or more",
        ),
        (lambda: mean_plus_std(relearn_after=3), r"relearn_after must be >= 64, .*got 3"),
        (lambda: skip_outliers(SGD, -1.0), r"threshold must be >= 0, got -1"),
        (lambda: skip_outliers(SGD, max_consecutive=0), r"max_consecutive must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_of_several_norms_each_must_be_within_its_bound():
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    tx = jitted(skip_outliers(SGD, {"a": 1.0, "b": 10.0}, norm="leaf"))
    state, skipped = tx.init(params), []
    for a, b in [(0.5, 5.0), (2.0, 5.0), (0.5, 20.0), (0.5, np.nan)]:
        updates = {"a": np.float32([a, 0]), "b": np.float32([b, 0])}
        _, state = tx.update(updates, state)
        skipped.append(int(state.skipped_count))
    assert skipped == [0, 1, 2, 3]


def test_a_part_may_be_left_out():
    params = {"frozen": np.zeros(1, np.float32), "w": np.ones(1, np.float32)}
    norm = Norm(exclude=lambda path, leaf: path == "frozen")
    for guard in (skip_outliers(SGD, 2.0, norm=norm), skip_nonfinite(SGD, norm=norm)):
        tx = jitted(guard)
        bad = {"frozen": np.float32([np.nan]), "w": np.float32([1.0])}
        assert int(tx.update(bad, tx.init(params))[1].skipped_count) == 0
