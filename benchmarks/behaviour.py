"""What each clipper does over time: driven with synthetic norms through its public `update`.

    python benchmarks/behaviour.py                 # about a minute on 2 cores; prints markdown
    python benchmarks/behaviour.py --markdown docs/behaviour.md --plot docs/behaviour.png

The streams and what is measured are those of `optaxclip.testing`: log-normal norms of level 0.1
and sigma 0.1, with a spike, a lasting shift, a ramp, a spike in the warm-up, a NaN, a leaf
without gradient. Fixed bounds are at 1.2 levels. "Published" is `relearn_after=None`, and of
`gradient_stabilizer` `outlier=inf`.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
from _measure import save

import optaxclip
from optaxclip.testing import EVENT, Behaviour, multipliers, norm_streams, summarize
from optaxclip.thresholds import mean_plus_std, multiple_of_quantile

LEVEL = 0.1
BOUND = 1.2 * LEVEL
FIXED: dict[str, Callable[[], Any]] = {
    "clip_by_value": lambda: optaxclip.clip_by_value(0.8 * BOUND),
    "clip_by_global_norm": lambda: optaxclip.clip_by_global_norm(BOUND),
    "clip_by_leaf_norm": lambda: optaxclip.clip_by_leaf_norm(BOUND),
    "clip_by_leaf_rms": lambda: optaxclip.clip_by_leaf_rms(BOUND / 2**0.5),
    "clip_by_unit_norm": lambda: optaxclip.clip_by_unit_norm(BOUND),
    "clip_by_group_norm": lambda: optaxclip.clip_by_group_norm(BOUND, "all"),
    "agc": lambda: optaxclip.agc(0.01),
    "clippy": lambda: optaxclip.clippy(0.01, absolute=0.0),
    "soft_clip": lambda: optaxclip.soft_clip(BOUND),
    "normalize": lambda: optaxclip.normalize(LEVEL),
    "clip_singular_values": lambda: optaxclip.clip_singular_values(BOUND),
    "error_feedback, global norm": lambda: optaxclip.error_feedback(
        optaxclip.clip_by_global_norm(BOUND)
    ),
    "skip_nonfinite": lambda: optaxclip.skip_nonfinite(optax.identity()),
    'skip_outliers, "fixed"': lambda: optaxclip.skip_outliers(optax.identity(), 2 * LEVEL),
}


def _stabilizer(*, relearn_after: int | None = 25) -> Any:
    """Its lengths are about 1 at every level."""
    outlier = math.inf if relearn_after is None else 2.0
    return optax.chain(optaxclip.gradient_stabilizer(outlier=outlier), optax.scale(LEVEL))


ADAPTIVE: dict[str, Callable[..., Any]] = {
    "autoclip": optaxclip.autoclip,
    "autoclip(95)": lambda **k: optaxclip.autoclip(95.0, **k),
    "zclip": optaxclip.zclip,
    'zclip, "mean"': lambda **k: optaxclip.zclip(mode="mean", **k),
    'zclip, "percentile"': lambda **k: optaxclip.zclip(mode="percentile", **k),
    "adagc": optaxclip.adagc,
    "clip_by_history": optaxclip.clip_by_history,
    "clip_by_quantile": optaxclip.clip_by_quantile,
    "spam_clip": optaxclip.spam_clip,
    "adaclip": optaxclip.adaclip,
    "gradient_stabilizer": _stabilizer,
    "skip_outliers": lambda **k: optaxclip.skip_outliers(optax.identity(), mean_plus_std(**k)),
    'skip_outliers, "quantile"': lambda **k: optaxclip.skip_outliers(
        optax.identity(), multiple_of_quantile(**k)
    ),
}
PLOTTED = (
    "autoclip",
    "zclip",
    "adagc",
    "clip_by_history",
    "clip_by_quantile",
    "spam_clip",
    "adaclip",
    "skip_outliers",
)
COLUMNS = {
    "early spike 5": "x1000 on step 5, x20 on step 300",
    "shift 3": "x3 for good",
    "ramp": "x10 over 300 steps",
}
HEAD = (
    "| clipper | steady: clipped | a 20x spike passes as | after one in the warm-up"
    " | recovery x1.5 | x3 | least on the ramp | NaN forgotten | waking leaf | constant |\n"
    f"| --- |{' ---: |' * 9}"
)
# Other pages include the table alone, from mark to mark.
PAGE = """# What each clipper does over time

`benchmarks/behaviour.py` drives every clipper through its public `update` with synthetic norms:
log-normal, sigma 0.1, around a usual norm of 0.1, the level. On step 300 of 600 something happens:
a spike, a lasting rise, a ramp, a NaN. The multiplier is the norm after clipping over the norm
before. Fixed bounds are 1.2 times the level, of `skip_outliers` twice. "Published" is
`relearn_after=None`, and of `gradient_stabilizer` `outlier=inf`. It and `normalize` make one length
of all, here the level: after a rise the multiplier stays small, and the leaf that wakes, a hundred
times shorter than the other, becomes as long.

![The multipliers over time](behaviour.png)

What the columns of the table mean:

* **steady: clipped**: share of steps changed at a steady level.
* **a 20x spike passes as**: how large a spike of 20 times the level is after clipping, in multiples
  of the level; then the same if a spike of 1000 times came during the **warm-up**, the first steps
  from which a clipper learns its first bound.
* **recovery**: steps until the multiplier is back, after the level has risen for good; "never" is
  not within the 300 steps that are left.
* **least on the ramp**: the smallest multiplier while the level rises tenfold over 300 steps.
* **NaN forgotten**: whether steps after a NaN or an infinity are as if it had not been. The
  published rules here are without their usual fault: nothing is learned from norms that are not
  finite.
* **waking leaf**: the multiplier of the first gradient of a leaf that had none for 300 steps.
* **constant**: the smallest multiplier of norms that do not vary.

<!-- table -->

{table}

<!-- end -->

Tests hold the clippers whose bound follows the norms, with their defaults, to at most 200 steps
after x3, at most two levels for both spikes, no memory of a NaN, and at least half of a waking leaf
and of constant norms (`optaxclip.testing.check_clipper`); but for `gradient_stabilizer`, whose
tests are its own.

This page and the picture are written by the script, with `--markdown` and `--plot`.
"""


def main() -> None:
    """Drives every clipper and prints the table."""
    args = _arguments()
    makers = dict(FIXED)
    for name, make in ADAPTIVE.items():
        makers[name] = make
        makers[_published(name)] = lambda make=make: make(relearn_after=None)
    streams = norm_streams(level=LEVEL)
    stacked = np.stack([*streams.values()])
    factors, rows = {}, {}
    print(HEAD, flush=True)
    for name, make in makers.items():
        found = multipliers(make(), stacked, level=LEVEL)
        factors[name] = dict(zip(streams, found, strict=True))
        rows[name] = summarize(streams, factors[name], level=LEVEL)
        print(_markdown(name, rows[name]), flush=True)
    save({name: dataclasses.asdict(row) for name, row in rows.items()}, args.json)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(factors, args.plot)
    if args.markdown:
        lines = [_markdown(name, row) for name, row in rows.items()]
        args.markdown.write_text(PAGE.replace("{table}", "\n".join([HEAD, *lines])))


def plot(factors: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """One row of panels a clipper, one column a stream; the published rule behind."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(PLOTTED),
        len(COLUMNS),
        figsize=(10, 11.5),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for row, name in zip(axes, PLOTTED, strict=True):
        for axis, (stream, title) in zip(row, COLUMNS.items(), strict=True):
            for key, style in (
                (_published(name), {"color": "#c08457", "label": "as published"}),
                (name, {"color": "#1f4e79", "label": "here"}),
            ):
                axis.plot(_smooth(factors[key][stream][:, 0]), linewidth=1.5, **style)
            axis.axvline(EVENT, color="0.8", linewidth=0.8, zorder=0)
            axis.set_ylim(-0.05, 1.1)
            axis.spines[["top", "right"]].set_visible(False)
            if axis in axes[0]:
                axis.set_title(title, fontsize=10)
        row[0].set_ylabel(name, fontsize=9)
    axes[0, -1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.supxlabel("step", fontsize=10)
    figure.suptitle("What the gradient is multiplied by (mean of 10 steps)", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _smooth(factors: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(factors, (9, 0), mode="edge"), np.ones(10) / 10, "valid")


def _published(name: str) -> str:
    return f"{name}, published"


def _markdown(name: str, row: Behaviour) -> str:
    cells = [
        f"{row.clip_rate:.2f}",
        *(f"{x:.2f}" for x in (row.spike, row.spike_after_early)),
        *("never" if x is None else str(x) for x in (row.recovery_1_5, row.recovery_3)),
        f"{row.ramp:.2f}",
        "yes" if row.nan_immune else "no",
        *(f"{x:.2f}" for x in (row.waking_leaf, row.constant)),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--plot", type=Path, help="also draw the multipliers here (PNG)")
    parser.add_argument("--markdown", type=Path, help="also write the documentation's page here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
