"""The race that draws a token: the same tokens as torch.multinomial draws, from numbers of their own."""

from __future__ import annotations

import itertools

import pytest
import torch

from kmixer import native
from kmixer.errors import InputError
from kmixer.generation.sampling import (
    Sampling,
    as_settings,
    draw_numbers,
    draws_are_known,
    exponential,
    one_hot,
    race,
    race_numbers,
    race_winners,
)

compiled = pytest.mark.skipif(native.kernels() is None, reason="the compiled kernels were not built")

SETTINGS = [Sampling(0.8), Sampling(1.0, top_k=5), Sampling(1.2, top_p=0.7), Sampling(0.6, top_k=20, top_p=0.9)]


@pytest.mark.parametrize("shape", [(1, 65), (4, 7), (3, 300)])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_seeds_keep_the_texts_that_multinomial_gave(shape: tuple[int, int], sampling: Sampling) -> None:
    for seed in range(300):
        ours, torchs = (torch.Generator().manual_seed(seed) for _ in range(2))
        logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            drawn = torch.multinomial(sampling.probabilities(logits), 1, generator=torchs)[:, 0]
            assert torch.equal(sampling(logits, ours), drawn)
        assert torch.equal(ours.get_state(), torchs.get_state())


def test_numbers_may_be_drawn_before_they_are_used() -> None:
    sampling = Sampling(0.7, top_k=6)
    positions = [torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    generator = torch.Generator().manual_seed(5)
    plain = [sampling(logits, generator) for logits in positions]
    generator.manual_seed(5)
    numbers = [race_numbers(torch.empty(2, 9, dtype=torch.float64), generator) for _ in positions]
    raced = [race_winners(sampling.rows(logits), drawn) for logits, drawn in zip(positions, numbers, strict=True)]
    assert torch.equal(torch.stack(raced), torch.stack(plain))


def test_what_a_race_gives_does_not_depend_on_the_sum() -> None:
    rows = torch.rand(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    numbers = race_numbers(rows, torch.Generator().manual_seed(2))
    assert torch.equal(race_winners(rows, numbers), race_winners(rows / 1024, numbers))


def test_rows_at_temperature_zero_are_the_first_likeliest_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, -torch.inf, 1.0]])
    rows = Sampling(0.0).rows(logits)
    assert torch.equal(rows, one_hot(torch.tensor([1, 0]), 3))
    assert torch.equal(rows.argmax(-1), Sampling(0.0)(logits))
    assert torch.equal(Sampling(0.5).rows(logits), Sampling(0.5).probabilities(logits))
    with pytest.raises(InputError, match="logits: got NaN or infinity"):
        Sampling(0.0).rows(torch.full((1, 3), torch.nan))


@compiled
@pytest.mark.parametrize("sampling", [Sampling(0.0), *SETTINGS, Sampling(1e-3), Sampling(50.0, top_k=1)], ids=str)
def test_a_compiled_race_is_the_definition(sampling: Sampling) -> None:
    for seed, shape in itertools.product(range(40), [(1, 65), (5, 3), (2, 700)]):
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(shape, generator=generator)
        numbers, tokens = draw_numbers(logits.shape, generator), torch.empty(shape[0], dtype=torch.int64)
        race(logits, numbers, torch.tensor([as_settings(sampling)], dtype=torch.float64), tokens)
        expected = race_winners(sampling.rows(logits), exponential(numbers))
        assert torch.equal(tokens, expected)
        if sampling.temperature:
            assert torch.equal(sampling.by_definition(logits, numbers), expected)


@compiled
def test_a_compiled_race_leaves_to_the_definition_what_rounding_decides() -> None:
    logits = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [2.0, 1.0, 0.0, -1.0], [torch.nan, 1.0, 1.0, 1.0], [torch.inf, 0, 0, 0]]
    )
    settings = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.float64)
    tokens = torch.empty(4, dtype=torch.int64)
    race(logits, draw_numbers(logits.shape), settings, tokens)
    assert tokens.tolist() == [-2, 0, -1, -1]
    settings[:2] = torch.tensor([1.0, 0.0, 0.5])
    race(torch.zeros(4, 4), draw_numbers(logits.shape), settings, tokens)
    assert tokens[:2].tolist() == [-2, -2]
    for seed in range(20):  # what the call does with them is what multinomial does
        ours, torchs = (torch.Generator().manual_seed(seed) for _ in range(2))
        for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=1.0)):
            drawn = torch.multinomial(sampling.probabilities(torch.zeros(2, 4)), 1, generator=torchs)[:, 0]
            assert torch.equal(sampling(torch.zeros(2, 4), ours), drawn)


def test_numbers_of_the_definition_are_torchs() -> None:
    assert draws_are_known()
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    ahead = draw_numbers(torch.Size([4, 2, 9]), first)
    assert torch.equal(ahead, torch.stack([draw_numbers(torch.Size([2, 9]), second) for _ in range(4)]))


def test_logits_that_are_no_distribution_are_named() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for sampling in (Sampling(0.0), Sampling(1.0), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
            logits = torch.full((2, 3), bad)
            logits[0] = 0
            with pytest.raises(InputError, match=r"^logits: got NaN or infinity"):
                sampling(logits)
