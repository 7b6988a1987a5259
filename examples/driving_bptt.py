"""A policy learns to drive by back-propagation through a simulator; without clipping it fails.

A recurrent policy (Flax NNX, a GRU with 16 units) steers a kinematic bicycle model at 36 km/h
along curved roads. It sees how far to the side the road lies 0, 6, 12 and 24 m ahead, its angle to
the road and the steering angle, which follows its command with a lag of 0.3 s. The loss is the mean
squared distance from the middle of the road over 250 steps (12.5 s), and its gradient goes back
through all of them: through the car, the lag and the policy. Its norm is 10^2 to 10^5 in the first
steps and 0.03 once the policy drives; without clipping it came to 10^16.

The runs of a seed have the same weights to start with, the same roads, the same optimizer (SGD
with momentum) and the same learning rate. They are one compiled program, and only two bounds
differ: that of the whole gradient, 1 or infinity, and that of the gradient which comes back to the
state of car and policy at each step of a drive (`clip_backward`), 0.1 or infinity. Either bound
does. With the second the gradient does not grow on its way: its norm is at most 22, where with the
first it comes to 60,000 before it is clipped. Bounds of 0.001 and 0.01 do as well; at 1 one seed
of three drives to the end of every road.

Without clipping the first steps throw the weights so far that the steering is locked and hardly any
gradient is left: two of the three cars drive in circles, the third cuts the curves. A smaller
learning rate is no way out: the rest of the table has runs without clipping at rates 10 to 10^5
times smaller. At none of them do all three seeds drive, and the few that do stay seven times
further from the middle.
With Adam, which divides by the gradient's own size, less depends on it: without clipping and with
the gradient clipped two of three seeds learn to drive, with clipping three to ten times closer to
the middle, and the third does not. With each step's gradient clipped all three do.

    python examples/driving_bptt.py                     # 3 seeds, half a minute on 2 cores
    python examples/driving_bptt.py --quick             # 1 seed, fewer steps: 15 seconds
    python examples/driving_bptt.py --optimizer adam

A table goes to the terminal, `driving.png` and `results.json` to the folder `--out`.
"""

import argparse
import dataclasses
import functools
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
from flax import nnx
from matplotlib.figure import Figure

import optaxclip

SPEED, SECONDS, WHEELBASE, LAG = 10.0, 0.05, 2.7, 0.3  # m/s, a step, m, s
STEPS, MAX_STEERING = 250, 0.5  # of a drive, rad
WAVELENGTHS, AMPLITUDES = np.array([60.0, 110.0]), np.array([2.5, 5.0])  # of the roads, m
AHEAD = np.array([0.0, 6.0, 12.0, 24.0])  # where the policy looks, m
HALF_WIDTH = 2.0  # of the road, m
UNITS, BATCH, TEST_ROADS = 16, 8, 64
RATE, BOUND, STEP_BOUND = 0.02, 1.0, 0.1
COLOURS = {"none": "#d55e00", "the gradient": "#0072b2", "each step's": "#009e73"}
OPTIMIZERS = {"sgd": lambda rate: optax.sgd(rate, momentum=0.9), "adam": optax.adam}


class Driver(nnx.Module):
    """From what is seen to a steering angle, with a memory."""

    def __init__(self, rngs: nnx.Rngs):
        self.cell = nnx.GRUCell(len(AHEAD) + 2, UNITS, rngs=rngs)
        self.head = nnx.Linear(UNITS, 1, rngs=rngs)

    def __call__(self, memory, seen):
        memory, _ = self.cell(memory, seen)
        return memory, MAX_STEERING * jnp.tanh(self.head(memory)[0])


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Driver(nnx.Rngs(0))))


def road(phases: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    """The middle of a road at x: where it is and where it points, m and rad."""
    waves = 2 * np.pi / WAVELENGTHS
    angles = x[..., None] * waves + phases
    slope = jnp.sum(AMPLITUDES * waves * jnp.cos(angles), axis=-1)
    return jnp.sum(AMPLITUDES * jnp.sin(angles), axis=-1), jnp.arctan(slope)


def drive(
    params: Any, phases: jax.Array, start: jax.Array, step_bound: Any = np.inf
) -> tuple[jax.Array, ...]:
    """One drive: x, y, the distance from the middle of the road and the command of each step.

    What comes back from later steps to the state of car and policy is clipped to `step_bound`.
    """
    driver = nnx.merge(GRAPH, params)

    def step(carry, _):
        (x, y, heading, steering), memory = optaxclip.clip_backward(carry, step_bound)
        ahead = x + AHEAD * jnp.cos(heading)
        aside = (road(phases, ahead)[0] - y) * jnp.cos(heading) - (ahead - x) * jnp.sin(heading)
        angle = jnp.sin(heading - road(phases, x)[1])
        seen = jnp.concatenate([jnp.tanh(aside / 5), jnp.stack([angle, steering])])
        memory, command = driver(memory, seen)
        steering += SECONDS / LAG * (command - steering)
        heading += SECONDS * SPEED / WHEELBASE * jnp.tan(steering)
        x += SECONDS * SPEED * jnp.cos(heading)
        y += SECONDS * SPEED * jnp.sin(heading)
        middle, direction = road(phases, x)
        seen_by_us = (x, y, (y - middle) * jnp.cos(direction), command)
        return ((x, y, heading, steering), memory), seen_by_us

    middle, direction = road(phases, jnp.zeros(()))
    car = (jnp.zeros(()), middle + start[0], direction + start[1], jnp.zeros(()))
    return jax.lax.scan(step, (car, jnp.zeros(UNITS)), length=STEPS)[1]


def loss_fn(params: Any, phases: jax.Array, starts: jax.Array, step_bound: jax.Array) -> jax.Array:
    """Squared distance from the middle of the road, and a little for steering."""
    cars = jax.vmap(drive, (None, 0, 0, None))
    _, _, distance, command = cars(params, phases, starts, step_bound)
    return jnp.mean(distance**2) + 0.1 * jnp.mean(command**2)


def sample(key: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Roads, and where the cars stand on them at first: aside and askew."""
    of_road, of_start = jax.random.split(key)
    phases = jax.random.uniform(of_road, (number, len(WAVELENGTHS)), maxval=2 * np.pi)
    return phases, np.array([0.5, 0.05]) * jax.random.normal(of_start, (number, 2))


def test_roads() -> tuple[jax.Array, jax.Array]:
    """The same for every policy, and seen by none in training."""
    return sample(jax.random.key(10_000), TEST_ROADS)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and what its policy does afterwards; arrays are NumPy's."""

    bound: float
    """Of the whole gradient."""
    step_bound: float
    """Of the gradient at each step of a drive, by that step's state."""
    rate: float
    seed: int
    loss: np.ndarray
    norm: np.ndarray
    """Before clipping, of each training step."""
    x: np.ndarray
    """[test roads, STEPS]"""
    y: np.ndarray
    distance: np.ndarray

    @property
    def clipped(self) -> str:
        """What is clipped."""
        if np.isfinite(self.step_bound):
            return "each step's"
        return "the gradient" if np.isfinite(self.bound) else "none"

    @property
    def on_road(self) -> float:
        """The share of the test roads that are driven to the end."""
        return float(np.mean(np.all(np.abs(self.distance) < HALF_WIDTH, axis=1)))

    @property
    def rms(self) -> float:
        """Distance from the middle of the road, m."""
        return float(np.sqrt(np.mean(self.distance**2)))


def train(
    optimizer: str,
    iterations: int,
    bound: jax.Array,
    step_bound: jax.Array,
    rate: jax.Array,
    seed: jax.Array,
) -> tuple[Any, ...]:
    """Losses and norms of the training steps, and the drives on the test roads."""
    key = jax.random.key(seed)
    _, params = nnx.split(Driver(nnx.Rngs(key)))
    # A bound of infinity never clips.
    tx = optax.chain(optaxclip.clip_by_global_norm(bound), OPTIMIZERS[optimizer](rate))

    def step(carry, key):
        params, state = carry
        roads = sample(key, BATCH)
        loss, grads = jax.value_and_grad(loss_fn)(params, *roads, step_bound)
        updates, state = tx.update(grads, state, params)
        norm = optaxclip.clip_stats(state)["clip_by_global_norm"].pre_clip_norm
        return (optax.apply_updates(params, updates), state), (loss, norm)

    keys = jax.random.split(jax.random.fold_in(key, 1), iterations)
    (params, _), (losses, norms) = jax.lax.scan(step, (params, tx.init(params)), keys)
    x, y, distance, _ = jax.vmap(drive, (None, 0, 0))(params, *test_roads())
    return losses, norms, x, y, distance


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, writes the figure and the JSON."""
    options = parse(argv)
    start = time.perf_counter()
    none = np.inf
    settings = [(none, none, RATE), (BOUND, none, RATE), (none, STEP_BOUND, RATE)]
    settings += [(none, none, RATE * k) for k in options.smaller]
    plan = [(*setting, seed) for setting in settings for seed in range(options.seeds)]
    program = jax.jit(jax.vmap(functools.partial(train, options.optimizer, options.iterations)))
    *numbers, seeds = (np.array(column) for column in zip(*plan, strict=True))
    found = program(*map(np.float32, numbers), seeds)
    runs = [Run(*key, *values) for key, *values in zip(plan, *map(np.asarray, found), strict=True)]
    print(f"{'clipped':14}{'rate':>8}{'seed':>6}{'roads driven':>14}{'off by, m':>11}", end="")
    print(f"{'gradient norm: least':>24}{'median':>9}{'most':>9}")
    for run in runs:
        norms = "".join(f"{n:9.1e}" for n in np.quantile(run.norm, [0, 0.5, 1]))
        print(
            f"{run.clipped:14}{run.rate:8.0e}{run.seed:6}{run.on_road:14.0%}{run.rms:11.2f}"
            f"{'':15}{norms}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    record = [
        {k: getattr(run, k) for k in ("rate", "seed", "on_road", "rms")}
        | {"clipped": run.clipped}
        | {"norms": [float(n) for n in np.quantile(run.norm, [0, 0.5, 1])]}
        for run in runs
    ]
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    with mpl.rc_context(LOOK):
        figure(runs[: 3 * options.seeds]).savefig(options.out / "driving.png", dpi=100)
    print(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s. See {options.out}/driving.png")
    return 0


def figure(runs: list[Run]) -> Figure:
    """A test road above; below the loss and the norm during training; a line for each run."""
    picture = Figure(figsize=(9, 5.6), layout="constrained")
    grid = picture.add_gridspec(2, 2, height_ratios=[1.15, 1])
    map_, loss, norm = (picture.add_subplot(grid[k]) for k in (np.s_[0, :], (1, 0), (1, 1)))
    phases = np.asarray(test_roads()[0][0])
    along = np.linspace(-15, 125, 400)
    middle, _ = road(phases, along)
    map_.plot(along, middle, color="#e3e5e9", lw=15, solid_capstyle="butt", zorder=0)
    map_.plot(along, middle, color="white", lw=1, ls=(0, (8, 8)), zorder=1)
    for run in runs:
        order = 2 + list(COLOURS).index(run.clipped)
        width = 2.6 if run.clipped == "the gradient" else 1.2  # the last lies upon it
        look = {"color": COLOURS[run.clipped], "lw": width, "zorder": order}
        map_.plot(run.x[0], run.y[0], **look)
        loss.plot(run.loss, **look)
        norm.plot(np.where(run.norm > 0, run.norm, np.nan), **look)
    map_.set(xlim=(-15, 125), ylim=(-16, 16), xlabel="m", ylabel="m", aspect="equal")
    map_.set_title("A road that was not in training, and where each seed's policy goes")
    loss.set(yscale="log", xlabel="training step", title="Loss")
    norm.set(yscale="log", xlabel="training step", title="Norm of the gradient, where it is not 0")
    norm.axhline(BOUND, color="black", lw=1, ls="--")
    norm.annotate("bound", (1, BOUND), (-2, 3), xycoords=("axes fraction", "data"), ha="right",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    lines = [mpl.lines.Line2D([], [], color=c, lw=2) for c in COLOURS.values()]
    titles = [
        "without clipping",
        f"the gradient clipped to {BOUND:g}",
        f"each step's, in the backward pass, to {STEP_BOUND:g}",
    ]
    picture.legend(lines, titles, loc="outside lower center", ncols=3)
    return picture


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--out", type=Path, default=Path("out/driving_bptt"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="1 seed, fewer steps")
    options = parser.parse_args(argv)
    options.seeds, options.iterations = (1, 120) if options.quick else (3, 300)
    options.smaller = [] if options.quick else [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    return options


if __name__ == "__main__":
    raise SystemExit(main())
