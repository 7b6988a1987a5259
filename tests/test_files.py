"""Every state goes into files and comes back, in each of the ways that training code has."""

import io
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from tools import quick
from tools.clippers import CLIPPERS, example_tree, make
from tools.oracles import assert_same_bits

import optaxclip

every = pytest.mark.parametrize("name", CLIPPERS)
AGGREGATORS = {
    "examples": lambda: optaxclip.clip_per_example(1.0),
    "examples-leaf": lambda: optaxclip.clip_per_example(1.0, by="leaf"),
    "examples-quantile": lambda: optaxclip.clip_per_example(
        optaxclip.per_example.example_quantile(0.5)
    ),
    "trimmed": lambda: optaxclip.per_example.trim_by_norm(0.1),
}
OTHERS = {
    "watch": lambda: optaxclip.watch_norms(depth=2),
    "watch-noise": lambda: optaxclip.watch_noise_scale(),
    "guard-of-all": lambda: optaxclip.skip_outliers(
        optax.adam(1e-3), of=("gradient", "update", "loss")
    ),
    "guard-published": lambda: optaxclip.skip_outliers(
        optax.identity(), optaxclip.thresholds.as_published("levanter"), of="loss"
    ),
}
MAKE = {**{name: lambda name=name: make(name) for name in CLIPPERS}, **AGGREGATORS, **OTHERS}


@pytest.fixture(scope="module")
def states():
    """By name, a state of numbers that are nowhere those of `init`."""
    params = jax.tree.map(np.asarray, example_tree())
    shapes = jax.eval_shape(lambda p: {name: made().init(p) for name, made in MAKE.items()}, params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(rng.uniform(1, 9, x.shape), x.dtype), shapes)


def fresh(name):
    return jax.eval_shape(MAKE[name]().init, example_tree())


@pytest.mark.parametrize("name", MAKE)
def test_flax_serialization(states, name):
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), fresh(name))
    as_dict = flax.serialization.to_state_dict(states[name])
    assert_same_bits(flax.serialization.from_state_dict(target, as_dict), states[name])
    written = flax.serialization.to_bytes(states[name])
    assert_same_bits(flax.serialization.from_bytes(target, written), states[name])


@pytest.mark.parametrize("name", MAKE)
def test_pickle_and_equinox(states, name):
    assert_same_bits(pickle.loads(pickle.dumps(states[name])), states[name])
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, states[name])
    file.seek(0)
    assert_same_bits(eqx.tree_deserialise_leaves(file, fresh(name)), states[name])


def test_orbax(states, tmp_path):
    """All in one checkpoint, by either of its interfaces: starting one takes a second."""
    arrays = jax.tree.map(jnp.asarray, states)
    target = jax.tree.map(jnp.zeros_like, arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", arrays)
        checkpointer.wait_until_finished()
        assert_same_bits(checkpointer.restore(tmp_path / "old", target), states)
    ocp_v1.save(tmp_path / "new", arrays)
    assert_same_bits(ocp_v1.load(tmp_path / "new", target), states)
    saved = ocp_v1.metadata(tmp_path / "new").metadata
    optaxclip.checkpoints.check_saved_state(saved, target)


def test_a_clipper_of_no_leaves_is_saved(tmp_path):
    """As `optax.partition` makes one of a label that no leaf has."""
    state = {name: make(name).init({}) for name in ("leaf", "agc", "global")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    assert all(stats.groups is None for stats in optaxclip.clip_stats(state).values())


@every
def test_tree_map_params(name):
    """What is like the parameters is mapped with them, all else apart; statistics stay whole."""
    tx = make(name)
    params = jax.tree.map(np.asarray, example_tree())
    state = quick.run(tx.init, params)
    mapped = optax.tree_map_params(tx, lambda x, p: x + p, state, params)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert optaxclip.clip_stats(mapped).keys() == optaxclip.clip_stats(state).keys()
    changed = [
        a.shape
        for a, b in zip(*map(jax.tree.leaves, (mapped, state)), strict=True)
        if np.any(a != b)
    ]
    shapes = [x.shape for x in jax.tree.leaves(params)]
    assert changed == shapes * name.startswith(("spam", "feedback"))
    specs = optax.tree_map_params(
        tx, lambda _, p: "sharded", state, params, transform_non_params=lambda _: "whole"
    )
    kinds = jax.tree.leaves(jax.tree.broadcast(specs, state))
    assert kinds.count("sharded") == len(changed)
    assert len(kinds) == len(jax.tree.leaves(state))
