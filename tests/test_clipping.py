import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import quick
from tools.clippers import CLIPPERS, ONE_EACH, example_tree, make
from tools.oracles import EPS, assert_close, assert_same_bits, f64
from tools.oracles import norm as exact
from tools.quick import quick_jit
from tools.steps import first_steps

import optaxclip
from optaxclip import Norm, clip_by, clip_stats

INF = float("inf")
G = {"a": np.float32([3, 4]), "b": np.float32([0, 12])}  # norms 5, 12 and 13
DTYPES = ["float32", "bfloat16", "float16", "float64", "complex64"]


def only(state):
    (stats,) = clip_stats(state).values()
    return stats


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def cast(x, dtype):
    return np.asarray(x).astype(jnp.dtype(dtype))


def cached(fixture):
    """A fixture that hands out a function, whose results are kept while the module runs."""
    return pytest.fixture(scope="module", name=fixture.__name__)(lambda: functools.cache(fixture))


# --- what comes out ---


EVERY_BY = ["global", "leaf", "unit", "element"]
RESPONSES = ["rescale", "rational", "sqrt", "tanh", "normalize", "drop"]


@cached
def with_bound_zero(by):
    """By response, the updates and states of zeros and of G."""

    def run(grads):
        found = {}
        for response in RESPONSES:
            tx = clip_by(by, 0.0, response)
            found[response] = jax.vmap(lambda g, tx=tx: tx.update(g, tx.init(g)))(grads)
        return found

    return quick.run(run, jax.tree.map(lambda x: np.stack([0 * x, x]), G))


@pytest.mark.parametrize("by", EVERY_BY)
@pytest.mark.parametrize("response", RESPONSES)
def test_zero_norm_with_bound_zero(by, response, with_bound_zero):
    updates, state = with_bound_zero(by)[response]
    assert only(row(state, 0)).nonfinite_count == 0
    assert_close(updates, jax.tree.map(lambda x: np.stack([0 * x, 0 * x]), G))


@cached
def inside_the_bound(dtype):
    """A tree, and by `by` the updates for all bounds that it is inside."""
    tree = {"v": cast([3.0, -4.0, -0.0], dtype), "w": cast([0.0, -0.5], dtype)}

    def run(bounds, tree):
        found = {}
        for by, these in bounds.items():
            norm = Norm(by, unit_axes=0) if by == "unit" else Norm(by)
            update = lambda c, norm=norm: clip_by(norm, c).update(tree, clip_by(norm, c).init(tree))
            found[by] = jax.vmap(update)(these)[0]
        return found

    with jax.enable_x64(dtype == "float64"):
        bounds = {}
        for by in EVERY_BY:
            largest = {"global": np.sqrt(25.25), "element": 4.0}.get(by, 5.0)
            at_the_bound = [5.0, 1e30] if by != "global" else []
            wide = np.float64 if dtype == "float64" else np.float32
            bounds[by] = np.array([largest * (1 + 1e-7), INF, *at_the_bound], wide)
        return tree, quick.run(run, bounds, tree)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", EVERY_BY)
def test_inside_the_bound_every_bit_stays(dtype, by, inside_the_bound):
    """Also at the bound itself, negative zeros and subnormal numbers."""
    tree, found = inside_the_bound(dtype)
    number = len(found[by]["v"])
    assert number == (2 if by == "global" else 4)
    for i in range(number):
        assert_same_bits(row(found[by], i), tree)


ORDS = [1, 2, 3, INF, "rms"]


@cached
def beyond_the_bound(dtype):
    """Bounds `[3, 5]`, and by ord the updates `[3, 5, 1000]` of three gradients."""
    leaves, bounds = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(1000) + 1j * rng.standard_normal(1000)
        leaves.append(cast(x if dtype == "complex64" else x.real, dtype))
        bounds.append(rng.uniform(0.01, 0.5, 5))
    bounds = np.asarray(bounds, np.float64 if dtype == "float64" else np.float32)

    def update(leaf, bound):
        found = {}
        for ord in ORDS:
            tx = optaxclip.clip_by_global_norm(bound, ord=ord)
            found[str(ord)] = tx.update([leaf], tx.init([leaf]))[0][0]
        return found

    with jax.enable_x64(dtype == "float64"):
        run = jax.vmap(jax.vmap(update, (None, 0)))
        return bounds, quick.run(run, np.stack(leaves), bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_never_longer_than_the_bound(dtype, ord, seed, beyond_the_bound):
    bounds, found = beyond_the_bound(dtype)
    assert found[str(ord)].dtype == dtype
    for bound, updates in zip(f64(bounds[seed]), found[str(ord)][seed], strict=True):
        assert exact([updates], ord) <= bound * (1 + EPS[dtype])
        assert exact([updates], ord) >= bound * (1 - 2 * EPS[dtype])


EXTREME = [
    ([300.0, 400.0], "float16", 5.0),
    ([1e25, 2e25], "float32", 1.0),
    ([5e36, 5e36], "float32", 1.0),
    ([1e38] * 4, "float32", 1000.0),
    ([1e-23, 0.0], "float32", 1e-24),
    ([1e-30, 1e-30], "float32", 1e-36),
    ([1e30, 1e30], "bfloat16", 1e-3),
    ([1e200, 1e200], "float64", 1e-3),
    ([1e30 + 2e30j, 0.0], "complex64", 1.0),
]


@cached
def of_extreme_norm(by, x64):
    """By case, the leaf and its update and state."""
    cases = {i: case for i, case in enumerate(EXTREME) if (case[1] == "float64") == x64}
    leaves = {i: cast(values, dtype) for i, (values, dtype, _) in cases.items()}

    def run(leaves):
        found = {}
        for i, (_, _, bound) in cases.items():
            tx = clip_by(by, bound)
            found[i] = tx.update([leaves[i]], tx.init([leaves[i]]))
        return found

    with jax.enable_x64(x64):
        found = quick.run(run, leaves)
    return {i: (leaves[i], *found[i]) for i in cases}


@pytest.mark.parametrize("case", range(len(EXTREME)), ids=lambda i: str(EXTREME[i]))
@pytest.mark.parametrize("by", ["global", "leaf"])
def test_finite_gradients_of_extreme_norm(case, by, of_extreme_norm):
    _, dtype, bound = EXTREME[case]
    leaf, updates, state = of_extreme_norm(by, dtype == "float64")[case]
    assert updates[0].dtype == dtype
    x = f64(leaf) / np.abs(f64(leaf)).max()
    expected = bound * x / np.linalg.norm(x)
    np.testing.assert_allclose(f64(updates[0]), expected, rtol=2 * EPS[dtype])
    assert only(state).nonfinite_count == 0
    assert only(state).clipped_count == 1


def test_normalize_of_tiny_gradients():
    tx = optaxclip.normalize(10.0)
    grads = np.float32([[1e-37, 0], [1e-30, 0], [1e-20, 0]])
    updates = quick.run(jax.vmap(lambda g: tx.update([g], tx.init([g]))[0][0]), grads)
    np.testing.assert_allclose(updates, [[10.0, 0.0]] * 3, rtol=1e-6)


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@cached
def clippers_of_bad_leaves(jit):
    """By what is measured and by policy: a clipper and its update."""
    found = {}
    for by in ("leaf", "element"):
        for nonfinite in ("propagate", "zero"):
            tx = clip_by(by, 0.25, nonfinite=nonfinite)
            found[by, nonfinite] = tx, quick_jit(tx.update) if jit else tx.update
    return found


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_nonfinite_leaves_propagate_or_become_zero(bad, jit, clippers_of_bad_leaves):
    grads = {"bad": np.float32([1.0, BAD[bad]]), "good": np.float32([0.3, 0.4])}
    grads = jax.tree.map(jnp.asarray, grads)
    for (by, nonfinite), (tx, update) in clippers_of_bad_leaves(jit).items():
        updates, state = update(grads, tx.init(grads))
        first, second = np.asarray(updates["bad"])
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


def test_a_complex_infinity_has_no_direction_to_be_clipped_in():
    grads = np.complex64([[complex(np.inf, 1), 3 + 4j], [complex(0, -np.inf), 3 + 4j]])
    txs = {k: optaxclip.clip_by_value(1.0, nonfinite=k) for k in ("propagate", "zero")}

    def run(grads):
        return {
            k: jax.vmap(lambda g, tx=tx: tx.update(g, tx.init(g))[0])(grads)
            for k, tx in txs.items()
        }

    found = quick.run(run, grads)
    assert np.isnan(found["propagate"][:, 0]).all()
    assert (found["zero"][:, 0] == 0).all()
    for updates in found.values():
        np.testing.assert_allclose(updates[:, 1], [0.6 + 0.8j] * 2, rtol=1e-6)


def test_one_bad_element_spoils_the_global_gradient_unless_zeroed():
    grads = {"a": np.float32([1.0, np.nan]), "b": np.ones(2, np.float32)}
    txs = {k: optaxclip.clip_by_global_norm(1.0, nonfinite=k) for k in ("propagate", "zero")}
    found = first_steps(txs, grads)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(found["propagate"][0]))
    assert all((x == 0).all() for x in jax.tree.leaves(found["zero"][0]))


def test_elementwise_responses_keep_directions_of_complex_numbers():
    z = np.complex64([3 + 4j, 0.3 - 0.4j, 0.0, -0.5j])
    responses = ["rational", "tanh", "drop", "normalize", "rescale"]
    found = first_steps({r: clip_by("element", 1.0, r) for r in responses}, [z])
    for response, ((u,), _) in found.items():
        ratio = u / np.where(z == 0, 1, z)
        np.testing.assert_allclose(ratio.imag, 0.0, atol=1e-7, err_msg=response)
        assert (ratio.real >= 0).all(), response
        assert (np.abs(u) <= 1 + 1e-6).all(), response


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
        tx.update({"a": G["a"], "c": G["b"]}, tx.init(G))


# --- statistics ---


@cached
def measured(by):
    """By ord and response, the step that clips the example tree."""
    whole = {"unit_axes": lambda path, x: tuple(range(x.ndim))} if by == "unit" else {}
    return first_steps(
        {
            str(ord): {r: clip_by(Norm(by, ord, **whole), 0.3, r) for r in MEASURED_RESPONSES}
            for ord in MEASURED_ORDS
        },
        example_tree(),
    )


MEASURED_ORDS, MEASURED_RESPONSES = [1, 2, INF, "rms"], ["rescale", "sqrt", "normalize"]


@pytest.mark.parametrize("ord", MEASURED_ORDS)
@pytest.mark.parametrize("by", EVERY_BY)
@pytest.mark.parametrize("response", MEASURED_RESPONSES)
def test_norms_before_and_after_are_those_of_the_gradient(ord, by, response, measured):
    grads = example_tree()
    updates, state = measured(by)[str(ord)][response]
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


@cached
def of_bad_gradients(by):
    """By policy, the updates and states of a gradient with each bad element."""

    def run(grads):
        found = {}
        for nonfinite in ("propagate", "zero"):
            tx = clip_by(by, 1.0, nonfinite=nonfinite)
            found[nonfinite] = jax.vmap(lambda g, tx=tx: tx.update([g], tx.init([g])))(grads)
        return found

    return quick.run(run, np.float32([[0.5, bad] for bad in BAD.values()]))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("by", ["global", "leaf", "element"])
@pytest.mark.parametrize("bad", BAD)
def test_the_norm_after_is_that_of_the_result_on_bad_steps_too(
    nonfinite, by, bad, of_bad_gradients
):
    updates, state = row(of_bad_gradients(by)[nonfinite], list(BAD).index(bad))
    measured = exact(updates, INF if by == "element" else 2)
    if nonfinite == "zero" and by == "element":
        assert np.isfinite(only(state).post_clip_norm)
    else:
        np.testing.assert_allclose(only(state).post_clip_norm, measured, rtol=1e-6)


def test_counts_and_the_worst_group():
    tx = optaxclip.clip_by_leaf_norm({"a": 6.0, "b": 10.0})
    state, update = tx.init(G), quick_jit(tx.update)
    scales = [(1.0, 1.0), (3.0, 1.0), (0.1, 0.1)]
    clipped = []
    for a, b in scales:
        _, state = update({"a": G["a"] * np.float32(a), "b": G["b"] * np.float32(b)}, state)
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
    rows = np.arange(1, 21)
    shares = (np.arange(20) < rows[:, None]) * rows[:, None] / 30  # as many elements as the row
    update = quick_jit(lambda tree: tx.update(tree, tx.init(tree))[1])
    tree = list(np.float32(shares))
    for shuffled in (tree, tree[::-1]):
        state = update(shuffled)
        np.testing.assert_allclose(only(state).pre_clip_norm, exact([tree[19]]), rtol=1e-6)


def test_groups_are_recorded_up_to_a_limit():
    def groups(n):
        tree = [np.ones(1, np.float32)] * n
        return clip_stats(jax.eval_shape(optaxclip.clip_by_leaf_norm(1.0).init, tree))

    assert groups(1)["clip_by_leaf_norm"].groups is None
    assert groups(257)["clip_by_leaf_norm"].groups is None
    assert len(groups(256)["clip_by_leaf_norm"].groups.names) == 256


def test_double_precision_norms_beyond_float32_are_no_bad_steps():
    with jax.enable_x64(True):
        updates, state = first_steps(optaxclip.clip_by_global_norm(1.0), [np.array([1e50])])
    assert updates[0].tolist() == pytest.approx([1.0])
    assert (only(state).nonfinite_count, only(state).clipped_count) == (0, 1)


def test_every_group_counts_when_another_is_worse():
    tx = optaxclip.clip_by_leaf_norm({"a": 0.0, "b": 1.0, "c": 1.0})
    one, two = np.ones(1, np.float32), np.full(1, 2, np.float32)
    update = quick_jit(tx.update)
    for bad in BAD.values():
        grads = {"a": one, "b": bad * one, "c": two}
        _, state = update(grads, tx.init(grads))
        assert only(state).nonfinite_count == 1, bad
        assert only(state).clipped_count == 1, bad
        _, state = update({**grads, "b": 0 * one}, state)
        assert (only(state).nonfinite_count, only(state).clipped_count) == (1, 2), bad


def test_an_infinite_bound_leaves_infinities_alone():
    grads = [np.float32([1.0, np.inf])]
    found = first_steps({by: clip_by(by, INF) for by in ("global", "leaf", "element")}, grads)
    for updates, _ in found.values():
        assert_same_bits(updates, grads)


def test_without_stats():
    txs = [
        optaxclip.clip_by_value(1.0, stats=False),
        optaxclip.soft_clip(1.0, elementwise=True, stats=False),
    ]
    for _, state in first_steps(txs, G):
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
    _, state = quick_jit(tx.update)(G, state, G)
    stats = clip_stats(state)
    assert list(stats) == ["here"]
    assert stats["here"].pre_clip_norm == pytest.approx(norm)
    assert (stats["here"].count, stats["here"].clipped_count) == (1, 1)


def test_clip_stats_of_clippers_with_one_name():
    one = optaxclip.clip_by_value
    named = [one(1.0), one(2.0), one(3.0, name="x"), one(4.0), one(5.0, name="clip_by_value_2")]
    _, state = first_steps(optax.chain(*named), G)
    stats = clip_stats({"opt": [state]})
    assert [float(s.threshold) for s in stats.values()] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert list(stats)[:4] == ["clip_by_value", "clip_by_value_2", "x", "clip_by_value_3"]


def test_clip_stats_without_a_clipper():
    assert clip_stats(optax.adam(1e-3).init(G)) == {}
    assert clip_stats(None) == {}


def test_clip_stats_inside_jit():
    tx = optaxclip.clip_by_global_norm(1.0)

    @quick_jit
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
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: 100 * jnp.sum(m(x)))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer, np.float32([[3, 4]]))
    stats = clip_stats(optimizer.opt_state)
    assert list(stats) == ["clip_by_leaf_norm", "clip_by_global_norm"]
    last = stats["clip_by_global_norm"]
    assert float(last.pre_clip_norm) == pytest.approx(np.sqrt(0.5), rel=1e-5)
    assert f"{last.post_clip_norm:.2f}" == "0.10"
    assert int(last.clipped_count) == 2
    groups = stats["clip_by_leaf_norm"].groups
    np.testing.assert_allclose(np.asarray(groups.pre_clip_norm), [100.0, 500.0], rtol=1e-5)
    assert groups.names == ("bias", "kernel")
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, nnx.state(model, nnx.Param), before)
    assert exact(jax.tree.leaves(moved)) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(
    "read",
    [
        clip_stats,
        optaxclip.clip_scalars,
        optaxclip.raise_if_stuck,
        optaxclip.scalars.raise_if_frozen,
    ],
)
def test_an_optimizer_is_not_its_state(read):
    with pytest.raises(TypeError, match=r"got the optimizer itself. Pass what its init"):
        read(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1)))


@pytest.mark.parametrize("factory", [optaxclip.clip_by_global_norm, optaxclip.clip_per_example])
def test_an_optimizer_is_no_bound(factory):
    with pytest.raises(TypeError, match=r"max_norm must be a bound.*side by side: optax.chain"):
        factory(optax.adam(1e-3))


@pytest.mark.parametrize(
    "wrapper", [optaxclip.skip_nonfinite, optaxclip.skip_outliers, optaxclip.error_feedback]
)
def test_a_number_is_no_optimizer(wrapper):
    with pytest.raises(TypeError, match=r"must be a gradient transformation, got 1.0. Pass an opt"):
        wrapper(1.0)
