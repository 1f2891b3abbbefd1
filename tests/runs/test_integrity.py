"""A run knows its own files: a changed one, or one of another run, is one line that names it; old runs are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kmixer
from kmixer.cli.analysis import analyze
from kmixer.cli.evaluate import evaluate
from kmixer.errors import InputError
from kmixer.files import write_json
from kmixer.runs.check import check_run
from kmixer.runs.integrity import sealed
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors, save_tensors
from kmixer.training.loop import train
from tests.training.test_loop import CrashError, StopAfter, make_recipe

CHANGED = "was changed after the run wrote it, or is of another run"
CUT = "was shortened or edited since the last checkpoint; restore it from a copy"


@pytest.fixture
def run(text_file: Path, tmp_path: Path) -> Path:
    train(make_recipe(text_file), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def other(text_file: Path, tmp_path: Path) -> Path:
    """The same recipe but for the seed."""
    train(make_recipe(text_file, seed=7), tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def begun(text_file: Path, tmp_path: Path) -> Path:
    """A run that was killed."""
    with pytest.raises(CrashError):
        train(make_recipe(text_file), tmp_path / "begun", reporter=StopAfter(5))
    return tmp_path / "begun"


def readers(run: Path, text_file: Path) -> dict[str, Callable[[], object]]:
    """What the commands read of a run."""
    folder = RunFolder(run)
    return {
        "generate": lambda: kmixer.load(run),
        "eval": lambda: evaluate(run),
        "analyze": lambda: analyze(run),
        "compare": lambda: (folder.read_recipe(), folder.results()),
        "report": lambda: (folder.read_recipe(), folder.results(), folder.read_metrics()),
        "pack": lambda: check_run(folder),
        "resume": lambda: train(make_recipe(text_file), run, resume=True),
    }


def assert_noticed(run: Path, text_file: Path, message: str, *commands: str) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in commands:
        with pytest.raises(InputError, match=message) as error:
            readers(run, text_file)[command]()
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("state", ["run", "begun"])
def test_weights_of_another_seed(state: str, text_file: Path, other: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(state)
    shutil.copy(other / "model.safetensors", run / "model.safetensors")
    message = rf"model\.safetensors {CHANGED}; restore it from a copy"
    assert_noticed(run, text_file, message, "generate", "eval", "analyze", "pack", "resume")
    if state == "run":
        assert_noticed(run, text_file, message, "compare", "report")


@pytest.mark.parametrize("state", ["run", "begun"])
def test_a_checkpoint_and_metrics_of_another_seed(
    state: str, text_file: Path, other: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(state)
    for name in ("checkpoints/last.safetensors", "metrics.jsonl"):
        shutil.copy(other / name, run / name)
    assert_noticed(run, text_file, rf"(last\.safetensors {CHANGED})|(metrics\.jsonl {CUT})", "pack", "resume", "report")


@pytest.mark.parametrize("state", ["run", "begun"])
@pytest.mark.parametrize(
    ("old", "new"), [("validation = 0.1", "validation = 0.9"), ("for tests", "for other tests"), ("\n", "\n\n")]
)
def test_an_edited_recipe(state: str, old: str, new: str, text_file: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(state)
    text = (run / "recipe.toml").read_text()
    assert old in text
    (run / "recipe.toml").write_text(text.replace(old, new, 1))
    message = rf"recipe\.toml {CHANGED}; restore it from a copy, or train another run"
    assert_noticed(run, text_file, message, "generate", "eval", "analyze", "compare", "report", "pack", "resume")


def test_edited_results(run: Path, text_file: Path, other: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results["best"]["validation"][0]["loss"] -= 0.1
    write_json(run / "results.json", results)
    message = rf"results\.json {CHANGED}; restore it from a copy, or remove it: kmixer train --resume measures again"
    assert_noticed(run, text_file, message, "generate", "compare", "report", "pack", "resume")
    shutil.copy(other / "results.json", run / "results.json")
    assert_noticed(run, text_file, message, "compare", "report", "pack", "resume")
    (run / "results.json").unlink()
    assert train(make_recipe(text_file), run, resume=True).finished
    check_run(RunFolder(run))


@pytest.mark.parametrize("state", ["run", "begun"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted", "edited"])
def test_damaged_metrics(state: str, damage: str, text_file: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(state)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    if damage == "deleted":
        metrics.unlink()
    else:
        left = {"cut": lines[:2], "emptied": [], "edited": [lines[0].replace("0", "1", 1), *lines[1:]]}[damage]
        metrics.write_text("".join(left))
    message = rf"metrics\.jsonl ({CUT}|is missing; restore it from a copy)"
    assert_noticed(run, text_file, message, "report", "pack", "resume")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "environment.json"])
def test_other_edited_files(name: str, run: Path, text_file: Path) -> None:
    """White space alone is no other configuration, yet it is not what the run wrote."""
    (run / name).write_text((run / name).read_text() + "\n")
    assert_noticed(run, text_file, rf"{name} {CHANGED}; restore it from a copy", "generate", "pack", "resume")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "environment.json"])
def test_other_missing_files(name: str, run: Path, text_file: Path) -> None:
    (run / name).unlink()
    assert_noticed(run, text_file, rf"{name} is missing", "generate", "compare", "report", "pack", "resume")


def test_damage_within_weights_or_checkpoint_is_found_before_packing(run: Path) -> None:
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        with pytest.raises(InputError, match="was changed after it was written"):
            check_run(RunFolder(run))
        (run / name).write_bytes(content)
    check_run(RunFolder(run))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value: float, run: Path, text_file: Path) -> None:
    tensors, metadata = load_tensors(run / "model.safetensors")
    tensors["embedding.weight"][3, 2] = value
    save_tensors(run / "model.safetensors", tensors, metadata)
    for command in ("generate", "eval", "analyze"):
        with pytest.raises(InputError, match=r"tensor embedding\.weight holds numbers that are not finite"):
            readers(run, text_file)[command]()
    (run / "results.json").unlink()  # which holds the sha256 of the weights
    if value != torch.inf:
        with pytest.raises(InputError, match="holds numbers that are not finite"):
            check_run(RunFolder(run))


@pytest.mark.parametrize("state", ["run", "begun"])
def test_a_run_made_before_files_knew_it(state: str, text_file: Path, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(state)
    environment = json.loads((run / "environment.json").read_text())
    del environment["recipe_sha256"]
    write_json(run / "environment.json", environment)
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        tensors, metadata = load_tensors(run / name)
        (metadata["about"] if name == "model.safetensors" else metadata).pop("recipe_sha256")
        save_tensors(run / name, tensors, metadata)
    if state == "run":
        results = json.loads((run / "results.json").read_text())
        write_json(
            run / "results.json", {k: v for k, v in results.items() if k not in ("recipe_sha256", "files", "sha256")}
        )
    for command in ("generate", "eval", "report", "pack", "resume", "generate", "eval", "report", "pack", "resume"):
        readers(run, text_file)[command]()


def test_a_record_without_weights(run: Path, text_file: Path) -> None:
    """Records of runs are kept without weights and checkpoint."""
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    for command in ("compare", "report"):
        readers(run, text_file)[command]()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        readers(run, text_file)["report"]()


def test_sealing_again_is_the_same(run: Path) -> None:
    results = RunFolder(run).results()
    assert results is not None
    assert sealed(run, results) == results
