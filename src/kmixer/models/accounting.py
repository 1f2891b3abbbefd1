"""What a model costs, counted from its shapes without making it: parameters, operations, state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kmixer.models.causal_lm import CausalLM, LanguageModelConfig, count_parameters
from kmixer.models.classifiers import ClassifierConfig, build_classifier, count_example_flops
from kmixer.models.flops import count_flops, matrix_parameters, state_bytes
from kmixer.models.vision import VisionConfig


@dataclass(frozen=True)
class Account:
    """What a model and its training cost."""

    unit: Literal["token", "image", "sequence"]
    parameters: dict[str, int]  # by part
    matrix_parameters: int  # of these, in the matrices of linear maps
    positions: int  # of a sequence or an image, for the operations
    forward_flops: float  # a unit; of causal attention, each position against the keys it sees
    training_flops: float  # a unit, as papers count: three forward passes, every position against all keys
    trained_units: int  # of the whole training
    # Of bfloat16, and of the tokens that a copy memory remembers, int64.
    cache_bytes_per_token: int  # while no window is full; a mean, rounded
    constant_state_bytes: int  # whatever the length

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_training_flops(self) -> float:
        return self.trained_units * self.training_flops

    def to_json(self) -> dict[str, Any]:
        """All figures, the totals among them."""
        totals = {"total_parameters": self.total_parameters, "total_training_flops": self.total_training_flops}
        return {**asdict(self), **totals}


def account_language(config: LanguageModelConfig, vocabulary_size: int, *, window: int, tokens: int) -> Account:
    """The costs of a language model for sequences of `window` tokens and a training of `tokens` tokens."""
    with torch.device("meta"):
        model = CausalLM(config, vocabulary_size)
    a_token, constant = state_bytes(model)
    return Account(
        unit="token",
        parameters=count_parameters(model),
        matrix_parameters=matrix_parameters(model),
        positions=window,
        forward_flops=count_flops(model, window),
        training_flops=3 * count_flops(model, window, every_key=True),
        trained_units=tokens,
        cache_bytes_per_token=round(a_token),
        constant_state_bytes=constant,
    )


def account_classifier(config: ClassifierConfig, *, examples: int) -> Account:
    """The costs of a classifier and a training of so many examples, sequences at their full length."""
    with torch.device("meta"):
        model = build_classifier(config)
    return Account(
        unit="image" if isinstance(config, VisionConfig) else "sequence",
        parameters=count_parameters(model),
        matrix_parameters=matrix_parameters(model),
        positions=config.tokens if isinstance(config, VisionConfig) else config.length,
        forward_flops=count_example_flops(model),
        training_flops=3 * count_example_flops(model, every_key=True),
        trained_units=examples,
        cache_bytes_per_token=0,
        constant_state_bytes=0,
    )
