"""The half-steps of Sinkhorn's iteration, by their formula, where rows or columns may be empty."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def potentials_of(exponents: Float[Tensor, "... t s"], dim: int) -> Tensor:
    """-logsumexp over `dim`; 0 where there is nothing but minus infinity."""
    highest, totals = _sums(exponents, dim)
    return -(totals.log() + highest).squeeze(dim)


def rows_to_one(exponents: Float[Tensor, "... t s"]) -> Float[Tensor, "... t s"]:
    """Softmax over rows; a row of nothing but minus infinity has no weights."""
    highest, totals = _sums(exponents, -1)
    return torch.exp(exponents - highest) / totals


def _sums(exponents: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The highest, and the sum of exp(x - highest); 0 and 1 where there is nothing."""
    highest = exponents.amax(dim, keepdim=True).detach()
    highest = highest.masked_fill(highest == -torch.inf, 0)
    totals = torch.exp(exponents - highest).sum(dim, keepdim=True)
    return highest, totals.masked_fill(totals == 0, 1)
