"""Cross-validation against plain loops, and what must hold when it is interrupted."""

import csv
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from tools.regression import THRESHOLDS, clipped_sgd, error, linear, linear_data, per_example_sgd

import optaxclip
from optaxclip import cross_validate, suggest_threshold
from optaxclip.selection import folds, runs, saved

X, Y = linear_data()
PER_EXAMPLE = {
    "make_optimizer": per_example_sgd,
    "grad": functools.partial(optaxclip.per_example_grad, keep_batch_dim=True),
}


def descend(x, y, threshold, steps, per_example):
    """Full-batch gradient descent in float64."""
    w, clipped = np.zeros(3), 0.0
    for _ in range(steps):
        grads = 2 * (x @ w - y)[:, None] * x
        if not per_example:
            grads = grads.mean(axis=0, keepdims=True)
        norms = np.linalg.norm(grads, axis=1, keepdims=True)
        clipped += np.mean(norms > threshold)
        w -= 0.2 * np.mean(grads * np.minimum(1, threshold / norms), axis=0)
    return w, clipped / steps, norms.mean()


@pytest.mark.parametrize("per_example", [False, True])
def test_scores_are_those_of_a_plain_loop(per_example):
    x, y = linear_data()
    order = np.random.default_rng(1).permutation(23)
    pairs = [(order[5:], order[:5]), (np.delete(order, range(5, 10)), order[5:8])]
    found = linear(folds=pairs, batch_size=18, **(PER_EXAMPLE if per_example else {}))
    assert found.scores.shape == (3, 2, 1)
    for (i, threshold), (k, (train, validation)) in (
        (a, b) for a in enumerate(THRESHOLDS) for b in enumerate(pairs)
    ):
        w, rate, norm = descend(x[train], y[train], threshold, 12, per_example)
        expected = np.mean((x[validation] @ w - y[validation]) ** 2)
        np.testing.assert_allclose(found.scores[i, k, 0], expected, rtol=2e-4)
        np.testing.assert_allclose(found.clip_rates[i, k, 0], rate, atol=1e-6)
        np.testing.assert_allclose(found.norms[i, k, 0], norm, rtol=2e-4)


@pytest.mark.parametrize(("number", "k"), [(23, 5), (20, 5), (7, 7), (9, 2)])
def test_every_example_validates_once(number, k):
    pairs = folds.split(k, number, np.array([3, 4]))
    sizes = [len(validation) for _, validation in pairs]
    assert len(pairs) == k
    assert max(sizes) - min(sizes) <= 1
    assert sorted(np.concatenate([v for _, v in pairs])) == list(range(number))
    for train, validation in pairs:
        assert sorted([*train, *validation]) == list(range(number))


def test_a_share_is_held_out_once():
    ((train, validation),) = folds.split(0.3, 10, np.array([0, 1]))
    assert len(validation) == 3
    assert sorted([*train, *validation]) == list(range(10))


def counting(metric, steps, **changes):
    """Training that counts how often each example was drawn, by score."""
    return cross_validate(
        lambda c: optax.chain(optaxclip.clip_by_value(c), optax.sgd(4.0)),  # a batch has 4
        [10.0],
        init_fn=lambda key: jnp.zeros(11),
        loss_fn=lambda counts, ids: -jnp.mean(counts[ids]),
        metric_fn=metric,
        data=jnp.arange(11),
        folds=3,
        steps=steps,
        batch_size=4,
        key=jax.random.key(0),
        progress=False,
        **changes,
    ).scores.ravel()


def test_no_example_of_the_fold_is_trained_on_and_all_of_them_score():
    found = counting(lambda counts, ids: 100 * jnp.sum(counts[ids]) + len(ids), 7)
    assert sorted(found) == [3, 4, 4]


def test_every_example_is_drawn_as_often_as_any_other():
    # 7 or 8 train, 160 are drawn.
    most = counting(lambda counts, ids: jnp.max(counts) + 1000 * jnp.sum(counts > 0), 40)
    assert sorted(most) == [7023, 7023, 8020]


def test_batches_are_the_same_for_every_threshold_and_differ_by_seed():
    found = linear([5e3, 5e4], seeds=2)
    np.testing.assert_array_equal(found.scores[0], found.scores[1])
    assert np.all(found.scores[0, :, 0] != found.scores[0, :, 1])
    again = linear([5e3, 5e4], seeds=2)
    np.testing.assert_array_equal(again.scores, found.scores)
    other = linear([5e3, 5e4], seeds=2, key=jax.random.key(1))
    assert np.all(other.scores != found.scores)


def test_everything_shares_one_compilation():
    traces, compiled = [], []

    def make_optimizer(threshold):
        traces.append(threshold)
        return clipped_sgd(threshold)

    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    linear(THRESHOLDS, make_optimizer, folds=2)  # what is compiled besides, once and for all
    first = len(traces)
    compiled.clear()
    linear(np.geomspace(0.01, 1, 16), make_optimizer, folds=5, seeds=2)
    assert len(compiled) == 1
    assert len(traces) == 2 * first
    linear(np.geomspace(0.1, 9, 16), make_optimizer, folds=5, seeds=2)
    assert len(compiled) == 1


@pytest.mark.parametrize("changes", [{}, PER_EXAMPLE], ids=["batch", "per_example"])
def test_side_by_side_is_as_one_by_one(changes):
    one, three = linear(runs_at_once=1, **changes), linear(runs_at_once=3, **changes)
    np.testing.assert_allclose(three.scores, one.scores, rtol=1e-5)
    np.testing.assert_allclose(three.norms, one.norms, rtol=1e-4)
    np.testing.assert_allclose(three.clip_rates, one.clip_rates, atol=1e-6)


def test_width_goes_by_memory():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 3_000, "bytes_in_use": 1_000}

    assert runs.width_for(100, 200, 1000, [Device()]) == 8
    assert runs.width_for(100, 200, 9, [Device()]) == 5  # two rounds, as full as can be
    assert runs.width_for(10_000, 200, 9, [Device()]) == 1
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, y: (c * y, None), x[0], x)[0])
    counted = runs.most_bytes(jaxpr(jnp.zeros((5, 10))).jaxpr)
    assert counted >= 2 * 40


class StopError(Exception):
    pass


def interrupted(monkeypatch, after, directory, **changes):
    """Starts, and is stopped once `after` rounds are written."""
    add, rounds = saved.Saved.add, []

    def stopping(self, *args):
        add(self, *args)
        rounds.append(1)
        if len(rounds) == after:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(saved.Saved, "add", stopping)
        with pytest.raises(StopError):
            linear(resume_dir=directory, **changes)


def test_resumed_is_uninterrupted_and_nothing_is_computed_twice(monkeypatch, tmp_path):
    whole = linear()
    interrupted(monkeypatch, 1, tmp_path)
    left = whole.scores.size - len(jax.devices())
    added = []
    add = saved.Saved.add
    monkeypatch.setattr(
        saved.Saved, "add", lambda self, runs, *rest: (added.extend(runs), add(self, runs, *rest))
    )
    resumed = linear(resume_dir=tmp_path)
    assert len(added) == len(set(added)) == left
    for field in ("scores", "failed", "clip_rates", "norms"):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))
    linear(resume_dir=tmp_path)
    assert len(added) == left
    assert not list(tmp_path.glob("*.tmp"))


def test_the_directory_decides_how_many_run_side_by_side(monkeypatch, tmp_path):
    interrupted(monkeypatch, 1, tmp_path, runs_at_once=2)
    np.testing.assert_array_equal(linear(resume_dir=tmp_path).scores, linear(runs_at_once=2).scores)
    with pytest.raises(ValueError, match=r"another experiment.*with other runs_at_once"):
        linear(resume_dir=tmp_path, runs_at_once=3)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from optaxclip.selection import saved
from tools.regression import linear
add = saved.Saved.add
def killing(self, runs, outcomes):
    add(self, runs, outcomes)
    os.kill(os.getpid(), signal.SIGKILL)
saved.Saved.add = killing
linear(np.geomspace(0.05, 5, 3), resume_dir=sys.argv[2])
"""


def test_killed_and_resumed_in_another_process_is_bit_identical(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "killed")]
    # Bits are those of one compiler: the other process compiles in a hurry as this one does.
    hurry = jax.config.values["jax_disable_most_optimizations"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(hurry))}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = sorted((tmp_path / "killed").glob("runs-*"))
    assert 0 < sum(len(json.loads(f.read_text())) for f in files) < 12
    before = [f.read_bytes() for f in files]
    resumed, whole = (
        linear(np.geomspace(0.05, 5, 3), resume_dir=tmp_path / name) for name in ("killed", "whole")
    )
    assert [f.read_bytes() for f in files] == before
    for field in ("scores", "failed", "clip_rates", "norms"):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))


def other_error(w, batch):
    return error(w, batch) + 1


def closing_over(constant):
    return lambda w, batch: error(w, batch) * constant


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("thresholds", {"thresholds": [0.05, 0.5, 51.0]}),
        ("folds", {"folds": 5}),
        ("seeds", {"seeds": 2}),
        ("steps", {"steps": 13}),
        ("batch_size", {"batch_size": 4}),
        ("key", {"key": 1}),
        ("data", {"data": (X, Y + 1)}),
        ("functions", {"metric_fn": other_error}),
        ("functions", {"make_optimizer": per_example_sgd, "grad": optaxclip.per_example_grad}),
    ],
)
def test_a_directory_of_another_experiment(tmp_path, monkeypatch, name, changes):
    linear(resume_dir=tmp_path)
    changes = changes | {k: jax.random.key(v) for k, v in changes.items() if k == "key"}
    monkeypatch.setattr(runs, "program", None)  # no training
    with pytest.raises(ValueError, match=f"got {tmp_path} with other .*{name}"):
        linear(resume_dir=tmp_path, **changes)


def test_constants_in_closures_are_part_of_the_experiment(tmp_path):
    table = np.arange(1.0, 100.0, dtype=np.float32)
    linear(resume_dir=tmp_path, metric_fn=closing_over(jnp.asarray(table).sum()))
    with pytest.raises(ValueError, match="with other functions"):
        linear(resume_dir=tmp_path, metric_fn=closing_over(jnp.asarray(table).sum() + 1))
    linear(resume_dir=tmp_path, metric_fn=closing_over(jnp.asarray(table).sum()))


def test_a_directory_that_cannot_be_read(tmp_path):
    linear(resume_dir=tmp_path)
    file = next(tmp_path.glob("runs-*"))
    whole = file.read_text()
    file.write_text(whole[:30])
    with pytest.raises(ValueError, match=f"cannot be read, got {file}.*Delete it"):
        linear(resume_dir=tmp_path)
    (tmp_path / "experiment.json").unlink()
    with pytest.raises(ValueError, match="runs of an unknown experiment"):
        linear(resume_dir=tmp_path)


def never(*_):
    raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"thresholds": []}, ValueError, "thresholds must be a list of numbers, got \\[\\]"),
        ({"thresholds": 1.0}, ValueError, "thresholds must be a list of numbers"),
        ({"thresholds": [0.0, 1.0]}, ValueError, "thresholds must be > 0, got 0.0"),
        ({"thresholds": [np.nan]}, ValueError, "thresholds must be > 0, got nan"),
        ({"thresholds": [2.0, 1.0]}, ValueError, "must increase.*got 2.0 before 1.0"),
        ({"thresholds": [1.0, 1.0 + 1e-9]}, ValueError, "must increase, in float32"),
        ({"folds": 24}, ValueError, "at most the number of examples, got 24 for 23"),
        ({"folds": 1}, ValueError, "folds must be >= 2, got 1"),
        ({"folds": 1.5}, ValueError, "must lie between 0 and 1, got 1.5"),
        ({"folds": 0.01}, ValueError, "got 0.01 of 23, which holds out 0"),
        ({"folds": "five"}, TypeError, "must be .train, validation. pairs, got 'f'"),
        ({"folds": None}, TypeError, "folds must be a number, a share or"),
        ({"folds": iter([])}, TypeError, r"a share or .* Wrap a generator in list\(\)"),
        ({"data": (X[:1], Y[:1])}, ValueError, "data must have at least two rows, got 1 at 0"),
        ({"data": X[0, 0]}, ValueError, "one row per example, got .* at the root"),
        ({"folds": []}, ValueError, "folds must not be empty"),
        ({"folds": [([0, 1], [1, 2])]}, ValueError, "both train and validate, got 1 that do, 1"),
        ({"folds": [([0], [23])]}, ValueError, "from 0 to 22, got array.*for validation at fold 0"),
        ({"folds": [([], [2])]}, ValueError, "for train at fold 0"),
        ({"data": (X, Y[1:])}, ValueError, "as many rows in every array, got 23 at 0 and 22 at 1"),
        ({"data": (X, 3.0)}, ValueError, "one row per example, got 3.0 at 1. Convert lists"),
        ({"data": ()}, ValueError, "data must hold arrays"),
        ({"batch_size": 18}, ValueError, "smallest training set, got 18 for 17"),
        ({"steps": 0}, ValueError, "steps must be >= 1"),
        ({"seeds": 1.5}, TypeError, "seeds must be a whole number"),
        ({"runs_at_once": 0}, ValueError, "runs_at_once must be >= 1"),
        ({"key": 0}, TypeError, "key must be a JAX key, got 0"),
        ({"mode": "best"}, ValueError, "unknown mode, got 'best'"),
        ({"metric_fn": lambda w, batch: batch[1]}, ValueError, r"one number, got shape \(5,\)"),
        ({"loss_fn": lambda w, batch: w}, TypeError, "scalar-output"),
        ({"make_optimizer": lambda c: clipped_sgd(float(c))}, TypeError, "accept a traced"),
        (
            {"make_optimizer": lambda c: clipped_sgd(c if c > 1 else 1.0)},
            TypeError,
            "without float",
        ),
        ({"make_optimizer": lambda c: clipped_sgd(np.asarray(c))}, TypeError, "accept a traced"),
    ],
)
def test_errors_come_before_any_training(monkeypatch, changes, kind, message):
    monkeypatch.setattr("optaxclip.selection.search.program", never)
    with pytest.raises(kind, match=message):
        linear(**changes)


def test_a_diverged_run_fails_and_is_not_chosen(tmp_path):
    """Unclipped gradient descent on a quartic from far out overflows; its accuracy would not."""
    found = cross_validate(
        lambda c: optax.chain(optaxclip.clip_by_global_norm(c), optax.sgd(0.5)),
        [1e-3, 0.1, np.inf],
        init_fn=lambda key: jnp.full(2, 10.0),
        loss_fn=lambda w, batch: jnp.sum(w**4) + 0 * batch.sum(),
        metric_fn=lambda w, batch: jnp.where(jnp.isnan(w[0]), 0.5, jnp.exp(-jnp.sum(w**2))),
        data=jnp.zeros(6),
        folds=3,
        steps=300,
        batch_size=2,
        key=jax.random.key(0),
        progress=False,
    )
    assert found.failures.tolist() == [0, 0, 3]
    assert found.scores[2].tolist() == [[-np.inf]] * 3
    assert found.mean[2] == -np.inf
    assert found.best == found.one_standard_error == pytest.approx(0.1)
    assert not np.isnan(found.mean).any()
    assert not np.isnan(found.standard_error).any()
    assert "3" in str(found).splitlines()[3].split()
    found.to_csv(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["failed"] for row in rows] == ["0"] * 6 + ["1"] * 3
    assert [row["score"] for row in rows[6:]] == [""] * 3
    assert float(rows[3]["score"]) == found.scores[1, 0, 0]
    assert float(rows[3]["threshold"]) == found.thresholds[1]


def validation(scores, failed, mode="max"):
    worst = -np.inf if mode == "max" else np.inf
    scores = np.where(failed, worst, scores)
    nothing = np.full(scores.shape, np.nan)
    return optaxclip.selection.CrossValidation(
        np.arange(1.0, len(scores) + 1), scores, failed, nothing, nothing, mode
    )


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(["max", "min"]),
    st.integers(0, 2**32 - 1),
)
def test_what_follows_from_the_scores(thresholds, folds, seeds, share, mode, seed):
    rng = np.random.default_rng(seed)
    shape = (thresholds, folds, seeds)
    scores, failed = rng.standard_normal(shape), rng.random(shape) < share
    found = validation(scores, failed, mode)
    means, errors = [], []
    for rows, bad in zip(scores, failed, strict=True):
        units = [r[~b].mean() for r, b in zip(rows, bad, strict=True) if not b.all()]
        if folds == 1:
            units = rows[0][~bad[0]]
        means.append(np.mean(units) if len(units) else {"max": -np.inf, "min": np.inf}[mode])
        errors.append(np.std(units, ddof=1) / len(units) ** 0.5 if len(units) > 1 else np.inf)
    np.testing.assert_allclose(found.mean, means)
    np.testing.assert_allclose(found.standard_error, errors, atol=1e-12)
    if failed.all():
        with pytest.raises(ValueError, match="every run failed"):
            _ = found.best
        return
    loss = np.array(means) * (1 if mode == "min" else -1)
    fewest = [i for i in range(thresholds) if failed[i].sum() == failed.sum(axis=(1, 2)).min()]
    best = min(fewest, key=lambda i: loss[i])
    assert found.best == best + 1
    error = errors[best] if np.isfinite(errors[best]) else 0
    assert found.one_standard_error == 1 + next(i for i in fewest if loss[i] <= loss[best] + error)
    assert f"best {found.best:g}" in str(found)


def test_an_optimizer_without_a_clipper_of_this_library():
    found = linear(
        make_optimizer=lambda c: optax.chain(optax.clip_by_global_norm(c), optax.sgd(0.2))
    )
    np.testing.assert_allclose(found.scores, linear().scores, rtol=1e-5)
    assert np.isnan(found.clip_rate).all()
    assert str(found).splitlines()[1].split()[-2:] == ["-", "-"]


def test_loss_gets_a_new_key_every_step():
    def noise(w, batch, key):
        return w * jax.random.uniform(key) + 0 * batch.sum()

    found = cross_validate(
        lambda c: optax.chain(optaxclip.clip_by_value(c), optax.sgd(1.0)),
        [1.0],
        init_fn=lambda key: jnp.zeros(()),
        loss_fn=noise,
        metric_fn=lambda w, batch: -w,
        data=jnp.zeros(10),
        folds=0.2,
        seeds=5,
        steps=400,
        batch_size=2,
        key=jax.random.key(0),
        pass_key=True,
        progress=False,
    )
    sums = found.scores.ravel()
    assert len(set(sums)) == 5
    # A sum of 400 uniform numbers: mean 200, standard deviation 5.8.
    assert np.all(np.abs(sums - 200) < 35)


@dataclasses.dataclass
class Scaled:
    """A callable without a hash."""

    scale: float

    def __call__(self, w, batch):
        return self.scale * error(w, batch)


def test_functions_need_no_hash():
    np.testing.assert_allclose(linear(metric_fn=Scaled(2.0)).mean, 2 * linear().mean, rtol=1e-6)


def test_keys_of_the_old_kind_will_do():
    np.testing.assert_array_equal(linear(key=jax.random.PRNGKey(0)).scores, linear().scores)


def test_progress_is_a_line_on_stderr_or_silent(capsys, tmp_path):
    linear(progress=True, resume_dir=tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "12 of 12 runs" in printed.err
    linear(progress=True, resume_dir=tmp_path)
    assert capsys.readouterr().err == "12 of 12 runs are there\n"
    linear()
    assert capsys.readouterr() == ("", "")


def test_plot_shows_every_threshold(tmp_path):
    failed = np.zeros((3, 4, 1), bool)
    failed[2, 0] = True
    rng = np.random.default_rng(0)
    found = optaxclip.selection.CrossValidation(
        np.array([0.1, 1.0, np.inf]),
        np.where(failed, -np.inf, rng.random((3, 4, 1))),
        failed,
        rng.random((3, 4, 1)),
        rng.random((3, 4, 1)),
    )
    figure = found.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    top, below = figure.axes
    assert below.lines[0].get_ydata().tolist() == (100 * found.clip_rate).tolist()
    assert {text.get_text() for text in top.texts} == {"1 failed"}


def test_plot_names_the_extra_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'optaxclip\[plot\]'"):
        validation(np.ones((1, 1, 1)), np.zeros((1, 1, 1), bool)).plot()


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50), st.sampled_from([0.0, 0.07, 0.5, 0.9])
)
def test_suggested_bound_clips_at_most_the_target(norms, rate):
    bound = suggest_threshold(np.array(norms), target_clip_rate=rate)
    assert bound in norms
    assert np.mean(np.array(norms) > bound) <= rate + 1e-12
    smaller = [n for n in norms if n < bound]
    if smaller:
        assert np.mean(np.array(norms) > max(smaller)) > rate


def test_suggested_bound_is_a_quantile():
    norms = np.random.default_rng(0).permutation(np.arange(1.0, 101.0)).reshape(4, 25)
    assert suggest_threshold(norms) == 95
    assert suggest_threshold(norms, target_clip_rate=0.07) == 93


def test_suggestion_says_what_it_leaves_out():
    with pytest.warns(UserWarning, match="2 of 5 norms are not finite"):
        assert suggest_threshold([1.0, np.nan, 3.0, np.inf, 2.0], target_clip_rate=0.0) == 3.0


@pytest.mark.parametrize(
    ("norms", "rate", "message"),
    [
        ([], 0.1, "norms must hold a finite number, got 0 without one"),
        ([np.nan], 0.1, "got 1 without one"),
        ([-1.0, 1.0], 0.1, "norms must be >= 0, got -1.0"),
        ([0.0, 0.0, 1.0], 0.5, "the bound would be 0, got 67% of norms"),
        ([1.0], 1.0, r"target_clip_rate must be in \[0, 1\), got 1.0"),
        ([1.0], -0.1, "target_clip_rate must be in"),
    ],
)
def test_suggestion_is_checked(norms, rate, message):
    with pytest.raises(ValueError, match=message):
        suggest_threshold(norms, target_clip_rate=rate)


def mlp_init(key):
    first, second = jax.random.split(key)
    return jax.random.normal(first, (64, 32)) / 6, jax.random.normal(second, (32, 10)) / 4


def mlp_logits(params, x):
    return jax.nn.relu(x @ params[0]) @ params[1]


def mlp_loss(params, batch):
    logits = mlp_logits(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def mlp_accuracy(params, batch):
    return jnp.mean(mlp_logits(params, batch[0]).argmax(axis=-1) == batch[1])


@pytest.mark.slow
def test_the_choice_on_digits_is_as_good_as_the_best_on_a_held_out_set():
    """16 thresholds on 5 folds, five times: within a standard error of a share of 540."""
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target
    search = functools.partial(
        cross_validate,
        lambda c: optax.chain(optaxclip.clip_by_global_norm(c), optax.sgd(0.3)),
        np.geomspace(0.01, 10, 16),
        init_fn=mlp_init,
        loss_fn=mlp_loss,
        metric_fn=mlp_accuracy,
        steps=200,
        batch_size=64,
        progress=False,
    )
    for repeat in range(5):
        order = np.random.default_rng(repeat).permutation(len(x))
        held, rest = order[:540], order[540:]
        found = search(data=(x[rest], y[rest]), folds=5, key=jax.random.key(repeat))
        test = search(data=(x, y), folds=[(rest, held)], seeds=2, key=jax.random.key(9 + repeat))
        best = test.mean.max()
        for choice in (found.best, found.one_standard_error):
            got = test.mean[found.thresholds == choice][0]
            assert got >= best - np.sqrt(best * (1 - best) / 540)
        assert test.mean.min() < 0.6  # the strictest costs
