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
from kmixer.runs.recipe import load_recipe
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts, of_model, one_at_a_time

VOCABULARY = 50


def make_config(**values: Any) -> TransformerConfig:
    return TransformerConfig.parse({"width": 16, "layers": 2, "heads": 2} | values, source="test")


# What a configuration can ask for beside the plain transformer.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "gaussian": {"mixers": ["gaussian"], "blocks": "nanochat", "windows": "SSSL", "window": 5, "layers": 4},
    "hybrid": {"mixers": ["gaussian", "k2", "softmax"], "layers": 4},
    "nanochat": {
        "blocks": "nanochat",
        "windows": "SL",
        "window": 5,
        "value_embeddings": True,
        "softmax": {"query_key_norm": True},
        "head": {"kind": "untied", "soft_cap": 15.0},
    },
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def make_model(variant: str = "softmax") -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(make_config(**VARIANTS[variant]), VOCABULARY).double().eval()
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

    for block in model.stack.blocks:
        x = x + block.mixer(rms_norm(x, block.mixing_norm))[0]
        up = rms_norm(x, block.feed_forward_norm) @ block.feed_forward.up.weight.T + block.feed_forward.up.bias
        x = x + F.gelu(up) @ block.feed_forward.down.weight.T + block.feed_forward.down.bias
    torch.testing.assert_close(model(tokens).logits, rms_norm(x, model.norm) @ model.embedding.weight.T)


@torch.no_grad()
def test_the_blocks_of_nanochat_are_their_formula() -> None:
    model, tokens = make_model("nanochat"), make_tokens(12)
    stack: Any = model.stack

    def norm(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-8)

    x = first = norm(model.embedding.weight[tokens])
    for layer, block in enumerate(stack.blocks):
        x = stack.stream_scale[layer] * x + stack.input_scale[layer] * first
        extra = stack.value_embeddings["1"].weight[tokens] if layer == 1 else None
        assert block.mixer.reach == (5 if layer == 0 else None)
        x = x + block.mixer(norm(x), None, *(() if extra is None else (extra,)))[0]
        x = x + torch.relu(norm(x) @ block.feed_forward.up.weight.T) ** 2 @ block.feed_forward.down.weight.T
    logits = norm(x) @ model.head.to_logits.weight.T
    torch.testing.assert_close(model(tokens).logits, 15 * torch.tanh(logits / 15))
    assert set(stack.value_embeddings) == {"1"}


def test_layers_take_their_mixers_and_windows_in_turn() -> None:
    config = make_config(layers=8, mixers=["gaussian", "gaussian", "gaussian", "softmax"], windows="SSSL", window=9)
    assert [config.mixer_of(i) for i in range(8)] == ["gaussian", "gaussian", "gaussian", "softmax"] * 2
    assert [config.window_of(i) for i in range(8)] == [9, 9, 9, None] * 2
    assert not any(config.has_value_embedding(i) for i in range(8))
    chosen = config.model_copy(update={"value_embeddings": True, "layers": 5, "mixers": ("softmax",)})
    assert [chosen.has_value_embedding(i) for i in range(5)] == [True, False, True, False, True]


@variants
@given(st.integers(1, 40), st.data())
def test_any_split_gives_the_whole(variant: str, t: int, data: st.DataObject) -> None:
    model = make_model(variant)
    cuts, start = draw_cuts(data, t), model.initial_state(2)
    assert_a_split_gives_the_whole(of_model(model, make_tokens(t)), t, cuts, start=start)


@variants
def test_one_token_at_a_time_gives_the_whole(variant: str) -> None:
    assert_a_split_gives_the_whole(of_model(make_model(variant), make_tokens(40)), 40, one_at_a_time(40))


@variants
@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens_nor_on_other_rows(variant: str) -> None:
    model, tokens = make_model(variant), make_tokens(40, b=3)
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


@variants
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model, tokens = make_model(variant), make_tokens(20)
    model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_it_starts_like_its_formula_says() -> None:
    model = CausalLM(make_config(width=128, heads=4), 1000)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert math.isclose(parameter.std().item(), 0.02, rel_tol=0.1), name
        else:
            assert bool((parameter == (1 if "norm" in name else 0)).all()), name


@pytest.mark.parametrize("key", ["embedding", "mlp", "residual"])
def test_dropout_acts_in_training_only(key: str) -> None:
    model, tokens = CausalLM(make_config(dropout={key: 0.5}), VOCABULARY), make_tokens(5)
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
    size = sum(count_parameters(CausalLM(config, v)).values())
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
            ours, theirs = CausalLM(near, v), CausalLM(config, v)
        return abs(sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in theirs.parameters()))

    for other in (chosen.hidden_width - 8, chosen.hidden_width + 8):
        assert other < 8 or distance(chosen.hidden_width) <= distance(other)


def test_wrong_configurations_are_named() -> None:
    with pytest.raises(InputError, match="test: heads: got 3 for width 16; heads must divide width"):
        make_config(heads=3)
    with pytest.raises(InputError, match="unknown key layer; did you mean layers"):
        make_config(layer=3)
    with pytest.raises(InputError, match="windows 'SL' with window None; S layers need one, and only they do"):
        make_config(windows="SL")
    with pytest.raises(InputError, match="layer 0 is short, and its mixer k2 has no window"):
        make_config(windows="S", window=3, mixers=["k2"])
    with pytest.raises(InputError, match=r"sinkhorn needs all queries.* allowed: gaussian, hierarchical, k2, softmax$"):
        make_config(mixers=["softmax", "sinkhorn"])
    with pytest.raises(InputError, match="base_kernel: got kind 'conv', shared True; allowed here: none"):
        make_config(k2={"base_kernel": {"kind": "conv"}})
    with pytest.raises(InputError, match=r"tokens: missing; this stack has value embeddings, which need them"):
        make_model("nanochat").stack(torch.zeros(1, 3, 16, dtype=torch.float64))
    with pytest.raises(InputError, match="width: got 7; a transformer with rotary positions needs an even one"):
        transformer_like(ModelConfig(width=7, layers=1, rank=2), VOCABULARY)
    with pytest.raises(InputError, match=r"tokens: got shape \(3,\); allowed: \(batch, time\)"):
        CausalLM.forward.__wrapped__(make_model(), torch.zeros(3, dtype=torch.long))
