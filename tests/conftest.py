"""Eight host devices, as on a small mesh; hypothesis without deadlines, repeatable in CI.

What XLA compiled is kept between tests, workers and runs: many tests compile the same function.
Two of the longer files took 97 s of processor time with an empty cache, 140 s without one.
"""

import os
import pathlib

_EIGHT = "--xla_force_host_platform_device_count=8"
if "device_count" not in os.environ.get("XLA_FLAGS", ""):  # before jax is imported
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT}".strip()
_ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_common = {"deadline": None, "max_examples": 20}
hypothesis.settings.register_profile("local", **_common)
hypothesis.settings.register_profile("ci", **_common, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(params=["one_device", "mesh"])
def devices(request, monkeypatch) -> int:
    """How many devices norms believe there are: with one, leaves may be joined."""
    number = {"one_device": 1, "mesh": 8}[request.param]
    monkeypatch.setattr(jax, "device_count", lambda: number)
    return number
