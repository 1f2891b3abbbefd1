"""The table of what runs have learned: means over layers, then over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmixer.errors import InputError
from kmixer.experiments.arms import Arm
from kmixer.experiments.learned import learned_table
from kmixer.runs.run_folder import RunFolder
from tests.experiments.records import evaluation, make_record, results_of


def test_means_over_layers_then_over_seeds(tmp_path: Path) -> None:
    runs = []
    for seed, gates in enumerate(([0.2, 0.4], [0.4, 0.6])):
        lines = [
            evaluation(0, 4.0, dynamics={"gate": [1.0, 1.0]}),
            evaluation(1, 3.0, dynamics={"gate": gates, "decay": [[0.5, 0.9], [0.7, 0.7]]}),
            {"step": 2, "train_loss": 1.0},
        ]
        runs.append(make_record(tmp_path / str(seed), lines, results_of(seed, 3.0)))
    arms = [Arm("a", runs), Arm("b", runs[:1]), Arm("none", [RunFolder(tmp_path / "later")])]
    heading, body = learned_table(arms)
    assert heading == ("arm", "gate", "decay")
    assert body == [
        ("a", "0.400 +- 0.141 (0.200 to 0.600)", "0.7000 +- 0.0000 (0.5000 to 0.9000)"),
        ("b", "0.300 (0.200 to 0.400)", "0.7000 (0.5000 to 0.9000)"),
    ]


@pytest.mark.parametrize("decay", [5, [0.5], [["a"]], {"a": [1.0]}])
def test_a_measure_of_another_shape_is_one_line(tmp_path: Path, decay: object) -> None:
    run = make_record(tmp_path / "run", [evaluation(3, 4.0, dynamics={"decay": decay})], results_of(1, 3.0))
    with pytest.raises(InputError, match=r"metrics.jsonl, line 1 holds no line of metrics \(dynamics.decay"):
        learned_table([Arm("a", [run])])


@pytest.mark.parametrize("recorded", [5, [0.5], [["a"]], {"a": [1.0]}, None])
def test_a_measure_of_a_mixer_of_others_has_the_shape_that_is_asked_for(tmp_path: Path, recorded: object) -> None:
    lines = [evaluation(3, 4.0, dynamics={"reach": recorded})]
    arm = Arm("a", [make_record(tmp_path / "run", lines, results_of(1, 3.0))])
    with pytest.raises(InputError, match=r"metrics.jsonl, step 3: dynamics.reach is no list\[list\[float\]\]"):
        arm.recorded("reach", list[list[float]])
