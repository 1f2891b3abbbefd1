"""Tokens and states are checked once where they enter a language model, and wrong ones named in one line."""

from __future__ import annotations

import pytest
import torch

from kmixer.errors import InputError
from kmixer.layers import K2
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.models.causal_lm import check_tokens

MODELS = {
    "k-stack": ModelConfig.parse({"width": 8, "layers": 2, "rank": 2}, source="test"),
    "transformer": TransformerConfig(width=8, layers=2, heads=2),
}
models = pytest.mark.parametrize("kind", MODELS)


@models
@pytest.mark.parametrize("token", [1 << 40, -1, 11])
def test_a_token_outside_the_vocabulary_is_named(kind: str, token: int) -> None:
    model = CausalLM(MODELS[kind], 11)
    tokens = torch.tensor([[0, 10], [token, 3]])
    for targets in (None, torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(InputError, match=rf"^tokens: got {token}; allowed: 0 to 10, this model's vocabulary$"):
            model(tokens, targets=targets)


def test_tokens_of_another_dtype_or_shape_are_named() -> None:
    with pytest.raises(InputError, match=r"^tokens: got torch.float32; allowed: torch.int64, the numbers that"):
        check_tokens(torch.zeros(2, 3), 11)
    with pytest.raises(InputError, match=r"^tokens: got shape \(3,\); allowed: \(batch, time\)$"):
        check_tokens(torch.zeros(3, dtype=torch.long), 11)
    check_tokens(torch.zeros(2, 0, dtype=torch.long), 11)


@models
@torch.no_grad()
def test_a_state_of_another_batch_or_model_is_named(kind: str) -> None:
    model, tokens = CausalLM(MODELS[kind], 11), torch.zeros(2, 3, dtype=torch.long)
    other = CausalLM(MODELS["transformer" if kind == "k-stack" else "k-stack"], 11)
    for state in (model.initial_state(3), other.initial_state(2), (None,), torch.zeros(2)):
        with pytest.raises(InputError, match=r"^state: got .*; allowed there: .*; give what this model returned for a"):
            model(tokens, state)
    model(tokens, model(tokens).state)


@torch.no_grad()
def test_states_are_compared_with_the_parts_that_a_model_has_now() -> None:
    model, tokens = CausalLM(MODELS["k-stack"], 11), torch.zeros(2, 3, dtype=torch.long)
    before = model(tokens, model.initial_state(2)).state
    model.stack.blocks[0] = K2(8, 5, base_kernel="shared")  # type: ignore[union-attr, operator]
    model(tokens, model.initial_state(2))
    with pytest.raises(InputError, match=r"^state: got \(2, 2, 8\) at .*decay; allowed there: \(2, 5, 8\);"):
        model(tokens, before)
