"""The compilers of TPUs and of an H100, on a machine that has neither, and what they say."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _collectives import collectives
from _hlo import read
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

AXES = ("data", "model")
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mesh(kind: str, shape: tuple[int, int], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """Devices that are not there; the smallest part of a TPU that can be named has 2x2."""
    number = shape[0] * shape[1]
    if kind == "h100":
        topology = topologies.get_topology_desc(
            kind, platform="cuda", target_config=H100, topology=f"1x1x{number}"
        )
    else:
        grid = "2x2" if number == 1 else f"{shape[0]}x{shape[1]}"
        topology = topologies.get_topology_desc(f"{kind}:{grid}", "tpu")
    devices = np.array(topology.devices[:number]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(axis_type,) * 2)


def cost(fun: Callable, *args: Any, **jit_options: Any) -> dict[str, Any]:
    """Compiles, and reads the costs off the program, for JSON.

    `seconds` are the processor's, of tracing and compiling: other processes matter little to them.
    """
    start = time.process_time()
    compiled = jax.jit(fun, **jit_options).lower(*args).compile()
    seconds = time.process_time() - start
    program = dataclasses.asdict(read(compiled.as_text()))
    found = collectives(compiled)
    return {
        **program.pop("least"),
        "most": program.pop("most"),
        **program,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "collectives": _counts(c.kind for c in found if not c.rare),
        "collective_bytes": sum(c.bytes for c in found if not c.rare),
        "rare_collectives": _counts(c.kind for c in found if c.rare),
    }


def versions() -> dict[str, str]:
    """Of the packages here that decide what is compiled."""
    found = {d.name: d.version for d in importlib.metadata.distributions()}
    names = ("jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin")
    return {name: found[name] for name in names if name in found}


def _counts(kinds: Any) -> dict[str, int]:
    kinds = list(kinds)
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}
