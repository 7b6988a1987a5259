"""What clipping does to stability, robustness and speed: every clipper, model and regulariser.

{MLP, CNN, LSTM, transformer} x {no clipping, by value, by global norm, AGC, per example, zclip} x
{plain, weight decay, dropout, label smoothing, adversarial training, SAM}, on scikit-learn's digits
and breast cancer, with SGD and momentum; the plain runs also at a larger learning rate ("stress")
and with ever stricter bounds. Measured: accuracy, its spread over seeds, sensitivity to the input,
accuracy under attack (PGD) and noise, steps to a target, the share of clipped steps.

The comparison is fair in this sense: runs of one cell have the same seeds, first weights, batches
and learning rate. The bounds of value, global and per-example clipping are the median of what they
measure in unclipped runs with seeds of their own, one bound for a model and data set; AGC (0.01)
and zclip have their defaults. The larger learning rate is the first of 2, 4, 8, ... times the usual
one at which most of these runs fail.

    python examples/robustness_study.py               # 1920 runs, some 15 minutes on 2 cores
    python examples/robustness_study.py --minutes 3   # goes on where it stopped, for 3 minutes
    python examples/robustness_study.py --quick       # MLP on digits, 2 seeds, 60 steps: 30 seconds

Rows go to results.csv in the folder `--out` as they are found; tables and figures follow at the
end. `--page docs/robustness.md` also writes the tables into that page, between its markers.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _study_models import DATA, MODELS
from _study_report import fill_page, write_report
from _study_results import load
from _study_training import RATES, REGULARISERS, STRESS, Piece, Study


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing; writes the report when nothing is."""
    options = parse(argv)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "seeds": options.seeds, "rates": RATES}
    settings |= {"stress": list(STRESS)}
    same_settings(options.out / "settings.json", settings)
    path = options.out / "results.csv"
    missing = [p for p in pieces(options) if p not in finished(path, options.seeds)]
    for (data, model), some in itertools.groupby(missing, lambda p: (p.data, p.model)):
        study = bounds = None
        for piece in some:
            if time.perf_counter() - start > 60 * options.minutes:
                print(f"stopped after {options.minutes:g} minutes; run it again to go on")
                return 0
            study = study or Study(data, model, steps=options.steps, seeds=options.seeds)
            bounds = bounds or study.pilot()
            append(path, study.run(piece, bounds))
            name = f"{model} on {DATA[data].title}, {piece.regulariser}, {piece.setting}"
            print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
    write_report(load(path), options.steps, options.out)
    if options.page:
        fill_page(options.page, options.out)
    print(f"all runs are there. See {options.out}/tables.md")
    return 0


def pieces(options: argparse.Namespace) -> list[Piece]:
    """Those that use one compiled program follow each other."""
    wanted = []
    for data, model in itertools.product(options.data, options.models):
        wanted += [Piece(data, model, r, "base") for r in options.regularisers[:1]]
        wanted += [Piece(data, model, "plain", s) for s in ("stress", "strict")]
        wanted += [Piece(data, model, r, "base") for r in options.regularisers[1:]]
    return wanted


def same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raises if the folder holds a study with other settings."""
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        raise ValueError(
            f"the folder holds a study with other settings, got {found} at {path}. Choose another"
            " folder for --out, or delete this one."
        )
    path.write_text(json.dumps(settings) + "\n")


def finished(path: Path, seeds: int) -> set[Piece]:
    """The pieces that have all their rows; of one that was cut off the rows are removed."""
    rows = load(path)
    keys = [Piece(r["data"], r["model"], r["regulariser"], r["setting"]) for r in rows]
    done = {k for k in keys if keys.count(k) == len(k.variants()) * seeds}
    if set(keys) - done:
        path.unlink()
        append(path, [r for r, k in zip(rows, keys, strict=True) if k in done])
    return done


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the CSV; the first get a header."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        if new and rows:
            writer.writeheader()
        writer.writerows(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing after them")
    parser.add_argument("--out", type=Path, default=Path("out/robustness_study"), metavar="FOLDER")
    parser.add_argument("--page", type=Path, help="a page to write the tables into")
    parser.add_argument("--quick", action="store_true", help="MLP on digits, 2 seeds, 60 steps")
    options = parser.parse_args(argv)
    if options.quick:
        options.data, options.models = ["digits"], ["MLP"]
    options.regularisers = list(REGULARISERS[: 2 if options.quick else None])
    options.steps, options.seeds = (60, 2) if options.quick else (250, 5)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
