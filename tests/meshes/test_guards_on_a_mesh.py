"""Guards on a mesh: what one device sees, all of them act on."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from optaxclip import Norm, skip_outliers

OF = ("gradient", "loss")


def test_all_devices_skip_an_outlier_alike():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = skip_outliers(optax.identity(), 3.0)

    def step(g):
        return tx.update(g, tx.init(g))[0]

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    # Only one device's part is long.
    assert run(np.float32([4, 0, 0, 0])).tolist() == [0, 0, 0, 0]
    assert run(np.ones(4, np.float32)).tolist() == [1, 1, 1, 1]


def test_devices_whose_losses_differ_take_their_mean():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    losses = np.float32([[1, 1, 1, 1], [1, 1, 1, 9], [1, np.nan, 1, 1], [5, 1, 1, 1]])

    def step(tx, g, loss):
        return tx.update(g, tx.init(g), loss=loss[0])[0]

    for settings, of in (({"check_vma": True}, None), ({"check_vma": False}, OF)):
        norm = Norm(axis_name=None if settings["check_vma"] else "data")
        tx = skip_outliers(optax.identity(), {"gradient": 9.0, "loss": 2.5}, of=of, norm=norm)
        specs = {"mesh": mesh, "in_specs": (P("data"), P("data")), "out_specs": P("data")}
        run = jax.jit(jax.shard_map(functools.partial(step, tx), **specs, **settings))
        found = [run(np.ones(4, np.float32), row).tolist() for row in losses]
        assert found == [[1] * 4, [0] * 4, [0] * 4, [1] * 4]


def test_a_long_update_is_seen_by_all():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = skip_outliers(optax.scale(2.0), 5.0, of="update")
    run = jax.jit(
        jax.shard_map(
            lambda g: tx.update(g, tx.init(g))[0],
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
    )
    assert run(np.float32([3, 0, 0, 0])).tolist() == [0, 0, 0, 0]
    assert run(np.float32([2, 0, 0, 0])).tolist() == [4, 0, 0, 0]
