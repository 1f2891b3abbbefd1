"""Shapes of what an evaluation records of a model beside its loss: of levels, copies, fast weights, norms and more."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kmixer.runs.record_types import Count, Number, PerHead, PerLevel, Record, check_even, check_lengths, shape_of


class Levels(Record, extra="allow"):
    """What was measured on one hierarchical layer, a list per level."""

    reciprocity: PerHead
    smallest_eigenvalue: PerHead
    kurtosis: list[list[Number]]
    fit_error: list[list[Number]]
    remainder: PerHead


class Locality(Record, extra="allow"):
    """Where the heads of the attention layers look."""

    effective_keys: PerHead
    distance: PerHead
    self_weight: PerHead | None = None


class Copies(Record, extra="allow"):
    """What a copy memory is worth, a number for every bucket of lengths of matches."""

    layers: list[Count]  # that take copies
    lengths: Annotated[list[str], Field(min_length=1)]  # as the buckets are called
    positions: list[Count]
    right: list[Number | None]
    loss: list[Number | None]
    loss_without: list[Number | None]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_lengths(self, "copies", dict.fromkeys(("positions", "right", "loss", "loss_without"), "lengths"))
        return self


class FastWeightsWorth(Record, extra="allow"):
    """How far fast weights moved by layer, and the loss with adapting and without by stretch of positions."""

    layers: Annotated[list[str], Field(min_length=1)]
    moves: list[Number]
    positions: Annotated[list[Count], Field(min_length=1)]  # the last of every stretch
    loss: list[Number]
    loss_without: list[Number]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        likes = {"moves": "layers", "loss": "positions", "loss_without": "positions"}
        check_lengths(self, "fast_weights", likes)
        return self


class Norms(Record, extra="allow"):
    """How norms that are functions of every number alone are used, a number for each."""

    names: Annotated[list[str], Field(min_length=1)]
    alpha: list[Number]
    shift: list[Number]
    saturation: list[Number]
    input: list[Number]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_lengths(self, "norms", dict.fromkeys(("alpha", "shift", "saturation", "input"), "names"))
        return self


class Dynamics(Record, extra="allow"):
    """What an evaluation recorded of a model, see `kmixer.measure.dynamics`; mixers of others may record more."""

    gate: list[Number] | None = None
    base_share: list[Number] | None = None
    base_kernel: list[Annotated[list[Number], Field(min_length=1)]] | None = None
    alpha: PerHead | None = None
    decay: PerHead | None = None
    eta: Number | None = None
    residuals: list[Number] | None = None
    sigma: PerHead | None = None
    locality: Locality | None = None
    level_weights: PerLevel | None = None
    levels: Annotated[list[Levels], Field(min_length=1)] | None = None
    copy_gate: list[Number] | PerHead | None = None  # by layer, and by length of the match where the gate knows it
    copies: Copies | None = None
    fast_weights: FastWeightsWorth | None = None
    norms: Norms | None = None
    column_residual: Annotated[list[Number], Field(min_length=1)] | None = None
    temperature: PerHead | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("sigma", "level_weights"):
            check_even(getattr(self, name), name)
        if self.locality is not None:
            check_even(self.locality.effective_keys, "effective_keys")
            check_even(self.locality.distance, "distance")
        if (self.eta is None) != (self.residuals is None):
            raise ValueError("eta without residuals")
        if (self.levels is None) != (self.level_weights is None):
            raise ValueError("levels without level_weights")
        if self.levels is not None and self.level_weights is not None and len(self.levels) != len(self.level_weights):
            raise ValueError("levels and level_weights are of different layers")
        if (self.copies is None) != (self.copy_gate is None):
            raise ValueError("copies without copy_gate")
        if self.copies is not None and self.copy_gate is not None:
            layers, lengths = len(self.copies.layers), len(self.copies.lengths)
            if shape_of(self.copy_gate) not in ((layers,), (layers, lengths)):
                raise ValueError("copy_gate and copies are of different layers or lengths")
        return self
