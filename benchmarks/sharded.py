"""Clippers on a mesh of 8 host devices: step time, collectives, and per-example scaling.

    python benchmarks/sharded.py            # about 3 minutes on 2 cores
    python benchmarks/sharded.py --quick    # small leaves, few rounds: the counts are the same

Host devices share the machine's cores, so that times say what a program costs in all, and not how
it scales; collectives between them are copies in memory. The counts are those of any machine
whose XLA partitions alike. The last table works out from them what a step costs on a cluster,
under the assumptions printed with it. Prints markdown; writes JSON with `--json`, and `--markdown`
fills the tables of the documentation's page in; with `--rows` from rows measured before:

    python benchmarks/sharded.py --json out/sharded.json --markdown docs/meshes.md
    python benchmarks/sharded.py --rows out/sharded.json --markdown docs/meshes.md
"""

import argparse
import functools
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for _pages

import jax
import jax.numpy as jnp
import optax
from _cluster import cluster_section
from _collectives import collectives
from _measure import compiled, interleaved, machine, ratios, save
from _pages import fill
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip
from optaxclip.per_example import reweighted_grad

CLIPPERS: dict[str, tuple[Callable[[], Any] | None, Callable[[], Any]]] = {
    "value": (lambda: optax.clip(0.5), lambda: optaxclip.clip_by_value(0.5)),
    "global": (lambda: optax.clip_by_global_norm(1.0), lambda: optaxclip.clip_by_global_norm(1.0)),
    "rms": (lambda: optax.clip_by_block_rms(0.5), lambda: optaxclip.clip_by_leaf_rms(0.5)),
    "agc": (lambda: optax.adaptive_grad_clip(0.01), lambda: optaxclip.agc(0.01)),
    "zclip": (None, optaxclip.zclip),
    "adagc": (None, optaxclip.adagc),
    "spam": (None, optaxclip.spam_clip),
    "skip_nonfinite, global": (
        None,
        lambda: optaxclip.skip_nonfinite(optaxclip.clip_by_global_norm(1.0)),
    ),
}
# name: (mesh, axes, how leaves are split in turn)
LAYOUTS = {
    "fsdp": ((8, 1), AxisType.Auto, (P("data"), P(None, "data"))),
    "2x4": ((2, 4), AxisType.Auto, (P("data", "model"), P("model", "data"))),
    "2x4, explicit axes": ((2, 4), AxisType.Explicit, (P("data", "model"), P("model", "data"))),
}
DEVICES = (1, 2, 4, 8)


def main() -> None:
    """Measures and prints the tables."""
    args = _arguments()
    found = json.loads(args.rows.read_text()) if args.rows else _measure_all(args.quick)
    sections = _sections(found)
    print(*sections.values(), sep="\n\n")
    save(found, args.json)
    if args.markdown:
        fill(args.markdown, sections)


def _measure_all(quick: bool) -> dict[str, Any]:
    width, leaves, rounds = (128, 6, 3) if quick else (1024, 12, 15)
    return {
        "machine": machine(),
        "width": width,
        "leaves": leaves,
        "rows": [row for name in LAYOUTS for row in measure(name, width, leaves, rounds)],
        "scaling": measure_scaling(256 if quick else 1024, rounds),
    }


def _sections(found: dict[str, Any]) -> dict[str, str]:
    """Markdown, by the mark on the page."""
    rows, noise = found["rows"], [row["alone_again"] for row in found["rows"]]
    return {
        "how": textwrap.fill(
            f"{found['leaves']} leaves of {found['width']}x{found['width']} in float32, on"
            f" {found['machine']}. Adam alone, timed twice (A/A), takes {min(noise):.2f}x to"
            f" {max(noise):.2f}x its own time.",
            100,
        ),
        "counts": _markdown(rows),
        "scaling": _scaling_markdown(found["scaling"]),
        "cluster": cluster_section([r for r in rows if r["layout"] == "fsdp"], found["leaves"]),
    }


def measure(layout: str, width: int, leaves: int, rounds: int) -> list[dict]:
    """One row per clipper: collectives of an ordinary step, and time relative to Adam alone."""
    shape, kind, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
    keys = jax.random.split(jax.random.key(0), leaves)
    tree = {
        f"p{i:02}": jax.device_put(
            jax.random.normal(key, (width, width)), NamedSharding(mesh, specs[i % 2])
        )
        for i, key in enumerate(keys)
    }
    transforms = {"alone": optax.identity(), "alone again": optax.identity()}
    for name, (theirs, ours) in CLIPPERS.items():
        transforms[f"optaxclip {name}"] = ours()
        if theirs is not None and kind is AxisType.Auto:
            transforms[f"optax {name}"] = theirs()
    variants, found = {}, {}
    with jax.set_mesh(mesh):
        for name, clip in transforms.items():
            tx = optax.chain(clip, optax.adam(1e-3))
            state = jax.tree.map(  # moments are split as the parameters are, all else is whole
                lambda x: (
                    x if len(x.devices()) > 1 else jax.device_put(x, NamedSharding(mesh, P()))
                ),
                tx.init(tree),
            )
            step, _ = compiled(tx.update, tree, state, tree)
            variants[name] = functools.partial(step, tree, state, tree)
            found[name] = collectives(step)
        times = interleaved(variants, rounds)
    of_alone = ratios(times, "alone")
    return [
        {
            "layout": layout,
            "clipper": name,
            "alone_ms": 1e3 * statistics.median(times["alone"]),
            "alone_again": of_alone["alone again"],
            **{
                system: _counted(found[key]) | {"time": of_alone[key]}
                for system in ("optaxclip", "optax")
                if (key := f"{system} {name}") in found
            },
        }
        for name in CLIPPERS
    ]


def _counted(found: list[Any]) -> dict[str, Any]:
    ordinary = [c for c in found if not c.rare]
    return {
        "all_reduces": sum(c.kind == "all-reduce" for c in ordinary),
        "others": sum(c.kind != "all-reduce" for c in ordinary),
        "bytes": sum(c.bytes for c in ordinary),
        "rare": len(found) - len(ordinary),
    }


def measure_scaling(width: int, rounds: int) -> list[dict]:
    """Time and collectives of per-example clipping of one batch over 1, 2, 4 and 8 devices."""
    key = jax.random.key(1)
    params = {f"w{i}": jax.random.normal(key, (width, width)) / width**0.5 for i in range(3)}
    batch = jax.random.normal(key, (256, width))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.sum(x**2)

    def weights(sq_norms: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, 1 / jnp.sqrt(sq_norms))

    def plain(params: Any, batch: jax.Array) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, batch)))(params)

    variants, found = {}, {}
    for number in DEVICES:
        mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,))
        held = jax.device_put(params, NamedSharding(mesh, P()))
        examples = jax.device_put(batch, NamedSharding(mesh, P("data")))
        for method in ("plain", "one_pass", "two_pass"):
            fun = plain if method == "plain" else reweighted_grad(loss, weights, method=method)
            step, _ = compiled(
                lambda p, x, fun=fun: getattr(r := fun(p, x), "grads", r), held, examples
            )
            variants[method, number] = functools.partial(step, held, examples)
            found[method, number] = collectives(step)
    times = interleaved(variants, rounds)
    return [
        {
            "method": method,
            "devices": number,
            "ms": 1e3 * statistics.median(times[method, number]),
            "collectives": len(found[method, number]),
            "bytes": sum(c.bytes for c in found[method, number]),
        }
        for method, number in variants
    ]


def _markdown(rows: list[dict]) -> str:
    lines = [
        "| layout | clipper | all-reduces | other collectives | bytes | in rare branches | step |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            _cell(row, key, form)
            for key, form in (
                ("all_reduces", "{}"),
                ("others", "{}"),
                ("bytes", "{}"),
                ("rare", "{}"),
                ("time", "{:.2f}x"),
            )
        ]
        lines.append(f"| {' | '.join((row['layout'], row['clipper'], *cells))} |")
    return "\n".join(lines)


def _cell(row: dict, key: str, form: str) -> str:
    theirs = f" ({form.format(row['optax'][key])})" if "optax" in row else ""
    return form.format(row["optaxclip"][key]) + theirs


def _scaling_markdown(rows: list[dict]) -> str:
    devices = " | ".join(f"{d} device{'s' if d > 1 else ''}" for d in DEVICES)
    lines = [
        f"| schedule | {devices} | collectives | bytes |",
        f"| --- | {' | '.join(['---:'] * (len(DEVICES) + 2))} |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [f"{row['ms']:.1f} ms" for row in mine]
        last = mine[-1]
        lines.append(
            f"| {' | '.join((method, *cells, str(last['collectives']), str(last['bytes'])))} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small leaves, few rounds")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--rows", type=Path, help="take the rows of this JSON, measure nothing")
    parser.add_argument("--markdown", type=Path, help="also fill in the tables of this page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
