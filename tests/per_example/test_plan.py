import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools.agreement import normal

from optaxclip.per_example import explain, per_example_grad

PARAMS = {
    "w": normal(0, 4, 3),
    "v": normal(1, 3),
    "table": normal(2, 9, 4),
    "unused": normal(3, 2),
}


def loss(params, ids):
    w = params["w"] / jnp.linalg.norm(params["w"])
    return jnp.sum(jnp.sin(params["table"][ids] @ w + params["v"]))


IDS = np.array([[1, 2], [3, 3], [0, 8]], np.int32)


def test_rows():
    plan = explain(loss, PARAMS, IDS)
    assert plan.fallbacks == ("w",)
    rows = plan.to_dict()
    assert "test_plan.py" in rows["w"]["fallback"]
    assert rows["table"]["forms"] == ("Gathered([3,2], [3,2,4])",)
    assert rows["table"]["norm_methods"] == ("segment sum",)
    itemsize = PARAMS["table"].dtype.itemsize
    assert rows["table"]["stacked_bytes"] == 3 * 9 * 4 * itemsize
    assert rows["table"]["bytes"] == 3 * 2 * (4 * itemsize + IDS.dtype.itemsize)
    assert rows["unused"]["bytes"] == 0
    assert [row.uses for row in plan.rows] == [1, 0, 1, 1]
    assert plan.costs.factor_bytes == sum(row.bytes for row in plan.rows)
    assert plan.costs.parameter_bytes == sum(x.nbytes for x in PARAMS.values())


def test_bytes_held_are_those_of_the_compiled_program():
    """The forms are what `per_example_grad` returns, and XLA says how large that is."""
    w, batch = jnp.ones((40, 30)), jnp.ones((8, 16, 40))
    fun = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    compiled = jax.jit(per_example_grad(fun)).lower(w, batch).compile()
    held = compiled.memory_analysis().output_size_in_bytes
    assert explain(fun, w, batch).costs.factor_bytes == pytest.approx(held, rel=0.01)


def test_uses_are_counted_once_each():
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["a"]) @ p["a"].T) + x[0] * p["b"] * p["c"]

    params = {"a": normal(0, 4, 4), "b": jnp.ones(()), "c": jnp.ones(()), "n": jnp.arange(2)}
    plan = explain(loss, params, normal(1, 5, 4))
    assert {row.path: row.uses for row in plan.rows} == {"a": 2, "b": 1, "c": 1, "n": 0}


def test_work():
    """An MLP's layer: rank-one norms, and a sum that is a plain gradient's product."""
    b, i, o = 64, 128, 32
    plan = explain(lambda w, x: jnp.sum(x @ w), jnp.ones((i, o)), jnp.ones((b, i)))
    (row,) = plan.rows
    assert row.sum_flops == 2 * b * i * o + b * o  # weighted first
    assert row.norm_flops == 2 * b * (i + o) + 2 * b  # the squares, their product, one sum
    assert plan.plain_flops == pytest.approx(2 * 2 * b * i * o, rel=0.05)


def test_printed():
    lines = str(explain(loss, PARAMS, IDS)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["parameter", "shape", "uses"]
    assert lines[1].index("9x4") == lines[0].index("shape")
    assert "4x3" in lines[4]
    assert lines[5].startswith("    stacked: ")
    taken = [line.rsplit(maxsplit=6)[:3] for line in lines if line.startswith("on a")]
    assert taken == [["on a CPU", "one_pass", "1"], ["on an accelerator", "one_pass", "1"]]
    assert lines[-1].split()[:2] == ["then", "two_pass"]


def test_long_paths_lose_their_middle():
    params = {"encoder": {"block_with_a_very_long_name": {"attention": {"kernel": jnp.ones(3)}}}}
    plan = explain(lambda p, x: jnp.sum(x * jax.tree.leaves(p)[0]), params, jnp.ones((2, 3)))
    assert "encoder/block_w…ttention/kernel" in str(plan)
    assert plan.rows[0].path.endswith("very_long_name/attention/kernel")


def test_shapes_are_enough():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, IDS))
    assert explain(loss, *abstract) == explain(loss, PARAMS, IDS)


def test_further_arguments_may_be_anything():
    def fun(params, batch, mode, *, scale):
        assert mode == "train"
        return jnp.sum(batch @ params) * scale, {"scale": scale}

    plan = explain(fun, jnp.ones(3), jnp.ones((2, 3)), "train", scale=2.0, has_aux=True)
    assert plan.rows[0].path == "the root"
    assert "the root" in repr(plan)


def test_what_is_taken_is_said_with_what_is_not():
    """Long examples: stacking is less work than one pass, which per_example_grad takes anyway."""
    fun = lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w))
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 256), (4, 2048, 256)))
    plan = explain(fun, *shapes)
    assert {ranked[0].method for ranked in plan.schedules.values()} == {"vmap"}
    held = plan.rows[0].bytes
    assert f"over the whole batch, and holds {held / 1e6:.3g} MB: where" in str(plan)
    assert str(plan).endswith("clipped_grad is better.")
