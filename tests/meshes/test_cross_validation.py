"""Runs of a cross-validation are spread over the devices, which changes nothing else."""

import jax
import numpy as np
import pytest
from tools.regression import linear

from optaxclip.selection import saved


class StopError(Exception):
    pass


def search(**changes):
    """15 runs: a round of eight, and one with room to spare."""
    return linear(folds=5, **changes)


def test_the_number_of_devices_does_not_matter(monkeypatch):
    expected = search()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    np.testing.assert_array_equal(search().scores, expected.scores)


def test_a_round_fills_all_devices_and_is_not_computed_again(monkeypatch, tmp_path):
    """Stopped after the first round, the second is left."""
    whole, add, rounds = search(), saved.Saved.add, []

    def stopping(self, runs, outcomes):
        add(self, runs, outcomes)
        rounds.append(len(runs))
        if len(rounds) == 1:
            raise StopError

    monkeypatch.setattr(saved.Saved, "add", stopping)
    with pytest.raises(StopError):
        search(resume_dir=tmp_path)
    resumed = search(resume_dir=tmp_path)
    assert rounds == [8, 7]
    for field in ("scores", "failed", "clip_rates", "norms"):
        np.testing.assert_array_equal(getattr(resumed, field), getattr(whole, field))
