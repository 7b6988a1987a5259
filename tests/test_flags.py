"""Every clipper, guard and aggregator under the flags of JAX that make it strict or suspicious."""

import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools.clippers import CLIPPERS, example_tree, make
from tools.quick import quick_jit

import optaxclip
from optaxclip import per_example

AGGREGATORS = {
    "examples": lambda: optaxclip.clip_per_example(1.0),
    "examples-leaf": lambda: optaxclip.clip_per_example(1.0, by="leaf"),
    "examples-quantile": lambda: optaxclip.clip_per_example(per_example.example_quantile(0.5)),
    "trimmed": lambda: per_example.trim_by_norm(0.1),
    "centered": lambda: per_example.centered_clip(1.0),
    "geometric": lambda: per_example.geometric_median(),
    "median": lambda: per_example.coordinate_median(),
    "trimmed-coordinates": lambda: per_example.coordinate_trimmed_mean(0.1),
}
OTHERS = {
    "watch": lambda: optaxclip.watch_norms(depth=2),
    "guard-of-all": lambda: optaxclip.skip_outliers(
        optax.trace(0.9), of=("gradient", "update", "loss")
    ),
    "guard-published": lambda: optaxclip.skip_outliers(
        optax.identity(), optaxclip.thresholds.as_published("levanter"), of=("loss", "gradient")
    ),
    "passed": lambda: optaxclip.clip_by_global_norm(optaxclip.thresholds.Passed("loss")),
}
MAKE = {**{name: lambda name=name: make(name) for name in CLIPPERS}, **AGGREGATORS, **OTHERS}
every = pytest.mark.parametrize("name", MAKE)
STEPS = 3


def steps_of(name, dtype=np.float32):
    """Gradients of some steps, of examples for an aggregator; no NaN, no infinity."""
    trees = [example_tree(dtype, seed=10 + i) for i in range(STEPS * 4)]
    stack = lambda xs: np.stack([np.asarray(x) for x in xs])
    rows = jax.tree.map(lambda *xs: stack(xs), *trees)
    if name in AGGREGATORS:
        return jax.tree.map(lambda x: x.reshape(STEPS, 4, *x.shape[1:]), rows)
    return jax.tree.map(lambda x: x[:STEPS], rows)


def tx_takes_more(tx):
    return isinstance(tx, optax.GradientTransformationExtraArgs)


def train(tx, params, grads):
    """Init and some steps in a scan, which holds states to their types."""
    extra = {"loss": jnp.float32(0.5)} if tx_takes_more(tx) else {}

    def step(state, g):
        updates, state = tx.update(g, state, params, **extra)
        return state, updates

    return jax.lax.scan(step, tx.init(params), grads)


def arrays(dtype=np.float32):
    return jax.tree.map(np.asarray, example_tree(dtype, seed=1))


@every
def test_nothing_is_promoted_and_nothing_leaks(name):
    """All of it happens when a program is traced. With 64 bits, as NumPy's numbers have them."""

    def mixed(tree):
        leaves, structure = jax.tree.flatten(tree)
        dtypes = itertools.cycle([jnp.bfloat16, np.float32, np.float64])
        found = [x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=False)]
        return jax.tree.unflatten(structure, found)

    params, grads = mixed(arrays()), mixed(steps_of(name))
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(True), strict[0], strict[1], jax.checking_leaks():
        _, updates = jax.eval_shape(lambda p, g: train(MAKE[name](), p, g), params, grads)
    types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert types(updates) == types(grads)


@every
def test_no_nan_and_no_infinity(name):
    """In no result of a compiled program, nor of an operation outside: `init` and one step."""
    grads, params = steps_of(name), jax.tree.map(jnp.asarray, arrays())
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), grads)
    tx = MAKE[name]()
    with jax.debug_nans(True), jax.debug_infs(True):
        extra = {"loss": jnp.float32(0.5)} if tx_takes_more(tx) else {}
        jax.block_until_ready(tx.update(first, tx.init(params), params, **extra))
        quick_jit(lambda p, g: train(tx, p, g))(params, grads)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_numpy_widen_no_state(name, dtype):
    """With 64 bits enabled; what statistics are in is float32 and int32 all the same."""
    with jax.enable_x64(True):
        shapes = lambda tx: jax.eval_shape(
            lambda p, g: train(tx, p, g)[0], arrays(dtype), steps_of(name, dtype)
        )
        types = jax.tree.map(lambda x: (x.shape, str(x.dtype)), shapes(MAKE[name]()))
        if name in CLIPPERS:
            found = shapes(with_numpy_numbers(name))
            assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), found) == types
    with jax.enable_x64(False):
        narrow = jax.eval_shape(MAKE[name]().init, arrays())
    assert types == jax.tree.map(lambda x: (x.shape, str(x.dtype)), narrow) or dtype == np.float64


def with_numpy_numbers(name):
    """The clipper with every number among its arguments, also the defaults, one of NumPy's."""
    factory, bound, rest = CLIPPERS[name]
    _, *others = inspect.signature(factory).parameters.items()
    defaults = {k: p.default for k, p in others}
    given = {k: v for k, v in {**defaults, **rest}.items() if type(v) in (int, float)}
    numbers = {k: np.float64(v) if isinstance(v, float) else np.int64(v) for k, v in given.items()}
    bound = jax.tree.map(lambda x: np.float64(x) if isinstance(x, float) else x, bound)
    return factory(bound, **{**rest, **numbers})


# --- types of 8 bits and fewer, of which some have no infinity, and one no sign ---

TINY_TYPES = [
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
# The bound is their one positional number, and it may be anything.
BOUNDED = [
    "value", "value-zero", "value-no-stats", "global", "leaf", "leaf-rms", "unit", "agc",
    "group-one-bound", "soft-elements", "singular", "feedback", "drop", "skip-outliers",
]  # fmt: skip


@pytest.mark.parametrize("dtype", TINY_TYPES)
def test_a_bound_beyond_the_range_of_a_type_never_clips(dtype):
    params = jax.tree.map(lambda x: jnp.abs(x).astype(dtype), example_tree())

    def run(params):
        found = {}
        for name in BOUNDED:
            factory, _, rest = CLIPPERS[name]
            tx = factory(1e6, **rest)
            found[name] = tx.update(params, tx.init(params), params)[0]
        for name, tx in {"spam": optaxclip.spam_clip(), "soft": optaxclip.soft_clip(1e30)}.items():
            found[name] = tx.update(params, tx.init(params), params)[0]
        return found

    for name, updates in quick_jit(run)(params).items():
        for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert x.dtype == dtype
            np.testing.assert_array_equal(np.float32(x), np.float32(y), err_msg=name)


@pytest.mark.parametrize("dtype", TINY_TYPES)
def test_what_grows_beyond_the_range_of_a_type_is_its_largest(dtype):
    params = {"w": jnp.ones(1, dtype)}
    tx = optaxclip.normalize(3e38)
    updates, _ = quick_jit(lambda p: tx.update(p, tx.init(p)))(params)
    np.testing.assert_array_equal(np.float32(updates["w"]), np.float32(jnp.finfo(dtype).max))


def test_statistics_of_fp8_layers_are_left_out_by_name():
    """Flax overwrites them with what comes in as their gradient, which is no gradient."""
    layer = nn.Dense(4, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    x = np.ones((2, 3), np.float32)
    left_out = lambda path, leaf: "_overwrite_with_gradient" in path.split("/")
    tx = optaxclip.clip_by(optaxclip.Norm(exclude=left_out), 0.5)

    def run(key):
        variables = layer.init(key, x)
        grads = jax.grad(lambda v: jnp.sum(layer.apply(v, x) ** 2), allow_int=True)(variables)
        updates, state = tx.update(grads, tx.init(variables), variables)
        return grads, updates, optaxclip.clip_stats(state)["clip_by_global"].pre_clip_norm

    grads, updates, norm = quick_jit(run)(jax.random.key(0))
    alone = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads["params"])])
    statistics = grads["_overwrite_with_gradient"]
    assert np.float64(norm) == pytest.approx(np.linalg.norm(alone), rel=1e-6)
    assert len(jax.tree.leaves(statistics)) > 3
    for x, y in zip(
        jax.tree.leaves(updates["_overwrite_with_gradient"]),
        jax.tree.leaves(statistics),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    clipped = np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates["params"])])
    assert np.linalg.norm(clipped) == pytest.approx(0.5, rel=1e-6)


# --- the engine: each kind of use, in several dtypes at once ---

HALF, SINGLE, DOUBLE = jnp.bfloat16, jnp.float32, jnp.float64


def uses(params, x, ids):
    """A product, a bias, a lookup, a convolution, a scan and a scale; promotes nothing itself."""
    narrow = params["first"].dtype
    h = jnp.tanh(x.astype(narrow) @ params["first"] + params["bias"][None, :])
    h = h + params["table"][ids].astype(narrow)

    def turn(carry, row):
        return jnp.tanh(carry @ params["again"] + row), None

    last, _ = jax.lax.scan(turn, jnp.zeros_like(h[0]), h)
    wide = params["kernel"].dtype
    image = h.astype(wide)[None, :, :]
    patches = jax.lax.conv_general_dilated(
        image, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return (jnp.sum(patches) * params["scale"]).astype(last.dtype) + jnp.sum(last)


def of_dtypes(narrow, wide):
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.normal(size=shape) / 2
    of_narrow = {"first": normal(5, 4), "bias": normal(4), "again": normal(4, 4)}
    of_wide = {"table": normal(7, 4), "kernel": normal(3, 4, 2), "scale": normal()}
    params = {k: np.asarray(v, narrow) for k, v in of_narrow.items()}
    params |= {k: np.asarray(v, wide) for k, v in of_wide.items()}
    return params, np.asarray(normal(8, 6, 5), wide), rng.integers(0, 7, (8, 6)).astype(np.int32)


BOUNDS = {"whole": lambda params: 1.0, "leaf": lambda params: dict.fromkeys(params, 1.0)}


def clipped(method, bound):
    def call(params, args):
        return per_example.clipped_grad(
            uses, batch_argnums=(1, 2), l2_clip_norm=BOUNDS[bound](params), method=method,
            keep_batch_dim=False, microbatch_size=4,
        )(params, *args)  # fmt: skip

    return call


def reweighted(params, args):
    weights = lambda squares: 1 / (1 + squares)
    fun = per_example.reweighted_grad(uses, weights, batch_argnums=(1, 2), by="leaf")
    return fun(params, *args)


def summed(params, args):
    grads = optaxclip.per_example_grad(uses, batch_argnums=(1, 2))(params, *args)
    return per_example.norms(grads), per_example.weighted_sum(grads, jnp.ones(8))


CALLS = {
    "one pass": clipped("one_pass", "whole"), "one pass, leaf": clipped("one_pass", "leaf"),
    "two passes": clipped("two_pass", "whole"), "reweighted": reweighted, "gradients": summed,
}  # fmt: skip
DTYPES = {"16, 32": (HALF, SINGLE), "32, 64": (SINGLE, DOUBLE), "64, 16": (DOUBLE, HALF)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_engine_promotes_nothing_that_the_loss_does_not(call, dtypes):
    with jax.enable_x64(DOUBLE in DTYPES[dtypes]):
        params, *args = of_dtypes(*DTYPES[dtypes])
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            found = jax.eval_shape(lambda p, *args: CALLS[call](p, args), params, *args)
    if "pass" in call:
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(found) == types(params)


@pytest.mark.parametrize("call", CALLS)
def test_the_engine_leaks_no_tracer(call):
    params, *args = of_dtypes(HALF, SINGLE)
    with jax.checking_leaks():
        jax.eval_shape(lambda p, *args: CALLS[call](p, args), params, *args)
