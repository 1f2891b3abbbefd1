"""Batches of tokens."""

from __future__ import annotations

import torch

from kmixer.data.batches import random_windows


def test_targets_follow_their_inputs() -> None:
    text = torch.arange(200, dtype=torch.int16)
    inputs, targets = random_windows(text, 20, 64, torch.Generator().manual_seed(1))
    assert torch.equal(targets, inputs + 1)
    assert (int(inputs.min()), int(targets.max())) < (20, 200)
