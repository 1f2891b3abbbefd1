"""results.json as its readers see it: what a finished run gave, for its best weights and for its last ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from kmixer.config import StrictConfig
from kmixer.runs.run_folder import RESULTS, RunFolder

Unit = Literal["tokens", "images", "sequences"]
UNITS: tuple[Unit, ...] = ("tokens", "images", "sequences")
Part = Literal["validation", "test"]
Weights = Literal["best", "last"]
# A window length, or "stream"; None is what the recipe chooses its weights by.
Protocol = int | Literal["stream"] | None
Figure = Literal["loss", "perplexity", "perplexity_per_word", "bits_per_byte", "accuracy"]


class Record(StrictConfig):
    """A part of a file that a run wrote: what is read has its type, what a later version added is passed over."""

    model_config = ConfigDict(extra="ignore")


class Measurement(Record):
    """One evaluation of some weights on one held-out part."""

    protocol: Literal["windows", "stream", "examples"]
    window: int | None = None  # tokens, of windows
    tokens: int | None = None  # scored, of text
    examples: int | None = None  # of a classifier
    loss: float  # nats per token or per example
    perplexity: float | None = None  # None too where no number holds it
    perplexity_per_word: float | None = None
    bits_per_character: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None  # part of the examples
    stretches: list[float] | None = None  # mean loss of the positions 1, 2, 3-4, 5-8, ... of a window

    def is_of(self, protocol: Protocol) -> bool:
        """Whether it was made by this protocol; None is any."""
        if protocol is None:
            return True
        return self.protocol == "stream" if protocol == "stream" else self.window == protocol

    def figure(self, name: Figure) -> float | None:
        """A figure by its name; None where it was not measured."""
        value: float | None = getattr(self, name)
        return value

    def has(self, name: Figure) -> bool:
        """Whether this kind of evaluation measures a figure, be it too large for a number."""
        return name in self.model_fields_set


class ClassToken(Record):
    """A few validation images, and what the class token holds of each patch after all layers."""

    images: list[list[list[list[float]]]]  # (n, channels, height, width)
    rollout: list[list[float]]  # (n, patches)


class WeightsResults(Record):
    """What one set of weights gave."""

    step: int
    validation: Annotated[list[Measurement], Field(min_length=1)]  # the first chooses the weights
    test: list[Measurement] = Field(default_factory=list)
    loss_by_position: list[float] | None = None  # nats per token at each position of a validation window
    class_token: ClassToken | None = None

    def measurements(self, part: Part) -> list[Measurement]:
        return self.validation if part == "validation" else self.test


class RunResults(Record):
    """What results.json holds."""

    recipe: str
    seed: int
    parameters: int
    steps: int
    unit: Unit
    units: int  # trained, of this unit: in the file under the unit's own name
    flops: float  # of training
    seconds: float  # of training and evaluation
    best: WeightsResults
    last: WeightsResults

    @model_validator(mode="before")
    @classmethod
    def _name_units(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unit = next((unit for unit in UNITS if unit in values), None)
        if unit is None:
            raise ValueError(f"{' or '.join(UNITS)} is missing")
        return {**values, "unit": unit, "units": values[unit]}

    def weights(self, which: Weights) -> WeightsResults:
        return self.best if which == "best" else self.last


def read_results(run: RunFolder) -> RunResults | None:
    """The results of a run that has ended, None of another. Raises InputError where the file holds none."""
    values = run.results()
    return None if values is None else RunResults.parse(values, source=str(run.path / RESULTS))
