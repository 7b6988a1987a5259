"""What guards look at: the gradient, the update, the loss, any of them together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick
from tools.oracles import assert_same_bits
from tools.skip_steps import published, stream, through

import optaxclip
from optaxclip import Norm, raise_if_stuck, skip_nonfinite, skip_outliers
from optaxclip.thresholds import as_published, mean_plus_std, mean_plus_std_of_values

SGD = optax.sgd(1.0)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("which", ["olmo-core", "maxtext", "levanter"])
def test_the_published_rules_to_the_letter(which, sign):
    """Losses below zero too: a log-likelihood has any sign."""
    norms, losses = stream(0)
    losses = losses - 6 * (sign < 0)
    tx = skip_outliers(SGD, as_published(which, 3.0, window=32), of=("gradient", "loss"))
    happened, seen, bounds, state = quick.run(functools.partial(through, tx), norms, losses)
    expected = published(which, norms, losses, 32, 3.0)
    np.testing.assert_array_equal(happened, expected[:, 0])
    assert 4 <= np.sum(~happened) < 20
    np.testing.assert_allclose(seen["loss"], losses, rtol=1e-6)
    for i, name in enumerate(["gradient", "loss"]):
        ready = np.isfinite(expected[:, i + 1])
        unit = np.abs(seen[name]).max()
        found, wanted = bounds[name][ready] / unit, expected[ready, i + 1] / unit
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        assert (bounds[name][~ready] > 1e38).all()
    assert int(state.skipped_count) == np.sum(~happened)
    assert 1 <= int(state.beyond_count["loss"]) <= np.sum(~happened)


def test_a_loss_that_spikes_is_skipped_and_not_learned():
    losses = np.float32([*[2.0, 2.1, 1.9] * 30, *[50.0] * 5, 2.0])
    norms = np.ones_like(losses)
    tx = skip_outliers(SGD, mean_plus_std_of_values(window=16), of="loss")
    happened, _, bounds, state = quick.run(functools.partial(through, tx), norms, losses)
    assert happened.tolist() == [True] * 90 + [False] * 5 + [True]
    assert bounds[-1] < 3
    assert int(state.beyond_count) == 5


def test_a_level_of_losses_that_has_changed_is_learned():
    losses = np.float32([1.0, 1.1] * 20 + [5.0, 5.1] * 20)
    tx = skip_outliers(SGD, mean_plus_std_of_values(window=8, relearn_after=6), of="loss")
    happened, *_ = quick.run(functools.partial(through, tx), np.ones_like(losses), losses)
    assert happened.tolist() == [True] * 40 + [False] * 6 + [True] * 34


def steps(tx, norms, losses, given):
    """Updates and states of steps; `given` says for each step, in the program, if it has a loss."""
    params = {"w": jnp.ones(2)}
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for n, loss, has in zip(norms, losses, given, strict=True):
        extra = {"loss": loss} if has else {}
        updates, new = update({"w": n * np.float32([0.6, 0.8])}, state, params, **extra)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        alike = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
        assert all(jax.tree.leaves(alike))
        state = new
        seen.append((updates, state))
    return seen


def of_the_gradient(seen):
    """What a guard of the gradient alone holds too."""
    return [
        (updates, state._replace(loss=None, nonfinite=state.nonfinite.step[:1]))
        for updates, state in jax.device_get(seen)
    ]


def test_a_loss_that_is_passed_is_seen_and_one_that_spikes_is_skipped():
    losses = np.float32([1.0] * 200 + [50.0])
    tx = skip_outliers(SGD)
    happened, seen, _, state = quick.run(functools.partial(through, tx), np.ones(201), losses)
    assert happened.tolist() == [True] * 200 + [False]
    assert seen.shape == (201,)  # of the gradient, as without a loss
    assert (int(state.skipped_count), int(state.beyond_count)) == (1, 0)
    assert (int(state.loss.seen_count), int(state.loss.beyond_count)) == (201, 1)
    assert float(state.loss.norm) == 50
    assert 1 <= float(state.loss.threshold) < 1.1


@pytest.mark.parametrize("threshold", [None, 2.5, mean_plus_std(2.0, window=16)])
def test_steps_without_a_loss_are_those_of_a_guard_of_the_gradient(threshold):
    norms = stream(1)[0][:60]
    norms[[40, 50]] = 30, np.nan
    never = [False] * 60
    by_default = steps(skip_outliers(SGD, threshold), norms, norms, never)
    alone = steps(skip_outliers(SGD, threshold, of="gradient"), norms, norms, never)
    assert_same_bits(of_the_gradient(by_default), of_the_gradient(alone))
    state = by_default[-1][1]
    assert int(state.skipped_count) >= 2
    fresh = skip_outliers(SGD, threshold).init({"w": jnp.ones(2)})
    assert_same_bits(*jax.device_get((state.loss, fresh.loss)))
    assert state.nonfinite.step.tolist() == [50, -1]


def test_of_mixed_steps_the_loss_is_judged_by_those_that_had_one():
    norms, losses = np.ones(120, np.float32), np.float32([1.0, 1.1] * 60)
    given = np.arange(120) % 3 != 0
    losses[110:112] = 50.0  # one with a loss, 110, and one without, 111
    assert given[110:112].tolist() == [True, False]
    tx, params = skip_outliers(SGD), {"w": jnp.ones(2)}
    mixed = steps(tx, norms, losses, given)
    happened = [bool(updates["w"][0]) for updates, _ in mixed]
    assert happened == [i != 110 for i in range(120)]
    dense = steps(tx, norms[given], losses[given], [True] * int(given.sum()))
    assert_same_bits(*jax.device_get((mixed[-1][1].loss, dense[-1][1].loss)))
    assert int(mixed[-1][1].loss.seen_count) == given.sum()
    alone = steps(skip_outliers(SGD, of="gradient"), norms, losses, [False] * 120)
    kept = lambda state: (state.norm, state.threshold, state.threshold_state, state.beyond_count)
    assert_same_bits(*jax.device_get((kept(mixed[-1][1]), kept(alone[-1][1]))))

    def both(state, n):  # a carry of one type through steps with and without
        _, state = tx.update({"w": n * jnp.ones(2)}, state, params, loss=n)
        return tx.update({"w": n * jnp.ones(2)}, state, params, loss=None)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(both, s, norms))(tx.init(params))
    assert (int(state.seen_count), int(state.loss.seen_count)) == (240, 120)


def test_beside_a_threshold_of_the_gradient_a_loss_need_only_be_finite():
    params = np.ones(1, np.float32)
    cases = [(1e38, 0), (-5.0, 0), (np.nan, 1), (-np.inf, 1)]
    for threshold in (2.0, as_published("maxtext"), mean_plus_std()):
        tx = skip_outliers(SGD, threshold)
        for loss, skipped in cases:
            _, state = tx.update(params, tx.init(params), params, loss=np.float32(loss))
            assert int(state.skipped_count) == int(state.loss.beyond_count) == skipped
            assert np.isfinite(state.loss.threshold)
    tx = skip_outliers(SGD, 2.0)
    _, state = tx.update(3 * params, tx.init(params), params, loss=1.0)
    assert (int(state.skipped_count), int(state.loss.beyond_count)) == (1, 0)
    tx = skip_outliers(SGD, {"gradient": 2.0, "loss": 4.0})
    for n, loss, skipped in [(1.0, 3.0, 0), (3.0, 3.0, 1), (1.0, 5.0, 1)]:
        _, state = tx.update(n * params, tx.init(params), params, loss=loss)
        assert int(state.skipped_count) == skipped
    assert int(tx.update(params, tx.init(params), params)[1].skipped_count) == 0


def test_a_loss_that_is_nan_beside_a_finite_gradient_is_skipped_by_default():
    params = {"w": np.ones(2, np.float32)}
    tx = skip_nonfinite(optax.adam(0.1), max_consecutive=1)
    update, state = jax.jit(tx.update), tx.init(params)
    _, state = update(params, state, params)
    updates, after = update(params, state, params, loss=np.float32(np.nan))
    assert not np.any(updates["w"])
    assert_same_bits(*jax.device_get((after.inner_state, state.inner_state)))
    _, after = update(params, after, params, loss=np.float32(1.0))
    assert (int(after.skipped_count), int(after.consecutive_count)) == (1, 0)
    assert after.nonfinite.names == ("w", "loss")
    assert after.nonfinite.step.tolist() == [-1, 1]
    with pytest.raises(FloatingPointError, match=r"first not finite: loss \(step 1\)\."):
        raise_if_stuck(after)
    of_gradient = skip_nonfinite(SGD, of="gradient")
    _, state = of_gradient.update(params, of_gradient.init(params), params, loss=np.nan)
    assert int(state.skipped_count) == 0


def test_the_loss_has_its_name_in_errors_and_scalars():
    tx, params = skip_outliers(SGD, 2.0, max_consecutive=1), np.ones(1, np.float32)
    state = tx.init(params)
    _, without = tx.update(9 * params, state, params)
    with pytest.raises(FloatingPointError, match=r"the bound: 1\. Look"):
        raise_if_stuck(without)
    for n, loss in [(1.0, 5.0), (9.0, 5.0), (9.0, np.nan)]:
        _, state = tx.update(n * params, state, params, loss=np.float32(loss))
    with pytest.raises(
        FloatingPointError, match=r"gradient 2, loss 1; first not .*: loss \(step 2"
    ):
        raise_if_stuck(state)
    _, state = tx.update(params, state, params, loss=5.0)
    found = optaxclip.clip_scalars(state)
    names = (
        "norm",
        "norm/loss",
        "threshold",
        "beyond_count",
        "beyond_count/loss",
        "seen_count/loss",
    )
    assert [found[f"skip_outliers/{name}"] for name in names] == [1.0, 5.0, 2.0, 2, 1, 4]
    assert found["skip_outliers/first_nonfinite/loss"] == 2


def test_a_tree_without_gradients_still_has_a_loss():
    for guard in (skip_nonfinite(SGD), skip_outliers(SGD)):
        state = guard.init({})
        for loss, skipped in [(1.0, 0), (np.nan, 1)]:
            _, state = guard.update({}, state, {}, loss=np.float32(loss))
            assert int(state.skipped_count) == skipped
        assert int(guard.update({}, state, {})[1].skipped_count) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_skipped_whatever_is_known(bad):
    losses = np.float32([bad, 1.0, bad, 1.0])
    for tx in (
        skip_outliers(SGD, float("inf"), of="loss"),
        skip_outliers(SGD, of=("loss", "gradient")),
        skip_outliers(SGD, as_published("olmo-core"), of="loss"),
    ):
        happened, _, _, state = quick.run(functools.partial(through, tx), np.ones(4), losses)
        assert happened.tolist() == [False, True, False, True]
        assert dict(zip(state.nonfinite.names, state.nonfinite.step, strict=True))["loss"] == 0
    params = {"w": np.ones(1, np.float32)}
    guard = skip_nonfinite(SGD, of=("gradient", "loss"))
    for loss, skipped in ((bad, 1), (1.0, 0)):
        _, state = guard.update(params, guard.init(params), params, loss=np.float32(loss))
        assert int(state.skipped_count) == skipped


def test_an_update_that_spikes_while_the_gradient_does_not():
    """Adam after a pause: the second moment has decayed, and a usual gradient makes a long step."""
    adam = optax.adam(0.1, b1=0.5, b2=0.95)
    params = {"w": np.zeros(2, np.float32)}

    def steps(tx, sizes):
        def step(carry, size):
            state, params = carry
            updates, state = tx.update({"w": size * jnp.ones(2)}, state, params)
            length = jnp.linalg.norm(updates["w"])
            return (state, optax.apply_updates(params, updates)), length

        (state, _), lengths = jax.lax.scan(step, (tx.init(params), params), sizes)
        return state, lengths

    sizes = np.float32([*[1.0] * 20, *[1e-3] * 100, 1.0])
    _, plain = quick.run(functools.partial(steps, adam), sizes)
    guarded = skip_outliers(adam, 0.2, of="update")
    state, lengths = quick.run(functools.partial(steps, guarded), sizes)
    assert plain[-1] > 0.2 > plain[:-1].max()
    assert lengths[-1] == 0
    assert int(state.skipped_count) == 1
    assert state.norm == pytest.approx(plain[-1], rel=1e-6)


def test_the_state_of_the_optimizer_stays_in_a_step_whose_update_is_dropped():
    params = {"w": np.ones(2, np.float32)}
    tx = skip_outliers(optax.adam(1.0), 0.5, of="update")
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert_same_bits(jax.device_get(after.inner_state), jax.device_get(state.inner_state))
    assert not np.any(updates["w"])


@pytest.mark.parametrize("by", ["global", "leaf", "unit", "element", "group"])
@pytest.mark.parametrize("ord", [1, 2, 3.5, np.inf, "rms"])
def test_the_norm_is_that_of_norm_and_the_leaf_has_a_name(by, ord):
    labels = (lambda path, leaf: path.split("/")[0]) if by == "group" else None
    norm = Norm(by, ord=ord, labels=labels, exclude=lambda path, leaf: path == "b/free")
    rng = np.random.default_rng(3)
    leaf = lambda *shape: np.float32(rng.standard_normal(shape))
    params = {"a": leaf(3, 2), "b": {"free": np.float32([np.nan]), "w": leaf(2), "x": leaf()}}
    bad = {**params, "b": {**params["b"], "w": np.float32([1, np.inf])}}
    tx = skip_outliers(SGD, 1e9, norm=norm)

    def both(params, bad):
        _, state = tx.update(params, tx.init(params), params)
        leaves = norm.leaves(params)
        expected = jnp.max(norm.groups(leaves).vector(norm.measure(leaves, norm.groups(leaves))))
        return state, expected, tx.update(bad, state, params)[1]

    state, expected, after = quick.run(both, params, bad)
    np.testing.assert_allclose(state.norm, expected, rtol=1e-6)
    assert state.skipped_count == 0
    assert after.skipped_count == 1
    assert after.nonfinite.names == ("a", "b/w", "b/x", "loss")
    assert after.nonfinite.step.tolist() == [-1, 1, -1, -1]


def test_the_first_step_of_each_leaf_is_kept_and_said():
    params = {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}
    tx = skip_nonfinite(SGD, max_consecutive=2)
    state = tx.init(params)
    for a, b in [(1, 1), (1, np.nan), (np.inf, 1), (np.inf, np.nan)]:
        _, state = tx.update({"a": np.float32([a]), "b": np.float32([b])}, state, params)
    assert state.nonfinite.step.tolist() == [2, 1, -1]
    with pytest.raises(FloatingPointError, match=r"first not finite: b \(step 1\), a \(step 2\)\."):
        raise_if_stuck(state)


def test_what_was_beyond_its_bound_is_said():
    tx = skip_outliers(SGD, 2.0, of=("gradient", "loss"), max_consecutive=1)
    params = np.ones(1, np.float32)
    state = tx.init(params)
    for n, loss in [(1.0, 5.0), (9.0, 5.0)]:
        _, state = tx.update(n * params, state, params, loss=loss)
    with pytest.raises(FloatingPointError, match=r"the bound: gradient 1, loss 2\. Look"):
        raise_if_stuck(state)


def test_each_thing_has_its_own_threshold():
    tx = skip_outliers(SGD, {"gradient": 2.0, "loss": -1.0}, of=("gradient", "loss"))
    params = np.ones(1, np.float32)
    for n, loss, skipped in [(1.0, -2.0, 0), (3.0, -2.0, 1), (1.0, -0.5, 1)]:
        _, state = tx.update(n * params, tx.init(params), params, loss=loss)
        assert int(state.skipped_count) == skipped


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: skip_outliers(SGD, of=[]), TypeError, r"of must be a name or a tuple of names"),
        (lambda: skip_nonfinite(SGD, of=()), TypeError, r"of must be a name or a tuple of names"),
        (
            lambda: skip_outliers(SGD, {"loss": 1.0}, of=("loss", "gradient")),
            ValueError,
            r"got \['loss'\] for \['gradient', 'loss'\]\. Give each its own",
        ),
        (lambda: as_published("olmo"), ValueError, r"unknown rule, got 'olmo'\. Use one of"),
        (lambda: as_published("maxtext", window=1), ValueError, r"window must be >= 2, got 1"),
        (lambda: mean_plus_std_of_values(-1.0), ValueError, r"num_stds must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_that_is_missing_or_no_scalar():
    tx = skip_outliers(SGD, of="loss")
    params = np.ones(1, np.float32)
    with pytest.raises(ValueError, match=r"a guard of 'loss' must be given it .*loss=\.\.\.\)"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"loss must be a real scalar, got float32 of shape"):
        tx.update(params, tx.init(params), params, loss=np.ones(2, np.float32))


def test_guards_inside_each_other_are_several_levels_each_counted():
    tx = skip_outliers(skip_outliers(SGD, 2.0), 10.0)
    params = np.ones(1, np.float32)
    state = tx.init(params)
    for n in (1.0, 5.0, 50.0):
        _, state = tx.update(n * params, state, params)
    assert (int(state.skipped_count), int(state.inner_state.skipped_count)) == (1, 1)
    assert isinstance(optaxclip.wrappers.FirstNonfinite, type)
