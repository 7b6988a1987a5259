"""Unit axes against the parameters that Equinox and Haiku make: a unit is what feeds one output."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equinox import nn

import optaxclip


def axes_of(tree, fun, **kwargs):
    norm = optaxclip.Norm("unit", unit_axes=functools.partial(fun, **kwargs))
    leaves = norm.leaves(tree)
    return dict(zip(leaves.paths, norm.groups(leaves).unit_axes, strict=True))


LAYERS = {
    "linear": (lambda key: nn.Linear(3, 2, key=key), {"weight": (1,), "bias": (0,)}),
    "conv": (lambda key: nn.Conv2d(4, 8, 3, 2, key=key), {"weight": (1, 2, 3), "bias": (0, 1, 2)}),
    "transposed": (
        lambda key: nn.ConvTranspose1d(3, 4, 5, key=key),
        {"weight": (1, 2), "bias": (0, 1)},
    ),
    "embedding": (lambda key: nn.Embedding(5, 4, key=key), {"weight": (1,)}),
    "gru": (
        lambda key: nn.GRUCell(3, 4, key=key),
        {"weight_ih": (1,), "weight_hh": (1,), "bias": (0,), "bias_n": (0,)},
    ),
    "norm": (lambda key: nn.LayerNorm((3, 4)), {"weight": (0, 1), "bias": (0, 1)}),
    "activation": (lambda key: nn.PReLU(), {"negative_slope": ()}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_equinox(name):
    make, expected = LAYERS[name]
    layer = eqx.filter_eval_shape(make, jax.random.key(0))
    tree = {f"the_{name}": eqx.filter(layer, lambda x: isinstance(x, jax.ShapeDtypeStruct))}
    found = axes_of(tree, optaxclip.equinox_unit_axes)
    assert found == {f"the_{name}/{k}": axes for k, axes in expected.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_auto_knows_equinox_by_type(name):
    """Alone, and three layers stacked; norms are no layers, and vectors are whole by rank too."""
    make, expected = LAYERS[name]
    if name == "norm":
        return
    layer = eqx.filter_eval_shape(make, jax.random.key(0))
    tree = eqx.filter(layer, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    norm = optaxclip.Norm("unit")
    leaves = norm.leaves({"a": [tree]})
    found = dict(zip(leaves.paths, norm.groups(leaves).unit_axes, strict=True))
    assert found == {f"a/0/{k}": axes for k, axes in expected.items()}
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), tree)
    leaves = norm.leaves(stacked)
    found = dict(zip(leaves.paths, norm.groups(leaves).unit_axes, strict=True))
    if name != "activation":
        assert found == {k: tuple(a + 1 for a in axes) for k, axes in expected.items()}


def test_equinox_layers_stacked_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = jax.eval_shape(jax.vmap(lambda key: nn.Linear(3, 2, key=key)), keys)
    found = axes_of({"layers": layers}, optaxclip.equinox_unit_axes, scanned=("layers",))
    assert found == {"layers/weight": (2,), "layers/bias": (1,)}


def test_each_row_of_an_equinox_layer_comes_out_by_the_paper():
    layer = nn.Linear(3, 2, use_bias=False, key=jax.random.key(0))
    grads = jax.tree.map(lambda w: jnp.array([[1.0], [100.0]]) * jnp.ones_like(w), layer)
    tx = optaxclip.agc(0.01, unit_axes=optaxclip.equinox_unit_axes)
    updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, layer)
    ratios = np.linalg.norm(updates.weight, axis=1) / np.linalg.norm(layer.weight, axis=1)
    np.testing.assert_allclose(ratios, [0.01, 0.01], rtol=1e-6)


def test_haiku():
    def model(x, images, ids):
        hk.Linear(5)(x)
        hk.Conv2D(4, 3)(images)
        hk.Conv1D(4, 3)(images[:, 0])
        hk.Conv2DTranspose(5, 3)(images)
        hk.Embed(10, 4)(ids)
        hk.MultiHeadAttention(2, 4, w_init=jnp.zeros)(x[None], x[None], x[None])
        hk.LayerNorm(-1, True, True)(x)
        return hk.GRU(4)(x, jnp.zeros((2, 4)))

    inputs = np.ones((2, 3), np.float32), np.ones((1, 8, 8, 3), np.float32), np.zeros(2, np.int32)
    params = jax.eval_shape(hk.transform(model).init, jax.random.key(0), *inputs)
    found = axes_of(params, optaxclip.haiku_unit_axes)
    kernels = {k: v for k, v in found.items() if k.rpartition("/")[2][0] in "we"}
    assert kernels == {
        "linear/w": (0,),
        "conv2_d/w": (0, 1, 2),
        "conv1_d/w": (0, 1),
        "conv2_d_transpose/w": (0, 1, 3),
        "embed/embeddings": (1,),
        **{f"multi_head_attention/{k}/w": (0,) for k in ("query", "key", "value", "linear")},
        "gru/w_i": (0,),
        "gru/w_h": (0,),
    }
    assert {k: v for k, v in found.items() if k not in kernels and len(v) != 1} == {}


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("dense/kernel", (3, 2), (0,)),
        ("conv2d/kernel", (3, 3, 4, 8), (0, 1, 2)),
        ("conv2d_transpose/kernel", (3, 3, 8, 4), (0, 1, 3)),
        ("embedding/embeddings", (10, 4), (1,)),
        ("gru_cell/recurrent_kernel", (4, 12), (0,)),
        ("multi_head_attention/query/kernel", (8, 2, 4), (0,)),
        ("multi_head_attention/attention_output/kernel", (2, 4, 8), (0, 1)),
        ("dense/bias", (2,), (0,)),
    ],
)
def test_names_and_shapes_of_keras(path, shape, axes):
    assert optaxclip.haiku_unit_axes(path, np.zeros(shape)) == axes
