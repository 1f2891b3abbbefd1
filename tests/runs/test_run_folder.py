"""A run folder: nothing is overwritten, one process trains into it, and damage is noticed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kmixer.errors import InputError
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import Reporter, train
from tests.training.test_loop import CrashError, StopAfter, make_recipe


def test_two_processes_do_not_train_into_one_folder(text_file: Path, tmp_path: Path) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with RunFolder(run).held():
        for how in ({"resume": True}, {"force": True}):
            with pytest.raises(InputError, match="run is being run by another process; wait for it or stop it"):
                train(recipe, run, **how)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert [path.name for path in tmp_path.glob(".run*")] == []


def test_a_link_stays_one_and_the_current_folder_is_not_replaced(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    train(make_recipe(text_file), link)
    train(make_recipe(text_file), link, force=True)
    assert link.is_symlink()
    assert RunFolder(real).results() is not None
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="is the current folder"):
        train(make_recipe(text_file), Path())


def test_a_run_is_neither_overwritten_nor_resumed_with_another_recipe(text_file: Path, tmp_path: Path) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=r"holds a run; add --resume to continue it, --force to replace it"):
        train(recipe, run)
    changed = make_recipe(text_file, learning_rate=0.02)
    with pytest.raises(InputError, match=r"training\.learning_rate is 0\.01 in the run and 0\.02 now"):
        train(changed, run, resume=True)
    missing = make_recipe(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="no such file or folder"):
        train(missing, run, force=True)
    with pytest.raises(InputError, match=r"a window of 30000 needs 30001 or more"):
        train(make_recipe(text_file, window=30000), run, force=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    train(changed, run, force=True)
    assert RunFolder(run).read_recipe().training.learning_rate == 0.02


def test_a_folder_that_is_not_a_run_is_left_alone(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for options in ({}, {"force": True}):
        with pytest.raises(InputError, match="exists and is not a run; choose another --out"):
            train(make_recipe(text_file), tmp_path / "thesis", **options)
    with pytest.raises(InputError, match="holds no run"):
        train(make_recipe(text_file), tmp_path / "nothing", resume=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


class StopAtTheStart(Reporter):
    def started(self, *args: Any) -> None:
        raise CrashError


def test_a_run_takes_its_place_with_its_first_checkpoint(text_file: Path, tmp_path: Path) -> None:
    """Killed before that, it leaves nothing in its place, and a run that is there as it was."""
    recipe, run = make_recipe(text_file), tmp_path / "run"
    with pytest.raises(CrashError):
        train(recipe, run, reporter=StopAtTheStart())
    assert not run.exists()
    train(recipe, run)
    (run / "notes.txt").write_text("a file of the user")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    changed = make_recipe(text_file, learning_rate=0.02)
    with pytest.raises(CrashError):
        train(changed, run, force=True, reporter=StopAtTheStart())
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    train(changed, run, force=True)
    assert (run / "notes.txt").read_text() == "a file of the user"
    vocabulary = len(set(text_file.read_text()))
    tokenizer = changed.tokenizer.model_copy(update={"vocabulary_size": vocabulary})
    assert RunFolder(run).read_recipe() == changed.model_copy(update={"tokenizer": tokenizer})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.txt", "run"]


def test_a_forced_run_that_cannot_be_written_leaves_the_old_one(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    sync, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        train(recipe, run, force=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_is_not_resumed_on_another_text(text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file)
    with pytest.raises(CrashError):
        train(recipe, tmp_path / "run", reporter=StopAfter(4))
    text_file.write_text(text_file.read_text()[::-1])
    with pytest.raises(InputError, match=r"cannot resume .*: the data is not what it was"):
        train(recipe, tmp_path / "run", resume=True)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damage_to_the_best_weights_is_noticed_on_resuming(file: str, text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe(text_file)
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / file).write_text("x")
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        train(recipe, tmp_path / "run", resume=True)


def test_weights_are_not_taken_for_a_checkpoint(text_file: Path, tmp_path: Path) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    (run / "checkpoints/last.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="is not a checkpoint of a run"):
        train(recipe, run, resume=True)


@pytest.mark.parametrize("damage", ["shortened", "edited"])
def test_damaged_metrics_are_noticed(damage: str, text_file: Path, tmp_path: Path) -> None:
    recipe, run = make_recipe(text_file), tmp_path / "run"
    train(recipe, run)
    content = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(content[:-30] if damage == "shortened" else content.replace("0", "1", 1))
    with pytest.raises(InputError, match=r"metrics\.jsonl was shortened or edited"):
        train(recipe, run, resume=True)


def test_a_run_folder_holds_what_it_should(text_file: Path, tmp_path: Path) -> None:
    train(make_recipe(text_file, steps=2), tmp_path / "run")
    files = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files == {
        "recipe.toml",
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "metrics.jsonl",
        "environment.json",
        "results.json",
        "checkpoints/last.safetensors",
    }
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert len(environment["corpus_sha256"]) == 64
