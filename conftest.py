"""What the examples in docstrings register is forgotten after each of them."""

import pytest


@pytest.fixture(autouse=True)
def _rules_of_an_example(request, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        # Not before tests/conftest.py sets up JAX.
        from optaxclip.per_example.engine import registry

        monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
