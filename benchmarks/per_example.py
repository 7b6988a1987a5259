"""What per-example clipping adds to a gradient: time, memory and compile time, by model.

    python benchmarks/per_example.py                  # every model, about 15 minutes on 2 cores
    python benchmarks/per_example.py --quick          # the MLP and two language models
    python benchmarks/per_example.py --preset others  # as other packages have them, as long again
    python benchmarks/per_example.py --preset gpu     # larger models
    python benchmarks/per_example.py --crossover      # from many short examples to few long ones

Each system computes `sum_b c_b g_b` with `c_b = min(1, 1 / |g_b|)`; the plain gradient is that of
the summed loss. All run in one process in a new random order every round; quoted is the median
over rounds of time / time of the plain gradient in that round. Temporary memory is XLA's figure.
"auto" also picks the micro-batch; one pass and stacking run whole and in 2 and 4 parts, and the
best of all that is ours is shown. jax-privacy runs at the micro-batch sizes 1, 4, 8, 16 and none;
its best time is shown, if it is installed; not for the others, where it loops over convolutions.
`--crossover` cuts one number of tokens into sequences of different lengths, and shows which method
is faster and which one "auto" takes. Prints markdown; writes JSON with `--json`, and `--markdown`
writes the documentation's page; with `--rows` from rows measured before, in several runs:

    python benchmarks/per_example.py --rows out/*.json --markdown docs/per_example_cost.md
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _models as models
import _others as others
import jax
import jax.numpy as jnp
from _measure import compiled, interleaved, machine, ratios, save

import optaxclip
from optaxclip.per_example import reweighted_grad

try:
    from jax_privacy.clipping import clipped_grad as privacy_clipped_grad
except ImportError:
    privacy_clipped_grad = None

PRESETS: dict[str, dict[str, Callable[[], models.Workload]]] = {
    "cpu": {
        "MLP B=256": lambda: models.mlp(256),
        "LM B=32 T=64": lambda: models.lm(32, 64),
        "LM B=32 T=64 tied": lambda: models.lm(32, 64, tied=True),
        "LM B=16 T=128": lambda: models.lm(16, 128),
        "LM B=16 T=128 tied": lambda: models.lm(16, 128, tied=True),
        "LM B=4 T=512": lambda: models.lm(4, 512),
        "LM B=4 T=512 tied": lambda: models.lm(4, 512, tied=True),
        "LM B=16 T=128 scanned, remat": lambda: models.lm(16, 128, scanned=True),
        "CNN B=64": lambda: models.cnn(64),
        "LSTM B=64 T=64": lambda: models.lstm(64, 64),
    },
    "gpu": {
        "MLP B=4096": lambda: models.mlp(4096, 4096),
        "LM B=64 T=256": lambda: _large(64, 256),
        "LM B=64 T=256 tied": lambda: _large(64, 256, tied=True),
        "LM B=16 T=1024": lambda: _large(16, 1024),
        "LM B=16 T=1024 scanned, remat": lambda: _large(16, 1024, scanned=True),
        "CNN B=1024": lambda: models.cnn(1024, (64, 128, 256)),
        "LSTM B=1024 T=128": lambda: models.lstm(1024, 128, 512),
    },
    "others": others.MODELS,
}
QUICK = ("MLP B=256", "LM B=32 T=64", "LM B=16 T=128 tied")
METHODS = ("auto", "one_pass", "two_pass", "vmap")
IN_PARTS = ("one_pass", "vmap")
PARTS = (2, 4)
SLOW = 10
"""What takes so many times the plain gradient's time is run in three rounds only."""
MICROBATCHES = (1, 4, 8, 16, None)
PLAIN, AGAIN = "plain", "plain again"
COLUMNS = (
    "model", "auto", "best", "one_pass", "two_pass", "vmap", "jax-privacy (micro-batch)",
    "memory: auto", "one_pass", "two_pass", "vmap", "compile: auto",
)  # fmt: skip
PEER = "jax-privacy (micro-batch)"


def _head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n| --- | {' | '.join(['---:'] * (len(columns) - 1))} |"


HEAD = _head(COLUMNS)
HEAD_OF_OTHERS = _head([column for column in COLUMNS if column != PEER])

PAGE = """# What clipping each example costs

Time of a gradient whose examples are clipped one by one (`reweighted_grad`) relative to the plain
gradient of the summed loss. "auto": with the schedule and the number of parts that `"auto"` picks,
which stand in brackets; "best": the fastest of all schedules, whole and in 2 or 4 parts; then
each schedule over the whole batch, then jax-privacy's `clipped_grad` at the fastest of its
micro-batch sizes, which stands in brackets. After it temporary memory, by XLA's figure, and the
time to trace and compile, relative to the plain gradient's too. B is the number of examples, T the
length of a sequence.

{table}

{machine}. {noise} Medians over interleaved rounds. {auto}

`one_pass` holds the cotangents of every layer until the norms are known, where a plain gradient
drops each once it is used. `"auto"` makes up for that by taking a part of the batch at a time,
where that is worth it; a plain gradient taken in parts would gain as well. `two_pass` goes backward
a second time instead of keeping the factors. `vmap` stacks the gradients, which is best for few
long examples. With remat ("scanned, remat") what the norms need is kept, so that a part of what
remat saves is lost. The parameters of the MLP are large beside its activations, so that its batch
is not cut; a plain gradient holds {mlp_memory:.0f} MB there. Parts with convolutions are written
out, as XLA runs these without its library in a loop; a CPU then holds all parts, and is quicker.

These are choices for a CPU. On an accelerator `"auto"` counts a byte moved as 20 operations, not 7,
and takes parts for memory alone, as they cost time there; `explain` shows both.

## Models as other packages have them

A U-Net, a score network with transposed convolutions, transformers on patches and on sound with a
CTC loss, an ODE differentiated step by step: `benchmarks/_others.py`.

{others}

A whole step, with Adam, and other aggregators than `clip_per_example`:
[What aggregators cost](aggregators_cost.md).

This page is written by `benchmarks/per_example.py --markdown`.
"""


def main() -> None:
    """Measures every model, or reads what was measured, and prints the table."""
    args = _arguments()
    if args.crossover:
        crossover(args.preset, args.rounds)
        return
    print(HEAD_OF_OTHERS if args.preset == "others" else HEAD, flush=True)
    if args.rows:
        files = [json.loads(path.read_text()) for path in args.rows]
        rows = {row["model"]: row for file in files for row in file["rows"]}
        order = [model for preset in PRESETS.values() for model in preset]
        found = {
            "machine": files[0]["machine"],
            "rows": [rows[model] for model in order if model in rows],
        }
        print(*map(_markdown, found["rows"]), sep="\n")
    else:
        found = {"machine": machine(), "rows": []}
        for model in args.models:
            row = measure(model, PRESETS[args.preset][model](), args.rounds)
            found["rows"].append(row)
            print(_markdown(row), flush=True)
            save(found, args.json)
    rows = found["rows"]
    noise = [row["time"][AGAIN] for row in rows]
    noise = f"The plain gradient against itself (A/A): {min(noise):.2f}x to {max(noise):.2f}x."
    print(f"\n{found['machine']}\n{noise}\n{_of_auto(rows)}")
    if args.markdown:
        theirs = [row["model"] in others.MODELS for row in rows]
        tables = [
            "\n".join([head, *(_markdown(r) for r, x in zip(rows, theirs, strict=True) if x is t)])
            for t, head in ((False, HEAD), (True, HEAD_OF_OTHERS))
        ]
        page = PAGE.format(
            table=tables[0], others=tables[1], machine=found["machine"], noise=noise,
            auto=_of_auto(rows), mlp_memory=rows[0]["plain_memory_mb"],
        )  # fmt: skip
        args.markdown.write_text(page)


def crossover(preset: str, rounds: int) -> None:
    """One pass against stacking, from many short sequences to few long ones."""
    tokens, small = (2048, {"layers": 2}) if preset == "cpu" else (2**16, {"d": 1024, "heads": 16})
    print("| B x T | one_pass | vmap | auto takes |\n| --- | ---: | ---: | --- |", flush=True)
    for time in (8, 32, 64, 128, 256, 512, 1024):
        work = models.lm(tokens // time, time, **small)
        systems = _systems(work, peer=False)
        variants = {
            name: functools.partial(
                compiled(systems[name], work.params, work.batch)[0], work.params, work.batch
            )
            for name in (PLAIN, "one_pass", "vmap")
        }
        of_plain = ratios(interleaved(variants, rounds), PLAIN)
        taken = _taken(work)
        cells = (f"{of_plain[name]:.2f}x" for name in ("one_pass", "vmap"))
        print(f"| {tokens // time} x {time} | {' | '.join(cells)} | {taken} |", flush=True)
    print(f"\n{machine()}")


def measure(model: str, work: models.Workload, rounds: int) -> dict[str, Any]:
    """Time, temporary memory and compile time of every system, over those of the plain gradient."""
    executables, compile_s = {}, {}
    for name, fun in _systems(work, peer=model not in others.MODELS).items():
        executables[name], compile_s[name] = compiled(fun, work.params, work.batch)
    memory = {k: e.memory_analysis().temp_size_in_bytes for k, e in executables.items()}
    variants = {
        name: functools.partial(executable, work.params, work.batch)
        for name, executable in executables.items()
    }
    quick = _quick(variants)
    times = interleaved({name: variants[name] for name in quick}, rounds)
    slow = interleaved({k: v for k, v in variants.items() if k == PLAIN or k not in quick}, 3)
    return {
        "model": model,
        "taken": _taken(work),
        "plain_ms": 1e3 * statistics.median(times[PLAIN]),
        "plain_memory_mb": memory[PLAIN] / 1e6,
        "plain_compile_s": compile_s[PLAIN],
        "time": {**ratios(slow, PLAIN), **ratios(times, PLAIN)},
        "memory": {k: m / max(memory[PLAIN], 1) for k, m in memory.items()},
        "compile": {k: s / compile_s[PLAIN] for k, s in compile_s.items()},
        "fallbacks": optaxclip.explain(work.loss, work.params, work.batch).fallbacks,
    }


def _quick(variants: dict[str, Callable[[], Any]]) -> list[str]:
    """Those that are not `SLOW`."""
    once = interleaved(variants, 1)
    return [name for name, (seconds,) in once.items() if seconds < SLOW * once[PLAIN][0]]


def _taken(work: models.Workload) -> str:
    """What "auto" takes here, and in how many parts."""
    platform = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    best = optaxclip.explain(work.loss, work.params, work.batch).schedules[platform][0]
    return f"{best.method} {best.parts}"


def _of_auto(rows: list[dict[str, Any]]) -> str:
    """How far "auto" is from the best."""
    worse = {row["model"]: row["time"]["auto"] / _best(row)[0] for row in rows}
    beyond = [f"{model} ({ratio:.2f}x)" for model, ratio in worse.items() if ratio > 1.15]
    within = f'"auto" is within 1.15x of the best for {len(rows) - len(beyond)} of {len(rows)}'
    return f"{within} models{'; not for ' + ', '.join(beyond) if beyond else ''}."


def _best(row: dict[str, Any]) -> tuple[float, str]:
    """The fastest of ours: its time, and which."""
    names = [*METHODS, *(_in_parts(method, parts) for method in IN_PARTS for parts in PARTS)]
    return min((row["time"][name], name) for name in names if name in row["time"])


def _in_parts(method: str, parts: int) -> str:
    return f"{method} {parts}"


def _systems(work: models.Workload, peer: bool) -> dict[str, Callable[[Any, Any], Any]]:
    def plain(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(work.loss, (None, 0))(p, batch)))(params)

    def weights(sq_norms: jax.Array) -> jax.Array:
        return jnp.minimum(1, jax.lax.rsqrt(sq_norms))

    systems: dict[str, Callable[[Any, Any], Any]] = {PLAIN: plain, AGAIN: plain}
    for method in METHODS:
        size: Any = "auto" if method == "auto" else None
        systems[method] = reweighted_grad(work.loss, weights, method=method, microbatch_size=size)
    examples = len(jax.tree.leaves(work.batch)[0])
    for method in IN_PARTS:
        for parts in (n for n in PARTS if examples % n == 0):
            systems[_in_parts(method, parts)] = reweighted_grad(
                work.loss, weights, method=method, microbatch_size=examples // parts
            )
    if peer and privacy_clipped_grad is not None:
        for size in (size for size in MICROBATCHES if size is None or examples % size == 0):
            systems[_privacy(size)] = privacy_clipped_grad(
                work.loss, l2_clip_norm=1.0, keep_batch_dim=False, microbatch_size=size
            )
    return systems


def _privacy(size: int | None) -> str:
    return f"jax-privacy {size or 'none'}"


def _large(batch: int, time: int, **options: Any) -> models.Workload:
    return models.lm(batch, time, d=1024, layers=12, vocabulary=32_000, heads=16, **options)


def _markdown(row: dict[str, Any]) -> str:
    best = min(
        ((t, name) for name, t in row["time"].items() if name.startswith("jax-privacy")),
        default=None,
    )
    fastest, which = _best(row)
    privacy = [] if row["model"] in others.MODELS else [""]
    if best is not None:
        privacy = [f"{best[0]:.2f}x ({best[1].split()[-1]})"]
    cells = [
        row["model"],
        f"{row['time']['auto']:.2f}x ({row['taken']})",
        f"{fastest:.2f}x ({which})",
        *(f"{row['time'][method]:.2f}x" for method in METHODS[1:]),
        *privacy,
        *(f"{row['memory'][method]:.2f}x" for method in METHODS),
        f"{row['compile']['auto']:.1f}x",
    ]
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--models", nargs="+", help="as they are called in the table")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--crossover", action="store_true", help="where one method overtakes")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--rows", type=Path, nargs="+", help="take these rows, measure nothing")
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    args = parser.parse_args()
    known = PRESETS[args.preset]
    args.models = args.models or (list(QUICK) if args.quick else list(known))
    unknown = [model for model in args.models if model not in known]
    if unknown:
        parser.error(f"unknown model, got {unknown[0]!r}. Use some of {list(known)}.")
    return args


if __name__ == "__main__":
    main()
