"""README and docs: code runs as pasted and prints what is shown, links lead somewhere."""

import contextlib
import io
import itertools
import re
import tempfile
import urllib.parse
from pathlib import Path

import pytest
from tools.pages import PAGES, ROOT, anchors, blocks, links, name, unlabelled

import optaxclip
from optaxclip.per_example.engine import registry

PEER = "jax-privacy (micro-batch)"
README = ROOT / "README.md"
WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """Rules that a page registers are forgotten, and so is what it writes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_blocks_run_and_print_what_is_shown(page):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        printed = io.StringIO()
        # Lines are counted as in a file that holds the block alone.
        code = compile(block.code, f"{page.stem}.py", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        assert printed.getvalue() == block.shown, f"{name(page)}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is_or_is_output(page):
    assert unlabelled(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        url = urllib.parse.urlsplit(target)
        if url.scheme:
            good = url.scheme == "https" and "." in url.netloc
        else:
            file = (page.parent / url.path).resolve() if url.path else page
            named = not url.fragment or (file.suffix == ".md" and url.fragment in anchors(file))
            good = file.exists() and file.is_relative_to(ROOT) and named
        if not good:
            broken.append(target)
    assert broken == []


def test_readme_begins_with_a_short_block():
    assert len(blocks(README)[0].code.strip().splitlines()) <= 15


def test_guides_mention_every_public_name():
    """Where one may find it who does not know what to look for."""
    elsewhere = {*(ROOT / "docs" / "api").glob("*.md"), ROOT / "docs" / "errors.md"}
    text = "".join(page.read_text() for page in PAGES if page not in elsewhere)
    assert [name for name in public() if name not in text and not is_state(name)] == []


def test_readme_quotes_the_tables():
    """The tables themselves are written by the benchmarks."""
    docs = ROOT / "docs"
    quoted = table(README, "clipper")
    assert len(quoted) > 3
    pages = {
        "CPU, time": (docs / "step_overhead.md", None, "25 x 1024x1024"),
        "TPU v5e, cycles": (docs / "compiled_cost.md", "### TPU v5e, 25x1024", "cycles / Adam"),
        "H100, bytes": (docs / "compiled_cost.md", "### H100, 25x1024", "bytes / Adam"),
    }
    for column, (page, after, theirs) in pages.items():
        found = table(page, "clipper", after)
        assert {k: row[column] for k, row in quoted.items()} == {
            k: found[k][theirs] for k in quoted
        }
    rows, quoted = table(docs / "per_example_cost.md", "model"), table(README, "model")
    assert len(quoted) > 3
    ours = {"`clipped_grad`": "auto", "lines above": "one_pass"}
    columns = {**ours, "jax-privacy": PEER, "stacked": "vmap"}
    for model, row in quoted.items():
        found = {ours: rows[model][theirs].partition(" (")[0] for ours, theirs in columns.items()}
        assert row == found, model


def test_reference_describes_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"^\.\. auto\w+:: (\w+)$", pages, flags=re.MULTILINE))
    assert [name for name in public() if name not in described] == []


def table(page: Path, corner: str, after: str | None = None) -> dict[str, dict[str, str]]:
    """The first table with `corner` in its head, or the first after a line: cells by column."""
    lines = page.read_text().splitlines()
    lines = lines if after is None else lines[lines.index(after) :]
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {corner} |"))
    head = cells(lines[at])[1:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[at + 2 :])
    found = {}
    for row in rows:
        name, *values = cells(row)
        found[name] = dict(reversed([*zip(head, values, strict=True)]))  # the first of one name
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def public() -> list[str]:
    return [name for name in vars(optaxclip) if callable(getattr(optaxclip, name))]


def is_state(name: str) -> bool:
    return name.endswith(("State", "Stats"))
