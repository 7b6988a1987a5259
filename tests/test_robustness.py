"""Sensitivity and accuracy under changed inputs, against what is known of linear models."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tools.exploring import examples

from optaxclip import adversarial_accuracy, input_sensitivity
from optaxclip.robustness import noise_accuracy

INF = float("inf")


def linear(w, x):
    return x.reshape(len(x), -1) @ w["kernel"].T + w["bias"]


def random_linear(seed, classes=5, features=12):
    rng = np.random.default_rng(seed)
    # Some are nearly of rank one, some nearly orthogonal: the power iteration has it easy or not.
    kernel = rng.standard_normal((classes, features)) * np.exp(rng.normal(0, 1, (classes, 1)))
    w = {"kernel": kernel.astype(np.float32), "bias": rng.standard_normal(classes, np.float32)}
    return w, rng.standard_normal((7, features), np.float32), rng.integers(0, classes, 7)


# --- sensitivity ---


@given(st.integers(0, 10_000), st.floats(0.01, 10.0), st.sampled_from([2, INF]))
@examples(30)
def test_largest_is_the_lipschitz_constant_of_a_linear_map(seed, radius, norm):
    w, x, _ = random_linear(seed)
    found = input_sensitivity(
        linear, w, x, radius=radius, norm=norm, samples=6, key=jax.random.key(0)
    )
    kernel = np.float64(w["kernel"])
    constant = np.linalg.norm(kernel, 2) if norm == 2 else np.abs(kernel).sum(axis=1).max()
    np.testing.assert_allclose(found.largest, constant, rtol=0.01)
    np.testing.assert_allclose(found.by_example, constant, rtol=0.01)
    assert 0 < found.mean <= constant * (1 + 1e-4)


@pytest.mark.parametrize("norm", [2, INF])
@pytest.mark.parametrize(("x", "radius", "output"), [
    ("bfloat16", "float32", "bfloat16"), ("float64", "float64", "float32"),
    ("float32", "float64", "float64"),
])  # fmt: skip
def test_dtypes_that_promote(x, radius, output, norm):
    """The answer has the dtype of the outputs, or float32."""
    with jax.enable_x64(True):
        found = input_sensitivity(
            lambda w, x: (x @ w.astype(x.dtype)).astype(output), np.diag([3.0, 1.0]),
            np.zeros((1, 2), jnp.dtype(x)), radius=np.asarray(0.5, radius), norm=norm,
            samples=2, steps=20, key=jax.random.key(0),
        )  # fmt: skip
        np.testing.assert_allclose(found.largest, 3.0, rtol=0.02)
        wide = "float64" if output == "float64" else "float32"
        assert {field.dtype.name for field in found} == {wide}


def test_mean_is_over_random_directions():
    """Uniform on the circle, E|cos| = 2 / pi; among the corners of the cube, by enumeration."""
    w = {"kernel": np.array([[3.0, 4.0]], np.float32), "bias": np.zeros(1, np.float32)}
    arguments = {"radius": 0.5, "samples": 3000, "key": jax.random.key(0), "steps": 1}
    found = input_sensitivity(linear, w, np.zeros((5, 2), np.float32), norm=2, **arguments)
    assert found.mean == pytest.approx(5 * 2 / np.pi, rel=0.02)
    w["kernel"] = np.array([[1.0, 2.0, 4.0]], np.float32)
    corners = [abs(np.dot(w["kernel"][0], s)) for s in itertools.product([-1, 1], repeat=3)]
    found = input_sensitivity(linear, w, np.zeros((5, 3), np.float32), norm=INF, **arguments)
    assert found.mean == pytest.approx(np.mean(corners), rel=0.02)


def test_a_steep_spot_is_found_by_the_ascent():
    """A step of tanh at a distance: its secant is steepest for a certain direction and length."""
    fun = lambda w, x: jnp.tanh(10 * (x @ w - 1))[:, None]
    w, x = np.eye(20, dtype=np.float32)[3], np.zeros((2, 20), np.float32)
    found = input_sensitivity(fun, w, x, radius=1.2, norm=2, samples=4, key=jax.random.key(0))
    steepest = (np.tanh(2) + np.tanh(10)) / 1.2
    np.testing.assert_allclose(found.by_example, steepest, rtol=1e-3)
    assert found.mean < steepest / 2


def test_images_bf16_outputs_and_batches_give_the_same():
    w, x, _ = random_linear(1)
    images = x.reshape(7, 2, 2, 3)
    arguments = {"radius": 0.1, "norm": INF, "samples": 6, "key": jax.random.key(0), "steps": 2}
    whole = input_sensitivity(linear, w, images, **arguments)
    parts = input_sensitivity(linear, w, images, batch_size=3, **arguments)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    half = lambda w, x: linear(w, x).astype(jnp.bfloat16)
    found = jax.eval_shape(lambda x: input_sensitivity(half, w, x, **arguments), images)
    assert {x.dtype for x in found} == {jnp.dtype("float32")}


def test_flat_and_broken_functions():
    x = np.ones((3, 4), np.float32)
    arguments = {"radius": 0.1, "norm": 2, "samples": 2, "key": jax.random.key(0), "steps": 2}
    dead = input_sensitivity(lambda w, x: jax.nn.relu(w * x), -1.0, x, **arguments)
    assert (dead.largest, dead.mean) == (0, 0)
    large = np.ones((3, 4000), np.float32)  # XLA's maximum on CPU loses NaN in large arrays
    for norm in (2, INF):
        arguments["norm"] = norm
        nan = input_sensitivity(lambda w, x: jnp.sqrt(w * x), -1.0, large, **arguments)
        assert np.isnan(nan.largest)
        assert np.isnan(nan.mean)


# --- accuracy under attack ---


def margins(w, x, y):
    """How far each example is from each other class, and the slopes: [B, K] and [B, K, D]."""
    slopes = np.float64(w["kernel"])[y][:, None] - np.float64(w["kernel"])
    return np.einsum("bkd,bd->bk", slopes, x) + w["bias"][y][:, None] - w["bias"], slopes


@pytest.mark.parametrize("norm", [2, INF])
def test_two_classes_of_a_linear_model_have_a_known_accuracy(norm):
    w, _, _ = random_linear(2, classes=2)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 12), np.float32), rng.integers(0, 2, 300)
    margin, slopes = margins(w, x, y)
    dual = np.linalg.norm(slopes, axis=2) if norm == 2 else np.abs(slopes).sum(axis=2)
    distance = np.where(dual > 0, margin / np.where(dual > 0, dual, 1), np.inf).min(axis=1)
    for radius in (0.0, 0.1, 0.5):
        expected = np.mean(distance > radius)
        for method in ("fgsm", "pgd"):
            found = adversarial_accuracy(
                linear, w, x, y, radius=radius, norm=norm, method=method, steps=5
            )
            assert found == pytest.approx(expected, abs=1 / 300)  # one may lie on the boundary
    assert 0 < expected < np.mean(distance > 0) - 0.1


@jax.jit
def network(w, x):
    hidden = jax.nn.relu(x @ w["inner"])
    return jax.nn.relu(hidden @ w["middle"]) @ w["outer"]


@given(st.integers(0, 10_000), st.floats(0.0, 2.0), st.sampled_from([2, INF]))
@examples(30)
def test_pgd_never_reports_more_than_fgsm_and_restarts_never_more_than_one(seed, radius, norm):
    rng = np.random.default_rng(seed)
    shapes = {"inner": (6, 8), "middle": (8, 8), "outer": (8, 3)}
    w = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    x = rng.uniform(-1, 1, (20, 6)).astype(np.float32)
    answers = np.argmax(network(w, x), axis=1)
    y = np.where(rng.random(20) < 0.7, answers, rng.integers(0, 3, 20))
    attack = {"radius": radius, "norm": norm, "steps": 3, "clip_to": (-1, 1)}
    clean = np.mean(answers == y)
    fgsm = adversarial_accuracy(network, w, x, y, method="fgsm", **attack)
    pgd = adversarial_accuracy(network, w, x, y, **attack)
    again = adversarial_accuracy(network, w, x, y, restarts=3, key=jax.random.key(0), **attack)
    assert again <= pgd <= fgsm <= clean + 1e-6


@pytest.mark.parametrize("norm", [2, INF])
def test_every_point_lies_in_the_ball_and_within_the_bounds(norm):
    """The function itself checks: whoever leaves them is answered wrongly."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (40, 2, 5)).astype(np.float32)
    low, high, radius = np.zeros(5), np.linspace(0.9, 1.0, 5), 0.2
    x = np.clip(x, low, high).astype(np.float32)

    def watched(w, z):
        change = (z - w["x"]).reshape(len(z), -1)
        length = jnp.abs(change).max(axis=1) if norm == INF else jnp.sqrt((change**2).sum(axis=1))
        ok = (length <= radius * (1 + 1e-5)) & jnp.all((z >= 0) & (z <= high + 1e-6), axis=(1, 2))
        score = jnp.where(ok, 100 + z.sum(axis=(1, 2)), -1e6)
        return jnp.stack([score, 0 * score], axis=1)

    found = adversarial_accuracy(
        watched, {"x": x}, x, np.zeros(40, int), radius=radius, norm=norm, steps=4, restarts=3,
        key=jax.random.key(0), clip_to=(low, high),
    )  # fmt: skip
    assert found == 1.0


def test_a_model_that_is_sure_is_attacked_all_the_same():
    """Cross-entropy's gradient is exactly 0 in float32 here."""
    fun = lambda w, x: jnp.stack([w * x, -w * x], axis=1)
    x, y = np.full(4, 0.5, np.float32), np.zeros(4, int)
    loss = lambda x: -jax.nn.log_softmax(fun(1e4, x))[:, 0].sum()
    assert not np.any(jax.jit(jax.grad(loss))(x))
    found = [
        float(adversarial_accuracy(fun, 1e4, x, y, radius=r, norm=INF, method="fgsm"))
        for r in (0.4, 0.6)
    ]
    assert found == [1.0, 0.0]


def test_a_flat_start_is_left_by_a_restart():
    fun = lambda w, x: jnp.stack([jnp.ones(len(x)), 9 * jax.nn.relu(w * x - 0.2)], 1)
    x, y = np.zeros(16, np.float32), np.zeros(16, int)
    attack = {"radius": 1.0, "norm": INF, "steps": 3}
    assert adversarial_accuracy(fun, 1.0, x, y, **attack) == 1.0
    found = adversarial_accuracy(fun, 1.0, x, y, restarts=6, key=jax.random.key(0), **attack)
    assert found < 0.3
    parts = adversarial_accuracy(
        fun, 1.0, x, y, restarts=6, key=jax.random.key(0), batch_size=5, **attack
    )
    assert parts == found


def test_answers_that_are_not_finite_are_wrong():
    fun = lambda w, x: jnp.stack([w / x, 0 * x], axis=1)
    x, y = np.float32([0, 1]), np.zeros(2, int)
    assert adversarial_accuracy(fun, 1.0, x, y, radius=0.0, norm=2) == 0.5
    found = noise_accuracy(fun, 1.0, x, y, sigmas=[0.0], samples=1, key=jax.random.key(0))
    assert found == 0.5


def test_vmap_over_radii_and_models_and_an_nnx_model():
    graph, shapes = nnx.split(nnx.eval_shape(lambda: nnx.Linear(12, 5, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    fun = lambda params, x: nnx.merge(graph, params)(x)
    _, x, y = random_linear(3)
    radii = np.float32([0, 0.3, 3])
    attack = lambda p, r: adversarial_accuracy(fun, p, x, y, radius=r, norm=2, steps=2)
    two = jax.tree.map(lambda p: np.stack([p, 2 * p]), params)
    over = jax.jit(jax.vmap(jax.vmap(attack, (None, 0)), (0, None)))(two, radii)
    assert over.shape == (2, 3)
    for got, radius in zip(over[0], radii, strict=True):
        assert got == pytest.approx(float(attack(params, radius)), abs=1e-6)


# --- noise ---


def test_noise_accuracy_of_a_linear_model():
    """Two classes: the normal distribution function of margin / (sigma |slope|)."""
    w, _, _ = random_linear(4, classes=2)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 12), np.float32), rng.integers(0, 2, 50)
    margin, slopes = (np.take_along_axis(a, 1 - y.reshape(-1, *[1] * (a.ndim - 1)), axis=1)[:, 0]
                      for a in margins(w, x, y))  # fmt: skip
    sigmas = [0.0, 0.3, 1.0]
    found = noise_accuracy(linear, w, x, y, sigmas=sigmas, samples=400, key=jax.random.key(0))
    assert found[0] == pytest.approx(np.mean(margin > 0))
    for got, sigma in zip(found[1:], sigmas[1:], strict=True):
        z = margin / (sigma * np.linalg.norm(slopes, axis=1))
        expected = np.mean([0.5 * (1 + math.erf(v / 2**0.5)) for v in z])
        assert got == pytest.approx(expected, abs=0.01)
    parts = noise_accuracy(
        linear, w, x, y, sigmas=sigmas, samples=400, key=jax.random.key(0), batch_size=20
    )
    np.testing.assert_allclose(parts, found, atol=1e-3)


def test_noise_stays_within_the_bounds():
    fun = lambda w, x: jnp.stack([1 - x, x - w], axis=1)
    x, y = np.full(5, 0.2, np.float32), np.zeros(5, int)
    arguments = {"sigmas": [100.0], "samples": 50, "key": jax.random.key(0)}
    assert noise_accuracy(fun, 0.5, x, y, clip_to=(0.0, 0.7), **arguments) == 1.0
    assert noise_accuracy(fun, 0.5, x, y, **arguments) < 0.7


# --- arguments ---

X, Y, W = np.ones((3, 12), np.float32), np.zeros(3, int), random_linear(0)[0]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"radius": 0}, ValueError, "radius must be finite and > 0, got 0"),
        ({"radius": -1.0}, ValueError, "radius must be finite and > 0, got -1.0"),
        ({"radius": float("nan")}, ValueError, "radius must be finite and > 0, got nan"),
        ({"radius": np.array(INF)}, ValueError, "radius must be finite and > 0, got inf"),
        ({"radius": np.ones(2)}, ValueError, r"radius must be a scalar, got shape \(2,\)"),
        ({"radius": "0.1"}, TypeError, "radius must be a number or a scalar array, got '0.1'"),
        ({"norm": 1}, ValueError, "norm must be 2 or inf, got 1"),
        ({"norm": "l2"}, ValueError, "norm must be 2 or inf, got 'l2'"),
        ({"samples": 0}, ValueError, "samples must be >= 1, got 0"),
        ({"samples": 2.5}, TypeError, "samples must be a whole number, got 2.5"),
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"x": np.ones((3, 12), np.int32)}, TypeError, "x must be floating point, got dtype int32"),
        ({"x": np.ones((0, 12))}, ValueError, r"got shape \(0, 12\)"),
        ({"x": np.float32(1)}, ValueError, r"x must be \[B, ...\] with B >= 1, got shape \(\)"),
        ({"fun": lambda w, x: w["bias"]}, ValueError, r"got float32 \(5,\) for \(3, 12\)"),
        ({"fun": lambda w, x: (x, x)}, ValueError, "fun must return one array"),
    ],
)
def test_arguments_of_input_sensitivity_are_checked(changed, error, message):
    good = {
        "fun": linear,
        "params": W,
        "x": X,
        "radius": 0.1,
        "norm": 2,
        "samples": 1,
        "key": jax.random.key(0),
    }
    with pytest.raises(error, match=message):
        input_sensitivity(**good | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"radius": -0.1}, ValueError, "radius must be finite and >= 0, got -0.1"),
        ({"norm": 3}, ValueError, "norm must be 2 or inf, got 3"),
        ({"method": "cw"}, ValueError, 'method must be "fgsm" or "pgd", got \'cw\''),
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"restarts": 0}, ValueError, "restarts must be >= 1, got 0"),
        ({"restarts": 2}, ValueError, "restarts need a key, got restarts=2"),
        ({"step_size": -1.0}, ValueError, "step_size must be finite and >= 0, got -1.0"),
        ({"y": np.zeros(4, int)}, ValueError, r"got shapes \(4,\) and \(3, 12\)"),
        ({"y": np.zeros(3, np.float32)}, TypeError, "y must be integers, got dtype float32"),
        ({"y": np.array([0, 5, 1])}, ValueError, r"labels must lie in \[0, 5\), got 0 to 5"),
        ({"y": np.array([0, -1, 1])}, ValueError, r"labels must lie in \[0, 5\), got -1 to 1"),
        ({"fun": lambda w, x: x[:, :1]}, ValueError, r"K >= 2, got shape \(3, 1\)"),
        ({"clip_to": (0.0, 0.5)}, ValueError, "x must lie within clip_to, got values from 1.0"),
        ({"clip_to": 1.0}, ValueError, r"clip_to must be \(lowest, highest\), got 1.0"),
        ({"clip_to": (0.0, np.ones(3))}, ValueError, r"one example, got shape \(3,\)"),
        ({"clip_to": (0.0, np.ones((3, 12)))}, ValueError, r"one example, got shape \(3, 12\)"),
    ],
)
def test_arguments_of_adversarial_accuracy_are_checked(changed, error, message):
    good = {"fun": linear, "params": W, "x": X, "y": Y, "radius": 0.1, "norm": 2}
    with pytest.raises(error, match=message):
        adversarial_accuracy(**good | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sigmas": [-0.1]}, ValueError, r"sigmas must be finite and >= 0, got \[-0.1\]"),
        ({"sigmas": [np.inf]}, ValueError, r"sigmas must be finite and >= 0, got \[inf\]"),
        ({"sigmas": 0.1}, ValueError, r"sigmas must be \[S\], got shape \(\)"),
        ({"sigmas": []}, ValueError, r"sigmas must be \[S\], got shape \(0,\)"),
        ({"samples": 0}, ValueError, "samples must be >= 1, got 0"),
        ({"y": np.zeros(4, int)}, ValueError, r"got shapes \(4,\) and \(3, 12\)"),
    ],
)
def test_arguments_of_noise_accuracy_are_checked(changed, error, message):
    good = {
        "fun": linear,
        "params": W,
        "x": X,
        "y": Y,
        "sigmas": [0.1],
        "samples": 1,
        "key": jax.random.key(0),
    }
    with pytest.raises(error, match=message):
        noise_accuracy(**good | changed)
