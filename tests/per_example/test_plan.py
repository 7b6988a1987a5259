import jax
import jax.numpy as jnp
from agreement import normal

from optaxclip.per_example import explain

with jax.enable_x64(True):
    PARAMS = {
        "w": normal(0, 4, 3),
        "v": normal(1, 3),
        "table": normal(2, 9, 4),
        "unused": normal(3, 2),
    }


def loss(params, ids):
    w = params["w"] / jnp.linalg.norm(params["w"])
    return jnp.sum(jnp.sin(params["table"][ids] @ w + params["v"]))


IDS = jnp.array([[1, 2], [3, 3], [0, 8]])


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


def test_printed():
    lines = str(explain(loss, PARAMS, IDS)).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:3] == ["parameter", "shape", "forms"]
    assert "4x3" in lines[4]
    assert lines[1].index("9x4") == lines[0].index("shape")


def test_shapes_are_enough():
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, IDS))
    assert explain(loss, *abstract) == explain(loss, PARAMS, IDS)
