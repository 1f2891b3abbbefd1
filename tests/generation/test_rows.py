"""Rows that come and go: each is as if it were alone, bit for bit, whoever else is there and wherever it lies."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer import LanguageModel
from kmixer.errors import InputError
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.reading import PIECE, PromptReader
from kmixer.generation.rows import EagerRow, RowDecoder, why_not_rows
from kmixer.state import State
from kmixer.state import tensors as tensors_of
from tests.generation.test_prepared import MODELS, VOCABULARY, compiled, make_model, make_tokens

pytestmark = compiled
STREAMING = {name: values for name, values in MODELS.items() if why_not_rows(make_model(values)) is None}


def equal(state: State, other: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(state), tensors_of(other), strict=True))


@pytest.mark.parametrize("kind", STREAMING)
@torch.no_grad()
def test_logits_of_a_row_do_not_depend_on_how_many_there_are(kind: str) -> None:
    model, tokens = make_model(STREAMING[kind]), make_tokens(20, 12)
    expected: dict[int, Tensor] = {}
    for n in (20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 19):
        decoder = RowDecoder(model, 20)
        logits = torch.stack([decoder.step(tokens[:n, t]).clone() for t in range(12)])
        if n == 20:
            expected = {row: logits[:, row] for row in range(20)}
            exact = model.double()(tokens).logits.transpose(0, 1)
            torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
            model = make_model(STREAMING[kind])
        assert all(torch.equal(logits[:, row], expected[row]) for row in range(n)), n


COMING = ["conv", "copies", "refined", "fast weights", "gaussian, short", "softmax with normed keys, a soft cap"]


@pytest.mark.parametrize("kind", COMING)
@settings(max_examples=15)
@given(data=st.data())
def test_rows_that_come_go_and_move_are_each_as_if_alone(kind: str, data: st.DataObject) -> None:
    model = make_model(STREAMING[kind])
    decoder, rows = RowDecoder(model, 9), []  # of a row: its name, its tokens so far
    names = itertools.count()

    def text(name: int, t: int) -> int:
        return 9 * ((name * 7 + t * t) % 5)

    answers: dict[int, list[Tensor]] = {}
    for action in data.draw(st.lists(st.sampled_from(["come", "step", "step", "go"]), min_size=4, max_size=14)):
        if action == "come" and len(rows) < 9:
            name = next(names)
            decoder.put(len(rows), model.initial_state(1))
            rows.append(name)
            answers[name] = []
        elif action == "go" and rows:
            row = data.draw(st.integers(0, len(rows) - 1))
            last = len(rows) - 1
            if row != last:
                decoder.move(last, row)
            rows[row] = rows[last]
            rows.pop()
        elif rows:
            tokens = torch.tensor([text(name, len(answers[name])) for name in rows])
            logits = decoder.step(tokens)
            for row, name in enumerate(rows):
                answers[name].append(logits[row].clone())
    for name, logits in answers.items():
        alone = RowDecoder(model, 9)
        for t, one in enumerate(logits):
            assert torch.equal(alone.step(torch.tensor([text(name, t)]))[0], one)
        if name in rows:
            assert equal(alone.state(0), decoder.state(rows.index(name)))


@pytest.mark.parametrize("kind", ["conv", *COMING[1:]])
@torch.no_grad()
def test_a_state_put_back_goes_on_where_it_stood(kind: str) -> None:
    model, tokens = make_model(STREAMING[kind]), make_tokens(1, 40)
    decoder = RowDecoder(model, 3)
    for t in range(25):
        decoder.step(tokens[:, t])
    kept = decoder.state(0)
    model.check_state(kept, 1)
    whole = [decoder.step(tokens[:, t]).clone() for t in range(25, 40)]
    decoder.put(2, kept)
    decoder.put(1, kept)
    decoder.move(2, 0)
    again = [decoder.step(tokens[:, t].expand(2)).clone() for t in range(25, 40)]
    assert all(torch.equal(logits[:1].expand(2, -1), both) for logits, both in zip(whole, again, strict=True))
    torch.testing.assert_close(model(tokens[:, 25:], kept).logits[0], torch.cat(whole), rtol=1e-3, atol=1e-3)


def test_what_has_no_rows_is_named() -> None:
    for values in ({"base_kernel": {"kind": "dense", "size": 20}}, {"copy_memory": {}}):
        model = make_model(values)
        assert why_not_rows(model)
        with pytest.raises(InputError, match=r"^rows that come and go are not for this model: .*; use EagerRow$"):
            RowDecoder(model, 4)
    with pytest.raises(InputError, match=r"^state: got "):
        RowDecoder(make_model(STREAMING["conv"]), 4).put(0, make_model(STREAMING["conv"]).initial_state(2))


def test_one_row_of_any_model_is_the_model() -> None:
    model, tokens = make_model({"base_kernel": {"kind": "dense", "size": 20}}), make_tokens(1, 6)
    row, decoder = EagerRow(model), EagerDecoder(model, model.initial_state(1))
    for t in range(6):
        assert torch.equal(row.step(tokens[:, t]), decoder.step(tokens[:, t]))
    assert equal(row.state(0), decoder.state())


def read(model: LanguageModel, tokens: Tensor, state: State, position: int, *, prepared: bool) -> tuple[Tensor, State]:
    reader, pieces, at = PromptReader(model, state, prepared=prepared), [], 0
    while at < tokens.shape[1]:
        n = reader.length(position + at, tokens.shape[1] - at)
        pieces.append(reader.read(tokens[:, at : at + n]))
        at += n
    return torch.cat(pieces, 1), reader.decoder.state()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prepared", [True, False])
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_model(kind: str, prepared: bool) -> None:
    model, tokens = make_model(MODELS[kind]), make_tokens(2, 2 * PIECE + 5)
    logits, state = read(model, tokens, model.initial_state(2), 0, prepared=prepared)
    expected = make_model(MODELS[kind]).double()(tokens)
    torch.testing.assert_close(logits.double(), expected.logits, rtol=1e-4, atol=1e-4)
    for mine, other in zip(tensors_of(state), tensors_of(expected.state), strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", *COMING[1:]])
def test_a_prompt_read_from_the_end_of_a_piece_is_the_whole_bit_for_bit(kind: str) -> None:
    model, tokens = make_model(STREAMING[kind]), make_tokens(1, 3 * PIECE + 7)
    whole, after = read(model, tokens, model.initial_state(1), 0, prepared=True)
    for cut in (PIECE, 2 * PIECE, 3 * PIECE):
        _, state = read(model, tokens[:, :cut], model.initial_state(1), 0, prepared=True)
        rest, end = read(model, tokens[:, cut:], state, cut, prepared=True)
        assert torch.equal(rest, whole[:, cut:])
        assert equal(end, after)
    shorter, _ = read(model, tokens[:, : PIECE + 3], model.initial_state(1), 0, prepared=True)
    assert torch.equal(shorter, whole[:, : PIECE + 3])
    assert whole.shape[-1] == VOCABULARY
