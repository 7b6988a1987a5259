"""Norms and clippers on a mesh equal those of the unsharded tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tools.norm_cases import vector
from tools.oracles import norm as exact
from tools.quick import QUICK

import optaxclip

jit = functools.partial(jax.jit, compiler_options=QUICK)
SPECS = {"kernel": P("data", "model"), "rows": P("data"), "columns": P(None, "model"), "bias": P()}
SHAPES = {"kernel": (8, 6), "rows": (4, 5), "columns": (3, 4), "bias": (7,)}
LABELS = {"kernel": "a", "rows": "b", "columns": "a", "bias": "a"}
ORDS = [1, 2, 3.0, float("inf"), "rms"]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def grads():
    """Of the names in alphabetical order, as JAX flattens them."""
    rng = np.random.default_rng(0)
    drawn = {k: np.float32(rng.normal(size=s, scale=3.0)) for k, s in SHAPES.items()}
    return {k: drawn[k] for k in sorted(drawn)}


def placed(mesh, tree):
    return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}


@pytest.fixture(scope="module")
def norms(mesh):
    """A compiled function: a tree -> the norms of every kind and order under `shard_map`."""

    def of_each(tree):
        labels = {"group": LABELS}
        return {
            by: [vector(optaxclip.Norm(by, ord, labels=labels.get(by)), tree) for ord in ORDS]
            for by in ("global", "leaf", "group")
        }

    return jit(jax.shard_map(of_each, mesh=mesh, in_specs=(SPECS,), out_specs=P()))


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-23], ids=["ordinary", "overflow", "underflow"])
def test_shard_map_equals_numpy(norms, grads, scale):
    grads = {k: x * np.float32(scale) for k, x in grads.items()}
    together = {
        "global": [grads.values()],
        "leaf": [[x] for x in grads.values()],
        "group": [[x for k, x in grads.items() if LABELS[k] == label] for label in "ab"],
    }
    for by, found in norms(grads).items():
        for ord, numbers in zip(ORDS, found, strict=True):
            expected = [exact(leaves, ord) for leaves in together[by]]
            np.testing.assert_allclose(numbers, expected, rtol=1e-6, err_msg=f"{by}, {ord}")


def test_shard_map_outside_jit(mesh, grads):
    """Operation by operation, each of which is compiled for the mesh."""
    tree = {k: grads[k] for k in ("bias", "kernel")}
    sharded = jax.shard_map(
        functools.partial(vector, optaxclip.Norm()),
        mesh=mesh,
        in_specs=({k: SPECS[k] for k in tree},),
        out_specs=P(),
    )
    np.testing.assert_allclose(sharded(tree), [exact(tree.values())], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_element_on_one_device_is_seen_by_all(norms, grads, bad):
    kernel = grads["kernel"].copy()
    kernel[-1, -1] = bad
    np.testing.assert_array_equal(
        np.ravel(norms(grads | {"kernel": kernel})["global"]), [bad] * len(ORDS)
    )


def test_optax_is_wrong_where_this_is_right(mesh, grads):
    """The claim in the README: Optax's local norm under shard_map."""

    def factors(clip, tree):
        return clip.update(tree, clip.init(tree), tree)[0]["bias"]

    def run(clip):
        local = functools.partial(factors, clip)
        # Optax's result varies over the mesh, so its out_specs cannot be checked.
        sharded = jax.shard_map(local, mesh=mesh, in_specs=(SPECS,), out_specs=P(), check_vma=False)
        return jit(sharded)(grads)

    whole = jit(functools.partial(factors, optax.clip_by_global_norm(1.0)))(grads)
    ours = optaxclip.clip_by_global_norm(
        1.0,
        axis_name=lambda path, x: tuple(a for a in ("data", "model") if a in SPECS[path]),
    )
    np.testing.assert_allclose(run(ours), whole, rtol=1e-6)
    assert not np.allclose(run(optax.clip_by_global_norm(1.0)), whole, rtol=0.05)


def test_large_and_small_leaves(mesh):
    """Leaves on both sides of the size where the safe path changes."""
    rng = np.random.default_rng(1)
    shapes = {"large": (256, 512), "small": (4, 6)}
    tree = {k: np.float32(rng.normal(size=shape) * 1e20) for k, shape in shapes.items()}
    norm = functools.partial(vector, optaxclip.Norm("leaf"))
    sharded = jax.shard_map(norm, mesh=mesh, in_specs=(P("data"),), out_specs=P())
    expected = [exact([x]) for x in tree.values()]
    np.testing.assert_allclose(jit(sharded)(tree), expected, rtol=1e-6)


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
    "guarded": lambda **k: optaxclip.skip_nonfinite(
        optaxclip.clip_by_global_norm(1.0, **k), norm=optaxclip.Norm(**k)
    ),
}


def update_each(txs, grads, states):
    """Updates and statistics, by the name of the clipper."""
    found = {name: tx.update(grads, states[name], grads) for name, tx in txs.items()}
    return {name: (u, optaxclip.clip_stats(state)) for name, (u, state) in found.items()}


@pytest.fixture(scope="module")
def alone(grads):
    """States before the first update, and what all clippers make of it, unsharded."""
    txs = {name: make() for name, make in CLIPPERS.items()}

    @jit
    def first_update(grads):
        states = {name: tx.init(grads) for name, tx in txs.items()}
        return states, update_each(txs, grads, states)

    return first_update(grads)


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "axis_name"])
def test_clippers_under_shard_map(mesh, grads, alone, check_vma):
    """All of them in one program. `test_every_clipper` has them under `jit`."""
    axes = {}
    if not check_vma:
        axes["axis_name"] = lambda path, x: tuple(a for a in ("data", "model") if a in SPECS[path])
    states, expected = alone
    sharded = jax.shard_map(
        functools.partial(update_each, {name: make(**axes) for name, make in CLIPPERS.items()}),
        mesh=mesh,
        in_specs=(SPECS, P()),
        out_specs={name: (SPECS, P()) for name in CLIPPERS},
        check_vma=check_vma,
    )
    for name, found in jit(sharded)(grads, states).items():
        assert_close(found, expected[name], name)


@pytest.mark.parametrize("relearn_after", [1, None])
def test_bounds_of_elements_are_sharded_like_the_elements(mesh, grads, relearn_after):
    tx = optaxclip.spam_clip(3.0, warmup=1, relearn_after=relearn_after)

    def two_steps(g):
        _, state = tx.update(g, tx.init(g))
        return tx.update(jax.tree.map(lambda x: x**3, g), state)

    expected, expected_state = jit(two_steps)(grads)
    state_specs = jax.tree.map(lambda _: P(), expected_state)
    if relearn_after is None:
        state_specs = state_specs._replace(threshold_state=SPECS)
    else:
        learned = state_specs.threshold_state._replace(shares=SPECS)
        state_specs = state_specs._replace(threshold_state=learned)
    sharded = jax.shard_map(two_steps, mesh=mesh, in_specs=(SPECS,), out_specs=(SPECS, state_specs))
    held = placed(mesh, grads)
    for run in (jit(sharded), jit(two_steps)):
        updates, state = run(held)
        assert_close(updates, expected)
        assert_close(state, expected_state)
        assert updates["kernel"].sharding.is_equivalent_to(held["kernel"].sharding, 2)


@pytest.mark.parametrize("ord", [2, "rms"])
def test_one_device_may_overflow_where_the_others_do_not(mesh, ord):
    """What devices add up goes together, whichever of them had to take it anew."""
    x = np.full((8, 4), 0.4e19, np.float32)
    x[:2] = 0.9e19  # the squares of the first device add up to 6.5e38, of the others to 1.3e38
    norm = functools.partial(vector, optaxclip.Norm("global", ord))
    sharded = jax.shard_map(norm, mesh=mesh, in_specs=(P(("data", "model")),), out_specs=P())
    np.testing.assert_allclose(jit(sharded)(x), [exact([x], ord)], rtol=1e-6)


def test_singular_values_need_whole_matrices(mesh, grads):
    tx = optaxclip.clip_singular_values(1.0)

    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    sharded = jax.shard_map(update, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS)
    message = r"whole matrices, got columns of local shape \(3, 2\), sharded over \('model',\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sharded, grads)
    for k, x in jit(update)(placed(mesh, grads)).items():
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
        return jit(local)({"columns": grads["columns"]})

    with pytest.raises(ValueError, match=r"columns .* sharded over \('model',\).*axis_name=\(\)"):
        sharded(optaxclip.agc(0.01))
    # Columns are whole on each device here.
    alone = functools.partial(update, tx=optaxclip.agc(0.01))
    expected = jit(alone)({"columns": grads["columns"]})
    assert_close(sharded(optaxclip.agc(0.01, axis_name=())), expected)


def test_units_split_over_the_mesh(mesh, grads):
    tree = {"rows": grads["rows"]}  # units are columns, split over "data"
    alone, tx = optaxclip.agc(0.01), optaxclip.agc(0.01, axis_name="data")
    expected = jit(lambda g: alone.update(g, alone.init(g), g)[0])(tree)
    sharded = jax.shard_map(
        lambda g: tx.update(g, tx.init(g), g)[0],
        mesh=mesh,
        in_specs=({"rows": P("data")},),
        out_specs={"rows": P("data")},
    )
    assert_close(jit(sharded)(tree), expected)


def test_pmap_axis_name():
    """A tree whose shards lie on the devices of a pmap."""
    stacked = {"w": np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)}
    tx = optaxclip.clip_by_global_norm(1.0, axis_name="i")
    out = jax.pmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="i")(stacked)
    np.testing.assert_allclose(np.linalg.norm(out["w"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(out["w"], stacked["w"] / np.linalg.norm(stacked["w"]), rtol=1e-6)


def test_one_all_reduce_for_many_sharded_leaves(mesh):
    """Under shard_map a global norm over 100 sharded leaves is one collective."""
    tree = {f"w{i}": np.ones((4, 2), np.float32) for i in range(100)}
    tx = optaxclip.clip_by_global_norm(1.0)
    sharded = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    hlo = jit(sharded).lower(tree).compile().as_text()
    assert hlo.count(" all-reduce(") == 1


def test_a_gradient_that_was_not_reduced(mesh):
    """Under `shard_map` the types show it, when the parameters are given."""
    params = {"w": np.ones(3, np.float32), "b": np.ones((), np.float32)}
    batch = np.arange(24.0, dtype=np.float32).reshape(8, 3)

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
        return jit(run)(params, batch)

    tx = optaxclip.clip_by_global_norm(1.0)
    message = r"got b varying over \('data',\).*jax\.lax\.pmean\(grads, \('data',\)\)"
    with pytest.raises(ValueError, match=message):
        run(tx, False)

    @jit
    def expected(params, batch):
        whole = jax.grad(loss)(params, batch)
        return tx.update(whole, tx.init(whole))[0]

    assert_close(run(tx, True), expected(params, batch))
    # Of a parameter that is split itself the gradient is too.
    split = jax.shard_map(
        lambda g, p: tx.update(g, tx.init(p), p)[0],
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    assert_close(jit(split)({"w": batch}, {"w": batch})["w"], batch / np.linalg.norm(batch))


def test_skip_is_taken_by_all_devices_alike(mesh, grads):
    tx = optaxclip.skip_nonfinite(optax.adam(1e-3))
    state = jit(tx.init)(grads)
    bad = grads | {"kernel": grads["kernel"].copy()}
    bad["kernel"][0, 0] = np.nan  # on one device only
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
    updates, new_state = jit(update)(bad, state)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))
    assert int(new_state.skipped_count) == 1
    assert_close(new_state.inner_state, state.inner_state)


def assert_close(got, expected, name=""):
    def assert_near(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7, err_msg=name)

    jax.tree.map(assert_near, got, expected)
