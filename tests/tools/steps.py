"""Steps of clippers and optimizers, from few programs that are compiled quickly.

Nothing here keeps an array or a program: a test file holds what it wants to use again in a fixture
of module scope.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tools import quick
from tools.quick import quick_jit

_DIRECTION = np.float32([0.6, 0.8])


def jitted(tx):
    """The transformation with `init` and `update` compiled, once for each tree they are given."""
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(quick_jit(tx.init), quick_jit(tx.update))


def first_steps(txs, grads, params=None):
    """Updates and state of the first step of each transformation of a tree, from one program."""

    def run(grads, params):
        step = lambda tx: tx.update(grads, tx.init(grads), params)
        return jax.tree.map(step, txs, is_leaf=_is_transform)

    return quick.run(run, grads, params)


def through(tx, start, grads, params=None):
    """Scans gradients `[steps, ...]`: all updates and the last state. To be compiled."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, start, grads)
    return updates, state


def factors(txs, norms):
    """What transformations of a tree multiply two leaves of these norms by: `[..., steps, 2]`.

    That of `optaxclip.testing.multipliers`, for several at once.
    """

    def run(norms):
        grads = [n[:, None] * _DIRECTION for n in norms.T]

        def lengths(tx):
            updates, _ = through(tx, tx.init([_DIRECTION, _DIRECTION]), grads)
            return jnp.stack([u @ _DIRECTION for u in updates], axis=1)

        return jax.tree.map(lengths, txs, is_leaf=_is_transform)

    norms = np.float32(norms)
    found = quick.run(jax.vmap(run), norms.reshape(-1, *norms.shape[-2:]))
    with np.errstate(invalid="ignore"):
        return jax.tree.map(lambda n: n.reshape(norms.shape) / norms, found)


def _is_transform(x):
    return isinstance(x, optax.GradientTransformation)
