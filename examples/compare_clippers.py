"""Compare gradient clippers on real data, in fair weather and foul; `make demo` runs this.

Two MLPs and a CNN (Flax NNX, SGD with momentum) learn scikit-learn's bundled handwritten
digits and breast-cancer measurements, without clipping and under six clippers, when
  clean        nothing is wrong,
  label_noise  40 % of the training labels are replaced by another class,
  spike        on one step in 50 the gradient is 1000 times too large,
  nan          one batch, half-way, holds nothing but NaN,
  nan_guarded  the same, with every optimizer inside `skip_nonfinite`.

The bound of a clipper is the upper quartile of what it measures during a clean, unclipped
run with a seed of its own: chosen once per workload, before any comparison, so that a clean
run is clipped now and then and a bad step always (AGC, which has a bound for each unit, clips some
unit on nearly every step). `--quantile 0.5` clips harder.

SGD rather than Adam, because the size of its steps follows the size of the gradient, which
is what clipping bounds. Adam divides by the size of past gradients: a spike moves the
parameters less and then makes learning stall. `--optimizer adam` shows that.

    python examples/compare_clippers.py
    python examples/compare_clippers.py --quick --clippers none global --settings spike

A table goes to the terminal; report.html, results.csv, results.json, overview.png and accuracy.png
to the folder `--out`. Timings are in the table, the report and the JSON; the CSV has none, so that
the same seeds give the same CSV, byte for byte.
"""

import argparse
import csv
import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import flax
import jax
import optax
from _report import write_pictures, write_report
from _results import Results
from _training import (
    CLIPPER_TITLES,
    CLIPPERS,
    EVAL_EVERY,
    OPTIMIZERS,
    SETTINGS,
    WORKLOADS,
    Run,
    Trainer,
)
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the tables and writes the files."""
    options = parse(argv)
    console = Console()
    start = time.perf_counter()
    results = compare(options, console)
    for workload in options.workloads:
        console.print(table(results, workload))
    write_files(results, options.out)
    elapsed = time.perf_counter() - start
    console.print(f"{len(results.runs)} runs in {elapsed:.0f} s. See {options.out}/report.html")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; an unknown name prints the valid ones and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {"nargs": "+", "metavar": "NAME"}
    for option, known in (("clippers", CLIPPERS), ("settings", SETTINGS)):
        parser.add_argument(
            f"--{option}", **names, choices=list(known), default=list(known),
            help=f"any of: {', '.join(known)} (default: all)",
        )  # fmt: skip
    parser.add_argument("--seeds", type=_positive, help="how many, from 0 on (default 5)")
    parser.add_argument("--out", type=Path, default=Path("out/compare_clippers"), metavar="FOLDER")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--quantile", type=_fraction, default=0.75, help="of norms, the bound")
    parser.add_argument("--quick", action="store_true", help="MLP on digits alone, short, 2 seeds")
    options = parser.parse_args(argv)
    # In the order of the tables, each once.
    options.clippers = [name for name in CLIPPERS if name in options.clippers]
    options.settings = [name for name in SETTINGS if name in options.settings]
    options.workloads = list(WORKLOADS)[:1] if options.quick else list(WORKLOADS)
    options.steps = 200 if options.quick else 400
    options.seeds = options.seeds or (2 if options.quick else 5)
    return options


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return int(text)


def _fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return float(text)


def compare(options: argparse.Namespace, console: Console) -> Results:
    """Runs every combination, with a progress bar."""
    runs: list[Run] = []
    bounds: dict[str, dict[str, float]] = {}
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        each = len(options.settings) * len(options.clippers) * options.seeds
        bar = progress.add_task("", total=each * len(options.workloads))
        for workload in options.workloads:
            progress.update(bar, description=f"{WORKLOADS[workload].title}: choosing bounds")
            trainer = Trainer(
                workload,
                options.clippers,
                optimizer=options.optimizer,
                steps=options.steps,
                quantile=options.quantile,
            )
            bounds[workload] = trainer.bounds
            for setting in options.settings:
                title = f"{WORKLOADS[workload].title}: {setting}"
                progress.update(bar, description=title)
                for clipper in options.clippers:
                    for seed in range(options.seeds):
                        runs.append(trainer.run(setting, clipper, seed))
                        progress.advance(bar)
    config = {
        "workloads": options.workloads,
        "settings": options.settings,
        "clippers": options.clippers,
        "optimizer": options.optimizer,
        "seeds": list(range(options.seeds)),
        "steps": options.steps,
        "bound_quantile": options.quantile,
    }
    return Results(config, bounds, runs)


def table(results: Results, workload: str) -> Table:
    """The table of one workload for the terminal."""
    view = Table(
        title=WORKLOADS[workload].title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("setting", "clipper"):
        view.add_column(name, no_wrap=True)
    for name in ("accuracy %", "clipped", "to 90%", "µs/step"):
        view.add_column(name, justify="right", no_wrap=True)
    for setting in results.config["settings"]:
        rows = results.rows_of(workload, setting)
        for i, row in enumerate(rows):
            view.add_row(
                SETTINGS[setting].title if i == 0 else "",
                CLIPPER_TITLES[row.clipper],
                *row.cells(),
                end_section=i == len(rows) - 1,
            )
    return view


def write_files(results: Results, out: Path) -> None:
    """The CSV (a line per run), the JSON (a record per row), the report and the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(results, out / "results.csv")
    record = {
        "config": results.config,
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (optaxclip, jax, optax, flax)},
        },
        "device": jax.devices()[0].device_kind,
        "bounds": results.bounds,
        "rows": [dataclasses.asdict(row) for row in results.rows],
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_report(results, out / "report.html")
    write_pictures(results, out)


def write_csv(results: Results, path: Path) -> None:
    """A line per run; nothing that depends on the clock."""
    header = (
        "workload setting clipper seed bound test_accuracy clip_rate steps_to_90"
        " skipped_steps lost_to_nonfinite final_loss"
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split())
        for run in results.runs:
            writer.writerow(
                [
                    *(run.workload, run.setting, run.clipper, run.seed),
                    results.bounds[run.workload].get(run.clipper, ""),
                    f"{run.accuracy[-1]:.4f}",
                    "" if run.clip_rate is None else f"{run.clip_rate:.4f}",
                    results.steps_to_90(run) or "",
                    run.skipped,
                    int(run.lost),
                    f"{run.loss[-EVAL_EVERY:].mean():.4g}",
                ]
            )


if __name__ == "__main__":
    raise SystemExit(main())
