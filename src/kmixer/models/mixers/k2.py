"""The mixing of a K2 layer: the card, and the settings that a K-Stack shares with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kmixer.config import StrictConfig, Taps, Width
from kmixer.layers import BaseKernel, K2Mixer
from kmixer.layers.base_kernel import Init
from kmixer.layers.k_operators import DecayInit
from kmixer.models.mixers.card import MixerCard, Place
from kmixer.models.mixers.cost import kernel_operations, linear_operations
from kmixer.ops.base_kernel import LowRankState
from kmixer.ops.decay.recurrence import Backend


class BaseKernelConfig(StrictConfig):
    """The causal base kernel of the K2 layers; see `kmixer.layers.BaseKernel`."""

    kind: Literal["none", "dense", "low_rank", "toeplitz", "conv"] = "conv"
    size: Taps = 8  # positions (dense, low_rank) or lags (toeplitz, conv)
    rank: Width | None = None  # of low_rank
    shared: bool = True  # one for the whole stack, or one per layer
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


class K2Config(StrictConfig):
    """The mixing of a K2 layer, each layer with its own base kernel; see `kmixer.layers.K2Mixer`."""

    rank: Width = 4
    base_kernel: BaseKernelConfig = BaseKernelConfig(shared=False)
    decay: DecayConfig = DecayConfig()
    output_gate: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.base_kernel.shared or self.base_kernel.kind in ("dense", "low_rank"):
            raise ValueError(
                f"base_kernel: got kind {self.base_kernel.kind!r}, shared {self.base_kernel.shared}; "
                "allowed here: none, toeplitz, conv with shared = false (a k-stack takes all)"
            )
        return self


def build_base_kernel(config: BaseKernelConfig) -> BaseKernel | None:
    """The base kernel of a configuration; None for kind "none"."""
    if config.kind == "none":
        return None
    return BaseKernel(config.kind, config.size, rank=config.rank or 0, init=config.init)


def decay_options(config: DecayConfig) -> dict[str, Any]:
    """A decay configuration as arguments of `K2Mixer`."""
    return {
        "decay_range": config.range,
        "decay_init": config.init,
        "alpha_cap": config.alpha_cap,
        "alpha_per_channel": config.alpha == "per_channel",
        "backend": config.backend,
    }


def _build(settings: K2Config, heads: int, place: Place) -> K2Mixer:
    return K2Mixer(
        place.width,
        settings.rank,
        base_kernel=build_base_kernel(settings.base_kernel),
        gate_init=settings.base_kernel.gate_init,
        output_gate=settings.output_gate,
        **decay_options(settings.decay),
    )


def _operations(layer: K2Mixer, window: int, shared: BaseKernel | None = None, *, every_key: bool = False) -> float:
    """Linear maps, queries and keys, the decay path as its recurrence, and the base kernel, be it the stack's."""
    queries_keys, recurrence = 4 * layer.width * layer.rank, 6 * layer.rank * layer.width
    kernel = kernel_operations(layer.base_kernel or shared, window, layer.width)
    return linear_operations(layer) + queries_keys + recurrence + kernel


def _state_numbers(layer: K2Mixer, shared: BaseKernel | None = None) -> tuple[float, int]:
    kernel = layer.base_kernel or shared
    with torch.device("meta"):
        state = None if kernel is None else kernel.initial_state(1, layer.width)
    # A dense kernel keeps all of its inputs, and ends at its size.
    a_token = layer.width if kernel is not None and kernel.kind == "dense" else 0
    decay = layer.rank * layer.width
    kept = state.sums if isinstance(state, LowRankState) else state
    return a_token, decay + (kept.numel() if isinstance(kept, Tensor) else 0)


CARD = MixerCard(
    name="k2",
    settings=K2Config,
    layer=K2Mixer,
    build=_build,
    operations=_operations,
    state_numbers=_state_numbers,
    state_grows=False,
    sees_both_ways=False,
    has_window=False,
    has_heads=False,
)
