"""Muon lets the attention logits of a small transformer explode; with QK-Clip they stay at tau.

A byte-level transformer (Flax NNX, 2 layers of 4 heads, no normalisation of queries and keys)
learns the text of the Python standard library with `optax.contrib.muon`, whose updates have the
same spectral norm at every step, however small the gradient is. So the weights of queries and keys
grow, and the logits, which are their product, grow with the square. `qk_clip` is the last
transformation of the chain; it is given the largest logit of each head in that step, and scales the
weights of those beyond tau. All runs of a seed have the same weights to start with, the same
batches, and are one compiled program: only the learning rate and tau differ, 100 or infinity.

At a learning rate of 0.02, the best of these three, no logit comes near tau in 600 steps, and runs
with and without QK-Clip are the same to the last bit: nothing explodes in so small a model at the
rate that suits it. At rates 2.5 and 5 times larger logits grow to 500 and to 2200 without it, and
are still growing. With it they stay below 160: one step may go that far beyond tau, and the next
brings it back. At these rates the loss is a little lower with it, for each of three seeds.

    python examples/qk_clip.py                           # 1 seed, half a minute on 2 cores
    python examples/qk_clip.py --seeds 3 --steps 600     # the picture in the documentation
    python examples/qk_clip.py --quick                   # two rates, fewer steps

A table goes to the terminal, `qk_clip.png` and `results.json` to the folder `--out`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from _plots import LOOK
from _text import standard_library, windows
from flax import nnx
from matplotlib.figure import Figure

import optaxclip

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 32, 8
TAU = 100.0
COLOURS = {True: "#0072b2", False: "#d55e00"}


class Attention(nnx.Module):
    """Causal attention that also says how large its logits are."""

    def __init__(self, rngs: nnx.Rngs):
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs))

    def __call__(self, x):
        q, k, v = (
            project(x).reshape(*x.shape[:-1], HEADS, -1)
            for project in (self.query, self.key, self.value)
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
        logits = jnp.where(np.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
        return self.out(mixed.reshape(x.shape)), jnp.max(logits, axis=(0, 2, 3))


class Block(nnx.Module):
    """Attention and a feed-forward layer, each added to its input."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = Attention(rngs)
        self.norm1, self.norm2 = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.inner = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.outer = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mixed, max_logits = self.attention(self.norm1(x))
        x = x + mixed
        return x + self.outer(nnx.gelu(self.inner(self.norm2(x)))), max_logits


class Transformer(nnx.Module):
    """Predicts each next byte."""

    def __init__(self, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, WIDTH, rngs=rngs)
        self.places = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, text):
        x = self.bytes(text) + self.places(jnp.arange(text.shape[-1]))
        max_logits = {}
        for i, block in enumerate(self.blocks):
            x, max_logits[f"blocks/{i}/attention"] = block(x)
        return self.head(self.norm(x)), max_logits


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Transformer(nnx.Rngs(0))))


def loss_fn(params: Any, text: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy a byte, in nats, and the largest logits by the path of the attention."""
    text = text.astype(jnp.int32)
    logits, max_logits = nnx.merge(GRAPH, params)(text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean(), max_logits


def matrices(params: Any) -> Any:
    """What Muon trains: the matrices of the blocks. The rest is left to Adam."""

    def one(path: Any, x: jax.Array) -> Any:
        in_a_block = "blocks" in jax.tree_util.keystr(path) and x.ndim == 2
        return optax.contrib.MuonDimensionNumbers() if in_a_block else None

    return jax.tree.map_with_path(one, params)


def train(rate: jax.Array, tau: jax.Array, seed: jax.Array, data: jax.Array) -> Any:
    """The loss and the largest logit of each step, and how many steps were clipped."""
    _, params = nnx.split(Transformer(nnx.Rngs(jax.random.key(seed))))
    muon = optax.contrib.muon(
        rate, adam_learning_rate=3e-3, muon_weight_dimension_numbers=matrices(params)
    )
    tx = optax.chain(muon, optaxclip.qk_clip(tau))

    def step(carry, text):
        params, state = carry
        (loss, max_logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, text)
        updates, state = tx.update(grads, state, params, max_logits=max_logits)
        largest = optaxclip.clip_stats(state)["qk_clip"].pre_clip_norm
        return (optax.apply_updates(params, updates), state), (loss, largest)

    (_, state), (losses, largest) = jax.lax.scan(step, (params, tx.init(params)), data)
    return losses, largest, optaxclip.clip_stats(state)["qk_clip"].clipped_count


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; arrays are NumPy's, with a number for each step."""

    rate: float
    tau: float
    seed: int
    loss: np.ndarray
    logit: np.ndarray
    clipped: int

    @property
    def last(self) -> tuple[float, float, float]:
        """Of the last 50 steps the mean loss and the largest logit; of all the largest logit."""
        return float(np.mean(self.loss[-50:])), float(np.max(self.logit[-50:])), self.most

    @property
    def most(self) -> float:
        """The largest logit of the run."""
        return float(np.max(self.logit))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, writes the figure and the JSON."""
    options = parse(argv)
    start = time.perf_counter()
    text = standard_library()
    data = windows(text, 0, (options.steps, BATCH), CONTEXT + 1)
    plan = [
        (rate, tau, seed)
        for rate in options.rates
        for tau in (np.inf, TAU)
        for seed in range(options.seeds)
    ]
    rates, taus, seeds = (np.array(column) for column in zip(*plan, strict=True))
    program = jax.jit(jax.vmap(train, (0, 0, 0, None)))
    found = program(np.float32(rates), np.float32(taus), seeds, data)
    runs = [Run(*key, *values) for key, *values in zip(plan, *map(np.asarray, found), strict=True)]
    print(
        f"{'rate':>6}{'tau':>6}{'seed':>6}{'loss':>8}{'logits: end':>14}{'most':>8}{'clipped':>10}"
    )
    for run in runs:
        loss, end, most = run.last
        print(
            f"{run.rate:6g}{run.tau:6g}{run.seed:6}{loss:8.3f}{end:14.0f}{most:8.0f}"
            f"{run.clipped / options.steps:10.0%}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    record = [
        {"rate": run.rate, "qk_clip": bool(np.isfinite(run.tau)), "seed": run.seed}
        | dict(zip(("loss", "logit", "most"), run.last, strict=True))
        | {"clipped": int(run.clipped) / options.steps}
        for run in runs
    ]
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    with mpl.rc_context(LOOK):
        figure(runs, options.rates).savefig(options.out / "qk_clip.png", dpi=100)
    print(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s. See {options.out}/qk_clip.png")
    return 0


def figure(runs: list[Run], rates: Sequence[float]) -> Figure:
    """The largest logit above, the loss below; a column for each learning rate."""
    picture = Figure(figsize=(9, 5), layout="constrained")
    axes = picture.subplots(2, len(rates), squeeze=False, sharex=True, sharey="row")
    for run in runs:
        above, below = axes[:, rates.index(run.rate)]
        clipped = bool(np.isfinite(run.tau))
        look = {"color": COLOURS[clipped], "lw": 1.2, "zorder": 2 + clipped}
        above.plot(run.logit, **look)
        smooth = np.convolve(run.loss, np.full(20, 1 / 20), mode="valid")
        below.plot(np.arange(19, len(run.loss)), smooth, **look)
    for (above, below), rate in zip(axes.T, rates, strict=True):
        above.axhline(TAU, color="black", lw=1, ls="--")
        above.set(title=f"Muon, learning rate {rate:g}", yscale="log")
        below.set(xlabel="training step")
    axes[0, 0].annotate("tau", (0.02, TAU), (0, 3), xycoords=("axes fraction", "data"),
                        textcoords="offset points", fontsize=8)  # fmt: skip
    axes[0, 0].set_ylabel("largest logit")
    axes[1, 0].set_ylabel("loss, mean of 20 steps")
    lines = [mpl.lines.Line2D([], [], color=COLOURS[c], lw=2) for c in (True, False)]
    picture.legend(lines, ["with QK-Clip", "without"], loc="outside lower center", ncols=2)
    return picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/qk_clip"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--quick", action="store_true", help="two rates, 250 steps")
    options = parser.parse_args(argv)
    options.rates = [0.02, 0.1] if options.quick else [0.02, 0.05, 0.1]
    if options.quick:
        options.steps = 250
    return options


if __name__ == "__main__":
    raise SystemExit(main())
