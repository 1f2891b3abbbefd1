"""kmixer train: what its options take and what it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kmixer.cli.progress import by_layer
from kmixer.runs.run_folder import RunFolder
from kmixer.training.trainer import Trainer
from tests.cli.conftest import Run


def test_a_run_begins_with_the_weights_of_another(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    assert kmixer_command("train", recipe_file, "--out", source).code == 0
    (tmp_path / "more.txt").write_text((tmp_path / "corpus.txt").read_text()[:9000])
    answer = kmixer_command("train", recipe_file, "--out", run, "--from", source, "--corpus", tmp_path / "more.txt")
    assert answer.code == 0, answer
    environment = json.loads((run / "environment.json").read_text())
    assert environment["from"]["path"] == str(source)
    assert RunFolder(run).read_recipe().data_path == tmp_path / "more.txt"
    other = kmixer_command("train", recipe_file, "--out", source, "--from", run, "--resume")
    assert "did not begin with these weights" in other.error()
    wider = kmixer_command("train", recipe_file, "--out", tmp_path / "x", "--from", source, "--set", "model.width=32")
    assert "model.width is 16 there and 32 in the recipe" in wider.error()
    assert (
        "nothing is not a run or model folder"
        in kmixer_command("train", recipe_file, "--out", tmp_path / "x", "--from", tmp_path / "nothing").error()
    )


def test_a_text_that_was_moved_is_named(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kmixer_command("train", recipe_file, "--out", run).code == 0
    moved = (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    answer = kmixer_command("train", recipe_file, "--out", run, "--resume")
    assert f"{tmp_path / 'corpus.txt'}, which is not there; --corpus FILE says where it is now" in answer.error()
    assert kmixer_command("train", recipe_file, "--out", run, "--resume", "--corpus", moved).code == 0


@pytest.mark.parametrize(("step", "said"), [(2, "keeps the run it held"), (4, "Continue with the same command")])
def test_an_interrupted_replacement_says_what_is_there(
    step: int, said: str, kmixer_command: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert kmixer_command("train", recipe_file, "--out", run).code == 0
    make_step = Trainer._step

    def interrupted(self: Trainer) -> Any:
        make_step(self)
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    answer = kmixer_command("train", recipe_file, "--out", run, "--force", "--seed", 3)
    assert (answer.code, said in answer.out) == (130, True), answer
    assert (RunFolder(run).results() is None) == (step == 4)


def test_a_warm_up_longer_than_training_is_one_line(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    answer = kmixer_command("train", recipe_file, "--out", tmp_path / "run", "--set", "training.steps=1")
    assert "training.warmup_steps 2 is longer than training.steps 1" in answer.error()


def test_a_run_goes_on_with_its_own_recipe(
    kmixer_command: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kmixer_command("train", recipe_file, "--out", "source").code == 0
    gate = ["--set", "model.output_gate=true", "--set", "training.steps=6"]
    answer = kmixer_command("train", "--from", "source", *gate)
    assert answer.code == 0, answer
    (line,) = [line for line in answer.out.splitlines() if line.startswith("begins with the weights of source; ")]
    assert "fresh: stack.blocks.{0,1}.mixer." in line
    assert "model.output_gate is False there and True in the recipe" in line
    recipe, there = (RunFolder(tmp_path / name).read_recipe().by_key() for name in ("runs/source-continued", "source"))
    changed = {key for key in recipe if recipe[key] != there[key]}
    assert changed == {"model.output_gate", "training.steps"}
    assert kmixer_command("train", "--from", "source", *gate, "--resume").code == 0
    assert kmixer_command("train", "--out", "runs/source-continued", "--resume").code == 0
    assert "cannot resume" in kmixer_command("train", "--from", "source", "--resume", "--set", "model.rank=3").error()
    assert "got neither RECIPE nor --from RUN" in kmixer_command("train").error()
    assert "has no recipe beside its weights" in kmixer_command("train", "--from", "shakespeare-small").error()


def test_names_that_differ_in_their_layer_are_one() -> None:
    names = ["a", "blocks.0.mixer.gate", "blocks.0.up", "blocks.3.mixer.gate", "b.1.c.2.d", "4.x"]
    assert by_layer(names) == ["a", "blocks.{0,3}.mixer.gate", "blocks.0.up", "b.1.c.2.d", "4.x"]
