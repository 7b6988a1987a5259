"""The only file that touches names that differ between JAX releases."""

from typing import Any

import jax


def varying_axes(x: Any) -> tuple[str, ...]:
    """Mesh axes over which `x` varies inside `jax.shard_map`, sorted; `()` elsewhere.

    The type of an array carries them while `check_vma` is on: as `typeof(x).vma`
    up to JAX 0.10, as `typeof(x).mat.varying` from 0.11.
    """
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)
    axes = getattr(aval, "vma", None) if manual is None else manual.varying
    return tuple(sorted(axes or ()))
