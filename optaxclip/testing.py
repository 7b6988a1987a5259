"""How a clipper behaves over time: streams of norms to drive it with, and what to expect of it.

`check_clipper(tx)` holds a clipper whose bound follows the norms to the promises every such
clipper of this library keeps; `behaviour(tx)` only measures. `check_per_example(loss, params,
batch)` holds the per-example gradients of a loss to `vmap(grad)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip.per_example.agreement import check_per_example as check_per_example

STEPS = 600
EVENT = 300
"""The step on which a spike, a shift, a ramp or a NaN happens, and the sleeping leaf wakes."""

_DIRECTION = np.array([0.6, 0.8], np.float32)
_SMALL = 0.01


def norm_streams(*, level: float = 0.1, noise: float = 0.1) -> dict[str, np.ndarray]:
    """Norms of two leaves over time, `[STEPS, 2]`: the first of `level`, the other a hundredth.

    Args:
      level: the typical norm. Small, as bounds such as `zclip`'s `max_norm` are absolute.
      noise: the standard deviation of the norm's logarithm.

    Returns:
      By name: `steady`; `spike` (20 times on step `EVENT`); `shift 1.5` and `shift 3` (for
      good); `ramp` (tenfold over 300 steps); `early spike 0` and `early spike 5` (1000 times on
      that step, 20 times on step `EVENT`); `nan`, `inf`, `early nan` (an additional step);
      `sleeping leaf` (the small leaf has zero gradient until `EVENT`); `constant` and `nearly
      constant`.

    Example:
      >>> from optaxclip.testing import EVENT, norm_streams
      >>> streams = norm_streams(level=1.0, noise=0.0)
      >>> print(streams["spike"][EVENT - 1 : EVENT + 2, 0])
      [ 1. 20.  1.]
    """
    rng = np.random.default_rng(0)
    steady = level * np.exp(noise * rng.standard_normal(STEPS))
    step = np.arange(STEPS)

    def changed(*factors: tuple[int, float]) -> np.ndarray:
        norms = steady.copy()
        for at, factor in factors:
            norms[at] *= factor
        return norms

    def inserted(at: int, value: float) -> np.ndarray:
        return np.insert(steady, at, value)[:STEPS]

    streams = {
        "steady": steady,
        "spike": changed((EVENT, 20)),
        "shift 1.5": np.where(step >= EVENT, 1.5, 1.0) * steady,
        "shift 3": np.where(step >= EVENT, 3.0, 1.0) * steady,
        "ramp": 10.0 ** np.clip((step - EVENT) / (STEPS - EVENT), 0, 1) * steady,
        "early spike 0": changed((0, 1000), (EVENT, 20)),
        "early spike 5": changed((5, 1000), (EVENT, 20)),
        "nan": inserted(EVENT, np.nan),
        "inf": inserted(EVENT, np.inf),
        "early nan": inserted(3, np.nan),
        "sleeping leaf": steady,
        "constant": np.full(STEPS, level),
        "nearly constant": level * (1 + 1e-6 * rng.standard_normal(STEPS)),
    }
    both = {name: np.stack([norms, _SMALL * norms], 1) for name, norms in streams.items()}
    both["sleeping leaf"][:EVENT, 1] = 0
    return both


def multipliers(
    tx: optax.GradientTransformation, norms: np.ndarray, *, level: float = 0.1
) -> np.ndarray:
    """What the clipper multiplies the gradient by, leaf by leaf and step by step.

    Args:
      tx: the clipper.
      norms: of two leaves, `[..., steps, 2]`, as in `norm_streams`.
      level: the parameters have 120 times this norm, for clippers that look at them.

    Returns:
      An array like `norms`: norm after / norm before; NaN where the gradient was zero or NaN.

    Example:
      >>> import numpy as np, optaxclip
      >>> from optaxclip.testing import multipliers
      >>> norms = np.array([[1.0, 0.1], [4.0, 0.4]])
      >>> print(multipliers(optaxclip.clip_by_leaf_norm(2.0), norms)[:, 0])
      [1.  0.5]
    """
    tx = optax.with_extra_args_support(tx)

    def tree(scales: jax.Array) -> list[jax.Array]:
        return [scales[0] * _DIRECTION, scales[1] * _DIRECTION]

    params = tree(120 * level * jnp.array([1, _SMALL], jnp.float32))

    def step(state: Any, pair: jax.Array) -> tuple[Any, jax.Array]:
        updates, state = tx.update(tree(pair), state, params)
        return state, jnp.stack([jnp.dot(u, _DIRECTION) for u in updates])

    @jax.jit
    @jax.vmap
    def run(stream: jax.Array) -> jax.Array:
        return jax.lax.scan(step, tx.init(params), stream)[1]

    flat = np.asarray(norms, np.float32).reshape(-1, *norms.shape[-2:])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.asarray(run(flat)) / flat).reshape(norms.shape)


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What a clipper did to the streams of `norm_streams`."""

    clip_rate: float
    """Share of steady steps that were changed, past the first 100."""
    spike: float
    """What a spike of 20 times the level passes as, in levels."""
    spike_after_early: float
    """The same, the worse of two, if another of 1000 times came in the first steps."""
    recovery_1_5: int | None
    """Steps after a lasting rise by half until the multiplier is back: its mean over the next 20 is
    at least 0.9 of that over the 100 steps before the rise. None: not in 300, or not to stay."""
    recovery_3: int | None
    """The same after a threefold rise."""
    ramp: float
    """The smallest multiplier while the level rises tenfold over 300 steps."""
    nan_immune: bool
    """Whether steps after a NaN or an infinity are as if it had not been."""
    waking_leaf: float
    """The multiplier of a leaf's first gradient after 300 steps of zeros."""
    constant: float
    """The smallest multiplier of norms that are (nearly) constant, past the first 100."""


def behaviour(tx: optax.GradientTransformation, *, level: float = 0.1) -> Behaviour:
    """Drives a clipper with every stream and measures what it does.

    Args:
      tx: the clipper, or a guard around one; not a whole optimizer.
      level: the typical norm of the streams.

    Returns:
      A `Behaviour`.

    Example:
      >>> import optaxclip
      >>> from optaxclip.testing import behaviour
      >>> found = behaviour(optaxclip.clip_by_global_norm(0.2))
      >>> print(round(found.spike, 3), found.recovery_3)
      2.0 None
    """
    streams = norm_streams(level=level)
    found = multipliers(tx, np.stack([*streams.values()]), level=level)
    return summarize(streams, dict(zip(streams, found, strict=True)), level=level)


def summarize(
    streams: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray], *, level: float
) -> Behaviour:
    """The `Behaviour` that follows from the multipliers of each stream.

    For many clippers at once; `behaviour` does all of it for one.

    Args:
      streams: by name, as `norm_streams(level=level)` gives them.
      factors: by name, what `multipliers` gives for each stream.
      level: the typical norm of the streams.

    Returns:
      A `Behaviour`.

    Example:
      >>> import numpy as np
      >>> from optaxclip.testing import norm_streams, summarize
      >>> streams = norm_streams(level=1.0)
      >>> halved = {name: np.full(norms.shape, 0.5) for name, norms in streams.items()}
      >>> print(summarize(streams, halved, level=1.0).clip_rate)
      1.0
    """
    main = {name: f[:, 0] for name, f in factors.items()}
    steady = main["steady"]

    def passes(name: str) -> float:
        return float(main[name][EVENT] * streams[name][EVENT, 0] / level)

    def recovery(name: str) -> int | None:
        goal = 0.9 * steady[EVENT - 100 : EVENT].mean()
        after = main[name][EVENT:]
        back = np.convolve(after, np.ones(20) / 20, "valid") >= goal
        return int(np.argmax(back)) if back.any() and after[-100:].mean() >= goal else None

    def same_after(name: str, at: int) -> bool:
        later, expected = factors[name][at + 1 :], factors["steady"][at:-1]
        return bool(np.allclose(later, expected, rtol=1e-5, equal_nan=False))

    return Behaviour(
        clip_rate=float(np.mean(np.abs(steady[100:] - 1) > 1e-6)),
        spike=passes("spike"),
        spike_after_early=max(passes("early spike 0"), passes("early spike 5")),
        recovery_1_5=recovery("shift 1.5"),
        recovery_3=recovery("shift 3"),
        ramp=float(np.min(main["ramp"][EVENT:])),
        nan_immune=same_after("nan", EVENT)
        and same_after("inf", EVENT)
        and same_after("early nan", 3),
        waking_leaf=float(factors["sleeping leaf"][EVENT, 1]),
        constant=float(min(main["constant"][100:].min(), main["nearly constant"][100:].min())),
    )


def check_clipper(tx: optax.GradientTransformation, *, level: float = 0.1) -> Behaviour:
    """Holds a clipper whose bound follows the norms to the promises of this library's own.

    Args:
      tx: the clipper, such as `clip_by("global", MyThreshold())`.
      level: the typical norm it is tried at.

    Returns:
      What was measured.

    Raises:
      AssertionError: naming each promise that is broken, with the figure: a lasting threefold
        rise is followed within 200 steps; a spike of 20 times the level passes as at most
        twice it, also if one of 1000 times came during the first steps; a NaN or an infinity
        changes no later step; a leaf that wakes passes, by half at least; norms that hardly
        vary pass, by half at least.

    Example:
      >>> import optaxclip
      >>> from optaxclip.testing import check_clipper
      >>> found = check_clipper(optaxclip.zclip())
      >>> print(found.recovery_3 <= 200)
      True
      >>> check_clipper(optaxclip.clip_by_global_norm(0.2))
      Traceback (most recent call last):
      ...
      AssertionError: a clipper must keep its promises: recovery_3 must be at most ...
    """
    found = behaviour(tx, level=level)
    promises = {
        "recovery_3 must be at most 200 steps": found.recovery_3 is not None
        and found.recovery_3 <= 200,
        "spike must be at most 2 levels": found.spike <= 2,
        "spike_after_early must be at most 2 levels": found.spike_after_early <= 2,
        "nan_immune must be true": found.nan_immune,
        "waking_leaf must be at least 0.5": found.waking_leaf >= 0.5,
        "constant must be at least 0.5": found.constant >= 0.5,
    }
    broken = [
        f"{promise}, got {getattr(found, promise.split()[0])}"
        for promise, kept in promises.items()
        if not kept
    ]
    if broken:
        raise AssertionError(
            f"a clipper must keep its promises: {'; '.join(broken)}. Mend its threshold; see"
            " optaxclip.testing.Behaviour for what is measured."
        )
    return found
