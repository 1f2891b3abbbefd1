"""What a model learned is measured on its own text, wherever it lies, and on any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kmixer.analysis.analyze import analyze
from kmixer.errors import InputError
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.results import evaluations_of
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.conftest import tiny_recipe_values


@pytest.fixture
def run(text_file: Path, tmp_path: Path) -> Path:
    """A refined run, evaluated before its first step and after its last."""
    values = tiny_recipe_values(text_file)
    values["model"]["refinement"] = {"steps": 2}
    values["training"]["evaluate_every"] = 8
    train(LanguageRecipe.parse(values, source="test"), tmp_path / "run")
    return tmp_path / "run"


def best_of(run: Path) -> dict[str, Any]:
    """What was recorded of the best weights."""
    best = json.loads((run / "results.json").read_text())["best"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return best | next(line["dynamics"] for line in lines if line["step"] == best["step"] and "dynamics" in line)


def test_norms_of_gradients_and_updates_are_of_the_same_groups(run: Path) -> None:
    lines = [line for line in evaluations_of(RunFolder(run)) if line.gradient_norms]
    assert [line.step for line in lines] == [8]
    assert lines[0].update_norms is not None
    assert lines[0].gradient_norms is not None
    assert lines[0].gradient_norms.keys() == lines[0].update_norms.keys()


def test_it_is_what_training_recorded(run: Path, text_file: Path, tmp_path: Path) -> None:
    measured, recorded = analyze(run), best_of(run)
    assert measured["decay"] == recorded["decay"]
    assert measured["effective_window"][0][0] == pytest.approx(1 / (1 - measured["decay"][0][0]))
    assert measured["eta"] == pytest.approx(recorded["eta"])
    assert measured["loss_by_position"] == pytest.approx(recorded["loss_by_position"], rel=1e-6)

    moved = tmp_path / "elsewhere" / "text.txt"
    moved.parent.mkdir()
    shutil.move(text_file, moved)
    assert analyze(run, corpus=str(moved)) == measured  # the same text, so its validation part


@pytest.mark.parametrize("match_length", ["unused", "gate"])
def test_copies_are_what_training_recorded(text_file: Path, tmp_path: Path, match_length: str) -> None:
    values = tiny_recipe_values(text_file)
    values["model"]["copy_memory"] = {"layers": [1], "memory": 64, "match_length": match_length}
    train(LanguageRecipe.parse(values, source="test"), tmp_path / "copying")
    measured, recorded = analyze(tmp_path / "copying"), best_of(tmp_path / "copying")
    for name, values in recorded["copies"].items():
        assert measured["copies"][name] == (pytest.approx(values) if name.startswith("loss") else values)
    assert measured["copies"]["layers"] == [1]
    assert sum(measured["copies"]["positions"]) > 0
    assert measured["copy_gate"] == recorded["copy_gate"]


def test_another_text_is_measured_as_a_whole(run: Path, text: str, tmp_path: Path) -> None:
    other, short = tmp_path / "other.txt", tmp_path / "short.txt"
    other.write_text(text[:5000])
    short.write_text(text[:20])
    assert len(analyze(run, str(other))["loss_by_position"]) == 32  # the run's window
    assert len(analyze(run, str(other), window=64)["loss_by_position"]) == 64
    assert len(analyze(run, str(short))["loss_by_position"]) == 19  # all that there is
    with pytest.raises(InputError, match="a window of 64 needs 65 or more"):
        analyze(run, str(short), window=64)
    short.write_text("a")
    with pytest.raises(InputError, match="has 1 tokens"):
        analyze(run, str(short))
    short.write_text("語")
    with pytest.raises(InputError, match="the tokenizer does not know '語'"):
        analyze(run, str(short))


def test_a_packaged_model_and_a_model_folder(run: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text("KING:\nWhat is thy name, and wherefore art thou here?\n" * 10)
    measured = analyze(Path("shakespeare-small"), str(text), window=64)
    assert len(measured["decay"]) == 6
    assert len(measured["loss_by_position"]) == 64
    with pytest.raises(InputError, match="a model without its run, so without a text; give one with --text FILE"):
        analyze(Path("shakespeare-small"))

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(run / name, folder)
    measured = analyze(folder, str(text_file))
    assert measured["decay"] == best_of(run)["decay"]
    assert len(measured["loss_by_position"]) == 1024  # no run beside it says another window
