"""Softmax attention against its formula, and the law of rotary positions; more in tests/models/test_mixers.py."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers import SoftmaxAttention
from kmixer.layers.rotary import rotate, rotation

WIDTH, HEADS = 12, 3


def make_attention() -> SoftmaxAttention:
    torch.manual_seed(0)
    layer = SoftmaxAttention(WIDTH, HEADS).double()
    for parameter in layer.parameters():  # scores far from uniform
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


def inputs(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def rotation_matrix(position: int, e: int) -> Tensor:
    """The (e, e) rotation of a position: plane i is spanned by the channels i and i + e/2."""
    matrix = torch.zeros(e, e, dtype=torch.float64)
    for i in range(e // 2):
        angle = position / 10_000 ** (2 * i / e)
        matrix[i, i] = matrix[i + e // 2, i + e // 2] = math.cos(angle)
        matrix[i, i + e // 2], matrix[i + e // 2, i] = -math.sin(angle), math.sin(angle)
    return matrix


def test_it_is_its_formula() -> None:
    layer, x, e = make_attention(), inputs(9, b=1), WIDTH // HEADS
    query, key, value = layer.query_key_value.weight.chunk(3)
    attended = torch.zeros(9, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * e, (head + 1) * e)
        q = torch.stack([rotation_matrix(t, e) @ query[part] @ x[0, t] for t in range(9)])
        k = torch.stack([rotation_matrix(t, e) @ key[part] @ x[0, t] for t in range(9)])
        for t in range(9):
            scores = k[: t + 1] @ q[t] / math.sqrt(e)
            weights = scores.exp() / scores.exp().sum()
            attended[t, part] = weights @ (x[0, : t + 1] @ value[part].T)
    torch.testing.assert_close(layer(x)[0][0], attended @ layer.out.weight.T)


def test_its_reduced_forms_are_their_formulas() -> None:
    x, e = inputs(7, b=1), WIDTH // HEADS
    layer = SoftmaxAttention(WIDTH, HEADS, rotary=False, tie_query_key=True, value_projection=False).double()
    assert layer.query_key_value.weight.shape == (WIDTH, WIDTH)
    q = layer.query_key_value(x[0])
    found, _ = layer(x)
    for head in range(HEADS):
        part = slice(head * e, (head + 1) * e)
        scores = (q[:, part] @ q[:, part].T / math.sqrt(e)).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ x[0, :, part]
        torch.testing.assert_close(mixed, torch.linalg.solve(layer.out.weight, found[0].T).T[:, part])


def test_a_value_embedding_goes_through_a_gate() -> None:
    layer = SoftmaxAttention(WIDTH, HEADS, value_embedding=True).double()
    assert layer.gate is not None
    x, extra = inputs(6), inputs(6).flip(0)
    values = layer.query_key_value(x).chunk(3, -1)[2]
    gate = 2 * torch.sigmoid(layer.gate(x)).repeat_interleave(WIDTH // HEADS, dim=-1)
    y, state = layer(x, None, extra)
    expected = (values + gate * extra).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(state.values, expected)
    torch.testing.assert_close(y[:, 0], layer.out(expected[:, :, 0].flatten(1)))


@given(st.integers(0, 100_000), st.integers(0, 50), st.integers(0, 50))
def test_shifting_all_positions_leaves_the_scores(shift: int, i: int, j: int) -> None:
    q, k = torch.randn(2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i + 51 * j))

    def score(first: int, second: int) -> Tensor:
        turned = [
            rotate(z, rotation(torch.tensor([place]), 32, torch.float64)) for z, place in ((q, first), (k, second))
        ]
        return turned[0] @ turned[1].T

    torch.testing.assert_close(score(i + shift, j + shift), score(i, j), rtol=0, atol=1e-9)


def test_rotation_keeps_lengths_and_dtype_and_leaves_position_zero() -> None:
    x = torch.randn(2, 3, 40, 8)
    angles = rotation(torch.arange(40), 8, torch.bfloat16)
    rotated = rotate(x, angles)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert rotate(x.bfloat16(), angles).dtype == torch.bfloat16


def test_a_checkpoint_holds_weights_only() -> None:
    assert set(make_attention().state_dict()) == {"query_key_value.weight", "out.weight"}


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="heads: got 5 for width 12; heads must divide width"):
        SoftmaxAttention(12, 5)
    with pytest.raises(InputError, match="heads: got 4 for width 12; rotary positions act on pairs of channels, so"):
        SoftmaxAttention(12, 4)
    SoftmaxAttention(12, 4, rotary=False)


def test_a_convolution_filters_what_queries_and_keys_are_made_of() -> None:
    torch.manual_seed(0)
    x, taps = inputs(7), 3
    layer = SoftmaxAttention(WIDTH, HEADS, convolution=taps, rotary=False).double()
    plain = SoftmaxAttention(WIDTH, HEADS, rotary=False).double()
    assert layer.convolution is not None
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "convolution" not in name})
    torch.testing.assert_close(layer(x)[0], plain(x)[0])  # it starts as the identity
    torch.nn.init.normal_(layer.convolution.filter)
    weights = layer.convolution.filter
    filtered = sum(weights[:, r] * torch.nn.functional.pad(x, (0, 0, r, 0))[:, :7] for r in range(taps))
    q, k, _ = plain.query_key_value(filtered).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    v = plain.query_key_value(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[2]
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x)[0], layer.out(attended.transpose(1, 2).flatten(2)))


def test_a_projection_of_another_type_is_called_also_beside_a_convolution() -> None:
    torch.manual_seed(0)
    layer, x = SoftmaxAttention(WIDTH, HEADS, convolution=3).double(), inputs(7)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.query_key_value.weight.mul_(2)
    layer.query_key_value.register_forward_hook(lambda module, given, answer: answer * 2)
    torch.testing.assert_close(layer(x)[0], doubled(x)[0])
