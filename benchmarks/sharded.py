"""Clippers on a mesh of 8 host devices: step time, collectives, and per-example scaling.

    python benchmarks/sharded.py            # about 3 minutes on 2 cores
    python benchmarks/sharded.py --quick    # small leaves, few rounds: the counts are the same

Host devices share the machine's cores, so that times say what a program costs in all, and not how
it scales; collectives between them are copies in memory. The counts are those of any machine
whose XLA partitions alike. The last table works out from them what a step costs on a cluster,
under the assumptions printed with it (docs/meshes.md). Prints markdown; JSON with `--json`.
"""

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported

import jax
import jax.numpy as jnp
import optax
from _collectives import collectives
from _measure import compiled, interleaved, machine, ratios
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
# What the table for a cluster assumes.
CLUSTER = {
    "devices": 1000,
    "layers": 80,
    "width": 10240,
    "tokens in a batch": 4e6,
    "sustained FLOP/s of a device": 4e14,
    "memory bytes/s of a device": 3e12,
    "network bytes/s of a device": 25e9,
    "seconds a hop": 5e-6,
    "leaves a layer": 7,
    "units a layer over the width": 9,
}
# Bytes that a clipper reads and writes for each element of float32, besides what Adam does anyway,
# and of what there is one number in its all-reduce.
TRAFFIC = {
    "value": (4, "leaves"),
    "global": (4, "leaves"),
    "rms": (4, "leaves"),
    "agc": (8, "units"),
    "zclip": (4, "leaves"),
    "adagc": (4, "leaves"),
    "spam": (16, "leaves"),
    "skip_nonfinite, global": (4, "leaves"),
}


def main() -> None:
    """Measures and prints the tables."""
    args = _arguments()
    width, leaves, rounds = (128, 6, 3) if args.quick else (1024, 12, 15)
    rows = [row for name in LAYOUTS for row in measure(name, width, leaves, rounds)]
    print(f"\n{leaves} leaves of {width}x{width}: optaxclip (Optax)\n\n{_markdown(rows)}")
    scaling = measure_scaling(256 if args.quick else 1024, rounds)
    print(f"\nPer-example clipping, one batch over devices\n\n{_scaling_markdown(scaling)}")
    paper = on_a_cluster(rows, leaves)
    print(
        f"\nOn a cluster, worked out: {_assumptions()}; a step takes"
        f" {paper[0]['step_s']:.1f} s\n\n{_paper_markdown(paper)}"
    )
    print(f"\n{machine()}")
    noise = [row["alone_again"] for row in rows]
    print(f"Adam against itself (A/A): {min(noise):.2f}x to {max(noise):.2f}x.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "rows": rows, "scaling": scaling, "cluster": paper}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(layout: str, width: int, leaves: int, rounds: int) -> list[dict]:
    """One row a clipper: collectives of an ordinary step, and time relative to Adam alone."""
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


def on_a_cluster(rows: list[dict], leaves: int) -> list[dict]:
    """Bytes, latency and share of a step of each clipper, from the counts under "fsdp"."""
    c = CLUSTER
    devices, bandwidth = c["devices"], c["network bytes/s of a device"]
    params = 12 * c["layers"] * c["width"] ** 2
    step = 6 * params * c["tokens in a batch"] / devices / c["sustained FLOP/s of a device"]
    groups = {
        "leaves": c["layers"] * c["leaves a layer"],
        "units": c["layers"] * c["units a layer over the width"] * c["width"],
    }
    # A tree of hops there and back.
    latency = 2 * math.ceil(math.log2(devices)) * c["seconds a hop"]
    found = []
    for row in rows:
        if row["layout"] != "fsdp":
            continue
        counts, (traffic, group) = row["optaxclip"], TRAFFIC[row["clipper"]]
        width = 1 if group == "leaves" else _units_of(rows, leaves)
        sent = counts["bytes"] / (leaves * width) * groups[group]
        local = traffic * params / devices
        seconds = (
            local / c["memory bytes/s of a device"]
            + counts["all_reduces"] * latency
            + 2 * sent / bandwidth
        )
        found.append(
            {
                "clipper": row["clipper"],
                "local_bytes": local,
                "all_reduces": counts["all_reduces"],
                "sent_bytes": sent,
                "latency_s": counts["all_reduces"] * latency,
                "seconds": seconds,
                "share": seconds / step,
                "step_s": step,
            }
        )
    return found


def _units_of(rows: list[dict], leaves: int) -> float:
    """Units of a leaf: `agc` reduces one number for each, of the gradient and of the parameters."""
    (agc,) = [r for r in rows if r["layout"] == "fsdp" and r["clipper"] == "agc"]
    return agc["optaxclip"]["bytes"] / (leaves * 2 * 4)


def _assumptions() -> str:
    return ", ".join(f"{k} {v:g}" for k, v in CLUSTER.items())


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
    lines = [
        f"| schedule | {' | '.join(f'{d} devices' for d in DEVICES)} | collectives | bytes |",
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


def _paper_markdown(rows: list[dict]) -> str:
    lines = [
        "| clipper | memory read and written by a device | all-reduces | bytes in them | latency |"
        " time | share of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['clipper']} | {row['local_bytes'] / 1e6:.0f} MB | {row['all_reduces']} |"
            f" {row['sent_bytes'] / 1e3:.3g} kB | {1e6 * row['latency_s']:.0f} us |"
            f" {1e3 * row['seconds']:.2f} ms | {row['share']:.1e} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small leaves, few rounds")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
