"""Every state goes through a checkpoint, onto another mesh too."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.clippers import CLIPPERS, make
from tools.oracles import assert_close, assert_same_bits
from tools.quick import QUICK

import optaxclip
from optaxclip.per_example import centered_clip, example_quantile

PER_EXAMPLE = {
    "per-example": lambda: optaxclip.clip_per_example(1.0),
    "per-example-quantile": lambda: optaxclip.clip_per_example(example_quantile(0.5)),
    "per-example-labels": lambda: optaxclip.clip_per_example(1.0, by="leaf"),
    "centered": lambda: centered_clip(1.0),
    "median": lambda: optaxclip.per_example.geometric_median(),
}
ONE_OF_EACH_MEMORY = [
    "autoclip",
    "zclip",
    "adagc",
    "history",
    "quantile",
    "spam-published",
    "adaclip-published",
    "feedback",
    "skip-nonfinite",
]


def tree(seed=0):
    """Leaves that 2, 4 and 8 devices divide; and one that none does."""
    rng = np.random.default_rng(seed)
    shapes = {
        "body": {"bias": (8,), "kernel": (8, 16)},
        "head": {"bias": (), "kernel": (16, 8)},
    }
    return jax.tree.map(
        lambda shape: np.asarray(rng.standard_normal(shape), np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def split(wide):
    """A sharding for each array: fully sharded over eight devices, or over two axes of a mesh."""
    shape, specs = (8, 1), {(8,): P("data"), (8, 16): P("data"), (16, 8): P("data")}
    if wide:
        shape = (2, 4)
        specs = {(8, 16): P("data", "model"), (16, 8): P("model", "data")}
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return lambda x: NamedSharding(mesh, specs.get(x.shape, P()))


def put(tree, sharding):
    return jax.device_put(tree, jax.tree.map(sharding, tree))


def empty(state, sharding):
    """What to restore: shapes, dtypes and shardings."""

    def of(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x))

    return jax.tree.map(of, state)


def all_different(shapes, seed=0):
    """Values that no two arrays share, so that none is taken for another."""
    rng = np.random.default_rng(seed)

    def values(x):
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.integer):
            return np.asarray(rng.integers(1, 2**31 - 1, x.shape), x.dtype)
        return np.asarray(rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(values, shapes)


@pytest.fixture
def checkpointer():
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


def test_every_state_comes_back_on_another_mesh_bit_for_bit(checkpointer, tmp_path):
    params = tree()
    optimizers = {name: make(name) for name in CLIPPERS}
    optimizers |= {name: factory() for name, factory in PER_EXAMPLE.items()}
    shapes = {name: jax.eval_shape(tx.init, params) for name, tx in optimizers.items()}
    states = all_different(shapes)
    checkpointer.save(tmp_path / "states", put(states, split(wide=False)))
    checkpointer.wait_until_finished()
    saved = checkpointer.metadata(tmp_path / "states").item_metadata
    optaxclip.checkpoints.check_saved_state(saved, states)
    restored = checkpointer.restore(tmp_path / "states", empty(shapes, split(wide=True)))
    for name in shapes:
        assert_same_bits(restored[name], states[name])
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(restored))
    carry = restored["feedback"].carry["body"]["kernel"]
    assert carry.sharding.spec == P("data", "model")


def test_training_goes_on_as_before_on_another_mesh(checkpointer, tmp_path):
    optimizers = {name: make(name) for name in ONE_OF_EACH_MEMORY}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(grads, states, params):
        done = {name: tx.update(grads, states[name], params) for name, tx in optimizers.items()}
        return tuple({name: pair[i] for name, pair in done.items()} for i in range(2))

    narrow, wide = split(wide=False), split(wide=True)
    params, first, second = tree(seed=1), tree(seed=2), tree(seed=3)
    states = jax.jit(lambda p: {name: tx.init(p) for name, tx in optimizers.items()})(params)
    _, states = step(*(put(x, narrow) for x in (first, states, params)))
    checkpointer.save(tmp_path / "states", states)
    checkpointer.wait_until_finished()
    expected = step(*(put(x, narrow) for x in (second, states, params)))
    restored = checkpointer.restore(tmp_path / "states", empty(states, wide))
    assert_close(
        step(put(second, wide), restored, put(params, wide)), expected, rtol=2e-6, atol=1e-7
    )
