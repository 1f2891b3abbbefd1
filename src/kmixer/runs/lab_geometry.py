"""Records of `kmixer lab geometry`: how far perturbations moved the representations of encoders."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kmixer.runs.lab import LabRecord
from kmixer.runs.record_types import Count, Number, Record

Distance = Annotated[float, Field(ge=0, le=1)]
Distances = Annotated[list[Distance], Field(min_length=1)]
Rank = Annotated[float, Field(ge=0, le=1e9)]
# A part of all, above 0.
Rate = Annotated[float, Field(gt=0, le=1)]


class Moves(Record):
    """What `measure_moves` gives: lists by perturbation."""

    rank: Rank
    distance: Distances
    shared: Distances  # on the first directions, each of variance 1
    cka: list[Number]
    null: Distances  # of shuffled pairs
    null_band: list[Number]
    shared_null: Distances
    cka_band: list[Number]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("shared", "cka", "null", "null_band", "shared_null", "cka_band"):
            if len(getattr(self, name)) != len(self.distance):
                raise ValueError(f"{name}: it has another length than distance")
        return self


class Decoded(Record):
    """R^2 of one state variable from hidden vectors, before training and after."""

    linear: Number
    nearest: Number
    untrained_linear: Number
    untrained_nearest: Number


class HeadArm(Record):
    """One encoder of the ablation of heads."""

    system: str
    mixer: str
    head: str
    codes: Count
    seed: Count
    parameters: Count  # of the encoder
    trained: Moves  # by rate of noise
    untrained: Moves  # the same encoder before training, which does not depend on the head
    changed: list[Distance]  # part of the codes that the noise changed
    next_value: Number  # error (root mean square) in parts of the range of values
    repeating: Number  # the same of repeating the value before
    coding: Number  # the same of the codebook alone
    decoded: dict[str, Decoded]  # by state variable


class AblationRecord(LabRecord):
    """Of `kmixer lab geometry --ablation`."""

    panel = "geometry-heads"

    rates: Annotated[list[Rate], Field(min_length=1)]
    directions: Count
    learned: bool
    arms: Annotated[list[HeadArm], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(len(moves.distance) != len(self.rates) for arm in self.arms for moves in (arm.trained, arm.untrained)):
            raise ValueError("arms: distance has another length than rates")
        return self


class GeometryCurve(Record):
    """One run: what perturbing its validation text did, by perturbation."""

    name: str
    width: Count
    changed: list[Distance]  # part of the tokens
    trained: Moves
    distance_error: list[Number]
    untrained: Annotated[list[Moves], Field(min_length=1)]  # a fresh encoder each

    @model_validator(mode="after")
    def _fits(self) -> Self:
        count = len(self.trained.distance)
        others = [self.changed, self.distance_error, *(moves.distance for moves in self.untrained)]
        if any(len(values) != count for values in others):
            raise ValueError("changed, distance_error, untrained: another length than trained")
        return self


class GeometryRecord(LabRecord):
    """Of `kmixer lab geometry RUN`."""

    panel = "geometry"

    perturbations: Annotated[list[str], Field(min_length=1)]
    directions: Count
    curves: Annotated[list[GeometryCurve], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(len(curve.trained.distance) != len(self.perturbations) for curve in self.curves):
            raise ValueError("curves: another length than perturbations")
        return self
