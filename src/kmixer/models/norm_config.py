"""Which norm stands where in a model, and how it begins."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from kmixer.config import StrictConfig
from kmixer.layers.norms import Derf, DyT, RMSNorm, UnweightedRMSNorm

Kind = Literal["rms", "layer", "dyt", "derf"]
# Before the mixing of a block, before its feed-forward part, and at the end of a stack or inside a head.
NormPlace = Literal["mixing", "feed_forward", "final"]
Alpha = Annotated[float, Field(gt=0)]

DEFAULT_ALPHA = 0.5
LAYER_NORM_EPS = 1e-6


class AlphaByPlace(StrictConfig):
    """Where the alphas of a model start."""

    mixing: Alpha = DEFAULT_ALPHA
    feed_forward: Alpha = DEFAULT_ALPHA
    final: Alpha = DEFAULT_ALPHA


class NormConfig(StrictConfig):
    """The norms of a model; see `kmixer.layers.norms`. Norms of queries and keys are part of their mixer."""

    kind: Kind = "rms"  # dyt, derf: functions of every number alone, which do not see the scale of the stream
    final: Kind | None = None  # of the last norm and those of heads and read-outs; None is `kind`
    alpha: Alpha | AlphaByPlace | None = None  # dyt, derf: where alpha starts; None is 0.5
    # unit: before the first step, alpha and gain are set on a training batch so that every branch starts as strong as
    # with RMSNorm, whatever the scale of the stream; see `kmixer.training.norm_matching`.
    match: Literal["none", "unit"] = "none"
    bias: bool = False  # of layer, dyt and derf

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.pointwise and (self.alpha is not None or self.match != "none"):
            key = "alpha" if self.alpha is not None else "match"
            raise ValueError(f"norm.{key} goes with kind 'dyt' or 'derf'; {self.kind!r} has none")
        return self

    @property
    def pointwise(self) -> bool:
        """Whether any of the norms is a function of every number alone."""
        return {self.kind, self.kind_at("final")} & {"dyt", "derf"} != set()

    def kind_at(self, place: NormPlace) -> Kind:
        """Of the norms of a place."""
        return self.kind if place != "final" or self.final is None else self.final

    def alpha_at(self, place: NormPlace) -> float:
        """Where the alpha of a norm starts."""
        if isinstance(self.alpha, AlphaByPlace):
            return float(getattr(self.alpha, place))
        return DEFAULT_ALPHA if self.alpha is None else self.alpha

    def build(self, width: int, place: NormPlace, *, parameters: bool = True) -> nn.Module:
        """A fresh norm; without parameters it has no weight, gain and bias, but still alpha and shift."""
        kind = self.kind_at(place)
        if kind == "rms":
            return RMSNorm(width) if parameters else UnweightedRMSNorm()
        if kind == "layer":
            return nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=parameters, bias=self.bias)
        norm = DyT if kind == "dyt" else Derf
        return norm(width, self.alpha_at(place), gain=parameters, bias=parameters and self.bias)

    def before_branches(self, width: int, *, parameters: bool = True) -> tuple[nn.Module, nn.Module]:
        """The two norms of a block."""
        mixing = self.build(width, "mixing", parameters=parameters)
        return mixing, self.build(width, "feed_forward", parameters=parameters)

    def for_read_out(self, width: int) -> nn.Module:
        """The norm of `K0`, which has a gain and a bias itself; the published one has a weight all the same."""
        return self.build(width, "final", parameters=self.kind_at("final") == "rms")


class VisionNormConfig(NormConfig):
    """The norms of a vision transformer."""

    kind: Kind = "layer"
    bias: bool = True
