"""The benchmarks' readers of compiled programs, for tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from _collectives import collectives as collectives
from _compiled_page import bounds as bounds
from _compiled_page import report as report
from _hlo import Work as Work
from _hlo import read as read
from _hlo import size_of as size_of
