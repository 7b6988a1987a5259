"""Training on several hosts: the clippers see one gradient, whoever holds it.

    python examples/multihost.py

starts two processes with two CPU devices each on this machine, as two hosts would be. On a cluster
start the same script once on every host:

    python examples/multihost.py --num-processes 2 --process-id 0 --coordinator host0:8476
    python examples/multihost.py --num-processes 2 --process-id 1 --coordinator host0:8476

A small network in plain JAX learns the text of the Python standard library. Parameters, optimizer
state and batch are split over all devices of all processes (FSDP); nothing about the clippers is
configured for that. Process 0 prints the loss and what each clipper did. Every few steps all
processes write an Orbax checkpoint to `--out`, which must be a folder they share, and a run that
finds one goes on from it, bit for bit as if it had not been interrupted, clippers included.

When a process dies the others cannot go on. On CPU the next collective fails at once; elsewhere JAX
itself ends them when no heartbeat has come for HEARTBEAT seconds. Either way they say so and exit
with an error: start all of them again with the same command.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead."""
GAVE_UP = 75
"""The exit code of a process that cannot go on without another: try again."""
BATCH, CONTEXT, WIDTH = 32, 8, 64


def train(options: argparse.Namespace) -> None:
    """What every process runs."""
    import jax

    if options.num_processes > 1:
        jax.distributed.initialize(  # before anything else asks for devices
            options.coordinator,
            options.num_processes,
            options.process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )

    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from _mesh import all_devices, fsdp, init_state
    from _text import standard_library, windows

    import optaxclip

    mesh, text = all_devices(), standard_library()
    by_example = jax.NamedSharding(mesh, jax.P("data"))

    shapes = {"bytes": (256, 16), "hidden": (CONTEXT * 16, WIDTH), "head": (WIDTH, 256)}
    rng = np.random.default_rng(0)
    params = {k: np.float32(rng.normal(0, s[0] ** -0.5, s)) for k, s in shapes.items()}
    params["bias"] = np.zeros(WIDTH, np.float32)
    params = jax.device_put(params, fsdp(mesh, params))

    def loss_fn(params, text):
        x = params["bytes"][text[:, :-1]].reshape(len(text), -1)
        logits = jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, -1]).mean()

    tx = optax.chain(
        optaxclip.adagc(warmup=4, relearn_after=4),
        optaxclip.clip_by_global_norm(0.25),
        optax.sgd(0.5, momentum=0.9),
    )

    @jax.jit
    def train_step(params, opt_state, text):
        loss, grads = jax.value_and_grad(loss_fn)(params, text.astype(jnp.int32))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    state = {"params": params, "opt_state": init_state(mesh, tx, params)}
    manager = ocp.CheckpointManager(
        options.out.resolve(),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    say(f"{jax.device_count()} devices in {jax.process_count()} processes", flush=True)
    start = manager.latest_step() or 0
    if start:
        optaxclip.check_saved_state(manager.item_metadata(start), state)
        state = manager.restore(start, args=ocp.args.StandardRestore(state))
        say(f"goes on from the checkpoint of step {start}", flush=True)

    step = start
    try:
        for step in range(start + 1, options.steps + 1):
            if [jax.process_index(), step] == options.die:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = windows(text, [0, step], (BATCH,), CONTEXT + 1)
            batch = jax.make_array_from_callback(batch.shape, by_example, batch.__getitem__)
            *new, loss = train_step(state["params"], state["opt_state"], batch)
            state = dict(zip(("params", "opt_state"), new, strict=True))
            line = [f"step {step}: loss {loss:.4f}"]
            for name, seen in optaxclip.clip_stats(state["opt_state"]).items():
                line.append(f"{name} {seen.pre_clip_norm:.4f} -> {seen.post_clip_norm:.4f}")
                line.append(f"{seen.clipped_count} steps clipped")
            say(", ".join(line), flush=True)
            if step % options.save_every == 0 or step == options.steps:
                manager.save(step, args=ocp.args.StandardSave(state), force=True)
    except jax.errors.JaxRuntimeError as error:
        if options.num_processes == 1:
            raise
        reason = str(error).splitlines()[0]
        print(
            f"process {options.process_id}: step {step} failed, most likely because another process"
            f" died ({reason}). {resume(options.out)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(GAVE_UP)  # the orderly way out waits for the process that died
    say(f"all {options.steps} steps are done; see {options.out}", flush=True)
    manager.close()


def resume(out: Path) -> str:
    """What to do after a process died."""
    steps = [int(path.name) for path in out.glob("*") if path.name.isdecimal()]
    if not steps:
        return "There is no checkpoint yet: start all processes again."
    return f"Start all processes again: they go on from the checkpoint of step {max(steps)}."


def launch(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Runs every process on this machine, and ends all of them when one dies."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | settings
    command = [sys.executable, __file__, *argv, "--coordinator", coordinator, "--process-id"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment) for i in range(options.num_processes)
    ]
    try:
        while all(code == 0 for code in codes(processes) if code is not None):
            if None not in codes(processes):
                return 0
            time.sleep(0.1)
        deadline = time.monotonic() + HEARTBEAT + 5  # by then the others have ended by themselves
        while None in codes(processes) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    died = " and ".join(
        f"process {i} {f'was ended by {signal.Signals(-c).name}' if c < 0 else f'exited with {c}'}"
        for i, c in enumerate(codes(processes))
        if c not in (0, GAVE_UP, -signal.SIGABRT)  # JAX aborts those that miss process 0
    )
    died = died or "a process died"
    print(
        f"{died}, and the others cannot go on. {resume(options.out)}", file=sys.stderr, flush=True
    )
    return 1


def codes(processes: Sequence[subprocess.Popen]) -> list[int | None]:
    """The exit code of each process; None while it runs."""
    return [process.poll() for process in processes]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--process-id", type=int, help="this process; without it all start here")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    parser.add_argument("--devices", type=int, default=2, help="CPU devices of each, started here")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("out/multihost"), metavar="FOLDER")
    parser.add_argument(
        "--die", type=int, nargs=2, metavar=("PROCESS", "STEP"), help="a process kills itself"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Starts all processes, or is one of them."""
    options = parse(argv)
    if options.process_id is None:
        return launch(options, argv)
    train(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
