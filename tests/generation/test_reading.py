"""Decoders read ahead: `read` gives the model's logits and moves nothing, `commit` stands after what is kept."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation import live_memory
from kmixer.generation.decoder import Decoder, EagerDecoder
from kmixer.generation.prepared import PreparedDecoder, can_prepare
from kmixer.models import CausalLM, TransformerConfig
from kmixer.native import library
from kmixer.state import State, batch_of, join, rows
from kmixer.state import tensors as tensors_of
from tests.generation.test_live_memory import make_model as make_copying
from tests.generation.test_prepared import MODELS, VOCABULARY, compiled, make_model, make_tokens

EAGER: dict[str, dict[str, Any]] = {
    "softmax": {"mixers": "softmax", "windows": "SL", "window": 4},
    "hierarchical, copies": {"mixers": "hierarchical", "copy_memory": {"memory": 8}},
    "all": {"mixers": ["gaussian", "k2"]},
}
KINDS = [*MODELS, *EAGER]


def make(kind: str) -> CausalLM:
    if kind in MODELS:
        return make_model(MODELS[kind])
    torch.manual_seed(0)
    values = {"kind": "transformer", "width": 12, "layers": 2, "heads": 3, **EAGER[kind]}
    return CausalLM(TransformerConfig.parse(values, source="test"), VOCABULARY).eval()


def decoders(model: CausalLM, state: State) -> list[Decoder]:
    prepared = [PreparedDecoder(model, state)] if can_prepare(model) else []
    return [EagerDecoder(model, state), *prepared]


def assert_close(mine: Any, expected: Any) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


def assert_as_exact(mine: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Rounding grows over hundreds of tokens: mine is not much further from float64 than the model is."""
    assert len(mine) == len(plain) == len(exact) > 0
    for tensor, other, truth in zip(mine, plain, exact, strict=True):
        assert tensor.shape == other.shape == truth.shape
        if not tensor.is_floating_point():
            assert torch.equal(tensor, other)
        elif tensor.numel():
            error, allowed = ((one.double() - truth).abs().max() for one in (tensor, other))
            assert error <= 2 * allowed + 1e-3


@torch.no_grad()
def trimmed(model: CausalLM, state: State) -> State:
    """The same without padding that no row needs, which rows have that once stood beside others."""
    return model(torch.zeros(batch_of(state), 0, dtype=torch.int64), state).state


@torch.no_grad()
def read_so_much(model: CausalLM, state: State, tokens: Tensor, lengths: list[int]) -> State:
    """Every row alone."""
    states = [
        model(tokens[row : row + 1, :length], rows(state, [row])).state if length else rows(state, [row])
        for row, length in enumerate(lengths)
    ]
    return trimmed(model, join(states))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(data=st.data())
@torch.no_grad()
def test_a_read_moves_nothing_and_a_commit_stands_after_what_is_kept(kind: str, data: st.DataObject) -> None:
    model = make(kind)
    begun = join([model(make_tokens(1, n)).state for n in (data.draw(st.integers(1, 20)), 5)])
    tokens, more = make_tokens(2, data.draw(st.integers(1, 20))), make_tokens(2, 3)
    lengths = data.draw(st.lists(st.integers(0, tokens.shape[1]), min_size=2, max_size=2))
    expected, kept = model(tokens, begun).logits, read_so_much(model, begun, tokens, lengths)
    for decoder in decoders(model, begun):
        decoder.read((make_tokens(2, data.draw(st.integers(0, 9))) + 9) % 45)  # forgotten
        assert_close(decoder.read(tokens), expected)
        assert_close(trimmed(model, decoder.state()), trimmed(model, begun))
        decoder.commit(torch.tensor(lengths))
        assert_close(trimmed(model, decoder.state()), kept)
        assert_close(decoder.advance(more), model(more, kept).logits)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_many_rounds_of_any_length_are_the_steps_of_what_was_kept(kind: str) -> None:
    model = make(kind)
    double = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    state, begun = (of(make_tokens(3, 5)).state for of in (model, double))
    for decoder in decoders(model, state):
        kept: list[Tensor] = [torch.zeros(0, dtype=torch.int64) for _ in range(3)]
        for _ in range(300 if isinstance(decoder, PreparedDecoder) else 30):
            n = int(torch.randint(1, 11, (1,), generator=generator))
            tokens = 9 * torch.randint(5, (3, n), generator=generator)
            lengths = torch.randint(0, n + 1, (3,), generator=generator)
            logits = decoder.read(tokens)
            decoder.commit(lengths)
            kept = [torch.cat([old, new[:k]]) for old, new, k in zip(kept, tokens, lengths.tolist(), strict=True)]
        read: list[tuple[State, State]] = []
        for row, text in enumerate(kept):
            plain, exact = model(text[None], rows(state, [row])), double(text[None], rows(begun, [row]))
            read.append((plain.state, exact.state))
            last = int(lengths[row])
            if last:
                ends = (logits[row, :last], plain.logits[0, -last:], exact.logits[0, -last:])
                assert_as_exact(*([end] for end in ends))
        states = (decoder.state(), *(join(list(of_rows)) for of_rows in zip(*read, strict=True)))
        assert_as_exact(*(list(tensors_of(one)) for one in states))


@compiled
@pytest.mark.parametrize("memory", [None, 2, 6, 16, 1000])
@settings(max_examples=5)
@given(data=st.data())
@torch.no_grad()
def test_a_copy_memory_has_no_trace_of_what_was_not_kept(memory: int | None, data: st.DataObject) -> None:
    """Chunks over several halves, automata that are full and grow, the same read again: exactly the same copies."""
    model = make_copying(memory)
    b = data.draw(st.integers(1, 3))
    first = live_memory.FIRST_CAPACITY
    live_memory.FIRST_CAPACITY = data.draw(st.sampled_from([2, 16]))
    try:
        run = data.draw(st.sampled_from([0, 70, 100]))  # makes paths in the automata, soon or already
        state = model(torch.ones(b, run, dtype=torch.int64)).state if run else model.initial_state(b)
        decoder = PreparedDecoder(model, state)
        for _ in range(data.draw(st.integers(1, 6))):
            tokens = torch.randint(3, (b, data.draw(st.integers(1, 30))), generator=torch.Generator().manual_seed(b))
            tokens[:, : data.draw(st.integers(0, 30))] = 1
            logits = decoder.read(tokens)
            assert_close(logits, model(tokens, state).logits)
            assert torch.equal(decoder.read(tokens), logits)
            lengths = data.draw(st.lists(st.integers(0, tokens.shape[1]), min_size=b, max_size=b))
            decoder.commit(torch.tensor(lengths))
            state = model(tokens, state, trail=True).trail.at(torch.tensor(lengths))
            assert all(map(torch.equal, decoder.state().memory, state.memory))  # type: ignore[union-attr]
            one = torch.ones(b, dtype=torch.int64)
            state = model(one[:, None], state).state
            decoder.step(one)
    finally:
        live_memory.FIRST_CAPACITY = first


@pytest.mark.parametrize("kind", ["conv", "copies", "softmax"])
@torch.no_grad()
def test_what_moves_forgets_what_was_read(kind: str) -> None:
    model, tokens = make(kind), make_tokens(2, 4)
    state = model(make_tokens(2, 7)).state
    for decoder in decoders(model, state):
        moves = (
            lambda decoder=decoder: decoder.step(tokens[:, 0]),
            lambda decoder=decoder: decoder.advance(tokens),
            lambda decoder=decoder: decoder.restore(state),
            lambda decoder=decoder: decoder.commit(torch.tensor([1, 2])),
        )
        for move in moves:
            decoder.read(tokens)
            move()
            before = decoder.state()
            with pytest.raises(InputError, match=r"^commit: got nothing to keep; call read first, and commit once"):
                decoder.commit(torch.tensor([1, 1]))
            assert_close(decoder.state(), before)


@pytest.mark.parametrize("kind", ["conv", "copies", "softmax"])
@torch.no_grad()
def test_lengths_and_tokens_that_do_not_fit_are_named_and_change_nothing(kind: str) -> None:
    model, tokens = make(kind), make_tokens(2, 4)
    for decoder in decoders(model, model.initial_state(2)):
        before = decoder.state()
        logits = decoder.read(tokens)
        for lengths in (torch.tensor([5, 0]), torch.tensor([0, -1]), torch.tensor([1]), torch.tensor([1.0, 1.0])):
            with pytest.raises(InputError, match=r"^lengths: got .*; allowed: .*$"):
                decoder.commit(lengths)
        with pytest.raises(InputError, match=rf"^tokens: got {VOCABULARY}; allowed: 0 to {VOCABULARY - 1}, this"):
            decoder.read(torch.full((2, 3), VOCABULARY))
        assert_close(decoder.state(), before)
        decoder.commit(torch.tensor([4, 1]))  # of what was read last
        assert_close(decoder.read(tokens)[1], model(tokens, read_so_much(model, before, tokens, [4, 1])).logits[1])
        assert logits.shape == (2, 4, VOCABULARY)


@compiled
@torch.no_grad()
def test_logits_of_a_read_stay_as_they_are() -> None:
    model, tokens = make("conv"), make_tokens(2, 4)
    decoder = PreparedDecoder(model, model.initial_state(2))
    logits = decoder.read(tokens)
    kept = logits.clone()
    decoder.read(tokens.flip(1))
    decoder.step(tokens[:, 0])
    assert torch.equal(logits, kept)


@pytest.fixture(params=library.BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decoders are made with this build of the kernels, where there is one and this machine runs it."""
    file = library.built(request.param)
    if native.kernels() is None or not file.exists() or request.param not in library.usable_builds():
        pytest.skip(f"this machine has no {request.param} kernels")
    kernels = ctypes.CDLL(str(file))
    monkeypatch.setattr(native, "kernels", lambda: kernels)
    return str(request.param)


@pytest.mark.parametrize("b", [1, 5, 40])
@pytest.mark.parametrize("width", [16, 20, 33, 64])
@torch.no_grad()
def test_any_number_of_rows_is_the_model(build: str, b: int, width: int) -> None:
    model = make_model(MODELS["refined"], width=width)
    decoder, state = PreparedDecoder(model, model.initial_state(b)), model.initial_state(b)
    for n in range(1, 18) if b == 1 else (1, 2, 3, 5, 7, 13):
        tokens = make_tokens(b, n)
        output = model(tokens, state)
        assert_close(decoder.read(tokens), output.logits)
        decoder.commit(torch.full((b,), n))
        state = output.state


# Chunks within what is read at once and beyond, filters longer than a chunk, resets inside and at the ends of chunks.
FAST = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([2, 5, 16]),
        "taps": st.sampled_from([1, 3, 9]),
        "rate": st.just(0.1),
        "target": st.sampled_from(["embed", "hidden"]),
        "tau": st.sampled_from([None, 600.0]),
        "max_norm": st.sampled_from([None, 0.5]),
        "reset_every": st.sampled_from([None, 4, 15]),
        "layers": st.sampled_from([[0], "every"]),
    }
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@torch.no_grad()
def test_any_rank_width_and_filter_is_the_model(build: str, data: st.DataObject) -> None:
    """Sizes that fill no vector, panels that two groups of rows share, filters longer and shorter than what is read."""
    size = data.draw(st.sampled_from([1, 2, 9, 20]))
    values = {
        "rank": data.draw(st.sampled_from([1, 5, 16, 17, 40])),
        "base_kernel": data.draw(st.sampled_from([{"kind": "none"}, {"kind": "conv", "size": size}])),
        "output_gate": data.draw(st.booleans()),
        "fast_weights": data.draw(st.none() | FAST),
    }
    model = make_model(values, width=data.draw(st.sampled_from([1, 7, 31, 62, 96])))
    b = data.draw(st.integers(1, 3))
    decoder, state = PreparedDecoder(model, model.initial_state(b)), model.initial_state(b)
    for n in data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)):
        tokens = make_tokens(b, n)
        assert_close(decoder.read(tokens), model(tokens, state).logits)
        lengths = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=b, max_size=b)))
        decoder.commit(lengths)
        state = read_so_much(model, state, tokens, lengths.tolist())
        assert_close(trimmed(model, decoder.state()), state)
        one = make_tokens(b, 1)
        assert_close(decoder.step(one[:, 0]), model(one, state).logits[:, 0])
        state = model(one, state).state


@compiled
@pytest.mark.parametrize("kind", ["conv", "fast weights"])
def test_a_decoder_goes_in_and_out_of_inference_mode(kind: str) -> None:
    """What it writes to is made in one mode and written to in another; neither follows gradients."""
    model, tokens = make(kind), make_tokens(2, 4)
    state = model(tokens).state
    with torch.inference_mode():
        inside = PreparedDecoder(model, model.initial_state(2))
        inside.read(tokens)
    outside = PreparedDecoder(model, model.initial_state(2))
    for decoder in (inside, outside):
        for mode in (False, True, False):
            with torch.inference_mode(mode):
                decoder.restore(state)
                assert_close(decoder.advance(tokens), model(tokens, state).logits)
                decoder.read(torch.cat([tokens, tokens], 1))
                decoder.commit(torch.tensor([1, 2]))
                assert not any(tensor.requires_grad for tensor in tensors_of(decoder.state()))
