"""What clippers would cost on a cluster: worked out on paper, from the collectives counted here."""

import math
import textwrap

CLUSTER = {
    "devices": 1000,
    "layers": 80,
    "width": 10240,
    "tokens in a batch": 4e6,
    "sustained FLOP/s of a device": 4e14,
    "memory bytes/s of a device": 3e12,
    "network bytes/s of a device": 25e9,
    "seconds per hop": 5e-6,
    "leaves per layer": 7,
    "units per layer over the width": 9,
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


def cluster_section(rows: list[dict], leaves: int) -> str:
    """The assumptions, the table, and what it says; from the rows under "fsdp"."""
    worked_out = _worked_out(rows, leaves)
    return "\n\n".join((_assumptions(), _table(worked_out), _said(worked_out)))


def _worked_out(rows: list[dict], leaves: int) -> list[dict]:
    """Bytes, latency and share of a step of each clipper."""
    c = CLUSTER
    devices, bandwidth = c["devices"], c["network bytes/s of a device"]
    params, step = _parameters_and_step()
    groups = {
        "leaves": c["layers"] * c["leaves per layer"],
        "units": c["layers"] * c["units per layer over the width"] * c["width"],
    }
    # A tree of hops there and back.
    latency = 2 * math.ceil(math.log2(devices)) * c["seconds per hop"]
    found = []
    for row in rows:
        counts, (traffic, group) = row["optaxclip"], TRAFFIC[row["clipper"]]
        # Of each unit that is split `agc` sends two numbers, of the gradient and of the parameters.
        each = counts["bytes"] / leaves if group == "leaves" else 2 * 4
        sent = each * groups[group]
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


def _parameters_and_step() -> tuple[float, float]:
    """How many parameters the model has, and the seconds a step takes."""
    c = CLUSTER
    params = 12 * c["layers"] * c["width"] ** 2
    flop = 6 * params * c["tokens in a batch"]
    return params, flop / c["devices"] / c["sustained FLOP/s of a device"]


def _assumptions() -> str:
    c = CLUSTER
    params, step = _parameters_and_step()
    listed = "\n".join(f"* {name}: {value:,g}" for name, value in c.items())
    return f"""{listed}

The model has 12 x layers x width² parameters, {params:.1e}, split over all devices. A step takes
6 FLOP per parameter and token, in all {step:.1f} s. A clipper reads the gradient once more (`agc`
the parameters too; `spam` reads and writes a state), in float32. An all-reduce takes
2 log2(devices) hops, and bytes pass the network twice. All-reduces are those of a CPU, which
takes more than an accelerator for `value`, `agc` and `spam`."""


def _said(rows: list[dict]) -> str:
    """What the table says of one all-reduce against one for each leaf, and of `agc`."""
    by_name = {row["clipper"]: row for row in rows}
    whole, agc = by_name["global"], by_name["agc"]
    leaves = CLUSTER["layers"] * CLUSTER["leaves per layer"]
    each = whole["latency_s"] / whole["all_reduces"]
    reading = whole["seconds"] - whole["latency_s"]
    text = (
        f"So clipping by global norm takes {1e3 * whole['seconds']:.2f} ms of a step of"
        f" {whole['step_s']:.1f} s: {1e3 * reading:.2f} ms to read"
        f" {_bytes(whole['local_bytes'])} of gradient from local memory, and"
        f" {1e3 * whole['latency_s']:.2f} ms for the one all-reduce. One all-reduce for each of the"
        f" {leaves} leaves would take {1e3 * leaves * each:.0f} ms. `agc` sends two numbers for"
        f" each unit, {_bytes(agc['sent_bytes'])}, if all of them are split."
    )
    return textwrap.fill(text, 100)


def _bytes(number: float) -> str:
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.2f} kB"


def _table(rows: list[dict]) -> str:
    lines = [
        "| clipper | memory read and written per device | all-reduces | bytes in them | latency |"
        " time | share of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['clipper']} | {_bytes(row['local_bytes'])} | {row['all_reduces']} |"
            f" {_bytes(row['sent_bytes'])} | {1e6 * row['latency_s']:.0f} us |"
            f" {1e3 * row['seconds']:.2f} ms | {row['share']:.1e} |"
        )
    return "\n".join(lines)
