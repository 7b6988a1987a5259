"""The wheel and the sdist: what is in them, what importing them does, what type checkers see."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import optaxclip

ROOT = Path(__file__).parents[1]

# Only distributions that jax and optax bring along can be imported after this.
ALONE = """
import importlib.metadata as metadata, re, sys

def closure(name, seen):
    if name not in seen:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform or Python
            return seen
        seen.add(name)
        for need in needs:
            if "extra ==" not in need:
                closure(re.match(r"[\\w.-]+", need)[0].lower().replace("_", "-"), seen)
    return seen

allowed = closure("jax", closure("optax", {"optaxclip"}))
others = {
    module
    for module, distributions in metadata.packages_distributions().items()
    if not {d.lower().replace("_", "-") for d in distributions} & allowed
}
assert {"flax", "matplotlib", "hypothesis", "pytest"} <= others, others

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in others:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

# A platform that does not exist: whatever starts a backend fails.
QUIET = """
import jax, optax
before = dict(jax.config.values)
import optaxclip, optaxclip.per_example, optaxclip.testing
assert dict(jax.config.values) == before
assert optaxclip.__file__.startswith({site!r}), optaxclip.__file__
"""


def run(*command, site=None, **environment):
    """What a command printed; with `site` in front of what is installed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=env | environment,
        cwd=site or ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this tree, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A folder into which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(folder)
    return folder


def test_twine_is_content(built):
    assert "PASSED" in run("-m", "twine", "check", "--strict", *built)


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files = {p for p in (ROOT / "optaxclip").rglob("*") if p.suffix in (".py", ".typed")}
    expected = {p.relative_to(ROOT).as_posix() for p in files}
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if name.startswith("optaxclip-")}
    assert names - about == expected
    assert "optaxclip/py.typed" in names
    assert {name.split("/", 1)[1] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "licenses/LICENSE",
    }


def test_the_sdist_holds_what_its_tests_read(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    linked = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    tests = [p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")]
    assert [
        name
        for name in [*linked, *tests, "CHANGELOG.md", "CITATION.cff", "Makefile"]
        if name not in names and not any(n.startswith(f"{name}/") for n in names)
    ] == []
    assert [name for name in names if "_build" in name or ".venv" in name] == []


def test_each_room_imports_only_rooms_below_it():
    """Of the table in CONTRIBUTING, imports inside functions included."""
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    rooms = [re.sub(r"/|\.py$", "", name) for row in table for name in re.findall("`(.*?)`", row)]
    package = ROOT / "optaxclip"
    seen = [(p.relative_to(package).parts[0].removesuffix(".py"), p) for p in package.rglob("*.py")]
    assert {room for room, _ in seen} == {*rooms}
    upward = []
    for room, path in seen:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            below = {room, *rooms[rooms.index(room) + 1 :]}
            upward += [
                f"{path.name}:{node.lineno} imports {name}"
                for name in names
                if name.split(".")[0] == "optaxclip" and name.split(".")[1] not in below
            ]
    assert upward == []


def test_each_room_of_per_example_imports_only_rooms_below_it():
    """Of the list in its docstring; the doors, which stand beside the rooms, may import all."""
    package = ROOT / "optaxclip" / "per_example"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    rooms = re.findall(r"^\* `(\w+)`:", text, flags=re.MULTILINE)
    assert {*rooms} == {p.name for p in package.iterdir() if (p / "__init__.py").exists()}
    upward = [
        f"{path.relative_to(package)} imports {module}.{name}"
        for k, room in enumerate(rooms)
        for path in (package / room).rglob("*.py")
        for module, name in names_from("per_example", ast.parse(path.read_text()))
        if (module or name).split(".")[0] not in rooms[k:]
    ]
    assert upward == []


@pytest.mark.parametrize(
    "room", ["clippers", "wrappers", "thresholds", "measure", "selection", "robustness"]
)
def test_what_leaves_a_room_is_named_at_its_door(room):
    """In `__init__`: imported there, or listed in its docstring, module by module."""
    package = ROOT / "optaxclip"
    door = ast.parse((package / room / "__init__.py").read_text())
    listed = re.findall(r"^\* `(\w+)`:((?: .*(?:\n|$))+)", ast.get_docstring(door), re.MULTILINE)
    named = {(module, name) for module, names in listed for name in re.findall(r"`(\w+)`", names)}
    imported = names_from(room, door)
    taken = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] != room:
            taken |= names_from(room, ast.parse(path.read_text()))
    of_the_door = {("", name) for _, name in imported}
    assert taken - named - imported - of_the_door == set(), "name it in the docstring"
    assert named - taken == set(), "no other room imports it"


def names_from(room, tree):
    """(module within the room, name) of what a program imports from it."""
    return {
        (node.module.removeprefix(f"optaxclip.{room}").removeprefix("."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"optaxclip.{room}.")
        for alias in node.names
    }


def test_one_version_and_one_date():
    changelog = re.search(r"## \[(\S+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text())
    citation = (ROOT / "CITATION.cff").read_text()
    assert changelog[1] == optaxclip.__version__
    assert f"\nversion: {optaxclip.__version__}\n" in citation
    assert f"\ndate-released: {changelog[2]}\n" in citation


def test_metadata_of_the_wheel(site):
    (found,) = importlib.metadata.distributions(name="optaxclip", path=[str(site)])
    assert found.version == optaxclip.__version__
    needed = [need for need in found.requires if "extra ==" not in need]
    assert sorted(re.match(r"\w+", need)[0] for need in needed) == ["jax", "optax"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in found.metadata.get_all("Classifier")


@pytest.mark.slow
def test_import_is_silent_and_changes_nothing(site):
    code = QUIET.format(site=str(site))
    assert run("-W", "error", "-c", code, site=site, JAX_PLATFORMS="none_such") == ""


@pytest.mark.slow
def test_the_readme_begins_with_jax_and_optax_alone(site):
    readme = (ROOT / "README.md").read_text()
    block, shown = re.findall(r"```(?:python)?\n(.*?)```", readme, flags=re.DOTALL)[1:3]
    assert "import" in block
    assert run("-W", "error", "-c", f"{ALONE}\n{block}", site=site) == shown


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_type_checkers_understand_a_users_program(checker, site):
    program = site / "program.py"
    program.write_text((ROOT / "tests" / "tools" / "typing_user.py").read_text())
    # optax itself has no types for mypy.
    options = {
        "pyright": ("--pythonpath", sys.executable),
        "mypy": ("--strict", "--disable-error-code=import-untyped"),
    }
    run("-m", checker, *options[checker], program, site=site)
