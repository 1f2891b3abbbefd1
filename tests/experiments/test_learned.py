"""The table of what runs have learned: means over layers, then over seeds."""

from __future__ import annotations

import json
from pathlib import Path

from kmixer.experiments.compare import Arm
from kmixer.experiments.learned import learned_table
from kmixer.runs.run_folder import RunFolder


def test_means_over_layers_then_over_seeds(tmp_path: Path) -> None:
    runs = []
    for seed, gates in enumerate(([0.2, 0.4], [0.4, 0.6])):
        run = RunFolder(tmp_path / str(seed))
        run.path.mkdir()
        run.append_metrics({"step": 0, "dynamics": {"gate": [1.0, 1.0]}})
        run.append_metrics({"step": 1, "dynamics": {"gate": gates, "decay": [[0.5, 0.9], [0.7, 0.7]]}})
        run.append_metrics({"step": 2, "train_loss": 1.0})
        runs.append(run)
    assert json.loads(runs[0].metrics.read_text().splitlines()[1])["step"] == 1
    arms = [Arm("a", {}, 0, runs=runs), Arm("b", {}, 0, runs=runs[:1]), Arm("none", {}, 1)]
    heading, body = learned_table(arms)
    assert heading == ("arm", "gate", "decay")
    assert body == [
        ("a", "0.400 +- 0.141 (0.200 to 0.600)", "0.7000 +- 0.0000 (0.5000 to 0.9000)"),
        ("b", "0.300 (0.200 to 0.400)", "0.7000 (0.5000 to 0.9000)"),
    ]
