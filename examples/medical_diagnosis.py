"""Diagnosis from 30 measurements of a biopsy: a threshold by cross-validation, and its worth.

An MLP learns scikit-learn's breast cancer data (569 patients, 212 of them with a malignant tumour)
with SGD at a rate that is on the high side, under three clippers:
  none         no clipping,
  global       the batch's gradient,
  per_example  every patient's gradient, so that no single one decides.

For each seed a quarter of the patients is set aside. On the others, 5-fold cross-validation of the
log loss picks the threshold (`best`; infinity is among the candidates), and a model is trained with
it. What counts in a diagnosis is then measured on the quarter that no choice has seen: the share of
malignant tumours that are found (sensitivity), of benign ones that are left alone (specificity),
and whether a stated probability can be believed: the Brier score, the expected calibration error
(10 bins) and a reliability diagram. Intervals are 95 %, of the mean over seeds (Student's t); the
seeds split the same 569 patients, so they are somewhat too narrow.

    python examples/medical_diagnosis.py           # 20 seeds, 1 minute on 2 cores
    python examples/medical_diagnosis.py --quick   # 3 seeds, shorter: 20 seconds

Two tables go to the terminal, the second with the differences to no clipping, seed by seed;
medical_diagnosis.png and results.json go to the folder `--out`. `--page
docs/choosing_a_threshold.md` also writes the tables into that page, between its markers.
This is an example of method. Nobody should be diagnosed by it.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _medical_report import Assessment, figure_of, markdown_of, table_of
from _mlp import Params, init, outputs
from _pages import fill
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.preprocessing import StandardScaler

import optaxclip

initialize = functools.partial(init, widths=(30, 32, 1))  # one object: compiled once
BATCH_SIZE, LEARNING_RATE = 32, 0.5


@dataclasses.dataclass(frozen=True)
class Method:
    """A clipper, and how the gradients that it takes are made."""

    title: str
    clipper: Callable[[Any], Any] | None
    grad: Callable = jax.grad


METHODS = {
    "none": Method("no clipping", None),
    "global": Method("global norm", optaxclip.clip_by_global_norm),
    "per_example": Method(
        "per example",
        optaxclip.clip_per_example,
        functools.partial(optaxclip.per_example_grad, keep_batch_dim=True),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Chooses, trains, assesses; prints the table and writes the files."""
    options = parse(argv)
    start = time.perf_counter()
    thresholds = [*np.geomspace(0.003, 10, 5 if options.quick else 11), np.inf]
    optimizers = {name: optimizer_of(method) for name, method in METHODS.items()}
    trained = {name: trainer(optimizers[name], METHODS[name].grad) for name in METHODS}
    found, searches = [], {}
    for seed in range(options.seeds):
        (x, y), (x_test, y_test) = load(seed)
        for name, method in METHODS.items():
            threshold = np.inf
            if method.clipper is not None:
                searches[name] = optaxclip.cross_validate(
                    optimizers[name],
                    thresholds,
                    init_fn=initialize,
                    loss_fn=loss,
                    metric_fn=loss,
                    mode="min",
                    grad=method.grad,
                    data=(x, y),
                    folds=list(StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y)),
                    steps=options.steps,
                    batch_size=BATCH_SIZE,
                    key=jax.random.key(seed),
                    progress=False,
                )
                threshold = searches[name].best
            order = np.random.default_rng(seed).integers(0, len(x), (options.steps, BATCH_SIZE))
            params = trained[name](threshold, jax.random.key(seed), x, y, order)
            probability = np.asarray(jax.nn.sigmoid(logit(params, x_test)), float)
            found.append(Assessment(name, seed, threshold, probability, y_test))
    titles = {name: method.title for name, method in METHODS.items()}
    print("\n".join(table_of(found, titles)))
    print("\n".join(["", *table_of(found, titles, against="none")]))
    options.out.mkdir(parents=True, exist_ok=True)
    figure_of(found, titles, searches).savefig(options.out / "medical_diagnosis.png", dpi=110)
    record = [{**x.measures(), "method": x.method, "seed": x.seed} for x in found]
    (options.out / "results.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    if options.page:
        fill(options.page, {"diagnosis": markdown_of(found, titles)})
    print(f"{options.seeds} seeds in {time.perf_counter() - start:.0f} s. See {options.out}")


def load(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test patients; malignant is 1. The scale is that of the training patients."""
    data = load_breast_cancer()
    x, x_test, y, y_test = train_test_split(
        data.data, 1 - data.target, stratify=data.target, random_state=seed
    )
    scaler = StandardScaler().fit(x)
    return (scaler.transform(x).astype(np.float32), y.astype(np.float32)), (
        scaler.transform(x_test).astype(np.float32),
        y_test,
    )


def logit(params: Params, x: jax.Array) -> jax.Array:
    """Of a malignant tumour, for a batch."""
    return outputs(params, x)[:, 0]


def loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The log loss, which a probability that is right has least of."""
    x, y = batch
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logit(params, x), y))


def optimizer_of(method: Method) -> Callable[[Any], optax.GradientTransformation]:
    """`threshold -> optimizer`."""
    if method.clipper is None:
        return lambda threshold: optax.sgd(LEARNING_RATE)
    return lambda threshold: optax.chain(method.clipper(threshold), optax.sgd(LEARNING_RATE))


def trainer(optimizer: Callable, grad: Callable) -> Callable:
    """The final training, on all patients that were not set aside."""

    @jax.jit
    def train(threshold: Any, key: jax.Array, x: Any, y: Any, order: Any) -> Params:
        tx = optimizer(threshold)
        params = initialize(key)

        def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(grad(loss)(params, (x[batch], y[batch])), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]

    return train


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default 20)")
    parser.add_argument("--steps", type=int, help="of each training (default 600)")
    parser.add_argument("--out", type=Path, default=Path("out/medical_diagnosis"), metavar="FOLDER")
    parser.add_argument("--page", type=Path, help="a page to write the tables into")
    parser.add_argument("--quick", action="store_true", help="3 seeds, 200 steps, 6 thresholds")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or (3 if options.quick else 20)
    options.steps = options.steps or (200 if options.quick else 600)
    return options


if __name__ == "__main__":
    main()
