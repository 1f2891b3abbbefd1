"""Sources of text: contexts that all have, the null of a sample, and what splits into halves correct."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.measure.ecology import divergences, losses_of
from kmixer.measure.ecology_models import model_followers
from kmixer.measure.ecology_sources import (
    Context,
    Ecology,
    followers_of,
    shared_contexts,
    standard_error,
)
from kmixer.models import CausalLM, TransformerConfig

PAIR = np.array([[1, 2]])


def drawn(n: int, v: int, seed: int, law: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.ones(v) if law is None else law, n, replacement=True, generator=generator)


def ecology_of(
    tokens: list[Tensor], v: int, context: str, *, blocks: int = 200, splits: int = 8, min_count: int = 5
) -> Ecology:
    shared = shared_contexts(tokens, v, Context.parse(context), min_count)
    followers, outcomes = followers_of(tokens, shared, blocks)
    return Ecology(followers, shared.marginal, outcomes, blocks, splits, seed=0)


@given(st.integers(0, 3), st.integers(1, 12), st.integers(0, 100))
def test_contexts_are_the_last_tokens_and_their_frequencies_sum_to_1(length: int, least: int, seed: int) -> None:
    tokens = [drawn(400, 4, seed + i) for i in range(2)]
    context = Context.parse(f"suffix:{length}" if length else "none")
    counts: list[dict[tuple[int, ...], int]] = []
    for x in tokens:
        counts.append({})
        for t in range(length, len(x)):
            key = tuple(x[t - length : t].tolist())
            counts[-1][key] = counts[-1].get(key, 0) + 1
    kept = {key for key in counts[0] if all(of_source.get(key, 0) >= least for of_source in counts)}
    if not kept:
        with pytest.raises(InputError, match="no context occurs"):
            shared_contexts(tokens, 4, context, least)
        return
    shared = shared_contexts(tokens, 4, context, least)
    assert len(shared.marginal) == len(kept)
    assert float(shared.marginal.sum()) == pytest.approx(1, abs=1e-12)
    seen: dict[int, tuple[int, ...]] = {}
    for x, at, coverage in zip(tokens, shared.at, shared.coverage, strict=True):
        for t, number in enumerate(at.tolist()):
            key = tuple(x[max(0, t - length) : t].tolist())
            assert (number >= 0) == (t >= length and key in kept)
            if number >= 0:
                assert seen.setdefault(number, key) == key
        assert coverage == pytest.approx(float((at >= 0).sum()) / (len(x) - length))


def test_lengths_are_places_of_a_chunk() -> None:
    tokens = [torch.arange(30).repeat(20), torch.arange(30).repeat(20)]
    shared = shared_contexts(tokens, 30, Context.parse("length:3,5,8"), 20)
    followers, v = followers_of(tokens, shared, 4)
    assert (v, len(shared.marginal)) == (3, 3)
    assert tokens[0][shared.at[0] >= 0].unique().tolist() == [3, 5, 8]
    assert [of_source.contexts.bincount().tolist() for of_source in followers] == [[20, 20, 20]] * 2


@pytest.mark.parametrize(
    "text", ["", "suffix", "suffix:0", "suffix:-1", "suffix:1,2", "length:30", "length:", "last:2"]
)
def test_other_contexts_are_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"--context: got .*; allowed: none, suffix:2"):
        Context.parse(text)


def test_the_null_of_a_sample_is_that_of_the_plug_in() -> None:
    """(v - 1) / (4 n) of two samples of n tokens each; n is here half of a source."""
    n, v = 20_000, 30
    ecology = ecology_of([drawn(n, v, 1), drawn(n, v, 2)], v, "none", splits=40)
    expected = (v - 1) / (4 * n / 2)
    assert float(ecology.null.mean()) == pytest.approx(expected, rel=0.2)
    assert divergences(ecology.losses, ecology.prior, PAIR)[0] == pytest.approx(expected, rel=0.35)
    corrected = divergences(ecology.corrected(), ecology.prior, PAIR)[0]
    assert abs(corrected) < 0.35 * expected


def test_correcting_gives_the_distance_of_the_laws() -> None:
    v, n = 20, 20_000
    laws = torch.softmax(0.3 * torch.randn(3, v, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)
    prior = np.full(3, 1 / 3)
    truth = losses_of(laws[:, None], torch.ones(1), prior)
    ecology = ecology_of([drawn(n, v, i, law) for i, law in enumerate(laws)], v, "none")
    pairs = np.array([[1, 2], [1, 4], [2, 4], [3, 4]])
    exact, raw = divergences(truth, prior, pairs), divergences(ecology.losses, prior, pairs)
    corrected = divergences(ecology.corrected(), prior, pairs)
    masks = np.array([1, 2, 3])
    error = standard_error(ecology.left_out(masks) @ np.array([-1.0, -1.0, 1.0])) * 3 / 2
    assert 0 < error < 0.2 * exact[0]
    assert (np.abs(corrected - exact) < 4 * error).all()
    assert (raw > corrected).all()
    assert (ecology.losses(np.array([7])) - ecology.losses(np.array([1, 2, 4])).sum()) > ecology.largest_noise(
        np.array([7])
    )


def test_a_text_that_dwells_on_subjects_has_a_larger_null() -> None:
    """Blocks of one law each: halves differ by which laws they got, which a sample's null does not know."""
    n, v = 20_000, 20
    generator = torch.Generator().manual_seed(0)
    laws = torch.softmax(torch.randn(100, v, generator=generator), -1)
    tokens = [torch.cat([drawn(n // 100, v, 100 * i + j, law) for j, law in enumerate(laws)]) for i in range(2)]
    ecology = ecology_of(tokens, v, "none", blocks=100)
    assert float(ecology.null.mean()) > 2 * (v - 1) / (4 * n / 2)


def test_halves_hold_all_sources_and_contexts_that_occur_in_both() -> None:
    ecology = ecology_of([drawn(3000, 6, i) for i in range(3)], 6, "suffix:2", blocks=10, splits=3)
    for half in ecology.halves:
        assert half.laws.shape[:2] == (2, 3)
        assert float(half.marginal.sum()) == pytest.approx(1)
        torch.testing.assert_close(
            half.laws.sum(-1)[..., half.marginal > 0], torch.ones(2, 3, 36).double()[..., half.marginal > 0]
        )
    assert ecology.coverage == pytest.approx(1)


def test_what_would_not_fit_into_memory_is_one_line() -> None:
    tokens = [drawn(40_000, 200, i) for i in range(2)]
    with pytest.raises(InputError, match="raise --min-count"):
        ecology_of(tokens, 200, "suffix:2", min_count=1, splits=200)


def test_laws_of_a_model_are_those_at_the_positions_of_contexts() -> None:
    torch.manual_seed(0)
    model = CausalLM(TransformerConfig.parse({"width": 16, "layers": 1, "heads": 2}, source="test"), 5).eval()
    tokens = [drawn(640, 5, i) for i in range(2)]
    shared = shared_contexts(tokens, 5, Context.parse("suffix:1"), 1)
    seconds: list[float] = []
    followers = model_followers(model, tokens, shared, 8, 32, seconds.append)
    assert len(seconds) == 1
    assert [len(of_source.contexts) for of_source in followers] == [20 * 16] * 2
    logits = model(tokens[0][None, 32:64]).logits
    assert logits is not None
    at = followers[0].contexts[16:32]  # of the second window
    torch.testing.assert_close(followers[0].outcomes[16:32], logits[0, 15:31].softmax(-1))
    assert at.tolist() == shared.at[0][48:64].tolist()
    assert followers[0].blocks[16:32].tolist() == [position * 8 // 640 for position in range(48, 64)]
    ecology = Ecology(followers, shared.marginal, 5, 8, 4, seed=0)
    torch.testing.assert_close(ecology.total.sum(-1).sum(-1), torch.full((2,), 320.0, dtype=torch.float64))
    with pytest.raises(InputError, match="--window: got 641; allowed: 2 to 640"):
        model_followers(model, tokens, shared, 8, 641)
