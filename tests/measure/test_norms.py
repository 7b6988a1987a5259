"""Norms with one device; `meshes/test_norms_with_devices.py` measures the same with eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.norm_cases import (
    CASES,
    INF,
    LABELS,
    ORDS,
    assert_other_leaves_do_not_count,
    measure,
    mixed,
    names,
    vector,
)
from tools.oracles import norm as exact
from tools.oracles import unit_norms

from optaxclip import Norm
from optaxclip.measure import platforms


def measure_one(tree, by="global", ord=2, **kw):
    """The norms of a tree, in a program of their own."""
    ((norms,),) = measure([Norm(by, ord, **kw)], tree)
    return norms


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(name):
    CASES[name].check()


@pytest.mark.parametrize("by", ["global", "leaf"])
def test_outside_jit(by):
    """What is compiled as one program elsewhere gives the same one operation at a time."""
    tree = {"a": np.float32([[1, 2], [3, 4]]), "b": np.float32([[5, 6], [7, 8]])}
    for ord in (2, INF):
        norm = Norm(by, ord)
        np.testing.assert_allclose(
            vector(norm, tree), measure_one(tree, by, ord), rtol=1e-7, err_msg=str(ord)
        )


def test_names():
    tree = mixed()
    assert names(Norm("global"), tree) == ("global",)
    assert names(Norm("leaf"), tree) == ("a", "b/x", "b/y", "b/z", "c", "h")
    assert names(Norm("group", labels=LABELS), tree) == ("p", "q")
    units = Norm("unit", unit_axes=0)
    assert names(units, {"w": np.ones((2, 3))}) == ("w[0,0]", "w[0,1]", "w[0,2]")


@pytest.mark.parametrize("by", ["leaf", "unit"])
def test_vectors_are_in_the_order_of_names(by):
    norm = Norm(by)
    groups = norm.groups(norm.leaves(mixed()))
    numbers = np.arange(groups.size, dtype=np.float32)
    blocks = groups.blocks_of(numbers)
    np.testing.assert_array_equal(groups.vector(blocks), numbers)
    assert len(groups.names) == groups.size
    for x, n in zip(jax.tree.leaves(mixed()), groups.by_leaf(blocks), strict=True):
        assert np.broadcast_shapes(n.shape, x.shape) == x.shape


def test_a_vector_of_another_length():
    norm = Norm("leaf")
    groups = norm.groups(norm.leaves(mixed()))
    with pytest.raises(ValueError, match=r"must be a scalar or of shape \(6,\), got \(5,\)"):
        groups.blocks_of(np.ones(5, np.float32))


AUTOMATIC = {
    (): (),
    (5,): (0,),
    (1, 5): (0, 1),
    (5, 1, 1): (0, 1, 2),
    (1, 1): (0, 1),
    (4, 3): (0,),
    (4, 3, 2): (0,),
    (2, 2, 3, 4): (0, 1, 2),
    (2, 2, 2, 3, 4): (0, 1, 2, 3),
}


def test_automatic_units_go_by_rank():
    rng = np.random.default_rng(2)
    tree = [np.asarray(rng.standard_normal(shape), np.float32) for shape in AUTOMATIC]
    norm = Norm("unit")
    assert norm.groups(norm.leaves(tree)).unit_axes == tuple(AUTOMATIC.values())
    expected = [unit_norms(x, axes) for x, axes in zip(tree, AUTOMATIC.values(), strict=True)]
    np.testing.assert_allclose(measure_one(tree, "unit"), np.concatenate(expected), rtol=1e-6)


def test_elements_measure_the_largest_of_each_leaf():
    largest = [exact([x], INF) for x in jax.tree.leaves(mixed())]
    np.testing.assert_allclose(measure_one(mixed(), "element"), largest, rtol=1e-6)


def test_excluded_leaves_do_not_count():
    tree = mixed()
    norms = measure_one(tree, exclude=lambda path, leaf: path.startswith("b/") or leaf.ndim == 0)
    np.testing.assert_allclose(norms, [exact([tree["a"], tree["c"], tree["h"]])], rtol=1e-6)


def test_leaves_without_floating_point_elements_do_not_count():
    assert_other_leaves_do_not_count()


@pytest.mark.parametrize("empty", [{}, {"n": np.arange(3)}, {"e": np.zeros((0,))}])
def test_a_tree_without_leaves_has_norm_zero(empty):
    norms = [Norm(by, ord) for ord in ORDS for by in ("global", "leaf")]
    assert [x.tolist() for x in measure(norms, empty)[0]] == [[0.0], []] * len(ORDS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_long_leaves_are_added_precisely(dtype):
    x = np.random.default_rng(4).uniform(0.5, 1.5, 2**20).astype(dtype)
    ords = (1, 2, "rms", 3)
    for ord, norm in zip(ords, *measure([Norm("global", ord) for ord in ords], [x]), strict=True):
        assert norm == pytest.approx([exact([x], ord)], rel=2e-6), ord


# --- range ---

EXTREME = {
    "f16-overflow": ([300.0, 400.0], "float16"),
    "f32-overflow": ([1e25, 2e25], "float32"),
    "f32-nearly-overflow": ([2e38, 2e38], "float32"),
    "f32-underflow": ([1e-23], "float32"),
    "f32-underflow-many": ([3e-30, 4e-30, 1e-31], "float32"),
    "f32-smallest-normal": ([1.2e-38, 2e-38], "float32"),
    "bf16-overflow": ([1e30, 3e30], "bfloat16"),
    "f16-smallest": ([6e-8, 6e-8], "float16"),
    "wide-range": ([1e-30, 1.0, 1e15], "float32"),
    "wider-range": ([1e-38, 1e30], "float32"),
    "complex-overflow": ([1e30 + 2e30j, 1.0], "complex64"),
    "complex-underflow": ([1e-30 + 2e-30j], "complex64"),
    "f64-overflow": ([1e200, 2e200], "float64"),
    "f64-underflow": ([1e-200, 2e-200], "float64"),
    "f64-nearly-overflow": ([1e308, 1e307], "float64"),
}


@pytest.mark.parametrize("by", ["global", "leaf", "unit"])
@pytest.mark.parametrize("dtype", sorted({dtype for _, dtype in EXTREME.values()}))
def test_extreme_values(dtype, by):
    cases = {k: numbers for k, (numbers, of) in EXTREME.items() if of == dtype}
    trees = [[np.array(x + [0.0] * (3 - len(x))).astype(dtype)] for x in cases.values()]
    largest = np.finfo(np.float64 if dtype == "float64" else np.float32).max
    axes = {"unit_axes": (0,)} if by == "unit" else {}
    with jax.enable_x64(dtype == "float64"):
        found = measure([Norm(by, ord, **axes) for ord in ORDS], *trees)
    for name, tree, norms in zip(cases, trees, found, strict=True):
        for ord, norm in zip(ORDS, norms, strict=True):
            expected = min(exact(tree, ord), largest)  # beyond it, see the test below
            np.testing.assert_allclose(norm, [expected], rtol=2e-6, err_msg=f"{name}, {ord}")


@pytest.mark.parametrize("value", [3e38, 3e38 + 3e38j], ids=["real", "complex"])
def test_norms_beyond_the_largest_float_are_finite(value):
    tree = [np.full(4, value, np.complex64 if isinstance(value, complex) else np.float32)]
    for ord, norm in zip(
        (1, 2, 3, INF), *measure([Norm("global", ord) for ord in (1, 2, 3, INF)], tree), strict=True
    ):
        assert np.isfinite(norm).all(), ord
        assert norm[0] >= 2.9e38, ord


def test_nan_wins_over_infinity():
    (norms,) = measure([Norm("global", ord) for ord in ORDS], [np.float32([np.inf, np.nan])])
    assert np.isnan(np.concatenate(norms)).tolist() == [True] * len(ORDS)


@pytest.mark.parametrize("column", [1.0, 0.0, 1e-13, 1e-25, 1e25, 1e-33, np.inf, np.nan])
def test_units_of_large_leaves_stay_in_range(column):
    """A CPU measures these in another way."""
    x = np.random.default_rng(3).standard_normal((600, 450))
    assert x.size >= platforms._LARGE
    x[:, 7] *= column
    x[:, 8] = 0
    small = x[:5, 5:9] + 1e-20
    norms = [Norm("unit", ord, unit_axes=0) for ord in (1, 2, "rms")]
    for ord, found in zip(
        (1, 2, "rms"), *measure(norms, [np.float32(x), np.float32(small)]), strict=True
    ):
        expected = np.concatenate([unit_norms(np.float32(y), [0], ord) for y in (x, small)])
        np.testing.assert_allclose(found, expected, rtol=2e-6, err_msg=str(ord))


def test_units_of_different_ranges_do_not_disturb_each_other():
    x = np.array([[1e-15, 2e-15], [1.0, 2.0], [1e20, 2e20], [0.0, 0.0]], np.float32)
    (found,) = measure([Norm("unit", ord, unit_axes=1) for ord in ORDS], [x])
    for ord, norms in zip(ORDS, found, strict=True):
        np.testing.assert_allclose(norms, unit_norms(x, [1], ord), rtol=2e-6, err_msg=str(ord))


# --- derivatives ---


@jax.jit
def gradients(x):
    """Of the global norm of each order."""
    norms = [Norm("global", ord) for ord in ORDS]
    return [jax.grad(lambda x, norm=norm: vector(norm, [x])[0])(x) for norm in norms]


@pytest.mark.parametrize(
    "values", [[3.0, -4.0, 0.0], [3e25, 4e25, 0.0], [3e-25, 4e-25, 0.0]], ids=str
)
def test_derivative_is_that_of_the_formula(values):
    x = np.array(values)
    for ord, gradient in zip(ORDS, map(np.asarray, gradients(np.float32(x))), strict=True):
        p = {"rms": 2}.get(ord, ord)
        if p == INF:
            expected = np.sign(x) * (np.abs(x) == np.abs(x).max())
        else:
            expected = np.sign(x) * (np.abs(x) / exact([x], p)) ** (p - 1)
            expected /= np.sqrt(x.size) if ord == "rms" else 1
            expected = np.where(x == 0, 0.0, expected)
        at_kink = (x == 0) & (ord == 1)  # any slope within [-1, 1] will do
        found = np.where(at_kink, 0, gradient)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(ord))
        assert (np.abs(gradient) <= 1 + 1e-5).all(), ord


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_derivative_at_zero_is_finite(dtype):
    for ord, gradient in zip(ORDS, gradients(np.zeros(3, dtype)), strict=True):
        assert np.isfinite(gradient).all(), ord


def test_a_leaf_for_which_axis_name_gives_none_is_whole():
    tree = {"a": np.float32([3.0]), "b": np.float32([4.0])}
    norms = measure_one(tree, axis_name=lambda path, leaf: None if path == "a" else ())
    assert norms.tolist() == [5.0]


# --- mistakes ---


@pytest.mark.parametrize("ord", [0, 0.5, -1, -INF, float("nan"), "l2", None, True, (2,)])
def test_unknown_ord(ord):
    with pytest.raises(ValueError, match=r"unknown ord, got .*Use 1, 2, a finite p >= 1"):
        Norm("global", ord)


def test_traced_ord():
    with pytest.raises(TypeError, match=r"ord must be static.*static_args=\('ord',\)"):
        jax.jit(lambda p: vector(Norm("global", p), [jnp.ones(2)]))(3.0)


def test_unknown_grouping():
    with pytest.raises(ValueError, match=r"unknown norm, got 'tree'\. Use one of .*'global'"):
        Norm("tree")
    with pytest.raises(ValueError, match=r"needs labels, got None\. Pass a tree prefix"):
        Norm("group")


@pytest.mark.parametrize("by", ["global", "leaf", "element", "group"])
@pytest.mark.parametrize("axes", [0, (1,), "rows", lambda path, x: 0])
def test_unit_axes_of_another_norm(by, axes):
    labels = "p" if by == "group" else None
    with pytest.raises(ValueError, match=rf"go with by='unit', got .* for by='{by}'\. Pass by='un"):
        Norm(by, unit_axes=axes, labels=labels)
    Norm(by, unit_axes="auto", labels=labels)


@pytest.mark.parametrize("by", ["global", "leaf", "element", "unit"])
def test_labels_of_another_norm(by):
    with pytest.raises(ValueError, match=rf"go with by='group', got 'p' for by='{by}'\. Pass by="):
        Norm(by, labels="p")


@pytest.mark.parametrize(
    "axes",
    [2, -3, (0, 5), "rows", None, 0.5, lambda path, x: 9, lambda path, x: None],
    ids=["2", "-3", "(0, 5)", "rows", "None", "0.5", "function", "function to None"],
)
def test_unit_axes_that_the_leaf_lacks(axes):
    with pytest.raises((ValueError, TypeError), match=r"unit_axes .*got .* at layer/w\. .*Use"):
        measure_one({"layer": {"w": np.ones((2, 3))}}, "unit", unit_axes=axes)


def test_automatic_units_stop_at_rank_five():
    with pytest.raises(ValueError, match=r"at layer/w\. Pass a function \(path, leaf\) -> axes"):
        measure_one({"layer": {"w": np.ones((2,) * 6)}}, "unit")
    with pytest.raises(ValueError, match=r"at the root\. Pass a function"):
        measure_one(np.ones((2,) * 6), "unit")


def test_numpy_integers_are_axes():
    x = np.arange(6.0).reshape(2, 3)
    norms = measure_one([np.float32(x)], "unit", unit_axes=np.int64(1))
    np.testing.assert_allclose(norms, unit_norms(x, [1]), rtol=1e-6)


def test_labels_must_be_strings_for_every_leaf():
    with pytest.raises(TypeError, match=r"labels must be strings, got 3 at b\. Give every"):
        measure_one({"a": np.ones(2), "b": np.ones(2)}, "group", labels={"a": "p", "b": 3})
    with pytest.raises(TypeError, match=r"labels must be strings, got None at a\. Give every"):
        measure_one({"a": np.ones(2)}, "group", labels=lambda path, leaf: None)
    with pytest.raises(TypeError, match=r"labels must be strings, got None at the root\. Give"):
        measure_one(np.ones(2), "group", labels=lambda path, leaf: None)
    with pytest.raises(
        ValueError, match=r"labels must be a tree prefix of the updates(.|\n)*key sets is\s+\S*b"
    ):
        measure_one({"a": np.ones(2), "b": np.ones(2)}, "group", labels={"a": "p"})
