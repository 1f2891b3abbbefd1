"""Counted operations against sums made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kmixer.models import CausalLM, ModelConfig, TransformerConfig, count_flops
from kmixer.models.accounting import account_classifier
from kmixer.models.flops import TOKEN_BYTES, state_bytes
from kmixer.models.sequence_classifier import SequenceClassifierConfig
from kmixer.state import State, tensors

D, R, V, T = 16, 4, 20, 32
FLOAT32 = 4  # bytes
K1 = 2 * D * D + 2 * 2 * D * 2 * D
K2 = K1 + 2 * D * 2 * R + 6 * R * D


def lm(**values: object) -> CausalLM:
    return CausalLM(ModelConfig.parse({"width": D, "layers": 3, "rank": R, **values}, source="test"), V)


def test_a_k_stack_is_the_sum_of_its_layers() -> None:
    assert count_flops(lm(base_kernel={"kind": "none"}), T) == 2 * K1 + 3 * K2 + 2 * D * V
    dense = lm(base_kernel={"kind": "dense", "size": T})
    assert count_flops(dense, T) == 2 * K1 + 3 * (K2 + 2 * D * (T + 1) / 2) + 2 * D * V
    conv = lm(base_kernel={"kind": "conv", "size": 3, "shared": False})
    reach = (1 + 2 + 3 * (T - 2)) / T
    assert count_flops(conv, T) == pytest.approx(2 * K1 + 3 * (K2 + 2 * D * reach) + 2 * D * V)


def test_refinement_repeats_the_stack_and_not_the_head() -> None:
    plain = count_flops(lm(), T)
    refined = count_flops(lm(refinement={"steps": 4}), T)
    assert refined - 2 * D * V == pytest.approx(4 * (plain - 2 * D * V))


def test_a_transformer_grows_with_the_window() -> None:
    model = CausalLM(TransformerConfig(width=D, layers=2, heads=2), V)
    assert count_flops(model, 2 * T) - count_flops(model, T) == 2 * 4 * D * T / 2


def kept(state: State) -> int:
    """Bytes of all tensors of a state, beside the count of positions of each row."""
    return sum(tensor.nbytes for tensor in tensors(state) if tensor.ndim > 1)


@pytest.mark.parametrize(
    ("mixer", "settings"),
    [
        ("softmax", {}),
        ("softmax", {"convolution": 4}),
        ("gaussian", {}),
        ("gaussian", {"value_source": "pre_rope"}),
        ("hierarchical", {}),
        ("hierarchical", {"levels": 4, "fusion": "output", "convolution_head": True}),
        ("hierarchical", {"levels": 2, "taps": 3, "downsampling": "average"}),
        ("k2", {}),
        ("k2", {"base_kernel": {"kind": "toeplitz", "size": 5, "shared": False}}),
        ("k2", {"base_kernel": {"kind": "none", "shared": False}}),
    ],
    ids=str,
)
def test_the_state_is_as_large_as_counted(mixer: str, settings: dict[str, Any]) -> None:
    values = {"width": D, "layers": 2, "heads": 2, "mixers": mixer, mixer: settings}
    model = CausalLM(TransformerConfig.parse(values, source="test"), V)
    a_token, constant = state_bytes(model, FLOAT32)
    tokens = torch.zeros(1, 2 * T, dtype=torch.long)
    for t in (T, 2 * T):
        assert kept(model(tokens[:, :t]).state) == constant + t * a_token


@pytest.mark.parametrize("kernel", [{"kind": "dense"}, {"kind": "low_rank", "rank": 2}], ids=str)
def test_the_state_of_a_base_kernel_that_ends_is_as_large_as_counted(kernel: dict[str, Any]) -> None:
    model = lm(base_kernel={"size": 2 * T, **kernel})
    a_token, constant = state_bytes(model, FLOAT32)
    assert a_token == (3 * D * FLOAT32 if kernel["kind"] == "dense" else 0)
    for t in (T, 2 * T):
        assert kept(model(torch.zeros(1, t, dtype=torch.long)).state) == constant + t * a_token


@pytest.mark.parametrize("like", [{}, {"refinement": {"steps": 2}}, {"heads": 2, "mixers": "softmax"}], ids=str)
def test_a_copy_memory_adds_the_tokens_that_it_remembers(like: dict[str, Any]) -> None:
    def make(**values: Any) -> CausalLM:
        if "heads" in like:
            return CausalLM(TransformerConfig.parse({"width": D, "layers": 2, **like, **values}, source="test"), V)
        return lm(**like, **values)

    a_token, constant = state_bytes(make())
    assert state_bytes(make(copy_memory={})) == (a_token + TOKEN_BYTES, constant)
    assert state_bytes(make(copy_memory={"memory": 10})) == (a_token, constant + 10 * TOKEN_BYTES)
    tokens = torch.zeros(1, 2 * T, dtype=torch.long)
    with torch.no_grad():
        for memory in (None, 10):
            model = make(copy_memory={"memory": memory})
            a_token, constant = state_bytes(model, FLOAT32)
            free = [constant + t * a_token - kept(model(tokens[:, :t]).state) for t in range(1, 2 * T)]
            if memory is None:
                assert set(free) == {0}
            else:  # never more than is counted, and at its fullest room for the newest token
                assert min(free) == TOKEN_BYTES


def test_copies_cost_the_product_after_their_table_and_a_pointer_its_dot_product() -> None:
    e = 6
    plain = count_flops(lm(embedding_width=e), T)
    for settings in ({}, {"layers": "last", "memory": 10, "match_length": "both"}):
        assert count_flops(lm(embedding_width=e, copy_memory=settings), T) - plain == 2 * e * D
    assert count_flops(lm(embedding_width=e, copy_memory={"pointer": True}), T) - plain == 2 * e * D + 2 * D
    assert count_flops(lm(copy_memory={}), T) == count_flops(lm(), T)  # a look-up alone


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_every_half_step_of_sinkhorn_attention_more_makes_the_scores_again(iterations: int) -> None:
    def flops(**values: Any) -> float:
        config = {"vocabulary": 9, "length": T, "classes": 3, "width": D, "layers": 2, "heads": 2, "causal": False}
        parsed = SequenceClassifierConfig.parse({**config, **values}, source="test")
        return account_classifier(parsed, examples=1).forward_flops

    more = flops(mixers="sinkhorn", sinkhorn={"iterations": iterations}) - flops()
    assert more == 2 * (iterations - 1) * T * T * (2 * D + 2)  # products, and an exponential in each of two heads


@pytest.mark.parametrize("like", [{}, {"heads": 2, "mixers": "k2"}], ids=str)
def test_a_state_grows_where_all_is_remembered(like: dict[str, Any]) -> None:
    kind: Any = TransformerConfig if like else ModelConfig
    config = kind.parse({"width": D, "layers": 2, **(like or {"rank": R})}, source="test")
    for settings, grows in ((None, False), ({"memory": 10}, False), ({}, True), ({"layers": "none"}, True)):
        copying = kind.parse({**config.model_dump(), "copy_memory": settings}, source="test")
        assert copying.state_grows == grows
        a_token, _ = state_bytes(CausalLM(copying, V))
        assert bool(a_token) == grows


def test_attention_to_the_whole_past_grows_whatever_is_remembered() -> None:
    values = {"width": D, "layers": 2, "heads": 2, "mixers": "softmax", "copy_memory": {"memory": 10}}
    assert TransformerConfig.parse(values, source="test").state_grows


def test_training_of_a_classifier_is_counted_as_papers_do() -> None:
    sizes = {"width": D, "layers": 2, "heads": 2}
    config = SequenceClassifierConfig(vocabulary=V, length=T, classes=3, **sizes)
    found = account_classifier(config, examples=10)
    seen_less = 2 * 4 * D * T * (T - (T + 1) / 2)  # two layers, scores and values: all keys against those before
    assert found.training_flops == pytest.approx(3 * (found.forward_flops + seen_less))
    both_ways = account_classifier(config.model_copy(update={"causal": False}), examples=10)
    assert both_ways.training_flops == pytest.approx(3 * both_ways.forward_flops)
    assert both_ways.training_flops == found.training_flops
