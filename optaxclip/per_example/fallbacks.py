"""Parameters whose gradients are stacked because no exact factored form was found."""

from optaxclip._leaves import Tree, leaves_with_path, path_name, place
from optaxclip.per_example.forms.forms import Dense, Form, is_form, terms


def reason(form: Form) -> str:
    """Why a gradient is stacked; empty if it is not, or if that is cheapest."""
    found = "; ".join(x.reason for x in terms(form) if isinstance(x, Dense) and x.reason)
    return "; ".join(dict.fromkeys(found.split("; ")))


def refuse_fallbacks(grads: Tree) -> None:
    """Raise for all fallbacks of a tree at once."""
    lines = []
    for path, form in leaves_with_path(grads, is_leaf=is_form):
        if why := reason(form):
            (stacked,) = {x.stacked.shape for x in terms(form) if isinstance(x, Dense)}
            shape, name = list(form.shape), place(path_name(path))
            lines.append(f"  {name}, {form.dtype}{shape}, as {list(stacked)}: {why}")
    if lines:
        listed = "\n".join(lines)
        raise ValueError(
            "with strict=True every leaf must have a factored form, got"
            f" {len(lines)} whose gradients must be stacked:\n{listed}\n"
            "Teach optaxclip the primitive with register_rule, rewrite that line, or pass"
            " strict=False: stacking is exact and costs the memory."
        )
