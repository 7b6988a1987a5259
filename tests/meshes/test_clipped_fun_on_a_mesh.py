"""`clipped_fun` on meshes: as on one device, by the compiler, with explicit axes, in shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.agreement import normal
from tools.quick import quick_jit

from optaxclip.per_example import clipped_fun

DATA = np.float32(normal(0, 16, 4, 3))


def values(x):
    return {"mean": x.mean(axis=0), "largest": jnp.max(x)}


def made(**options):
    return clipped_fun(values, keep_batch_dim=False, l2_clip_norm=0.5, **options)


@pytest.fixture(scope="module")
def expected():
    return jax.tree.map(np.asarray, quick_jit(made())(DATA))


def near(found, expected):
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("size", [None, 4])
def test_examples_are_split(expected, kind, size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        data = jax.device_put(DATA, NamedSharding(mesh, P("data")))
        fun = made(microbatch_size=size, return_norms=True)
        for run in (fun, quick_jit(fun)):
            found, norms = run(data)
            near(found, expected)
            assert norms.shape == (16,)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(expected, check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        lambda x: jax.lax.psum(made()(x), "data"),
        mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    near(quick_jit(step)(DATA), expected)


def test_the_grid_is_the_same_however_examples_are_split():
    with jax.enable_x64(True):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        fun = quick_jit(made(grid_scale=1000))
        whole = fun(DATA)
        split = fun(jax.device_put(DATA, NamedSharding(mesh, P("data"))))
        for name, x in whole.items():
            assert x.dtype == np.int64
            np.testing.assert_array_equal(split[name], x)
