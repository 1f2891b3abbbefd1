"""kmixer train: what its options take and what it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

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
    both = kmixer_command("train", recipe_file, "--out", run, "--from", source, "--resume")
    assert "give one of them" in both.error()
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
