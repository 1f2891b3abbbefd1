"""The mixers that a configuration names: one function each, from its settings to its layer.

Every mixer takes x (b, t, d), normalised, and a state, and returns y (b, t, d) and the new state; the
block around it adds the residual. A new mixer is a function here and its name in `MixerName`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from kmixer.errors import InputError
from kmixer.layers import BaseKernel, GaussianAttention, HierarchicalAttention, K2Mixer, SoftmaxAttention
from kmixer.models.config import BaseKernelConfig, DecayConfig, MixerName, MixersConfig


@dataclass(frozen=True)
class Place:
    """Where a mixer stands: what the model around it decides."""

    width: int  # d
    causal: bool = True
    rotary: bool = True  # positions enter by rotation of keys; otherwise the model adds them to the input
    bias: bool = False  # of the matrices
    window: int | None = None  # positions it sees; None is all of them
    window_inclusive: bool = False
    value_embedding: bool = False

    def seen(self) -> dict[str, Any]:
        """What attention sees, as arguments of its layer."""
        names = ("causal", "rotary", "bias", "window", "window_inclusive")
        return {name: getattr(self, name) for name in names}


def build_mixer(name: MixerName, config: MixersConfig, place: Place) -> nn.Module:
    """The mixer of this name, with fresh weights."""
    return MIXERS[name](config, place)


def _gaussian(config: MixersConfig, place: Place) -> nn.Module:
    settings = config.gaussian.model_dump()
    if settings["head_norm"] is None:
        settings["head_norm"] = place.rotary
    return GaussianAttention(place.width, config.heads, **settings, **place.seen())


def _hierarchical(config: MixersConfig, place: Place) -> nn.Module:
    return HierarchicalAttention(
        place.width,
        config.heads,
        causal=place.causal,
        rotary=place.rotary,
        bias=place.bias,
        **config.hierarchical.model_dump(),
    )


def _k2(config: MixersConfig, place: Place) -> nn.Module:
    if not place.causal:
        raise InputError("mixer k2 mixes with the past only; allowed here: gaussian, hierarchical, softmax")
    settings = config.k2
    return K2Mixer(
        place.width,
        settings.rank,
        base_kernel=build_base_kernel(settings.base_kernel),
        gate_init=settings.base_kernel.gate_init,
        output_gate=settings.output_gate,
        **decay_options(settings.decay),
    )


def _softmax(config: MixersConfig, place: Place) -> nn.Module:
    settings = config.softmax.model_dump()
    return SoftmaxAttention(
        place.width, config.heads, value_embedding=place.value_embedding, **settings, **place.seen()
    )


MIXERS: dict[MixerName, Callable[[MixersConfig, Place], nn.Module]] = {
    "gaussian": _gaussian,
    "hierarchical": _hierarchical,
    "k2": _k2,
    "softmax": _softmax,
}


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
