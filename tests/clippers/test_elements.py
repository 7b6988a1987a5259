"""SPAM's and Stable-SPAM's clippers: the published rules, and what is kept by element."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import quick

import optaxclip
from optaxclip.thresholds import ElementBounds

INF = float("inf")


def run(tx, steps):
    """The updates of streams of gradients [..., steps, elements], and the last state."""

    def tree(g):
        return {"w": g, "ids": jnp.zeros(1, jnp.int32)}

    def step(state, g):
        updates, state = tx.update(tree(g), state)
        return state, updates["w"]

    scan = lambda steps: jax.lax.scan(step, tx.init(tree(steps[0])), steps)
    state, updates = quick.run(scan if np.ndim(steps) == 2 else jax.vmap(scan), np.float32(steps))
    return updates, state


@pytest.fixture(scope="module")
def stream():
    """Gaussian elements of four sizes with spikes, zeros and a lasting rise."""
    rng = np.random.default_rng(5)
    g = rng.standard_normal((120, 4)) * [1.0, 0.3, 1e-3, 5.0]
    g[40] *= 1000
    g[60, 1] *= 1000
    g[70:90, 3] = 0
    g[100:] *= 10
    return np.float32(g).astype(np.float64)


def spam(steps, theta, decay, warmup):
    v, out = np.zeros(steps.shape[1]), []
    for t, g in enumerate(steps):
        c = np.sqrt(theta * v)
        spiked = (t >= warmup) & (g**2 > theta * v) & (v > 0)
        g = np.where(spiked, np.sign(g) * c, g)
        v = decay * v + (1 - decay) * g**2
        out.append(g)
    return np.array(out)


@pytest.mark.parametrize("theta", [4.0, None])
def test_published_spam(stream, theta):
    tx = optaxclip.spam_clip(theta, decay=0.95, warmup=20, relearn_after=None)
    expected = spam(stream, theta or 5000.0, 0.95, 20)
    assert (np.abs(expected) < np.abs(stream)).sum() >= 5, "this stream has spikes"
    np.testing.assert_allclose(run(tx, stream)[0], expected, rtol=1e-6)


def adaclip(steps, decay):
    m, out = 0.0, []
    for t, g in enumerate(steps):
        largest = np.abs(g).max()
        m = decay * m + (1 - decay) * largest
        c = m / (1 - decay ** (t + 1))
        out.append(np.where(np.abs(g) > c, g / largest * c, g))
    return np.array(out)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_published_adaclip(stream, decay):
    expected = adaclip(stream, decay)
    assert (np.abs(expected) < np.abs(stream)).any(1).mean() > 0.2
    tx = optaxclip.adaclip(decay, relearn_after=None)
    np.testing.assert_allclose(run(tx, stream)[0], expected, rtol=1e-6)


def test_adaclip_sets_what_is_beyond_the_bound_to_it():
    steps = np.ones((6, 3)) * [1.0, 0.5, 0.1]
    steps[-1] = [50, -2, 0.3]
    updates, _ = run(optaxclip.adaclip(warmup=4), steps)
    np.testing.assert_allclose(updates[-1], [1, -1, 0.3], rtol=1e-6)


def shares(steps, theta, decay, warmup):
    """spam_clip after its warm-up, on a stream whose only outlier is the last step."""
    n = np.abs(steps).max(1)
    square, share = np.mean(n[:warmup] ** 2), np.ones(steps.shape[1])
    for t, g in enumerate(steps):
        rate = 1 / (t + 2) if t < warmup else 1 - decay
        share = np.where(g == 0, share, share + rate * ((g / n[t]) ** 2 - share))
        if t >= warmup:
            bounds = np.sqrt(theta * square * share)
            square = decay * square + (1 - decay) * n[t] ** 2
    return np.minimum(np.abs(g), bounds)


def test_spam_bounds_each_element_by_its_leafs_level_and_its_share():
    rng = np.random.default_rng(2)
    steps = np.exp(0.2 * rng.standard_normal((38, 4))) * [1.0, -0.3, 1e-3, 5.0]
    steps[10:20, 1] = 0
    tx = optaxclip.spam_clip(4.0, decay=0.9, warmup=8)
    steps[-1] *= 1000
    expected = shares(steps, 4.0, 0.9, 8)
    assert (np.abs(steps[-1]) > expected).sum() >= 3
    np.testing.assert_allclose(np.abs(run(tx, steps)[0][-1]), expected, rtol=1e-5)


def test_a_rarely_used_element_keeps_its_bound():
    """One element of an embedding, used on one step in ten."""
    rng = np.random.default_rng(0)
    steps = np.exp(0.1 * rng.standard_normal((400, 2)))
    steps[np.arange(400) % 10 != 0, 1] = 0
    updates, _ = run(optaxclip.spam_clip(), steps)
    np.testing.assert_array_equal(updates, np.float32(steps))


def test_the_spike_of_a_small_element_alone():
    """It passes as a small multiple of its own size, not its leaf's, as often as it comes."""
    steps = np.ones((400, 2)) * [1.0, 1e-3]
    steps[[360, 380], 1] = [1.0, 1000.0]
    updates, _ = run(optaxclip.spam_clip(4.0, decay=0.95), steps)
    assert (updates[[360, 380], 1] > 2e-3).all()
    assert (updates[[360, 380], 1] < 1.1 * 2.1e-3).all()


def test_an_element_that_changes_for_good_is_followed():
    steps = np.ones((1200, 2))
    steps[300:, 1] = 0.1
    steps[800:, 1] = 1.0
    updates, _ = run(optaxclip.spam_clip(decay=0.99), steps)
    clipped = updates[:, 1] < steps[:, 1]
    assert clipped[800]
    assert not clipped[1100:].any()


def test_bounds_do_not_depend_on_the_unit_of_the_gradient(stream):
    tx = optaxclip.spam_clip()
    scales = np.array([1, 1e-15, 1e15])[:, None, None]
    found, _ = run(tx, scales * stream)
    for scale, updates in zip(scales, found, strict=True):
        np.testing.assert_allclose(updates, scale * np.float64(found[0]), rtol=1e-4)


def test_statistics_count_in_bounds():
    steps = np.ones((31, 2)) * [1.0, 0.1]
    steps[-1] = [1.0, 50.0]
    tx = optaxclip.spam_clip(4.0)
    updates, state = run(tx, steps)
    stats = optaxclip.clip_stats(state)["spam_clip"]
    assert stats.pre_clip_norm == pytest.approx(50 / updates[-1, 1], rel=1e-5)
    assert stats.clip_factor == pytest.approx(updates[-1, 1] / 50, rel=1e-5)
    assert (stats.threshold, stats.post_clip_norm) == (1, 1)
    assert (int(stats.count), int(stats.clipped_count)) == (31, 1)
    steps[-1] = [np.nan, 1.0]
    assert int(optaxclip.clip_stats(run(tx, steps)[1])["spam_clip"].nonfinite_count) == 1
    untold = optaxclip.clip_stats(run(optaxclip.spam_clip(4.0, stats=False), steps)[1])["spam_clip"]
    assert (untold.pre_clip_norm, int(untold.count)) == (-1, 31)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Given bounds of elements, as they are or as a scale and the rest."""

    bounds: tuple[float, ...]
    scale: float | None = None

    def init(self, norm, params):
        return ()

    def bound(self, norms, state, context):
        bounds = jnp.array(self.bounds)
        if self.scale is None:
            return ElementBounds([bounds]), state
        return ElementBounds([bounds / self.scale], [jnp.array(self.scale)]), state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("g", [[0.5, 3.0, -8.0], [0.0, 0.0, 0.0], [1.0, np.nan, 9.0], [1, INF, 2]])
def test_bounds_with_a_scale_are_those_without(g, dtype):
    found = []
    for scale in (None, 4.0):
        tx = optaxclip.clip_by("element", Fixed((1.0, 2.0, 0.5), scale))
        updates, state = tx.update(jnp.array(g, dtype), tx.init(jnp.zeros(3)))
        found.append((jnp.complex64(updates), state.stats))  # NumPy compares NaN of these
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_state_is_one_array_like_the_parameters():
    params = {"w": jnp.ones((30, 40)), "b": jnp.ones(40), "ids": jnp.ones(3, jnp.int32)}
    for tx in (optaxclip.spam_clip(), optaxclip.spam_clip(relearn_after=None)):
        state = jax.eval_shape(tx.init, params).threshold_state
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert 4 * 1240 <= size <= 4 * (1240 + 2 * 60)


def test_the_state_of_adaclip_is_small():
    """At most 16 KB a norm: here each leaf's largest element."""
    params = {"w": jnp.ones((3000, 400)), "b": jnp.ones(40), "ids": jnp.ones(3, jnp.int32)}
    for tx in (optaxclip.adaclip(), optaxclip.adaclip(relearn_after=None)):
        state = jax.eval_shape(tx.init, params)
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= 2 * 16 * 1024


@pytest.mark.parametrize("relearn_after", [25, None])
def test_a_state_of_another_tree(relearn_after):
    tx = optaxclip.spam_clip(relearn_after=relearn_after)
    with pytest.raises(ValueError, match=r"saw, got 0 \(3,\) in init and 0 \(2,\) in the updates"):
        tx.update([jnp.ones(2)], tx.init([jnp.ones(3)]))
    with pytest.raises(ValueError, match=r"got w \(3,\) in init and v \(3,\) in the updates\."):
        tx.update({"v": jnp.ones(3), "w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"got 1 leaves in init and 2 in the updates\. Call"):
        tx.update([jnp.ones(3)] * 2, tx.init([jnp.ones(3)]))
    with pytest.raises(ValueError, match=r"got the root \(3,\) in init and the root \(2,\) in the"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optaxclip.spam_clip(-1.0), r"theta must be >= 0, got -1\.0"),
        (lambda: optaxclip.spam_clip(decay=1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: optaxclip.spam_clip(relearn_after=3), r"relearn_after must be >= 25, .*got 3"),
        (lambda: optaxclip.spam_clip(warmup=0, relearn_after=None), r"warmup must be >= 1, got 0"),
        (lambda: optaxclip.adaclip(1.5), r"decay must be in \[0, 1\), got 1\.5"),
        (lambda: optaxclip.adaclip(by="rows"), r"unknown norm, got 'rows'"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
