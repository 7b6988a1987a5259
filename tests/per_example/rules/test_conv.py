import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from tools.agreement import assert_equals_oracle, normal
from tools.exploring import examples


@st.composite
def convolutions(draw):
    """Any rank, stride, padding, dilation and groups, few or many output channels."""
    rank = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 3]))
    many = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]
    return {
        "image": (draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)), *many(3, 5)),
        "kernel": (groups * draw(st.sampled_from([1, 2, 40])), *many(1, 3)),
        "groups": groups,
        "numbers": {
            "window_strides": many(1, 2),
            "padding": [(draw(st.integers(-1, 2)), 2) for _ in range(rank)],
            "lhs_dilation": many(1, 2),
            "rhs_dilation": many(1, 2),
        },
        "last": draw(st.booleans()),
    }


@examples(10)
@given(convolutions())
def test_every_setting(case):
    (n, channels, *image), (out, *window) = case["image"], case["kernel"]
    spatial = "HW"[: len(image)]
    if case["last"]:
        specs = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        x_shape, w_shape = (n, *image, channels), (*window, channels // case["groups"], out)
    else:
        specs = (f"NC{spatial}", f"OI{spatial}", f"NC{spatial}")
        x_shape, w_shape = (n, channels, *image), (out, channels // case["groups"], *window)

    def loss(w, x):
        y = lax.conv_general_dilated(
            x, w, **case["numbers"], dimension_numbers=specs, feature_group_count=case["groups"]
        )
        return jnp.sum(jnp.sin(y))

    # A kernel may see nothing but zeros, from padding and dilation.
    assert_equals_oracle(loss, normal(0, *w_shape), normal(1, 3, *x_shape), may_vanish=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("out", "form"), [(4, "Dense"), (80, "Outer")])
def test_the_smaller_of_patches_and_stacked_gradients(out, form, groups):
    def loss(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        return jnp.sum(jnp.sin(y))

    plan = assert_equals_oracle(loss, normal(0, 3, 3, 4 // groups, out), normal(1, 3, 1, 5, 5, 4))
    assert plan.rows[0].forms[0].startswith(form)


@pytest.mark.parametrize("numbers", [("NCW", "OIW", "NCW"), ("NWC", "WIO", "NWC")])
@pytest.mark.parametrize("out", [4, 40])
def test_batch_groups(numbers, out):
    channels_last = numbers[0] == "NWC"

    def loss(w, x):
        if channels_last:
            w, x = w.transpose(2, 1, 0), x.transpose(0, 2, 1)
        y = lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, batch_group_count=2
        )
        return jnp.sum(jnp.cos(y))

    assert_equals_oracle(loss, normal(0, out, 2, 3), normal(1, 3, 4, 2, 5))


def test_a_parameter_as_image_and_a_kernel_from_the_example():
    def loss(w, x):
        return jnp.sum(jnp.sin(lax.conv_general_dilated(w, x, (1,), "SAME")))

    assert_equals_oracle(loss, normal(0, 2, 2, 5), normal(1, 3, 2, 2, 5))


@pytest.mark.parametrize("length", [9, 65])
def test_patches_of_a_large_window(length):
    def loss(w, x):
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x, w, (3,), "SAME", rhs_dilation=(2,))))

    plan = assert_equals_oracle(loss, normal(0, 2, 1, length), normal(1, 3, 1, 1, 9))
    assert plan.rows[0].forms[0].startswith("Dense" if length == 9 else "Outer")


def test_flipped_kernels_of_a_transposed_convolution():
    def loss(w, x):
        y = lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True
        )
        return jnp.sum(jnp.sin(y))

    for out in (2, 40):
        assert_equals_oracle(loss, normal(0, 3, 2, out), normal(1, 3, 1, 5, out))


def test_an_empty_kernel():
    def loss(params, x):
        empty = lax.conv_general_dilated(x[:, :0], params[0], (1,), "SAME")
        return jnp.sum(empty) + jnp.sum(jnp.sin(x * params[1]))

    assert_equals_oracle(
        loss, [np.zeros((2, 0, 3)), normal(0)], normal(1, 3, 1, 1, 9), may_vanish=True
    )
