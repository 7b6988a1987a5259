"""The page of compilers' figures, from rows as their processes print them."""

import pytest
from tools.hlo import bounds, report

WORK = {"cycles": 100, "bytes": 1000, "kernels": 10, "copies": 0}
ROW = {**WORK, "most": WORK, "conditionals": 0, "sorts": 0, "loops": 0, "temporary": 0}
ROW |= {"loops_of_unknown_trips": 0, "seconds": 1.0, "collectives": {}, "collective_bytes": 0}
ROW |= {"rare_collectives": {}}
PLACES = {"tree": {"tree": "25x1024"}, "mesh": {"mesh": "4x4", "layout": "jit"}}


def rows(kind="v5e", place="tree", **ours):
    where = {"kind": kind, **PLACES[place]}
    names = ("adam", "optax clip_by_global_norm", "optaxclip global")
    found = [where | {"name": name} | ROW for name in names]
    return [*found[:2], found[2] | ours]


def titles(found):
    """Each bound with what does not keep it."""
    return bounds(found).split("\n* ")


@pytest.mark.parametrize(
    ("kind", "place", "ours", "missed"),
    [
        ("v5e", "tree", {"cycles": 105}, None),
        ("v5e", "tree", {"cycles": 106}, "cycles on a TPU"),
        ("h100", "tree", {"bytes": 1060}, "bytes on the H100"),
        ("h100", "tree", {"kernels": 14}, "kernels on the H100"),
        ("v5e", "tree", {"sorts": 1}, "no conditional and no sort"),
        ("v5e", "tree", {"seconds": 1.6}, "compiling"),
        ("v5e", "mesh", {"collectives": {"all-reduce": 1}}, None),
        ("v5e", "mesh", {"collectives": {"all-reduce": 2}}, "on a mesh"),
        ("v5e", "mesh", {"collectives": {"all-gather": 1}}, "on a mesh"),
        ("v5e", "mesh", {"rare_collectives": {"all-reduce": 1}}, "on a mesh"),
    ],
)
def test_what_is_beyond_a_bound_is_named(kind, place, ours, missed):
    found = rows(kind, place, **ours)
    said = [text for text in titles(found) if "not by global" in text]
    assert [missed in text for text in said] == ([True] if missed else [])
    assert ("| **" in report({}, found)) == (missed is not None)


@pytest.mark.parametrize("place", PLACES)
def test_what_did_not_compile_is_shown_and_nothing_else_is_lost(place):
    found = rows(place=place)
    found[2] = {k: found[2][k] for k in ("kind", "name", *PLACES[place])} | {"error": "Full: HBM"}
    assert "Full: HBM" in report({}, found)
    missed = next(text for text in titles(found) if "every program compiles" in text)
    assert "kept in 0 of 1" in missed
    assert "not by global" in missed
