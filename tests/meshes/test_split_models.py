"""Clipping each example of a model that is split over a mesh: as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.quick import QUICK

import optaxclip

quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
LAYERS, WIDTH, WORDS, TOKENS, BATCH, EXPERTS = 3, 8, 16, 8, 4, 4
SHAPES = {
    "embed": (WORDS, WIDTH), "qkv": (LAYERS, WIDTH, 3, 4, 2), "out": (LAYERS, 4, 2, WIDTH),
    "norm": (LAYERS, WIDTH), "experts": (EXPERTS, WIDTH, WIDTH), "head": (WIDTH, WORDS),
}  # fmt: skip
# Fully sharded; rows, columns and heads of weights, and experts, over "model".
SPECS = {
    "fully sharded": {
        "embed": P(("data", "model")), "qkv": P(None, ("data", "model")), "norm": P(),
        "out": P(None, None, None, ("data", "model")), "experts": P(None, ("data", "model")),
        "head": P(None, ("data", "model")),
    },
    "split weights": {
        "embed": P(None, "model"), "qkv": P(None, None, None, "model"), "norm": P(),
        "out": P(None, "model"), "experts": P(None, None, "model"), "head": P("model"),
    },
    "split experts": {
        "embed": P("model"), "qkv": P(None, "model"), "norm": P(), "out": P(),
        "experts": P("model"), "head": P(None, "model"),
    },
}  # fmt: skip
BOUNDS = {
    "whole": 0.5,
    "by leaf": dict.fromkeys(SHAPES, 0.2),
    "by layer": {
        **dict.fromkeys(SHAPES, 0.2), "qkv": np.full(LAYERS, 0.05), "out": np.full(LAYERS, 0.1),
    },
}  # fmt: skip


def loss_of(held):
    """`held` says how activations [T, D] are split."""

    def layer(h, w):
        x = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * w["norm"]
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, w["qkv"]), 1, 0)
        scores = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        return held(h + jnp.einsum("hts,shk,hkd->td", scores, v, w["out"])), None

    def loss(p, tokens):
        h = held(p["embed"][tokens])
        layers = {k: p[k] for k in ("qkv", "out", "norm")}
        h, _ = lax.scan(jax.checkpoint(layer), h, layers)
        choice = jax.nn.one_hot(tokens % EXPERTS, EXPERTS, dtype=h.dtype)
        h = held(h + jnp.tanh(jnp.einsum("te,td,edf->tf", choice, h, p["experts"])))
        return -jnp.mean(jax.nn.log_softmax(h @ p["head"])[jnp.arange(TOKENS), tokens])

    return loss


def numbers(dtype=np.float64):
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) / 2 for k, s in SHAPES.items()}
    tokens = rng.integers(0, WORDS, (BATCH, TOKENS))
    return {k: x.astype(dtype) for k, x in params.items()}, tokens


@pytest.fixture(scope="module", params=BOUNDS)
def expected(request):
    """By `vmap(grad)` on one device, in float64."""
    bounds = BOUNDS[request.param]

    def one(c, g):
        c = np.asarray(c)
        n = np.sqrt(np.sum(g * g, axis=tuple(range(1 + c.ndim, g.ndim)), keepdims=True))
        factor = np.minimum(1, c.reshape(1, *c.shape, *(1,) * (g.ndim - 1 - c.ndim)) / n)
        return np.sum(factor * g, axis=0)

    with jax.enable_x64(True):
        params, tokens = numbers()
        grads = quick_jit(jax.vmap(jax.grad(loss_of(lambda h: h)), (None, 0)))(params, tokens)
        grads = {k: np.asarray(g) for k, g in grads.items()}
    if not isinstance(bounds, dict):
        norm = np.sqrt(sum(np.sum(g.reshape(BATCH, -1) ** 2, axis=1) for g in grads.values()))
        factor = np.minimum(1, bounds / norm)
        assert np.any(factor < 1)
        return bounds, {k: np.tensordot(factor, g, 1) for k, g in grads.items()}
    return bounds, {k: one(bounds[k], g) for k, g in grads.items()}


@pytest.mark.parametrize("split", SPECS)
@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_as_on_one_device(expected, method, split):
    """Sequences are split over "model", too, with fully sharded weights."""
    bounds, want = expected
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    along = P("model", None) if split == "fully sharded" else P(None, None)
    clip = optaxclip.clipped_grad(
        loss_of(lambda h: lax.with_sharding_constraint(h, NamedSharding(mesh, along))),
        l2_clip_norm=bounds, keep_batch_dim=False, method=method, spmd_axis_name="data",
    )  # fmt: skip
    params, tokens = numbers(np.float32)
    of_params = {k: NamedSharding(mesh, spec) for k, spec in SPECS[split].items()}
    of_batch = NamedSharding(mesh, P("data"))
    params = {k: jax.device_put(x, of_params[k]) for k, x in params.items()}
    found = quick_jit(clip)(params, jax.device_put(tokens, of_batch))
    for k, x in want.items():
        np.testing.assert_allclose(found[k], x, rtol=0, atol=2e-6 * np.max(np.abs(x)), err_msg=k)


def test_constraints_reach_the_program():
    """Examples stay split over "data" inside the loss."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    held = lambda h: lax.with_sharding_constraint(h, NamedSharding(mesh, P("model", None)))
    clip = optaxclip.clipped_grad(
        loss_of(held), l2_clip_norm=1.0, keep_batch_dim=False, method="two_pass",
        spmd_axis_name="data",
    )  # fmt: skip
    text = jax.jit(clip).lower(*numbers(np.float32)).as_text()
    assert '[{"data"}, {"model"}, {}]' in text


def in_shard_map(loss, of_params):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    clip = optaxclip.clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False)
    batch = P() if of_params == P("devices") and loss is summed else P("devices")
    return jax.shard_map(clip, mesh=mesh, in_specs=(of_params, batch), out_specs=P("devices"))


def summed(w, x):
    """Rows of a weight on each device, the products added up."""
    part = x[lax.axis_index("devices") * 2 + jnp.arange(2)] @ w
    return jnp.sum(lax.psum(part, "devices") ** 2)


def gathered(w, x):
    return jnp.sum(x @ lax.all_gather(w, "devices", tiled=True))


@pytest.mark.parametrize("loss", [summed, gathered])
def test_a_loss_that_mixes_devices_is_refused(loss):
    """Its norms were silently those of a part, or of examples of several devices."""
    with pytest.raises(ValueError, match=r"on one device inside jax.shard_map, got .* devices at"):
        in_shard_map(loss, P("devices"))(np.ones((16, 3)), np.ones((8, 16)))
