"""What a run measured, as records: its evaluations so far, and its results once it has ended."""

from __future__ import annotations

from kmixer.runs.records import EvaluationLine, Results
from kmixer.runs.run_folder import RESULTS, RunFolder


def results_of(run: RunFolder) -> Results | None:
    """The results of a run that has ended, None of another. Raises InputError where the file holds none."""
    values = run.results()
    return None if values is None else Results.parse(values, source=str(run.path / RESULTS))


def evaluations_of(run: RunFolder) -> list[EvaluationLine]:
    """The evaluations of a run so far. Raises InputError where a line is something else."""
    return [
        EvaluationLine.parse(line, source=f"{run.metrics}, line {number}")
        for number, line in enumerate(run.read_metrics(), start=1)
        if "validation" in line
    ]
