"""Every pair of forms against their stacked arrays."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import close, normal
from tools.quick import run

from optaxclip.per_example import Dense, Gathered, Outer, Sum, per_example_norms
from optaxclip.per_example.forms import contractions
from optaxclip.per_example.forms.forms import add, scale
from optaxclip.per_example.forms.layout import Layout

B, SHAPE = 3, (6, 4)
ROWS = Layout(SHAPE, jnp.dtype("float64"), ((), (0,), (1,)))
COLUMNS = ROWS.swapped()
WHOLE = Layout(SHAPE, jnp.dtype("float64"), ((), (0, 1), ()))
BATCHED = Layout(SHAPE, jnp.dtype("float64"), ((0,), (1,), ()))
SPLIT = Layout(SHAPE, jnp.dtype("float64"), ((0,), (1, 3), (2,)), (2, 3, 2, 2))
IDS = np.array([[0, 2, 2, 5], [1, 1, 1, 1], [3, 0, 4, 3]])


def outer(seed, layout, t):
    k, i, o = layout.sizes
    return Outer(normal(seed, B, k, t, i), normal(seed + 1, B, k, t, o), layout)


def forms():
    found = {
        "outer rows T=1": outer(10, ROWS, 1),
        "outer rows T=2": outer(20, ROWS, 2),
        "outer rows T=9": outer(30, ROWS, 9),
        "outer columns T=9": outer(40, COLUMNS, 9),
        "outer whole": outer(70, WHOLE, 2),
    }
    found["outer batched"] = outer(50, BATCHED, 2)
    found["outer split"] = outer(52, SPLIT, 2)
    found["outer empty"] = outer(54, ROWS, 0)
    found["gathered rows"] = Gathered(IDS, normal(60, B, 4, 4), ROWS)
    found["gathered more rows"] = Gathered((5 - IDS)[:, :2], normal(61, B, 2, 4), ROWS)
    found["gathered columns"] = Gathered(IDS % 4, normal(62, B, 4, 6), COLUMNS)
    found["dense"] = Dense(normal(63, B, *SHAPE))
    found["sum"] = Sum((found["outer rows T=2"], found["gathered rows"], found["dense"]))
    return found


NAMES = tuple(forms())
WEIGHTS = np.array([1.0, -2.0, 0.5])


@pytest.fixture(scope="module")
def answers():
    """Of each form alone, from one program."""

    def compute(found):
        return {
            name: {
                "stacked": form.materialize(),
                "norm": form.sq_norm(),
                "sum": form.weighted_sum(jnp.asarray(WEIGHTS)),
                "scaled": scale(form, -3.0).materialize(),
            }
            for name, form in found.items()
        }

    return run(compute, forms())


@pytest.mark.parametrize("name", NAMES)
def test_norms_sums_and_stacks(name, answers):
    form, found = forms()[name], answers[name]
    stacked = found["stacked"]
    expected = {
        "stacked": stacked,
        "norm": np.sum(stacked**2, axis=(1, 2)),
        "sum": np.tensordot(WEIGHTS, stacked, 1),
        "scaled": -3 * stacked,
    }
    close(found, expected, 1e-12)
    assert (form.shape, form.dtype, stacked.shape) == (SHAPE, jnp.float64, (B, *SHAPE))


def test_stacks_are_the_definition(answers):
    """Materialize, the yardstick of the other tests, written out by hand."""
    found, k = forms(), np.arange(B)
    form = found["outer columns T=9"]
    by_hand = {"outer columns T=9": np.einsum("bti,bto->boi", form.left[:, 0], form.right[:, 0])}
    form, table = found["gathered rows"], np.zeros((B, *SHAPE))
    for b, t in itertools.product(k, range(4)):
        table[b, IDS[b, t]] += form.right[b, t]
    by_hand["gathered rows"] = table
    form = found["outer split"]
    split = np.einsum("bkti,bkto->bkio", form.left, form.right).reshape(B, 2, 3, 2, 2)
    by_hand["outer split"] = split.transpose(0, 1, 2, 4, 3).reshape(B, *SHAPE)
    close({name: answers[name]["stacked"] for name in by_hand}, by_hand, 1e-12)


@pytest.mark.slow
def test_every_pair(answers):
    pairs = functools.partial(itertools.combinations_with_replacement, r=2)

    def products(found):
        sums = (add([x, y]) for x, y in pairs(found.values()))
        inner = [x.inner(y) for x, y in itertools.product(found.values(), repeat=2)]
        return inner, [(total.sq_norm(), total.materialize()) for total in sums]

    # In the order in which jit hands over a dict.
    stacked = [answers[name]["stacked"] for name in sorted(NAMES)]
    inner, sums = run(products, forms())
    for product, (x, y) in zip(inner, itertools.product(stacked, repeat=2), strict=True):
        close(product, np.sum(x * y, axis=(1, 2)), 1e-12)
    for (norm, total), (x, y) in zip(sums, pairs(stacked), strict=True):
        close(norm, np.sum((x + y) ** 2, axis=(1, 2)), 1e-12)
        close(total, x + y, 1e-12)


def test_forms_of_one_layout_are_joined():
    found = forms()
    rows, columns = found["outer rows T=2"], found["outer columns T=9"]
    joined = add([rows, columns])
    assert isinstance(joined, Outer)
    assert joined.left.shape[2] == 11
    assert isinstance(add([found["sum"], found["sum"]]), Sum)
    assert len(add([found["sum"], found["sum"]]).terms) == 3


def test_a_wide_table_is_never_stacked():
    """No buffer of B x V x D or T x T: 2 x 10^9 rows would not fit."""
    t, rows = 20_000, 2_000_000
    layout = Layout((rows, 1000), jnp.dtype("float32"), ((), (0,), (1,)))
    ids = jax.ShapeDtypeStruct((2, t), jnp.int32)
    right = jax.ShapeDtypeStruct((2, t, 1000), jnp.float32)
    norm = jax.jit(lambda f: f.sq_norm()).lower(Gathered(ids, right, layout)).compile()
    assert norm.memory_analysis().temp_size_in_bytes < 5 * 2 * t * 1000 * 4


def peak(fun, *args):
    """Bytes of temporaries, compiled for arrays of these shapes and never run."""
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_an_embedding_is_never_stacked():
    """50,000 x 512 for B = 64 examples of 256 tokens: no B x V x D, no V x V."""
    loss = lambda table, ids: jnp.sum(jnp.sin(table[ids]))
    b, t, v, d = 64, 256, 50_000, 512
    assert peak(per_example_norms(loss), f32(v, d), i32(b, t)) < 5 * b * t * d * 4


# T, I and O such that T x T or I x O for each example would take 4 GB or more.
LONG = {"gram": (4096, 16384, 16384), "instantiate": (8192, 8192, 4096)}


@pytest.mark.parametrize("method", LONG)
def test_norms_of_large_factors_take_little_more_memory(method):
    t, i, o = LONG[method]
    form = Outer(
        f32(64, 1, t, i), f32(64, 1, t, o), Layout((i, o), jnp.dtype("float32"), ((), (0,), (1,)))
    )
    assert form.norm_method == method
    assert min(t * t, i * o) * 64 * 4 > 2**32 - 1
    assert peak(lambda form: form.sq_norm(), form) < 0.3 * (form.left.size + form.right.size) * 4


@pytest.mark.parametrize(("rows", "s"), [(50_000, 8192), (256, 16384)])
def test_cross_terms_of_a_tied_head_take_little_more_memory(rows, s):
    b, d = 8, 64
    layout = Layout((rows, d), jnp.dtype("float32"), ((), (0,), (1,)))
    head = Outer(f32(b, 1, s, rows), f32(b, 1, s, d), layout)
    bytes_ = peak(lambda x, y: x.inner(y), Gathered(i32(b, s), f32(b, s, d), layout), head)
    assert bytes_ < 0.6 * b * s * min(s, rows) * 4


def test_sums_by_blocks(monkeypatch):
    """Blocks of a few numbers, with a rest."""
    found = forms()
    names = "rows T=9", "columns T=9", "split", "whole"
    found = [found[f"outer {n}"] for n in names] + [
        found["gathered rows"],
        found["gathered columns"],
    ]

    def products(found):
        return [x.inner(y) for x, y in itertools.combinations_with_replacement(found, 2)]

    expected = run(products, found)
    monkeypatch.setattr(contractions, "_BLOCK_BYTES", 400)
    close(run(lambda x: products(x), found), expected, 1e-12)


def test_gram_sums_that_cancel_stay_nonnegative():
    left = np.stack([normal(0, 8), normal(0, 8)])[None, None] * 1e3
    right = np.stack([normal(1, 8), -normal(1, 8)])[None, None] * 1e3
    form = Outer(left, right * (1 + 1e-12), Layout((8, 8), left.dtype, ((), (0,), (1,))))
    assert form.norm_method == "gram"
    assert run(lambda form: form.sq_norm(), form)[0] >= 0
    assert jax.device_put(form).sq_norm()[0] >= 0  # outside jit
