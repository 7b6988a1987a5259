"""Plain-text tables of quantities."""

import textwrap
from collections.abc import Sequence

_WIDTH = 100
_WIDEST = 32


def amount(number: float, unit: str) -> str:
    """Three digits and a unit: `1.2 MB`.

    >>> amount(1_234_567, "B"), amount(999.6, "FLOP"), amount(0, "B")
    ('1.23 MB', '1 kFLOP', '0 B')
    """
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}{unit}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; numbers stand on the right, long cells lose their middle.

    >>> print("\\n".join(table([("name", "count"), ("a", "1"), ("b", "12")])))
    name  count
    a         1
    b        12
    """
    short = [[_shortened(cell) for cell in row] for row in rows]
    columns = list(zip(*short, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell.isdigit() for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if digits else cell.ljust(width)
            for cell, width, digits in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in short
    ]


def note(text: str) -> str:
    """A note under a line, wrapped and indented."""
    return textwrap.fill(
        text,
        width=_WIDTH,
        initial_indent=" " * 4,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shortened(cell: str) -> str:
    if len(cell) <= _WIDEST:
        return cell
    half = (_WIDEST - 1) // 2
    return f"{cell[:half]}…{cell[-half:]}"
