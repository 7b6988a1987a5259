"""Random losses of one example, made of what programs are made of, for the per-example engine.

`program(seed)` is a function of parameters and one example. Each step takes a vector and makes
another of it; loops, branches, checkpoints and inner gradients are made of further steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

WIDTH, ROWS, LAYERS, STEPS, BATCH = 3, 5, 3, 4, 3
Step = Callable[[Any, Any, Any], Any]
"""`(parameters, example, vector) -> vector`."""


def parameters(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([1, seed])
    shapes = {
        "w": (WIDTH, WIDTH),
        "v": (WIDTH, WIDTH),
        "b": (WIDTH,),
        "s": (),
        "table": (ROWS, WIDTH),
        "layers": (LAYERS, WIDTH, WIDTH),
        "biases": (LAYERS, WIDTH),
        "flat": (2 * WIDTH * WIDTH,),
    }
    return {name: rng.standard_normal(shape) / 1.5 for name, shape in shapes.items()}


def examples(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([2, seed])
    return {
        "x": rng.standard_normal((BATCH, WIDTH)),
        "xs": rng.standard_normal((BATCH, STEPS, WIDTH)),
        "ids": rng.integers(0, ROWS, (BATCH, STEPS)),
        "flag": rng.integers(0, 2, BATCH).astype(bool),
    }


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss, and the names of the steps it is made of."""

    loss: Callable[[Any, Any], Any]
    names: tuple[str, ...]


def program(seed: int) -> Program:
    rng = np.random.default_rng([3, seed])
    names: list[str] = []
    body = block(rng, names, int(rng.integers(2, 5)), depth=2)
    tail = rng.integers(4)

    def loss(p: Any, e: Any) -> Any:
        h = body(p, e, e["x"])
        total = jnp.sum(jnp.sin(h + jnp.arange(WIDTH)) * (1 + p["s"]) * (h + 0.5))
        if tail == 1:
            total = total + 0.1 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
        if tail == 2:
            total = total + jnp.sum((p["table"] @ h) ** 2)
        return total

    return Program(loss, (*names, f"tail {tail}"))


def block(rng: Any, names: list[str], length: int, depth: int) -> Step:
    """So many steps, one after the other."""
    kinds = [*SIMPLE, *(NESTED if depth else ())]
    steps = []
    for _ in range(length):
        kind = kinds[int(rng.integers(len(kinds)))]
        names.append(kind.__name__)
        steps.append(kind(rng, names, depth))

    def run(p: Any, e: Any, h: Any) -> Any:
        return functools.reduce(lambda h, step: step(p, e, h), steps, h)

    return run


def weight(rng: Any, names: list[str]) -> Callable[[Any], Any]:
    """A matrix made of parameters alone."""
    name = ("w", "v")[int(rng.integers(2))]
    order = rng.permutation(WIDTH)
    mask = rng.integers(0, 2, (WIDTH, WIDTH))
    vector = rng.standard_normal(WIDTH)
    ways: dict[str, Callable[[Any], Any]] = {
        "plain": lambda p: p[name],
        "transposed": lambda p: p[name].T,
        "rows moved": lambda p: p[name][jnp.asarray(order)],
        "masked": lambda p: p[name] * mask,
        "scaled rows": lambda p: p[name] * vector[:, None],
        "scaled": lambda p: p[name] * p["s"],
        "divided by its norm": lambda p: p[name] / jnp.linalg.norm(p[name]),
        "centred": lambda p: p[name] - p[name].mean(0),
        "barrier": lambda p: lax.optimization_barrier(p[name]),
        "named": lambda p: jax.ad_checkpoint.checkpoint_name(p[name], "w"),
        "a row set": lambda p: p[name].at[1].set(0.5),
        "product": lambda p: p["w"] @ p["v"],
        "from a vector": lambda p: p["flat"][: WIDTH * WIDTH].reshape(WIDTH, WIDTH),
        "joined": lambda p: jnp.concatenate([p["w"][:1], p["table"][1:WIDTH]], 0),
        "limited": lambda p: limited(p[name]),
        "watched": lambda p: watched(p[name], p[name]),
        "cast": lambda p: p[name].astype(jnp.float32).astype(p[name].dtype),
        "rounded": lambda p: p[name] + jnp.floor(p["v"]),
        "solved": lambda p: jnp.linalg.solve(jnp.eye(WIDTH) * 3 + p[name], p["v"]),
        "chosen": lambda p: jnp.where(p[name] > 0, p[name], 0.1 * p["v"]),
    }
    way = [*ways][int(rng.integers(len(ways)))]
    names.append(f"[{way}]")
    return ways[way]


# --- rules of a user's ---


@jax.custom_vjp
def limited(w):
    """Its gradient is clipped: the backward rule is not linear."""
    return w


limited.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.3, 0.3),))


@jax.custom_vjp
def doubled(w):
    """Its gradient is doubled, and shifted where there is one: not linear either."""
    return 1.0 * w


doubled.defvjp(lambda w: (w, None), lambda _, g: (2 * g + 0.1 * jnp.sign(g),))


@jax.custom_jvp
def watched(w, h):
    """Its rule asks which of its inputs are differentiated."""
    return h * jnp.ones_like(w)[0, 0]


def _watched_rule(primals, tangents):
    _, h = primals
    if type(tangents[1]) is SymbolicZero:
        return h, jnp.zeros_like(h)
    return h, tangents[1] * (1.0 if type(tangents[0]) is SymbolicZero else 3.0)


watched.defjvp(_watched_rule, symbolic_zeros=True)


@jax.custom_jvp
def smooth(h):
    return jnp.where(h > 0, h, 0.0)


smooth.defjvp(
    lambda primals, tangents: (smooth(*primals), tangents[0] * jax.nn.sigmoid(primals[0]))
)


# --- steps ---


def linear(rng, names, depth):
    w, act = weight(rng, names), (jnp.tanh, jnp.sin, smooth, jax.nn.silu)[int(rng.integers(4))]
    return lambda p, e, h: act(h @ w(p) + e["x"])


def affine(rng, names, depth):
    return lambda p, e, h: h * (1 + p["b"]) + p["b"] - p["s"]


def lookup(rng, names, depth):
    k = int(rng.integers(STEPS))
    return lambda p, e, h: h + p["table"][e["ids"][k]]


def lookups(rng, names, depth):
    rows = rng.integers(0, ROWS, STEPS)
    return lambda p, e, h: h + jnp.tanh(p["table"][e["ids"]] + p["table"][jnp.asarray(rows)]).sum(0)


def tied(rng, names, depth):
    return lambda p, e, h: jax.nn.softmax(p["table"] @ h) @ p["table"]


def rows(rng, names, depth):
    w = weight(rng, names)
    return lambda p, e, h: jnp.sin(e["xs"] @ w(p)).mean(0) + h


def scattered(rng, names, depth):
    def run(p, e, h):
        total = jnp.zeros((ROWS, WIDTH)).at[e["ids"]].add(jnp.tanh(e["xs"] @ p["v"]))
        return h + (total * p["table"]).sum(0)

    return run


def constant_first(rng, names, depth):
    """The parameter meets a constant before it meets the example."""
    return lambda p, e, h: jnp.tanh(jnp.arange(1.0, WIDTH + 1) @ p["w"] + h)


def difference(rng, names, depth):
    """Two uses that nearly cancel."""
    return lambda p, e, h: h + (jnp.tanh((h + 1e-2) @ p["w"]) - jnp.tanh(h @ p["w"])) / 1e-2


def own_rule(rng, names, depth):
    rule = (limited, doubled, smooth)[int(rng.integers(3))]
    return lambda p, e, h: rule(h)


def own_rule_of_both(rng, names, depth):
    return lambda p, e, h: watched(p["w"], h @ p["v"])


def reference(rng, names, depth):
    def run(p, e, h):
        cell = jax.new_ref(jnp.zeros_like(h))
        cell[...] += h @ p["w"]
        cell[...] *= 2
        return jnp.tanh(cell[...])

    return run


def stopped(rng, names, depth):
    return lambda p, e, h: h + lax.stop_gradient(h @ p["w"]) + jnp.floor(h @ p["v"])


def guarded(rng, names, depth):
    """A branch that is NaN for the examples that do not take it."""

    def run(p, e, h):
        total = jnp.sum(h * p["b"])
        root = lax.cond(total > 0, lambda x: jnp.sqrt(x) * p["s"], lambda x: 0.1 * p["s"], total)
        return h + root

    return run


SIMPLE = [
    linear, linear, affine, lookup, lookups, tied, rows, scattered, constant_first, difference,
    own_rule, own_rule_of_both, reference, stopped, guarded,
]  # fmt: skip


# --- steps made of steps ---


def remat(rng, names, depth):
    inner = block(rng, names, 2, depth - 1)
    return lambda p, e, h: jax.checkpoint(inner)(p, e, h)


def recurrent(rng, names, depth):
    inner = block(rng, names, 1, depth - 1)
    again = bool(rng.integers(2))

    def run(p, e, h):
        def step(h, x):
            h = inner(p, {**e, "x": x}, h)
            return jnp.tanh(h), jnp.tanh(h @ p["v"])

        step = jax.checkpoint(step) if again else step
        h, ys = lax.scan(step, h, e["xs"], reverse=again)
        return h + ys.mean(0)

    return run


def layers(rng, names, depth):
    inner = block(rng, names, 1, depth - 1)
    again = bool(rng.integers(2))

    def run(p, e, h):
        def step(h, layer):
            w, b = layer
            return jnp.tanh(inner({**p, "w": w, "b": b}, e, h)), None

        step = jax.checkpoint(step) if again else step
        return lax.scan(step, h, (p["layers"], p["biases"]))[0]

    return run


def counted(rng, names, depth):
    """Layers picked by a counter, in some order."""
    inner = block(rng, names, 1, depth - 1)
    order = [lambda i: i, lambda i: LAYERS - 1 - i, lambda i: i // 2, lambda i: (2 * i) % LAYERS]
    pick = order[int(rng.integers(4))]

    def run(p, e, h):
        def step(i, h):
            k = pick(i)
            return jnp.tanh(inner({**p, "w": p["layers"][k], "b": p["biases"][k]}, e, h))

        return lax.fori_loop(0, LAYERS, step, h)

    return run


def known_carry(rng, names, depth):
    """A carry that depends on parameters alone."""
    inner = block(rng, names, 1, depth - 1)

    def run(p, e, h):
        def step(carry, x):
            w, h = carry
            return (jnp.tanh(w @ p["v"]), inner({**p, "w": w}, {**e, "x": x}, h)), None

        return lax.scan(step, (p["w"], h), e["xs"])[0][1]

    return run


def branch(rng, names, depth):
    yes, no = block(rng, names, 1, depth - 1), block(rng, names, 1, depth - 1)
    which = int(rng.integers(3))

    def run(p, e, h):
        choice = [e["flag"], jnp.sum(h) > 0, p["s"] > 0][which]
        return lax.cond(choice, lambda h: yes(p, e, h), lambda h: no(p, e, h), h)

    return run


def inner_gradient(rng, names, depth):
    """A step of gradient descent on a loss of its own."""
    return lambda p, e, h: h - 0.1 * jax.grad(lambda h: jnp.sum(jnp.sin(h @ p["w"]) ** 2))(h)


def called(rng, names, depth):
    inner = block(rng, names, 2, depth - 1)
    return lambda p, e, h: jax.jit(inner)(p, e, h)


def mapped(rng, names, depth):
    inner = block(rng, names, 1, depth - 1)
    return lambda p, e, h: h + jax.vmap(lambda x: inner(p, e, x))(e["xs"]).sum(0)


NESTED = [
    remat, recurrent, layers, counted, known_carry, branch, inner_gradient, called, mapped,
]  # fmt: skip
