"""Every clipper whose bound follows the norms keeps the promises of `check_clipper`."""

import numpy as np
import optax
import pytest
from tools.clippers import ADAPTIVE

import optaxclip
from optaxclip.testing import EVENT, STEPS, behaviour, check_clipper, multipliers, norm_streams


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_adaptive_clipper(name):
    check_clipper(ADAPTIVE[name]())


@pytest.mark.parametrize(
    ("tx", "broken"),
    [
        (optaxclip.zclip(relearn_after=None), r"recovery_3 .* got None; spike_after_early"),
        (optaxclip.clip_by_global_norm(0.3, nonfinite="zero"), r"spike must be .* got (2.9|3.0)"),
        (optax.identity(), r"spike must be at most 2 levels, got 2\d"),
        (optax.scale(0.0), r"waking_leaf .*constant .*Behaviour for what is"),
    ],
    ids=["published zclip", "fixed bound", "nothing", "zeros"],
)
def test_a_broken_promise_is_named(tx, broken):
    with pytest.raises(AssertionError, match=broken):
        check_clipper(tx)


def test_what_is_measured_of_a_fixed_bound():
    found = behaviour(optaxclip.clip_by_global_norm(0.12))
    steady = norm_streams()["steady"][100:, 0]
    assert found.clip_rate == pytest.approx(np.mean(steady > 0.12), abs=0.01)
    assert found.spike == pytest.approx(1.2, rel=1e-3)
    assert (found.recovery_1_5, found.recovery_3) == (None, None)
    assert found.ramp == pytest.approx(0.12 / norm_streams()["ramp"][:, 0].max(), rel=1e-3)
    assert found.nan_immune
    assert (found.constant, found.waking_leaf) == pytest.approx((1, 1))


def test_a_clipper_that_remembers_a_nan_is_found_out():
    ema = optax.GradientTransformation(
        lambda params: np.float32(0), lambda g, s, p=None: ([x + 0 * s for x in g], s + g[0][0])
    )
    assert not behaviour(ema).nan_immune


def test_streams():
    streams = norm_streams(level=2.0, noise=0.0)
    assert {s.shape for s in streams.values()} == {(STEPS, 2)}
    assert streams["shift 3"][[EVENT - 1, EVENT, -1], 0].tolist() == [2, 6, 6]
    assert np.isnan(streams["nan"]).sum() == 2
    assert streams["sleeping leaf"][[EVENT - 1, EVENT], 1].tolist() == [0, 0.02]


def test_multipliers_need_parameters_for_agc():
    found = multipliers(optaxclip.agc(0.01), np.array([[0.1, 0.001], [0.24, 0.001]]))
    np.testing.assert_allclose(found, [[1, 1], [0.5, 1]], rtol=1e-5)
