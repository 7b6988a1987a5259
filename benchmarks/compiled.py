"""What a clipper adds to a step of Adam on TPUs and on an H100, by their compilers' own figures,
and what clipping each example adds to a gradient.

    make bench-compiled                           # environments, the whole grid, the page
    python benchmarks/compiled.py --quick         # v5e and H100, under 3 minutes on 2 cores
    python benchmarks/compiled.py --kinds v5e,h100 --trees 25x1024 --only global,leaf
    python benchmarks/compiled.py --kinds v5e --meshes 4x4 --layouts jit --only global
    python benchmarks/compiled.py --kinds v5e --models "LM B=16 T=256"

The compilers of accelerators run without one (`_compilers.py`), each in a virtual environment of
its own, `.venv-tpu` and `.venv-cuda12`, which `make bench-compiled` makes. Nothing is run, and
nothing timed but compilation: a figure is what the compiler says of the program. Whoever names
trees, meshes or models gets none of the others. Prints markdown; writes JSON with `--json`, and
`--markdown` writes the documentation's page; with `--rows` from rows found before, of which later
files replace what they have too:

    python benchmarks/compiled.py --rows docs/compiled_cost.json out/new.json \\
        --json docs/compiled_cost.json --markdown docs/compiled_cost.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _compiled_grid import (
    COUNTERPARTS,
    KINDS,
    LAYOUTS,
    MESHES,
    METHODS,
    MODELS,
    PLAIN,
    TREES,
    names,
)
from _compiled_page import page, report

ROOT = Path(__file__).parents[1]
# With these the compilers look for no device.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
# What tells one row from another.
CASE = ("kind", "tree", "mesh", "layout", "name", "model", "system")
MESH_KINDS = ("v5e", "h100")  # of the two TPUs, which share a partitioner, one
# Those left out are much like one that is there.
QUICK_CLIPPERS = ["value", "global", "leaf", "unit", "agc", "zclip", "adagc", "quantile"]
QUICK_CLIPPERS += ["autoclip", "spam"]
QUICK_ON_MESHES = ["value", "global", "agc"]
QUICK = {"kinds": ["v5e", "h100"], "trees": ["25x1024"], "meshes": ["4x4"], "layouts": ["jit"]}
QUICK |= {"only": QUICK_CLIPPERS}


def main() -> None:
    """Compiles the cases, or reads what they gave, and prints the tables."""
    args = _arguments()
    if args.rows:
        found = _joined([json.loads(path.read_text()) for path in args.rows])
    else:
        cases = [*_on_chips(args), *_on_meshes(args), *_of_models(args)]
        parts = [compile_in_turn(extra, cases) for extra in dict.fromkeys(KINDS.values())]
        found = {
            "versions": {k: v for versions, _ in parts for k, v in versions.items()},
            "rows": [row for _, rows in parts for row in rows],
        }
    print(report(**found))
    if args.json:
        args.json.write_text(as_json(**found))
    if args.markdown:
        args.markdown.write_text(page(**found))


def _joined(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several files the last row of each case."""
    rows: dict[tuple[str, ...], dict] = {}
    for row in (row for file in files for row in file["rows"]):
        rows[tuple(str(row.get(key)) for key in CASE)] = row
    return {"versions": files[-1]["versions"], "rows": list(rows.values())}


def as_json(versions: dict[str, str], rows: list[dict]) -> str:
    """A line a row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n'


def _on_chips(args: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {"kind": kind, "tree": tree, "name": name}
        for kind in args.kinds
        for tree in args.trees
        for name in names(args.only)
    ]


def _on_meshes(args: argparse.Namespace) -> list[dict[str, str]]:
    clippers = [name for name in args.only if not args.quick or name in QUICK_ON_MESHES]
    return [
        {"kind": kind, "mesh": mesh, "layout": layout, "name": name}
        for kind in args.kinds
        if kind in MESH_KINDS
        for mesh in args.meshes
        for layout in args.layouts
        for name in names(clippers)
    ]


def _of_models(args: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {"kind": kind, "model": model, "system": system}
        for kind in args.kinds
        for model in args.models
        for system in (PLAIN, *METHODS)
    ]


def compile_in_turn(
    extra: str, cases: Sequence[dict[str, Any]], script: str = "_compiled_cases.py"
) -> tuple[dict[str, str], list[dict]]:
    """Versions, and a row for each of the cases of this compiler, in a process of its own.

    If the process dies, as when a check inside the compiler fails, the case it was at gets an
    error, and another process goes on from the next.
    """
    ahead = [case for case in cases if KINDS[case["kind"]] == extra]
    versions: dict[str, str] = {}
    rows: list[dict] = []
    while ahead:
        (versions, *found), complaint = _run(extra, ahead, script)
        if len(found) < len(ahead):
            found.append(ahead[len(found)] | {"error": f"the compiler died: {complaint}"})
        rows += found
        ahead = ahead[len(found) :]
    return versions, rows


def _run(extra: str, cases: Sequence[dict[str, Any]], script: str) -> tuple[list[dict], str]:
    """The lines of JSON that a process printed, and the last line of what it complained of."""
    python = ROOT / f".venv-{extra}" / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"the compiler of {extra} is missing, got no {python.relative_to(ROOT)}. Run"
            f" `make compilers`."
        )
    lines: list[dict] = []
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as given:
        json.dump(cases, given)
        given.seek(0)
        process = subprocess.Popen(
            [python, Path(__file__).with_name(script)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        )
        for line in filter(lambda line: line.startswith("{"), process.stdout):
            lines.append(json.loads(line))
            print(_progress(lines[-1]), file=sys.stderr, end="", flush=True)
        process.wait()
        errors.seek(0)
        complaints = errors.read().strip()
    if not lines:
        raise SystemExit(f"{python.relative_to(ROOT)} cannot compile:\n{complaints}")
    return lines, complaints.splitlines()[-1] if complaints else ""


def _progress(row: dict[str, Any]) -> str:
    if "kind" not in row:
        return ""
    names = (*CASE, "tokens")
    said = row.get("error") or f"{row['seconds']:.1f} s"
    return f"{' '.join(str(row[n]) for n in names if n in row)}: {said}\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="v5e and H100, a tree, a mesh")
    for name, table, meant in (
        ("kinds", KINDS, "what to compile for"),
        ("only", COUNTERPARTS, "clippers"),
        ("trees", TREES, "parameters on one chip"),
        ("meshes", MESHES, "meshes"),
        ("layouts", LAYOUTS, "how programs on meshes are written"),
        ("models", MODELS, "models whose examples are clipped"),
    ):
        parser.add_argument(f"--{name}", type=_some(table), help=f"{meant}: of {','.join(table)}")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--rows", type=Path, nargs="+", help="take these rows, compile nothing")
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    args = parser.parse_args()
    if args.quick:
        args = argparse.Namespace(**{k: v or QUICK.get(k) for k, v in vars(args).items()})
    places = args.trees or args.meshes or args.models
    args.trees = args.trees or ([] if places else [*TREES])
    args.meshes = args.meshes or ([] if places else [*MESHES])
    args.models = args.models or ([] if places else [*MODELS])
    args.kinds, args.only = args.kinds or [*KINDS], args.only or [*COUNTERPARTS]
    args.layouts = args.layouts or [*LAYOUTS]
    return args


def _some(table: Sequence[str] | dict[str, Any]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        for name in (found := text.split(",")):
            if name not in table:
                raise argparse.ArgumentTypeError(f"{name!r}. Use some of {','.join(table)}.")
        return found

    return chosen


if __name__ == "__main__":
    main()
