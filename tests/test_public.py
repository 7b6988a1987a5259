"""What holds for every public function: how it is called, and what its docstring says."""

import ast
import inspect
import re
import textwrap

import optax
import pytest

import optaxclip
import optaxclip.per_example
import optaxclip.testing

PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (optaxclip.testing, optaxclip.per_example, optaxclip)
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and value.__module__.startswith("optaxclip")
    and not name.startswith("_")
}
FUNCTIONS = list({id(f): name for name, f in PUBLIC.items()}.values())
every = pytest.mark.parametrize("name", FUNCTIONS)

# The bound, or the one number from which the bound follows.
THRESHOLDS = {
    "threshold",
    "max_norm",
    "max_norms",
    "max_rms",
    "max_value",
    "norm",
    "clipping",
    "ratio",
    "theta",
    "decay",
    "percentile",
    "quantile",
    "z_threshold",
    "num_stds",
    "fraction",
    "tau",
}
# What `clip_by` is made of, what a wrapper wraps, and whose bounds they are.
PARTS = {"response", "inner", "clipper", "labels"}
# Where `jax.grad` and `jax_privacy.clipping.clipped_grad` have them by position too.
OF_JAX = {"argnums", "has_aux"}


def parameters(name):
    return list(inspect.signature(PUBLIC[name]).parameters.values())


def docstring(name):
    return inspect.getdoc(PUBLIC[name]) or ""


def section(text, title):
    """The body of a section, up to the next line that is not indented."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
    return found[1] if found else ""


@every
def test_only_the_threshold_is_positional(name):
    by_position = [p for p in parameters(name) if p.kind is p.POSITIONAL_OR_KEYWORD]
    result = inspect.signature(PUBLIC[name]).return_annotation
    is_transform = inspect.isclass(result) and issubclass(result, optax.GradientTransformation)
    for p in by_position:
        if is_transform or p.default is not p.empty:
            assert p.name in THRESHOLDS | PARTS | OF_JAX, f"{p.name} should be keyword-only"
    assert len([p for p in by_position if p.name in THRESHOLDS]) <= 2


@every
def test_docstring_has_its_sections(name):
    text, result = docstring(name), inspect.signature(PUBLIC[name]).return_annotation
    source = textwrap.dedent(inspect.getsource(PUBLIC[name]))
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(source)))
    wanted = {
        "Args": bool(parameters(name)),
        "Returns": result is not None,
        "Raises": raises,
        "Example": True,
    }
    assert [title for title, needed in wanted.items() if needed and not section(text, title)] == []
    assert ">>>" in section(text, "Example")
    assert "arXiv" not in text or "\nSource: " in text


@every
def test_docstring_names_every_argument(name):
    args = section(docstring(name), "Args")
    heads = " ".join(re.findall(r"^  (\S[^:\n]*):", args, flags=re.MULTILINE))
    named = set(re.findall(r"\w+", heads))
    assert {p.name for p in parameters(name)} - named == set()


def test_docstring_begins_with_one_sentence():
    first = {name: docstring(name).split("\n")[0] for name in FUNCTIONS}
    assert [name for name, line in first.items() if len(line) > 100 or line[-1:] not in ".,:"] == []


def test_docstrings_fit_on_a_screen():
    """help() shows all of it at once, on a laptop."""
    classes = {name: f for name, f in vars(optaxclip).items() if inspect.isclass(f)}
    texts = {name: inspect.getdoc(f) for name, f in {**PUBLIC, **classes}.items()}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    assert {name: n for name, n in lines.items() if n > 40} == {}
