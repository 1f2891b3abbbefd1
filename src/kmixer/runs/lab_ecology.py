"""Records of `kmixer lab ecology`: how far sources of text differ, and what is told apart of brackets."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kmixer.runs.lab import LabResult
from kmixer.runs.record_types import Count, Number, Record

Distance = Annotated[float, Field(ge=-1, le=100)]  # nats; what is corrected may be a little below 0
Matrix = list[list[Distance]]


class EcologyPair(Record):
    """Two of the sources, by number, and how far apart they are."""

    first: Count
    second: Count
    js: Distance
    differs: bool


class EcologyStep(Record):
    """From `beta` on these cells of sources are best."""

    beta: Distance
    cells: Annotated[list[Annotated[list[Count], Field(min_length=1)]], Field(min_length=1)]
    noise: bool


class EcologyNull(Record):
    """Two halves of one source, over splits."""

    mean: Distance
    largest: Distance


class ModelPair(Record):
    """Two of the sources, by number, in the eyes of a model."""

    first: Count
    second: Count
    says: str


class EcologyOfModel(Record):
    """The same of a model's own laws."""

    js: Matrix
    null: list[EcologyNull]
    pairs: list[ModelPair]


class EcologyRecord(LabResult):
    """Of `kmixer lab ecology` on texts."""

    panel = "ecology"

    sources: list[str]
    context: str
    js: Matrix
    null: list[EcologyNull]  # by source
    pairs: list[EcologyPair]
    path: Annotated[list[EcologyStep], Field(min_length=1)]
    exact: bool
    model: EcologyOfModel | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        w = len(self.sources)
        if w < 2:
            raise ValueError(f"sources: got {w}; there are two or more")
        lengths = {len(self.js), len(self.null), *map(len, self.js)}
        if self.model is not None:
            lengths |= {len(self.model.js), len(self.model.null), *map(len, self.model.js)}
        if lengths != {w}:
            raise ValueError("js, null: they have another size than sources")
        if any(sorted(state for cell in step.cells for state in cell) != list(range(w)) for step in self.path):
            raise ValueError("path: its cells do not hold every source once")
        pairs = [(pair.first, pair.second) for pair in self.pairs]
        pairs += [] if self.model is None else [(pair.first, pair.second) for pair in self.model.pairs]
        if any(max(pair) >= w for pair in pairs):
            raise ValueError("pairs: they name a source that is not there")
        return self


class RescueShare(Record):
    """What is told apart with one share of training texts."""

    discrimination: Annotated[list[Number], Field(min_length=1)]  # nats per character, by seed


class RescueCurve(Record):
    """One mixer at every share."""

    mixer: str
    shares: list[RescueShare]


class CounterShare(Record):
    """What a counter tells apart."""

    discrimination: Number


class RescueCounter(Record):
    """A counter with so many characters of context, at every share."""

    context: Count
    shares: list[CounterShare]


class RescueEvaluation(Record):
    """All mixers and counters on one kind of texts."""

    name: str
    characters: Count
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    curves: Annotated[list[RescueCurve], Field(min_length=1)]
    counters: list[RescueCounter]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = {len(curve.shares) for curve in self.curves} | {len(counter.shares) for counter in self.counters}
        if lengths != {len(self.alphas)}:
            raise ValueError("shares: they have another length than alphas")
        return self


class RescueRecord(LabResult):
    """Of `kmixer lab ecology --rescue`."""

    panel = "rescue"

    evaluations: Annotated[list[RescueEvaluation], Field(min_length=1)]
