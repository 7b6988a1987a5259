import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.oracles import assert_close, assert_same_bits

import optaxclip
from optaxclip import clip_by, clip_by_global_norm, clip_by_group_norm, clip_by_leaf_norm
from optaxclip.thresholds import ParamNorm

GRADS = {
    "a": np.float32([3.0, 4.0]),
    "b": {"c": np.float32([6.0, 8.0]), "d": np.float32([0.0, 2.0])},
}


def update(tx, grads=GRADS, params=None):
    """The first update."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(g), p)[0])(grads, params)


def update_each(txs, grads=GRADS):
    """The first update of each, by name; all are one program."""
    return jax.jit(lambda g: {k: tx.update(g, tx.init(g))[0] for k, tx in txs.items()})(grads)


# --- where a bound comes from ---


def test_every_kind_of_bound():
    bounds = {
        "int": 1,
        "float": 1.0,
        "numpy scalar": np.float32(1),
        "numpy array": np.array(1.0),
        "int array": jnp.array(1),
        "schedule": optax.constant_schedule(1.0),
    }
    txs = {kind: clip_by_global_norm(bound) for kind, bound in bounds.items()}
    for kind, updates in update_each(txs, [GRADS["a"]]).items():
        np.testing.assert_allclose(updates[0], [0.6, 0.8], err_msg=kind)


def test_a_schedule_sees_the_steps_taken_before():
    schedule = optax.piecewise_interpolate_schedule("linear", 1.0, {2: 3.0})
    tx = clip_by_global_norm(schedule)
    state = tx.init(GRADS)
    step = jax.jit(lambda s: tx.update(GRADS, s)[1])
    for count in range(4):
        state = step(state)
        stats = optaxclip.clip_stats(state)["clip_by_global_norm"]
        assert stats.threshold == pytest.approx(min(1.0 + count, 3.0))
    assert stats.post_clip_norm == pytest.approx(3.0)


def test_a_traced_bound_needs_no_second_compilation():
    traces = []

    @jax.jit
    def step(bound):
        traces.append(1)
        tx = clip_by_global_norm(bound)
        return tx.update(GRADS, tx.init(GRADS))[0]

    for bound in (0.5, 2.0, 100.0):
        factor = min(1.0, bound / np.sqrt(129.0))
        expected = jax.tree.map(lambda g, factor=factor: g * factor, GRADS)
        assert_close(step(bound), expected)
    assert len(traces) == 1


def test_vmap_over_bounds():
    bounds = np.float32([0.0, 1.0, 5.0, np.inf])
    clipped = jax.jit(jax.vmap(lambda c: update(clip_by_global_norm(c), [GRADS["a"]])[0]))(bounds)
    np.testing.assert_allclose(clipped, [[0, 0], [0.6, 0.8], [3, 4], [3, 4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "factors"),
    [
        ({"a": 1.0, "b": 5.0}, (0.2, 0.5, 1.0)),
        ({"a": 1.0, "b": {"c": 5.0, "d": 1.0}}, (0.2, 0.5, 0.5)),
        ({"a": np.array(1.0), "b": {"c": lambda count: 5.0 + count, "d": 0}}, (0.2, 0.5, 0.0)),
    ],
    ids=["prefix", "full", "mixed kinds"],
)
def test_a_tree_of_bounds(bounds, factors):
    a, c, d = factors
    expected = {"a": GRADS["a"] * a, "b": {"c": GRADS["b"]["c"] * c, "d": GRADS["b"]["d"] * d}}
    assert_close(update(clip_by_leaf_norm(bounds)), expected)


def test_a_tree_of_bounds_for_units_and_elements():
    bounds = {"a": 1.0, "b": 5.0}
    found = update_each(
        {
            "units": optaxclip.clip_by_unit_norm(bounds, unit_axes=0),
            "leaves": clip_by_leaf_norm(bounds),
            "elements": optaxclip.clip_by_value(bounds),
        }
    )
    units = found["units"]
    assert_close(units, found["leaves"])
    elements = found["elements"]
    np.testing.assert_allclose(elements["a"], [1.0, 1.0])
    np.testing.assert_allclose(elements["b"]["c"], [5.0, 5.0])


def test_a_tree_of_bounds_is_no_trouble_without_leaves():
    tree = {"a": np.arange(3, dtype=np.int32)}
    assert_same_bits(update(clip_by_leaf_norm({"a": 1.0}), tree), tree)


def test_tree_bounds_are_double_precision_for_double_precision_leaves():
    txs = {bound: clip_by_leaf_norm({"w": bound}) for bound in (0.1, 1e-50, 1e50)}
    with jax.enable_x64(True):
        found = update_each(txs, {"w": np.array([1e60, 0.0])})
    for bound, updates in found.items():
        np.testing.assert_allclose(updates["w"], [bound, 0.0], rtol=1e-12)


def test_bounds_by_label():
    def label(path, leaf):
        return "first" if path == "a" else "rest"

    tx = clip_by_group_norm({"first": 1.0, "rest": lambda count: np.sqrt(104.0) / 2}, label)
    expected = {"a": GRADS["a"] / 5, "b": jax.tree.map(lambda g: g / 2, GRADS["b"])}
    labels = {"a": "x", "b": "y"}
    found = update_each(
        {
            "by function": tx,
            "one bound": clip_by_group_norm(1.0, labels),
            "extremes": clip_by_group_norm({"x": float("inf"), "y": 0}, labels),
        }
    )
    assert_close(found["by function"], expected)
    assert_close(found["one bound"]["a"], GRADS["a"] / 5)
    assert_same_bits(found["extremes"]["a"], GRADS["a"])
    assert_same_bits(found["extremes"]["b"], jax.tree.map(np.zeros_like, GRADS["b"]))


@pytest.mark.parametrize("bound", [-1.0, -float("inf")])
def test_a_negative_bound_that_is_traced_counts_as_zero(bound):
    zeros = jax.tree.map(np.zeros_like, GRADS)

    def step(bound):
        tx = clip_by_global_norm(bound)
        return tx.update(GRADS, tx.init(GRADS))[0]

    assert_close(step(jnp.float32(bound)), zeros)  # an array; outside jit
    assert_close(jax.jit(step)(bound), zeros)
    assert_close(update(optaxclip.clip_by_value(lambda count: bound)), zeros)


def test_a_nan_bound_that_is_traced_shows():
    updates = jax.jit(lambda c: update(clip_by_global_norm(c)))(np.nan)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))


def test_a_custom_threshold_keeps_its_state():
    class LargestYet:
        """Bounds the norm by half the largest norm seen before."""

        def init(self, norm, params):
            return jnp.zeros(())

        def bound(self, norms, state, context):
            assert context.extra_args["loss"] == 7.0
            total = sum(jnp.sum(n) for n in jax.tree.leaves(norms))
            half = state / 2
            bounds = jax.tree.map(lambda n: jnp.broadcast_to(half, n.shape), norms)
            return bounds, jnp.maximum(state, total)

    tx = clip_by("global", LargestYet())
    state = tx.init([GRADS["a"]])
    step = jax.jit(lambda s: tx.update([GRADS["a"]], s, loss=7.0))
    first, state = step(state)
    second, state = step(state)
    assert state.threshold_state == 5.0
    np.testing.assert_allclose(first[0], [0.0, 0.0])
    np.testing.assert_allclose(second[0], [1.5, 2.0])


# --- relative to the parameters ---


def test_the_bound_of_agc_is_a_multiple_of_the_parameter_norm():
    params = {"w": np.array([[3.0, 0.0], [4.0, 0.0]]).astype(jnp.bfloat16)}
    grads = {"w": np.float32([[30.0, 0.3], [40.0, 0.4]])}
    updates = update(optaxclip.agc(0.1, eps=0.5), grads, params)
    np.testing.assert_allclose(updates["w"], [[0.3, 0.03], [0.4, 0.04]], rtol=1e-6)


def test_missing_params():
    with pytest.raises(ValueError, match=r"needs params, got None\. Call\s+tx\.update\(grads, st"):
        update(optaxclip.agc(0.1))


@pytest.mark.parametrize(
    ("params", "place"),
    [
        (
            {"a": GRADS["a"], "b": {"c": np.ones(3, np.float32), "d": GRADS["a"]}},
            r"b/c \(3,\) in params",
        ),
        ({"a": GRADS["a"]}, r"1 leaves in params and 3 in updates"),
        ({"a": GRADS["a"], "b": {"c": GRADS["a"], "e": GRADS["a"]}}, r"b/e \(2,\) in params"),
    ],
    ids=["shape", "fewer", "other"],
)
def test_params_unlike_the_updates(params, place):
    with pytest.raises(ValueError, match=rf"same leaves, got {place}.*Pass the parameters"):
        update(optaxclip.agc(0.1), GRADS, params)


# --- mistakes, all found when the clipper is made or first used ---

MADE_WITH = {
    "clip_by": lambda c: clip_by("global", c),
    "max_value": optaxclip.clip_by_value,
    "max_norm": clip_by_global_norm,
    "max_norm of leaves": clip_by_leaf_norm,
    "max_rms": optaxclip.clip_by_leaf_rms,
    "max_norm of units": optaxclip.clip_by_unit_norm,
    "max_norms": lambda c: clip_by_group_norm(c, "label"),
    "clipping": optaxclip.agc,
    "eps": lambda c: optaxclip.agc(0.1, eps=c),
    "norm": optaxclip.normalize,
    "max_norm of soft_clip": optaxclip.soft_clip,
}


@pytest.mark.parametrize("argument", MADE_WITH)
@pytest.mark.parametrize("bound", [-1, -0.5, float("nan"), -float("inf"), np.float32(-2)])
def test_bound_out_of_range(argument, bound):
    name = "threshold" if argument == "clip_by" else argument.split()[0]
    with pytest.raises(ValueError, match=rf"{name} must be >= 0, got .*Pass 0 or more"):
        MADE_WITH[argument](bound)


@pytest.mark.parametrize("argument", MADE_WITH)
@pytest.mark.parametrize("bound", [None, "1.0", True, 1j])
def test_bound_that_is_no_number(argument, bound):
    name = "threshold" if argument == "clip_by" else argument.split()[0]
    with pytest.raises(TypeError, match=rf"{name} must be a number.*got .*Pass"):
        MADE_WITH[argument](bound)


@pytest.mark.parametrize("make", [clip_by_leaf_norm, lambda c: clip_by_group_norm(c, "p")])
def test_bound_inside_a_tree_is_named(make):
    with pytest.raises(ValueError, match=r"max_norms?\['p'\]\['q'\] must be >= 0, got -2"):
        make({"p": {"q": -2.0}})


@pytest.mark.parametrize("argument", ["clipping", "eps"])
def test_agc_takes_no_schedule(argument):
    """It must say so when it is made, unless it takes one."""
    try:
        tx = MADE_WITH[argument](optax.constant_schedule(0.1))
    except TypeError as error:
        assert argument in str(error)  # noqa: PT017
    else:
        expected = update(MADE_WITH[argument](0.1), GRADS, GRADS)
        assert_close(update(tx, GRADS, GRADS), expected)


def test_a_bound_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"max_norm must be a scalar, got shape \(2,\)\. Several"):
        update(clip_by_global_norm(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"max_norm\['a'\] must be a scalar, got shape \(1,\)"):
        update(clip_by_leaf_norm({"a": jnp.ones(1), "b": 1.0}))
    with pytest.raises(ValueError, match=r"max_norms\['q'\] must be a scalar, got shape \(1,\)"):
        update(clip_by_group_norm({"p": 1.0, "q": lambda count: jnp.ones(1)}, {"a": "p", "b": "q"}))


@pytest.mark.parametrize("argument", MADE_WITH)
def test_a_class_is_no_bound(argument):
    """Its missing parentheses would otherwise show in `init`, or make it a schedule."""
    with pytest.raises(TypeError, match=r"got (the class|<class).*ParamNorm.*\. (Make|Pass)"):
        MADE_WITH[argument](ParamNorm)


def test_a_tree_for_a_global_norm():
    with pytest.raises(ValueError, match=r"max_norm must be one bound.*clip_by_leaf_norm"):
        update(clip_by_global_norm({"a": 1.0, "b": 1.0}))


def test_a_tree_unlike_the_updates():
    with pytest.raises(
        ValueError, match=r"max_norm must be a tree prefix of the updates(.|\n)*key sets is\s+\S*b"
    ):
        update(clip_by_leaf_norm({"a": 1.0}))


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ({"p": 1.0}, r"label 'q' \(of b/c\) has no bound"),
        ({"p": 1.0, "q": 1.0, "r": 2.0}, r"no leaf is labelled 'r'"),
    ],
)
def test_labels_and_bounds_that_disagree(bounds, problem):
    with pytest.raises(ValueError, match=problem + r"(.|\n)*Make the two agree"):
        update(clip_by_group_norm(bounds, {"a": "p", "b": "q"}))


def test_bounds_of_groups_are_a_dict():
    with pytest.raises(TypeError, match=r"max_norms must map labels to bounds.*keys \['p'\]"):
        update(clip_by_group_norm([1.0], "p"))
    with pytest.raises(TypeError, match=r"got \{'p': \{'q': 1\.0\}\}\. Pass a dict with the keys"):
        update(clip_by_group_norm({"p": {"q": 1.0}}, "p"))
