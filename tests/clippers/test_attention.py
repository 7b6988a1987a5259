"""QK-Clip: the logits of real attentions, before and after."""

import operator

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import quick
from tools.oracles import assert_close, assert_same_bits, f64

import optaxclip
from optaxclip import latent_attention_heads, qk_clip, qk_clip_params
from optaxclip.clippers.attention import Heads

RNG = np.random.default_rng(0)
WIDTH, HEADS, DIM = 6, 4, 3
X = RNG.standard_normal((5, WIDTH))


def normal(*shape):
    return np.float32(RNG.standard_normal(shape))


def logits_of(q, k):
    """`[heads, queries, keys]` of queries and keys [tokens, heads, dim], in double precision."""
    k = np.repeat(f64(k), q.shape[1] // k.shape[1], axis=1)
    return np.einsum("qhd,khd->hqk", f64(q), k) / np.sqrt(q.shape[-1])


def gammas(logits, tau):
    return np.minimum(1, tau / logits.max((1, 2)))


def tau_between(logits):
    """A bound that half of the heads exceed."""
    return float(np.median(logits.max((1, 2))))


# --- layouts: of each, its parameters and how logits follow from them ---


def flax_layout(keys=HEADS):
    params = {
        "query": {"kernel": normal(WIDTH, HEADS, DIM), "bias": normal(HEADS, DIM)},
        "key": {"kernel": normal(WIDTH, keys, DIM), "bias": normal(keys, DIM)},
        "value": {"kernel": normal(WIDTH, keys, DIM), "bias": normal(keys, DIM)},
    }

    def logits(params):
        one = lambda p: np.einsum("td,dhe->the", X, f64(p["kernel"])) + f64(p["bias"])
        return logits_of(one(params["query"]), one(params["key"]))

    return params, logits


def rows_layout(keys=HEADS):
    params = {
        "q_proj": {"weight": normal(HEADS * DIM, WIDTH), "bias": normal(HEADS * DIM)},
        "k_proj": {"weight": normal(keys * DIM, WIDTH), "bias": normal(keys * DIM)},
        "v_proj": {"weight": normal(keys * DIM, WIDTH)},
    }

    def logits(params):
        one = lambda p: (X @ f64(p["weight"]).T + f64(p["bias"])).reshape(len(X), -1, DIM)
        return logits_of(one(params["q_proj"]), one(params["k_proj"]))

    return params, logits


def columns_layout(keys=HEADS):
    params = {
        "q_proj": {"kernel": normal(WIDTH, HEADS * DIM), "bias": normal(HEADS * DIM)},
        "k_proj": {"kernel": normal(WIDTH, keys * DIM), "bias": normal(keys * DIM)},
    }

    def logits(params):
        one = lambda p: (X @ f64(p["kernel"]) + f64(p["bias"])).reshape(len(X), -1, DIM)
        return logits_of(one(params["q_proj"]), one(params["k_proj"]))

    return params, logits


LAYOUTS = {"flax": flax_layout, "rows": rows_layout, "columns": columns_layout}


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_of_each_head_come_down_to_tau(layout, alpha):
    params, logits = LAYOUTS[layout]()
    before = logits(params)
    tau = tau_between(before)
    found = quick.run(
        lambda p, s: qk_clip_params(p, {"": s}, tau, alpha=alpha), params, before.max((1, 2))
    )
    gamma = gammas(before, tau)
    assert 0 < np.sum(gamma < 1) < HEADS
    np.testing.assert_allclose(logits(found), gamma[:, None, None] * before, rtol=2e-5, atol=1e-6)
    for name in params.keys() - {"query", "key", "q_proj", "k_proj"}:
        assert_same_bits(found[name], params[name])


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_query_heads_that_share_a_key_share_the_gamma_of_the_largest(layout, keys):
    params, logits = LAYOUTS[layout](keys)
    before = logits(params)
    tau = float(np.sort(before.max((1, 2)))[-2]) - 1e-3
    found = quick.run(lambda p, s: qk_clip_params(p, {"": s}, tau), params, before.max((1, 2)))
    gamma = np.repeat(gammas(before, tau).reshape(keys, -1).min(1), HEADS // keys)
    np.testing.assert_allclose(logits(found), gamma[:, None, None] * before, rtol=2e-5, atol=1e-6)
    assert logits(found).max() <= tau * (1 + 1e-5)


def latent(merged):
    """Multi-head latent attention: no-position and rotary parts, one rotary key for all heads."""
    rank, nope, rope, value = 5, 4, 2, 3
    q, kv, shared = (
        normal(rank, HEADS, nope + rope),
        normal(rank, HEADS, nope + value),
        normal(5, rope),
    )
    rows = lambda w: w.reshape(rank, -1).T
    if merged:
        params = {
            "q_b_proj": {"weight": rows(q)}, "kv_b_proj": {"weight": rows(kv)},
            "kv_a_proj_with_mqa": {"weight": shared.T},
        }  # fmt: skip
    else:
        params = {"wq_b": {"kernel": q}, "wkv_b": {"kernel": kv}, "wkv_a": {"kernel": shared}}
    names, c = [*params], RNG.standard_normal((7, rank))

    def logits(params):
        q, kv, shared = (f64(*params[name].values()) for name in names)
        if merged:
            q, kv, shared = q.T.reshape(rank, HEADS, -1), kv.T.reshape(rank, HEADS, -1), shared.T
        q, k = np.einsum("tr,rhd->thd", c, q), np.einsum("tr,rhd->thd", c, kv)[..., :nope]
        rotary = np.broadcast_to((c @ shared)[:, None], (7, HEADS, rope))
        return logits_of(q, np.concatenate([k, rotary], -1))

    return params, logits, latent_attention_heads(nope)


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("merged", [False, True])
def test_latent_attention(merged, alpha):
    """As in the paper: the shared rotary key stays, and its query takes gamma whole."""
    params, logits, heads = latent(merged)
    before = logits(params)
    tau = tau_between(before)
    found = quick.run(
        lambda p, s: qk_clip_params(p, {"": s}, tau, alpha=alpha, heads=heads),
        params,
        before.max((1, 2)),
    )
    gamma = gammas(before, tau)
    np.testing.assert_allclose(logits(found), gamma[:, None, None] * before, rtol=2e-5, atol=1e-6)
    query, both, shared = params
    assert_same_bits(found[shared], params[shared])
    values = lambda p: f64(*p[both].values())
    if not merged:
        assert_same_bits(found[both]["kernel"][..., 4:], params[both]["kernel"][..., 4:])
        by_hand = f64(params[query]["kernel"]) * gamma[:, None] ** np.array(4 * [alpha] + 2 * [1])
        np.testing.assert_allclose(found[query]["kernel"], by_hand, rtol=1e-6)
    assert not np.array_equal(values(found), values(params))


def test_dimensions_without_position_lie_within_a_head():
    params, logits, _ = latent(merged=False)
    largest = logits(params).max((1, 2))
    with pytest.raises(ValueError, match=r"parts of a head must lie within it.*of 7 dimensions at"):
        qk_clip_params(params, {"": largest}, heads=latent_attention_heads(128))
    with pytest.raises(ValueError, match="nope_dim must be >= 1, got 0"):
        latent_attention_heads(0)


def test_layers_stacked_in_front():
    one, two = flax_layout()[0], flax_layout()[0]
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), one, two)
    logits = np.float32([[50, 150, 400, 100], [300, 20, 30, 40]])
    found = quick.run(lambda p: qk_clip_params({"scan": p}, {"scan": logits}), stacked)["scan"]
    for i, p in enumerate((one, two)):
        alone = quick.run(lambda p, s: qk_clip_params(p, {"": s}), p, logits[i])
        assert_close(jax.tree.map(operator.itemgetter(i), found), alone)


# --- modules as Flax and Equinox make them ---


def test_modules_of_flax_linen():
    model = nn.MultiHeadDotProductAttention(HEADS)
    variables = model.init(jax.random.key(0), np.ones((1, 5, WIDTH + 2)))
    logits = {"params": np.float32([400, 50, 50, 100])}
    found = qk_clip_params(variables, logits)["params"]
    np.testing.assert_allclose(
        found["query"]["kernel"][:, 0], variables["params"]["query"]["kernel"][:, 0] / 2, rtol=1e-6
    )
    assert_same_bits(found["query"]["kernel"][:, 1:], variables["params"]["query"]["kernel"][:, 1:])
    assert_same_bits(found["out"], variables["params"]["out"])


def test_modules_of_flax_nnx_in_a_list():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List(
                [nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs) for _ in range(2)]
            )

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    logits = {"blocks": {0: jnp.array([1.0, 2.0]), 1: jnp.array([400.0, 2.0])}}
    found = qk_clip_params(params, logits)
    before, after = (nnx.to_pure_dict(x)["blocks"] for x in (params, found))
    assert_same_bits(after[0], before[0])
    np.testing.assert_allclose(
        after[1]["key"]["kernel"][:, 0], before[1]["key"]["kernel"][:, 0] / 2, rtol=1e-6
    )


def test_modules_of_equinox():
    model = eqx.nn.MultiheadAttention(HEADS, 8, use_query_bias=True, key=jax.random.key(0))
    found = qk_clip_params(model, {"": jnp.array([400.0, 50.0, 50.0, 50.0])})
    assert isinstance(found, eqx.nn.MultiheadAttention)
    before, after = (np.asarray(m.query_proj.weight).reshape(HEADS, 2, 8) for m in (model, found))
    np.testing.assert_allclose(after[0], before[0] / 2, rtol=1e-6)
    assert_same_bits(after[1:], before[1:])
    assert_same_bits(found.value_proj.weight, model.value_proj.weight)


# --- as the last of a chain ---


@pytest.fixture(scope="module")
def model():
    return {"a": flax_layout()[0], "b": flax_layout(2)[0], "head": normal(3)}


LOGITS = {"a": np.float32([400, 50, -3, 101]), "b": np.float32([90, 100, 100, 30])}


def test_it_scales_what_the_update_leads_to(model):
    grads = jax.tree.map(lambda x: np.float32(0.1) * x + np.float32(0.01), model)
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), qk_clip())

    def run(params):
        updates, state = tx.update(grads, tx.init(params), params, max_logits=LOGITS)
        return updates, optax.apply_updates(params, updates), state

    updates, found, state = quick.run(run, model)
    moved = jax.tree.map(lambda w, g: w - g, model, grads)
    expected = quick.run(lambda p: qk_clip_params(p, LOGITS), moved)
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    plain = jax.tree.map(np.negative, grads)
    assert_same_bits(updates["b"], plain["b"])
    assert_same_bits(updates["a"]["query"]["kernel"][:, 1:3], plain["a"]["query"]["kernel"][:, 1:3])
    stats = optaxclip.clip_stats(state)["qk_clip"]
    assert (stats.pre_clip_norm, stats.threshold, stats.clip_factor) == (400, 100, 0.25)
    assert stats.groups.names == ("a", "b")
    np.testing.assert_array_equal(stats.groups.pre_clip_norm, [400, 100])
    np.testing.assert_array_equal(stats.groups.clipped_count, [1, 0])


def test_logits_that_are_no_numbers_change_nothing_and_are_counted(model):
    logits = {"a": np.float32([np.nan, np.inf, 1, 1]), "b": LOGITS["b"]}
    tx = qk_clip()
    zeros = jax.tree.map(np.zeros_like, model)
    updates, state = quick.run(lambda p: tx.update(zeros, tx.init(p), p, max_logits=logits), model)
    assert_same_bits(updates, zeros)
    assert optaxclip.clip_stats(state)["qk_clip"].nonfinite_count == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64])
def test_types_stay_in_a_scan(model, dtype):
    schedule = lambda count: 100.0 - 30.0 * count.astype(np.float32)
    tx = optax.chain(optax.sgd(1e-3), qk_clip(schedule))
    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("strict"):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), model)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params, max_logits=LOGITS)
            return (optax.apply_updates(params, updates), state), state[1].stats.threshold

        _, bounds = quick.run(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 3), params)
    np.testing.assert_allclose(bounds, [100, 70, 40], rtol=1e-6)


def test_inject_hyperparams_and_states_in_files(model):
    tx = optax.inject_hyperparams(qk_clip, static_args=("heads",), hyperparam_dtype=np.float32)()
    zeros = jax.tree.map(np.zeros_like, model)
    step = lambda p: tx.update(zeros, tx.init(p), p, max_logits=LOGITS)
    updates, state = quick.run(step, model)
    plain = quick.run(
        lambda p: qk_clip().update(zeros, qk_clip().init(p), p, max_logits=LOGITS), model
    )
    assert_close(updates, plain[0])
    as_dict = flax.serialization.to_state_dict(state)
    assert_same_bits(flax.serialization.from_state_dict(state, as_dict), state)


# --- mistakes ---


def call(params, logits, **options):
    tx = qk_clip(**options)
    return tx.update(params, tx.init(params), params, max_logits=logits)


@pytest.mark.parametrize(
    ("match", "run"),
    [
        ("tau must be > 0, got 0", lambda m: qk_clip(0)),
        ("tau must be >= 0, got -1", lambda m: qk_clip(-1.0)),
        (r"alpha must be in \[0, 1\], got 2", lambda m: qk_clip(alpha=2.0)),
        ("needs the attention logits, got no max_logits", lambda m: call(m, None)),
        ("needs params, got None",
         lambda m: qk_clip().update(m, qk_clip().init(m), max_logits=LOGITS)),
        ("got b in only one of the two. The attentions are at a, b",
         lambda m: call(m, {"a": LOGITS["a"]})),
        ("got c in only one", lambda m: call(m, LOGITS | {"c": LOGITS["a"]})),
        (r"logits must be one for each query head, got 3 for a/query/\w+ of shape",
         lambda m: call(m, LOGITS | {"a": np.ones(3)})),
        (r"logits \[layers, heads\] go with layers stacked in front, got \(2, 4\) for a/key",
         lambda m: call(m, LOGITS | {"a": np.ones((2, 4))})),
        ("needs queries and keys, got a tree without", lambda m: qk_clip().init({"w": m["head"]})),
        ("must have queries and keys, got only a/query/bias, a/query/kernel at a",
         lambda m: qk_clip().init({"a": {"query": m["a"]["query"]}})),
        ("query heads must be a multiple of key heads, got .3, 4. at a",
         lambda m: call({"a": {"query": m["a"]["query"],
                               "key": {"bias": np.ones((3, DIM), np.float32)}}},
                        {"a": LOGITS["a"]})),
        ("queries and keys that are normalised cannot be clipped by their weights, got a/query_ln",
         lambda m: qk_clip().init({"a": m["a"] | {"query_ln": {"scale": m["head"]}}})),
    ],
)  # fmt: skip
def test_mistakes(model, match, run):
    with pytest.raises(ValueError, match=match):
        run(model)


def test_names_of_ones_own():
    def heads(path, leaf):
        return {"wq": Heads(0, query=slice(None)), "wk": Heads(0, key=slice(None))}.get(path)

    params = {"wq": normal(2, 3, 5), "wk": normal(2, 3, 5)}
    found = qk_clip_params(params, {"": np.float32([400, 1])}, heads=heads)
    np.testing.assert_allclose(found["wq"][0], params["wq"][0] / 2, rtol=1e-6)
    assert_same_bits(found["wk"][1], params["wk"][1])
