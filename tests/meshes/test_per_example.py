"""Per-example clipping with the batch split over a mesh: one device's result, nothing gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.hlo import collectives
from tools.quick import QUICK

import optaxclip
from optaxclip.per_example import reweighted_grad

pytestmark = pytest.mark.optimized  # for `test_jit`
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)

WIDTH, BATCH = 32, 16
REPLICATED = {"a": P(), "b": P(), "c": P()}
FSDP = {"a": P("data"), "b": P("data"), "c": P(None, "data")}
SCHEDULES = [("one_pass", None), ("two_pass", None), ("vmap", None), ("one_pass", 8)]


def loss(params, x):
    hidden = jnp.tanh(x @ params["a"] + params["b"])
    return jnp.sum(jnp.tanh(hidden @ params["c"]) ** 2)


def single_in_double(rng, *shape):
    """Numbers that are the same in single and in double precision, in which the oracle adds up."""
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"a": (16, WIDTH), "b": (WIDTH,), "c": (WIDTH, 8)}
    return {k: single_in_double(rng, *shape) for k, shape in shapes.items()}


@pytest.fixture(scope="module")
def batch():
    return single_in_double(np.random.default_rng(1), BATCH, 3, 16)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def to_unit_norm(sq_norms):
    return jnp.minimum(1.0, 1 / jnp.sqrt(sq_norms))


def placed(mesh, specs, params, batch):
    """In single precision."""
    held = {
        k: jax.device_put(np.float32(x), NamedSharding(mesh, specs[k])) for k, x in params.items()
    }
    return held, jax.device_put(np.float32(batch), NamedSharding(mesh, P("data")))


def reweighted(method, size):
    return reweighted_grad(loss, to_unit_norm, method=method, microbatch_size=size)


@pytest.fixture(scope="module")
def oracle(params, batch):
    """The sum and the norms, by `vmap(grad)`."""

    @quick_jit
    def sum_and_norms(params, batch):
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        squares = sum(jnp.sum(g.reshape(BATCH, -1) ** 2, axis=1) for g in grads.values())
        c = jnp.minimum(1.0, 1 / jnp.sqrt(squares))
        return {k: jnp.tensordot(c, g, 1) for k, g in grads.items()}, jnp.sqrt(squares)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, sum_and_norms(params, batch))


@pytest.fixture
def double():
    """Rounding to single precision would hide what a device adds wrongly to the last digits."""
    with jax.enable_x64(True):
        yield


def assert_near(got, want, tol=1e-12):
    for k, x in got.items():
        np.testing.assert_allclose(
            x, want[k], rtol=min(tol, 1e-7), atol=tol * np.abs(want[k]).max()
        )


@pytest.mark.parametrize("specs", [REPLICATED, FSDP], ids=["replicated", "fsdp"])
@pytest.mark.parametrize(("method", "size"), SCHEDULES)
def test_jit(params, batch, mesh, oracle, specs, method, size):
    held, examples = placed(mesh, specs, params, batch)
    compiled = jax.jit(reweighted(method, size)).lower(held, examples).compile()
    got = compiled(held, examples)
    assert_near(got.grads, oracle[0], tol=4e-6)  # float32, which JAX 0.12 adds in another order
    np.testing.assert_allclose(np.sqrt(got.sq_norms), oracle[1], rtol=1e-5)
    found = collectives(compiled)
    # The sum itself, and parameters that are split: what belongs to examples stays where it is.
    # A boolean for each matrix, whether its terms cancel for some example, goes together.
    number = sum(x.size for x in params.values())
    reduced = sorted(c.bytes for c in found if c.kind != "all-gather" and not c.rare)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    assert reduced in ([4 * number], [2, 4 * number])
    sizes = {4 * x.size for x in params.values()} if specs is FSDP else set()
    assert {c.bytes for c in found if c.kind == "all-gather"} <= sizes


@pytest.mark.parametrize("by", ["global", "leaf"])
def test_statistics_are_those_of_the_whole_batch(params, batch, mesh, by):
    tx = optaxclip.clip_per_example(1.0, by=by)

    def step(params, batch):
        grads = optaxclip.per_example_grad(loss)(params, batch)
        return tx.update(grads, tx.init(params), params)

    updates, state = quick_jit(step)(*placed(mesh, FSDP, params, batch))
    alone, alone_state = quick_jit(step)(jax.tree.map(np.float32, params), np.float32(batch))
    assert_near(updates, jax.tree.map(np.asarray, alone), tol=4e-6)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(alone_state), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
        assert x.sharding.is_fully_replicated


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("method", "size"), [*SCHEDULES[:3], ("one_pass", 1)])
def test_inside_shard_map_each_device_has_its_own_examples(
    params, batch, mesh, oracle, method, size, check_vma
):
    """`jax.grad` there adds up over devices what parameters that are whole get."""

    def step(params, batch):
        return jax.lax.psum(reweighted(method, size)(params, batch).grads, "data")

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    assert_near(quick_jit(step)(params, batch), oracle[0])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("check_vma", [True, False])
def test_padding_in_micro_batches_inside_shard_map(params, batch, mesh, oracle, check_vma):
    """A device of nothing but padding, and others with a micro-batch of it."""
    padding = np.arange(BATCH) % 2 == 1
    grad = optaxclip.clipped_grad(
        loss, l2_clip_norm=1.0, keep_batch_dim=False, microbatch_size=1, return_values=True
    )

    def step(params, batch, padding):
        sums, aux = grad(params, batch, is_padding_example=padding)
        return jax.lax.psum(sums, "data"), aux.values

    spread = quick_jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P("data")),
            check_vma=check_vma,
        )
    )  # fmt: skip
    some, values = spread(params, batch, padding)
    others, _ = spread(params, batch, ~padding)
    assert_near({k: np.add(x, others[k]) for k, x in some.items()}, oracle[0])
    np.testing.assert_array_equal(np.asarray(values) == 0, padding)
    assert not any(map(np.any, jax.tree.leaves(spread(params, batch, padding | True)[0])))


@pytest.mark.usefixtures("double")
def test_clip_per_example_inside_shard_map(params, batch, mesh, oracle):
    tx = optaxclip.clip_per_example(1.0)

    def step(params, batch):
        grads = optaxclip.per_example_grad(loss)(params, batch)
        return jax.lax.pmean(tx.update(grads, tx.init(params), params)[0], "data")

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    got = quick_jit(step)(params, batch)
    assert_near({k: BATCH * np.asarray(x) for k, x in got.items()}, oracle[0])
