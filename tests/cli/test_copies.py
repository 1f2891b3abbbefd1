"""A model that copies, on the command line: measured with the memory it was trained with, and with another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kmixer
from kmixer.measure.evaluation import evaluate
from kmixer.measure.texts import held_out
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values


@pytest.fixture
def copying(text_file: Path, tmp_path: Path) -> Path:
    """A run whose gates know the length of the match."""
    values: dict[str, Any] = tiny_recipe_values(text_file)
    values["model"]["copy_memory"] = {"match_length": "gate"}
    train(LanguageRecipe.parse(values, source="test"), tmp_path / "copying")
    return tmp_path / "copying"


def test_eval_takes_another_memory(kmixer_command: Run, copying: Path) -> None:
    trained = kmixer_command("eval", copying, "--window", 64)
    assert "windows of 64, state reset, copy memory of all tokens\n" in trained.out
    page = kmixer_command("eval", copying, "--window", 64, "--memory", 1024)
    assert page.out == trained.out.replace("all tokens", "1,024 tokens")  # no window reaches further

    model = kmixer.load(copying)
    assert model.tokenizer is not None and model.copy_memory is not None
    _, split = held_out(RunFolder(copying), model.tokenizer)
    for memory in (None, 4, 200):
        model.copy_memory.memory = memory
        chosen = () if memory is None else ("--memory", memory)
        for protocol in ("windows", "stream"):
            answer = json.loads(kmixer_command("eval", copying, "--json", "--protocol", protocol, *chosen).out)
            expected = evaluate(model, split, "windows" if protocol == "windows" else "stream", 32)
            assert answer == expected.to_json() | {"memory": memory}


def test_another_text_takes_another_memory(kmixer_command: Run, copying: Path, text_file: Path) -> None:
    losses = {}
    for memory in (2, 64):
        answer = kmixer_command("eval", copying, "--text", text_file, "--memory", memory, "--json").out
        losses[memory] = json.loads(answer)["loss"]
    assert losses[2] != losses[64]


def test_a_memory_that_does_not_fit(kmixer_command: Run, copying: Path, text_file: Path) -> None:
    for memory in (3, 0, -2):
        error = kmixer_command("eval", copying, "--memory", memory).error()
        assert f"memory: got {memory}; allowed: an even number of tokens from 2 on" in error
    error = kmixer_command("eval", "shakespeare-small", "--text", text_file, "--memory", 64).error()
    assert "memory: got 64; this model has no copy memory, leave it out" in error


def test_a_run_without_copies_says_nothing_of_a_memory(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    kmixer_command("train", recipe_file, "--out", tmp_path / "run")
    assert "memory" not in json.loads(kmixer_command("eval", tmp_path / "run", "--json").out)
    assert "copy memory" not in kmixer_command("eval", tmp_path / "run").out
    assert "has no copy memory" in kmixer_command("eval", tmp_path / "run", "--memory", 64).error()


def test_what_copies_are_worth_is_printed_and_drawn(kmixer_command: Run, copying: Path, tmp_path: Path) -> None:
    measured = json.loads(kmixer_command("analyze", copying, "--json").out)
    assert len(measured["copy_gate"]) == len(measured["copies"]["layers"]) == 2
    page = kmixer_command("analyze", copying).out.splitlines()
    header = next(i for i, line in enumerate(page) if line.startswith("copy gates by length of the match"))
    for layer, gates in enumerate(measured["copy_gate"]):
        assert page[header + 2 + layer].split() == [str(layer + 1), *(f"{gate:.3f}" for gate in gates)]
    rows = [line.split() for line in page[header + 5 :] if not line.startswith("loss at")]
    counted = [int(row[-5].replace(",", "")) for row in rows]
    assert counted == [*(count for count in measured["copies"]["positions"] if count), sum(counted[:-1])]
    assert float(rows[-1][-1]) == pytest.approx(float(rows[-1][-2]) - float(rows[-1][-3]), abs=2e-3)

    assert kmixer_command("report", copying, "--figures", tmp_path / "figures").code == 0
    report = (copying / "report.html").read_text()
    for name in ("copy-gates", "copies"):
        assert f'<figure id="{name}">' in report
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 1000
    assert "copy gate" in report
