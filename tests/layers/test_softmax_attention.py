"""Softmax attention against its formula, the law of rotary positions, and the laws every mixer keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers import SoftmaxAttention
from kmixer.layers.softmax_attention import rotate

WIDTH, HEADS = 12, 3


def make_attention() -> SoftmaxAttention:
    torch.manual_seed(0)
    layer = SoftmaxAttention(WIDTH, HEADS).double()
    for parameter in layer.parameters():  # scores far from uniform
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


def inputs(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, WIDTH, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def rotation(position: int, e: int) -> Tensor:
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
        q = torch.stack([rotation(t, e) @ query[part] @ x[0, t] for t in range(9)])
        k = torch.stack([rotation(t, e) @ key[part] @ x[0, t] for t in range(9)])
        for t in range(9):
            scores = k[: t + 1] @ q[t] / math.sqrt(e)
            weights = scores.exp() / scores.exp().sum()
            attended[t, part] = weights @ (x[0, : t + 1] @ value[part].T)
    torch.testing.assert_close(layer(x)[0][0], attended @ layer.out.weight.T)


@given(st.integers(0, 100_000), st.integers(0, 50), st.integers(0, 50))
def test_shifting_all_positions_leaves_the_scores(shift: int, i: int, j: int) -> None:
    q, k = torch.randn(2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i + 51 * j))

    def score(first: int, second: int) -> Tensor:
        return rotate(q, torch.tensor([first])) @ rotate(k, torch.tensor([second])).T

    torch.testing.assert_close(score(i + shift, j + shift), score(i, j), rtol=0, atol=1e-9)


def test_rotation_keeps_lengths_and_dtype_and_leaves_position_zero() -> None:
    x = torch.randn(2, 3, 40, 8)
    rotated = rotate(x, torch.arange(40))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert rotate(x.bfloat16(), torch.arange(40)).dtype == torch.bfloat16


@given(st.integers(1, 40), st.data())
def test_any_split_gives_the_whole(t: int, data: st.DataObject) -> None:
    layer, x = make_attention(), inputs(t)
    whole, final = layer(x)
    cuts = sorted(data.draw(st.lists(st.integers(0, t), max_size=4)))
    state, pieces = layer.initial_state(2), []
    for start, stop in zip([0, *cuts], [*cuts, t], strict=True):
        y, state = layer(x[:, start:stop], state)
        assert state.position == stop
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_one_at_a_time_gives_the_whole() -> None:
    layer, x = make_attention(), inputs(30)
    whole, _ = layer(x)
    state = None
    for t in range(30):
        y, state = layer(x[:, t : t + 1], state)
        torch.testing.assert_close(y, whole[:, t : t + 1], rtol=1e-10, atol=1e-10)


def test_no_position_leaves_the_state() -> None:
    layer = make_attention()
    _, state = layer(inputs(5))
    y, after = layer(inputs(0), state)
    assert y.shape == (2, 0, WIDTH)
    assert after is state


def test_it_is_causal_and_rows_are_independent() -> None:
    layer, x = make_attention(), inputs(40, b=3)
    before, _ = layer(x)
    changed = x.clone()
    changed[1, 20] += 1.0
    after, _ = layer(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-14)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=0, atol=1e-14)
    assert bool(((before[1, 20:] - after[1, 20:]).abs().amax(-1) > 1e-4).all())
    for row in range(3):
        torch.testing.assert_close(layer(x[row : row + 1])[0], before[row : row + 1], rtol=1e-12, atol=1e-12)


def test_every_parameter_gets_a_gradient_also_through_the_state() -> None:
    layer = make_attention()
    _, state = layer(inputs(20))
    layer(inputs(7), state)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_checkpoint_holds_weights_only() -> None:
    assert set(make_attention().state_dict()) == {"query_key_value.weight", "out.weight"}


def test_bfloat16_autocast_streams() -> None:
    layer, x = make_attention().float(), inputs(12).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = layer(x)
        first, state = layer(x[:, :5], layer.initial_state(2))
        second, state = layer(x[:, 5:], state)
    assert state.keys.dtype == state.values.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0.02, atol=0.02)


def test_dropout_acts_on_weights_in_training_only() -> None:
    layer, x = SoftmaxAttention(WIDTH, HEADS, dropout=0.5), inputs(9).float()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("heads", [5, 4])
def test_heads_that_do_not_fit_are_named(heads: int) -> None:
    with pytest.raises(InputError, match=f"heads: got {heads} for width 12; heads must divide width, and width / he"):
        SoftmaxAttention(12, heads)
