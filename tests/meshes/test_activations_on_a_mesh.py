"""`clip_backward` with the batch, or the width, split over eight devices: what one device finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.quick import quick_jit

from optaxclip import clip_backward, per_example_norms
from optaxclip.thresholds import LargestBut

RNG = np.random.default_rng(0)
X, W = np.float32(RNG.standard_normal((16, 4, 8))), np.float32(RNG.standard_normal((8, 8)))
OPTIONS = {
    "whole": (0.5, {}),
    "tokens": (0.1, {"axes": -1}),
    "examples": (0.1, {"axes": (1, 2)}),
    "elements": (0.05, {"axes": ()}),
    "largest tokens": (LargestBut(3), {"axes": -1, "response": "drop"}),
}


def gradients(name):
    bound, options = OPTIONS[name]

    def loss(w, x):
        return jnp.sum(jnp.tanh(clip_backward(x @ w, bound, **options)) ** 2)

    return jax.grad(loss, (0, 1))


def split(name, kind, spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        return quick_jit(gradients(name))(jax.device_put(W, NamedSharding(mesh, P())), x)


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")], ids=["batch", "width"])
@pytest.mark.parametrize("name", OPTIONS)
def test_jit(name, spec):
    expected = quick_jit(gradients(name))(W, X)
    for x, y in zip(split(name, AxisType.Auto, spec), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_explicit_axes(name):
    expected = quick_jit(gradients(name))(W, X)
    for x, y in zip(split(name, AxisType.Explicit, P("data")), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(name, check_vma):
    """What lies on one device has the norms it has anywhere; the whole is that of the device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def on_a_device(w, x):
        w = jax.lax.pcast(w, "data", to="varying") if check_vma else w
        of_w, of_x = gradients(name)(w, x)
        return jax.lax.psum(of_w, "data"), of_x

    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P("data")), "check_vma": check_vma}
    found = quick_jit(jax.shard_map(on_a_device, mesh=mesh, **specs))(W, X)
    if name in ("whole", "largest tokens"):
        parts = [gradients(name)(W, x) for x in X.reshape(8, 2, 4, 8)]
        expected = sum(p[0] for p in parts), np.concatenate([p[1] for p in parts])
    else:
        expected = quick_jit(gradients(name))(W, X)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_examples_split_over_devices_keep_norms_of_their_own():
    """Per example inside `jax.shard_map`: nothing of another device's example comes in."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss = lambda w, x: jnp.sum(jnp.tanh(clip_backward(x @ w, 0.1)) ** 2)
    norms = per_example_norms(loss)
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    found = quick_jit(jax.shard_map(norms, mesh=mesh, **specs))(W, X)
    stacked = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(W, X))
    np.testing.assert_allclose(found, np.linalg.norm(stacked.reshape(16, -1), axis=1), rtol=1e-5)
