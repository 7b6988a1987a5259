"""A leaf has its full name wherever it is: an attribute called `value` is one like any other."""

import dataclasses
import typing

import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tools.clippers import CLIPPERS, make

import optaxclip
from optaxclip._leaves import Leaves
from optaxclip.checkpoints import check_saved_state


class Tupled(typing.NamedTuple):
    policy: typing.Any
    value: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    policy: typing.Any
    value: typing.Any


class Module(eqx.Module):
    policy: typing.Any
    value: typing.Any


@flax.struct.dataclass
class Struct:
    policy: typing.Any
    value: typing.Any


class Custom:
    def __init__(self, policy, value):
        self.policy, self.value = policy, value


jax.tree_util.register_pytree_with_keys(
    Custom,
    lambda x: (
        [
            (jax.tree_util.GetAttrKey("policy"), x.policy),
            (jax.tree_util.GetAttrKey("value"), x.value),
        ],
        None,
    ),
    lambda _, children: Custom(*children),
)
kinds = pytest.mark.parametrize("kind", [Tupled, Registered, Module, Struct, Custom])
NAMES = ("heads/policy", "heads/value")


def heads(kind, policy=(3.0, 4.0), value=(30.0, 40.0)):
    return {"heads": kind(np.float32(policy), np.float32(value))}


@kinds
def test_a_leaf_in_an_attribute_called_value(kind):
    assert Leaves.of(heads(kind)).paths == [*NAMES]
    assert Leaves.of(kind({"value": np.ones(1)}, kind(np.ones(1), np.ones(1)))).paths == [
        "policy/value",
        "value/policy",
        "value/value",
    ]


@kinds
@pytest.mark.parametrize("name", [k for k in CLIPPERS if k.startswith(("leaf", "unit", "agc"))])
def test_statistics_name_it(kind, name):
    if name != "leaf-tree":  # its bounds are a tree of other names
        groups = jax.eval_shape(make(name).init, heads(kind)).stats.groups
        assert groups.names == NAMES


@kinds
def test_functions_of_the_path_are_given_it(kind):
    seen = []

    def note(answer):
        return lambda path, leaf: seen.append(path) or answer

    functions = {
        "exclude": optaxclip.Norm(exclude=note(False)),
        "labels": optaxclip.Norm("group", labels=note("all")),
        "unit_axes": optaxclip.Norm("unit", unit_axes=note(0)),
        "axis_name": optaxclip.Norm(axis_name=note(None)),
    }
    for norm in functions.values():
        seen.clear()
        tx = optaxclip.clip_by(norm, 1.0)
        tree = heads(kind)
        jax.eval_shape(lambda tree, tx=tx: tx.update(tree, tx.init(tree), tree), tree)
        assert set(seen) == set(NAMES)


@kinds
def test_errors_name_it(kind):
    tree, other = heads(kind), heads(kind, value=(1.0,))
    agc = optaxclip.agc(0.01)
    with pytest.raises(ValueError, match=r"heads/value \(2,\) in params and heads/value \(1,\) in"):
        jax.eval_shape(lambda g, p: agc.update(g, agc.init(p), p), other, tree)
    with pytest.raises(TypeError, match="at heads/value"):
        Leaves.of({"heads": kind(np.ones(1), 1.0)})
    with pytest.raises(ValueError, match=r"  heads/value: shape \(2,\) in the checkpoint, \(1,\)"):
        check_saved_state(tree, other)


@kinds
def test_per_example_labels_and_statistics_are_given_it(kind):
    params = heads(kind)
    batch = np.ones((3, 2), np.float32)

    def loss(params, x):
        return x @ params["heads"].policy + jnp.tanh(x @ params["heads"].value)

    def step(params, batch):
        grads = optaxclip.per_example_grad(loss)(params, batch)
        tx = optaxclip.clip_per_example(1.0, by=lambda path, leaf: path)
        return tx.update(grads, tx.init(params), params)[1]

    state = jax.eval_shape(step, params, batch)
    (stats,) = optaxclip.clip_stats(state).values()
    assert stats.groups.names == NAMES
    shown = str(optaxclip.explain(loss, params, batch))
    assert "heads/value" in shown
    assert "heads/policy" in shown


# --- what Flax wraps around an array is known by its type ---


class Critic(nnx.Module):
    def __init__(self):
        self.policy = nnx.Param(jnp.ones(2))
        self.value = nnx.Param(jnp.ones(2))
        self.nested = nnx.Param({"value": jnp.ones(1), "w": Tupled(jnp.ones(1), jnp.ones(1))})


def test_variables_of_flax_nnx_add_nothing():
    model = Critic()
    names = ["nested/value", "nested/w/policy", "nested/w/value", "policy", "value"]
    state = nnx.state(model)
    assert Leaves.of(model).paths == names
    assert Leaves.of(state).paths == names
    assert Leaves.of(nnx.to_pure_dict(state)).paths == names
    doubled = Leaves.of(state).replace([2 * x for x in Leaves.of(state).arrays])
    assert float(doubled["value"][...][0]) == 2.0
    assert float(doubled["nested"].get_value()["w"].value[0]) == 2.0


def test_boxes_of_flax_linen_add_nothing():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("model",))
            return x @ self.param("value", init, (2,))

    boxed = Net().init(jax.random.key(0), jnp.ones(2))
    assert isinstance(boxed["params"]["value"], nn.Partitioned)
    assert Leaves.of(boxed).paths == ["params/value"]


def test_masked_and_set_aside_leaves_keep_the_names_of_the_others():
    tree = heads(Tupled)
    tx = optax.masked(optaxclip.clip_by_leaf_norm(1.0), {"heads": Tupled(True, True)})
    (stats,) = optaxclip.clip_stats(tx.init(tree)).values()
    assert stats.groups.names == NAMES
    tx = optax.partition(
        {"train": optaxclip.agc(0.01, exclude=lambda path, leaf: path == "heads/policy")},
        {"heads": Tupled("train", "train")},
    )
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert updates["heads"].policy[0] == 3.0
    assert updates["heads"].value[0] != 30.0


def test_a_checkpoint_of_flax_variables_fits_whatever_they_hold(tmp_path):
    state = {"model": nnx.state(Critic()), "heads": heads(Tupled)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        saved = checkpointer.metadata(tmp_path / "state").item_metadata
    check_saved_state(saved, state)
    with pytest.raises(ValueError, match="  heads/heads/value: shape"):
        check_saved_state(saved, {**state, "heads": heads(Tupled, value=(1.0,))})
