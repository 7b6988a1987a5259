"""With `relearn_after=None` the published rules, from their formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.steps import factors

import optaxclip
from optaxclip.thresholds.learned import relearn_after_of

INF = float("inf")
ONES = np.ones(2, np.float32)


@pytest.fixture(scope="module")
def norms():
    """Noise, a spike, and a shift that stays: [steps, 2 leaves]."""
    rng = np.random.default_rng(3)
    n = 0.1 * np.exp(0.3 * rng.standard_normal((60, 2)))
    n[25] *= 20
    n[40:] *= 1.5
    return np.float32(n).astype(np.float64)


def clipped(norms, bounds):
    return np.minimum(1, bounds / norms)


def same(txs, norms, expected):
    found = factors(txs, norms)
    assert found.keys() == expected.keys()
    for case, factor in found.items():
        np.testing.assert_allclose(factor, expected[case], rtol=2e-6, err_msg=str(case))


def by_leaf(rule, norms, *args):
    return np.stack([rule(n, *args) for n in norms.T], 1)


def autoclip(n, p, window):
    return [np.percentile(n[max(0, t + 1 - window) : t + 1], p) for t in range(len(n))]


def test_autoclip(norms):
    percentiles = [0, 10, 50, 97, 100]
    txs = {p: optaxclip.autoclip(p, window=16, relearn_after=None, by="leaf") for p in percentiles}
    same(txs, norms, {p: clipped(norms, by_leaf(autoclip, norms, p, 16)) for p in percentiles})


def zclip(n, k, decay, mode, warmup):
    mean, var, bounds = n[:warmup].mean(), n[:warmup].var(), [INF] * warmup
    for x in n[warmup:]:
        std = var**0.5
        z = (x - mean) / (std + 1e-6)
        bound = {"zscore": mean + std * k**2 / z, "mean": mean, "percentile": mean + k * std}[mode]
        bounds.append(bound if z > k or mode == "percentile" else INF)
        x = min(x, bounds[-1])
        mean = decay * mean + (1 - decay) * x
        var = decay * var + (1 - decay) * (x - mean) ** 2
    return bounds


@pytest.mark.parametrize("mode", ["zscore", "mean", "percentile"])
def test_zclip(norms, mode):
    arguments = {"decay": 0.9, "mode": mode, "warmup": 8, "relearn_after": None, "by": "leaf"}
    bounds = by_leaf(zclip, norms, 1.5, 0.9, mode, 8)
    txs = {c: optaxclip.zclip(1.5, max_norm=c, **arguments) for c in (0.11, INF)}
    same(txs, norms, {c: clipped(norms, np.minimum(bounds, c)) for c in txs})


def test_a_traced_percentile_beyond_the_ends_is_the_end(norms):
    percentiles = {"9900": np.float32(9900), "100": 100, "-50": np.float32(-50), "0": 0}
    txs = {
        name: optaxclip.autoclip(
            jnp.asarray(p) if isinstance(p, np.float32) else p, window=16, by="leaf"
        )
        for name, p in percentiles.items()
    }
    found = factors(txs, norms[:40])
    np.testing.assert_array_equal(found["9900"], found["100"])
    np.testing.assert_array_equal(found["-50"], found["0"])
    assert not np.array_equal(found["0"], found["100"])


@pytest.mark.parametrize("leaves", [2, 1], ids=["two leaves", "one without a gradient"])
def test_adagc(norms, leaves):
    ratio, decay, warmup = 1.1, 0.9, 10

    def adagc(largest):
        out, gamma = [], np.full(leaves, INF)
        for t, n in enumerate(norms[:, :leaves]):
            if t < warmup:
                out.append(np.full(leaves, min(1, largest / np.sqrt(np.sum(n**2)))))
                gamma = np.minimum(gamma, n * out[-1])
            else:
                out.append(clipped(n, ratio * gamma))
                gamma = decay * gamma + (1 - decay) * n * out[-1]
        return np.array(out)

    arguments = {"decay": decay, "warmup": warmup, "relearn_after": None}
    txs = {c: optaxclip.adagc(ratio, max_norm=c, **arguments) for c in (0.12, 0.05)}
    found = factors(txs, norms * (np.arange(2) < leaves))
    for c, factor in found.items():
        np.testing.assert_allclose(factor[:, :leaves], adagc(c), rtol=2e-6, err_msg=str(c))


def history(n, k, window):
    bounds = []
    for t in range(len(n)):
        past = n[max(0, t - window) : t]
        bounds.append(past.mean() + k * max(past.std(), 1e-6) if t >= window // 2 else INF)
    return bounds


def test_clip_by_history(norms):
    tx = optaxclip.clip_by_history(1.5, window=12, relearn_after=None, by="leaf")
    same({"": tx}, norms, {"": clipped(norms, by_leaf(history, norms, 1.5, 12))})


def quantile(n, q, eta, bound):
    bounds = []
    for x in n:
        bounds.append(bound)
        bound = bound * np.exp(-eta * ((x <= bound) - q))
    return bounds


def test_clip_by_quantile(norms):
    tx = optaxclip.clip_by_quantile(0.8, step_size=0.2, init=0.05, relearn_after=None, by="leaf")
    same({"": tx}, norms, {"": clipped(norms, by_leaf(quantile, norms, 0.8, 0.2, 0.05))})


def test_clip_by_quantile_without_init_starts_from_the_quantile_of_the_warm_up(norms):
    tx = optaxclip.clip_by_quantile(0.5, relearn_after=None, by="leaf")
    found = factors(tx, norms[:26]) * norms[:26]
    np.testing.assert_allclose(found[:25], norms[:25], rtol=1e-6)
    np.testing.assert_allclose(found[25], np.quantile(norms[:25], 0.5, axis=0), rtol=1e-6)


def stabilized(n, decay, sq_decay, eps):
    m = v = 0.0
    lengths = []
    for t, x in enumerate(n, 1):
        m, v = decay * m + (1 - decay) * x, sq_decay * v + (1 - sq_decay) * x * x
        lengths.append(m / (1 - decay**t) / (np.sqrt(v / (1 - sq_decay**t)) + eps))
    return lengths


def test_gradient_stabilizer(norms):
    """By leaf, to 1e-6; eps counts in the unit of the norm."""
    txs = {
        eps: optaxclip.gradient_stabilizer(outlier=INF, **({} if eps == 1e-8 else {"eps": eps}))
        for eps in (1e-8, 0.0, 0.05)
    }
    found = factors(txs, norms)
    for eps, factor in found.items():
        expected = by_leaf(stabilized, norms, 0.7, 0.9, eps) / norms
        np.testing.assert_allclose(factor, expected, rtol=1e-6, err_msg=str(eps))


LEVELS = {
    "spike": lambda t: 1000.0 if t == 100 else 1.0,
    "rise": lambda t: 1000.0 if t >= 100 else 1.0,
    "fall": lambda t: 1e-3 if t >= 100 else 1.0,
    "first": lambda t: 1000.0 if t == 0 else 1.0,
}


def lengths_of(outlier):
    """By stream, the length of the gradient on each of 400 steps."""
    streams = np.array([[[level(t)] * 2 for t in range(400)] for level in LEVELS.values()])
    found = factors(optaxclip.gradient_stabilizer(outlier=outlier), streams) * streams
    return dict(zip(LEVELS, found[..., 0], strict=True))


def test_gradient_stabilizer_is_as_long_as_its_docstring_says():
    ours, published = lengths_of(2.0), lengths_of(INF)
    np.testing.assert_allclose(ours["spike"][100], 1.14, atol=0.01)
    assert ours["spike"][101:].min() > 0.95
    np.testing.assert_allclose(published["spike"][100], 0.95, atol=0.01)
    assert 0.009 < published["spike"][101:].min() < 0.02
    assert (published["spike"][101:] < 0.9).sum() > 95
    for found in (ours, published):
        assert max(x.max() for x in found.values()) <= 1.41
        np.testing.assert_allclose(found["rise"][140:], 1, atol=0.1)
        for name, start in (("fall", 100), ("first", 0)):
            after = found[name][start + 1 :]
            assert 0.002 < after.min() < 0.02
            assert 100 < (after < 0.9).sum() < 150
            np.testing.assert_allclose(after[150:], 1, atol=0.1)


def test_gradient_stabilizer_counts_an_outlier_as_twice_the_mean_before_it():
    n = np.array([1.0, 1.0, 50.0, 1.0, 1.0])
    counted = np.array([1.0, 1.0, 2.0, 1.0, 1.0])
    expected = stabilized(counted, 0.7, 0.9, 0.0)
    found = factors(optaxclip.gradient_stabilizer(eps=0.0), np.stack([n, n], 1))[:, 0] * n
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gradient_stabilizer_has_the_same_length_in_any_unit():
    n = np.exp(0.5 * np.random.default_rng(0).standard_normal((50, 2)))
    tx = optaxclip.gradient_stabilizer(eps=0.0)
    found = factors(tx, np.stack([n, n * 1e-20, n * 1e20]))
    lengths = found * np.stack([n, n * 1e-20, n * 1e20])
    np.testing.assert_allclose(lengths[1:], np.stack([lengths[0]] * 2), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_gradient_stabilizer_learns_nothing_from_what_tells_nothing(value):
    n = np.exp(0.5 * np.random.default_rng(0).standard_normal((40, 2)))
    with_it = np.insert(n, 20, value, axis=0)
    tx = optaxclip.gradient_stabilizer()
    without, found = factors(tx, n), factors(tx, with_it)
    np.testing.assert_allclose(np.delete(found, 20, axis=0), without, rtol=1e-6)


def test_gradient_stabilizer_by_global_norm_has_one_length():
    grads = [3 * ONES, ONES]
    tx = optaxclip.gradient_stabilizer(by="global", eps=0.0)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(updates)), 1, rtol=1e-6)


# --- what all of them share ---

MAKE = {
    "autoclip": optaxclip.autoclip,
    "zclip": optaxclip.zclip,
    "adagc": optaxclip.adagc,
    "clip_by_history": optaxclip.clip_by_history,
    "clip_by_quantile": optaxclip.clip_by_quantile,
}


@pytest.mark.parametrize("name", MAKE)
def test_names_units_and_the_scale_of_norms(name):
    """Bounds are in the unit of the norms, from the smallest gradients to the largest."""
    small = 0.1 * np.exp(0.1 * np.random.default_rng(0).standard_normal((120, 2)))
    small[110] *= 30
    free = {"max_norm": INF} if name in ("zclip", "adagc") else {}
    tx = MAKE[name](by="leaf", **free)
    expected, tiny, huge = factors(tx, np.stack([small, small * 1e-20, small * 1e20]))
    np.testing.assert_allclose(tiny, expected, rtol=1e-4)
    np.testing.assert_allclose(huge, expected, rtol=1e-4)
    assert list(optaxclip.clip_stats(jax.eval_shape(tx.init, [ONES]))) == [name]
    named = MAKE[name](name="mine", by=optaxclip.Norm("unit", unit_axes=0))
    assert list(optaxclip.clip_stats(jax.eval_shape(named.init, [ONES]))) == ["mine"]


@pytest.mark.parametrize("name", MAKE)
def test_only_the_first_argument_is_positional(name):
    with pytest.raises(TypeError, match="positional"):
        MAKE[name](1.0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optaxclip.autoclip(101), r"percentile must be in \[0, 100\], got 101\. Pass"),
        (lambda: optaxclip.autoclip(window=0), r"window must be >= 1, got 0"),
        (lambda: optaxclip.zclip(decay=1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: optaxclip.zclip(-1.0), r"z_threshold must be >= 0, got -1\.0"),
        (lambda: optaxclip.zclip(mode="z"), r"unknown mode, got 'z'\. Use one of"),
        (lambda: optaxclip.zclip(relearn_after=24), r"relearn_after must be >= 25, .*got 24"),
        (lambda: optaxclip.zclip(relearn_after="never"), r"\"auto\", a whole number.*got 'never'"),
        (lambda: optaxclip.adagc(max_norm=-2), r"max_norm must be >= 0, got -2"),
        (lambda: optaxclip.clip_by_history(relearn_after=0), r"relearn_after must be >= 1, got 0"),
        (lambda: optaxclip.clip_by_history(window=1), r"window must be >= 2, got 1\. Pass 2 or"),
        (
            lambda: optaxclip.clip_by_quantile(init=0),
            r"init must be > 0 and finite, got 0\. Pass for",
        ),
        (
            lambda: optaxclip.clip_by_quantile(step_size=0.0),
            r"step_size must be > 0 and finite, got 0\.0",
        ),
        (
            lambda: optaxclip.zclip(by=optaxclip.Norm("leaf"), axis_name="data"),
            r"part of a Norm, got axis_name='data' beside one\. Pass it inside: by=Norm\(\.\.\.",
        ),
        (
            lambda: optaxclip.gradient_stabilizer(sq_decay=1),
            r"sq_decay must be in \[0, 1\), got 1\. Pass for example 0\.9",
        ),
        (lambda: optaxclip.gradient_stabilizer(-0.1), r"decay must be in \[0, 1\), got -0\.1"),
        (lambda: optaxclip.gradient_stabilizer(eps=-1.0), r"eps must be >= 0, got -1\.0"),
        (lambda: optaxclip.gradient_stabilizer(outlier=0.5), r"outlier must be >= 1, got 0\.5"),
        (lambda: optaxclip.clip_by_quantile(1.5), r"quantile must be in \[0, 1\], got 1\.5"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "usual", "warmup", "expected"),
    [("auto", 25, 4, 25), ("auto", 25, 50, 50), (30, 25, 4, 30), (None, 25, 50, None)],
)
def test_relearn_after_follows_a_longer_warm_up(value, usual, warmup, expected):
    assert relearn_after_of(value, usual, warmup) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: optaxclip.clip_by_history(window=256),
        lambda: optaxclip.skip_outliers(
            optax.identity(), optaxclip.thresholds.mean_plus_std(window=256)
        ),
        lambda: optaxclip.zclip(warmup=50),
        lambda: optaxclip.adagc(warmup=200),
        lambda: optaxclip.spam_clip(warmup=50),
        lambda: optaxclip.adaclip(warmup=50),
    ],
)
def test_a_longer_warm_up_needs_no_other_argument(make):
    jax.eval_shape(make().init, [ONES])


def test_arguments_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"window must be a whole number, got 2\.5"):
        optaxclip.autoclip(window=2.5)
    tx = optax.inject_hyperparams(optaxclip.autoclip)()
    with pytest.raises(TypeError, match=r"window must be static.*static_args=\('window',\)"):
        tx.init([ONES])


def test_a_state_of_another_tree():
    tx = optaxclip.zclip(by="unit")
    state = tx.init([np.ones((2, 300), np.float32)])
    with pytest.raises(
        ValueError, match=r"init saw, got 400 for 300, of the leaves 0 \(2, 400\)\."
    ):
        tx.update([np.ones((2, 400), np.float32)], state)
    tx = optaxclip.adaclip()
    with pytest.raises(ValueError, match=r"5 for 1, of the leaves 0 \(2,\), .* and 2 more\. Call"):
        tx.update([ONES] * 5, tx.init([ONES]))


@pytest.mark.parametrize("name", MAKE)
def test_the_state_is_small(name):
    state = jax.eval_shape(MAKE[name](by="leaf").init, [ONES] * 3).threshold_state
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= 3 * 16 * 1024
