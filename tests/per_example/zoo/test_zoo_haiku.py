"""Haiku: its networks, and state and random keys that go in beside the parameters."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from tools.agreement import normal
from tools.zoo_check import check, randomized

IDS = np.array([[0, 2, 2, 5, 1], [1, 1, 1, 1, 1], [3, 0, 4, 3, 0]])


def total(fun, data, **kwargs):
    model = hk.without_apply_rng(hk.transform(fun))
    params = randomized(model.init(jax.random.key(0), data[0]))
    return check(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x))), params, data, **kwargs)


def test_residual_block():
    """Normalized by moving averages, as in evaluation or fine-tuning."""

    def network(x, is_training):
        options = {"create_scale": True, "create_offset": True, "decay_rate": 0.9}
        block = hk.nets.ResNet.BlockGroup(
            channels=4, num_blocks=1, stride=2, bn_config=options, resnet_v2=False,
            bottleneck=False, use_projection=True,
        )  # fmt: skip
        return block(x[None], is_training, test_local_stats=False)

    model = hk.without_apply_rng(hk.transform_with_state(network))
    data = normal(0, 3, 5, 5, 2)
    params, state = model.init(jax.random.key(0), data[0], True)

    def loss(params, x):
        out, _ = model.apply(params, state, x, False)
        return jnp.sum(jnp.sin(out))

    check(loss, randomized(params), data)


def test_transformer():
    """A decoder as in the examples of the package."""

    def network(ids):
        init = hk.initializers.VarianceScaling(1.0)
        norm = lambda x: hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
        positions = hk.get_parameter("positions", (len(ids), 8), init=init)
        x = hk.Embed(6, 8)(ids) + positions
        mask = jnp.tril(jnp.ones((1, len(ids), len(ids))))
        attention = hk.MultiHeadAttention(2, 4, model_size=8, w_init=init, with_bias=False)
        h = norm(x)
        x += attention(h, h, h, mask=mask)
        x += hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(norm(x))))
        logits = jax.nn.log_softmax(hk.Linear(6)(norm(x)))
        return jnp.take_along_axis(logits[:-1], ids[1:, None], axis=1)

    total(network, IDS)


def test_stacked_layers():
    """One layer's parameters for all, in a scan."""

    def network(x):
        layer = lambda x: x + hk.Linear(4)(jnp.tanh(hk.LayerNorm(-1, True, True)(x)))
        return hk.experimental.layer_stack(3)(layer)(x)

    total(network, normal(0, 3, 5, 4), clipped=True)


def test_recurrent():
    def network(xs):
        core = hk.DeepRNN([hk.GRU(4), jnp.tanh, hk.LSTM(3)])
        out, _ = hk.dynamic_unroll(core, xs[:, None], core.initial_state(1))
        return hk.Linear(1)(out[-1])

    total(network, normal(0, 3, 5, 2))
