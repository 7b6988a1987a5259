"""What clippers, guards and watchers did, in one flat dict for any logger."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import quick
from tools.clippers import CLIPPERS, example_tree, make
from tools.oracles import norm

import optaxclip
from optaxclip import clip_scalars, watch_norms
from optaxclip.scalars import raise_if_frozen


def plain(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("name", CLIPPERS)
def test_every_state_gives_plain_numbers(name):
    params = plain(example_tree())
    tx = optax.chain(make(name), optax.adam(1e-3))
    state = quick.run(lambda p: tx.update(p, tx.init(p), p)[1], params)
    found = clip_scalars(state)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {type(x) for x in found.values()} <= {int, float, bool}
    for clipper, stats in optaxclip.clip_stats(state).items():
        for field in ("count", "pre_clip_norm", "threshold"):
            assert found[f"{clipper}/{field}"] == getattr(stats, field).item()
        for i, group in enumerate(stats.groups.names if stats.groups else ()):
            assert found[f"{clipper}/clip_factor/{group}"] == stats.groups.clip_factor[i].item()


def test_guards_are_there_the_outer_before_the_inner():
    inner = optaxclip.skip_nonfinite(optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1)))
    tx = optaxclip.skip_outliers(
        optaxclip.skip_outliers(inner, 5.0), {"gradient": 9.0, "loss": 2.0}, of=("gradient", "loss")
    )
    params = {"a": np.ones(1, np.float32), "b": np.float32([np.nan])}
    state = tx.init(params)
    _, state = tx.update(params, state, params, loss=3.0)
    found = clip_scalars(state)
    assert found["skip_outliers/skipped_count"] == 1
    assert found["skip_outliers/beyond_count/loss"] == 1
    assert found["skip_outliers/threshold/gradient"] == 9.0
    assert found["skip_outliers/stuck"] is False
    assert found["skip_outliers_2/skipped_count"] == 0
    assert [k for k in found if "first_nonfinite" in k] == ["skip_outliers/first_nonfinite/b"]
    assert found["clip_by_global_norm/count"] == 0  # the step was dropped


def test_examples_are_there():
    grads = {"w": np.float32([[3.0, 4.0], [0.3, 0.4]])}
    tx = optaxclip.clip_per_example(1.0)
    _, state = tx.update(grads, tx.init({"w": np.zeros(2, np.float32)}))
    found = clip_scalars(state)
    assert found["clip_per_example/examples/max_norm"] == pytest.approx(5.0)
    assert found["clip_per_example/examples/clipped_fraction"] == 0.5


def test_the_rate_is_of_all_steps_or_of_those_since():
    tx = optaxclip.clip_by_global_norm(1.0)
    state, seen = tx.init(np.ones(1, np.float32)), [None]
    for n in (2.0, 2.0, 0.5, 0.5, 0.5, 2.0):
        _, state = tx.update(np.float32([n]), state)
        seen.append(clip_scalars(state, since=seen[-2] if len(seen) > 2 else None))
    rates = [x["clip_by_global_norm/clip_rate"] for x in seen[1:]]
    assert rates == [1, 1, 0.5, 0, 0, 0.5]
    assert clip_scalars(state)["clip_by_global_norm/clip_rate"] == 0.5
    assert clip_scalars(tx.init(np.ones(1)))["clip_by_global_norm/clip_rate"] == 0
    tx = make("value-no-stats")
    _, state = tx.update(np.ones(1, np.float32), tx.init(np.ones(1, np.float32)))
    assert not [k for k in clip_scalars(state) if "rate" in k]


def test_statistics_of_thousands_of_leaves_on_request():
    params = {f"w{i}": jax.ShapeDtypeStruct((2,), np.float32) for i in range(1000)}
    few = jax.eval_shape(optaxclip.clip_by("leaf", 1.0).init, params)
    assert few.stats.groups is None
    tx = optaxclip.clip_by("leaf", 1.0, stats="every")
    state = jax.eval_shape(lambda p: tx.update(p, tx.init(p))[1], params)
    assert state.stats.groups.pre_clip_norm.shape == (1000,)
    assert state.stats.groups.names[:2] == ("w0", "w1")


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_watchers_measure_and_change_nothing(ord):
    rng = np.random.default_rng(0)
    leaf = lambda *shape: np.float32(rng.standard_normal(shape))
    params = {"body": {"a": {"w": leaf(3), "b": leaf(2)}, "c": leaf(4)}, "head": leaf(2, 2)}
    grads = jax.tree.map(lambda x: 2 * x, params)
    tx = optax.chain(
        watch_norms(name="gradient", ord=ord),
        watch_norms(depth=2, of="params", ord=ord),
        optax.scale(-0.5),
        watch_norms(depth=None, name="update", ord=ord, exclude=lambda path, leaf: path == "head"),
    )
    updates, state = quick.run(lambda p, g: tx.update(g, tx.init(p), p), params, grads)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(u, -p)
    found = clip_scalars(state)
    body = jax.tree.leaves(params["body"])
    a = jax.tree.leaves(params["body"]["a"])
    expected = {
        "gradient/norm": 2 * norm([*body, params["head"]], ord),
        "gradient/norm/body": 2 * norm(body, ord),
        "gradient/norm/head": 2 * norm([params["head"]], ord),
        "params/norm": norm([*body, params["head"]], ord),
        "params/norm/body/a": norm(a, ord),
        "params/norm/body/c": norm([params["body"]["c"]], ord),
        "params/norm/head": norm([params["head"]], ord),
        "update/norm": norm(body, ord),
        "update/norm/body/a/b": norm([params["body"]["a"]["b"]], ord),
        "update/norm/body/a/w": norm([params["body"]["a"]["w"]], ord),
        "update/norm/body/c": norm([params["body"]["c"]], ord),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    again = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    watcher = watch_norms()
    assert clip_scalars(watcher.update({}, watcher.init({}))[1]) == {"updates/norm": 0.0}


def test_watchers_refuse_what_they_cannot_watch():
    with pytest.raises(ValueError, match=r"of must be 'updates' or 'params', got 'gradient'"):
        watch_norms(of="gradient")
    with pytest.raises(ValueError, match=r"depth must be >= 1, got 0"):
        watch_norms(depth=0)
    tx = watch_norms(of="params")
    with pytest.raises(ValueError, match=r"a watcher of parameters needs params, got None"):
        tx.update(np.ones(1), tx.init(np.ones(1)))


def test_in_flax_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optaxclip.skip_outliers(
        optax.chain(watch_norms(), optaxclip.clip_by_leaf_norm(0.1), optax.adam(1e-3)), 1e9
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones(2))))(model))
    found = clip_scalars(optimizer.opt_state)
    assert found["updates/norm/kernel"] == pytest.approx(np.sqrt(6), rel=1e-6)
    assert found["clip_by_leaf_norm/clipped_count/bias"] == 1
    assert found["skip_outliers/norm"] == pytest.approx(3.0, rel=1e-6)
    for lost in (nnx.state(optimizer), nnx.state(optimizer.opt_state)):
        with pytest.raises(ValueError, match=r"its type, which holds its name, got dicts at .*opt"):
            optaxclip.clip_stats(lost)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_bound_that_adams_eps_swallows(order):
    params = {"w": np.ones(4, np.float32), "unused": np.zeros(50, np.float32)}

    def state_of(bound, steps=3):
        parts = [optaxclip.clip_by_global_norm(bound), optax.adam(1e-3)]
        tx = optax.chain(*parts[:: 1 if order == "before" else -1])
        state = tx.init(params)
        for _ in range(steps):
            _, state = tx.update(params, state, params)
        return state

    raise_if_frozen(state_of(1.0))
    if order == "after":  # what Adam sees is not clipped
        raise_if_frozen(state_of(1e-9))
        return
    with pytest.raises(FloatingPointError, match=r"below eps=1e-08 in 100% of .*multiplied the la"):
        raise_if_frozen(state_of(1e-9))
    raise_if_frozen(state_of(1e-9), eps=1e-12)
    raise_if_frozen(optax.adam(1e-3).init(params))
