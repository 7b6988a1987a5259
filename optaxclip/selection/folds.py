"""Which examples train and which validate: k folds, a held-out share, or given indices."""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Tree, leaves_with_path, path_name, place

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""The indices to train on and those to validate on, fold by fold."""


class Folds(NamedTuple):
    """The validation sets of all folds; int32 arrays."""

    validation: Any
    """[folds, longest], filled up to one length."""
    kind: Any
    """[folds]: which of the sizes that occur the fold has."""


def check_data(data: Tree) -> tuple[Tree, int]:
    """The data as arrays, and the number of examples. Raises unless all leaves agree on it."""
    leaves = leaves_with_path(data)
    if not leaves:
        raise ValueError(f"data must hold arrays, got {data!r}. Pass for example (x, y).")
    places = [place(path_name(path)) for path, _ in leaves]
    for at, (_, leaf) in zip(places, leaves, strict=True):
        if np.ndim(leaf) == 0:
            raise ValueError(
                f"data must be arrays with one row per example, got {leaf!r} at {at}. Convert"
                " lists with np.asarray; close over constants in loss_fn."
            )
    sizes = [len(leaf) for _, leaf in leaves]
    for at, size in zip(places, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"data must have as many rows in every array, got {sizes[0]} at {places[0]} and"
                f" {size} at {at}. Give each example one row in each."
            )
    if sizes[0] < 2:
        raise ValueError(
            f"data must have at least two rows, got {sizes[0]} at {places[0]}. Pass one to train on"
            " and one to validate on, and better many."
        )
    return jax.tree.map(jnp.asarray, data), sizes[0]


def split(folds: Any, number: int, seed: np.ndarray) -> Pairs:
    """The folds of `number` examples, shuffled by `seed`; `folds` as in `cross_validate`."""
    if isinstance(folds, bool) or not isinstance(folds, numbers.Real | Sequence):
        raise TypeError(
            f"folds must be a number, a share or a list of index pairs, got {folds!r}. Pass for"
            " example 5, or 0.2 to hold a fifth out. Wrap a generator in list()."
        )
    if isinstance(folds, Sequence):
        return _given(folds, number)
    order = np.random.default_rng(seed).permutation(number)
    if isinstance(folds, int | np.integer):
        if folds < 2:
            raise ValueError(
                f"folds must be >= 2, got {folds}. Pass a share such as 0.2 to hold out once."
            )
        if folds > number:
            raise ValueError(
                f"folds must be at most the number of examples, got {folds} for {number}. Pass"
                f" {number} to leave one out at a time."
            )
        parts = np.array_split(order, int(folds))
        return [
            (np.concatenate([*parts[:k], *parts[k + 1 :]]), part) for k, part in enumerate(parts)
        ]
    if not 0 < float(folds) < 1:
        raise ValueError(
            f"a share to hold out must lie between 0 and 1, got {folds}. Pass for example 0.2."
        )
    held = round(float(folds) * number)
    if not 0 < held < number:
        raise ValueError(
            f"a share must hold out some examples and leave some, got {folds} of {number}, which"
            f" holds out {held}. Pass for example 0.5."
        )
    return [(order[held:], order[:held])]


def _given(folds: Sequence, number: int) -> Pairs:
    if not folds:
        raise ValueError("folds must not be empty, got []. Pass (train, validation) pairs.")
    pairs = []
    for k, pair in enumerate(folds):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"folds must be (train, validation) pairs, got {pair!r} at fold {k}. Pass for"
                " example list(StratifiedKFold(5).split(x, y))."
            )
        train, validation = (np.asarray(index) for index in pair)
        for name, index in (("train", train), ("validation", validation)):
            whole = index.ndim == 1 and index.size and np.issubdtype(index.dtype, np.integer)
            if not whole or index.min() < 0 or index.max() >= number:
                raise ValueError(
                    f"indices must be a list of whole numbers from 0 to {number - 1}, got"
                    f" {index!r} for {name} at fold {k}. Pass positions in the data."
                )
        common = np.intersect1d(train, validation)
        if common.size:
            raise ValueError(
                "an example must not both train and validate, got"
                f" {common.size} that do, {common[0]} first, at fold {k}. Take them out of one."
            )
        pairs.append((train, validation))
    return pairs


def tables(pairs: Pairs) -> tuple[Folds, tuple[int, ...]]:
    """The validation sets as arrays of one shape, and the sizes they have."""
    sizes = tuple(sorted({len(validation) for _, validation in pairs}))
    validation = np.stack([np.resize(v, sizes[-1]) for _, v in pairs]).astype(np.int32)
    kinds = np.array([sizes.index(len(v)) for _, v in pairs], np.int32)
    return Folds(validation, kinds), sizes


def batches(train: np.ndarray, steps: int, batch_size: int, seed: Sequence[int]) -> np.ndarray:
    """The examples of each step, int32 [steps, batch_size]: one random order after another.

    NumPy's order of 1438 examples takes 15 us, one sorted by XLA 270 us (CPU): with 22 batches to
    an epoch that was half of the time of a step of an MLP 64-32-10.
    """
    rng = np.random.default_rng(seed)
    needed = steps * batch_size
    orders = [rng.permutation(train) for _ in range(-(-needed // len(train)))]
    return np.concatenate(orders)[:needed].astype(np.int32).reshape(steps, batch_size)
