"""Arms read what their runs recorded: which runs count, which measurement is meant, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.experiments.arms import Arm, arms_of, read_arms
from kmixer.runs.results import evaluations_of, results_of
from kmixer.runs.run_folder import DIVERGED, METRICS, RESULTS, RunFolder
from tests.experiments.records import evaluation, make_record
from tests.experiments.records import results_of as results_values


@pytest.fixture
def arm(tmp_path: Path) -> Arm:
    """Two runs that have ended, one that goes on, one that diverged, one that has not begun."""
    ended = [
        make_record(tmp_path / str(seed), [evaluation(0, 5.0), evaluation(8, loss)], results_values(seed, loss))
        for seed, loss in ((1, 2.0), (2, 3.0))
    ]
    going = make_record(tmp_path / "3", [evaluation(0, 9.0)])
    diverged = make_record(tmp_path / "4", [evaluation(0, 9.0)])
    (diverged.path / DIVERGED).write_text("{}")
    return Arm("arm", [*ended, going, diverged, RunFolder(tmp_path / "5")])


def test_runs_are_counted_by_how_they_stand(arm: Arm) -> None:
    assert [run.path.name for run in arm.begun] == ["1", "2", "3", "4"]
    assert [run.path.name for run in arm.ended] == ["1", "2"]
    assert (arm.unfinished, arm.diverged, arm.unit, arm.has_weights) == (3, 1, "tokens", False)
    assert arm.figures("loss", "best", "validation") == {1: 2.0, 2: 3.0}
    assert arm.figures("loss", "last", "validation") == {1: 3.0, 2: 4.0}
    assert arm.figures("perplexity", "best", "validation") == {}


def test_a_protocol_chooses_its_measurement(arm: Arm) -> None:
    (measured,) = results_values(1, 2.0)["best"]["validation"]
    more = [
        measured,
        measured | {"window": 64, "loss": 1.5},
        measured | {"protocol": "stream", "window": None, "loss": 1.0},
    ]
    (arm.runs[0].path / RESULTS).write_text(json.dumps(results_values(1, 2.0, validation=more)))
    for protocol, expected in ((None, {1: 2.0, 2: 3.0}), (32, {1: 2.0, 2: 3.0}), (64, {1: 1.5}), ("stream", {1: 1.0})):
        assert arm.figures("loss", "best", "validation", protocol) == expected


def test_the_curve_is_that_of_the_runs_that_ended(arm: Arm) -> None:
    curve = arm.losses()
    assert curve is not None
    units_per_step = 4 * 32  # of the tiny recipe
    assert curve.units.tolist() == [0, 8 * units_per_step]
    assert curve.minutes.tolist() == [0.0, 8.0]
    assert (curve.mean[1], curve.low[1], curve.high[1]) == (2.5, 2.0, 3.0)


def test_nothing_is_read_before_it_is_asked_for(arm: Arm) -> None:
    for run in arm.begun:
        (run.path / METRICS).write_text("not JSON\n")
    fresh = Arm("arm", arm.runs)
    assert len(fresh.results) == 2
    with pytest.raises(InputError, match="is not valid JSON"):
        fresh.losses()


@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", '{"seed": 1, "best": {}}'])
def test_a_file_that_holds_no_results_is_one_line(tmp_path: Path, content: str) -> None:
    run = make_record(tmp_path / "run", [evaluation(0, 5.0)])
    (run.path / RESULTS).write_text(content)
    with pytest.raises(InputError, match=r"run/results.json"):
        results_of(run)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": "1"}, "seed: got '1'"),
        ({"flops": None}, "flops: got None"),
        ({"best": {"step": 8, "validation": []}}, "best.validation: got \\[\\]; it should not be empty"),
        ({"last": {"step": 8, "validation": [{"protocol": "windows"}]}}, "last.validation.0.loss is missing"),
        ({"last": {"step": 8, "validation": [{"protocol": "x", "loss": 1.0}]}}, "protocol: got 'x'"),
    ],
)
def test_results_of_another_shape_name_the_key(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    run = make_record(tmp_path / "run", [], results_values(1, 2.0) | changed)
    with pytest.raises(InputError, match=said):
        results_of(run)


def test_results_say_what_was_counted(tmp_path: Path) -> None:
    values = results_values(1, 2.0)
    results = results_of(make_record(tmp_path / "a", [], values))
    assert results is not None
    assert (results.unit, results.units) == ("tokens", 1024)
    measured = {"step": 8, "validation": [{"protocol": "examples", "loss": 2.0, "accuracy": 0.5}]}
    values |= {"sequences": values.pop("tokens"), "best": measured, "last": measured}
    results = results_of(make_record(tmp_path / "b", [], values))
    assert results is not None
    assert (results.unit, results.units) == ("sequences", 1024)
    del values["sequences"]
    with pytest.raises(InputError, match="it counts not one of tokens, images and sequences"):
        results_of(make_record(tmp_path / "c", [], values))


@pytest.mark.parametrize("line", [[], 5, {"validation": []}, {"step": 1, "seconds": 1.0, "validation": [5]}])
def test_a_line_that_is_no_evaluation_is_one_line(tmp_path: Path, line: object) -> None:
    run = make_record(tmp_path / "run", [evaluation(0, 5.0)])
    with run.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2"):
        evaluations_of(run)


def test_an_arm_without_a_run_that_ended_is_refused_where_figures_are_needed(tmp_path: Path) -> None:
    make_record(tmp_path / "run", [evaluation(0, 5.0)])
    assert arms_of([tmp_path / "run"])[0].results == {}
    with pytest.raises(InputError, match="none of its runs has ended"):
        read_arms([tmp_path / "run"])
