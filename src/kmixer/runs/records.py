"""Shapes of the small JSON files of a run: what must be in them before any of it is used, said once.

The functions here give plain values, as they were written; a file of another shape is one line that names the key. Keys
that are not listed here are kept in these: newer versions may write more. `kmixer.runs.results` gives the records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kmixer.errors import InputError
from kmixer.files import read_json, read_json_lines
from kmixer.runs.dynamics import Dynamics
from kmixer.runs.record_types import Count, Number, Record, Seconds, check_even, shape_of

Unit = Literal["tokens", "images", "sequences"]
UNITS: tuple[Unit, ...] = ("tokens", "images", "sequences")
Part = Literal["validation", "test"]
Weights = Literal["best", "last"]
# A window length, or "stream"; None is what the recipe chooses its weights by.
Protocol = int | Literal["stream"] | None
Figure = Literal["loss", "perplexity", "perplexity_per_word", "bits_per_byte", "accuracy"]

# exp of a loss may be as large as a float64, and is left out (None) beyond.
Perplexity = Annotated[float, Field(ge=0)] | None


class Measurement(Record):
    """One evaluation of some weights on one held-out part."""

    protocol: Literal["windows", "stream", "examples"]
    loss: Number  # nats per token or per example
    window: Annotated[int, Field(ge=1, le=10**15)] | None = None  # tokens, of windows
    accuracy: Number | None = None  # part of the examples
    bits_per_byte: Number | None = None
    bits_per_character: Number | None = None
    perplexity: Perplexity = None
    perplexity_per_word: Perplexity = None
    # Mean loss of the positions 1, 2, 3-4, 5-8, ... of a window.
    stretches: Annotated[list[Number], Field(min_length=1)] | None = None
    tenths: Annotated[list[Number], Field(min_length=10, max_length=10)] | None = None  # of a stream

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.protocol == "windows") != (self.window is not None):
            raise ValueError(f"protocol {self.protocol!r} with window {self.window}")
        if (self.protocol == "examples") != (self.accuracy is not None):
            raise ValueError(f"protocol {self.protocol!r} with accuracy {self.accuracy}")
        if (self.protocol == "examples") != (self.bits_per_byte is None):
            raise ValueError(f"protocol {self.protocol!r} with bits_per_byte {self.bits_per_byte}")
        return self

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


# The first chooses the weights.
Measured = Annotated[list[Measurement], Field(min_length=1)]


class ClassToken(Record):
    """A few validation images, and what the class token holds of each patch after all layers."""

    images: Annotated[list[list[list[list[Number]]]], Field(min_length=1)]  # (n, channels, height, width)
    rollout: Annotated[list[list[Number]], Field(min_length=1)]  # (n, patches)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_even(self.images, "images")
        check_even(self.rollout, "rollout")
        patches = len(self.rollout[0])
        if len(self.images) != len(self.rollout) or patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise ValueError("class_token: its pictures and patches do not fit together")
        if len(self.images[0]) not in (1, 3) or not self.images[0][0] or not self.images[0][0][0]:
            raise ValueError("class_token: its pictures are none")
        return self


class MeasuredWeights(Record):
    """What one set of weights gave on every held-out part."""

    step: Count
    validation: Measured
    test: Measured | None = None
    # Nats per token at each position of a validation window.
    loss_by_position: Annotated[list[Number], Field(min_length=1)] | None = None
    class_token: ClassToken | None = None

    def measurements(self, part: Part) -> list[Measurement]:
        return self.validation if part == "validation" else self.test or []


class Results(Record):
    """results.json."""

    recipe: str
    seed: Annotated[int, Field(ge=0, le=1 << 64)]
    parameters: Count
    steps: Count
    flops: Annotated[float, Field(ge=0, le=1e36)]  # of training
    seconds: Seconds  # of training and evaluation
    # Trained, one of these.
    tokens: Annotated[int, Field(ge=0, le=10**20)] | None = None
    images: Count | None = None
    sequences: Count | None = None
    best: MeasuredWeights
    last: MeasuredWeights

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if sum(getattr(self, unit) is not None for unit in UNITS) != 1:
            raise ValueError("it counts not one of tokens, images and sequences")
        kind = {measured.protocol == "examples" for part in (self.best, self.last) for measured in part.validation}
        if kind != {self.tokens is None}:
            raise ValueError("its evaluations are not of what it counts")
        return self

    @property
    def unit(self) -> Unit:
        """What training counts."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def units(self) -> int:
        """How many it was trained on."""
        return int(getattr(self, self.unit))

    def weights(self, which: Weights) -> MeasuredWeights:
        return self.best if which == "best" else self.last


class MetricsLine(Record):
    """A line of metrics.jsonl: a training loss, or an evaluation with what was measured beside it."""

    step: Count
    seconds: Seconds | None = None  # of training and evaluation until then
    train_loss: Number | None = None
    validation: Measured | None = None
    dynamics: Dynamics | None = None
    gradient_norms: dict[str, Number] | None = None  # by group of parameters, before clipping
    update_norms: dict[str, Number] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.train_loss is not None and self.validation is not None:
            raise ValueError("a line holds one of train_loss and validation")
        if self.train_loss is None and self.validation is None and self.dynamics is None:
            raise ValueError("a line holds one of train_loss, validation and dynamics")
        if self.validation is not None and self.seconds is None:
            raise ValueError("validation without seconds")
        if (self.gradient_norms is None) != (self.update_norms is None):
            raise ValueError("gradient_norms without update_norms")
        return self


class EvaluationLine(MetricsLine):
    """A line that training wrote at an evaluation."""

    seconds: Seconds
    validation: Measured

    @property
    def loss(self) -> float:
        """Nats per token or per example, by the protocol that chooses the weights."""
        return self.validation[0].loss

    @property
    def measures(self) -> dict[str, Any]:
        """What was measured of the model's mixers, by name; whoever reads one says its shape, see `Arm.recorded`."""
        return {} if self.dynamics is None else self.dynamics.model_dump(exclude_unset=True)


class Session(Record):
    """What a run was made with, at its start or where it was resumed."""

    kmixer: str
    commit: str | None
    python: str
    packages: dict[str, str]
    platform: str
    device: str
    threads: Annotated[int, Field(ge=1, le=1 << 20)]
    processes: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    command: list[str]


class Environment(Session):
    """environment.json."""

    corpus_sha256: str
    resumed: list[Session] | None = None


class Diverged(Record):
    """diverged.json."""

    step: Count
    why: str


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run. Raises InputError, one line, where it is something else."""
    values: dict[str, Any] = read_json(path)
    _check(Results, values, path, "no results of a run")
    return values


def read_environment(path: Path) -> dict[str, Any]:
    """environment.json of a run. Raises InputError, one line, where it is something else."""
    values: dict[str, Any] = read_json(path)
    _check(Environment, values, path, "no environment of a run")
    return values


def check_diverged(path: Path) -> None:
    """Raises InputError, one line, where a file is no diverged.json."""
    _check(Diverged, read_json(path), path, "no word of a divergence")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, the last left out while it is being written.

    Raises InputError, one line, where a line is something else, or measures what the lines before it do not.
    """
    lines = read_json_lines(path)
    first: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        _check(MetricsLine, line, where, "no line of metrics")
        for name, shape in _shapes(line):
            if first.setdefault(name, shape) != shape:
                raise InputError(f"{where}: {name} has another shape than before; restore it from a copy")
    return lines


def _shapes(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The shapes of what a line measured, which no line of the same run may change."""
    for entry in (line.get("validation") or ())[:1]:
        yield "stretches", shape_of(entry.get("stretches"))
    for key, measure in (line.get("dynamics") or {}).items():
        yield f"dynamics.{key}", _tree(measure)
    if line.get("gradient_norms") is not None:
        yield "gradient_norms", sorted(line["gradient_norms"])


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tree(part) for key, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_tree(part) for part in value]
    return shape_of(value)


def _check(record: type[Record], values: Any, source: Path | str, what: str) -> None:
    try:
        record.parse(values, source="")
    except InputError as error:
        problem = str(error).removeprefix(": ")
        raise InputError(f"{source} holds {what} ({problem}); restore it from a copy") from None
