"""One training run for `compare_clippers.py`: the data, the models and the jitted loop."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import optaxclip

BATCH_SIZE = 32
EVAL_EVERY = 10
SPIKE_EVERY = 50
SPIKE_FACTOR = 1000.0
CALIBRATION_SEED = 10_000

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(3e-3),
}

OPTIMIZER_TITLES = {"sgd": "SGD with momentum", "adam": "Adam"}

CLIPPERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "none": lambda bound: optax.identity(),
    "value": optaxclip.clip_by_value,
    "global": optaxclip.clip_by_global_norm,
    "leaf": optaxclip.clip_by_leaf_norm,
    "unit": optaxclip.clip_by_unit_norm,
    "agc": optaxclip.agc,
    "soft": optaxclip.soft_clip,
}


CLIPPER_TITLES = {
    "none": "no clipping",
    "value": "value",
    "global": "global norm",
    "leaf": "leaf norm",
    "unit": "unit norm",
    "agc": "AGC",
    "soft": "soft",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What goes wrong during training, and whether the optimizer is guarded."""

    title: str
    label_noise: float = 0.0
    spike: bool = False
    nan: bool = False
    guarded: bool = False


SETTINGS = {
    "clean": Setting("Clean"),
    "label_noise": Setting("40 % label noise", label_noise=0.4),
    "spike": Setting("Spikes x1000", spike=True),
    "nan": Setting("NaN batch", nan=True),
    "nan_guarded": Setting("NaN, guarded", nan=True, guarded=True),
}


class MLP(nnx.Module):
    """Two hidden layers of 64."""

    def __init__(self, features: int, classes: int, rngs: nnx.Rngs):
        self.hidden1 = nnx.Linear(features, 64, rngs=rngs)
        self.hidden2 = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden2(nnx.relu(self.hidden1(x)))))


class CNN(nnx.Module):
    """Two 3x3 convolutions over square images."""

    def __init__(self, features: int, classes: int, rngs: nnx.Rngs):
        self.side = math.isqrt(features)
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), padding="VALID", rngs=rngs)
        self.head = nnx.Linear((self.side // 2 - 2) ** 2 * 16, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x.reshape(-1, self.side, self.side, 1)))
        return self.head(nnx.relu(self.conv2(x)).reshape(len(x), -1))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the data it learns."""

    title: str
    model: Callable[..., nnx.Module]
    load: Callable[[], Any]
    features: int
    classes: int

    def build(self, seed: Any) -> nnx.Module:
        """The model with fresh parameters."""
        return self.model(self.features, self.classes, rngs=nnx.Rngs(jax.random.key(seed)))

    def graph(self) -> nnx.GraphDef:
        """The model without its parameters."""
        return nnx.graphdef(nnx.eval_shape(lambda: self.build(0)))


digits, cancer = functools.cache(load_digits), functools.cache(load_breast_cancer)

WORKLOADS = {
    "mlp_digits": Workload("MLP on digits", MLP, digits, features=64, classes=10),
    "mlp_cancer": Workload("MLP on breast cancer", MLP, cancer, features=30, classes=2),
    "cnn_digits": Workload("CNN on digits", CNN, digits, features=64, classes=10),
}


class Plan(NamedTuple):
    """What a run does at each step; arrays `[evaluations, EVAL_EVERY, ...]`."""

    batches: jax.Array
    input_scale: jax.Array
    grad_scale: jax.Array


class Inputs(NamedTuple):
    """Everything a compiled training program is called with."""

    params: nnx.State
    x: jax.Array
    y: jax.Array
    plan: Plan


class ClipCurves(NamedTuple):
    """A clipper's statistics after each step."""

    norm: np.ndarray
    bound: np.ndarray
    clipped_count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """The outcome of one training run."""

    workload: str
    setting: str
    clipper: str
    seed: int
    loss: np.ndarray
    """Of each step's batch, before the step."""
    clip: ClipCurves | None
    """None without a clipper."""
    accuracy: np.ndarray
    """On the test set, every EVAL_EVERY steps."""
    clip_rate: float | None
    skipped: int
    """Steps that `skip_nonfinite` skipped."""
    lost: bool
    """Whether the final parameters hold a NaN or an infinity."""
    seconds_per_step: float


def load_split(workload: Workload, setting: Setting, seed: int) -> tuple[jax.Array, ...]:
    """Standardised `x, y, x_test, y_test`; noise replaces training labels by other classes."""
    data = workload.load()
    x, x_test, y, y_test = train_test_split(
        data.data, data.target, test_size=0.25, random_state=seed, stratify=data.target
    )
    scaler = StandardScaler().fit(x)
    rng = np.random.default_rng([seed, 1])
    classes = int(y.max()) + 1
    other = (y + rng.integers(1, classes, y.shape)) % classes
    y = np.where(rng.random(y.shape) < setting.label_noise, other, y)
    x, x_test = (jnp.asarray(scaler.transform(a), jnp.float32) for a in (x, x_test))
    return x, jnp.asarray(y, jnp.int32), x_test, jnp.asarray(y_test, jnp.int32)


def make_plan(setting: Setting, examples: int, steps: int, seed: int) -> Plan:
    """The batches of a run and its accidents."""
    rng = np.random.default_rng([seed, 2])
    passes = -(-steps * BATCH_SIZE // examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(passes)])
    step = np.arange(steps)
    poisoned = setting.nan & (step == steps // 2)
    spiked = setting.spike & (step % SPIKE_EVERY == SPIKE_EVERY // 2)
    shape = (steps // EVAL_EVERY, EVAL_EVERY)
    return Plan(
        jnp.asarray(order[: steps * BATCH_SIZE].reshape(*shape, BATCH_SIZE), jnp.int32),
        jnp.asarray(np.where(poisoned, np.nan, 1.0).reshape(shape), jnp.float32),
        jnp.asarray(np.where(spiked, SPIKE_FACTOR, 1.0).reshape(shape), jnp.float32),
    )


def make_optimizer(
    clipper: optax.GradientTransformation, optimizer: str, *, guarded: bool
) -> optax.GradientTransformation:
    """Clip, then step; the guard goes around both."""
    tx = optax.chain(clipper, OPTIMIZERS[optimizer]())
    return optaxclip.skip_nonfinite(tx) if guarded else tx


def observe(clipper: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the clipper's statistics and leaves the gradient alone."""

    def update_fn(updates, state, params=None, **extra_args):
        return updates, clipper.update(updates, state, params, **extra_args)[1]

    return optax.GradientTransformationExtraArgs(clipper.init, update_fn)


def loss_fn(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def train(workload: Workload, tx: optax.GradientTransformation, inputs: Inputs):
    """A whole run as one scan: records of each step, a snapshot per evaluation, the end."""
    model = nnx.merge(workload.graph(), inputs.params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state, now: Plan):
        model, optimizer = nnx.merge(graph, state)
        x, y = inputs.x[now.batches] * now.input_scale, inputs.y[now.batches]
        loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
        grads = jax.tree.map(lambda g: g * now.grad_scale, grads)
        optimizer.update(model, grads)
        stats = optaxclip.clip_stats(nnx.as_pure(optimizer.opt_state)).values()
        curves = [ClipCurves(s.pre_clip_norm, s.threshold, s.clipped_count) for s in stats]
        return nnx.state((model, optimizer)), (loss, curves)

    def until_evaluation(state, plan: Plan):
        state, records = jax.lax.scan(step, state, plan)
        model, _ = nnx.merge(graph, state)
        return state, (records, nnx.state(model))

    state, (records, snapshots) = jax.lax.scan(until_evaluation, state, inputs.plan)
    records = jax.tree.map(jnp.ravel, records)
    _, optimizer = nnx.merge(graph, state)
    return records, snapshots, nnx.as_pure(optimizer.opt_state)


def evaluate(workload: Workload, snapshots: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Test accuracy of each snapshot; an answer that is not finite is a wrong one."""

    def accuracy(snapshot):
        logits = nnx.merge(workload.graph(), snapshot)(x)
        right = (logits.argmax(axis=-1) == y) & jnp.isfinite(logits).all(axis=-1)
        return right.mean()

    return jax.lax.map(accuracy, snapshots)


class Trainer:
    """One workload's bounds and its programs, each compiled when it is first needed."""

    def __init__(
        self,
        workload: str,
        clippers: Sequence[str],
        *,
        optimizer: str = "sgd",
        steps: int = 400,
        quantile: float = 0.75,
    ):
        self.name = workload
        self.workload = WORKLOADS[workload]
        self.optimizer = optimizer
        self.steps = steps
        self.quantile = quantile
        self._init = jax.jit(lambda seed: nnx.state(self.workload.build(seed)))
        self.bounds = self._calibrate([c for c in clippers if c != "none"])
        self._programs: dict[tuple[str, bool], Callable] = {}
        self._evaluate = jax.jit(functools.partial(evaluate, self.workload))

    def run(self, setting_name: str, clipper: str, seed: int) -> Run:
        """Trains once, with the clock running from call to result; evaluates afterwards."""
        setting = SETTINGS[setting_name]
        x, y, x_test, y_test = load_split(self.workload, setting, seed)
        plan = make_plan(setting, len(x), self.steps, seed)
        inputs = Inputs(self._init(seed), x, y, plan)
        program = self._program(clipper, setting.guarded, inputs)
        start = time.perf_counter()
        (loss, curves), snapshots, opt_state = jax.block_until_ready(program(inputs))
        seconds = time.perf_counter() - start
        stats = next(iter(optaxclip.clip_stats(opt_state).values()), None)
        return Run(
            workload=self.name,
            setting=setting_name,
            clipper=clipper,
            seed=seed,
            loss=np.asarray(loss),
            clip=jax.tree.map(np.asarray, curves[0]) if curves else None,
            accuracy=np.asarray(self._evaluate(snapshots, x_test, y_test)),
            clip_rate=float(stats.clipped_count / stats.count) if stats else None,
            skipped=int(opt_state.skipped_count) if setting.guarded else 0,
            lost=not all(bool(jnp.isfinite(p[-1]).all()) for p in jax.tree.leaves(snapshots)),
            seconds_per_step=seconds / self.steps,
        )

    def _program(self, clipper: str, guarded: bool, inputs: Inputs) -> Callable:
        """Compiled and called once, so that the clock sees neither compiler nor cold caches."""
        if (clipper, guarded) not in self._programs:
            tx = CLIPPERS[clipper](self.bounds.get(clipper, 0.0))
            tx = make_optimizer(tx, self.optimizer, guarded=guarded)
            program = jax.jit(functools.partial(train, self.workload, tx))
            jax.block_until_ready(program(inputs))
            self._programs[clipper, guarded] = program
        return self._programs[clipper, guarded]

    def _calibrate(self, clippers: Sequence[str]) -> dict[str, float]:
        """Each clipper's bound: a quantile of what it measures in a clean, unclipped run."""
        if not clippers:
            return {}
        watchers = optax.chain(*(observe(CLIPPERS[c](1.0)) for c in clippers))
        tx = make_optimizer(watchers, self.optimizer, guarded=False)
        clean, seed = SETTINGS["clean"], CALIBRATION_SEED
        x, y, _, _ = load_split(self.workload, clean, seed)
        inputs = Inputs(self._init(seed), x, y, make_plan(clean, len(x), self.steps, seed))
        (_, curves), _, _ = jax.jit(functools.partial(train, self.workload, tx))(inputs)
        # What an AGC of 1 measures is a norm, and its bound the parameters' norm.
        sizes = [float(np.quantile(c.norm / c.bound, self.quantile)) for c in curves]
        return {c: float(f"{n:.2g}") for c, n in zip(clippers, sizes, strict=True)}
