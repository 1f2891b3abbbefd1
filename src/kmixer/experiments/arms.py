"""Arms: runs that differ in their seed alone, read from run folders and sweeps when something is asked of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from kmixer.errors import InputError
from kmixer.experiments.sweep import runs_by_arm
from kmixer.files import is_there
from kmixer.models.model_folder import WEIGHTS
from kmixer.runs.recipe import AnyRecipe, ImageRecipe, LanguageRecipe
from kmixer.runs.records import EvaluationLine, Figure, Measurement, Part, Protocol, Results, Unit, Weights
from kmixer.runs.results import evaluations_of, results_of
from kmixer.runs.run_folder import RESULTS, RunFolder

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class Curve:
    """A quantity against what was trained: mean and band over runs."""

    units: np.ndarray[Any, Any]  # tokens, images or sequences
    minutes: np.ndarray[Any, Any]  # of training and evaluation, mean
    mean: np.ndarray[Any, Any]
    low: np.ndarray[Any, Any]
    high: np.ndarray[Any, Any]


class Arm:
    """The runs of one arm in the order of their seeds: not begun, begun or ended."""

    def __init__(self, name: str, runs: Iterable[RunFolder]) -> None:
        self.name, self.runs = name, list(runs)
        self._evaluations: dict[Path, list[EvaluationLine]] = {}

    @cached_property
    def begun(self) -> list[RunFolder]:
        """The runs of which there is something to read."""
        return [run for run in self.runs if run.exists()]

    @cached_property
    def _results(self) -> list[tuple[RunFolder, Results]]:
        return [(run, results) for run in self.begun if (results := results_of(run)) is not None]

    @property
    def ended(self) -> list[RunFolder]:
        """The runs that have results."""
        return [run for run, _ in self._results]

    @cached_property
    def results(self) -> dict[int, Results]:
        """results.json of the runs that have ended, by seed."""
        return {results.seed: results for _, results in self._results}

    @property
    def unfinished(self) -> int:
        """Runs that have not ended, those that diverged among them."""
        return len(self.runs) - len(self._results)

    @cached_property
    def diverged(self) -> int:
        """Runs whose loss was not finite."""
        return sum(run.diverged() for run in self.runs)

    @cached_property
    def recipe(self) -> AnyRecipe:
        """Of the first run that has begun."""
        return self.begun[0].read_recipe()

    @property
    def unit(self) -> Unit:
        """What training counts."""
        recipe = self.recipe
        return (
            "tokens"
            if isinstance(recipe, LanguageRecipe)
            else "images"
            if isinstance(recipe, ImageRecipe)
            else "sequences"
        )

    @cached_property
    def measures(self) -> dict[str, Any]:
        """What an arm with results must share with another for their losses to measure the same thing."""
        run = self.ended[0]
        return {"corpus": run.environment()["corpus_sha256"], **run.read_recipe().measures()}

    @property
    def has_weights(self) -> bool:
        """Whether the first run still has its model: records of runs are kept without."""
        return is_there(self.begun[0].path / WEIGHTS)

    def measurements(self, weights: Weights, part: Part, protocol: Protocol = None) -> dict[int, Measurement]:
        """What was measured of a part, by seed: by a protocol, or by the one that the recipe chooses weights by."""
        chosen = {}
        for seed, results in self.results.items():
            measured = results.weights(weights).measurements(part)
            measurement = next((one for one in measured if one.is_of(protocol)), None)
            if measurement is not None:
                chosen[seed] = measurement
        return chosen

    def figures(self, name: Figure, weights: Weights, part: Part, protocol: Protocol = None) -> dict[int, float]:
        """A figure of these by seed, where it was measured."""
        measured = self.measurements(weights, part, protocol)
        return {seed: value for seed, one in measured.items() if (value := one.figure(name)) is not None}

    def evaluations(self, run: RunFolder | None = None) -> list[EvaluationLine]:
        """The evaluations of a run so far; by default of the first that has begun."""
        run = run or self.begun[0]
        if run.path not in self._evaluations:
            self._evaluations[run.path] = evaluations_of(run)
        return self._evaluations[run.path]

    def recorded(self, measure: str, shape: type[Shape], run: RunFolder | None = None) -> list[tuple[int, Shape]]:
        """(step, value) of a measure of a run's dynamics at every evaluation that recorded it; see `evaluations`.

        Raises InputError where what was recorded has not this shape, `list[list[float]]` for example.
        """
        adapter = TypeAdapter(shape)
        recorded = []
        for line in self.evaluations(run):
            measures = line.measures
            if measure in measures:
                try:
                    recorded.append((line.step, adapter.validate_python(measures[measure], strict=True)))
                except ValidationError:
                    raise InputError(
                        f"{(run or self.begun[0]).metrics}, step {line.step}: dynamics.{measure} is no {shape}; "
                        "restore it from a copy"
                    ) from None
        return recorded

    def losses(self) -> Curve | None:
        """Validation loss: mean, smallest and largest over the runs that have ended, or over all where none has."""
        runs = self.ended or self.begun
        by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for line in chain.from_iterable(map(self.evaluations, runs)):
            by_step[line.step].append((line.loss, line.seconds))
        steps = sorted(step for step, measured in by_step.items() if len(measured) == len(runs))
        if not steps:
            return None
        losses, seconds = np.moveaxis(np.array([by_step[step] for step in steps]), -1, 0)
        units = np.array(steps) * self.recipe.units_per_step
        return Curve(units, seconds.mean(1) / 60, losses.mean(1), losses.min(1), losses.max(1))


def arms_of(paths: list[Path]) -> list[Arm]:
    """Every arm of run folders and sweeps in the order given, ended or not.

    Raises InputError where a path is neither.
    """
    return [Arm(name, map(RunFolder, folders)) for name, folders in runs_by_arm(paths)]


def read_arms(paths: list[Path]) -> list[Arm]:
    """The arms of run folders and sweeps, in the order given.

    Raises InputError where a path is neither, or none of its runs has ended.
    """
    for path in paths:
        if not any((run / RESULTS).is_file() for _, runs in runs_by_arm([path]) for run in runs):
            raise InputError(
                f"{path}: none of its runs has ended; go on with kmixer train --resume, or the same kmixer sweep"
            )
    return arms_of(paths)
