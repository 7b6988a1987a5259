import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools.clippers import CLIPPERS, ONE_EACH, example_tree, make
from tools.oracles import EPS, assert_close, assert_same_bits, f64
from tools.oracles import norm as exact

import optaxclip
from optaxclip import Norm, clip_by, clip_stats

INF = float("inf")
G = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 12.0])}  # norms 5, 12 and 13


def only(state):
    (stats,) = clip_stats(state).values()
    return stats


# --- what comes out ---


@pytest.mark.parametrize("by", ["global", "leaf", "unit", "element"])
@pytest.mark.parametrize("response", ["rescale", "rational", "sqrt", "tanh", "normalize", "drop"])
def test_zero_norm_with_bound_zero(by, response):
    tx = clip_by(by, 0.0, response)
    zeros = jax.tree.map(jnp.zeros_like, G)
    updates, state = tx.update(zeros, tx.init(G))
    assert_close(updates, zeros)
    assert only(state).nonfinite_count == 0
    updates, _ = tx.update(G, tx.init(G))
    assert_close(updates, zeros)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "complex64"])
@pytest.mark.parametrize("by", ["global", "leaf", "unit", "element"])
def test_inside_the_bound_every_bit_stays(dtype, by):
    """Also at the bound itself, negative zeros and subnormal numbers."""
    with jax.enable_x64(dtype == "float64"):
        tree = {"v": jnp.array([3.0, -4.0, -0.0], dtype), "w": jnp.array([0.0, -0.5], dtype)}
        norm = Norm(by, unit_axes=0) if by == "unit" else Norm(by)
        largest = {"global": np.sqrt(25.25), "element": 4.0}.get(by, 5.0)
        step = jax.jit(lambda c: clip_by(norm, c).update(tree, clip_by(norm, c).init(tree))[0])
        for bound in (largest * (1 + 1e-7), INF, *([5.0, 1e30] if by != "global" else [])):
            assert_same_bits(step(jnp.asarray(bound)), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "complex64"])
@pytest.mark.parametrize("ord", [1, 2, 3, INF, "rms"])
@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_never_longer_than_the_bound(dtype, ord, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(dtype == "float64"):
        x = rng.standard_normal(1000) + 1j * rng.standard_normal(1000)
        leaf = jnp.asarray(x if dtype == "complex64" else x.real, dtype)
        for bound in rng.uniform(0.01, 0.5, 5):
            tx = optaxclip.clip_by_global_norm(float(bound), ord=ord)
            updates, _ = tx.update([leaf], tx.init([leaf]))
            assert exact(updates, ord) <= bound * (1 + EPS[dtype])
            assert exact(updates, ord) >= bound * (1 - 2 * EPS[dtype])


@pytest.mark.parametrize(
    ("values", "dtype", "bound"),
    [
        ([300.0, 400.0], "float16", 5.0),
        ([1e25, 2e25], "float32", 1.0),
        ([5e36, 5e36], "float32", 1.0),
        ([1e38] * 4, "float32", 1000.0),
        ([1e-23, 0.0], "float32", 1e-24),
        ([1e-30, 1e-30], "float32", 1e-36),
        ([1e30, 1e30], "bfloat16", 1e-3),
        ([1e200, 1e200], "float64", 1e-3),
        ([1e30 + 2e30j, 0.0], "complex64", 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["global", "leaf"])
def test_finite_gradients_of_extreme_norm(values, dtype, bound, by):
    with jax.enable_x64(dtype == "float64"):
        leaf = jnp.asarray(np.array(values), dtype)
        tx = clip_by(by, bound)
        updates, state = tx.update([leaf], tx.init([leaf]))
        x = f64(leaf) / np.abs(f64(leaf)).max()
        expected = bound * x / np.linalg.norm(x)
        np.testing.assert_allclose(f64(updates[0]), expected, rtol=2 * EPS[dtype])
        assert only(state).nonfinite_count == 0
        assert only(state).clipped_count == 1


@pytest.mark.parametrize("value", [1e-37, 1e-30, 1e-20], ids=str)
def test_normalize_of_tiny_gradients(value):
    tx = optaxclip.normalize(10.0)
    updates, _ = tx.update([jnp.array([value, 0.0])], tx.init([jnp.zeros(2)]))
    np.testing.assert_allclose(updates[0], [10.0, 0.0], rtol=1e-6)


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_nonfinite_leaves_propagate_or_become_zero(bad, jit):
    grads = {"bad": jnp.array([1.0, BAD[bad]]), "good": jnp.array([0.3, 0.4])}
    for by in ("leaf", "element"):
        for nonfinite in ("propagate", "zero"):
            tx = clip_by(by, 0.25, nonfinite=nonfinite)
            update = jax.jit(tx.update) if jit else tx.update
            updates, state = update(grads, tx.init(grads))
            first, second = updates["bad"]
            if by == "leaf":
                np.testing.assert_allclose(updates["good"], [0.15, 0.2], rtol=1e-6)
                expected_first = {"zero": 0.0, "nan": np.nan}.get(
                    nonfinite if nonfinite == "zero" else bad, 0.0
                )
                expected_second = 0.0 if nonfinite == "zero" else np.nan
            else:
                np.testing.assert_allclose(updates["good"], [0.25, 0.25], rtol=1e-6)
                expected_first = 0.25
                expected_second = 0.0 if nonfinite == "zero" else np.clip(BAD[bad], -0.25, 0.25)
            np.testing.assert_allclose([first, second], [expected_first, expected_second])
            assert only(state).nonfinite_count == 1
            _, state = update({**grads, "bad": grads["good"]}, state)
            assert (only(state).nonfinite_count, only(state).count) == (1, 2)


@pytest.mark.parametrize("bad", [complex(np.inf, 1), complex(0, -np.inf)], ids=str)
def test_a_complex_infinity_has_no_direction_to_be_clipped_in(bad):
    grads = [jnp.array([bad, 3 + 4j])]
    for nonfinite, is_expected in {"propagate": jnp.isnan, "zero": lambda x: x == 0}.items():
        tx = optaxclip.clip_by_value(1.0, nonfinite=nonfinite)
        first, second = tx.update(grads, tx.init(grads))[0][0]
        assert is_expected(first)
        np.testing.assert_allclose(second, 0.6 + 0.8j, rtol=1e-6)


def test_one_bad_element_spoils_the_global_gradient_unless_zeroed():
    grads = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
    for nonfinite, check in {"propagate": jnp.isnan, "zero": lambda x: x == 0}.items():
        tx = optaxclip.clip_by_global_norm(1.0, nonfinite=nonfinite)
        updates, _ = tx.update(grads, tx.init(grads))
        assert all(bool(check(x).all()) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "tx",
    [clip_by("element", 1.0, r) for r in ("rational", "tanh", "drop", "normalize", "rescale")],
    ids=["rational", "tanh", "drop", "normalize", "rescale"],
)
def test_elementwise_responses_keep_directions_of_complex_numbers(tx):
    z = jnp.array([3 + 4j, 0.3 - 0.4j, 0.0, -0.5j])
    updates, _ = tx.update([z], tx.init([z]))
    ratio = np.asarray(updates[0]) / np.where(z == 0, 1, z)
    np.testing.assert_allclose(ratio.imag, 0.0, atol=1e-7)
    assert (ratio.real >= 0).all()
    assert (np.abs(updates[0]) <= 1 + 1e-6).all()


# --- mistakes ---


def test_unknown_words():
    with pytest.raises(ValueError, match=r"unknown norm, got 'tree'\. Use one of"):
        clip_by("tree", 1.0)
    with pytest.raises(ValueError, match=r"unknown response, got 'squash'\. Use one of"):
        clip_by("global", 1.0, "squash")
    for factory, bound, rest in CLIPPERS.values():
        if "nonfinite" not in inspect.signature(factory).parameters:
            continue
        with pytest.raises(ValueError, match=r"unknown nonfinite, got 'skip'\. Use one of"):
            factory(bound, **{**rest, "nonfinite": "skip"})
    with pytest.raises(ValueError, match=r"stats=False saves nothing for a global norm.*Drop the"):
        clip_by("global", 1.0, stats=False)


def test_a_leaf_that_is_no_array():
    tree, params = example_tree(), example_tree()
    tree["body"]["bias"] = 0.5
    for name in ONE_EACH:
        tx = make(name)
        state = tx.init(params)
        with pytest.raises(TypeError, match=r"leaves must be arrays, got float 0\.5 at body/bias"):
            tx.update(tree, state, params)


def test_another_tree_than_at_init():
    tx = optaxclip.clip_by_leaf_norm(1.0)
    with pytest.raises(ValueError, match=r"got 2 for 2, and c differs\. Call init with"):
        tx.update({"a": jnp.ones(1), "c": jnp.ones(1)}, tx.init(G))


# --- statistics ---


@pytest.mark.parametrize("ord", [1, 2, INF, "rms"])
@pytest.mark.parametrize("by", ["global", "leaf", "unit", "element"])
@pytest.mark.parametrize("response", ["rescale", "sqrt", "normalize"])
def test_norms_before_and_after_are_those_of_the_gradient(ord, by, response):
    grads = example_tree()
    whole = {"unit_axes": lambda path, x: tuple(range(x.ndim))} if by == "unit" else {}
    norm = Norm(by, ord, **whole)
    tx = clip_by(norm, 0.3, response)
    updates, state = tx.update(grads, tx.init(grads))
    groups = [jax.tree.leaves(grads)] if by == "global" else [[x] for x in jax.tree.leaves(grads)]
    ord = INF if by == "element" else ord
    before = [exact(group, ord) for group in groups]
    at = int(np.argmax(before))
    out = [jax.tree.leaves(updates)] if by == "global" else [[x] for x in jax.tree.leaves(updates)]
    stats = only(state)
    assert stats.pre_clip_norm == pytest.approx(before[at], rel=1e-5)
    assert stats.post_clip_norm == pytest.approx(exact(out[at], ord), rel=1e-5)
    assert stats.threshold == pytest.approx(0.3)
    factor = exact(out[at], ord) / before[at]
    assert stats.clip_factor == pytest.approx(factor, rel=1e-5)
    assert (stats.count, stats.clipped_count, stats.nonfinite_count) == (1, 1, 0)
    if by in ("leaf", "unit"):
        np.testing.assert_allclose(stats.groups.pre_clip_norm, before, rtol=1e-5)
        after = stats.groups.pre_clip_norm * stats.groups.clip_factor
        np.testing.assert_allclose(after, [exact(o, ord) for o in out], rtol=1e-5)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("by", ["global", "leaf", "element"])
@pytest.mark.parametrize("bad", BAD)
def test_the_norm_after_is_that_of_the_result_on_bad_steps_too(nonfinite, by, bad):
    grads = [jnp.array([0.5, BAD[bad]])]
    tx = clip_by(by, 1.0, nonfinite=nonfinite)
    updates, state = tx.update(grads, tx.init(grads))
    measured = exact(updates, INF if by == "element" else 2)
    if nonfinite == "zero" and by == "element":
        assert np.isfinite(only(state).post_clip_norm)
    else:
        np.testing.assert_allclose(only(state).post_clip_norm, measured, rtol=1e-6)


def test_counts_and_the_worst_group():
    tx = optaxclip.clip_by_leaf_norm({"a": 6.0, "b": 10.0})
    state = tx.init(G)
    scales = [(1.0, 1.0), (3.0, 1.0), (0.1, 0.1)]
    clipped = []
    for a, b in scales:
        _, state = tx.update({"a": G["a"] * a, "b": G["b"] * b}, state)
        clipped.append(int(only(state).clipped_count))
        if a == 1.0:
            assert (only(state).pre_clip_norm, only(state).threshold) == (12.0, 10.0)
        elif a == 3.0:  # both exceed, a by more
            assert (only(state).pre_clip_norm, only(state).threshold) == (15.0, 6.0)
    assert clipped == [1, 2, 2]  # steps, however many leaves
    assert only(state).groups.names == ("a", "b")
    assert only(state).groups.clipped_count.tolist() == [1, 2]
    assert only(state).count == 3
    np.testing.assert_allclose(only(state).groups.clip_factor, [1.0, 1.0])


def test_of_groups_with_one_factor_the_longest_is_the_worst():
    """In `adagc`'s warm-up all leaves share a factor; rounding must not choose among them."""
    tx = optaxclip.adagc(max_norm=1.3)
    tree = [jnp.full(k + 1, 0.1 * (k + 1) / 3) for k in range(20)]
    for shuffled in (tree, tree[::-1]):
        _, state = jax.jit(tx.update)(shuffled, tx.init(shuffled))
        np.testing.assert_allclose(only(state).pre_clip_norm, exact([tree[19]]), rtol=1e-6)


def test_groups_are_recorded_up_to_a_limit():
    def groups(n):
        tree = [jnp.ones(1) for _ in range(n)]
        return clip_stats(jax.eval_shape(optaxclip.clip_by_leaf_norm(1.0).init, tree))

    assert groups(1)["clip_by_leaf_norm"].groups is None
    assert groups(257)["clip_by_leaf_norm"].groups is None
    assert len(groups(256)["clip_by_leaf_norm"].groups.names) == 256


def test_double_precision_norms_beyond_float32_are_no_bad_steps():
    with jax.enable_x64(True):
        tx = optaxclip.clip_by_global_norm(1.0)
        updates, state = tx.update([jnp.array([1e50])], tx.init([jnp.zeros(1)]))
        assert updates[0].tolist() == pytest.approx([1.0])
        assert (only(state).nonfinite_count, only(state).clipped_count) == (0, 1)


@pytest.mark.parametrize("bad", BAD)
def test_every_group_counts_when_another_is_worse(bad):
    tx = optaxclip.clip_by_leaf_norm({"a": 0.0, "b": 1.0, "c": 1.0})
    grads = {"a": jnp.ones(1), "b": jnp.array([BAD[bad]]), "c": jnp.array([2.0])}
    _, state = tx.update(grads, tx.init(grads))
    assert only(state).nonfinite_count == 1
    assert only(state).clipped_count == 1
    _, state = tx.update({**grads, "b": jnp.zeros(1)}, state)
    assert (only(state).nonfinite_count, only(state).clipped_count) == (1, 2)


@pytest.mark.parametrize("by", ["global", "leaf", "element"])
def test_an_infinite_bound_leaves_infinities_alone(by):
    grads = [jnp.array([1.0, jnp.inf])]
    tx = clip_by(by, INF)
    assert_same_bits(tx.update(grads, tx.init(grads))[0], grads)


def test_without_stats():
    for tx in (
        optaxclip.clip_by_value(1.0, stats=False),
        optaxclip.soft_clip(1.0, elementwise=True, stats=False),
    ):
        _, state = tx.update(G, tx.init(G))
        assert (only(state).count, only(state).threshold) == (1, 1.0)
        assert (only(state).clipped_count, only(state).nonfinite_count) == (-1, -1)
        assert (only(state).pre_clip_norm, only(state).post_clip_norm) == (-1, -1)


HALF = {"a": True, "b": False}
WRAPPERS = {
    "alone": (lambda c: c, 13.0),
    "chain": (lambda c: optax.chain(optax.identity(), c, optax.adam(1e-3)), 13.0),
    "named_chain": (lambda c: optax.named_chain(("x", c), ("y", optax.sgd(1.0))), 13.0),
    "masked": (lambda c: optax.masked(c, HALF), 5.0),
    "partition": (
        lambda c: optax.partition({True: c, False: optax.set_to_zero()}, HALF),
        5.0,
    ),
    "inject": (
        lambda c: optax.inject_hyperparams(lambda lr: optax.chain(c, optax.sgd(lr)))(0.1),
        13.0,
    ),
    "apply_if_finite": (lambda c: optax.apply_if_finite(c, 3), 13.0),
    "skip_nonfinite": (optaxclip.skip_nonfinite, 13.0),
    "multi_steps": (lambda c: optax.MultiSteps(c, 1), 13.0),
    "schedule_free": (
        lambda c: optax.contrib.schedule_free(optax.chain(c, optax.sgd(0.1)), 0.1),
        13.0,
    ),
    "deep": (
        lambda c: optaxclip.skip_nonfinite(
            optax.chain(optax.apply_if_finite(optax.masked(optax.chain(c), HALF), 2))
        ),
        5.0,
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clip_stats_finds_the_clipper(wrapper):
    wrap, norm = WRAPPERS[wrapper]
    tx = wrap(optaxclip.clip_by_global_norm(1.0, name="here"))
    state = tx.init(G)
    assert clip_stats(state)["here"].count == 0
    _, state = jax.jit(tx.update)(G, state, G)
    stats = clip_stats(state)
    assert list(stats) == ["here"]
    assert stats["here"].pre_clip_norm == pytest.approx(norm)
    assert (stats["here"].count, stats["here"].clipped_count) == (1, 1)


def test_clip_stats_of_clippers_with_one_name():
    one = optaxclip.clip_by_value
    named = [one(1.0), one(2.0), one(3.0, name="x"), one(4.0), one(5.0, name="clip_by_value_2")]
    tx = optax.chain(*named)
    _, state = tx.update(G, tx.init(G))
    stats = clip_stats({"opt": [state]})
    assert [float(s.threshold) for s in stats.values()] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert list(stats)[:4] == ["clip_by_value", "clip_by_value_2", "x", "clip_by_value_3"]


def test_clip_stats_without_a_clipper():
    assert clip_stats(optax.adam(1e-3).init(G)) == {}
    assert clip_stats(None) == {}


def test_clip_stats_inside_jit():
    tx = optaxclip.clip_by_global_norm(1.0)

    @jax.jit
    def step(state):
        _, state = tx.update(G, state)
        return {k: s._asdict() for k, s in clip_stats(state).items()}

    logged = step(tx.init(G))["clip_by_global_norm"]
    assert logged["pre_clip_norm"] == 13.0


def test_statistics_of_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(
        optaxclip.clip_by_leaf_norm(0.5), optaxclip.clip_by_global_norm(0.1), optax.sgd(1.0)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: 100 * jnp.sum(m(x)))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer, jnp.array([[3.0, 4.0]]))
    stats = clip_stats(optimizer.opt_state)
    assert list(stats) == ["clip_by_leaf_norm", "clip_by_global_norm"]
    last = stats["clip_by_global_norm"]
    assert float(last.pre_clip_norm) == pytest.approx(np.sqrt(0.5), rel=1e-5)
    assert f"{last.post_clip_norm:.2f}" == "0.10"
    assert int(last.clipped_count) == 2
    groups = stats["clip_by_leaf_norm"].groups
    np.testing.assert_allclose(np.asarray(groups.pre_clip_norm), [100.0, 500.0], rtol=1e-5)
    assert groups.names == ("bias", "kernel")
    moved = jax.tree.map(lambda a, b: a - b, nnx.state(model, nnx.Param), before)
    assert exact(jax.tree.leaves(moved)) == pytest.approx(0.2, rel=1e-5)
