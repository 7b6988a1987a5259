"""Norms of whole trees where there are several devices, and leaves share no kernel."""

import jax
import pytest
from tools.compiling import QUICK
from tools.norm_cases import CASES, assert_other_leaves_do_not_count


def test_there_are_several():
    assert jax.device_count() == 8


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy(name):
    CASES[name].check(QUICK)


def test_leaves_without_floating_point_elements_do_not_count():
    assert_other_leaves_do_not_count()
