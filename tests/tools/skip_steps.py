"""The rules of published skip-step optimizers as their authors wrote them, with lists."""

import jax
import jax.numpy as jnp
import numpy as np


def stream(seed, length=300):
    """Norms and losses with spikes, apart and one upon the other."""
    rng = np.random.default_rng(seed)
    losses = 3 + 0.1 * rng.standard_normal(length)
    norms = np.exp(0.2 * rng.standard_normal(length))
    losses[[90, 150, 151, 250]] += [4, 0.9, 2, -4]
    norms[[30, 120, 200]] *= [9, 12, 3]
    return np.float32(norms), np.float32(losses)


def published(which, norms, losses, window, k):
    """[steps, 3]: whether each step happens, and the bounds of norm and loss."""
    happened, past = [], []
    for n, loss in zip(np.float64(norms), np.float64(losses), strict=True):
        if which == "levanter":
            recent = np.array(past[-(window + 1) :]).reshape(-1, 2)
            ready = len(past) >= max(2, window // 2)
            limit = lambda x: x.mean() + k * max(x.std(), 1e-6)
        else:  # the count holds the present step
            recent = np.array(past[-window:]).reshape(-1, 2)
            ready = len(past) + 1 >= max(2, window // 2)
            limit = lambda x: x.mean() + k * x.std(ddof=1)
        ok = not ready or (n <= limit(recent[:, 0]) and loss <= limit(recent[:, 1]))
        bounds = [limit(recent[:, i]) if ready else np.inf for i in (0, 1)]
        happened.append((ok, *bounds))
        past.append((n, loss))
    return np.array(happened)


def through(tx, norms, losses):
    """To be compiled: whether each step happened, norm, threshold, and the last state."""
    params = {"w": jnp.ones(2)}

    def step(state, row):
        n, loss = row
        grads = {"w": n * jnp.array([0.6, 0.8])}
        updates, state = tx.update(grads, state, params, loss=loss)
        return state, (updates["w"][0] != 0, state.norm, state.threshold)

    state, (happened, seen, bounds) = jax.lax.scan(step, tx.init(params), (norms, losses))
    return happened, seen, bounds, state
