"""What clipping each example costs a large language model on a TPU pod, by the compiler's figures.

    make compilers
    python benchmarks/at_scale.py --models 134M       # 16 chips, about 15 minutes on 2 cores
    python benchmarks/at_scale.py --json docs/at_scale.json --markdown docs/concepts/at_scale.md

Compiled for chips that are not there, in `.venv-tpu`: nothing is run, and nothing timed but
compilation. Parameters are float32 and fully sharded, activations bfloat16, layers scanned and
checkpointed, as is what follows them; the batch is split over the chips. Prints markdown; `--rows`
takes rows found before:

    python benchmarks/at_scale.py --rows docs/at_scale.json --markdown docs/concepts/at_scale.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

from _at_scale_grid import MODELS, SYSTEMS, TOKENS
from _at_scale_page import page, report
from compiled import as_json, compile_in_turn


def main() -> None:
    """Compiles the cases, or reads what they gave, and prints the table."""
    args = _arguments()
    if args.rows:
        found = json.loads(args.rows.read_text())
    else:
        versions, rows = compile_in_turn("tpu", _cases(args), "_at_scale_cases.py")
        found = {"versions": versions, "rows": rows}
    print(report(**found))
    if args.json:
        args.json.write_text(as_json(**found))
    if args.markdown:
        args.markdown.write_text(page(**found))


def _cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"kind": MODELS[model].kind, "model": model, "tokens": tokens, "system": system}
        for model in args.models
        for tokens in args.tokens
        for system in args.systems
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--tokens", nargs="+", type=int, default=[*TOKENS])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    parser.add_argument("--rows", type=Path, help="JSON of an earlier run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
