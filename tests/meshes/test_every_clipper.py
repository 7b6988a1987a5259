"""Every clipper of the table, over a matrix of meshes: what it does to the unsharded tree.

All of them are updated in one compiled function, so that a mesh costs one compilation.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.clippers import CLIPPERS, make
from tools.hlo import collectives
from tools.quick import QUICK

import optaxclip

SHAPES = {
    "body": {"bias": (8,), "kernel": (8, 16), "odd": {"kernel": (5, 3)}},
    "head": {"bias": (), "kernel": (16, 8)},
}


def split(bias, kernel, head):
    """How leaves are split; some are whole."""
    return {
        "body": {"bias": bias, "kernel": kernel, "odd": {"kernel": P()}},
        "head": {"bias": P(), "kernel": head},
    }


BOTH = ("data", "model")
# name: (mesh, how leaves are split)
LAYOUTS = {
    "fsdp 8x1": ((8, 1), split(P("data"), P("data"), P(None, "data"))),
    "tensor parallel 1x8": ((1, 8), split(P("model"), P(None, "model"), P("model"))),
    "mixed 2x4": ((2, 4), split(P("model"), P("data", "model"), P("model", "data"))),
}
# Singular values have a tolerance and a test of their own.
NAMES = [name for name in CLIPPERS if not name.startswith("singular")]
# What is updated where: all on the mesh that splits leaves in every way. The meshes along one axis
# split the same leaves along one dimension or the other, which only units can tell apart.
ROWS = ["value", "global", "leaf", "unit", "agc", "clippy", "zclip-published-units", "spam"]
COLUMNS = ["global-max", "leaf-rms", "group", "unit", "adagc", "adaclip"]
OTHERS = ["soft-elements", "feedback", "skip-outliers"]
UPDATED = {
    "fsdp 8x1": ROWS,
    "tensor parallel 1x8": COLUMNS,
    "mixed 2x4": NAMES,
    "explicit": sorted({*ROWS, *COLUMNS, *OTHERS}),
}
STEPS = 4


def is_spec(x):
    return isinstance(x, P)


def make_mesh(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, BOTH, axis_types=(kind,) * 2)


def put(mesh, specs, tree):
    return jax.tree.map(
        lambda s, x: jax.device_put(x, NamedSharding(mesh, s)), specs, tree, is_leaf=is_spec
    )


def arrays(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.float32(rng.normal(size=s)), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
    )


def gradients():
    """An ordinary step, a spike on one device, a NaN on one device, an ordinary step."""
    trees = [arrays(seed) for seed in range(STEPS)]
    trees[1]["head"]["kernel"][-1, -1] *= 1e3
    trees[2]["body"]["kernel"][0, 0] = np.nan
    return trees


def transforms(names):
    return {name: make(name) for name in names}


def update_all(txs):
    def update(grads, states, params):
        found = {k: tx.update(grads, states[k], params) for k, tx in txs.items()}
        return {k: u for k, (u, _) in found.items()}, {k: s for k, (_, s) in found.items()}

    return update


def run(txs, place=lambda tree: tree, everywhere=None):
    """Updates and states of all steps, and the compiled step."""
    params = place(arrays(99))
    states = {k: tx.init(params) for k, tx in txs.items()}
    if everywhere is not None:  # otherwise the second step, whose state is, compiles again
        states = jax.tree.map(
            lambda x: x if len(x.devices()) > 1 else jax.device_put(x, everywhere), states
        )
    step = jax.jit(update_all(txs)).lower(params, states, params).compile(QUICK)
    found = []
    for grads in gradients():
        updates, states = step(place(grads), states, params)
        found.append((updates, states))
    return found, step


@pytest.fixture(scope="module")
def alone():
    """What every clipper does on one device."""
    return run(transforms(NAMES))[0]


def assert_same(found, expected):
    """Equal to 1e-6, of the largest number of a leaf where it is not of each."""
    for step, (got, want) in enumerate(zip(found, expected, strict=True)):
        for name in got[0]:
            pairs = zip(
                jax.tree.leaves_with_path([got[0][name], got[1][name]]),
                jax.tree.leaves([want[0][name], want[1][name]]),
                strict=True,
            )
            for (path, x), y in pairs:
                x, y = np.asarray(x), np.asarray(y)
                at = f"step {step}, {name}{jax.tree_util.keystr(path)}"
                finite = np.abs(y[np.isfinite(y)])
                atol = 1e-6 * finite.max() if finite.size else 0.0
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol, err_msg=at)


@pytest.mark.parametrize("layout", UPDATED)
def test_jit(layout, alone):
    """With `NamedSharding`; "explicit" with axes whose types carry it."""
    names = UPDATED[layout]
    explicit = layout == "explicit"
    shape, specs = LAYOUTS["mixed 2x4" if explicit else layout]
    mesh = make_mesh(shape, AxisType.Explicit if explicit else AxisType.Auto)
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        found, step = run(
            transforms(names), functools.partial(put, mesh, specs), NamedSharding(mesh, P())
        )
    assert_same(found, alone)
    flat_specs = jax.tree.leaves(specs, is_leaf=is_spec)
    for updates, states in found:
        for name in names:
            for spec, x in zip(flat_specs, jax.tree.leaves(updates[name]), strict=True):
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), name
            for x in jax.tree.leaves(optaxclip.clip_stats(states[name])):
                assert x.sharding.is_fully_replicated
    # No clipper moves a leaf, nor gathers norms leaf by leaf.
    assert {c.kind for c in collectives(step) if not c.rare} == {"all-reduce"}
