import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.oracles import assert_same_bits

import optaxclip
from optaxclip._leaves import Leaves


@pytest.fixture(scope="module")
def tree():
    return {
        "a": [jnp.array([1.0, 2.0]), None],
        "b": {"ids": jnp.array([3]), "w": jnp.ones((2, 2), jnp.bfloat16)},
        "c": jnp.zeros((0, 4)),
        "d": np.zeros((2,), jax.dtypes.float0),
        "e": optax.MaskedNode(),
        "f": jnp.array(1j),
        "g": jnp.array(True),
        "h": jax.random.key(0),
    }


def test_counts_floating_point_leaves_by_path(tree):
    leaves = Leaves.of(tree)
    assert leaves.paths == ["a/0", "b/w", "f"]
    assert [x.dtype for x in leaves.arrays] == [jnp.float32, jnp.bfloat16, jnp.complex64]


def test_replace_leaves_the_others_in_place(tree):
    leaves = Leaves.of(tree)
    replaced = leaves.replace([x * 2 for x in leaves.arrays])
    assert jax.tree.structure(replaced) == jax.tree.structure(tree)
    np.testing.assert_array_equal(replaced["a"][0], [2.0, 4.0])
    for at in ("c", "d", "g", "h"):
        assert replaced[at] is tree[at]
    assert replaced["b"]["ids"] is tree["b"]["ids"]
    assert_same_bits(leaves.replace(leaves.arrays)["a"], tree["a"])


def test_exclude_sees_path_and_leaf(tree):
    seen = []
    leaves = Leaves.of(tree, lambda path, leaf: seen.append((path, leaf.shape)) or path == "f")
    assert leaves.paths == ["a/0", "b/w"]
    assert seen == [("a/0", (2,)), ("b/w", (2, 2)), ("f", ())]


def test_shapes_will_do_instead_of_arrays():
    abstract = jax.eval_shape(lambda: {"w": jnp.ones(3), "n": jnp.arange(2)})
    assert Leaves.of(abstract).paths == ["w"]


@pytest.mark.parametrize("leaf", [1.0, "weights", object()], ids=["number", "string", "object"])
def test_a_leaf_that_is_no_array(leaf):
    with pytest.raises(TypeError, match=r"arrays, got .* at layer/w\. .*jnp\.asarray"):
        Leaves.of({"layer": {"w": leaf}})
    with pytest.raises(TypeError, match=r"at the root"):
        Leaves.of(leaf)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("x", ["x", "x", "x"]),
        ({"a": ["x", None], "b": "y", "c": "-", "d": "-", "e": "-", "f": "z", "g": "-", "h": "-"},
         ["x", "y", "z"]),
    ],
    ids=["one", "by child"],
)  # fmt: skip
def test_prefix_reaches_the_counted_leaves(tree, prefix, expected):
    assert Leaves.of(tree).from_prefix(prefix, "labels") == expected


@pytest.mark.parametrize(
    "prefix", [{"a": 1}, {"a": 1, "b": 2, "x": 3}, [1, 2], {"a": [1, 2], "b": 1}]
)
def test_prefix_of_another_tree(prefix):
    leaves = Leaves.of({"a": jnp.ones(1), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"bounds must be a tree prefix of the updates(.|\n)*Give"):
        leaves.from_prefix(prefix, "bounds")


TAKE_GRADIENTS = {
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "value": lambda: optaxclip.clip_by_value(1),
    "agc": optaxclip.agc, "zclip": optaxclip.zclip, "spam": optaxclip.spam_clip,
    "singular": lambda: optaxclip.clip_singular_values(1.0), "watch": optaxclip.watch_norms,
    "skip": lambda: optaxclip.skip_nonfinite(optaxclip.clip_per_example(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKE_GRADIENTS)
def test_per_example_gradients_have_no_norm_of_a_batch(name):
    """The norm of their factors would be taken for one."""
    params = {"w": jnp.ones((3, 2))}
    fun = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    grads = optaxclip.per_example_grad(fun)(params, jnp.ones((4, 3)))
    tx = TAKE_GRADIENTS[name]()
    with pytest.raises(TypeError, match=r"got per-example gradients at w.*Put clip_per_example"):
        tx.update(grads, tx.init(params), params)


def test_a_guard_looks_at_what_comes_of_per_example_gradients():
    params = {"w": jnp.ones((3, 2))}
    fun = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    grads = optaxclip.per_example_grad(fun)(params, jnp.ones((4, 3)))
    tx = optaxclip.skip_nonfinite(optaxclip.clip_per_example(0.01), of=("update",))
    updates, state = tx.update(grads, tx.init(params), params)
    assert optax.tree.norm(updates) == pytest.approx(0.01, rel=1e-6)
    assert state.skipped_count == 0
