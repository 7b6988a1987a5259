"""Norms of whole trees where there are several devices, and leaves share no kernel."""

import jax
import pytest
from tools.norm_cases import CASES_ON_A_MESH, assert_other_leaves_do_not_count
from tools.quick import QUICK


def test_there_are_several():
    assert jax.device_count() == 8


@pytest.mark.parametrize("name", CASES_ON_A_MESH)
def test_equals_numpy(name):
    CASES_ON_A_MESH[name].check(QUICK)


def test_leaves_without_floating_point_elements_do_not_count():
    assert_other_leaves_do_not_count()
