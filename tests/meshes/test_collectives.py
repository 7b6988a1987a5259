"""How many collectives a clipper adds to a step, from the compiled HLO."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.clippers import make
from tools.hlo import collectives
from tools.quick import QUICK

import optaxclip

pytestmark = pytest.mark.optimized  # all that is not compiled with QUICK

SHAPES = {"body": {"bias": (8,), "kernel": (8, 16)}, "head": {"bias": (), "kernel": (16, 8)}}
FSDP = {
    "body": {"bias": P("data"), "kernel": P("data")},
    "head": {"bias": P(), "kernel": P(None, "data")},
}
MIXED = {
    "body": {"bias": P("model"), "kernel": P("data", "model")},
    "head": {"bias": P(), "kernel": P("model", "data")},
}
# name: all-reduces of a step where it is not one. The bounds of spam_clip follow from the largest
# element of each leaf, and its statistics from the bounds.
NUMBER = {"value-no-stats": 0, "spam": 2, "global-l3": 2}
# Under jit units stay split as their leaf is: once for their norms, once for the vector of them
# that statistics need, and once more where the bound is made of a vector too.
NUMBER_UNDER_JIT = {"unit": 2, "agc": 2, "zclip-published-units": 3}
# On a CPU a sum tells whether the largest element is NaN, beside the maximum.
NUMBER_UNDER_JIT |= {"value": 2, "adaclip": 2, "soft-elements": 2, "spam": 3}
NUMBER_UNDER_JIT |= {"spam-no-stats": 2, "global-l3": 3}
ROWS = [
    *("value", "value-no-stats", "global", "global-l3", "leaf-rms", "unit", "group", "agc"),
    *("soft-elements", "autoclip", "adagc", "zclip-published-units", "spam", "spam-no-stats"),
    *("adaclip", "feedback", "skip-nonfinite", "skip-outliers"),
]


def placed(shape, specs, kind):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
    tree = jax.tree.map(
        lambda s, shape: jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, s)),
        specs,
        SHAPES,
        is_leaf=lambda x: isinstance(x, P),
    )
    return mesh, tree


def ordinary(tx, tree, options=QUICK):
    """Those of an ordinary step."""
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    compiled = step.lower(tree, tx.init(tree), tree).compile(options)
    return [c for c in collectives(compiled) if not c.rare]


def added(tx, tree, options=QUICK):
    """Those that a clipper adds to a step of Adam, which has none."""
    return ordinary(optax.chain(tx, optax.adam(1e-3)), tree, options)


def of_layout(layout):
    """Leaves split along one dimension under jit, in every way on an explicit mesh."""
    if layout == "jit":
        return placed((8, 1), FSDP, AxisType.Auto)
    return placed((2, 4), MIXED, AxisType.Explicit)


def within(mesh, layout):
    return jax.set_mesh(mesh) if layout == "explicit" else contextlib.nullcontext()


@pytest.mark.parametrize(("name", "layout"), [("agc", "jit"), ("spam", "explicit")])
def test_quick_compilation_has_the_collectives_of_users_programs(name, layout):
    mesh, tree = of_layout(layout)
    with within(mesh, layout):
        assert added(make(name), tree) == added(make(name), tree, options=None)


def test_a_step_of_adam_has_none():
    assert ordinary(optax.adam(1e-3), placed((2, 4), MIXED, AxisType.Auto)[1]) == []


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("layout", ["jit", "explicit"])
def test_one_all_reduce(name, layout):
    mesh, tree = of_layout(layout)
    with within(mesh, layout):
        found = added(make(name), tree)
    number = NUMBER | (NUMBER_UNDER_JIT if layout == "jit" else {})
    assert [c.kind for c in found] == ["all-reduce"] * number.get(name, 1)
    # A few numbers a group, of which there are 33 units at most: three scales of each, of the
    # gradients and the parameters.
    assert sum(c.bytes for c in found) <= 4 * 3 * 2 * 33


def test_leaves_split_along_two_dimensions_take_one_a_dimension():
    """XLA's partitioner reduces one dimension after another; an explicit mesh takes one."""
    _, tree = placed((2, 4), MIXED, AxisType.Auto)
    assert len(added(make("global"), tree)) <= 3


@pytest.mark.parametrize("name", ["global", "leaf", "agc"])
def test_many_leaves_are_one_collective(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))]
    ones = np.ones((8, 16), np.float32)
    tree = {f"w{i}": jax.device_put(ones, split[i % 2]) for i in range(12)}
    found = added(make(name), tree)
    assert [c.kind for c in found] == ["all-reduce"] * NUMBER_UNDER_JIT.get(name, 1)


def test_the_reader_finds_gathers_and_tells_branches_apart():
    """The reader of HLO finds what there is."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("data")))

    def step(x):
        gathered = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P()))
        rare = jax.lax.cond(jnp.any(x > 3), lambda: jnp.sum(x), lambda: 0.0)
        return gathered, rare

    found = collectives(jax.jit(step).lower(x).compile())
    kinds = {c.kind: c.bytes for c in found if not c.rare}
    assert kinds.keys() == {"all-gather", "all-reduce"}
    assert kinds["all-gather"] == 8 * 16 * 4
    assert [(c.kind, c.bytes) for c in found if c.rare] == [("all-reduce", 4)]


def test_one_collective_for_leaves_split_in_different_ways_inside_shard_map():
    mesh, tree = placed((2, 4), MIXED, AxisType.Auto)
    tx = optaxclip.clip_by_global_norm(1.0)
    update = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh, in_specs=(MIXED,), out_specs=MIXED
    )
    compiled = jax.jit(update).lower(tree).compile()
    assert [c.kind for c in collectives(compiled)] == ["all-reduce"]
    # Of ones, 8 + 128 + 1 + 128 in all: nothing counts twice.
    np.testing.assert_allclose(compiled(tree)["head"]["bias"], 1 / np.sqrt(265), rtol=1e-6)
