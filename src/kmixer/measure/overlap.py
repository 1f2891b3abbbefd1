"""How alike the tokens of a sequence become with depth: cosines between the rows of the stream after every block.

With u = h / |h| of the stream h^l (b, n, d):

    overlap(l) = mean over sequences and pairs i != j of u_i . u_j
    m(l)       = |mean_i u_i|^2 = overlap (n - 1) / n + 1 / n              the diagonal included
    across(l)  = mean over pairs of positions of different sequences       the null: what is common to all text
    excess(l)  = overlap - across                                          what the context does
    spread(l)  = standard deviation over the pairs of one sequence

Source: Koubbi, Geshkovski, Rigollet 2026 (arXiv 2604.01978) for m; the null and the groups of positions are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Position i has mixed i tokens where a model is causal: pairs within these, the last without end, counted from 1.
GROUPS = ((1, 8), (9, 64), (65, None))


class Overlap(NamedTuple):
    """Of the streams of one model, for l = 0 to L; (L + 1,), float64."""

    overlap: Tensor  # of one position nan
    with_diagonal: Tensor  # m
    across: Tensor  # of one sequence nan
    at_position: Tensor  # the same over equal positions alone
    spread: Tensor
    by_sequence: Tensor  # overlap of every sequence, (b, L + 1)
    positions: int
    groups: dict[str, Tensor]  # excess of the pairs within a group of positions


def measure_overlap(hidden: Sequence[Tensor]) -> Overlap:
    """Of h^0 to h^L, each (b, n, d)."""
    layers = [_of_layer(h.double()) for h in hidden]
    names = layers[0]["groups"].keys()
    stacked = {key: torch.stack([layer[key] for layer in layers], dim=-1) for key in layers[0] if key != "groups"}
    groups = {name: torch.stack([layer["groups"][name] for layer in layers]) for name in names}
    return Overlap(**stacked, positions=hidden[0].shape[1], groups=groups)


def mean_overlap(measured: Sequence[Overlap]) -> Overlap:
    """Over several models."""
    first = measured[0]
    means: dict[str, Any] = {
        key: torch.stack([getattr(one, key) for one in measured]).mean(0)
        for key, value in first._asdict().items()
        if isinstance(value, Tensor)
    }
    groups = {name: torch.stack([one.groups[name] for one in measured]).mean(0) for name in first.groups}
    return first._replace(**means, groups=groups)


def _of_layer(h: Tensor) -> dict[str, Any]:
    n = h.shape[1]
    u = h / h.norm(dim=-1, keepdim=True)
    cosines = u @ u.mT  # (b, n, n)
    of_pairs = cosines[:, ~torch.eye(n, dtype=torch.bool)]  # (b, n (n - 1))
    means = u.mean(1)  # (b, d)
    across = _of_others(means @ means.T)
    return {
        "overlap": of_pairs.mean(),
        "with_diagonal": means.square().sum(-1).mean(),
        "across": across,
        "at_position": _of_others(torch.einsum("aid,bid->ab", u, u) / n),
        "spread": of_pairs.std(-1, correction=0).mean() if n > 1 else u.new_tensor(math.nan),
        "by_sequence": of_pairs.mean(-1),
        "groups": {name: _excess(u[:, first:last]) for name, first, last in _groups(n)},
    }


def _groups(n: int) -> list[tuple[str, int, int]]:
    """Those that have two positions of n or more: name, first and end, from 0."""
    ends = [(first - 1, min(n, last or n)) for first, last in GROUPS]
    return [(f"{first + 1}-{last}", first, last) for first, last in ends if last - first >= 2]


def _excess(u: Tensor) -> Tensor:
    """Of unit vectors (b, n, d): overlap within the sequences, less that across them where there are several."""
    n = u.shape[1]
    means = u.mean(1)
    within = (means.square().sum(-1).mean() * n - 1) / (n - 1)
    return within - _of_others(means @ means.T).nan_to_num(0.0)


def _of_others(products: Tensor) -> Tensor:
    """The mean off the diagonal; nan of one row."""
    b = len(products)
    return (products.sum() - products.diagonal().sum()) / (b * (b - 1)) if b > 1 else products.new_tensor(math.nan)
