"""trackio's database, read back, is metrics.jsonl."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from kmixer.interop.tracking.following import Following
from kmixer.interop.tracking.tracker import open_trackers
from kmixer.runs.run_folder import RunFolder
from tests.interop.tracking.recording import Curves, curves_of, tracked_run

if importlib.util.find_spec("trackio") is None:
    pytest.skip("trackio is not installed (pip install trackio)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of a foreign library


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """trackio asks where its database is once, when it is imported."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


def stored(name: str) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    curves: Curves = {}
    for row in SQLiteStorage.get_logs("kmixer", run=name):
        for key, value in row.items():
            if key not in ("step", "timestamp"):
                curves.setdefault(key, []).append((row["step"], value))
    return curves


@pytest.mark.parametrize("crash", [None, 5])
def test_the_database_is_the_record_of_a_training(crash: int | None, text_file: Path, tmp_path: Path) -> None:
    name = f"crash-{crash}"
    tracked_run("trackio", tmp_path / name, text_file, tmp_path, crash=crash)
    found, expected = stored(name), curves_of(tmp_path / name)
    rates = [curves.pop("train/tokens_per_second") for curves in (found, expected)]
    assert found == expected  # rates of the steps that were made twice are those of the first time
    assert [step for step, _ in rates[0]] == [step for step, _ in rates[1]] == list(range(1, 9))


def test_two_runs_at_a_time_and_each_anew(text_file: Path, tmp_path: Path) -> None:
    names = ("first", "second")
    for name in names:
        tracked_run("trackio", tmp_path / name, text_file, tmp_path)
    for _ in range(2):
        followed = [
            Following(RunFolder(tmp_path / name), name, open_trackers(["trackio"], tmp_path, pytest.fail))
            for name in names
        ]
        assert all([following.look() for following in followed])  # noqa: C419  (all of them look)
        for following in followed:
            following.end()
        assert all(stored(name) == curves_of(tmp_path / name) for name in names)
