"""The motif-and-copy task: corrupted sequences, to be restored from what repeats in them.

Every sequence tiles a random motif, with one span copied from elsewhere in it. Some positions are
masked or replaced, and one burst of neighbours is hit harder. The loss counts corrupted positions.

Source: Koneko's denoising benchmark; its lengths and rates are the defaults here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Denoising:
    """The task; ranges are inclusive. The token `vocabulary` is the mask."""

    length: int = 64
    vocabulary: int = 16
    period: tuple[int, int] = (4, 16)
    copied: tuple[int, int] = (4, 10)
    masked: float = 0.10
    replaced: float = 0.05
    burst: tuple[int, int] = (4, 8)
    masked_in_burst: float = 0.7


class Samples(NamedTuple):
    """Corrupted tokens, what they were, and where they were corrupted; each (n, t)."""

    inputs: Int[Tensor, "n t"]
    targets: Int[Tensor, "n t"]
    corrupted: Bool[Tensor, "n t"]


def make_samples(task: Denoising, count: int, seed: int) -> Samples:
    """`count` sequences, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def between(bounds: tuple[int, int]) -> Tensor:
        """A whole number per sequence (n, 1)."""
        return torch.randint(bounds[0], bounds[1] + 1, (count, 1), generator=generator)

    def start_of(span: Tensor) -> Tensor:
        """Where a span of this length begins (n, 1)."""
        return (torch.rand(count, 1, generator=generator) * (task.length - span + 1)).long()

    def uniform() -> Tensor:
        return torch.rand(count, task.length, generator=generator)

    position = torch.arange(task.length)[None]
    motif = torch.randint(task.vocabulary, (count, task.period[1]), generator=generator)
    targets = motif.gather(1, position % between(task.period))

    span = between(task.copied)
    source, target = start_of(span), start_of(span)
    inside = (position >= target) & (position < target + span)
    targets = torch.where(inside, targets.gather(1, (position - target + source).clamp(0, task.length - 1)), targets)

    kind = uniform()
    masked, replaced = kind < task.masked, (kind >= task.masked) & (kind < task.masked + task.replaced)
    span = between(task.burst)
    start = start_of(span)
    burst = (position >= start) & (position < start + span)
    masked_there = uniform() < task.masked_in_burst
    masked = torch.where(burst, masked_there, masked)
    replaced = torch.where(burst, ~masked_there, replaced)
    random = torch.randint(task.vocabulary, targets.shape, generator=generator)
    inputs = torch.where(masked, task.vocabulary, torch.where(replaced, random, targets))
    return Samples(inputs, targets, masked | replaced)
