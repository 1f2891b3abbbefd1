"""What the copy memory costs: inputs are what their names say, checked before they are timed, ratios per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kmixer.bench import copy
from kmixer.bench.copy import CopySizes, bench_copy
from kmixer.errors import InputError
from kmixer.ops import suffix_matches

SIZES = CopySizes(windows=3, window=40, row=90, hard=100, prompt=9, steps=3)


def test_ratios_are_those_of_the_times_a_token(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
        assert repeats == 2
        return {name: {"seconds": 2.0 + i, "relative": (2.0 + i) / 2.0} for i, name in enumerate(calls)}

    monkeypatch.setattr(copy, "time_in_turn", timed)
    rows = {row["what"]: row for row in copy.bench_matches(text, SIZES, 2)}
    assert rows["text"]["token_relative_to_text"] == 1
    for row in rows.values():
        assert row["section"] == "matches"
        assert row["tokens_per_second"] == row["rows"] * row["t"] / row["seconds"]
        slower = rows["text"]["tokens_per_second"] / row["tokens_per_second"]
        assert row["token_relative_to_text"] == pytest.approx(slower)
    shape = {name: (row["rows"], row["t"]) for name, row in rows.items()}
    assert shape["text, windows"] == (3, 40)
    assert shape["text, one row"] == shape["words, one row"] == (1, 90)
    assert {shape[name] for name in copy._hard_inputs(text, 100)} == {(1, 100)}


def test_hard_inputs_are_what_they_are_called(text: str) -> None:
    inputs = {name: tokens[0].tolist() for name, tokens in copy._hard_inputs(text, 250).items()}
    assert inputs["two tokens in turn"] == [0, 1] * 125
    fibonacci = inputs["Fibonacci word"]
    grown = [x for token in fibonacci for x in ([0, 1] if token == 0 else [0])]
    assert grown[:250] == fibonacci  # what stays as it is where 0 becomes 01 and 1 becomes 0
    assert len(set(inputs["random of 2"])) == 2
    assert inputs["text 10 times"] == inputs["text 10 times"][:25] * 10
    cycle = copy._de_bruijn(256)
    assert len({tuple((cycle + cycle)[i : i + 8]) for i in range(256)}) == 256
    assert copy._de_bruijn(250) == cycle[:250]


def test_matches_that_are_wrong_are_not_timed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tokens: Tensor, *arguments: Any, backend: Any = "auto") -> Any:
        copied, lengths, state = suffix_matches(tokens, *arguments, backend=backend)
        return copied, lengths + (backend == "auto") * (torch.arange(tokens.shape[1]) == 70), state

    monkeypatch.setattr(copy, "suffix_matches", wrong)
    monkeypatch.setattr(copy, "time_in_turn", lambda calls, repeats: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="suffix_matches is wrong on text: not timed"):
        bench_copy(text, SIZES, 1)


def test_a_text_that_is_too_short() -> None:
    needed = 64 * (9 + 3)
    with pytest.raises(InputError, match=rf"got a text of {needed - 1} characters; allowed: {needed} or more"):
        bench_copy("a" * (needed - 1), SIZES, 1)
