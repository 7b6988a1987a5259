"""How the suite runs: the same examples everywhere, one device, compiled in a hurry.

* hypothesis draws the same examples on a laptop and in CI. `make explore` draws others, and more.
* Ordinary tests see one device, as most users do; those in `meshes/` see eight.
* XLA skips what only makes programs faster: nearly all of them run once. Tests of bits, of HLO and
  of memory say `pytestmark = pytest.mark.optimized`, and get what users get.
* What a file compiled is forgotten after it: programs of all files took a worker to 5.9 GB. XLA's
  own cache on disk keeps them for the other worker and for the next run.
"""

import gc
import os
import pathlib

_ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.extend  # noqa: E402
import pytest  # noqa: E402
from tools.exploring import TIMES  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
collect_ignore = ["tools"]

_common = {"deadline": None, "max_examples": 20 * TIMES}
hypothesis.settings.register_profile("suite", **_common, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", **_common, database=None, print_blob=True)
hypothesis.settings.load_profile("suite" if TIMES == 1 else "explore")


def pytest_report_header(config):
    """What to pass in order to see the same again."""
    if TIMES == 1:
        return None
    seed = config.getoption("--hypothesis-seed")
    return f"exploring: {TIMES} times the examples, --hypothesis-seed={seed}"


def pytest_collection_modifyitems(items):
    """Files with long tests first: the last file to end is then a short one."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collectreport(report):
    """Stops at a file that computes when it is imported: its arrays die with their backend."""
    try:
        for number in (2, 1):  # an error once a backend has started, unless nothing changes
            jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        pytest.exit(f"{report.nodeid} computes something when it is imported. Use a fixture.", 4)


@pytest.fixture(scope="module", autouse=True)
def _backend(request):
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    _see_devices(8 if request.path.parent.name == "meshes" else 1)
    yield
    jax.config.update("jax_disable_most_optimizations", True)  # for doctests
    jax.clear_caches()
    _see_devices(1)
    gc.collect()


def _see_devices(number):
    if jax.device_count() != number:
        jax.extend.backend.clear_backends()
        jax.config.update("jax_num_cpu_devices", number)
