"""The code of the README and of the pages runs as pasted and prints what they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import optaxclip

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page):
    """The language and the body of each."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def code(page):
    return [body for language, body in blocks(page) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if code(page)])
def test_blocks_run_and_print_what_is_shown(page):
    namespace = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in code(page):
            exec(compile(block, page, "exec"), namespace)
    shown = [body for language, body in blocks(page) if not language and "pip install" not in body]
    assert printed.getvalue() == "".join(shown)


def test_first_block_is_short():
    assert len(code("README.md")[0].strip().splitlines()) <= 15


def test_every_public_name_is_mentioned():
    public = [name for name in vars(optaxclip) if callable(getattr(optaxclip, name))]
    public = [name for name in public if not name.endswith(("State", "Stats"))]
    assert [name for name in public if name not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert targets
    here = (ROOT / page).parent
    assert [t for t in targets if "://" not in t and not (here / t).exists()] == []
