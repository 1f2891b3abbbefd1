"""Models to compare with: equal budgets, named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kmixer.errors import InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import ModelConfig
from kmixer.models.transformer import HIDDEN_MULTIPLE, TransformerConfig

# Head width of `transformer_like`, where the width allows it.
HEAD_WIDTH = 32


def transformer_like(config: ModelConfig, vocabulary_size: int) -> TransformerConfig:
    """The transformer to compare a K-Operators model with.

    Matched: the width, the depth in mixing layers (K2 layers against attention layers; the two K1
    layers and K0 have no counterpart), and the number of parameters, all of them counted, by the
    hidden width of the feed-forward layers: the multiple of 8 that comes closest, 8 at least.
    Not matched: FLOPs, the size of the state, dropout (0 here), the head, which is tied.
    The head width is 32, or the even divisor of the width that is closest to it.

    Raises InputError for an odd width, which no even head width divides.
    """
    width = config.width
    if width % 2:
        raise InputError(f"width: got {width}; a transformer with rotary positions needs an even one")
    head_width = min((e for e in range(2, width + 1, 2) if width % e == 0), key=lambda e: abs(e - HEAD_WIDTH))

    def with_hidden(hidden: int) -> TransformerConfig:
        heads, multiplier = width // head_width, hidden / width
        return TransformerConfig(width=width, layers=config.layers, heads=heads, mlp_multiplier=multiplier)

    with torch.device("meta"):
        target = size_of(CausalLM(config, vocabulary_size))
    return closest_hidden(with_hidden, vocabulary_size, target)


def closest_hidden(
    with_hidden: Callable[[int], TransformerConfig], vocabulary_size: int, target: int
) -> TransformerConfig:
    """The transformer with the number of parameters closest to `target`.

    Its hidden width is a multiple of 8, 8 at least; parameters are a straight line over it.
    """
    with torch.device("meta"):
        smallest, second = (
            size_of(CausalLM(with_hidden(steps * HIDDEN_MULTIPLE), vocabulary_size)) for steps in (1, 2)
        )
    steps = 1 + max(0, round((target - smallest) / (second - smallest)))
    return with_hidden(steps * HIDDEN_MULTIPLE)


def size_of(model: nn.Module) -> int:
    """The number of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
