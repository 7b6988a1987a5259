"""`watch_noise_scale` where each device has some of the examples."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import quick

import optaxclip

DEVICES, EACH = 4, 3
PARAMS = {"b": np.zeros(3, np.float32), "w": np.zeros((4, 3), np.float32)}
by_leaf = optaxclip.watch_noise_scale()
whole = optaxclip.watch_noise_scale(by="global")


@pytest.fixture(scope="module")
def grads():
    rng = np.random.default_rng(0)
    shapes = {k: (DEVICES * EACH, *x.shape) for k, x in PARAMS.items()}
    return {k: np.float32(1 + rng.standard_normal(shape)) for k, shape in shapes.items()}


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,), devices=jax.devices()[:DEVICES])


def estimates(grads):
    g = np.concatenate([np.float64(x).reshape(len(x), -1) for x in grads.values()], 1)
    variance = np.sum(np.var(g, axis=0, ddof=1))
    return np.array([variance, np.sum(g.mean(0) ** 2) - variance / len(g)])


def mean_and_norms(grads):
    mean = jax.tree.map(lambda x: x.mean(0), grads)
    squares = [np.sum(x**2, tuple(range(1, x.ndim))) for x in grads.values()]
    return mean, np.sqrt(sum(squares))


def test_devices_average_their_estimates_and_norms_make_one(grads):
    def local(grads, mean, norms):
        first = by_leaf.update(grads, by_leaf.init(PARAMS), PARAMS)[1]
        second = whole.update(mean, whole.init(PARAMS), PARAMS, example_norms=norms)[1]
        return first, second

    specs = P("data"), P(), P("data")
    run = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=P())
    first, second = quick.run(run, grads, *mean_and_norms(grads))
    of_devices = [
        estimates({k: x[i * EACH : (i + 1) * EACH] for k, x in grads.items()})
        for i in range(DEVICES)
    ]
    noise, signal = np.mean(of_devices, axis=0)
    np.testing.assert_allclose(first.noise_scale, noise / signal, rtol=1e-5)
    noise, signal = estimates(grads)
    np.testing.assert_allclose(second.noise_scale, noise / signal, rtol=1e-5)


def test_a_device_without_examples_enough_does_not_count(grads):
    broken = jax.tree.map(np.copy, grads)
    broken["b"][:EACH] = np.nan
    run = jax.shard_map(
        lambda g: by_leaf.update(g, by_leaf.init(PARAMS), PARAMS)[1],
        mesh=mesh_of(AxisType.Auto),
        in_specs=P("data"),
        out_specs=P(),
    )
    found = quick.run(run, broken)
    parts = [{k: x[i * EACH : (i + 1) * EACH] for k, x in grads.items()} for i in (1, 2, 3)]
    noise, signal = np.mean([estimates(x) for x in parts], axis=0)
    np.testing.assert_allclose(found.noise_scale, noise / signal, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_jit_it_is_that_of_all_examples(grads, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        split = jax.device_put(grads, NamedSharding(mesh, P("data")))
        mean, norms = jax.device_put(mean_and_norms(grads)[0]), mean_and_norms(grads)[1]
        norms = jax.device_put(norms, NamedSharding(mesh, P("data")))
        rows = jax.device_put(np.asarray(mean["w"]), NamedSharding(mesh, P("data")))

        @jax.jit
        def run(grads, mean, norms):
            first = by_leaf.update(grads, by_leaf.init(PARAMS), PARAMS)[1]
            second = whole.update(mean, whole.init(PARAMS), PARAMS, example_norms=norms)[1]
            return first, second

        states = run(split, {**mean, "w": rows}, norms)
        found = [float(state.noise_scale) for state in states]
    noise, signal = estimates(grads)
    np.testing.assert_allclose(found, [noise / signal] * 2, rtol=1e-5)


def test_a_mean_that_was_not_reduced_is_refused(grads):
    mean, norms = mean_and_norms(grads)
    split = jax.tree.map(lambda x: np.stack([x] * DEVICES), mean)
    unreduced = jax.shard_map(
        lambda g, n: whole.update(
            jax.tree.map(lambda x: x[0], g), whole.init(PARAMS), PARAMS, example_norms=n
        )[1],
        mesh=mesh_of(AxisType.Auto),
        in_specs=P("data"),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"one that varies over \('data',\)\. Reduce it first"):
        jax.eval_shape(unreduced, split, norms)
