"""Guards on a mesh: what one device sees, all of them act on."""

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from optaxclip import skip_outliers


def test_all_devices_skip_an_outlier_alike():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = skip_outliers(optax.identity(), 3.0)

    def step(g):
        return tx.update(g, tx.init(g))[0]

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    # Only one device's part is long.
    assert run(np.float32([4, 0, 0, 0])).tolist() == [0, 0, 0, 0]
    assert run(np.ones(4, np.float32)).tolist() == [1, 1, 1, 1]
