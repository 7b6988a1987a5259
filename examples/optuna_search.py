"""A search over several machines: Optuna proposes, `cross_validate` scores, a database remembers.

    pip install '.[examples]'
    python examples/optuna_search.py --storage sqlite:///out/search.db       # on one machine
    python examples/optuna_search.py --storage postgresql://user:password@host/search
                                                  # the same command on as many as you like

Threshold and learning rate of an MLP on scikit-learn's digits are searched together, as the best
bound depends on the rate. Every worker asks the study in the database for its next trial and
tells it the score, so workers may come and go. A trial whose runs diverged is told as failed: the
sampler leaves it out. A trial whose worker was killed stays marked as running, and costs the study
nothing else. SQLite is for workers that share a disk; for more, use PostgreSQL or MySQL.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from _mlp import init, outputs
from sklearn.datasets import load_digits

import optaxclip

initialize = functools.partial(init, widths=(64, 64, 10))  # one object: compiled once


def main(argv: Sequence[str] | None = None) -> None:
    """Works on the study, and prints what it knows by then."""
    options = parse(argv)
    if options.storage.startswith("sqlite:///"):
        Path(options.storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(options.storage)
    study = optuna.create_study(
        study_name=options.study,
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=options.seed),
    )
    digits = load_digits()
    data = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)

    def objective(trial: optuna.Trial) -> float:
        threshold = trial.suggest_float("threshold", 1e-2, 1e2, log=True)
        learning_rate = trial.suggest_float("learning_rate", 1e-2, 3.0, log=True)
        found = optaxclip.cross_validate(
            lambda c: optax.chain(optaxclip.clip_by_global_norm(c), optax.sgd(learning_rate)),
            [threshold],
            init_fn=initialize,
            loss_fn=loss,
            metric_fn=accuracy,
            data=data,
            folds=options.folds,
            steps=options.steps,
            batch_size=64,
            key=jax.random.key(0),
            progress=False,
        )
        trial.set_user_attr("standard_error", float(found.standard_error[0]))
        trial.set_user_attr("clip_rate", float(found.clip_rate[0]))
        if found.failures[0]:
            raise RuntimeError(f"{found.failures[0]} of {options.folds} runs diverged")
        return float(found.mean[0])

    study.optimize(objective, n_trials=options.trials, catch=(RuntimeError,))
    report(study)


def report(study: optuna.Study) -> None:
    """All trials of all workers, the best first."""
    done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    print(f"{'threshold':>10} {'rate':>8} {'accuracy':>9} {'+-':>7} {'clipped':>8}")
    for trial in sorted(done, key=lambda t: -t.value)[:10]:
        threshold, rate = trial.params["threshold"], trial.params["learning_rate"]
        error, clipped = (trial.user_attrs[name] for name in ("standard_error", "clip_rate"))
        print(f"{threshold:10.3g} {rate:8.3g} {trial.value:9.4f} {error:7.4f} {clipped:8.0%}")
    failed = len(study.get_trials(states=[optuna.trial.TrialState.FAIL]))
    print(f"{len(done)} trials in the study, {failed} more diverged")


def loss(params: Any, batch: Any) -> jax.Array:
    """Cross-entropy."""
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs(params, x), y))


def accuracy(params: Any, batch: Any) -> jax.Array:
    """Share of right answers."""
    return jnp.mean(outputs(params, batch[0]).argmax(axis=-1) == batch[1])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", default="sqlite:///out/optuna_search.db", metavar="URL")
    parser.add_argument("--study", default="digits", help="workers with one name share a search")
    parser.add_argument("--trials", type=int, help="of this worker (default 20)")
    parser.add_argument("--folds", type=int, help="default 5")
    parser.add_argument("--steps", type=int, help="default 300")
    parser.add_argument("--seed", type=int, help="of the sampler; give each worker its own")
    parser.add_argument("--quick", action="store_true", help="2 trials, 2 folds, 60 steps")
    options = parser.parse_args(argv)
    options.trials = options.trials or (2 if options.quick else 20)
    options.folds = options.folds or (2 if options.quick else 5)
    options.steps = options.steps or (60 if options.quick else 300)
    return options


if __name__ == "__main__":
    main()
