"""The training that every process of `multihost.py` runs.

A file of its own, because its imports take seconds: the process that starts the others needs none.
"""

import argparse
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _launch import GAVE_UP, HEARTBEAT, resume
from _mesh import all_devices, fsdp, init_state
from _text import standard_library, windows
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

BATCH, CONTEXT, WIDTH = 32, 8, 64
SHAPES = {
    "bytes": (256, 16),
    "hidden": (CONTEXT * 16, WIDTH),
    "bias": (WIDTH,),
    "head": (WIDTH, 256),
}

tx = optax.chain(
    optaxclip.adagc(warmup=4, relearn_after=4),
    optaxclip.clip_by_global_norm(0.25),
    optax.sgd(0.5, momentum=0.9),
)


def loss_fn(params, text):
    """Mean cross-entropy of the last byte of each piece, given those before it."""
    x = params["bytes"][text[:, :-1]].reshape(len(text), -1)
    logits = jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, -1]).mean()


@jax.jit
def train_step(state, text):
    """One step of the whole batch, wherever its parts are."""
    params = state["params"]
    loss, grads = jax.value_and_grad(loss_fn)(params, text.astype(jnp.int32))
    updates, opt_state = tx.update(grads, state["opt_state"], params)
    return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, loss


def train(options: argparse.Namespace) -> None:
    """What every process runs; `options` are those of `multihost.py`."""
    if options.num_processes > 1:
        jax.distributed.initialize(  # before anything asks for devices
            options.coordinator,
            options.num_processes,
            options.process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    mesh, text = all_devices(), standard_library()
    by_example = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    params = {k: np.float32(rng.normal(0, s[0] ** -0.5, s)) for k, s in SHAPES.items()}
    params = jax.device_put(params, fsdp(mesh, params))
    state = {"params": params, "opt_state": init_state(mesh, tx, params)}
    say(f"{jax.device_count()} devices in {jax.process_count()} processes")

    manager = ocp.CheckpointManager(
        options.out.resolve(),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    done = manager.latest_step() or 0
    if done:
        optaxclip.checkpoints.check_saved_state(manager.item_metadata(done), state)
        state = manager.restore(done, args=ocp.args.StandardRestore(state))
        say(f"goes on from the checkpoint of step {done}")
    step = done
    try:
        for step in range(done + 1, options.steps + 1):
            if [jax.process_index(), step] == options.die:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = windows(text, [0, step], (BATCH,), CONTEXT + 1)
            batch = jax.make_array_from_callback(batch.shape, by_example, batch.__getitem__)
            state, loss = train_step(state, batch)
            say(f"step {step}: loss {loss:.4f}, {summary(state['opt_state'])}")
            if step % options.save_every == 0 or step == options.steps:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
    except jax.errors.JaxRuntimeError as error:
        if options.num_processes == 1:
            raise
        print(
            f"process {options.process_id}: step {step} failed, most likely because another process"
            f" died ({str(error).splitlines()[0]}). {resume(options.out)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(GAVE_UP)  # the orderly way out waits for the process that died
    say(f"all {options.steps} steps are done; see {options.out}, and delete it to start afresh")
    manager.close()


def summary(opt_state) -> str:
    """What each clipper did: replicated, so that any process can read it."""
    return ", ".join(
        f"{name} {seen.pre_clip_norm:.4f} -> {seen.post_clip_norm:.4f},"
        f" {seen.clipped_count} steps clipped"
        for name, seen in optaxclip.clip_stats(opt_state).items()
    )


def say(line: str) -> None:
    """Prints, in process 0 alone."""
    if jax.process_index() == 0:
        print(line, flush=True)
