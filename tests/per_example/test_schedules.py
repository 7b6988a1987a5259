"""All schedules give the same numbers; "auto" picks from shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal, stacked_grads
from tools.models import mlp, mlp_batch, mlp_params
from tools.quick import quick_jit

from optaxclip.per_example import explain, reweighted_grad
from optaxclip.per_example.schedules.choice import best_size
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


@pytest.mark.parametrize(
    ("factor", "residual", "parameter", "parts"),
    [(50, 100, 1, 2), (401, 100, 1, 5), (50, 100, 20, 1), (1, 2, 0.1, 1)],
)
def test_parts_bring_what_is_held_down_to_a_plain_gradient(factor, residual, parameter, parts):
    costs = Costs(
        parameter_bytes=int(parameter * 10**6), factor_bytes=factor * 10**6,
        stacked_bytes=10**12, residual_bytes=residual * 10**6, norm_flops=0,
    )  # fmt: skip
    assert costs.parts() == parts
    assert costs.parts(100) == max(parts, 2)


def test_half_a_batch_asks_for_as_many_parts_as_the_whole():
    """Of the residuals 40 MB are parameters, which a batch twice as large has no more of."""
    both = {"parameter_bytes": 40 * 10**6, "stacked_bytes": 10**12, "norm_flops": 0}
    half = Costs(factor_bytes=300 * 10**6, residual_bytes=60 * 10**6, **both)
    whole = Costs(factor_bytes=600 * 10**6, residual_bytes=80 * 10**6, **both)
    assert half.parts(2) == whole.parts() == 8


@pytest.mark.parametrize(
    ("count", "parts", "size"), [(8, 1, None), (8, 2, 4), (9, 2, 3), (12, 5, 2), (13, 2, None)]
)
def test_the_best_size_divides_the_batch(count, parts, size):
    class Asking:
        def parts(self):
            return parts

    assert best_size(count, Asking()) == size


def test_weights_are_checked():
    fun = reweighted_grad(mlp, lambda sq_norms: 1.0)
    with pytest.raises(ValueError, match=r"one number per example, got shape \(\) for .*\(6,\)"):
        fun(mlp_params(5, 3), mlp_batch())


def test_methods_are_checked():
    with pytest.raises(ValueError, match=r"unknown method, got 'fast'. Use one of .*'two_pass'"):
        reweighted_grad(mlp, clip, method="fast")


def chosen(fun, params, data):
    return explain(fun, params, data).costs.method


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


@pytest.mark.parametrize(("stacked_bytes", "method"), [(10**8, "vmap"), (10**10, "one_pass")])
def test_auto_stacks_where_that_holds_less(stacked_bytes, method):
    costs = Costs(
        parameter_bytes=10**6, factor_bytes=10**9, stacked_bytes=stacked_bytes,
        residual_bytes=10**8, norm_flops=0,
    )  # fmt: skip
    assert costs.method == method
