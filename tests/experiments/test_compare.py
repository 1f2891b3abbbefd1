"""Rows of a comparison from chosen numbers: which is better, and what they say as JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmixer.experiments.arms import Arm
from kmixer.experiments.compare import compare, reach_of
from kmixer.experiments.rows import ComparedArm
from kmixer.experiments.tables import headline, is_better
from tests.experiments.records import evaluation, make_record, results_of


def make_arm(folder: Path, losses: list[float]) -> Arm:
    runs = [
        make_record(folder / str(seed), [evaluation(0, 5.0), evaluation(4, loss)], results_of(seed, loss))
        for seed, loss in enumerate(losses)
    ]
    return Arm(folder.name, runs)


def test_rows_of_known_losses(tmp_path: Path) -> None:
    arms = [make_arm(tmp_path / "first", [2.0, 2.2, 2.4]), make_arm(tmp_path / "second", [1.0, 1.3, 1.3])]
    first, second = compare(arms)
    assert (first.n, first.loss, first.last) == (3, pytest.approx(2.2), pytest.approx(3.2))
    assert (first.difference, first.interval, first.pairs) == (None, None, None)
    assert (second.difference, second.pairs) == (pytest.approx(-1.0), 3)
    # -1.0 +- 4.3027 * sd / sqrt(3), sd of (-1.0, -0.9, -1.1)
    assert second.interval == pytest.approx((-1.0 - 0.24842, -1.0 + 0.24842), abs=1e-4)
    assert is_better(first) is None
    assert is_better(second) is True
    assert headline([first, second]).startswith("second has the best validation loss: loss 1.2000 +- 0.1732")


def test_a_row_is_read_from_its_json(tmp_path: Path) -> None:
    (row,) = compare([make_arm(tmp_path / "first", [2.0, 2.2])])
    plain = row.to_json()
    assert ComparedArm.parse(plain, source="test") == row
    assert ComparedArm.parse(plain, source="test").to_json() == plain
    assert "accuracy" not in plain  # of text there is none
    assert plain["perplexity"] is None  # measured, and too large for a number


def test_training_until_a_loss(tmp_path: Path) -> None:
    arms = [make_arm(tmp_path / "first", [2.0, 3.0]), make_arm(tmp_path / "second", [2.5, 2.0])]
    first, second = reach_of(arms, 2.5)
    assert (first.seeds, first.of, first.units, first.seconds) == (1, 2, 4 * 128, 240.0)
    assert (second.seeds, second.of) == (2, 2)
    assert reach_of(arms, 0.5)[0].units is None
