"""The examples that train one model: each runs as its docstring says, and without a warning."""

import json
import re

import numpy as np
import pytest
from tools.running import PNG, run, succeeded

pytestmark = pytest.mark.slow


def test_flax_linen_prints_loss_and_statistics():
    done = succeeded(run("flax_linen.py"))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    for field in ("count", "pre_clip_norm", "clipped_count", "nonfinite_count"):
        assert re.search(rf"{field} +\d", done.stdout)


def test_equinox_loop_learns_and_counts():
    done = succeeded(run("equinox_loop.py"))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0]
    assert re.search(r"of 300 steps clipped", done.stdout)


def test_grain_finds_the_record_that_stopped_a_step():
    done = succeeded(run("nnx_grain.py"))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+|nan)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    left_out = [int(x) for x in re.findall(r"(\d+) left out", done.stdout)]
    assert 1 < left_out[0] < left_out[-1]
    assert re.findall(r"first left out: step \d+, for record (\d+)", done.stdout) == ["1000"]


def test_unstable_training_needs_a_clipper(tmp_path):
    arguments = ("--quick", "--clippers", "none", "zclip", "--out", tmp_path)
    done = succeeded(run("unstable_training.py", *arguments, hurry=False))
    assert "steps clipped" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["clippers"]
    assert found["zclip"]["final"] < 3
    assert not found["none"]["final"] < 10
    assert (tmp_path / "unstable_training.png").read_bytes().startswith(PNG)


def test_two_spikes_are_each_survived_by_one_line(tmp_path):
    """In neither is the gradient much longer than usual."""
    done = succeeded(run("two_spikes.py", "--out", tmp_path, hurry=False))
    assert "skip_outliers(adam) " in done.stdout
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for accident, spike in (("loss", 100), ("update", 20)):
        plain, gradient, cured = found[accident].values()
        assert plain["spike"] > spike
        assert plain["gradient"] < 3
        assert min(plain["worst"], gradient["worst"]) > 2 * cured["worst"]
        assert cured["worst"] < 2 * cured["before"]
    assert (tmp_path / "two_spikes.png").read_bytes().startswith(PNG)


def test_batch_size_measures_what_its_page_shows(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- steps -->\n<!-- end -->\n<!-- noise -->\nold\n<!-- end -->\n", "utf-8")
    quick = ("--sizes", 16, 64, 256, "--steps", 40, "--out", tmp_path, "--page", page)
    done = succeeded(run("batch_size.py", *quick))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    steps = [row["steps"] for row in found["digits"]]
    assert steps[0] > 2 * steps[1] > 2 * steps[2]
    assert 1 / 3 < found["noise"]["whole"] / found["knee"]["size"] < 3
    whole, norm = (found["transformer"][k] for k in ("whole", "norm"))
    assert len(whole) == 40
    assert whole[-1] > 1.5 * whole[0]  # it grows
    assert 0.5 < norm[-1] / whole[-1] < 2
    assert f"| transformer, step 40 | {whole[-1]:.1f} | {norm[-1]:.1f} |" in done.stdout
    assert "old" not in page.read_text("utf-8")
    assert (tmp_path / "batch_size.png").read_bytes().startswith(PNG)


def test_mucon_with_a_small_bound_is_muon(tmp_path):
    quick = ("--steps", 30, "--taus", 1e-3, 1.0, "--out", tmp_path)
    done = succeeded(run("mucon.py", *quick))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    adam, muon, small, large = (np.mean(x[-5:]) for x in found.values())
    assert adam < 4 < found["Adam"][0]
    assert small == pytest.approx(muon, abs=0.1)
    assert large > small + 0.2
    assert "MuCon, tau 0.001" in done.stdout
    assert (tmp_path / "mucon.png").read_bytes().startswith(PNG)


def test_fsdp_transformer_learns_with_everything_split_but_the_statistics():
    done = succeeded(run("fsdp_transformer.py", "--quick"))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 3 < losses[0]
    assert "8 devices" in done.stdout
    for name in ("agc", "clip_by_global_norm"):
        assert re.search(rf"{name}: norm [\d.]+, \d+% of steps clipped", done.stdout)
    for name in ("a kernel", "its first moment"):
        assert f"{name}: (64, 256), P('data',), (8, 256) on each device" in done.stdout
    assert "a clipper's norm: P()" in done.stdout


def test_driving_needs_clipping(tmp_path):
    done = succeeded(run("driving_bptt.py", "--quick", "--out", tmp_path))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    bare, *clipped = found
    assert [row["clipped"] for row in found] == ["none", "the gradient", "each step's"]
    assert len({row["rate"] for row in found}) == 1
    assert bare["on_road"] < 0.1
    for row in clipped:
        assert row["on_road"] > 0.95
        assert row["rms"] < 0.3
    whole, steps = (row["norms"] for row in clipped)
    assert whole[2] > 1e3 * whole[1]
    assert steps[2] < 1e-2 * whole[2]
    assert re.search(r"none +2e-02 +0 +0%", done.stdout)
    assert (tmp_path / "driving.png").read_bytes().startswith(PNG)


def test_qk_clip_holds_logits_that_explode(tmp_path):
    done = succeeded(run("qk_clip.py", "--quick", "--out", tmp_path))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    calm, calm_clipped, bare, clipped = found
    assert [row["rate"] for row in found] == [0.02, 0.02, 0.1, 0.1]
    assert [row["qk_clip"] for row in found] == [False, True, False, True]
    assert calm["clipped"] == calm_clipped["clipped"] == 0
    assert calm["loss"] == calm_clipped["loss"]
    assert bare["logit"] > 400
    assert clipped["most"] < 200
    assert clipped["clipped"] > 0.3
    assert "4 runs" in done.stdout
    assert (tmp_path / "qk_clip.png").read_bytes().startswith(PNG)


def test_dp_sgd_prints_epsilon_delta_and_accuracy(tmp_path):
    picture = tmp_path / "made" / "dp_sgd.png"
    every = ("--noise", "1", "--steps", "60", "--print-every", "30")
    done = succeeded(run("dp_sgd.py", *every, "--plot", picture))
    assert "failed to converge" not in done.stderr
    assert picture.read_bytes().startswith(PNG)
    found = re.findall(r"epsilon ([\d.]+), delta ([\d.e-]+), accuracy ([\d.]+)%", done.stdout)
    epsilons, deltas, accuracies = zip(*(map(float, row) for row in found), strict=True)
    assert 0 < epsilons[0] < epsilons[1] < 6
    assert set(deltas) == {1e-4}
    assert accuracies[-1] > 75
