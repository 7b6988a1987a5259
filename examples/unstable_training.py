"""A transformer at a learning rate it does not bear, under each clipper that learns its bound.

A byte-level transformer (Flax NNX, SGD with momentum) learns the text of the Python standard
library, which comes with every interpreter. The learning rate is such that without clipping the
loss leaves its course for good. Every run has the same parameters to start with, the same batches
and the same learning rate; only the clipper differs, always with its defaults. Not every clipper
holds this run: `spam_clip` and `adaclip`, which bound single elements, pass a gradient that grows
as a whole a little at every step, and their bounds follow it. They diverge too, only later, and so
they do as published (`relearn_after=None`).

    python examples/unstable_training.py            # a few minutes on 2 cores
    python examples/unstable_training.py --quick    # 100 steps: half a minute

A table goes to the terminal, `unstable_training.png` and `results.json` to the folder `--out`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _plots import LOOK
from _text import standard_library, windows
from _transformer import CONTEXT, Transformer, loss_fn
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip

CLIPPERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "none": optax.identity,
    "autoclip": optaxclip.autoclip,
    "zclip": optaxclip.zclip,
    "adagc": optaxclip.adagc,
    "clip_by_history": optaxclip.clip_by_history,
    "clip_by_quantile": optaxclip.clip_by_quantile,
    "spam_clip": optaxclip.spam_clip,
    "adaclip": optaxclip.adaclip,
}
BATCH = 16
CHUNK = 50
LEARNING_RATE = 0.5


def batches(text: np.ndarray, steps: int) -> jax.Array:
    """`[steps, BATCH, CONTEXT + 1]`, the same for every run."""
    return jnp.asarray(windows(text, 0, (steps, BATCH), CONTEXT + 1), jnp.uint8)


def train(clipper: str, data: jax.Array, rate: float, advance: Callable[[], None]) -> np.ndarray:
    """The loss, the norm before clipping and the norm after it of each step: `[steps, 3]`."""
    model = Transformer(nnx.Rngs(0))
    graph, params = nnx.split(model)
    clip, sgd = CLIPPERS[clipper](), optax.sgd(rate, momentum=0.9)

    def step(carry, text):
        params, clip_state, opt_state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graph, p), text))(params)
        clipped, clip_state = clip.update(grads, clip_state, params)
        updates, opt_state = sgd.update(clipped, opt_state, params)
        seen = jnp.stack([loss, optax.tree.norm(grads), optax.tree.norm(clipped)])
        return (optax.apply_updates(params, updates), clip_state, opt_state), seen

    run = jax.jit(lambda carry, texts: jax.lax.scan(step, carry, texts))
    carry, seen = (params, clip.init(params), sgd.init(params)), []
    for start in range(0, len(data), CHUNK):
        carry, part = run(carry, data[start : start + CHUNK])
        seen.append(np.asarray(part))
        advance()
    return np.concatenate(seen)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, writes the figure and the JSON."""
    options = parse(argv)
    console, start = Console(), time.perf_counter()
    data = batches(standard_library(), options.steps)
    runs = {}
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(options.clippers) * (options.steps // CHUNK))
        for name in options.clippers:
            progress.update(bar, description=name)
            runs[name] = train(name, data, options.rate, lambda: progress.advance(bar))
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("clipper", "loss at the end", "worst after the start", "steps clipped"):
        view.add_column(title, justify="left" if title == "clipper" else "right")
    rows = {name: summary(run) for name, run in runs.items()}
    for name, row in rows.items():
        clipped = f"{100 * row['clipped']:.0f} %"
        view.add_row(name, f"{row['final']:.2f}", f"{row['worst']:.2f}", clipped)
    console.print(view)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"learning_rate": options.rate, "steps": options.steps, "clippers": rows}
    (options.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    with mpl.rc_context(LOOK):
        figure(runs, options.rate).savefig(options.out / "unstable_training.png", dpi=110)
    seconds = time.perf_counter() - start
    console.print(f"{len(runs)} runs in {seconds:.0f} s. See {options.out}/unstable_training.png")
    return 0


def summary(run: np.ndarray) -> dict[str, float]:
    """The mean loss of the last tenth, the highest past the first tenth, the share clipped."""
    loss, before, after = run.T
    tenth = len(loss) // 10
    return {
        "final": float(np.mean(loss[-tenth:])),
        "worst": float(np.max(loss[tenth:])),
        "clipped": float(np.mean(after < before * (1 - 1e-5))),
    }


def figure(runs: dict[str, np.ndarray], rate: float) -> Figure:
    """Loss above and norms below, a column for each clipper; no clipping in grey behind."""
    picture = Figure(figsize=(2.1 * len(runs) + 1, 5), layout="constrained")
    axes = picture.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for (name, run), (above, below) in zip(runs.items(), axes.T, strict=True):
        if "none" in runs and name != "none":
            above.plot(_smooth(runs["none"][:, 0]), color="#b8bcc4", lw=1)
        above.plot(_smooth(run[:, 0]), color="#0072b2", lw=1.4)
        below.plot(run[:, 1], color="#d55e00", lw=0.7, label="before clipping")
        below.plot(run[:, 2], color="#0072b2", lw=0.7, label="after")
        above.set_title(name)
        below.set(yscale="log", xlabel="step")
    axes[0, 0].set_ylabel("loss, nats a byte")
    axes[0, 0].set(yscale="log", ylim=(1, 1000))
    axes[1, 0].set_ylabel("norm of the gradient")
    axes[1, -1].legend(fontsize=8, handlelength=1.2)
    title = f"Byte-level transformer, SGD at a learning rate of {rate:g}; grey: no clipping"
    picture.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return picture


def _smooth(loss: np.ndarray) -> np.ndarray:
    return np.convolve(np.pad(loss, (9, 0), mode="edge"), np.ones(10) / 10, "valid")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clippers", nargs="+", choices=list(CLIPPERS), default=list(CLIPPERS))
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="the learning rate")
    parser.add_argument("--out", type=Path, default=Path("out/unstable_training"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="100 steps")
    options = parser.parse_args(argv)
    options.steps = 100 if options.quick else 800
    options.clippers = [name for name in CLIPPERS if name in options.clippers]
    return options


if __name__ == "__main__":
    raise SystemExit(main())
