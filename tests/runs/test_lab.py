"""What kmixer lab leaves in a run folder: it belongs to the run's weights, and the run is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmixer.errors import InputError
from kmixer.runs.archive import pack
from kmixer.runs.check import check_run
from kmixer.runs.lab import SignalRecord, identity_of, lab_file, read_measurement, save_measurement
from kmixer.runs.lab_ecology import EcologyRecord, RescueRecord
from kmixer.runs.recipe import parse_recipe
from kmixer.runs.run_folder import RECIPE, RunFolder
from kmixer.training.loop import train
from tests.conftest import tiny_recipe_values

CURVE = {
    "name": "trained",
    "log_growth": [1.0, 0.5, 0.0],
    "log_growth_error": [0.1, 0.1, 0.0],
    "q": [1.0, 2.0, 3.0],
    "cosine": [0.1, 0.2, 0.3],
    "log_theory": None,
    "anything": "else",
}


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> RunFolder:
    folder = tmp_path / "run"
    train(parse_recipe(tiny_recipe_values(text_file), "test"), folder)
    return RunFolder(folder)


def measured(run: RunFolder, **changed: Any) -> dict[str, Any]:
    return {"name": "run", "trained": True, "positions": 64, "curves": [CURVE], **identity_of(run), **changed}


def test_a_measurement_is_read_back_and_changes_nothing_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    assert read_measurement(run, SignalRecord) is None
    path = save_measurement(run, "signal", measured(run))
    record = read_measurement(run, SignalRecord)
    assert record is not None
    assert record.curves[0].log_growth == CURVE["log_growth"]
    run.check_files()
    check_run(run)
    pack(run.path, tmp_path / "run.tar.gz")
    assert path.is_file()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"curves": []}, "curves"),
        ({"positions": "64"}, "positions"),
        ({"curves": [{**CURVE, "q": [1.0, 2.0]}]}, "q: it has another length than log_growth"),
        ({"curves": [{**CURVE, "log_growth": [0.0]}]}, "log_growth"),
        ({"curves": [{**CURVE, "log_growth": [1e3, 0.5, 0.0]}]}, "log_growth"),
        ({"recipe_sha256": "0" * 64}, "of another run"),
        ({"weights_sha256": "0" * 64}, "weights that the run had before"),
    ],
)
def test_anything_else_is_one_line(run: RunFolder, changed: dict[str, Any], why: str) -> None:
    save_measurement(run, "signal", measured(run, **changed))
    with pytest.raises(InputError, match=why) as error:
        read_measurement(run, SignalRecord)
    assert "--save measures again, or remove it" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"curves": 1}'])
def test_what_is_no_measurement_is_one_line(run: RunFolder, content: str) -> None:
    lab_file(run, "signal").write_text(content)
    with pytest.raises(InputError, match="holds no measurement"):
        read_measurement(run, SignalRecord)


def test_a_changed_number_is_noticed_where_a_digest_says_so(run: RunFolder) -> None:
    whole = json.loads(save_measurement(run, "signal", measured(run)).read_text())
    lab_file(run, "signal").write_text(json.dumps(whole | {"positions": 65}))
    with pytest.raises(InputError, match=r"was changed after it was measured; .* --save measures again, or remove it"):
        read_measurement(run, SignalRecord)
    by_hand = measured(run) | {"positions": 65}  # as --json prints it
    lab_file(run, "signal").write_text(json.dumps(by_hand))
    record = read_measurement(run, SignalRecord)
    assert record is not None and record.positions == 65


def test_records_without_weights_are_known_by_their_recipe(run: RunFolder) -> None:
    save_measurement(run, "signal", measured(run))
    (run.path / "model.safetensors").unlink()
    assert read_measurement(run, SignalRecord) is not None
    lab_file(run, "signal").write_text(json.dumps(measured_of_other()))
    with pytest.raises(InputError, match="of another run"):
        read_measurement(run, SignalRecord)


STEPS = [{"beta": 0.0, "cells": [[0], [1]], "noise": False}, {"beta": 0.1, "cells": [[0, 1]], "noise": False}]
ECOLOGY: dict[str, Any] = {
    "name": "run",
    "sources": ["a", "b"],
    "context": "none",
    "js": [[0.0, 0.1], [0.1, 0.0]],
    "null": [{"mean": 0.01, "largest": 0.02}] * 2,
    "pairs": [{"first": 0, "second": 1, "js": 0.1, "differs": True}],
    "path": STEPS,
    "exact": True,
}
OF_MODEL = {"js": ECOLOGY["js"], "null": ECOLOGY["null"], "pairs": [{"first": 0, "second": 1, "says": "merged"}]}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sources": ["a", "b", "c"]}, "another size than sources"),
        ({"sources": ["a"]}, "sources: got 1"),
        ({"js": [[0.0, 0.1], [0.1]]}, "another size than sources"),
        ({"null": []}, "another size than sources"),
        ({"model": {**OF_MODEL, "js": [[0.0]]}}, "another size than sources"),
        ({"model": {**OF_MODEL, "null": []}}, "another size than sources"),
        ({"path": []}, "path"),
        ({"path": [{"beta": 0.0, "cells": [[0]], "noise": False}]}, "do not hold every source once"),
        ({"path": [{"beta": 0.0, "cells": [[0, 1], [1]], "noise": False}]}, "do not hold every source once"),
        ({"pairs": [{"first": 0, "second": 2, "js": 0.1, "differs": True}]}, "a source that is not there"),
        ({"js": [[0.0, 1e9], [0.1, 0.0]]}, "js"),
    ],
)
def test_an_ecology_fits_together(changed: dict[str, Any], why: str) -> None:
    assert EcologyRecord.parse({**ECOLOGY, "model": OF_MODEL}, source="test").model is not None
    with pytest.raises(InputError, match=why):
        EcologyRecord.parse({**ECOLOGY, **changed}, source="test")


def test_a_rescue_has_every_share() -> None:
    shares = [{"discrimination": [0.1, 0.2]}]
    whole = {
        "name": "chunks",
        "characters": 30,
        "alphas": [1.0],
        "curves": [{"mixer": "one", "shares": shares}],
        "counters": [{"context": 1, "shares": [{"discrimination": 0.1}]}],
    }
    assert RescueRecord.parse({"name": "one", "evaluations": [whole]}, source="test").evaluations[0].alphas == [1.0]
    for wrong in ({"alphas": [0.0, 1.0]}, {"alphas": [2.0]}, {"curves": []}):
        with pytest.raises(InputError, match=r"alphas|curves"):
            RescueRecord.parse({"name": "one", "evaluations": [{**whole, **wrong}]}, source="test")


def measured_of_other() -> dict[str, Any]:
    return {
        "name": "run",
        "trained": True,
        "positions": 64,
        "curves": [CURVE],
        "recipe_sha256": "0",
        "weights_sha256": "",
    }


def test_the_record_of_a_recipe_belongs_to_no_run() -> None:
    record = SignalRecord.parse({"name": RECIPE, "trained": False, "positions": 8, "curves": [CURVE]}, source="test")
    assert record.recipe_sha256 is None
