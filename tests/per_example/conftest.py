"""Per-example tests run in float64, so that agreement with the oracle means 1e-10."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield
