"""What a clipper adds to an optimizer's step: time and compile time, against Optax's clipper.

    python benchmarks/step_overhead.py            # the whole grid, about 70 minutes on 2 cores
    python benchmarks/step_overhead.py --quick    # Adam in float32 alone, about 9 minutes

A step is `update` and `apply_updates` in one jitted function with donated state. For each
tree, optimizer and dtype all variants run in one process on the same buffers, in a new random
order every round, and what is quoted is the median over rounds of time / time of the optimizer
alone in that round. The optimizer alone runs twice a round: the second is the "A/A" column,
which shows what the machine's noise is worth. Prints markdown; writes JSON with `--json`, and
`--markdown` writes the documentation's page; with `--rows` both from rows measured before:

    python benchmarks/step_overhead.py --json out/steps.json --markdown docs/step_overhead.md
    python benchmarks/step_overhead.py --rows out/steps.json --markdown docs/step_overhead.md
"""

import argparse
import functools
import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _measure import compiled, interleaved, machine, ratios, save

import optaxclip

TREES = {
    "25 x 1024x1024": [(1024, 1024)] * 25,
    "300 x 256x256": [(256, 256)] * 300,
    "1000 x 1024": [(1024,)] * 1000,
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "sgd+momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "lion": lambda: optax.lion(1e-4),
}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# name: (Optax's or None, ours). Given bounds are such that every step clips.
CLIPPERS: dict[str, tuple[Callable[[], Any] | None, Callable[[], Any]]] = {
    "value": (lambda: optax.clip(0.5), lambda: optaxclip.clip_by_value(0.5)),
    "value, stats=False": (
        lambda: optax.clip(0.5),
        lambda: optaxclip.clip_by_value(0.5, stats=False),
    ),
    "global": (lambda: optax.clip_by_global_norm(1.0), lambda: optaxclip.clip_by_global_norm(1.0)),
    "rms": (lambda: optax.clip_by_block_rms(0.5), lambda: optaxclip.clip_by_leaf_rms(0.5)),
    "agc": (lambda: optax.adaptive_grad_clip(0.01), lambda: optaxclip.agc(0.01)),
    "autoclip": (None, optaxclip.autoclip),
    "zclip": (None, optaxclip.zclip),
    "adagc": (None, optaxclip.adagc),
    "history": (None, optaxclip.clip_by_history),
    "quantile": (None, optaxclip.clip_by_quantile),
    "adaclip": (None, optaxclip.adaclip),
    "spam": (None, optaxclip.spam_clip),
    "spam, stats=False": (None, lambda: optaxclip.spam_clip(stats=False)),
    "autoclip by leaf": (None, lambda: optaxclip.autoclip(by="leaf")),
}
ALONE, AGAIN = "alone", "alone again"


def main() -> None:
    """Runs the grid, or reads what it gave, and prints the tables."""
    args = _arguments()
    if args.rows:
        parts = [json.loads(path.read_text()) for path in args.rows]
        found = {
            "machine": parts[0]["machine"],
            "rows": [row for part in parts for row in part["rows"]],
        }
        print(*(f"\n{title}\n\n{table}" for title, table in _tables(found["rows"])), sep="\n")
    else:
        found = {"machine": machine(), "rows": _measure_all(args)}
    print(f"\n{found['machine']}\n{_noise(found['rows'])}")
    save(found, args.json)
    if args.markdown:
        args.markdown.write_text(_page(**found))


def _measure_all(args: argparse.Namespace) -> list[dict]:
    rows = []
    for optimizer in args.optimizers:
        for dtype in args.dtypes:
            found = [
                row
                for tree in args.trees
                for row in measure(tree, optimizer, dtype, args.clippers, args.rounds)
            ]
            for title, table in _tables(found):
                print(f"\n{title}: optaxclip (Optax); compile seconds\n\n{table}", flush=True)
            rows += found
    return rows


def measure(tree: str, optimizer: str, dtype: str, clippers: list[str], rounds: int) -> list[dict]:
    """One row per clipper: median ratios to the optimizer alone, and compile seconds."""
    tx = OPTIMIZERS[optimizer]()
    params, grads = (_arrays(tree, dtype, seed) for seed in (0, 1))
    transforms = {ALONE: optax.identity(), AGAIN: optax.identity()}
    for clipper in clippers:
        for system, make in zip(("optax", "optaxclip"), CLIPPERS[clipper], strict=True):
            if make is not None:
                transforms[f"{system} {clipper}"] = make()
    state = {"params": params, "opt": tx.init(params)}
    variants, compile_s = {}, {}
    for name, clip in transforms.items():
        state[name] = clip.init(params)
        args = (state["params"], state["opt"], state[name], grads)
        step, compile_s[name] = compiled(_step(clip, tx), *args, donate_argnums=(0, 1, 2))
        variants[name] = functools.partial(_take, step, state, name, grads)
    times = interleaved(variants, rounds)
    of_alone = ratios(times, ALONE)
    return [
        {
            "tree": tree,
            "optimizer": optimizer,
            "dtype": dtype,
            "clipper": clipper,
            "alone_ms": 1e3 * statistics.median(times[ALONE]),
            "alone_again": of_alone[AGAIN],
            "alone_compile_s": compile_s[ALONE],
            "optax": of_alone.get(f"optax {clipper}"),
            "optaxclip": of_alone[f"optaxclip {clipper}"],
            "optax_compile_s": compile_s.get(f"optax {clipper}"),
            "optaxclip_compile_s": compile_s[f"optaxclip {clipper}"],
        }
        for clipper in clippers
    ]


def _step(clip: Any, tx: Any) -> Any:
    def step(params: Any, opt_state: Any, clip_state: Any, grads: Any) -> Any:
        updates, clip_state = clip.update(grads, clip_state, params)
        updates, opt_state = tx.update(updates, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, clip_state

    return step


def _take(step: Callable, state: dict[str, Any], name: str, grads: Any) -> Any:
    """One step; parameters and moments go on from whichever variant came before."""
    results = step(state["params"], state["opt"], state[name], grads)
    state["params"], state["opt"], state[name] = results
    return results


def _arrays(tree: str, dtype: str, seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(TREES[tree]))
    return {
        f"p{i:04}": jax.random.normal(key, shape, DTYPES[dtype])
        for i, (key, shape) in enumerate(zip(keys, TREES[tree], strict=True))
    }


PAGE = """# What a clipper adds to a step

{machine}

A figure is the time of the optimizer's part of a training step (`update` and `apply_updates`,
jitted, without the gradient) with the clipper, relative to that without, and then the seconds it
takes to compile; in brackets the same with Optax's counterpart. "25 x 1024x1024" is a tree of 25
leaves of shape 1024x1024. Medians over interleaved rounds.

{names}

{tables}

## Where the time goes

* **`global`**: with Adam in float32 a step takes about half as long as with Optax's. Optax divides
  inside a select, which XLA repeats in every kernel that uses the result; here one scalar is
  multiplied in. With momentum one kernel uses it, and the two are equal. What remains is reading
  the gradient once more: Adam reads or writes seven arrays of its size, and an eighth adds a
  seventh where memory is the limit, as it is here.
* **`rms`** looks whether a sum overflowed before it uses it, so that a leaf is not measured and
  updated in one go; Optax does not look. `agc` reads the parameters too; its sums are in float32
  first for leaves of 2^18 elements and more, and in float64 for smaller ones.
* **`value`** reads the gradient twice more for its statistics, of which Optax has none: for the
  largest element, and for a sum that tells whether there is NaN.
* **`spam`** reads and writes a state of the size of the parameters, and its statistics read that
  and the gradient once more.

These are figures of a CPU. What compilers make of the same steps on a TPU and an H100:
[compiled](compiled_cost.md).

This page is written by `benchmarks/step_overhead.py --markdown`.
"""
NAMES = """Short names stand for `clip_by_value`, `clip_by_global_norm`, `clip_by_leaf_rms` (rms),
`clip_by_history`, `clip_by_quantile` and `spam_clip`. Optax's counterparts are `clip`,
`clip_by_global_norm`, `clip_by_block_rms` and `adaptive_grad_clip`."""


def _page(machine: str, rows: list[dict]) -> str:
    # Other pages include the names or a single table: from the mark to the next end.
    names = f"<!-- names -->\n\n{NAMES}\n\n<!-- end -->"
    tables = "\n\n".join(
        f"## {title}\n\n<!-- {title} -->\n\n{table}\n\n<!-- end -->"
        for title, table in _tables(rows)
    )
    machine = textwrap.fill(f"Measured on one machine: {machine}. {_noise(rows)}", 100)
    return PAGE.format(tables=tables, machine=machine, names=names)


def _noise(rows: list[dict]) -> str:
    noise = [row["alone_again"] for row in rows]
    return (
        f"The optimizer alone, timed twice (A/A), takes {min(noise):.2f}x to {max(noise):.2f}x its"
        " own time: closer than that, two figures are equal."
    )


def _tables(rows: list[dict]) -> list[tuple[str, str]]:
    """Title and markdown, one table for each optimizer and dtype, in the order of the rows."""
    titles = dict.fromkeys((row["optimizer"], row["dtype"]) for row in rows)
    return [
        (", ".join(title), _markdown([r for r in rows if (r["optimizer"], r["dtype"]) == title]))
        for title in titles
    ]


def _markdown(rows: list[dict]) -> str:
    trees, clippers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("tree", "clipper"))
    by_place = {(row["tree"], row["clipper"]): row for row in rows}
    lines = [
        f"| clipper | {' | '.join(f'{tree} | compile' for tree in trees)} |",
        f"| --- | {' | '.join(['---:'] * (2 * len(trees)))} |",
    ]
    for clipper in clippers:
        found = [by_place[tree, clipper] for tree in trees]
        cells = [_cell(row, key, form) for row in found for key, form in _COLUMNS]
        lines.append(f"| {' | '.join((clipper, *cells))} |")
    return "\n".join(lines)


_COLUMNS = (("{}", "{:.2f}x"), ("{}_compile_s", "{:.1f}"))


def _cell(row: dict, key: str, form: str) -> str:
    ours, theirs = row[key.format("optaxclip")], row[key.format("optax")]
    return form.format(ours) + ("" if theirs is None else f" ({form.format(theirs)})")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Adam in float32 alone")
    for name, table in (
        ("trees", TREES),
        ("optimizers", OPTIMIZERS),
        ("dtypes", DTYPES),
        ("clippers", CLIPPERS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=list(table), default=list(table))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="take the rows of these JSONs, measure nothing"
    )
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    args = parser.parse_args()
    if args.quick:
        args.optimizers, args.dtypes = ["adam"], ["f32"]
    return args


if __name__ == "__main__":
    main()
