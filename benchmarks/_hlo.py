"""What a compiled program costs, read off the text of its HLO: cycles, bytes, kernels, branches.

The text is that of `jax.jit(f).lower(...).compile().as_text()`, of the TPU's compiler or the GPU's.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(|\{)")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAMES = re.compile(r"%([\w.-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))"
)
_SORTS = re.compile(r"sort|top_?k", re.IGNORECASE)

KERNELS = {"fusion", "custom-call", "reduce", "sort"}
# What moves nothing, and what is counted where it is carried out.
_FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "iota", "call"}
_FREE |= {"while", "conditional", "partition-id", "replica-id", "after-all", "opt-barrier"}
_VIEWS = ("AllocateBuffer", "ConcatBitcast")  # custom calls of the TPU that move nothing


@dataclasses.dataclass
class Work:
    """What is carried out; of a loop, in all its trips."""

    cycles: int = 0
    """The TPU compiler's estimate; it has none for scalars and for sorts. 0 on a GPU."""
    bytes: int = 0
    """Operands and results in the device's memory of all operations: what caches do is left out,
    and an operand of which a kernel reads a part counts whole."""
    kernels: int = 0
    """Fusions, custom calls, single reductions and sorts."""
    copies: int = 0

    def __add__(self, other: "Work") -> "Work":
        return self._by(lambda a, b: a + b, other)

    def times(self, number: int) -> "Work":
        return Work(*(number * x for x in dataclasses.astuple(self)))

    def _by(self, fun: Callable[[int, int], int], other: "Work") -> "Work":
        return Work(*map(fun, dataclasses.astuple(self), dataclasses.astuple(other)))


@dataclasses.dataclass
class Program:
    """A compiled program."""

    least: Work
    """If every conditional takes its cheapest branch: an ordinary step."""
    most: Work
    """If every conditional takes its dearest branch."""
    conditionals: int
    sorts: int
    """Custom calls that sort or select among them."""
    loops: int
    loops_of_unknown_trips: int
    """Their bodies count once."""


@dataclasses.dataclass
class _Operation:
    name: str
    type: str
    kind: str
    rest: str

    def operands(self) -> list[str]:
        return _NAMES.findall(self.rest.split("), ")[0])

    @property
    def constant(self) -> int | None:
        """The whole number that it is."""
        found = re.match(r"(\d+)\)", self.rest) if self.kind == "constant" else None
        return int(found[1]) if found and self.type.startswith(("s32[]", "u32[]")) else None

    def called(self, attribute: str) -> list[str]:
        return re.findall(rf"{attribute}=%?([\w.-]+)", self.rest)


def read(text: str) -> Program:
    """The costs of a program."""
    computations, entry = _computations(text)
    operations = [op for ops in computations.values() for op in ops]
    loops = [op for op in operations if op.kind == "while"]

    def trips(op: _Operation) -> int | None:
        """Of a loop: the compiler says, or its condition compares a counter with a constant."""
        if known := _TRIPS.search(op.rest):
            return int(known[1])
        (condition,) = op.called("condition")
        inside = computations[condition]
        limits = [x.constant for x in inside if x.kind == "constant" and x.constant is not None]
        compares = [x for x in inside if x.kind == "compare" and "direction=LT" in x.rest]
        return limits[0] if len(limits) == len(compares) == 1 else None

    @functools.cache
    def work(name: str, pick: Callable) -> Work:
        ops = computations[name]
        types = {op.name: op for op in ops}
        total = Work()
        for op in ops:
            total += _alone(op, types)
            for times, called in _carried_out(op, trips, lambda name: work(name, pick), pick):
                total += called.times(times)
        return total

    return Program(
        least=work(entry, min),
        most=work(entry, max),
        conditionals=sum(op.kind == "conditional" for op in operations),
        sorts=sum(_is_sort(op) for op in operations),
        loops=len(loops),
        loops_of_unknown_trips=sum(trips(op) is None for op in loops),
    )


def size_of(text: str, *, device_only: bool = False) -> int:
    """Bytes of the arrays in a type; `device_only` leaves out a TPU's on-chip memories."""
    return sum(
        _bits(dtype) * math.prod(int(d) for d in shape.split(",") if d) // 8
        for dtype, shape, layout in _ARRAY.findall(text)
        if not (device_only and "S(" in layout)
    )


def _computations(text: str) -> tuple[dict[str, list[_Operation]], str]:
    """Their operations, by name, and the name of the one that is called first."""
    found: dict[str, list[_Operation]] = {}
    here: list[_Operation] = []
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (head := _HEAD.match(line)):
            here = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            here.append(_Operation(*match.groups()))
    if not entry:
        raise ValueError("no program in the text. Pass what `compiled.as_text()` returns.")
    return found, entry


def _alone(op: _Operation, ops: dict[str, _Operation]) -> Work:
    """An operation without what it calls."""
    if op.kind in _FREE or op.kind.endswith("-start") or any(v in op.rest for v in _VIEWS):
        return Work()
    operands = [ops[name] for name in dict.fromkeys(op.operands()) if name in ops]
    moved = size_of(op.type, device_only=True)
    if op.kind.endswith("-done"):  # as much is read, where the start read from the device's memory
        sources = [ops[name] for start in operands for name in start.operands() if name in ops]
        far = any(size_of(source.type, device_only=True) for source in sources)
        moved += size_of(op.type) if far else 0
    else:
        moved += sum(size_of(operand.type, device_only=True) for operand in operands)
    cycles = _CYCLES.search(op.rest)
    return Work(
        cycles=int(cycles[1]) if cycles else 0,
        bytes=moved,
        kernels=int(op.kind in KERNELS),
        copies=int(op.kind in ("copy", "copy-done")),
    )


def _carried_out(
    op: _Operation, trips: Callable, work: Callable[[str], Work], pick: Callable
) -> Iterator[tuple[int, Work]]:
    """What an operation calls, and how often. What a fusion calls is the fusion."""
    if op.kind == "while":
        for name in op.called("body") + op.called("condition"):
            yield trips(op) or 1, work(name)
    elif op.kind == "conditional":
        names = [n for both in _BRANCHES.findall(op.rest) for n in _NAMES.findall("".join(both))]
        yield 1, functools.reduce(lambda a, b: a._by(pick, b), map(work, names))
    elif op.kind == "call":
        for name in op.called("to_apply"):
            yield 1, work(name)


def _is_sort(op: _Operation) -> bool:
    if op.kind == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', op.rest)
        return bool(target and _SORTS.search(target[1]))
    return op.kind in ("sort", "topk")


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
