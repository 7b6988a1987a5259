"""The text the examples read: the modules of the Python standard library, byte by byte."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def standard_library(size: int = 2_000_000) -> np.ndarray:
    """The first bytes of its modules, in the order of their names."""
    text, modules = b"", sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for module in modules:
        text += module.read_bytes()
        if len(text) >= size:
            break
    return np.frombuffer(text[:size], np.uint8)


def windows(
    text: np.ndarray, seed: int | Sequence[int], shape: tuple[int, ...], length: int
) -> np.ndarray:
    """`[*shape, length]`: pieces of the text from random places, the same for the same seed."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, shape)
    return text[starts[..., None] + np.arange(length)]
