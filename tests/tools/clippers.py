"""Every clipper in one table, and the tree they are all tried on."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optaxclip
from optaxclip.thresholds import Learned, multiple_of_quantile
from optaxclip.thresholds.rules import WindowMoments

INF = float("inf")


def by_name(path, leaf):
    """Labels kernels and biases."""
    return path.split("/")[-1]


def rows(path, leaf):
    return tuple(range(1, leaf.ndim)) or tuple(range(leaf.ndim))


def _drop(max_norm):
    return optaxclip.clip_by("global", max_norm, "drop")


def _guarded(max_norm):
    return optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(max_norm))


def _feedback(max_norm):
    return optaxclip.error_feedback(optaxclip.clip_by_global_norm(max_norm))


def _skipping(max_norm):
    return optaxclip.skip_outliers(optaxclip.clip_by_global_norm(max_norm))


def _singular_learned(num_stds):
    rule = WindowMoments(num_stds, 4, True)
    return optaxclip.clip_singular_values(Learned(rule, 2, 2), steps=6)


# name: (factory, bound, the other arguments)
CLIPPERS = {
    "value": (optaxclip.clip_by_value, 0.1, {}),
    "value-no-stats": (optaxclip.clip_by_value, 0.1, {"stats": False}),
    "value-zero": (optaxclip.clip_by_value, 0.1, {"nonfinite": "zero"}),
    "value-tree": (
        optaxclip.clip_by_value,
        {"body": 0.1, "head": {"bias": 0.2, "kernel": 0.3}},
        {},
    ),
    "global": (optaxclip.clip_by_global_norm, 0.5, {}),
    "global-l1": (optaxclip.clip_by_global_norm, 0.5, {"ord": 1}),
    "global-l3": (optaxclip.clip_by_global_norm, 0.5, {"ord": 3}),
    "global-max": (optaxclip.clip_by_global_norm, 0.1, {"ord": INF}),
    "global-rms": (optaxclip.clip_by_global_norm, 0.1, {"ord": "rms"}),
    "global-eps": (optaxclip.clip_by_global_norm, 0.5, {"eps": 1e-6}),
    "global-zero": (optaxclip.clip_by_global_norm, 0.5, {"nonfinite": "zero"}),
    "global-schedule": (optaxclip.clip_by_global_norm, optax.linear_schedule(1.0, 0.1, 2), {}),
    "leaf": (optaxclip.clip_by_leaf_norm, 0.3, {}),
    "leaf-max": (optaxclip.clip_by_leaf_norm, 0.1, {"ord": INF}),
    "leaf-tree": (optaxclip.clip_by_leaf_norm, {"body": 0.1, "head": lambda count: 0.2}, {}),
    "leaf-rms": (optaxclip.clip_by_leaf_rms, 0.1, {}),
    "unit": (optaxclip.clip_by_unit_norm, 0.2, {}),
    "unit-rows-l1": (optaxclip.clip_by_unit_norm, 0.2, {"unit_axes": rows, "ord": 1}),
    "group": (
        optaxclip.clip_by_group_norm,
        {"kernel": 0.5, "bias": optax.constant_schedule(0.1)},
        {"labels": by_name},
    ),
    "group-one-bound": (optaxclip.clip_by_group_norm, 0.2, {"labels": by_name, "ord": 1.5}),
    "agc": (optaxclip.agc, 0.01, {}),
    "agc-exclude": (optaxclip.agc, 0.01, {"exclude": lambda path, leaf: path.endswith("bias")}),
    "clippy": (optaxclip.clippy, 0.1, {"absolute": 0.0}),
    "clippy-schedule": (
        optaxclip.clippy,
        optax.linear_schedule(0.5, 0.1, 2),
        {"absolute": 1e-2, "nonfinite": "zero"},
    ),
    "normalize": (optaxclip.normalize, 0.5, {}),
    "normalize-eps": (optaxclip.normalize, 0.5, {"eps": 1e-3, "ord": 1}),
    "soft-rational": (optaxclip.soft_clip, 0.5, {}),
    "soft-sqrt": (optaxclip.soft_clip, 0.5, {"shape": "sqrt"}),
    "soft-tanh": (optaxclip.soft_clip, 0.5, {"shape": "tanh"}),
    "soft-elements": (optaxclip.soft_clip, 0.1, {"elementwise": True}),
    "soft-elements-tanh": (
        optaxclip.soft_clip,
        0.1,
        {"elementwise": True, "shape": "tanh", "stats": False},
    ),
    "autoclip": (optaxclip.autoclip, 10.0, {"window": 8}),
    "zclip": (optaxclip.zclip, 2.5, {"max_norm": 0.5}),
    "zclip-published-units": (
        optaxclip.zclip,
        2.5,
        {
            "by": "unit",
            "max_norm": INF,
            "mode": "mean",
            "warmup": 1,
            "relearn_after": None,
        },
    ),
    "adagc": (optaxclip.adagc, 1.05, {"max_norm": 1e3, "warmup": 2, "relearn_after": 2}),
    "history": (optaxclip.clip_by_history, 3.0, {"window": 4, "relearn_after": 2}),
    "quantile": (optaxclip.clip_by_quantile, 0.95, {"init": 0.5}),
    "stabilizer": (optaxclip.gradient_stabilizer, 0.7, {}),
    "stabilizer-published": (
        optaxclip.gradient_stabilizer,
        0.7,
        {"outlier": INF, "by": "global", "eps": 0.0},
    ),
    "spam": (optaxclip.spam_clip, 3.0, {"warmup": 2, "relearn_after": 2}),
    "spam-no-stats": (optaxclip.spam_clip, 3.0, {"warmup": 1, "stats": False}),
    "spam-published": (optaxclip.spam_clip, 9.0, {"warmup": 1, "relearn_after": None}),
    "adaclip": (optaxclip.adaclip, 0.9, {"warmup": 2, "relearn_after": 2}),
    "adaclip-published": (optaxclip.adaclip, 0.9, {"relearn_after": None}),
    "singular": (optaxclip.clip_singular_values, 0.1, {}),
    "singular-soft-zero": (
        optaxclip.clip_singular_values,
        0.1,
        {"soft": True, "nonfinite": "zero", "steps": 6},
    ),
    "singular-learned": (_singular_learned, 3.0, {}),
    "feedback": (_feedback, 0.5, {}),
    "drop": (_drop, 0.5, {}),
    "skip-nonfinite": (_guarded, 0.5, {}),
    "skip-outliers": (_skipping, 0.5, {}),
}
# One row for each way of measuring and responding.
ONE_EACH = [
    "value",
    "global",
    "leaf",
    "leaf-rms",
    "unit",
    "group",
    "agc",
    "normalize",
    "soft-rational",
    "soft-elements",
    "skip-nonfinite",
]
STATIC = (
    "labels",
    "unit_axes",
    "exclude",
    "ord",
    "window",
    "warmup",
    "relearn_after",
    "soft",
    "steps",
)
# Clippers whose bound follows the norms, with their defaults; for `check_clipper`.
ADAPTIVE = {
    "autoclip": lambda: optaxclip.autoclip(),
    "autoclip-95": lambda: optaxclip.autoclip(95.0),
    "zclip": lambda: optaxclip.zclip(),
    "zclip-mean": lambda: optaxclip.zclip(mode="mean"),
    "zclip-percentile": lambda: optaxclip.zclip(mode="percentile"),
    "zclip-leaf": lambda: optaxclip.zclip(by="leaf"),
    "adagc": lambda: optaxclip.adagc(),
    "history": lambda: optaxclip.clip_by_history(),
    "quantile": lambda: optaxclip.clip_by_quantile(),
    "spam": lambda: optaxclip.spam_clip(),
    "spam-no-stats": lambda: optaxclip.spam_clip(stats=False),
    "adaclip": lambda: optaxclip.adaclip(),
    "adaclip-leaf": lambda: optaxclip.adaclip(by="leaf"),
    "skip-window": lambda: optaxclip.skip_outliers(optax.identity()),
    "skip-quantile": lambda: optaxclip.skip_outliers(optax.identity(), multiple_of_quantile()),
}
# Of CLIPPERS, those that have no bound on their first step, for want of history.
UNBOUNDED_AT_FIRST = (
    "autoclip",
    "zclip-published-units",
    "adagc",
    "history",
    "singular-learned",
    "spam",
    "spam-no-stats",
    "spam-published",
    "adaclip",
    "adaclip-published",
)


def is_adaptive(name):
    learned = ("optaxclip.clippers.learned", "optaxclip.clippers.elements")
    return CLIPPERS[name][0].__module__ in learned or name == "singular-learned"


def static_arguments(name):
    """What `optax.inject_hyperparams` must leave alone."""
    return [k for k in STATIC if k in inspect.signature(CLIPPERS[name][0]).parameters]


def make(name):
    factory, bound, rest = CLIPPERS[name]
    return factory(bound, **rest)


def example_tree(dtype=jnp.float32, seed=0):
    """Two modules of a kernel and a bias each: norm about 4."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(np.asarray(rng.standard_normal(shape), jnp.dtype(dtype)))

    return {
        "body": {"bias": leaf(3), "kernel": leaf(4, 3)},
        "head": {"bias": leaf(), "kernel": leaf(3, 1)},
    }


def mixed_tree(seed=0):
    """Every kind of leaf there is, double precision when it is enabled."""
    tree = jax.tree.map(np.asarray, example_tree(seed=seed))
    tree["body"]["kernel"] = tree["body"]["kernel"].astype(jnp.bfloat16)
    tree["body"]["bias"] = tree["body"]["bias"].astype(np.float16)
    tree["head"]["bias"] = np.asarray(tree["head"]["bias"] * (1 + 1j), np.complex64)
    tree["head"]["kernel"] = tree["head"]["kernel"].astype(np.float64)
    return jax.tree.map(jnp.asarray, tree)


def with_odd_leaves(tree):
    """The tree with leaves that no clipper may touch or count."""
    return {
        **tree,
        "body": {
            **tree["body"],
            "none": None,
            "masked": optax.MaskedNode(),
            "ids": jnp.asarray(np.array([2**24 + 1, -7], np.int32)),
            "flag": jnp.asarray(np.array([True, False])),
            "empty": jnp.asarray(np.zeros((0, 3))),
        },
    }
