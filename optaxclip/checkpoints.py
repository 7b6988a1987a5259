"""Whether what a checkpoint holds is the state an optimizer needs."""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Tree, leaves_with_path, path_name, place

_SHOWN = 10
# What states have that those of 0.1.0 had not, besides `ordered`, which follows from `recent`.
_NEW = ("seen_count", "nonfinite/step", "beyond_count")
_OF_0_1_0 = " If 0.1.0 wrote it, use optaxclip.checkpoints.from_0_1_0(saved, state)."


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
        differing = ours.keys() ^ theirs.keys()
        old = bool(differing) and all(_is_new(k, theirs) for k in differing)
        more = len(problems) - _SHOWN
        listed = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
        listed += f"\n  and {more} more" if more > 0 else ""
        raise ValueError(
            f"the checkpoint must hold the state to restore, got\n{listed}\nBuild the optimizer"
            " with the clippers and settings of the run that wrote it, or restore the rest and"
            f" keep what `init` gives for these.{_OF_0_1_0 * old}"
        )


def from_0_1_0(saved: Tree, state: Tree) -> Tree:
    """The state of an optimizer from a checkpoint that 0.1.0 wrote.

    States have gained fields since. The norms that learned bounds keep in order follow from those
    in the checkpoint; what guards count anew begins as in `init`.

    Args:
      saved: what is in the checkpoint, arrays in a tree of any kind with the same names: with
        Orbax, what is restored without a target.
      state: the tree to restore, such as `optimizer.init(params)`.

    Returns:
      A tree like `state`.

    Raises:
      ValueError: from `check_saved_state`, if something else is missing, in excess or of another
        shape.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> from optaxclip.checkpoints import from_0_1_0
      >>> state = optaxclip.zclip(warmup=2).init({"w": jnp.zeros(2)})
      >>> old = state._asdict() | {"threshold_state": state.threshold_state._asdict()}
      >>> del old["threshold_state"]["ordered"], old["name"]
      >>> print(from_0_1_0(old, state).threshold_state.ordered.shape)
      (2, 1)
    """
    ours, theirs = _arrays(state), _arrays(saved)
    arrays = dict(zip(theirs, jax.tree.leaves(saved), strict=True))
    found = dict(zip(ours, jax.tree.leaves(state), strict=True)) | arrays
    for key in ours.keys() - theirs.keys():
        if _is_new(key, theirs) and key.endswith("ordered"):
            found[key] = np.sort(arrays[key.removesuffix("ordered") + "recent"], axis=0)
    unknown = [k for k in ours.keys() ^ theirs.keys() if not _is_new(k, theirs)]
    if unknown or any(ours[k].shape != x.shape for k, x in theirs.items()):
        check_saved_state(saved, state)
    leaves, structure = jax.tree.flatten(state)
    arrays_of = zip(map(found.get, ours), leaves, strict=True)
    return jax.tree.unflatten(structure, [jnp.asarray(x, own.dtype) for x, own in arrays_of])


def _is_new(path: str, saved: Collection[str]) -> bool:
    """Whether a state has something here that one of 0.1.0 had not."""
    if path.rpartition("/")[2] == "ordered":
        return path.removesuffix("ordered") + "recent" in saved
    guard, of_loss, _ = path.rpartition("loss/")
    if of_loss and f"{guard}skipped_count" in saved:  # of a guard, not of a parameter called so
        return path not in saved
    return path.endswith(_NEW)


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
