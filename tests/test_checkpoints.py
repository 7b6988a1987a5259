"""Every state goes through a checkpoint, onto another mesh too; what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.clippers import CLIPPERS, make
from tools.oracles import assert_close, assert_same_bits

import optaxclip

DEVICES = min(jax.device_count(), 8)
on_a_mesh = pytest.mark.skipif(DEVICES < 4, reason="needs 4 devices")
PER_EXAMPLE = {
    "per-example": lambda: optaxclip.clip_per_example(1.0),
    "per-example-quantile": lambda: optaxclip.clip_per_example(optaxclip.example_quantile(0.5)),
    "per-example-labels": lambda: optaxclip.clip_per_example(1.0, by="leaf"),
    "centered": lambda: optaxclip.centered_clip(1.0),
    "median": lambda: optaxclip.geometric_median(),
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
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def split(wide):
    """A sharding for each array: fully sharded over all devices, or over two axes of a mesh."""
    shape, specs = (DEVICES, 1), {(8,): P("data"), (8, 16): P("data"), (16, 8): P("data")}
    if wide:
        shape = (2, DEVICES // 2)
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


@on_a_mesh
def test_every_state_comes_back_on_another_mesh_bit_for_bit(checkpointer, tmp_path):
    params = tree()
    optimizers = {name: make(name) for name in CLIPPERS}
    optimizers |= {name: factory() for name, factory in PER_EXAMPLE.items()}
    shapes = {name: jax.eval_shape(tx.init, params) for name, tx in optimizers.items()}
    states = all_different(shapes)
    checkpointer.save(tmp_path / "states", put(states, split(wide=False)))
    checkpointer.wait_until_finished()
    optaxclip.check_saved_state(found(checkpointer, tmp_path / "states"), states)
    restored = checkpointer.restore(tmp_path / "states", empty(shapes, split(wide=True)))
    for name in shapes:
        assert_same_bits(restored[name], states[name])
    assert not any(jax.typeof(x).weak_type for x in jax.tree.leaves(restored))
    carry = restored["feedback"].carry["body"]["kernel"]
    assert carry.sharding.spec == P("data", "model")


@pytest.mark.slow
@on_a_mesh
def test_training_goes_on_as_before_on_another_mesh(checkpointer, tmp_path):
    optimizers = {name: make(name) for name in ONE_OF_EACH_MEMORY}

    @jax.jit
    def step(grads, states, params):
        done = {name: tx.update(grads, states[name], params) for name, tx in optimizers.items()}
        return tuple({name: pair[i] for name, pair in done.items()} for i in range(2))

    narrow, wide = split(wide=False), split(wide=True)
    params, first, second = tree(seed=1), tree(seed=2), tree(seed=3)
    states = {name: tx.init(params) for name, tx in optimizers.items()}
    _, states = step(*(put(x, narrow) for x in (first, states, params)))
    checkpointer.save(tmp_path / "states", states)
    checkpointer.wait_until_finished()
    expected = step(*(put(x, narrow) for x in (second, states, params)))
    restored = checkpointer.restore(tmp_path / "states", empty(states, wide))
    assert_close(
        step(put(second, wide), restored, put(params, wide)), expected, rtol=2e-6, atol=1e-7
    )


SAVED = {
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "zclip": lambda: optaxclip.zclip(),
    "leaf": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "autoclip": lambda: optaxclip.autoclip(window=64),
    "guarded": lambda: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
    "spam": lambda: optaxclip.spam_clip(),
}


def state_of(clipper):
    return {"params": tree(), "opt_state": optax.chain(clipper, optax.adam(1e-3)).init(tree())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What Orbax says about a checkpoint of each of SAVED, without reading arrays."""
    path = tmp_path_factory.mktemp("saved") / "states"
    states = {name: state_of(clipper()) for name, clipper in SAVED.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, states)
        checkpointer.wait_until_finished()
        return found(checkpointer, path).tree


def found(checkpointer, path):
    return checkpointer.metadata(path).item_metadata


@pytest.mark.parametrize(
    ("written_with", "clipper", "lines"),
    [
        (
            "global",
            optaxclip.zclip(),
            [
                "opt_state/0/threshold_state/recent: missing in the checkpoint",
                "opt_state/0/threshold_state/seen: missing in the checkpoint",
                "opt_state/0/threshold_state/streak: missing in the checkpoint",
                "opt_state/0/threshold_state/memory/mean: missing in the checkpoint",
                "opt_state/0/threshold_state/memory/std: missing in the checkpoint",
            ],
        ),
        (
            "leaf",
            optaxclip.clip_by_global_norm(1.0),
            [
                "opt_state/0/stats/groups/clip_factor: in the checkpoint alone",
                "opt_state/0/stats/groups/clipped_count: in the checkpoint alone",
                "opt_state/0/stats/groups/pre_clip_norm: in the checkpoint alone",
                "opt_state/0/stats/groups/threshold: in the checkpoint alone",
            ],
        ),
        (
            "autoclip",
            optaxclip.autoclip(window=32),
            [
                "opt_state/0/threshold_state/memory/history: shape (64, 1) in the checkpoint,"
                " (32, 1) here",
                "opt_state/0/threshold_state/memory/ordered: shape (64, 1) in the checkpoint,"
                " (32, 1) here",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_else(saved, written_with, clipper, lines):
    with pytest.raises(ValueError, match="the checkpoint must hold the state to restore") as error:
        optaxclip.check_saved_state(saved[written_with], state_of(clipper))
    _, *listed, last = str(error.value).splitlines()
    assert sorted(line.strip() for line in listed) == sorted(lines)
    assert last.startswith("Build the optimizer with the clippers and settings of the run")


def test_of_a_long_list_the_beginning_is_shown(saved):
    with pytest.raises(ValueError, match=r"(?s)opt_state/0/skipped_count: miss.*\n  and 7 more\n"):
        optaxclip.check_saved_state(saved["global"], state_of(SAVED["guarded"]()))


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_fits(saved, name):
    state = state_of(SAVED[name]())
    optaxclip.check_saved_state(saved[name], state)
    optaxclip.check_saved_state(saved[name], jax.eval_shape(lambda: state))
    optaxclip.check_saved_state(state, state)


def test_flax_variables_keys_and_numbers_fit_what_was_saved(checkpointer, tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optaxclip.clip_by_global_norm(1.0), wrt=nnx.Param)
    state = {
        "optimizer": nnx.state(optimizer),
        "value": {"value": np.ones(2)},
        "key": jax.random.key(0),
        "step": 3,
    }
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    optaxclip.check_saved_state(found(checkpointer, tmp_path / "state"), state)
    with pytest.raises(ValueError, match="  value/value: shape"):
        optaxclip.check_saved_state(
            found(checkpointer, tmp_path / "state"), state | {"value": {"value": np.ones(3)}}
        )
