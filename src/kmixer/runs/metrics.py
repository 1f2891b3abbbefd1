"""The evaluations in metrics.jsonl as their readers see them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kmixer.errors import InputError
from kmixer.runs.results import Measurement, Record
from kmixer.runs.run_folder import RunFolder


class EvaluationLine(Record):
    """A line that training wrote at an evaluation."""

    step: int
    seconds: float  # of training and evaluation until then
    validation: Annotated[list[Measurement], Field(min_length=1)]  # the first chooses the weights
    # What was measured of the model's mixers, by name; whoever reads one says its shape, see `Arm.recorded`.
    dynamics: dict[str, Any] = Field(default_factory=dict)
    gradient_norms: dict[str, float] | None = None  # by group of parameters, before clipping
    update_norms: dict[str, float] | None = None

    @property
    def loss(self) -> float:
        """Nats per token or per example, by the protocol that chooses the weights."""
        return self.validation[0].loss


def read_evaluations(run: RunFolder) -> list[EvaluationLine]:
    """The evaluations of a run so far. Raises InputError where a line is something else."""
    evaluations = []
    for number, line in enumerate(run.read_metrics(), 1):
        if not isinstance(line, dict):
            raise InputError(f"{run.metrics}, line {number}: got {line!r:.40}; it should be a group of keys")
        if "validation" in line:
            evaluations.append(EvaluationLine.parse(line, source=f"{run.metrics}, line {number}"))
    return evaluations
