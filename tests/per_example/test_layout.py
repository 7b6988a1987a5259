import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.agreement import normal

from optaxclip.per_example.forms.layout import Layout

F64 = jnp.dtype("float64")


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(shape))] * 2)))
    roles = (tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]))
    return Layout(shape, F64, roles)


@given(layouts())
def test_to_and_from_the_parameter(layout):
    blocks = np.asarray(normal(0, 2, *layout.sizes))
    there = np.asarray(layout.to_parameter(blocks))
    assert there.shape == (2, *layout.shape)
    np.testing.assert_array_equal(layout.from_parameter(there), blocks)


@given(layouts(), st.data())
def test_transposes_and_reshapes_of_the_parameter_move_labels_only(layout, data):
    blocks = np.asarray(normal(0, *layout.sizes))
    gradient = np.asarray(layout.to_parameter(blocks))  # of transpose(x, permutation)
    permutation = tuple(data.draw(st.permutations(range(gradient.ndim))))
    expected = gradient.transpose(np.argsort(permutation))
    moved = layout.transposed(permutation, expected.shape)
    np.testing.assert_array_equal(moved.to_parameter(blocks), expected)

    size = gradient.size
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    d = data.draw(st.sampled_from(divisors))
    for shape in [(d, size // d), (size,), (1, size // d, 1, d), layout.shape]:
        moved = layout.reshaped(shape)
        np.testing.assert_array_equal(moved.to_parameter(blocks), gradient.reshape(shape))
        back = moved.reshaped(layout.shape)
        np.testing.assert_array_equal(back.to_parameter(blocks), gradient)
        np.testing.assert_array_equal(moved.from_parameter(gradient.reshape(shape)), blocks)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (2, 3, 2, 2), (6, 1, 4)])
def test_roles_survive_the_reshapes_that_keep_them_apart(shape):
    layout = Layout((6, 4), F64, ((), (0,), (1,)))
    assert layout.reshaped(shape).split is None
    assert layout.reshaped(shape).reshaped((6, 4)) == layout


def test_an_axis_with_two_roles_cannot_be_transposed():
    layout = Layout((6, 4), F64, ((), (0,), (1,))).reshaped((3, 8))
    assert layout.split == (6, 4)
    assert layout.transposed((1, 0), (8, 3)) is None


def test_an_axis_split_between_two_roles_moves_as_a_whole():
    layout = Layout((2, 6), F64, ((1,), (0,), (2,)), (2, 3, 2))
    blocks = np.asarray(normal(0, 3, 2, 2))
    moved = layout.transposed((1, 0), (6, 2))
    np.testing.assert_array_equal(moved.to_parameter(blocks), layout.to_parameter(blocks).T)
