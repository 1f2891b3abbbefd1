"""How well a state can be read from hidden vectors: R^2 of a linear map, and of the mean of the nearest vectors.

The first half of the sequences is fitted, the second measured. A linear map favours models whose head is linear in the
value; the nearest neighbours do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10
# Of all positions, spread evenly: vectors that are looked through, and vectors that look.
KEPT, ASKING = 8192, 2048
QUERIES_AT_ONCE = 256


def decode(hidden: Tensor, states: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """R^2 of every state variable (n, t) from hidden (n, t, d): "linear" and "nearest"."""
    if not states:
        return {}
    half = len(hidden) // 2
    truth = torch.stack([*states.values()], dim=-1).double()
    h, k = hidden.double(), truth.shape[-1]
    fitted, measured = (h[:half].flatten(0, 1), h[half:].flatten(0, 1))
    known, asked = truth[:half].reshape(-1, k), truth[half:].reshape(-1, k)
    linear = explained(asked, _linear(fitted, known, measured))
    kept, asking = _spread(len(fitted), KEPT), _spread(len(measured), ASKING)
    nearest = explained(asked[asking], _nearest(fitted[kept], known[kept], measured[asking]))
    return {name: {"linear": linear[i], "nearest": nearest[i]} for i, name in enumerate(states)}


def explained(truth: Tensor, guess: Tensor) -> list[float]:
    """R^2 of every column: 1 - squared error over squared deviation from the mean; below 0 for worse than the mean."""
    return (1 - (truth - guess).square().sum(0) / (truth - truth.mean(0)).square().sum(0)).tolist()


def _linear(fitted: Tensor, known: Tensor, asked: Tensor) -> Tensor:
    """Least squares with a constant; directions that do not vary are left out."""
    mean, known_mean = fitted.mean(0), known.mean(0)
    return (asked - mean) @ (torch.linalg.pinv(fitted - mean) @ (known - known_mean)) + known_mean


def _nearest(fitted: Tensor, known: Tensor, asked: Tensor) -> Tensor:
    number = min(NEIGHBOURS, len(fitted))
    guesses = [
        known[torch.cdist(some, fitted).topk(number, largest=False).indices].mean(1)
        for some in asked.split(QUERIES_AT_ONCE)
    ]
    return torch.cat(guesses)


def _spread(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).long()
