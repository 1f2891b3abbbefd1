"""The copy memory and the pointer are their formulas over the ids that `suffix_matches` gives."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.copy_memory import BUCKETS, Copies, CopyMemory, MatchLength, bucket_of, chosen_layers, nothing_seen
from kmixer.layers.pointer import Pointer
from kmixer.ops.suffix_automaton import suffix_matches

V, D = 5, 6
match_lengths = pytest.mark.parametrize("match_length", get_args(MatchLength))
embedding_widths = pytest.mark.parametrize("embedding_width", [None, 3])


def make(match_length: MatchLength = "unused", embedding_width: int | None = None, **options: Any) -> CopyMemory:
    torch.manual_seed(0)
    memory = CopyMemory(V, D, (0, 2), embedding_width=embedding_width, match_length=match_length, **options).double()
    for parameter in memory.parameters():
        nn.init.normal_(parameter)
    return memory


def repeating(t: int, b: int = 2) -> Tensor:
    """Tokens whose matches are of all lengths, long ones too."""
    tokens = torch.randint(V, (b, t), generator=torch.Generator().manual_seed(t))
    tokens[:, t // 2 : t // 2 + 50] = tokens[:, :50][:, : tokens[:, t // 2 : t // 2 + 50].shape[1]].clone()
    return tokens


def test_buckets() -> None:
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 32, 33, 10**6])
    assert bucket_of(lengths).tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10]
    assert BUCKETS == 11


@match_lengths
@embedding_widths
def test_it_is_its_formula(match_length: MatchLength, embedding_width: int | None) -> None:
    memory, tokens = make(match_length, embedding_width), repeating(120)
    copies, _ = memory.copies(tokens)
    added = memory(copies)
    assert list(added) == [0, 2]
    copied, lengths, _ = suffix_matches(tokens)
    assert int(lengths.max()) > 33
    for row, t in ((0, 0), (0, 20), (1, 61), (1, 110), (1, 119)):
        bucket = int(bucket_of(lengths[row, t][None]))
        vector = memory.table.weight[copied[row, t] + 1]
        if embedding_width is not None:
            vector = memory.from_table.weight @ vector
        if memory.length_vector is not None:
            vector = vector + memory.length_vector[bucket]
        for index, layer in enumerate((0, 2)):
            logit = memory.gate_logit[index]
            if memory.length_gate is not None:
                logit = logit + memory.length_gate[index, bucket]
            torch.testing.assert_close(added[layer][row, t], torch.sigmoid(logit) * vector)


@match_lengths
@embedding_widths
def test_gradients(match_length: MatchLength, embedding_width: int | None) -> None:
    memory = make(match_length, embedding_width)
    copies, _ = memory.copies(repeating(9))
    names = [name for name, _ in memory.named_parameters()]

    def added(*parameters: Tensor) -> tuple[Tensor, ...]:
        outputs = torch.func.functional_call(memory, dict(zip(names, parameters, strict=True)), (copies,))
        return tuple(outputs.values())

    assert torch.autograd.gradcheck(added, tuple(memory.parameters()))


def test_a_second_memory_is_one_of_shorter_matches_beside_the_first() -> None:
    memory, tokens = make("gate", second=2), repeating(60)
    assert memory.second is not None
    copies, state = memory.copies(tokens)
    copied, lengths, _ = suffix_matches(tokens, longest=2)
    assert copies.second is not None
    assert torch.equal(copies.second.tokens, copied)
    assert torch.equal(copies.second.lengths, lengths)
    assert torch.equal(state.tokens[..., 0], tokens)
    alone, beside = memory.second(copies.second), memory(copies)
    first = memory(copies._replace(second=nothing_seen(tokens)))
    silent = memory.second(nothing_seen(tokens))
    for layer in (0, 2):
        torch.testing.assert_close(beside[layer], first[layer] - silent[layer] + alone[layer])


@pytest.mark.parametrize("token", [-1, V])
def test_a_token_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(InputError, match=rf"got tokens .*{token}.*; allowed: 0\.\.{V - 1}"):
        make().copies(torch.tensor([[0, token]]))


def test_a_token_without_a_match_has_the_first_row_of_the_table() -> None:
    memory = make()
    vectors = memory.vectors(memory.copies(torch.tensor([[0, 1, 2, 1]]))[0])
    assert torch.equal(vectors[0, :3], memory.table.weight[[0, 0, 0]])
    assert torch.equal(vectors[0, 3], memory.table.weight[2 + 1])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("all", (0, 1, 2)), ("last", (2,)), ("none", ()), ([2, 0], (0, 2)), ([], ())],
)
def test_layers_are_chosen(layers: Any, chosen: tuple[int, ...]) -> None:
    assert chosen_layers(layers, 3) == chosen


@pytest.mark.parametrize("layers", [[3], [-1], [1, 1]])
def test_layers_that_are_not_there(layers: list[int]) -> None:
    with pytest.raises(InputError, match=r"copy_memory.layers: got .* allowed: different numbers from 0 to 2"):
        chosen_layers(layers, 3)


def make_pointer() -> Pointer:
    torch.manual_seed(1)
    pointer = Pointer(D).double()
    for parameter in pointer.parameters():
        nn.init.normal_(parameter)
    return pointer


@given(st.integers(1, 30))
def test_a_pointer_is_a_mixture(t: int) -> None:
    pointer, tokens = make_pointer(), repeating(t)
    copies = make().copies(tokens)[0]
    logits, hidden = torch.randn(2, t, V, dtype=torch.float64), torch.randn(2, t, D, dtype=torch.float64)
    logit = pointer.length_logit[bucket_of(copies.lengths)] + hidden @ pointer.direction
    share = (torch.sigmoid(logit) * (copies.tokens >= 0))[..., None]
    onehot = nn.functional.one_hot(copies.tokens.clamp(min=0), V)
    expected = (1 - share) * logits.softmax(-1) + share * onehot
    mixed = pointer(logits, hidden, copies)
    torch.testing.assert_close(mixed.exp(), expected)
    plain = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    losses = pointer.losses(plain, tokens, hidden, copies)
    torch.testing.assert_close(losses, -mixed.gather(-1, tokens[..., None]).squeeze(-1))


def test_gradients_of_a_pointer_where_it_is_right_wrong_and_silent() -> None:
    pointer = make_pointer()
    copies = Copies(torch.tensor([[-1, 0, 1]]), torch.tensor([[0, 3, 40]]))
    targets = torch.tensor([[0, 0, 0]])
    plain, hidden = torch.rand(1, 3, dtype=torch.float64) + 0.1, torch.randn(1, 3, D, dtype=torch.float64)

    def losses(plain: Tensor, hidden: Tensor, *parameters: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(
            pointer, dict(zip(("length_logit", "direction"), parameters, strict=True))
        ):
            return pointer.losses(plain, targets, hidden, copies)

    inputs = (plain.requires_grad_(), hidden.requires_grad_(), *pointer.parameters())
    assert torch.autograd.gradcheck(losses, inputs)
