"""What a step is traced to: nothing that depends on the host, no branch, no sort."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.core import Literal, jaxprs_in_params
from tools.clippers import CLIPPERS, make

SHAPES = {"kernel": (4, 6), "bias": (6,)}  # of the body and of the head
HOST = """
import hashlib, jax, jax.numpy as jnp, sys
sys.path.insert(0, sys.argv[1])
from tools.clippers import CLIPPERS, make
tree = {k: {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)} for k in ("body", "head")}
for name in CLIPPERS:
    tx = make(name)
    text = str(jax.make_jaxpr(tx.update)(tree, tx.init(tree), tree))
    print(jax.device_count(), name, hashlib.sha256(text.encode()).hexdigest())
"""
# A matrix iteration ends when it has converged; the others have what a step may have.
LOOPS = {"singular", "singular-soft", "singular-svd"}


@pytest.fixture(scope="module")
def by_devices():
    """What a host with one device traces, and one with eight."""

    def traced(devices):
        flags = f"--xla_force_host_platform_device_count={devices}"
        tests = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", HOST, tests],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        assert {int(row[0]) for row in rows} == {devices}
        return {row[1]: row[2] for row in rows}

    return traced(1), traced(8)


@pytest.mark.slow
def test_the_program_does_not_depend_on_the_host(by_devices):
    one, eight = by_devices
    assert one.keys() == eight.keys() == CLIPPERS.keys()
    assert [name for name in one if one[name] != eight[name]] == []


def primitives(jaxpr):
    """Of what runs on a TPU: of a choice by platform the last branch, the default, alone."""
    found, by_platform = set(), set()
    for eqn in jaxpr.eqns:
        name, bodies = eqn.primitive.name, list(jaxprs_in_params(eqn.params))
        known = {v for v in eqn.invars if not isinstance(v, Literal)}
        if name == "platform_index" or (name != "cond" and known and known <= by_platform):
            by_platform |= {*eqn.outvars}
        elif name == "cond" and eqn.invars[0] in by_platform:
            bodies = bodies[-1:]
        else:
            found.add(name)
        for body in bodies:
            found |= primitives(body)
    return found


@pytest.mark.parametrize("name", [name for name in CLIPPERS if name not in LOOPS])
def test_no_branch_and_no_sort(name):
    part = {k: np.ones(shape, np.float32) for k, shape in SHAPES.items()}
    tx, tree = make(name), {"body": part, "head": part}
    jaxpr = jax.make_jaxpr(tx.update)(tree, tx.init(tree), tree).jaxpr
    assert primitives(jaxpr) & {"cond", "while", "sort", "top_k", "scan"} == set()


@pytest.mark.parametrize("name", CLIPPERS)
def test_nothing_is_promoted(name):
    """Leaves of three dtypes under the strictest settings of JAX: each keeps its own."""
    kinds = {"kernel": np.float32, "bias": np.float64}
    part = {k: np.ones(shape, kinds[k]) for k, shape in SHAPES.items()}
    tree = {"body": part, "head": {k: x.astype(jax.numpy.bfloat16) for k, x in part.items()}}
    tx = make(name)
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), strict[0], strict[1]:
        state = jax.eval_shape(tx.init, tree)
        updates, after = jax.eval_shape(tx.update, tree, state, tree)
    of = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
    assert of(updates) == of(tree)
    assert of(after) == of(state)
