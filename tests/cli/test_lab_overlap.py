"""kmixer lab overlap: recipes at initialisation, runs as they are, the toy; what it draws, keeps and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kmixer.analysis import overlap
from kmixer.analysis.figures import all_figures
from kmixer.experiments.arms import arms_of
from kmixer.runs.lab import OverlapRecord, lab_file, read_measurement
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.cli.test_lab import run_folder, transformer_file  # noqa: F401

QUICK = ("--inits", "2", "--windows", "2", "--window", "12")


def measured(kmixer: Run, *arguments: object) -> dict[str, Any]:
    answer = kmixer("lab", "overlap", *arguments, "--json")
    assert answer.code == 0, answer
    value: dict[str, Any] = json.loads(answer.out)
    return value


def test_a_recipe_has_a_curve_for_every_mixer_and_depth(
    kmixer_command: Run,
    transformer_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    figure = tmp_path / "overlap.svg"
    asked = (transformer_file, "--mixers", "softmax,k2", "--depth", "2,3", *QUICK)
    found = measured(kmixer_command, *asked, "--figure", figure)
    assert "<svg" in figure.read_text()
    names = ["softmax, 2 layers", "softmax, 3 layers", "k2, 2 layers", "k2, 3 layers"]
    assert [curve["name"] for curve in found["curves"]] == names
    softmax, _, k2, _ = found["curves"]
    assert (softmax["measured_only"], k2["theory"]) == (None, None)
    assert len(softmax["overlap"]) == len(softmax["theory"]) == len(softmax["across"]) == 3
    assert softmax["overlap"][0] == k2["overlap"][0]  # the embedding is the same
    assert softmax["overlap"][-1] > softmax["overlap"][0]
    assert list(softmax["groups"]) == ["1-8", "9-12"]
    assert measured(kmixer_command, *asked) == found
    text = kmixer_command("lab", "overlap", transformer_file, *QUICK).out
    assert "sequences of 12 positions" in text
    assert "excess at the top" in text
    assert "says nothing about its loss" in text


def test_a_run_is_measured_kept_and_drawn(kmixer_command: Run, run_folder: Path) -> None:  # noqa: F811
    found = measured(kmixer_command, run_folder, "--windows", "3", "--save")
    (curve,) = found["curves"]
    assert (curve["draws"], curve["theory"], len(curve["overlap"])) == (3, None, 5)
    assert json.loads(lab_file(RunFolder(run_folder), "overlap").read_text()).items() > found.items()
    assert read_measurement(RunFolder(run_folder), OverlapRecord) is not None
    assert "overlap" in [drawn.name for drawn in all_figures(arms_of([run_folder]))]
    lab_file(RunFolder(run_folder), "overlap").write_text('{"curves": []}')
    assert "lab-overlap.json holds no measurement" in kmixer_command("report", run_folder).error()


def test_fresh_weights_stand_beside_those_of_a_run(kmixer_command: Run, recipe_file: Path, run_folder: Path) -> None:  # noqa: F811
    (curve,) = measured(kmixer_command, run_folder, *QUICK)["curves"]
    (of_recipe,) = measured(kmixer_command, recipe_file, *QUICK)["curves"]
    assert curve["fresh"] == {**of_recipe, "name": "at initialisation"}
    assert curve["overlap"] != of_recipe["overlap"]
    lines = kmixer_command("lab", "overlap", run_folder, *QUICK).out.splitlines()
    assert any(line.endswith("fresh (excess)") for line in lines)
    assert any("; of fresh weights" in line for line in lines)


def test_runs_have_a_curve_each(kmixer_command: Run, run_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    figure, other = tmp_path / "overlap.svg", tmp_path / "two" / "run"
    shutil.copytree(run_folder, other)
    found = measured(kmixer_command, run_folder, other, *QUICK, "--figure", figure)
    assert [curve.pop("name") for curve in found["curves"]] == [str(run_folder), str(other)]
    assert found["curves"][0] == found["curves"][1]
    assert found["name"] == f"{run_folder}, {other}"
    assert figure.read_text().count("at initialisation</text>") == 2  # on the left and on the right, once
    (alone,) = measured(kmixer_command, run_folder, *QUICK)["curves"]
    assert (alone.pop("name"), alone) == ("trained", found["curves"][0])


def test_runs_of_different_lengths_are_refused(
    kmixer_command: Run,
    run_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    values = ("model.width=16", "model.layers=1", "training.steps=1", "training.warmup_steps=1")
    train(load_recipe("vit-digits", list(values)), tmp_path / "pictures")
    (curve,) = measured(kmixer_command, tmp_path / "pictures", "--inits", "2", "--windows", "2")["curves"]
    assert curve["fresh"]["positions"] == curve["positions"]
    refused = kmixer_command("lab", "overlap", run_folder, tmp_path / "pictures", "--inits", "1").error()
    assert "measure them one by one" in refused


def test_the_toy_stands_beside_its_laws(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "TOY_WIDTH", 16)
    monkeypatch.setattr(overlap, "TOY_TIME", 1.0)
    found = measured(kmixer_command, "--toy")
    for curve in found["curves"]:
        rows = zip(curve["overlap"], curve["theory"], curve["overlap_error"], strict=True)
        assert all(abs(value - law) <= 3 * error + 0.02 for value, law, error in rows)
    assert "none found" not in kmixer_command("lab", "overlap", "--toy").out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--depth", "x"), "--depth: got 'x'"),
        (("--save",), "--save and --corpus go with a run"),
        (("--toy",), "give runs or a recipe, or --toy alone"),
        (("--figure", "overlap.pdf"), "--figure: got overlap.pdf"),
        (("--mixers", "rnn"), "'rnn'"),
    ],
)
def test_wrong_options_are_one_line(
    kmixer_command: Run,
    transformer_file: Path,  # noqa: F811
    arguments: tuple[str, ...],
    why: str,
) -> None:
    assert why in kmixer_command("lab", "overlap", transformer_file, *arguments).error()


def test_what_does_not_go_together_is_refused(kmixer_command: Run, recipe_file: Path, run_folder: Path) -> None:  # noqa: F811
    assert "is no transformer" in kmixer_command("lab", "overlap", recipe_file, "--mixers", "softmax").error()
    assert "go with a recipe" in kmixer_command("lab", "overlap", run_folder, "--depth", "3").error()
    assert "give runs or a recipe" in kmixer_command("lab", "overlap").error()
    both = kmixer_command("lab", "overlap", run_folder, recipe_file).error()
    assert "a recipe goes alone" in both
    assert "got 2 runs" in kmixer_command("lab", "overlap", run_folder, run_folder, "--save").error()
