"""The collectives in a compiled program, from the text of its HLO."""

import re
from typing import Any, NamedTuple

from _hlo import size_of

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_OPERATION = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{[^}]*\}|(?:true|false)_computation=%?[\w.-]+)")


class Collective(NamedTuple):
    """One operation, which may carry several arrays."""

    kind: str
    bytes: int
    """Of its result, on one device."""
    rare: bool
    """Whether it is in a branch of a conditional."""


def collectives(compiled: Any) -> list[Collective]:
    """Those of `jax.jit(f).lower(...).compile()`, each counted once, also in loops."""
    found: list[tuple[str, str, int]] = []
    always: dict[str, set[str]] = {}
    here = entry = ""
    for line in compiled.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            is_entry, name = re.match(r"(ENTRY )?%?([\w.-]+)", line).groups()
            here, entry = name, name if is_entry else entry
            always[here] = set()
        always.get(here, set()).update(_CALLED.findall(_BRANCHES.sub("", line)))
        if match := _OPERATION.search(line):
            found.append((here, match[2], size_of(match[1])))
    ordinary, ahead = set(), {entry}
    while ahead:
        ordinary |= ahead
        ahead = set().union(*(always.get(name, set()) for name in ahead)) - ordinary
    return [Collective(kind, size, place not in ordinary) for place, kind, size in found]
