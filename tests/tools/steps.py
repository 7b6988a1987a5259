"""A step of a clipper, compiled: what tests of the contract, of adaptive bounds and meshes run."""

import jax
import optax
from tools.clippers import make


def jitted(tx):
    """The transformation with `init` and `update` compiled, once for each tree they are given.

    Inside another jit, `scan` or `vmap` its trace is used again.
    """
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))


class Steps(dict):
    """The clippers of the table by name, `jitted`: `steps["global"].update(grads, state, params)`.

    Made by a fixture of module scope, so that it dies with the backend of the module.
    """

    def __missing__(self, name):
        return self.setdefault(name, jitted(make(name)))


def together(txs):
    """Clippers by name as one, so that they cost one program: `{name: updates}, {name: state}`."""

    def init(params):
        return {name: tx.init(params) for name, tx in txs.items()}

    def update(grads, states, params=None):
        found = {name: tx.update(grads, states[name], params) for name, tx in txs.items()}
        return {k: u for k, (u, _) in found.items()}, {k: s for k, (_, s) in found.items()}

    return jitted(optax.GradientTransformation(init, update))


def through(tx, start, grads, params=None):
    """Scans `[steps, ...]` of gradients: all updates `[steps, ...]` and the last state. In jit."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, start, grads)
    return updates, state


def compiled(fun, *args):
    """`fun(*args)` in one program, as NumPy: many small steps cost one compilation."""
    return jax.device_get(jax.jit(fun)(*args))


def first_steps(txs, grads, params=None):
    """The first step of each transformation of a tree: all updates and states, one program."""
    run = lambda grads, params: jax.tree.map(
        lambda tx: tx.update(grads, tx.init(grads), params), txs, is_leaf=_is_transform
    )
    return compiled(run, grads, params)


def _is_transform(x):
    return isinstance(x, optax.GradientTransformation)
