"""Norms in the backward pass: what is measured where it is used, and that nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal, stacked_grads
from tools.quick import quick_jit

from optaxclip.measure.platforms import ACCELERATOR
from optaxclip.per_example import Outer, clipped_grad
from optaxclip.per_example.engine.arguments import Options, call_of
from optaxclip.per_example.forms.layout import Layout
from optaxclip.per_example.schedules.choice import Choice, chooser
from optaxclip.per_example.schedules.factored import see
from optaxclip.per_example.schedules.flops import flops

EVERY = {*range(7)}


def params():
    return {
        "embed": normal(0, 11, 8), "tied": normal(1, 11, 8), "w": normal(2, 8, 8),
        "b": normal(3, 8), "layers": {"w": normal(4, 5, 8, 8) / 3, "b": normal(5, 5, 8)},
        "recurrent": normal(6, 8, 8) / 3,
    }  # fmt: skip


def batch():
    ids = np.arange(24).reshape(4, 6) % 11
    return ids, normal(7, 4, 6, 11)


def loss(p, example):
    """Tied and untied tables, a dense layer, layers in a checkpointed scan, a recurrent weight."""
    ids, targets = example
    h = jnp.tanh((p["embed"][ids] + p["tied"][ids]) @ p["w"] + p["b"])

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w["w"] + w["b"]) + h, None

    h, _ = jax.lax.scan(layer, h, p["layers"])
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["recurrent"]), None), h, None, length=3)
    return jnp.sum((h @ p["tied"].T - targets) ** 2) / 100


def seen():
    return see(call_of(loss, Options(), (params(), batch()), {}))


def test_what_is_used_once_has_a_spot():
    """In the order of the leaves: b, embed, layers/b, layers/w, recurrent, tied, w."""
    spots = seen().spots(range(7)).spots
    assert {k: spot.whole for k, spot in spots.items()} == {
        0: True, 1: True, 2: False, 3: False, 6: True,
    }  # fmt: skip


def test_weights_follow_at_a_spot_alone_where_all_of_the_group_is_there():
    assert set(seen().alone(range(7), EVERY).spots) == {0, 1, 6}, "layers are seen slice by slice"
    together = [0, 1, 2, 3, 4, 5, 0]  # b and w meet
    assert set(seen().alone(together, EVERY).spots) == {0, 1, 6}
    apart = [0, 0, 2, 3, 4, 5, 6]  # b and embed do not
    assert set(seen().alone(apart, EVERY).spots) == {6}
    assert set(seen().alone(range(7), EVERY, rows={2, 3}).spots) == {0, 1, 2, 3, 6}


def expected(bounds, keep=(1, 1, 1, 1)):
    """Each leaf, or slice of one, clipped by its own norm; only the examples in `keep`."""

    def one(c, g):
        c = np.asarray(c)
        norm = jnp.sqrt(jnp.sum(g * g, axis=tuple(range(1 + c.ndim, g.ndim)), keepdims=True))
        c = c.reshape(1, *c.shape, *(1,) * (g.ndim - 1 - c.ndim))
        return jnp.tensordot(jnp.asarray(keep, g.dtype), jnp.minimum(1, c / norm) * g, 1)

    return jax.tree.map(one, bounds, stacked_grads(loss, params(), batch()))


def test_a_group_that_loses_a_member_is_held_as_a_whole():
    """Its weights would follow from a part of its norm."""
    together = [0, 1, 2, 3, 4, 5, 0]  # b and w meet
    assert set(seen().alone(together, EVERY - {0}).spots) == {1}


@pytest.mark.parametrize("turned", [lambda w: w[::-1], lambda w: w.transpose(1, 0, 2)])
def test_bounds_of_rows_are_of_the_parameters_own_rows(turned):
    """Which the steps of a scan need not see in order, nor see at all."""

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, turned(w))[0] ** 2)

    w, x, bounds = normal(0, 4, 4, 4), normal(1, 5, 4), np.linspace(0.01, 0.2, 4)
    grads = stacked_grads(loss, w, x)
    lengths = jnp.sqrt(jnp.sum(grads**2, axis=(2, 3), keepdims=True))
    want = jnp.sum(jnp.minimum(1, bounds.reshape(1, 4, 1, 1) / lengths) * grads, axis=0)
    grad = clipped_grad(loss, l2_clip_norm=bounds, keep_batch_dim=False, method="one_pass")
    close(quick_jit(grad)(w, x), want, 1e-12)


def test_mixed_precision_under_one_bound():
    """A sum in bfloat16 is not wide enough: its parameter is held, and its group with it."""

    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"] + p["b"].astype(x.dtype)))

    p = {"w": np.float32(normal(0, 4, 3)), "b": jnp.asarray(normal(1, 3), jnp.bfloat16)}
    x = np.float32(normal(2, 5, 4))
    grads = {k: np.float64(g) for k, g in stacked_grads(loss, p, x).items()}
    norms = np.sqrt(sum(np.sum(g.reshape(5, -1) ** 2, axis=1) for g in grads.values()))
    factor = np.minimum(1, 0.5 / norms)
    assert np.all(factor < 1)
    for method in ("one_pass", "two_pass"):
        grad = clipped_grad(
            loss, l2_clip_norm=0.5, keep_batch_dim=False, method=method,
            dtype=jnp.float32,
        )  # fmt: skip
        found = quick_jit(grad)(p, x)
        for k, g in grads.items():
            np.testing.assert_allclose(found[k], np.tensordot(factor, g, 1), rtol=0.01)


def by_leaf():
    return jax.tree.map(lambda x: 0.05, params())


def by_layer():
    bounds = by_leaf()
    bounds["layers"] = {"w": np.linspace(0.01, 0.1, 5), "b": np.linspace(0.1, 0.01, 5)}
    bounds["recurrent"] = np.linspace(0.01, 0.05, 8)  # which is held
    return bounds


@pytest.mark.parametrize("method", ["one_pass", "two_pass", "vmap"])
@pytest.mark.parametrize("bounds", [by_leaf, by_layer])
def test_bounds_by_leaf_and_by_layer(method, bounds):
    """Traced bounds, too, which the rules in the loop must not close over."""

    @quick_jit
    def clipped(bounds, params, batch):
        options = {"l2_clip_norm": bounds, "keep_batch_dim": False, "return_grad_norms": True}
        return clipped_grad(loss, method=method, **options)(params, batch)

    found, aux = clipped(bounds(), params(), batch())
    close(found, expected(bounds()), 1e-12)
    squares = [jnp.sum(g * g, range(1, g.ndim)) for g in
               jax.tree.leaves(stacked_grads(loss, params(), batch()))]  # fmt: skip
    close(aux.grad_norms, np.float32(jnp.sqrt(sum(squares))), 1e-6)  # they are given in float32


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
@pytest.mark.parametrize("bounds", [by_leaf, by_layer, lambda: 1e9])
def test_a_nan_example_counts_as_zero_and_spoils_nothing(method, bounds):
    """Nothing is held that could be masked: the sums are taken again without it."""
    ids, targets = batch()
    targets = np.array(targets)
    targets[2] = np.nan
    grad = clipped_grad(loss, l2_clip_norm=bounds(), keep_batch_dim=False, method=method)
    found = quick_jit(grad)(params(), (ids, targets))
    limits = bounds() if isinstance(bounds(), dict) else jax.tree.map(lambda x: 1e9, params())
    close(found, expected(limits, keep=(1, 1, 0, 1)), 1e-12)


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_a_batch_of_nan_gives_zeros(method):
    ids, targets = batch()
    grad = clipped_grad(loss, l2_clip_norm=by_leaf(), keep_batch_dim=False, method=method)
    found = quick_jit(grad)(params(), (ids, np.full_like(targets, np.nan)))
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(found))


def mlp(p, x):
    for w, b in p:
        x = jnp.tanh(x @ w + b)
    return jnp.sum(x)


def test_bounds_by_leaf_take_one_pass():
    """By operations: hardly more than a plain gradient; two passes took a gradient per bound."""
    shapes = [(256, 256)] * 6
    p = [(jax.ShapeDtypeStruct(s, jnp.float32), jax.ShapeDtypeStruct(s[1:], jnp.float32))
         for s in shapes]  # fmt: skip
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    bounds = jax.tree.map(lambda _: 1.0, p)
    options = {"l2_clip_norm": bounds, "keep_batch_dim": False, "nan_safe": False}
    plain = flops(jax.grad(lambda p, x: jnp.sum(jax.vmap(mlp, (None, 0))(p, x))), p, x)
    assert flops(clipped_grad(mlp, method="one_pass", **options), p, x) < 1.05 * plain
    assert flops(clipped_grad(mlp, method="two_pass", **options), p, x) < 1.75 * plain


def test_a_bound_for_each_slice_must_fit_its_leaf():
    bounds = by_leaf()
    bounds["layers"]["w"] = np.ones(4)
    grad = clipped_grad(loss, l2_clip_norm=bounds, keep_batch_dim=False)
    with pytest.raises(ValueError, match=r"one number for each slice .* layers/w .*\(5,\)"):
        grad(params(), batch())


def test_sensitivity_counts_each_slice():
    bounds = {"w": np.array([3.0, 4.0]), "b": 12.0}
    assert clipped_grad(loss, l2_clip_norm=bounds).sensitivity() == 13.0


def deep(p, x):
    layer = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None))
    return jnp.sum(jax.lax.scan(layer, x, p)[0])


def test_auto_takes_two_passes_where_all_else_holds_too_much():
    """One pass holds what a checkpoint drops. Where the batch may be cut, parts of it hold less."""
    shapes = {"up": (16, 128, 512), "down": (16, 512, 128)}
    p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct((1024, 64, 128), jnp.float32)
    chosen = {}

    def look(p, x):
        call = call_of(deep, Options(), (p, x), {})
        for size in (None, "auto"):
            found = chooser(call, see(call), [0, 0], "auto", size)
            chosen[size] = found.choose(ACCELERATOR)

    jax.eval_shape(look, p, x)
    assert chosen[None] == Choice("two_pass", None)
    assert chosen["auto"].method == "one_pass"
    assert chosen["auto"].size < 1024


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float16, 1e-6), (jnp.bfloat16, 0.01)])
@pytest.mark.parametrize("weight", [1e6, 1e-6])
def test_weighted_factors_may_leave_the_range_of_float16(dtype, tol, weight):
    """Of bfloat16, whose range is float32's, they are rounded."""
    left, right = (
        jnp.asarray(normal(0, 5, 1, 2, 4), dtype),
        jnp.asarray(normal(1, 5, 1, 2, 3), dtype),
    )
    form = Outer(left, right, Layout((4, 3), jnp.float32, ((), (0,), (1,))))
    want = weight * np.einsum("bkti,bkto->io", np.float64(left), np.float64(right))
    found = form.weighted_sum(jnp.full(5, weight, jnp.float32))
    np.testing.assert_allclose(found, want, atol=tol * np.max(np.abs(want)))


@pytest.mark.parametrize("nan_safe", [True, False])
def test_weights_of_a_loss_in_bfloat16_are_rounded_toward_zero(nan_safe):
    """Each 1 / x that rounds up in bfloat16 would leave a gradient longer than its bound."""
    xs = jnp.arange(1, 256, dtype=jnp.float32)
    grad = clipped_grad(
        lambda p, x: (p * x).astype(jnp.bfloat16), l2_clip_norm=1.0, keep_batch_dim=False,
        method="two_pass", nan_safe=nan_safe,
    )  # fmt: skip

    def one(x):
        return grad(jnp.float32(1), jnp.stack([x, jnp.where(nan_safe, jnp.nan, 0)]))

    found = quick_jit(lambda xs: jax.lax.map(one, xs))(xs)
    assert np.max(found) == 1
    assert np.min(found) > 1 - 2**-7
