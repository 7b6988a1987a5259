import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.oracles import norm as exact
from tools.oracles import unit_norms

from optaxclip import Norm

INF = float("inf")
ORDS = [1, 2, 3, 1.5, 7, INF, "rms"]


def measure(tree, by="global", ord=2, *, jit=False, **kw):
    """The norms, in the order of the layout's names, and the names."""
    of = {"unit_axes": "unit", "labels": "group"}
    norm = Norm(by, ord, **{k: v for k, v in kw.items() if of.get(k, by) == by})
    layout = norm.layout(norm.leaves(tree))

    def run(tree):
        leaves = norm.leaves(tree)
        layout = norm.layout(leaves)
        return [jnp.ravel(n) for n in layout.by_slot(norm.measure(leaves, layout))]

    norms = (jax.jit(run) if jit else run)(tree)
    return np.concatenate([np.asarray(n) for n in norms] or [np.zeros(0)]), layout.names


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "a": jnp.asarray(draw(3, 4)),
        "b": {"x": jnp.asarray(draw(5)), "y": jnp.asarray(draw(3, 4)), "z": jnp.asarray(draw())},
        "c": jnp.asarray(draw(2, 3) + 1j * draw(2, 3)),
        "h": jnp.asarray(draw(3, 4), jnp.bfloat16),
    }


@pytest.mark.parametrize("ord", ORDS)
def test_global(tree, ord, devices):
    norms, names = measure(tree, ord=ord)
    assert names == ("global",)
    np.testing.assert_allclose(norms, [exact(jax.tree.leaves(tree), ord)], rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
def test_leaf(tree, ord, devices):
    norms, names = measure(tree, "leaf", ord)
    assert names == ("a", "b/x", "b/y", "b/z", "c", "h")
    np.testing.assert_allclose(norms, [exact([x], ord) for x in jax.tree.leaves(tree)], rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
def test_group(tree, ord, devices):
    norms, names = measure(tree, "group", ord, labels={"a": "p", "b": "q", "c": "p", "h": "q"})
    assert names == ("p", "q")
    p, q = [tree["a"], tree["c"]], [*tree["b"].values(), tree["h"]]
    np.testing.assert_allclose(norms, [exact(p, ord), exact(q, ord)], rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize(
    "axes", [0, 1, -1, (0, 2), (2, 1), (0, 1, 2), ()], ids=lambda a: str(a).replace(" ", "")
)
def test_unit(ord, axes):
    x = np.random.default_rng(1).standard_normal((3, 4, 2)).astype(np.float32)
    norms, names = measure({"w": jnp.asarray(x)}, "unit", ord, unit_axes=axes)
    spanned = {a % 3 for a in ((axes,) if isinstance(axes, int) else axes)}
    np.testing.assert_allclose(norms, unit_norms(x, sorted(spanned), ord), rtol=1e-6)
    assert len(names) == len(norms)
    assert len(set(names)) == len(names)


def test_unit_names_say_where():
    _, names = measure({"w": jnp.ones((2, 3))}, "unit", unit_axes=0)
    assert names == ("w[0,0]", "w[0,1]", "w[0,2]")


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), (0,)),
        ((1, 5), (0, 1)),
        ((5, 1, 1), (0, 1, 2)),
        ((1, 1), (0, 1)),
        ((4, 3), (0,)),
        ((4, 3, 2), (0,)),
        ((2, 2, 3, 4), (0, 1, 2)),
        ((2, 2, 2, 3, 4), (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_automatic_units_go_by_rank(shape, axes):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    norms, _ = measure([jnp.asarray(x)], "unit")
    np.testing.assert_allclose(norms, unit_norms(x, axes), rtol=1e-6)


@pytest.mark.parametrize("ord", [1, 2, 3, INF, "rms"])
@pytest.mark.parametrize("by", ["leaf", "unit"])
def test_leaves_of_one_shape_do_not_disturb_one_another(by, ord, devices):
    """More than one bundle of them, in between others; some overflow, vanish or are NaN."""
    rng = np.random.default_rng(5)
    least = 1e-25 if by == "leaf" else 1e-18  # units below 1e-19 may measure 0
    sizes = [1.0, 1e25, least, 0.0, np.nan, 1e-12] + [1.0] * 30
    draw = (size * rng.standard_normal((3, 4)).astype(np.float32) for size in sizes)
    tree = [leaf for x in draw for leaf in (x.astype(np.float32), np.ones(2, np.float32))]
    norms, names = measure(jax.tree.map(jnp.asarray, tree), by, ord, unit_axes=-1, jit=True)
    expected = [
        unit_norms(x, (x.ndim - 1,) if by == "unit" else (0, 1)[: x.ndim], ord) for x in tree
    ]
    np.testing.assert_allclose(norms, np.concatenate(expected), rtol=1e-6)
    assert len(names) == len(norms)


def test_elements_measure_the_largest_of_each_leaf(tree):
    norms, _ = measure(tree, "element")
    largest = [exact([x], INF) for x in jax.tree.leaves(tree)]
    np.testing.assert_allclose(norms, largest, rtol=1e-6)


def test_excluded_leaves_do_not_count(tree):
    norms, _ = measure(tree, exclude=lambda path, leaf: path.startswith("b/") or leaf.ndim == 0)
    np.testing.assert_allclose(norms, [exact([tree["a"], tree["c"], tree["h"]])], rtol=1e-6)


def test_leaves_without_floating_point_elements_do_not_count(tree, devices):
    odd = {
        **tree,
        "empty": jnp.zeros((0, 3)),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "ids": jnp.array([1000]),
        "key": jax.random.key(0),
        "masked": optax.MaskedNode(),
        "none": None,
    }
    for ord in (1, 2, INF, "rms", 3):
        assert measure(odd, ord=ord)[0] == measure(tree, ord=ord)[0]


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("empty", [{}, {"n": jnp.arange(3)}, {"e": jnp.zeros((0,))}])
def test_a_tree_without_leaves_has_norm_zero(ord, empty):
    assert measure(empty, ord=ord)[0].tolist() == [0.0]
    assert measure(empty, "leaf", ord)[0].tolist() == []


# --- low precision ---


@pytest.mark.parametrize("ord", [1, 2, 3, "rms"])
@pytest.mark.parametrize(("dtype", "leaves"), [("bfloat16", 1000), ("float16", 60)])
def test_many_low_precision_leaves_are_added_in_float32(dtype, leaves, ord, devices):
    """Added in bfloat16, such a sum stops growing."""
    if leaves == 1000 and ord != 2:
        leaves = 60
    rng = np.random.default_rng(3)
    tree = [jnp.asarray(rng.uniform(1, 2.2, ()), dtype) for _ in range(leaves)]
    assert measure(tree, ord=ord, jit=True)[0] == pytest.approx([exact(tree, ord)], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_long_leaves_are_added_precisely(dtype):
    x = jnp.asarray(np.random.default_rng(4).uniform(0.5, 1.5, 2**20), dtype)
    for ord in (1, 2, "rms", 3):
        assert measure([x], ord=ord, jit=True)[0] == pytest.approx([exact([x], ord)], rel=2e-6)


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


@pytest.mark.parametrize("values", EXTREME)
@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("by", ["global", "leaf", "unit"])
def test_extreme_values(values, ord, by):
    numbers, dtype = EXTREME[values]
    with jax.enable_x64(dtype == "float64"):
        tree = {"w": jnp.asarray(np.array(numbers), dtype)}
        true = exact([tree["w"]], ord)
        if true > np.finfo(np.float64 if dtype == "float64" else np.float32).max:
            pytest.skip("the norm itself is out of range: see the test below")
        norms, _ = measure(tree, by, ord, unit_axes=(0,))
        np.testing.assert_allclose(norms, [true], rtol=2e-6)


@pytest.mark.parametrize("ord", [1, 2, 3, INF])
@pytest.mark.parametrize("value", [3e38, 3e38 + 3e38j], ids=["real", "complex"])
def test_norms_beyond_the_largest_float_are_finite(ord, value):
    norms, _ = measure([jnp.full(4, value)], ord=ord)
    assert np.isfinite(norms).all()
    assert norms[0] >= 2.9e38


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("by", ["global", "leaf", "unit", "group"])
@pytest.mark.parametrize(("bad", "check"), [(np.nan, np.isnan), (np.inf, np.isposinf)])
def test_a_norm_is_finite_exactly_when_its_elements_are(ord, by, bad, check):
    tree = {"w": jnp.array([[1.0, 2.0], [3.0, bad]]), "v": jnp.array([[1.0, 2.0]])}
    norms, names = measure(tree, by, ord, unit_axes=1, labels={"w": "p", "v": "q"})
    hit = {"global": [True], "leaf": [False, True], "unit": [False, False, True]}
    hit["group"] = [True, False]
    assert len(names) == len(norms)
    assert check(norms).tolist() == hit[by]


def test_nan_wins_over_infinity():
    for ord in ORDS:
        assert np.isnan(measure([jnp.array([np.inf, np.nan])], ord=ord)[0]).all()


@pytest.mark.parametrize("ord", ORDS)
def test_units_of_different_ranges_do_not_disturb_each_other(ord):
    x = np.array([[1e-15, 2e-15], [1.0, 2.0], [1e20, 2e20], [0.0, 0.0]], np.float32)
    norms, _ = measure([jnp.asarray(x)], "unit", ord, unit_axes=1)
    np.testing.assert_allclose(norms, unit_norms(x, [1], ord), rtol=2e-6)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize(
    "values", [[3.0, -4.0, 0.0], [3e25, 4e25, 0.0], [3e-25, 4e-25, 0.0]], ids=str
)
def test_derivative_is_that_of_the_formula(ord, values):
    x = np.array(values)
    gradient = jax.grad(lambda x: measure_one(x, ord))(jnp.asarray(x, jnp.float32))
    p = {"rms": 2}.get(ord, ord)
    if p == INF:
        expected = np.sign(x) * (np.abs(x) == np.abs(x).max())
    else:
        expected = np.sign(x) * (np.abs(x) / exact([x], p)) ** (p - 1)
        expected /= np.sqrt(x.size) if ord == "rms" else 1
        expected = np.where(x == 0, 0.0, expected)
    at_kink = (x == 0) & (ord == 1)  # any slope within [-1, 1] will do
    np.testing.assert_allclose(np.where(at_kink, 0, gradient), expected, rtol=1e-5)
    assert (np.abs(gradient) <= 1 + 1e-5).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_derivative_at_zero_is_finite(ord, dtype):
    assert jnp.isfinite(jax.grad(lambda x: measure_one(x, ord))(jnp.zeros(3, dtype))).all()


def measure_one(x, ord):
    norm = Norm("global", ord)
    leaves = norm.leaves([x])
    return sum(jnp.sum(n) for n in jax.tree.leaves(norm.measure(leaves, norm.layout(leaves))))


def test_a_leaf_for_which_axis_name_gives_none_is_whole():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    norms, _ = measure(tree, axis_name=lambda path, leaf: None if path == "a" else ())
    assert norms.tolist() == [5.0]


# --- mistakes ---


@pytest.mark.parametrize("ord", [0, 0.5, -1, -INF, float("nan"), "l2", None, True, (2,)])
def test_unknown_ord(ord):
    with pytest.raises(ValueError, match=r"unknown ord, got .*Use 1, 2, a finite p >= 1"):
        Norm("global", ord)


def test_traced_ord():
    with pytest.raises(TypeError, match=r"ord must be static.*static_args=\('ord',\)"):
        jax.jit(lambda p: measure([jnp.ones(2)], ord=p)[0])(3.0)


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
        measure({"layer": {"w": jnp.ones((2, 3))}}, "unit", unit_axes=axes)


def test_automatic_units_stop_at_rank_five():
    with pytest.raises(ValueError, match=r"at layer/w\. Pass a function \(path, leaf\) -> axes"):
        measure({"layer": {"w": jnp.ones((2,) * 6)}}, "unit")
    with pytest.raises(ValueError, match=r"at the root\. Pass a function"):
        measure(jnp.ones((2,) * 6), "unit")


def test_numpy_integers_are_axes():
    x = np.arange(6.0).reshape(2, 3)
    norms, _ = measure([jnp.asarray(x)], "unit", unit_axes=np.int64(1))
    np.testing.assert_allclose(norms, unit_norms(x, [1]), rtol=1e-6)


def test_labels_must_be_strings_for_every_leaf():
    with pytest.raises(TypeError, match=r"labels must be strings, got 3 at b\. Give every"):
        measure({"a": jnp.ones(2), "b": jnp.ones(2)}, "group", labels={"a": "p", "b": 3})
    with pytest.raises(TypeError, match=r"labels must be strings, got None at a\. Give every"):
        measure({"a": jnp.ones(2)}, "group", labels=lambda path, leaf: None)
    with pytest.raises(TypeError, match=r"labels must be strings, got None at the root\. Give"):
        measure(jnp.ones(2), "group", labels=lambda path, leaf: None)
    with pytest.raises(
        ValueError, match=r"labels must be a tree prefix of the updates(.|\n)*key sets is\s+\S*b"
    ):
        measure({"a": jnp.ones(2), "b": jnp.ones(2)}, "group", labels={"a": "p"})
