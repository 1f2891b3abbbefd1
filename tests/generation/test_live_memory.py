"""A prepared decoder of a model with a copy memory: its automata are the remembered tokens, wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation import live_memory
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.live_memory import LiveMemory
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models import CausalLM, ModelConfig
from kmixer.models.causal_lm import RememberingState
from kmixer.ops.suffix_automaton import SuffixState
from kmixer.state import State, join, rows

VOCABULARY = 3
MEMORIES = (None, 2, 6, 16, 1000)
MATCH_LENGTHS = ("unused", "gate", "embedding", "both")
pytestmark = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")


def make_model(memory: int | None, match_length: str = "both") -> CausalLM:
    torch.manual_seed(0)
    values = {
        "width": 12,
        "layers": 2,
        "rank": 2,
        "base_kernel": {"kind": "conv", "size": 3},
        "copy_memory": {"memory": memory, "match_length": match_length, "pointer": True},
    }
    model = CausalLM(ModelConfig.parse(values, source="test"), VOCABULARY).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or "copy_memory" in name or "pointer" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_tokens(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


def remembered(state: State) -> SuffixState:
    assert isinstance(state, RememberingState)
    return state.memory


def assert_same_memory(state: State, expected: State) -> None:
    for mine, reference in zip(remembered(state), remembered(expected), strict=True):
        assert torch.equal(mine, reference)
        assert mine.dtype == reference.dtype


def assert_close(logits: Tensor, expected: Tensor | None) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("match_length", MATCH_LENGTHS)
@torch.no_grad()
def test_over_many_halves_the_steps_and_every_state_are_the_models(memory: int | None, match_length: str) -> None:
    model, tokens = make_model(memory, match_length), make_tokens(2, 90)
    decoder = PreparedDecoder(model, model.initial_state(2))
    state = model.initial_state(2)
    for t in range(90):
        output = model(tokens[:, t : t + 1], state)
        state = output.state
        assert_close(decoder.advance(tokens[:, t : t + 1]), output.logits)
        assert_same_memory(decoder.state(), state)


@pytest.mark.parametrize("memory", MEMORIES)
@settings(max_examples=25)
@given(data=st.data())
def test_rows_at_any_positions_go_on_and_back_as_the_model_does(memory: int | None, data: st.DataObject) -> None:
    """Rows that have read texts of different lengths are joined, go on, go back to any state, and on otherwise."""
    model = make_model(memory)
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    steps = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=4))
    with torch.no_grad():
        parts = [
            model(make_tokens(1, n, seed=row)).state if n else model.initial_state(1) for row, n in enumerate(lengths)
        ]
        begun: State = join(parts)
        eager, prepared = EagerDecoder(model, begun), PreparedDecoder(model, begun)
        kept = [(eager.state(), prepared.state())]
        for n in steps:
            tokens = make_tokens(len(lengths), n, seed=n)
            if n:
                assert_close(prepared.advance(tokens), eager.advance(tokens))
            kept.append((eager.state(), prepared.state()))
            assert_same_memory(kept[-1][1], kept[-1][0])
        chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
        of_model, of_decoder = data.draw(st.sampled_from(kept))
        eager.restore(rows(of_model, chosen))
        prepared.restore(rows(of_decoder, chosen))
        other = make_tokens(len(chosen), 20, seed=99)
        assert_close(prepared.advance(other), eager.advance(other))
        assert_same_memory(prepared.state(), eager.state())


@pytest.mark.parametrize("memory", [None, 64])
@torch.no_grad()
def test_automata_that_are_full_are_made_larger_and_go_on(memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_memory, "FIRST_CAPACITY", 2)
    model, tokens = make_model(memory), make_tokens(3, 150)
    decoder = PreparedDecoder(model, model.initial_state(3))
    sizes, pieces = [], []
    for t in range(150):
        pieces.append(decoder.advance(tokens[:, t : t + 1]))
        assert decoder._memory is not None
        sizes.append(decoder._memory.words)
    whole = model(tokens)
    assert_close(torch.cat(pieces, 1), whole.logits)
    assert_same_memory(decoder.state(), whole.state)
    assert len(set(sizes)) == (8 if memory is None else 6)  # room for 2, 4, ... 256 tokens, or 64


@given(st.lists(st.integers(0, 2), max_size=70), st.sampled_from(MEMORIES))
@torch.no_grad()
def test_a_live_memory_gives_its_state_back(text: list[int], memory: int | None) -> None:
    model, tokens = make_model(memory), torch.tensor(text, dtype=torch.int64)[None]
    state = model(tokens).state if text else model.initial_state(1)
    live = LiveMemory(remembered(state), memory)
    assert_same_memory(RememberingState(None, live.state()), state)


@torch.no_grad()
def test_a_state_kept_is_a_snapshot() -> None:
    model, tokens = make_model(8), make_tokens(2, 30)
    decoder = PreparedDecoder(model, model(tokens[:, :11]).state)
    kept = decoder.state()
    before = [tensor.clone() for tensor in remembered(kept)]
    first = decoder.advance(tokens[:, 11:])
    assert all(torch.equal(a, b) for a, b in zip(before, remembered(kept), strict=True))
    decoder.restore(kept)
    assert torch.equal(decoder.advance(tokens[:, 11:]), first)


def test_states_of_another_memory_or_vocabulary_are_named_and_change_nothing() -> None:
    model = make_model(16)
    decoder = PreparedDecoder(model, model.initial_state(1))
    before = decoder.state()
    stack, (tokens, position) = model(make_tokens(1, 30)).state
    wrong: list[tuple[Any, str]] = [
        (stack, "^state: got .*; allowed there: 2 parts"),
        (RememberingState(stack, SuffixState(tokens[:, 5:], position)), "^state: got 9 remembered tokens; 14 are"),
        (RememberingState(stack, SuffixState(tokens, position - 40)), "^state: got positions"),
        (RememberingState(stack, SuffixState(tokens + 1, position)), "^tokens: got 3; allowed: 0 to 2, this model's"),
        (RememberingState(stack, SuffixState(tokens - 1, position)), "^tokens: got -1; allowed: 0 to 2, this model's"),
        (RememberingState(stack, SuffixState(tokens[..., 0], position)), "^state: got .*; allowed there"),
    ]
    for state, message in wrong:
        with pytest.raises(InputError, match=message):
            decoder.restore(state)
    assert_same_memory(decoder.state(), before)
    decoder.advance(make_tokens(1, 3))


@torch.no_grad()
def test_weights_that_do_not_fit_each_other_are_refused() -> None:
    model = make_model(16)
    assert model.copy_memory is not None
    model.copy_memory.table = torch.nn.Embedding(VOCABULARY, 12)
    with pytest.raises(InputError, match="the weights of this model do not fit each other"):
        PreparedDecoder(model, model.initial_state(1))
