"""How many tokens a round drafts: what pays most by the costs, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kmixer.generation import Sampling, Speculation, generate_tokens, speculate
from kmixer.generation.speculative import generate_drafted
from kmixer.generation.tempo import FIRST, LARGEST, PAYS, Costs, MeasuredTempo, expected_tokens, gain_of
from tests.generation.test_speculative import STACK, make

CHEAP = Costs(1.0, {2: 1.0, 17: 1.6})


def after(tempo: MeasuredTempo, acceptance: float, draft: float, rounds: int = 40) -> MeasuredTempo:
    for _ in range(rounds):
        m = tempo.tokens()
        kept = round(acceptance * m)
        tempo.learn(kept, int(kept < m), m, m * draft, 0.0)
    return tempo


@given(st.floats(0.05, 0.95), st.integers(1, LARGEST))
def test_tokens_of_a_round_are_a_geometric_sum(acceptance: float, m: int) -> None:
    expected = (1 - acceptance ** (m + 1)) / (1 - acceptance)
    assert expected_tokens(acceptance, m) == pytest.approx(expected)
    assert gain_of(CHEAP, m, acceptance, 0.1, 0.2) == pytest.approx(expected / (CHEAP.of_read(m + 1) + 0.1 * m + 0.2))
    assert CHEAP.of_read(2) <= CHEAP.of_read(m + 1) <= CHEAP.of_read(17)


# In twentieths: what kmixer bench runs in this process lets numbers that are nearly 0 be 0, which st.floats refuses.
TWENTIETHS = st.integers(0, 20).map(lambda n: n / 20)


@given(TWENTIETHS, TWENTIETHS.map(lambda x: 2 * x))
def test_what_pays_most_is_drafted_and_nothing_where_nothing_pays(acceptance: float, draft: float) -> None:
    tempo = MeasuredTempo(CHEAP)
    assert tempo.tokens() == FIRST and tempo.note is None
    after(tempo, acceptance, draft, rounds=8)
    kept = round(acceptance * FIRST)
    rate = kept / (kept + (kept < FIRST))
    gains = [gain_of(CHEAP, m, rate, draft, 0.0) for m in range(1, LARGEST + 1)]
    if tempo.tokens():
        assert max(gains) >= PAYS - 1e-9 and gains[tempo.tokens() - 1] == pytest.approx(max(gains))
    else:
        assert max(gains) < PAYS + 1e-9
        assert tempo.note is not None and "drafting does not pay here" in tempo.note and "after 8 rounds" in tempo.note


def test_it_follows_what_is_kept() -> None:
    assert after(MeasuredTempo(CHEAP), 1.0, 0.01).tokens() == LARGEST
    often, rarely = (after(MeasuredTempo(CHEAP), a, 0.1).tokens() for a in (0.75, 0.5))
    assert LARGEST > often > rarely > 0
    dear = MeasuredTempo(Costs(1.0, {2: 3.0, 17: 40.0}))
    assert dear.tokens() == 0 and dear.note is not None and "from the start" in dear.note
    after(dear, 1.0, 0.0)
    assert dear.tokens() == 0


def test_the_text_does_not_depend_on_it() -> None:
    model, prompt = make(STACK), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for seed, draft in enumerate(("lookup", "self:1", model)):
        result = speculate(model, draft, prompt, 40, Speculation(tokens="auto"), seed=seed)
        plain = torch.stack(list(generate_tokens(model, prompt, 40, Sampling(), seed=seed)), 1)
        assert torch.equal(result.tokens[:, 3:], plain)
        assert result.plain_tokens_per_second is not None and result.plain_tokens_per_second > 0
        if result.note is not None:
            assert "drafting does not pay here" in result.note


class Stops:
    """Drafts for four rounds, and never again."""

    def __init__(self, tokens: int) -> None:
        self.note, self.plain_seconds, self._tokens, self._rounds = None, None, tokens, 0

    def tokens(self) -> int:
        self._rounds += 1
        return self._tokens if self._rounds <= 4 else 0

    def learn(self, kept: int, refused: int, drafted: int, draft: float, overhead: float) -> None:
        pass


@pytest.mark.parametrize("pace", ["lockstep", "own"])
def test_the_text_goes_on_as_it_was_where_drafting_ends(pace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.generation.speculative.FixedTempo", Stops)
    model, prompt = make(STACK), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for seed in range(3):
        result = speculate(model, "self:1", prompt, 25, Speculation(tokens=3, pace=pace), seed=seed)
        plain = torch.stack(list(generate_tokens(model, prompt, 25, Sampling(), seed=seed)), 1)
        assert torch.equal(result.tokens[:, 3:], plain)
        assert result.drafted == 4 * 3 * 2
        streamed = generate_drafted(model, "self:1", prompt, 25, Speculation(tokens=3, pace=pace), seed=seed)
        assert torch.equal(torch.stack(list(streamed), 1), plain)
