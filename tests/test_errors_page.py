"""docs/errors.md has an explained entry for every error the package raises, and no others."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import _errors

SOURCE = """
def f(x, name):
    if x:
        raise ValueError(f"{name} must be{' a' if x else ''} number, got {x!r}. Pass"
            " 1.")
    raise
"""
TEXT = "ValueError: … must be… number, got …. Pass 1."


def test_the_page_is_in_step_with_the_code():
    texts, known = _errors.raised(), _errors.entries(_errors.PAGE.read_text())
    advice = "Run python docs/_errors.py --write, then explain what is new in docs/errors.md"
    assert sorted(texts) == sorted(known), advice
    assert [text for text, explanation in known.items() if not explanation.strip()] == [], advice


def test_texts_are_found(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    assert _errors.raised(tmp_path) == [TEXT]
    (tmp_path / "module.py").write_text("raise ValueError()")
    with pytest.raises(SystemExit, match="an error must have a text"):
        _errors.raised(tmp_path)


def test_an_update_keeps_explanations_and_drops_what_is_obsolete():
    page = "# Errors\n\n### must\n\n``ValueError: must``\n\nWhy.\n\n### old\n\n``KeyError: old``\n"
    new = _errors.updated(page, ["ValueError: must", TEXT])
    assert new.endswith(f"### must be… number\n\n``{TEXT}``\n")
    assert {k: v.strip() for k, v in _errors.entries(new).items()} == {
        "ValueError: must": "Why.",
        TEXT: "",
    }
    assert _errors.updated(new, ["ValueError: must", TEXT]) == new


def test_every_error_says_what_to_do():
    """One sentence says what is wrong, another what to do."""
    assert [
        text for text in _errors.raised() if not re.search(r"[.…] ([A-Z]|[\w.]+\()", text)
    ] == []
