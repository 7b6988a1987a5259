"""Norms and clippers on a mesh equal those of the unsharded tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

SPECS = {"kernel": P("data", "model"), "rows": P("data"), "columns": P(None, "model"), "bias": P()}
SHAPES = {"kernel": (8, 6), "rows": (4, 5), "columns": (3, 4), "bias": (7,)}
ORDS = [1, 2, 3.0, float("inf"), "rms"]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def grads():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s, scale=3.0), jnp.float32) for k, s in SHAPES.items()}


def norms_of(norm, tree):
    leaves = norm.leaves(tree)
    return jnp.stack(norm.measure(leaves, norm.layout(leaves)))


@pytest.mark.parametrize(
    ("ord", "jitted"),  # eagerly, op by op on the mesh, takes 15 seconds each
    [*((ord, True) for ord in ORDS), (2, False)],
)
@pytest.mark.parametrize("by", ["global", "leaf", "group"])
def test_shard_map_equals_unsharded(mesh, grads, by, ord, jitted):
    labels = {"kernel": "a", "rows": "b", "columns": "a", "bias": "a"}
    norm = optaxclip.Norm(by, ord, labels=labels if by == "group" else None)
    sharded = jax.shard_map(
        functools.partial(norms_of, norm), mesh=mesh, in_specs=(SPECS,), out_specs=P()
    )
    got = (jax.jit(sharded) if jitted else sharded)(grads)
    np.testing.assert_allclose(got, norms_of(norm, grads), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e25, 1e-23], ids=["overflow", "underflow"])
def test_shard_map_is_safe_at_rare_scales(mesh, grads, scale):
    grads = jax.tree.map(lambda x: x * scale, grads)
    norm = optaxclip.Norm()
    sharded = jax.shard_map(
        functools.partial(norms_of, norm), mesh=mesh, in_specs=(SPECS,), out_specs=P()
    )
    exact = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in grads.values()))
    np.testing.assert_allclose(jax.jit(sharded)(grads)[0], exact, rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_element_on_one_device_is_seen_by_all(mesh, grads, ord, bad):
    grads = grads | {"kernel": grads["kernel"].at[-1, -1].set(bad)}
    norm = optaxclip.Norm("global", ord)
    sharded = jax.shard_map(
        functools.partial(norms_of, norm), mesh=mesh, in_specs=(SPECS,), out_specs=P()
    )
    np.testing.assert_array_equal(jax.jit(sharded)(grads).ravel(), [bad])


def test_optax_is_wrong_where_this_is_right(mesh, grads):
    """The claim in the README: Optax's local norm under shard_map."""

    def factors(clip, tree):
        return clip.update(tree, clip.init(tree), tree)[0]["bias"]

    def run(clip):
        local = functools.partial(factors, clip)
        # Optax's result varies over the mesh, so its out_specs cannot be checked.
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(SPECS,), out_specs=P(), check_vma=False)
        return jax.jit(sharded)(grads)

    whole = factors(optax.clip_by_global_norm(1.0), grads)
    ours = optaxclip.clip_by_global_norm(
        1.0,
        axis_name=lambda path, x: tuple(a for a in ("data", "model") if a in SPECS[path]),
    )
    np.testing.assert_allclose(run(ours), whole, rtol=1e-6)
    assert not np.allclose(run(optax.clip_by_global_norm(1.0)), whole, rtol=0.05)


@pytest.mark.parametrize("large", [False, True], ids=["small leaf", "large leaf"])
def test_large_and_small_leaves(mesh, large):
    """Leaves on both sides of the size where the safe path changes."""
    shape = (256, 512) if large else (4, 6)
    tree = {"w": jax.random.normal(jax.random.key(1), shape) * 1e20}
    norm = optaxclip.Norm("leaf")
    sharded = jax.shard_map(
        functools.partial(norms_of, norm), mesh=mesh, in_specs=(P("data"),), out_specs=P()
    )
    exact = np.linalg.norm(np.asarray(tree["w"], np.float64))
    np.testing.assert_allclose(jax.jit(sharded)(tree)[0], exact, rtol=1e-6)


CLIPPERS = {
    "global": lambda **k: optaxclip.clip_by_global_norm(1.0, **k),
    "leaf": lambda **k: optaxclip.clip_by_leaf_norm(1.0, **k),
    "rms": lambda **k: optaxclip.clip_by_leaf_rms(0.5, **k),
    "value": lambda **k: optaxclip.clip_by_value(0.5, **k),
    "normalize": lambda **k: optaxclip.normalize(1.0, **k),
    "soft": lambda **k: optaxclip.soft_clip(1.0, **k),
    "zclip": lambda **k: optaxclip.zclip(by="leaf", **k),
    "adagc": lambda **k: optaxclip.adagc(warmup=1, relearn_after=1, **k),
    "adaclip": lambda **k: optaxclip.adaclip(warmup=1, relearn_after=1, **k),
    "adaclip-published": lambda **k: optaxclip.adaclip(relearn_after=None, **k),
    "guarded": lambda **k: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0, **k), **k),
}


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "axis_name"])
def test_clippers_under_shard_map(mesh, grads, name, check_vma):
    axes = {}
    if not check_vma:
        axes["axis_name"] = lambda path, x: tuple(a for a in ("data", "model") if a in SPECS[path])
    alone, sharded = CLIPPERS[name](), CLIPPERS[name](**axes)
    expected, expected_state = alone.update(grads, alone.init(grads), grads)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(SPECS, P()),
        out_specs=(SPECS, P()),
        check_vma=check_vma,
    )
    def update(grads, state):
        return sharded.update(grads, state, grads)

    updates, state = jax.jit(update)(grads, alone.init(grads))
    assert_close(updates, expected)
    assert_close(optaxclip.clip_stats(state), optaxclip.clip_stats(expected_state))


@pytest.mark.parametrize("relearn_after", [1, None])
def test_bounds_of_elements_are_sharded_like_the_elements(mesh, grads, relearn_after):
    tx = optaxclip.spam_clip(3.0, warmup=1, relearn_after=relearn_after)

    def two_steps(g):
        _, state = tx.update(g, tx.init(g))
        return tx.update(jax.tree.map(lambda x: x**3, g), state)

    expected, expected_state = two_steps(grads)
    state_specs = jax.tree.map(lambda _: P(), expected_state)
    if relearn_after is None:
        state_specs = dataclasses.replace(state_specs, threshold_state=SPECS)
    else:
        learned = state_specs.threshold_state._replace(shares=SPECS)
        state_specs = dataclasses.replace(state_specs, threshold_state=learned)
    sharded = jax.shard_map(two_steps, mesh=mesh, in_specs=(SPECS,), out_specs=(SPECS, state_specs))
    placed = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in grads.items()}
    for run in (jax.jit(sharded), jax.jit(two_steps)):
        updates, state = run(placed)
        assert_close(updates, expected)
        assert_close(state, expected_state)
        assert updates["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)


@pytest.mark.parametrize("name", CLIPPERS)
def test_clippers_under_jit_with_named_sharding(mesh, grads, name):
    tx = CLIPPERS[name]()
    expected, expected_state = tx.update(grads, tx.init(grads), grads)
    placed = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in grads.items()}
    updates, state = jax.jit(tx.update)(placed, tx.init(placed), placed)
    assert_close(updates, expected)
    assert_close(optaxclip.clip_stats(state), optaxclip.clip_stats(expected_state))
    assert updates["kernel"].sharding.is_equivalent_to(placed["kernel"].sharding, 2)


def test_singular_values_need_whole_matrices(mesh, grads):
    tx = optaxclip.clip_singular_values(1.0)

    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    sharded = jax.shard_map(update, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS)
    message = r"whole matrices, got columns of local shape \(3, 2\), sharded over \('model',\)"
    with pytest.raises(ValueError, match=message):
        sharded(grads)
    placed = {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in grads.items()}
    for k, x in jax.jit(update)(placed).items():
        expected = np.float64(grads[k])
        u, s, vt = np.linalg.svd(np.atleast_2d(expected), full_matrices=False)
        expected = ((u * np.minimum(s, 1.0)) @ vt).reshape(expected.shape)
        np.testing.assert_allclose(x, expected, atol=1e-4)


def test_units_under_shard_map_need_axis_name(mesh, grads):
    def update(grads, tx):
        return tx.update(grads, tx.init(grads), grads)[0]

    def sharded(tx):
        local = jax.shard_map(
            functools.partial(update, tx=tx),
            mesh=mesh,
            in_specs=({"columns": SPECS["columns"]},),
            out_specs={"columns": SPECS["columns"]},
        )
        return jax.jit(local)({"columns": grads["columns"]})

    with pytest.raises(ValueError, match=r"columns .* sharded over \('model',\).*axis_name=\(\)"):
        sharded(optaxclip.agc(0.01))
    # Columns are whole on each device here.
    expected = update({"columns": grads["columns"]}, optaxclip.agc(0.01))
    assert_close(sharded(optaxclip.agc(0.01, axis_name=())), expected)


def test_units_split_over_the_mesh(mesh, grads):
    tree = {"rows": grads["rows"]}  # units are columns, split over "data"
    alone, tx = optaxclip.agc(0.01), optaxclip.agc(0.01, axis_name="data")
    expected, _ = alone.update(tree, alone.init(tree), tree)
    sharded = jax.shard_map(
        lambda g: tx.update(g, tx.init(g), g)[0],
        mesh=mesh,
        in_specs=({"rows": P("data")},),
        out_specs={"rows": P("data")},
    )
    assert_close(jax.jit(sharded)(tree), expected)


def test_pmap_axis_name(grads):
    """A tree whose shards lie on the devices of a pmap."""
    stacked = {"w": jnp.arange(1.0, 9.0).reshape(4, 2)}
    tx = optaxclip.clip_by_global_norm(1.0, axis_name="i")
    out = jax.pmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="i")(stacked)
    np.testing.assert_allclose(jnp.linalg.norm(out["w"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(out["w"], stacked["w"] / jnp.linalg.norm(stacked["w"]), rtol=1e-6)


def test_one_all_reduce_for_many_sharded_leaves(mesh):
    """Under shard_map a global norm over 100 sharded leaves is one collective."""
    tree = {f"w{i}": jnp.ones((4, 2)) for i in range(100)}
    tx = optaxclip.clip_by_global_norm(1.0)
    sharded = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    hlo = jax.jit(sharded).lower(tree).compile().as_text()
    assert hlo.count(" all-reduce(") == 1


def test_a_gradient_that_was_not_reduced(mesh):
    """Under `shard_map` the types show it, when the parameters are given."""
    params, batch = {"w": jnp.ones(3), "b": jnp.ones(())}, jnp.arange(24.0).reshape(8, 3)

    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"]) ** 2)

    def step(tx, reduced, params, batch):
        local = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params)
        grads = jax.grad(loss)(local, batch)
        if reduced:
            grads = jax.lax.pmean(grads, "data")
        return tx.update(grads, tx.init(params), params)[0]

    def run(tx, reduced):
        f = functools.partial(step, tx, reduced)
        run = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        return jax.jit(run)(params, batch)

    tx = optaxclip.clip_by_global_norm(1.0)
    message = r"got b varying over \('data',\).*jax\.lax\.pmean\(grads, \('data',\)\)"
    with pytest.raises(ValueError, match=message):
        run(tx, False)
    whole = jax.grad(loss)(params, batch)
    assert_close(run(tx, True), tx.update(whole, tx.init(whole))[0])
    # Of a parameter that is split itself the gradient is too.
    split = jax.shard_map(
        lambda g, p: tx.update(g, tx.init(p), p)[0],
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    assert_close(jax.jit(split)({"w": batch}, {"w": batch})["w"], batch / jnp.linalg.norm(batch))


def test_skip_is_taken_by_all_devices_alike(mesh, grads):
    tx = optaxclip.skip_nonfinite(optax.adam(1e-3))
    state = tx.init(grads)
    bad = grads | {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}  # on one device only
    specs = jax.tree.map(lambda _: P(), state)
    specs = specs._replace(
        inner_state=(specs.inner_state[0]._replace(mu=SPECS, nu=SPECS), specs.inner_state[1])
    )
    update = jax.shard_map(
        lambda g, s: tx.update(g, s, g),
        mesh=mesh,
        in_specs=(SPECS, specs),
        out_specs=(SPECS, specs),
    )
    updates, new_state = jax.jit(update)(bad, state)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))
    assert int(new_state.skipped_count) == 1
    assert_close(new_state.inner_state, state.inner_state)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, expected)
