"""wandb offline: its file, read back, is metrics.jsonl; a run keeps its id when it is resumed."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kmixer.cli.progress import TrackingReporter
from kmixer.interop.tracking.wandb import id_of
from tests.interop.tracking.recording import Curves, curves_of, tracked_run

if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed (pip install wandb)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of a foreign library


BLOCK, HEADER = 32768, 7


def contents(file: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, whose first header is wandb's own: crc, length, kind, content."""
    data, place, whole = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # what is left of a block holds no record
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # all of one, or its last part
            yield whole
            whole = b""


def records_of(file: Path) -> tuple[str, Curves]:
    """The id and the curves of a file of an offline run."""
    from wandb.proto import wandb_internal_pb2

    name, curves = "", Curves()
    for content in contents(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            name = record.run.run_id
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((int(row["_step"]), value))
    return name, curves


@pytest.mark.parametrize("crash", [None, 5])
def test_the_last_session_has_the_record_of_a_training(
    crash: int | None, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    run = tmp_path / "run"
    # A process that was killed has none; this one has lived on.
    monkeypatch.setattr(TrackingReporter, "__enter__", lambda self: (wandb.teardown(), self)[1])
    tracked_run("wandb", run, text_file, tmp_path / "out", crash=crash)
    files = sorted((tmp_path / "out/wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    sessions = [records_of(file) for file in files]
    assert sessions[-1][1] == curves_of(run)
    assert len({name for name, _ in sessions}) == 1


def test_an_id_is_of_name_and_recipe_and_not_of_where_the_data_is() -> None:
    config: dict[str, Any] = {"training.seed": 1, "data.corpus": "a.txt", "description": "one", "model.rank": None}
    assert id_of("run", config) == id_of("run", config | {"data.corpus": "b.txt", "description": "two"})
    assert len({id_of("run", config), id_of("other", config), id_of("run", config | {"training.seed": 2})}) == 3
