"""What holds for every clipper, whatever it computes.

Each clipper costs three programs: all that is `tried` on it, a step in mixed precision, and one
with a traced bound. What needs no numbers is only traced.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import quick
from tools.clippers import (
    CLIPPERS,
    ONE_EACH,
    UNBOUNDED_AT_FIRST,
    example_tree,
    is_adaptive,
    make,
    mixed_tree,
    static_arguments,
    with_odd_leaves,
)
from tools.oracles import assert_close, assert_same_bits
from tools.quick import quick_jit
from tools.steps import through

import optaxclip

every = pytest.mark.parametrize("name", CLIPPERS)
STEPS = 3


@pytest.fixture(scope="module")
def params():
    return arrays(example_tree(seed=1))


@pytest.fixture(scope="module")
def tried(params):
    """By name, the results of everything that is tried on a clipper, in one program."""

    @functools.cache
    def of(name):
        def run(grads, params):
            tx = make(name)
            return {**in_scan_and_vmap(tx, grads, params), **elsewhere(tx, first(grads), params)}

        return quick.run(run, gradients(), params)

    return of


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


def gradients():
    """Rows of gradients: those of `STEPS` steps, one with zeros in the body, and zeros."""
    trees = [arrays(example_tree(seed=10 + i)) for i in range(STEPS)]
    zeros = jax.tree.map(np.zeros_like, trees[0])
    return stack([*trees, {**trees[0], "body": zeros["body"]}, zeros])


def stack(trees):
    return jax.tree.map(lambda *xs: np.stack(xs), *trees)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def first(tree):
    return row(tree, 0)


def types(tree):
    """Structure, shapes, dtypes and weak types: what decides whether jit compiles again."""
    return jax.tree.structure(tree), [jax.typeof(x) for x in jax.tree.leaves(tree)]


def assert_types_stay(tx, grads):
    """What comes out of a step is of the types that went in. Returns nothing computed."""
    state = jax.eval_shape(tx.init, grads)
    updates, new_state = jax.eval_shape(tx.update, grads, state, grads)
    assert types(updates) == types(grads)
    assert types(new_state) == types(state)


# --- types ---


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "mixed"])
def test_update_keeps_structure_shapes_and_dtypes(name, dtype):
    with jax.enable_x64(dtype in ("float64", "mixed")):
        grads = mixed_tree() if dtype == "mixed" else example_tree(dtype)
        assert_types_stay(make(name), with_odd_leaves(grads))


@every
def test_strict_dtype_promotion(name):
    with jax.numpy_dtype_promotion("strict"):
        assert_types_stay(make(name), with_odd_leaves(mixed_tree()))


@every
def test_a_fresh_state_can_be_donated_and_is_of_the_types_of_later_ones(name, params):
    """One made outside jit: no buffer is in it twice, and no second compilation follows."""
    state = make(name).init(params)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)
    assert types(state) == types(jax.eval_shape(make(name).init, params))


@every
def test_multi_steps_keeps_types(name):
    grads = with_odd_leaves(mixed_tree())
    # MultiSteps itself fails on these.
    del grads["body"]["ids"], grads["body"]["flag"]
    grads["head"]["bias"] = np.asarray(grads["head"]["bias"]).real
    assert_types_stay(optax.MultiSteps(make(name), 2), grads)


@every
def test_inject_hyperparams_in_bfloat16_keeps_dtypes(name):
    assert_types_stay(injected(name), example_tree(jnp.bfloat16))


@every
def test_every_leaf_of_any_dtype_is_bounded_and_others_are_untouched(name):
    def pick(tree):
        return tree["head"], tree["body"]["kernel"], tree["body"]["bias"]

    def largest(tree):
        return [float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(pick(tree))]

    tx = make(name)
    with jax.enable_x64(True):
        grads, params = (arrays(with_odd_leaves(mixed_tree(seed))) for seed in range(2))
        updates = quick.run(lambda g, p: tx.update(g, tx.init(p), p)[0], grads, params)
    for k in ("ids", "flag", "empty"):
        assert_same_bits(updates["body"][k], grads["body"][k])
    sizes = largest(updates)
    assert np.isfinite(sizes).all()
    bound = name not in UNBOUNDED_AT_FIRST
    assert (sizes != largest(grads)) == bound, "this table is of bounds that bind"


# --- the same wherever it runs ---


def assert_agree(name, found, expected):
    """Singular values are exact to 1e-6 of the largest: they come of products of matrices."""
    assert_close(found, expected, rtol=2e-6, atol=1e-6 * name.startswith("singular"))


@pytest.mark.parametrize("name", [*ONE_EACH, "zclip", "adaclip"])
def test_eager_steps_equal_jitted_ones_that_are_compiled_once(name):
    """All leaves have one shape, so that few operations are compiled one by one."""
    tx, traces = make(name), []
    params = like_each_other(0)
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), params)

    def step(*args):
        traces.append(1)
        return tx.update(*args)

    compiled = quick_jit(step, donate_argnums=(0, 1))
    state, donated = tx.init(params), tx.init(params)
    with jax.debug_nans(True):
        updates, _ = tx.update(zeros, state, params)
    assert_same_bits(updates, zeros)
    for seed in range(1, 1 + STEPS):
        updates, state = tx.update(like_each_other(seed), state, params)
        jitted_updates, donated = compiled(like_each_other(seed), donated, params)
        assert_close(jitted_updates, updates, rtol=2e-6)
        assert types(donated) == types(state)
    assert_close(donated, state, rtol=2e-6)
    assert len(traces) == 1


def like_each_other(seed):
    rng = np.random.default_rng(seed)
    keys = {"body": {"bias": 0, "kernel": 0}, "head": {"bias": 0, "kernel": 0}}
    return jax.tree.map(lambda _: jnp.asarray(np.float32(rng.standard_normal((2, 2)))), keys)


@every
def test_scan_in_a_chain_and_vmap_agree(name, tried):
    """`test_inject_hyperparams` compares the first step with one that is in neither."""
    updates, states = tried(name)["vmap"]
    assert_agree(name, tried(name)["scan"], (jax.tree.map(lambda u: -2 * u, updates), states))


def in_scan_and_vmap(tx, grads, params):
    """Scanned as part of a chain, with derivatives; and side by side from the same states."""
    chain = optax.chain(tx, optax.scale(-2.0))
    start = chain.init(params)

    def step(state, row):
        grads, fresh = row
        state = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), start, state)

        def total(grads):
            updates, new_state = chain.update(grads, state, params, value=1.0, unknown=None)
            return sum(jnp.sum(u) for u in jax.tree.leaves(updates)), (updates, new_state)

        slopes, (updates, new_state) = jax.grad(total, has_aux=True)(grads)
        return new_state, (slopes, updates, state[0], new_state[0])

    fresh = np.arange(STEPS + 2) >= STEPS  # the rows with zeros are first steps
    _, (slopes, updates, before, after) = jax.lax.scan(step, start, (grads, fresh))
    side_by_side = jax.vmap(tx.update, (0, 0, None))(grads, before, params)
    return {"scan": (updates, after), "slopes": slopes, "vmap": side_by_side}


@every
def test_derivative_is_finite_at_zero_too(name, tried):
    for path, x in jax.tree.leaves_with_path(tried(name)["slopes"]):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


@every
def test_zero_gradient_stays_zero(name, tried):
    updates, states = row(tried(name)["vmap"], -1)
    assert_same_bits(updates, jax.tree.map(np.zeros_like, updates))
    for path, x in jax.tree.leaves_with_path(states):
        assert not np.isnan(x).any(), jax.tree_util.keystr(path)
    for stats in optaxclip.clip_stats(states).values():
        assert stats.nonfinite_count <= 0


WRAPPERS = {
    "masked": lambda tx: optax.masked(tx, {"body": False, "head": True}),
    "partition": lambda tx: optax.partition(
        {"train": tx, "frozen": optax.set_to_zero()}, {"body": "frozen", "head": "train"}
    ),
    "freeze": lambda tx: optax.chain(
        optax.transforms.freeze({"body": {"bias": True, "kernel": True}, "head": False}), tx
    ),
}


@every
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "odd leaves"])
def test_leaves_elsewhere_do_not_count(name, wrapper, tried):
    """The head comes out as if the body, a million times larger, were not there."""
    found, expected = tried(name)[wrapper], tried(name)["head alone"]
    if wrapper == "freeze" and name == "global-rms":  # the body's 15 zeros count in the mean
        expected = jax.tree.map(lambda x: x * np.sqrt(19 / 4), expected)
    assert_close(found["head"], expected, rtol=2e-6)
    if wrapper == "odd leaves":
        assert_same_bits(found["body"], arrays(odd_leaves()))
    elif wrapper == "masked":
        assert_same_bits(found["body"], larger_body(first(gradients()))["body"])
    else:
        assert not any(map(np.any, jax.tree.leaves(found["body"])))


def larger_body(tree):
    return {**tree, "body": jax.tree.map(lambda x: 1e6 * x, tree["body"])}


def odd_leaves():
    return with_odd_leaves({"body": {}})["body"]


def elsewhere(tx, grads, params):
    """The updates of each wrapper and beside odd leaves, and what becomes of the head alone."""
    found, grads = {}, larger_body(grads)
    for wrapper, wrap in WRAPPERS.items():
        wrapped = wrap(tx)
        found[wrapper], _ = wrapped.update(grads, wrapped.init(params), params)
    nothing = jax.tree.map(lambda _: None, grads["body"])
    for what, body in {"head alone": nothing, "odd leaves": odd_leaves()}.items():
        heads = {**params, "body": body}
        found[what], _ = tx.update({**grads, "body": body}, tx.init(heads), heads)
    return {**found, "head alone": found["head alone"]["head"]}


# --- around other transformations ---


@pytest.mark.parametrize("name", ONE_EACH)
def test_inside_multi_steps_the_mean_is_clipped_outside_each_micro_batch(name, params):
    tx = make(name)

    def run(grads):
        mean = jax.tree.map(lambda x: x.mean(0), grads)
        inside = optax.MultiSteps(tx, 2)
        wait = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
        outside = optax.chain(tx, wait)
        return {
            "mean": tx.update(mean, tx.init(params), params)[0],
            "inside": through(inside, inside.init(params), grads, params)[0],
            "each": through(tx, tx.init(params), grads, params)[0],
            "outside": through(outside, outside.init(params), grads, params)[0],
        }

    def last(tree):
        return jax.tree.map(lambda x: x[-1], tree)

    found = quick.run(run, jax.tree.map(lambda x: x[:2], gradients()))
    assert_close(last(found["inside"]), found["mean"], rtol=2e-5, atol=1e-7)
    mean_of_clipped = jax.tree.map(lambda x: x.mean(0), found["each"])
    assert_close(last(found["outside"]), mean_of_clipped, rtol=2e-5, atol=1e-7)


def injected(name):
    """In float32: in the dtype of bfloat16 parameters a decay of 0.999 would be 1."""
    factory, bound, rest = CLIPPERS[name]
    inject = optax.inject_hyperparams(
        factory, static_args=static_arguments(name), hyperparam_dtype=np.float32
    )
    return inject(bound, **rest)


@every
def test_inject_hyperparams(name, tried, params):
    tx = injected(name)
    update, grads, state = quick_jit(tx.update), first(gradients()), tx.init(params)
    updates, new_state = update(grads, state, params)
    assert_close(updates, first(tried(name)["vmap"][0]), rtol=2e-6)
    assert types(new_state) == types(state)
    bound_name = next((k for k in state.hyperparams if k != "eps"), None)
    if isinstance(CLIPPERS[name][1], float) and not is_adaptive(name):
        assert bound_name is not None, state.hyperparams
        state.hyperparams[bound_name] = 0.0 * state.hyperparams[bound_name]
        zeroed, _ = update(grads, state, params)
        for path, x in jax.tree.leaves_with_path(zeroed):
            if not is_excluded(name, path):
                np.testing.assert_array_equal(x, 0, err_msg=jax.tree_util.keystr(path))


def is_excluded(name, path):
    return name == "agc-exclude" and "bias" in jax.tree_util.keystr(path)


def test_the_table_has_every_clipper():
    """A new public clipper must be added to the table."""
    modules = {
        f"optaxclip.clippers.{name}" for name in ("given", "learned", "elements", "singular_values")
    }
    public = {
        name
        for name, value in vars(optaxclip).items()
        if getattr(value, "__module__", None) in modules
    }
    assert {"agc", "autoclip", "adaclip"} <= public
    tried = {factory.__name__ for factory, _, _ in CLIPPERS.values()}
    assert public <= tried
