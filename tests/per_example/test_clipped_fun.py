"""`clipped_fun` against jax-privacy and NumPy, and what its integer grid guarantees."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax_privacy.clipping import clipped_fun as privacy_clipped_fun
from tools.agreement import close, normal
from tools.exploring import examples
from tools.quick import quick_jit

from optaxclip import clipped_grad
from optaxclip.per_example import clipped_fun

# jax-privacy 2.0 calls a name that optax has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")

B = 6


def statistics(x, shift=0.0):
    """Of one example, with or without its batch axis: a tree, and what stands besides."""
    x = x - shift
    return {"mean": x.mean(), "sorted": jnp.sort(x.reshape(-1, 3), axis=0)}


def with_aux(x, shift=0.0):
    return statistics(x, shift), (x.sum(), x)


OPTIONS = st.fixed_dictionaries(
    {
        "l2_clip_norm": st.sampled_from([0.0, 0.7, 5.0, float("inf")]),
        "rescale_to_unit_norm": st.booleans(),
        "normalize_by": st.sampled_from([1.0, 6.0]),
        "has_aux": st.booleans(),
        "keep_batch_dim": st.booleans(),
        "return_norms": st.booleans(),
        "microbatch_size": st.sampled_from([None, 1, 2, 6]),
        "nan_safe": st.booleans(),
    }
)


@examples(15)
@given(options=OPTIONS, padding=st.none() | st.lists(st.booleans(), min_size=B, max_size=B))
def test_equals_jax_privacy(options, padding):
    fun = with_aux if options["has_aux"] else statistics
    ours, theirs = (make(fun, **options) for make in (clipped_fun, privacy_clipped_fun))
    named = {} if padding is None else {"is_padding_example": np.array(padding)}
    data = 2 * normal(0, B, 3)
    found, expected = quick_jit(lambda *a, **k: (ours(*a, **k), theirs(*a, **k)))(data, **named)
    assert (ours.l2_norm_bound, ours.has_aux) == (theirs.l2_norm_bound, theirs.has_aux)
    assert ours.sensitivity("REPLACE_ONE") == 2 * ours.l2_norm_bound
    if not ours.has_aux:
        return close(found, expected, 1e-9)
    close(found[0], expected[0], 1e-9)
    if not options[
        "has_aux"
    ]:  # 2.0 returns ((), norms), its documentation and later versions norms
        expected = (expected[0], expected[1][1])
    computed = np.ones(B, bool)  # of micro-batches of padding alone nothing is returned
    if padding is not None and options["microbatch_size"]:
        parts = np.reshape(padding, (options["microbatch_size"], -1))
        computed = np.broadcast_to(~parts.all(0), parts.shape).reshape(B)
    kept = [jax.tree.map(lambda x: np.asarray(x, float)[computed], x[1]) for x in (found, expected)]
    return close(*kept, 1e-6)


def test_signature_and_defaults_are_those_of_jax_privacy():
    ours, theirs = (
        {name: x.default for name, x in inspect.signature(f).parameters.items()}
        for f in (clipped_fun, privacy_clipped_fun)
    )
    assert ours.pop("grid_scale") is None
    assert ours == theirs


def test_the_gradient_is_one_such_function():
    """So `clipped_grad` may be held to it, with a tree of bounds too."""

    def loss(params, x, y):
        return jnp.sum((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)

    params = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    batch, bounds = (normal(2, B, 3), normal(3, B, 2)), {"w": 0.5, "b": 2.0}
    options = {"batch_argnums": (1, 2), "keep_batch_dim": False, "l2_clip_norm": bounds}
    ours = clipped_fun(jax.grad(loss), **options)
    whole = clipped_grad(loss, **options)
    found, expected = quick_jit(lambda *a: (ours(*a), whole(*a)))(params, *batch)
    close(found, expected, 1e-10)
    assert ours.l2_norm_bound == whole.l2_norm_bound == np.hypot(0.5, 2.0)


def test_what_has_no_derivative():
    """A loop that ends when it may, a key for each example, a keyword argument for each."""

    def steps(x, key, *, start):
        noise = jax.random.uniform(key)
        halved = jax.lax.while_loop(lambda v: jnp.sum(v) > 1, lambda v: v / 2, jnp.abs(x))
        return jnp.round(halved * 8) + noise * 0 + start

    data, start = normal(0, B, 3), np.arange(6.0)
    options = {"keep_batch_dim": False, "prng_argnum": 1, "l2_clip_norm": 4.0}
    ours, theirs = (make(steps, **options) for make in (clipped_fun, privacy_clipped_fun))
    both = quick_jit(lambda *a, **k: (ours(*a, **k), theirs(*a, **k)))
    found, expected = both(data, jax.random.key(0), start=start)
    close(found, expected, 1e-10)


def test_what_has_effects():
    """A reference that is written to, or a callback to the host; a key besides."""

    def held(x, key):
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = 2 * x
        return ref[...], (key, ref[...] > 0)

    def on_host(x, key):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        value = jax.pure_callback(np.sort, like, 2 * x, vmap_method="sequential")
        return value, (key, x > 0)

    options = {"has_aux": True, "keep_batch_dim": False, "prng_argnum": 1, "l2_clip_norm": np.inf}
    data, key = normal(0, B, 3), jax.random.key(0)
    for fun, expected in ((held, 2 * data), (on_host, np.sort(2 * data, axis=1))):
        found, (keys, positive) = quick_jit(clipped_fun(fun, **options))(data, key)
        close(found, expected.sum(0), 1e-10)
        assert jnp.all(keys == jax.random.split(key, B))
        np.testing.assert_array_equal(positive, data > 0)


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"grid_scale": 100}])
def test_strict_promotion_and_other_flags(options):
    def mixed(x):
        return {"mean": jnp.mean(x), "low": x.astype(jnp.bfloat16)}

    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    wide = jax.enable_x64("grid_scale" in options)
    with wide, strict[0], strict[1], jax.checking_leaks(), jax.debug_nans(True):
        fun = clipped_fun(mixed, return_norms=True, **options)
        summed, norms = jax.jit(fun)(normal(0, B, 3).astype(np.float32))
        assert summed["low"].shape == (1, 3)
        assert norms.dtype == np.float32


def test_the_key_is_split_between_the_examples():
    def noise(x, key):
        return jax.random.normal(key) + 0 * x

    options = {"keep_batch_dim": False, "prng_argnum": 1, "l2_clip_norm": np.inf}
    found, norms = clipped_fun(noise, **options, return_norms=True)(np.zeros(B), jax.random.key(1))
    drawn = jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), B))
    close(found, np.sum(drawn), 1e-10)
    close(norms, np.abs(np.float32(drawn)), 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_with_nan_is_left_out_whole(bad):
    data = normal(0, B, 3)
    data[2, 1] = bad
    summed, norms = clipped_fun(
        lambda x: x, keep_batch_dim=False, l2_clip_norm=1.0, return_norms=True
    )(data)
    good = np.delete(data, 2, axis=0)
    expected = np.sum(good * np.minimum(1, 1 / np.linalg.norm(good, axis=1))[:, None], axis=0)
    close(summed, expected, 1e-9)
    assert np.isfinite(np.delete(norms, 2)).all()
    assert not np.isfinite(norms[2])
    unsafe = clipped_fun(lambda x: x, keep_batch_dim=False, nan_safe=False)(data)
    assert np.isnan(unsafe).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_are_in_float32_and_come_in_the_dtype_of_the_values(dtype):
    data = jnp.ones((3000, 4), dtype)
    options = {"keep_batch_dim": False, "l2_clip_norm": 1.0}
    summed = clipped_fun(lambda x: x, **options)(data)
    assert summed.dtype == dtype
    np.testing.assert_array_equal(summed, jnp.full(4, 1500, dtype))  # bfloat16 would stop at 128
    assert clipped_fun(lambda x: x, **options, dtype=jnp.float32)(data).dtype == jnp.float32


# --- the integer grid ---


def grid_oracle(values, bound, scale):
    """Clipped in units of `bound / scale` to what rounding leaves room for; then rounded."""
    size = np.prod(values.shape[1:])
    units = values.astype(np.float64).reshape(len(values), -1) * (scale / bound)
    most = scale - np.sqrt(size) / 2
    factors = np.minimum(1, most / np.linalg.norm(units, axis=1))
    return np.round(units * factors[:, None]).astype(np.int64).reshape(values.shape)


@pytest.mark.parametrize(
    ("bound", "scale", "size"), [(1.0, 1000, 100), (5.0, 500, 3), (0.3, 60, 50)]
)
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_grid_equals_numpy_and_keeps_its_bound(bound, scale, size, microbatch_size):
    data = np.concatenate([normal(0, 3, size) * bound, normal(1, 3, size) * bound / size])
    each = grid_oracle(data, bound, scale)
    options = {"keep_batch_dim": False, "l2_clip_norm": bound, "grid_scale": scale}
    fun = clipped_fun(lambda x: x, **options, microbatch_size=microbatch_size, return_norms=True)
    summed, norms = quick_jit(fun)(data)
    assert summed.dtype == jnp.int64
    np.testing.assert_array_equal(summed, each.sum(0))
    close(norms, np.float32(np.linalg.norm(data, axis=1)), 1e-6)
    assert fun.l2_norm_bound == fun.sensitivity() == scale
    assert np.linalg.norm(each, axis=1).max() <= scale
    assert np.linalg.norm(each, axis=1).max() > 0.9 * scale  # the bound is used


@examples(10)
@given(
    data=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.5, -0.5, 1e-30, 1e30]),
        min_size=16,
        max_size=16,
    ),
    scale=st.sampled_from([3, 7, 1000]),
)
def test_no_example_moves_the_grid_further_than_it_says(data, scale):
    """Integers are added exactly, so that the norm of one example's sum is that of its share."""
    fun = clipped_fun(lambda x: x, keep_batch_dim=False, l2_clip_norm=0.7, grid_scale=scale)
    one = np.asarray(quick_jit(fun)(np.float32(data)[None]))
    assert np.sum(np.square(one.astype(object))) <= scale**2


def test_equal_elements_are_rounded_up_and_still_keep_the_bound():
    """The worst case: each would be 3.6, and 4 after rounding."""
    for size in (4, 99, 10_000):
        scale = int(3.6 * np.sqrt(size))
        fun = clipped_fun(lambda x: x, keep_batch_dim=False, grid_scale=scale)
        one = np.asarray(fun(np.ones((1, size))))
        assert np.sum(np.square(one)) <= scale**2


def test_gradients_on_the_grid():
    loss = lambda w, x: jnp.mean((x - w) ** 2)
    fun = clipped_fun(jax.grad(loss), batch_argnums=1, l2_clip_norm=1.0, grid_scale=1000)
    data = normal(0, B, 4)
    summed = fun(np.zeros(4, np.float32), data)
    np.testing.assert_array_equal(summed, grid_oracle(np.float32(-data / 2), 1.0, 1000).sum(0))


def test_padding_and_nan_count_as_zero_on_the_grid():
    data = normal(0, B, 3)
    data[1, 2] = np.nan
    fun = clipped_fun(lambda x: x, keep_batch_dim=False, grid_scale=100)
    found = fun(data, is_padding_example=np.arange(B) == 3)
    expected = grid_oracle(np.delete(data, [1, 3], axis=0), 1.0, 100).sum(0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"l2_clip_norm": 0.0}, r"must be one number > 0 and finite, got 0\.0"),
        ({"l2_clip_norm": np.inf}, "must be one number > 0 and finite, got inf"),
        ({"l2_clip_norm": {"a": 1.0}}, "must be one number > 0 and finite"),
        ({"rescale_to_unit_norm": True}, "got rescale_to_unit_norm too"),
        ({"normalize_by": 6.0}, "got normalize_by too"),
        ({"dtype": jnp.float32}, "got dtype too"),
        ({"nan_safe": False}, "got nan_safe too"),
        ({"grid_scale": 0}, "grid_scale"),
    ],
)
def test_grid_refuses_when_it_is_made(options, said):
    with pytest.raises(ValueError, match=said):
        clipped_fun(lambda x: x, **{"grid_scale": 1000, **options})


def test_grid_needs_64_bits_and_room():
    with jax.enable_x64(False), pytest.raises(ValueError, match="64 bits"):
        clipped_fun(lambda x: x, grid_scale=10)
    fun = clipped_fun(lambda x: x, keep_batch_dim=False, grid_scale=50)
    with pytest.raises(ValueError, match=r"50\.0 of 10000, got 50"):
        fun(np.ones((2, 10_000)))
    with jax.enable_x64(False), pytest.raises(ValueError, match="64 bits"):
        fun(np.ones((2, 3), np.float32))


# --- errors ---


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"batch_argnums": ()}, ValueError, "batch_argnums must name an argument"),
        ({"batch_argnums": -1}, ValueError, "batch_argnums must be >= 0, got -1"),
        ({"prng_argnum": 0}, ValueError, "must not overlap, got 0 in batch_argnums and in prng"),
        ({"l2_clip_norm": -1.0}, ValueError, "l2_clip_norm must be >= 0"),
        ({"normalize_by": 0.0}, ValueError, "normalize_by must be > 0"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size"),
    ],
)
def test_errors_when_it_is_made(options, error, said):
    with pytest.raises(error, match=said):
        clipped_fun(statistics, **options)


@pytest.mark.parametrize(
    ("fun", "options", "args", "error", "said"),
    [
        (lambda x: x.astype(int), {}, (np.ones(3),), TypeError, "values, got int64 at the root"),
        (lambda x: {"a": x * 1j}, {}, (np.ones(3),), TypeError, "got complex128 at a"),
        (lambda x: (), {}, (np.ones(3),), ValueError, "at least one array, got none"),
        (lambda x: x, {"has_aux": True}, (np.ones(3),), TypeError, r"\(value, aux\), got \w+"),
        (lambda x: x, {"microbatch_size": 2}, (np.ones(3),), ValueError, "must divide the number"),
        (lambda x, y: x, {"batch_argnums": (0, 1)}, (np.ones(3), np.ones(2)), ValueError, "sizes"),
        (lambda x: x, {"batch_argnums": 1}, (np.ones(3),), ValueError, "got 1 with 1 of them"),
        (lambda x: x, {"l2_clip_norm": {"a": 1.0}}, (np.ones(3),), ValueError, "l2_clip_norm"),
    ],
)
def test_errors_of_a_call(fun, options, args, error, said):
    with pytest.raises(error, match=said):
        clipped_fun(fun, **options)(*args)


def test_an_error_of_the_function_says_what_it_saw():
    def fun(x):
        raise RuntimeError("oh")

    with pytest.raises(RuntimeError, match="oh") as caught:
        clipped_fun(fun)(np.ones((3, 4)))
    assert "float64[1, 4] at x" in "".join(caught.value.__notes__)


def test_inside_scan_and_vmap():
    data = normal(0, 2, B, 3)
    fun = clipped_fun(statistics, l2_clip_norm=0.7)
    _, scanned = jax.lax.scan(lambda c, x: (c, fun(x)), 0, data)
    close(scanned, jax.vmap(fun)(data), 1e-10)
    close(jax.tree.map(lambda x: x[0], scanned), fun(data[0]), 1e-10)
    assert np.all(optax.tree.norm(fun(data[0])) <= B * 0.7)
