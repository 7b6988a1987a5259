"""Two processes train as one does, and a run that lost a process goes on as if it had not."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tools.running import EXAMPLES, environment

SCRIPT = EXAMPLES / "multihost.py"
STEPS, EVERY = 9, 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the example with a folder for its checkpoints; every program is compiled only once."""
    cache = tmp_path_factory.mktemp("compiled")
    settings = environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "error", str(SCRIPT), "--out", str(out), *arguments]
        command += ["--steps", str(STEPS), "--save-every", str(EVERY)]
        with subprocess.Popen(
            command,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:  # a hang fails the test, and leaves no process
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


def steps(done: subprocess.CompletedProcess) -> list[str]:
    """What was printed about each step: the loss and the statistics."""
    return re.findall(r"^.*(step \d+: .*)$", done.stdout, re.MULTILINE)


def last_checkpoint(out: Path):
    """Parameters and optimizer state, on one device, in NumPy."""
    folder = out / str(STEPS) / "default"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            checkpointer.metadata(folder).item_metadata.tree,
        )
        return jax.tree.map(np.asarray, checkpointer.restore(folder, target))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of two processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    done = run(out)
    assert done.returncode == 0, done.stderr
    assert "4 devices in 2 processes" in done.stdout
    assert len(steps(done)) == STEPS
    return done, last_checkpoint(out)


def test_two_processes_equal_one(run, whole, tmp_path):
    done = run(tmp_path, "--num-processes", "1", "--devices", "4")
    assert done.returncode == 0, done.stderr
    assert "4 devices in 1 processes" in done.stdout
    one, two = last_checkpoint(tmp_path), whole[1]
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)
    for clipper in one["opt_state"][:2]:
        assert 0 < clipper["stats"]["clipped_count"] <= STEPS


def test_a_run_that_lost_a_process_twice_ends_bit_for_bit_like_one_that_did_not(
    run, whole, tmp_path
):
    lost = run(tmp_path, "--die", "1", "5")
    assert lost.returncode == 1
    assert "process 0: step 5 failed, most likely because another process died" in lost.stderr
    assert "process 1 was ended by SIGKILL, and the others cannot go on" in lost.stderr
    assert "go on from the checkpoint of step 3" in lost.stderr

    # Process 0 is the one the others report to: JAX may end them before they can say anything.
    again = run(tmp_path, "--die", "0", "8")
    assert again.returncode == 1
    assert "goes on from the checkpoint of step 3" in again.stdout
    assert "process 0 was ended by SIGKILL, and the others cannot go on" in again.stderr
    assert "go on from the checkpoint of step 6" in again.stderr

    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on from the checkpoint of step 6" in done.stdout
    assert steps(again) == steps(whole[0])[3:7]
    assert steps(done) == steps(whole[0])[6:]
    found, expected = last_checkpoint(tmp_path), whole[1]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.tobytes() == b.tobytes()
