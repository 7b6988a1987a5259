"""`flax_unit_axes` against the parameters real Flax modules make."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import optaxclip


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens, images):
        x = nn.Embed(7, 8, name="embed")(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.DenseGeneral((2, 3), name="general")(x).sum((-1, -2))
        x = nn.Dense(4, name="dense")(x)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        y = nn.Conv(4, (3, 3), feature_group_count=2, name="conv")(images)
        z = nn.Conv(6, (3,), name="conv1d")(images[:, 0])
        return x.sum() + y.sum() + z.sum()


@pytest.fixture(scope="module")
def linen_params():
    init = jax.eval_shape(
        Model().init,
        jax.random.key(0),
        np.zeros((2, 5), np.int32),
        np.zeros((1, 6, 6, 4), np.float32),
    )
    return init["params"]


def axes_of(tree, **kwargs):
    fun = functools.partial(optaxclip.flax_unit_axes, **kwargs)
    norm = optaxclip.Norm("unit", unit_axes=fun)
    leaves = norm.leaves(tree)
    return dict(zip(leaves.paths, norm.groups(leaves).unit_axes, strict=True))


def test_linen(linen_params):
    axes = axes_of(linen_params, scanned=("layers",))
    assert axes == {
        "attention/query/kernel": (0,),
        "attention/query/bias": (0, 1),
        "attention/key/kernel": (0,),
        "attention/key/bias": (0, 1),
        "attention/value/kernel": (0,),
        "attention/value/bias": (0, 1),
        "attention/out/kernel": (0, 1),
        "attention/out/bias": (0,),
        "conv/kernel": (0, 1, 2),
        "conv/bias": (0,),
        "conv1d/kernel": (0, 1),
        "conv1d/bias": (0,),
        "dense/kernel": (0,),
        "dense/bias": (0,),
        "embed/embedding": (1,),
        "general/kernel": (0,),
        "general/bias": (0, 1),
        "layers/Dense_0/kernel": (1,),
        "layers/Dense_0/bias": (1,),
        "norm/scale": (0,),
        "norm/bias": (0,),
    }


def test_scan_default_name_is_known():
    assert optaxclip.flax_unit_axes("ScanBlock_0/Dense_0/kernel", np.zeros((3, 4, 5))) == (1,)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
            self.table = nnx.Embed(7, 8, rngs=rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

    params = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    axes = axes_of(params)
    assert axes["attention/out/kernel"] == (0, 1)
    assert axes["attention/query/kernel"] == (0,)
    assert axes["conv/kernel"] == (0, 1, 2)
    assert axes["table/embedding"] == (1,)
    assert axes["head/kernel"] == (0,)
    assert axes["head/bias"] == (0,)


def test_each_layer_of_a_scanned_stack_is_clipped_on_its_own():
    layers = np.stack([np.full((4, 2), scale, np.float32) for scale in (0.1, 1.0, 10.0)])
    grads = {"layers": {"Dense_0": {"kernel": layers}}}
    tx = optaxclip.clip_by_unit_norm(
        1.0, unit_axes=functools.partial(optaxclip.flax_unit_axes, scanned=("layers",))
    )
    clipped = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(grads)
    norms = np.linalg.norm(clipped["layers"]["Dense_0"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, [[0.2] * 2, [1.0] * 2, [1.0] * 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3,), (0,)), ((1, 3), (0, 1)), ((4, 3), (0,)), ((2, 4, 3), (0,)), ((2, 2, 4, 3), (0, 1, 2))],
)
def test_auto_is_optax_rule(shape, axes):
    norm = optaxclip.Norm("unit")
    leaves = norm.leaves({"w": np.zeros(shape)})
    assert norm.groups(leaves).unit_axes == (axes,)


def test_auto_says_what_to_do_beyond_rank_five():
    norm = optaxclip.Norm("unit")
    with pytest.raises(ValueError, match=r"ranks up to 5, got shape .* at w.*function"):
        norm.groups(norm.leaves({"w": np.zeros((2,) * 6)}))


def test_axes_a_leaf_lacks():
    norm = optaxclip.Norm("unit", unit_axes=2)
    with pytest.raises(ValueError, match=r"unit_axes .* got 2 for shape \(2, 3\) at w"):
        norm.groups(norm.leaves({"w": np.zeros((2, 3))}))
