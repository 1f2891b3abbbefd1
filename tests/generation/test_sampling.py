"""The race that draws a token: the same tokens as torch.multinomial draws, from numbers of their own."""

from __future__ import annotations

import pytest
import torch

from kmixer.errors import InputError
from kmixer.generation.sampling import Sampling, one_hot, race_numbers, race_winners

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
