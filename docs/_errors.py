"""Keeps `docs/errors.md` in step with the errors the package raises.

    python docs/_errors.py           says what is missing, what is obsolete, what is unexplained
    python docs/_errors.py --write   adds and removes entries; headings and explanations stay,
                                     and are yours: make headings that read alike tell apart

An entry is a heading, the text in double backticks with an ellipsis for each value, an explanation.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"


def raised(package: Path = ROOT / "optaxclip") -> list[str]:
    """`Error: text` of each error the package raises, in the order of its files."""
    found = []
    for path in sorted(package.rglob("*.py")):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise)]
        for node in sorted(nodes, key=lambda n: n.lineno):
            if isinstance(node.exc, ast.Call):
                if not node.exc.args:
                    raise SystemExit(f"an error must have a text, got none at {path}:{node.lineno}")
                found.append(f"{ast.unparse(node.exc.func)}: {_text(node.exc.args[0])}")
    return list(dict.fromkeys(found))


def entries(page: str) -> dict[str, str]:
    """`Error: text` -> explanation, of each entry of the page."""
    entry = r"^### .*\n\n``(\w+: .*)``\n((?:(?!##).*\n?)*)"
    return dict(re.findall(entry, page, flags=re.MULTILINE))


def updated(page: str, texts: list[str]) -> str:
    """The page with an entry for each text and no others; new ones stand last, unexplained."""
    sections = re.split(r"^(?=##)", page, flags=re.MULTILINE)
    kept = [s for s in sections if not s.startswith("### ") or {*entries(s)} & {*texts}]
    new = [text for text in texts if text not in entries(page)]
    fresh = [f"### {_heading(text)}\n\n``{text}``\n\n" for text in new]
    return "\n\n".join(part.strip() for part in [*kept, *fresh]) + "\n"


def _text(node: ast.expr) -> str:
    """A string with an ellipsis for each value in it."""
    if isinstance(node, ast.Constant):
        return " ".join(str(node.value).split("\n"))
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(_text(part) for part in node.values))
    return "…"


def _heading(text: str) -> str:
    """What is wrong, without what was got: short enough for a table of contents."""
    wrong = text.split(": ", 1)[1].split(", got")[0].split(". ")[0]
    return wrong.removeprefix("… ")


def main() -> int:
    """Nonzero where the page and the package differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="update docs/errors.md")
    args = parser.parse_args()
    texts = raised()
    if args.write:
        PAGE.write_text(updated(PAGE.read_text(), texts))
    known = entries(PAGE.read_text())
    problems = {
        "missing": [text for text in texts if text not in known],
        "obsolete": [text for text in known if text not in texts],
        "unexplained": [text for text, explanation in known.items() if not explanation.strip()],
    }
    for problem, which in problems.items():
        for text in which:
            print(f"{problem}: {text}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
