"""Slow references in float64 NumPy, for comparison only."""

import jax
import numpy as np

EPS = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "float32": 1e-6,
    "float64": 1e-6,
    "complex64": 1e-6,
}


def f64(x):
    """A leaf in double precision, complex if it is."""
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def norm(leaves, ord=2):
    """The norm of some arrays taken together."""
    flat = np.concatenate([np.abs(f64(x)).ravel() for x in leaves] or [np.zeros(0)])
    if flat.size == 0:
        return 0.0
    largest = flat.max()
    if ord == np.inf or largest == 0 or not np.isfinite(largest):
        return largest
    flat = flat / largest
    if ord == "rms":
        return largest * np.sqrt(np.mean(flat**2))
    return largest * np.sum(flat**ord) ** (1 / ord)


def leaf_norms(tree, ord=2):
    return np.array([norm([x], ord) for x in jax.tree.leaves(tree)])


def unit_norms(x, axes, ord=2):
    """One norm a unit, in the order of the remaining axes."""
    rest = [i for i in range(np.ndim(x)) if i not in axes]
    rows = np.transpose(f64(x), [*rest, *axes]).reshape(
        int(np.prod([np.shape(x)[i] for i in rest], dtype=int)), -1
    )
    return np.array([norm([row], ord) for row in rows])


def assert_same_bits(actual, expected):
    """Equal structure, shapes, dtypes and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes(), f"{a} != {b}"


def assert_close(actual, expected, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f64(a), f64(b), rtol=rtol, atol=atol)
