"""What the levels of hierarchical attention have learned: how symmetric their scores are, and their features' shape.

A score matrix splits uniquely into a symmetric part, two positions alike to each other, and an antisymmetric one,
which of two comes first; the two are orthogonal, so their energies add up (Cirrincione 2026, abstract).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kmixer.layers import HierarchicalAttention


@torch.no_grad()
def measure_levels(layer: HierarchicalAttention, x: Tensor) -> dict[str, list[list[float]]]:
    """Measures of each level of a layer on inputs (b, t, d), one list a level.

    Returns:
        "reciprocity", a number a head: the part of the energy (squared Frobenius norm) of the unmasked scores that is
        symmetric; the rest is directional. "smallest_eigenvalue", a number a head: of the symmetric part of
        W_Q W_K^T; where none is negative the scores are a positive semidefinite kernel. "kurtosis", one number:
        Mardia's of the level's rows over that of a normal distribution, 1; left out where there are too few rows.
    """
    found: dict[str, list[list[float]]] = {"reciprocity": [], "smallest_eigenvalue": [], "kurtosis": []}
    rows, _ = layer._levels_of(x, layer.initial_state(len(x)))
    for level, level_rows in enumerate(rows):
        q, k = layer._queries_keys(level, level_rows, 0)
        found["reciprocity"].append(symmetric_part((q @ k.mT).double()))
        projection = layer.query_key[level]
        assert isinstance(projection, nn.Linear)
        queries, keys = projection.weight.double().unflatten(0, (2, layer.heads, layer.head_width))
        form = queries.mT @ keys  # (h, d, d)
        found["smallest_eigenvalue"].append(torch.linalg.eigvalsh((form + form.mT) / 2)[:, 0].tolist())
        flat = level_rows.flatten(0, 1).double()
        found["kurtosis"].append([mardia_kurtosis(flat)] if len(flat) > 2 * flat.shape[1] else [])
    return found


def symmetric_part(scores: Tensor) -> list[float]:
    """|S_sym|^2 / |S|^2 of scores (b, h, n, n), for each head over the batch; 1 for scores that are all zero."""
    symmetric = ((scores + scores.mT) / 2).square().sum((0, 2, 3))
    whole = scores.square().sum((0, 2, 3))
    return torch.where(whole > 0, symmetric / whole, torch.ones_like(whole)).tolist()


def mardia_kurtosis(rows: Tensor) -> float:
    """Mean of ((x - m)^T C^-1 (x - m))^2 over rows (n, d), divided by d (d + 2): 1 for a normal distribution.

    Source: Mardia 1970. Directions in which the rows do not vary are left out.
    """
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / len(rows))
    varied = values > 1e-10 * values[-1]
    d = int(varied.sum())
    if d == 0:
        return 1.0
    whitened = centred @ vectors[:, varied] / values[varied].sqrt()
    return float(whitened.square().sum(1).square().mean() / (d * (d + 2)))
