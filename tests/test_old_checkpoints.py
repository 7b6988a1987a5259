"""States that 0.1.0 wrote, each after five steps on one stream: `data/states_0_1_0.json`."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from test_files import AGGREGATORS, MAKE
from tools import quick
from tools.clippers import example_tree
from tools.oracles import assert_close

import optaxclip
from optaxclip.checkpoints import check_saved_state, from_0_1_0

STATES = json.loads((Path(__file__).parent / "data" / "states_0_1_0.json").read_text("utf-8"))
# Norms kept in order came later, and what guards say of single leaves.
CHANGED = {
    "autoclip", "zclip", "adagc", "history", "quantile", "spam", "adaclip", "skip-outliers",
    "skip-nonfinite",
}  # fmt: skip


@functools.cache
def saved(name):
    """As Orbax gives a checkpoint back without a target: nested dicts."""
    tree: dict = {}
    for path, (dtype, numbers) in STATES[name].items():
        *nodes, last = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), nodes, tree)
        node[last] = np.asarray(numbers, dtype)
    return tree


def gradients(name):
    if name not in AGGREGATORS:
        return [example_tree(seed=10 + i) for i in range(5)]
    stack = lambda trees: jax.tree.map(lambda *xs: np.stack(xs), *trees)
    return [stack([example_tree(seed=100 + 10 * i + j) for j in range(3)]) for i in range(5)]


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_0_1_0_goes_on(name):
    """It is the state that the same five steps lead to now."""
    tx, params = MAKE[name](), example_tree(seed=1)

    def five(params, grads):
        state = tx.init(params)
        for g in grads:
            _, state = tx.update(g, state, params)
        return state

    expected = quick.run(five, params, gradients(name))
    found = from_0_1_0(saved(name), tx.init(params))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    known = jax.tree.map(lambda x: np.minimum(x, np.finfo(np.float32).max), (found, expected))
    if name == "skip-nonfinite":  # 0.1.0 did not count the steps that this guard saw
        known = jax.tree.map(lambda x: x, (known[0]._replace(seen_count=5), known[1]))
    assert_close(*known, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_0_1_0_fits_or_the_remedy_is_named(name):
    state = MAKE[name]().init(example_tree())
    if name not in CHANGED:
        check_saved_state(saved(name), state)
        return
    with pytest.raises(ValueError, match=r"If 0\.1\.0 wrote it, use .*from_0_1_0\(saved, state\)"):
        check_saved_state(saved(name), state)


def test_of_another_clipper_it_is_refused():
    state = optaxclip.zclip().init(example_tree())
    with pytest.raises(ValueError, match=r"threshold_state/recent: missing(.|\n)*\nBuild the opt"):
        from_0_1_0(saved("global"), state)
    with pytest.raises(ValueError, match=r"threshold_state/recent: shape \(25, 1\)"):
        from_0_1_0(saved("zclip"), optaxclip.zclip(warmup=3).init(example_tree()))


def test_deep_in_an_optimizer():
    params = example_tree()
    tx = optax.chain(MAKE["zclip"](), optax.adam(1e-3))
    state = tx.init(params)
    adam = {"0": {"count": 0, "mu": params, "nu": params}, "1": {}}
    found = from_0_1_0({"0": saved("zclip"), "1": adam}, state)
    assert float(found[0].threshold_state.ordered[-2, 0]) > 0
    assert_close(found[1][0].mu, params)


def test_a_parameter_called_loss_is_no_loss_of_a_guard():
    params = {"loss": {"w": np.ones(2, np.float32)}}
    tx = optax.chain(optaxclip.skip_outliers(optax.trace(0.9)))
    state = tx.init(params)
    old = state[0]._asdict() | {"inner_state": {"trace": params}}
    old["threshold_state"] = old["threshold_state"]._asdict()
    for name in ("seen_count", "nonfinite", "beyond_count", "loss"):
        del old[name]
    del old["threshold_state"]["ordered"]
    found = from_0_1_0({"0": old}, state)
    assert_close(found[0].inner_state.trace, params)
    assert int(found[0].loss.seen_count) == 0
    del old["inner_state"]["trace"]["loss"]["w"]
    with pytest.raises(ValueError, match=r"trace/loss/w: missing in the checkpoint"):
        from_0_1_0({"0": old}, state)
