"""QK-Clip with heads, or widths, split over eight devices: what one device makes of it."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.oracles import assert_close
from tools.quick import quick_jit

from optaxclip import qk_clip

RNG = np.random.default_rng(0)
LOGITS = np.float32(RNG.uniform(50, 400, 8))
LAYOUTS = {
    "heads": {"kernel": P(None, "model"), "bias": P("model")},
    "width": {"kernel": P("model"), "bias": P(None, "model")},
}


def model():
    leaf = lambda *shape: np.float32(RNG.standard_normal(shape))
    one = lambda: {"kernel": leaf(16, 8, 8), "bias": leaf(8, 8)}
    return {"query": one(), "key": one(), "value": one()}


def step(params, grads, logits):
    tx = optax.chain(optax.sgd(0.1), qk_clip())
    updates, state = tx.update(grads, tx.init(params), params, max_logits={"": logits})
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_attention(layout, kind):
    params, grads = model(), model()
    expected = quick_jit(step)(params, grads, LOGITS)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    specs = dict.fromkeys(params, LAYOUTS[layout])
    put = lambda tree: jax.tree.map(
        lambda s, x: jax.device_put(x, NamedSharding(mesh, s)),
        specs,
        tree,
        is_leaf=lambda s: isinstance(s, P),
    )
    with jax.set_mesh(mesh):
        found = quick_jit(step)(put(params), put(grads), LOGITS)
    assert_close(found, expected, rtol=2e-6, atol=1e-7)
    kernel = found[0]["query"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, LAYOUTS[layout]["kernel"]), 3)
