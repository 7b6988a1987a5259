"""Whether what a checkpoint holds is the state an optimizer needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._leaves import Tree, leaves_with_path, path_name, place

_SHOWN = 10


def check_saved_state(saved: Tree, state: Tree) -> None:
    """Raises unless a checkpoint holds the arrays of `state`, and names those that differ.

    For use before restoring, when the clipper may not be the one the checkpoint was written with:
    Orbax then stops too, but at the first difference, and for an array of another shape it does
    not say which.

    Args:
      saved: what is in the checkpoint: a tree of anything with a `shape`. With Orbax
        `checkpointer.metadata(path).item_metadata` or `manager.item_metadata(step)`, which read
        no arrays; or arrays restored without a target.
      state: the tree to restore, such as `optimizer.init(params)` or a dict that holds it with
        the parameters, concrete or from `jax.eval_shape`.

    Raises:
      ValueError: an array that is missing in the checkpoint, or in excess, or of another shape;
        the message lists the paths.

    Edge cases:
      Names are compared, not types: a tuple may have come back as a list, and a state as a dict.
      Dtypes are not compared, for Orbax converts to those of the target. A clipper's `name=` is
      not saved. Two clippers whose states look alike, such as two modes of `zclip`, cannot be
      told apart.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip.checkpoints import check_saved_state
      >>> params = {"w": jnp.zeros(2)}
      >>> saved = optaxclip.clip_by_quantile().init(params)
      >>> check_saved_state(saved, optaxclip.clip_by_quantile().init(params))
      >>> check_saved_state(saved, optaxclip.clip_by_global_norm(1.0).init(params))
      Traceback (most recent call last):
      ...
      ValueError: the checkpoint must hold the state to restore, got
        threshold_state/recent: in the checkpoint alone
        ...
    """
    ours, theirs = _arrays(state), _arrays(saved)
    problems = [f"{x.path}: missing in the checkpoint" for k, x in ours.items() if k not in theirs]
    problems += [f"{x.path}: in the checkpoint alone" for k, x in theirs.items() if k not in ours]
    problems += [
        f"{x.path}: shape {theirs[k].shape} in the checkpoint, {x.shape} here"
        for k, x in ours.items()
        if k in theirs and None not in (x.shape, theirs[k].shape) and x.shape != theirs[k].shape
    ]
    if problems:
        more = len(problems) - _SHOWN
        listed = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        listed += f"\n  and {more} more" if more > 0 else ""
        raise ValueError(
            f"the checkpoint must hold the state to restore, got\n{listed}\nBuild the optimizer"
            " with the clippers and settings of the run that wrote it, or restore the rest and"
            " keep what `init` gives for these."
        )


class _Array(NamedTuple):
    path: str
    shape: tuple[int, ...] | None
    """None for PRNG keys, which are saved as their data."""


def _arrays(tree: Tree) -> dict[str, _Array]:
    """Every array, by a path that is the same in a tree and in a checkpoint of it."""
    found = {}
    for (key_path, x), (named, _) in zip(
        jax.tree.leaves_with_path(tree), leaves_with_path(tree), strict=True
    ):
        dtype = getattr(x, "dtype", None)
        is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
        # A variable of Flax NNX is a node with one leaf: an attribute, but in a checkpoint a key.
        path = path_name(key_path).removesuffix("/value")
        found[path] = _Array(place(path_name(named)), None if is_key else tuple(jnp.shape(x)))
    return found
