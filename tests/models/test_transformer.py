"""The transformer keeps the laws of the language model, and matches the size of the model it is compared with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.models import CausalLM, ModelConfig, Transformer, TransformerConfig, count_parameters, transformer_like
from kmixer.training.recipe import load_recipe
from tests.models.laws import assert_a_split_gives_the_whole

VOCABULARY = 50


def make_config(**values: Any) -> TransformerConfig:
    return TransformerConfig.parse({"width": 16, "layers": 2, "heads": 2} | values, source="test")


def make_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(make_config(), VOCABULARY).double().eval()
    for parameter in model.parameters():  # away from the near-zero initialisation, so that every path matters
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_tokens(t: int, b: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(t))


@torch.no_grad()
def test_it_is_its_formula() -> None:
    model, tokens = make_model(), make_tokens(12)
    x = model.embedding.weight[tokens]

    def rms_norm(x: Tensor, norm: Any) -> Tensor:
        return norm.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-8)

    for block in model.blocks:
        x = x + block.attention(rms_norm(x, block.attention_norm))[0]
        up = rms_norm(x, block.feed_forward_norm) @ block.feed_forward.up.weight.T + block.feed_forward.up.bias
        x = x + F.gelu(up) @ block.feed_forward.down.weight.T + block.feed_forward.down.bias
    torch.testing.assert_close(model(tokens).logits, rms_norm(x, model.norm) @ model.embedding.weight.T)


@given(st.integers(1, 40), st.data())
def test_any_split_gives_the_whole(t: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, t), max_size=3)))
    assert_a_split_gives_the_whole(make_model(), make_tokens(t), cuts)


@torch.no_grad()
def test_one_token_at_a_time_gives_the_whole() -> None:
    model, tokens = make_model(), make_tokens(40)
    whole, state = model(tokens).logits, None
    for t in range(40):
        output = model(tokens[:, t : t + 1], state)
        state = output.state
        torch.testing.assert_close(output.logits, whole[:, t : t + 1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens_nor_on_other_rows() -> None:
    model, tokens = make_model(), make_tokens(40, b=3)
    before = model(tokens).logits
    changed = tokens.clone()
    changed[1, 25] = (changed[1, 25] + 1) % VOCABULARY
    after = model(changed).logits
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[1, 25], after[1, 25])
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1]).logits[0], before[row], rtol=1e-10, atol=1e-10)


def test_losses_are_those_of_the_logits() -> None:
    model, tokens = make_model(), make_tokens(20)
    losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    log_probabilities = torch.log_softmax(model(tokens[:, :-1]).logits, dim=-1)
    torch.testing.assert_close(losses, -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1))


def test_every_parameter_gets_a_gradient() -> None:
    model, tokens = make_model(), make_tokens(20)
    model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_starts_like_its_formula_says() -> None:
    model = Transformer(make_config(width=128, heads=4), 1000)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.1), name
        else:
            assert bool((parameter == (1 if "norm" in name else 0)).all()), name


def test_dropout_acts_in_training_only() -> None:
    model, tokens = Transformer(make_config(dropout=0.5), VOCABULARY), make_tokens(5)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_the_feed_forward_layers_are_four_times_as_wide_unless_told() -> None:
    assert make_config().hidden_width == 64
    assert make_config(mlp_multiplier=1.3).hidden_width == 24
    assert make_config(mlp_multiplier=0.01).hidden_width == 8
    hidden = Transformer(make_config(mlp_multiplier=1.3), VOCABULARY).blocks[0].feed_forward.up.out_features
    assert hidden == 24


H2, H4 = "k-operators-v2-shakespeare", "k-operators-local-shakespeare"


@pytest.mark.parametrize(("recipe", "heads", "count"), [(H2, 4, 811_056), (H4, 2, 171_792)])
def test_the_transformer_like_a_recipe_has_its_size(recipe: str, heads: int, count: int) -> None:
    loaded = load_recipe(recipe)
    v = loaded.tokenizer.vocabulary_size
    config = transformer_like(loaded.model, v)
    size = sum(count_parameters(Transformer(config, v)).values())
    assert (config.width, config.layers, config.heads) == (loaded.model.width, loaded.model.layers, heads)
    assert size == count
    assert size == pytest.approx(sum(count_parameters(CausalLM(loaded.model, v)).values()), rel=0.02)


@settings(max_examples=15)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 9), st.integers(2, 500))
def test_no_other_hidden_width_comes_closer(half_width: int, layers: int, rank: int, v: int) -> None:
    config = ModelConfig(width=2 * half_width, layers=layers, rank=rank)
    chosen = transformer_like(config, v)

    def distance(hidden_width: int) -> int:
        near = chosen.model_copy(update={"mlp_multiplier": hidden_width / chosen.width})
        with torch.device("meta"):
            ours, theirs = Transformer(near, v), CausalLM(config, v)
        return abs(sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in theirs.parameters()))

    for other in (chosen.hidden_width - 8, chosen.hidden_width + 8):
        assert other < 8 or distance(chosen.hidden_width) <= distance(other)


def test_wrong_configurations_are_named() -> None:
    with pytest.raises(InputError, match="test: heads: got 3 for width 16; heads must divide width"):
        make_config(heads=3)
    with pytest.raises(InputError, match="unknown key head; did you mean heads"):
        make_config(head=3)
    with pytest.raises(InputError, match="width: got 7; a transformer with rotary positions needs an even one"):
        transformer_like(ModelConfig(width=7, layers=1, rank=2), VOCABULARY)
    with pytest.raises(InputError, match=r"tokens: got shape \(3,\); allowed: \(batch, time\)"):
        Transformer.forward.__wrapped__(make_model(), torch.zeros(3, dtype=torch.long))
