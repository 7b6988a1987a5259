"""The examples that compare many runs, each in a small version of itself."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from tools.running import PNG, run, run_each, succeeded

pytestmark = pytest.mark.slow


def test_robustness_study_goes_on_where_it_stopped_and_fills_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- price -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    arguments = ("robustness_study.py", "--quick", "--out", tmp_path, "--page", page)
    done = succeeded(run(*arguments))
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
    again, other = run_each(arguments[0], arguments[1:], ("--out", tmp_path))
    succeeded(again)
    assert "plain, base" in done.stdout
    assert "plain, base" not in again.stdout
    assert other.returncode == 1
    assert "the folder holds a study with other settings" in other.stderr


LABEL_NOISE = ("per_example", "global", "phuber")


@pytest.fixture(scope="module")
def label_noise(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("label_noise")
    page = ("--markdown", str(out / "page.md"))
    done = succeeded(
        run("label_noise.py", "--quick", "--methods", *LABEL_NOISE, "--out", out, *page)
    )
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


def test_per_example_clipping_withstands_wrong_labels_where_global_clipping_does_not(tmp_path):
    """Three seeds, 40 % of the labels wrong; the example prints the same difference."""
    methods = ("global", "per_example")
    arguments = ("--noises", 0.4, "--methods", *methods, "--out", tmp_path)
    done = succeeded(run("label_noise.py", *arguments, hurry=False))
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    ends = {m: [x["curve"][-1] for x in record if x["method"] == m] for m in methods}
    assert len(ends["global"]) == len(ends["per_example"]) == 3
    batch, single = (100 * sum(ends[m]) / 3 for m in methods)
    assert single >= batch + 8
    printed = re.search(r"per-example clip over global clip, points: \+([\d.]+)", done.stdout)
    assert float(printed[1]) == pytest.approx(single - batch, abs=0.06)


def test_convergence_price_is_paid_by_strict_bounds(tmp_path):
    clippers, page = ("global", "per_example"), tmp_path / "page.md"
    page.write_text("<!-- price -->\n<!-- end -->\n", encoding="utf-8")
    out = ("--out", tmp_path, "--page", page)
    succeeded(run("convergence_price.py", "--quick", "--clippers", *clippers, *out))
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


def test_medical_diagnosis_reports_calibration_and_both_kinds_of_mistake(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- diagnosis -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    arguments = ("--quick", "--out", tmp_path, "--page", page)
    done = succeeded(run("medical_diagnosis.py", *arguments))
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
