"""What does not fit a checkpoint is named; `meshes/test_checkpoints_on_a_mesh.py` restores."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tools.clippers import example_tree

import optaxclip

SAVED = {
    "global": lambda: optaxclip.clip_by_global_norm(1.0),
    "zclip": lambda: optaxclip.zclip(),
    "leaf": lambda: optaxclip.clip_by_leaf_norm(1.0),
    "autoclip": lambda: optaxclip.autoclip(window=64),
    "guarded": lambda: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
    "spam": lambda: optaxclip.spam_clip(),
}


def state_of(clipper):
    params = example_tree()
    return {"params": params, "opt_state": optax.chain(clipper, optax.adam(1e-3)).init(params)}


def metadata(path, state):
    """What Orbax says about a checkpoint of a state, without reading arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.metadata(path).item_metadata


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a checkpoint of each of SAVED."""
    states = {name: state_of(clipper()) for name, clipper in SAVED.items()}
    return metadata(tmp_path_factory.mktemp("saved") / "states", states).tree


@pytest.mark.parametrize(
    ("written_with", "clipper", "lines"),
    [
        (
            "global",
            optaxclip.zclip(),
            [
                "opt_state/0/threshold_state/ordered: missing in the checkpoint",
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
        optaxclip.checkpoints.check_saved_state(saved[written_with], state_of(clipper))
    _, *listed, last = str(error.value).splitlines()
    assert sorted(line.strip() for line in listed) == sorted(lines)
    assert last.startswith("Build the optimizer with the clippers and settings of the run")


def test_of_a_long_list_the_beginning_is_shown(saved):
    with pytest.raises(ValueError, match=r"(?s)opt_state/0/skipped_count: miss.*\n  and 9 more\n"):
        optaxclip.checkpoints.check_saved_state(saved["global"], state_of(SAVED["guarded"]()))


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_fits(saved, name):
    state = state_of(SAVED[name]())
    optaxclip.checkpoints.check_saved_state(saved[name], state)
    optaxclip.checkpoints.check_saved_state(saved[name], jax.eval_shape(lambda: state))
    optaxclip.checkpoints.check_saved_state(state, state)


def test_flax_variables_keys_and_numbers_fit_what_was_saved(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optaxclip.clip_by_global_norm(1.0), wrt=nnx.Param)
    state = {
        "optimizer": nnx.state(optimizer),
        "value": {"value": np.ones(2)},
        "key": jax.random.key(0),
        "step": 3,
    }
    saved = metadata(tmp_path / "state", state)
    optaxclip.checkpoints.check_saved_state(saved, state)
    with pytest.raises(ValueError, match="  value/value: shape"):
        optaxclip.checkpoints.check_saved_state(saved, state | {"value": {"value": np.ones(3)}})
