"""Tables in the pages of the documentation, which examples and benchmarks write."""

import re
from collections.abc import Sequence
from pathlib import Path


def fill(page: Path, sections: dict[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and the next `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, body in sections.items():
        start, end = f"<!-- {name} -->", "<!-- end -->"
        new = f"{start}\n\n{body}\n\n{end}"
        text, found = re.subn(f"{start}.*?{end}", lambda _, n=new: n, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"the page must have one mark {start}, got {found} at {page}. Add it.")
    page.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is flush left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
