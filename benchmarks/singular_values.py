"""What clipping the singular values of one matrix costs, in products of that size.

    python benchmarks/singular_values.py            # 1024x1024 in float32, a few minutes
    python benchmarks/singular_values.py --kinds v5e,h100    # by the compilers' figures

All variants run in one process, in a new random order every round; quoted is the median over
rounds of time / time of one product, and the error in spectral norm over the largest singular
value. The ways are those of the library and QDWH of `jax.lax.linalg`. With `--kinds` nothing is
run: cycles, bytes and kernels are what the compilers say of the programs (see `compiled.py`), where
a loop whose trips are not known counts once. For a TPU some take minutes to compile: `--only`
names those wanted. Prints markdown.
"""

import argparse
import functools

import jax
import numpy as np
from _compiled_grid import KINDS
from _measure import interleaved, machine, ratios
from _singular_cases import BOUND, WAYS
from compiled import compile_in_turn


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", help=f"compile for these, of {','.join(KINDS)}, and run nothing")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], help="which ways")
    args = parser.parse_args()
    if args.kinds:
        compiled(args.kinds.split(","), args.only, args.size)
    else:
        timed(args.only, args.size, args.rounds)


def timed(names: list[str], size: int, rounds: int) -> None:
    """On this machine, of a random matrix with singular values up to 2."""
    x = np.random.default_rng(0).standard_normal((size, size)) / size**0.5
    single = jax.numpy.asarray(x, np.float32)
    u, s, vt = np.linalg.svd(np.float64(single), full_matrices=False)
    soft = s / np.hypot(1, s / BOUND)
    exact = {"hard": (u * np.minimum(s, BOUND)) @ vt, "soft": (u * soft) @ vt}
    variants = {name: functools.partial(jax.jit(WAYS[name]), single) for name in names}
    times = interleaved(variants, rounds)
    print(f"| {size}x{size} | products | ms | error |\n| --- | ---: | ---: | ---: |")
    for name, ratio in ratios(times, "one product").items():
        error, wanted = "-", exact.get(name.split(",")[0])
        if wanted is not None:
            error = f"{np.linalg.norm(np.float64(variants[name]()) - wanted, 2) / s[0]:.0e}"
        median = 1e3 * sorted(times[name])[len(times[name]) // 2]
        print(f"| {name} | {ratio:.0f} | {median:.0f} | {error} |")
    print(f"\n{machine()}")


def compiled(kinds: list[str], names: list[str], size: int) -> None:
    """By the compilers of accelerators."""
    cases = [{"kind": kind, "name": name, "size": size} for kind in kinds for name in names]
    parts = [compile_in_turn(KINDS[kind], cases, "_singular_cases.py") for kind in kinds]
    rows = {(row["kind"], row["name"]): row for _, rows in parts for row in rows}
    print(
        f"| {size}x{size} | cycles, million | MB moved | kernels | loops, of unknown trips |"
        " seconds to compile |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for (kind, name), row in rows.items():
        if "error" in row:
            print(f"| {kind}, {name} | {row['error']} | | | | |")
            continue
        cells = (
            f"{row['cycles'] / 1e6:.2f}" if row["cycles"] else "-",
            f"{row['bytes'] / 1e6:.0f}",
            str(row["kernels"]),
            f"{row['loops']}, {row['loops_of_unknown_trips']}",
            f"{row['seconds']:.1f}",
        )
        print(f"| {kind}, {name} | {' | '.join(cells)} |")
    print(f"\n{dict(v for versions, _ in parts for v in versions.items())}")


if __name__ == "__main__":
    main()
