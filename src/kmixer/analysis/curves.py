"""The recorded measurements of runs, by arm: what the figures are drawn from."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kmixer.errors import InputError
from kmixer.experiments.sweep import runs_by_arm
from kmixer.files import is_there
from kmixer.models.model_folder import WEIGHTS
from kmixer.runs.recipe import ImageRecipe, LanguageRecipe
from kmixer.runs.run_folder import RunFolder


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm, one or more, in the order of their seeds."""

    name: str
    runs: list[RunFolder]
    metrics: list[list[dict[str, Any]]]  # a run's lines of metrics.jsonl
    results: list[dict[str, Any] | None]  # results.json of the runs that have ended

    @property
    def unit(self) -> str:
        """What training counts: tokens, images or sequences."""
        recipe = self.runs[0].read_recipe()
        return (
            "tokens"
            if isinstance(recipe, LanguageRecipe)
            else "images"
            if isinstance(recipe, ImageRecipe)
            else "sequences"
        )

    @property
    def has_weights(self) -> bool:
        """Whether the first run still has its model: records of runs are kept without."""
        return is_there(self.runs[0].path / WEIGHTS)

    def losses(self) -> Curve | None:
        """Validation loss: mean, smallest and largest over the runs that have ended, or over all where none has."""
        ended = [lines for lines, result in zip(self.metrics, self.results, strict=True) if result is not None]
        runs = ended or self.metrics
        by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for lines in runs:
            for line in lines:
                if "validation" in line:
                    by_step[line["step"]].append((line["validation"][0]["loss"], line["seconds"]))
        steps = sorted(step for step, found in by_step.items() if len(found) == len(runs))
        if not steps:
            return None
        losses, seconds = np.moveaxis(np.array([by_step[step] for step in steps]), -1, 0)
        units = np.array(steps) * self.runs[0].read_recipe().units_per_step
        return Curve(units, seconds.mean(1) / 60, losses.mean(1), losses.min(1), losses.max(1))

    def dynamics(self, run: int = 0) -> list[tuple[int, dict[str, Any]]]:
        """(step, measurement) of a run, the first one, as it was recorded at each evaluation."""
        return [(line["step"], line["dynamics"]) for line in self.metrics[run] if "dynamics" in line]


@dataclass(frozen=True)
class Curve:
    """A quantity against what was trained: mean and band over runs."""

    units: np.ndarray[Any, Any]  # tokens or images
    minutes: np.ndarray[Any, Any]  # of training and evaluation, mean
    mean: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]


def read_arm_runs(paths: list[Path]) -> list[ArmRuns]:
    """The arms of run folders and sweeps; runs that have not begun are left out.

    Raises InputError where a path is neither, or nothing has begun.
    """
    arms = [(name, [run for run in map(RunFolder, folders) if run.exists()]) for name, folders in runs_by_arm(paths)]
    begun = [
        ArmRuns(name, runs, [run.read_metrics() for run in runs], [run.results() for run in runs])
        for name, runs in arms
        if runs
    ]
    if not begun:
        raise InputError(f"{', '.join(str(path) for path in paths)}: no run has begun yet")
    return begun
