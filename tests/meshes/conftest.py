"""Tests of meshes see eight devices."""

import pytest


@pytest.fixture(scope="module")
def device_count():
    return 8
