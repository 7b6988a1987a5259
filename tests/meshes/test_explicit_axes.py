"""Per-example gradients on a mesh with explicit axes, which `jax.make_mesh` makes by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tools.agreement import normal
from tools.quick import quick_jit

import optaxclip
from optaxclip.per_example import clipped_grad, explain, per_example_grad, per_example_norms

PARAMS = {"e": normal(0, 16, 8), "w": normal(1, 8, 8), "b": normal(2, 8), "o": normal(3, 8, 3)}
SPECS = {
    "whole": {k: P() for k in PARAMS},
    "fully sharded": {"e": P("data"), "w": P("data"), "b": P("data"), "o": P()},
    "columns": {"e": P(), "w": P(None, "model"), "b": P("model"), "o": P("model")},
}


def dense(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) @ p["o"])


def tokens(p, ids):
    return jnp.sum((jnp.tanh(p["e"][ids] @ p["w"]) @ p["o"]) ** 2)


def recurrent(p, x):
    step = lambda h, _: (jnp.tanh(h @ p["w"] + p["b"]), None)
    return jnp.sum(jax.lax.scan(step, x, None, length=3)[0] @ p["o"])


IDS = np.random.default_rng(4).integers(0, 16, (16, 5))
LOSSES = {"dense": (dense, normal(5, 16, 8)), "tokens": (tokens, IDS)}
LOSSES |= {"rows": (dense, normal(6, 16, 4, 8)), "recurrent": (recurrent, normal(5, 16, 8))}


def single(tree):
    return jax.tree.map(lambda x: np.float32(x) if x.dtype.kind == "f" else x, tree)


def answers(loss, params, batch):
    """What the doors return, from programs; that of norms is called outside of one."""
    tx = optaxclip.clip_per_example(1.0, mean="sum")

    def lines(params, batch):
        return tx.update(per_example_grad(loss)(params, batch), tx.init(params), params)[0]

    def clipped(params, batch):
        return [
            clipped_grad(loss, l2_clip_norm=1.0, keep_batch_dim=False, method=m)(params, batch)
            for m in ("one_pass", "two_pass", "vmap")
        ]

    return {
        "norms": per_example_norms(loss)(params, batch),
        "lines": quick_jit(lines)(params, batch),
        "clipped": quick_jit(clipped)(params, batch),
    }


PAIRS = [("dense", "whole"), ("tokens", "fully sharded"), ("rows", "columns")]


@pytest.mark.parametrize(("name", "specs"), [*PAIRS, ("recurrent", "fully sharded")])
def test_every_door(name, specs):
    loss, batch = LOSSES[name]
    params, batch = single((PARAMS, batch))
    expected = answers(loss, params, batch)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        held = {
            k: jax.device_put(x, NamedSharding(mesh, SPECS[specs][k])) for k, x in params.items()
        }
        examples = jax.device_put(batch, NamedSharding(mesh, P("data")))
        found = answers(loss, held, examples)
        assert found["norms"].sharding.spec == P("data")
        assert found["lines"]["w"].sharding.is_equivalent_to(held["w"].sharding, 2)
        assert explain(loss, held, examples).fallbacks == ()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
