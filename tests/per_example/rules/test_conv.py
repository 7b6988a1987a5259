import jax
import jax.numpy as jnp
import pytest
from agreement import assert_equals_oracle, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax


@st.composite
def convolutions(draw):
    """Any rank, stride, padding, dilation and groups, few or many output channels."""
    rank = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 2, 3]))
    many = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
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


@settings(max_examples=10)
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

    with jax.enable_x64(True):
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


def test_kernel_as_image_and_batch_groups_fall_back():
    def loss(w, x):
        swapped = lax.conv_general_dilated(w, x, (1,), "SAME")
        grouped = lax.conv_general_dilated(x, w, (1,), "SAME", batch_group_count=2)
        return jnp.sum(jnp.sin(swapped)) + jnp.sum(jnp.cos(grouped))

    assert_equals_oracle(loss, normal(0, 2, 2, 5), normal(1, 3, 2, 2, 5), fallbacks=[""])
