"""`strict=True`: one error for all fallbacks."""

import jax.numpy as jnp
import pytest
from jax import lax
from tools.agreement import close, normal

from optaxclip.per_example import per_example_grad, per_example_norms, per_example_value_and_grad
from optaxclip.per_example.fallbacks import reason


def loss(params, x):
    w = params["w"] / jnp.sqrt(jnp.sum(params["w"] ** 2))
    y = jnp.tanh(x @ params["fine"]) @ w
    return jnp.sum(lax.rem(params["v"], y))


def params():
    return {"fine": normal(0, 4, 3), "v": normal(1, 2), "w": normal(2, 3, 2)}


@pytest.mark.parametrize("door", [per_example_grad, per_example_value_and_grad, per_example_norms])
def test_all_fallbacks_in_one_error(door):
    with pytest.raises(ValueError, match="a factored form, got 2 whose") as caught:
        door(loss, strict=True)(params(), normal(3, 5, 4))
    _, v, w, remedy = str(caught.value).splitlines()
    assert v.startswith("  v, float64[2], as [5, 2]: no exact factored form for rem at ")
    assert "test_fallbacks.py:" in v
    assert "(loss)" in v
    assert w.startswith("  w, float64[3, 2], as [5, 3, 2]: ")
    assert "div of the parameter at " in w
    assert "register_rule" in remedy
    assert "strict=False" in remedy


def test_stacking_by_choice_is_no_fallback():
    """A bias is stacked because nothing is smaller."""
    grads = per_example_grad(lambda b, x: jnp.sum((x + b) ** 2), strict=True)(
        normal(0, 4), normal(1, 5, 4)
    )
    assert reason(grads) == ""
    close(grads.materialize(), 2 * (normal(1, 5, 4) + normal(0, 4)), 1e-12)
