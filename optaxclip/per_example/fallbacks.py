"""Parameters whose gradients are stacked because no exact factored form was found."""

from typing import Any

import jax

from optaxclip._leaves import path_name
from optaxclip.per_example.forms import Dense, Form, is_form, terms

Tree = Any


def reason(form: Form) -> str:
    """Why a gradient is stacked; empty if it is not, or if that is cheapest."""
    found = "; ".join(x.reason for x in terms(form) if isinstance(x, Dense) and x.reason)
    return "; ".join(dict.fromkeys(found.split("; ")))


def refuse_fallbacks(grads: Tree) -> None:
    """Raise for all fallbacks of a tree at once."""
    lines = []
    for path, form in jax.tree.leaves_with_path(grads, is_leaf=is_form):
        if why := reason(form):
            (stacked,) = {x.stacked.shape for x in terms(form) if isinstance(x, Dense)}
            shape, name = list(form.shape), path_name(path) or "the parameter"
            lines.append(f"  {name}, {form.dtype}{shape}, as {list(stacked)}: {why}")
    if lines:
        listed = "\n".join(lines)
        raise ValueError(
            f"with strict=True no gradient may be stacked, got {len(lines)} that would be:\n"
            f"{listed}\nTeach optaxclip the primitive with register_rule, rewrite that line, or"
            " pass strict=False: stacking is exact and costs the memory."
        )
