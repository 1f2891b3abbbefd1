"""The small files of a run: another shape is one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmixer.errors import InputError
from kmixer.runs.record_types import shape_of
from kmixer.runs.records import read_environment, read_metrics, read_results

ENTRY = {"protocol": "windows", "window": 8, "loss": 2.0, "bits_per_byte": 2.9, "stretches": [3.0, 2.0]}
WEIGHTS = {"step": 3, "validation": [ENTRY], "loss_by_position": [2.0, 1.0]}
RESULTS = {"recipe": "tiny", "seed": 1, "parameters": 10, "steps": 3, "tokens": 96, "flops": 1e3, "seconds": 0.5}
RESULTS |= {"best": WEIGHTS, "last": WEIGHTS}
DYNAMICS = {"gate": [0.5], "alpha": [[0.5, 0.4]], "decay": [[0.9, 0.8]], "sigma": [[1.0, 2.0], [3.0, 4.0]]}
LINES: list[dict[str, Any]] = [
    {"step": 1, "train_loss": 3.0, "seconds": 0.1},
    {"step": 1, "validation": [ENTRY], "dynamics": DYNAMICS, "seconds": 0.2},
    {"step": 2, "validation": [ENTRY], "dynamics": DYNAMICS, "seconds": 0.3},
]
ENVIRONMENT = {"kmixer": "0.1", "commit": None, "python": "3.11", "packages": {"torch": "2"}, "platform": "Linux"}
ENVIRONMENT |= {"device": "cpu: one", "threads": 1, "command": ["kmixer", "train"], "corpus_sha256": "0"}


def changed(value: Any, *keys: Any, to: Any) -> Any:
    """A copy with one place changed, or left out where `to` is KeyError."""
    value = json.loads(json.dumps(value))
    part = value
    for key in keys[:-1]:
        part = part[key]
    if to is KeyError:
        del part[keys[-1]]
    else:
        part[keys[-1]] = to
    return value


def test_what_kmixer_writes_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"newer": 1}))
    assert read_results(tmp_path / "results.json") == RESULTS | {"newer": 1}
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    assert read_environment(tmp_path / "environment.json") == ENVIRONMENT
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert read_metrics(tmp_path / "metrics.jsonl") == LINES


@pytest.mark.parametrize(
    ("keys", "to", "named"),
    [
        (("seed",), KeyError, "seed is missing"),
        (("seed",), True, "seed: got True"),
        (("best",), [], "best: got"),
        (("best", "validation"), [], "best.validation: got"),
        (("best", "validation", 0, "loss"), "x", "loss: got 'x'"),
        (("best", "validation", 0, "loss"), float("nan"), "loss: got nan"),
        (("best", "validation", 0, "loss"), 1e308, "loss: got 1e"),
        (("best", "validation", 0, "window"), None, "protocol 'windows' with window None"),
        (("tokens",), KeyError, "one of tokens, images and sequences"),
        (("images",), 3, "one of tokens, images and sequences"),
        (("best", "loss_by_position"), [[1.0]], "loss_by_position"),
    ],
)
def test_results_of_another_shape(keys: tuple[Any, ...], to: Any, named: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(changed(RESULTS, *keys, to=to)))
    with pytest.raises(InputError) as raised:
        read_results(tmp_path / "results.json")
    assert "results.json holds no results of a run (" in str(raised.value)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "to", "named"),
    [
        ((0, "step"), -1, "line 1 holds no line of metrics (step: got -1"),
        ((0, "train_loss"), KeyError, "line 1 holds no line of metrics (a line holds one of"),
        ((1, "dynamics", "alpha"), [0.5], "line 2 holds no line of metrics (dynamics.alpha"),
        ((1, "dynamics", "sigma"), [[1.0], [1.0, 2.0]], "its lists have different lengths"),
        ((2, "dynamics", "gate"), [0.5, 0.5], "line 3: dynamics.gate has another shape than before"),
        ((2, "validation", 0, "stretches"), [1.0], "line 3: stretches has another shape than before"),
    ],
)
def test_metrics_of_another_shape(keys: tuple[Any, ...], to: Any, named: str, tmp_path: Path) -> None:
    lines = changed(LINES, *keys, to=to)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as raised:
        read_metrics(tmp_path / "metrics.jsonl")
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("key", "to"), [("packages", []), ("command", "kmixer"), ("threads", 0), ("resumed", {}), ("device", 5)]
)
def test_environments_of_another_shape(key: str, to: Any, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps(changed(ENVIRONMENT, key, to=to)))
    with pytest.raises(InputError, match=rf"environment\.json holds no environment of a run \({key}: got"):
        read_environment(tmp_path / "environment.json")


def test_shapes_of_nested_lists() -> None:
    assert shape_of(1.0) == ()
    assert shape_of([1.0, 2.0]) == (2,)
    assert shape_of([[1.0, 2.0], [3.0, 4.0]]) == (2, 2)
    assert shape_of([[1.0], [3.0, 4.0]]) == [(1,), (2,)]
    assert shape_of([]) == (0,)
