"""The curves of a line of metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmixer.interop.tracking.series import series_of

RUNS = Path(__file__).parents[3] / "docs/runs"


def test_a_line_of_training() -> None:
    line = {"step": 10, "tokens": 640, "train_loss": 2.5, "learning_rate": 0.01, "gradient_norm": 0.5, "seconds": 3}
    assert series_of({**line, "tokens_per_second": 200.0}) == {
        "train/loss": 2.5,
        "train/learning_rate": 0.01,
        "train/gradient_norm": 0.5,
        "train/tokens_per_second": 200.0,
    }


def test_a_line_of_an_evaluation() -> None:
    validation = [
        {"protocol": "windows", "window": 32, "loss": 2.0, "bits_per_byte": 3.0, "perplexity": 7.4, "stretches": [1.0]},
        {"protocol": "stream", "window": None, "loss": 1.5, "bits_per_byte": 2.5},
        {"protocol": "examples", "loss": 0.5, "accuracy": 0.75, "bits_per_byte": None},
    ]
    assert series_of({"step": 3, "validation": validation, "dynamics": {}, "seconds": 2.0}) == {
        "validation/windows/loss": 2.0,
        "validation/windows/bits_per_byte": 3.0,
        "validation/stream/loss": 1.5,
        "validation/stream/bits_per_byte": 2.5,
        "validation/examples/loss": 0.5,
        "validation/examples/accuracy": 0.75,
    }


def test_what_was_measured_of_layers() -> None:
    dynamics = {
        "eta": 0.25,
        "gate": [0.5, 0.75],
        "decay": [[0.25, 0.75], [1.0, 0.5]],
        "copies": {"layers": [0], "lengths": ["1", "2"], "positions": [5, 6], "right": [0.5, None]},
        "levels": [{"reciprocity": [[0.0, 1.0], [0.5, 0.5]]}],
        "nothing": [[]],
    }
    line = {"step": 3, "dynamics": dynamics, "gradient_norms": {"core": 2}, "update_norms": {"core": 0.5}}
    assert series_of(line) == {
        "dynamics/eta": 0.25,
        "dynamics/gate/0": 0.5,
        "dynamics/gate/1": 0.75,
        "dynamics/decay/0": 0.5,
        "dynamics/decay/1": 0.75,
        "dynamics/copies/right/0": 0.5,
        "dynamics/levels/0/reciprocity/0": 0.5,
        "dynamics/levels/0/reciprocity/1": 0.5,
        "dynamics/gradient_norms/core": 2.0,
        "dynamics/update_norms/core": 0.5,
    }


@pytest.mark.parametrize("run", ["h4/base/seed-42", "shakespeare-small-copy/base/seed-1"])
def test_every_line_of_a_published_run_has_curves(run: str) -> None:
    for text in (RUNS / run / "metrics.jsonl").read_text().splitlines():
        values = series_of(json.loads(text))
        assert values and all(type(value) is float for value in values.values())
        assert len(values) < 200
