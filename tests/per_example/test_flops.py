import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optaxclip.per_example.schedules.flops import flops

A, B = np.ones((8, 16)), np.ones((16, 4))
IMAGES, KERNEL = np.ones((2, 3, 9, 9)), np.ones((5, 3, 3, 3))


CASES = {
    "product": (lambda a, b: a @ b, (A, B), 2 * 8 * 16 * 4),
    "batched product": (lambda a: jnp.einsum("bij,bj->bi", a, a[:, 0]), (IMAGES[0],), 2 * 3 * 81),
    "convolution": (lambda x, w: lax.conv(x, w, (1, 1), "VALID"), (IMAGES, KERNEL),
                    2 * (2 * 5 * 49) * 27),
    "elementwise": (lambda a: jnp.sin(a) * a, (A,), 2 * 128),
    "sum": (jnp.sum, (A,), 128),
    "moving": (lambda a: a.T.reshape(4, 32)[:2], (A,), 0),
    "indices": (lambda a: jnp.arange(10) * 2, (A,), 0),
    "scan": (lambda a: lax.scan(lambda c, _: (jnp.sin(c), None), a, length=7), (A,), 7 * 128),
    "cond": (lambda a: lax.cond(a[0, 0] > 0, jnp.sin, lambda a: jnp.sin(jnp.cos(a)), a), (A,),
             2 * 128 + 1),
    "nothing in, nothing out": (lambda a: jax.debug.print("here"), (A,), 0),
    "calls": (jax.checkpoint(jax.jit(jnp.sin)), (A,), 128),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flops(name):
    fun, args, expected = CASES[name]
    assert flops(fun, *args) == expected
