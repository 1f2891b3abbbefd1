"""Configuration of a K-Operators language model: everything that determines its function but the weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig
from kmixer.layers.base_kernel import Init
from kmixer.layers.k_operators import DecayInit
from kmixer.ops.decay import Backend

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class BaseKernelConfig(StrictConfig):
    """The causal base kernel of the K2 layers; see `kmixer.layers.BaseKernel`."""

    kind: Literal["none", "dense", "low_rank", "toeplitz", "conv"] = "conv"
    size: Positive = 8  # positions (dense, low_rank) or lags (toeplitz, conv)
    rank: Positive | None = None  # of low_rank
    shared: bool = True  # one for the whole stack, or one a layer
    init: Init = "exponential"
    gate_init: float = 0.0  # initial logit of each layer's gate

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "low_rank") != (self.rank is not None):
            raise ValueError(
                f"kind {self.kind!r} with rank {self.rank}; rank goes with kind 'low_rank' and only with it"
            )
        if self.rank is not None and self.rank > self.size:
            raise ValueError(f"rank {self.rank} is more than size {self.size}")
        return self


class DecayConfig(StrictConfig):
    """The decayed recurrence of the K2 layers; see `kmixer.layers.K2`."""

    range: Annotated[tuple[float, float], Field(strict=False)] = (0.05, 0.999)
    init: DecayInit = "time_constant"
    alpha: Literal["per_channel", "per_layer"] = "per_channel"
    alpha_cap: Annotated[float, Field(gt=0)] = 1.0
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.range
        if not 0.01 <= low < high <= 1:
            raise ValueError(f"range: got [{low}, {high}]; allowed: 0.01 <= low < high <= 1")
        return self


class RefinementConfig(StrictConfig):
    """The equilibrium loop h <- h + eta (KStack(h) - h)."""

    steps: Annotated[int, Field(ge=0)] = 1  # 0 is one plain pass; eta stays a parameter, unused
    initial_eta: Annotated[float, Field(gt=0, lt=1)] = 0.3


class HeadConfig(StrictConfig):
    """From hidden vectors to the vocabulary; see `kmixer.models.heads`."""

    kind: Literal["linear", "gelu", "adaptive"] = "linear"
    multiplier: Positive | None = None  # gelu: hidden width over d
    cutoffs: list[Positive] | None = None  # adaptive: ends of the frequency bands; None takes the author's rule
    dropout: Probability = 0.0  # gelu: on the hidden units; adaptive: on the input

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "gelu") != (self.multiplier is not None):
            raise ValueError(
                f"kind {self.kind!r} with multiplier {self.multiplier}; it goes with kind 'gelu' and only with it"
            )
        if self.cutoffs is not None and self.kind != "adaptive":
            raise ValueError(f"kind {self.kind!r} with cutoffs; cutoffs go with kind 'adaptive' only")
        if self.cutoffs is not None and self.cutoffs != sorted(set(self.cutoffs)):
            raise ValueError(f"cutoffs: got {self.cutoffs}; they must increase")
        if self.dropout and self.kind == "linear":
            raise ValueError("dropout goes with kind 'gelu' or 'adaptive'; 'linear' has none")
        return self


class DropoutConfig(StrictConfig):
    """Dropout probabilities of the stack."""

    embedding: Probability = 0.0
    mlp: Probability = 0.0  # hidden units of every feed-forward layer
    residual: Probability = 0.0  # mixing branch of the K2 layers


class ModelConfig(StrictConfig):
    """K1 -> K2 x layers -> K1 -> K0 between an embedding and a head."""

    width: Positive  # d
    layers: Positive  # number of K2 layers
    rank: Positive  # r
    embedding_width: Positive | None = None  # factorised embedding; None is `width`
    base_kernel: BaseKernelConfig = BaseKernelConfig()
    decay: DecayConfig = DecayConfig()
    refinement: RefinementConfig | None = None  # None has no eta
    head: HeadConfig = HeadConfig()
    dropout: DropoutConfig = DropoutConfig()
    output_gate: bool = False  # a gate on what every K2 mixes, by SiLU of a linear map
    copy_gate: bool = False  # hold the unused gate of the author's copy branch in every K2

    @property
    def max_positions(self) -> int | None:
        """Positions a sequence may have; None where the model streams for ever."""
        return self.base_kernel.size if self.base_kernel.kind in ("dense", "low_rank") else None
