"""The motif-and-copy task is what it says."""

from __future__ import annotations

import torch

from kmixer.data.denoising import Denoising, make_samples

TASK = Denoising()


def test_sequences_repeat_but_for_the_copied_span() -> None:
    samples = make_samples(TASK, 500, seed=0)
    targets = samples.targets
    assert targets.shape == (500, 64)
    assert targets.min() == 0
    assert targets.max() == 15
    # Differences at the right period: at most the copied span and its echo one period later.
    fewest = torch.stack([(targets[:, p:] != targets[:, :-p]).sum(1) for p in range(4, 17)]).min(0).values
    assert fewest.max() <= 2 * TASK.copied[1]
    assert (fewest > 0).double().mean() > 0.5


def test_corruption_has_its_rates_and_touches_nothing_else() -> None:
    samples = make_samples(TASK, 2000, seed=1)
    changed = samples.inputs != samples.targets
    assert not (changed & ~samples.corrupted).any()
    share = samples.corrupted.double().mean().item()
    # 15 % of the positions outside a burst of 6 on average, and all inside.
    assert abs(share - (0.15 * (58 / 64) + 6 / 64)) < 0.01
    masked = (samples.inputs == TASK.vocabulary).double().mean().item()
    assert abs(masked - (0.10 * (58 / 64) + 0.7 * 6 / 64)) < 0.01


def test_a_seed_gives_the_same_and_another_other_samples() -> None:
    first, same, other = (make_samples(TASK, 10, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first.targets, other.targets)
