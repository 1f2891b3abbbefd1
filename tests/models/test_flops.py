"""Counted operations against sums made by hand."""

from __future__ import annotations

import pytest

from kmixer.models import CausalLM, ModelConfig, TransformerConfig, count_flops

D, R, V, T = 16, 4, 20, 32
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
