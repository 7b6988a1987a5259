"""Draws `docs/responses.png`: what each response makes of a norm.

python docs/_responses.py
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
from matplotlib.figure import Figure

from optaxclip.responses import as_response

# "automatic" and "psac" lie on "normalize" but for very short gradients.
DRAWN = {
    "rescale": "#9ecae8",
    "tanh": "#b0569a",
    "sqrt": "#009e73",
    "rational": "#0072b2",
    "normalize": "#d55e00",
    "drop": "#3b3b3b",
}


def main() -> None:
    """Norms in bounds, before and after."""
    norms = jnp.linspace(0.001, 4, 1000)
    bound = jnp.ones(())
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axis = figure.add_subplot()
        for name, colour in DRAWN.items():
            after = norms * as_response(name).factor(norms, bound)
            wide = 5 if name == "rescale" else 1.8  # others lie on it
            style = "--" if name == "drop" else "-"
            axis.plot(norms, after, style, color=colour, linewidth=wide, label=f'"{name}"')
        axis.set(xlabel="norm before, in bounds", ylabel="norm after, in bounds")
        axis.set(xlim=(0, 4), ylim=(0, 1.15))
        axis.grid(color="0.92")
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(Path(__file__).with_name("responses.png"), dpi=150)


if __name__ == "__main__":
    main()
