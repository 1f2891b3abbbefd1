"""What a model costs, counted from its shapes without making it: parameters, operations, state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kmixer.models.causal_lm import CausalLM, count_parameters
from kmixer.models.config import LanguageModelConfig
from kmixer.models.flops import cache_size, count_flops, linear_flops

# Bytes of a number in a cache: bfloat16.
CACHE_BYTES = 2


@dataclass(frozen=True)
class Account:
    """What a language model and its training cost."""

    parameters: dict[str, int]  # by part
    matrix_parameters: int  # of these, in matrices that every token is multiplied with
    window: int  # tokens of a sequence, for the operations
    forward_flops: float  # a token, each position against the keys it sees
    training_flops: float  # a token, as papers count: three forward passes, every position against all keys
    tokens: int  # of the whole training
    cache_bytes_per_token: int  # bfloat16, while no window is full
    constant_state_bytes: int  # bfloat16, whatever the length

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_training_flops(self) -> float:
        return self.tokens * self.training_flops

    def to_json(self) -> dict[str, Any]:
        """All figures, the totals among them."""
        totals = {"total_parameters": self.total_parameters, "total_training_flops": self.total_training_flops}
        return {**asdict(self), **totals}


def account(config: LanguageModelConfig, vocabulary_size: int, *, window: int, tokens: int) -> Account:
    """Count a configuration's costs for sequences of `window` tokens and a training of `tokens` tokens."""
    with torch.device("meta"):
        model = CausalLM(config, vocabulary_size)
    a_token, constant = cache_size(model)
    return Account(
        parameters=count_parameters(model),
        matrix_parameters=round(linear_flops(model) / 2),
        window=window,
        forward_flops=count_flops(model, window),
        training_flops=3 * count_flops(model, window, every_key=True),
        tokens=tokens,
        cache_bytes_per_token=CACHE_BYTES * a_token,
        constant_state_bytes=CACHE_BYTES * constant,
    )
