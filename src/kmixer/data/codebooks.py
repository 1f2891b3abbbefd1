"""Codebooks of numbers: values become tokens, those of the nearest of K centres, and noise is added before that.

Values are scaled to [0, 1] by the range of those that the codebook was made from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Lloyd's steps end where no centre moves, or here.
MOST_STEPS = 100
# Of the density that k-means begins with.
BINS = 1024
# Deviation of noise, as a part of the range.
NOISE = 0.1


class Codebook(NamedTuple):
    """The range that values are scaled by, and the centres (K,) of the codes, rising, in scaled values."""

    lowest: float
    highest: float
    centres: Tensor

    def scaled(self, values: Tensor) -> Tensor:
        """To [0, 1], those outside of the range a little beyond."""
        return (values - self.lowest) / (self.highest - self.lowest)

    def encode(self, scaled: Tensor) -> Tensor:
        """The code of the nearest centre, int64."""
        return torch.bucketize(scaled.contiguous(), (self.centres[1:] + self.centres[:-1]) / 2)


def uniform_codebook(values: Tensor, codes: int) -> Codebook:
    """Centres of equal bins of the range of these values."""
    return Codebook(float(values.min()), float(values.max()), (torch.arange(codes, dtype=torch.float64) + 0.5) / codes)


def learned_codebook(values: Tensor, codes: int) -> Codebook:
    """Centres by Lloyd's k-means of these values: in one dimension, and without chance.

    It begins where many codes would end: as dense as the cube root of the values' density (Panter and Dite 1951).
    """
    begun = uniform_codebook(values, codes)
    rising = begun.scaled(values.double().flatten()).sort().values
    density = torch.histc(rising, BINS, 0, 1).pow(1 / 3).cumsum(0)
    shares = torch.cat([density.new_zeros(1), density / density[-1]])
    centres = torch.from_numpy(np.interp(begun.centres, shares, np.linspace(0, 1, BINS + 1)))
    sums = torch.cat([rising.new_zeros(1), rising.cumsum(0)])
    for _ in range(MOST_STEPS):
        inner = torch.searchsorted(rising, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(rising)])])
        counts = ends.diff()
        moved = torch.where(counts > 0, sums[ends].diff() / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return begun._replace(centres=centres)


class Noise(NamedTuple):
    """Draws for positions (n, t), the same for every rate: what a low rate changes, a higher one changes alike."""

    chance: Tensor  # uniform
    offset: Tensor  # normal

    def added(self, scaled: Tensor, rate: float) -> Tensor:
        """Scaled values with noise of deviation NOISE at a share of the positions."""
        return torch.where(self.chance < rate, scaled + NOISE * self.offset, scaled)


def draw_noise(shape: tuple[int, ...], seed: int) -> Noise:
    """The same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(shape, generator=generator, dtype=torch.float64)
    return Noise(chance, torch.randn(shape, generator=generator, dtype=torch.float64))
