"""Fully sharded data parallelism (FSDP) over one mesh axis, for the examples."""

from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any


def all_devices() -> Mesh:
    """Every device of every process along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def fsdp(mesh: Mesh, params: Tree) -> Tree:
    """A sharding for each parameter: its first axis is split if the devices divide it."""

    def sharding(x: jax.Array) -> NamedSharding:
        whole = x.ndim == 0 or x.shape[0] % mesh.size
        return NamedSharding(mesh, P() if whole else P("data"))

    return jax.tree.map(sharding, params)


def init_state(mesh: Mesh, tx: optax.GradientTransformation, params: Tree) -> Tree:
    """`tx.init`, on all devices.

    What mirrors a parameter is split as the parameter is, which takes no doing. The rest, such as
    counters and a clipper's statistics, starts out on one device and is copied to all.
    """
    everywhere = NamedSharding(mesh, P())

    def place(x: jax.Array) -> jax.Array:
        return x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, everywhere)

    return jax.tree.map(place, tx.init(params))
