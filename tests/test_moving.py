"""The tables for users of other libraries: each line against that library, or its formula."""

import contextlib
import functools
import operator
import re

import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest
from tools import quick
from tools.pages import ROOT
from tools.quick import quick_jit
from tools.skip_steps import published, stream, through

import optaxclip
from optaxclip.per_example import clipped_fun, example_quantile, materialize

# jax-privacy 2.0 calls a function that Optax has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")

PARAMS = {"b": np.float32([0.5, -0.1]), "w": np.float32(np.arange(1, 7).reshape(3, 2) / 10)}
GRADS = {"b": np.float32([0.3, -2.0]), "w": np.float32([[3.0, -4.0], [0.1, 0.2], [-6.0, 5.0]])}
BAD = {"b": np.float32([np.nan, 1.0]), "w": np.ones((3, 2), np.float32)}
BATCH = np.float32([[3.0, 1.0, -2.0], [0.1, 0.0, 0.2], [5.0, -5.0, 5.0], [0.3, 0.3, 0.1]])
C = 1.5


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) * jnp.array([4.0, 1.0]) + params["b"])


def batch_loss(params, x):
    return jnp.sum(jax.vmap(loss, (None, 0))(params, x))


@functools.cache
def per_example():
    return quick.run(jax.vmap(jax.grad(loss), (None, 0)), PARAMS, BATCH)


@functools.cache
def factored():
    return quick.run(optaxclip.per_example_grad(loss), PARAMS, BATCH)


def ours(tx, grads=GRADS):
    return quick_jit(lambda grads: tx.update(grads, tx.init(PARAMS), PARAMS))(grads)


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, expected)


def as_optax(theirs, tx, grads=GRADS):
    update = quick_jit(lambda grads: theirs.update(grads, theirs.init(PARAMS), PARAMS)[0])
    same(ours(tx, grads)[0], update(grads))


def wide(tree):
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def total(tree, order=2.0):
    return np.linalg.norm(np.concatenate([x.ravel() for x in wide(tree).values()]), order)


def torch_norm_clip(order=2.0):
    """`torch.nn.utils.clip_grad_norm_`: times `min(1, c / (n + 1e-6))`."""
    factor = min(1.0, C / (total(GRADS, order) + 1e-6))
    return {name: x * factor for name, x in wide(GRADS).items()}


def rows_of(by_leaf_bounds=None):
    """Opacus: sum of examples times `min(1, c / (n + 1e-6))`, over the expected batch size."""
    squares = {k: np.sum(np.square(x.reshape(4, -1)), axis=1) for k, x in per_example().items()}
    out = {}
    for k, x in per_example().items():
        n = np.sqrt(squares[k] if by_leaf_bounds else sum(squares.values()))
        bound = by_leaf_bounds[k] if by_leaf_bounds else C
        factors = np.minimum(1, bound / (n + 1e-6))
        out[k] = np.tensordot(factors, x, 1) / 5
    return out


def same_but_for_eps(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def apply_if_finite():
    theirs = optax.apply_if_finite(optax.sgd(0.1), 3)
    guard = optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=3)
    as_optax(theirs, guard)
    as_optax(theirs, guard, BAD)
    let_in, dropped = in_a_row(theirs, BAD, 5), in_a_row(guard, BAD, 5)
    assert [bool(np.isnan(u["b"][0])) for u, _ in let_in] == [False] * 3 + [True] * 2
    for step, (updates, state) in enumerate(dropped, 1):
        same(updates, jax.tree.map(np.zeros_like, GRADS))
        with pytest.raises(FloatingPointError) if step >= 3 else contextlib.nullcontext():
            optaxclip.raise_if_stuck(state)


def in_a_row(tx, grads, steps):
    """Updates and state after each step with the same gradient."""
    state, update, found = tx.init(PARAMS), quick_jit(tx.update), []
    for _ in range(steps):
        updates, state = update(grads, state, PARAMS)
        found.append((updates, state))
    return found


def optax_per_example():
    leaves, tree = jax.tree.flatten(per_example())
    theirs, _ = quick_jit(optax.per_example_global_norm_clip)(leaves, C)
    same(ours(optaxclip.clip_per_example(C, mean="sum"), factored())[0], tree.unflatten(theirs))


def skip_large_updates():
    too_long = functools.partial(optax.skip_large_updates, max_squared_norm=C**2)
    theirs = optax.MultiSteps(optax.sgd(0.1), 1, should_skip_update_fn=too_long)
    guard = optaxclip.skip_outliers(optax.sgd(0.1), C)
    as_optax(theirs, guard)
    as_optax(theirs, guard, jax.tree.map(lambda g: g / 100, GRADS))


def error_if_nonfinite():
    updates, state = ours(optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=1), BAD)
    same(updates, jax.tree.map(np.zeros_like, GRADS))
    with pytest.raises(FloatingPointError):
        optaxclip.raise_if_stuck(state)


def get_total_norm():
    stats = optaxclip.clip_stats(ours(optaxclip.clip_by_global_norm(C))[1])
    np.testing.assert_allclose(stats["clip_by_global_norm"].pre_clip_norm, total(GRADS), rtol=1e-6)


def unscale():
    scaled = jax.tree.map(lambda g: 1024 * g, GRADS)
    clip = optaxclip.clip_by_global_norm(C)
    same(ours(optax.chain(optax.scale(1 / 1024), clip), scaled)[0], ours(clip)[0])


def keras_clipnorm():
    expected = {k: g * min(1, C / np.linalg.norm(g)) for k, g in wide(GRADS).items()}
    same(ours(optaxclip.clip_by_leaf_norm(C))[0], expected)


def opacus_adaptive():
    """`C <- C exp(-eta (share within C - q))`, once a step."""
    tx = optaxclip.clip_per_example(example_quantile(0.5, init=C, step_size=0.2))
    state, update = tx.init(PARAMS), quick_jit(tx.update)
    for _ in range(2):
        _, state = update(factored(), state, PARAMS)
    norms = np.sqrt(sum(np.sum(np.square(x.reshape(4, -1)), 1) for x in per_example().values()))
    expected = C * np.exp(-0.2 * (np.mean(norms <= C) - 0.5))
    found = optaxclip.clip_stats(state)["clip_per_example"].threshold
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def privacy(**options):
    theirs = jax_privacy.clipping.clipped_grad(batch_loss, l2_clip_norm=C, **options)
    mine = optaxclip.clipped_grad(batch_loss, l2_clip_norm=C, **options)
    same(quick_jit(mine)(PARAMS, BATCH), quick_jit(theirs)(PARAMS, BATCH))


def sensitivity():
    theirs = jax_privacy.clipping.clipped_grad(batch_loss, l2_clip_norm=C)
    mine = optaxclip.clipped_grad(batch_loss, l2_clip_norm=C)
    assert mine.sensitivity() == theirs.sensitivity()


def clip_pytree():
    same(ours(optaxclip.clip_by_global_norm(C))[0], jax_privacy.clipping.clip_pytree(GRADS, C)[0])


def any_function():
    theirs = jax_privacy.clipping.clipped_fun(jax.grad(batch_loss), batch_argnums=1, l2_clip_norm=C)
    mine = clipped_fun(jax.grad(batch_loss), batch_argnums=1, l2_clip_norm=C)
    same(quick_jit(mine)(PARAMS, BATCH), quick_jit(theirs)(PARAMS, BATCH))
    assert mine.sensitivity() == theirs.sensitivity()


def integer_grid():
    """Clipped in units of C / 200, as far as rounding leaves room; then rounded."""
    flat = np.concatenate([wide(per_example())[k].reshape(4, -1) for k in ("b", "w")], axis=1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True) * 200 / C
    most = 200 - np.sqrt(flat.shape[1]) / 2
    expected = np.round(flat * 200 / C * np.minimum(1, most / norms)).sum(0)
    with jax.enable_x64(True):
        grad = jax.grad(batch_loss)
        fun = clipped_fun(grad, batch_argnums=1, l2_clip_norm=C, grid_scale=200)
        found = fun(PARAMS, BATCH)
        assert found["w"].dtype == np.int64
    found = np.concatenate([np.ravel(found[k]) for k in ("b", "w")])
    # Gradients in float64 and in float32 may round to either side of a half.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1)


def scale_then_privatize():
    """Algorithm 8 of arXiv 2507.01129 without its noise: divided, clipped, added up, multiplied."""
    roots = {k: 0.5 + 2.0 * np.arange(x.size).reshape(x.shape) for k, x in PARAMS.items()}
    scaled = {k: x / roots[k] for k, x in wide(per_example()).items()}
    norms = np.sqrt(sum(np.sum(np.square(x.reshape(4, -1)), axis=1) for x in scaled.values()))
    factors = np.minimum(1, C / norms)
    assert 0 < np.min(factors) < np.max(factors) <= 1
    expected = {k: np.tensordot(factors, x, 1) * roots[k] for k, x in scaled.items()}
    divided = lambda grads: jax.tree.map(lambda g, r: g / np.float32(r), grads, roots)
    grad = optaxclip.clipped_grad(batch_loss, l2_clip_norm=C, pre_clipping_transform=divided)
    found = quick_jit(grad)(PARAMS, BATCH)
    same({k: x * roots[k] for k, x in wide(found).items()}, expected)


def fits_in_memory():
    """Less memory is another schedule, in other micro-batches; the sum does not depend on it."""
    params, batch = {"w": np.eye(64, dtype=np.float32)}, np.ones((512, 64), np.float32)
    wave = lambda params, xs: jnp.sum(jnp.sin(jnp.sin(xs @ params["w"]) @ params["w"]))
    whole, fitted = (
        optaxclip.clipped_grad(wave, l2_clip_norm=C, memory=memory) for memory in (2**30, 2**18)
    )
    chosen = {str(jax.make_jaxpr(f)(params, batch)) for f in (whole, fitted)}
    assert len(chosen) == 2
    same(quick_jit(fitted)(params, batch), quick_jit(whole)(params, batch))


LEAF_BOUNDS = {"b": 0.5, "w": 1.0}


def skip_steps(which):
    norms, losses = stream(1, 260)
    rule = optaxclip.thresholds.as_published(which, 4.0, window=24)
    tx = optaxclip.skip_outliers(optax.identity(), rule, of=("gradient", "loss"))
    happened, *_ = quick.run(functools.partial(through, tx), norms, losses)
    expected = published(which, norms, losses, 24, 4.0)[:, 0]
    assert 3 <= np.sum(expected == 0) < 20
    np.testing.assert_array_equal(happened, expected)


HELD = {
    "optax.clip(c)": lambda: as_optax(optax.clip(C), optaxclip.clip_by_value(C)),
    "optax.clip_by_global_norm(c)": lambda: as_optax(
        optax.clip_by_global_norm(C), optaxclip.clip_by_global_norm(C)
    ),
    "optax.clip_by_block_rms(d)": lambda: as_optax(
        optax.clip_by_block_rms(C), optaxclip.clip_by_leaf_rms(C)
    ),
    "optax.adaptive_grad_clip(a)": lambda: as_optax(
        optax.adaptive_grad_clip(0.1), optaxclip.agc(0.1)
    ),
    "optax.apply_if_finite(tx, n)": apply_if_finite,
    "optax.per_example_global_norm_clip(grads, c)": optax_per_example,
    "MultiSteps(tx, 1, should_skip_update_fn=skip_large_updates)": skip_large_updates,
    "clip_grad_norm_(p, c)": lambda: same(
        ours(optaxclip.clip_by_global_norm(C, eps=1e-6))[0], torch_norm_clip()
    ),
    "clip_grad_norm_(p, c, norm_type=t)": lambda: [
        same(
            ours(optaxclip.clip_by_global_norm(C, ord=t, eps=1e-6))[0],
            torch_norm_clip(t),
        )
        for t in (3.0, np.inf)
    ],
    "clip_grad_norm_(p, c, error_if_nonfinite=True)": error_if_nonfinite,
    "clip_grad_value_(p, c)": lambda: same(
        ours(optaxclip.clip_by_value(C))[0], {k: g.clip(-C, C) for k, g in wide(GRADS).items()}
    ),
    "get_total_norm(grads)": get_total_norm,
    "scaler.unscale_(optimizer)": unscale,
    "skip_step_on_spikes(tx, w, k)": lambda: skip_steps("maxtext"),
    "SkipStepOptimizer(ps, opts, w, k)": lambda: skip_steps("olmo-core"),
    "SkipStepConfig(w, k).wrap(tx)": lambda: skip_steps("levanter"),
    "Optimizer(clipvalue=c)": lambda: same(
        ours(optaxclip.clip_by_value(C))[0], {k: g.clip(-C, C) for k, g in wide(GRADS).items()}
    ),
    "Optimizer(clipnorm=c)": keras_clipnorm,
    "Optimizer(global_clipnorm=c)": lambda: same(
        ours(optaxclip.clip_by_global_norm(C))[0],
        {k: g * min(1, C / total(GRADS)) for k, g in wide(GRADS).items()},
    ),
    "make_private(max_grad_norm=c)": lambda: same_but_for_eps(
        ours(optaxclip.clip_per_example(C, mean=5), factored())[0], rows_of()
    ),
    'make_private(clipping="per_layer", max_grad_norm=cs)': lambda: same_but_for_eps(
        ours(optaxclip.clip_per_example(LEAF_BOUNDS, by="leaf", mean=5), factored())[0],
        rows_of(LEAF_BOUNDS),
    ),
    'make_private(clipping="adaptive")': opacus_adaptive,
    "GradSampleModule(m)": lambda: same(quick.run(materialize, factored()), per_example()),
    'grad_sample_mode="ghost"': lambda: same(
        ours(optaxclip.clip_per_example(C), factored())[0],
        ours(optaxclip.clip_per_example(C), per_example())[0],
    ),
    "clipping.clipped_grad(f, l2_clip_norm=c)": privacy,
    "clipped_grad(..., rescale_to_unit_norm=True)": lambda: privacy(rescale_to_unit_norm=True),
    "clipped_grad(..., microbatch_size=m)": lambda: privacy(microbatch_size=2),
    "clipping.clipped_fun(f, l2_clip_norm=c)": any_function,
    "clipped_fun(..., grid_scale=G)": integer_grid,
    "optimizers.scale_then_privatize(tx)": scale_then_privatize,
    "AutotuneMicrobatch()": fits_in_memory,
    "clipping.clip_pytree(g, c)": clip_pytree,
    "g.sensitivity()": sensitivity,
}


@pytest.mark.parametrize("there", HELD)
def test_line_does_what_it_says(there):
    HELD[there]()


def test_every_line_of_the_page_is_held():
    page = (ROOT / "docs" / "how_to" / "moving.md").read_text()
    assert re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE) == list(HELD)


def test_names_that_moved_are_where_the_page_says():
    page = (ROOT / "docs" / "how_to" / "from_0_1_0.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| (`.*`) \|$", page.partition("## Guards")[0], re.MULTILINE)
    pairs = [
        (old, new)
        for row in rows
        for old, new in zip(*(re.findall(r"`([\w.]+)`", cell) for cell in row), strict=True)
    ]
    assert len(pairs) > 15
    for old, new in pairs:
        assert not hasattr(optaxclip, old)
        assert new.endswith(f".{old}")
        assert operator.attrgetter(new)(optaxclip) is not None


# --- threads of other trackers ---


def norm_comes_out():
    state = ours(optax.chain(optaxclip.clip_by_global_norm(C), optax.adam(0.1)))[1]
    found = optaxclip.clip_stats(state)["clip_by_global_norm"].pre_clip_norm
    np.testing.assert_allclose(found, total(GRADS), rtol=1e-6)


def a_bound_that_falls_to_zero():
    tx = optaxclip.clip_by_global_norm(optax.linear_schedule(1.0, 0.0, 1))
    zeros = jax.tree.map(np.zeros_like, GRADS)
    (_, before), (updates, state) = in_a_row(tx, zeros, 2)
    bounds = [optaxclip.clip_stats(s)["clip_by_global_norm"].threshold for s in (before, state)]
    assert bounds == [1.0, 0.0]
    same(updates, zeros)
    summed = lambda grads: sum(map(jnp.sum, jax.tree.leaves(tx.update(grads, state, PARAMS)[0])))
    derivative = quick.run(jax.grad(summed), zeros)
    assert all(np.isfinite(x).all() for x in derivative.values())


def counters_of_a_guard():
    tx = optaxclip.skip_nonfinite(optax.sgd(0.1), max_consecutive=2)
    state, update = tx.init(PARAMS), quick_jit(tx.update)
    counted = []
    for grads in (BAD, BAD, BAD, GRADS, BAD):
        updates, state = update(grads, state, PARAMS)
        assert all(np.isfinite(x).all() for x in updates.values())
        counted.append((int(state.consecutive_count), int(state.skipped_count)))
    assert counted == [(1, 1), (2, 2), (3, 3), (0, 3), (1, 4)]


def one_norm_in_float32():
    """Squares of bfloat16 added in bfloat16 stop at 256 times the first."""
    ones = {"b": jnp.ones(2, jnp.bfloat16), "w": jnp.ones((300, 300), jnp.bfloat16)}
    tx = optaxclip.clip_by_global_norm(150.0)
    updates, state = quick_jit(lambda g: tx.update(g, tx.init(g), g))(ones)
    stats = optaxclip.clip_stats(state)["clip_by_global_norm"]
    np.testing.assert_allclose(stats.pre_clip_norm, np.sqrt(90002), rtol=1e-6)
    expected = jnp.asarray(150 / np.sqrt(90002), jnp.bfloat16)
    np.testing.assert_array_equal(updates["w"], jnp.full((300, 300), expected))


def tied_weights():
    """An embedding that is the last layer too: its two gradients overlap."""
    table = {"table": np.float32(np.arange(15).reshape(5, 3) % 4 - 1.5)}
    tokens = np.array([[0, 1, 1], [2, 2, 3], [4, 0, 2], [1, 1, 1]])

    def tied(params, tokens):
        hidden = jnp.tanh(params["table"][tokens[:-1]])
        logits = hidden @ params["table"].T
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - logits[jnp.arange(2), tokens[1:]])

    rows = quick.run(jax.vmap(jax.grad(tied), (None, 0)), table, tokens)["table"]
    norms = np.sqrt(np.sum(np.square(np.float64(rows)), axis=(1, 2)))
    found = quick.run(optaxclip.per_example_norms(tied), table, tokens)
    np.testing.assert_allclose(found, norms, rtol=1e-5)
    grads = quick.run(optaxclip.per_example_grad(tied), table, tokens)
    tx = optaxclip.clip_per_example(1.0, mean="sum")
    updates = quick_jit(lambda g: tx.update(g, tx.init(table), table)[0])(grads)
    expected = np.tensordot(np.minimum(1, 1 / norms), rows, 1)
    np.testing.assert_allclose(updates["table"], expected, rtol=1e-5, atol=1e-6)


THREADS = {
    "optax #326": norm_comes_out,
    "optax #1752": a_bound_that_falls_to_zero,
    "optax #1746": counters_of_a_guard,
    "maxtext #5143": one_norm_in_float32,
    "opacus #413": tied_weights,
}


@pytest.mark.parametrize("thread", THREADS)
def test_thread_is_answered(thread):
    THREADS[thread]()


def test_every_thread_of_the_page_is_answered():
    page = (ROOT / "docs" / "how_to" / "moving.md").read_text()
    assert re.findall(r"^\| \[([^\]]+)\]", page, flags=re.MULTILINE) == list(THREADS)
