"""Event files, read back by TensorBoard's own reader, are metrics.jsonl."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kmixer.interop.tracking.following import Following
from kmixer.interop.tracking.tracker import open_trackers
from kmixer.runs.run_folder import RunFolder
from tests.interop.tracking.recording import Curves, curves_of, tracked_run

if importlib.util.find_spec("tensorboard") is None:
    pytest.skip("tensorboard is not installed (pip install 'kmixer[track]')", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of a foreign library


def events_of(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def rounded(curves: Curves) -> Curves:
    """As event files have numbers."""
    return {name: [(step, float(np.float32(value))) for step, value in points] for name, points in curves.items()}


@pytest.mark.parametrize("crash", [None, 5])
def test_event_files_are_the_record_of_a_training(crash: int | None, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracked_run("tensorboard", run, text_file, tmp_path / "out", crash=crash)
    found = events_of(tmp_path / "out/tensorboard/run")
    assert found == rounded(curves_of(run))
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert [step for step, _ in found["validation/windows/loss"]] == [0, 3, 6, 8]


def test_a_run_is_shown_anew_every_time(text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tracked_run("tensorboard", run, text_file, tmp_path / "out")
    for _ in range(2):
        following = Following(RunFolder(run), "run", open_trackers(["tensorboard"], tmp_path / "out", pytest.fail))
        assert following.look()
        following.end()
        assert events_of(tmp_path / "out/tensorboard/run") == rounded(curves_of(run))
