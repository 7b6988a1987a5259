"""The ways to change a bound in a run; states and parameters that are not what they should be."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick
from tools.clippers import CLIPPERS, example_tree, make, static_arguments
from tools.oracles import assert_close

import optaxclip
from optaxclip.thresholds import Passed

WITH_THRESHOLD = {
    "value": lambda c: optaxclip.clip_by_value(c),
    "global": lambda c: optaxclip.clip_by_global_norm(c),
    "leaf": lambda c: optaxclip.clip_by_leaf_norm(c),
    "unit": lambda c: optaxclip.clip_by_unit_norm(c),
    "group": lambda c: optaxclip.clip_by_group_norm(c, labels=lambda path, leaf: path[0]),
    "normalize": lambda c: optaxclip.normalize(c),
    "soft": lambda c: optaxclip.soft_clip(c),
    "singular": lambda c: optaxclip.clip_singular_values(c),
    "drop": lambda c: optaxclip.clip_by("global", c, "drop"),
    "guard": lambda c: optaxclip.skip_outliers(optax.identity(), c),
    "examples": lambda c: optaxclip.clip_per_example(c),
}


def numbers():
    return jax.tree.map(np.asarray, example_tree())


@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_bound_that_is_passed_is_the_bound(name):
    grads = numbers()
    if name == "examples":
        grads = jax.tree.map(lambda x: np.stack([x, 2 * x]), grads)
    params = numbers()
    given, passed = WITH_THRESHOLD[name](0.3), WITH_THRESHOLD[name](Passed("c"))

    def both(grads, params, c):
        expected = given.update(grads, given.init(params), params)[0]
        return expected, passed.update(grads, passed.init(params), params, c=c)[0]

    expected, found = quick.run(both, grads, params, 0.3)
    assert_close(found, expected)
    with pytest.raises(ValueError, match=r"passed at each step, got no 'c'\. Call .*c=\.\.\.\)"):
        jax.eval_shape(lambda g, p: passed.update(g, passed.init(p), p), grads, params)


BODY = {"bias": 0.1, "kernel": lambda count: 0.2}
FULL = {"body": BODY, "head": {"bias": 0.3, "kernel": 0.4}}


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("name", ["leaf", "value", "unit"])
def test_of_a_full_tree_of_bounds_the_part_that_is_there_counts(name, wrapper):
    alone = WITH_THRESHOLD[name](FULL["head"])
    inside = WITH_THRESHOLD[name](FULL)
    if wrapper == "masked":
        tx = optax.masked(inside, {"body": False, "head": True})
    else:
        parts = {"train": inside, "frozen": optax.set_to_zero()}
        tx = optax.partition(parts, {"body": "frozen", "head": "train"})

    def both(grads):
        expected = alone.update(grads["head"], alone.init(grads["head"]), grads["head"])[0]
        return expected, tx.update(grads, tx.init(grads), grads)[0]["head"]

    expected, found = quick.run(both, numbers())
    assert_close(found, expected)


def test_a_dict_by_label_may_hold_labels_that_are_set_aside():
    by_top = lambda path, leaf: path.split("/")[0]
    group = optaxclip.clip_by_group_norm({"body": 0.1, "head": 0.2}, labels=by_top)
    grads = numbers()
    tx = optax.masked(group, {"body": False, "head": True})
    updates = quick.run(lambda g: tx.update(g, tx.init(g), g)[0], grads)
    length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(updates["head"])))
    assert length == pytest.approx(0.2, rel=1e-6)
    with pytest.raises(ValueError, match="no leaf is labelled 'body'"):
        jax.eval_shape(lambda g: group.update(g, group.init(g)), {"head": grads["head"]})


@pytest.mark.parametrize("bound", [np.array(-1.0), np.float32(-1), np.array(np.nan)])
def test_a_negative_bound_of_numpy_raises(bound):
    for make_clipper in (optaxclip.clip_by_global_norm, optaxclip.clip_by_value, optaxclip.agc):
        with pytest.raises(ValueError, match=r"must be >= 0, got (-1\.0|nan|np\.float32\(-1)"):
            make_clipper(bound)


@pytest.mark.parametrize("name", CLIPPERS)
def test_under_inject_hyperparams_it_works_or_the_remedy_is_named(name):
    """Without `static_args`; functions are called by Optax itself, before any clipper sees them."""
    factory, bound, rest = CLIPPERS[name]
    if any(callable(x) for x in rest.values()):
        return
    tx = optax.inject_hyperparams(factory)(bound, **rest)
    said = ""
    try:
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), numbers())
    except TypeError as error:
        said = str(error)
    assert not said or any(f"static_args=('{k}',)" in said for k in static_arguments(name)), said


@pytest.mark.parametrize("name", ["zclip", "adagc", "spam", "spam-published", "adaclip"])
def test_a_decay_in_bfloat16_is_refused(name):
    factory, bound, rest = CLIPPERS[name]
    tx = optax.inject_hyperparams(factory, static_args=static_arguments(name))(bound, **rest)
    with pytest.raises(TypeError, match=r"0\.999 is 1 in fewer, got bfloat16\. .*hyperparam_dtype"):
        jax.eval_shape(tx.init, example_tree(jnp.bfloat16))


@pytest.mark.parametrize("name", ["global", "leaf", "value", "agc", "zclip", "singular"])
def test_a_state_that_did_not_come_from_init(name):
    tx, grads = make(name), numbers()
    for state in (None, (), optax.EmptyState()):
        with pytest.raises(TypeError, match=rf"come from its init, got {type(state).__name__}\."):
            tx.update(grads, state, grads)


def test_agc_takes_a_whole_equinox_model():
    class Model(eqx.Module):
        layer: eqx.nn.Linear
        act: object
        steps: int
        ids: jax.Array

    key = jax.random.key(0)
    model = Model(eqx.nn.Linear(3, 2, key=key), jax.nn.relu, 3, np.arange(3))
    trained, _ = eqx.partition(model, eqx.is_inexact_array)
    grads = jax.tree.map(jnp.ones_like, trained)
    tx = optaxclip.agc(0.01)
    state = tx.init(trained)
    expected = tx.update(grads, state, trained)[0]
    assert_close(tx.update(grads, state, model)[0].layer, expected.layer)
