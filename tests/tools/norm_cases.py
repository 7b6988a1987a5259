"""Trees to measure, and their norms in float64: with one device and with eight."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from tools.oracles import norm as exact
from tools.oracles import unit_norms

from optaxclip import Norm

INF = float("inf")
ORDS = (1, 2, 3, 1.5, 7, INF, "rms")
MOST_ORDS = (1, 2, 3, INF, "rms")  # one for each way of computing


def measure(norms, *trees, options=None):
    """For each tree its norms, in the order of the groups' names; all are one program."""
    of_each = jax.jit(lambda tree: [vector(n, tree) for n in norms], compiler_options=options)
    return [list(map(np.asarray, of_each(tree))) for tree in trees]


def vector(norm, tree):
    leaves = norm.leaves(tree)
    groups = norm.groups(leaves)
    return groups.vector(norm.measure(leaves, groups))


def names(norm, tree):
    return norm.groups(norm.leaves(tree)).names


@dataclasses.dataclass(frozen=True)
class Case:
    """Norms, all of the same kind, and trees of the same shapes whose leaves all count."""

    norms: tuple[Norm, ...]
    trees: tuple[Any, ...]
    rtol: float = 1e-6

    def check(self, options=None):
        measured = measure(self.norms, *self.trees, options=options)
        for tree, found in zip(self.trees, measured, strict=True):
            for norm, numbers in zip(self.norms, found, strict=True):
                at = f"by={norm.by!r}, ord={norm.ord!r}, unit_axes={norm.unit_axes!r}"
                expected = expected_norms(norm, tree)
                np.testing.assert_allclose(numbers, expected, rtol=self.rtol, err_msg=at)
                assert len(set(names(norm, tree))) == len(numbers), at


def expected_norms(norm, tree):
    leaves = jax.tree.leaves(tree)
    if norm.by == "global":
        return [exact(leaves, norm.ord)]
    if norm.by == "leaf":
        return [exact([x], norm.ord) for x in leaves]
    if norm.by == "group":
        groups = {label: [] for label in sorted(set(norm.labels.values()))}
        for key, branch in tree.items():
            groups[norm.labels[key]] += jax.tree.leaves(branch)
        return [exact(members, norm.ord) for members in groups.values()]
    axes = norm.unit_axes if isinstance(norm.unit_axes, tuple) else (norm.unit_axes,)
    return np.concatenate(
        [unit_norms(x, sorted({a % x.ndim for a in axes}), norm.ord) for x in leaves]
    )


def mixed():
    """Some leaves of one shape, others of other dtypes and ranks."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return np.asarray(rng.standard_normal(shape), np.float32)

    return {
        "a": draw(3, 4),
        "b": {"x": draw(5), "y": draw(3, 4), "z": draw()},
        "c": draw(2, 3) + np.complex64(1j) * draw(2, 3),
        "h": draw(3, 4).astype(jax.numpy.bfloat16),
    }


LABELS = {"a": "p", "b": "q", "c": "p", "h": "q"}
UNIT_AXES = (0, 1, -1, (0, 2), (2, 1), (0, 1, 2), ())


def unit_case(axes):
    tree = {"w": np.random.default_rng(1).standard_normal((3, 4, 2)).astype(np.float32)}
    return Case(tuple(Norm("unit", ord, unit_axes=axes) for ord in ORDS), (tree,))


def alike(by, ordinary=30):
    """Many leaves of one shape; some overflow, vanish or are NaN."""
    rng = np.random.default_rng(5)
    least = 1e-25 if by == "leaf" else 1e-18  # units below 1e-19 may measure 0
    tree = []
    for i, size in enumerate([1.0, 1e25, least, 0.0, np.nan, 1e-12] + [1.0] * ordinary):
        tree.append((size * rng.standard_normal((3, 4)).astype(np.float32)).astype(np.float32))
        if i % 4 == 1:
            tree.append(np.ones(2, np.float32))
    axes = {"unit_axes": -1} if by == "unit" else {}
    return Case(tuple(Norm(by, ord, **axes) for ord in MOST_ORDS), (tree,))


def low_precision(dtype):
    """Added in bfloat16, the sum would be wrong in its third digit."""
    rng = np.random.default_rng(3)
    tree = [np.asarray(rng.uniform(1, 2.2, ())).astype(dtype) for _ in range(60)]
    return Case(tuple(Norm("global", ord) for ord in (1, 2, 3, "rms")), (tree,), rtol=1e-5)


def with_bad_element(by):
    """NaN or infinity in one leaf, and in one of its rows: the norms of others stay finite."""
    rest = {"unit": {"unit_axes": 1}, "group": {"labels": {"w": "p", "v": "q"}}}.get(by, {})
    trees = tuple(
        {"w": np.float32([[1, 2], [3, bad]]), "v": np.float32([[1, 2]])} for bad in (np.nan, np.inf)
    )
    return Case(tuple(Norm(by, ord, **rest) for ord in ORDS), trees)


CASES = {
    "global": Case(tuple(Norm("global", ord) for ord in ORDS), (mixed(),)),
    "leaf": Case(tuple(Norm("leaf", ord) for ord in ORDS), (mixed(),)),
    "group": Case(tuple(Norm("group", ord, labels=LABELS) for ord in ORDS), (mixed(),)),
    **{f"unit {axes}": unit_case(axes) for axes in UNIT_AXES},
    **{f"{by}, many of one shape": alike(by) for by in ("leaf", "unit")},
    **{f"many in {dtype}": low_precision(dtype) for dtype in ("bfloat16", "float16")},
    **{f"{by}, one bad": with_bad_element(by) for by in ("global", "leaf", "unit", "group")},
}
# With several devices each leaf's units stay apart, however many leaves there are.
CASES_ON_A_MESH = CASES | {"unit, many of one shape": alike("unit", ordinary=4)}


def assert_other_leaves_do_not_count():
    """Bit for bit the norms of the tree without them."""
    norms = [Norm("global", ord) for ord in MOST_ORDS]
    others = {
        "empty": np.zeros((0, 3), np.float32),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "ids": np.array([1000]),
        "key": jax.random.key(0),
        "masked": optax.MaskedNode(),
        "none": None,
    }
    (found,), (expected,) = measure(norms, mixed() | others), measure(norms, mixed())
    for norm, a, b in zip(norms, found, expected, strict=True):
        assert a.tolist() == b.tolist() != [0.0], norm.ord
