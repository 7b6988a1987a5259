"""All schedules give the same numbers; "auto" picks from shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal, stacked_grads
from tools.models import mlp, mlp_batch, mlp_params
from tools.quick import quick_jit

from optaxclip.measure import platforms
from optaxclip.measure.platforms import ACCELERATOR, CPU, Rates
from optaxclip.per_example import clipped_grad, explain, reweighted_grad
from optaxclip.per_example.schedules.choice import Chooser, best_size
from optaxclip.per_example.schedules.costs import Costs

METHODS = ["one_pass", "two_pass", "vmap", "auto"]
every = pytest.mark.parametrize("method", METHODS)


def clip(sq_norms):
    return jnp.minimum(1.0, 33.0 / jnp.sqrt(sq_norms))


def oracle(fun, weights, params, batch):
    grads = stacked_grads(fun, params, batch)
    squares = sum(jnp.sum(g * g, range(1, g.ndim)) for g in jax.tree.leaves(grads))
    c = weights(squares)
    return jax.tree.map(lambda g: jnp.tensordot(c, g, 1), grads), squares, c


@every
def test_methods_agree(method):
    @quick_jit
    def answers(params, data):
        found = reweighted_grad(mlp, clip, method=method)(params, data)
        return found, oracle(mlp, clip, params, data), jax.vmap(mlp, (None, 0))(params, data)

    found, (grads, squares, c), values = answers(mlp_params(5, 8, 3), mlp_batch())
    assert 0 < np.sum(np.asarray(c) < 1) < 6, "the test would pass without weights"
    close(found.grads, grads, 1e-10)
    close((found.sq_norms, found.weights), (squares, c), 1e-10)
    close(found.values, values, 1e-10)
    assert found.aux == ()


def remat_loss(params, x):
    block = jax.checkpoint(lambda w, x: jnp.sin(x @ w))
    return jnp.sum(block(params["w"], block(params["w"], x)) * params["n"]) * params["scale"]


@every
def test_tied_rematerialised_weights_and_leaves_that_do_not_move(method):
    n, moving = np.arange(4), {"w": normal(0, 4, 4), "scale": np.array(0.5)}

    @quick_jit
    def answers(n, moving, x):
        found = reweighted_grad(remat_loss, clip, method=method)({**moving, "n": n}, x)
        return found, oracle(lambda p, x: remat_loss({**p, "n": n}, x), clip, moving, x)

    found, (grads, squares, _) = answers(n, moving, normal(1, 6, 4))
    assert found.grads.pop("n").tolist() == [0] * 4
    close((found.grads, found.sq_norms), (grads, squares), 1e-10)


@every
def test_options(method):
    def fun(scale, key, x, w):
        y = x * jax.random.normal(key, x.shape)
        return jnp.sum((y @ w) ** 2) * scale, y

    grad = reweighted_grad(
        fun, clip, (3,), batch_argnums=2, prng_argnum=1, has_aux=True, keep_batch_dim=True,
        strict=True, method=method,
    )  # fmt: skip

    @quick_jit
    def answers(key, x, w):
        one = lambda w, kx: fun(2.0, kx[0], kx[1][None], w)[0]
        keys = jax.random.split(key, 6)
        return grad(2.0, key, x, w), oracle(one, clip, w, (keys, x))

    found, (grads, squares, _) = answers(jax.random.key(0), normal(1, 6, 4), normal(0, 4, 3))
    close((found.grads, found.sq_norms), ((grads,), squares), 1e-10)
    assert found.aux.shape == (6, 4)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_flows_through_the_weights(method):
    """As when a clipped gradient is itself differentiated, for instance by a hyperparameter."""

    def total(scale):
        loss = lambda w, x: jnp.sum(x @ w) * scale
        normalise = lambda sq_norms: 1 / jnp.sqrt(sq_norms)
        result = reweighted_grad(loss, normalise, method=method)(normal(0, 4), normal(1, 6, 4))
        return jnp.sum(result.grads)

    close(*quick_jit(lambda scale: (jax.grad(total)(scale), total(scale)))(1.0), 1e-10)


@every
@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_micro_batches_change_nothing(method, size):
    """Whatever their size; leaves that do not move, keys and aux included."""

    def fun(params, key, x):
        y = jnp.sin(x * jax.random.normal(key, x.shape) @ params["w"])
        return jnp.sum(y) * params["n"][0], y

    params = {"w": normal(0, 4, 3), "n": np.arange(1, 3), "key": jax.random.key(3)}
    options = {"batch_argnums": 2, "prng_argnum": 1, "has_aux": True, "method": method}
    in_parts = reweighted_grad(fun, clip, microbatch_size=size, **options)
    at_once = reweighted_grad(fun, clip, **options)
    found, whole = quick_jit(lambda *given: (in_parts(*given), at_once(*given)))(
        params, jax.random.key(0), normal(1, 6, 4)
    )
    assert jax.tree.structure(found) == jax.tree.structure(whole)
    assert found.grads["n"].tolist() == [0, 0]
    assert found.grads.pop("key") == whole.grads.pop("key")
    close(found, whole, 1e-10)


def test_micro_batches_with_convolutions_change_nothing():
    """Few of them are written out, with the keys of examples and what a loss returns besides."""

    def fun(w, x, key):
        y = jax.lax.conv_general_dilated(x[None, None], w, (1,), "SAME")[0]
        y = y * jax.random.bernoulli(key, 0.5, y.shape)
        return jnp.sum(jnp.sin(y)), {"key": key, "size": y.size, "y": y}

    w, x, key = normal(0, 3, 1, 3), normal(1, 8, 6), jax.random.key(0)

    def of(size):
        options = {"microbatch_size": size, "has_aux": True, "prng_argnum": 2}
        return reweighted_grad(fun, clip, **options)

    whole = quick_jit(of(None))(w, x, key)
    keys = whole.aux.pop("key")
    for size in (4, 2):
        assert "scan[" not in str(jax.make_jaxpr(of(size))(w, x, key))
        some = quick_jit(of(size))(w, x, key)
        assert jnp.all(some.aux.pop("key") == keys)
        close(some, whole, 1e-10)


def test_the_rare_branch_with_convolutions_stays_a_loop():
    """Written out it would hold the whole batch on a CPU, where it is not taken either."""

    def fun(w, x):
        y = jax.lax.conv_general_dilated(x[None, None], w["k"], (1,), "SAME")[0]
        return jnp.sum(jnp.sin(y)) * w["s"]

    w, x = {"k": normal(0, 3, 1, 3), "s": np.array(2.0)}, normal(1, 8, 6)
    options = {"l2_clip_norm": 1.0, "keep_batch_dim": False, "method": "two_pass"}
    grad = clipped_grad(fun, **options)
    assert str(jax.make_jaxpr(grad)(w, x)).count("scan[") == 1
    x[3] = np.nan
    close(quick_jit(grad)(w, x), quick_jit(grad)(w, np.delete(x, 3, axis=0)), 1e-10)


def test_micro_batches_add_in_float32():
    """128 ones and then halves: in bfloat16 the total would stop at 128 or 256."""
    x = np.repeat(np.float32([2.0, 0.5]), [128, 256])
    fun = lambda w, x: w.astype(jnp.float32) * x
    sum_all = reweighted_grad(fun, jnp.ones_like, microbatch_size=1)
    found = quick_jit(sum_all)(np.zeros((), jnp.bfloat16), x).grads
    assert (found.dtype, float(found)) == (jnp.bfloat16, 384.0)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (4, ValueError, r"must divide the number of examples, got 4 for 6\. Pass a divisor"),
        (0, ValueError, r"microbatch_size must be >= 1, got 0"),
        (2.0, TypeError, r"must be a whole number, got 2\.0"),
        (True, TypeError, r"must be a whole number, got True"),
    ],
)
def test_micro_batch_sizes_are_checked(size, error, message):
    with pytest.raises(error, match=message):
        reweighted_grad(mlp, clip, microbatch_size=size)(mlp_params(5, 3), mlp_batch())


GB, MB = 10**9, 10**6


def taken(
    rates=ACCELERATOR, unit=GB, *, examples=64, size="auto", memory=None, twice=True, **costs
):
    """What is chosen for costs in a unit, and in how many parts."""
    given = {"parameters": 1, "factors": 50, "stacked": 10**6, "residuals": 100, **costs}
    parameters, factors, stacked, residuals, norms, forward = (
        int(given.get(name, default) * unit)
        for name, default in (
            ("parameters", 0), ("factors", 0), ("stacked", 0), ("residuals", 0), ("norms", 0),
            ("forward", 10**5),
        )
    )  # fmt: skip
    costs = Costs(
        examples, parameters, factors, stacked, residuals, norms, held_by_one=factors,
        forward_flops=forward, convolves=given.get("convolves", False),
    )  # fmt: skip
    chooser = Chooser(examples, "auto", size, memory, costs, twice)
    choice = chooser.choose(rates)
    return choice.method, chooser.parts(choice)


@pytest.mark.parametrize(
    ("costs", "parts"),
    [
        ({"factors": 50}, 2),
        ({"factors": 5}, 1),
        ({"factors": 401}, 8),
        ({"factors": 60, "parameters": 80}, 1),  # a total holds as much
        ({"factors": 50, "forward": 1}, 1),  # parts would take longer than the gradient
    ],
)
def test_an_accelerator_takes_as_few_parts_as_fit(costs, parts):
    assert taken(**costs) == ("one_pass", parts)


def test_an_example_is_taken_alone_only_for_memory():
    costs = {"factors": 100, "residuals": 200, "forward": 10**4}
    assert taken(CPU, MB, examples=4, **costs) == ("one_pass", 2)
    assert taken(CPU, MB, examples=8, **costs)[1] == 4
    assert taken(CPU, MB, examples=4, memory=int(90 * MB), **costs) == ("one_pass", 4)


def test_little_memory_is_free():
    assert taken(ACCELERATOR, MB, factors=300) == ("one_pass", 1)
    assert taken(CPU, MB, factors=1.5, residuals=2) == ("one_pass", 1)


def test_a_cpu_takes_parts_for_speed():
    assert taken(CPU, MB, factors=5) == ("one_pass", 8)
    assert taken(CPU, MB, factors=5, residuals=10) == ("one_pass", 1)


def test_parts_with_convolutions_are_few():
    """Parts that are written out. A CPU holds all of them, but has one after the other in cache."""
    assert taken(CPU, convolves=True) == ("one_pass", 8)
    assert taken(CPU, convolves=True, memory=1.2, twice=False) == ("one_pass", 1)
    # The next divisors of 50 are 5 and 10 parts, and 10 would be a loop.
    assert taken(CPU, convolves=True, examples=50) == ("one_pass", 5)
    assert taken(CPU, examples=50)[1] == 10
    assert taken(ACCELERATOR, convolves=True) == ("one_pass", 2)
    assert taken(ACCELERATOR, factors=2000, convolves=True)[1] <= 8


def test_stacked_convolutions_are_dear():
    assert taken(stacked=40, norms=10**4) == ("vmap", 2)
    assert taken(stacked=40, norms=10**4, convolves=True) == ("one_pass", 2)


def test_two_passes_only_where_nothing_else_fits_a_batch_that_is_whole():
    assert taken(size=None, factors=90) == ("one_pass", 1)
    assert taken(size=None, factors=110) == ("two_pass", 1)
    assert taken(size=None, factors=110, twice=False) == ("one_pass", 1)
    assert taken(size=None, factors=110, stacked=80) == ("vmap", 1)


@pytest.mark.parametrize(
    ("memory", "found"),
    [
        (3.0, ("one_pass", 1)),
        (1.2, ("one_pass", 4)),
        (0.5, ("one_pass", 8)),
        (120 * GB, ("one_pass", 4)),
        (1000 * GB, ("one_pass", 1)),
        (1.01, ("one_pass", 4)),
    ],
)
def test_memory_is_what_fits(memory, found):
    assert taken(factors=190, memory=memory, forward=10**6) == found


def test_memory_may_ask_for_two_passes():
    assert taken(size=None, factors=50, memory=1.1) == ("two_pass", 1)
    assert taken(size=None, factors=50, memory=1.6) == ("one_pass", 1)


@pytest.mark.parametrize(
    ("memory", "method", "error", "message"),
    [
        (2, "auto", ValueError, r"at least 65536 bytes if it is an int, got 2\. Pass 2\.0"),
        (0.0, "auto", ValueError, r"must be > 0, got 0\.0"),
        (float("nan"), "auto", ValueError, r"must be > 0, got nan"),
        (True, "auto", TypeError, r"must be a float, .* got True"),
        (1.5, "vmap", ValueError, r"must be None with method='vmap', got 1\.5"),
    ],
)
def test_memory_is_checked(memory, method, error, message):
    with pytest.raises(error, match=message):
        reweighted_grad(mlp, clip, method=method, memory=memory)
    with pytest.raises(error, match=message):
        clipped_grad(mlp, l2_clip_norm=1.0, method=method, memory=memory)


def test_memory_says_nothing_of_gradients_that_are_transformed():
    with pytest.raises(ValueError, match=r"None with a pre_clipping_transform, got 1\.5"):
        clipped_grad(mlp, l2_clip_norm=1.0, pre_clipping_transform=lambda g: g * 2, memory=1.5)


def test_each_platform_takes_its_own_choice(monkeypatch):
    """The program holds both, and a CPU runs its own: in parts, with padding, in eager mode too."""
    data, padding = mlp_batch(), np.arange(6) % 3 == 0
    grad = clipped_grad(mlp, l2_clip_norm=1.0, keep_batch_dim=False, return_grad_norms=True)
    one = jax.jit(grad)(mlp_params(5, 3), data, is_padding_example=padding)
    whole = str(jax.make_jaxpr(grad)(mlp_params(5, 3), data))
    assert "platform_index" not in whole
    monkeypatch.setattr(
        platforms, "CPU", Rates(moving=0, holding=10**9, free=0, written_out_waits=True)
    )
    grad = clipped_grad(mlp, l2_clip_norm=1.0, keep_batch_dim=False, return_grad_norms=True)
    program = str(jax.make_jaxpr(grad)(mlp_params(5, 3), data))
    assert "platform_index" in program
    assert program.count("scan[") == 2 * whole.count("scan[") + 1
    for fun in (jax.jit(grad), grad):
        sums, aux = fun(mlp_params(5, 3), data, is_padding_example=padding)
        close(sums, one[0], 1e-10)
        close(aux.grad_norms[~padding], one[1].grad_norms[~padding], 1e-6)


def test_the_loss_is_traced_once():
    calls = []

    def fun(params, example):
        calls.append(1)
        return mlp(params, example)

    jax.jit(reweighted_grad(fun, clip, microbatch_size="auto")).lower(mlp_params(5, 3), mlp_batch())
    assert len(calls) == 1
    jax.jit(clipped_grad(fun, l2_clip_norm=1.0, keep_batch_dim=False)).lower(
        mlp_params(5, 3), mlp_batch()
    )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("count", "parts", "size"), [(8, 1, None), (8, 2, 4), (9, 2, 3), (12, 5, 2), (13, 2, None)]
)
def test_the_best_size_divides_the_batch(count, parts, size):
    assert best_size(count, parts) == size


@pytest.mark.parametrize("method", ["one_pass", "two_pass", "vmap"])
@pytest.mark.parametrize("labels", [None, {"a": "x", "b": ["y", "x"], "n": "none", "e": "y"}])
def test_norms_by_leaf_or_label(method, labels):
    """The tree has an integer and an empty leaf, which count for nothing."""
    params = {
        "a": normal(0, 4, 3), "b": [normal(1, 3, 2), normal(2, 2)], "n": np.arange(2),
        "e": jnp.zeros((0, 2)),
    }  # fmt: skip
    batch = normal(3, 6, 4)
    fun = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"][0] * p["b"][1])
    grads = stacked_grads(lambda p, x: fun({**params, **p}, x), {k: params[k] for k in "ab"}, batch)
    each = {"a": grads["a"], "b/0": grads["b"][0], "b/1": grads["b"][1]}
    groups = [["a"], ["b/0"], ["b/1"]] if labels is None else [["a", "b/1"], ["b/0"]]
    want, squares = {}, []
    for group in groups:
        square = sum(np.sum(np.square(each[k]), axis=tuple(range(1, each[k].ndim))) for k in group)
        squares.append(square)
        c = np.minimum(1, 0.3 / np.sqrt(square))
        want.update({k: np.tensordot(c, each[k], 1) for k in group})
    by = "leaf" if labels is None else labels
    weights = lambda square: jnp.minimum(1, 0.3 / jnp.sqrt(square))
    found = quick_jit(reweighted_grad(fun, weights, by=by, method=method))(params, batch)
    close(found.sq_norms, np.stack(squares, axis=1), 1e-10)
    close(found.weights, np.minimum(1, 0.3 / np.sqrt(np.stack(squares, axis=1))), 1e-10)
    close([found.grads["a"], *found.grads["b"]], [want[k] for k in each], 1e-10)
    assert found.grads["e"].shape == (0, 2)


def test_by_is_checked():
    with pytest.raises(ValueError, match=r"unknown by, got 'unit'. Use 'global', 'leaf'"):
        reweighted_grad(mlp, clip, by="unit")


def test_weights_are_checked():
    fun = reweighted_grad(mlp, lambda sq_norms: 1.0)
    with pytest.raises(ValueError, match=r"one number per example, got shape \(\) for .*\(6,\)"):
        fun(mlp_params(5, 3), mlp_batch())


def test_methods_are_checked():
    with pytest.raises(ValueError, match=r"unknown method, got 'fast'. Use one of .*'two_pass'"):
        reweighted_grad(mlp, clip, method="fast")


def chosen(fun, params, data, platform="accelerator"):
    return explain(fun, params, data).schedules[platform][0].method


def ones(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_auto_takes_one_pass_for_an_mlp():
    wide = [(ones((m, n)), ones((n,))) for m, n in ((784, 1024), (1024, 10))]
    assert chosen(mlp, wide, (ones((256, 784)), ones((256, 10)))) == "one_pass"


def test_auto_stacks_few_long_examples():
    """The norm costs as many operations as the gradient itself."""
    fun = lambda w, x: jnp.sum(jnp.sin(x @ w))
    assert chosen(fun, ones((256, 256)), ones((4, 2048, 256))) == "vmap"
    assert chosen(fun, ones((256, 256)), ones((128, 16, 256))) == "one_pass"
