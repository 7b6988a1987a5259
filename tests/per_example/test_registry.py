import jax
import jax.numpy as jnp
import pytest
from jax import lax
from tools.agreement import assert_equals_oracle, normal

from optaxclip._compat import primitives
from optaxclip.per_example import Dense, per_example_grad
from optaxclip.per_example.engine import registry
from optaxclip.per_example.engine.registry import register_rule


@pytest.fixture
def rules(monkeypatch):
    """A copy of the rules, so that a test can add some."""
    copy = dict(registry._RULES)
    monkeypatch.setattr(registry, "_RULES", copy)
    return copy


def loss(w, x):
    return jnp.sum(jnp.sin(lax.rem(w, x)))


W, X = normal(0, 4), 2 + normal(1, 5, 4) / 4


def test_a_new_rule_replaces_the_fallback(rules):
    assert_equals_oracle(loss, W, X, fallbacks=["the root"])

    @register_rule(primitives.rem_p)
    def rem(ctx, w, x):
        """d(w mod x)/dw = 1."""
        assert ctx.position == 0
        assert ctx.batched == (False, True)
        assert (ctx.examples, w.shape, x.shape) == (5, (4,), (5, 4))
        assert ctx.parameter is w
        assert "test_registry.py" in ctx.source
        return Dense(ctx.cotangent)

    assert_equals_oracle(loss, W, X)


def test_a_rule_may_decline(rules):
    register_rule(primitives.rem_p)(lambda ctx, *operands, **params: None)
    assert_equals_oracle(loss, W, X, fallbacks=["the root"])


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (lambda ctx: Dense(ctx.cotangent[:, :3]), r"Dense of \(3,\)"),
        (lambda ctx: Dense(ctx.cotangent[..., None]), r"Dense of \(4, 1\)"),
        (lambda ctx: ctx.cotangent[0, 0] * 0 + 7, r"Array\(7"),
    ],
)
@pytest.mark.parametrize("within", [loss, jax.checkpoint(loss)])
def test_what_a_rule_returns_is_checked(rules, returned, what, within):
    register_rule(primitives.rem_p)(lambda ctx, *operands, **params: returned(ctx))
    message = rf"got {what}.* for \(4,\), of rem at .*test_registry.py.*\(loss\). Return Outer"
    with pytest.raises(TypeError, match=message):
        per_example_grad(within)(W, X)


@pytest.mark.parametrize("primitive", [(), (loss,), (primitives.rem_p, "rem")])
def test_a_rule_is_for_primitives(rules, primitive):
    before = dict(rules)
    with pytest.raises(TypeError, match=r"must be given primitives, got (none|.*loss|rem, 'rem')"):
        register_rule(*primitive)
    assert rules == before


def test_each_operand_is_asked_for_on_its_own():
    """Both branches of a select are parameters, and so are both bounds of a clamp."""

    def loss(w, x):
        return jnp.sum(jnp.sin(lax.select(x > 0, w["a"], w["a"] * w["b"])))

    assert_equals_oracle(loss, {"a": W, "b": W + 1}, X - 2)
