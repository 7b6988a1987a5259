"""What holds for every clipper, whatever it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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

import optaxclip

every = pytest.mark.parametrize("name", CLIPPERS)


def types(tree):
    """Structure, shapes, dtypes and weak types: what decides whether jit compiles again."""
    return jax.tree.structure(tree), [jax.typeof(x) for x in jax.tree.leaves(tree)]


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def stacked_grads(steps=3):
    trees = [jax.tree.map(lambda x: x * 1.0, example_tree(seed=10 + i)) for i in range(steps)]
    return trees, jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "mixed"])
def test_update_keeps_structure_shapes_and_dtypes(name, dtype):
    with jax.enable_x64(dtype in ("float64", "mixed")):
        grads = mixed_tree() if dtype == "mixed" else example_tree(dtype)
        grads = with_odd_leaves(grads)
        tx = make(name)
        state = jax.eval_shape(tx.init, grads)
        updates, new_state = jax.eval_shape(tx.update, grads, state, grads)
        assert types(updates) == types(grads)
        assert types(new_state) == types(state)


@every
def test_every_leaf_is_bounded_and_others_are_untouched(name):
    """Runs in mixed precision and checks values, where the test above checks types."""
    with jax.enable_x64(True):
        grads, params = with_odd_leaves(mixed_tree()), with_odd_leaves(mixed_tree(seed=1))
        tx = make(name)
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        assert_same_bits(
            [updates["body"][k] for k in ("ids", "flag", "empty")],
            [grads["body"][k] for k in ("ids", "flag", "empty")],
        )

        def pick(tree):
            return tree["head"], tree["body"]["kernel"], tree["body"]["bias"]

        single = make(name)  # the odd leaves change nothing about the others
        plain_grads, plain_params = mixed_tree(), mixed_tree(seed=1)
        plain, _ = jax.jit(single.update)(plain_grads, single.init(plain_params), plain_params)
        assert_same_bits(pick(updates), pick(plain))
        sizes = [float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(pick(updates))]
        assert np.isfinite(sizes).all()
        before = [float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(pick(grads))]
        bound = name not in UNBOUNDED_AT_FIRST
        assert (sizes != before) == bound, "this table is of bounds that bind"


@every
def test_eager_jit_scan_and_vmap_agree_with_one_compilation(name):
    tx, params = make(name), example_tree(seed=1)
    trees, stacked = stacked_grads()
    atol = 1e-6 * name.startswith("singular")  # small elements of products of matrices
    traces = []

    def step(*args):
        traces.append(1)
        return tx.update(*args)

    # A state made outside jit is donated too: this fails if one buffer is in it twice.
    compiled = jax.jit(step, donate_argnums=(0, 1))
    start = tx.init(params)
    updates, state = tx.update(trees[0], start, params)
    states, outputs = [copy(start), copy(state)], [updates]
    for grads in trees[1:]:
        updates, state = compiled(copy(grads), state, params)
        states.append(copy(state))
        outputs.append(updates)
    assert len(traces) == 1
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)

    def body(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    last, scanned = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(states[0], stacked)
    assert_close(scanned, expected, rtol=2e-6, atol=atol)
    assert_close(last, states[-1], rtol=2e-6, atol=atol)

    def batch(trees):
        return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

    update = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, params)))
    updates, new_states = update(stacked, batch(states[:-1]))
    assert_close(updates, expected, rtol=2e-6, atol=atol)
    assert_close(new_states, batch(states[1:]), rtol=2e-6, atol=atol)


@every
def test_chain_and_extra_args(name):
    tx, grads, params = make(name), example_tree(), example_tree(seed=1)
    alone, _ = tx.update(grads, tx.init(params), params)
    chained = optax.chain(tx, optax.scale(-2.0))
    updates, _ = chained.update(grads, chained.init(params), params, value=1.0, unknown=None)
    assert_close(updates, jax.tree.map(lambda u: -2.0 * u, alone))


def head_only(tree):
    return {"body": jax.tree.map(lambda _: None, tree["body"]), "head": tree["head"]}


@every
@pytest.mark.parametrize("wrapper", ["masked", "partition", "freeze"])
def test_leaves_elsewhere_do_not_count(name, wrapper):
    """The head comes out as if the body, a million times larger, were not there."""
    grads, params = example_tree(), example_tree(seed=1)
    grads["body"] = jax.tree.map(lambda x: 1e6 * x, grads["body"])
    alone = make(name)
    expected, _ = alone.update(head_only(grads), alone.init(head_only(params)), head_only(params))
    is_head = {"body": False, "head": True}
    if wrapper == "masked":
        tx = optax.masked(make(name), is_head)
        body = grads["body"]
    elif wrapper == "partition":
        tx = optax.partition(
            {"train": make(name), "frozen": optax.set_to_zero()},
            {"body": "frozen", "head": "train"},
        )
        body = jax.tree.map(jnp.zeros_like, grads["body"])
    else:
        freeze = optax.transforms.freeze(jax.tree.map(lambda b: not b, is_head))
        tx = optax.chain(freeze, make(name))
        body = jax.tree.map(jnp.zeros_like, grads["body"])
    updates, _ = tx.update(grads, tx.init(params), params)
    if wrapper == "freeze" and name == "global-rms":
        pytest.skip("a frozen leaf of zeros counts as elements of the mean")
    assert_close(updates["head"], expected["head"], rtol=2e-6)
    assert_same_bits(updates["body"], body)


@every
def test_multi_steps_keeps_types(name):
    grads = with_odd_leaves(mixed_tree())
    # MultiSteps itself fails on these.
    del grads["body"]["ids"], grads["body"]["flag"]
    grads["head"]["bias"] = grads["head"]["bias"].real
    tx = optax.MultiSteps(make(name), 2)
    state = jax.eval_shape(tx.init, grads)
    updates, new_state = jax.eval_shape(tx.update, grads, state, grads)
    assert types(updates) == types(grads)
    assert types(new_state) == types(state)


@pytest.mark.parametrize("name", ONE_EACH)
def test_inside_multi_steps_the_mean_is_clipped_outside_each_micro_batch(name):
    _, stacked = stacked_grads(2)
    params = example_tree(seed=1)

    def run(tx, grads):
        def body(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return jax.jit(lambda s, g: jax.lax.scan(body, s, g)[1])(tx.init(params), grads)

    def mean(tree):
        return jax.tree.map(lambda x: x.mean(0), tree)

    def last(tree):
        return jax.tree.map(lambda x: x[-1], tree)

    tx = make(name)
    clipped_mean, _ = jax.jit(tx.update)(mean(stacked), tx.init(params), params)
    inside = run(optax.MultiSteps(make(name), 2), stacked)
    assert_close(last(inside), clipped_mean, rtol=2e-5, atol=1e-7)
    wait = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    outside = run(optax.chain(make(name), wait), stacked)
    assert_close(last(outside), mean(run(make(name), stacked)), rtol=2e-5, atol=1e-7)


@every
def test_inject_hyperparams(name):
    factory, bound, rest = CLIPPERS[name]
    tx = optax.inject_hyperparams(factory, static_args=static_arguments(name))(bound, **rest)
    grads, params = example_tree(), example_tree(seed=1)
    plain = make(name)
    expected, _ = plain.update(grads, plain.init(params), params)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params)
    assert_close(updates, expected, rtol=2e-6)
    assert types(new_state) == types(state)
    bound_name = next((k for k in state.hyperparams if k != "eps"), None)
    if isinstance(bound, float) and not is_adaptive(name):
        assert bound_name is not None, state.hyperparams
        state.hyperparams[bound_name] = jnp.zeros_like(state.hyperparams[bound_name])
        zeroed, _ = tx.update(grads, state, params)
        clipped = [x for p, x in jax.tree.leaves_with_path(zeroed) if not is_excluded(name, p)]
        assert all(bool((x == 0).all()) for x in clipped)


def is_excluded(name, path):
    return name == "agc-exclude" and "bias" in jax.tree_util.keystr(path)


@every
def test_inject_hyperparams_in_bfloat16_keeps_dtypes(name):
    factory, bound, rest = CLIPPERS[name]
    tx = optax.inject_hyperparams(factory, static_args=static_arguments(name))(bound, **rest)
    grads = example_tree(jnp.bfloat16)
    state = jax.eval_shape(tx.init, grads)
    updates, new_state = jax.eval_shape(tx.update, grads, state, grads)
    assert types(updates) == types(grads)
    assert types(new_state) == types(state)


@every
def test_strict_dtype_promotion(name):
    tx, grads = make(name), with_odd_leaves(mixed_tree())
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, grads), grads)
    assert types(updates) == types(grads)


@every
def test_derivative_is_finite_at_zero_too(name):
    tx, params = make(name), example_tree(seed=1)
    state = tx.init(params)

    @jax.jit
    @jax.grad
    def slope(grads):
        updates, _ = tx.update(grads, state, params)
        return sum(jnp.sum(u) for u in jax.tree.leaves(updates))

    ordinary = example_tree()
    some_zeros = {**ordinary, "body": jax.tree.map(jnp.zeros_like, ordinary["body"])}
    zeros = jax.tree.map(jnp.zeros_like, ordinary)
    for grads in (ordinary, some_zeros, zeros):
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slope(grads)))


@every
def test_zero_gradient_stays_zero(name):
    params = example_tree(seed=1)
    tx, zeros = make(name), jax.tree.map(jnp.zeros_like, params)
    with jax.debug_nans("no-stats" not in name and "elements-tanh" not in name):
        updates, state = tx.update(zeros, tx.init(params), params)
    assert_same_bits(updates, zeros)
    for stats in optaxclip.clip_stats(state).values():
        assert int(stats.nonfinite_count) <= 0


def test_the_table_has_every_clipper():
    """A new public clipper must be added to the table."""
    modules = {
        f"optaxclip.{name}" for name in ("strategies", "adaptive", "spike_aware", "spectral")
    }
    public = {
        name
        for name, value in vars(optaxclip).items()
        if getattr(value, "__module__", None) in modules
    }
    assert {"agc", "autoclip", "adaclip"} <= public
    tried = {factory.__name__ for factory, _, _ in CLIPPERS.values()}
    assert public <= tried
