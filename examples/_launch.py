"""Several processes on this machine that train together, for `multihost.py`."""

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


def launch(command: Sequence[str], number: int, devices: int, out: Path) -> int:
    """Runs a command as so many processes with CPU devices; ends all of them when one dies."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | settings
    command = [*command, "--coordinator", coordinator, "--process-id"]
    processes = [subprocess.Popen([*command, str(i)], env=environment) for i in range(number)]
    try:
        while not any(found := codes(processes)):
            if None not in found:
                return 0
            time.sleep(0.1)
        deadline = time.monotonic() + HEARTBEAT + 5  # by then the others have ended by themselves
        while None in (found := codes(processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    died = " and ".join(
        f"process {i} {f'was ended by {signal.Signals(-c).name}' if c < 0 else f'exited with {c}'}"
        for i, c in enumerate(found)
        if c not in (None, 0, GAVE_UP, -signal.SIGABRT)  # JAX aborts those that miss process 0
    )
    died = died or "a process died"
    print(f"{died}, and the others cannot go on. {resume(out)}", file=sys.stderr, flush=True)
    return 1


def codes(processes: Sequence[subprocess.Popen]) -> list[int | None]:
    """The exit code of each process; None while it runs."""
    return [process.poll() for process in processes]


def resume(out: Path) -> str:
    """What to do after a process died."""
    steps = [int(path.name) for path in out.glob("*") if path.name.isdecimal()]
    if not steps:
        return "There is no checkpoint yet: start all processes again."
    return f"Start all processes again: they go on from the checkpoint of step {max(steps)}."
