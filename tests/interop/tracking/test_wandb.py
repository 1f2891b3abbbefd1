"""wandb offline: its file, read back, is metrics.jsonl; a run keeps its id when it is resumed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kmixer.interop.tracking.wandb import id_of
from tests.interop.tracking.recording import Curves, curves_of, tracked_run

if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed (pip install wandb)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of a foreign library


def records_of(file: Path) -> tuple[str, Curves]:
    """The id and the curves of a file of an offline run."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, name, curves = DataStore(), "", {}
    store.open_for_scan(str(file))
    while (content := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            name = record.run.run_id
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = int(row["_step"])
            for key, value in row.items():
                if not key.startswith("_"):
                    curves.setdefault(key, []).append((step, value))
    return name, curves


@pytest.mark.parametrize("crash", [None, 5])
def test_the_last_session_has_the_record_of_a_training(
    crash: int | None, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    tracked_run("wandb", run, text_file, tmp_path / "out", crash=crash)
    files = sorted((tmp_path / "out/wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    sessions = [records_of(file) for file in files]
    assert sessions[-1][1] == curves_of(run)
    assert len({name for name, _ in sessions}) == 1


def test_an_id_is_of_name_and_recipe_and_not_of_where_the_data_is() -> None:
    config: dict[str, Any] = {"training.seed": 1, "data.corpus": "a.txt", "description": "one", "model.rank": None}
    assert id_of("run", config) == id_of("run", config | {"data.corpus": "b.txt", "description": "two"})
    assert len({id_of("run", config), id_of("other", config), id_of("run", config | {"training.seed": 2})}) == 3
