"""kmixer lab signal: recipes at initialisation, runs as they are, what it prints, draws, keeps and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kmixer.analysis.figures import all_figures
from kmixer.analysis.panels.signal import draw_signal
from kmixer.experiments.arms import arms_of
from kmixer.models.model_folder import PACKAGED
from kmixer.runs.lab import SignalRecord, lab_file, read_measurement
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values

QUICK = ("--inits", "2", "--inputs", "2", "--window", "12")


@pytest.fixture
def transformer_file(text_file: Path, tmp_path: Path) -> Path:
    values = tiny_recipe_values(text_file)
    values["model"] = {"kind": "transformer", "width": 16, "layers": 2, "heads": 2}
    path = tmp_path / "transformer.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


@pytest.fixture
def run_folder(recipe_file: Path, tmp_path: Path) -> Path:
    train(load_recipe(str(recipe_file)), tmp_path / "run")
    return tmp_path / "run"


def measured(kmixer: Run, *arguments: object) -> dict[str, Any]:
    answer = kmixer("lab", "signal", *arguments, "--json")
    assert answer.code == 0, answer
    value: dict[str, Any] = json.loads(answer.out)
    return value


def test_a_recipe_is_measured_at_every_depth(kmixer_command: Run, transformer_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "signal.svg"
    found = measured(kmixer_command, transformer_file, "--depths", "2,4", *QUICK, "--figure", figure)
    assert "<svg" in figure.read_text()
    assert (found["name"], found["trained"], found["positions"], found["seeds"]) == ("tiny", False, 12, [0, 1])
    assert [(curve["name"], len(curve["log_growth"])) for curve in found["curves"]] == [
        ("2 layers", 3),
        ("4 layers", 5),
    ]
    for curve in found["curves"]:
        assert curve["measured_only"] is None
        assert curve["agreement"] < 1.3
        assert curve["law"]["law"] == "shallow"
        assert len(curve["strengths"]) == curve["layers"]
        assert curve["log_growth"][-1] == curve["log_theory"][-1] == 0
        low, high = curve["total_interval"]
        assert low <= curve["total"] <= high
    again = measured(kmixer_command, transformer_file, "--depths", "2,4", *QUICK)
    assert again == found
    assert measured(kmixer_command, transformer_file, "--depths", "2,4", *QUICK, "--seed", "1") != found


def test_the_text_says_what_the_number_is(kmixer_command: Run, transformer_file: Path, recipe_file: Path) -> None:
    of_attention = kmixer_command("lab", "signal", transformer_file, *QUICK).out
    assert "sequences of 12 positions" in of_attention
    assert "it says nothing about training" in of_attention.replace("\n", " ")
    assert "theory: measured and predicted J differ by a factor of" in of_attention
    assert "too shallow to say" in of_attention
    assert "no defect" not in of_attention
    of_sums = kmixer_command("lab", "signal", recipe_file, *QUICK).out
    assert "measured only, no theory: K2Mixer" in of_sums
    assert "no defect" in of_sums


def test_symmetric_inputs_need_no_data(kmixer_command: Run, transformer_file: Path, text_file: Path) -> None:
    text_file.unlink()
    error = kmixer_command("lab", "signal", transformer_file, *QUICK).error()
    assert "--inputs symmetric needs no data" in error
    found = measured(kmixer_command, transformer_file, "--inits", "2", "--inputs", "symmetric", "--window", "12")
    (curve,) = found["curves"]
    assert (found["inputs"], curve["q_0"], curve["p_0"]) == ("symmetric", pytest.approx(1), pytest.approx(0.2))
    assert curve["agreement"] < 1.05


def test_classifiers_are_measured(kmixer_command: Run) -> None:
    found = measured(kmixer_command, "vit-digits", "--inits", "2", "--inputs", "2", "--set", "model.width=16")
    assert found["positions"] == 17
    assert found["curves"][0]["agreement"] < 1.2
    assert "--window" in kmixer_command("lab", "signal", "vit-digits", *QUICK).error()
    recipe = ("listops", "--inputs", "symmetric", "--inits", "2", "--window", "12")
    assert measured(kmixer_command, *recipe)["positions"] == 12


def test_a_run_is_measured_kept_and_drawn(kmixer_command: Run, run_folder: Path, tmp_path: Path) -> None:
    found = measured(kmixer_command, run_folder, "--inputs", "3", "--read-out", "--save")
    (curve,) = found["curves"]
    assert (curve["draws"], curve["log_theory"], len(curve["log_growth"])) == (3, None, 6)
    assert "have been trained" in curve["measured_only"]
    assert json.loads(lab_file(RunFolder(run_folder), "signal").read_text()).items() > found.items()
    assert kmixer_command("eval", run_folder).code == 0
    assert kmixer_command("pack", run_folder, "--out", tmp_path / "run.tar.gz").code == 0
    assert "signal" in [drawn.name for drawn in all_figures(arms_of([run_folder]))]
    lab_file(RunFolder(run_folder), "signal").write_text('{"curves": 1}')
    assert "lab-signal.json holds no measurement" in kmixer_command("report", run_folder).error()


def test_the_printed_json_is_what_a_report_reads(kmixer_command: Run, run_folder: Path) -> None:
    answer = kmixer_command("lab", "signal", run_folder, "--inputs", "2", "--json")
    lab_file(RunFolder(run_folder), "signal").write_text(answer.out)
    record = read_measurement(RunFolder(run_folder), SignalRecord)
    assert record is not None
    assert draw_signal(record).axes


def test_a_model_folder_takes_symmetric_inputs(kmixer_command: Run) -> None:
    name = PACKAGED / "shakespeare-small"
    assert "--inputs symmetric" in kmixer_command("lab", "signal", name).error()
    assert "keeps no measurements" in kmixer_command("lab", "signal", name, "--save").error()
    found = measured(kmixer_command, name, "--inputs", "symmetric", "--window", "8", "--probes", "1")
    assert found["trained"]
    assert math.isfinite(found["curves"][0]["total"])


def test_every_norm_and_alpha_has_a_curve(kmixer_command: Run, transformer_file: Path) -> None:
    asked = (transformer_file, *QUICK, "--norm", "rms,dyt,derf", "--alpha", "0.3,0.5")
    found = measured(kmixer_command, *asked)
    names = [curve["name"].partition(",")[0] for curve in found["curves"]]
    assert names == ["rms", "dyt 0.3", "dyt 0.5", "derf 0.3", "derf 0.5"]
    assert all(curve["agreement"] < 1.3 for curve in found["curves"])
    assert found["curves"][0]["warning"] is None
    assert all("of RMSNorm's" in curve["warning"] for curve in found["curves"][1:])  # q_0 is 4e-4


def test_matched_norms_begin_as_strong_as_rms(kmixer_command: Run, transformer_file: Path) -> None:
    asked = (transformer_file, *QUICK, "--set", "model.norm.kind=dyt", "--set", "model.norm.match=unit")
    found = measured(kmixer_command, *asked, "--norm", "rms,dyt,derf")
    rms, *bounded = found["curves"]
    assert [curve["name"] for curve in found["curves"]] == ["rms, 2 layers", "dyt, 2 layers", "derf, 2 layers"]
    for curve in bounded:
        assert curve["warning"] is None
        assert curve["agreement"] < 1.3
        assert curve["q"][-1] == pytest.approx(rms["q"][-1], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--depths", "2,x"), "--depths: got '2,x'"),
        (("--depths", "0"), "--depths: got '0'"),
        (("--inputs", "none"), "--inputs: got 'none'"),
        (("--alpha", "0.5"), "--alpha goes with --norm dyt or derf"),
        (("--figure", "signal.pdf"), "--figure: got signal.pdf"),
        (("--save",), "--save and --corpus go with a run"),
        (("--read-out",), "only a K-Stack ends in one"),
        (("--window", "1000000"), "--window: got 1000000"),
        (("--inputs", "symmetric", "--window", "17"), "got 17 positions of width 16"),
    ],
)
def test_wrong_options_are_one_line(
    kmixer_command: Run, transformer_file: Path, arguments: tuple[str, ...], why: str
) -> None:
    assert why in kmixer_command("lab", "signal", transformer_file, *arguments).error()


def test_options_of_a_recipe_are_refused_for_a_run(kmixer_command: Run, run_folder: Path) -> None:
    assert "go with a recipe" in kmixer_command("lab", "signal", run_folder, "--depths", "3").error()
    assert "no such recipe" in kmixer_command("lab", "signal", "nothing-of-this-name").error()
