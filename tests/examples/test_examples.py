"""Every example runs, as its docstring says to run it, and without a warning."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def compare(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = run("compare_clippers.py", "--quick", "--seeds", "1", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    return done


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return {(row["setting"], row["clipper"]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a small comparison."""
    out = tmp_path_factory.mktemp("comparison") / "made" / "here"
    settings = ("spike", "nan", "nan_guarded")
    done = compare(out, "--clippers", "global", "none", "--settings", *settings)
    return out, done.stdout


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


@pytest.mark.slow
def test_same_seeds_give_the_same_csv(comparison, tmp_path):
    settings = ("spike", "nan", "nan_guarded")
    compare(tmp_path, "--clippers", "none", "global", "--settings", *settings)
    again, first = (path / "results.csv" for path in (tmp_path, comparison[0]))
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("clippers", [["none"], ["agc", "unit", "leaf", "value", "soft"]])
def test_any_subset_can_be_compared(tmp_path, clippers):
    done = compare(tmp_path, "--clippers", *clippers, "--settings", "label_noise")
    assert "label noise" in done.stdout
    assert len(rows(tmp_path)) == len(clippers)


@pytest.mark.parametrize(
    ("option", "valid"),
    [
        ("--clippers", ("none", "value", "global", "leaf", "unit", "agc", "soft")),
        ("--settings", ("clean", "label_noise", "spike", "nan", "nan_guarded")),
    ],
)
def test_unknown_name_lists_the_valid_ones(tmp_path, option, valid):
    done = run("compare_clippers.py", option, "clean_and_global", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    message = done.stderr[done.stderr.index("error:") :]
    assert "clean_and_global" in message
    assert all(f"{name}" in message for name in valid)
    assert not (tmp_path / "out").exists()


def test_flax_linen_prints_loss_and_statistics():
    done = run("flax_linen.py")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    for field in ("count", "pre_clip_norm", "clipped_count", "nonfinite_count"):
        assert re.search(rf"{field} +\d", done.stdout)


def test_equinox_loop_learns_and_counts():
    done = run("equinox_loop.py")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert re.search(r"of 300 steps clipped", done.stdout)


@pytest.mark.slow
def test_unstable_training_needs_a_clipper(tmp_path):
    done = run("unstable_training.py", "--quick", "--clippers", "none", "zclip", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "steps clipped" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["clippers"]
    assert found["zclip"]["final"] < 3
    assert not found["none"]["final"] < 10
    assert (tmp_path / "unstable_training.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_fsdp_transformer_learns_with_everything_split_but_the_statistics():
    done = run("fsdp_transformer.py", "--quick")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 3 < losses[0]
    assert "8 devices" in done.stdout
    for name in ("agc", "clip_by_global_norm"):
        assert re.search(rf"{name}: norm [\d.]+, \d+% of steps clipped", done.stdout)
    for name in ("a kernel", "its first moment"):
        assert f"{name}: (64, 256), P('data',), (8, 256) on each device" in done.stdout
    assert "a clipper's norm: P()" in done.stdout


def test_driving_needs_clipping(tmp_path):
    done = run("driving_bptt.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    bare, clipped = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (bare["clipped"], clipped["clipped"]) == (False, True)
    assert bare["rate"] == clipped["rate"]
    assert bare["on_road"] < 0.1
    assert clipped["on_road"] > 0.95
    assert clipped["rms"] < 0.3
    assert clipped["norms"][2] > 1e3 * clipped["norms"][1]
    assert re.search(r"none +2e-02 +0 +0%", done.stdout)
    assert (tmp_path / "driving.png").read_bytes().startswith(PNG)


def test_robustness_study_goes_on_where_it_stopped_and_fills_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- price -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    arguments = ("robustness_study.py", "--quick", "--out", str(tmp_path), "--page", str(page))
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4 * 6 * 2
    stress = {k: [float(r["accuracy"]) for r in found if (r["setting"], r["variant"]) == k]
              for k in (("stress", "none"), ("stress", "per-example"))}  # fmt: skip
    assert max(stress["stress", "none"]) < 0.7 < min(stress["stress", "per-example"])
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert re.search(
        r"before\n<!-- price -->\n\n\| bound[^<]*\| 0.003 [^<]*<!-- end -->\nafter", text
    )
    for name in ("stability", "sensitivity", "price"):
        assert (tmp_path / f"robustness_{name}.png").read_bytes().startswith(PNG)
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert "plain, base" in done.stdout
    assert "plain, base" not in again.stdout
    other = run("robustness_study.py", "--out", str(tmp_path))
    assert "the folder holds a study with other settings" in other.stderr


def test_dp_sgd_prints_epsilon_delta_and_accuracy(tmp_path):
    picture = tmp_path / "made" / "dp_sgd.png"
    done = run("dp_sgd.py", "--steps", "60", "--print-every", "30", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(PNG)
    found = re.findall(r"epsilon ([\d.]+), delta ([\d.e-]+), accuracy ([\d.]+)%", done.stdout)
    epsilons, deltas, accuracies = zip(*(map(float, row) for row in found), strict=True)
    assert 0 < epsilons[0] < epsilons[1] < 5
    assert set(deltas) == {1e-4}
    assert accuracies[-1] > 75


LABEL_NOISE = ("per_example", "global", "phuber")


@pytest.fixture(scope="module")
def label_noise(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("label_noise")
    page = ("--markdown", str(out / "page.md"))
    done = run("label_noise.py", "--quick", "--methods", *LABEL_NOISE, "--out", str(out), *page)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_label_noise_writes_its_files_and_the_table(label_noise):
    out, printed = label_noise
    assert {path.name for path in out.iterdir()} == {
        "label_noise.png",
        "page.md",
        "report.html",
        "results.json",
    }
    assert (out / "label_noise.png").read_bytes().startswith(PNG)
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = {(x["method"], x["noise"]): x["curve"][-1] for x in record}
    assert set(found) == {(method, noise) for method in LABEL_NOISE for noise in (0.0, 0.4)}
    for method in LABEL_NOISE:
        assert found[method, 0.0] > 0.9
    line = next(x for x in printed.splitlines() if x.startswith("PHuber"))
    shown = [f"{100 * found['phuber', noise]:.1f}" for noise in (0.0, 0.4)]
    assert line.split()[-2:] == shown
    page = (out / "page.md").read_text(encoding="utf-8")
    assert f"| PHuber, tau 2 | {shown[0]} ± 0.0 | {shown[1]} ± 0.0 |" in page
    aside = page[page.index("standardised pixels") :]
    assert len(re.findall(r"^\| \+ .* \| [\d.]+ ± 0\.0 \|$", aside, flags=re.MULTILINE)) == 2


@pytest.mark.slow
def test_per_example_clipping_withstands_wrong_labels_where_global_clipping_does_not(tmp_path):
    """Three seeds, 40 % of the labels wrong; the example prints the same difference."""
    methods = ("global", "per_example")
    done = run("label_noise.py", "--noises", "0.4", "--methods", *methods, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    ends = {m: [x["curve"][-1] for x in record if x["method"] == m] for m in methods}
    assert len(ends["global"]) == len(ends["per_example"]) == 3
    batch, single = (100 * sum(ends[m]) / 3 for m in methods)
    assert single >= batch + 8
    printed = re.search(r"per-example clip over global clip, points: \+([\d.]+)", done.stdout)
    assert float(printed[1]) == pytest.approx(single - batch, abs=0.06)


@pytest.mark.slow
def test_convergence_price_is_paid_by_strict_bounds(tmp_path):
    clippers, page = ("global", "per_example"), tmp_path / "page.md"
    page.write_text("<!-- price -->\n<!-- end -->\n", encoding="utf-8")
    out = ("--out", str(tmp_path), "--page", str(page))
    done = run("convergence_price.py", "--quick", "--clippers", *clippers, *out)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "convergence_price.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    by_clipper = {x["clipper"]: [y for y in record if y["clipper"] == x["clipper"]] for x in record}
    assert set(by_clipper) == set(clippers)
    for clipper, rows in by_clipper.items():
        strict, *_, none = rows
        assert (strict["clipped"], none["clipped"]) == (1, 0)
        assert strict["accuracy"] < 0.5 < 0.9 < none["accuracy"]
        assert strict["steps"] == math.inf > none["steps"]
        assert none["cosine"] == pytest.approx(1, abs=1e-5)
        cell = f"{100 * none['accuracy']:.1f} ± 0.0; {none['steps']:.0f}; 1.00; 0 %"
        assert re.search(rf"^\| none \|.* {cell} \|", page.read_text("utf-8"), re.MULTILINE)
        turned = min(row["cosine"] for row in rows)
        assert turned == pytest.approx(1, abs=1e-5) if clipper == "global" else turned < 0.995


@pytest.mark.slow
def test_medical_diagnosis_reports_calibration_and_both_kinds_of_mistake(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- diagnosis -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    arguments = ("--quick", "--out", str(tmp_path), "--page", str(page))
    done = run("medical_diagnosis.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "medical_diagnosis.png").read_bytes().startswith(PNG)
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [x["seed"] for x in record if x["method"] == "global"] == [0, 1, 2]
    for row in record:
        assert row["sensitivity"] > 75
        assert row["specificity"] > 85
        assert 0 < row["brier"] < 0.1
        assert 0 < row["calibration"] < 0.15
    head, bare, *_ = done.stdout.splitlines()
    for title in ("sensitivity", "specificity", "Brier score", "calibration error", "threshold"):
        assert title in head
    mean = sum(x["sensitivity"] for x in record if x["method"] == "none") / 3
    assert bare.split()[2:4] == [f"{mean:.1f}", "±"]
    by_method = {m: [x["brier"] for x in record if x["method"] == m] for m in ("none", "global")}
    change = sum(by_method["global"]) / 3 - sum(by_method["none"]) / 3
    *_, means, differences = re.findall(
        r"^\| global norm \|(?:[^|]*\|){2} (\S+) ±", page.read_text("utf-8"), re.MULTILINE
    )
    assert float(means) == pytest.approx(sum(by_method["global"]) / 3, abs=6e-4)
    assert float(differences) == pytest.approx(change, abs=6e-4)
    assert "old" not in page.read_text("utf-8")


@pytest.mark.slow
def test_optuna_workers_share_a_study(tmp_path):
    """The second worker finds what the first has told the database."""
    storage = f"sqlite:///{tmp_path}/search.db"
    for worker in ("1", "2"):
        options = ("--quick", "--trials", "1", "--seed", worker, "--storage", storage)
        done = run("optuna_search.py", *options)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"^{worker} trials in the study, 0 more diverged$", done.stdout, re.M)
    accuracies = [float(line.split()[2]) for line in done.stdout.splitlines()[1:-1]]
    assert len(accuracies) == 2
    assert accuracies == sorted(accuracies, reverse=True)
