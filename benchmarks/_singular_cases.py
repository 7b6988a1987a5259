"""The programs that `singular_values.py --kinds` compiles: one matrix clipped in each of the ways.

Run by `compiled.compile_in_turn` in the virtual environment that has the compiler.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import _compilers
import _qdwh
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optaxclip import clip_singular_values

BOUND = 0.2


def clipper(**options: Any) -> Callable[[jax.Array], jax.Array]:
    """`clip_singular_values`, without its state."""
    tx = clip_singular_values(BOUND, **options)
    return lambda x: tx.update(x, tx.init(x))[0]


WAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "one product": lambda x: jnp.matmul(x, x, precision="highest"),
    "hard": clipper(),
    "hard, qdwh": lambda x: _qdwh.hard(x, jnp.float32(BOUND)),
    "hard, svd": clipper(method="svd"),
    "soft": clipper(soft=True),
    "soft, qdwh": lambda x: _qdwh.soft(x, jnp.float32(BOUND)),
}


def main() -> None:
    """Compiles the cases of stdin one after another; what fails is said, and the rest goes on."""
    cases = json.load(sys.stdin)
    print(json.dumps(_compilers.versions()), flush=True)
    for case in cases:
        sharding = NamedSharding(_compilers.mesh(case["kind"], (1, 1)), P())
        x = jax.ShapeDtypeStruct((case["size"], case["size"]), jnp.float32)
        found: dict[str, Any] = {}
        try:
            found = _compilers.cost(WAYS[case["name"]], x, in_shardings=sharding)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        print(json.dumps(case | found), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
