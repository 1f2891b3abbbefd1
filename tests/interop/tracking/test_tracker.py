"""Trackers are told of every line, in order; one that fails is left out, and one that is missing is named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kmixer.cli.progress import TrackingReporter
from kmixer.cli.track import name_of
from kmixer.errors import InputError
from kmixer.interop.tracking import tracker
from kmixer.interop.tracking.following import Following, check_names
from kmixer.interop.tracking.series import series_of
from kmixer.interop.tracking.tracker import Trackers, check_libraries, open_trackers
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run, kmixer_command, make_sweep, recipe_file  # noqa: F401
from tests.interop.tracking.recording import Recording, lines_of
from tests.training.test_loop import InterruptAfter, assert_same_run, make_recipe


class Broken(Recording):
    """Fails at every call but the first."""

    def log(self, step: int, values: Any) -> None:
        super().log(step, values)
        raise OSError("no room\nleft")


def test_a_training_passes_on_its_record_and_is_the_same(text_file: Path, tmp_path: Path) -> None:
    recipe, told, warnings = make_recipe(text_file), Recording(), []
    broken = Broken()
    reporter = TrackingReporter(Trackers({"broken": broken, "good": told}, warnings.append), resume=False)
    with reporter:
        train(recipe, tmp_path / "tracked", reporter=reporter)
    train(recipe, tmp_path / "plain")
    assert_same_run(tmp_path / "tracked", tmp_path / "plain")
    lines = lines_of(tmp_path / "tracked")
    config = RunFolder(tmp_path / "tracked").read_recipe().by_key()
    assert told.calls == [
        ("begin", "tracked", config, None),
        *(("log", line["step"], series_of(line)) for line in lines),
        ("end",),
    ]
    assert [call[0] for call in broken.calls] == ["begin", "log"]
    assert warnings == ["tracking by broken failed and ends here: OSError: no room\\nleft"]


def test_a_resumed_training_passes_on_its_record_from_the_first_line(text_file: Path, tmp_path: Path) -> None:
    recipe, told, run = make_recipe(text_file), Recording(), tmp_path / "run"
    train(recipe, run, reporter=InterruptAfter(4))
    with TrackingReporter(Trackers({"told": told}, pytest.fail), resume=True) as reporter:
        train(recipe, run, resume=True, reporter=reporter)
    assert told.calls[0][3] == 4
    assert told.logged() == [(line["step"], series_of(line)) for line in lines_of(run)]


def test_nothing_is_told_of_a_training_that_did_not_begin(tmp_path: Path) -> None:
    told = Recording()
    with (
        pytest.raises(InputError),
        TrackingReporter(Trackers({"told": told}, pytest.fail), resume=False) as reporter,
    ):
        train(make_recipe(tmp_path / "no such file"), tmp_path / "run", reporter=reporter)
    assert told.calls == []


def test_following_a_run_that_grows_and_goes_back(text_file: Path, tmp_path: Path) -> None:
    run, told = RunFolder(tmp_path / "run"), Recording()
    following = Following(run, "name", Trackers({"told": told}, pytest.fail))
    assert not following.look() and told.calls == []
    train(make_recipe(text_file, log_every=1), run.path, reporter=InterruptAfter(5))
    checkpoint = run.metrics.read_text()
    lost = [{"step": 6, "train_loss": 9.0}, {"step": 7, "train_loss": 9.0}]
    run.metrics.write_text(checkpoint + "".join(json.dumps(line) + "\n" for line in lost))
    assert not following.look()
    assert told.logged()[-1] == (7, {"train/loss": 9.0})
    told.calls.clear()
    train(make_recipe(text_file, log_every=1), run.path, resume=True)
    assert following.look()
    following.end()
    assert [call[0] for call in told.calls[:2]] == ["end", "begin"]
    assert told.calls[1][3] == 5
    assert told.logged() == [(line["step"], series_of(line)) for line in lines_of(run.path)]
    told.calls.clear()
    assert following.look() and told.calls == []


def test_libraries_are_known_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    assert check_libraries(["trackio", "trackio"]) == ["trackio"]
    with pytest.raises(InputError, match=r"tracking by wandb needs its library: pip install wandb"):
        check_libraries(["wandb"])
    with pytest.raises(InputError, match=r"got 'mlflow'; allowed: tensorboard, trackio, wandb"):
        check_libraries(["mlflow"])


def test_runs_are_named_by_their_folder_and_in_a_sweep_by_all(tmp_path: Path) -> None:
    run = tmp_path / "sweep/base/seed-1"
    run.mkdir(parents=True)
    assert name_of(run) == "seed-1"
    (tmp_path / "sweep/sweep.json").write_text("{}")
    assert name_of(run) == "sweep/base/seed-1"
    check_names(["a", "b"])
    with pytest.raises(InputError, match="two runs are called a"):
        check_names(["a", "b", "a"])


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Every tracker that is opened is one that keeps what it is told."""
    opened: list[Recording] = []

    def open_recording(names: list[str], out: Path, warn: Any) -> Trackers:
        opened.append(Recording())
        return Trackers({"told": opened[-1]}, warn)

    monkeypatch.setattr("kmixer.cli.track.open_trackers", open_recording)
    monkeypatch.setattr("kmixer.cli.progress.open_trackers", open_recording)
    monkeypatch.setattr("kmixer.cli.track.check_libraries", lambda names: names)
    return opened


def test_the_command_tracks_runs_and_sweeps(
    kmixer_command: Run,  # noqa: F811
    recipe_file: Path,  # noqa: F811
    tmp_path: Path,
    recording: list[Recording],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_sweep(tmp_path / "sweep", recipe_file)
    run = tmp_path / "sweep/base/seed-42"
    answer = kmixer_command("track", tmp_path / "sweep", "--to", "tensorboard", "--follow")
    assert answer.out.startswith("1 of 1 runs shown in tensorboard, below tracking: sweep/base/seed-42")
    (told,) = recording
    assert told.logged() == [(line["step"], series_of(line)) for line in lines_of(run)]
    assert told.calls[-1] == ("end",)
    monkeypatch.setenv("KMIXER_TRACK", "tensorboard")
    assert kmixer_command("train", recipe_file, "--out", tmp_path / "run").code == 0
    assert recording[1].calls[0][1] == "run"


@pytest.mark.parametrize("arguments", [("train", "shakespeare-quick", "--track"), ("track", "run", "--to")])
def test_a_library_that_is_not_known_is_one_line(kmixer_command: Run, arguments: tuple[str, ...]) -> None:  # noqa: F811
    assert "allowed: tensorboard, trackio, wandb" in kmixer_command(*arguments, "mlflow").error()


def test_no_library_is_imported_before_it_is_used() -> None:
    libraries = {*tracker.LIBRARIES, "accelerate", "lm_eval", "transformers", "datasets"}
    program = f"import sys, kmixer.cli.main; print(*({libraries} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []
    assert open_trackers([], Path("nowhere"), pytest.fail) is not None
