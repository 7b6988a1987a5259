"""The README's code runs as pasted and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import optaxclip

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
CODE = [body for language, body in BLOCKS if language == "python"]


def test_blocks_run_and_print_what_is_shown():
    namespace = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in CODE:
            exec(compile(block, "README.md", "exec"), namespace)
    shown = [body for language, body in BLOCKS if language == "" and "pip install" not in body]
    assert printed.getvalue() == "".join(shown)


def test_first_block_is_short():
    assert len(CODE[0].strip().splitlines()) <= 15


def test_every_public_name_is_mentioned():
    public = [name for name in vars(optaxclip) if callable(getattr(optaxclip, name))]
    public = [name for name in public if not name.endswith(("State", "Stats"))]
    assert [name for name in public if name not in README] == []


def test_local_links_lead_somewhere():
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if "://" not in t and not (root / t).exists()] == []
