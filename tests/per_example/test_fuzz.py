"""Random programs: 300 of fixed seeds, the same in every run; others under `make explore`."""

import os

import pytest
from tools.exploring import TIMES
from tools.fuzzing import disagreements
from tools.programs import program

PROGRAMS = 300
FIRST = int(os.environ.get("FUZZ_FROM", PROGRAMS)) if TIMES > 1 else 0


@pytest.mark.fuzz
@pytest.mark.parametrize("start", range(FIRST, FIRST + PROGRAMS * TIMES, 25))
def test_random_programs_agree_with_vmap_of_grad(start):
    found = {
        seed: disagreements(seed, schedules=seed % 2 == 1) for seed in range(start, start + 25)
    }
    different = {seed: (program(seed).names, what) for seed, what in found.items() if what}
    assert not different


def test_the_programs_are_of_every_kind():
    """Or the test above would pass without having tried them."""
    tried = {name for seed in range(PROGRAMS) for name in program(seed).names}
    kinds = ("[limited]", "[watched]", "reference", "guarded", "counted", "known_carry", "remat")
    assert len(tried) >= 45
    assert {*kinds} <= tried
