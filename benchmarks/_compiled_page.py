"""Tables, bounds and the documentation's page, from the rows of `compiled.py`."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from _compiled_grid import ALONE, COUNTERPARTS, LAYOUTS, METHODS, PLAIN

Row = dict[str, Any]

CHIPS = {"v5e": "TPU v5e", "v6e": "TPU v6e", "h100": "H100"}
BRANCHLESS = ("value", "global", "leaf", "rms", "unit", "agc", "soft", "adagc", "quantile")
# What a step may cost at most, relative to Optax's counterpart.
COST, AGC, KERNELS, COMPILING = 1.05, 1.00, 1.35, 1.5
VALUE = 1.02  # relative to Adam alone

PAGE = """# What compilers say

{how}

**These are compilers' figures.** No program was run: what is quoted is what the compiler of the
accelerator says of the program that it would run. Fusions, memory, collectives and branches are
those of that program. Cycles are the compiler's estimates: it has none for sorts and for single
numbers, and none for waiting.

A step is `update` and `apply_updates` of a clipper and Adam in one jitted function with donated
state, without the gradient.

{names}

## One chip

* **cycles**: the TPU compiler's estimates, added up; a loop's body counts in each of its trips.
* **bytes**: operands and results of all operations that lie in the device's memory, relative to
  those of Adam alone. Adam reads or writes seven arrays; one more is 1.14x. On the H100 the
  compiler adds two copies a leaf, to Adam alone too, so that one more is 1.09x.
* **kernels**: fusions, custom calls, reductions and sorts. Copies are not counted.
* **memory**: temporary, beyond that of Adam alone.
* **control flow**: conditionals, sorts and loops, wherever in the program they are. Figures are
  those of a step whose conditionals take the cheaper branch; "at most" is the dearer. On a GPU the
  compiler turns a small conditional into a select: both branches then run, and none is left.
* **compile**: processor seconds of tracing and compiling.

In brackets Optax's counterpart; "/ Optax" is relative to it. What is beyond a bound stands bold;
the bounds are at the end.

{chips}

## On a mesh

All-reduces and the bytes of their results on one device, beyond those of Adam alone, traced on a
host with one device. Leaves are split along two axes, along one, along both at once; some are
whole, and under `jit` one gradient comes in shards of different sizes. Inside `jax.shard_map`
Optax's clippers take no collective, because they bound each device's part by itself. "(fails)"
stands where Optax's does not compile.

{meshes}

## Each example clipped

A gradient whose examples are clipped one by one (`per_example.reweighted_grad`) relative to the
plain gradient of the summed loss, of the models of `benchmarks/per_example.py`: what `"auto"`
takes, in parts of the batch where it likes, then each schedule over the whole batch. Memory is
temporary memory. "At most" is a step that takes the rare branches, where terms of a norm cancel.

{models}

## Bounds

{bounds}

This page is written by `benchmarks/compiled.py --markdown`, and `--json` writes
[its rows](compiled_cost.json).
"""
NAMES = """Trees: 25 leaves of 1024x1024 and 300 of 256x256, in float32, and "lm", the 182
parameters, 1.0e9 numbers, of a language model, with gradients in bf16, parameters and moments in
float32. Short names stand for `clip_by_value` with statistics, `clip_by_global_norm`,
`clip_by_leaf_norm`, `clip_by_leaf_rms` (rms), `clip_by_unit_norm`, `soft_clip`, `clip_by_history`,
`clip_by_quantile`, `gradient_stabilizer` and `spam_clip`. Optax's counterparts are `clip`,
`clip_by_global_norm`, `clip_by_block_rms` and `adaptive_grad_clip`: for a learned bound the one of
as many norms, and for `clip_by_unit_norm`, which has none, `adaptive_grad_clip`, although it reads
the parameters too; so does `clippy`, which is set beside it. `spam_clip` has no counterpart: it
reads and writes a state of the size of the parameters."""


def page(versions: dict[str, str], rows: list[Row]) -> str:
    """The documentation's page."""
    how = "Compiled with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
    return PAGE.format(
        how=textwrap.fill(how, 100),
        names=NAMES,
        chips=_sections(rows, "tree"),
        meshes=_sections(rows, "mesh"),
        models=_model_tables(rows),
        bounds=bounds(_steps(rows)),
    )


def report(versions: dict[str, str], rows: list[Row]) -> str:
    """What is printed."""
    parts = [_sections(rows, "tree"), _sections(rows, "mesh"), _model_tables(rows)]
    parts.append(bounds(_steps(rows)))
    return "\n\n".join([*filter(None, parts), f"Compilers' figures: {versions}"])


def _sections(rows: list[Row], place: str) -> str:
    titles = dict.fromkeys((row["kind"], row[place]) for row in rows if place in row)
    table = {"tree": _chip_table, "mesh": _mesh_table}[place]
    return "\n\n".join(
        f"### {CHIPS[kind]}, {name}\n\n"
        + table([r for r in rows if (r["kind"], r.get(place)) == (kind, name)])
        for kind, name in titles
    )


def _steps(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "model" not in row]


def _model_tables(rows: list[Row]) -> str:
    """A table a chip."""
    of_models = [row for row in rows if "model" in row]
    tables = []
    for kind in dict.fromkeys(row["kind"] for row in of_models):
        here = [row for row in of_models if row["kind"] == kind]
        decides = _decides(here[0])
        head = ["model", *(f"{decides}: {m}" if k == 0 else m for k, m in enumerate(METHODS))]
        head += [f"memory: {m}" if k == 0 else m for k, m in enumerate(METHODS)]
        names = dict.fromkeys(row["model"] for row in here)
        lines = [_model_line(name, [r for r in here if r["model"] == name]) for name in names]
        tables.append(f"### {CHIPS[kind]}, models\n\n{_markdown(head, lines)}")
    return "\n\n".join(tables)


def _model_line(model: str, rows: list[Row]) -> list[str]:
    by_system = {row["system"]: row for row in rows}
    plain = by_system[PLAIN]
    if "error" in plain:
        return [model, plain["error"], *[""] * (2 * len(METHODS) - 1)]
    costs, memories = [], []
    for row in map(by_system.get, METHODS):
        if row is None or "error" in row:
            full = row is not None and "RESOURCE_EXHAUSTED" in row["error"]
            costs.append("does not fit" if full else "fails")
            memories.append("")
            continue
        decides = _decides(row)
        least, most = row[decides], row["most"][decides]
        at_most = f", at most {most / plain[decides]:.2f}x" if most > 1.005 * least else ""
        costs.append(f"{least / plain[decides]:.2f}x{at_most}")
        of_plain = row["temporary"] / plain["temporary"] if plain["temporary"] else None
        memory = f"{row['temporary'] / 1e6:.0f} MB"
        memories.append(memory if of_plain is None else f"{of_plain:.2f}x")
    return [model, *costs, *memories]


def _clippers(rows: Sequence[Row]) -> list[str]:
    names = {row["name"] for row in rows}
    return [name for name in COUNTERPARTS if f"optaxclip {name}" in names]


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def _chip_table(rows: list[Row]) -> str:
    decides = _decides(rows[0])
    head = ["clipper", f"{decides} / Adam", "/ Optax"]
    head += ["bytes / Adam"] if decides == "cycles" else []
    head += ["kernels", "/ Optax", "memory", "control flow", "compile", "/ Optax"]
    lines = [_chip_line(name, rows) for name in _clippers(rows)]
    return _markdown(head, [line + [""] * (len(head) - len(line)) for line in lines])


def _decides(row: Row) -> str:
    return "bytes" if row["kind"] == "h100" else "cycles"


def _chip_line(clipper: str, rows: list[Row]) -> list[str]:
    ours, theirs, alone = _three(clipper, rows)
    if "error" in ours or "error" in alone:
        return [clipper, ours.get("error") or f"Adam alone: {alone['error']}"]
    limits = dict(_limits(clipper, rows))
    decides = _decides(ours)

    def over(key: str, form: str = "{:.2f}x") -> str:
        """Relative to Adam alone; in brackets Optax's."""
        bracket = f" ({form.format(theirs[key] / alone[key])})" if theirs else ""
        return form.format(ours[key] / alone[key]) + bracket

    def against(key: str) -> str:
        if not theirs:
            return ""
        ratio = f"{ours[key] / theirs[key]:.2f}x"
        return ratio if limits.get(key, True) else f"**{ratio}**"

    most = ours["most"][decides] / alone[decides]
    at_most = f", at most {most:.2f}x" if most > 1.005 * ours[decides] / alone[decides] else ""
    cost = over(decides) + at_most
    branches = _control_flow(ours)
    return [
        clipper,
        cost if limits.get("alone", True) else f"**{cost}**",
        against(decides),
        *([over("bytes")] if decides == "cycles" else []),
        f"{ours['kernels']}" + (f" ({theirs['kernels']})" if theirs else ""),
        against("kernels"),
        f"{(ours['temporary'] - alone['temporary']) / 1e6:.1f} MB"
        + (f" ({(theirs['temporary'] - alone['temporary']) / 1e6:.1f})" if theirs else ""),
        branches if limits.get("branches", True) else f"**{branches}**",
        f"{ours['seconds']:.1f} s" + (f" ({theirs['seconds']:.1f})" if theirs else ""),
        against("seconds"),
    ]


def _control_flow(row: Row) -> str:
    kinds = ("conditionals", "sorts", "loops")
    found = [f"{row[k]} {k if row[k] > 1 else k[:-1]}" for k in kinds if row[k]]
    if row["loops_of_unknown_trips"]:
        found.append(f"{row['loops_of_unknown_trips']} of unknown trips, counted once")
    return ", ".join(found) or "none"


def _three(clipper: str, rows: Sequence[Row]) -> tuple[Row, Row | None, Row]:
    """Ours, Optax's counterpart if there is one that compiles, and Adam alone."""
    by_name = {row["name"]: row for row in rows}
    theirs = by_name.get(f"optax {COUNTERPARTS[clipper]}")
    theirs = None if theirs is None or "error" in theirs else theirs
    return by_name[f"optaxclip {clipper}"], theirs, by_name[ALONE]


def _limits(clipper: str, rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    """What is bounded on one chip, and whether the bound is kept."""
    ours, theirs, alone = _three(clipper, rows)
    compiles = "error" not in ours and "error" not in alone
    yield "compiles", compiles
    if not compiles:
        return
    decides = _decides(ours)
    if clipper == "value":
        yield "alone", ours[decides] <= VALUE * alone[decides]
    if theirs:
        most = AGC if clipper == "agc" else COST
        yield decides, ours[decides] <= most * theirs[decides]
        yield "seconds", ours["seconds"] <= COMPILING * theirs["seconds"]
        if decides == "bytes":
            yield "kernels", ours["kernels"] <= KERNELS * theirs["kernels"]
    if clipper in BRANCHLESS:
        yield "branches", not ours["conditionals"] + ours["sorts"]


def _mesh_table(rows: list[Row]) -> str:
    layouts = [name for name in LAYOUTS if any(row["layout"] == name for row in rows)]
    head = ["clipper", *(cell for name in layouts for cell in (name, "bytes"))]
    lines = []
    for clipper in _clippers(rows):
        cells = [_mesh_cells(clipper, [r for r in rows if r["layout"] == x]) for x in layouts]
        lines.append([clipper, *(cell for pair in cells for cell in pair)])
    return _markdown(head, lines)


def _mesh_cells(clipper: str, rows: Sequence[Row]) -> tuple[str, str]:
    ours, theirs, alone = _three(clipper, rows)
    if "error" in ours or "error" in alone:
        return ours.get("error") or f"Adam alone: {alone['error']}", ""
    count = _collectives(ours, alone)
    if theirs:
        count += f" ({_collectives(theirs, alone)})"
    elif COUNTERPARTS[clipper]:
        count += " (fails)"
    moved = [r["collective_bytes"] - alone["collective_bytes"] for r in (ours, theirs) if r]
    return (
        count if _one_all_reduce(ours, alone) else f"**{count}**",
        f"{moved[0]:,}" + (f" ({moved[1]:,})" if theirs else ""),
    )


def _collectives(row: Row, alone: Row) -> str:
    extra = _beyond(row, alone)
    parts = [str(extra.pop("all-reduce", 0)), *(f"{n} {kind}" for kind, n in extra.items())]
    rare = sum(row["rare_collectives"].values()) - sum(alone["rare_collectives"].values())
    return " + ".join([*parts, *([f"{rare} in branches"] if rare else [])])


def _beyond(row: Row, alone: Row) -> dict[str, int]:
    """Collectives beyond those of Adam alone, by kind."""
    kinds = {**row["collectives"], **alone["collectives"]}
    counts = {k: row["collectives"].get(k, 0) - alone["collectives"].get(k, 0) for k in kinds}
    return {kind: number for kind, number in counts.items() if number}


def _one_all_reduce(row: Row, alone: Row) -> bool:
    """At most one all-reduce beyond Adam's, and nothing else, in branches neither."""
    extra = _beyond(row, alone)
    rare = row["rare_collectives"] != alone["rare_collectives"]
    return extra.pop("all-reduce", 0) <= 1 and not any(n > 0 for n in extra.values()) and not rare


TITLES = {
    "cycles": f"cycles on a TPU at most {COST}x those of Optax's counterpart (agc: {AGC:.2f}x)",
    "bytes": f"bytes on the H100 at most {COST}x those of Optax's counterpart (agc: {AGC:.2f}x)",
    "alone": f"value, with statistics, at most {VALUE}x Adam alone",
    "kernels": f"kernels on the H100 at most {KERNELS}x those of Optax's counterpart",
    "branches": f"no conditional and no sort in {', '.join(BRANCHLESS)}",
    "seconds": f"compiling takes at most {COMPILING}x as long as Optax's counterpart",
    "collectives": "on a mesh at most one all-reduce and nothing else",
    "compiles": "every program compiles",
}


def bounds(rows: list[Row]) -> str:
    """Each bound, how often it is kept, and where it is not."""
    places = dict.fromkeys(_place(row) for row in rows)
    here = {place: [row for row in rows if _place(row) == place] for place in places}
    kept = [
        (name, holds, place, clipper)
        for place in places
        for clipper in _clippers(here[place])
        for name, holds in _kept(clipper, here[place])
    ]
    lines = []
    for name, title in TITLES.items():
        cases = [case for case in kept if case[0] == name]
        missed: dict[str, list[str]] = {}
        for _, holds, place, clipper in cases:
            if not holds:
                missed.setdefault(place, []).append(clipper)
        if cases and (missed or name != "compiles"):
            number = len(cases) - sum(map(len, missed.values()))
            lines.append(f"* {title}: kept in {number} of {len(cases)}.")
            lines += [f"  * {place}: not by {', '.join(who)}" for place, who in missed.items()]
    return "\n".join(_wrapped(line) for line in lines)


def _wrapped(line: str) -> str:
    hang = " " * (line.index("*") + 2)
    return textwrap.fill(line, 100, subsequent_indent=hang, break_on_hyphens=False)


def _place(row: Row) -> str:
    return " ".join([row["kind"], *(row[k] for k in ("tree", "mesh", "layout") if k in row)])


def _kept(clipper: str, rows: list[Row]) -> Iterator[tuple[str, bool]]:
    if "tree" in rows[0]:
        yield from _limits(clipper, rows)
        return
    ours, _, alone = _three(clipper, rows)
    compiles = "error" not in ours and "error" not in alone
    yield "compiles", compiles
    if compiles:
        yield "collectives", _one_all_reduce(ours, alone)
