"""Rows of tables: what `kmixer compare` and `kmixer task` print, and docs/results.json keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kmixer.runs.record_types import Record
from kmixer.runs.records import Figure, Part, Unit

Metric = Literal["loss", "bits_per_byte", "accuracy"]
Interval = Annotated[tuple[float, float], Field(strict=False)]  # JSON has lists


class ComparedArm(Record):
    """A row of a comparison. A figure that this kind of evaluation does not measure is not set at all."""

    arm: str
    metric: Metric
    n: int  # seeds that were measured
    unfinished: int  # runs
    seeds: list[int]
    # Means over the seeds for the weights chosen by validation loss, and deviations; None where a run has no number.
    loss: float | None = None  # nats
    loss_deviation: float | None = None
    perplexity: float | None = None
    perplexity_deviation: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_deviation: float | None = None
    accuracy: float | None = None
    accuracy_deviation: float | None = None
    last: float  # the metric of the weights of the last step
    difference: float | None  # of the metric from the first arm
    interval: Interval | None  # of the difference, 95 %
    pairs: int | None  # seeds shared with the first arm
    parameters: int
    unit: Unit
    units: int  # trained
    flops: float  # of training
    seconds: float  # of a run, mean
    part: Part
    protocol: Literal["windows", "stream", "examples"]
    window: int | None

    def mean(self, name: Figure) -> float | None:
        value: float | None = getattr(self, name)
        return value

    def deviation(self, name: Figure) -> float | None:
        value: float | None = getattr(self, f"{name}_deviation")
        return value

    def to_json(self) -> dict[str, Any]:
        """The row as `kmixer compare --json` prints it."""
        return self.model_dump(exclude_unset=True)


class DenoisedMixer(Record):
    """One mixer of the denoising task; means over the seeds, and deviations, None for one seed."""

    mixer: str
    parameters: int
    n: int  # seeds
    seeds: list[int]
    loss: float  # nats per corrupted position
    loss_deviation: float | None
    accuracy: float  # part of the corrupted positions
    accuracy_deviation: float | None
    difference: float | None  # of the loss from the first mixer, paired by seed
    interval: Interval | None  # of the difference, 95 %


class AtDistance(Record):
    """How much was recalled of the values that lie between so many and so many positions back."""

    gap: int  # of filler; the first is that of training
    nearest: int
    farthest: int
    asked: int  # values, of one seed
    accuracy: float


class TrainedRecall(Record):
    """What one model of the recall task did after its last step."""

    pairs: int
    arm: str
    seed: int
    parameters: int
    loss: float  # nats per value
    accuracy: float  # part of the values
    reached: int | None  # after how many steps 99 % were recalled first
    by_distance: list[AtDistance]
    seconds: float


class RecallTrainings(Record):
    """A file of them: the same command goes on where it was stopped."""

    setting: dict[str, Any]
    trained: list[TrainedRecall]


class RecallingArm(Record):
    """One arm of the recall task; means over the seeds, and deviations, None for one seed."""

    arm: str
    mixer: str
    fast_weights: bool
    pairs: int
    keys: int
    length: int  # tokens of a sequence
    parameters: int
    steps: int
    n: int  # seeds
    seeds: list[int]
    loss: float  # nats per value
    loss_deviation: float | None
    accuracy: float  # part of the values
    accuracy_deviation: float | None
    accuracies: list[float]  # by seed
    chance: float
    reached: list[int | None]  # by seed: after how many steps 99 % were recalled first
    difference: float | None  # of the accuracy from the same mixer without fast weights, paired by seed
    interval: Interval | None  # of the difference, 95 %
    by_distance: list[AtDistance]
