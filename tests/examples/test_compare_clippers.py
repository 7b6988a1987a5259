"""The comparison of clippers on real data, and the search over machines."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from tools.running import PNG, Done, run, run_each, succeeded

SMALL = ("--quick", "--seeds", 1)
FOUL = ("--settings", "spike", "nan", "nan_guarded")
SUBSETS = (["none"], ["agc", "unit", "leaf", "value", "soft"])

pytestmark = pytest.mark.slow


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return {(row["setting"], row["clipper"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a small comparison."""
    out = tmp_path_factory.mktemp("comparison") / "made" / "here"
    clippers = ("--clippers", "global", "none")
    done = succeeded(run("compare_clippers.py", *SMALL, *clippers, *FOUL, "--out", out))
    return out, done.stdout


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> tuple[Path, list[Done]]:
    """A folder with "again", which is the comparison again, and one for each of the subsets; and
    all that was printed, by two commands with an unknown name at the end, too."""
    out = tmp_path_factory.mktemp("others")
    unknown = "clean_and_global"
    done = run_each(
        "compare_clippers.py",
        (*SMALL, "--clippers", "none", "global", *FOUL, "--out", out / "again"),
        *(
            (*SMALL, "--clippers", *names, "--settings", "label_noise", "--out", out / names[0])
            for names in SUBSETS
        ),
        ("--clippers", unknown, "--out", out / "unknown"),
        ("--settings", unknown, "--out", out / "unknown"),
    )
    return out, done


def test_comparison_writes_its_five_files(comparison):
    out, _ = comparison
    names = {"accuracy.png", "overview.png", "report.html", "results.csv", "results.json"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("accuracy.png", "overview.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_comparison_prints_the_table(comparison):
    _, printed = comparison
    for words in ("MLP on digits", "accuracy %", "clipped", "µs/step", "global norm", "guarded"):
        assert words in printed


def test_report_needs_no_other_file(comparison):
    page = (comparison[0] / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(links) >= 3
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def test_clipping_withstands_gradient_spikes(comparison):
    found = rows(comparison[0])
    bare, clipped = (float(found["spike", c]["test_accuracy"]) for c in ("none", "global"))
    assert clipped > 0.9
    assert bare < clipped - 0.2


@pytest.mark.parametrize("clipper", ["none", "global"])
def test_nan_batch_is_survived_with_the_guard_alone(comparison, clipper):
    found = rows(comparison[0])
    bare, guarded = found["nan", clipper], found["nan_guarded", clipper]
    assert (bare["lost_to_nonfinite"], bare["skipped_steps"]) == ("1", "0")
    assert (guarded["lost_to_nonfinite"], guarded["skipped_steps"]) == ("0", "1")
    assert math.isfinite(float(guarded["final_loss"]))
    assert float(guarded["test_accuracy"]) > 0.9


def test_clip_rate_is_that_of_the_clipper(comparison):
    found = rows(comparison[0])
    assert found["spike", "none"]["clip_rate"] == ""
    assert 0 < float(found["spike", "global"]["clip_rate"]) < 1


def test_json_holds_the_timings_and_the_csv_does_not(comparison):
    out, _ = comparison
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) == 6
    assert all(row["us_per_step"] > 0 for row in record["rows"])
    assert set(record["versions"]) >= {"optaxclip", "jax", "flax", "optax"}
    header = (out / "results.csv").read_text(encoding="utf-8").splitlines()[0]
    assert not re.search("second|time|us_", header)


def test_same_seeds_give_the_same_csv_in_another_process(comparison, others):
    succeeded(others[1][0])
    again, first = (path / "results.csv" for path in (others[0] / "again", comparison[0]))
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("at", [1, 2])
def test_any_subset_can_be_compared(others, at):
    names = SUBSETS[at - 1]
    assert "label noise" in succeeded(others[1][at]).stdout
    assert len(rows(others[0] / names[0])) == len(names)


@pytest.mark.parametrize(
    ("at", "valid"),
    [
        (3, ("none", "value", "global", "leaf", "unit", "agc", "soft")),
        (4, ("clean", "label_noise", "spike", "nan", "nan_guarded")),
    ],
    ids=["clippers", "settings"],
)
def test_unknown_name_lists_the_valid_ones(others, at, valid):
    out, done = others[0], others[1][at]
    assert done.returncode == 2
    message = done.stderr[done.stderr.index("error:") :]
    assert "clean_and_global" in message
    assert all(f"{name}" in message for name in valid)
    assert not (out / "unknown").exists()


def test_optuna_workers_share_a_study(tmp_path):
    """The second worker finds what the first has told the database."""
    storage = f"sqlite:///{tmp_path}/search.db"
    for worker in ("1", "2"):
        options = ("--quick", "--trials", "1", "--seed", worker, "--storage", storage)
        done = succeeded(run("optuna_search.py", *options))
        assert re.search(rf"^{worker} trials in the study, 0 more diverged$", done.stdout, re.M)
    accuracies = [float(line.split()[2]) for line in done.stdout.splitlines()[1:-1]]
    assert len(accuracies) == 2
    assert accuracies == sorted(accuracies, reverse=True)
