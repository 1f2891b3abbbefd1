"""Batches of tokens: what noise changes, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from kmixer.data.batches import random_windows, with_noise

TEXT = torch.tensor([0, 0, 0, 1], dtype=torch.uint8).repeat(5000)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_noise_replaces_a_part_of_the_inputs_by_tokens_as_frequent_as_in_the_text() -> None:
    inputs = torch.full((100, 500), 7)
    noised = with_noise(inputs, TEXT, 0.2, generator())
    replaced = noised != 7
    assert float(replaced.double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((noised[replaced] == 1).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(with_noise(inputs, TEXT, 0.2, generator()), noised)
    assert torch.equal(with_noise(inputs, TEXT, 0.0, generator()), inputs)


def test_targets_follow_their_inputs() -> None:
    text = torch.arange(200, dtype=torch.int16)
    inputs, targets = random_windows(text, 20, 8, generator())
    assert torch.equal(targets, inputs + 1)
    assert int(targets.max()) < 200
