"""The README and the pages of the documentation: their code, what they show of it, their links."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = (ROOT / "README.md", *(page for page in _PAGES if "_build" not in page.parts))
_FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", flags=re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """Code, and what the page says it prints: the block without a language right after it."""

    code: str
    shown: str
    line: int


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, following in itertools.zip_longest(fences, fences[1:]):
        if fence[2] == "python":
            directly = following and not text[fence.end() : following.start()].strip()
            shown = following[3] if directly and following[2] == "" else ""
            found.append(Block(fence[3], shown, text.count("\n", 0, fence.start()) + 1))
    return found


def unlabelled(page: Path) -> list[str]:
    """Blocks without a language that show no output of code, but for commands to install."""
    text = page.read_text()
    shown = [block.shown for block in blocks(page)]
    orphans = [fence[3] for fence in _FENCE.finditer(text) if fence[2] == ""]
    return [body for body in orphans if body not in shown and not body.startswith("pip install")]


def links(page: Path) -> list[str]:
    """The targets of links and pictures, those in code left aside."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub(_prose_of_directives, page.read_text()))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def _prose_of_directives(fence: re.Match) -> str:
    return "" if not fence[2].startswith("{") or "toctree" in fence[2] else fence[3]


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """What `#...` may name: headings, as GitHub and MyST make anchors of them."""
    prose = _FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)
