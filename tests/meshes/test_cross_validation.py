"""Runs of a cross-validation are spread over the devices, which changes nothing else."""

import jax
import numpy as np
import pytest
from tools.regression import linear

from optaxclip.selection import saved


class StopError(Exception):
    pass


def test_the_number_of_devices_does_not_matter(monkeypatch):
    expected = linear()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    np.testing.assert_array_equal(linear().scores, expected.scores)


def test_a_round_fills_all_devices_and_is_not_computed_again(monkeypatch, tmp_path):
    """12 runs on 8 devices: stopped after the first round, 4 are left for the second."""
    whole, add, rounds = linear(), saved.Saved.add, []

    def stopping(self, runs, outcomes):
        add(self, runs, outcomes)
        rounds.append(len(runs))
        if len(rounds) == 1:
            raise StopError

    monkeypatch.setattr(saved.Saved, "add", stopping)
    with pytest.raises(StopError):
        linear(resume_dir=tmp_path)
    resumed = linear(resume_dir=tmp_path)
    assert rounds == [8, 4]
    for field in ("scores", "failed", "clip_rates", "norms"):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))
