"""How the documentation is built: `make docs`."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree, whatever is installed

from docutils import nodes
from sphinx import addnodes

import optaxclip

project = "optaxclip"
MODULES = (
    optaxclip, optaxclip.per_example, optaxclip.thresholds, optaxclip.wrappers, optaxclip.clipping,
    optaxclip.selection, optaxclip.robustness, optaxclip.checkpoints,
)  # fmt: skip
author = "The optaxclip authors"
copyright = author
version = release = optaxclip.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"optaxclip {version}"
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output
html_static_path = ["_static"]
html_css_files = ["pages.css"]
highlight_language = "none"
smartquotes_action = "De"  # dashes and ellipses; quotes as they are typed
pygments_dark_style = "github-dark"

# A build must not depend on the network: without this variable, names of other libraries are
# not linked. Where the documentation is published, set it.
if os.environ.get("OPTAXCLIP_DOCS_ONLINE"):
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "flax": ("https://flax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
# Returns among them: napoleon would take what stands before a colon for a type.
napoleon_custom_sections = ["Returns", "Guarantees", "Edge cases", "Source"]
# What stands in single backticks is code, and a link where it names something of this library.
default_role = "py:obj"


def _as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written for the terminal: beyond backticks and bullets nothing is markup."""
    text = []
    in_example = in_source = False
    for line in _with_tables(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        in_source = line.startswith("Source: ") or (in_source and bool(line.strip()))
        if line.startswith("Source: "):
            text.append("Source:")
            line = line.removeprefix("Source: ")
        if not in_example and not line.lstrip().startswith((".. list-table::", ":header-rows:")):
            line = _escaped(line)
        text.append(f"  {line}" if in_source else line)
    lines[:] = text


def _with_tables(lines):
    """Rows between pipes, with a head where the second is of dashes, as Sphinx has them."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith("|"):
            yield line
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if i == 0 or not lines[i - 1].lstrip().startswith("|"):
            headed = i + 1 < len(lines) and lines[i + 1].lstrip().startswith("| ---")
            yield from (f"{indent}.. list-table::", f"{indent}   :header-rows: {int(headed)}", "")
        cells = [cell.strip() for cell in re.split(r"(?<!\S)\|(?!\S)", line)[1:-1]]
        if set(cells[0]) != {"-"}:
            yield f"{indent}   * - {cells[0]}".rstrip()
            yield from (f"{indent}     - {cell}".rstrip() for cell in cells[1:])
            if i + 1 == len(lines) or not lines[i + 1].lstrip().startswith("|"):
                yield ""


def _escaped(line):
    bullet, text = re.fullmatch(r"(\s*(?:\* - |\* |- )?)(.*)", line).groups()
    parts = text.split("`")
    parts[::2] = [re.sub(r"([|*\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    # A letter may not follow a closing backtick but for an escaped space, which vanishes.
    parts[2::2] = [rf"\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]
    return bullet + "`".join(parts)


def _pictures_open_in_full_size(app, doctree):
    """Sphinx links a picture to its file where a width is given: for telephones."""
    for picture in doctree.findall(nodes.image):
        picture.setdefault("width", "100%")


def _names_are_links(app, doctree):
    """`clip_by_value(c)` in the text of a page leads to its place in the reference."""
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().partition("(")[0]
        linked = isinstance(code.parent, (addnodes.pending_xref, nodes.reference, nodes.title))
        module = next((m for m in MODULES if callable(getattr(m, name, None))), None)
        if not linked and module is not None:
            place = f"{module.__name__}.{name}"
            target = {"refdomain": "py", "reftype": "obj", "reftarget": place}
            code.replace_self(addnodes.pending_xref("", code.deepcopy(), refwarn=True, **target))


def _without_the_constructor_of_tuples(app, what, name, obj, options, signature, returns):
    """Nobody makes these results by hand: their fields say what they are."""
    return ("", returns) if what == "class" and issubclass(obj, tuple) else None


def setup(app):
    """What this file adds to Sphinx; docstrings are looked at before napoleon does, at 500."""
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)
    app.connect("doctree-read", _pictures_open_in_full_size)
    app.connect("doctree-read", _names_are_links)
    app.connect("autodoc-process-signature", _without_the_constructor_of_tuples)
