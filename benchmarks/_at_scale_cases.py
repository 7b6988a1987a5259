"""The programs that `at_scale.py` compiles: gradients of language models, fully sharded.

Run by `at_scale.py`, in the virtual environment that has the compiler: takes cases as JSON from
stdin, and prints a line of JSON with the versions, then one for each case.
"""

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import _compilers
import jax
import jax.numpy as jnp
import numpy as np
from _at_scale_grid import MODELS, PLAIN, Model
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

try:
    from jax_privacy.clipping import clipped_grad as privacy_clipped_grad
except ImportError:
    privacy_clipped_grad = None


def shapes(model: Model) -> dict[str, Any]:
    """Of the parameters: layers stacked, float32."""
    d, inner, n = model.width, 4 * model.width, model.layers
    layers = {
        "norm_1": (n, d), "qkv": (n, d, 3 * d), "out": (n, d, d),
        "norm_2": (n, d), "up": (n, d, inner), "down": (n, inner, d),
    }  # fmt: skip
    named = {"embed": (model.words, d), "layers": layers, "norm": (d,), "head": (d, model.words)}
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), named, is_leaf=lambda x: type(x) is tuple
    )


def loss_of(model: Model) -> Callable[[Any, Any], Any]:
    """The loss of one sequence of `tokens + 1` numbers; activations in bfloat16."""

    def normed(h: Any, scale: Any) -> Any:
        wide = h.astype(jnp.float32)
        length = lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
        return (wide * length * scale).astype(jnp.bfloat16)

    def held(h: Any) -> Any:
        return lax.with_sharding_constraint(h, P(None, None))

    def layer(h: Any, w: Any) -> tuple[Any, None]:
        w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), w)
        t = h.shape[0]
        qkv = (normed(h, w["norm_1"]) @ w["qkv"]).reshape(t, 3, model.heads, -1)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        scores = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32)
        seen = jnp.tril(jnp.ones((t, t), bool))
        scores = jnp.where(seen, scores / np.sqrt(q.shape[-1]), -1e9)
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores).astype(jnp.bfloat16), v)
        h = held(h + mixed.reshape(t, -1) @ w["out"])
        inner = jax.nn.gelu(normed(h, w["norm_2"]) @ w["up"])
        return held(h + inner @ w["down"]), None

    def of_words(h: Any, scale: Any, head: Any, words: Any) -> Any:
        logits = normed(h, scale) @ head.astype(jnp.bfloat16)
        found = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(found, words[:, None], axis=1))

    def loss(params: Any, tokens: Any) -> Any:
        h = held(params["embed"][tokens[:-1]].astype(jnp.bfloat16))
        h, _ = lax.scan(jax.checkpoint(layer), h, params["layers"])
        return jax.checkpoint(of_words)(h, params["norm"], params["head"], tokens[1:])

    return loss


def gradient(system: str, model: Model) -> Callable[[Any, Any], Any]:
    """The gradient of a batch, summed, as a system takes it."""
    loss = loss_of(model)
    whole = {"spmd_axis_name": "data", "keep_batch_dim": False}

    def plain(params: Any, batch: Any) -> Any:
        each = jax.vmap(loss, (None, 0), spmd_axis_name="data")
        return jax.grad(lambda p: jnp.sum(each(p, batch)))(params)

    bounds = jax.tree.map(lambda x: 1.0, shapes(model))
    if system == PLAIN:
        return plain
    if system == "optaxclip, whole gradient":
        return optaxclip.clipped_grad(loss, l2_clip_norm=1.0, method="two_pass", **whole)
    if system == "optaxclip, by leaf":
        return optaxclip.clipped_grad(loss, l2_clip_norm=bounds, method="two_pass", **whole)
    if system == "optaxclip, by layer":
        each = np.ones(model.layers, np.float32)
        bounds["layers"] = jax.tree.map(lambda _: each, bounds["layers"])
        return optaxclip.clipped_grad(loss, l2_clip_norm=bounds, method="one_pass", **whole)
    return privacy_clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=model.chips, **whole)


def split(x: Any, mesh: Mesh) -> NamedSharding:
    """Fully sharded: along the longest axis that divides, but not that of the layers."""
    sizes = [
        (d, a) for a, d in enumerate(x.shape) if d % mesh.size == 0 and (x.ndim < 2 or a or d > 256)
    ]
    spec: list[Any] = [None] * x.ndim
    if sizes:
        spec[max(sizes)[1]] = "data"
    return NamedSharding(mesh, P(*spec))


def case(kind: str, model: str, tokens: int, system: str) -> dict[str, Any]:
    """Compiles one program for a mesh."""
    m = MODELS[model]
    side = int(m.chips**0.5)
    topology = topologies.get_topology_desc(f"{kind}:{side}x{side}", "tpu")
    mesh = Mesh(np.array(topology.devices).reshape(-1), ("data",))
    params = shapes(m)
    of_params = jax.tree.map(lambda x: split(x, mesh), params)
    batch = jax.ShapeDtypeStruct((m.chips * m.sequences(tokens), tokens + 1), jnp.int32)
    of_batch = NamedSharding(mesh, P("data"))
    with jax.sharding.set_mesh(mesh):
        return _compilers.cost(
            gradient(system, m), params, batch,
            in_shardings=(of_params, of_batch), out_shardings=of_params,
        )  # fmt: skip


def main() -> None:
    """Reads the cases, prints what they cost."""
    print(json.dumps(_compilers.versions()), flush=True)
    for given in json.load(sys.stdin):
        try:
            found = case(**given)
        except Exception:
            found = {"error": traceback.format_exc(limit=-3)[-600:]}
        print(json.dumps(given | found), flush=True)


if __name__ == "__main__":
    main()
