"""What clipping the singular values of one matrix costs, in products of that size.

    python benchmarks/singular_values.py            # 1024x1024 in float32, about a minute

All variants run in one process, in a new random order every round; quoted is the median over
rounds of time / time of one product. Prints markdown.
"""

import argparse
import functools

import jax
from _measure import interleaved, machine, ratios

from optaxclip import clip_singular_values

VARIANTS = {
    "hard": {},
    "soft": {"soft": True},
    "hard, svd": {"method": "svd"},
}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    x = jax.random.normal(jax.random.key(0), (args.size, args.size))
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))
    variants = {"one product": functools.partial(product, x)}
    for name, options in VARIANTS.items():
        tx = clip_singular_values(0.1 * args.size**0.5, **options)
        variants[name] = functools.partial(jax.jit(tx.update), x, tx.init(x))
    times = interleaved(variants, args.rounds)
    print(f"| {args.size}x{args.size} | products | ms |\n| --- | ---: | ---: |")
    for name, ratio in ratios(times, "one product").items():
        print(f"| {name} | {ratio:.0f} | {1e3 * sorted(times[name])[len(times[name]) // 2]:.0f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
