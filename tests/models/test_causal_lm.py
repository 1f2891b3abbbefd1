"""The language model: all three families keep the laws, and have the published numbers of parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kmixer
from kmixer.errors import InputError
from kmixer.models import CausalLM, KStack, ModelConfig, count_parameters
from kmixer.runs.recipe import load_recipe
from tests.models.laws import assert_a_split_gives_the_whole, draw_cuts, of_model, one_at_a_time

VOCABULARY = 1100

FAMILIES: dict[str, dict[str, Any]] = {
    "a": {
        "base_kernel": {"kind": "dense", "size": 60, "shared": False, "init": "uniform", "gate_init": 8.0},
        "decay": {"range": [0.85, 1.0], "init": "fraction", "alpha": "per_layer", "alpha_cap": 0.8},
        "refinement": {"steps": 2},
        "head": {"kind": "gelu", "multiplier": 1},
    },
    "b": {
        "base_kernel": {"kind": "low_rank", "size": 60, "shared": True, "rank": 2, "init": "uniform"},
        "decay": {"range": [0.15, 0.995], "init": "linear", "alpha": "per_layer"},
        "refinement": {"steps": 0},
        "head": {"kind": "adaptive", "cutoffs": [300, 700]},
        "embedding_width": 8,
    },
    "c": {"base_kernel": {"kind": "conv", "size": 8}, "copy_gate": True},
    "c factorised": {"base_kernel": {"kind": "toeplitz", "size": 40}, "embedding_width": 8},
    "no base kernel": {"base_kernel": {"kind": "none"}, "refinement": {"steps": 1}},
}


def make_model(family: str) -> CausalLM:
    torch.manual_seed(0)
    values = {"width": 16, "layers": 2, "rank": 3, **FAMILIES[family]}
    model = CausalLM(ModelConfig.parse(values, source="test"), VOCABULARY).double().eval()
    for parameter in model.parameters():  # away from the near-zero initialisation, so that every path matters
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_tokens(t: int, b: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(t))


families = pytest.mark.parametrize("family", FAMILIES)


@families
@given(st.integers(1, 60), st.data())
def test_any_split_gives_the_whole(family: str, t: int, data: st.DataObject) -> None:
    model = make_model(family)
    cuts, start = draw_cuts(data, t), model.initial_state(2)
    assert_a_split_gives_the_whole(of_model(model, make_tokens(t)), t, cuts, start=start)


@families
def test_one_token_at_a_time_gives_the_whole(family: str) -> None:
    assert_a_split_gives_the_whole(of_model(make_model(family), make_tokens(60)), 60, one_at_a_time(60))


@families
@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens(family: str) -> None:
    model, tokens = make_model(family), make_tokens(50)
    before = model(tokens).logits
    tokens[:, 30] = (tokens[:, 30] + 1) % VOCABULARY
    after = model(tokens).logits
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30], after[:, 30])


@families
@torch.no_grad()
def test_a_padded_batch_equals_its_rows(family: str) -> None:
    model = make_model(family)
    lengths = [60, 1, 33, 17]
    rows = [make_tokens(length, 1) for length in lengths]
    padded = torch.cat([torch.cat([row, row.new_zeros(1, 60 - row.shape[1])], 1) for row in rows])
    logits = model(padded).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index : index + 1, : row.shape[1]], model(row).logits, rtol=1e-11, atol=1e-11)


@families
def test_losses_are_those_of_the_logits(family: str) -> None:
    model, tokens = make_model(family), make_tokens(30)
    losses = model(tokens[:, :-1], targets=tokens[:, 1:]).losses
    log_probabilities = torch.log_softmax(model(tokens[:, :-1]).logits, dim=-1)
    expected = -log_probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(losses, expected)


@families
def test_every_trainable_parameter_gets_a_gradient(family: str) -> None:
    model, tokens = make_model(family), torch.arange(2 * 60).view(2, 60) * 9 % VOCABULARY
    model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_refinement_is_its_formula() -> None:
    torch.manual_seed(0)
    values = {"width": 8, "layers": 1, "rank": 2}
    refined = KStack(ModelConfig.parse({**values, "refinement": {"steps": 3}}, source="test")).double()
    plain = KStack(ModelConfig.parse(values, source="test")).double()
    plain.load_state_dict({k: v for k, v in refined.state_dict().items() if k != "eta_logit"})
    assert math.isclose(refined.eta().item(), 0.3, rel_tol=1e-6)
    h = expected = torch.randn(2, 20, 8, dtype=torch.float64)
    for _ in range(3):
        expected = expected + refined.eta() * (plain(expected)[0] - expected)
    torch.testing.assert_close(refined(h)[0], expected)


def test_zero_refinement_steps_are_a_plain_pass() -> None:
    torch.manual_seed(0)
    values = {"width": 8, "layers": 1, "rank": 2}
    unrefined = KStack(ModelConfig.parse({**values, "refinement": {"steps": 0}}, source="test"))
    plain = KStack(ModelConfig.parse(values, source="test"))
    plain.load_state_dict({k: v for k, v in unrefined.state_dict().items() if k != "eta_logit"})
    h = torch.randn(1, 9, 8)
    assert torch.equal(unrefined(h)[0], plain(h)[0])
    assert unrefined.eta_logit is not None
    assert not unrefined.eta_logit.requires_grad


def test_the_order_of_the_adaptive_head_relabels_and_nothing_else() -> None:
    model, tokens = make_model("b"), make_tokens(20)
    before = torch.log_softmax(model(tokens).logits, -1)
    counts = torch.randint(100, (VOCABULARY,), generator=torch.Generator().manual_seed(1))
    model.head.set_frequencies(counts)
    order = torch.argsort(counts, descending=True, stable=True)
    after = torch.log_softmax(model(tokens).logits, -1)
    torch.testing.assert_close(after[..., order], before)
    assert "head.order" in model.state_dict()


def test_dropout_acts_in_training_only() -> None:
    values = {"width": 8, "layers": 1, "rank": 2, "dropout": {"embedding": 0.5, "mlp": 0.5, "residual": 0.5}}
    model, tokens = CausalLM(ModelConfig.parse(values, source="test"), VOCABULARY), make_tokens(5)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


V1, V2, WT2 = "k-operators-v1-shakespeare", "k-operators-v2-shakespeare", "k-operators-v2-wikitext2"
LOW_RANK = ["model.base_kernel.shared=false", "model.base_kernel.kind=low_rank", "model.base_kernel.rank=2"]


@pytest.mark.parametrize(
    ("recipe", "settings", "count"),
    [
        (V1, [], 1_137_869),
        (V2, [], 810_189),
        (V2, ["model.base_kernel.shared=false"], 1_137_869),
        (V2, LOW_RANK, 750_797),
        (WT2, [], 4_081_357),
        (WT2, ["model.base_kernel.shared=false"], 5_392_077),
        (WT2, LOW_RANK, 3_831_501),
        (WT2, ["model.base_kernel.kind=none"], 3_819_207),
        ("k-operators-local-shakespeare", [], 174_468),
        ("k-operators-local-bytes", [], 186_692),
        ("k-operators-copy-shakespeare", [], 178_692),
        ("k-operators-copy-bytes", [], 203_140),
    ],
)
def test_published_numbers_of_parameters(recipe: str, settings: list[str], count: int) -> None:
    model = kmixer.LanguageModel.from_recipe(recipe, settings)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(count_parameters(model).values()) == count


def test_initial_weights_are_konekos() -> None:
    loaded = load_recipe(V2)
    model = CausalLM(loaded.model, loaded.tokenizer.vocabulary_size)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "kernel" not in name:
            std = 0.05 if name.endswith(("query", "key")) else 0.02
            assert math.isclose(parameter.std().item(), std, rel_tol=0.1), name
        elif name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name


def test_heads_that_cannot_be_are_named() -> None:
    values = {"width": 16, "layers": 1, "rank": 2, "head": {"kind": "adaptive", "cutoffs": [5, 2000]}}
    with pytest.raises(InputError, match=r"cutoffs: got \[5, 2000\]; all must be below the vocabulary's 1100"):
        CausalLM(ModelConfig.parse(values, source="test"), VOCABULARY)
    values |= {"width": 12, "head": {"kind": "adaptive"}}
    with pytest.raises(InputError, match=r"width: got 12; 2 adaptive cutoffs need 16"):
        CausalLM(ModelConfig.parse(values, source="test"), VOCABULARY)


def test_tokens_of_a_wrong_shape_are_named() -> None:
    with pytest.raises(InputError, match=r"tokens: got shape \(3,\); allowed: \(batch, time\)"):
        CausalLM.forward.__wrapped__(make_model("c"), torch.zeros(3, dtype=torch.long))
