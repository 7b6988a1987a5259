"""How many examples a test draws: as many in every run, and more under `make explore`."""

import os

import hypothesis

TIMES = int(os.environ.get("EXPLORE", "1"))
"""How many times the examples of the suite."""


def examples(number: int) -> hypothesis.settings:
    """`@examples(12)`: draw 12 examples, or so many times as many."""
    return hypothesis.settings(max_examples=number * TIMES)
