"""A Flax NNX transformer on a mesh, its parameters split over all devices, clipped as on one.

    python examples/fsdp_transformer.py            # a minute or two on 2 cores
    python examples/fsdp_transformer.py --quick    # under a minute

Runs on all devices there are; a CPU pretends to be eight. A byte-level transformer learns the text
of the Python standard library. Parameters and the moments of Adam are fully sharded (FSDP), batches
are split by example. `agc` bounds each unit by the norm of its weights, in all layers but the last,
then `clip_by_global_norm` the whole gradient. Both are given nothing that has to do with the mesh:
under `jit` an array is one array, however it is split, and so is its norm.
"""

import argparse
import os
from collections.abc import Sequence
from itertools import starmap

import jax
import numpy as np
import optax
from _mesh import all_devices, fsdp, init_state
from _text import standard_library, windows
from _transformer import CONTEXT, Transformer, loss_fn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

BATCH, PRINT_EVERY = 32, 20


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints how it goes."""
    options = parse(argv)
    use_several_devices()
    mesh, text = all_devices(), standard_library()
    by_example = NamedSharding(mesh, P("data"))

    tx = optax.chain(
        optaxclip.agc(
            0.05,
            unit_axes=optaxclip.flax_unit_axes,
            exclude=lambda path, _: path.startswith("head/"),
        ),
        optaxclip.clip_by_global_norm(1.0),
        optax.adam(3e-3),
    )

    def init_params():
        return nnx.as_pure(nnx.state(Transformer(nnx.Rngs(0)), nnx.Param))

    # No device ever holds all parameters: each makes its own share.
    params = jax.jit(init_params, out_shardings=fsdp(mesh, jax.eval_shape(init_params)))()
    opt_state = init_state(mesh, tx, params)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(nnx.Rngs(0))))

    @jax.jit
    def train_step(params, opt_state, text):
        loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graph, p), text))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    print(f"{mesh.size} devices; batches of {BATCH} are split among them")
    losses = []
    for step, batch in enumerate(windows(text, 0, (options.steps, BATCH), CONTEXT + 1), 1):
        batch = jax.device_put(batch, by_example)
        params, opt_state, loss = train_step(params, opt_state, batch)
        losses.append(loss)
        if step % PRINT_EVERY == 0:
            mean, losses = np.mean(losses), []
            done = starmap(summary, optaxclip.clip_stats(opt_state).items())
            print(f"step {step}: loss {mean:.3f}", *done, sep=", ")

    kernel, moment = (
        tree["blocks"][0]["inner"]["kernel"] for tree in (params, optax.tree.get(opt_state, "mu"))
    )
    for name, x in (("a kernel", kernel), ("its first moment", moment)):
        share = x.addressable_shards[0].data.shape
        print(f"{name}: {x.shape}, {x.sharding.spec}, {share} on each device")
    norm = optaxclip.clip_stats(opt_state)["clip_by_global_norm"].pre_clip_norm
    print(f"a clipper's norm: {norm.sharding.spec}, the same on all devices")


def summary(name: str, seen: optaxclip.clipping.ClipStats) -> str:
    """What a clipper did."""
    rate = seen.clipped_count / seen.count
    return f"{name}: norm {seen.pre_clip_norm:.3f}, {rate:.0%} of steps clipped"


def use_several_devices() -> None:
    """Eight on CPU, unless a number is set already."""
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    options = parser.parse_args(argv)
    options.steps = 40 if options.quick else 400
    return options


if __name__ == "__main__":
    main()
