"""The benchmark's reader of compiled programs, for tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from _collectives import collectives as collectives
