"""Running the examples as one does: `python examples/NAME.py`, with warnings as errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"

# Every command finds `sys.argv`, `__main__` and the folder of imports as it would alone.
_ONE_BY_ONE = """
import contextlib, io, json, runpy, sys, traceback, warnings
script, *lines = json.load(sys.stdin)
sys.path[0] = script.rpartition("/")[0]
done = []
for arguments in lines:
    sys.argv, code, out, err = [script, *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def environment(hurry: bool = True) -> dict[str, str]:
    """One device. Programs come from the suite's cache, and are compiled in a hurry unless they
    run for long."""
    own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return own | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(hurry))}


def run(script: str, *arguments: object, hurry: bool = True) -> Done:
    """`python examples/SCRIPT ARGUMENTS`."""
    return _python([str(EXAMPLES / script), *map(str, arguments)], "", hurry)


def run_each(script: str, *lines: tuple[object, ...], hurry: bool = True) -> list[Done]:
    """The same for several lines of arguments, one after the other in one process.

    Starting an example takes seconds, for its imports: this starts it once.
    """
    lines_ = [[*map(str, arguments)] for arguments in lines]
    whole = _python(["-c", _ONE_BY_ONE], json.dumps([str(EXAMPLES / script), *lines_]), hurry)
    assert whole.returncode == 0, whole.stderr
    return [Done(*found) for found in json.loads(whole.stdout)]


def _python(arguments: list[str], given: str, hurry: bool) -> Done:
    found = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        input=given,
        env=environment(hurry),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    return Done(found.returncode, found.stdout, found.stderr)


def succeeded(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done
