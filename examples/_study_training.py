"""The training of `robustness_study.py`: many runs side by side in one compiled program.

A run differs from its neighbours in numbers alone: its seed, its learning rate, the bound of each
clipper (infinite where there is none), how much weight decay, label smoothing and dropout it has.
Adversarial training and SAM need a second gradient, so each has a program of its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _study_models import DATA, build, logits, split
from flax import nnx

import optaxclip

BATCH, EVAL_EVERY, PILOT_SEED = 32, 10, 1000
RATES = {"MLP": 0.05, "CNN": 0.05, "LSTM": 0.2, "transformer": 0.05}
STRESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""How many times larger the learning rate may be in the setting "stress"."""
FAILED = 0.8
"""A run has failed if its accuracy is below this share of the usual one."""
CLIPPERS = ("none", "value", "global", "AGC", "per-example", "zclip")
STRICTNESS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
REGULARISERS = (
    "plain",
    "weight decay",
    "dropout",
    "label smoothing",
    "adversarial training",
    "SAM",
)
ATTACKED, SAMPLES = 100, 2  # test examples that are attacked; directions of each
RHO = 0.05  # of SAM


class Lane(NamedTuple):
    """What a run is told; every field a number."""

    seed: Any
    rate: Any
    value: Any = np.inf
    global_norm: Any = np.inf
    agc: Any = np.inf
    per_example: Any = np.inf
    zclip: Any = False
    decay: Any = 0.0
    smoothing: Any = 0.0
    dropout: Any = 0.0


class Found(NamedTuple):
    """What a run gives."""

    curve: Any
    """Test accuracy, every EVAL_EVERY steps."""
    loss: Any
    """Of the last tenth of the steps."""
    clip_rates: Any
    """Of value, global norm, AGC, per-example and zclip."""
    sizes: Any
    """The median over steps of what value, global norm and per-example clipping measure."""
    sensitivity: Any
    """Of the logits."""
    sensitivity_of_probabilities: Any
    adversarial: Any
    noise: Any


def clipper(lane: Lane) -> optax.GradientTransformation:
    """All of them one after the other; a lane's bounds are infinite but for its own."""
    zclip = optaxclip.zclip()

    def update_fn(updates, state, params=None, **extra_args):
        clipped, state = zclip.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda c, u: jnp.where(lane.zclip, c, u), clipped, updates), state

    return optax.chain(
        optaxclip.clip_per_example(lane.per_example, nan_safe=False),
        optaxclip.clip_by_value(lane.value),
        optaxclip.agc(lane.agc),
        optaxclip.clip_by_global_norm(lane.global_norm),
        optax.GradientTransformationExtraArgs(zclip.init, update_fn),
    )


def train(
    model: str,
    data: str,
    steps: int,
    kind: str,
    lane: Lane,
    x: Any,
    y: Any,
    x_test: Any,
    y_test: Any,
):
    """One run. `kind` is "adversarial training", "SAM" or "" for all else."""
    key = jax.random.key(lane.seed)
    graph, params = build(model, data, key)
    outer = optax.chain(
        clipper(lane), optax.add_decayed_weights(lane.decay), optax.sgd(lane.rate, momentum=0.9)
    )
    inner = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(outer, inner, opaque_mode=True) if kind == "SAM" else outer
    width = jax.eval_shape(lambda p: nnx.merge(graph, p).features(x[:1]), params).shape[1]

    def example_loss(params, example):
        x, y, kept = example
        z = logits(graph, params, x[None], kept)[0]
        log_p = jax.nn.log_softmax(z)
        smooth = lane.smoothing
        return -(1 - smooth) * log_p[y] - smooth * jnp.mean(log_p)

    def mean_loss(params, batch):
        return jnp.mean(jax.vmap(example_loss, (None, 0))(params, batch))

    per_example = optaxclip.per_example_value_and_grad(example_loss)

    def step(carry, key):
        params, state = carry
        of_batch, of_dropout = jax.random.split(key)
        index = jax.random.randint(of_batch, (BATCH,), 0, len(x))
        kept = jax.random.bernoulli(of_dropout, 1 - lane.dropout, (BATCH, width))
        batch = (x[index], y[index], kept / (1 - lane.dropout))
        if kind == "adversarial training":
            slope = jax.grad(lambda x: mean_loss(params, (x, *batch[1:])))(batch[0])
            batch = (batch[0] + DATA[data].radius * jnp.sign(slope), *batch[1:])
        if kind == "SAM":
            loss, grads = jax.value_and_grad(mean_loss)(params, batch)
            there = {"grad_fn": lambda p, _: per_example(p, batch)[1]}
        else:
            losses, grads = per_example(params, batch)
            loss, there = jnp.mean(losses), {}
        updates, state = tx.update(grads, state, params, **there)
        found = optaxclip.clip_stats(state)
        examples = found["clip_per_example"].examples
        names = ("clip_by_value", "clip_by_global_norm", "agc")
        clipped = [found[n].clipped_count for n in names]
        clipped += [examples.clipped_fraction, found["zclip"].clipped_count]
        sizes = [found[n].pre_clip_norm for n in names[:2]] + [examples.mean_norm]
        return (optax.apply_updates(params, updates), state), (loss, clipped, sizes)

    def until_evaluation(carry, keys):
        carry, records = jax.lax.scan(step, carry, keys)
        return carry, (records, accuracy(graph, carry[0], x_test, y_test))

    keys = jax.random.split(jax.random.fold_in(key, 1), (steps // EVAL_EVERY, EVAL_EVERY))
    carry, (records, curve) = jax.lax.scan(until_evaluation, (params, tx.init(params)), keys)
    loss, clipped, sizes = jax.tree.map(jnp.ravel, records)
    rates = [c[-1] / steps if k != 3 else jnp.mean(c) for k, c in enumerate(clipped)]
    return carry[0], curve, jnp.mean(loss[-steps // 10 :]), rates, [jnp.median(s) for s in sizes]


def accuracy(graph: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of right answers; one that is not finite is wrong."""
    z = logits(graph, params, x)
    return jnp.mean((z.argmax(axis=1) == y) & jnp.isfinite(z).all(axis=1))


def examine(model: str, data: str, params: Any, x: jax.Array, y: jax.Array) -> list[jax.Array]:
    """Sensitivity of logits and of probabilities, accuracy under attack and under noise."""
    graph, _ = jax.eval_shape(lambda: build(model, data, 0))
    fun = functools.partial(logits, graph)

    def sure(params, x):
        return jax.nn.softmax(fun(params, x))

    x, y, key, radius = x[:ATTACKED], y[:ATTACKED], jax.random.key(0), DATA[data].radius
    found = [
        jnp.mean(
            optaxclip.input_sensitivity(
                f, params, x, radius=radius, norm=2, samples=SAMPLES, key=key, steps=4
            ).by_example
        )
        for f in (fun, sure)
    ]
    attack = {"radius": radius, "norm": np.inf, "steps": 5}
    found.append(optaxclip.adversarial_accuracy(fun, params, x, y, **attack))
    noise = {"sigmas": np.array([3 * radius]), "samples": 4, "key": key}
    found.append(optaxclip.robustness.noise_accuracy(fun, params, x, y, **noise)[0])
    return found


@dataclasses.dataclass(frozen=True)
class Piece:
    """Runs that share a program call: six variants, each with all seeds."""

    data: str
    model: str
    regulariser: str
    setting: str
    """"base", "stress", or "strict": global clipping at a share of its bound."""

    @property
    def kind(self) -> str:
        """Which program."""
        return self.regulariser if self.regulariser in ("adversarial training", "SAM") else ""

    def variants(self) -> tuple[Any, ...]:
        """What tells its rows apart."""
        return STRICTNESS if self.setting == "strict" else CLIPPERS

    def lanes(self, bounds: dict[str, float], seeds: int) -> list[Lane]:
        """One a run: variant by variant, seed by seed."""
        rate = RATES[self.model] * (bounds["stress"] if self.setting == "stress" else 1)
        how: dict[str, Any] = {
            "weight decay": {"decay": 3e-3},
            "label smoothing": {"smoothing": 0.1},
            "dropout": {"dropout": 0.3},
        }.get(self.regulariser, {})
        own = {
            "none": {},
            "value": {"value": bounds["value"]},
            "global": {"global_norm": bounds["global"]},
            "AGC": {"agc": 0.01},
            "per-example": {"per_example": bounds["per-example"]},
            "zclip": {"zclip": True},
        }
        return [
            Lane(
                seed,
                rate,
                **how,
                **({"global_norm": bounds["global"] * v} if self.setting == "strict" else own[v]),
            )
            for v in self.variants()
            for seed in range(seeds)
        ]


class Study:
    """One model on one data set: its data, its programs, its bounds."""

    def __init__(self, data: str, model: str, *, steps: int, seeds: int):
        self.data, self.model, self.seeds = data, model, seeds
        pilots = range(PILOT_SEED, PILOT_SEED + seeds)
        self.examples = {s: split(data, s) for s in [*range(seeds), *pilots]}
        self._train = jax.jit(
            lambda kind, *args: jax.vmap(functools.partial(train, model, data, steps, kind))(*args),
            static_argnums=0,
        )
        self._examine = jax.jit(jax.vmap(functools.partial(examine, model, data)))

    def pilot(self) -> dict[str, float]:
        """Each clipper's bound: the median of what it measures in unclipped runs.

        And the learning rate of "stress": the smallest at which most unclipped runs fail.
        """
        seeds = range(PILOT_SEED, PILOT_SEED + self.seeds)
        found = self._run("", [Lane(s, k * RATES[self.model]) for k in STRESS for s in seeds])
        medians = np.median(found.sizes[:, : self.seeds], axis=1)
        names = ("value", "global", "per-example")
        bounds = {n: float(f"{m:.3g}") for n, m in zip(names, medians, strict=True)}
        ends = found.curve[:, -1].reshape(len(STRESS), self.seeds)
        most = np.mean(ends < FAILED * np.median(ends[0]), axis=1) > 0.5
        return bounds | {"stress": STRESS[int(np.argmax(most)) if most.any() else -1]}

    def run(self, piece: Piece, bounds: dict[str, float]) -> list[dict[str, Any]]:
        """A row for each run."""
        found = self._run(piece.kind, piece.lanes(bounds, self.seeds))
        rows = []
        for k, (variant, seed) in enumerate(
            (v, s) for v in piece.variants() for s in range(self.seeds)
        ):
            rate = {"none": 0.0}.get(variant)
            if rate is None:
                at = 1 if piece.setting == "strict" else CLIPPERS.index(variant) - 1
                rate = float(found.clip_rates[at][k])
            rows.append(
                dataclasses.asdict(piece)
                | {"variant": variant, "seed": seed, "accuracy": float(found.curve[k, -1])}
                | {"loss": float(found.loss[k]), "clip_rate": rate}
                | {n: float(getattr(found, n)[k]) for n in Found._fields[4:]}
                | {"curve": " ".join(f"{a:.4f}" for a in found.curve[k])}
            )
        return rows

    def _run(self, kind: str, lanes: list[Lane]) -> Found:
        columns = [np.asarray(c) for c in zip(*lanes, strict=True)]
        columns = [c.astype(np.float32) if c.dtype == np.float64 else c for c in columns]
        x, y, x_test, y_test = (
            np.stack(c) for c in zip(*(self.examples[i.seed] for i in lanes), strict=True)
        )
        params, curve, loss, rates, sizes = self._train(kind, Lane(*columns), x, y, x_test, y_test)
        examined = self._examine(params, x_test, y_test)
        return Found(*map(np.asarray, (curve, loss, rates, sizes, *examined)))
