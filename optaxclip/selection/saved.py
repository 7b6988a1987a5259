"""Runs that are kept in a directory, so that an interrupted search goes on where it stopped."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optaxclip.selection.runs import Outcome

_MANIFEST = "experiment.json"


def digest(*parts: Any) -> str:
    """Of strings, and of trees of arrays."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
            continue
        found.update(str(jax.tree.structure(part)).encode())
        for leaf in jax.tree.leaves(part):
            if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
                leaf.dtype, jax.dtypes.prng_key
            ):
                found.update(str(leaf.dtype).encode())
                leaf = jax.random.key_data(leaf)
            array = np.asarray(leaf)
            found.update(f"{array.shape} {array.dtype}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class Saved:
    """The runs of one experiment in a directory: a manifest, and a file for each round of runs.

    Args:
      directory: made when it is missing.
      experiment: what the experiment is: strings and numbers by name.
      free: names that the directory decides where it holds an experiment already.

    Raises:
      ValueError: the directory holds another experiment, naming what differs.
    """

    def __init__(self, directory: Any, experiment: dict[str, Any], free: Sequence[str] = ()):
        self.directory = Path(directory)
        self.experiment = experiment
        manifest = self.directory / _MANIFEST
        if manifest.exists():
            held = json.loads(manifest.read_text(encoding="utf-8"))
            for name in free:
                experiment[name] = held.get(name)
            names = [*experiment, *(name for name in held if name not in experiment)]
            differing = [name for name in names if held.get(name) != experiment.get(name)]
            if differing:
                raise ValueError(
                    f"resume_dir holds another experiment, got {self.directory} with other"
                    f" {', '.join(differing)}. Pass a new directory, or the arguments it was"
                    " started with."
                )
        elif any(self.directory.glob("runs-*.json")):
            raise ValueError(
                f"resume_dir holds runs of an unknown experiment, got {self.directory} without"
                f" {_MANIFEST}. Pass a new directory."
            )
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write(manifest, experiment)

    def load(self, outcomes: Outcome, done: np.ndarray) -> None:
        """Fills in the runs that are there, and marks them as done."""
        for path in sorted(self.directory.glob("runs-*.json")):
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))
                for row in rows:
                    for field, value in zip(outcomes, row["outcome"], strict=True):
                        field[row["run"]] = value
                    done[row["run"]] = True
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"a file of finished runs cannot be read, got {path}: {error}. Delete it, and"
                    " its runs are computed again."
                ) from error

    def add(self, runs: np.ndarray, outcomes: Outcome) -> None:
        """Writes finished runs, all of them or none."""
        columns = [field[runs].tolist() for field in outcomes]
        rows = [
            {"run": int(run), "outcome": list(row)}
            for run, row in zip(runs, zip(*columns, strict=True), strict=True)
        ]
        _write(self.directory / f"runs-{runs[0]:06d}.json", rows)


def without_addresses(program: str) -> str:
    """The text of a program, without what differs from process to process."""
    return re.sub(r"0x[0-9a-f]{6,}", "", program)


def _write(path: Path, content: Any) -> None:
    """All of the file or none of it, also when the machine stops in between."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
