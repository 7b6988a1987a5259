"""`clipped_grad` against jax-privacy over models and options, and what it guarantees besides."""

import itertools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax_privacy.clipping import clipped_grad as privacy_clipped_grad
from tools.agreement import close, normal, stacked_grads
from tools.exploring import examples
from tools.quick import quick_jit

import optaxclip
from optaxclip import clipped_grad, clipped_value_and_grad
from optaxclip.per_example import AuxiliaryOutput

# jax-privacy 2.0 calls a name that optax has renamed since.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")

B = 6
METHODS = ("auto", "one_pass", "two_pass", "vmap")


def loss(params, batch, shift=0.0):
    """Layers with a bias each, the first weights used twice; sees a batch, or one example."""
    h = batch["x"]
    for layer in params["layers"]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    out = h @ params["layers"][-1]["w"].T * params["scale"]
    return jnp.mean((out.sum(-1) - batch["y"] - shift) ** 2)


def loss_and_aux(params, batch, shift=0.0):
    return loss(params, batch, shift), {"mean": jnp.mean(batch["x"], axis=-1), "y": batch["y"]}


def model(widths, seed=0):
    pairs = itertools.pairwise(widths)
    layers = [
        {"w": normal(seed + i, a, b), "b": normal(seed + 10 * i, b)}
        for i, (a, b) in enumerate(pairs, 1)
    ]
    return {"layers": layers, "scale": np.asarray(3.0)}


def data(width, seed=0):
    return {"x": normal(seed, B, width), "y": normal(seed + 1, B)}


@pytest.fixture
def params():
    return model((4, 3))


@pytest.fixture
def batch():
    return data(4)


OPTIONS = st.fixed_dictionaries(
    {
        "l2_clip_norm": st.sampled_from([0.0, 0.7, 5.0, float("inf")]),
        "rescale_to_unit_norm": st.booleans(),
        "normalize_by": st.sampled_from([1.0, 6.0]),
        "has_aux": st.booleans(),
        "keep_batch_dim": st.booleans(),
        "return_values": st.booleans(),
        "return_grad_norms": st.booleans(),
        "microbatch_size": st.sampled_from([None, 1, 2, 3, 6]),
        "nan_safe": st.booleans(),
        "dtype": st.sampled_from([None, jnp.float32]),
    }
)


@examples(15)
@given(
    options=OPTIONS,
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    padding=st.none() | st.lists(st.booleans(), min_size=B, max_size=B),
    method=st.sampled_from(METHODS),
)
def test_equals_jax_privacy(options, widths, padding, method):
    fun = loss_and_aux if options["has_aux"] else loss
    params, batch = model(widths), data(widths[0])
    named = {} if padding is None else {"is_padding_example": np.array(padding)}
    ours = clipped_grad(fun, **options, method=method)
    theirs = privacy_clipped_grad(fun, **options)
    found, expected = quick_jit(lambda *a, **k: (ours(*a, **k), theirs(*a, **k)))(
        params, batch, **named
    )
    assert (ours.l2_norm_bound, ours.has_aux) == (theirs.l2_norm_bound, theirs.has_aux)
    tol = 1e-5 if options["dtype"] else 1e-9  # theirs adds in float32 then
    if not ours.has_aux:
        return close(found, expected, tol)
    close(found[0], expected[0], tol)
    assert isinstance(found[1], AuxiliaryOutput)
    assert found[1]._fields == expected[1]._fields
    computed = np.ones(B, bool)  # of micro-batches of padding alone nothing is returned
    if padding is not None and options["microbatch_size"]:
        parts = np.reshape(padding, (options["microbatch_size"], -1))
        computed = np.broadcast_to(~parts.all(0), parts.shape).reshape(B)
    for name, x, y in zip(found[1]._fields, *(aux[1] for aux in (found, expected)), strict=True):
        x, y = (jax.tree.map(lambda a: np.asarray(a, float)[computed], tree) for tree in (x, y))
        close(x, y, 1e-6 if name == "grad_norms" else 1e-9)
    return None


def test_several_arguments_keys_and_keyword_arguments_equal_jax_privacy():
    def fun(w, x, scale, key, b, shift):
        assert x.shape == (1, 4)
        assert shift.shape == ()
        drawn = jax.random.normal(key, (4,))
        return jnp.sum((x * drawn @ w["w"] + b) ** 2) * scale + shift * b.sum(), x[:, :1]

    args = ({"w": normal(0, 4, 2)}, normal(1, B, 4), 0.5, jax.random.key(0), normal(2, 2))
    shift = normal(3, B)
    options = {
        "argnums": (0, 4), "batch_argnums": 1, "prng_argnum": 3, "has_aux": True,
        "l2_clip_norm": 2.0, "return_grad_norms": True, "microbatch_size": 2,
    }  # fmt: skip
    ours, theirs = (make(fun, **options) for make in (clipped_grad, privacy_clipped_grad))
    found, expected = quick_jit(lambda *a: (ours(*a, shift=shift), theirs(*a, shift=shift)))(*args)
    close(found[0], expected[0], 1e-10)
    norms = np.asarray(expected[1].grad_norms, np.float32)
    close(tuple(found[1])[1:], (norms, expected[1].aux), 1e-6)
    assert np.ptp(found[1].grad_norms) > 0


def test_users_are_clipped_as_a_whole(params):
    users = {"x": normal(0, B, 5, 4), "y": normal(1, B, 5)}
    options = {"l2_clip_norm": 3.0, "keep_batch_dim": False, "return_grad_norms": True}
    ours, theirs = (make(loss, **options) for make in (clipped_grad, privacy_clipped_grad))
    (found, _), (expected, same) = quick_jit(lambda *a: (ours(*a), theirs(*a)))(params, users)
    close(found, expected, 1e-10)
    assert np.max(same.grad_norms) > 3.0


def test_a_transform_equals_jax_privacy_and_may_change_the_tree(params, batch):
    def transform(grad):
        return {"first": grad["layers"][0]["w"] * 0.1, "scale": jnp.tanh(grad["scale"])}

    options = {"pre_clipping_transform": transform, "l2_clip_norm": 0.5, "return_grad_norms": True}
    makes = (clipped_grad, privacy_clipped_grad)
    for size in (None, 2):
        ours, theirs = (make(loss, microbatch_size=size, **options) for make in makes)
        found, expected = quick_jit(lambda *a, f=ours, g=theirs: (f(*a), g(*a)))(params, batch)
        close(found[0], expected[0], 1e-10)
        np.testing.assert_allclose(found[1].grad_norms, expected[1].grad_norms, rtol=1e-6)


SUBTREES = {"layers": 2.0, "scale": 0.1}
UNITS = (False, True)


def by_subtrees(method, unit):
    return clipped_grad(loss, l2_clip_norm=SUBTREES, rescale_to_unit_norm=unit, method=method)


@pytest.fixture(scope="module")
def sums_by_subtrees():
    """Of every method and unit, and the stacked gradients, from one program."""

    def compute(params, batch):
        found = {(m, u): by_subtrees(m, u)(params, batch) for m in METHODS for u in UNITS}
        return found, stacked_grads(loss, params, batch)

    return quick_jit(compute)(model((4, 3)), data(4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", UNITS)
def test_a_prefix_tree_bounds_each_subtree(method, unit, sums_by_subtrees):
    found, grads = sums_by_subtrees
    expected = {}
    for name, c in SUBTREES.items():
        leaves = map(np.asarray, jax.tree.leaves(grads[name]))
        norms = np.sqrt(sum(np.sum(np.reshape(g, (B, -1)) ** 2, 1) for g in leaves))
        factor = np.minimum(1, c / norms) / (c if unit else 1)
        assert np.any(norms > c), "the test would pass without clipping"
        expected[name] = jax.tree.map(lambda g, f=factor: np.tensordot(f, g, 1), grads[name])
    close(found[method, unit], expected, 1e-10)
    bound = by_subtrees(method, unit).l2_norm_bound
    assert bound == pytest.approx(np.sqrt(2) if unit else np.hypot(2.0, 0.1))


BAD = {"nan": np.nan, "infinite": np.inf, "too long for float32": 1e30}


@pytest.fixture(scope="module", params=METHODS)
def sums_with_bad_examples(request):
    """Without the third example; with it bad, in each of the ways; with all examples bad."""
    params, batch = jax.tree.map(np.float32, (model((4, 3)), data(4)))
    fun = clipped_grad(loss, l2_clip_norm=1.0, method=request.param, return_grad_norms=True)
    one, everyone = np.arange(B) == 2, np.full(B, True)
    factors = np.array([np.where(m, x, 1) for m in (one, everyone) for x in BAD.values()])
    targets = np.float32(batch["y"] * factors)

    def compute(params, batch, targets):
        clean, _ = fun(params, batch, is_padding_example=one)
        # A loop, so that each sum is one of its own.
        return clean, jax.lax.map(lambda y: fun(params, {**batch, "y": y}), targets)

    clean, (sums, aux) = quick_jit(compute)(params, batch, targets)
    return clean, sums, np.asarray(aux.grad_norms)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_example_counts_as_zero(kind, sums_with_bad_examples):
    clean, sums, norms = sums_with_bad_examples
    i = list(BAD).index(kind)
    close(jax.tree.map(lambda x: np.asarray(x)[i], sums), clean, 1e-6)
    assert not np.isfinite(norms[i, 2])
    assert np.isfinite(np.delete(norms[i], 2)).all()
    nothing = [np.asarray(x)[i + len(BAD)] for x in jax.tree.leaves(sums)]
    assert not any(map(np.any, nothing))


def test_without_nan_safe_a_bad_example_shows():
    """Outside jit, where all else here is inside."""
    x = normal(0, B, 4)
    fun = clipped_grad(lambda w, x: jnp.sum((x @ w) ** 2), l2_clip_norm=1.0, nan_safe=False)
    assert np.isfinite(fun(normal(1, 4), x)).all()
    x[2] = np.nan
    assert np.isnan(fun(normal(1, 4), x)).all()


def test_no_example_moves_the_sum_further_than_the_sensitivity(params, batch):
    """Removing and replacing examples, each as bad as it gets."""
    fun = clipped_grad(loss, l2_clip_norm=0.8, normalize_by=2.0)

    @quick_jit
    def distances(params, batch, *others):
        total = fun(params, batch)
        others = [fun(params, other) for other in others]
        return [optax.tree.norm(jax.tree.map(jnp.subtract, total, other)) for other in others]

    rest = jax.tree.map(lambda x: x[1:], batch)
    opposed = jax.tree.map(lambda x: np.concatenate([-5.0 * x[:1], x[1:]]), batch)
    one_less, replaced = map(float, distances(params, batch, rest, opposed))
    relations = dp_accounting.NeighboringRelation
    assert 0.399 < one_less <= fun.sensitivity(relations.ADD_OR_REMOVE_ONE) + 1e-12
    assert fun.sensitivity(relations.ADD_OR_REMOVE_ONE) == fun.sensitivity() == 0.4
    assert 0.4 < replaced <= fun.sensitivity(relations.REPLACE_ONE) + 1e-12
    assert fun.sensitivity(relations.REPLACE_ONE) == 0.8
    with pytest.raises(ValueError, match="unknown neighboring_relation, got 'SWAP'"):
        fun.sensitivity("SWAP")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_added_in_float32_in_any_micro_batch(dtype):
    """64 ones and 64 of 2^-8: in bfloat16 itself the small ones would be lost."""
    x = np.concatenate([np.ones((64, 1)), np.full((64, 1), 2.0**-8)]).astype(dtype)
    fun = lambda w, x: jnp.sum(w * x)
    cases = list(itertools.product((None, 1, 32), (jnp.float32, None)))

    @quick_jit
    def sums(w, x):
        makes = [
            clipped_grad(fun, l2_clip_norm=10.0, microbatch_size=size, dtype=asked)
            for size, asked in cases
        ]
        return [make(w, x) for make in makes]

    for (size, asked), found in zip(cases, sums(np.ones(1, dtype), x), strict=True):
        expected = np.array([64.25]).astype(asked or dtype)
        np.testing.assert_array_equal(found, expected, err_msg=f"{size} {asked}", strict=True)


def test_micro_batches_bound_the_memory():
    """The largest array of the jaxpr is that of a micro-batch."""
    fun = lambda w, x: jnp.sum(jnp.sin(x @ w))
    w, x = np.ones((20, 30)), np.ones((64, 2, 20))

    def largest(size):
        grad = clipped_grad(fun, l2_clip_norm=1.0, microbatch_size=size, method="vmap")
        return jax.jit(grad).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert largest(8) < largest(None) / 4


def test_gradients_stay_factored():
    fun = lambda w, x: jnp.sum(jnp.sin(x @ w))
    jaxpr = jax.make_jaxpr(clipped_grad(fun, l2_clip_norm=1.0))(
        np.ones((30, 40)), np.ones((8, 2, 30))
    )
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < 8 * 30 * 40


@pytest.mark.parametrize("method", METHODS)
def test_spmd_axis_name_reaches_sharding_constraints(method):
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())

    def fun(w, x):
        return jnp.sum(jax.lax.with_sharding_constraint(x @ w, whole) ** 2)

    def lowered(name):
        grad = clipped_grad(
            fun, l2_clip_norm=1.0, keep_batch_dim=False, spmd_axis_name=name, method=method
        )
        traced = jax.jit(grad).trace(np.ones((3, 2)), np.ones((8, 3)))
        return traced.lower(lowering_platforms=("cpu",)).as_text()

    assert '@mesh, [{"data"}, {}]' in lowered("data")
    assert '@mesh, [{"data"}, {}]' not in lowered(None)


def test_value_and_grad_are_in_the_order_of_jax(params, batch):
    options = {"l2_clip_norm": 1.0, "microbatch_size": 3}
    alone = clipped_grad(loss_and_aux, has_aux=True, return_values=True, **options)
    both = clipped_value_and_grad(loss_and_aux, has_aux=True, **options)
    plain = clipped_value_and_grad(loss, **options)
    (grads, aux), with_aux, without = quick_jit(lambda *a: (alone(*a), both(*a), plain(*a)))(
        params, batch
    )
    close(with_aux, ((aux.values, aux.aux), grads), 1e-12)
    close(without, (aux.values, grads), 1e-12)
    assert plain.sensitivity("REPLACE_ONE") == 2.0


def test_equals_clip_per_example(params, batch):
    tx = optaxclip.clip_per_example(0.8, mean=3.0)
    fun = clipped_grad(loss, l2_clip_norm=0.8, normalize_by=3.0, keep_batch_dim=False)

    @quick_jit
    def both(params, batch):
        grads = optaxclip.per_example_grad(loss)(params, batch)
        return fun(params, batch), tx.update(grads, tx.init(params), params)[0]

    close(*both(params, batch), 1e-12)


def test_the_norm_may_be_traced_and_negative(params, batch):
    static = clipped_grad(loss, l2_clip_norm=0.8)

    @quick_jit
    def both(c, params, batch):
        return clipped_grad(loss, l2_clip_norm=c)(params, batch), static(params, batch)

    close(*both(0.8, params, batch), 1e-6)
    assert not any(map(np.any, jax.tree.leaves(both(-1.0, params, batch)[0])))
    for bound in (jnp.asarray(-1.0), {"layers": jnp.asarray(-1.0), "scale": 0}):
        negative = clipped_grad(loss, l2_clip_norm=bound)
        assert negative.sensitivity("REPLACE_ONE") == negative.l2_norm_bound == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2_clip_norm": -1.0}, "l2_clip_norm must be >= 0, got -1.0"),
        ({"l2_clip_norm": np.asarray(-1.0)}, "l2_clip_norm must be >= 0, got -1.0"),
        ({"l2_clip_norm": {"scale": -2.0}}, r"l2_clip_norm\['scale'\] must be >= 0, got -2.0"),
        ({"normalize_by": 0.0}, "normalize_by must be > 0, got 0.0"),
        ({"microbatch_size": 0}, "microbatch_size must be >= 1, got 0"),
        ({"batch_argnums": ()}, r"batch_argnums must name an argument, got \(\)"),
        ({"batch_argnums": 0}, "must not overlap, got 0 in argnums and in batch_argnums"),
        ({"batch_argnums": -1}, "batch_argnums must be >= 0, got -1"),
        ({"method": "fast"}, "unknown method, got 'fast'"),
        (
            {"method": "one_pass", "pre_clipping_transform": abs},
            "method must be 'vmap' with a pre_clipping_transform, got 'one_pass'",
        ),
    ],
)
def test_options_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(loss, **{"l2_clip_norm": 1.0, **arguments})


@pytest.mark.parametrize("size", [True, 2.0, "auto", np.asarray(2)])
def test_a_micro_batch_size_is_a_whole_number(size):
    size = jnp.asarray(size) if isinstance(size, np.ndarray) else size
    with pytest.raises(TypeError, match=r"microbatch_size must be (a whole number|static), got"):
        clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=size)


def test_a_micro_batch_size_may_be_numpys(params, batch):
    sizes = (2, np.int64(2))
    one, two = (clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=s) for s in sizes)
    close(*quick_jit(lambda *a: (one(*a), two(*a)))(params, batch), 1e-12)


def test_options_of_other_versions_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'integer_grid'"):
        clipped_grad(loss, l2_clip_norm=1.0, integer_grid=True)


@pytest.mark.parametrize(
    ("options", "named", "message"),
    [
        (
            {"microbatch_size": 4},
            {},
            "must divide the number of examples, got 4 for 6. Pass a divisor of 6",
        ),
        ({}, {"is_padding_example": np.zeros(5, bool)}, r"got shape \(5,\) for 6 examples"),
        (
            {},
            {"shift": 1.0},
            r"scalar at shift. Bind it first: functools.partial\(fun, shift=...\)",
        ),
        (
            {},
            {"shift": np.ones(4)},
            r"sizes must agree, got \(4,\) at shift and \(6, 4\) at batch",
        ),
        ({"l2_clip_norm": {"layers": 1.0}}, {}, "l2_clip_norm must be a tree prefix"),
    ],
)
def test_calls_are_checked(options, named, message, params, batch):
    with pytest.raises(ValueError, match=message):
        clipped_grad(loss, **{"l2_clip_norm": 1.0, **options})(params, batch, **named)
