"""`generate` of transformers: what a state saves changes no text, whatever rows do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kmixer.generation.decoder import EagerDecoder
from kmixer.huggingface import KMixerForCausalLM
from kmixer.interop.huggingface import model as wrapping
from kmixer.interop.huggingface.read_state import ReadState, after, resumable
from tests.interop.huggingface.models import KINDS, filled_up, make_tokens, wrapped

NEW = 5
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two returned": {"num_beams": 2, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 10},
    "several sampled": {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.3},
    "beams, sampled": {"do_sample": True, "num_beams": 2, "min_p": 0.01},
    "no repeats": {"no_repeat_ngram_size": 2},
}


def new_tokens(model: KMixerForCausalLM, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    made = model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return made[:, batch["input_ids"].shape[1] :]


class Counting:
    """How many positions a model has read since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.positions = 0
        read, step = wrapping.read, wrapping.Decoding.step

        def counted_read(model: Any, tokens: Tensor, *more: Any) -> Any:
            self.positions += tokens.shape[1]
            return read(model, tokens, *more)

        def counted_step(decoding: Any, model: Any, tokens: Tensor, state: Any) -> Any:
            self.positions += 1
            return step(decoding, model, tokens, state)

        monkeypatch.setattr(wrapping, "read", counted_read)
        monkeypatch.setattr(wrapping.Decoding, "step", counted_step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["greedy", "beams", "two returned"])
def test_a_state_changes_no_text_and_rows_are_the_rows_alone(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = wrapped(kind), [make_tokens(9), make_tokens(14)]
    batch, count = filled_up(rows), Counting(monkeypatch)
    made = new_tokens(model, batch, **WAYS[way])
    assert count.positions == 14 + NEW - 1  # every token once: no state was lost
    assert torch.equal(made, new_tokens(model, batch, use_cache=False, **WAYS[way]))
    alone = torch.cat([new_tokens(model, {"input_ids": row}, **WAYS[way]) for row in rows])
    assert torch.equal(made, alone)


@pytest.mark.parametrize("kind", ["conv", "copies", "softmax"])
@pytest.mark.parametrize("way", list(WAYS)[3:])
def test_a_state_changes_no_text_of_other_ways_to_choose_tokens(kind: str, way: str) -> None:
    model, batch = wrapped(kind), filled_up([make_tokens(9), make_tokens(14)])
    made = new_tokens(model, batch, **WAYS[way])
    assert torch.equal(made, new_tokens(model, batch, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_goes_on_from_its_state(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped(kind), filled_up([make_tokens(9), make_tokens(6)])
    whole = new_tokens(model, batch, max_new_tokens=2 * NEW)
    first = model.generate(**batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    count = Counting(monkeypatch)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    rest = new_tokens(model, {"input_ids": first.sequences, "attention_mask": mask}, state=first.state)
    assert count.positions == NEW
    assert torch.equal(torch.cat([first.sequences[:, 9:], rest], 1), whole)


def test_rows_that_end_do_not_disturb_the_others() -> None:
    model, batch = wrapped("conv"), filled_up([make_tokens(9), make_tokens(6)])
    plain = new_tokens(model, batch)
    end = int(plain[0, 2])
    made = new_tokens(model, batch, eos_token_id=end)
    assert torch.equal(made, new_tokens(model, batch, eos_token_id=end, use_cache=False))
    ended = [*plain[0].tolist()].index(end) + 1
    assert (made[0, ended:] == model.generation_config.pad_token_id).all()
    if end not in plain[1].tolist():
        assert torch.equal(made[1], plain[1, : made.shape[1]])


def test_a_prepared_step_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wrapped("conv"), filled_up([make_tokens(9), make_tokens(6)])
    made = new_tokens(model, batch)
    monkeypatch.setattr(EagerDecoder, "step", None)
    assert torch.equal(made, new_tokens(model, batch))
    monkeypatch.undo()
    monkeypatch.setattr(wrapping, "open_decoder", EagerDecoder)
    assert torch.equal(made, new_tokens(model, batch))


def test_what_cannot_go_back_is_refused_by_transformers() -> None:
    with pytest.raises(ValueError, match="stateful"):
        new_tokens(wrapped("conv"), {"input_ids": make_tokens(9)}, prompt_lookup_num_tokens=3)


def read_state(rows: Tensor, filled: list[int] | None = None) -> ReadState:
    """A state of rows whose number stands in it."""
    filled = filled or [0] * len(rows)
    return ReadState(torch.arange(len(rows)), after(rows, filled, None))


def test_rows_are_found_by_what_they_have_read() -> None:
    read = torch.tensor([[1, 2], [3, 4], [1, 2]])
    state = read_state(read)

    def places(rows: list[list[int]], filled: list[int] | None = None) -> tuple[list[int], int] | None:
        known = resumable(state, torch.tensor(rows), filled or [0] * len(rows))
        return None if known is None else (known[0].state.tolist(), known[1])  # type: ignore[union-attr]

    in_place = resumable(state, torch.tensor([[1, 2, 9], [3, 4, 9], [1, 2, 8]]), [0, 0, 0])
    assert in_place == (state, 2)
    assert places([[3, 4, 5], [1, 2, 5], [3, 4, 6], [3, 4, 7]]) == ([1, 0, 1, 1], 2)
    assert places([[3, 4, 5, 6]]) == ([1], 2)
    assert places([[3, 4]]) is None  # nothing is left to read
    assert places([[3, 5, 5]]) is None
    assert places([[3, 4, 5], [2, 1, 5]]) is None
    assert places([[0, 3, 4, 5]]) is None
    assert places([[0, 3, 4, 5]], [1]) == ([1], 3)


def test_rows_of_several_lengths_are_found() -> None:
    state = read_state(torch.tensor([[9, 1, 2], [5, 3, 4]]), [1, 0])
    known = resumable(state, torch.tensor([[5, 3, 4, 0], [9, 1, 2, 0]]), [0, 1])
    assert known is not None
    assert (known[0].state.tolist(), known[1]) == ([1, 0], 3)  # type: ignore[union-attr]
    assert [row.length for row in known[0].read] == [3, 2]
    # What is read in pieces is what is read at once.
    once = after(torch.tensor([[1, 2, 3]]), [0], None)
    twice = after(torch.tensor([[2, 3]]), [0], after(torch.tensor([[1]]), [0], None))
    assert once[0].key() == twice[0].key()
